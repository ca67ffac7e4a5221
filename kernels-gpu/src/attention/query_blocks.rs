//! Query blocks that a block of keys visits in the backward pass: those of every query head of its group, from the
//! first that attends to a key of it to the last.
//!
//! If no query attends to the keys, or none through one of two pairs, there is no query block, and the gradients are 0.

use super::blocks::Blocks;
use super::key_parts::{Sharing, SplitPart};
use super::mask::{Interval, Mask};
use crate::ground::places::KvBlock;
use crate::ground::places::QueryBlock;
use crate::ground::places::WorkTile;
use crate::ground::sequence::Sequence;
use crate::tuning;

/// Returns the query blocks of the keys `keys.start..keys.end`, through one pair. The first key is before seqlen_k. A
/// block with keys of padding has no full query block; rows of padding make no query block masked.
#[inline(always)]
pub fn blocks_of<M: Mask>(of: &Sequence, mask: &M, pair: u32, keys: Interval, block_m: u32) -> Blocks {
    let queries = |j| {
        let Interval { start, end } = mask.queries(of, pair, j);
        Interval { start, end: end.min(of.seqlen_q) }
    };
    let (first, last) = (queries(keys.start), queries(keys.end.min(of.seqlen_k) - 1));
    let blocks = Blocks::new(first, last, block_m);
    let full_end = if first.end == of.seqlen_q { blocks.end } else { blocks.full_end };
    if keys.end > of.seqlen_k {
        return Blocks { full_start: blocks.end, full_end: blocks.end, ..blocks };
    }
    Blocks { full_end, ..blocks }
}

/// Maximum number of query blocks that a CTA of the backward kernel visits. Its consumers count them in 30 bits.
pub const MAX_QUERY_BLOCKS: u32 = (1 << 30) - 1;

/// Number of query blocks that share one dQ semaphore in an exact pass. Blocks of keys of one head follow each other
/// at that distance. Fewer semaphores cost less waiting and signalling (notebook 38, 82).
///
/// Example: at D 128 and S 4096 a head has 64 query blocks of 64 rows, which share 16 semaphores of four blocks each.
pub const fn blocks_per_semaphore(head_dim: u32) -> u32 {
    if head_dim <= tuning::EXACT_LARGE_ABOVE_HEAD_DIM {
        tuning::DQ_SEMAPHORE_BLOCKS
    } else {
        tuning::DQ_SEMAPHORE_BLOCKS_LARGE
    }
}

/// Returns the block of keys of a work tile. The work tile that comes first in the order has the first block of keys,
/// which under a causal mask has the most queries.
#[inline(always)]
pub fn key_block(of: &Sequence, block_n: u32, tile: &WorkTile) -> KvBlock {
    let last = of.seqlen_k.div_ceil(block_n) - 1;
    KvBlock { batch: tile.batch, head: tile.head, n_block: last - tile.m_block, pair: 0 }
}

/// Query blocks that a block of keys visits through a pair, head by head, from the last to the first. Under a causal
/// mask all blocks of keys have the last query block in common, and can follow each other from there.
#[derive(Clone, Copy, Debug)]
pub struct QueryBlocks<M> {
    blocks: Blocks,
    batch: u32,
    /// Head and query block of the first visit.
    first_head: u32,
    first_block: u32,
    count: u32,
    pair: u32,
    mask: M,
}

impl<M: Mask> QueryBlocks<M> {
    /// Computes the query blocks of `keys` and the pair that they name, in each of the `heads` query heads that share
    /// the keys. `tile` is the number of queries and that of keys of a block.
    #[inline(always)]
    pub fn new(of: &Sequence, mask: M, heads: u32, tile: (u32, u32), keys: &KvBlock) -> Self {
        let (block_m, block_n) = tile;
        let first_key = keys.n_block * block_n;
        let interval = Interval { start: first_key, end: first_key + block_n };
        let blocks = blocks_of(of, &mask, keys.pair, interval, block_m);
        QueryBlocks {
            blocks,
            batch: keys.batch,
            first_head: keys.head * heads,
            first_block: blocks.end.wrapping_sub(1),
            count: heads * blocks.count(),
            pair: keys.pair,
            mask,
        }
    }

    /// Restricts them to a part of the work tile. Work tiles of a mask with bounds are never split.
    #[inline(always)]
    pub fn part(self, sharing: &Sharing, part: SplitPart) -> Self {
        if const { M::PAIRS > 1 } {
            return self;
        }
        let (before, most) = sharing.blocks(part);
        let (head, from_last) = sharing.m_blocks.divide(before);
        QueryBlocks {
            first_head: self.first_head + head,
            first_block: self.first_block - from_last,
            count: most.min(self.count - before),
            ..self
        }
    }

    /// Returns the number of query blocks.
    #[inline(always)]
    pub fn count(&self) -> u32 {
        self.count
    }

    #[inline(always)]
    pub fn first(&self) -> QueryBlock {
        QueryBlock { batch: self.batch, head: self.first_head, m_block: self.first_block, pair: self.pair }
    }

