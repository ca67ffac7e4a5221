//! Dropout of attention weights: its probability and its mask.

use kernels_gpu::attention::dropout::Dropout as Launched;

use crate::backend::{Backend, cpu};
use crate::error::{Error, Operand, Result};
use crate::problem::{Problem, at_most};

/// Dropout of attention weights. Each weight is dropped with probability `p`, and kept weights are scaled by 1 / (1 −
/// p).
///
/// The mask is a function of seed, offset, batch item, query head, query and key alone
/// ([`dropout_mask`](crate::dropout_mask)). It is the same in both passes, for any machine, tiles and attention mask.
/// The probability is `p` itself, and exact to 40 bits. With `p` 0, the default, nothing is dropped and there is no
/// cost.
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

    /// Returns a dropout whose seed and offset kernels read from memory. Both passes take that memory as an input
    /// ([`Inputs::seed_offset`](crate::Inputs::seed_offset)), so that a captured graph draws another mask at each
    /// launch.
    ///
    /// ```
    /// use ferroflash::{Attention, Cpu, Dropout, Dtype, Inputs, Problem, Tensor, bf16};
    ///
    /// let problem =
    ///     Problem { batch: 1, heads_q: 2, heads_kv: 2, seqlen_q: 40, seqlen_k: 40, head_dim: 32, dtype: Dtype::Bf16 };
    /// let x: Vec<bf16> = (0..2 * 40 * 32).map(|i| bf16::from_f32((i as f32).sin())).collect();
    /// let x = Tensor::bhsd(&x[..], problem.q_shape());
    /// let drawn = Attention::new(problem).dropout(Dropout::from_memory(0.1));
    /// let out = drawn.forward_with(&Cpu, Inputs::new(x, x, x).seed_offset(&[7, 0]))?;
    ///
    /// let fixed = Attention::new(problem).dropout(Dropout { p: 0.1, seed: 7, offset: 0 });
    /// assert_eq!(out.o, fixed.forward(&Cpu, x, x, x)?.o);
    /// # Ok::<(), ferroflash::Error>(())
    /// ```
    pub const fn from_memory(p: f32) -> PlanDropout {
        PlanDropout::FromMemory { p }
    }

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

    /// Returns the launch parameter of the kernel that writes the mask. The probability was validated.
    #[cfg(feature = "cuda")]
    pub(crate) fn of_mask(&self) -> Launched {
        Launched::of(self.p, self.seed, self.offset)
    }
}

/// Dropout of a plan: seed and offset are either numbers of the plan or lie in the machine's memory, where a captured
/// graph finds other numbers at each launch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PlanDropout {
    /// Seed and offset are known when a pass is planned.
    Fixed(Dropout),
    /// Kernels read seed and offset, which are an input of both passes. The mask is that of a [`Dropout`] with these
    /// numbers.
    FromMemory {
        /// The probability that a weight is dropped: at least 0 and below 1.
        p: f32,
    },
}

impl Default for PlanDropout {
    fn default() -> Self {
        PlanDropout::NONE
    }
}

impl From<Dropout> for PlanDropout {
    fn from(dropout: Dropout) -> Self {
        PlanDropout::Fixed(dropout)
    }
}

impl PlanDropout {
    /// No dropout.
    pub const NONE: PlanDropout = PlanDropout::Fixed(Dropout::NONE);

    /// Returns the probability that a weight is dropped.
    pub const fn p(&self) -> f32 {
        match *self {
            PlanDropout::Fixed(Dropout { p, .. }) | PlanDropout::FromMemory { p } => p,
        }
    }

    /// True if kernels read seed and offset from memory.
    pub const fn reads_memory(&self) -> bool {
        matches!(self, PlanDropout::FromMemory { .. })
    }

    /// Returns the same dropout without numbers, which no plan depends on.
    pub(crate) fn without_numbers(self) -> Self {
        match self {
            PlanDropout::Fixed(Dropout { p, .. }) => PlanDropout::Fixed(Dropout { p, ..Dropout::NONE }),
            from_memory => from_memory,
        }
    }

    /// Returns a kernel's launch parameter, but for the address of numbers in memory; `None` if nothing is dropped.
    pub(crate) fn launched(&self) -> Result<Option<Launched>> {
        match *self {
            PlanDropout::Fixed(dropout) => dropout.launched(),
            PlanDropout::FromMemory { p } => Ok(Dropout { p, ..Dropout::NONE }.launched()?.map(Launched::from_memory)),
        }
    }
}

/// Returns the mask that both passes use: true for kept weights, (batch, heads_q, seqlen_q, seqlen_k), contiguous. It
/// takes memory that neither pass needs, and is for tests.
///
/// It runs on the current rayon thread pool: 1.1 to 1.5 ns a weight on one thread, 0.7 ns on two, of an x86-64 server
/// with AVX-512.
/// [`dropout_mask_into`] writes it to memory of the machine, and on a GPU runs there.
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
    let MaskShape { len, lens, .. } = MaskShape::of(problem)?;
    let launched = dropout.launched()?;
    let out_of_memory = Error::OutOfMemory { operand: Operand::DropoutMask, bytes: len };
    let len = usize::try_from(len).map_err(|_| out_of_memory.clone())?;
    let mut kept = bytemuck::allocation::try_zeroed_vec(len).map_err(|()| out_of_memory)?;
    match launched {
        Some(launched) => cpu::dropout_mask::write(&mut kept, lens, &launched, |kept| kept != 0)?,
        None => kept.fill(true),
    }
    Ok(kept)
}

