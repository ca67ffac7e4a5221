//! Forward attention, O = softmax(scale·Q·Kᵀ + mask)·V and its LSE (FlashAttention-3, arXiv 2407.08608, algorithm 2).
//!
//! A consumer warpgroup owns 64 query rows. In each step the scores of the next block are issued before the output of
//! the last one is waited for, so that the tensor cores work while this warpgroup, or the other, computes a softmax.
//! Where a work tile ends, the next block is the first of the next work tile, and the pipeline never runs empty.

use crate::arch::{ForwardWarpgroup, Pending};
use crate::attention::block_info::NBlocks;
use crate::attention::epilogue;
use crate::attention::mask::{Mask, mask_scores};
use crate::attention::scheduler::WorkTile;
use crate::attention::softmax::Softmax;
use crate::params::ForwardParams;

/// What the mainloop carries from block to block: O, the last block's P, and m and l.
struct Mainloop<W: ForwardWarpgroup, const D8: usize, const N8: usize> {
    o: W::Acc<D8>,
    p: W::Operand<N8>,
    softmax: Softmax<W>,
}

/// One block's scores and the output of the block before, both in flight, with the slots that they read.
struct InFlight<W: ForwardWarpgroup, const D8: usize, const N8: usize> {
    s: Pending<W::Acc<N8>>,
    o: Pending<W::Acc<D8>>,
    k: W::Slot,
    v: W::Slot,
}

impl<W: ForwardWarpgroup, const D8: usize, const N8: usize> Mainloop<W, D8, N8> {
    /// The first block of all: there is no output to add to yet.
    #[inline(always)]
    fn first(wg: &mut W, scale: f32, scored: impl FnOnce(&mut W, &mut W::Acc<N8>)) -> Self {
        let k = wg.wait_kv();
        let s = wg.qk::<D8, N8>(k);
        let mut s = wg.wait::<0, N8>(s);
        wg.release_kv(k);
        scored(wg, &mut s);
        let mut softmax = Softmax::new(wg, scale);
        softmax.step(wg, &mut s);
        Mainloop { o: wg.zeros::<D8>(), p: wg.pack(&s), softmax }
    }

    /// Issues the scores of one more block, and the output of the one before.
    #[inline(always)]
    fn issue(&self, wg: &mut W) -> InFlight<W, D8, N8> {
        let k = wg.wait_kv();
        wg.take_turn();
        let s = wg.qk::<D8, N8>(k); //                     S = Q·Kᵀ
        let v = wg.wait_kv();
        let o = wg.pv::<N8, D8>(self.o, self.p, v); //     O = O + P·V, one block behind
        wg.pass_turn();
        InFlight { s, o, k, v }
    }

    /// One more block of the same work tile. `scored` masks its scores.
    #[inline(always)]
    fn step(&mut self, wg: &mut W, scored: impl FnOnce(&mut W, &mut W::Acc<N8>)) {
        let InFlight { s, o, k, v } = self.issue(wg);
        let mut s = wg.wait::<1, N8>(s);
        wg.release_kv(k);
        scored(wg, &mut s);
        let correction = self.softmax.step(wg, &mut s); // S → P; m, l
        self.o = wg.wait::<0, D8>(o);
        wg.release_kv(v);
        wg.scale_rows(&mut self.o, correction);
        self.p = wg.pack(&s);
    }

    /// The first block of the next work tile, beside the last output of this one, which it returns.
    #[inline(always)]
    fn turn_over(
        self,
        wg: &mut W,
        scale: f32,
        scored: impl FnOnce(&mut W, &mut W::Acc<N8>),
    ) -> (Self, W::Acc<D8>, Softmax<W>) {
        let InFlight { s, o, k, v } = self.issue(wg);
        let mut s = wg.wait::<1, N8>(s);
        wg.release_kv(k);
        scored(wg, &mut s);
        let mut softmax = Softmax::new(wg, scale);
        softmax.step(wg, &mut s);
        let o = wg.wait::<0, D8>(o);
        wg.release_kv(v);
        (Mainloop { o: wg.zeros::<D8>(), p: wg.pack(&s), softmax }, o, self.softmax)
    }

