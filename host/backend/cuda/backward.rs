//! The backward pass on the GPU: three launches on one stream, and the workspace between them. A fourth one computes
//! the gradient of the sinks if it is wanted.

use std::time::Duration;

use kernels_gpu::ground::tensor::TensorMap;
use kernels_gpu::params::{ROW_KERNEL_THREADS, SINK_GRADIENTS, SINK_GRADIENTS_SMEM_BYTES};

use super::driver::{Extent, zero_words};
use super::lowering::Lowering;
use super::modules::Loaded;
use super::{Cuda, DeviceSlice, DeviceSliceMut, RawStream, Specialise};
use crate::backend::Workspace;
use crate::element::Element;
use crate::error::Result;
use crate::operands::{
    BackwardInputs, BackwardTensors, Gradients, Pair, RawBackward, RawSecond, RawTensor, SecondTensors,
};
use crate::plan::{BackwardPlan, Determinism, Sinks};
use crate::tensor::Tensor;

/// Loaded kernels of a plan.
struct Kernels<'a> {
    prepare: &'a Loaded,
    main: &'a Loaded,
    finish: &'a Loaded,
    /// Computes the gradient of sinks, for a plan with sinks.
    sinks: Option<&'a Loaded>,
}

impl Cuda {
    /// Loads a backward plan's kernels before their first launch, specialised to the plan as by [`Cuda::load`]. Returns
    /// the time that loading took when it happened.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver).
    pub fn load_backward(&self, plan: &BackwardPlan) -> Result<Duration> {
        let _entered = self.device().enter()?;
        let Kernels { prepare, main, finish, sinks } = self.backward_kernels(plan, Specialise::AtFirstUse)?;
        let of_sinks = sinks.map_or(Duration::ZERO, |sinks| sinks.load_time);
        let of_schedule = self.load_schedule(plan.schedule.as_ref())?;
        Ok(prepare.load_time + main.load_time + finish.load_time + of_sinks + of_schedule)
    }

    /// Runs a backward plan on raw device addresses and the caller's stream. After the kernels' first use (see
    /// [`Cuda::load_backward`]) it neither allocates nor waits, and may be captured into a graph.
    ///
    /// # Errors
    /// Errors of [`RawBackward::validate`], before anything is launched; [`Error::Driver`](crate::Error::Driver).
    ///
    /// # Safety
    /// Until the launches have run, the addresses are valid on this device for the whole span of their layouts:
    /// elements of the plan's dtype, f32 for the LSE, slopes, sinks and gradients of LSE and sinks, u64 for seed and
    /// offset, and the workspace for all of its size. Nothing else writes the inputs or accesses outputs and workspace.
    /// `stream` is a stream of this device's primary context, or null.
    pub unsafe fn backward_raw(&self, plan: &BackwardPlan, args: &RawBackward, stream: RawStream) -> Result<()> {
        args.validate(plan)?;
        let _entered = self.device().enter()?;
        // SAFETY: validated; the caller's promise.
        unsafe { self.launch_backward(plan, args, stream) }
    }

    /// Checks each input alone.
    pub(super) fn check_gradient_inputs<E: Element>(
        &self,
        plan: &BackwardPlan,
        inputs: BackwardInputs<DeviceSlice<'_, E>, DeviceSlice<'_, f32>>,
        second: Option<Pair<Tensor<DeviceSlice<'_, E>>>>,
    ) -> Result<()> {
        let mut lowering = Lowering::new(plan.problem(), plan.inputs(), &self.stream);
        BackwardTensors::inputs(inputs, second).lower(plan, E::DTYPE, &mut lowering)?;
        Ok(())
    }

    /// Checks everything and launches the plan on the backend's stream, in the caller's workspace.
    pub(super) fn run_backward<E: Element>(
        &self,
        plan: &BackwardPlan,
        inputs: BackwardInputs<DeviceSlice<'_, E>, DeviceSlice<'_, f32>>,
        outputs: Gradients<Tensor<DeviceSliceMut<'_, E>>, DeviceSliceMut<'_, f32>>,
        second: Option<SecondTensors<DeviceSlice<'_, E>, DeviceSliceMut<'_, E>>>,
        workspace: &mut Workspace<Self>,
    ) -> Result<()> {
        let mut lowering = Lowering::new(plan.problem(), plan.inputs(), &self.stream);
        let args = BackwardTensors::new(inputs, second, outputs).lower(plan, E::DTYPE, &mut lowering)?;
        self.run_lowered_backward(plan, args, lowering, workspace)
    }

