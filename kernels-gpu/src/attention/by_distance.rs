//! Piecewise attention: the near pair of Q and K has the keys close to a query, the far pair those far behind it.
//!
//! score(i, j) is scale·q2_i·k2_j if i + seqlen_k − seqlen_q − j ≥ dist_threshold, and scale·q1_i·k1_j otherwise. Of
//! the keys that a mask leaves to a query, each pair has one interval. So piecewise attention is one softmax over two
//! sequences of blocks, and a block that the threshold crosses is in both.

use super::mask::{Interval, Mask};
#[cfg(not(target_arch = "nvptx64"))]
use crate::ground::constants::ConstantPlace;
use crate::ground::sequence::Sequence;

/// Mask whose scores come from two pairs of Q and K. Pair 0 is the near pair; pair 1, the far pair, has the keys at a
/// distance of at least `dist_threshold`, which may be any number. The distance of query i to key j is i + seqlen_k −
/// seqlen_q − j: both are counted from the end.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByDistance<M> {
    pub mask: M,
    pub dist_threshold: i32,
}

impl<M: Mask> Mask for ByDistance<M> {
    const PAIRS: u32 = 2;
    const IS_BAND: bool = M::IS_BAND;
    #[cfg(not(target_arch = "nvptx64"))]
    const CONSTANTS: &'static [ConstantPlace] = M::CONSTANTS;

    #[inline(always)]
    fn bounds_left(&self) -> bool {
        self.mask.bounds_left()
    }
    #[inline(always)]
    fn bounds_right(&self) -> bool {
        self.mask.bounds_right()
    }
    #[inline(always)]
    fn sees_behind(&self) -> bool {
        self.mask.sees_behind()
    }
    #[inline(always)]
    fn keys(&self, of: &Sequence, pair: u32, i: u32) -> Interval {
        let Interval { start, end } = self.mask.keys(of, 0, i);
        let far_end = of.place(i).wrapping_add(1).saturating_sub(self.dist_threshold);
        let far_end = far_end.max(0).min(of.seqlen_k as i32) as u32;
        match pair {
            0 => Interval { start: start.max(far_end), end },
            _ => Interval { start, end: far_end.min(end) },
        }
    }
    #[inline(always)]
    fn queries(&self, of: &Sequence, pair: u32, j: u32) -> Interval {
        let Interval { start, end } = self.mask.queries(of, 0, j);
        let far_start = of.row(j).saturating_add(self.dist_threshold).max(0) as u32;
        match pair {
            0 => Interval { start, end: far_start.min(end) },
            _ => Interval { start: start.max(far_start), end },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::mask::tests::windows;

    #[test]
    fn intervals_and_rule_agree() {
        for (seqlen_q, seqlen_k) in [(1, 1), (5, 9), (9, 5), (16, 16), (3, 0)] {
            let of = Sequence { seqlen_q, seqlen_k };
            let thresholds = (-18..=18).chain([i32::MIN, i32::MIN + 1, i32::MAX]);
            for (dist_threshold, mask) in thresholds.flat_map(|t| windows().into_iter().map(move |mask| (t, mask))) {
                let pairs = ByDistance { mask, dist_threshold };
                for (i, j) in (0..seqlen_q).flat_map(|i| (0..seqlen_k).map(move |j| (i, j))) {
                    let distance = i64::from(i) + i64::from(seqlen_k) - i64::from(seqlen_q) - i64::from(j);
                    let is_far = distance >= i64::from(dist_threshold);
                    for pair in 0..2 {
                        let live = mask.keys(&of, 0, i).contains(j) && is_far == (pair == 1);
                        assert_eq!(live, pairs.keys(&of, pair, i).contains(j), "{pairs:?} {of:?} at {i}, {j}");
                        assert_eq!(live, pairs.queries(&of, pair, j).contains(i), "{pairs:?} {of:?} at {i}, {j}");
                    }
                }
            }
        }
    }
}
