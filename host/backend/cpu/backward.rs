//! The backward pass on the CPU: key heads, spread over rayon's threads.
//!
//! A key head and the query heads that read it are one unit. No other unit adds to their dQ, dK and dV, so the order of
//! every sum is fixed, and the bits do not depend on the number of threads.

use kernels_gpu::{
    cpu::{add_parts, finish, prepare, schedule, sink_gradient},
    params::SINK_GRADIENTS,
};

use super::{Cpu, check, check_host_lengths, pool, reserve};
use crate::{
    backend::Workspace,
    element::Element,
    error::Result,
    operands::{
        BackwardInputs, BackwardTensors, Gradients, PackedGradients, Pair, RawBackward, RawTensor, SecondTensors,
    },
    plan::BackwardPlan,
    tensor::Tensor,
};

/// Number of SMs for which the tail's work tiles are split. It does not depend on the number of threads, because the
/// bits must not. It is small, so that small problems also have both unsplit and split work tiles.
const SM_COUNT: u32 = 7;

/// Returns the plan that runs here.
pub(super) fn replan(plan: &BackwardPlan) -> Result<BackwardPlan> {
    plan.on(SM_COUNT)
}

/// Checks each input alone.
pub(super) fn check_inputs<E: Element>(
    plan: &BackwardPlan,
    inputs: BackwardInputs<&[E], &[f32]>,
    second: Option<Pair<Tensor<&[E]>>>,
) -> Result<()> {
    let mut check = check(plan.problem(), plan.inputs());
    BackwardTensors::inputs(inputs, second).lower(plan, E::DTYPE, &mut check)?;
    check_host_lengths(plan.problem(), inputs.optional.lengths.as_ref())
}

/// Checks everything and runs the plan in the caller's workspace.
pub(super) fn run_into<E: Element>(
    plan: &BackwardPlan,
    inputs: BackwardInputs<&[E], &[f32]>,
    outputs: Gradients<Tensor<&mut [E]>, &mut [f32]>,
    second: Option<SecondTensors<&[E], &mut [E]>>,
    workspace: &mut Workspace<Cpu>,
) -> Result<()> {
    let plan = &replan(plan)?;
    let mut check = check(plan.problem(), plan.inputs());
    let args = BackwardTensors::new(inputs, second, outputs).lower(plan, E::DTYPE, &mut check)?;
    check.overlaps()?;
    check_host_lengths(plan.problem(), inputs.optional.lengths.as_ref())?;
    // SAFETY: the arguments were checked, and come from slices that are borrowed by the caller until this function
    // returns, those of the outputs mutably.
    unsafe { run(plan, args, workspace) }
}

/// Checks everything and runs the plan in the caller's workspace, with packed gradients.
pub(super) fn run_packed<E: Element>(
    plan: &BackwardPlan,
    inputs: BackwardInputs<&[E], &[f32]>,
    outputs: PackedGradients<Tensor<&mut [E]>, &mut [f32]>,
    workspace: &mut Workspace<Cpu>,
) -> Result<()> {
    let plan = &replan(plan)?;
    let mut check = check(plan.problem(), plan.inputs());
    let args = outputs.lower(inputs, plan, E::DTYPE, &mut check)?;
    check.overlaps()?;
    check_host_lengths(plan.problem(), inputs.optional.lengths.as_ref())?;
    // SAFETY: the arguments were checked, and come from slices that are borrowed by the caller until this function
    // returns, those of the outputs mutably. The packed gradients lie between each other in one of them.
    unsafe { run(plan, args, workspace) }
}

/// Runs every key head of `plan` in the caller's workspace, in parallel. Stops at the first fault.
///
/// # Safety
/// The arguments, without a workspace, were checked against the plan. They are valid until this function returns, for
/// writing the outputs and for reading the inputs.
pub(super) unsafe fn run(plan: &BackwardPlan, mut args: RawBackward, workspace: &mut Workspace<Cpu>) -> Result<()> {
    args.workspace = reserve(workspace, plan.workspace_bytes())?;
    // Without anything to do there is no workspace either.
    if plan.prepare_grid() == 0 {
        if let Some(d_sinks) = args.d_sinks {
            let d_sinks: *mut f32 = std::ptr::with_exposed_provenance_mut(d_sinks as usize);
            // SAFETY: the caller promised so many elements for writing.
            unsafe { d_sinks.write_bytes(0, plan.problem().heads_q) };
        }
        return Ok(());
    }
    if let Some((params, lists)) = args.schedule(plan) {
        // SAFETY: the caller checked the arguments, and the workspace is as large as the plan says.
        unsafe { schedule(&params, lists as usize) };
    }
    let placed = |tensor: &RawTensor| tensor.placed(plan.schedule.as_ref());
    let tensors = [&args.q, &args.k, &args.v, &args.d_o].map(placed);
    let named = args.second.map(|second| second.inputs.as_ref().map(placed));
    let params = args.params(plan, tensors, named);
    let preparation = args.prepare(plan);
    let (problem, shape, variant) = (plan.problem(), plan.problem().kernel_shape(), plan.variant());
    let items = plan.schedule.map_or(shape.batch, |schedule| schedule.items());
    pool::for_each(variant.symbol, items * shape.heads_kv, |unit| {
        let (batch, head_kv) = (unit / shape.heads_kv, unit % shape.heads_kv);
        let heads = head_kv * shape.group()..(head_kv + 1) * shape.group();
        // SAFETY: the caller promised the memory, and checked its layouts against the plan, which also has this
        // variant. The workspace is borrowed mutably. Outputs and workspace alias nothing, and every write goes to this
        // key head or to one of its query heads, so units may run at the same time. The workspace is filled before it
        // is used, and the main kernel runs only if there is a key.
        unsafe {
            heads.clone().for_each(|head| prepare(&preparation, variant.dtype, batch, head));
            if problem.seqlen_k > 0 {
                (variant.run)(variant.dtype, variant.smem(), &params, batch, head_kv);
            }
            for finishing in args.finish(plan) {
                heads.clone().for_each(|head| finish(&finishing, variant, batch, head));
                if problem.seqlen_k > 0 {
                    add_parts(&finishing, variant, batch, head_kv);
                }
            }
        }
    })?;
    let Some(params) = args.sink_gradients(plan) else { return Ok(()) };
    pool::for_each(SINK_GRADIENTS, shape.heads_q, |head| {
        // SAFETY: the caller promised the memory, and every head has been prepared. Each writes its own element.
        unsafe { sink_gradient(&params, head) }
    })
}
