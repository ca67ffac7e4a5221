//! Backward attention for head dim 256, where the registers of a warpgroup hold one gradient of a block of keys but not
//! two. One consumer warpgroup has dV, the other has dK. The algorithm is that of [`super::backward`]:
//!
//! ```text
//! consumer 0          Sᵀ = K·Qᵢᵀ → Pᵀ → shared memory          dV = dV + Pᵀ·dOᵢ
//! consumer 1          dPᵀ = V·dOᵢᵀ, Pᵀ from shared memory      → dSᵀ → ring, dK = dK + dSᵀ·Qᵢ
//! third warpgroup     dSᵀ from the ring                        dQᵢ = dQᵢ + dS·K, and all loads
//! ```
//!
//! `pass_weights` writes P to shared memory in f32, and `take_weights` reads it, thread to thread.
//!
//! No product is computed twice. If each consumer had half of the columns of both gradients, both would compute all of
//! S and dP, seven products instead of five (notebook 80).
//!
//! Done for speed:
//!
//! 1. Pᵀ·dO of the last block overlaps the exponentials of the next one (`Dv::step`), and dSᵀ·Q of the last block
//!    overlaps dS of the next one (`Dk::step`).
//! 2. A consumer with one gradient needs fewer registers, so that the third warpgroup has 72 (notebook 81).

use super::backward::{Step, blocks_met, last_pair};
use crate::arch::BackwardWarpgroup;
use crate::attention::dropping::Dropping;
use crate::attention::features::Features;
use crate::attention::key_parts::KeyPart;
use crate::attention::query_blocks::key_block;
use crate::ground::places::KvBlock;
use crate::ground::places::QueryBlock;
use crate::params::BackwardParams;

/// dV of a block of keys so far, and P of the last query block, whose product dV still lacks.
struct Dv<W: BackwardWarpgroup, const D8: usize, const M8: usize> {
    dv: W::Acc<D8>,
    p: W::Operand<M8>,
    slot: W::Slot,
}

impl<W: BackwardWarpgroup, const D8: usize, const M8: usize> Dv<W, D8, M8> {
    /// Processes the first query block up to P.
    #[inline(always)]
    fn new<F: Features>(wg: &mut W, step: &Step<W::Tensor, F>, at: &QueryBlock, dv: W::Acc<D8>) -> Self {
        let slot = wg.wait_q();
        let s = wg.kq::<D8, M8>(slot); //                            Sᵀ = K·Qᵀ
        let neg_lse_log2 = wg.neg_lse_log2(slot);
        let s = wg.wait::<0, M8>(s);
        let p = step.weights(wg, at, &neg_lse_log2, s); //           Pᵀ = exp(scale·Sᵀ − LSE)
        wg.pass_weights(&p, slot);
        wg.wait_do(slot);
        Dv { dv, p: F::Weights::pack_unmarked::<W, M8>(wg, &p), slot }
    }

    /// Adds the last query block's product to dV. It overlaps the next block's exponentials.
    #[inline(always)]
    fn step<F: Features>(&mut self, wg: &mut W, step: &Step<W::Tensor, F>, at: &QueryBlock) {
        let slot = wg.wait_q();
        let s = wg.kq::<D8, M8>(slot); //                            Sᵀ = K·Qᵀ
        let dv = wg.p_do::<M8, D8>(self.dv, self.p, self.slot); //   dV = dV + Pᵀ·dO
        let neg_lse_log2 = wg.neg_lse_log2(slot);
        let s = wg.wait::<1, M8>(s);
        let p = step.weights(wg, at, &neg_lse_log2, s); //           Pᵀ = exp(scale·Sᵀ − LSE)
        wg.pass_weights(&p, slot);
        wg.wait_do(slot);
        self.dv = wg.wait::<0, D8>(dv);
        wg.release(self.slot);
        (self.p, self.slot) = (F::Weights::pack_unmarked::<W, M8>(wg, &p), slot);
    }

    #[inline(always)]
    fn finish(self, wg: &mut W) -> W::Acc<D8> {
        let dv = wg.p_do::<M8, D8>(self.dv, self.p, self.slot); //   dV = dV + Pᵀ·dO
        let dv = wg.wait::<0, D8>(dv);
        wg.release(self.slot);
        dv
    }
}

/// dK of a block of keys so far, and dS of the last query block, whose product dK still lacks.
struct Dk<W: BackwardWarpgroup, const D8: usize, const M8: usize> {
    dk: W::Acc<D8>,
    ds: W::Operand<M8>,
    slot: W::Slot,
}

impl<W: BackwardWarpgroup, const D8: usize, const M8: usize> Dk<W, D8, M8> {
    /// Processes the first query block up to dS.
    #[inline(always)]
    fn new<F: Features>(wg: &mut W, step: &Step<W::Tensor, F>, at: &QueryBlock) -> Self {
        let slot = wg.wait_q();
        wg.wait_do(slot);
        let dp = wg.v_do::<D8, M8>(slot); //                         dPᵀ = V·dOᵀ
        let p = wg.take_weights::<M8>(slot);
        let dp = wg.wait::<0, M8>(dp);
        let ds = step.score_gradients(wg, &p, dp, &wg.delta(slot)); // dSᵀ = Pᵀ∘(dPᵀ − delta)
        Dk { dk: wg.zeros::<D8>(), ds: leave_ds(wg, &ds, slot, at), slot }
    }

