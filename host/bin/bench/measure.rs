//! The median time of many runs of one pass.

use std::time::{Duration, Instant};

use ferroflash::cases::Case;
use ferroflash::{Attention, Element, ForwardInputs, Operand, Pair, Piecewise, Result, Tensor};

use super::Step;
use crate::backward::{BackwardMemory, second_pair};
use crate::machine::Timed;
use crate::op::OpName;
use crate::sweep::interrupted;

/// Runs that warm-up and measurement have at least.
const WARM_UP: usize = 2;
const FEWEST_RUNS: usize = 5;

/// What runs of one problem took.
pub struct Measured {
    pub median: Duration,
    pub runs: usize,
    /// What they need beside the tensors.
    pub extra_bytes: usize,
}

/// Measures one problem; `None` where Ctrl-C left too few runs for a median.
pub fn measure<B: Timed, E: Element>(backend: &B, step: &Step, budget: Duration) -> Result<Option<Measured>> {
    let (attention, case) = (step.attention(), Case::new(step.problem, step.mask));
    match step.op {
        OpName::Forward | OpName::Piecewise => forward::<B, E>(backend, &attention, &case, step.dist_threshold, budget),
        OpName::Backward | OpName::PiecewiseBackward => {
            backward::<B, E>(backend, &attention, &case, step.dist_threshold, budget)
        }
        OpName::TotalAttention => total_attention::<B, E>(backend, &attention, &case, budget),
    }
}

fn forward<B: Timed, E: Element>(
    backend: &B,
    attention: &Attention,
    case: &Case,
    dist_threshold: Option<i32>,
    budget: Duration,
) -> Result<Option<Measured>> {
    let problem = &case.problem;
    let plan = match dist_threshold {
        Some(threshold) => Piecewise::new(attention.clone(), threshold).plan(backend.sm_count())?,
        None => attention.plan(backend.sm_count())?,
    };
    let second = dist_threshold.map(|_| second_pair::<B, E>(backend, case)).transpose()?;
    let inputs = case.random_inputs::<E>()?;
    let [q, k, v] = [
        backend.upload(Operand::Q, &inputs[0])?,
        backend.upload(Operand::K, &inputs[1])?,
        backend.upload(Operand::V, &inputs[2])?,
    ];
    let mut o = backend.allocate(Operand::O, inputs[0].len(), E::from_f32(0.0))?;
    let len = inputs[0].len();
    let launch = || {
        let kv = |buffer| Tensor::bhsd(B::slice(buffer), problem.kv_shape());
        let q = Tensor::bhsd(B::slice(&q), problem.q_shape());
        let o = Tensor::bhsd(B::slice_mut(&mut o, 0..len), problem.q_shape());
        let second =
            second.as_ref().map(|Pair { q, k }| Pair { q: Tensor::bhsd(B::slice(q), problem.q_shape()), k: kv(k) });
        let inputs = match second {
            Some(second) => ForwardInputs::piecewise(Pair { q, k: kv(&k) }, second, kv(&v)),
            None => ForwardInputs::plain(q, kv(&k), kv(&v)),
        };
        backend.forward_into(&plan, inputs, o, None)
    };
    median(backend, launch, budget, plan.workspace_bytes())
}

/// The whole backward pass; one forward pass before gives O and the LSE.
fn backward<B: Timed, E: Element>(
    backend: &B,
    attention: &Attention,
    case: &Case,
    dist_threshold: Option<i32>,
    budget: Duration,
) -> Result<Option<Measured>> {
    let plan = match dist_threshold {
        Some(threshold) => Piecewise::new(attention.clone(), threshold).plan_backward(backend.sm_count())?,
        None => attention.plan_backward(backend.sm_count())?,
    };
    let mut memory = BackwardMemory::<B, E>::new(backend, attention, case, dist_threshold)?;
    let lse_bytes = case.problem.lse_len() * size_of::<f32>();
    median(backend, backend.backward(&plan, &mut memory)?, budget, lse_bytes + plan.workspace_bytes())
}

/// Total attention alone; one forward pass before gives the LSE.
fn total_attention<B: Timed, E: Element>(
    backend: &B,
    attention: &Attention,
    case: &Case,
    budget: Duration,
) -> Result<Option<Measured>> {
    let (plan, problem) = (attention.plan_total_attention(backend.sm_count())?, &case.problem);
    let [q, k, v] = case.random_inputs::<E>()?;
    let [q, k, v] = [backend.upload(Operand::Q, &q)?, backend.upload(Operand::K, &k)?, backend.upload(Operand::V, &v)?];
    let of_q = Tensor::bhsd(B::slice(&q), problem.q_shape());
    let of_kv = |buffer| Tensor::bhsd(B::slice(buffer), problem.kv_shape());
    let lse = attention.forward(backend, of_q, of_kv(&k), of_kv(&v))?.lse;
    let lse = lse.map_or_else(|| backend.allocate(Operand::Lse, 0, 0.0), Ok)?;
    drop(v);
    let len = problem.total_len();
    let mut total = backend.allocate(Operand::Total, len, 0.0)?;
    let launch = || {
        let q = Tensor::bhsd(B::slice(&q), problem.q_shape());
        let k = Tensor::bhsd(B::slice(&k), problem.kv_shape());
        backend.total_attention_into(&plan, q, k, B::slice(&lse), B::slice_mut(&mut total, 0..len))
    };
    median(backend, launch, budget, problem.lse_len() * size_of::<f32>())
}

fn median<B: Timed>(
    backend: &B,
    mut launch: impl FnMut() -> Result<()>,
    budget: Duration,
    extra_bytes: usize,
) -> Result<Option<Measured>> {
    // As long as the measurement: a chip that comes from a pause runs faster than it can go on.
    let (start, mut runs) = (Instant::now(), 0);
    while (runs < WARM_UP || start.elapsed() < budget) && !interrupted() {
        backend.time(&mut launch)?;
        runs += 1;
    }
    let (start, mut times) = (Instant::now(), Vec::new());
    while (times.len() < FEWEST_RUNS || start.elapsed() < budget) && !interrupted() {
        times.push(backend.time(&mut launch)?);
    }
    if times.len() < FEWEST_RUNS {
        return Ok(None);
    }
    times.sort();
    Ok(Some(Measured { median: times[times.len() / 2], runs: times.len(), extra_bytes }))
}
