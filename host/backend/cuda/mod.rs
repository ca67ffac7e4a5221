//! NVIDIA GPUs, through the driver API.
//!
//! [`Cuda`] holds the device's primary context, which CUDA's runtime and the frameworks on it also use, so their memory
//! and streams can be passed in. The safe calls run on the backend's stream and return before the GPU is done; reading
//! a [`DeviceBuffer`] waits. [`Cuda::forward_raw`], [`Cuda::backward_raw`] and [`Cuda::total_attention_raw`] are for
//! frameworks: raw addresses, the caller's stream, no allocation and no waiting.
//!
//! # Loading
//! The first use of a kernel loads it, which takes a fraction of a millisecond. For a combination of features that the
//! build holds no specialised kernel for, the general kernel is loaded, which has all features and is up to 4 % slower.
//! [`Cuda::load`], [`Cuda::load_backward`] and [`Cuda::load_total_attention`] load a plan's kernels in advance, and let
//! the driver compile specialised ones if need be. [`Cuda::specialise`] does so at first use.
//!
//! # Context and streams
//! - Every call, and every drop, leaves the calling thread's current context as it was.
//! - [`Cuda::new`] works on the device's default stream, [`Cuda::on_new_stream`] on a new stream, [`Cuda::on_stream`]
//!   on a stream of the caller's. Memory belongs to the stream that allocated it. Calls on other streams of the device
//!   are ordered with it by events, so safe calls may mix streams.
//! - Raw calls take any stream of the device's primary context. Null and `CU_STREAM_LEGACY` (1) mean the default
//!   stream, and `CU_STREAM_PER_THREAD` (2) means the calling thread's.

mod backward;
#[cfg(feature = "cudarc")]
mod cudarc;
#[cfg(feature = "cust")]
mod cust;
mod device;
mod driver;
mod dropout_mask;
mod kernels;
mod lowering;
mod memory;
mod modules;
mod sequences;
mod specialise;
mod stream;
mod sys;
mod tensor_map;
#[cfg(test)]
mod tests;
mod timing;
mod total_attention;

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::Pod;
use kernels_gpu::variants::{WARP_ROWS, WARPGROUP_ROWS};

#[cfg(feature = "cudarc")]
pub use cudarc::{CudarcStream, CudarcView, CudarcViewMut};
#[cfg(feature = "cust")]
pub use cust::{CustView, CustViewMut};
pub use kernels::{COMMIT, Cubin, KERNEL_ASSEMBLER, KERNEL_COMPILER, KERNEL_ORIGIN, KERNELS, Kernel};
pub use kernels_gpu::ground::constants::{ConstantPlace, Constants, Form};
pub use memory::{DeviceBuffer, DeviceSlice, DeviceSliceMut};
pub use specialise::Specialise;

use crate::backend::{Backend, Workspace, sealed::Sealed};
use crate::dropout::Dropout;
use crate::element::Element;
use crate::error::{Operand, Result};
use crate::lengths::{Integers, Lengths};
use crate::operands::{
    BackwardInputs, ForwardTensors, Gradients, Inputs, PackedGradients, Pair, RawForward, RawTensor, SecondTensors,
    SeedOffset, TotalInputs, TotalTensors,
};
use crate::plan::{BackwardPlan, Plan, TotalPlan};
use crate::problem::Problem;
use crate::tensor::Tensor;
use device::{Device, device_attribute, device_count, driver_version};
use driver::{Extent, check};
use lowering::Lowering;
use stream::Stream;
use sys::attribute;

/// A stream of the driver API, `CUstream`; null is the default stream.
pub type RawStream = *mut c_void;

/// One GPU and the stream that safe calls run on. Cheap to clone; every clone is the same device and stream.
#[derive(Clone)]
pub struct Cuda {
    stream: Arc<Stream>,
    specialise: Specialise,
}

impl Cuda {
    /// Number of devices that the driver shows; 0 without a driver.
    pub fn device_count() -> u32 {
        sys::calls().and_then(device_count).unwrap_or(0)
    }

    /// Opens device `ordinal`. Safe calls run on its default stream.
    ///
    /// NVIDIA's driver is opened here, at run time. Every [`Cuda`] of a device shares its loaded kernels. Dropping the
    /// last one waits for the device and unloads them.
    ///
    /// # Errors
    /// [`Error::NoDevice`](crate::Error::NoDevice), which names what is missing;
    /// [`Error::UnsupportedDevice`](crate::Error::UnsupportedDevice) for a GPU that is not of compute capability 9.0;
    /// [`Error::Driver`](crate::Error::Driver).
    pub fn new(ordinal: u32) -> Result<Self> {
        Ok(Cuda::on(Stream::default_of(Device::shared(ordinal)?)))
    }

