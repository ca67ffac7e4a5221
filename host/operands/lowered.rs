//! Optional inputs as kernels read them.

use kernels_gpu::{attention::any_features::AnyFeatures, attention::score::Shaped, ground::tensor::PerHead};

use super::{OptionalInputs, SeedOffset, Slopes};
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

/// Returns the sinks at this address.
pub(super) fn sinks_at(sinks: Option<u64>) -> PerHead {
    sinks.map_or(PerHead::NONE, per_head)
}
