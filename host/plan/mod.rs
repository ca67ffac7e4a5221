//! Plans: kernel, tiles and grid as pure functions of the problem and the machine's size.
//!
//! Only functions that validate the problem make a [`Plan`], [`BackwardPlan`] or [`TotalPlan`], so code that has a plan
//! need not validate again. The CPU executor and the GPU run the same plan.

use kernels_gpu::attention::any_features::{AnyFeatures, AnyMask};
use kernels_gpu::attention::scheduler::MAX_CTAS;
use kernels_gpu::attention::score::Shaped;

use crate::error::Result;
use crate::problem::at_most;

mod backward;
mod forward;
mod needs;
mod options;
mod run;
mod schedule;
mod settings;
mod total_attention;
mod workspace;

#[cfg(test)]
mod extremes;

pub use backward::{BackwardPlan, Determinism};
pub use forward::Plan;
pub use needs::{Needs, PassKind};
pub use options::{Alibi, InputKinds, Options, Sinks};
pub(crate) use schedule::Schedule;
use schedule::{ListOf, most_blocks};
use settings::{Settings, accessors, accessors_with_extra};
pub use total_attention::TotalPlan;
pub(crate) use workspace::{WORKSPACE_ALIGNMENT, WorkspaceLayout};

/// Work tiles are counted in 32-bit signed numbers.
const MAX_WORK_TILES: u128 = i32::MAX as u128;

/// Checks the number of SMs; 0 counts as 1.
fn checked_sm_count(sm_count: u32) -> Result<u32> {
    at_most("sm_count", sm_count as u128, MAX_CTAS as u128)?;
    Ok(sm_count.max(1))
}

/// Returns the features of a plan with these settings as launch parameters. Addresses are still missing.
fn features(settings: &Settings) -> Result<AnyFeatures> {
    let Settings { problem, scale, options } = settings;
    Ok(AnyFeatures {
        mask: AnyMask::new(options.mask.window(problem), options.dist_threshold),
        // Without sequences there are no slopes to read, but rows to fill.
        score: Shaped::new(*scale, options.softcap, options.alibi != Alibi::None && settings.has_items()),
        dropout: options.dropout.launched()?,
    })
}
