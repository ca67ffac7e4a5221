//! Dropout of attention weights: its probability and its mask.

use kernels_gpu::attention::dropout::Dropout as Launched;

use crate::error::{Error, Operand, Result};
use crate::problem::{Problem, at_most};

/// Dropout of attention weights. Each weight is dropped with probability `p`, and kept weights are scaled by 1 / (1 −
/// p).
///
/// The mask is a function of seed, offset, batch item, query head, query and key alone
/// ([`dropout_mask`](crate::dropout_mask)). It is the same in both passes, for any machine, tiles and attention mask.
/// The probability is `p` itself, and exact to 40 bits. With `p` 0, the default, nothing is dropped and there is no cost.
///
/// Every training step needs a new seed or a new offset. Masks that differ in either are independent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Dropout {
    /// The probability that a weight is dropped: at least 0 and below 1.
    pub p: f32,
    /// Key of the random numbers.
    pub seed: u64,
    /// Position of the mask in the seed's random numbers.
    pub offset: u64,
}

impl Dropout {
    /// No dropout.
    pub const NONE: Dropout = Dropout { p: 0.0, seed: 0, offset: 0 };

    /// Checks the probability.
    ///
    /// # Errors
    /// [`Error::Dropout`] for a `p` below 0, of 1 or above, or NaN.
    pub fn validate(&self) -> Result<()> {
        if (0.0..1.0).contains(&self.p) { Ok(()) } else { Err(Error::Dropout { value: self.p }) }
    }

    /// Returns a kernel's launch parameter; `None` if nothing is dropped.
    pub(crate) fn launched(&self) -> Result<Option<Launched>> {
        self.validate()?;
        Ok(Launched::new(self.p, self.seed, self.offset))
    }
}

