//! cust's contexts, streams and device slices, for a program that uses Rust-CUDA's host half.
//!
//! cust frees memory regardless of streams. So a view of its memory waits, when it is dropped, for everything that was
//! launched with it. cust does not know the 16-bit floats of the crate `half` 2, so they are `u16` there. A view
//! reinterprets them as elements of the same size.
//!
//! ```no_run
//! use cust::memory::{CopyDestination, DeviceBuffer};
//! use ferroflash::{Attention, Cuda, Dtype, Inputs, Problem, Tensor, bf16};
//!
//! let problem =
//!     Problem { batch: 1, heads_q: 8, heads_kv: 8, seqlen_q: 512, seqlen_k: 512, head_dim: 64, dtype: Dtype::Bf16 };
//! let context = cust::quick_init()?;
//! let x = DeviceBuffer::from_slice(&vec![bf16::ONE.to_bits(); 8 * 512 * 64])?;
//! let mut o = DeviceBuffer::<u16>::zeroed(8 * 512 * 64)?;
//!
//! let cuda = Cuda::from_cust(&context)?;
//! let (x, mut out) = (cuda.read_cust(&x)?, cuda.write_cust(&mut o)?);
//! let x = Tensor::bhsd(x.as_slice(), problem.q_shape());
//! let out = Tensor::bhsd(out.as_slice_mut(), problem.q_shape());
//! Attention::new(problem).forward_into::<_, bf16>(&cuda, Inputs::new(x, x, x), out, None)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::marker::PhantomData;
use std::sync::Arc;

use bytemuck::Pod;
use cust::context::Context;
use cust::memory::{DeviceCopy, DeviceSlice as CustSlice};
use cust::stream::Stream as CustStream;

use super::driver::check;
use super::stream::Stream;
use super::{Cuda, DeviceSlice, DeviceSliceMut, sys};
use crate::error::{Error, Operand, Result};

impl Cuda {
    /// Returns the backend for the device of a context of cust's, which must be the primary one. Safe calls run on the
    /// default stream.
    ///
    /// # Errors
    /// [`Error::WrongContext`] for a context that is not the device's primary one; errors of [`Cuda::new`].
    pub fn from_cust(context: &Context) -> Result<Self> {
        let (calls, handle) = (sys::calls()?, context.as_raw().cast());
        let mut device = 0;
        // SAFETY: cust's context is live, and is current only between the two calls.
        unsafe {
            check(calls, "cuCtxPushCurrent", (calls.cuCtxPushCurrent_v2)(handle))?;
            let code = (calls.cuCtxGetDevice)(&mut device);
            let mut popped = std::ptr::null_mut();
            check(calls, "cuCtxPopCurrent", (calls.cuCtxPopCurrent_v2)(&mut popped))?;
            check(calls, "cuCtxGetDevice", code)?;
        }
        let cuda = Cuda::new(device.unsigned_abs())?;
        if cuda.device().context.handle() != handle {
            return Err(Error::WrongContext { device: cuda.ordinal() });
        }
        Ok(cuda)
    }

    /// Returns the same device with safe calls on a stream of cust's. The stream is kept for as long as the backend and
    /// its buffers are.
    ///
    /// # Errors
    /// [`Error::WrongContext`] for a stream of another device.
    pub fn on_cust_stream(&self, stream: Arc<CustStream>) -> Result<Self> {
        // SAFETY: cust's stream is live, and is kept by the new value.
        let made = unsafe { Stream::caller(self.stream.device.clone(), stream.as_inner().cast()) }?;
        Ok(Cuda { stream: Arc::new(made.kept_by(Box::new(stream))), ..*self })
    }

    /// Returns memory of cust's for reading, as elements of the same size.
    ///
    /// # Errors
    /// [`Error::WrongDevice`], [`Error::Driver`].
    pub fn read_cust<'a, T: Pod, C: Pod + DeviceCopy>(&'a self, memory: &'a CustSlice<C>) -> Result<CustView<'a, T>> {
        const { assert!(size_of::<T>() == size_of::<C>(), "a view's elements have the size of cust's") };
        let (address, len) = (memory.as_device_ptr().as_raw(), memory.len());
        self.check_device_of(address, len)?;
        Ok(CustView { wait: WaitOnDrop(self), address, len, elements: PhantomData })
    }

    /// Returns memory of cust's for writing, as elements of the same size.
    ///
    /// # Errors
    /// [`Error::WrongDevice`], [`Error::Driver`].
    pub fn write_cust<'a, T: Pod, C: Pod + DeviceCopy>(
        &'a self,
        memory: &'a mut CustSlice<C>,
    ) -> Result<CustViewMut<'a, T>> {
        const { assert!(size_of::<T>() == size_of::<C>(), "a view's elements have the size of cust's") };
        let (address, len) = (memory.as_device_ptr().as_raw(), memory.len());
        self.check_device_of(address, len)?;
        Ok(CustViewMut { wait: WaitOnDrop(self), address, len, elements: PhantomData })
    }

    /// Checks that an address belongs to this device, by asking the driver.
    fn check_device_of(&self, address: u64, len: usize) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let (calls, mut found) = (self.device().calls(), 0i32);
        // SAFETY: this attribute is an `int`.
        let code =
            unsafe { (calls.cuPointerGetAttribute)((&raw mut found).cast(), sys::POINTER_DEVICE_ORDINAL, address) };
        check(calls, "cuPointerGetAttribute", code)?;
        let (found, expected) = (found.unsigned_abs(), self.ordinal());
        if found != expected {
            return Err(Error::WrongDevice { operand: Operand::Foreign, found, expected });
        }
        Ok(())
    }
}

/// Waits for the backend's stream.
struct WaitOnDrop<'a>(&'a Cuda);

impl Drop for WaitOnDrop<'_> {
    fn drop(&mut self) {
        if let Ok(_entered) = self.0.device().enter() {
            // An error here belongs to an earlier launch, and other calls report it.
            let _ = self.0.stream.synchronize();
        }
    }
}

/// Memory of cust's that may be read. Dropping it waits for the backend's stream.
pub struct CustView<'a, T> {
    wait: WaitOnDrop<'a>,
    address: u64,
    len: usize,
    elements: PhantomData<T>,
}

impl<T: Pod> CustView<'_, T> {
    /// Returns all of the memory as a slice.
    pub fn as_slice(&self) -> DeviceSlice<'_, T> {
        // SAFETY: cust's memory is borrowed for longer than this view. Launches on other streams meanwhile are ordered
        // with this backend's stream, and dropping the view waits for that stream.
        unsafe { DeviceSlice::from_raw(self.wait.0, self.address, self.len) }.on(self.wait.0)
    }
}

/// Memory of cust's that may be written. Dropping it waits for the backend's stream.
pub struct CustViewMut<'a, T> {
    wait: WaitOnDrop<'a>,
    address: u64,
    len: usize,
    elements: PhantomData<T>,
}

impl<T: Pod> CustViewMut<'_, T> {
    /// Returns all of the memory as a slice.
    pub fn as_slice_mut(&mut self) -> DeviceSliceMut<'_, T> {
        // SAFETY: cust's memory is mutably borrowed for longer than this view. Launches on other streams meanwhile are
        // ordered with this backend's stream, and dropping the view waits for that stream.
        unsafe { DeviceSliceMut::from_raw(self.wait.0, self.address, self.len) }.on(self.wait.0)
    }
}