    /// The output of the last block of all.
    #[inline(always)]
    fn last(self, wg: &mut W) -> (W::Acc<D8>, Softmax<W>) {
        let v = wg.wait_kv();
        let o = wg.pv::<N8, D8>(self.o, self.p, v);
        let o = wg.wait::<0, D8>(o);
        wg.release_kv(v);
        (o, self.softmax)
    }
}

/// The work tiles that are left to a CTA, and the one whose query rows are being loaded.
struct Upcoming<I> {
    tiles: I,
    next: Option<WorkTile>,
}

impl<I: Iterator<Item = WorkTile>> Upcoming<I> {
    /// Starts loading the query rows of the next work tile.
    #[inline(always)]
    fn load<W: ForwardWarpgroup>(&mut self, wg: &mut W) {
        self.next = self.tiles.next();
        if let Some(next) = &self.next {
            wg.load_q(next);
        }
    }
}

/// What one consumer warpgroup of a CTA does with its work tiles.
#[inline(always)]
pub fn consume<W: ForwardWarpgroup, M: Mask, const D8: usize, const N8: usize>(
    wg: &mut W,
    p: &ForwardParams<W::Tensor>,
    block_m: u32,
    tiles: impl Iterator<Item = WorkTile>,
) {
    let block_n = 8 * N8 as u32;
    let n_blocks = |tile: &WorkTile| NBlocks::new::<M>(&p.shape, tile.m_block * block_m, block_m, block_n);
    let mask = |wg: &W, s: &mut W::Acc<N8>, tile: &WorkTile, n_block: u32| {
        mask_scores::<W, M, N8>(wg, &p.shape, s, wg.first_row(tile), n_block * block_n);
    };
    // The first and the last block of a work tile may be full ones too.
    let mask_if_needed = |wg: &W, s: &mut W::Acc<N8>, tile: &WorkTile, blocks: &NBlocks, n_block: u32| {
        if n_block >= blocks.full_end {
            mask(wg, s, tile, n_block);
        }
    };
    let mut upcoming = Upcoming { tiles, next: None };
    upcoming.load(wg);
    let Some(mut tile) = upcoming.next else { return };
    let mut blocks = n_blocks(&tile);
    wg.wait_q();
    // After the scores of a work tile's block 0, its last, Q is free for the next work tile.
    let mut mainloop = Mainloop::<W, D8, N8>::first(wg, p.scale, |wg, s| {
        if blocks.end == 1 {
            upcoming.load(wg);
        }
        mask_if_needed(wg, s, &tile, &blocks, blocks.end - 1);
    });
    loop {
        for n_block in (blocks.full_end.max(1)..blocks.end - 1).rev() {
            mainloop.step(wg, |wg, s| mask(wg, s, &tile, n_block));
        }
        for _ in 1..blocks.full_end.min(blocks.end - 1) {
            mainloop.step(wg, |_, _| {});
        }
        if blocks.end > 1 {
            mainloop.step(wg, |wg, s| {
                upcoming.load(wg);
                mask_if_needed(wg, s, &tile, &blocks, 0);
            });
        }
        let Some(next) = upcoming.next else { break };
        blocks = n_blocks(&next);
        wg.wait_q();
        let (following, o, softmax) = mainloop.turn_over(wg, p.scale, |wg, s| {
            if blocks.end == 1 {
                upcoming.load(wg);
            }
            mask_if_needed(wg, s, &next, &blocks, blocks.end - 1);
        });
        epilogue::store(wg, p, &tile, o, softmax);
        (mainloop, tile) = (following, next);
    }
    let (o, softmax) = mainloop.last(wg);
    epilogue::store(wg, p, &tile, o, softmax);
}