    /// Returns device `ordinal`, which is opened once and stays open until the process ends. It is for bindings, whose
    /// functions take no context: a later call is a look into a table.
    ///
    /// # Errors
    /// Errors of [`Cuda::new`]. A failure is not remembered.
    pub fn for_ordinal(ordinal: u32) -> Result<&'static Cuda> {
        static OPEN: Mutex<BTreeMap<u32, &'static Cuda>> = Mutex::new(BTreeMap::new());
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cuda) = open.get(&ordinal) {
            return Ok(cuda);
        }
        let cuda: &'static Cuda = Box::leak(Box::new(Cuda::new(ordinal)?));
        open.insert(ordinal, cuda);
        Ok(cuda)
    }

    /// Returns the backend of a stream.
    fn on(stream: Stream) -> Self {
        Cuda { stream: Arc::new(stream), specialise: Specialise::default() }
    }

    /// Returns the same device with safe calls on a new stream, which is destroyed when the last user is dropped.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver).
    pub fn on_new_stream(&self) -> Result<Self> {
        Ok(Cuda { stream: Arc::new(Stream::new(self.stream.device.clone())?), ..*self })
    }

    /// Returns the same device with safe calls on a stream of the caller's. It is a stream of the device's primary
    /// context; null or `CU_STREAM_LEGACY` is the default stream.
    ///
    /// # Errors
    /// [`Error::ThreadStream`](crate::Error::ThreadStream) for `CU_STREAM_PER_THREAD`;
    /// [`Error::WrongContext`](crate::Error::WrongContext) for a stream of another context or device;
    /// [`Error::Driver`](crate::Error::Driver).
    ///
    /// # Safety
    /// `stream` is such a stream, and lives as long as the returned value, its clones and what they allocate.
    pub unsafe fn on_stream(&self, stream: RawStream) -> Result<Self> {
        // SAFETY: the caller's promise.
        let stream = unsafe { Stream::caller(self.stream.device.clone(), stream) }?;
        Ok(Cuda { stream: Arc::new(stream), ..*self })
    }

    /// Returns the stream that safe calls run on; null is the default stream.
    pub fn stream(&self) -> RawStream {
        self.stream.handle()
    }

    fn device(&self) -> &Device {
        &self.stream.device
    }

    /// Returns the device's number.
    pub fn ordinal(&self) -> u32 {
        self.device().ordinal
    }

    /// Returns the device's name.
    pub fn name(&self) -> &str {
        &self.device().name
    }

    /// Number of SMs of the device, which plans take.
    pub fn sm_count(&self) -> u32 {
        self.device().sm_count
    }

    /// Returns the CUDA version that the driver supports, as (major, minor).
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver).
    pub fn driver_version(&self) -> Result<(i32, i32)> {
        let version = driver_version(self.device().calls())?;
        Ok((version / 1000, version % 1000 / 10))
    }

    /// Number of bytes of device memory.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver).
    pub fn total_memory(&self) -> Result<usize> {
        let (context, mut bytes) = (&self.device().context, 0);
        // SAFETY: writes one number; the device is one that the driver returned.
        let code = unsafe { (context.calls.cuDeviceTotalMem_v2)(&mut bytes, context.device) };
        check(context.calls, "cuDeviceTotalMem", code)?;
        Ok(bytes)
    }

    /// Returns the device's peak clock rate in kHz.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver).
    pub fn clock_khz(&self) -> Result<u32> {
        let context = &self.device().context;
        device_attribute(context.calls, attribute::CLOCK_RATE, context.device)
    }

    /// Waits until all launches on the device, on any stream of its primary context, have run.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver), also for errors of earlier launches.
    pub fn synchronize(&self) -> Result<()> {
        let _entered = self.device().enter()?;
        let calls = self.device().calls();
        // SAFETY: the context is current.
        check(calls, "cuCtxSynchronize", unsafe { (calls.cuCtxSynchronize)() })
    }

    /// Runs a forward plan on raw device addresses and the caller's stream. After a kernel's first use (see
    /// [`Cuda::load`]) it neither allocates nor waits, and may be captured into a graph.
    ///
    /// # Errors
    /// Errors of [`RawForward::validate`], before anything is launched; [`Error::Driver`](crate::Error::Driver).
    ///
    /// # Safety
    /// Until the launch has run, the addresses are valid on this device for the whole span of their layouts, as
    /// elements of the plan's dtype, f32 for the LSE, slopes and sinks, and u64 for seed and offset. Nothing else
    /// writes the inputs or accesses O and the LSE. `stream` is a stream of this device's primary context, or null.
    pub unsafe fn forward_raw(&self, plan: &Plan, args: &RawForward, stream: RawStream) -> Result<()> {
        args.validate(plan)?;
        let _entered = self.device().enter()?;
        // SAFETY: validated; the caller's promise.
        unsafe { self.launch(plan, args, stream) }
    }

    /// Launches a forward plan. The device's context is current.
    ///
    /// # Safety
    /// The requirements of [`Cuda::forward_raw`], with arguments that were validated for `plan`.
    unsafe fn launch(&self, plan: &Plan, args: &RawForward, stream: RawStream) -> Result<()> {
        if plan.work_tiles() == 0 {
            return Ok(());
        }
        let variant = plan.variant();
        let encode = |tensor: &RawTensor, rows| self.encode(tensor, plan.problem().dtype, rows, plan.schedule.as_ref());
        let q = encode(&args.q, WARPGROUP_ROWS)?;
        let o = encode(&args.o, WARP_ROWS)?;
        let maps = match plan.problem().seqlen_k {
            // The driver encodes no empty tensor. This map points at some element of Q instead, and every key of it is
            // masked out.
            0 => {
                let stand_in = self.encode(&args.q.first_row(), plan.problem().dtype, variant.block_n, None)?;
                [q, stand_in, stand_in, o]
            }
            _ => [q, encode(&args.k, variant.block_n)?, encode(&args.v, variant.block_n)?, o],
        };
        let second = match (&args.second, plan.problem().seqlen_k) {
            (None, _) => None,
            (Some(_), 0) => Some(Pair { q: maps[0], k: maps[1] }),
            (Some(Pair { q, k }), _) => Some(Pair { q: encode(q, WARPGROUP_ROWS)?, k: encode(k, variant.block_n)? }),
        };
        let function = self.kernel(variant.symbol, plan.constants(), plan.smem_bytes(), self.specialise)?.function;
        let extent = Extent { grid: plan.grid(), block: plan.block(), shared_memory: plan.smem_bytes() };
        // SAFETY: these are the kernels' parameters, their context is current, and the caller promises the rest.
        unsafe {
            self.launch_schedule(args.schedule(plan), stream)?;
            function.launch_with(extent, stream, args.params(plan, maps, second))
        }
    }
}

