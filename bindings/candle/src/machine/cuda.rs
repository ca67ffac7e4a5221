//! A GPU: candle's stream and memory, with ferroflash's kernels.
//!
//! The kernels run on the stream of candle's device, like candle's own, in the primary context, which both libraries
//! use. A use of memory waits for other streams that have used it, and records itself for those that will: cudarc's
//! guards do both.

use std::ffi::c_void;
use std::sync::Arc;

use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};
use candle_core::{CudaDevice, CudaStorage, DType, Error, Result, Shape, Storage, backend::BackendDevice, bail};
use ferroflash as ff;

use super::{Machine, Place};

pub(crate) struct CudaMachine {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    cuda: &'static ff::Cuda,
}

impl CudaMachine {
    /// Returns the machine of a device of candle.
    pub(crate) fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let ordinal = u32::try_from(stream.context().ordinal()).map_err(Error::wrap)?;
        let cuda = ff::Cuda::for_ordinal(ordinal).map_err(Error::wrap)?;
        Ok(CudaMachine { device: device.clone(), stream, cuda })
    }

    fn raw_stream(&self) -> *mut c_void {
        self.stream.cu_stream().cast()
    }

    /// Allocates a plan's workspace; `None` if the plan needs none. The allocator aligns it to 256 bytes.
    fn workspace(&self, bytes: usize) -> Result<Option<CudaStorage>> {
        (bytes > 0).then(|| self.allocate(bytes, DType::U8)).transpose()
    }

    fn reading<'a, T>(&'a self, slice: &'a CudaSlice<T>) -> Place<SyncOnDrop<'a>> {
        let (address, used) = slice.device_ptr(&self.stream);
        Place { address, bytes: slice.num_bytes(), _used: used }
    }

    fn writing<'a, T>(&'a self, slice: &'a mut CudaSlice<T>) -> Place<SyncOnDrop<'a>> {
        let bytes = slice.num_bytes();
        let (address, used) = slice.device_ptr_mut(&self.stream);
        Place { address, bytes, _used: used }
    }
}

impl Machine for CudaMachine {
    type Storage = CudaStorage;
    type Use<'a> = SyncOnDrop<'a>;

    fn storage(storage: &Storage) -> Result<&CudaStorage> {
        match storage {
            Storage::Cuda(storage) => Ok(storage),
            _ => bail!("a tensor is not on the GPU, and another is"),
        }
    }

    fn wrap(storage: CudaStorage) -> Storage {
        Storage::Cuda(storage)
    }

    fn sm_count(&self) -> u32 {
        self.cuda.sm_count()
    }

    fn allocate(&self, elements: usize, dtype: DType) -> Result<CudaStorage> {
        // The driver allocates no memory of size 0.
        let shape = Shape::from(elements.max(1));
        // SAFETY: a kernel writes the results before anything reads them; any bits are a value of these types.
        unsafe { self.device.alloc_uninit(&shape, dtype) }
    }

    fn read<'a>(&'a self, storage: &'a CudaStorage) -> Result<Place<SyncOnDrop<'a>>> {
        match &storage.slice {
            CudaStorageSlice::F16(slice) => Ok(self.reading(slice)),
            CudaStorageSlice::BF16(slice) => Ok(self.reading(slice)),
            CudaStorageSlice::F32(slice) => Ok(self.reading(slice)),
            _ => bail!("a tensor is neither F16 nor BF16 nor F32"),
        }
    }

    fn write<'a>(&'a self, storage: &'a mut CudaStorage) -> Result<Place<SyncOnDrop<'a>>> {
        match &mut storage.slice {
            CudaStorageSlice::F16(slice) => Ok(self.writing(slice)),
            CudaStorageSlice::BF16(slice) => Ok(self.writing(slice)),
            CudaStorageSlice::F32(slice) => Ok(self.writing(slice)),
            CudaStorageSlice::U8(slice) => Ok(self.writing(slice)),
            _ => bail!("a tensor is neither F16 nor BF16 nor F32"),
        }
    }

    unsafe fn run(&self, plan: &ff::Plan, args: ff::RawForward) -> Result<()> {
        let workspace_bytes = plan.workspace_bytes();
        let mut workspace = self.workspace(workspace_bytes)?;
        let place = workspace.as_mut().map(|workspace| self.write(workspace)).transpose()?;
        let workspace = place.as_ref().map_or(0, |place| place.address);
        let args = ff::RawForward { workspace, workspace_bytes, ..args };
        // SAFETY: the caller's promise. The places order the launch with other uses of the memory, and memory is freed
        // in the order of a stream that waits for its uses. The workspace is memory of its own. The stream is one of
        // the primary context.
        unsafe { self.cuda.forward_raw(plan, &args, self.raw_stream()) }.map_err(Error::wrap)
    }

    unsafe fn run_backward(&self, plan: &ff::BackwardPlan, args: ff::RawBackward) -> Result<()> {
        let workspace_bytes = plan.workspace_bytes();
        let mut workspace = self.workspace(workspace_bytes)?;
        let place = workspace.as_mut().map(|workspace| self.write(workspace)).transpose()?;
        let workspace = place.as_ref().map_or(0, |place| place.address);
        let args = ff::RawBackward { workspace, workspace_bytes, ..args };
        // SAFETY: the caller's promise, and the reasons of `run`.
        unsafe { self.cuda.backward_raw(plan, &args, self.raw_stream()) }.map_err(Error::wrap)
    }
}
