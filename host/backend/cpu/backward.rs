//! The backward pass on the CPU: key heads spread over rayon's threads.
//!
//! A key head and the query heads that read it are one unit: nobody else adds to their dQ, dK and dV, so the order of
//! every sum is fixed, and the bits do not depend on the number of threads.

use kernels_gpu::{
    cpu::{backward, finish, prepare},
    element::Element,
};
use rayon::prelude::*;

use super::{Cpu, catch};
use crate::{
    backend::Backend,
    error::{Operand, Result},
    operands::{
        AddressSpace, BackwardInputs, Gradients, Memory, RawBackward, RawTensor, check_backward_inputs, check_dtype,
    },
    plan::BackwardPlan,
    tensor::Tensor,
};

/// Checks the inputs by themselves.
pub(super) fn check_inputs<E: Element>(plan: &BackwardPlan, inputs: &BackwardInputs<&[E], &[f32]>) -> Result<()> {
    check_dtype(plan.problem(), E::DTYPE)?;
    check_backward_inputs(plan, &inputs.map(|x| memory(x), |x| memory(x)), AddressSpace::Host)
}

/// Checks everything, takes memory for the workspace and runs the plan.
pub(super) fn run_into<E: Element>(
    plan: &BackwardPlan,
    inputs: BackwardInputs<&[E], &[f32]>,
    outputs: Gradients<Tensor<&mut [E]>>,
) -> Result<()> {
    let outputs = outputs.map(|x| Tensor {
        data: Memory { address: x.data.as_mut_ptr().expose_provenance() as u64, len: Some(x.data.len()) },
        layout: x.layout,
    });
    let inputs = inputs.map(|x| memory(x), |x| memory(x));
    let mut args = RawBackward::lower(plan, E::DTYPE, AddressSpace::Host, &inputs, &outputs)?;
    let mut workspace = Cpu.allocate(Operand::Workspace, plan.workspace_bytes() / size_of::<f32>(), 0.0f32)?;
    args.workspace = workspace.as_mut_ptr().expose_provenance() as u64;
    args.workspace_bytes = plan.workspace_bytes();
    // SAFETY: the arguments were validated against the plan; they come from slices that are borrowed by the caller until
    // this function returns, those of the outputs mutably, and the workspace is this function's own.
    unsafe { run::<E>(plan, &args) }
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
    let (problem, shape) = (plan.problem(), plan.problem().kernel_shape());
    let (preparation, finishing) = (args.prepare(plan), args.finish(plan));
    let params = args.params(plan, [&args.q, &args.k, &args.v, &args.d_o].map(RawTensor::strided));
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
                    backward::<E>(plan.variant(), &params, batch, head_kv);
                }
                heads.for_each(|head| finish::<E>(&finishing, plan.variant().head_dim, batch, head));
            }
        })
    })
}