impl Sealed for Cuda {}

impl Backend for Cuda {
    type Slice<'a, T: Pod> = DeviceSlice<'a, T>;
    type SliceMut<'a, T: Pod> = DeviceSliceMut<'a, T>;
    type Buffer<T: Pod> = DeviceBuffer<T>;

    fn sm_count(&self) -> u32 {
        Cuda::sm_count(self)
    }

    fn allocate<T: Pod>(&self, operand: Operand, len: usize) -> Result<DeviceBuffer<T>> {
        DeviceBuffer::new(self, operand, len)
    }

    fn upload<T: Pod>(&self, operand: Operand, from: &[T]) -> Result<DeviceBuffer<T>> {
        let mut buffer = DeviceBuffer::new(self, operand, from.len())?;
        buffer.copy_from_host(from)?;
        Ok(buffer)
    }

    fn download<T: Pod>(&self, from: &DeviceBuffer<T>) -> Result<Vec<T>> {
        from.to_host()
    }

    fn slice<T: Pod>(buffer: &DeviceBuffer<T>) -> DeviceSlice<'_, T> {
        buffer.as_slice()
    }

    fn slice_mut<T: Pod>(buffer: &mut DeviceBuffer<T>, range: Range<usize>) -> DeviceSliceMut<'_, T> {
        buffer.as_slice_mut(range)
    }

    fn integers(from: Self::Slice<'_, i32>) -> Integers<Self::Slice<'_, f32>> {
        from.into()
    }

    fn check_lengths(&self, problem: &Problem, lengths: &Lengths<DeviceSlice<'_, f32>>) -> Result<()> {
        self.check_lengths_on_host(problem, lengths)
    }

    fn seed_offset(from: Self::Slice<'_, u64>) -> SeedOffset<Self::Slice<'_, f32>> {
        from.into()
    }

    fn check_inputs<E: Element>(
        &self,
        plan: &Plan,
        inputs: &Inputs<DeviceSlice<'_, E>, DeviceSlice<'_, f32>>,
    ) -> Result<()> {
        let tensors = ForwardTensors::new(*inputs, (), None::<()>);
        tensors.lower(plan, E::DTYPE, &mut Lowering::new(plan.problem(), plan.inputs(), &self.stream))?;
        Ok(())
    }

    fn forward_into<E: Element>(
        &self,
        plan: &Plan,
        inputs: Inputs<DeviceSlice<'_, E>, DeviceSlice<'_, f32>>,
        o: Tensor<DeviceSliceMut<'_, E>>,
        lse: Option<DeviceSliceMut<'_, f32>>,
        workspace: &mut Workspace<Self>,
    ) -> Result<()> {
        let mut lowering = Lowering::new(plan.problem(), plan.inputs(), &self.stream);
        let mut args = ForwardTensors::new(inputs, o, lse).lower(plan, E::DTYPE, &mut lowering)?;
        lowering.check.overlaps()?;
        (args.workspace, args.workspace_bytes) = self.reserve(&mut lowering, workspace, plan.workspace_bytes())?;
        let _entered = self.device().enter()?;
        // SAFETY: the arguments were validated against the plan. The slices stand for valid memory of this device,
        // borrowed as the kernel uses it. Later uses of that memory come after the launch in its stream, by `Order`.
        lowering.order.run(|| unsafe { self.launch(plan, &args, self.stream()) })
    }

    fn check_backward_inputs<E: Element>(
        &self,
        plan: &BackwardPlan,
        inputs: &BackwardInputs<DeviceSlice<'_, E>, DeviceSlice<'_, f32>>,
        second: Option<&Pair<Tensor<DeviceSlice<'_, E>>>>,
    ) -> Result<()> {
        self.check_gradient_inputs(plan, *inputs, second.copied())
    }

    fn backward_into<E: Element>(
        &self,
        plan: &BackwardPlan,
        inputs: BackwardInputs<DeviceSlice<'_, E>, DeviceSlice<'_, f32>>,
        outputs: Gradients<Tensor<DeviceSliceMut<'_, E>>, DeviceSliceMut<'_, f32>>,
        second: Option<SecondTensors<DeviceSlice<'_, E>, DeviceSliceMut<'_, E>>>,
        workspace: &mut Workspace<Self>,
    ) -> Result<()> {
        self.run_backward(plan, inputs, outputs, second, workspace)
    }

    fn backward_packed_into<E: Element>(
        &self,
        plan: &BackwardPlan,
        inputs: BackwardInputs<DeviceSlice<'_, E>, DeviceSlice<'_, f32>>,
        outputs: PackedGradients<Tensor<DeviceSliceMut<'_, E>>, DeviceSliceMut<'_, f32>>,
        workspace: &mut Workspace<Self>,
    ) -> Result<()> {
        let mut lowering = Lowering::new(plan.problem(), plan.inputs(), &self.stream);
        let args = outputs.lower(inputs, plan, E::DTYPE, &mut lowering)?;
        self.run_lowered_backward(plan, args, lowering, workspace)
    }

    fn check_total_inputs<E: Element>(
        &self,
        plan: &TotalPlan,
        inputs: &TotalInputs<DeviceSlice<'_, E>, DeviceSlice<'_, f32>>,
    ) -> Result<()> {
        self.check_inputs_of_total(plan, TotalTensors::new(*inputs, ()))
    }

    fn total_attention_into<E: Element>(
        &self,
        plan: &TotalPlan,
        inputs: TotalInputs<DeviceSlice<'_, E>, DeviceSlice<'_, f32>>,
        total: DeviceSliceMut<'_, f32>,
        workspace: &mut Workspace<Self>,
    ) -> Result<()> {
        self.run_total(plan, TotalTensors::new(inputs, total), workspace)
    }

    fn dropout_mask_into(&self, problem: &Problem, dropout: &Dropout, kept: DeviceSliceMut<'_, u8>) -> Result<()> {
        self.write_dropout_mask(problem, dropout, kept)
    }
}
