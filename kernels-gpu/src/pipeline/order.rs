//! The order in which K and V tiles pass through the ring: the one agreement between producer and consumers.
//!
//! For the blocks a, b, c, … of a CTA, of one work tile after another, it is K(a), K(b), V(a), K(c), V(b), …: K runs
//! one block ahead, because the mainloop issues the scores of the next block before it waits for the output of this
//! one. Work tiles make no difference to it, so the scores of the next one begin beside the last output of this one.

use crate::ground::places::KvBlock;

/// One tile that passes through the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvTile {
    K(KvBlock),
    V(KvBlock),
}

/// The tiles of a sequence of blocks, in order.
#[derive(Clone, Copy, Debug)]
pub struct KvOrder<I> {
    blocks: I,
    /// The block whose K came last, and the one before.
    ahead: KvBlock,
    due: KvBlock,
    next: Next,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// The first block's K.
    First,
    /// K of one more block.
    K,
    /// V of the block that is due.
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
