//! Blocks of keys (n_blocks) that a query tile visits. A skipped block has no valid key, a full block has only valid
//! ones.
//!
//! Blocks are visited from the last to the first. So masked blocks come before full ones, and the mainloop runs over
//! consecutive ranges with one step function. With two pairs, the blocks of the first pair come before those of the
//! second. A query tile without a valid key visits its first block, wholly masked. So every work tile has a first and a
//! last visit, and the mainloop needs no case for none.

use core::marker::PhantomData;

use super::mask::Mask;
use super::pairs::Pairs;
use crate::ground::divisor::Divisor;
use crate::ground::places::KvBlock;
use crate::ground::places::WorkTile;
use crate::ground::shape::Shape;

/// Blocks of keys that a query tile visits through one pair. Of `start..end`, those in `full_start..full_end` are full,
/// the others masked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct NBlocks {
    start: u32,
    full_start: u32,
    full_end: u32,
    end: u32,
}

impl NBlocks {
    #[inline(always)]
    fn new<M: Mask, P: Pairs>(shape: &Shape, pairs: P, pair: u32, rows: (u32, u32), block_n: u32) -> Self {
        let (first, last) = (pairs.keys::<M>(shape, pair, rows.0), pairs.keys::<M>(shape, pair, rows.1));
        // Starts and ends grow with the row. If neither the first nor the last row attends to a key, no row does.
        let any = P::COUNT == 1 || first.0 < first.1 || last.0 < last.1;
        let end = if any { last.1.div_ceil(block_n) } else { 0 };
        NBlocks {
            start: (first.0 / block_n).min(end),
            full_start: last.0.div_ceil(block_n),
            full_end: first.1 / block_n,
            end,
        }
    }
}

/// Visits of a query tile. They count down: visit `u` is followed by `u` more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visits {
    pub count: u32,
    /// Visits below this one are of the second pair.
    second: u32,
    /// Visit `u` of the first pair is n_block `u − base`, modulo 2³².
    base: u32,
    /// First and end of the first pair's full visits.
    first_full: (u32, u32),
    /// End of the second pair's full visits, which begin at 0.
    second_full: u32,
}

/// Block of keys, and the pair that its scores come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visit {
    pub pair: u32,
    pub n_block: u32,
}

impl Visits {
    /// Computes the visits of the query rows `first_row..first_row + block_m`, of which at least one is before
    /// seqlen_q.
    #[inline(always)]
    pub fn new<M: Mask, P: Pairs>(shape: &Shape, pairs: P, first_row: u32, block_m: u32, block_n: u32) -> Self {
        let rows = (first_row, (first_row + block_m).min(shape.seqlen_q) - 1);
        let first = NBlocks::new::<M, P>(shape, pairs, 0, rows, block_n);
        if P::COUNT == 1 {
            return Visits {
                count: first.end.max(1),
                second: 0,
                base: 0,
                first_full: (0, first.full_end),
                second_full: 0,
            };
        }
        let second = NBlocks::new::<M, P>(shape, pairs, 1, rows, block_n);
        let base = second.end.wrapping_sub(first.start);
        let visit = |n_block: u32| n_block.clamp(first.start, first.end).wrapping_add(base);
        Visits {
            count: (second.end + (first.end - first.start)).max(1),
            second: second.end,
            base,
            first_full: (visit(first.full_start), visit(first.full_end)),
            second_full: second.full_end.min(second.end),
        }
    }

    #[inline(always)]
    pub fn at(&self, u: u32) -> Visit {
        let second = u < self.second;
        Visit { pair: second as u32, n_block: if second { u } else { u.wrapping_sub(self.base) } }
    }

    /// True if every row attends to every key of the block through the pair.
    #[inline(always)]
    pub fn is_full(&self, u: u32) -> bool {
        (self.first_full.0 <= u && u < self.first_full.1) || u < self.second_full
    }

    /// Returns the full visits of run `index`, from `.0` up to but not `.1`. There is one run per pair. A run's masked
    /// visits come before its full ones, counting down from where the previous run's full visits ended.
    #[inline(always)]
    pub fn run(&self, index: u32) -> (u32, u32) {
        if index == 0 { self.first_full } else { (0, self.second_full) }
    }
}

/// Blocks of keys that a CTA's work tiles visit, in the order of their visits.
pub struct KvBlocks<'a, M, P, I> {
    shape: &'a Shape,
    pairs: P,
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
    mask: PhantomData<M>,
}

