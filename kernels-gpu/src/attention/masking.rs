//! Masking of scores, as an operation on a fragment.

use super::mask::{Interval, Mask};
use crate::arch::Warpgroup;
use crate::ground::sequence::Sequence;
use crate::tile::lane::WARPGROUP_ROWS;

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
    // Start and end grow by one from key to key, unless they are 0 or beyond all queries. So the last key's tell those
    // of all keys.
    let last = WARPGROUP_ROWS - 1;
    let Interval { start, end } = mask.queries(of, at.pair, at.key + last);
    let column = |row: u32| {
        let column = (row.min(i32::MAX as u32) as i32).saturating_sub(at.row as i32);
        column.min(8 * M8 as i32 + last as i32) - last as i32
    };
    let (start, end, keys) = (column(start), column(end), of.seqlen_k.saturating_sub(at.key));
    // No query attends to a key of padding.
    let start = |r: u32| if r < keys { start + r as i32 } else { i32::MAX };
    if const { M::PAIRS > 1 } || mask.bounds_left() {
        wg.fill_outside(s, f32::NEG_INFINITY, |r| (start(r), end + r as i32));
    } else {
        wg.fill_outside(s, f32::NEG_INFINITY, |r| (start(r), i32::MAX));
    }
}
