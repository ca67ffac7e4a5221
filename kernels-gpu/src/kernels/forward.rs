//! Forward attention, O = softmax(scale·Q·Kᵀ + mask)·V and its LSE (FlashAttention-3, arXiv 2407.08608, algorithm 2).
//!
//! A consumer warpgroup owns 64 query rows. In each step the scores of the next block are issued before the output of
//! the last one is waited for, so that the tensor cores work while this warpgroup, or the other, computes a softmax.
//! Where a work tile ends, the next block is the first of the next work tile, and the pipeline never runs empty.

use crate::arch::{ForwardWarpgroup, Pending};
use crate::attention::block_info::{Visit, Visits};
use crate::attention::dropout::{Place, Rows};
use crate::attention::dropping::Dropping;
use crate::attention::epilogue;
use crate::attention::mask::Mask;
use crate::attention::masking::mask_scores;
use crate::attention::pairs::Pairs;
use crate::attention::softmax::Softmax;
use crate::ground::places::WorkTile;
use crate::params::{ForwardParams, Second};

/// What the mainloop carries from block to block: O, the last block's P, and m and l.
struct Mainloop<W: ForwardWarpgroup, R: Dropping, const D8: usize, const N8: usize> {
    o: W::Acc<D8>,
    p: W::Operand<N8>,
    softmax: Softmax<W>,
    dropping: R,
}

/// One block's scores and the output of the block before, both in flight, with the slots that they read.
struct InFlight<W: ForwardWarpgroup, const D8: usize, const N8: usize> {
    s: Pending<W::Acc<N8>>,
    o: Pending<W::Acc<D8>>,
    k: W::Slot,
    v: W::Slot,
}

/// A block of scores, the pair that they come from, and whether a mask may hide many of them.
#[derive(Clone, Copy)]
struct BlockAt {
    tile: WorkTile,
    heads_q: u32,
    visit: Visit,
    masked: bool,
}

impl BlockAt {
    /// Where this warpgroup's rows of it lie.
    #[inline(always)]
    fn place<W: ForwardWarpgroup>(&self, wg: &W, block_n: u32) -> Place {
        Place {
            head: self.tile.batch * self.heads_q + self.tile.head,
            row: wg.first_row(&self.tile),
            column: self.visit.n_block * block_n,
            rows: Rows::Queries,
        }
    }
}

impl<W: ForwardWarpgroup, R: Dropping, const D8: usize, const N8: usize> Mainloop<W, R, D8, N8> {
    /// Whether a look at the corrections, which are 1 where no row's maximum has moved, costs less than what it saves:
    /// it stands between instructions that would mix without it.
    const fn looks_first() -> bool {
        D8 > 16 || R::DROPS
    }

    /// Whether maxima are better taken as floats: where a mask may hide many scores, or integers have Philox to do.
    #[inline(always)]
    fn floats(at: &BlockAt) -> bool {
        at.masked || R::DROPS
    }

    /// The first block of all: there is no output to add to yet.
    #[inline(always)]
    fn first(wg: &mut W, scale: f32, dropping: R, at: BlockAt, scored: impl FnOnce(&mut W, &mut W::Acc<N8>)) -> Self {
        let k = wg.wait_kv();
        let s = wg.qk::<D8, N8>(k, at.visit.pair);
        let keep = dropping.keep::<W, N8>(wg, |wg| at.place(wg, 8 * N8 as u32));
        let mut s = wg.wait::<0, N8>(s);
        wg.release_kv(k);
        scored(wg, &mut s);
        let mut softmax = Softmax::new(wg, scale);
        softmax.step(wg, &mut s, Self::floats(&at));
        Mainloop { o: wg.zeros::<D8>(), p: Self::weights(wg, &s, &keep), softmax, dropping }
    }

    /// P as the left operand of P·V, without the weights that are dropped.
    #[inline(always)]
    fn weights(wg: &W, p: &W::Acc<N8>, keep: &R::Keep<W, N8>) -> W::Operand<N8> {
        let mut p = wg.pack(p);
        R::drop_operand::<W, N8>(wg, &mut p, keep);
        p
    }

    /// Issues the scores of one more block, and the output of the one before.
    #[inline(always)]
    fn issue(&self, wg: &mut W, pair: u32) -> InFlight<W, D8, N8> {
        let k = wg.wait_kv();
        wg.take_turn();
        let s = wg.qk::<D8, N8>(k, pair); //               S = Q·Kᵀ
        let v = wg.wait_kv();
        let o = wg.pv::<N8, D8>(self.o, self.p, v); //     O = O + P·V, one block behind
        wg.pass_turn();
        InFlight { s, o, k, v }
    }

    /// One more block of the same work tile. `scored` masks its scores.
    #[inline(always)]
    fn step(&mut self, wg: &mut W, at: BlockAt, scored: impl FnOnce(&mut W, &mut W::Acc<N8>)) {
        let InFlight { s, o, k, v } = self.issue(wg, at.visit.pair);
        let keep = self.dropping.keep::<W, N8>(wg, |wg| at.place(wg, 8 * N8 as u32)); // beside the products
        let mut s = wg.wait::<1, N8>(s);
        wg.release_kv(k);
        scored(wg, &mut s);
        let raised = self.softmax.raise(wg, &s, Self::floats(&at)); // S → P; m, l
        if R::DROPS {
            self.softmax.half_the_exponents(wg, &mut s, raised, 0);
        } else {
            self.softmax.exponents(wg, &mut s, raised);
        }
        self.o = wg.wait::<0, D8>(o);
        wg.release_kv(v);
        wg.scale_rows(&mut self.o, raised.1, const { Self::looks_first() });
        if R::DROPS {
            // The look keeps apart what ptxas would put last otherwise: half the exponentials go with the Philox calls,
            // half with what they decide.
            self.softmax.half_the_exponents(wg, &mut s, raised, 1);
        }
        self.p = Self::weights(wg, &s, &keep);
    }

