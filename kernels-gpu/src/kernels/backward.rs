//! Backward attention by recomputation: dQ, dK and dV without a stored score matrix (FlashAttention-2, arXiv
//! 2307.08691, algorithm 2; FlashAttention-3, arXiv 2407.08608, section 3).
//!
//! A CTA keeps one block of keys, with dK and dV in registers, and walks over the query blocks that see it. Scores are
//! recomputed transposed, so that Pᵀ and dSᵀ go from registers into dV and dK. dSᵀ also goes through shared memory to a
//! warpgroup that does nothing but multiply it by K, and adds up dQ in f32 in the workspace; so the two that have the
//! keys never wait for each other, and one's exponentials run beside the other's products.

use core::f32::consts::LOG2_E;

use crate::arch::{BackwardWarpgroup, Pending};
use crate::attention::dropout::{Place, Rows};
use crate::attention::dropping::Dropping;
use crate::attention::key_parts::{KeyPart, Part};
use crate::attention::mask::Mask;
use crate::attention::masking::mask_transposed;
use crate::attention::pairs::Pairs;
use crate::attention::query_blocks::{QueryBlocks, key_block};
use crate::ground::places::KvBlock;
use crate::ground::places::QueryBlock;
use crate::ground::tensor::Strided;
use crate::params::{BackwardParams, BackwardSecond, Second};

/// The gradients of a block of keys, and what of the query block last met is still to go into them.
struct Mainloop<W: BackwardWarpgroup, const D8: usize, const M8: usize> {
    dk: W::Acc<D8>,
    dv: W::Acc<D8>,
    p: W::Operand<M8>,
    ds: W::Operand<M8>,
    slot: W::Slot,
}

/// What a step needs to know of where it is.
pub(super) struct Step<'a, T, S: Second<T>, M, R> {
    pub p: &'a BackwardParams<T, S>,
    pub first_key: u32,
    pub block_m: u32,
    pub blocks: &'a QueryBlocks<M, S::Pairs>,
    pub dropping: R,
}

/// Whether the other warpgroup may issue beside dP already: where exponentials take as long as products.
const fn passes_early(head_dim: u32) -> bool {
    head_dim <= 64
}

/// Whether S is issued before dV and dK are there, so that products follow each other without a pause. dP has room only
/// where P and dS were.
const fn queues_scores(head_dim: u32) -> bool {
    head_dim == 128
}

