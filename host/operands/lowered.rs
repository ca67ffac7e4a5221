//! Optional inputs as kernels read them.

use kernels_gpu::{
    attention::any_features::AnyFeatures,
    attention::score::Shaped,
    attention::sequences::Sequences,
    ground::tensor::{PerHead, RowArray},
};

use super::{OptionalInputs, SeedOffset, Slopes};
use crate::plan::Schedule;
use crate::problem::Problem;

/// Returns an array of one value for each query head.
fn per_head(address: u64) -> PerHead {
    PerHead { address, stride_batch: 0 }
}

/// Returns the slopes at these addresses.
fn slopes_at(slopes: Option<Slopes<u64>>, problem: &Problem) -> PerHead {
    match slopes {
        None => PerHead::NONE,
        Some(Slopes::PerHead(address)) => per_head(address),
        Some(Slopes::PerItem(address)) => PerHead { address, stride_batch: problem.heads_q as u64 },
    }
}

/// Returns the scores of a plan with their slopes.
pub(super) fn with_slopes(score: Shaped, slopes: Option<Slopes<u64>>, problem: &Problem) -> Shaped {
    score.with_slopes(slopes_at(slopes, problem))
}

/// Returns the features of a plan with the addresses of slopes, and of seed and offset of dropout.
pub(super) fn features(plan: &AnyFeatures, optional: &OptionalInputs<u64>, problem: &Problem) -> AnyFeatures {
    let features = AnyFeatures { score: with_slopes(plan.score, optional.slopes, problem), ..*plan };
    features.with_seed_offset(optional.seed_offset.map(SeedOffset::raw))
}

/// Returns the array of one f32 for each of `rows` rows of each head, or none if there is no address.
pub(super) fn row_array(address: Option<u64>, rows: usize, problem: &Problem, schedule: Option<&Schedule>) -> RowArray {
    let Some(address) = address else { return RowArray::NONE };
    let rows = rows as u64;
    match schedule {
        None => RowArray { address, stride_batch: rows * problem.heads_q as u64, stride_head: rows },
        // As for tensors whose rows sequences share.
        Some(_) => RowArray { address: address.wrapping_sub(4 * rows), stride_batch: 1, stride_head: rows },
    }
}

/// Returns the sequences of a schedule in the workspace at this address.
pub(super) fn sequences(schedule: Option<&Schedule>, workspace: u64) -> Sequences {
    schedule.map_or(Sequences::DENSE, |schedule| schedule.sequences(workspace))
}

/// Returns the sinks at this address.
pub(super) fn sinks_at(sinks: Option<u64>) -> PerHead {
    sinks.map_or(PerHead::NONE, per_head)
}