/// Writes what [`dropout_mask`] returns to the caller's memory on the machine: 1 for kept weights and 0 for others.
///
/// ```
/// use ferroflash::{Backend, Cpu, Dropout, Dtype, Operand, Problem, dropout_mask, dropout_mask_into};
///
/// let problem =
///     Problem { batch: 1, heads_q: 2, heads_kv: 1, seqlen_q: 100, seqlen_k: 200, head_dim: 64, dtype: Dtype::Bf16 };
/// let dropout = Dropout { p: 0.25, seed: 7, offset: 0 };
/// let mut kept = Cpu.allocate(Operand::DropoutMask, 2 * 100 * 200)?;
/// dropout_mask_into(&Cpu, &problem, &dropout, &mut kept)?;
/// assert!(kept.iter().map(|&kept| kept == 1).eq(dropout_mask(&problem, &dropout)?));
/// # Ok::<(), ferroflash::Error>(())
/// ```
///
/// # Errors
/// Errors of [`Problem::validate`]; [`Error::Dropout`]; [`Error::TooLarge`] for more than 2³² query heads of all batch
/// items; [`Error::MaskLength`] unless `kept` has exactly batch · heads_q · seqlen_q · seqlen_k elements; errors of the
/// machine. Unless the error comes from running, nothing was written.
pub fn dropout_mask_into<B: Backend>(
    backend: &B,
    problem: &Problem,
    dropout: &Dropout,
    kept: B::SliceMut<'_, u8>,
) -> Result<()> {
    backend.dropout_mask_into(problem, dropout, kept)
}

/// Extents of a dropout mask.
pub(crate) struct MaskShape {
    /// Numbers of queries and keys.
    pub(crate) lens: [usize; 2],
    /// Number of weights.
    pub(crate) len: u128,
}

impl MaskShape {
    /// Validates a problem, and returns the extents of its mask.
    pub(crate) fn of(problem: &Problem) -> Result<Self> {
        problem.validate()?;
        let Problem { batch, heads_q, seqlen_q, seqlen_k, .. } = *problem;
        let heads = batch as u128 * heads_q as u128;
        if seqlen_q > 0 && seqlen_k > 0 {
            // Kernels number query heads over the batch in 32 bits.
            at_most("query heads of all batch items", heads, 1 << u32::BITS)?;
        }
        let len = heads.saturating_mul(seqlen_q as u128).saturating_mul(seqlen_k as u128);
        Ok(MaskShape { lens: [seqlen_q, seqlen_k], len })
    }

    /// Checks the number of elements of memory for the mask.
    pub(crate) fn check_len(&self, len: usize) -> Result<()> {
        if len as u128 == self.len { Ok(()) } else { Err(Error::MaskLength { len, expected: self.len }) }
    }
}

#[cfg(test)]
mod tests {
    use kernels_gpu::variants::Dtype;

    use super::*;
    use crate::Cpu;

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
    fn masks_are_the_kernels() {
        let launched = Launched::new(0.3, 1, 2).unwrap();
        for (batch, seqlen_q, seqlen_k) in [(1, 1, 1), (3, 5, 33), (2, 300, 70), (1, 17, 40_000), (2, 33, 4096)] {
            let problem =
                Problem { batch, heads_q: 2, heads_kv: 1, seqlen_q, seqlen_k, head_dim: 8, dtype: Dtype::F16 };
            let kept = dropout_mask(&problem, &Dropout { p: 0.3, seed: 1, offset: 2 }).unwrap();
            let mut lines = kept.chunks_exact(seqlen_k).enumerate();
            assert_eq!(kept.len(), batch * 2 * seqlen_q * seqlen_k);
            assert!(lines.all(|(line, kept)| {
                let [head, i] = [line / seqlen_q, line % seqlen_q].map(|x| x as u32);
                kept.iter().zip(0..).all(|(&kept, j)| kept == launched.kept(head, i, j))
            }));
        }
    }

    #[test]
    fn masks_have_memory_of_their_size() {
        let problem =
            Problem { batch: 2, heads_q: 2, heads_kv: 1, seqlen_q: 5, seqlen_k: 7, head_dim: 8, dtype: Dtype::F16 };
        let mut kept = [9; 141];
        for len in [0, 139, 141] {
            let error = dropout_mask_into(&Cpu, &problem, &with(0.5), &mut kept[..len]).unwrap_err();
            let rule = "exactly 140 are needed (batch × heads_q × seqlen_q × seqlen_k)";
            assert_eq!(error.to_string(), format!("dropout_mask has {len} elements; {rule}"));
        }
        assert_eq!(kept, [9; 141]);
        dropout_mask_into(&Cpu, &problem, &with(0.0), &mut kept[..140]).unwrap();
        assert!(kept[..140] == [1; 140] && kept[140] == 9);
        dropout_mask_into(&Cpu, &problem, &with(0.5), &mut kept[..140]).unwrap();
        let mask = dropout_mask(&problem, &with(0.5)).unwrap();
        assert!(kept[..140].iter().map(|&kept| kept == 1).eq(mask));
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
