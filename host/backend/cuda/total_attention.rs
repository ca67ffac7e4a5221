//! Total attention on the GPU: one launch, or zeros if there is no query.

use std::time::Duration;

use super::driver::{Extent, zero_words};
use super::lowering::Lowering;
use super::{Cuda, DeviceSlice, DeviceSliceMut, RawStream, Specialise};
use crate::backend::Workspace;
use crate::element::Element;
use crate::error::Result;
use crate::operands::{RawTensor, RawTotalAttention, TotalTensors};
use crate::plan::TotalPlan;
use crate::tensor::Tensor;

impl Cuda {
    /// Loads the kernel of a plan of total attention before its first launch, specialised to the plan as by
    /// [`Cuda::load`]. Returns the time that loading took when it happened.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver).
    pub fn load_total_attention(&self, plan: &TotalPlan) -> Result<Duration> {
        let _entered = self.device().enter()?;
        let (symbol, policy) = (plan.variant().symbol, Specialise::AtFirstUse);
        let of_kernel = self.kernel(symbol, plan.constants(), plan.smem_bytes(), policy)?.load_time;
        Ok(of_kernel + self.load_schedule(plan.schedule.as_ref())?)
    }

    /// Computes total attention on raw device addresses and the caller's stream. After the kernel's first use (see
    /// [`Cuda::load_total_attention`]) it neither allocates nor waits, and may be captured into a graph.
    ///
    /// # Errors
    /// Errors of [`RawTotalAttention::validate`], before anything is launched; [`Error::Driver`](crate::Error::Driver).
    ///
    /// # Safety
    /// Until the launch has run, the addresses are valid on this device for the whole span of their layouts: elements
    /// of the plan's dtype, and f32 for the LSE, slopes and the result. Nothing else writes the inputs or accesses the
    /// result. `stream` is a stream of this device's primary context, or null.
    pub unsafe fn total_attention_raw(
        &self,
        plan: &TotalPlan,
        args: &RawTotalAttention,
        stream: RawStream,
    ) -> Result<()> {
        args.validate(plan)?;
        let _entered = self.device().enter()?;
        // SAFETY: validated; the caller's promise.
        unsafe { self.launch_total(plan, args, stream) }
    }

    /// Checks each input alone.
    pub(super) fn check_inputs_of_total<E: Element>(
        &self,
        plan: &TotalPlan,
        inputs: TotalTensors<Tensor<DeviceSlice<'_, E>>, DeviceSlice<'_, f32>, ()>,
    ) -> Result<()> {
        inputs.lower(plan, E::DTYPE, &mut Lowering::new(plan.problem(), plan.inputs(), &self.stream))?;
        Ok(())
    }

    /// Checks everything and launches the plan on the default stream.
    pub(super) fn run_total<E: Element>(
        &self,
        plan: &TotalPlan,
        tensors: TotalTensors<Tensor<DeviceSlice<'_, E>>, DeviceSlice<'_, f32>, DeviceSliceMut<'_, f32>>,
        workspace: &mut Workspace<Self>,
    ) -> Result<()> {
        let mut lowering = Lowering::new(plan.problem(), plan.inputs(), &self.stream);
        let mut args = tensors.lower(plan, E::DTYPE, &mut lowering)?;
        lowering.check.overlaps()?;
        (args.workspace, args.workspace_bytes) = self.reserve(&mut lowering, workspace, plan.workspace_bytes())?;
        let _entered = self.device().enter()?;
        // SAFETY: the arguments were validated against the plan. The slices stand for valid memory of this device,
        // borrowed as the kernel uses it. Later uses of that memory come after the launch in its stream, by `Order`.
        lowering.order.run(|| unsafe { self.launch_total(plan, &args, self.stream()) })
    }

    /// Launches a plan of total attention. The device's context is current.
    ///
    /// # Safety
    /// The requirements of [`Cuda::total_attention_raw`], with arguments that were validated for `plan`.
    unsafe fn launch_total(&self, plan: &TotalPlan, args: &RawTotalAttention, stream: RawStream) -> Result<()> {
        let len = plan.problem().total_len();
        if len == 0 {
            return Ok(());
        }
        if plan.work_tiles() == 0 {
            // SAFETY: the caller's promise; the result has that many elements.
            return unsafe { zero_words(self.device().calls(), args.total, len, stream) };
        }
        let variant = plan.variant();
        let encode = |tensor: &RawTensor, rows| self.encode(tensor, plan.problem().dtype, rows, plan.schedule.as_ref());
        let maps = [encode(&args.q, variant.block_m)?, encode(&args.k, variant.block_n())?];
        let params = args.params(plan, maps);
        let function = self.kernel(variant.symbol, plan.constants(), plan.smem_bytes(), self.specialise)?.function;
        let extent = Extent { grid: plan.grid(), block: plan.block(), shared_memory: plan.smem_bytes() };
        // SAFETY: these are the kernels' parameters, their context is current, and the caller promises the rest.
        unsafe {
            self.launch_schedule(args.schedule(plan), stream)?;
            function.launch(extent, stream, &params)
        }
    }
}
