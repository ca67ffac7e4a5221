//! NVIDIA GPUs, through the driver API.
//!
//! [`Cuda`] holds the device's primary context, the one that CUDA's runtime and the frameworks on it use, so memory
//! and streams of theirs can be passed in. The safe calls run on the default stream and return before the GPU is done;
//! reading a [`DeviceBuffer`] waits. [`Cuda::forward_raw`], [`Cuda::backward_raw`] and
//! [`Cuda::total_attention_raw`] are for frameworks: raw addresses, the caller's stream, no allocation and no waiting.

mod backward;
mod driver;
mod early_launch;
mod kernels;
mod memory;
mod tensor_map;
mod timing;
mod total_attention;

use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use cust::CudaFlags;
use cust::context::{Context, CurrentContext};
use cust::device::DeviceAttribute;
use kernels_gpu::element::Element;
use kernels_gpu::params::WithDropout;
use kernels_gpu::variants::{WARP_ROWS, WARPGROUP_ROWS};

pub use kernels::{COMMIT, KERNEL_ASSEMBLER, KERNEL_COMPILER, KERNEL_ORIGIN, KERNELS, Kernel};
pub use memory::{DeviceBuffer, DeviceSlice, DeviceSliceMut, Plain};

use crate::backend::{Backend, sealed::Sealed};
use crate::error::{Error, Operand, Result};
use crate::operands::{
    AddressSpace, BackwardInputs, Buffers, ForwardInputs, Gradients, Pair, RawForward, RawTensor, SecondTensors,
    check_dtype, check_second, check_tensor, second_pair,
};
use crate::plan::{BackwardPlan, Plan, TotalPlan};
use crate::tensor::Tensor;
use driver::failed;

/// The compute capability that the kernels are compiled for.
const CAPABILITY: (u32, u32) = (9, 0);

/// A stream of the driver API, `CUstream`; null is the default stream.
pub type RawStream = *mut c_void;

/// One GPU. Cheap to clone; every clone is the same device.
#[derive(Clone)]
pub struct Cuda {
    device: Arc<Device>,
}

/// A device, its context and what was loaded there. Fields are dropped in this order: modules before their context.
struct Device {
    modules: kernels::Modules,
    context: Context,
    device: cust::device::Device,
    name: String,
    sm_count: u32,
    encoder: tensor_map::Encoder,
    early_launch: Option<early_launch::EarlyLaunch>,
}

impl Device {
    /// Makes the context the calling thread's current one.
    fn make_current(&self) -> Result<()> {
        CurrentContext::set_current(&self.context).map_err(failed("cuCtxSetCurrent"))
    }
}

impl Cuda {
    /// How many devices the driver shows; 0 without a driver.
    pub fn device_count() -> u32 {
        cust::init(CudaFlags::empty()).and_then(|()| cust::device::Device::num_devices()).unwrap_or(0)
    }

    /// Opens device `ordinal`.
    ///
    /// # Errors
    /// [`Error::NoDevice`]; [`Error::UnsupportedDevice`] for a GPU that is not of compute capability 9.0;
    /// [`Error::Driver`].
    pub fn new(ordinal: u32) -> Result<Self> {
        let none = |error: cust::error::CudaError| Error::NoDevice { reason: driver::words(error) };
        cust::init(CudaFlags::empty()).map_err(none)?;
        let device = cust::device::Device::get_device(ordinal).map_err(none)?;
        let name = device.name().map_err(failed("cuDeviceGetName"))?;
        let get =
            |attribute| device.get_attribute(attribute).map(i32::unsigned_abs).map_err(failed("cuDeviceGetAttribute"));
        let capability = (get(DeviceAttribute::ComputeCapabilityMajor)?, get(DeviceAttribute::ComputeCapabilityMinor)?);
        if capability != CAPABILITY {
            let (major, minor) = capability;
            return Err(Error::UnsupportedDevice { name, major, minor, needed: "9.0" });
        }
        let sm_count = get(DeviceAttribute::MultiprocessorCount)?;
        let context = Context::new(device).map_err(failed("cuDevicePrimaryCtxRetain"))?;
        let encoder = tensor_map::Encoder::find()?;
        let early_launch = early_launch::EarlyLaunch::find();
        let modules = kernels::Modules::new();
        Ok(Cuda { device: Arc::new(Device { modules, context, device, name, sm_count, encoder, early_launch }) })
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.device.name
    }

    /// The CUDA version that the driver supports, as (major, minor).
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn driver_version(&self) -> Result<(i32, i32)> {
        let version = cust::CudaApiVersion::get().map_err(failed("cuDriverGetVersion"))?;
        Ok((version.major(), version.minor()))
    }

