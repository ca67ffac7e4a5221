//! The dropout mask on the GPU: one launch.

use kernels_gpu::ground::constants::Constants;
use kernels_gpu::params::{DropoutMaskParams, ROW_KERNEL_THREADS};
use kernels_gpu::variants::DROPOUT_MASK;

use super::driver::Extent;
use super::stream::Order;
use super::{Cuda, DeviceSliceMut, RawStream};
use crate::dropout::{Dropout, MaskShape};
use crate::error::{Operand, Result};
use crate::operands::check_memory_of_mask;
use crate::problem::Problem;

/// Maximum number of CTAs for each SM. A thread goes on to other parts of the mask.
const CTAS_PER_SM: u64 = 8;

impl Cuda {
    /// Writes a dropout mask to a raw device address on the caller's stream: u8, 1 for kept weights and 0 for others,
    /// (batch, heads_q, seqlen_q, seqlen_k), contiguous. After its first use it neither allocates nor waits, and may be
    /// captured into a graph.
    ///
    /// # Errors
    /// Errors of [`dropout_mask_into`](crate::dropout_mask_into), before anything is launched, but for the length of
    /// the memory; [`Error::NullPointer`](crate::Error::NullPointer);
    /// [`Error::SpanTooLarge`](crate::Error::SpanTooLarge); [`Error::Driver`](crate::Error::Driver).
    ///
    /// # Safety
    /// Until the launch has run, the whole mask is valid at the address on this device, and nothing else accesses it.
    /// `stream` is a stream of this device's primary context, or null.
    pub unsafe fn dropout_mask_raw(
        &self,
        problem: &Problem,
        dropout: &Dropout,
        kept: u64,
        stream: RawStream,
    ) -> Result<()> {
        let shape = MaskShape::of(problem)?;
        dropout.validate()?;
        check_memory_of_mask(kept, shape.len)?;
        let _entered = self.device().enter()?;
        // SAFETY: validated; the caller's promise.
        unsafe { self.launch_dropout_mask(&shape, dropout, kept, stream) }
    }

    /// Checks everything and launches the kernel on the backend's stream.
    pub(super) fn write_dropout_mask(
        &self,
        problem: &Problem,
        dropout: &Dropout,
        kept: DeviceSliceMut<'_, u8>,
    ) -> Result<()> {
        let shape = MaskShape::of(problem)?;
        dropout.validate()?;
        shape.check_len(kept.len)?;
        check_memory_of_mask(kept.address, shape.len)?;
        let mut order = Order::on(&self.stream);
        order.add(Operand::DropoutMask, kept.home)?;
        let _entered = self.device().enter()?;
        // SAFETY: the slice stands for valid memory of this device with the mask's number of elements. Later uses of
        // it come after the launch in its stream, by `Order`.
        order.run(|| unsafe { self.launch_dropout_mask(&shape, dropout, kept.address, self.stream()) })
    }

    /// Launches the kernel. The device's context is current.
    ///
    /// # Safety
    /// The requirements of [`Cuda::dropout_mask_raw`], with arguments that were validated.
    unsafe fn launch_dropout_mask(
        &self,
        shape: &MaskShape,
        dropout: &Dropout,
        kept: u64,
        stream: RawStream,
    ) -> Result<()> {
        if shape.len == 0 {
            return Ok(());
        }
        let [queries, keys] = shape.lens;
        let heads = (shape.len / (queries as u128 * keys as u128)) as u64;
        let params = DropoutMaskParams::new(kept, heads, [queries as u32, keys as u32], dropout.of_mask());
        let function = self.kernel(DROPOUT_MASK, Constants::NONE, 0, self.specialise)?.function;
        let ctas = params.parts.div_ceil(u64::from(ROW_KERNEL_THREADS));
        let grid = ctas.min(CTAS_PER_SM * u64::from(self.sm_count())) as u32;
        let extent = Extent { grid, block: ROW_KERNEL_THREADS, shared_memory: 0 };
        // SAFETY: these are the kernel's parameters, its context is current, and the caller promises the rest.
        unsafe { function.launch(extent, stream, &params) }
    }
}
