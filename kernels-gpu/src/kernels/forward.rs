//! Forward attention, O = softmax(scale·Q·Kᵀ + mask)·V and its LSE (FlashAttention-3, arXiv 2407.08608, algorithm 2).
//!
//! A consumer warpgroup owns 64 query rows. In each step the scores of the next block are issued before the output of
//! the last one is waited for, so that the tensor cores work while this warpgroup, or the other, computes a softmax.

use crate::arch::Warpgroup;
use crate::attention::block_info::NBlocks;
use crate::attention::epilogue;
use crate::attention::mask::{Mask, mask_scores};
use crate::attention::scheduler::WorkTile;
use crate::attention::softmax::Softmax;
use crate::params::ForwardParams;

/// What the mainloop carries from block to block: O, the last block's P, and m and l.
struct Mainloop<W: Warpgroup, const D8: usize, const N8: usize> {
    o: W::Acc<D8>,
    p: W::Operand<N8>,
    softmax: Softmax<W>,
}

impl<W: Warpgroup, const D8: usize, const N8: usize> Mainloop<W, D8, N8> {
    /// The first block: there is no output to add to yet.
    #[inline(always)]
    fn first(wg: &mut W, scale: f32, mask: impl Fn(&W, &mut W::Acc<N8>)) -> Self {
        let k = wg.wait_kv();
        let s = wg.qk::<D8, N8>(k);
        let mut s = wg.wait::<0, N8>(s);
        wg.release_kv(k);
        mask(wg, &mut s);
        let mut softmax = Softmax::new(wg, scale);
        softmax.step(wg, &mut s);
        Mainloop { o: wg.zeros::<D8>(), p: wg.pack(&s), softmax }
    }

    /// Scores of one more block, beside the output of the one before.
    #[inline(always)]
    fn step(&mut self, wg: &mut W, mask: impl Fn(&W, &mut W::Acc<N8>)) {
        let k = wg.wait_kv();
        wg.take_turn();
        let s = wg.qk::<D8, N8>(k); //                     S = Q·Kᵀ
        let v = wg.wait_kv();
        let o = wg.pv::<N8, D8>(self.o, self.p, v); //     O = O + P·V, one block behind
        wg.pass_turn();
        let mut s = wg.wait::<1, N8>(s);
        wg.release_kv(k);
        mask(wg, &mut s);
        let correction = self.softmax.step(wg, &mut s); // S → P; m, l
        self.o = wg.wait::<0, D8>(o);
        wg.release_kv(v);
        wg.map_rows(&mut self.o, correction, |o, a| o * a);
        self.p = wg.pack(&s);
    }

    /// The output of the last block, and `meanwhile` while it is in flight.
    #[inline(always)]
    fn last(self, wg: &mut W, meanwhile: impl FnOnce(&mut W)) -> (W::Acc<D8>, Softmax<W>) {
        let v = wg.wait_kv();
        let o = wg.pv::<N8, D8>(self.o, self.p, v);
        meanwhile(wg);
        let o = wg.wait::<0, D8>(o);
        wg.release_kv(v);
        (o, self.softmax)
    }
}

/// What one consumer warpgroup of a CTA does with its work tiles.
#[inline(always)]
pub fn consume<W: Warpgroup, M: Mask, const D8: usize, const N8: usize>(
    wg: &mut W,
    p: &ForwardParams<W::Tensor>,
    block_m: u32,
    mut tiles: impl Iterator<Item = WorkTile>,
) {
    let block_n = 8 * N8 as u32;
    let mut next = tiles.next();
    if let Some(tile) = &next {
        wg.load_q(tile);
    }
    while let Some(tile) = next {
        let blocks = NBlocks::new::<M>(&p.shape, tile.m_block * block_m, block_m, block_n);
        wg.wait_q();
        let mut load_next = |wg: &mut W| {
            next = tiles.next();
            if let Some(tile) = &next {
                wg.load_q(tile);
            }
        };
        let (o, softmax) = if blocks.end == 0 {
            load_next(wg);
            (wg.zeros::<D8>(), Softmax::new(wg, p.scale))
        } else {
            let row = wg.first_row(&tile);
            let masked =
                |n_block| move |wg: &W, s: &mut _| mask_scores::<W, M, N8>(wg, &p.shape, s, row, n_block * block_n);
            let mut mainloop = Mainloop::<W, D8, N8>::first(wg, p.scale, masked(blocks.end - 1));
            for n_block in (blocks.full_end..blocks.end - 1).rev() {
                mainloop.step(wg, masked(n_block));
            }
            for _ in 0..blocks.full_end.min(blocks.end - 1) {
                mainloop.step(wg, |_, _| {});
            }
            mainloop.last(wg, load_next)
        };
        epilogue::store(wg, p, &tile, o, softmax);
    }
}