    /// The first block of the next work tile, beside the last output of this one, which it returns.
    #[inline(always)]
    fn turn_over(
        self,
        wg: &mut W,
        scale: f32,
        at: BlockAt,
        scored: impl FnOnce(&mut W, &mut W::Acc<N8>),
    ) -> (Self, W::Acc<D8>, Softmax<W>) {
        let InFlight { s, o, k, v } = self.issue(wg, at.visit.pair);
        let keep = self.dropping.keep::<W, N8>(wg, |wg| at.place(wg, 8 * N8 as u32));
        let mut s = wg.wait::<1, N8>(s);
        wg.release_kv(k);
        scored(wg, &mut s);
        let mut softmax = Softmax::new(wg, scale);
        softmax.step(wg, &mut s, Self::floats(&at));
        let o = wg.wait::<0, D8>(o);
        wg.release_kv(v);
        let p = Self::weights(wg, &s, &keep);
        (Mainloop { o: wg.zeros::<D8>(), p, softmax, dropping: self.dropping }, o, self.softmax)
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
pub fn consume<W: ForwardWarpgroup, M: Mask, S: Second<W::Tensor>, R: Dropping, const D8: usize, const N8: usize>(
    wg: &mut W,
    p: &ForwardParams<W::Tensor, S>,
    block_m: u32,
    tiles: impl Iterator<Item = WorkTile>,
    dropping: R,
) {
    let block_n = 8 * N8 as u32;
    let pairs = p.second.pairs(&p.shape);
    let visits_of =
        |tile: &WorkTile| Visits::new::<M, S::Pairs>(&p.shape, pairs, tile.m_block * block_m, block_m, block_n);
    let mask = |wg: &W, s: &mut W::Acc<N8>, tile: &WorkTile, Visit { pair, n_block }: Visit| {
        mask_scores::<W, M, S::Pairs, N8>(wg, &p.shape, pairs, pair, s, wg.first_row(tile), n_block * block_n);
    };
    // The first and the last visit of a work tile may be to full blocks too.
    let mask_if_needed = |wg: &W, s: &mut W::Acc<N8>, tile: &WorkTile, visits: &Visits, u: u32| {
        if !visits.is_full(u) {
            mask(wg, s, tile, visits.at(u));
        }
    };
    let at = |tile: WorkTile, visits: &Visits, u: u32, masked: bool| BlockAt {
        tile,
        heads_q: p.shape.heads_q,
        visit: visits.at(u),
        masked,
    };
    // Blocks are visited from the last one, at the mask's edge if there is one.
    let first_masked = M::HIDES || S::Pairs::COUNT > 1;
    let mut upcoming = Upcoming { tiles, next: None };
    upcoming.load(wg);
    let Some(mut tile) = upcoming.next else { return };
    let mut visits = visits_of(&tile);
    wg.wait_q();
    // After the scores of a work tile's last visit, 0, Q is free for the next work tile.
    let first = visits.count - 1;
    let block = at(tile, &visits, first, first_masked);
    let mut mainloop = Mainloop::<W, R, D8, N8>::first(wg, p.scale, dropping, block, |wg, s| {
        if first == 0 {
            upcoming.load(wg);
        }
        mask_if_needed(wg, s, &tile, &visits, first);
    });
    loop {
        let mut above = visits.count - 1;
        for run in 0..S::Pairs::COUNT {
            let (full_start, full_end) = visits.run(run);
            for u in (full_end.max(1)..above).rev() {
                let block = at(tile, &visits, u, true);
                mainloop.step(wg, block, |wg, s| mask(wg, s, &tile, block.visit));
            }
            above = above.min(full_end);
            for u in (full_start.max(1)..above).rev() {
                mainloop.step(wg, at(tile, &visits, u, false), |_, _| {});
            }
            above = above.min(full_start);
        }
        if visits.count > 1 {
            mainloop.step(wg, at(tile, &visits, 0, false), |wg, s| {
                upcoming.load(wg);
                mask_if_needed(wg, s, &tile, &visits, 0);
            });
        }
        let Some(next) = upcoming.next else { break };
        visits = visits_of(&next);
        wg.wait_q();
        let first = visits.count - 1;
        let block = at(next, &visits, first, first_masked);
        let (following, o, softmax) = mainloop.turn_over(wg, p.scale, block, |wg, s| {
            if first == 0 {
                upcoming.load(wg);
            }
            mask_if_needed(wg, s, &next, &visits, first);
        });
        epilogue::store(wg, p, &tile, o, softmax, dropping);
        (mainloop, tile) = (following, next);
    }
    let (o, softmax) = mainloop.last(wg);
    epilogue::store(wg, p, &tile, o, softmax, dropping);
}
