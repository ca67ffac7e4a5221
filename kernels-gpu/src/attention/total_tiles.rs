//! Work tiles of a CTA that computes total attention, and their steps ([`super::total_steps`]).

use super::features::Features;
use super::shared_tiles::TilePart;
use super::total_steps::{OwnKeys, TotalTile};
use crate::ground::places::KvBlock;
use crate::params::TotalParams;

/// Work tiles of a CTA, as the producer or a consumer walks them, by its [`OwnKeys`].
#[derive(Clone, Copy, Debug)]
pub struct TotalTiles<'a, T, F, I> {
    p: &'a TotalParams<T, F>,
    block_m: u32,
    block_n: u32,
    own_keys: OwnKeys,
    tiles: I,
}

impl<'a, T, F: Features, I: Iterator<Item = TilePart>> TotalTiles<'a, T, F, I> {
    /// Makes the iterator for work tiles of `block_n` keys and query blocks of `block_m` queries.
    #[inline(always)]
    pub fn new(p: &'a TotalParams<T, F>, block_m: u32, block_n: u32, own_keys: OwnKeys, tiles: I) -> Self {
        TotalTiles { p, block_m, block_n, own_keys, tiles }
    }
    /// Returns the query blocks of all work tiles, one work tile after the other.
    #[inline(always)]
    pub fn steps(self) -> TotalSteps<'a, T, F, I> {
        TotalSteps { tiles: self, keys: KvBlock { batch: 0, head: 0, n_block: 0, pair: 0 }, start: 0, m_block: 0 }
    }
}

impl<T, F: Features, I: Iterator<Item = TilePart>> Iterator for TotalTiles<'_, T, F, I> {
    type Item = TotalTile;

    #[inline(always)]
    fn next(&mut self) -> Option<TotalTile> {
        let at = self.tiles.next()?;
        let of = self.p.item(at.tile.batch).sequence();
        Some(TotalTile::new(&of, self.p.features.mask(), self.block_m, self.block_n, &self.own_keys, &at))
    }
}

/// Query blocks of a CTA's work tiles as (block of keys, m_block), from one work tile into the next.
#[derive(Clone, Copy, Debug)]
pub struct TotalSteps<'a, T, F, I> {
    tiles: TotalTiles<'a, T, F, I>,
    /// Work tile of the block that was returned last.
    keys: KvBlock,
    start: u32,
    m_block: u32,
}

impl<T, F: Features, I: Iterator<Item = TilePart>> Iterator for TotalSteps<'_, T, F, I> {
    type Item = (KvBlock, u32);

    #[inline(always)]
    fn next(&mut self) -> Option<(KvBlock, u32)> {
        if self.m_block == self.start {
            let tile = self.tiles.next()?;
            (self.keys, self.start, self.m_block) = (tile.keys, tile.start, tile.end);
        }
        self.m_block -= 1;
        Some((self.keys, self.m_block))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::dropout::NoDropout;
    use crate::attention::features::Chosen;
    use crate::attention::mask::Mask;
    use crate::attention::mask::tests::windows;
    use crate::attention::scheduler::TileOrder;
    use crate::attention::score::Shaped;
    use crate::attention::sequences::Sequences;
    use crate::attention::shared_tiles::SharedTiles;
    use crate::ground::shape::Shape;
    use crate::ground::tensor::RowArray;
    use std::collections::BTreeSet;

    /// Checks that every valid (head, query, key) is visited once, by one CTA and one of two consumers, and that full
    /// blocks have only valid ones. A consumer must visit or skip as many blocks as the producer loads. Tiles from
    /// `shared` on are split into two parts.
    fn covers<M: Mask + core::fmt::Debug>(
        shape: Shape,
        mask: M,
        block_m: u32,
        block_n: u32,
        ctas: u32,
        most_passed: u32,
        shared: u32,
    ) {
        let order = TileOrder::new(&Shape { seqlen_q: shape.seqlen_k, ..shape }, block_n, 2);
        let (mut seen, of) = (BTreeSet::new(), shape.sequence());
        let keys = block_n / 2;
        let features = Chosen { mask, score: Shaped::new(1.0, None, false), weights: NoDropout };
        let (lse, total, sequences) = (RowArray::NONE, RowArray::NONE, Sequences::DENSE);
        let p = TotalParams { q: (), k: (), lse, total, shape, sequences, order, shared_from: shared, features };
        for (cta, first_key) in (0..ctas).flat_map(|cta| [(cta, 0), (cta, keys)]) {
            let shared = shared.min(order.tiles());
            let tiles = |own_keys| {
                let tiles = SharedTiles::new(&order, shared, 2, cta, ctas);
                TotalTiles::new(&p, block_m, block_n, own_keys, tiles)
            };
            let mut sent = tiles(OwnKeys::whole(block_n)).steps();
            for tile in tiles(OwnKeys { first_key, keys, most_passed }) {
                let idle = tile.start == tile.end;
                assert!(!idle || (first_key > 0 && shared < order.tiles()), "{shape:?}: {tile:?}");
                assert!(tile.passed <= most_passed || idle, "{shape:?}: {tile:?}");
                for m_block in (tile.start - tile.passed..tile.end).rev() {
                    assert_eq!(sent.next(), Some((tile.keys, m_block)), "{shape:?}: {tile:?}");
                }
                let blocks = (tile.start..tile.end).rev();
                for (m, i, j) in blocks.flat_map(|m| (0..block_m).flat_map(move |i| (0..keys).map(move |j| (m, i, j))))
                {
                    let (i, j) = (m * block_m + i, tile.first_key + first_key + j);
                    let live = i < shape.seqlen_q && mask.keys(&of, 0, i).contains(j);
                    assert!(live || !tile.is_full(m), "{shape:?}: {tile:?} is not full at {i}, {j}");
                    assert!(!live || seen.insert((tile.keys.batch, tile.keys.head, i, j)), "{shape:?}: {i}, {j} twice");
                }
            }
            assert_eq!(sent.next(), None, "{shape:?}: CTA {cta}");
        }
        let heads = (shape.batch * shape.heads_q) as usize;
        let keys = |i| (0..shape.seqlen_k).filter(|&j| mask.keys(&of, 0, i).contains(j)).count();
        assert_eq!(seen.len(), heads * (0..shape.seqlen_q).map(keys).sum::<usize>(), "{mask:?} {shape:?}");
    }

    #[test]
    fn every_live_score_is_met_once() {
        for seqlen_q in [1, 2, 7, 8, 9, 31, 33] {
            for seqlen_k in [0, 1, 3, 5, 6, 7, 29, 40] {
                let shape = Shape { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q, seqlen_k, head_dim: 8 };
                for (ctas, most_passed, shared) in [(1, 0, u32::MAX), (1, 1, 0), (3, 9, u32::MAX), (3, 1, 6)] {
                    for block_m in [2, 8] {
                        windows()
                            .into_iter()
                            .for_each(|mask| covers(shape, mask, block_m, 6, ctas, most_passed, shared));
                    }
                }
            }
        }
    }
}
