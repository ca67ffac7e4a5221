//! Scores that a mask hides, as an operation on a fragment.

use super::mask::Mask;
use super::pairs::Pairs;
use crate::arch::Warpgroup;
use crate::ground::shape::Shape;

/// Scores of keys that a row may not see through the visit's pair become −∞; the fragment starts at query `row` and key
/// `first_key`.
#[inline(always)]
pub fn mask_scores<W: Warpgroup, M: Mask, P: Pairs, const N8: usize>(
    wg: &W,
    shape: &Shape,
    pairs: P,
    pair: u32,
    s: &mut W::Acc<N8>,
    row: u32,
    first_key: u32,
) {
    wg.fill_outside(s, f32::NEG_INFINITY, |r| {
        let (start, end) = pairs.keys::<M>(shape, pair, row + r);
        let column = |key: u32| key as i32 - first_key as i32;
        // With one pair, keys before the end are live.
        (if P::COUNT > 1 { column(start) } else { 0 }, column(end))
    });
}

/// As [`mask_scores`], for transposed scores: the fragment starts at key `key` and query row `first_row`.
#[inline(always)]
pub fn mask_transposed<W: Warpgroup, M: Mask, P: Pairs, const M8: usize>(
    wg: &W,
    shape: &Shape,
    pairs: P,
    pair: u32,
    s: &mut W::Acc<M8>,
    key: u32,
    first_row: u32,
) {
    wg.fill_outside(s, f32::NEG_INFINITY, |r| {
        let (start, end) = pairs.queries::<M>(shape, pair, key + r);
        let start = if key + r < shape.seqlen_k { start } else { u32::MAX };
        let column = |row: u32| (row.min(i32::MAX as u32) as i32).saturating_sub(first_row as i32);
        (column(start), if P::COUNT > 1 { column(end) } else { i32::MAX })
    });
}
