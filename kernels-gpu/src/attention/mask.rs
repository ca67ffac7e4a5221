//! A mask is one interval of live keys for each query row.
//!
//! Both what the scheduler needs (which blocks to visit, [`super::block_info`]) and what an element needs (is this key
//! live) follow from that interval, so they cannot disagree. Keys past the end are masked by the same interval.

use crate::arch::Warpgroup;
use crate::params::Shape;

/// Which keys a query may see.
pub trait Mask: Copy {
    /// Query row `i` sees the keys `0..live_end(i)`, never more than seqlen_k, and never fewer than row `i − 1`.
    fn live_end(shape: &Shape, i: u32) -> u32;
}

/// Every query sees every key.
#[derive(Clone, Copy, Debug)]
pub struct Full;

impl Mask for Full {
    #[inline(always)]
    fn live_end(shape: &Shape, _: u32) -> u32 {
        shape.seqlen_k
    }
}

/// Query `i` sees key `j` when j ≤ i + seqlen_k − seqlen_q: aligned to the bottom right.
#[derive(Clone, Copy, Debug)]
pub struct Causal;

impl Mask for Causal {
    #[inline(always)]
    fn live_end(shape: &Shape, i: u32) -> u32 {
        let end = i as i32 + 1 + (shape.seqlen_k as i32 - shape.seqlen_q as i32);
        end.max(0).min(shape.seqlen_k as i32) as u32
    }
}

/// Scores of keys that a row may not see become −∞; the fragment starts at query `row` and key `first_key`.
#[inline(always)]
pub fn mask_scores<W: Warpgroup, M: Mask, const N8: usize>(
    wg: &W,
    shape: &Shape,
    s: &mut W::Acc<N8>,
    row: u32,
    first_key: u32,
) {
    wg.truncate_rows(s, f32::NEG_INFINITY, |r| M::live_end(shape, row + r) as i32 - first_key as i32);
}
