//! The order in which K and V tiles pass through the ring: the one agreement between producer and consumers.
//!
//! For the n_blocks n−1, n−2, …, 0 of a work tile it is K(n−1), K(n−2), V(n−1), K(n−3), V(n−2), …, K(0), V(1), V(0):
//! K runs one block ahead, because the mainloop issues the scores of the next block before it waits for the output
//! of this one.

/// One tile that passes through the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvTile {
    K(u32),
    V(u32),
}

/// The tiles of one work tile, in order.
#[derive(Clone, Copy, Debug)]
pub struct KvOrder {
    blocks: u32,
    position: u32,
}

impl KvOrder {
    /// For a work tile that visits the n_blocks `0..blocks`.
    #[inline(always)]
    pub fn new(blocks: u32) -> Self {
        KvOrder { blocks, position: 0 }
    }
}

impl Iterator for KvOrder {
    type Item = KvTile;

    #[inline(always)]
    fn next(&mut self) -> Option<KvTile> {
        let Self { blocks: n, position: i } = *self;
        self.position += 1;
        if i >= 2 * n {
            None
        } else if i == 0 {
            Some(KvTile::K(n - 1))
        } else if i == 2 * n - 1 {
            Some(KvTile::V(0))
        } else if i % 2 == 1 {
            Some(KvTile::K(n - 1 - i.div_ceil(2)))
        } else {
            Some(KvTile::V(n - i / 2))
        }
    }
}

#[cfg(test)]
mod tests {

    use super::KvTile::{K, V};
    use super::*;
    use std::vec::Vec;

    #[test]
    fn k_runs_one_block_ahead() {
        assert_eq!(KvOrder::new(0).next(), None);
        assert_eq!(KvOrder::new(1).collect::<Vec<_>>(), [K(0), V(0)]);
        assert_eq!(KvOrder::new(2).collect::<Vec<_>>(), [K(1), K(0), V(1), V(0)]);
        assert_eq!(KvOrder::new(3).collect::<Vec<_>>(), [K(2), K(1), V(2), K(0), V(1), V(0)]);
    }
}
