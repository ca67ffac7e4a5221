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

use super::backward::{Accumulate, Gradients, KeyTile};
use crate::arch::BackwardWarpgroup;
use crate::attention::dropping::Dropping;
use crate::attention::features::Features;
use crate::ground::places::QueryBlock;

/// dV of a block of keys so far, and P of the last query block, whose product dV still lacks.
pub struct Dv<W: BackwardWarpgroup, const D8: usize, const M8: usize> {
    dv: W::Acc<D8>,
    p: W::Operand<M8>,
    slot: W::Slot,
}

impl<W: BackwardWarpgroup, F: Features, const D8: usize, const M8: usize> Accumulate<W, F, D8, M8> for Dv<W, D8, M8> {
    const HAS_DK: bool = false;
    const HAS_DV: bool = true;

    /// Processes the first query block up to P.
    #[inline(always)]
    fn start(wg: &mut W, keys: &KeyTile<W::Tensor, F>, at: &QueryBlock, dv: W::Acc<D8>) -> Self {
        let slot = wg.wait_q();
        let s = wg.kq::<D8, M8>(slot); //                            Sᵀ = K·Qᵀ
        let neg_lse_log2 = wg.neg_lse_log2(slot);
        let mut p = wg.wait::<0, M8>(s);
        let derivative = keys.curve(wg, &mut p);
        keys.weights(wg, at, &neg_lse_log2, &mut p); //              Pᵀ = exp(Sᵀ − LSE)
        wg.pass_weights(&p, derivative.as_ref(), slot);
        wg.wait_do(slot);
        Dv { dv, p: F::Weights::pack_unmarked::<W, M8>(wg, &p), slot }
    }

    /// Adds the last query block's product to dV. It overlaps the next block's exponentials.
    #[inline(always)]
    fn step(&mut self, wg: &mut W, keys: &KeyTile<W::Tensor, F>, at: &QueryBlock) {
        let slot = wg.wait_q();
        let s = wg.kq::<D8, M8>(slot); //                            Sᵀ = K·Qᵀ
        let dv = wg.p_do::<M8, D8>(self.dv, self.p, self.slot); //   dV = dV + Pᵀ·dO
        let neg_lse_log2 = wg.neg_lse_log2(slot);
        let mut p = wg.wait::<1, M8>(s);
        let derivative = keys.curve(wg, &mut p);
        keys.weights(wg, at, &neg_lse_log2, &mut p); //              Pᵀ = exp(Sᵀ − LSE)
        wg.pass_weights(&p, derivative.as_ref(), slot);
        wg.wait_do(slot);
        self.dv = wg.wait::<0, D8>(dv);
        wg.release(self.slot);
        (self.p, self.slot) = (F::Weights::pack_unmarked::<W, M8>(wg, &p), slot);
    }

    #[inline(always)]
    fn finish(self, wg: &mut W) -> Gradients<W, D8> {
        let dv = wg.p_do::<M8, D8>(self.dv, self.p, self.slot); //   dV = dV + Pᵀ·dO
        let dv = wg.wait::<0, D8>(dv);
        wg.release(self.slot);
        Gradients { dk: wg.zeros::<D8>(), dv }
    }
}

/// dK of a block of keys so far, and dS of the last query block, whose product dK still lacks.
pub struct Dk<W: BackwardWarpgroup, const D8: usize, const M8: usize> {
    dk: W::Acc<D8>,
    ds: W::Operand<M8>,
    slot: W::Slot,
}

impl<W: BackwardWarpgroup, F: Features, const D8: usize, const M8: usize> Accumulate<W, F, D8, M8> for Dk<W, D8, M8> {
    const HAS_DK: bool = true;
    const HAS_DV: bool = false;

    /// Processes the first query block up to dS.
    #[inline(always)]
    fn start(wg: &mut W, keys: &KeyTile<W::Tensor, F>, at: &QueryBlock, _: W::Acc<D8>) -> Self {
        wg.wait_v();
        let slot = wg.wait_q();
        wg.wait_do(slot);
        let dp = wg.v_do::<D8, M8>(slot); //                         dPᵀ = V·dOᵀ
        let p = wg.take_weights::<M8>(slot);
        let dp = wg.wait::<0, M8>(dp);
        let ds = keys.score_gradients(wg, &p, dp, &wg.delta(slot)); // dSᵀ = Pᵀ∘(dPᵀ − delta)
        Dk { dk: wg.zeros::<D8>(), ds: leave_ds(wg, &ds, slot, at), slot }
    }

    /// Adds the last query block's product to dK. It overlaps the computation of the next block's dS.
    #[inline(always)]
    fn step(&mut self, wg: &mut W, keys: &KeyTile<W::Tensor, F>, at: &QueryBlock) {
        let slot = wg.wait_q();
        wg.wait_do(slot);
        let dp = wg.v_do::<D8, M8>(slot); //                         dPᵀ = V·dOᵀ
        let dk = wg.ds_q::<M8, D8>(self.dk, self.ds, self.slot); //  dK = dK + dSᵀ·Q
        let p = wg.take_weights::<M8>(slot);
        let dp = wg.wait::<1, M8>(dp);
        let mut ds = keys.score_gradients(wg, &p, dp, &wg.delta(slot)); // dSᵀ = Pᵀ∘(dPᵀ − delta)
        wg.compute(&mut ds);
        self.dk = wg.wait::<0, D8>(dk);
        wg.release(self.slot);
        (self.ds, self.slot) = (leave_ds(wg, &ds, slot, at), slot); // dQ = dQ + dS·K
    }

    #[inline(always)]
    fn finish(self, wg: &mut W) -> Gradients<W, D8> {
        let dk = wg.ds_q::<M8, D8>(self.dk, self.ds, self.slot); //  dK = dK + dSᵀ·Q
        let dk = wg.wait::<0, D8>(dk);
        wg.release(self.slot);
        Gradients { dk, dv: wg.zeros::<D8>() }
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
