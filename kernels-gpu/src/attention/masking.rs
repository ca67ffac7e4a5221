//! Masking of scores, as an operation on a fragment.

use super::mask::Mask;
use crate::arch::Warpgroup;
use crate::ground::sequence::Sequence;

/// Position of a fragment of scores: its pair of Q and K, its first query row and its first key.
#[derive(Clone, Copy, Debug)]
pub struct ScorePlace {
    pub pair: u32,
    pub row: u32,
    pub key: u32,
}

/// Sets scores to −∞ if their query does not attend to their key. Rows of the fragment are queries.
#[inline(always)]
pub fn mask_scores<W: Warpgroup, M: Mask, const N8: usize>(
    wg: &W,
    of: &Sequence,
    mask: &M,
    s: &mut W::Acc<N8>,
    at: ScorePlace,
) {
    let keys = |r: u32| mask.keys(of, at.pair, at.row + r);
    let column = |key: u32| key as i32 - at.key as i32;
    // Without a left bound in the only pair, all keys before the end are valid.
    if const { M::PAIRS > 1 } || mask.bounds_left() {
        wg.fill_outside(s, f32::NEG_INFINITY, |r| (column(keys(r).start), column(keys(r).end)));
    } else {
        wg.fill_outside(s, f32::NEG_INFINITY, |r| (0, column(keys(r).end)));
    }
}

/// Sets scores to −∞ if their query does not attend to their key. Rows of the fragment are keys.
#[inline(always)]
pub fn mask_transposed<W: Warpgroup, M: Mask, const M8: usize>(
    wg: &W,
    of: &Sequence,
    mask: &M,
    s: &mut W::Acc<M8>,
    at: ScorePlace,
) {
    let queries = |r: u32| mask.queries(of, at.pair, at.key + r);
    let column = |row: u32| (row.min(i32::MAX as u32) as i32).saturating_sub(at.row as i32);
    // No query attends to a key of padding.
    let start = |r: u32| if at.key + r < of.seqlen_k { queries(r).start } else { u32::MAX };
    if const { M::PAIRS > 1 } || mask.bounds_left() {
        wg.fill_outside(s, f32::NEG_INFINITY, |r| (column(start(r)), column(queries(r).end)));
    } else {
        wg.fill_outside(s, f32::NEG_INFINITY, |r| (column(start(r)), i32::MAX));
    }
}
