//! Backward attention by recomputation: dQ, dK and dV without a stored score matrix (FlashAttention-2, arXiv 2307.08691,
//! algorithm 2; FlashAttention-3, arXiv 2407.08608, section 3).
//!
//! A CTA keeps one block of keys, with dK and dV in registers, and walks over the query blocks that see it. Scores are
//! recomputed transposed, so that Pᵀ and dSᵀ go from registers into dV and dK; dSᵀ also goes through shared memory into
//! dQ, which is added up in f32 in the workspace. The next block's scores are issued with the last products of this one.

use core::f32::consts::LOG2_E;

use crate::arch::{BackwardWarpgroup, Pending};
use crate::attention::dropout::{Dropping, Place, Rows};
use crate::attention::mask::{Mask, mask_transposed};
use crate::attention::pairs::Pairs;
use crate::attention::query_blocks::{QueryBlock, QueryBlocks, key_block, turn_blocks};
use crate::attention::scheduler::WorkTile;
use crate::params::{BackwardParams, BackwardSecond, Second};
use crate::pipeline::order::KvBlock;

/// The gradients of a block of keys, and the scores of the query block that comes next.
struct Mainloop<W: BackwardWarpgroup, const C8: usize, const M8: usize> {
    dk: W::Acc<C8>,
    dv: W::Acc<C8>,
    s: W::Acc<M8>,
    q: W::Slot,
}

/// What a step needs to know of where it is.
struct Step<'a, T, S: Second<T>, M, R> {
    p: &'a BackwardParams<T, S>,
    keys: KvBlock,
    first_key: u32,
    block_m: u32,
    block_n: u32,
    blocks: &'a QueryBlocks<M, S::Pairs>,
    dropping: R,
}

impl<W: BackwardWarpgroup, const C8: usize, const M8: usize> Mainloop<W, C8, M8> {
    /// The scores of the first query block that meets a pair's keys.
    #[inline(always)]
    fn new<const D8: usize>(wg: &mut W, dv: W::Acc<C8>) -> Self {
        let q = wg.wait_q();
        let s = wg.kq::<D8, M8>(q);
        let s = wg.wait::<0, M8>(s);
        Mainloop { dk: wg.zeros::<C8>(), dv, s, q }
    }

    /// Issues the scores of the next query block.
    #[inline(always)]
    fn scores<const D8: usize>(&mut self, wg: &mut W) -> Pending<W::Acc<M8>> {
        self.q = wg.wait_q();
        wg.kq::<D8, M8>(self.q)
    }

    /// Whether the next scores fit beside dQ: registers of dK and dV, dQ, S and dS.
    const fn ahead<const Q8: usize>() -> bool {
        8 * C8 + 4 * Q8 + 6 * M8 <= 208
    }

    /// One query block. But for the last, the scores of the next are issued beside its last products.
    #[inline(always)]
    fn step<const LAST: bool, const D8: usize, const Q8: usize, M: Mask, S: Second<W::Tensor>, R: Dropping>(
        &mut self,
        wg: &mut W,
        step: &Step<W::Tensor, S, M, R>,
        at: &QueryBlock,
    ) {
        let Step { p, keys, first_key, block_m, block_n, blocks, dropping } = step;
        let (mut s, q, c) = (self.s, self.q, p.scale * LOG2_E);
        let d_o = wg.wait_do();
        let dp = wg.v_do::<D8, M8>(d_o); //                             dPᵀ = V·dOᵀ
        if !blocks.is_full(at) {
            let (pairs, first_row) = (p.second.pairs(&p.shape), at.m_block * block_m);
            mask_transposed::<W, M, S::Pairs, M8>(wg, &p.shape, pairs, at.pair, &mut s, *first_key, first_row);
        }
        wg.map_lse(&mut s, q, |s, lse| W::exp2(W::fma(s, c, -lse))); // Sᵀ → Pᵀ
        let keep = dropping.keep::<W, M8>(wg, |_| Place {
            head: at.batch * p.shape.heads_q + at.head,
            row: *first_key,
            column: at.m_block * block_m,
            rows: Rows::Keys,
        });
        R::mark::<W, M8>(wg, &mut s, &keep);
        let mut dp = wg.wait::<0, M8>(dp);
        R::drop_marked::<W, M8>(wg, &mut dp, &s);
        wg.map_delta(&mut dp, d_o, |dp, delta| dropping.less_delta::<W>(dp, delta));
        wg.zip_with(&mut dp, &s, |dp, p| dp * R::unmarked(p)); //       dSᵀ = Pᵀ∘(dPᵀ − delta)
        let (p_t, ds) = (R::pack_unmarked::<W, M8>(wg, &s), wg.pack(&dp));
        let dv = wg.p_do::<M8, C8>(self.dv, p_t, d_o); //               dV = dV + Pᵀ·dO
        wg.share(&ds);
        let ahead = const { Self::ahead::<Q8>() };
        let dq;
        if ahead {
            dq = wg.ds_k::<M8, Q8>(); //                                dQ = dS·K
            self.dv = wg.wait::<1, C8>(dv);
        } else {
            self.dv = wg.wait::<0, C8>(dv);
            dq = wg.ds_k::<M8, Q8>();
        }
        wg.release_do(d_o);
        let dk = wg.ds_q::<M8, C8>(self.dk, ds, q); //                  dK = dK + dSᵀ·Q
        let mut next = None;
        if ahead && !LAST {
            next = Some(self.scores::<D8>(wg)); //                      Sᵀ = K·Qᵀ, of the next query block
        }
        let turn_blocks = const { turn_blocks(8 * D8 as u32) };
        let turn = blocks.turn(&p.shape, at, keys.n_block, turn_blocks, (*block_m, *block_n));
        wg.await_turn(&p.workspace, &p.shape, at, turn);
        let dq = if ahead && !LAST { wg.wait_dq::<2, Q8>(dq) } else { wg.wait_dq::<1, Q8>(dq) };
        wg.add_dq(&dq, &p.workspace, &p.shape, at);
        if !ahead && !LAST {
            next = Some(self.scores::<D8>(wg));
        }
        self.dk = if LAST { wg.wait::<0, C8>(dk) } else { wg.wait::<1, C8>(dk) };
        wg.release_q(q);
        if let Some(next) = next {
            self.s = wg.wait::<0, M8>(next);
        }
    }
}

