//! Query blocks that a block of keys visits in the backward pass: those of every query head of its group, from the
//! first that attends to a key of it to the last.
//!
//! A block of keys to which no query attends visits its last query block, wholly masked. So every work tile has a first
//! and a last step, which yields gradients of 0 without a special case. With two pairs, this may hold for one of them;
//! that pair is left out.

use core::marker::PhantomData;

use super::key_parts::{Sharing, SplitPart};
use super::mask::Mask;
use super::pairs::{OnePair, Pairs};
use crate::ground::places::KvBlock;
use crate::ground::places::QueryBlock;
use crate::ground::places::WorkTile;
use crate::ground::shape::Shape;
use crate::tuning;

/// Query blocks that a block of keys visits through one pair. Of `start..end`, those in `full_start..full_end` are
/// full, the others masked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MBlocks {
    pub start: u32,
    pub full_start: u32,
    pub full_end: u32,
    pub end: u32,
}

impl MBlocks {
    /// Computes the query blocks for one pair; see [`MBlocks::new`].
    #[inline(always)]
    pub fn plain<M: Mask>(shape: &Shape, first_key: u32, block_n: u32, block_m: u32) -> Self {
        Self::new::<M, OnePair>(shape, OnePair, 0, first_key, block_n, block_m)
    }

    /// Computes the query blocks of the keys `first_key..first_key + block_n`, of which at least one is before
    /// seqlen_k.
    #[inline(always)]
    pub fn new<M: Mask, P: Pairs>(
        shape: &Shape,
        pairs: P,
        pair: u32,
        first_key: u32,
        block_n: u32,
        block_m: u32,
    ) -> Self {
        let m_blocks = shape.seqlen_q.div_ceil(block_m);
        let last_key = first_key + block_n - 1;
        let whole = last_key < shape.seqlen_k;
        if P::COUNT == 1 {
            let end = m_blocks.max(1);
            let full_start = if whole { M::live_start(shape, last_key).div_ceil(block_m) } else { end };
            let start = (M::live_start(shape, first_key) / block_m).min(end - 1);
            return MBlocks { start, full_start: full_start.min(end), full_end: end, end };
        }
        let queries = |j| pairs.queries::<M>(shape, pair, j);
        let (first, last) = (queries(first_key), queries(last_key.min(shape.seqlen_k - 1)));
        // Starts and ends grow with the key. If queries attend neither to the first key nor to the last one, they
        // attend to none.
        let any = |(start, end): (u32, u32)| start < end.min(shape.seqlen_q);
        let end = if any(first) || any(last) { last.1.div_ceil(block_m).min(m_blocks) } else { 0 };
        MBlocks {
            start: (first.0 / block_m).min(end),
            full_start: if whole { last.0.div_ceil(block_m) } else { end },
            full_end: if first.1 < shape.seqlen_q { first.1 / block_m } else { end },
            end,
        }
    }
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
pub fn key_block(shape: &Shape, block_n: u32, tile: &WorkTile) -> KvBlock {
    let last = shape.seqlen_k.div_ceil(block_n) - 1;
    KvBlock { batch: tile.batch, head: tile.head, n_block: last - tile.m_block, pair: 0 }
}

/// Query blocks that a block of keys visits through a pair, head by head, from the last to the first. Under a causal
/// mask all blocks of keys have the last query block in common, and can follow each other from there.
#[derive(Clone, Copy, Debug)]
pub struct QueryBlocks<M, P> {
    blocks: MBlocks,
    batch: u32,
    /// Head and query block of the first visit.
    first_head: u32,
    first_block: u32,
    count: u32,
    pair: u32,
    pairs: P,
    mask: PhantomData<M>,
}

impl<M: Mask, P: Pairs> QueryBlocks<M, P> {
    /// Computes the query blocks of `keys` and the pair that they name.
    #[inline(always)]
    pub fn new(shape: &Shape, pairs: P, block_m: u32, block_n: u32, keys: &KvBlock) -> Self {
        let first_key = keys.n_block * block_n;
        let blocks = MBlocks::new::<M, P>(shape, pairs, keys.pair, first_key, block_n, block_m);
        let (heads, pair) = (shape.group(), keys.pair);
        QueryBlocks {
            blocks,
            batch: keys.batch,
            first_head: keys.head * heads,
            first_block: blocks.end.wrapping_sub(1),
            count: heads * (blocks.end - blocks.start),
            pair,
            pairs,
            mask: PhantomData,
        }
    }

    /// Restricts them to a part of the work tile.
    #[inline(always)]
    pub fn part(self, sharing: &Sharing, part: SplitPart) -> Self {
        if const { !Sharing::is_for::<M, P>() } {
            return self;
        }
        let (head, from_last, count) = sharing.blocks(part);
        let (first_head, first_block) = (self.first_head + head, self.first_block - from_last);
        QueryBlocks { first_head, first_block, count, ..self }
    }

