//! Splits the last partial wave of backward work tiles along the query dimension.
//!
//! Applies if all work tiles visit equally many query blocks. The tail is what is left after the last full wave; a
//! launch of less than one wave is all tail. If the tail fills at most half of the CTAs, each of its tiles is split
//! into parts of consecutive query blocks, one CTA per part (notebook 65). A part writes its share of dK and dV, in
//! f32, to its own slot in the workspace. The postprocess kernel sums the slots in a fixed order.

use super::first_tiles::FirstTiles;
use super::scheduler::{CtaTiles, TileOrder};
use crate::ground::divisor::Divisor;
use crate::ground::places::WorkTile;
use crate::tuning;

/// Part of a split work tile, by the number of its workspace slot, or the unsplit tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SplitPart(u32);

impl SplitPart {
    pub const WHOLE: SplitPart = SplitPart(u32::MAX);

    /// Returns the slot in the workspace. An unsplit tile has none.
    #[inline(always)]
    pub fn slot(self) -> Option<u32> {
        (self != SplitPart::WHOLE).then_some(self.0)
    }
}

/// Work tile, or one of the parts that it is split into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyPart {
    pub tile: WorkTile,
    pub part: SplitPart,
}

impl KeyPart {
    /// Returns the `index`-th work tile or part. Without `sharing` no tile is split, nor if its second value is false;
    /// without `first` none comes ahead of its place in the order. Nor does any of these in a list.
    #[inline(always)]
    pub fn new(order: &TileOrder, sharing: Option<(&Sharing, bool)>, first: Option<&FirstTiles>, index: u32) -> Self {
        let tile = |index| match first {
            Some(first) => first.tile(order, index),
            None => order.tile(index),
        };
        if order.is_listed() {
            return KeyPart { tile: order.tile(index), part: SplitPart::WHOLE };
        }
        let Some((sharing, splits)) = sharing else { return KeyPart { tile: tile(index), part: SplitPart::WHOLE } };
        // Branch-free. For an unsplit tile `slot` is 0.
        let is_part = splits & (index >= sharing.from);
        let slot = if is_part { index - sharing.from } else { 0 };
        KeyPart {
            tile: tile(index - slot + sharing.parts.divide(slot).0),
            part: if is_part { SplitPart(slot) } else { SplitPart::WHOLE },
        }
    }
}

/// Split of the tail: which work tiles are split, and into how many parts. The host makes it; it travels with the
/// launch parameters.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sharing {
    /// Index of the first split tile, or the number of tiles if none is split.
    pub from: u32,
    /// Number of items that CTAs take: unsplit tiles and parts.
    pub count: u32,
    /// CTAs of the grid. The number is read from the launch parameters, where it takes no register.
    pub ctas: u32,
    /// Query heads per key head. The number is read from the launch parameters, because a kernel that divided by a
    /// number of heads would no longer know that the number of its query blocks is the same in all threads.
    pub heads: u32,
    /// Parts per split tile; 1 if none is split.
    pub parts: Divisor,
    /// Query blocks of a part; the last part of a tile may have fewer. Of an unsplit tile, all.
    blocks: u32,
    /// Query blocks of a head.
    pub m_blocks: Divisor,
}

impl Sharing {
    /// Splits none of `tiles` work tiles, on up to `ctas` CTAs. Each visits query blocks of `heads` heads, and if all
    /// tiles are alike, `m_blocks` of each.
    pub fn none(tiles: u32, ctas: u32, heads: u32, m_blocks: u32) -> Self {
        let (ctas, all) = (tiles.min(ctas.max(1)), heads.saturating_mul(m_blocks));
        let m_blocks = Divisor::new(m_blocks);
        Sharing { from: tiles, count: tiles, ctas, heads, parts: Divisor::new(1), blocks: all, m_blocks }
    }

