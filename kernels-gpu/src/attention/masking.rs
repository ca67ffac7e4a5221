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
    if const { !M::IS_BAND } {
        return mask_any_transposed(wg, of, mask, s, at);
    }
    let Some(queries) = QueriesOfKeys::new(of, mask, &at, 8 * M8 as u32) else { return };
    if bounds_left(mask, &at) {
        wg.fill_outside(s, f32::NEG_INFINITY, |r| (queries.start(r), queries.end(r)));
    } else {
        wg.fill_outside(s, f32::NEG_INFINITY, |r| (queries.start(r), i32::MAX));
    }
}

/// Sets scores to −∞ if their query does not attend to their key, or is padding. Rows of the fragment are keys. It
/// takes more registers than [`mask_transposed`], but no mask is too irregular for it.
#[inline(always)]
pub fn mask_any_transposed<W: Warpgroup, M: Mask, const M8: usize>(
    wg: &W,
    of: &Sequence,
    mask: &M,
    s: &mut W::Acc<M8>,
    at: ScorePlace,
) {
    wg.fill_outside(s, f32::NEG_INFINITY, |r| {
        let Interval { start, end } = mask.queries(of, at.pair, at.key + r);
        let column = |row: u32| row as i32 - at.row as i32;
        // No query attends to a key of padding.
        let start = if at.key + r < of.seqlen_k { column(start) } else { i32::MAX };
        (start, column(end.min(of.seqlen_q)))
    });
}

/// Columns of a fragment whose queries attend to the key of a row. From row to row they move by one column.
struct QueriesOfKeys {
    /// Columns of the first row: the first one, and the one after the last. They may be outside the fragment.
    start: i32,
    end: i32,
    /// Number of rows before those of padding.
    keys: u32,
}

impl QueriesOfKeys {
    /// Computes them for a fragment of `width` columns. Returns `None` if every query attends to every key.
    ///
    /// Start and end of a mask's interval grow by one from key to key, unless they are 0 or beyond all queries. So the
    /// last key's tell those of all keys.
    #[inline(always)]
    fn new<M: Mask>(of: &Sequence, mask: &M, at: &ScorePlace, width: u32) -> Option<Self> {
        let last = WARPGROUP_ROWS - 1;
        let Interval { start, end } = mask.queries(of, at.pair, at.key + last);
        let keys = of.seqlen_k.saturating_sub(at.key);
        // Keys of padding count as a start beyond all queries. LLVM turns the first form into a test of its own, which
        // the loop over query blocks keeps as a predicate, and the second into a register. Wide fragments leave no
        // register.
        let starts_full = if width > 64 {
            if keys > last { start } else { u32::MAX }
        } else {
            start.max(keys.min(WARPGROUP_ROWS).wrapping_sub(WARPGROUP_ROWS))
        };
        let is_end_full = !bounds_left(mask, at) | (end >= at.row + width + last);
        if (starts_full <= at.row) & is_end_full {
            return None;
        }
        let column = |row: u32| (row.min(i32::MAX as u32) as i32).wrapping_sub((at.row + last) as i32);
        Some(QueriesOfKeys { start: column(start), end: column(end), keys })
    }

    /// Returns the first column of a row. No query attends to a key of padding.
    #[inline(always)]
    fn start(&self, r: u32) -> i32 {
        if r < self.keys { self.start + r as i32 } else { i32::MAX }
    }
    /// Returns the column after the last one of a row.
    #[inline(always)]
    fn end(&self, r: u32) -> i32 {
        self.end + r as i32
    }
}

/// True if queries of a fragment may not attend to the first keys. With two pairs, those of the near pair do not.
#[inline(always)]
fn bounds_left<M: Mask>(mask: &M, at: &ScorePlace) -> bool {
    M::PAIRS > 1 || mask.bounds_left_for(at.row)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::by_distance::ByDistance;
    use crate::attention::mask::tests::windows;

    fn agrees<M: Mask + core::fmt::Debug>(of: &Sequence, mask: M) {
        let width = 8;
        let places =
            (0..of.seqlen_k).step_by(31).flat_map(|key| (0..of.seqlen_q).step_by(8).map(move |row| (row, key)));
        for (pair, (row, key)) in (0..M::PAIRS).flat_map(|pair| places.clone().map(move |place| (pair, place))) {
            let at = ScorePlace { pair, row, key };
            let queries = QueriesOfKeys::new(of, &mask, &at, width);
            for (r, c) in (0..WARPGROUP_ROWS).flat_map(|r| (0..width).map(move |c| (r, c))) {
                let (i, j) = (row + c, key + r);
                if i < of.seqlen_q {
                    let live = j < of.seqlen_k && mask.keys(of, pair, i).contains(j);
                    let column = c as i32;
                    let kept = queries.as_ref().is_none_or(|queries| {
                        let end = if bounds_left(&mask, &at) { queries.end(r) } else { i32::MAX };
                        queries.start(r) <= column && column < end
                    });
                    assert_eq!(live, kept, "{mask:?} {of:?} {at:?} at {r}, {c}");
                }
            }
        }
    }

    #[test]
    fn columns_and_rule_agree() {
        for (seqlen_q, seqlen_k) in [(1, 1), (5, 90), (90, 5), (100, 100), (70, 130), (130, 70)] {
            let of = Sequence { seqlen_q, seqlen_k };
            for mask in windows() {
                agrees(&of, mask);
                for dist_threshold in [i32::MIN, -40, -1, 0, 1, 7, 64, 100, i32::MAX] {
                    agrees(&of, ByDistance { mask, dist_threshold });
                }
            }
        }
    }
}
