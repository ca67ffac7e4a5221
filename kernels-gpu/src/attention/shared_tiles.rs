//! Splits the last partial wave of total attention's work tiles along the keys.
//!
//! CTAs take unsplit work tiles in waves. The tail is what is left after the last full wave; a launch of less than one
//! wave is all tail. If there is a CTA for each part, every tile of the tail is split into parts, each of them the keys
//! of one consumer. A part takes less than half as long as a tile, because its consumer has the SM to itself (notebook
//! 111).

use super::scheduler::{CtaTiles, TileOrder};
use crate::ground::places::WorkTile;

/// Work tile, or one of the parts that it is split into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TilePart {
    pub tile: WorkTile,
    /// Index of the part, of `parts` in all; an unsplit tile is part 0 of 1.
    pub part: u32,
    pub parts: u32,
}

/// Returns the index of the first of `tiles` work tiles that is split into `parts`, on up to `ctas` CTAs. Returns
/// `tiles` if none is.
pub fn shared_from(tiles: u32, parts: u32, ctas: u32) -> u32 {
    let left = tiles % ctas.max(1);
    if left as u64 * parts as u64 <= ctas as u64 { tiles - left } else { tiles }
}

/// Work tiles, unsplit or in parts, of one CTA of a persistent grid.
#[derive(Clone, Copy, Debug)]
pub struct SharedTiles<'a> {
    tiles: CtaTiles<'a>,
    shared_from: u32,
    parts: u32,
}

impl<'a> SharedTiles<'a> {
    /// Makes the iterator for CTA `cta` of `ctas`. Tiles from index `shared_from` on are split into `parts`.
    #[inline(always)]
    pub fn new(order: &'a TileOrder, shared_from: u32, parts: u32, cta: u32, ctas: u32) -> Self {
        SharedTiles { tiles: CtaTiles::new(order, cta, ctas), shared_from, parts }
    }
}

/// Returns the number of items that CTAs take: unsplit tiles, and the `parts` of each tile from `shared_from` on.
#[inline(always)]
pub fn count(tiles: u32, shared_from: u32, parts: u32) -> u32 {
    shared_from + (tiles - shared_from) * parts
}

impl Iterator for SharedTiles<'_> {
    type Item = TilePart;

    #[inline(always)]
    fn next(&mut self) -> Option<TilePart> {
        let SharedTiles { tiles, shared_from, parts } = self;
        let order = tiles.order();
        // None in a list is split.
        if order.is_listed() {
            let index = tiles.next_index(order.tiles())?;
            return Some(TilePart { tile: order.tile(index), part: 0, parts: 1 });
        }
        let index = tiles.next_index(count(order.tiles(), *shared_from, *parts))?;
        if *parts == 1 || index < *shared_from {
            return Some(TilePart { tile: order.tile(index), part: 0, parts: 1 });
        }
        let index = index - *shared_from;
        Some(TilePart { tile: order.tile(*shared_from + index / *parts), part: index % *parts, parts: *parts })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ground::shape::Shape;
    use std::vec::Vec;

    /// Checks that every tile is taken once, unsplit or in all of its parts, and that no CTA takes more items than
    /// there are waves.
    #[test]
    fn every_tile_once_whole_or_in_parts() {
        for (heads, ctas, parts) in [(1, 132, 4), (4, 132, 4), (17, 132, 4), (17, 132, 1), (17, 5, 4)] {
            let shape = Shape { batch: 1, heads_q: heads, heads_kv: heads, seqlen_q: 256, seqlen_k: 1, head_dim: 64 };
            let order = TileOrder::new(&shape, 32, 1);
            let first = shared_from(order.tiles(), parts, ctas);
            let ctas = ctas.min(count(order.tiles(), first, parts));
            let rounds = count(order.tiles(), first, parts).div_ceil(ctas) as usize;
            let mut seen = Vec::new();
            for cta in 0..ctas {
                let taken: Vec<TilePart> = SharedTiles::new(&order, first, parts, cta, ctas).collect();
                assert!(taken.len() <= rounds);
                seen.extend(taken);
            }
            seen.sort_by_key(|at| (at.tile.head, at.tile.m_block, at.part));
            let mut expected = Vec::new();
            for index in 0..order.tiles() {
                let parts = if index < first { 1 } else { parts };
                expected.extend((0..parts).map(|part| TilePart { tile: order.tile(index), part, parts }));
            }
            expected.sort_by_key(|at| (at.tile.head, at.tile.m_block, at.part));
            assert_eq!(seen, expected, "{heads} heads on {ctas} CTAs");
        }
    }

    #[test]
    fn shares_what_the_last_round_leaves() {
        for (tiles, parts, ctas, first) in [
            (4096, 4, 132, 4092),
            (4096, 1, 132, 4092),
            (165, 4, 132, 132),
            (166, 4, 132, 166),
            (3, 4, 132, 0),
            (0, 4, 0, 0),
        ] {
            assert_eq!(shared_from(tiles, parts, ctas), first, "{tiles} tiles on {ctas} CTAs");
        }
    }
}
