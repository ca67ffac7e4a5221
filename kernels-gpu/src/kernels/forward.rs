//! Forward attention, O = softmax(score(Q·Kᵀ) + mask)·V and its LSE (FlashAttention-3, arXiv 2407.08608, algorithm 2).
//!
//! A consumer warpgroup owns 64 query rows of a work tile. With c = unit·log₂e, where unit is scale or, with softcap,
//! cap, and j counting the blocks of keys that the tile visits, from the last block to the first, it computes:
//!
//! ```text
//! for each work tile of the CTA:
//!     m = −∞, l = 0, O = 0
//!     for each block of keys j:
//!         Sⱼ = score(Q·Kⱼᵀ), −∞ for masked keys
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
//!    the tensor cores work during the softmax (`State::step`).
//! 2. A ping-pong barrier (`take_ping_pong`, `pass_ping_pong`) lets one consumer at a time issue, so that one's softmax
//!    overlaps the other's products (notebook 11).
//! 3. S of the next work tile's first block is issued with the last P·V of this one (`State::turn_over`, notebook
//!    14). The pipeline drains once per launch.
//! 4. Q of the next work tile is requested as soon as the last S of this one has arrived (`QueryQueue`, notebook 9).
//! 5. Full blocks run without masking code, in loops of their own (`Full`, `Masked`); the first and the last block
//!    are masked only if they are not full (`First`, `Last`, notebook 17).
//! 6. Row maxima are taken on the integer pipe if a block has at least 128 keys, no mask is expected to mask many of
//!    its scores out, and there is no dropout (notebook 26, 128).
//! 7. O is rescaled only if a row maximum has changed, if the check pays (`State::rescale_check`, notebook 20, 124).
//!
//! A ring of slots, filled in the order of [`crate::pipeline::order`], connects producer and consumers. With two
//! consumers:
//!
//! ```text
//! producer    K₀ K₁ V₀ K₂ V₁ K₃ V₂ …                        TMA loads into the ring
//! consumer 0  [S₀] softmax₀ [S₁ P₀V₀] softmax₁ [S₂ P₁V₁] …  [ ] = issued together; softmaxⱼ waits for Sⱼ alone
//! consumer 1            [S₀] softmax₀ [S₁ P₀V₀] softmax₁ …  about half a step later, by the ping-pong barrier
//! ```

use core::marker::PhantomData;
use core::mem::replace;

use crate::arch::{ForwardWarpgroup, MaxUnit, Pending, RescaleCheck};
use crate::attention::dropout::{Drops, Place, Rows};
use crate::attention::dropping::Dropping;
use crate::attention::epilogue;
use crate::attention::features::Features;
use crate::attention::mask::Mask;
use crate::attention::masking::{ScorePlace, mask_scores};
use crate::attention::score::{Distances, Score};
use crate::attention::softmax::Softmax;
use crate::attention::visits::{Visit, Visits};
use crate::ground::places::{PackedTile, WorkTile};
use crate::params::ForwardParams;
use crate::tuning;

/// Record of which elements of P are kept.
type Keep<W, F, const N8: usize> = <<F as Features>::Weights as Dropping>::Keep<W, N8>;

/// What all steps share: the launch parameters, and the tile sizes.
struct Context<'a, T, F> {
    p: &'a ForwardParams<T, F>,
    block_m: u32,
    block_n: u32,
}

/// Work tile and its visits.
#[derive(Clone, Copy)]
struct QueryTile {
    at: PackedTile,
    visits: Visits,
}

/// Block of scores: its work tile, its block of keys, and the pair of Q and K that they come from.
#[derive(Clone, Copy)]
struct BlockAt {
    tile: WorkTile,
    visit: Visit,
    /// Number of visits to the work tile's blocks after this one.
    later: u32,
    /// False if the mask may mask some of the scores out.
    is_full: bool,
}

impl QueryTile {
    /// Returns the block of visit `u`.
    #[inline(always)]
    fn block(&self, u: u32) -> BlockAt {
        BlockAt { tile: self.at.tile(), visit: self.visits.at(u), later: u, is_full: self.visits.is_full(u) }
    }

    /// Returns the first block that is visited.
    #[inline(always)]
    fn first_block(&self) -> BlockAt {
        self.block(self.visits.count - 1)
    }
}