    /// Splits the tail of `tiles` work tiles that are alike. The parameters are those of [`Sharing::none`].
    ///
    /// Example: D 128, S 4096, batch 8, 16 heads, 132 CTAs have 4096 tiles of 64 query blocks. 31 waves leave 4 tiles.
    /// 132 CTAs would suffice for 33 parts each; they are split into 8 of 8 query blocks, for 32 CTAs. A launch of 64
    /// tiles is all tail: 2 parts each, for 128 CTAs.
    pub fn new(tiles: u32, ctas: u32, heads: u32, m_blocks: u32) -> Self {
        let left = tiles % ctas.max(1);
        let whole = Self::none(tiles, ctas, heads, m_blocks);
        let all = whole.blocks;
        if left == 0 || all == 0 {
            return whole;
        }
        // All parts but the last have equally many query blocks; their number is the smallest that suffices.
        let blocks = all.div_ceil((ctas / left).min(tuning::MAX_TILE_PARTS).min(all));
        match all.div_ceil(blocks) {
            1 => whole,
            parts => Sharing {
                from: tiles - left,
                count: tiles - left + left * parts,
                ctas: ctas.min(tiles - left + left * parts),
                parts: Divisor::new(parts),
                blocks,
                ..whole
            },
        }
    }

    /// Returns the part of the `index`-th item.
    #[inline(always)]
    fn part(&self, index: u32) -> SplitPart {
        if index < self.from { SplitPart::WHOLE } else { SplitPart(index - self.from) }
    }

    /// Returns the number of parts of all work tiles. Each has a slot in the workspace.
    pub fn slots(&self) -> u32 {
        self.count - self.from
    }

    /// Returns all items of a work tile: its parts, or the unsplit tile.
    pub fn parts_of(&self, order: &TileOrder, tile: WorkTile) -> impl Iterator<Item = KeyPart> {
        let index = order.index(&tile);
        let (first, parts) = match index.checked_sub(self.from) {
            None => (index, 1),
            Some(shared) => (self.from + shared * self.parts.value, self.parts.value),
        };
        (first..first + parts).map(move |index| KeyPart { tile, part: self.part(index) })
    }

    /// Returns the number of query blocks of a work tile that come before a part of it, and the maximum number of those
    /// of the part.
    #[inline(always)]
    pub fn blocks(&self, part: SplitPart) -> (u32, u32) {
        let before = self.parts.divide(part.slot().unwrap_or(0)).1 * self.blocks;
        (before, if part == SplitPart::WHOLE { u32::MAX } else { self.blocks })
    }
}

/// Work tiles, unsplit or in parts, of one CTA of a persistent grid.
#[derive(Clone, Copy, Debug)]
pub struct KeyParts<'a> {
    tiles: CtaTiles<'a>,
    sharing: Option<(&'a Sharing, bool)>,
    first: Option<&'a FirstTiles>,
}

impl<'a> KeyParts<'a> {
    /// Makes the iterator for CTA `cta` of `ctas`; see [`KeyPart::new`] for the others.
    #[inline(always)]
    pub fn new(
        order: &'a TileOrder,
        sharing: Option<(&'a Sharing, bool)>,
        first: Option<&'a FirstTiles>,
        cta: u32,
        ctas: u32,
    ) -> Self {
        KeyParts { tiles: CtaTiles::new(order, cta, ctas), sharing, first }
    }
}

impl Iterator for KeyParts<'_> {
    type Item = KeyPart;

