//! Masks, each defined by one interval of valid keys for each query row. `live` in a name means valid.
//!
//! The blocks to visit ([`super::block_info`]) and the validity of a single key both follow from that interval, so they
//! cannot disagree. Keys past the end are masked by the same interval.

use crate::ground::shape::Shape;

/// Rule that says which keys a query attends to.
pub trait Mask: Copy {
    /// True if a query may attend to fewer than all keys.
    const HIDES: bool;
    /// Returns the end of the valid keys of query row `i`, `0..live_end(i)`. It is at most seqlen_k, and never less
    /// than for row `i − 1`. For a row of padding, from seqlen_q on, the sum may wrap; no result of such a row is
    /// stored.
    fn live_end(shape: &Shape, i: u32) -> u32;
    /// Returns the first query row that attends to key `j`, by the same rule. All later rows attend to it, too. For a
    /// key of padding, from seqlen_k on, the difference may wrap; no result of such a key is stored.
    fn live_start(shape: &Shape, j: u32) -> u32;
}

/// No mask: every query attends to every key.
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

/// Causal mask, aligned to the bottom right: query `i` attends to key `j` if j ≤ i + seqlen_k − seqlen_q.
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