impl<T, F: Features> Context<'_, T, F> {
    #[inline(always)]
    fn query_tile(&self, at: PackedTile) -> QueryTile {
        let WorkTile { batch, m_block, .. } = at.tile();
        let (of, first_row) = (self.p.base.item(batch).sequence(), m_block * self.block_m);
        QueryTile { at, visits: Visits::new(&of, self.p.features.mask(), first_row, self.block_m, self.block_n) }
    }

    /// Turns a block of products into scores, but for values of rows that are still missing.
    #[inline(always)]
    fn score<W: ForwardWarpgroup, E: Kind, const N8: usize>(
        &self,
        wg: &W,
        x: &mut W::Acc<N8>,
        at: &BlockAt,
        of_head: Option<f32>,
    ) -> Option<W::Rows> {
        let (row, key) = (wg.first_row(&at.tile), at.visit.n_block * self.block_n);
        let of = self.p.base.item(at.tile.batch).sequence();
        let distances = Distances::of_queries(&of, self.p.features.mask(), row, key, self.block_n);
        // In a masked block the largest weights need not be at the edge that distances count from.
        let distances = if E::masks(at) { distances.one_by_one() } else { distances };
        let score = self.p.features.score();
        score.curve(wg, x);
        score.bias(wg, x, of_head, &distances)
    }

    /// Reads what the scores of a block's head depend on.
    #[inline(always)]
    fn of_head<W: ForwardWarpgroup>(&self, wg: &W, at: &BlockAt) -> Option<f32> {
        self.p.features.score().of_head(wg, at.tile.batch, at.tile.head)
    }

    /// Masks a block of scores.
    #[inline(always)]
    fn mask<W: ForwardWarpgroup, const N8: usize>(&self, wg: &W, s: &mut W::Acc<N8>, at: &BlockAt) {
        let (row, key) = (wg.first_row(&at.tile), at.visit.n_block * self.block_n);
        let place = ScorePlace { pair: at.visit.pair, row, key };
        mask_scores(wg, &self.p.base.item(at.tile.batch).sequence(), self.p.features.mask(), s, place);
    }

    /// Decides which elements of a block of P are kept.
    #[inline(always)]
    fn keep<W: ForwardWarpgroup, const N8: usize>(&self, wg: &W, at: &BlockAt) -> Keep<W, F, N8> {
        self.p.features.weights().keep::<W, N8>(wg, |wg| Place {
            head: at.tile.batch * self.p.base.shape.heads_q + at.tile.head,
            row: wg.first_row(&at.tile),
            column: at.visit.n_block * self.block_n,
            rows: Rows::Queries,
        })
    }
}

/// Kind of a step by its block, chosen at compile time.
trait Kind {
    /// Returns the unit of row maxima: floats if the mask may mask many of the scores out.
    fn max_unit<M: Mask>(mask: &M) -> MaxUnit;
    /// Returns true if the block is to be masked.
    #[inline(always)]
    fn masks(at: &BlockAt) -> bool {
        !at.is_full
    }
    /// Returns true if the block is its work tile's last, so that Q is free once its scores have arrived.
    #[inline(always)]
    fn frees_q(_: &BlockAt) -> bool {
        false
    }
}

/// Block of a loop over full blocks.
struct Full;
/// Block of a loop over masked blocks.
struct Masked;
/// First block of a work tile, which is masked unless it is full. The right edge of a mask crosses it. It is also the
/// last if the tile has one block.
struct First;
/// Last block of a work tile, which is masked unless it is full. The left edge of a mask crosses it.
struct Last;

impl Kind for Full {
    #[inline(always)]
    fn max_unit<M: Mask>(_: &M) -> MaxUnit {
        MaxUnit::Integer
    }
    #[inline(always)]
    fn masks(_: &BlockAt) -> bool {
        false
    }
}
impl Kind for Masked {
    #[inline(always)]
    fn max_unit<M: Mask>(_: &M) -> MaxUnit {
        MaxUnit::Float
    }
    #[inline(always)]
    fn masks(_: &BlockAt) -> bool {
        true
    }
}
impl Kind for First {
    #[inline(always)]
    fn max_unit<M: Mask>(mask: &M) -> MaxUnit {
        let many = const { M::PAIRS > 1 } || mask.bounds_left() || mask.bounds_right();
        if many { MaxUnit::Float } else { MaxUnit::Integer }
    }
    #[inline(always)]
    fn frees_q(at: &BlockAt) -> bool {
        at.later == 0
    }
}
impl Kind for Last {
    #[inline(always)]
    fn max_unit<M: Mask>(mask: &M) -> MaxUnit {
        if mask.bounds_left() { MaxUnit::Float } else { MaxUnit::Integer }
    }
    #[inline(always)]
    fn frees_q(_: &BlockAt) -> bool {
        true
    }
}