    #[inline(always)]
    fn next(&mut self) -> Option<KeyPart> {
        let order = self.tiles.order();
        let count = match self.sharing {
            Some((sharing, _)) if !order.is_listed() => sharing.count,
            _ => order.tiles(),
        };
        self.tiles.next_index(count).map(|index| KeyPart::new(order, self.sharing, self.first, index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::mask::Window;
    use crate::attention::query_blocks::{QueryBlocks, key_block};
    use crate::ground::places::QueryBlock;
    use crate::ground::shape::Shape;
    use std::vec::Vec;

    /// Checks that every work tile visits every query block once, unsplit or in parts. No CTA takes more items than
    /// there are waves, and none takes more than one part.
    #[test]
    fn every_query_block_once() {
        let (block_m, block_n) = (16, 8);
        for (heads_kv, group, seqlen_q, ctas) in
            [(1, 1, 100, 7), (3, 2, 100, 7), (5, 3, 17, 4), (4, 1, 16, 9), (17, 5, 40, 132), (2, 7, 1, 132)]
        {
            let heads_q = heads_kv * group;
            let shape = Shape { batch: 2, heads_q, heads_kv, seqlen_q, seqlen_k: 60, head_dim: 8 };
            let keys = Shape { heads_q: heads_kv, seqlen_q: shape.seqlen_k, ..shape };
            let order = TileOrder::new(&keys, block_n, 1);
            let sharing = Sharing::new(order.tiles(), ctas, group, seqlen_q.div_ceil(block_m));
            let count = sharing.count;
            let (ctas, mut met) = (sharing.ctas, Vec::new());
            for cta in 0..ctas {
                let taken: Vec<KeyPart> = KeyParts::new(&order, Some((&sharing, true)), None, cta, ctas).collect();
                assert!(taken.len() as u32 <= count.div_ceil(ctas));
                assert!(taken.iter().filter(|at| at.part != SplitPart::WHOLE).count() <= 1);
                for at in taken {
                    let KeyPart { tile, part } = at;
                    assert!(sharing.parts_of(&order, tile).any(|other| other == at));
                    let keys = key_block(&shape.sequence(), block_n, &tile);
                    let all = QueryBlocks::new(&shape.sequence(), Window::FULL, group, (block_m, block_n), &keys);
                    let blocks = all.part(&sharing, part);
                    let mut at = blocks.first();
                    for _ in 0..blocks.count() {
                        met.push((keys.n_block, at));
                        at = blocks.after(&at);
                    }
                    assert!(blocks.count() > 0);
                }
            }
            met.sort_by_key(|&(n_block, at)| (at.batch, at.head, n_block, at.m_block));
            let mut expected = Vec::new();
            for (batch, head) in (0..2).flat_map(|batch| (0..heads_q).map(move |head| (batch, head))) {
                let m_blocks = 0..seqlen_q.div_ceil(block_m);
                for (n_block, m_block) in (0..8).flat_map(|n| m_blocks.clone().map(move |m| (n, m))) {
                    expected.push((n_block, QueryBlock { batch, head, m_block, pair: 0 }));
                }
            }
            assert_eq!(met, expected, "{shape:?} on {ctas} CTAs");
        }
    }

    #[test]
    fn shares_what_the_last_round_leaves() {
        // Work tiles, CTAs, heads of a group, query blocks of each; then the first split tile, parts, and query blocks
        // of a part.
        for (tiles, ctas, heads, m_blocks, expected) in [
            (4096, 132, 1, 64, Some((4092, 8, 8))),
            (165, 132, 2, 3, Some((132, 3, 2))),
            (198, 132, 1, 64, Some((132, 2, 32))),
            (199, 132, 1, 64, None),
            (264, 132, 1, 64, None),
            (137, 132, 1, 1, None),
            (3, 132, 3, 3, Some((0, 5, 2))),
            (66, 132, 1, 3, Some((0, 2, 2))),
            (132, 132, 1, 64, None),
            (0, 132, 1, 64, None),
            (5, 0, 1, 64, None),
            (5, 132, 1, 0, None),
        ] {
            let found = Sharing::new(tiles, ctas, heads, m_blocks);
            let whole = Sharing::none(tiles, ctas, heads, m_blocks);
            let expected = expected.map_or(whole, |(from, parts, blocks)| {
                let count = from + (tiles - from) * parts;
                Sharing { from, count, ctas: ctas.min(count), parts: Divisor::new(parts), blocks, ..whole }
            });
            assert_eq!(found, expected, "{tiles} work tiles of {heads} × {m_blocks} on {ctas} CTAs");
        }
    }
}
