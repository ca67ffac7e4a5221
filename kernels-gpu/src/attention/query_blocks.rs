//! Which query blocks a block of keys meets in the backward pass: those of every query head of its group, from the first
//! that sees a key of it to the last.
//!
//! A block of keys that no query sees meets its last query block all the same, wholly masked: so every work tile has a
//! first and a last step, and gradients of 0 come out of it by themselves.

use core::marker::PhantomData;

use super::mask::Mask;
use super::scheduler::WorkTile;
use crate::params::Shape;
use crate::pipeline::order::KvBlock;
use crate::variants::WARPGROUP_ROWS;

/// The query blocks of one block of keys: `start..full_start` are masked, `full_start..end` are full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MBlocks {
    pub start: u32,
    pub full_start: u32,
    pub end: u32,
}

impl MBlocks {
    /// For the keys `first_key..first_key + block_n`, of which there is at least one before seqlen_k.
    #[inline(always)]
    pub fn new<M: Mask>(shape: &Shape, first_key: u32, block_n: u32, block_m: u32) -> Self {
        let end = shape.seqlen_q.div_ceil(block_m).max(1);
        let last_key = first_key + block_n - 1;
        let full_start = if last_key < shape.seqlen_k { M::live_start(shape, last_key).div_ceil(block_m) } else { end };
        MBlocks {
            start: (M::live_start(shape, first_key) / block_m).min(end - 1),
            full_start: full_start.min(end),
            end,
        }
    }
}

/// Query blocks that share a turn in an exact pass. Blocks of keys of one head follow each other at that distance; fewer
/// turns cost less to wait for and to count.
pub const fn turn_blocks(head_dim: u32) -> u32 {
    if head_dim <= 128 { 4 } else { 1 }
}

/// Which part of a query block's dQ one of two warpgroups computes: 64 rows, of all columns where the block has 128 rows,
/// of half of them where it has 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DqPart {
    pub row: u32,
    pub column: u32,
}

impl DqPart {
    #[inline(always)]
    pub const fn new(block_m: u32, head_dim: u32, index: u32) -> Self {
        match block_m / WARPGROUP_ROWS {
            1 => DqPart { row: 0, column: index * Self::columns(block_m, head_dim) },
            _ => DqPart { row: index * WARPGROUP_ROWS, column: 0 },
        }
    }
    /// Columns of a part.
    pub const fn columns(block_m: u32, head_dim: u32) -> u32 {
        block_m * head_dim / (2 * WARPGROUP_ROWS)
    }
}

/// One query block of one head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueryBlock {
    pub batch: u32,
    /// The query head.
    pub head: u32,
    pub m_block: u32,
}

/// The block of keys of a work tile: the first one comes first, which under a causal mask has the most queries.
#[inline(always)]
pub fn key_block(shape: &Shape, block_n: u32, tile: &WorkTile) -> KvBlock {
    let last = shape.seqlen_k.div_ceil(block_n) - 1;
    KvBlock { batch: tile.batch, head: tile.head, n_block: last - tile.m_block }
}

/// The query blocks that a block of keys meets, head by head, from the last to the first: under a causal mask all blocks
/// of keys have the last one in common, and can follow each other from there.
#[derive(Clone, Copy, Debug)]
pub struct QueryBlocks<M> {
    blocks: MBlocks,
    batch: u32,
    first_head: u32,
    heads: u32,
    mask: PhantomData<M>,
}

impl<M: Mask> QueryBlocks<M> {
    #[inline(always)]
    pub fn new(shape: &Shape, block_m: u32, block_n: u32, keys: &KvBlock) -> Self {
        let blocks = MBlocks::new::<M>(shape, keys.n_block * block_n, block_n, block_m);
        let heads = shape.group();
        QueryBlocks { blocks, batch: keys.batch, first_head: keys.head * heads, heads, mask: PhantomData }
    }

    /// How many there are; at least one.
    #[inline(always)]
    pub fn count(&self) -> u32 {
        self.heads * (self.blocks.end - self.blocks.start)
    }

    #[inline(always)]
    pub fn first(&self) -> QueryBlock {
        QueryBlock { batch: self.batch, head: self.first_head, m_block: self.blocks.end - 1 }
    }

