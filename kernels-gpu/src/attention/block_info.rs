//! Which n_blocks a query tile visits: skipped blocks hold no live key, full blocks hold only live ones.
//!
//! Blocks are visited from the last to the first, so that the masked ones come before the full ones and the mainloop
//! runs over two consecutive ranges with one step function. A query tile without a live key visits its first block all
//! the same, wholly masked: so every work tile has a first and a last block, and the mainloop no case of none.

use core::marker::PhantomData;

use super::mask::Mask;
use super::scheduler::WorkTile;
use crate::params::{Shape, quotient};
use crate::pipeline::order::KvBlock;

/// The n_blocks of one query tile: `0..full_end` are full, `full_end..end` are masked, the rest is skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NBlocks {
    pub full_end: u32,
    pub end: u32,
}

impl NBlocks {
    /// For the query rows `first_row..first_row + block_m`, of which there is at least one before seqlen_q.
    #[inline(always)]
    pub fn new<M: Mask>(shape: &Shape, first_row: u32, block_m: u32, block_n: u32) -> Self {
        let last_row = (first_row + block_m).min(shape.seqlen_q) - 1;
        NBlocks {
            full_end: M::live_end(shape, first_row) / block_n,
            end: M::live_end(shape, last_row).div_ceil(block_n).max(1),
        }
    }
}

/// The blocks of keys that a CTA's work tiles visit, in the order in which they visit them.
pub struct KvBlocks<'a, M, I> {
    shape: &'a Shape,
    block_m: u32,
    block_n: u32,
    tiles: I,
    /// The last block that was given; those before it in its work tile are still to come.
    block: KvBlock,
    mask: PhantomData<M>,
}

impl<'a, M: Mask, I: Iterator<Item = WorkTile>> KvBlocks<'a, M, I> {
    #[inline(always)]
    pub fn new(shape: &'a Shape, block_m: u32, block_n: u32, tiles: I) -> Self {
        let block = KvBlock { batch: 0, head: 0, n_block: 0 };
        KvBlocks { shape, block_m, block_n, tiles, block, mask: PhantomData }
    }
}

impl<M: Mask, I: Iterator<Item = WorkTile>> Iterator for KvBlocks<'_, M, I> {
    type Item = KvBlock;

    #[inline(always)]
    fn next(&mut self) -> Option<KvBlock> {
        if self.block.n_block == 0 {
            let tile = self.tiles.next()?;
            let blocks = NBlocks::new::<M>(self.shape, tile.m_block * self.block_m, self.block_m, self.block_n);
            let head = quotient(tile.head, self.shape.group());
            self.block = KvBlock { batch: tile.batch, head, n_block: blocks.end };
        }
        self.block.n_block -= 1;
        Some(self.block)
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::attention::mask::{Causal, Full};

    fn agrees<M: Mask>(shape: Shape, block_m: u32, block_n: u32) {
        for first_row in (0..shape.seqlen_q).step_by(block_m as usize) {
            let blocks = NBlocks::new::<M>(&shape, first_row, block_m, block_n);
            let rows = first_row..(first_row + block_m).min(shape.seqlen_q);
            for n_block in 0..shape.seqlen_k.div_ceil(block_n) {
                let keys = n_block * block_n..(n_block + 1) * block_n;
                let live = |i: u32, j: u32| j < M::live_end(&shape, i);
                let any = rows.clone().any(|i| keys.clone().any(|j| live(i, j)));
                let all = rows.clone().all(|i| keys.clone().all(|j| live(i, j)));
                assert!(n_block < blocks.end || !any, "{shape:?} row {first_row}: block {n_block} skipped but live");
                assert!(n_block >= blocks.full_end || all, "{shape:?} row {first_row}: block {n_block} not full");
                let visited = n_block < blocks.end;
                assert!(
                    !visited || n_block == 0 || any,
                    "{shape:?} row {first_row}: block {n_block} visited for nothing"
                );
            }
        }
    }

    #[test]
    fn ranges_and_predicate_agree() {
        for seqlen_q in [1, 2, 7, 8, 9, 31, 33] {
            for seqlen_k in [0, 1, 3, 5, 6, 7, 29, 40] {
                let shape = Shape { batch: 1, heads_q: 1, heads_kv: 1, seqlen_q, seqlen_k, head_dim: 8 };
                agrees::<Full>(shape, 8, 6);
                agrees::<Causal>(shape, 8, 6);
            }
        }
    }
}