impl<T: Copy, S: Second<T>, M: Mask, R: Dropping> Step<'_, T, S, M, R> {
    /// A query block from its scores, in flight, to dS: Pᵀ and dSᵀ.
    #[inline(always)]
    fn gradients<W: BackwardWarpgroup<Tensor = T>, const D8: usize, const M8: usize>(
        &self,
        wg: &mut W,
        at: &QueryBlock,
        slot: W::Slot,
        offsets: &W::Columns<M8>,
        s: Pending<W::Acc<M8>>,
    ) -> (W::Operand<M8>, W::Operand<M8>) {
        let early = const { passes_early(8 * D8 as u32) };
        if early {
            wg.pass_turn();
        }
        let dp = wg.v_do::<D8, M8>(slot); //                        dPᵀ = V·dOᵀ
        if !early {
            wg.pass_turn();
        }
        let s = wg.wait::<1, M8>(s);
        let p = self.weights(wg, at, offsets, s); //                Pᵀ = exp(scale·Sᵀ − LSE)
        let delta = read_early(wg, wg.delta(slot));
        wg.wait_ds(slot);
        let dp = wg.wait::<0, M8>(dp);
        let ds = self.score_gradients(wg, &p, dp, &delta); //       dSᵀ = Pᵀ∘(dPᵀ − delta)
        let ds = wg.pack(&ds);
        wg.add_dq(&ds, slot, at); //                                dQ = dQ + dS·K
        (R::pack_unmarked::<W, M8>(wg, &p), ds)
    }

    /// Sᵀ → Pᵀ; weights that are dropped are marked.
    #[inline(always)]
    pub fn weights<W: BackwardWarpgroup<Tensor = T>, const M8: usize>(
        &self,
        wg: &W,
        at: &QueryBlock,
        offsets: &W::Columns<M8>,
        mut s: W::Acc<M8>,
    ) -> W::Acc<M8> {
        let (p, first_row) = (self.p, at.m_block * self.block_m);
        if !self.blocks.is_full(at) {
            let pairs = p.second.pairs(&p.shape);
            mask_transposed::<W, M, S::Pairs, M8>(wg, &p.shape, pairs, at.pair, &mut s, self.first_key, first_row);
        }
        let c = p.scale * LOG2_E;
        wg.map_columns(&mut s, offsets, |s, offset| W::exp2(W::fma(s, c, offset)));
        let keep = self.dropping.keep::<W, M8>(wg, |_| Place {
            head: at.batch * p.shape.heads_q + at.head,
            row: self.first_key,
            column: first_row,
            rows: Rows::Keys,
        });
        R::mark::<W, M8>(wg, &mut s, &keep);
        wg.compute(&mut s);
        s
    }

    /// dSᵀ = Pᵀ∘(dPᵀ − delta).
    #[inline(always)]
    pub fn score_gradients<W: BackwardWarpgroup<Tensor = T>, const M8: usize>(
        &self,
        wg: &W,
        p: &W::Acc<M8>,
        mut dp: W::Acc<M8>,
        delta: &W::Columns<M8>,
    ) -> W::Acc<M8> {
        R::drop_marked::<W, M8>(wg, &mut dp, p);
        wg.map_columns(&mut dp, delta, |dp, delta| self.dropping.less_delta::<W>(dp, delta));
        wg.zip_with(&mut dp, p, |dp, p| dp * R::unmarked(p));
        dp
    }
}

/// What columns need, read before a wait where registers allow: beside products, shared memory is slow to answer.
#[inline(always)]
fn read_early<W: BackwardWarpgroup, const M8: usize>(wg: &W, columns: W::Columns<M8>) -> W::Columns<M8> {
    if const { M8 <= 8 } { wg.read(columns) } else { columns }
}

impl<W: BackwardWarpgroup, const D8: usize, const M8: usize> Mainloop<W, D8, M8> {
    /// The first query block that meets a pair's keys, up to dS.
    #[inline(always)]
    fn new<M: Mask, S: Second<W::Tensor>, R: Dropping>(
        wg: &mut W,
        step: &Step<W::Tensor, S, M, R>,
        at: &QueryBlock,
        dv: W::Acc<D8>,
    ) -> Self {
        let slot = wg.wait_q();
        wg.wait_do(slot);
        let offsets = read_early(wg, wg.offsets(slot));
        wg.take_turn();
        let s = wg.kq::<D8, M8>(slot); //                           Sᵀ = K·Qᵀ
        wg.wait_v();
        let (p, ds) = step.gradients::<W, D8, M8>(wg, at, slot, &offsets, s);
        Mainloop { dk: wg.zeros::<D8>(), dv, p, ds, slot }
    }

    /// dV and dK of the query block last met, and the next one up to dS.
    #[inline(always)]
    fn step<M: Mask, S: Second<W::Tensor>, R: Dropping>(
        &mut self,
        wg: &mut W,
        step: &Step<W::Tensor, S, M, R>,
        at: &QueryBlock,
    ) {
        let slot = wg.wait_q();
        wg.wait_do(slot);
        let offsets = read_early(wg, wg.offsets(slot));
        wg.take_turn();
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
        (self.p, self.ds) = step.gradients::<W, D8, M8>(wg, at, slot, &offsets, s);
        self.slot = slot;
    }

    /// dV and dK of the query block last met.
    #[inline(always)]
    fn finish(&mut self, wg: &mut W) {
        let (dv, dk) = self.issue(wg);
        (self.dv, self.dk) = (wg.wait::<1, D8>(dv), wg.wait::<0, D8>(dk));
        wg.release(self.slot);
    }

