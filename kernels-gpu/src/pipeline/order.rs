//! Order in which K and V tiles pass through the ring: the one agreement between producer and consumers.
//!
//! For the blocks a, b, c, … of a CTA, of one work tile after another, the order is K(a), K(b), V(a), K(c), V(b), …: K
//! runs one block ahead. The mainloop issues the scores of the next block before it waits for the output of the current
//! one. The order ignores boundaries of work tiles, so the first scores of the next tile overlap the last output of the
//! current one.

use crate::ground::places::KvBlock;

/// Tile that passes through the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvTile {
    K(KvBlock),
    V(KvBlock),
}

/// Iterator over the tiles of a sequence of blocks, in order.
#[derive(Clone, Copy, Debug)]
pub struct KvOrder<I> {
    blocks: I,
    /// Block whose K came last; `due` is the block before it.
    ahead: KvBlock,
    due: KvBlock,
    next: Next,
}

/// Kind of the next tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// K of the first block.
    First,
    /// K of the next block.
    K,
    /// V of the block `due`.
    V,
    Nothing,
}

impl<I: Iterator<Item = KvBlock>> KvOrder<I> {
    #[inline(always)]
    pub fn new(blocks: I) -> Self {
        let none = KvBlock { batch: 0, head: 0, n_block: 0, pair: 0 };
        KvOrder { blocks, ahead: none, due: none, next: Next::First }
    }
}

impl<I: Iterator<Item = KvBlock>> Iterator for KvOrder<I> {
    type Item = KvTile;

    #[inline(always)]
    fn next(&mut self) -> Option<KvTile> {
        if self.next == Next::V {
            self.next = Next::K;
            return Some(KvTile::V(self.due));
        }
        if self.next == Next::Nothing {
            return None;
        }
        let Some(block) = self.blocks.next() else {
            let last = (self.next == Next::K).then_some(KvTile::V(self.ahead));
            self.next = Next::Nothing;
            return last;
        };
        self.due = self.ahead;
        self.ahead = block;
        self.next = if self.next == Next::First { Next::K } else { Next::V };
        Some(KvTile::K(block))
    }
}

#[cfg(test)]
mod tests {
    use super::KvTile::{K, V};
    use super::*;
    use std::vec::Vec;

    fn block(n_block: u32) -> KvBlock {
        KvBlock { batch: 0, head: 0, n_block, pair: 0 }
    }

    #[test]
    fn k_runs_one_block_ahead() {
        let order = |blocks: &[u32]| KvOrder::new(blocks.iter().map(|&n| block(n))).collect::<Vec<_>>();
        let [a, b, c] = [7, 5, 6].map(block);
        assert_eq!(order(&[]), []);
        assert_eq!(order(&[7]), [K(a), V(a)]);
        assert_eq!(order(&[7, 5]), [K(a), K(b), V(a), V(b)]);
        assert_eq!(order(&[7, 5, 6]), [K(a), K(b), V(a), K(c), V(b), V(c)]);
    }
}