    /// Replaces the end of the block range by its copy in the launch parameters. It then stays in constant memory; the
    /// consumers use this to reduce register pressure.
    #[inline(always)]
    pub fn end_of(self, sharing: &Sharing) -> Self {
        if const { !Sharing::is_for::<M, P>() } {
            return self;
        }
        QueryBlocks { blocks: MBlocks { end: sharing.m_blocks.value, ..self.blocks }, ..self }
    }

    /// Returns the number of query blocks. With one pair it is at least one.
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
        block.m_block >= self.blocks.full_start && (P::COUNT == 1 || block.m_block < self.blocks.full_end)
    }

    /// Returns how many blocks of keys precede block `n_block` at the dQ semaphore in an exact pass, of those that
    /// visit a query block with the same semaphore. `shared` is [`blocks_per_semaphore`].
    #[inline(always)]
    pub fn earlier(&self, shape: &Shape, block: &QueryBlock, n_block: u32, shared: u32, tile: (u32, u32)) -> u32 {
        if P::COUNT == 1 || self.pair == 1 {
            return n_block;
        }
        let (block_m, block_n) = tile;
        let first_row = block.m_block / shared * shared * block_m;
        n_block - self.pairs.second_end(shape, first_row) / block_n
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::mask::{Causal, Full};
    use crate::attention::pairs::ByDistance;
    use std::vec::Vec;

    fn agrees<M: Mask, P: Pairs>(shape: Shape, pairs: P, block_m: u32, block_n: u32) {
        // Number of blocks of keys that have visited each dQ semaphore of each pair.
        let mut semaphores = std::vec![[0; 2]; shape.seqlen_q.div_ceil(2 * block_m) as usize];
        for (n_block, pair) in (0..shape.seqlen_k.div_ceil(block_n)).flat_map(|n| (0..P::COUNT).map(move |p| (n, p))) {
            let key_block = KvBlock { batch: 0, head: 0, n_block, pair };
            let all_blocks = QueryBlocks::<M, P>::new(&shape, pairs, block_m, block_n, &key_block);
            let blocks = all_blocks.blocks;
            let keys = n_block * block_n..(n_block + 1) * block_n;
            let live = |i: u32, j: u32| {
                let (start, end) = pairs.keys::<M>(&shape, pair, i);
                (start..end).contains(&j)
            };
            for m_block in 0..shape.seqlen_q.div_ceil(block_m) {
                let rows = m_block * block_m..((m_block + 1) * block_m).min(shape.seqlen_q);
                let any = rows.clone().any(|i| keys.clone().any(|j| live(i, j)));
                let all = rows.clone().all(|i| keys.clone().all(|j| live(i, j)));
                let visited = (blocks.start..blocks.end).contains(&m_block);
                assert!(visited || !any, "{shape:?} keys {n_block}: block {m_block} skipped but live");
                let full = all_blocks.is_full(&QueryBlock { m_block, ..all_blocks.first() });
                assert!(!visited || full == all, "{shape:?} keys {n_block}: block {m_block} full or not");
                assert!(
                    !visited || any || P::COUNT == 1 && m_block + 1 == blocks.end,
                    "{shape:?} keys {n_block}: {m_block} for nothing"
                );
            }
            let mut met: Vec<u32> = (blocks.start..blocks.end).map(|m_block| m_block / 2 * 2).collect();
            met.dedup();
            for m_block in met.into_iter().filter(|m| m * block_m < shape.seqlen_q) {
                let semaphore = &mut semaphores[(m_block / 2) as usize][pair as usize];
                let block = QueryBlock { m_block, ..all_blocks.first() };
                let earlier = all_blocks.earlier(&shape, &block, n_block, 2, (block_m, block_n));
                assert_eq!(earlier, *semaphore, "{shape:?}");
                *semaphore += 1;
            }
        }
    }

    #[test]
    fn ranges_and_predicate_agree() {
        for seqlen_q in [0, 1, 2, 7, 8, 9, 31, 33] {
            for seqlen_k in [1, 3, 5, 6, 7, 29, 40] {
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

    #[test]
    fn blocks_come_head_by_head() {
        let shape = Shape { batch: 1, heads_q: 4, heads_kv: 2, seqlen_q: 20, seqlen_k: 20, head_dim: 8 };
        let keys = KvBlock { batch: 0, head: 1, n_block: 1, pair: 0 };
        let blocks = QueryBlocks::<Causal, _>::new(&shape, OnePair, 8, 8, &keys);
        let mut all = std::vec![blocks.first()];
        for _ in 1..blocks.count() {
            all.push(blocks.after(&all[all.len() - 1]));
        }
        let places: Vec<_> = all.into_iter().map(|b| (b.head, b.m_block)).collect();
        assert_eq!(places, [(2, 2), (2, 1), (3, 2), (3, 1)]);
    }
}