    /// The same, in flight.
    #[inline(always)]
    fn issue(&mut self, wg: &mut W) -> (Pending<W::Acc<D8>>, Pending<W::Acc<D8>>) {
        let dv = wg.p_do::<M8, D8>(self.dv, self.p, self.slot); //  dV = dV + Pᵀ·dO
        let dk = wg.ds_q::<M8, D8>(self.dk, self.ds, self.slot); // dK = dK + dSᵀ·Q
        wg.pass_ds(self.slot); // beside the products, because memory is slow to take it
        (dv, dk)
    }
}

/// The query blocks that a part of a work tile meets, through the pair of `keys`.
#[inline(always)]
pub(super) fn blocks_met<T, S: BackwardSecond<T>, M: Mask>(
    p: &BackwardParams<T, S>,
    (block_m, block_n): (u32, u32),
    keys: &KvBlock,
    part: Part,
) -> QueryBlocks<M, S::Pairs> {
    let blocks = QueryBlocks::new(&p.shape, p.second.pairs(&p.shape), block_m, block_n, keys);
    blocks.end_of(&p.sharing).part(&p.sharing, part)
}

/// Where dK of a pair goes.
#[inline(always)]
pub(super) fn dk_of<T, S: BackwardSecond<T>>(p: &BackwardParams<T, S>, pair: u32) -> Strided {
    match p.second.dk() {
        Some(second) if pair == 1 => second,
        _ => p.dk,
    }
}

/// What one consumer warpgroup of a CTA does with its work tiles, blocks of keys, or parts of them; it has half of the
/// keys.
#[inline(always)]
pub fn consume<
    W: BackwardWarpgroup,
    M: Mask,
    S: BackwardSecond<W::Tensor>,
    R: Dropping,
    const D8: usize,
    const M8: usize,
>(
    wg: &mut W,
    p: &BackwardParams<W::Tensor, S>,
    block_n: u32,
    tiles: impl Iterator<Item = KeyPart>,
    dropping: R,
) {
    let block_m = 8 * M8 as u32;
    let elements = block_n * 8 * D8 as u32;
    let mut tiles = tiles;
    let Some(KeyPart { mut tile, mut part }) = tiles.next() else { return };
    // dK of one pair after the other, the last one first, and with all of them the same dV.
    let mut pair = p.second.last();
    let mut dv = wg.zeros::<D8>();
    loop {
        let keys = KvBlock { pair, ..key_block(&p.shape, block_n, &tile) };
        let blocks = blocks_met::<_, _, M>(p, (block_m, block_n), &keys, part);
        if S::Pairs::COUNT > 1 && blocks.count() == 0 {
            wg.store_kv(&wg.zeros::<D8>(), &dk_of(p, pair), &keys, &p.shape);
        } else {
            let first_key = keys.n_block * block_n + wg.first_key();
            let step = Step { p, first_key, block_m, blocks: &blocks, dropping };
            wg.wait_k();
            let mut at = blocks.first();
            let mut mainloop = Mainloop::<W, D8, M8>::new::<M, S, R>(wg, &step, &at, dv);
            for _ in 1..blocks.count() {
                at = blocks.after(&at);
                mainloop.step(wg, &step, &at);
            }
            mainloop.finish(wg);
            let mut dk;
            (dk, dv) = (mainloop.dk, mainloop.dv);
            wg.release_kv();
            wg.map_rows(&mut dk, wg.rows(p.scale), |dk, scale| dk * scale);
            match part.slot() {
                None => wg.store_kv(&dk, &dk_of(p, pair), &keys, &p.shape),
                Some(slot) => wg.store_part(&dk, p.workspace.part(slot, 0, elements)),
            }
        }
        if pair > 0 {
            pair -= 1;
            continue;
        }
        dropping.scale::<W, D8>(wg, &mut dv);
        match part.slot() {
            None => wg.store_kv(&dv, &p.dv, &keys, &p.shape),
            Some(slot) => wg.store_part(&dv, p.workspace.part(slot, 1, elements)),
        }
        let Some(next) = tiles.next() else { return };
        KeyPart { tile, part } = next;
        (pair, dv) = (p.second.last(), wg.zeros::<D8>());
    }
}
