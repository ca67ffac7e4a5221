//! The properties that a pass needs of a kernel. The error names them if no kernel has them all.

use std::fmt;

use kernels_gpu::variants::{Dtype, Op};

use super::settings::write_shaping;
use super::{Alibi, Determinism, Sinks};
use crate::problem::Mask;

/// Kind of a pass of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PassKind {
    /// O and the LSE.
    Forward,
    /// The gradients.
    Backward(Determinism),
    /// The weight that each key got.
    TotalAttention,
}

/// Properties of the kernel that a plan asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Needs {
    /// Pass that was to be planned.
    pub pass: PassKind,
    /// Attention that the pass computes or differentiates.
    pub op: Op,
    /// Head dim of the problem.
    pub head_dim: usize,
    /// Mask of the problem.
    pub mask: Mask,
    /// Element type of the problem.
    pub dtype: Dtype,
    /// Bound of the scores, if there is one.
    pub softcap: Option<f32>,
    /// Slopes of ALiBi.
    pub alibi: Alibi,
    /// Sinks of the softmax.
    pub sinks: Sinks,
    /// Probability that a weight is dropped; 0 if none is.
    pub dropout: f32,
}

impl fmt::Display for Needs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Needs { pass, op, head_dim, mask, dtype, softcap, alibi, sinks, dropout } = self;
        let attention = match op {
            Op::Forward => "attention",
            Op::Piecewise => "piecewise attention",
        };
        match pass {
            PassKind::Forward => write!(f, "forward of {attention}")?,
            PassKind::Backward(_) => write!(f, "backward of {attention}")?,
            PassKind::TotalAttention => match op {
                Op::Forward => f.write_str("total attention")?,
                Op::Piecewise => f.write_str("total attention of piecewise attention")?,
            },
        }
        write!(f, " with head_dim {head_dim}, mask {mask}, dtype {}", dtype.name())?;
        write_shaping(f, *softcap, *alibi, *sinks)?;
        if *dropout > 0.0 {
            write!(f, ", dropout {dropout}")?;
        }
        match pass {
            PassKind::Backward(determinism) => write!(f, ", determinism {determinism}"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn errors_name_all_that_was_needed() {
        let needs = Needs {
            pass: PassKind::Backward(Determinism::Exact),
            op: Op::Piecewise,
            head_dim: 96,
            mask: Mask::Causal,
            dtype: Dtype::Bf16,
            softcap: Some(30.0),
            alibi: Alibi::PerItem,
            sinks: Sinks::PerHead,
            dropout: 0.1,
        };
        let text = |needs| Error::NoVariant { needs }.to_string();
        assert_eq!(
            text(needs),
            "no kernel is compiled for backward of piecewise attention with head_dim 96, mask causal, dtype bf16, \
             softcap 30, alibi per batch item, sinks, dropout 0.1, determinism exact"
        );
        let plain = Needs {
            pass: PassKind::Forward,
            op: Op::Forward,
            softcap: None,
            alibi: Alibi::None,
            sinks: Sinks::None,
            dropout: 0.0,
            ..needs
        };
        assert_eq!(
            text(plain),
            "no kernel is compiled for forward of attention with head_dim 96, mask causal, dtype bf16"
        );
        assert_eq!(
            text(Needs { pass: PassKind::TotalAttention, mask: Mask::None, dtype: Dtype::F16, ..plain }),
            "no kernel is compiled for total attention with head_dim 96, mask none, dtype f16"
        );
        assert!(Error::NoVariant { needs }.is_bad_input());
    }
}