    /// Bytes of device memory.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn total_memory(&self) -> Result<usize> {
        self.device.device.total_memory().map_err(failed("cuDeviceTotalMem"))
    }

    /// The device's peak clock rate in kHz.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn clock_khz(&self) -> Result<u32> {
        let rate = self.device.device.get_attribute(DeviceAttribute::ClockRate);
        Ok(rate.map_err(failed("cuDeviceGetAttribute"))?.unsigned_abs())
    }

    /// Waits until everything that was launched on the device has run.
    ///
    /// # Errors
    /// [`Error::Driver`], also for what went wrong in earlier launches.
    pub fn synchronize(&self) -> Result<()> {
        self.device.make_current()?;
        CurrentContext::synchronize().map_err(failed("cuCtxSynchronize"))
    }

    /// Loads a plan's kernel, so that its first launch need not. Returns how long loading took when it happened.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn load(&self, plan: &Plan) -> Result<Duration> {
        self.device.make_current()?;
        Ok(self.device.modules.get(plan.variant().symbol, plan.smem_bytes())?.load_time)
    }

    /// Runs a forward plan on raw device addresses and the caller's stream. After a kernel's first use (see
    /// [`Cuda::load`]) it neither allocates nor waits, and may be captured into a graph.
    ///
    /// # Errors
    /// Those of [`RawForward::validate`], before anything is launched; [`Error::Driver`].
    ///
    /// # Safety
    /// Until the launch has run, the addresses are valid on this device for all that their layouts span, of elements of
    /// the plan's dtype; nobody writes Q, K or V, or accesses O or the LSE. `stream` is a stream of this device's
    /// primary context, or null.
    pub unsafe fn forward_raw(&self, plan: &Plan, args: &RawForward, stream: RawStream) -> Result<()> {
        args.validate(plan)?;
        // SAFETY: validated; the caller's promise.
        unsafe { self.launch(plan, args, stream) }
    }

    /// # Safety
    /// As [`Cuda::forward_raw`], with arguments that were validated for `plan`.
    unsafe fn launch(&self, plan: &Plan, args: &RawForward, stream: RawStream) -> Result<()> {
        if plan.work_tiles() == 0 {
            return Ok(());
        }
        self.device.make_current()?;
        let (variant, dtype) = (plan.variant(), plan.problem().dtype);
        let encode = |tensor: &RawTensor, rows| self.device.encoder.encode(tensor, dtype, rows);
        let q = encode(&args.q, WARPGROUP_ROWS)?;
        let o = encode(&args.o, WARP_ROWS)?;
        let maps = match plan.problem().seqlen_k {
            // The driver encodes no empty tensor; every key of this one, some element of Q, is masked.
            0 => {
                let stand_in = encode(&args.q.first_row(), variant.block_n)?;
                [q, stand_in, stand_in, o]
            }
            _ => [q, encode(&args.k, variant.block_n)?, encode(&args.v, variant.block_n)?, o],
        };
        let second = match (&args.second, plan.problem().seqlen_k) {
            (None, _) => None,
            (Some(_), 0) => Some(Pair { q: maps[0], k: maps[1] }),
            (Some(Pair { q, k }), _) => Some(Pair { q: encode(q, WARPGROUP_ROWS)?, k: encode(k, variant.block_n)? }),
        };
        let function = self.device.modules.get(variant.symbol, plan.smem_bytes())?.function;
        let (grid, block, smem, stream) = (plan.grid(), plan.block(), plan.smem_bytes(), stream.cast());
        // SAFETY: these are the kernel's parameters, its context is current, and the caller promises the rest.
        unsafe {
            match (second_pair(plan.dist_threshold(), second), plan.launched) {
                (Some(second), _) => function.launch(grid, block, smem, stream, &args.params(plan, maps, second)),
                (None, None) => function.launch(grid, block, smem, stream, &args.params(plan, maps, ())),
                (None, Some(dropout)) => {
                    let params = WithDropout { params: args.params(plan, maps, ()), dropout };
                    function.launch(grid, block, smem, stream, &params)
                }
            }
        }
    }
}

impl Sealed for Cuda {}

impl Backend for Cuda {
    type Slice<'a, T: Copy + Send + Sync + 'static> = DeviceSlice<'a, T>;
    type SliceMut<'a, T: Copy + Send + Sync + 'static> = DeviceSliceMut<'a, T>;
    type Buffer<T: Copy + Send + Sync + 'static> = DeviceBuffer<T>;

    fn sm_count(&self) -> u32 {
        self.device.sm_count
    }

