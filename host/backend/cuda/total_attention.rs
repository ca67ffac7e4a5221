//! Total attention on the GPU: one launch, or zeros where there is no query.

use std::time::Duration;

use kernels_gpu::element::Element;

use super::{Cuda, DeviceSlice, DeviceSliceMut, RawStream, driver};
use crate::error::Result;
use crate::operands::{AddressSpace, Memory, RawTensor, RawTotalAttention, check_dtype, check_total_inputs};
use crate::plan::TotalPlan;
use crate::tensor::Tensor;

impl Cuda {
    /// Loads the kernel of a plan of total attention, so that its first launch need not. Returns how long loading took
    /// when it happened.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver).
    pub fn load_total_attention(&self, plan: &TotalPlan) -> Result<Duration> {
        self.device.make_current()?;
        Ok(self.device.modules.get(plan.variant().symbol, plan.smem_bytes())?.load_time)
    }

    /// Computes total attention on raw device addresses and the caller's stream. After the kernel's first use (see
    /// [`Cuda::load_total_attention`]) it neither allocates nor waits, and may be captured into a graph.
    ///
    /// # Errors
    /// Those of [`RawTotalAttention::validate`], before anything is launched; [`Error::Driver`](crate::Error::Driver).
    ///
    /// # Safety
    /// Until the launch has run, the addresses are valid on this device for all that their layouts span, of elements of
    /// the plan's dtype, f32 for the LSE and the result; nobody writes an input, or accesses the result. `stream` is a
    /// stream of this device's primary context, or null.
    pub unsafe fn total_attention_raw(
        &self,
        plan: &TotalPlan,
        args: &RawTotalAttention,
        stream: RawStream,
    ) -> Result<()> {
        args.validate(plan)?;
        // SAFETY: validated; the caller's promise.
        unsafe { self.launch_total(plan, args, stream) }
    }

    /// Checks the inputs by themselves.
    pub(super) fn check_inputs_of_total<E: Element>(
        &self,
        plan: &TotalPlan,
        q: &Tensor<DeviceSlice<'_, E>>,
        k: &Tensor<DeviceSlice<'_, E>>,
        lse: &DeviceSlice<'_, f32>,
    ) -> Result<()> {
        check_dtype(plan.problem(), E::DTYPE)?;
        check_total_inputs(plan, &tensor(q), &tensor(k), memory(lse), AddressSpace::Device)
    }

    /// Checks everything and launches the plan on the default stream.
    pub(super) fn run_total<E: Element>(
        &self,
        plan: &TotalPlan,
        q: &Tensor<DeviceSlice<'_, E>>,
        k: &Tensor<DeviceSlice<'_, E>>,
        lse: &DeviceSlice<'_, f32>,
        total: &DeviceSliceMut<'_, f32>,
    ) -> Result<()> {
        let result = Memory { address: total.address, len: Some(total.len) };
        let (tensors, lines) = ([tensor(q), tensor(k)], [memory(lse), result]);
        let args = RawTotalAttention::lower(plan, E::DTYPE, AddressSpace::Device, tensors, lines)?;
        // SAFETY: the arguments were validated against the plan; the slices stand for valid memory, borrowed as the kernel
        // uses it. Freeing a buffer waits for the launch, and so do the copies, all on the default stream.
        unsafe { self.launch_total(plan, &args, std::ptr::null_mut()) }
    }

    /// # Safety
    /// As [`Cuda::total_attention_raw`], with arguments that were validated for `plan`.
    unsafe fn launch_total(&self, plan: &TotalPlan, args: &RawTotalAttention, stream: RawStream) -> Result<()> {
        let (len, stream) = (plan.problem().total_len(), stream.cast());
        if len == 0 {
            return Ok(());
        }
        self.device.make_current()?;
        if plan.work_tiles() == 0 {
            // SAFETY: the caller's promise; the result has that many elements.
            return unsafe { driver::zero_words(args.total, len, stream) };
        }
        let (variant, dtype) = (plan.variant(), plan.problem().dtype);
        let encode = |tensor: &RawTensor, rows| self.device.encoder.encode(tensor, dtype, rows);
        let maps = [encode(&args.q, variant.block_m)?, encode(&args.k, variant.block_n())?];
        let params = args.params(plan, maps);
        let function = self.device.modules.get(variant.symbol, plan.smem_bytes())?.function;
        // SAFETY: these are the kernel's parameters, its context is current, and the caller promises the rest.
        unsafe { function.launch(plan.grid(), plan.block(), plan.smem_bytes(), stream, &params) }
    }
}

fn tensor<E>(tensor: &Tensor<DeviceSlice<'_, E>>) -> Tensor<Memory> {
    Tensor { data: memory(&tensor.data), layout: tensor.layout }
}

/// A slice's address and length.
fn memory<T>(slice: &DeviceSlice<'_, T>) -> Memory {
    Memory { address: slice.address, len: Some(slice.len) }
}
