//! Pairs of Q and K: one for all scores, or two by distance (piecewise attention).
//!
//! The second pair, the far pair, has the keys that are far behind a query: score(i, j) is scale·q2_i·k2_j if i +
//! seqlen_k − seqlen_q − j ≥ dist_threshold, and scale·q1_i·k1_j otherwise. Of the valid keys of a query, each pair has
//! one interval. So piecewise attention is one softmax over two sequences of blocks, and a block that the threshold
//! crosses is in both.

use super::mask::Mask;
use crate::ground::shape::Shape;

/// Rule that selects the pair of Q and K for each score. Pairs count from 0.
pub trait Pairs: Copy {
    /// Number of pairs.
    const COUNT: u32;
    /// Returns the end of the keys `0..second_end(i)` whose scores with query row `i` come from the second pair. It is
    /// at most seqlen_k, and never less than for row `i − 1`.
    fn second_end(self, shape: &Shape, i: u32) -> u32;
    /// Returns the first query row whose score with key `j` comes from the second pair, by the same rule. All later
    /// rows' scores with it do, too.
    fn second_start(self, shape: &Shape, j: u32) -> u32;

    /// Returns the interval of keys that query row `i` attends to through a pair. There are none if the end is not
    /// behind the start.
    #[inline(always)]
    fn keys<M: Mask>(self, shape: &Shape, pair: u32, i: u32) -> (u32, u32) {
        let (end, second_end) = (M::live_end(shape, i), self.second_end(shape, i));
        if pair == 0 { (second_end, end) } else { (0, second_end.min(end)) }
    }
    /// Returns the interval of query rows that attend to key `j` through a pair. Its end may exceed seqlen_q; only rows
    /// below that count.
    #[inline(always)]
    fn queries<M: Mask>(self, shape: &Shape, pair: u32, j: u32) -> (u32, u32) {
        let (start, second_start) = (M::live_start(shape, j), self.second_start(shape, j));
        if pair == 0 { (start, second_start) } else { (start.max(second_start), u32::MAX) }
    }
}

/// One pair for all scores.
#[derive(Clone, Copy, Debug)]
pub struct OnePair;

impl Pairs for OnePair {
    const COUNT: u32 = 1;
    #[inline(always)]
    fn second_end(self, _: &Shape, _: u32) -> u32 {
        0
    }
    #[inline(always)]
    fn second_start(self, _: &Shape, _: u32) -> u32 {
        u32::MAX
    }
}

/// Two pairs: scores from a distance of `threshold` on come from the second. The distance of query i to key j is i +
/// seqlen_k − seqlen_q − j: both are counted from the end.
#[derive(Clone, Copy, Debug)]
pub struct ByDistance {
    /// Threshold, clamped to −seqlen_q..=seqlen_k, whose ends are beyond every distance of the shape.
    threshold: i32,
}

impl ByDistance {
    /// Accepts any threshold. All thresholds beyond every distance of the shape, on one side, mean the same.
    #[inline(always)]
    pub fn new(dist_threshold: i32, shape: &Shape) -> Self {
        ByDistance { threshold: dist_threshold.max(-(shape.seqlen_q as i32)).min(shape.seqlen_k as i32) }
    }
}

impl Pairs for ByDistance {
    const COUNT: u32 = 2;
    #[inline(always)]
    fn second_end(self, shape: &Shape, i: u32) -> u32 {
        // May wrap for a row of padding, as `Causal::live_end` may.
        let end = (i as i32).wrapping_add(1).wrapping_add(shape.seqlen_k as i32 - shape.seqlen_q as i32);
        end.saturating_sub(self.threshold).max(0).min(shape.seqlen_k as i32) as u32
    }
    #[inline(always)]
    fn second_start(self, shape: &Shape, j: u32) -> u32 {
        // May wrap for a key of padding, as `Causal::live_start` may.
        let live = (j as i32).wrapping_sub(shape.seqlen_k as i32 - shape.seqlen_q as i32);
        live.saturating_add(self.threshold).max(0) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::mask::{Causal, Full};

    fn agrees<M: Mask>(shape: Shape, dist_threshold: i32) {
        let pairs = ByDistance::new(dist_threshold, &shape);
        for (i, j) in (0..shape.seqlen_q).flat_map(|i| (0..shape.seqlen_k).map(move |j| (i, j))) {
            let distance = i as i64 + shape.seqlen_k as i64 - shape.seqlen_q as i64 - j as i64;
            for pair in 0..2 {
                let ((first_key, end_key), (first_row, end_row)) =
                    (pairs.keys::<M>(&shape, pair, i), pairs.queries::<M>(&shape, pair, j));
                let live = j < M::live_end(&shape, i) && (distance >= dist_threshold as i64) == (pair == 1);
                assert_eq!(
                    live,
                    (first_key..end_key).contains(&j),
                    "{shape:?} {dist_threshold} pair {pair} at {i}, {j}"
                );
                assert_eq!(
                    live,
                    (first_row..end_row).contains(&i),
                    "{shape:?} {dist_threshold} pair {pair} at {i}, {j}"
                );
            }
        }
    }

    #[test]
    fn intervals_and_rule_agree() {
        for (seqlen_q, seqlen_k) in [(1, 1), (5, 9), (9, 5), (16, 16), (3, 0)] {
            let shape = Shape { batch: 1, heads_q: 1, heads_kv: 1, seqlen_q, seqlen_k, head_dim: 8 };
            for dist_threshold in (-18..=18).chain([i32::MIN, i32::MIN + 1, i32::MAX]) {
                agrees::<Full>(shape, dist_threshold);
                agrees::<Causal>(shape, dist_threshold);
            }
        }
    }
}
