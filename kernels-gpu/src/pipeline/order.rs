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

/// Step of the order: K of one block, then V of the block before it. The first step has no V, the last no K.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvStep {
    pub k: Option<KvBlock>,
    pub v: Option<KvBlock>,
}

impl IntoIterator for KvStep {
    type Item = KvTile;
    type IntoIter = core::iter::Flatten<core::array::IntoIter<Option<KvTile>, 2>>;

    fn into_iter(self) -> Self::IntoIter {
        [self.k.map(KvTile::K), self.v.map(KvTile::V)].into_iter().flatten()
    }
}

/// Iterator over the steps for a sequence of blocks. Flattened, it is one over tiles.
///
/// The GPU's producer takes whole steps. An iterator over tiles would carry one more block from tile to tile, and the
/// producer has few registers.
#[derive(Clone, Copy, Debug)]
pub struct KvOrder<I> {
    blocks: I,
    /// Block whose K came last.
    ahead: Option<KvBlock>,
}

impl<I: Iterator<Item = KvBlock>> KvOrder<I> {
    #[inline(always)]
    pub fn new(blocks: I) -> Self {
        KvOrder { blocks, ahead: None }
    }
}

impl<I: Iterator<Item = KvBlock>> Iterator for KvOrder<I> {
    type Item = KvStep;

    #[inline(always)]
    fn next(&mut self) -> Option<KvStep> {
        let k = self.blocks.next();
        let v = core::mem::replace(&mut self.ahead, k);
        (k.is_some() || v.is_some()).then_some(KvStep { k, v })
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
        let order = |blocks: &[u32]| KvOrder::new(blocks.iter().map(|&n| block(n))).flatten().collect::<Vec<_>>();
        let [a, b, c] = [7, 5, 6].map(block);
        assert_eq!(order(&[]), []);
        assert_eq!(order(&[7]), [K(a), V(a)]);
        assert_eq!(order(&[7, 5]), [K(a), K(b), V(a), V(b)]);
        assert_eq!(order(&[7, 5, 6]), [K(a), K(b), V(a), K(c), V(b), V(c)]);
    }
}
