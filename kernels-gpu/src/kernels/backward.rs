//! Backward attention by recomputation: dQ, dK and dV without a stored score matrix (FlashAttention-2, arXiv
//! 2307.08691, algorithm 2; FlashAttention-3, arXiv 2407.08608, section 3).
//!
//! A CTA keeps one block of keys, K and V in shared memory, dK and dV in registers. Each of two consumer warpgroups has
//! half of the keys (for head dim 256 see [`super::backward_gradients`]). Let c = unit·log₂e, δ = rowsum(dO∘O) − dLSE
//! and neg_lse_log2 = −LSE·log₂e. The CTA computes, transposed:
//!
//! ```text
//! for each work tile of the CTA, a block of keys of one key head:
//!     dK = 0, dV = 0
//!     for each query block i that attends to it, of all query heads of the group:
//!         Sᵀ = score(K·Qᵢᵀ), −∞ for masked keys
//!         Pᵀ = 2^(c·Sᵀ + neg_lse_log2)           = exp(S − LSE)
//!         dPᵀ = V·dOᵢᵀ
//!         dSᵀ = Pᵀ∘(dPᵀ − δ)∘score′               score′ is 1 without softcap
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
use crate::attention::key_parts::KeyPart;
use crate::attention::mask::Mask;
use crate::attention::masking::{ScorePlace, mask_transposed};
use crate::attention::query_blocks::{QueryBlocks, key_block};
use crate::attention::score::{Distances, Score};
use crate::ground::places::KvBlock;
use crate::ground::places::QueryBlock;
use crate::ground::tensor::Strided;
use crate::params::{BackwardBase, BackwardParams};
use crate::tuning;

/// Record of which elements of P are kept.
type Keep<W, F, const M8: usize> = <<F as Features>::Weights as Dropping>::Keep<W, M8>;

/// Gradients that a consumer warpgroup accumulates over the query blocks of a block of keys: dK, dV, or both.
pub trait Accumulate<W: BackwardWarpgroup, F: Features, const D8: usize, const M8: usize>: Sized {
    /// True if dK is among them.
    const HAS_DK: bool;
    /// True if dV is among them.
    const HAS_DV: bool;

    /// Processes the first query block that attends to a pair's keys, but for its products with the gradients. K has
    /// arrived. `dv` comes from the pair before.
    fn start(wg: &mut W, keys: &KeyTile<W::Tensor, F>, at: &QueryBlock, dv: W::Acc<D8>) -> Self;
    /// Adds the last query block's products to the gradients, and processes the next query block but for its products.
    fn step(&mut self, wg: &mut W, keys: &KeyTile<W::Tensor, F>, at: &QueryBlock);
    /// Adds the last query block's products to the gradients.
    fn finish(self, wg: &mut W) -> Gradients<W, D8>;
}

/// Gradients of a block of keys. One that a consumer does not accumulate is 0 and is never used.
pub struct Gradients<W: BackwardWarpgroup, const D8: usize> {
    pub dk: W::Acc<D8>,
    pub dv: W::Acc<D8>,
}

/// Computes the gradients `A` of one consumer warpgroup's keys, for every work tile of its CTA or part of one. A work
/// tile is a block of keys.
#[inline(always)]
pub fn consume<A, W, F, const D8: usize, const M8: usize>(
    wg: &mut W,
    p: &BackwardParams<W::Tensor, F>,
    block_n: u32,
    tiles: impl Iterator<Item = KeyPart>,
) where
    A: Accumulate<W, F, D8, M8>,
    W: BackwardWarpgroup,
    F: Features,
{
    let base = &p.base;
    let elements = block_n * 8 * D8 as u32;
    let last_pair = if const { F::Mask::PAIRS == 1 } { 0 } else { base.last_pair };
    let mut tiles = tiles;
    let Some(KeyPart { mut tile, mut part }) = tiles.next() else { return };
    // Visits the pairs one after the other, the last one first. Each has its own dK; all add to the same dV. It is one
    // loop, because nested ones take more registers (measured, cause unknown).
    let mut pair = last_pair;
    let mut dv = wg.zeros::<D8>();
    loop {
        let keys = KeyTile::new(wg, p, (8 * M8 as u32, block_n), &KeyPart { tile, part }, pair);
        if keys.blocks.count() > 0 {
            let mut dk;
            Gradients { dk, dv } = keys.accumulate::<A, W, D8, M8>(wg, dv);
            if A::HAS_DK {
                wg.map_rows(&mut dk, wg.rows(base.scale), |dk, scale| dk * scale);
                let to = part.slot().map(|slot| base.workspace.part(slot, 0, elements));
                store(wg, &dk, base.dk_of(pair), to, &keys.keys, base);
            }
        } else if A::HAS_DK {
            store(wg, &wg.zeros::<D8>(), base.dk_of(pair), None, &keys.keys, base);
        }
        if pair > 0 {
            pair -= 1;
            continue;
        }
        if A::HAS_DV {
            p.features.weights().scale::<W, D8>(wg, &mut dv);
            let to = part.slot().map(|slot| base.workspace.part(slot, 1, elements));
            store(wg, &dv, &base.dv, to, &keys.keys, base);
        }
        let Some(next) = tiles.next() else { return };
        KeyPart { tile, part } = next;
        (pair, dv) = (last_pair, wg.zeros::<D8>());
    }
}

