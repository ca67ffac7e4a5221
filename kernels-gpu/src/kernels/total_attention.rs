//! Total attention, total_j = Σ_i P_ij with P = exp(scale·Q·Kᵀ − LSE): how much weight each key got, from a second pass
//! over Q, K and the LSE of the forward pass.
//!
//! A consumer warpgroup owns 64 keys of one query head and walks over the query blocks that see them. Scores are computed
//! transposed, so that a key is a row and its sum stays in registers until its work tile ends. The scores of the next
//! block, be it of the next work tile, are issued before this block's exponentials.

use core::f32::consts::LOG2_E;

use crate::arch::TotalWarpgroup;
use crate::attention::mask::{Mask, mask_transposed};
use crate::attention::pairs::OnePair;
use crate::attention::scheduler::WorkTile;
use crate::attention::total_steps::{TotalStep, TotalSteps};
use crate::params::TotalParams;

/// The sums of 64 keys so far.
struct Mainloop<'a, W: TotalWarpgroup> {
    p: &'a TotalParams<W::Tensor>,
    block_n: u32,
    /// This thread's share of them.
    total: W::Rows,
}

impl<W: TotalWarpgroup> Mainloop<'_, W> {
    /// One query block, `at`, whose scores are `s`. The scores of `next` are computed beside it.
    #[inline(always)]
    fn step<M: Mask, const D8: usize, const M8: usize>(
        &mut self,
        wg: &mut W,
        s: W::Acc<M8>,
        at: &TotalStep,
        next: &TotalStep,
    ) -> W::Acc<M8> {
        if next.is_first() {
            wg.wait_k();
        }
        let q = wg.wait_q();
        let following = wg.kq::<D8, M8>(q); // Sᵀ = K·Qᵀ, of the next query block
        wg.wait_lse();
        wg.load_lse(self.p.lse, &self.p.shape, &next.queries());
        self.add::<M, M8>(wg, s, at);
        wg.share_lse();
        let s = wg.wait::<0, M8>(following);
        wg.release_q(q);
        if next.is_last() {
            wg.release_k();
        }
        s
    }

    /// Adds a query block's weights, and stores the sums at the end of a work tile.
    #[inline(always)]
    fn add<M: Mask, const M8: usize>(&mut self, wg: &mut W, mut s: W::Acc<M8>, at: &TotalStep) {
        let (p, block_m) = (self.p, 8 * M8 as u32);
        if !at.is_full(&p.shape, block_m) {
            let first_key = at.keys.n_block * self.block_n + wg.first_key();
            let first_row = at.m_block * block_m;
            mask_transposed::<W, M, OnePair, M8>(wg, &p.shape, OnePair, 0, &mut s, first_key, first_row);
            wg.fill_outside(&mut s, f32::NEG_INFINITY, |_| (0, p.shape.seqlen_q as i32 - first_row as i32));
        }
        let c = p.scale * LOG2_E;
        wg.map_offsets(&mut s, |s, offset| W::exp2(W::fma(s, c, offset))); // Sᵀ → Pᵀ
        // The block by itself first: a long column's sum is too large to take small terms one by one.
        self.total = wg.zip(self.total, wg.fold(&s, |a, p| a + p), |total, block| total + block);
        if at.is_last() {
            let total = wg.reduce(self.total, |a, b| a + b);
            wg.store_keys(total, p.total, &at.keys, &p.shape);
            self.total = wg.rows(0.0);
        }
    }
}

/// What one consumer warpgroup of a CTA does with its work tiles, blocks of `block_n` keys.
#[inline(always)]
pub fn consume<W: TotalWarpgroup, M: Mask, const D8: usize, const M8: usize>(
    wg: &mut W,
    p: &TotalParams<W::Tensor>,
    block_n: u32,
    tiles: impl Iterator<Item = WorkTile>,
) {
    let mut steps = TotalSteps::<M, _>::new(&p.shape, 8 * M8 as u32, block_n, tiles);
    let Some(mut at) = steps.next() else { return };
    wg.load_lse(p.lse, &p.shape, &at.queries());
    wg.wait_k();
    let q = wg.wait_q();
    let s = wg.kq::<D8, M8>(q);
    wg.share_lse();
    let mut s = wg.wait::<0, M8>(s);
    wg.release_q(q);
    if at.is_last() {
        wg.release_k();
    }
    let mut mainloop = Mainloop { p, block_n, total: wg.rows(0.0) };
    // Two steps a turn: scores alternate between two fragments, and none is copied.
    while let Some(next) = steps.next() {
        s = mainloop.step::<M, D8, M8>(wg, s, &at, &next);
        at = next;
        let Some(next) = steps.next() else { break };
        s = mainloop.step::<M, D8, M8>(wg, s, &at, &next);
        at = next;
    }
    wg.wait_lse();
    mainloop.add::<M, M8>(wg, s, &at);
}
