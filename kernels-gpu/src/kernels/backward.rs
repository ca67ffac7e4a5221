//! Backward attention by recomputation: dQ, dK and dV without a stored score matrix (FlashAttention-2, arXiv
//! 2307.08691, algorithm 2; FlashAttention-3, arXiv 2407.08608, section 3).
//!
//! A CTA keeps one block of keys, K and V in shared memory, dK and dV in registers. Each of two consumer warpgroups has
//! half of the keys (for head dim 256 see [`super::backward_gradients`]). Let c = scale·log₂e, δ = rowsum(dO∘O) − dLSE
//! and neg_lse_log2 = −LSE·log₂e. The CTA computes, transposed:
//!
//! ```text
//! for each work tile of the CTA, a block of keys of one key head:
//!     dK = 0, dV = 0
//!     for each query block i that attends to it, of all query heads of the group:
//!         Sᵀ = K·Qᵢᵀ, −∞ for masked keys
//!         Pᵀ = 2^(c·Sᵀ + neg_lse_log2)           = exp(scale·Sᵀ − LSE)
//!         dPᵀ = V·dOᵢᵀ
//!         dSᵀ = Pᵀ∘(dPᵀ − δ)
//!         dV = dV + Pᵀ·dOᵢ
//!         dK = dK + dSᵀ·Qᵢ
//!         dQᵢ = dQᵢ + dS·K                       by a third warpgroup, in f32 in the workspace
//!     store dV and scale·dK                      (the postprocess kernel stores scale·dQ)
//! ```
//!
//! Done for speed:
//!
//! 1. S and dP are computed transposed, keys × queries, so that Pᵀ and dSᵀ go from registers, as left operands, into dV
//!    and dK.
//! 2. The consumers also write dSᵀ to a ring in shared memory. A third warpgroup, which issues the loads too, computes
//!    dS·K from it and accumulates dQ in f32 in the workspace (`arch/sm90/backward_dq.rs`). So the consumers never wait
//!    for each other's dS (notebook 41).
//! 3. A ping-pong barrier (`take_ping_pong`, `pass_ping_pong`) overlaps one consumer's exponentials with the other's
//!    products. A consumer holds it while it issues dV and dK of the last query block and S of the next, and above head
//!    dim 64 also dP (notebook 43, 44).
//! 4. At head dim 128, S is issued before dV and dK are waited for, so that products follow each other without a pause
//!    (`queues_scores`, notebook 59).
//! 5. `neg_lse_log2` is read before the ping-pong barrier, and δ before a wait, if registers allow (`read_early`,
//!    notebook 46).
//! 6. dS is written to the ring at the end of a step (`add_dq`), but published while the next step's products run
//!    (`pass_ds`, notebook 47).
//! 7. At head dim 128, plain attention without dropout has a second buffer for K, into which the next work tile's K is
//!    loaded early (notebook 83).
//! 8. The tail of a launch is split along queries ([`crate::attention::key_parts`], notebook 65), and some work tiles
//!    initialise dQ instead of accumulating ([`crate::attention::first_tiles`], notebook 73).

use core::f32::consts::LOG2_E;

use crate::arch::{BackwardWarpgroup, Pending};
use crate::attention::dropout::{Place, Rows};
use crate::attention::dropping::Dropping;
use crate::attention::features::Features;
use crate::attention::key_parts::{KeyPart, SplitPart};
use crate::attention::mask::Mask;
use crate::attention::masking::{ScorePlace, mask_transposed};
use crate::attention::query_blocks::{QueryBlocks, key_block};
use crate::ground::places::KvBlock;
use crate::ground::places::QueryBlock;
use crate::params::BackwardParams;
use crate::tuning;

/// dK and dV of a block of keys so far, and P, dS and the slot of the last query block, whose products dK and dV still
/// lack.
struct Mainloop<W: BackwardWarpgroup, const D8: usize, const M8: usize> {
    dk: W::Acc<D8>,
    dv: W::Acc<D8>,
    p: W::Operand<M8>,
    ds: W::Operand<M8>,
    slot: W::Slot,
}

/// Context of a step: the launch parameters, this warpgroup's first key, and the query blocks of the work tile.
pub(super) struct Step<'a, T, F: Features> {
    pub p: &'a BackwardParams<T, F>,
    pub first_key: u32,
    pub block_m: u32,
    pub blocks: &'a QueryBlocks<F::Mask>,
}

/// True if a consumer passes on the ping-pong barrier before it issues dP instead of after it. That pays if
/// exponentials take as long as products (notebook 44).
const fn passes_early(head_dim: u32) -> bool {
    head_dim <= tuning::PING_PONG_BEFORE_DP_MAX_HEAD_DIM
}

/// True if S of the next block is issued before dV and dK are waited for, so that products follow each other without a
/// pause (notebook 59). dP must still wait for them: it has room only in the registers of P and dS.
const fn queues_scores(head_dim: u32) -> bool {
    head_dim == tuning::QUEUED_SCORES_HEAD_DIM
}

