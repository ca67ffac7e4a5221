//! The settings that every plan holds: the problem and the options of its attention, checked once.

use std::fmt;

use kernels_gpu::variants::Op;

use super::{Alibi, InputKinds, Needs, Options, PassKind, Sinks};
use crate::{
    error::{Error, Result},
    problem::{MAX_EXTENT, Mask, Problem, at_most},
};

/// Maximum number of sequences, of which each has three items of the schedule.
const MAX_SEQUENCES: u128 = 1 << 28;

/// A validated problem and the options of its attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Settings {
    pub(super) problem: Problem,
    /// Factor of the scores, finite and above 0.
    pub(super) scale: f32,
    /// The options. A scale in them is the same factor.
    pub(super) options: Options,
}

impl Settings {
    /// Checks the problem and the factors of scores. A plan checks the dropout when it lowers it.
    pub(super) fn new(problem: &Problem, options: &Options) -> Result<Self> {
        problem.validate()?;
        let scale = options.scale.unwrap_or_else(|| 1.0 / (problem.head_dim as f32).sqrt());
        if !is_factor(scale) {
            return Err(Error::Scale { value: scale });
        }
        check_factors(scale, options)?;
        if let Some(sequences) = options.sequences {
            if problem.batch != 1 {
                return Err(Error::BatchOfSequences { value: problem.batch });
            }
            at_most("sequences", sequences.count as u128, MAX_SEQUENCES)?;
        }
        if let Mask::Window { .. } = options.mask {
            // Kernels add a bound to a place among the keys.
            at_most("seqlen_q + seqlen_k", problem.seqlen_q as u128 + problem.seqlen_k as u128, MAX_EXTENT as u128)?;
        }
        Ok(Settings { problem: *problem, scale, options: Options { scale: Some(scale), ..*options } })
    }

    /// True if the batch has an item, or a sequence if lengths differ.
    pub(super) fn has_items(&self) -> bool {
        self.options.sequences.map_or(self.problem.batch, |sequences| sequences.count) > 0
    }

    /// Returns the operator of the plan.
    pub(super) fn op(&self) -> Op {
        if self.options.dist_threshold.is_some() { Op::Piecewise } else { Op::Forward }
    }

    /// Returns the kinds of the optional inputs.
    pub(super) fn inputs(&self) -> InputKinds {
        let Options { alibi, sinks, sequences, .. } = self.options;
        InputKinds { alibi, sinks, sequences }
    }

    /// Returns the properties that a pass with these settings needs of a kernel.
    pub(super) fn needs(&self, pass: PassKind) -> Needs {
        let Problem { head_dim, dtype, .. } = self.problem;
        let Options { mask, softcap, alibi, sinks, dropout, .. } = self.options;
        Needs { pass, op: self.op(), head_dim, mask, dtype, softcap, alibi, sinks, dropout: dropout.p() }
    }

    /// Writes a plan's first line: the pass and the settings.
    pub(super) fn write(&self, f: &mut fmt::Formatter<'_>, pass: &str) -> fmt::Result {
        let Settings { problem, scale, options } = self;
        let Problem { batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, dtype } = problem;
        write!(
            f,
            "{pass} {}: batch {batch}, heads {heads_q}/{heads_kv}, seqlen {seqlen_q} × {seqlen_k}, head_dim {head_dim}, \
             mask {}, scale {scale}",
            dtype.name(),
            options.mask,
        )?;
        write_shaping(f, options.softcap, options.alibi, options.sinks)?;
        if let Some(sequences) = options.sequences {
            write!(f, ", {} sequences", sequences.count)?;
        }
        if options.dropout.p() > 0.0 {
            write!(f, ", dropout {}", options.dropout.p())?;
        }
        if options.dropout.reads_memory() {
            f.write_str(", seed and offset from memory")?;
        }
        options.dist_threshold.map_or(Ok(()), |threshold| write!(f, ", dist_threshold {threshold}"))
    }
}

/// Writes what shapes scores and softmax, if there is anything.
pub(super) fn write_shaping(
    f: &mut fmt::Formatter<'_>,
    softcap: Option<f32>,
    alibi: Alibi,
    sinks: Sinks,
) -> fmt::Result {
    softcap.map_or(Ok(()), |cap| write!(f, ", softcap {cap}"))?;
    f.write_str(match alibi {
        Alibi::None => "",
        Alibi::PerHead => ", alibi",
        Alibi::PerItem => ", alibi per batch item",
    })?;
    f.write_str(match sinks {
        Sinks::None => "",
        Sinks::PerHead => ", sinks",
    })
}

/// True if kernels may multiply by this number.
fn is_factor(value: f32) -> bool {
    value.is_finite() && value > 0.0
}

/// Checks the softcap, and the quotients of scale and softcap that kernels multiply by.
fn check_factors(scale: f32, options: &Options) -> Result<()> {
    if let Some(cap) = options.softcap {
        if !is_factor(cap) {
            return Err(Error::Softcap { value: cap });
        }
        let inner = (f64::from(scale) / f64::from(cap)) as f32;
        if !is_factor(inner) {
            return Err(Error::ScoreFactor { factor: "scale / softcap", value: inner });
        }
    }
    if options.alibi != Alibi::None {
        let (factor, unit) = match options.softcap {
            Some(cap) => ("1 / softcap", cap),
            None => ("1 / scale", scale),
        };
        if !is_factor(1.0 / unit) {
            return Err(Error::ScoreFactor { factor, value: 1.0 / unit });
        }
    }
    Ok(())
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
                self.settings.options.mask
            }

            /// Returns the factor of the scores, finite and above 0.
            pub fn scale(&self) -> f32 {
                self.settings.scale
            }

            /// Returns the options, with the scale that is used.
            pub fn options(&self) -> &Options {
                &self.settings.options
            }

            /// Returns the kinds of the optional inputs that a call must have.
            pub(crate) fn inputs(&self) -> InputKinds {
                self.settings.inputs()
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
                self.settings.options.dist_threshold
            }

            /// Returns the dropout of attention weights.
            pub fn dropout(&self) -> PlanDropout {
                self.settings.options.dropout
            }

            /// Returns the plan with another seed and offset. `dropout` has the plan's probability, so that kernel and
            /// launch stay the same.
            pub(crate) fn with_random_numbers_of(mut self, dropout: PlanDropout) -> Result<Self> {
                self.settings.options.dropout = dropout;
                self.features.dropout = dropout.launched()?;
                Ok(self)
            }
        }
    };
}

pub(super) use {accessors, accessors_with_extra};
