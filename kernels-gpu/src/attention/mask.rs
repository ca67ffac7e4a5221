//! A mask is one interval of live keys for each query row.
//!
//! Both what the scheduler needs (which blocks to visit, [`super::block_info`]) and what an element needs (is this key
//! live) follow from that interval, so they cannot disagree. Keys past the end are masked by the same interval.

use crate::ground::shape::Shape;

/// Which keys a query may see.
pub trait Mask: Copy {
    /// Whether a query may see fewer than all keys.
    const HIDES: bool;
    /// Query row `i` sees the keys `0..live_end(i)`, never more than seqlen_k, and never fewer than row `i − 1`. For a
    /// row of padding, from seqlen_q on, the sum may wrap: no result of such a row is stored.
    fn live_end(shape: &Shape, i: u32) -> u32;
    /// Key `j` is seen by the query rows from this one on, by the same rule. For a key of padding, from seqlen_k on,
    /// the difference may wrap: no result of such a key is stored.
    fn live_start(shape: &Shape, j: u32) -> u32;
}

/// Every query sees every key.
#[derive(Clone, Copy, Debug)]
pub struct Full;

impl Mask for Full {
    const HIDES: bool = false;
    #[inline(always)]
    fn live_end(shape: &Shape, _: u32) -> u32 {
        shape.seqlen_k
    }
    #[inline(always)]
    fn live_start(_: &Shape, _: u32) -> u32 {
        0
    }
}

/// Query `i` sees key `j` when j ≤ i + seqlen_k − seqlen_q: aligned to the bottom right.
#[derive(Clone, Copy, Debug)]
pub struct Causal;

impl Mask for Causal {
    const HIDES: bool = true;
    #[inline(always)]
    fn live_end(shape: &Shape, i: u32) -> u32 {
        let end = (i as i32).wrapping_add(1).wrapping_add(shape.seqlen_k as i32 - shape.seqlen_q as i32);
        end.max(0).min(shape.seqlen_k as i32) as u32
    }
    #[inline(always)]
    fn live_start(shape: &Shape, j: u32) -> u32 {
        (j as i32).wrapping_sub(shape.seqlen_k as i32 - shape.seqlen_q as i32).max(0) as u32
    }
}