impl<T, F: Features> Step<'_, T, F> {
    /// Takes a query block from S, in flight, to dS. Returns Pᵀ and dSᵀ as left operands, and writes dSᵀ to its ring
    /// for dQ.
    #[inline(always)]
    fn gradients<W: BackwardWarpgroup<Tensor = T>, const D8: usize, const M8: usize>(
        &self,
        wg: &mut W,
        at: &QueryBlock,
        slot: W::Slot,
        neg_lse_log2: &W::Columns<M8>,
        s: Pending<W::Acc<M8>>,
    ) -> (W::Operand<M8>, W::Operand<M8>) {
        let early = const { passes_early(8 * D8 as u32) };
        if early {
            wg.pass_ping_pong();
        }
        let dp = wg.v_do::<D8, M8>(slot); //                        dPᵀ = V·dOᵀ
        if !early {
            wg.pass_ping_pong();
        }
        let s = wg.wait::<1, M8>(s);
        let p = self.weights(wg, at, neg_lse_log2, s); //           Pᵀ = exp(scale·Sᵀ − LSE)
        let delta = read_early(wg, wg.delta(slot));
        wg.wait_ds(slot);
        let dp = wg.wait::<0, M8>(dp);
        let ds = self.score_gradients(wg, &p, dp, &delta); //       dSᵀ = Pᵀ∘(dPᵀ − delta)
        let ds = wg.pack(&ds);
        wg.add_dq(&ds, slot, at); //                                dQ = dQ + dS·K
        (F::Weights::pack_unmarked::<W, M8>(wg, &p), ds)
    }

    /// Turns Sᵀ into Pᵀ, masked. Sets the sign bit of dropped elements.
    #[inline(always)]
    pub fn weights<W: BackwardWarpgroup<Tensor = T>, const M8: usize>(
        &self,
        wg: &W,
        at: &QueryBlock,
        neg_lse_log2: &W::Columns<M8>,
        mut s: W::Acc<M8>,
    ) -> W::Acc<M8> {
        let (base, features, first_row) = (&self.p.base, &self.p.features, at.m_block * self.block_m);
        let place = ScorePlace { pair: at.pair, row: first_row, key: self.first_key };
        mask_transposed(wg, &base.shape.sequence(), features.mask(), &mut s, place);
        let c = base.scale * LOG2_E;
        wg.map_columns(&mut s, neg_lse_log2, |s, neg_lse_log2| W::exp2(W::fma(s, c, neg_lse_log2)));
        let keep = features.weights().keep::<W, M8>(wg, |_| Place {
            head: at.batch * base.shape.heads_q + at.head,
            row: self.first_key,
            column: first_row,
            rows: Rows::Keys,
        });
        F::Weights::mark::<W, M8>(wg, &mut s, &keep);
        wg.compute(&mut s);
        s
    }

    /// Returns dSᵀ = Pᵀ∘(dPᵀ − δ). With dropout, dPᵀ is 0 for dropped elements and multiplied by the dropout scale for
    /// the others.
    #[inline(always)]
    pub fn score_gradients<W: BackwardWarpgroup<Tensor = T>, const M8: usize>(
        &self,
        wg: &W,
        p: &W::Acc<M8>,
        mut dp: W::Acc<M8>,
        delta: &W::Columns<M8>,
    ) -> W::Acc<M8> {
        F::Weights::drop_marked::<W, M8>(wg, &mut dp, p);
        wg.map_columns(&mut dp, delta, |dp, delta| self.p.features.weights().less_delta::<W>(dp, delta));
        wg.zip_with(&mut dp, p, |dp, p| dp * F::Weights::unmarked(p));
        dp
    }
}

/// Reads `neg_lse_log2` or δ of a block's queries before a wait, if registers allow (up to 64 queries). While products
/// run, shared memory is slow to answer.
#[inline(always)]
fn read_early<W: BackwardWarpgroup, const M8: usize>(wg: &W, columns: W::Columns<M8>) -> W::Columns<M8> {
    if const { M8 <= 8 } { wg.read(columns) } else { columns }
}

impl<W: BackwardWarpgroup, const D8: usize, const M8: usize> Mainloop<W, D8, M8> {
    /// Processes the first query block that attends to a pair's keys, up to dS.
    #[inline(always)]
    fn new<F: Features>(wg: &mut W, step: &Step<W::Tensor, F>, at: &QueryBlock, dv: W::Acc<D8>) -> Self {
        let slot = wg.wait_q();
        wg.wait_do(slot);
        let neg_lse_log2 = read_early(wg, wg.neg_lse_log2(slot));
        wg.take_ping_pong();
        let s = wg.kq::<D8, M8>(slot); //                           Sᵀ = K·Qᵀ
        wg.wait_v();
        let (p, ds) = step.gradients::<W, D8, M8>(wg, at, slot, &neg_lse_log2, s);
        Mainloop { dk: wg.zeros::<D8>(), dv, p, ds, slot }
    }

