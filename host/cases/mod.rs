//! Cases: one attention with random inputs, run on a backend and judged against the reference.
//!
//! The CLI's `check` and the test suites use these. Inputs lie between rows of NaN padding. Outputs are poisoned
//! beforehand and lie between canaries, so a case also fails if a kernel writes memory that it should not. A backward
//! case takes O and the LSE from the same backend's forward pass, and a case of total attention takes the LSE from it.

use std::fmt;

use crate::element::Element;
use kernels_gpu::variants::Dtype;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;

use crate::attention::Attention;
use crate::dropout::Dropout;
use crate::error::Result;
use crate::plan::{Alibi, Sinks};
use crate::problem::{Mask, Problem};
use crate::tensor::{Layout, Tensor};

mod backward;
mod forward;
mod guarded;
mod launch;
mod lengths;
mod limits;
mod piecewise;
mod shaping;
mod total_attention;
mod upload;

pub use backward::{BackwardData, BackwardOutcome, CaseGradients};
pub use forward::{CaseOutput, Outcome};
use guarded::POISON;
pub use launch::Judging;
pub use lengths::{CaseLengths, Gaps};
pub use piecewise::PiecewiseCase;
pub use shaping::Shaping;
pub use total_attention::{CaseTotal, TotalData, TotalOutcome};

/// Order of the dimensions in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// (batch, heads, seqlen, head_dim)
    #[default]
    Bhsd,
    /// (batch, seqlen, heads, head_dim)
    Bshd,
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Order::Bhsd => "bhsd",
            Order::Bshd => "bshd",
        })
    }
}

/// One attention with random inputs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Case {
    pub problem: Problem,
    pub mask: Mask,
    /// Scale; `None` is the default, 1/√head_dim.
    pub scale: Option<f32>,
    /// Bound of the scores.
    pub softcap: Option<f32>,
    pub alibi: Alibi,
    pub sinks: Sinks,
    pub order: Order,
    /// Number of elements between one row and the next, a multiple of 8.
    pub padding: usize,
    /// Standard deviation of the inputs.
    pub input_std: f32,
    /// Probability that a weight is dropped; the seed is the case's.
    pub dropout: f32,
    /// Lengths of sequences that share one tensor, with which the problem agrees; `None` for a dense batch.
    pub lengths: Option<CaseLengths>,
    pub seed: u64,
}

/// Returns a mask of any kind. Bounds of windows are small, next to the edge of a tile, or anything up to all keys.
fn random_mask(rng: &mut StdRng, problem: &Problem) -> Mask {
    let most = problem.seqlen_q.max(problem.seqlen_k) as u32 + 1;
    let bound = |rng: &mut StdRng| match rng.random_range(0..4) {
        0 => None,
        1 => Some(rng.random_range(0..4)),
        2 => Some(*[63, 64, 65, 127, 128, 129].choose(rng).unwrap_or(&64)),
        _ => Some(rng.random_range(0..most)),
    };
    match rng.random_range(0..3) {
        0 => Mask::None,
        1 => Mask::Causal,
        _ => Mask::Window { left: bound(rng), right: bound(rng) },
    }
}

impl Case {
    /// Returns a case with contiguous tensors, standard normal inputs and the default scale.
    pub fn new(problem: Problem, mask: Mask) -> Self {
        Case {
            problem,
            mask,
            scale: None,
            softcap: None,
            alibi: Alibi::None,
            sinks: Sinks::None,
            order: Order::Bhsd,
            padding: 0,
            input_std: 1.0,
            dropout: 0.0,
            lengths: None,
            seed: 0,
        }
    }

