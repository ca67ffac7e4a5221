//! Blocks of keys (n_blocks) that a query tile visits, one after the other.
//!
//! Blocks are visited from the last to the first. So masked blocks at the right edge of a mask come before full ones,
//! and the mainloop runs over consecutive ranges with one step function. With two pairs, the blocks of the near pair
//! come before those of the far pair. A query tile without a valid key visits its first block, wholly masked. So every
//! work tile has a first and a last visit, and the mainloop needs no case for none.

use core::ops::Range;

use super::blocks::Blocks;
use super::mask::Mask;
use crate::ground::divisor::Divisor;
use crate::ground::places::KvBlock;
use crate::ground::places::WorkTile;
use crate::ground::sequence::Sequence;

/// Visits of a query tile. They count down: visit `u` is followed by `u` more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visits {
    pub count: u32,
    /// Visits below this one are of the far pair; 0 with one pair.
    far: u32,
    /// Visit `u` is n_block `u + base`, modulo 2³²; `far_base` is that of the far pair.
    base: u32,
    far_base: u32,
    /// First and end of the full visits of the near pair, or of the only one.
    full: (u32, u32),
    /// First and end of the full visits of the far pair.
    far_full: (u32, u32),
}

/// Consecutive visits, which count down: first masked ones, at the left edge of the pair before this one and at the
/// right edge of this one, then full ones of this pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    pub masked: Range<u32>,
    pub full: Range<u32>,
}

/// Block of keys, and the pair that its scores come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visit {
    pub pair: u32,
    pub n_block: u32,
}

impl Visits {
    const NONE: Visits = Visits { count: 0, far: 0, base: 0, far_base: 0, full: (0, 0), far_full: (0, 0) };

    /// Computes the visits of the query rows `first_row..first_row + block_m`, of which at least one is before
    /// seqlen_q.
    #[inline(always)]
    pub fn new<M: Mask>(of: &Sequence, mask: &M, first_row: u32, block_m: u32, block_n: u32) -> Self {
        let last_row = (first_row + block_m).min(of.seqlen_q) - 1;
        let blocks = |pair| Blocks::new(mask.keys(of, pair, first_row), mask.keys(of, pair, last_row), block_n);
        let near = blocks(0);
        if const { M::PAIRS == 1 } {
            return Visits {
                count: near.count().max(1),
                base: near.start,
                full: (near.full_start - near.start, near.full_end - near.start),
                ..Visits::NONE
            };
        }
        let far = blocks(1);
        let base = near.start.wrapping_sub(far.count());
        Visits {
            count: (far.count() + near.count()).max(1),
            far: far.count(),
            base,
            far_base: far.start,
            full: (near.full_start.wrapping_sub(base), near.full_end.wrapping_sub(base)),
            far_full: (far.full_start - far.start, far.full_end - far.start),
        }
    }

    #[inline(always)]
    pub fn at(&self, u: u32) -> Visit {
        let far = u < self.far;
        Visit { pair: far as u32, n_block: u.wrapping_add(if far { self.far_base } else { self.base }) }
    }

    /// True if every row attends to every key of the block through the pair.
    #[inline(always)]
    pub fn is_full(&self, u: u32) -> bool {
        (self.full.0 <= u && u < self.full.1) || (self.far_full.0 <= u && u < self.far_full.1)
    }

    /// Returns the first and the end of the full visits of a pair.
    #[inline(always)]
    fn full(&self, pair: u32) -> (u32, u32) {
        if pair == 0 { self.full } else { self.far_full }
    }

    /// Returns a pair's run of the visits between the first and the last of the tile.
    #[inline(always)]
    pub fn run(&self, pair: u32) -> Run {
        let (full_start, full_end) = self.full(pair);
        let first = self.count - 1;
        let above = if pair == 0 { first } else { first.min(self.full.0) };
        Run { masked: full_end.max(1)..above, full: full_start.max(1)..full_end.min(above) }
    }

    /// Returns the masked visits at the left edge of the last pair's mask, without the last visit of the tile.
    #[inline(always)]
    pub fn left_edge<M: Mask>(&self) -> Range<u32> {
        1..self.full(const { M::PAIRS - 1 }).0.min(self.count - 1)
    }
}

/// Blocks of keys that a CTA's work tiles visit, in the order of their visits. `S` returns the lengths of a batch item.
pub struct KvBlocks<M, S, I> {
    sequence: S,
    mask: M,
    block_m: u32,
    block_n: u32,
    tiles: I,
    /// Query heads per key/value head.
    group: Divisor,
    /// Batch item and key/value head of the current work tile, and its visits. `left` of them are still to come.
    batch: u32,
    head: u32,
    visits: Visits,
    left: u32,
}