    /// Adds the last query block's products to dV and dK, and processes the next query block up to dS.
    #[inline(always)]
    fn step<F: Features>(&mut self, wg: &mut W, step: &Step<W::Tensor, F>, at: &QueryBlock) {
        let slot = wg.wait_q();
        wg.wait_do(slot);
        let neg_lse_log2 = read_early(wg, wg.neg_lse_log2(slot));
        wg.take_ping_pong();
        let s = if const { queues_scores(8 * D8 as u32) } {
            let (dv, dk) = self.issue(wg);
            let s = wg.kq::<D8, M8>(slot); //                       Sᵀ = K·Qᵀ
            (self.dv, self.dk) = (wg.wait::<2, D8>(dv), wg.wait::<1, D8>(dk));
            wg.release(self.slot);
            s
        } else {
            self.finish(wg);
            wg.kq::<D8, M8>(slot)
        };
        (self.p, self.ds) = step.gradients::<W, D8, M8>(wg, at, slot, &neg_lse_log2, s);
        self.slot = slot;
    }

    /// Adds the last query block's products to dV and dK, and releases its slot.
    #[inline(always)]
    fn finish(&mut self, wg: &mut W) {
        let (dv, dk) = self.issue(wg);
        (self.dv, self.dk) = (wg.wait::<1, D8>(dv), wg.wait::<0, D8>(dk));
        wg.release(self.slot);
    }

    /// Issues the last query block's products for dV and dK, and publishes its dS in the ring.
    #[inline(always)]
    fn issue(&mut self, wg: &mut W) -> (Pending<W::Acc<D8>>, Pending<W::Acc<D8>>) {
        let dv = wg.p_do::<M8, D8>(self.dv, self.p, self.slot); //  dV = dV + Pᵀ·dO
        let dk = wg.ds_q::<M8, D8>(self.dk, self.ds, self.slot); // dK = dK + dSᵀ·Q
        wg.pass_ds(self.slot); // overlaps the products, because its fence is slow
        (dv, dk)
    }
}

/// Returns the query blocks that a part of a work tile visits, through the pair of `keys`.
#[inline(always)]
pub(super) fn blocks_met<T, F: Features>(
    p: &BackwardParams<T, F>,
    tile: (u32, u32),
    keys: &KvBlock,
    part: SplitPart,
) -> QueryBlocks<F::Mask> {
    let sharing = &p.base.sharing;
    let blocks = QueryBlocks::new(&p.base.shape.sequence(), *p.features.mask(), sharing.heads, tile, keys);
    blocks.part(sharing, part)
}

/// Returns the number of the last pair of Q and K.
#[inline(always)]
pub(super) fn last_pair<T, F: Features>(p: &BackwardParams<T, F>) -> u32 {
    if const { F::Mask::PAIRS == 1 } { 0 } else { p.base.last_pair }
}

/// Computes dK and dV of one consumer warpgroup's half of the keys, for every work tile of its CTA or part of one. A
/// work tile is a block of keys.
#[inline(always)]
pub fn consume<W: BackwardWarpgroup, F: Features, const D8: usize, const M8: usize>(
    wg: &mut W,
    p: &BackwardParams<W::Tensor, F>,
    block_n: u32,
    tiles: impl Iterator<Item = KeyPart>,
) {
    let base = &p.base;
    let block_m = 8 * M8 as u32;
    let elements = block_n * 8 * D8 as u32;
    let mut tiles = tiles;
    let Some(KeyPart { mut tile, mut part }) = tiles.next() else { return };
    // Visits the pairs one after the other, the last one first. Each has its own dK; all add to the same dV.
    let mut pair = last_pair(p);
    let mut dv = wg.zeros::<D8>();
    loop {
        let keys = KvBlock { pair, ..key_block(&base.shape, block_n, &tile) };
        let blocks = blocks_met(p, (block_m, block_n), &keys, part);
        if blocks.count() == 0 {
            wg.store_kv(&wg.zeros::<D8>(), base.dk_of(pair), &keys, &base.shape);
        } else {
            let first_key = keys.n_block * block_n + wg.first_key();
            let step = Step { p, first_key, block_m, blocks: &blocks };
            wg.wait_k();
            let mut at = blocks.first();
            let mut mainloop = Mainloop::<W, D8, M8>::new::<F>(wg, &step, &at, dv);
            for _ in 1..blocks.count() {
                at = blocks.after(&at);
                mainloop.step(wg, &step, &at);
            }
            mainloop.finish(wg);
            let mut dk;
            (dk, dv) = (mainloop.dk, mainloop.dv);
            wg.release_kv();
            wg.map_rows(&mut dk, wg.rows(base.scale), |dk, scale| dk * scale);
            match part.slot() {
                None => wg.store_kv(&dk, base.dk_of(pair), &keys, &base.shape),
                Some(slot) => wg.store_part(&dk, base.workspace.part(slot, 0, elements)),
            }
        }
        if pair > 0 {
            pair -= 1;
            continue;
        }
        p.features.weights().scale::<W, D8>(wg, &mut dv);
        match part.slot() {
            None => wg.store_kv(&dv, &base.dv, &keys, &base.shape),
            Some(slot) => wg.store_part(&dv, base.workspace.part(slot, 1, elements)),
        }
        let Some(next) = tiles.next() else { return };
        KeyPart { tile, part } = next;
        (pair, dv) = (last_pair(p), wg.zeros::<D8>());
    }
}