    /// Returns a case of at most `limit` floating-point operations, with shapes that straddle the edges of tiles.
    pub fn random(seed: u64, limit: f64) -> Self {
        const EDGES: [usize; 30] = [
            0, 1, 2, 3, 5, 17, 63, 64, 65, 79, 80, 81, 95, 97, 127, 128, 129, 160, 161, 175, 177, 191, 192, 193, 255,
            256, 257, 385, 513, 1025,
        ];
        const HEADS: [(usize, usize); 9] = [(1, 1), (2, 2), (3, 1), (4, 4), (6, 2), (7, 1), (8, 2), (16, 16), (71, 1)];
        let mut rng = StdRng::seed_from_u64(seed);
        let rng = &mut rng;
        let mut seqlen = || match rng.random_range(0..4) {
            0 => rng.random_range(1..=2000),
            1 => rng.random_range(1..=300),
            _ => *EDGES.choose(rng).unwrap_or(&1),
        };
        let (seqlen_q, seqlen_k) = (seqlen(), seqlen());
        // Most users have equal lengths.
        let seqlen_k = if rng.random_bool(0.25) { seqlen_q } else { seqlen_k };
        let (heads_q, heads_kv) = *HEADS.choose(rng).unwrap_or(&(1, 1));
        let mut problem = Problem {
            batch: *[0, 1, 1, 1, 1, 2, 2, 3, 3, 5].choose(rng).unwrap_or(&1),
            heads_q,
            heads_kv,
            seqlen_q,
            seqlen_k,
            head_dim: 8 * rng.random_range(1..=32),
            dtype: *[Dtype::F16, Dtype::Bf16].choose(rng).unwrap_or(&Dtype::Bf16),
        };
        while problem.flops_forward(Mask::None) > limit {
            if problem.batch > 1 {
                problem.batch -= 1;
            } else if problem.heads_q > 2 * problem.heads_kv {
                problem.heads_q -= problem.heads_kv;
            } else if problem.heads_kv > 1 {
                let group = problem.heads_q / problem.heads_kv;
                problem.heads_kv -= 1;
                problem.heads_q = group * problem.heads_kv;
            } else {
                let larger = problem.seqlen_q.max(problem.seqlen_k);
                // Takes the next smaller edge, for both lengths if they are equal. A shrunk length still straddles a
                // tile.
                let smaller = EDGES.into_iter().rev().find(|&edge| edge < larger).unwrap_or(0);
                for seqlen in [&mut problem.seqlen_q, &mut problem.seqlen_k] {
                    *seqlen = if *seqlen == larger { smaller } else { *seqlen };
                }
            }
        }
        let case = Case {
            mask: random_mask(rng, &problem),
            scale: rng.random_bool(0.2).then(|| rng.random_range(0.01..0.5)),
            order: *[Order::Bhsd, Order::Bshd].choose(rng).unwrap_or(&Order::Bhsd),
            padding: *[0, 0, 8, 40].choose(rng).unwrap_or(&0),
            input_std: *[1.0, 1.0, 2.0, 4.0].choose(rng).unwrap_or(&1.0),
            seed: rng.random(),
            ..Case::new(problem, Mask::None)
        };
        case.with_random_shaping(seed)
    }

    /// Returns a case as [`Case::random`] does, with dropout. A row that attends to all keys keeps a few weights on
    /// average.
    pub fn random_dropout(seed: u64, limit: f64) -> Self {
        let case = Case::random(seed, limit);
        let mut rng = StdRng::seed_from_u64(seed.wrapping_add(1));
        let dropout: f32 = *[0.05, 0.1, 0.1, 0.25, 0.5, 0.9, 0.99].choose(&mut rng).unwrap_or(&0.1);
        // If a row keeps only a weight or two, one rounding is the whole error, and the plain implementation's is no
        // measure of it (docs/numerics.md).
        let kept = (1.0 - dropout) * case.problem.seqlen_k as f32;
        Case { dropout: if kept < 4.0 { 0.1 } else { dropout }, ..case }
    }

    /// Returns the scale that the case runs with.
    pub fn effective_scale(&self) -> f32 {
        self.scale.unwrap_or_else(|| 1.0 / (self.problem.head_dim as f32).sqrt())
    }

    /// Returns the dropout of the case.
    pub fn dropped(&self) -> Dropout {
        Dropout { p: self.dropout, seed: self.seed, offset: 0 }
    }

    /// Returns the attention that the case runs.
    pub fn attention(&self) -> Attention {
        let attention = Attention::new(self.problem).mask(self.mask).scale(self.effective_scale());
        let attention = attention.dropout(self.dropped()).for_inputs(self.kinds());
        self.softcap.map_or(attention, |cap| attention.softcap(cap))
    }

    /// Returns the layout of a tensor of `shape` in memory.
    pub fn layout(&self, [batch, heads, seqlen, head_dim]: [usize; 4]) -> Layout {
        let row = head_dim + self.padding;
        let strides = match self.order {
            Order::Bhsd => [heads.saturating_mul(seqlen).saturating_mul(row), seqlen.saturating_mul(row), row],
            Order::Bshd => [seqlen.saturating_mul(heads).saturating_mul(row), row, heads.saturating_mul(row)],
        };
        Layout::strided([batch, heads, seqlen, head_dim], strides)
    }

    /// Returns Q, K and V: normal values, with NaN in the padding.
    pub fn inputs<E: Element>(&self) -> Result<[Vec<E>; 3]> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let mut input = |shape: [usize; 4]| self.normal(&mut rng, shape, self.input_std);
        Ok([input(self.problem.q_shape())?, input(self.problem.kv_shape())?, input(self.problem.kv_shape())?])
    }

    /// Returns a tensor of normal values, with NaN in the padding.
    fn normal<E: Element>(&self, rng: &mut StdRng, shape: [usize; 4], std: f32) -> Result<Vec<E>> {
        let layout = self.layout(shape);
        let mut data = vec![E::from_bits(POISON); layout.required_len()?];
        for_rows(&layout, |start| {
            for x in &mut data[start..start + shape[3]] {
                let normal: f32 = rng.sample(StandardNormal);
                *x = E::from_f32(std * normal);
            }
        });
        Ok(data)
    }

    /// Returns the inputs as tensors.
    pub fn tensors<'a, E>(&self, [q, k, v]: &'a [Vec<E>; 3]) -> [Tensor<&'a [E]>; 3] {
        let kv = self.layout(self.problem.kv_shape());
        [
            Tensor { data: q, layout: self.layout(self.problem.q_shape()) },
            Tensor { data: k, layout: kv },
            Tensor { data: v, layout: kv },
        ]
    }
}

