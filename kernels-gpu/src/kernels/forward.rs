//! Forward attention, O = softmax(scale·Q·Kᵀ + mask)·V and its LSE (FlashAttention-3, arXiv 2407.08608, algorithm 2).
//!
//! A consumer warpgroup owns 64 query rows of a work tile. With c = scale·log₂e, and j counting the blocks of keys that
//! the tile visits, from the last block to the first, it computes:
//!
//! ```text
//! for each work tile of the CTA:
//!     m = −∞, l = 0, O = 0
//!     for each block of keys j:
//!         Sⱼ = Q·Kⱼᵀ, −∞ for masked keys
//!         m' = max(m, rowmax(Sⱼ))
//!         Pⱼ = 2^(c·Sⱼ − c·m'), α = 2^(c·m − c·m')
//!         l = α·l + rowsum(Pⱼ)
//!         O = α·O + Pⱼ·Vⱼ
//!         m = m'
//!     store O/l and LSE = ln 2·(c·m + log₂ l)
//! ```
//!
//! Done for speed:
//!
//! 1. S of the next block is issued together with P·V of this one, and the softmax starts as soon as S has arrived. So
//!    the tensor cores work during the softmax (`Mainloop::step`).
//! 2. A ping-pong barrier (`take_ping_pong`, `pass_ping_pong`) lets one consumer at a time issue, so that one's softmax
//!    overlaps the other's products (notebook 11).
//! 3. S of the next work tile's first block is issued with the last P·V of this one (`Mainloop::turn_over`, notebook
//!    14). The pipeline drains once per launch.
//! 4. Q of the next work tile is requested as soon as the last S of this one has arrived (`Upcoming`, notebook 9).
//! 5. Full blocks run without masking code, in loops of their own ([`Visits`]); the first and the last block are masked
//!    only if they are not full (notebook 17).
//! 6. Row maxima are taken on the integer pipe if a block has at least 128 keys, no mask is expected to mask many of
//!    its scores out, and there is no dropout (notebook 26, 128).
//! 7. O is rescaled only if a row maximum has changed, if the check pays (`Mainloop::rescale_check`, notebook 20, 124).
//!
//! A ring of slots, filled in the order of [`crate::pipeline::order`], connects producer and consumers. With two
//! consumers:
//!
//! ```text
//! producer    K₀ K₁ V₀ K₂ V₁ K₃ V₂ …                        TMA loads into the ring
//! consumer 0  [S₀] softmax₀ [S₁ P₀V₀] softmax₁ [S₂ P₁V₁] …  [ ] = issued together; softmaxⱼ waits for Sⱼ alone
//! consumer 1            [S₀] softmax₀ [S₁ P₀V₀] softmax₁ …  about half a step later, by the ping-pong barrier
//! ```

use crate::arch::{ForwardWarpgroup, MaxUnit, Pending, RescaleCheck};
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
use crate::tuning;

/// State that is carried from block to block: O, P of the last block, and m and l.
struct Mainloop<W: ForwardWarpgroup, R: Dropping, const D8: usize, const N8: usize> {
    o: W::Acc<D8>,
    p: W::Operand<N8>,
    softmax: Softmax<W>,
    dropping: R,
}

/// S of one block and O of the block before it, both in flight, with the slots of K and V that their products read.
struct InFlight<W: ForwardWarpgroup, const D8: usize, const N8: usize> {
    s: Pending<W::Acc<N8>>,
    o: Pending<W::Acc<D8>>,
    k: W::Slot,
    v: W::Slot,
}

/// Block of scores: its work tile, its block of keys, and the pair of Q and K that they come from.
#[derive(Clone, Copy)]
struct BlockAt {
    tile: WorkTile,
    heads_q: u32,
    visit: Visit,
    /// Unit of row maxima without dropout: floats if a mask may mask many of the scores out.
    max_unit: MaxUnit,
}