impl<'a, M: Mask, P: Pairs, I: Iterator<Item = WorkTile>> KvBlocks<'a, M, P, I> {
    #[inline(always)]
    pub fn new(shape: &'a Shape, pairs: P, (block_m, block_n): (u32, u32), group: Divisor, tiles: I) -> Self {
        let visits = Visits { count: 0, second: 0, base: 0, first_full: (0, 0), second_full: 0 };
        KvBlocks { shape, pairs, block_m, block_n, tiles, group, batch: 0, head: 0, visits, left: 0, mask: PhantomData }
    }
}

impl<M: Mask, P: Pairs, I: Iterator<Item = WorkTile>> Iterator for KvBlocks<'_, M, P, I> {
    type Item = KvBlock;

    #[inline(always)]
    fn next(&mut self) -> Option<KvBlock> {
        if self.left == 0 {
            let tile = self.tiles.next()?;
            let first_row = tile.m_block * self.block_m;
            self.visits = Visits::new::<M, P>(self.shape, self.pairs, first_row, self.block_m, self.block_n);
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
    use crate::attention::mask::{Causal, Full};
    use crate::attention::pairs::{ByDistance, OnePair};

    fn agrees<M: Mask, P: Pairs>(shape: Shape, pairs: P, block_m: u32, block_n: u32) {
        for first_row in (0..shape.seqlen_q).step_by(block_m as usize) {
            let visits = Visits::new::<M, P>(&shape, pairs, first_row, block_m, block_n);
            let rows = first_row..(first_row + block_m).min(shape.seqlen_q);
            let mut met = std::vec![];
            for u in (0..visits.count).rev() {
                let Visit { pair, n_block } = visits.at(u);
                let keys = n_block * block_n..(n_block + 1) * block_n;
                let live = |i: u32, j: u32| {
                    let (start, end) = pairs.keys::<M>(&shape, pair, i);
                    (start..end).contains(&j)
                };
                let any = rows.clone().any(|i| keys.clone().any(|j| live(i, j)));
                let all = rows.clone().all(|i| keys.clone().all(|j| live(i, j)));
                assert!(any || visits.count == 1, "{shape:?} row {first_row}: {visits:?} visits {u} for nothing");
                assert_eq!(visits.is_full(u), all, "{shape:?} row {first_row}: {visits:?} at {u}");
                met.push((pair, n_block));
            }
            for pair in 0..P::COUNT {
                for j in 0..shape.seqlen_k {
                    let live = rows.clone().any(|i| {
                        let (start, end) = pairs.keys::<M>(&shape, pair, i);
                        (start..end).contains(&j)
                    });
                    assert!(
                        !live || met.contains(&(pair, j / block_n)),
                        "{shape:?} row {first_row}: key {j} is skipped"
                    );
                }
            }
            // Runs of masked and full visits follow each other from the top, in the order of the mainloop.
            let mut above = visits.count;
            for (full_start, full_end) in (0..P::COUNT).map(|run| visits.run(run)) {
                let full_end = full_end.min(above);
                assert!((full_end..above).all(|u| !visits.is_full(u)), "{visits:?}");
                assert!((full_start..full_end).all(|u| visits.is_full(u)), "{visits:?}");
                above = full_start.min(full_end);
            }
            assert_eq!(above, 0, "{visits:?}");
            met.sort_unstable();
            met.dedup();
            assert_eq!(met.len() as u32, visits.count, "{visits:?}: a block twice");
        }
    }

    #[test]
    fn visits_and_predicate_agree() {
        for seqlen_q in [1, 2, 7, 8, 9, 31, 33] {
            for seqlen_k in [0, 1, 3, 5, 6, 7, 29, 40] {
                let shape = Shape { batch: 1, heads_q: 1, heads_kv: 1, seqlen_q, seqlen_k, head_dim: 8 };
                agrees::<Full, _>(shape, OnePair, 8, 6);
                agrees::<Causal, _>(shape, OnePair, 8, 6);
                for threshold in -42..=42 {
                    agrees::<Full, _>(shape, ByDistance::new(threshold, &shape), 8, 6);
                    agrees::<Causal, _>(shape, ByDistance::new(threshold, &shape), 8, 6);
                }
            }
        }
    }
}