impl<M: Mask, S: Fn(u32) -> Sequence, I: Iterator<Item = WorkTile>> KvBlocks<M, S, I> {
    #[inline(always)]
    pub fn new(sequence: S, mask: M, (block_m, block_n): (u32, u32), group: Divisor, tiles: I) -> Self {
        KvBlocks { sequence, mask, block_m, block_n, tiles, group, batch: 0, head: 0, visits: Visits::NONE, left: 0 }
    }
}

impl<M: Mask, S: Fn(u32) -> Sequence, I: Iterator<Item = WorkTile>> Iterator for KvBlocks<M, S, I> {
    type Item = KvBlock;

    #[inline(always)]
    fn next(&mut self) -> Option<KvBlock> {
        if self.left == 0 {
            let tile = self.tiles.next()?;
            let first_row = tile.m_block * self.block_m;
            self.visits = Visits::new(&(self.sequence)(tile.batch), &self.mask, first_row, self.block_m, self.block_n);
            self.left = self.visits.count;
            (self.batch, self.head) = (tile.batch, self.group.divide(tile.head).0);
        }
        self.left -= 1;
        let Visit { pair, n_block } = self.visits.at(self.left);
        Some(KvBlock { batch: self.batch, head: self.head, n_block, pair })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::by_distance::ByDistance;
    use crate::attention::mask::tests::windows;

    fn agrees<M: Mask + core::fmt::Debug>(of: Sequence, mask: M, block_m: u32, block_n: u32) {
        for first_row in (0..of.seqlen_q).step_by(block_m as usize) {
            let visits = Visits::new(&of, &mask, first_row, block_m, block_n);
            let what = std::format!("{mask:?} {of:?} row {first_row}: {visits:?}");
            let rows = first_row..(first_row + block_m).min(of.seqlen_q);
            let mut met = std::vec![];
            for u in (0..visits.count).rev() {
                let Visit { pair, n_block } = visits.at(u);
                let keys = n_block * block_n..(n_block + 1) * block_n;
                let live = |i: u32, j: u32| mask.keys(&of, pair, i).contains(j);
                let any = rows.clone().any(|i| keys.clone().any(|j| live(i, j)));
                let all = rows.clone().all(|i| keys.clone().all(|j| live(i, j)));
                // One of two pairs may have no key at all, and still a few blocks.
                assert!(any || visits.count == 1 || M::PAIRS > 1, "{what} visits {u} for nothing");
                assert_eq!(visits.is_full(u), all, "{what} at {u}");
                met.push((pair, n_block));
            }
            for (pair, j) in (0..M::PAIRS).flat_map(|pair| (0..of.seqlen_k).map(move |j| (pair, j))) {
                let live = rows.clone().any(|i| mask.keys(&of, pair, i).contains(j));
                assert!(!live || met.contains(&(pair, j / block_n)), "{what}: key {j} is skipped");
            }
            // From the first visit to the last, in the order of the mainloop, each range begins where the one before it
            // ended.
            let last = visits.count - 1;
            let mut above = last;
            let mut follows = |range: Range<u32>, full: bool| {
                assert!(range.clone().all(|u| visits.is_full(u) == full), "{what}: {range:?}");
                assert!(range.is_empty() || range.end == above, "{what}: {range:?} below {above}");
                above = above.min(range.start.max(1));
            };
            for run in (0..M::PAIRS).map(|pair| visits.run(pair)) {
                follows(run.masked, false);
                follows(run.full, true);
            }
            let left_edge = visits.left_edge::<M>();
            assert!(left_edge.is_empty() || mask.bounds_left(), "{what}");
            follows(left_edge, false);
            assert!(above <= 1, "{what}: {above} left out");
            met.sort_unstable();
            met.dedup();
            assert_eq!(met.len() as u32, visits.count, "{what}: a block twice");
        }
    }

    #[test]
    fn visits_and_predicate_agree() {
        for (seqlen_q, seqlen_k) in [1, 2, 7, 8, 9, 31, 33]
            .into_iter()
            .flat_map(|q| [0, 1, 3, 5, 6, 7, 29, 40].into_iter().map(move |k| (q, k)))
        {
            let of = Sequence { seqlen_q, seqlen_k };
            for mask in windows() {
                agrees(of, mask, 8, 6);
                for dist_threshold in -42..=42 {
                    agrees(of, ByDistance { mask, dist_threshold }, 8, 6);
                }
            }
        }
    }
}
