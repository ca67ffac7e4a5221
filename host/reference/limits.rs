//! Limits up to which results are within the tolerance, by the size of a row's LSE.
//!
//! A kernel subtracts numbers of the size of the LSE that f32 has rounded, and rounds P to the inputs' dtype. In the
//! forward pass the offset m·c is such a number: the rounding is common to a row's weights and cancels, but the largest
//! weight is then not exactly 1, and has a rounding of its own. In the backward pass and in total attention the LSE is
//! one: the rounding is an error of P. docs/numerics.md has the derivation and the measurements.
//!
//! The largest scaled score of a row differs from its LSE by at most ln(seqlen_k).

use std::fmt;

use kernels_gpu::variants::Dtype;

use super::forward::live_keys;
use crate::problem::{Mask, Problem};

/// Largest |LSE| of a row, natural log, up to which each result is within the tolerance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Of O: up to here a row's largest weight rounds to exactly 1.
    pub o: f64,
    /// Of dQ, dK and dV: up to here the LSE's rounding moves P by less than half a unit in the last place of the dtype.
    pub gradients: f64,
    /// Of total attention, of which P is not rounded: up to here the LSE's rounding moves P by up to 10⁻⁵.
    pub total: f64,
    /// Of the LSE. From `o` to here, O has an error of up to one rounding of P, and is finite if V is.
    pub lse: f64,
}

impl Limits {
    /// Limits for inputs of `dtype`.
    pub const fn of(dtype: Dtype) -> Self {
        // Powers of two, so that the ranges of f32's exponents begin there.
        const fn power(exponent: u32) -> f64 {
            (1u64 << exponent) as f64
        }
        match dtype {
            Dtype::F16 => Limits { o: power(12), gradients: power(11), total: power(7), lse: power(26) },
            Dtype::Bf16 => Limits { o: power(15), gradients: power(14), total: power(7), lse: power(29) },
        }
    }
}

/// Results that have no tolerance because a row's |LSE| is above their limit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Beyond {
    /// Name of the results.
    pub results: &'static str,
    /// The largest exact |LSE|.
    pub largest_lse: f64,
    /// The limit of the results.
    pub limit: f64,
}

impl Beyond {
    /// Returns the results as beyond their limit if `largest_lse` is.
    pub fn of(results: &'static str, largest_lse: f64, limit: f64) -> Option<Self> {
        (largest_lse > limit).then_some(Beyond { results, largest_lse, limit })
    }
}

impl fmt::Display for Beyond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Beyond { results, largest_lse, limit } = self;
        write!(f, "beyond the limit of {results}: |LSE| {largest_lse:.1e} is above {limit}")
    }
}

/// Returns the largest finite |LSE|, or 0.
pub fn largest_lse(lse: &[f64]) -> f64 {
    lse.iter().filter(|lse| lse.is_finite()).fold(0.0, |largest, lse| largest.max(lse.abs()))
}

/// True if a machine's LSE leaves it open whether the exact one is above `limit`: if one is above half of it, or not
/// finite although its row has a valid key.
pub fn may_exceed(problem: &Problem, mask: Mask, lse: &[f32], limit: f64) -> bool {
    let mut rows = lse.iter().zip((0..problem.seqlen_q.max(1)).cycle());
    rows.any(|(lse, i)| {
        let below = f64::from(lse.abs()) <= limit / 2.0;
        !below && (lse.is_nan() || lse.is_finite() || !live_keys(problem, mask, i).is_empty())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_without_a_key_is_below_every_limit() {
        let problem =
            Problem { batch: 1, heads_q: 1, heads_kv: 1, seqlen_q: 3, seqlen_k: 2, head_dim: 8, dtype: Dtype::F16 };
        let none = f32::NEG_INFINITY;
        for (lse, exceeds) in [
            ([none, 1.0, -3.9], false),
            ([none, 1.0, -4.1], true),
            ([none, none, 1.0], true),
            ([none, 1.0, f32::NAN], true),
            ([none, f32::INFINITY, 1.0], true),
        ] {
            assert_eq!(may_exceed(&problem, Mask::Causal, &lse, 8.0), exceeds, "{lse:?}");
        }
        assert_eq!(largest_lse(&[1.0, -7.5, f64::NEG_INFINITY, f64::NAN]), 7.5);
        assert_eq!(largest_lse(&[]), 0.0);
    }

    #[test]
    fn a_limit_is_within_the_limit() {
        assert_eq!(Beyond::of("O", 4096.0, Limits::of(Dtype::F16).o), None);
        let beyond = Beyond::of("O", 5000.0, Limits::of(Dtype::F16).o).unwrap();
        assert_eq!(beyond.to_string(), "beyond the limit of O: |LSE| 5.0e3 is above 4096");
    }
}
