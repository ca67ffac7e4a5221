//! One step: the median time of many runs, and the memory that they need.

use std::time::Duration;

use ferroflash::{Element, Inputs as AttentionInputs, Operand, Result, TotalInputs, Workspace};

use super::Step;
use super::protocol::{FEWEST_RUNS, Method};
use crate::backward::BackwardMemory;
use crate::inputs::{Inputs, tensor};
use crate::machine::Timed;
use crate::memory::forget_peak_memory;
use crate::op::OpName;
use crate::shaping::Lines;

/// What runs of one problem took.
pub struct Measured {
    pub median: Duration,
    pub runs: usize,
    /// What they need beside the tensors.
    pub extra_bytes: usize,
}

/// Measures one step with the inputs that it reads; `None` where Ctrl-C left too few runs for a median.
pub fn measure<B: Timed, E: Element>(
    backend: &B,
    step: &Step,
    inputs: &Inputs<B, E>,
    method: &Method,
) -> Result<Option<Measured>> {
    match step.op {
        OpName::Forward | OpName::Piecewise => forward(backend, step, inputs, method),
        OpName::Backward | OpName::PiecewiseBackward => backward(backend, step, inputs, method),
        OpName::TotalAttention => total_attention(backend, step, inputs, method),
    }
}

fn forward<B: Timed, E: Element>(
    backend: &B,
    step: &Step,
    inputs: &Inputs<B, E>,
    method: &Method,
) -> Result<Option<Measured>> {
    let (plan, shape) = (step.plan(backend.sm_count())?, step.problem.q_shape());
    let len = shape.iter().product();
    let mut o = backend.allocate(Operand::O, len)?;
    let lines = Lines::new(backend, &step.problem, &step.shaping)?;
    let mut workspace = Workspace::new();
    let launch = || {
        let o = tensor(plan.options(), B::slice_mut(&mut o, 0..len), shape);
        plan.run_in(backend, inputs.tensors(&plan).optional(lines.inputs()), o, None, &mut workspace)
    };
    median(backend, launch, method, plan.workspace_bytes())
}

/// The whole backward pass; one forward pass before gives O and the LSE.
fn backward<B: Timed, E: Element>(
    backend: &B,
    step: &Step,
    inputs: &Inputs<B, E>,
    method: &Method,
) -> Result<Option<Measured>> {
    let (forward, plan) = (step.plan(backend.sm_count())?, step.plan_backward(backend.sm_count())?);
    let mut memory = BackwardMemory::new(backend, &forward, &step.shaping, inputs)?;
    let lse_bytes = step.problem.lse_len() * size_of::<f32>();
    median(backend, || memory.run(backend, &plan), method, lse_bytes + plan.workspace_bytes())
}

/// Total attention alone; one forward pass before gives the LSE.
fn total_attention<B: Timed, E: Element>(
    backend: &B,
    step: &Step,
    inputs: &Inputs<B, E>,
    method: &Method,
) -> Result<Option<Measured>> {
    let (attention, problem) = (step.attention(), &step.problem);
    let plan = attention.plan_total_attention(backend.sm_count())?;
    let q = || inputs.q.tensor(plan.options(), problem.q_shape());
    let k = || inputs.k.tensor(plan.options(), problem.kv_shape());
    // The LSE is the same whatever V is.
    let lines = Lines::new(backend, problem, &step.shaping)?;
    let lse = attention.forward_with(backend, AttentionInputs::new(q(), k(), k()).optional(lines.inputs()))?.lse;
    let lse = lse.map_or_else(|| backend.allocate(Operand::Lse, 0), Ok)?;
    let len = problem.total_len();
    let mut total = backend.allocate(Operand::Total, len)?;
    let mut workspace = Workspace::new();
    let launch = || {
        let inputs = TotalInputs::new(q(), k(), B::slice(&lse)).optional(lines.inputs());
        plan.run_in(backend, inputs, B::slice_mut(&mut total, 0..len), &mut workspace)
    };
    median(backend, launch, method, problem.lse_len() * size_of::<f32>() + plan.workspace_bytes())
}

fn median<B: Timed>(
    backend: &B,
    launch: impl FnMut() -> Result<()>,
    method: &Method,
    extra_bytes: usize,
) -> Result<Option<Measured>> {
    // What making the inputs took is no part of the pass.
    forget_peak_memory();
    let mut times = method.times(backend, launch)?;
    if times.len() < FEWEST_RUNS {
        return Ok(None);
    }
    times.sort();
    Ok(Some(Measured { median: times[times.len() / 2], runs: times.len(), extra_bytes }))
}
