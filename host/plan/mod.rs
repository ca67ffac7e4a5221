//! Plans: kernel, tiles and grid as pure functions of the problem and the machine's size.
//!
//! Only functions that validate the problem make a [`Plan`], [`BackwardPlan`] or [`TotalPlan`], so code that has a plan
//! need not validate again. The CPU executor and the GPU run the same plan.

use std::fmt;

use kernels_gpu::{attention::scheduler::MAX_CTAS, variants::Op};

use crate::{
    dropout::Dropout,
    error::{Error, Result},
    problem::{Mask, Problem, at_most},
};

mod backward;
mod forward;
mod needs;
mod run;
mod total_attention;
mod workspace;

#[cfg(test)]
mod extremes;

pub use backward::{BackwardPlan, Determinism};
pub use forward::Plan;
use needs::needs;
pub use needs::{Needs, PassKind};
pub use total_attention::TotalPlan;
pub(crate) use workspace::{WORKSPACE_ALIGNMENT, WorkspaceLayout};

/// Work tiles are counted in 32-bit signed numbers.
const MAX_WORK_TILES: u128 = i32::MAX as u128;

/// Checks the problem and returns the factor of its scores, by default 1/√head_dim.
fn checked_scale(problem: &Problem, scale: Option<f32>) -> Result<f32> {
    problem.validate()?;
    let scale = scale.unwrap_or_else(|| 1.0 / (problem.head_dim as f32).sqrt());
    if !scale.is_finite() || scale <= 0.0 {
        return Err(Error::Scale { value: scale });
    }
    Ok(scale)
}

/// Checks the number of SMs; 0 counts as 1.
fn checked_sm_count(sm_count: u32) -> Result<u32> {
    at_most("sm_count", sm_count as u128, MAX_CTAS as u128)?;
    Ok(sm_count.max(1))
}

/// Options of a pass in addition to problem, mask and scale. No kernel has both.
struct Extra {
    dist_threshold: Option<i32>,
    dropout: Dropout,
}

/// Returns the operator of a plan with this threshold.
fn op(dist_threshold: Option<i32>) -> Op {
    if dist_threshold.is_some() { Op::Piecewise } else { Op::Forward }
}

fn write_threshold(f: &mut fmt::Formatter<'_>, dist_threshold: Option<i32>) -> fmt::Result {
    dist_threshold.map_or(Ok(()), |threshold| write!(f, ", dist_threshold {threshold}"))
}

/// Writes a plan's first line: the pass and the problem.
fn write_problem(
    f: &mut fmt::Formatter<'_>,
    pass: &str,
    problem: &Problem,
    mask: Mask,
    scale: f32,
    dropout: Dropout,
) -> fmt::Result {
    let Problem { batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, dtype } = problem;
    write!(
        f,
        "{pass} {}: batch {batch}, heads {heads_q}/{heads_kv}, seqlen {seqlen_q} × {seqlen_k}, head_dim {head_dim}, \
         mask {mask}, scale {scale}",
        dtype.name(),
    )?;
    match dropout.probability() {
        Ok(p) if p > 0.0 => write!(f, ", dropout {p}"),
        _ => Ok(()),
    }
}
