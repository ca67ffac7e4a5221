//! A GPU, for builds with the feature `cuda`.

use ferroflash::{
    BackwardPlan, Cuda, Dropout, Plan, Problem, RawBackward, RawForward, RawTotalAttention, Result, TotalPlan,
    cuda::KERNELS,
};

/// A GPU that stays open until the process ends.
#[derive(Clone, Copy)]
pub struct Gpu(&'static Cuda);

/// Each pass is enqueued on a stream, given as the driver's handle. The calls have the requirements of the library's
/// raw calls.
#[allow(unsafe_code)]
impl Gpu {
    pub fn open(ordinal: u32) -> Result<Self> {
        Cuda::for_ordinal(ordinal).map(Gpu)
    }

    pub fn sm_count(self) -> u32 {
        self.0.sm_count()
    }

    /// # Safety
    /// The requirements of [`Cuda::forward_raw`].
    pub unsafe fn forward(self, plan: &Plan, args: &RawForward, stream: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.0.forward_raw(plan, args, stream as *mut _) }
    }

    /// # Safety
    /// The requirements of [`Cuda::backward_raw`].
    pub unsafe fn backward(self, plan: &BackwardPlan, args: &RawBackward, stream: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.0.backward_raw(plan, args, stream as *mut _) }
    }

    /// # Safety
    /// The requirements of [`Cuda::total_attention_raw`].
    pub unsafe fn total_attention(self, plan: &TotalPlan, args: &RawTotalAttention, stream: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.0.total_attention_raw(plan, args, stream as *mut _) }
    }

    /// # Safety
    /// The requirements of [`Cuda::dropout_mask_raw`].
    pub unsafe fn dropout_mask(self, problem: &Problem, dropout: &Dropout, kept: u64, stream: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.0.dropout_mask_raw(problem, dropout, kept, stream as *mut _) }
    }
}

/// Number of GPUs that the driver shows.
pub fn device_count() -> u32 {
    Cuda::device_count()
}

/// Number of kernels in the build.
pub fn kernel_count() -> usize {
    KERNELS.len()
}