/// Stores a gradient of a work tile in its tensor, or that of a part of a work tile in the workspace at `part`.
#[inline(always)]
fn store<W: BackwardWarpgroup, const D8: usize>(
    wg: &mut W,
    x: &W::Acc<D8>,
    to: &Strided,
    part: Option<u64>,
    keys: &KvBlock,
    base: &BackwardBase<W::Tensor>,
) {
    match part {
        None => wg.store_kv(x, to, keys, &base.item(keys.batch).k, base.shape.head_dim),
        Some(address) => wg.store_part(x, address),
    }
}

/// A consumer warpgroup's keys of a work tile, and the query blocks that attend to them through one pair.
pub struct KeyTile<'a, T, F: Features> {
    p: &'a BackwardParams<T, F>,
    keys: KvBlock,
    /// First of this warpgroup's keys.
    first_key: u32,
    block_m: u32,
    blocks: QueryBlocks<F::Mask>,
}

impl<'a, T, F: Features> KeyTile<'a, T, F> {
    /// Makes the tile of `wg` for one pair. `tile` is the number of queries and that of keys of a block.
    #[inline(always)]
    fn new<W: BackwardWarpgroup<Tensor = T>>(
        wg: &W,
        p: &'a BackwardParams<T, F>,
        (block_m, block_n): (u32, u32),
        at: &KeyPart,
        pair: u32,
    ) -> Self {
        let (of, sharing) = (p.base.item(at.tile.batch).sequence(), &p.base.sharing);
        let keys = KvBlock { pair, ..key_block(&of, block_n, &at.tile) };
        let blocks = QueryBlocks::new(&of, *p.features.mask(), sharing.heads, (block_m, block_n), &keys);
        let blocks = blocks.part(sharing, at.part);
        KeyTile { p, keys, first_key: keys.n_block * block_n + wg.first_key(), block_m, blocks }
    }

