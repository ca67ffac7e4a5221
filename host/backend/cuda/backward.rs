//! The backward pass on the GPU: three launches on one stream, and the workspace between them.

use std::time::Duration;

use kernels_gpu::element::Element;
use kernels_gpu::params::{TensorMap, WithDropout};
use kernels_gpu::variants::ROW_KERNEL_THREADS;

use super::kernels::Loaded;
use super::{Cuda, DeviceBuffer, DeviceSlice, DeviceSliceMut, RawStream, driver};
use crate::error::{Operand, Result};
use crate::operands::{
    AddressSpace, BackwardInputs, Gradients, Memory, Pair, RawBackward, RawSecond, RawTensor, SecondTensors,
    check_backward_inputs, check_dtype, check_second,
};
use crate::plan::{BackwardPlan, Determinism};
use crate::tensor::Tensor;

/// The kernels of a plan, loaded.
struct Kernels<'a> {
    prepare: &'a Loaded,
    main: &'a Loaded,
    finish: &'a Loaded,
}

impl Cuda {
    /// Loads a backward plan's kernels, so that their first launch need not. Returns how long loading took when it
    /// happened.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver).
    pub fn load_backward(&self, plan: &BackwardPlan) -> Result<Duration> {
        self.device.make_current()?;
        let Kernels { prepare, main, finish } = self.backward_kernels(plan)?;
        Ok(prepare.load_time + main.load_time + finish.load_time)
    }

    /// Runs a backward plan on raw device addresses and the caller's stream. After the kernels' first use (see
    /// [`Cuda::load_backward`]) it neither allocates nor waits, and may be captured into a graph.
    ///
    /// # Errors
    /// Those of [`RawBackward::validate`], before anything is launched; [`Error::Driver`](crate::Error::Driver).
    ///
    /// # Safety
    /// Until the launches have run, the addresses are valid on this device for all that their layouts span, of elements
    /// of the plan's dtype, f32 for the LSE and its gradient, and the workspace for all of its size; nobody writes an
    /// input, or accesses an output or the workspace. `stream` is a stream of this device's primary context, or null.
    pub unsafe fn backward_raw(&self, plan: &BackwardPlan, args: &RawBackward, stream: RawStream) -> Result<()> {
        args.validate(plan)?;
        // SAFETY: validated; the caller's promise.
        unsafe { self.launch_backward(plan, args, stream) }
    }

    /// Checks the inputs by themselves.
    pub(super) fn check_gradient_inputs<E: Element>(
        &self,
        plan: &BackwardPlan,
        inputs: &BackwardInputs<DeviceSlice<'_, E>, DeviceSlice<'_, f32>>,
        second: Option<&Pair<Tensor<DeviceSlice<'_, E>>>>,
    ) -> Result<()> {
        check_second(plan.variant().op, second.is_some())?;
        check_dtype(plan.problem(), E::DTYPE)?;
        let second = second.map(|pair| pair.as_ref().map(read));
        check_backward_inputs(plan, &inputs.map(memory, memory), second.as_ref(), AddressSpace::Device)
    }

    /// Checks everything, takes memory for the workspace and launches the plan on the default stream. Giving the
    /// workspace back waits for the launches.
    pub(super) fn run_backward<E: Element>(
        &self,
        plan: &BackwardPlan,
        inputs: BackwardInputs<DeviceSlice<'_, E>, DeviceSlice<'_, f32>>,
        outputs: Gradients<Tensor<DeviceSliceMut<'_, E>>>,
        second: Option<SecondTensors<DeviceSlice<'_, E>, DeviceSliceMut<'_, E>>>,
    ) -> Result<()> {
        let outputs = outputs.map(written);
        let second = second.map(|SecondTensors { inputs, gradients }| SecondTensors {
            inputs: inputs.as_ref().map(read),
            gradients: gradients.map(written),
        });
        let inputs = inputs.map(memory, memory);
        let mut args = RawBackward::lower(plan, E::DTYPE, AddressSpace::Device, &inputs, &outputs, second.as_ref())?;
        let workspace = DeviceBuffer::<u8>::new(self, Operand::Workspace, plan.workspace_bytes())?;
        args.workspace = workspace.address();
        args.workspace_bytes = workspace.len();
        // SAFETY: the arguments were validated against the plan, and the workspace is this function's own; the slices
        // stand for valid memory, borrowed as the kernels use it. Freeing a buffer waits for the launches, and so do the
        // copies, all on the default stream.
        unsafe { self.launch_backward(plan, &args, std::ptr::null_mut()) }
    }

