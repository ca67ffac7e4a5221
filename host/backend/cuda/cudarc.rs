//! cudarc's streams and device slices, for a program that has its memory there.
//!
//! ```no_run
//! use cudarc::driver::CudaContext;
//! use ferroflash::cuda::CudarcStream;
//! use ferroflash::{Attention, Dtype, Inputs, Layout, Problem, Tensor, bf16};
//!
//! let problem =
//!     Problem { batch: 1, heads_q: 8, heads_kv: 8, seqlen_q: 512, seqlen_k: 512, head_dim: 64, dtype: Dtype::Bf16 };
//! let stream = CudaContext::new(0)?.default_stream();
//! let x = stream.clone_htod(&vec![bf16::ONE; 8 * 512 * 64])?;
//! let mut o = stream.alloc_zeros::<bf16>(8 * 512 * 64)?;
//!
//! let backend = CudarcStream::new(&stream)?;
//! let (x, mut out) = (backend.read(&x)?, backend.write(&mut o)?);
//! let x = Tensor::bhsd(x.as_slice(), problem.q_shape());
//! Attention::new(problem).forward_into(
//!     backend.cuda(), Inputs::new(x, x, x), Tensor::bhsd(out.as_slice_mut(), problem.q_shape()), None,
//! )?;
//! drop(out);
//! let o = stream.clone_dtoh(&o)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};

use super::stream::Stream;
use super::{Cuda, Device, DeviceSlice, DeviceSliceMut, Specialise};
use crate::error::{Error, Operand, Result};

/// A stream of cudarc's, and the backend that runs safe calls on it.
pub struct CudarcStream {
    cuda: Cuda,
    stream: Arc<CudaStream>,
}

impl CudarcStream {
    /// Returns the backend for a stream of cudarc's. The stream is kept for as long as the backend and its buffers are.
    ///
    /// # Errors
    /// [`Error::WrongContext`] for a stream of another context than its device's primary one; [`Error::ThreadStream`]
    /// for a per-thread stream; errors of [`Cuda::new`].
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        let ordinal = u32::try_from(stream.context().ordinal()).unwrap_or(u32::MAX);
        let device = Device::shared(ordinal)?;
        if stream.context().cu_ctx().cast() != device.context.handle() {
            return Err(Error::WrongContext { device: ordinal });
        }
        // SAFETY: cudarc's stream is live, and is kept by the new value.
        let kept = unsafe { Stream::caller(device, stream.cu_stream().cast()) }?.kept_by(Box::new(stream.clone()));
        Ok(CudarcStream { cuda: Cuda::on(kept), stream: stream.clone() })
    }

    /// Returns the same stream, with another choice of when to compile specialised kernels.
    #[must_use]
    pub fn specialise(self, when: Specialise) -> Self {
        CudarcStream { cuda: self.cuda.specialise(when), ..self }
    }

    /// Returns the backend.
    pub fn cuda(&self) -> &Cuda {
        &self.cuda
    }

    /// Returns memory of cudarc's for this backend to read. The stream waits for work that writes it.
    ///
    /// # Errors
    /// [`Error::WrongDevice`].
    pub fn read<'a, T: Pod>(&'a self, memory: &'a impl DevicePtr<T>) -> Result<CudarcView<'a, T>> {
        self.check_device(memory.stream())?;
        let len = memory.len();
        let (address, order) = memory.device_ptr(&self.stream);
        Ok(CudarcView { cuda: &self.cuda, address, len, _order: order, elements: std::marker::PhantomData })
    }

    /// Returns memory of cudarc's for this backend to write. The stream waits for work that uses it.
    ///
    /// # Errors
    /// [`Error::WrongDevice`].
    pub fn write<'a, T: Pod>(&'a self, memory: &'a mut impl DevicePtrMut<T>) -> Result<CudarcViewMut<'a, T>> {
        self.check_device(memory.stream())?;
        let len = memory.len();
        let (address, order) = memory.device_ptr_mut(&self.stream);
        Ok(CudarcViewMut { cuda: &self.cuda, address, len, _order: order, elements: std::marker::PhantomData })
    }

    fn check_device(&self, of: &CudaStream) -> Result<()> {
        let (found, expected) = (of.context().ordinal(), self.cuda.ordinal());
        if found != expected as usize {
            let found = u32::try_from(found).unwrap_or(u32::MAX);
            return Err(Error::WrongDevice { operand: Operand::Foreign, found, expected });
        }
        Ok(())
    }
}

/// Memory of cudarc's that may be read. Dropping it informs cudarc that the stream may still be reading.
pub struct CudarcView<'a, T> {
    cuda: &'a Cuda,
    address: u64,
    len: usize,
    _order: SyncOnDrop<'a>,
    elements: std::marker::PhantomData<T>,
}

impl<T: Pod> CudarcView<'_, T> {
    /// Returns all of the memory as a slice.
    pub fn as_slice(&self) -> DeviceSlice<'_, T> {
        // SAFETY: cudarc's memory is borrowed for longer than this view. Launches on other streams meanwhile are
        // ordered with this backend's stream, on which cudarc waits once the view is dropped.
        unsafe { DeviceSlice::from_raw(self.cuda, self.address, self.len) }.on(self.cuda)
    }
}

/// Memory of cudarc's that may be written. Dropping it informs cudarc that the stream may still be writing.
pub struct CudarcViewMut<'a, T> {
    cuda: &'a Cuda,
    address: u64,
    len: usize,
    _order: SyncOnDrop<'a>,
    elements: std::marker::PhantomData<T>,
}

impl<T: Pod> CudarcViewMut<'_, T> {
    /// Returns all of the memory as a slice.
    pub fn as_slice_mut(&mut self) -> DeviceSliceMut<'_, T> {
        // SAFETY: cudarc's memory is mutably borrowed for longer than this view. Launches on other streams meanwhile
        // are ordered with this backend's stream, on which cudarc waits once the view is dropped.
        unsafe { DeviceSliceMut::from_raw(self.cuda, self.address, self.len) }.on(self.cuda)
    }
}
