//! Masking of scores, as an operation on a fragment.

use super::mask::Mask;
use super::pairs::Pairs;
use crate::arch::Warpgroup;
use crate::ground::shape::Shape;

/// Sets scores to −∞ if their query does not attend to their key through the visit's pair. The fragment starts at query
/// `row` and key `first_key`.
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
        // With one pair, all keys before the end are valid.
        (if P::COUNT > 1 { column(start) } else { 0 }, column(end))
    });
}

/// Masks transposed scores as [`mask_scores`] masks others. The fragment starts at key `key` and query row `first_row`.
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