/// State that is carried from block to block: O, P of the last block, and m and l.
struct State<W: ForwardWarpgroup, F, const D8: usize, const N8: usize> {
    o: W::Acc<D8>,
    p: W::Operand<N8>,
    softmax: Softmax<W>,
    features: PhantomData<F>,
}

/// S of one block and O of the block before it, both in flight, with the slots of K and V that their products read.
struct InFlight<W: ForwardWarpgroup, const D8: usize, const N8: usize> {
    s: Pending<W::Acc<N8>>,
    o: Pending<W::Acc<D8>>,
    k: W::Slot,
    v: W::Slot,
}

impl<W: ForwardWarpgroup, F: Features, const D8: usize, const N8: usize> State<W, F, D8, N8> {
    /// Returns whether O is rescaled only when a row maximum has changed, that is, if a rescale factor differs from 1.
    /// The check saves multiplications but keeps ptxas from interleaving the instructions around it. It pays above head
    /// dim 128 (notebook 20); with dropout `step` wants the fence itself (notebook 124).
    const fn rescale_check() -> RescaleCheck {
        if D8 as u32 * 8 > tuning::RESCALE_CHECK_ABOVE_HEAD_DIM || F::Weights::DROPS {
            RescaleCheck::First
        } else {
            RescaleCheck::Never
        }
    }

    /// Returns the unit of row maxima. With dropout it is that of floats, because Philox calls occupy the integer pipe
    /// (notebook 26, 128).
    #[inline(always)]
    fn max_unit<E: Kind>(cx: &Context<W::Tensor, F>) -> MaxUnit {
        if const { F::Weights::DROPS } { MaxUnit::Float } else { E::max_unit(cx.p.features.mask()) }
    }

    /// Packs P as the left operand of P·V, and zeroes its dropped elements.
    #[inline(always)]
    fn weights(wg: &W, p: &W::Acc<N8>, keep: &Keep<W, F, N8>) -> W::Operand<N8> {
        let mut p = wg.pack(p);
        F::Weights::drop_operand::<W, N8>(wg, &mut p, keep);
        p
    }

    /// Waits for S, of which up to `LATER` products in flight are younger, turns it into scores and masks it. If this
    /// was the last product with Q, starts loading Q of the next work tile. Returns the scores, and the values of rows
    /// that are still missing from them.
    #[inline(always)]
    fn scores<E: Kind, const LATER: usize>(
        wg: &mut W,
        cx: &Context<W::Tensor, F>,
        at: &BlockAt,
        (s, k): (Pending<W::Acc<N8>>, W::Slot),
        queries: &mut QueryQueue<impl Iterator<Item = WorkTile>>,
    ) -> (W::Acc<N8>, Option<W::Rows>) {
        let of_head = cx.of_head(wg, at);
        let mut s = wg.wait::<LATER, N8>(s);
        wg.release_kv(k);
        if E::frees_q(at) {
            queries.load(wg, cx);
        }
        let missing = cx.score::<W, E, N8>(wg, &mut s, at, of_head);
        if E::masks(at) {
            cx.mask(wg, &mut s, at);
        }
        (s, missing)
    }