    /// The content is undefined: kernels write every element that a caller reads.
    fn allocate<T: Copy + Send + Sync + 'static>(&self, operand: Operand, len: usize, _: T) -> Result<DeviceBuffer<T>> {
        DeviceBuffer::new(self, operand, len)
    }

    fn upload<T: Copy + Send + Sync + 'static>(&self, operand: Operand, from: &[T]) -> Result<DeviceBuffer<T>> {
        let mut buffer = DeviceBuffer::new(self, operand, from.len())?;
        buffer.copy_from_host(from)?;
        Ok(buffer)
    }

    fn download<T: Copy + Send + Sync + 'static>(&self, from: &DeviceBuffer<T>) -> Result<Vec<T>> {
        from.to_host()
    }

    fn slice<T: Copy + Send + Sync + 'static>(buffer: &DeviceBuffer<T>) -> DeviceSlice<'_, T> {
        buffer.as_slice()
    }

    fn slice_mut<T: Copy + Send + Sync + 'static>(
        buffer: &mut DeviceBuffer<T>,
        range: Range<usize>,
    ) -> DeviceSliceMut<'_, T> {
        buffer.as_slice_mut(range)
    }

    fn check_inputs<E: Element>(&self, plan: &Plan, inputs: &ForwardInputs<DeviceSlice<'_, E>>) -> Result<()> {
        check_second(plan.variant().op, inputs.second.is_some())?;
        check_dtype(plan.problem(), E::DTYPE)?;
        for (operand, tensor) in inputs.named() {
            let raw = RawTensor { address: tensor.data.address, layout: tensor.layout };
            check_tensor(plan.problem(), operand, &raw, AddressSpace::Device, Some(tensor.data.len))?;
        }
        Ok(())
    }

    fn forward_into<E: Element>(
        &self,
        plan: &Plan,
        inputs: ForwardInputs<DeviceSlice<'_, E>>,
        o: Tensor<DeviceSliceMut<'_, E>>,
        lse: Option<DeviceSliceMut<'_, f32>>,
    ) -> Result<()> {
        let ForwardInputs { q, k, second, v } = inputs;
        let buffers = Buffers {
            dtype: E::DTYPE,
            q: q.data.len,
            k: k.data.len,
            second: second.map(|pair| pair.map(|x| x.data.len)),
            v: v.data.len,
            o: o.data.len,
            lse: lse.as_ref().map(|lse| lse.len),
        };
        let args = RawForward {
            q: RawTensor { address: q.data.address, layout: q.layout },
            k: RawTensor { address: k.data.address, layout: k.layout },
            second: second.map(|pair| pair.map(|x| RawTensor { address: x.data.address, layout: x.layout })),
            v: RawTensor { address: v.data.address, layout: v.layout },
            o: RawTensor { address: o.data.address, layout: o.layout },
            lse: lse.map(|lse| lse.address),
        };
        args.validate_buffers(plan, AddressSpace::Device, &buffers)?;
        // SAFETY: the arguments were validated against the plan; the slices stand for valid memory, borrowed as the
        // kernel uses it. Freeing a buffer waits for the launch, and so do the copies, all on the default stream.
        unsafe { self.launch(plan, &args, std::ptr::null_mut()) }
    }

    fn check_backward_inputs<E: Element>(
        &self,
        plan: &BackwardPlan,
        inputs: &BackwardInputs<DeviceSlice<'_, E>, DeviceSlice<'_, f32>>,
        second: Option<&Pair<Tensor<DeviceSlice<'_, E>>>>,
    ) -> Result<()> {
        self.check_gradient_inputs(plan, inputs, second)
    }

    fn backward_into<E: Element>(
        &self,
        plan: &BackwardPlan,
        inputs: BackwardInputs<DeviceSlice<'_, E>, DeviceSlice<'_, f32>>,
        outputs: Gradients<Tensor<DeviceSliceMut<'_, E>>>,
        second: Option<SecondTensors<DeviceSlice<'_, E>, DeviceSliceMut<'_, E>>>,
    ) -> Result<()> {
        self.run_backward(plan, inputs, outputs, second)
    }

    fn check_total_inputs<E: Element>(
        &self,
        plan: &TotalPlan,
        q: &Tensor<DeviceSlice<'_, E>>,
        k: &Tensor<DeviceSlice<'_, E>>,
        lse: &DeviceSlice<'_, f32>,
    ) -> Result<()> {
        self.check_inputs_of_total(plan, q, k, lse)
    }

    fn total_attention_into<E: Element>(
        &self,
        plan: &TotalPlan,
        q: Tensor<DeviceSlice<'_, E>>,
        k: Tensor<DeviceSlice<'_, E>>,
        lse: DeviceSlice<'_, f32>,
        total: DeviceSliceMut<'_, f32>,
    ) -> Result<()> {
        self.run_total(plan, &q, &k, &lse, &total)
    }
}
