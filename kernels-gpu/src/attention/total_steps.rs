//! Steps of a CTA that computes total attention. For each of its work tiles, a block of keys of one query head, they
//! are the query blocks that attend to a key of it, from the last to the first.
//!
//! Producer and consumers walk the same steps. The producer loads every query block that attends to any key of the
//! tile. A consumer computes those that attend to its own 64 keys, and with a left bound also those that come before
//! them. It skips the rest, which comes last: the order runs from the last query block to the first. Keys to which no
//! query attends visit one query block, wholly masked, so that every work tile has at least one step. If a work tile is
//! split ([`super::shared_tiles`]), the first consumer has all keys of a part, and the other consumers skip all of its
//! query blocks.

use super::mask::{Interval, Mask};
use super::query_blocks::{blocks_of, key_block};
use super::shared_tiles::TilePart;
use crate::ground::places::KvBlock;
use crate::ground::shape::Shape;

/// Keys of a work tile that the producer or a consumer walks.
#[derive(Clone, Copy, Debug)]
pub struct OwnKeys {
    /// First of the keys, within the work tile.
    pub first_key: u32,
    pub keys: u32,
    /// Maximum number of query blocks that are skipped in a row; blocks beyond it are visited.
    pub most_passed: u32,
}

impl OwnKeys {
    /// Returns all `block_n` keys.
    #[inline(always)]
    pub const fn whole(block_n: u32) -> Self {
        OwnKeys { first_key: 0, keys: block_n, most_passed: 0 }
    }
}

/// One work tile as the producer or a consumer walks it, by its [`OwnKeys`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TotalTile {
    /// Block of keys; `head` is the query head.
    pub keys: KvBlock,
    /// First key of the work tile, or of the part of a split one.
    pub first_key: u32,
    /// Query blocks `start..end` are visited, from the last to the first.
    pub start: u32,
    pub end: u32,
    /// Number of query blocks that follow and are skipped.
    pub passed: u32,
    full_start: u32,
    full_blocks: u32,
}

impl TotalTile {
    #[inline(always)]
    fn new<M: Mask>(shape: &Shape, mask: &M, block_m: u32, block_n: u32, own_keys: &OwnKeys, at: &TilePart) -> Self {
        let of = shape.sequence();
        let keys = key_block(shape, block_n, &at.tile);
        let part_keys = block_n / at.parts;
        let tile_key = keys.n_block * block_n + at.part * part_keys;
        let blocks = |start, keys| blocks_of(&of, mask, 0, Interval { start, end: start + keys }, block_m);
        // A part of a tile may have keys of padding alone.
        let all = blocks(tile_key.min(shape.seqlen_k - 1), part_keys);
        let (all_start, end) = (all.start.min(all.end.max(1) - 1), all.end.max(1));
        if own_keys.first_key >= part_keys {
            let passed = end - all_start;
            return TotalTile { keys, first_key: tile_key, start: end, end, passed, full_start: end, full_blocks: 0 };
        }
        let first_key = tile_key + own_keys.first_key;
        let own = blocks(first_key.min(shape.seqlen_k - 1), own_keys.keys.min(part_keys));
        let start = if first_key < shape.seqlen_k && own.count() > 0 { own.start } else { end - 1 };
        let passed = (start - all_start).min(own_keys.most_passed);
        TotalTile {
            keys,
            first_key: tile_key,
            start: all_start + passed,
            end,
            passed,
            full_start: own.full_start,
            full_blocks: (shape.seqlen_q / block_m).min(own.full_end).saturating_sub(own.full_start),
        }
    }
    /// True if the block has as many queries as rows, and each attends to every key of the part.
    #[inline(always)]
    pub fn is_full(&self, m_block: u32) -> bool {
        m_block.wrapping_sub(self.full_start) < self.full_blocks
    }
}

/// Work tiles of a CTA, as the producer or a consumer walks them, by its [`OwnKeys`].
#[derive(Clone, Copy, Debug)]
pub struct TotalTiles<'a, M, I> {
    shape: &'a Shape,
    mask: M,
    block_m: u32,
    block_n: u32,
    own_keys: OwnKeys,
    tiles: I,
}

impl<'a, M: Mask, I: Iterator<Item = TilePart>> TotalTiles<'a, M, I> {
    /// Makes the iterator for work tiles of `block_n` keys and query blocks of `block_m` queries.
    #[inline(always)]
    pub fn new(shape: &'a Shape, mask: M, block_m: u32, block_n: u32, own_keys: OwnKeys, tiles: I) -> Self {
        TotalTiles { shape, mask, block_m, block_n, own_keys, tiles }
    }
    /// Returns the query blocks of all work tiles, one work tile after the other.
    #[inline(always)]
    pub fn steps(self) -> TotalSteps<'a, M, I> {
        TotalSteps { tiles: self, keys: KvBlock { batch: 0, head: 0, n_block: 0, pair: 0 }, start: 0, m_block: 0 }
    }
}

impl<M: Mask, I: Iterator<Item = TilePart>> Iterator for TotalTiles<'_, M, I> {
    type Item = TotalTile;

    #[inline(always)]
    fn next(&mut self) -> Option<TotalTile> {
        let at = self.tiles.next()?;
        Some(TotalTile::new(self.shape, &self.mask, self.block_m, self.block_n, &self.own_keys, &at))
    }
}

/// Query blocks of a CTA's work tiles as (block of keys, m_block), from one work tile into the next.
#[derive(Clone, Copy, Debug)]
pub struct TotalSteps<'a, M, I> {
    tiles: TotalTiles<'a, M, I>,
    /// Work tile of the block that was returned last.
    keys: KvBlock,
    start: u32,
    m_block: u32,
}

impl<M: Mask, I: Iterator<Item = TilePart>> Iterator for TotalSteps<'_, M, I> {
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
    use crate::attention::mask::tests::windows;
    use crate::attention::scheduler::TileOrder;
    use crate::attention::shared_tiles::SharedTiles;
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
        for (cta, first_key) in (0..ctas).flat_map(|cta| [(cta, 0), (cta, keys)]) {
            let shared = shared.min(order.tiles());
            let tiles = |own_keys| {
                let tiles = SharedTiles::new(&order, shared, 2, cta, ctas);
                TotalTiles::new(&shape, mask, block_m, block_n, own_keys, tiles)
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