    /// The one after `block`.
    #[inline(always)]
    pub fn after(&self, block: &QueryBlock) -> QueryBlock {
        let last = block.m_block == self.blocks.start;
        QueryBlock {
            head: block.head + last as u32,
            m_block: if last { self.blocks.end } else { block.m_block } - 1,
            ..*block
        }
    }

    /// Whether every query of the block sees every key.
    #[inline(always)]
    pub fn is_full(&self, block: &QueryBlock) -> bool {
        block.m_block >= self.blocks.full_start
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::mask::{Causal, Full};
    use std::vec::Vec;

    fn agrees<M: Mask>(shape: Shape, block_m: u32, block_n: u32) {
        for n_block in 0..shape.seqlen_k.div_ceil(block_n) {
            let blocks = MBlocks::new::<M>(&shape, n_block * block_n, block_n, block_m);
            let keys = n_block * block_n..(n_block + 1) * block_n;
            for m_block in 0..shape.seqlen_q.div_ceil(block_m) {
                let rows = m_block * block_m..((m_block + 1) * block_m).min(shape.seqlen_q);
                let live = |i: u32, j: u32| j < M::live_end(&shape, i);
                let any = rows.clone().any(|i| keys.clone().any(|j| live(i, j)));
                let all = rows.clone().all(|i| keys.clone().all(|j| live(i, j)));
                let visited = (blocks.start..blocks.end).contains(&m_block);
                assert!(visited || !any, "{shape:?} keys {n_block}: block {m_block} skipped but live");
                assert!(m_block < blocks.full_start || all, "{shape:?} keys {n_block}: block {m_block} not full");
                assert!(
                    !visited || any || m_block + 1 == blocks.end,
                    "{shape:?} keys {n_block}: {m_block} for nothing"
                );
            }
            for j in keys.clone().filter(|&j| j < shape.seqlen_k) {
                for i in 0..shape.seqlen_q {
                    assert_eq!(i >= M::live_start(&shape, j), j < M::live_end(&shape, i), "{shape:?} row {i}, key {j}");
                }
            }
        }
    }

    #[test]
    fn ranges_and_predicate_agree() {
        for seqlen_q in [0, 1, 2, 7, 8, 9, 31, 33] {
            for seqlen_k in [1, 3, 5, 6, 7, 29, 40] {
                let shape = Shape { batch: 1, heads_q: 1, heads_kv: 1, seqlen_q, seqlen_k, head_dim: 8 };
                agrees::<Full>(shape, 8, 6);
                agrees::<Causal>(shape, 8, 6);
            }
        }
    }

    #[test]
    fn parts_of_dq_cover_it_once() {
        for (block_m, head_dim) in [(128, 64), (64, 128), (64, 256)] {
            let columns = DqPart::columns(block_m, head_dim);
            let mut seen = std::vec![0; (block_m * head_dim) as usize];
            for DqPart { row, column } in [0, 1].map(|index| DqPart::new(block_m, head_dim, index)) {
                for (i, d) in (0..WARPGROUP_ROWS).flat_map(|i| (0..columns).map(move |d| (row + i, column + d))) {
                    seen[(i * head_dim + d) as usize] += 1;
                }
            }
            assert!(seen.iter().all(|&times| times == 1), "{block_m} × {head_dim}");
        }
    }

    #[test]
    fn blocks_come_head_by_head() {
        let shape = Shape { batch: 1, heads_q: 4, heads_kv: 2, seqlen_q: 20, seqlen_k: 20, head_dim: 8 };
        let keys = KvBlock { batch: 0, head: 1, n_block: 1 };
        let blocks = QueryBlocks::<Causal>::new(&shape, 8, 8, &keys);
        let mut all = std::vec![blocks.first()];
        for _ in 1..blocks.count() {
            all.push(blocks.after(&all[all.len() - 1]));
        }
        let places: Vec<_> = all.into_iter().map(|b| (b.head, b.m_block)).collect();
        assert_eq!(places, [(2, 2), (2, 1), (3, 2), (3, 1)]);
    }
}