    /// Adds the last query block's product to dK. It overlaps the computation of the next block's dS.
    #[inline(always)]
    fn step<F: Features>(&mut self, wg: &mut W, step: &Step<W::Tensor, F>, at: &QueryBlock) {
        let slot = wg.wait_q();
        wg.wait_do(slot);
        let dp = wg.v_do::<D8, M8>(slot); //                         dPᵀ = V·dOᵀ
        let dk = wg.ds_q::<M8, D8>(self.dk, self.ds, self.slot); //  dK = dK + dSᵀ·Q
        let p = wg.take_weights::<M8>(slot);
        let dp = wg.wait::<1, M8>(dp);
        let mut ds = step.score_gradients(wg, &p, dp, &wg.delta(slot)); // dSᵀ = Pᵀ∘(dPᵀ − delta)
        wg.compute(&mut ds);
        self.dk = wg.wait::<0, D8>(dk);
        wg.release(self.slot);
        (self.ds, self.slot) = (leave_ds(wg, &ds, slot, at), slot); // dQ = dQ + dS·K
    }

    #[inline(always)]
    fn finish(self, wg: &mut W) -> W::Acc<D8> {
        let dk = wg.ds_q::<M8, D8>(self.dk, self.ds, self.slot); //  dK = dK + dSᵀ·Q
        let dk = wg.wait::<0, D8>(dk);
        wg.release(self.slot);
        dk
    }
}

/// Packs dS as the left operand of dK, and publishes it in the dS ring. The third warpgroup computes dQ from it.
#[inline(always)]
fn leave_ds<W: BackwardWarpgroup, const M8: usize>(
    wg: &mut W,
    ds: &W::Acc<M8>,
    slot: W::Slot,
    at: &QueryBlock,
) -> W::Operand<M8> {
    wg.wait_ds(slot);
    let ds = wg.pack(ds);
    wg.add_dq(&ds, slot, at);
    wg.pass_ds(slot);
    ds
}

/// Computes dV, as the first consumer, for every work tile of its CTA or part of one. A work tile is a block of keys.
#[inline(always)]
pub fn consume_dv<W: BackwardWarpgroup, F: Features, const D8: usize, const M8: usize>(
    wg: &mut W,
    p: &BackwardParams<W::Tensor, F>,
    block_n: u32,
    tiles: impl Iterator<Item = KeyPart>,
) {
    let base = &p.base;
    let block_m = 8 * M8 as u32;
    for KeyPart { tile, part } in tiles {
        let mut dv = wg.zeros::<D8>();
        // Visits the last pair first.
        let mut left = last_pair(p) + 1;
        let mut keys = key_block(&base.shape, block_n, &tile);
        while left > 0 {
            left -= 1;
            keys = KvBlock { pair: left, ..keys };
            let blocks = blocks_met(p, (block_m, block_n), &keys, part);
            if blocks.count() == 0 {
                continue;
            }
            let step = Step { p, first_key: keys.n_block * block_n, block_m, blocks: &blocks };
            wg.wait_k();
            let mut at = blocks.first();
            let mut mainloop = Dv::<W, D8, M8>::new::<F>(wg, &step, &at, dv);
            for _ in 1..blocks.count() {
                at = blocks.after(&at);
                mainloop.step(wg, &step, &at);
            }
            dv = mainloop.finish(wg);
            wg.release_kv();
        }
        p.features.weights().scale::<W, D8>(wg, &mut dv);
        match part.slot() {
            None => wg.store_kv(&dv, &base.dv, &keys, &base.shape),
            Some(slot) => wg.store_part(&dv, base.workspace.part(slot, 1, block_n * 8 * D8 as u32)),
        }
    }
}

/// Computes dK, as the second consumer, for every work tile of its CTA or part of one: one pair after the other, the
/// last one first.
#[inline(always)]
pub fn consume_dk<W: BackwardWarpgroup, F: Features, const D8: usize, const M8: usize>(
    wg: &mut W,
    p: &BackwardParams<W::Tensor, F>,
    block_n: u32,
    tiles: impl Iterator<Item = KeyPart>,
) {
    let base = &p.base;
    let block_m = 8 * M8 as u32;
    for KeyPart { tile, part } in tiles {
        let mut left = last_pair(p) + 1;
        while left > 0 {
            left -= 1;
            let keys = KvBlock { pair: left, ..key_block(&base.shape, block_n, &tile) };
            let blocks = blocks_met(p, (block_m, block_n), &keys, part);
            if blocks.count() == 0 {
                wg.store_kv(&wg.zeros::<D8>(), base.dk_of(left), &keys, &base.shape);
                continue;
            }
            let step = Step { p, first_key: keys.n_block * block_n, block_m, blocks: &blocks };
            wg.wait_k();
            wg.wait_v();
            let mut at = blocks.first();
            let mut mainloop = Dk::<W, D8, M8>::new::<F>(wg, &step, &at);
            for _ in 1..blocks.count() {
                at = blocks.after(&at);
                mainloop.step(wg, &step, &at);
            }
            let mut dk = mainloop.finish(wg);
            wg.release_kv();
            wg.map_rows(&mut dk, wg.rows(base.scale), |dk, scale| dk * scale);
            match part.slot() {
                None => wg.store_kv(&dk, base.dk_of(left), &keys, &base.shape),
                Some(slot) => wg.store_part(&dk, base.workspace.part(slot, 0, block_n * 8 * D8 as u32)),
            }
        }
    }
}