    /// Computes the gradients `A` of the keys: the loop over query blocks.
    #[inline(always)]
    fn accumulate<A, W, const D8: usize, const M8: usize>(&self, wg: &mut W, dv: W::Acc<D8>) -> Gradients<W, D8>
    where
        A: Accumulate<W, F, D8, M8>,
        W: BackwardWarpgroup<Tensor = T>,
    {
        wg.wait_k();
        let mut at = self.blocks.first();
        let mut gradients = A::start(wg, self, &at, dv);
        for _ in 1..self.blocks.count() {
            at = self.blocks.after(&at);
            gradients.step(wg, self, &at);
        }
        let gradients = gradients.finish(wg);
        wg.release_kv();
        gradients
    }

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
        let mut x = wg.wait::<1, M8>(s);
        // With a curve, its derivative must meet dP before scores turn into P, because there are no registers for all.
        let curved = self.is_curved();
        self.p.features.score().curve(wg, &mut x);
        if !curved {
            self.weights(wg, at, neg_lse_log2, &mut x); //          Pᵀ = exp(Sᵀ − LSE)
        }
        let delta = self.read_early(wg, wg.delta(slot));
        wg.wait_ds(slot);
        let mut ds = wg.wait::<0, M8>(dp);
        if curved {
            let keep = self.keep(wg, at);
            F::Weights::drop_scores::<W, M8>(wg, &mut ds, &keep);
            self.less_delta(wg, &mut ds, &delta);
            // Fences keep ptxas from interleaving the four steps, which takes more registers than there are.
            wg.compute(&mut ds);
            wg.zip_with(&mut ds, &x, |ds, x| ds * F::Score::derivative::<W>(x));
            wg.compute(&mut ds);
            self.weights(wg, at, neg_lse_log2, &mut x);
        } else {
            F::Weights::drop_marked::<W, M8>(wg, &mut ds, &x);
            self.less_delta(wg, &mut ds, &delta);
        }
        wg.zip_with(&mut ds, &x, |ds, p| ds * F::Weights::unmarked(p)); // dSᵀ = Pᵀ∘(dPᵀ − delta)∘score′
        let ds = wg.pack(&ds);
        wg.add_dq(&ds, slot, at); //                                dQ = dQ + dS·K
        (F::Weights::pack_unmarked::<W, M8>(wg, &x), ds)
    }

    /// Turns Sᵀ, on which the curve has worked, into Pᵀ, masked. Sets the sign bit of dropped elements.
    #[inline(always)]
    pub fn weights<W: BackwardWarpgroup<Tensor = T>, const M8: usize>(
        &self,
        wg: &W,
        at: &QueryBlock,
        neg_lse_log2: &W::Columns<M8>,
        s: &mut W::Acc<M8>,
    ) {
        let (base, features, first_row) = (&self.p.base, &self.p.features, at.m_block * self.block_m);
        let place = ScorePlace { pair: at.pair, row: first_row, key: self.first_key };
        let (of, score) = (base.item(at.batch).sequence(), features.score());
        let of_head = score.of_head(wg, at.batch, at.head);
        let distances = Distances::of_keys(&of, features.mask(), first_row, self.first_key, 8 * M8 as u32);
        if let Some(missing) = score.bias(wg, s, of_head, &distances) {
            wg.map_rows(s, missing, |s, missing| s + missing);
        }
        // For a band, masking itself finds out whether the block is full.
        if const { F::Mask::IS_BAND } || !self.blocks.is_full(at) {
            mask_transposed(wg, &of, features.mask(), s, place);
        }
        let c = score.unit() * LOG2_E;
        wg.map_columns(s, neg_lse_log2, |s, neg_lse_log2| W::exp2(W::fma(s, c, neg_lse_log2)));
        F::Weights::mark::<W, M8>(wg, s, &self.keep(wg, at));
        wg.compute(s);
    }

    /// Decides which elements of a block of P are kept.
    #[inline(always)]
    fn keep<W: BackwardWarpgroup<Tensor = T>, const M8: usize>(&self, wg: &W, at: &QueryBlock) -> Keep<W, F, M8> {
        self.p.features.weights().keep::<W, M8>(wg, |_| Place {
            head: at.batch * self.p.base.shape.heads_q + at.head,
            row: self.first_key,
            column: at.m_block * self.block_m,
            rows: Rows::Keys,
        })
    }

    /// Turns dPᵀ into dPᵀ − δ. With dropout, dPᵀ is multiplied by the dropout scale.
    #[inline(always)]
    fn less_delta<W: BackwardWarpgroup<Tensor = T>, const M8: usize>(
        &self,
        wg: &W,
        dp: &mut W::Acc<M8>,
        delta: &W::Columns<M8>,
    ) {
        wg.map_columns(dp, delta, |dp, delta| self.p.features.weights().less_delta::<W>(dp, delta));
    }

    /// Returns dSᵀ = Pᵀ∘(dPᵀ − δ). With dropout, dPᵀ is 0 for dropped elements.
    #[inline(always)]
    pub fn score_gradients<W: BackwardWarpgroup<Tensor = T>, const M8: usize>(
        &self,
        wg: &W,
        p: &W::Acc<M8>,
        mut dp: W::Acc<M8>,
        delta: &W::Columns<M8>,
    ) -> W::Acc<M8> {
        F::Weights::drop_marked::<W, M8>(wg, &mut dp, p);
        self.less_delta(wg, &mut dp, delta);
        wg.zip_with(&mut dp, p, |dp, p| dp * F::Weights::unmarked(p));
        dp
    }

    /// True if scores have a curve.
    #[inline(always)]
    pub fn is_curved(&self) -> bool {
        self.p.features.score().is_curved()
    }

    /// Reads `neg_lse_log2` or δ of a block's queries before a wait, if registers allow: up to 64 queries, and without
    /// a curve. While products run, shared memory is slow to answer.
    #[inline(always)]
    fn read_early<W: BackwardWarpgroup<Tensor = T>, const M8: usize>(
        &self,
        wg: &W,
        columns: W::Columns<M8>,
    ) -> W::Columns<M8> {
        if const { M8 > 8 } || self.is_curved() { columns } else { wg.read(columns) }
    }

    /// Applies the curve of scores to Sᵀ. Returns its derivative, if there is a curve.
    #[inline(always)]
    pub fn curve<W: BackwardWarpgroup<Tensor = T>, const M8: usize>(
        &self,
        wg: &W,
        s: &mut W::Acc<M8>,
    ) -> Option<W::Acc<M8>> {
        if !self.is_curved() {
            return None;
        }
        self.p.features.score().curve(wg, s);
        wg.compute(s);
        let mut derivative = *s;
        wg.map_rows(&mut derivative, wg.rows(0.0), |x, _| F::Score::derivative::<W>(x));
        wg.compute(&mut derivative);
        Some(derivative)
    }
}

