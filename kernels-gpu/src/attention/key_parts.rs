//! The last round of the backward pass's work tiles, shared out where it has so few that most CTAs would have none.
//!
//! Where all work tiles meet the same number of query blocks, what is left after the last whole round, or all where
//! there is none, is divided into parts by those query blocks, each taken by a CTA. A part has a slot in the workspace,
//! where it leaves what it contributes to dK and dV; the kernel that finishes adds parts up in their order.

use super::first_tiles::FirstTiles;
use super::mask::Mask;
use super::pairs::Pairs;
use super::scheduler::{CtaTiles, TileOrder};
use crate::ground::divisor::Divisor;
use crate::ground::places::WorkTile;

/// Parts of a work tile: with more of them, adding them up takes longer than what they save.
const MOST_PARTS: u32 = 8;

/// Which part of a work tile: the number of its slot, or the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part(u32);

impl Part {
    pub const WHOLE: Part = Part(u32::MAX);

    /// The slot in the workspace; a whole one has none.
    #[inline(always)]
    pub fn slot(self) -> Option<u32> {
        (self != Part::WHOLE).then_some(self.0)
    }
}

/// A work tile, or one of the parts that it is divided into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyPart {
    pub tile: WorkTile,
    pub part: Part,
}

impl KeyPart {
    /// The `index`-th; without a sharing all are whole, and without first tiles none comes earlier.
    #[inline(always)]
    pub fn new(order: &TileOrder, sharing: Option<&Sharing>, first: Option<&FirstTiles>, index: u32) -> Self {
        let tile = |index| match first {
            Some(first) => first.tile(order, index),
            None => order.tile(index),
        };
        let Some(sharing) = sharing else { return KeyPart { tile: tile(index), part: Part::WHOLE } };
        // Without a branch: whole ones as the first part of a tile that is none.
        let (whole, slot) = (index.min(sharing.from), index.saturating_sub(sharing.from));
        KeyPart { tile: tile(whole + sharing.parts.divide(slot).0), part: sharing.part(index) }
    }
}

/// Which work tiles are taken in parts. The host makes it; it travels with the launch parameters.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sharing {
    /// The first of them; where all are whole, how many there are.
    pub from: u32,
    /// How many there are to be taken, whole or in parts.
    pub count: u32,
    /// CTAs of the grid: read from here, their number takes no register either.
    pub ctas: u32,
    /// In how many each; 1 where all are whole.
    pub parts: Divisor,
    /// Query blocks that a work tile meets: read from here, they take no register from one work tile to the next.
    all: u32,
    /// Query blocks of a part, of which the last may have fewer.
    blocks: u32,
    /// Query blocks of a head.
    pub m_blocks: Divisor,
}

impl Sharing {
    /// All of `tiles` work tiles are whole, on `ctas` CTAs at most, and meet `m_blocks` query blocks of each of `heads`
    /// heads where they are alike.
    pub fn none(tiles: u32, ctas: u32, heads: u32, m_blocks: u32) -> Self {
        let (all, m_blocks) = (heads.saturating_mul(m_blocks), Divisor::new(m_blocks));
        let ctas = tiles.min(ctas.max(1));
        Sharing { from: tiles, count: tiles, ctas, parts: Divisor::new(1), all, blocks: all, m_blocks }
    }

    /// Whether kernels for such a mask and pairs know of parts at all.
    pub const fn is_for<M: Mask, P: Pairs>() -> bool {
        !M::HIDES && P::COUNT == 1
    }

    /// The same for work tiles that are alike.
    pub fn new(tiles: u32, ctas: u32, heads: u32, m_blocks: u32) -> Self {
        let left = tiles % ctas.max(1);
        let whole = Self::none(tiles, ctas, heads, m_blocks);
        let all = whole.all;
        if left == 0 || all == 0 {
            return whole;
        }
        // Parts of as many query blocks, and not one more than that takes.
        let blocks = all.div_ceil((ctas / left).min(MOST_PARTS).min(all));
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

    /// The part of the `index`-th.
    #[inline(always)]
    fn part(&self, index: u32) -> Part {
        if index < self.from { Part::WHOLE } else { Part(index - self.from) }
    }

    /// Parts of all work tiles, for which there are slots in the workspace.
    pub fn slots(&self) -> u32 {
        self.count - self.from
    }

    /// All that a work tile is taken in.
    pub fn parts_of(&self, order: &TileOrder, tile: WorkTile) -> impl Iterator<Item = KeyPart> {
        let index = order.index(&tile);
        let (first, parts) = match index.checked_sub(self.from) {
            None => (index, 1),
            Some(shared) => (self.from + shared * self.parts.value, self.parts.value),
        };
        (first..first + parts).map(move |index| KeyPart { tile, part: self.part(index) })
    }

    /// Of a part of a work tile: the head and the place in it, from its last query block on, where the part starts; and
    /// how many query blocks it has.
    #[inline(always)]
    pub fn blocks(&self, part: Part) -> (u32, u32, u32) {
        let before = self.parts.divide(part.slot().unwrap_or(0)).1 * self.blocks;
        let (head, from_last) = self.m_blocks.divide(before);
        let most = if part == Part::WHOLE { self.all } else { self.blocks };
        (head, from_last, most.min(self.all - before))
    }
}

/// The work tiles, whole or in parts, of one CTA of a persistent grid.
#[derive(Clone, Copy, Debug)]
pub struct KeyParts<'a> {
    tiles: CtaTiles<'a>,
    sharing: Option<&'a Sharing>,
    first: Option<&'a FirstTiles>,
}

impl<'a> KeyParts<'a> {
    /// For CTA `cta` of `ctas`; see [`KeyPart::new`].
    #[inline(always)]
    pub fn new(
        order: &'a TileOrder,
        sharing: Option<&'a Sharing>,
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
        let count = self.sharing.map_or(order.tiles(), |sharing| sharing.count);
        self.tiles.next_index(count).map(|index| KeyPart::new(order, self.sharing, self.first, index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::mask::Full;
    use crate::attention::pairs::OnePair;
    use crate::attention::query_blocks::{QueryBlocks, key_block};
    use crate::ground::places::QueryBlock;
    use crate::ground::shape::Shape;
    use std::vec::Vec;

    /// Every work tile meets every query block once, whole or in parts; no CTA takes more than there are rounds, and of
    /// parts at most one.
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
                let taken: Vec<KeyPart> = KeyParts::new(&order, Some(&sharing), None, cta, ctas).collect();
                assert!(taken.len() as u32 <= count.div_ceil(ctas));
                assert!(taken.iter().filter(|at| at.part != Part::WHOLE).count() <= 1);
                for at in taken {
                    let KeyPart { tile, part } = at;
                    assert!(sharing.parts_of(&order, tile).any(|other| other == at));
                    let keys = key_block(&shape, block_n, &tile);
                    let all = QueryBlocks::<Full, _>::new(&shape, OnePair, block_m, block_n, &keys);
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
        // Work tiles, CTAs, heads of a group, query blocks of each; the first that is shared, parts, query blocks of a
        // part.
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