impl BlockAt {
    /// Returns the position of this warpgroup's rows of the block.
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
    /// Returns whether O is rescaled only when a row maximum has changed, that is, if a rescale factor differs from 1.
    /// The check saves multiplications but keeps ptxas from interleaving the instructions around it. It pays above head
    /// dim 128 (notebook 20); with dropout `step` wants the fence itself (notebook 124).
    const fn rescale_check() -> RescaleCheck {
        if D8 as u32 * 8 > tuning::RESCALE_CHECK_ABOVE_HEAD_DIM || R::DROPS {
            RescaleCheck::First
        } else {
            RescaleCheck::Never
        }
    }

    /// Returns the unit of row maxima. With dropout it is that of floats, because Philox calls occupy the integer pipe
    /// (notebook 26, 128).
    #[inline(always)]
    fn max_unit(at: &BlockAt) -> MaxUnit {
        if R::DROPS { MaxUnit::Float } else { at.max_unit }
    }

    /// Computes S and P of the CTA's very first block. There is no P·V yet, so O is 0.
    #[inline(always)]
    fn first(wg: &mut W, scale: f32, dropping: R, at: BlockAt, scored: impl FnOnce(&mut W, &mut W::Acc<N8>)) -> Self {
        let k = wg.wait_kv();
        let s = wg.qk::<D8, N8>(k, at.visit.pair);
        let keep = dropping.keep::<W, N8>(wg, |wg| at.place(wg, 8 * N8 as u32));
        let mut s = wg.wait::<0, N8>(s);
        wg.release_kv(k);
        scored(wg, &mut s);
        let mut softmax = Softmax::new(wg, scale);
        softmax.step(wg, &mut s, Self::max_unit(&at));
        Mainloop { o: wg.zeros::<D8>(), p: Self::weights(wg, &s, &keep), softmax, dropping }
    }

    /// Packs P as the left operand of P·V, and zeroes its dropped elements.
    #[inline(always)]
    fn weights(wg: &W, p: &W::Acc<N8>, keep: &R::Keep<W, N8>) -> W::Operand<N8> {
        let mut p = wg.pack(p);
        R::drop_operand::<W, N8>(wg, &mut p, keep);
        p
    }

    /// Issues S of one more block, then P·V of the block before it, between taking and passing on the ping-pong
    /// barrier.
    #[inline(always)]
    fn issue(&self, wg: &mut W, pair: u32) -> InFlight<W, D8, N8> {
        let k = wg.wait_kv();
        wg.take_ping_pong();
        let s = wg.qk::<D8, N8>(k, pair); //               S = Q·Kᵀ
        let v = wg.wait_kv();
        let o = wg.pv::<N8, D8>(self.o, self.p, v); //     O = O + P·V, one block behind
        wg.pass_ping_pong();
        InFlight { s, o, k, v }
    }

    /// Processes one more block of the same work tile: issues its S and the last block's P·V, then turns S into P.
    /// `scored` masks its scores, which have arrived by then.
    #[inline(always)]
    fn step(&mut self, wg: &mut W, at: BlockAt, scored: impl FnOnce(&mut W, &mut W::Acc<N8>)) {
        let InFlight { s, o, k, v } = self.issue(wg, at.visit.pair);
        let keep = self.dropping.keep::<W, N8>(wg, |wg| at.place(wg, 8 * N8 as u32)); // overlaps the products
        let mut s = wg.wait::<1, N8>(s);
        wg.release_kv(k);
        scored(wg, &mut s);
        let rescale = self.softmax.raise(wg, &s, Self::max_unit(&at)); // S → P; m, l
        if R::DROPS {
            self.softmax.half_the_exponents(wg, &mut s, rescale, 0);
        } else {
            self.softmax.exponents(wg, &mut s, rescale);
        }
        self.o = wg.wait::<0, D8>(o);
        wg.release_kv(v);
        wg.scale_rows(&mut self.o, rescale.factor, const { Self::rescale_check() });
        if R::DROPS {
            // Half of the exponentials run before the skip-rescale check, with the Philox calls, and half after it,
            // with the instructions that drop elements. Without this fence ptxas puts those instructions last (notebook
            // 135).
            self.softmax.half_the_exponents(wg, &mut s, rescale, 1);
        }
        self.p = Self::weights(wg, &s, &keep);
    }

