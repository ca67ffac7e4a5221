//! The steps of a CTA that computes total attention: for each of its work tiles, a block of keys of one query head, the
//! query blocks that see a key of it, from the last to the first.
//!
//! Producer and consumers walk them alike, from one work tile into the next. A block of keys that no query sees meets its
//! last query block all the same, wholly masked: so every work tile has a first and a last step.

use core::marker::PhantomData;

use super::mask::Mask;
use super::query_blocks::{MBlocks, QueryBlock, key_block};
use super::scheduler::WorkTile;
use crate::params::Shape;
use crate::pipeline::order::KvBlock;

/// One query block of one work tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TotalStep {
    /// The block of keys; `head` is the query head.
    pub keys: KvBlock,
    pub m_block: u32,
    blocks: MBlocks,
}

impl TotalStep {
    /// Whether it is its work tile's first.
    #[inline(always)]
    pub fn is_first(&self) -> bool {
        self.m_block + 1 == self.blocks.end
    }

    /// Whether it is its work tile's last.
    #[inline(always)]
    pub fn is_last(&self) -> bool {
        self.m_block == self.blocks.start
    }

    /// Whether there are as many queries as the block has rows, and each sees every key.
    #[inline(always)]
    pub fn is_full(&self, shape: &Shape, block_m: u32) -> bool {
        self.m_block >= self.blocks.full_start && (self.m_block + 1) * block_m <= shape.seqlen_q
    }

    /// The query block.
    #[inline(always)]
    pub fn queries(&self) -> QueryBlock {
        QueryBlock { batch: self.keys.batch, head: self.keys.head, m_block: self.m_block, pair: 0 }
    }
}

/// The steps of one CTA's work tiles.
#[derive(Clone, Copy, Debug)]
pub struct TotalSteps<'a, M, I> {
    shape: &'a Shape,
    block_m: u32,
    block_n: u32,
    tiles: I,
    /// The last step that was given; those after it in its work tile are still to come.
    step: TotalStep,
    mask: PhantomData<M>,
}

impl<'a, M: Mask, I: Iterator<Item = WorkTile>> TotalSteps<'a, M, I> {
    #[inline(always)]
    pub fn new(shape: &'a Shape, block_m: u32, block_n: u32, tiles: I) -> Self {
        let (keys, blocks) = (
            KvBlock { batch: 0, head: 0, n_block: 0, pair: 0 },
            MBlocks { start: 0, full_start: 0, full_end: 0, end: 0 },
        );
        let step = TotalStep { keys, m_block: 0, blocks };
        TotalSteps { shape, block_m, block_n, tiles, step, mask: PhantomData }
    }
}

impl<M: Mask, I: Iterator<Item = WorkTile>> Iterator for TotalSteps<'_, M, I> {
    type Item = TotalStep;

    #[inline(always)]
    fn next(&mut self) -> Option<TotalStep> {
        if self.step.is_last() {
            let keys = key_block(self.shape, self.block_n, &self.tiles.next()?);
            let blocks = MBlocks::plain::<M>(self.shape, keys.n_block * self.block_n, self.block_n, self.block_m);
            self.step = TotalStep { keys, m_block: blocks.end, blocks };
        }
        self.step.m_block -= 1;
        Some(self.step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::mask::{Causal, Full};
    use crate::attention::scheduler::{CtaTiles, TileOrder};
    use std::collections::BTreeSet;

    /// Every live (head, query, key) is met once, by one CTA, and full blocks have only live ones.
    fn covers<M: Mask>(shape: Shape, block_m: u32, block_n: u32, ctas: u32) {
        let order = TileOrder::new(&Shape { seqlen_q: shape.seqlen_k, ..shape }, block_n, 2);
        let mut seen = BTreeSet::new();
        for cta in 0..ctas {
            let (mut open, mut steps) = (false, 0);
            for step in TotalSteps::<M, _>::new(&shape, block_m, block_n, CtaTiles::new(&order, cta, ctas)) {
                assert_eq!(step.is_first(), !open, "{shape:?}: {step:?}");
                open = !step.is_last();
                steps += 1;
                let full = step.is_full(&shape, block_m);
                for (i, j) in (0..block_m).flat_map(|i| (0..block_n).map(move |j| (i, j))) {
                    let (i, j) = (step.m_block * block_m + i, step.keys.n_block * block_n + j);
                    let live = i < shape.seqlen_q && j < M::live_end(&shape, i);
                    assert!(live || !full, "{shape:?}: {step:?} is not full at {i}, {j}");
                    assert!(!live || seen.insert((step.keys.batch, step.keys.head, i, j)), "{shape:?}: {i}, {j} twice");
                }
            }
            assert!(!open && (steps > 0 || cta >= order.tiles()), "{shape:?}: CTA {cta}");
        }
        let heads = (shape.batch * shape.heads_q) as usize;
        let live: u32 = (0..shape.seqlen_q).map(|i| M::live_end(&shape, i)).sum();
        assert_eq!(seen.len(), heads * live as usize, "{shape:?}");
    }

    #[test]
    fn every_live_score_is_met_once() {
        for seqlen_q in [1, 2, 7, 8, 9, 31, 33] {
            for seqlen_k in [0, 1, 3, 5, 6, 7, 29, 40] {
                let shape = Shape { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q, seqlen_k, head_dim: 8 };
                for ctas in [1, 3] {
                    covers::<Full>(shape, 8, 6, ctas);
                    covers::<Causal>(shape, 8, 6, ctas);
                }
            }
        }
    }
}