    /// Computes S and P of the CTA's very first block. There is no P·V yet, so O is 0.
    #[inline(always)]
    fn first(
        wg: &mut W,
        cx: &Context<W::Tensor, F>,
        at: BlockAt,
        queries: &mut QueryQueue<impl Iterator<Item = WorkTile>>,
    ) -> Self {
        let k = wg.wait_kv();
        let s = wg.qk::<D8, N8>(k, at.visit.pair);
        let keep = cx.keep(wg, &at);
        let (mut s, missing) = Self::scores::<First, 0>(wg, cx, &at, (s, k), queries);
        let mut softmax = Softmax::new(wg, cx.p.features.score().unit());
        softmax.step(wg, &mut s, missing, Self::max_unit::<First>(cx));
        State { o: wg.zeros::<D8>(), p: Self::weights(wg, &s, &keep), softmax, features: PhantomData }
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
    #[inline(always)]
    fn step<E: Kind>(
        &mut self,
        wg: &mut W,
        cx: &Context<W::Tensor, F>,
        at: BlockAt,
        queries: &mut QueryQueue<impl Iterator<Item = WorkTile>>,
    ) {
        let InFlight { s, o, k, v } = self.issue(wg, at.visit.pair);
        let keep = cx.keep(wg, &at); // overlaps the products
        let (mut s, missing) = Self::scores::<E, 1>(wg, cx, &at, (s, k), queries);
        let rescale = self.softmax.raise(wg, &s, missing, Self::max_unit::<E>(cx)); // S → P; m, l
        if const { F::Weights::DROPS } {
            self.softmax.half_the_exponents(wg, &mut s, rescale, 0);
        } else {
            self.softmax.exponents(wg, &mut s, rescale);
        }
        self.o = wg.wait::<0, D8>(o);
        wg.release_kv(v);
        wg.scale_rows(&mut self.o, rescale.factor, const { Self::rescale_check() });
        if const { F::Weights::DROPS } {
            // Half of the exponentials run before the skip-rescale check, with the Philox calls, and half after it,
            // with the instructions that drop elements. Without this fence ptxas puts those instructions last (notebook
            // 135).
            self.softmax.half_the_exponents(wg, &mut s, rescale, 1);
        }
        self.p = Self::weights(wg, &s, &keep);
    }

    /// Computes S and P of the next work tile's first block, overlapped with this tile's last P·V. Goes over to the
    /// next tile, and returns O and the softmax state of this one.
    #[inline(always)]
    fn turn_over(
        &mut self,
        wg: &mut W,
        cx: &Context<W::Tensor, F>,
        at: BlockAt,
        queries: &mut QueryQueue<impl Iterator<Item = WorkTile>>,
    ) -> (W::Acc<D8>, Softmax<W>) {
        let InFlight { s, o, k, v } = self.issue(wg, at.visit.pair);
        let keep = cx.keep(wg, &at);
        let (mut s, missing) = Self::scores::<First, 1>(wg, cx, &at, (s, k), queries);
        let mut softmax = Softmax::new(wg, cx.p.features.score().unit());
        softmax.step(wg, &mut s, missing, Self::max_unit::<First>(cx));
        let o = wg.wait::<0, D8>(o);
        wg.release_kv(v);
        self.p = Self::weights(wg, &s, &keep);
        self.o = wg.zeros::<D8>();
        (o, replace(&mut self.softmax, softmax))
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
struct QueryQueue<I> {
    tiles: I,
    loading: Option<PackedTile>,
}

impl<I: Iterator<Item = WorkTile>> QueryQueue<I> {
    /// Starts loading the query rows of the next work tile.
    #[inline(always)]
    fn load<W: ForwardWarpgroup, F>(&mut self, wg: &mut W, cx: &Context<W::Tensor, F>) {
        self.loading = self.tiles.next().map(PackedTile::new);
        if let Some(tile) = self.loading {
            wg.load_q(&tile.tile(), &cx.p.base.item(tile.tile().batch).q);
        }
    }

    /// Waits for the query rows that are being loaded, and returns their work tile.
    #[inline(always)]
    fn wait<W: ForwardWarpgroup, F: Features>(&self, wg: &mut W, cx: &Context<W::Tensor, F>) -> Option<QueryTile> {
        let tile = cx.query_tile(self.loading?);
        wg.wait_q();
        Some(tile)
    }
}

/// Computes one consumer warpgroup's 64 rows of every work tile of its CTA.
#[inline(always)]
pub fn consume<W: ForwardWarpgroup, F: Features, const D8: usize, const N8: usize>(
    wg: &mut W,
    p: &ForwardParams<W::Tensor, F>,
    block_m: u32,
    tiles: impl Iterator<Item = WorkTile>,
) {
    let cx = &Context { p, block_m, block_n: 8 * N8 as u32 };
    let queries = &mut QueryQueue { tiles, loading: None };
    queries.load(wg, cx);
    let Some(mut tile) = queries.wait(wg, cx) else { return };
    let mut state = State::<W, F, D8, N8>::first(wg, cx, tile.first_block(), queries);
    loop {
        for run in (0..F::Mask::PAIRS).map(|pair| tile.visits.run(pair)) {
            for u in run.masked.rev() {
                state.step::<Masked>(wg, cx, tile.block(u), queries);
            }
            for u in run.full.rev() {
                state.step::<Full>(wg, cx, tile.block(u), queries);
            }
        }
        if p.features.mask().bounds_left() {
            for u in tile.visits.left_edge::<F::Mask>().rev() {
                state.step::<Masked>(wg, cx, tile.block(u), queries);
            }
        }
        if tile.visits.count > 1 {
            state.step::<Last>(wg, cx, tile.block(0), queries);
        }
        let Some(next) = queries.wait(wg, cx) else { break };
        let (o, softmax) = state.turn_over(wg, cx, next.first_block(), queries); // overlaps the last P·V
        epilogue::store(wg, p, &tile.at.tile(), o, softmax);
        tile = next;
    }
    let (o, softmax) = state.last(wg);
    epilogue::store(wg, p, &tile.at.tile(), o, softmax);
}