    /// The device's context is current.
    fn backward_kernels(&self, plan: &BackwardPlan) -> Result<Kernels<'_>> {
        let (modules, variant) = (&self.device.modules, plan.variant());
        Ok(Kernels {
            prepare: modules.get(variant.prepare, 0)?,
            main: modules.get(variant.symbol, plan.smem_bytes())?,
            finish: modules.get(variant.finish, 0)?,
        })
    }

    /// # Safety
    /// As [`Cuda::backward_raw`], with arguments that were validated for `plan`, workspace included.
    unsafe fn launch_backward(&self, plan: &BackwardPlan, args: &RawBackward, stream: RawStream) -> Result<()> {
        // Nothing to do, and so no workspace to work in.
        if plan.prepare_grid() == 0 {
            return Ok(());
        }
        self.device.make_current()?;
        // Everything that can fail by itself comes before the first launch.
        let kernels = self.backward_kernels(plan)?;
        let maps = if plan.grid() > 0 { Some(self.backward_maps(plan, args)?) } else { None };
        let stream = stream.cast();
        // SAFETY: these are the kernels' parameters, their context is current, and the caller promises the rest; the
        // turns are a part of the workspace.
        unsafe {
            let preparation = args.prepare(plan);
            if plan.workspace.turns_len > 0 {
                driver::zero_words(preparation.workspace.turns, plan.workspace.turns_len, stream)?;
            }
            let function = kernels.prepare.function;
            function.launch(plan.prepare_grid(), ROW_KERNEL_THREADS, 0, stream, &preparation)?;
            let mut finish = kernels.finish.function;
            if let Some((maps, second)) = maps {
                // Each waits by itself for the one before: main for all of it, finish head by head.
                let early = self.device.early_launch;
                finish = finish.early(early);
                let function = match plan.determinism() {
                    Determinism::Fast => kernels.main.function.early(early),
                    Determinism::Exact => kernels.main.function.cooperative(),
                };
                let (grid, block) = (plan.grid(), plan.block());
                let smem = plan.smem_bytes();
                match (args.second(plan, second), plan.launched) {
                    (Some(second), _) => {
                        function.launch(grid, block, smem, stream, &args.params(plan, maps, second))?;
                    }
                    (None, None) => function.launch(grid, block, smem, stream, &args.params(plan, maps, ()))?,
                    (None, Some(dropout)) => {
                        let params = WithDropout { params: args.params(plan, maps, ()), dropout };
                        function.launch(grid, block, smem, stream, &params)?;
                    }
                }
            }
            if plan.finish_grid() > 0 {
                for params in args.finish(plan) {
                    finish.launch(plan.finish_grid(), ROW_KERNEL_THREADS, 0, stream, &params)?;
                    // The second pair's waits for the first's, and so for main.
                    finish = kernels.finish.function;
                }
            }
        }
        Ok(())
    }

    /// Tensor maps of Q, K, V and dO, of a plan that has keys, and of the second pair.
    fn backward_maps(
        &self,
        plan: &BackwardPlan,
        args: &RawBackward,
    ) -> Result<([TensorMap; 4], Option<Pair<TensorMap>>)> {
        let (variant, dtype) = (plan.variant(), plan.problem().dtype);
        let encode = |tensor: &RawTensor, rows| self.device.encoder.encode(tensor, dtype, rows);
        // The driver encodes no empty tensor; every query of this one, some element of its K, has P = 0.
        let idle = plan.problem().seqlen_q == 0;
        let queries = |tensor: &RawTensor, k: &RawTensor| match idle {
            true => encode(&k.first_row(), variant.block_m),
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

/// A tensor that is read.
fn read<T>(x: &Tensor<DeviceSlice<'_, T>>) -> Tensor<Memory> {
    Tensor { data: memory(&x.data), layout: x.layout }
}

/// A tensor that is written.
fn written<T>(x: Tensor<DeviceSliceMut<'_, T>>) -> Tensor<Memory> {
    Tensor { data: Memory { address: x.data.address, len: Some(x.data.len) }, layout: x.layout }
}

/// A slice's address and length.
fn memory<T>(slice: &DeviceSlice<'_, T>) -> Memory {
    Memory { address: slice.address, len: Some(slice.len) }
}