/// Returns `len` standard normal values, quickly: a few million distinct ones, repeated.
pub fn normal_values<E: Element>(seed: u64, len: usize) -> Vec<E> {
    // The number is prime, so that no two of millions of rows are alike.
    const DISTINCT: usize = (1 << 21) - 9;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut values = Vec::with_capacity(len);
    values.extend((0..len.min(DISTINCT)).map(|_| {
        let normal: f32 = rng.sample(StandardNormal);
        E::from_f32(normal)
    }));
    while values.len() < len {
        values.extend_from_within(..DISTINCT.min(len - values.len()));
    }
    values
}

/// Attention in its simplest form: three loops in f32, one thread, one head. The speed of the CPU executor is compared
/// with it.
pub fn plain_loop([q, k, v]: [&[f32]; 3], o: &mut [f32], d: usize, scale: f32) {
    let mut p = vec![0.0f32; k.len() / d];
    for (q, o) in q.chunks_exact(d).zip(o.chunks_exact_mut(d)) {
        let mut m = f32::NEG_INFINITY;
        for (p, k) in p.iter_mut().zip(k.chunks_exact(d)) {
            *p = scale * q.iter().zip(k).map(|(q, k)| q * k).sum::<f32>();
            m = m.max(*p);
        }
        o.fill(0.0);
        let mut l = 0.0;
        for (p, v) in p.iter().zip(v.chunks_exact(d)) {
            let p = (p - m).exp();
            l += p;
            o.iter_mut().zip(v).for_each(|(o, v)| *o += p * v);
        }
        o.iter_mut().for_each(|o| *o /= l);
    }
}

/// Calls `f` with the offset of every row.
pub fn for_rows(layout: &Layout, mut f: impl FnMut(usize)) {
    let [batch, heads, seqlen, _] = layout.shape;
    for b in 0..batch {
        for h in 0..heads {
            (0..seqlen).for_each(|i| f(layout.offset(b, h, i)));
        }
    }
}

/// Writes the flags of `ferroflash check` that run the case again. Padding has no flag, because the values in the rows
/// do not depend on it.
impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Problem { batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, dtype } = self.problem;
        if self.lengths.is_none() {
            write!(f, "--batch {batch} ")?;
        }
        write!(f, "--heads-q {heads_q} --heads-kv {heads_kv} ")?;
        match self.lengths {
            None => write!(f, "--seqlen-q {seqlen_q} --seqlen-k {seqlen_k}")?,
            Some(lengths) => write!(f, "{lengths}")?,
        }
        write!(
            f,
            " --head-dim {head_dim} --dtype {} --mask {} --scale {} --layout {} --input-std {} --seed {}",
            dtype.name(),
            self.mask,
            self.effective_scale(),
            self.order,
            self.input_std,
            self.seed,
        )?;
        if self.dropout != 0.0 {
            write!(f, " --dropout {}", self.dropout)?;
        }
        if let Some(cap) = self.softcap {
            write!(f, " --softcap {cap}")?;
        }
        f.write_str(match self.alibi {
            Alibi::None => "",
            Alibi::PerHead => " --alibi heads",
            Alibi::PerItem => " --alibi items",
        })?;
        f.write_str(match self.sinks {
            Sinks::None => "",
            Sinks::PerHead => " --sinks",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_cases_are_valid_and_within_the_limit() {
        for seed in 0..500 {
            let case = Case::random(seed, 1e7);
            case.problem.validate().unwrap();
            assert!(case.problem.flops_forward(Mask::None) <= 1e7);
            assert_eq!(case, Case::random(seed, 1e7));
        }
    }

    #[test]
    fn normal_values_of_any_number() {
        let [few, many] = [5, 5_000_000].map(|len| normal_values::<half::bf16>(3, len));
        assert_eq!((few.len(), many.len()), (5, 5_000_000));
        assert_eq!(few, many[..5]);
        let square = many.iter().map(|x| f64::from(x.to_f32()).powi(2)).sum::<f64>() / many.len() as f64;
        assert!((square - 1.0).abs() < 0.01, "{square}");
        assert_ne!(few, normal_values::<half::bf16>(4, 5));
    }

    #[test]
    fn padding_moves_no_value() {
        let case = Case { padding: 0, ..Case::random(3, 1e6) };
        let padded = Case { padding: 8, ..case };
        let [dense, sparse] = [case, padded].map(|case| case.inputs::<half::bf16>().unwrap());
        for (dense, sparse) in dense.iter().zip(&sparse) {
            assert!(sparse.iter().filter(|x| !x.is_nan()).eq(dense));
        }
    }

    #[test]
    fn padding_is_poison() {
        let case = Case { padding: 8, ..Case::random(3, 1e6) };
        let [q, ..] = case.inputs::<half::bf16>().unwrap();
        let nans = q.iter().filter(|x| x.is_nan()).count();
        let rows: usize = case.problem.q_shape()[..3].iter().product();
        assert_eq!(nans, 8 * rows.saturating_sub(1));
    }
}