    /// Returns the query block after `block`.
    #[inline(always)]
    pub fn after(&self, block: &QueryBlock) -> QueryBlock {
        let last = block.m_block == self.blocks.start;
        QueryBlock {
            head: block.head + last as u32,
            m_block: if last { self.blocks.end } else { block.m_block } - 1,
            ..*block
        }
    }

    /// True if every query of the block attends to every key.
    #[inline(always)]
    pub fn is_full(&self, block: &QueryBlock) -> bool {
        self.blocks.full_start <= block.m_block && block.m_block < self.blocks.full_end
    }

    /// Returns how many blocks of keys precede block `n_block` at the dQ semaphore in an exact pass, of those that
    /// visit a query block with the same semaphore. `shared` is [`blocks_per_semaphore`].
    #[inline(always)]
    pub fn earlier(&self, of: &Sequence, block: &QueryBlock, n_block: u32, shared: u32, tile: (u32, u32)) -> u32 {
        let (block_m, block_n) = tile;
        let first_row = block.m_block / shared * shared * block_m;
        n_block - self.mask.keys(of, self.pair, first_row).start / block_n
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::by_distance::ByDistance;
    use crate::attention::mask::Window;
    use crate::attention::mask::tests::windows;
    use crate::ground::shape::Shape;
    use std::vec::Vec;

    fn agrees<M: Mask + core::fmt::Debug>(shape: Shape, mask: M, block_m: u32, block_n: u32) {
        let of = shape.sequence();
        // Number of blocks of keys that have visited each dQ semaphore of each pair.
        let mut semaphores = std::vec![[0; 2]; shape.seqlen_q.div_ceil(2 * block_m) as usize];
        for (n_block, pair) in (0..shape.seqlen_k.div_ceil(block_n)).flat_map(|n| (0..M::PAIRS).map(move |p| (n, p))) {
            let key_block = KvBlock { batch: 0, head: 0, n_block, pair };
            let all_blocks = QueryBlocks::new(&of, mask, 1, (block_m, block_n), &key_block);
            let blocks = all_blocks.blocks;
            let what = std::format!("{mask:?} {of:?} keys {n_block}: {blocks:?}");
            let keys = n_block * block_n..(n_block + 1) * block_n;
            let live = |i: u32, j: u32| mask.keys(&of, pair, i).contains(j);
            for m_block in 0..shape.seqlen_q.div_ceil(block_m) {
                let rows = m_block * block_m..((m_block + 1) * block_m).min(shape.seqlen_q);
                let any = rows.clone().any(|i| keys.clone().any(|j| live(i, j)));
                let all = rows.clone().all(|i| keys.clone().all(|j| live(i, j)));
                let visited = (blocks.start..blocks.end).contains(&m_block);
                // One of two pairs may have no key at all, and still a few blocks.
                assert!(visited == any || visited && M::PAIRS > 1, "{what}: block {m_block}");
                let full = (blocks.full_start..blocks.full_end).contains(&m_block);
                assert!(!visited || full == all, "{what}: block {m_block} full or not");
            }
            let mut met: Vec<u32> = (blocks.start..blocks.end).map(|m_block| m_block / 2 * 2).collect();
            met.dedup();
            for m_block in met {
                let semaphore = &mut semaphores[(m_block / 2) as usize][pair as usize];
                let block = QueryBlock { m_block, ..all_blocks.first() };
                assert_eq!(all_blocks.earlier(&of, &block, n_block, 2, (block_m, block_n)), *semaphore, "{what}");
                *semaphore += 1;
            }
        }
    }

    #[test]
    fn ranges_and_predicate_agree() {
        for seqlen_q in [0, 1, 2, 7, 8, 9, 31, 33] {
            for seqlen_k in [1, 3, 5, 6, 7, 29, 40] {
                let shape = Shape { batch: 1, heads_q: 1, heads_kv: 1, seqlen_q, seqlen_k, head_dim: 8 };
                for mask in windows() {
                    agrees(shape, mask, 8, 6);
                    for dist_threshold in -42..=42 {
                        agrees(shape, ByDistance { mask, dist_threshold }, 8, 6);
                    }
                }
            }
        }
    }

    #[test]
    fn blocks_come_head_by_head() {
        let shape = Shape { batch: 1, heads_q: 4, heads_kv: 2, seqlen_q: 20, seqlen_k: 20, head_dim: 8 };
        let keys = KvBlock { batch: 0, head: 1, n_block: 1, pair: 0 };
        let blocks = QueryBlocks::new(&shape.sequence(), Window::CAUSAL, shape.group(), (8, 8), &keys);
        let mut all = std::vec![blocks.first()];
        for _ in 1..blocks.count() {
            all.push(blocks.after(&all[all.len() - 1]));
        }
        let places: Vec<_> = all.into_iter().map(|b| (b.head, b.m_block)).collect();
        assert_eq!(places, [(2, 2), (2, 1), (3, 2), (3, 1)]);
    }
}
