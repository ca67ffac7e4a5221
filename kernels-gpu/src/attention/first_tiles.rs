//! The work tiles of the backward pass that store dQ where all others add to it, so that it need not be filled with
//! zeros before: those with the first keys of each key head, which every query of the head meets.
//!
//! What others add must find something there. So such a work tile comes earlier than its head's others, in the place
//! that it would have some heads before. The heads that come first have no such place: their dQ is filled with zeros,
//! and all of their work tiles add.

use super::dropout::Drops;
use super::pairs::Pairs;
use super::scheduler::TileOrder;
use crate::ground::places::WorkTile;

/// Rounds of work tiles from the one that stores to those that add. It takes as long as two where a mask hides half of
/// the queries, and CTAs are not all equally far; more rounds would leave less of it in L2.
const ROUNDS: u32 = 3;
/// With more blocks of keys in a head, zeros are so small a part of the work that what stays in L2 outweighs them.
const MOST_BLOCKS: u32 = 16;

/// Which key heads, of all batch items, have such a work tile. The host makes it; it travels with the launch
/// parameters.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstTiles {
    /// How many have none, the first ones: their dQ is filled with zeros.
    pub zeroed: u32,
    /// All of them.
    pub heads: u32,
}

impl FirstTiles {
    /// No head of `heads` has one.
    pub const fn none(heads: u32) -> Self {
        FirstTiles { zeroed: heads, heads }
    }

    /// For `heads` key heads of `key_blocks` work tiles each, in sections of so many heads, on `ctas` CTAs, where the
    /// first keys meet every query.
    pub fn new(heads: u32, key_blocks: u32, section: u32, ctas: u32) -> Self {
        // A section may end with the work tiles that store.
        let zeroed = ROUNDS.saturating_mul(ctas).div_ceil(key_blocks.max(1)).saturating_add(section.saturating_sub(1));
        match key_blocks <= MOST_BLOCKS && zeroed <= heads / 2 {
            true => FirstTiles { zeroed, heads },
            false => Self::none(heads),
        }
    }

    /// Whether kernels for such pairs and dropout know of them at all. At head dim 64 they bring nothing.
    pub const fn is_for<P: Pairs, R: Drops>(head_dim: u32) -> bool {
        P::COUNT == 1 && !R::DROPS && head_dim >= 128
    }

    /// The `index`-th work tile.
    #[inline(always)]
    pub fn tile(&self, order: &TileOrder, index: u32) -> WorkTile {
        order.tile_ahead(index, self.zeroed, self.heads)
    }

    /// The key head in whose place the first keys of `head` come.
    #[inline(always)]
    pub fn place(&self, head: u32) -> u32 {
        if head >= self.zeroed { head - self.zeroed } else { head + (self.heads - self.zeroed) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::key_parts::{KeyPart, Part, Sharing};
    use super::*;
    use crate::ground::shape::Shape;
    use std::vec::Vec;

    /// Every work tile comes once, those that store whole and rounds before those of the same head that add.
    #[test]
    fn who_stores_comes_first() {
        for (batch, heads, seqlen, ctas) in [(2, 400, 256, 132), (1, 130, 1000, 132), (5, 20, 260, 8), (1, 41, 60, 4)] {
            let shape =
                Shape { batch, heads_q: heads, heads_kv: heads, seqlen_q: seqlen, seqlen_k: seqlen, head_dim: 128 };
            for section in [1, 3, 8] {
                let order = TileOrder::new(&shape, 64, section);
                let blocks = seqlen.div_ceil(64);
                let first = FirstTiles::new(batch * heads, blocks, section, ctas);
                assert!(first.zeroed < batch * heads, "{shape:?}");
                let sharing = Sharing::new(order.tiles(), ctas, 1, 16);
                let mut seen = Vec::new();
                let mut stored = std::vec![None; (batch * heads) as usize];
                for index in 0..sharing.count {
                    let KeyPart { tile, part } = KeyPart::new(&order, Some(&sharing), Some(&first), index);
                    let head = tile.batch * heads + tile.head;
                    if tile.m_block + 1 == blocks {
                        let stores = head >= first.zeroed;
                        assert!(!stores || part == Part::WHOLE, "{shape:?}: {tile:?}");
                        stored[head as usize] = Some(index);
                    } else if head >= first.zeroed {
                        let ahead = stored[head as usize].map(|first| index - first);
                        assert!(ahead >= Some((ROUNDS - 1) * ctas), "{shape:?}: {tile:?} {ahead:?} behind");
                    }
                    seen.push((head, tile.m_block));
                }
                seen.sort();
                seen.dedup();
                assert_eq!(seen.len() as u32, order.tiles(), "{shape:?}");
                let places: Vec<u32> = (0..batch * heads).map(|head| first.place(head)).collect();
                for (head, place) in (0..).zip(places) {
                    let place = WorkTile { batch: place / heads, head: place % heads, m_block: blocks - 1 };
                    let tile = first.tile(&order, order.index(&place));
                    assert_eq!(tile, WorkTile { batch: head / heads, head: head % heads, m_block: blocks - 1 });
                }
            }
        }
    }

    #[test]
    fn few_heads_or_long_ones_have_none() {
        for (heads, blocks, ctas, zeroed) in
            [(512, 8, 132, 50), (99, 8, 132, 99), (100, 8, 132, 50), (512, 17, 132, 512), (0, 8, 132, 0), (9, 0, 1, 3)]
        {
            assert_eq!(FirstTiles::new(heads, blocks, 1, ctas), FirstTiles { zeroed, heads });
        }
    }
}