/// What one consumer warpgroup of a CTA does with its work tiles, blocks of keys. dQ has 8·Q8 columns a warpgroup, dK and
/// dV 8·C8.
#[inline(always)]
pub fn consume<
    W: BackwardWarpgroup,
    M: Mask,
    S: BackwardSecond<W::Tensor>,
    R: Dropping,
    const D8: usize,
    const C8: usize,
    const M8: usize,
    const Q8: usize,
>(
    wg: &mut W,
    p: &BackwardParams<W::Tensor, S>,
    block_n: u32,
    tiles: impl Iterator<Item = WorkTile>,
    dropping: R,
) {
    let block_m = 8 * M8 as u32;
    let pairs = p.second.pairs(&p.shape);
    let dk_of = |pair| match p.second.dk() {
        Some(second) if pair == 1 => second,
        _ => p.dk,
    };
    let mut tiles = tiles;
    let Some(mut tile) = tiles.next() else { return };
    // dK of one pair after the other, the last one first, and with all of them the same dV.
    let mut pair = p.second.last();
    let mut dv = wg.zeros::<C8>();
    loop {
        let keys = KvBlock { pair, ..key_block(&p.shape, block_n, &tile) };
        let blocks = QueryBlocks::<M, S::Pairs>::new(&p.shape, pairs, block_m, block_n, &keys);
        if S::Pairs::COUNT > 1 && blocks.count() == 0 {
            wg.store_kv(&wg.zeros::<C8>(), &dk_of(pair), &keys, &p.shape);
        } else {
            let first_key = keys.n_block * block_n + wg.first_key();
            let step = Step { p, keys, first_key, block_m, block_n, blocks: &blocks, dropping };
            wg.wait_kv();
            let mut mainloop = Mainloop::<W, C8, M8>::new::<D8>(wg, dv);
            let mut at = blocks.first();
            for _ in 1..blocks.count() {
                mainloop.step::<false, D8, Q8, M, S, R>(wg, &step, &at);
                at = blocks.after(&at);
            }
            mainloop.step::<true, D8, Q8, M, S, R>(wg, &step, &at);
            wg.release_kv();
            let scale = wg.rows(p.scale);
            wg.map_rows(&mut mainloop.dk, scale, |dk, scale| dk * scale);
            wg.store_kv(&mainloop.dk, &dk_of(pair), &keys, &p.shape);
            dv = mainloop.dv;
        }
        if pair > 0 {
            pair -= 1;
            continue;
        }
        dropping.scale::<W, C8>(wg, &mut dv);
        wg.store_kv(&dv, &p.dv, &keys, &p.shape);
        let Some(next) = tiles.next() else { return };
        (tile, pair, dv) = (next, p.second.last(), wg.zeros::<C8>());
    }
}