    /// Launches the plan on the backend's stream, in the caller's workspace. The tensors of `args` have been lowered by
    /// `lowering`.
    pub(super) fn run_lowered_backward<'a>(
        &'a self,
        plan: &BackwardPlan,
        mut args: RawBackward,
        mut lowering: Lowering<'a>,
        workspace: &'a mut Workspace<Self>,
    ) -> Result<()> {
        lowering.check.overlaps()?;
        (args.workspace, args.workspace_bytes) = self.reserve(&mut lowering, workspace, plan.workspace_bytes())?;
        let _entered = self.device().enter()?;
        // SAFETY: the arguments were validated against the plan, and the workspace is borrowed mutably and large
        // enough. The slices stand for valid memory of this device, borrowed as the kernels use it. Later uses of that
        // memory come after the launches in its stream, by `Order`.
        lowering.order.run(|| unsafe { self.launch_backward(plan, &args, self.stream()) })
    }

    /// Returns the kernels of a plan. The device's context is current.
    fn backward_kernels(&self, plan: &BackwardPlan, policy: Specialise) -> Result<Kernels<'_>> {
        let variant = plan.variant();
        let kernel = |symbol, smem_bytes| self.kernel(symbol, plan.constants(), smem_bytes, policy);
        Ok(Kernels {
            prepare: kernel(variant.prepare, 0)?,
            main: kernel(variant.symbol, plan.smem_bytes())?,
            finish: kernel(variant.finish, 0)?,
            sinks: match plan.options().sinks {
                Sinks::None => None,
                Sinks::PerHead => Some(kernel(SINK_GRADIENTS, SINK_GRADIENTS_SMEM_BYTES)?),
            },
        })
    }

    /// Launches a backward plan. The device's context is current.
    ///
    /// # Safety
    /// The requirements of [`Cuda::backward_raw`], with arguments that were validated for `plan`, workspace included.
    unsafe fn launch_backward(&self, plan: &BackwardPlan, args: &RawBackward, stream: RawStream) -> Result<()> {
        // Without anything to do there is no workspace either.
        if plan.prepare_grid() == 0 {
            let Some(d_sinks) = args.d_sinks else { return Ok(()) };
            // SAFETY: the caller's promise; the gradient has that many elements.
            return unsafe { zero_words(self.device().calls(), d_sinks, plan.problem().heads_q, stream) };
        }
        // Everything that can fail independently comes before the first launch.
        let kernels = self.backward_kernels(plan, self.specialise)?;
        let maps = if plan.grid() > 0 { Some(self.backward_maps(plan, args)?) } else { None };
        let rows = |grid| Extent { grid, block: ROW_KERNEL_THREADS, shared_memory: 0 };
        // SAFETY: these are the kernels' parameters, their context is current, and the caller promises the rest;
        // `dq_semaphores` is a part of the workspace.
        unsafe {
            self.launch_schedule(args.schedule(plan), stream)?;
            let preparation = args.prepare(plan);
            if plan.workspace.dq_semaphores_len > 0 {
                zero_words(
                    self.device().calls(),
                    preparation.workspace.dq_semaphores,
                    plan.workspace.dq_semaphores_len,
                    stream,
                )?;
            }
            let function = kernels.prepare.function;
            function.launch(rows(plan.prepare_grid()), stream, &preparation)?;
            let mut finish = kernels.finish.function;
            if let Some((maps, second)) = maps {
                // Each kernel itself waits for the one before it: main for all of it, postprocess head by head.
                let early = self.device().early_launch;
                finish = finish.early(early);
                let function = match plan.determinism() {
                    Determinism::Fast => kernels.main.function.early(early),
                    Determinism::Exact => kernels.main.function.cooperative(),
                };
                let extent = Extent { grid: plan.grid(), block: plan.block(), shared_memory: plan.smem_bytes() };
                function.launch_with(extent, stream, args.params(plan, maps, second))?;
            }
            if plan.finish_grid() > 0 {
                for params in args.finish(plan) {
                    finish.launch(rows(plan.finish_grid()), stream, &params)?;
                    // The postprocess kernel of the second pair waits for that of the first, and so for main.
                    finish = kernels.finish.function;
                }
            }
            if let (Some(sinks), Some(params)) = (kernels.sinks, args.sink_gradients(plan)) {
                let shared_memory = SINK_GRADIENTS_SMEM_BYTES;
                let extent = Extent { grid: params.shape.heads_q, block: ROW_KERNEL_THREADS, shared_memory };
                sinks.function.launch(extent, stream, &params)?;
            }
        }
        Ok(())
    }

    /// Returns the tensor maps of Q, K, V and dO, and of the second pair, for a plan that has keys.
    fn backward_maps(
        &self,
        plan: &BackwardPlan,
        args: &RawBackward,
    ) -> Result<([TensorMap; 4], Option<Pair<TensorMap>>)> {
        let variant = plan.variant();
        let encode = |tensor: &RawTensor, rows| self.encode(tensor, plan.problem().dtype, rows, plan.schedule.as_ref());
        // The driver encodes no empty tensor. This map points at some element of its K instead, and every such query
        // has P = 0.
        let idle = plan.problem().seqlen_q == 0;
        let queries = |tensor: &RawTensor, k: &RawTensor| match idle {
            true => self.encode(&k.first_row(), plan.problem().dtype, variant.block_m, None),
            false => encode(tensor, variant.block_m),
        };
        let maps = [
            queries(&args.q, &args.k)?,
            encode(&args.k, variant.block_n)?,
            encode(&args.v, variant.block_n)?,
            queries(&args.d_o, &args.k)?,
        ];
        let second = match &args.second {
            None => None,
            Some(RawSecond { inputs: Pair { q, k }, .. }) => {
                Some(Pair { q: queries(q, k)?, k: encode(k, variant.block_n)? })
            }
        };
        Ok((maps, second))
    }
}
