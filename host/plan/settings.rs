//! The settings that every plan holds: the problem and the options of its attention, checked once.

use std::fmt;

use kernels_gpu::variants::Op;

use super::{Needs, PassKind};
use crate::{
    dropout::Dropout,
    error::{Error, Result},
    problem::{MAX_EXTENT, Mask, Problem, at_most},
};

/// Options of a pass in addition to problem, mask and scale.
pub(super) struct Extra {
    pub(super) dist_threshold: Option<i32>,
    pub(super) dropout: Dropout,
}

impl Extra {
    /// One pair of Q and K, and no dropout.
    pub(super) const NONE: Extra = Extra { dist_threshold: None, dropout: Dropout::NONE };
}

/// A validated problem and the options of its attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Settings {
    pub(super) problem: Problem,
    pub(super) mask: Mask,
    /// Factor of the scores, finite and above 0.
    pub(super) scale: f32,
    /// Distance from which on scores come from the second pair of Q and K; `None` if there is one pair.
    pub(super) dist_threshold: Option<i32>,
    pub(super) dropout: Dropout,
}

impl Settings {
    /// Checks problem and scale. The default scale is 1/√head_dim. A plan checks the dropout when it lowers it.
    pub(super) fn new(problem: &Problem, mask: Mask, scale: Option<f32>, extra: Extra) -> Result<Self> {
        problem.validate()?;
        let scale = scale.unwrap_or_else(|| 1.0 / (problem.head_dim as f32).sqrt());
        if !scale.is_finite() || scale <= 0.0 {
            return Err(Error::Scale { value: scale });
        }
        if let Mask::Window { .. } = mask {
            // Kernels add a bound to a place among the keys.
            at_most("seqlen_q + seqlen_k", problem.seqlen_q as u128 + problem.seqlen_k as u128, MAX_EXTENT as u128)?;
        }
        let Extra { dist_threshold, dropout } = extra;
        Ok(Settings { problem: *problem, mask, scale, dist_threshold, dropout })
    }

    /// Returns the operator of the plan.
    pub(super) fn op(&self) -> Op {
        if self.dist_threshold.is_some() { Op::Piecewise } else { Op::Forward }
    }

    /// Returns the properties that a pass with these settings needs of a kernel.
    pub(super) fn needs(&self, pass: PassKind) -> Needs {
        let Settings { problem, mask, dropout, .. } = self;
        let Problem { head_dim, dtype, .. } = *problem;
        Needs { pass, op: self.op(), head_dim, mask: *mask, dtype, dropout: dropout.p }
    }

    /// Writes a plan's first line: the pass and the settings.
    pub(super) fn write(&self, f: &mut fmt::Formatter<'_>, pass: &str) -> fmt::Result {
        let Settings { problem, mask, scale, dist_threshold, dropout } = self;
        let Problem { batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, dtype } = problem;
        write!(
            f,
            "{pass} {}: batch {batch}, heads {heads_q}/{heads_kv}, seqlen {seqlen_q} × {seqlen_k}, head_dim {head_dim}, \
             mask {mask}, scale {scale}",
            dtype.name(),
        )?;
        if dropout.p > 0.0 {
            write!(f, ", dropout {}", dropout.p)?;
        }
        dist_threshold.map_or(Ok(()), |threshold| write!(f, ", dist_threshold {threshold}"))
    }
}

/// Gives a plan that holds [`Settings`] the accessors that all plans have.
macro_rules! accessors {
    ($plan:ty) => {
        impl $plan {
            /// Returns the problem, validated.
            pub fn problem(&self) -> &Problem {
                &self.settings.problem
            }

            /// Returns the mask, which selects the keys that a query attends to.
            pub fn mask(&self) -> Mask {
                self.settings.mask
            }

            /// Returns the factor of the scores, finite and above 0.
            pub fn scale(&self) -> f32 {
                self.settings.scale
            }
        }
    };
}

/// Gives a plan the accessors of [`accessors`], and those of plans that take a second pair or dropout.
macro_rules! accessors_with_extra {
    ($plan:ty) => {
        $crate::plan::settings::accessors!($plan);

        impl $plan {
            /// Returns the distance from which on scores come from the second pair of Q and K; `None` if there is one
            /// pair.
            pub fn dist_threshold(&self) -> Option<i32> {
                self.settings.dist_threshold
            }

            /// Returns the dropout of attention weights.
            pub fn dropout(&self) -> Dropout {
                self.settings.dropout
            }

            /// Returns the plan with another seed and offset. `dropout` has the plan's probability, so that kernel and
            /// launch stay the same.
            pub(crate) fn with_random_numbers_of(mut self, dropout: Dropout) -> Result<Self> {
                self.settings.dropout = dropout;
                self.features.dropout = dropout.launched()?;
                Ok(self)
            }
        }
    };
}

pub(super) use {accessors, accessors_with_extra};