/// dK and dV of a block of keys so far, and P, dS and the slot of the last query block, whose products dK and dV still
/// lack.
pub struct Both<W: BackwardWarpgroup, const D8: usize, const M8: usize> {
    dk: W::Acc<D8>,
    dv: W::Acc<D8>,
    p: W::Operand<M8>,
    ds: W::Operand<M8>,
    slot: W::Slot,
}

impl<W: BackwardWarpgroup, F: Features, const D8: usize, const M8: usize> Accumulate<W, F, D8, M8> for Both<W, D8, M8> {
    const HAS_DK: bool = true;
    const HAS_DV: bool = true;

    #[inline(always)]
    fn start(wg: &mut W, keys: &KeyTile<W::Tensor, F>, at: &QueryBlock, dv: W::Acc<D8>) -> Self {
        let slot = wg.wait_q();
        wg.wait_do(slot);
        let neg_lse_log2 = keys.read_early(wg, wg.neg_lse_log2(slot));
        wg.take_ping_pong();
        let s = wg.kq::<D8, M8>(slot); //                           Sᵀ = K·Qᵀ
        wg.wait_v();
        let (p, ds) = keys.gradients::<W, D8, M8>(wg, at, slot, &neg_lse_log2, s);
        Both { dk: wg.zeros::<D8>(), dv, p, ds, slot }
    }

    #[inline(always)]
    fn step(&mut self, wg: &mut W, keys: &KeyTile<W::Tensor, F>, at: &QueryBlock) {
        let slot = wg.wait_q();
        wg.wait_do(slot);
        let neg_lse_log2 = keys.read_early(wg, wg.neg_lse_log2(slot));
        wg.take_ping_pong();
        let s = if const { queues_scores(8 * D8 as u32) } {
            let (dv, dk) = self.issue(wg);
            let s = wg.kq::<D8, M8>(slot); //                       Sᵀ = K·Qᵀ
            (self.dv, self.dk) = (wg.wait::<2, D8>(dv), wg.wait::<1, D8>(dk));
            wg.release(self.slot);
            s
        } else {
            self.flush(wg);
            wg.kq::<D8, M8>(slot)
        };
        (self.p, self.ds) = keys.gradients::<W, D8, M8>(wg, at, slot, &neg_lse_log2, s);
        self.slot = slot;
    }

    #[inline(always)]
    fn finish(mut self, wg: &mut W) -> Gradients<W, D8> {
        self.flush(wg);
        Gradients { dk: self.dk, dv: self.dv }
    }
}

impl<W: BackwardWarpgroup, const D8: usize, const M8: usize> Both<W, D8, M8> {
    /// Adds the last query block's products to dV and dK, and releases its slot.
    #[inline(always)]
    fn flush(&mut self, wg: &mut W) {
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