/// Returns the mask that both passes use: true for kept weights, (batch, heads_q, seqlen_q, seqlen_k), contiguous. It
/// takes memory that neither pass needs, and is for tests.
///
/// ```
/// use ferroflash::{Dropout, Dtype, Problem, dropout_mask};
///
/// let problem =
///     Problem { batch: 1, heads_q: 2, heads_kv: 1, seqlen_q: 100, seqlen_k: 200, head_dim: 64, dtype: Dtype::Bf16 };
/// let kept = dropout_mask(&problem, &Dropout { p: 0.25, seed: 7, offset: 0 })?;
/// assert_eq!(kept.len(), 2 * 100 * 200);
/// let share = kept.iter().filter(|&&kept| kept).count() as f64 / kept.len() as f64;
/// assert!((share - 0.75).abs() < 0.02);
/// # Ok::<(), ferroflash::Error>(())
/// ```
///
/// # Errors
/// Errors of [`Problem::validate`]; [`Error::Dropout`]; [`Error::TooLarge`] for more than 2³² query heads of all batch
/// items; [`Error::OutOfMemory`].
pub fn dropout_mask(problem: &Problem, dropout: &Dropout) -> Result<Vec<bool>> {
    problem.validate()?;
    let launched = dropout.launched()?;
    let (heads, queries, keys) = (problem.batch as u128 * problem.heads_q as u128, problem.seqlen_q, problem.seqlen_k);
    if queries > 0 && keys > 0 {
        // Kernels number query heads over the batch in 32 bits.
        at_most("query heads of all batch items", heads, 1 << u32::BITS)?;
    }
    let elements = heads.saturating_mul(queries as u128).saturating_mul(keys as u128);
    let out_of_memory = Error::OutOfMemory { operand: Operand::DropoutMask, bytes: elements };
    let len = usize::try_from(elements).map_err(|_| out_of_memory.clone())?;
    let mut kept = Vec::new();
    kept.try_reserve_exact(len).map_err(|_| out_of_memory)?;
    kept.resize(len, true);
    if let Some(launched) = launched {
        for (row, line) in kept.chunks_exact_mut(keys.max(1)).enumerate() {
            for (j, kept) in line.iter_mut().enumerate() {
                // The extents fit in 32 bits, and so does the number of the last head, as checked above.
                *kept = launched.kept((row / queries) as u32, (row % queries) as u32, j as u32);
            }
        }
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use kernels_gpu::variants::Dtype;

    use super::*;

    fn with(p: f32) -> Dropout {
        Dropout { p, ..Dropout::NONE }
    }

    #[test]
    fn p_is_below_one() {
        for p in [-0.1, -f32::MIN_POSITIVE, 1.0, 1.5, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error = with(p).validate().unwrap_err();
            assert_eq!(error.to_string(), format!("dropout.p is {p}; at least 0 and below 1 is needed"));
            assert!(error.is_bad_input());
        }
        for p in [0.0, -0.0, f32::MIN_POSITIVE, 0.5, 1.0f32.next_down()] {
            assert!(with(p).validate().is_ok());
        }
    }

    #[test]
    fn p_is_exact() {
        for p in [0.0, -0.0, f32::MIN_POSITIVE, 1e-13] {
            assert_eq!(with(p).launched(), Ok(None));
        }
        for (p, scale) in [(0.1, 1.0 / 0.9), (0.8, 5.0), (0.001, 1.0 / 0.999)] {
            let launched = with(p).launched().unwrap().unwrap();
            assert!((launched.scale / scale - 1.0).abs() < 1e-6);
            assert_eq!(launched.keeps(), 1.0 - p);
        }
    }

    #[test]
    fn masks_keep_the_share_that_they_should() {
        let problem =
            Problem { batch: 2, heads_q: 3, heads_kv: 1, seqlen_q: 301, seqlen_k: 257, head_dim: 8, dtype: Dtype::F16 };
        for p in [0.01, 0.1, 0.5, 0.9, 0.999] {
            let dropout = Dropout { p, seed: 5, offset: 11 };
            let kept = dropout_mask(&problem, &dropout).unwrap();
            assert_eq!(kept.len(), 2 * 3 * 301 * 257);
            let p = f64::from(p);
            let sigma = (p * (1.0 - p) / kept.len() as f64).sqrt();
            let dropped = kept.iter().filter(|&&kept| !kept).count() as f64 / kept.len() as f64;
            assert!((dropped - p).abs() < 5.0 * sigma, "{dropped} of {p}");
            // Every row and every column is checked too. The factor is larger, because there are so many of them.
            for (count, line) in [(301 * 6, 257), (257, 301 * 6)] {
                let sigma = (p * (1.0 - p) / line as f64).sqrt();
                for at in 0..count {
                    let index = |i: usize| if line == 257 { at * 257 + i } else { i * 257 + at };
                    let dropped = (0..line).filter(|&i| !kept[index(i)]).count() as f64 / line as f64;
                    assert!((dropped - p).abs() < 6.0 * sigma + 1.0 / line as f64, "{dropped} of {p} in line {at}");
                }
            }
        }
    }

    /// Both the seed and the offset have 64 bits of their own.
    #[test]
    fn halves_of_seed_and_offset_do_not_coincide() {
        let problem =
            Problem { batch: 1, heads_q: 1, heads_kv: 1, seqlen_q: 64, seqlen_k: 64, head_dim: 8, dtype: Dtype::F16 };
        let mask = |seed, offset| dropout_mask(&problem, &Dropout { p: 0.5, seed, offset }).unwrap();
        let same = mask(7 + (1 << 32), 0).iter().zip(mask(7, 1 << 32)).filter(|&(&a, b)| a == b).count();
        // A deviation of 5σ is 160.
        assert!((2048 - 160..2048 + 160).contains(&same), "{same} of 4096");
    }

    proptest::proptest! {
        #[test]
        fn masks_of_streams_one_bit_apart_are_independent(seed: u64, offset: u64, bits in (0u32..128, 0u32..128)) {
            let problem = Problem {
                batch: 1, heads_q: 2, heads_kv: 1, seqlen_q: 128, seqlen_k: 128, head_dim: 8, dtype: Dtype::F16,
            };
            let flipped = |bit: u32| {
                let bits = 1u128 << bit ^ (u128::from(offset) << 64 | u128::from(seed));
                Dropout { p: 0.5, seed: bits as u64, offset: (bits >> 64) as u64 }
            };
            let masks = [Dropout { p: 0.5, seed, offset }, flipped(bits.0), flipped(bits.1)];
            let masks = masks.map(|dropout| dropout_mask(&problem, &dropout).unwrap());
            for (a, b) in [(0, 1), (0, 2), (1, 2)].into_iter().filter(|&x| x != (1, 2) || bits.0 != bits.1) {
                let same = masks[a].iter().zip(&masks[b]).filter(|(a, b)| a == b).count() as f64;
                let sigma = (masks[a].len() as f64 / 4.0).sqrt();
                proptest::prop_assert!((same - masks[a].len() as f64 / 2.0).abs() < 6.0 * sigma, "{} agree", same);
            }
        }
    }

    #[test]
    fn masks_too_large_are_errors() {
        let problem = Problem {
            batch: 1 << 20,
            heads_q: 1 << 10,
            heads_kv: 1,
            seqlen_q: 1 << 20,
            seqlen_k: 1 << 20,
            head_dim: 8,
            dtype: Dtype::F16,
        };
        assert!(matches!(dropout_mask(&problem, &Dropout::NONE), Err(Error::OutOfMemory { .. })));
        let heads = Problem { batch: (1 << 22) + 1, seqlen_q: 1, seqlen_k: 1, ..problem };
        let error = dropout_mask(&heads, &Dropout::NONE).unwrap_err().to_string();
        assert_eq!(error, "query heads of all batch items is 4294968320; at most 4294967296 is allowed");
        assert_eq!(dropout_mask(&Problem { seqlen_k: 0, ..heads }, &with(0.5)), Ok(vec![]));
        assert_eq!(dropout_mask(&Problem { seqlen_k: 0, batch: 1, ..problem }, &with(0.5)), Ok(vec![]));
        assert_eq!(dropout_mask(&Problem { seqlen_q: 0, ..problem }, &with(0.5)), Ok(vec![]));
    }
}
