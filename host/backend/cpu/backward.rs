//! The backward pass on the CPU: key heads spread over rayon's threads.
//!
//! A key head and the query heads that read it are one unit: nobody else adds to their dQ, dK and dV, so the order of
//! every sum is fixed, and the bits do not depend on the number of threads.

use kernels_gpu::{
    attention::dropping::NoDropout,
    cpu::{add_parts, backward, finish, prepare},
};
use rayon::prelude::*;

use super::{Cpu, catch};
use crate::{
    backend::Workspace,
    element::Element,
    error::Result,
    operands::{
        AddressSpace, BackwardInputs, Gradients, Memory, Pair, RawBackward, RawTensor, SecondTensors,
        check_backward_inputs, check_dtype, check_second,
    },
    plan::BackwardPlan,
    tensor::Tensor,
};

/// Multiprocessors of the machine for which work tiles are shared out in parts, whatever the threads that run them: bits
/// don't depend on those. So few that small problems, too, have both whole work tiles and parts.
const SM_COUNT: u32 = 7;

/// Checks the inputs by themselves.
pub(super) fn check_inputs<E: Element>(
    plan: &BackwardPlan,
    inputs: &BackwardInputs<&[E], &[f32]>,
    second: Option<&Pair<Tensor<&[E]>>>,
) -> Result<()> {
    check_second(plan.variant().op, second.is_some())?;
    check_dtype(plan.problem(), E::DTYPE)?;
    let second = second.map(|pair| pair.as_ref().map(read));
    check_backward_inputs(plan, &inputs.map(|x| memory(x), |x| memory(x)), second.as_ref(), AddressSpace::Host)
}

/// Checks everything and runs the plan in the caller's workspace.
pub(super) fn run_into<E: Element>(
    plan: &BackwardPlan,
    inputs: BackwardInputs<&[E], &[f32]>,
    outputs: Gradients<Tensor<&mut [E]>>,
    second: Option<SecondTensors<&[E], &mut [E]>>,
    workspace: &mut Workspace<Cpu>,
) -> Result<()> {
    let plan = &plan.on(SM_COUNT)?;
    let outputs = outputs.map(written);
    let second = second.map(|SecondTensors { inputs, gradients }| SecondTensors {
        inputs: inputs.as_ref().map(read),
        gradients: gradients.map(written),
    });
    let inputs = inputs.map(|x| memory(x), |x| memory(x));
    let mut args = RawBackward::lower(plan, E::DTYPE, AddressSpace::Host, &inputs, &outputs, second.as_ref())?;
    let workspace = workspace.reserve(&Cpu, plan.workspace_bytes())?;
    args.workspace = workspace.as_mut_ptr().expose_provenance() as u64;
    args.workspace_bytes = plan.workspace_bytes();
    // SAFETY: the arguments were validated against the plan; they come from slices that are borrowed by the caller until
    // this function returns, those of the outputs and of the workspace mutably.
    unsafe { run::<E>(plan, &args) }
}

/// A tensor that is read.
fn read<E>(x: &Tensor<&[E]>) -> Tensor<Memory> {
    Tensor { data: memory(x.data), layout: x.layout }
}

/// A tensor that is written.
fn written<E>(x: Tensor<&mut [E]>) -> Tensor<Memory> {
    let data = Memory { address: x.data.as_mut_ptr().expose_provenance() as u64, len: Some(x.data.len()) };
    Tensor { data, layout: x.layout }
}

/// A slice's address and length.
fn memory<T>(data: &[T]) -> Memory {
    Memory { address: data.as_ptr().expose_provenance() as u64, len: Some(data.len()) }
}

/// Runs every key head of `plan`, in parallel; stops at the first fault.
///
/// # Safety
/// `args` has passed [`RawBackward::lower`] for `plan` with elements `E` and got a workspace of the plan's size; all of
/// its memory is valid, for writing the outputs and the workspace and for reading the rest, until this function returns.
unsafe fn run<E: Element>(plan: &BackwardPlan, args: &RawBackward) -> Result<()> {
    // Nothing to do, and so no workspace to work in.
    if plan.prepare_grid() == 0 {
        return Ok(());
    }
    let tensors = [&args.q, &args.k, &args.v, &args.d_o].map(RawTensor::strided);
    let second = args.second.map(|second| second.inputs.as_ref().map(RawTensor::strided));
    // SAFETY: this function's contract; the main kernel runs as `run_with` says.
    unsafe {
        match (args.second(plan, second), plan.launched) {
            (Some(second), _) => {
                let params = args.params(plan, tensors, second);
                run_with::<E>(plan, args, |batch, head| {
                    backward::<E, _, _>(plan.variant(), &params, NoDropout, batch, head)
                })
            }
            (None, None) => {
                let params = args.params(plan, tensors, ());
                run_with::<E>(plan, args, |batch, head| {
                    backward::<E, _, _>(plan.variant(), &params, NoDropout, batch, head)
                })
            }
            (None, Some(dropout)) => {
                let params = args.params(plan, tensors, ());
                run_with::<E>(plan, args, |batch, head| {
                    backward::<E, _, _>(plan.variant(), &params, dropout, batch, head);
                })
            }
        }
    }
}

/// Runs every key head, `main(batch, head)` after its query heads have been prepared, and where it has a key.
///
/// # Safety
/// As [`run`].
unsafe fn run_with<E: Element>(plan: &BackwardPlan, args: &RawBackward, main: impl Fn(u32, u32) + Sync) -> Result<()> {
    let (problem, shape) = (plan.problem(), plan.problem().kernel_shape());
    let preparation = args.prepare(plan);
    (0..shape.batch * shape.heads_kv).into_par_iter().with_max_len(1).try_for_each(|unit| {
        let (batch, head_kv) = (unit / shape.heads_kv, unit % shape.heads_kv);
        let heads = head_kv * shape.group()..(head_kv + 1) * shape.group();
        catch(plan.variant().symbol, unit, || {
            // SAFETY: by this function's contract the memory is valid, and its layouts are those of the plan, whose
            // variant this is; outputs and workspace alias nothing, and what is written belongs to this key head or to
            // one of its query heads, so units may run at the same time. The workspace is filled before it is used, and
            // the main kernel runs only where there is a key.
            unsafe {
                heads.clone().for_each(|head| prepare::<E>(&preparation, batch, head));
                if problem.seqlen_k > 0 {
                    main(batch, head_kv);
                }
                for finishing in args.finish(plan) {
                    heads.clone().for_each(|head| finish::<E>(&finishing, plan.variant().head_dim, batch, head));
                    if problem.seqlen_k > 0 {
                        add_parts::<E>(&finishing, plan.variant(), batch, head_kv);
                    }
                }
            }
        })
    })
}