    /// Computes S and P of the next work tile's first block, overlapped with this tile's last P·V. Returns the state of
    /// the next tile, and O and the softmax state of this one.
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
        softmax.step(wg, &mut s, Self::max_unit(&at));
        let o = wg.wait::<0, D8>(o);
        wg.release_kv(v);
        let p = Self::weights(wg, &s, &keep);
        (Mainloop { o: wg.zeros::<D8>(), p, softmax, dropping: self.dropping }, o, self.softmax)
    }

    /// Computes the CTA's very last P·V. Returns O and the softmax state of its last work tile.
    #[inline(always)]
    fn last(self, wg: &mut W) -> (W::Acc<D8>, Softmax<W>) {
        let v = wg.wait_kv();
        let o = wg.pv::<N8, D8>(self.o, self.p, v);
        let o = wg.wait::<0, D8>(o);
        wg.release_kv(v);
        (o, self.softmax)
    }
}

/// Work tiles that the CTA has not begun, and the one whose query rows are being loaded.
struct Upcoming<I> {
    tiles: I,
    next: Option<WorkTile>,
}

impl<I: Iterator<Item = WorkTile>> Upcoming<I> {
    /// Takes the next work tile and starts loading its query rows.
    #[inline(always)]
    fn load<W: ForwardWarpgroup>(&mut self, wg: &mut W) {
        self.next = self.tiles.next();
        if let Some(next) = &self.next {
            wg.load_q(next);
        }
    }
}

/// Computes one consumer warpgroup's 64 rows of every work tile of its CTA.
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
    // Masks the scores of a first or last visit, unless its block is full.
    let mask_if_needed = |wg: &W, s: &mut W::Acc<N8>, tile: &WorkTile, visits: &Visits, u: u32| {
        if !visits.is_full(u) {
            mask(wg, s, tile, visits.at(u));
        }
    };
    let at = |tile: WorkTile, visits: &Visits, u: u32, max_unit: MaxUnit| BlockAt {
        tile,
        heads_q: p.shape.heads_q,
        visit: visits.at(u),
        max_unit,
    };
    // The first visit of a work tile is to its last block, which the mask's edge crosses if there is a mask.
    let first_unit = if M::HIDES || S::Pairs::COUNT > 1 { MaxUnit::Float } else { MaxUnit::Integer };
    let mut upcoming = Upcoming { tiles, next: None };
    upcoming.load(wg);
    let Some(mut tile) = upcoming.next else { return };
    let mut visits = visits_of(&tile);
    wg.wait_q();
    // Visits count down to 0. When the scores of visit 0 have arrived, Q is free for the next work tile.
    let first = visits.count - 1;
    let block = at(tile, &visits, first, first_unit);
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
                let block = at(tile, &visits, u, MaxUnit::Float);
                mainloop.step(wg, block, |wg, s| mask(wg, s, &tile, block.visit));
            }
            above = above.min(full_end);
            for u in (full_start.max(1)..above).rev() {
                mainloop.step(wg, at(tile, &visits, u, MaxUnit::Integer), |_, _| {});
            }
            above = above.min(full_start);
        }
        if visits.count > 1 {
            mainloop.step(wg, at(tile, &visits, 0, MaxUnit::Integer), |wg, s| {
                upcoming.load(wg);
                mask_if_needed(wg, s, &tile, &visits, 0);
            });
        }
        let Some(next) = upcoming.next else { break };
        visits = visits_of(&next);
        wg.wait_q();
        let first = visits.count - 1;
        let block = at(next, &visits, first, first_unit);
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
