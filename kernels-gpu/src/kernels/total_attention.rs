//! Total attention, total_j = Σ_i P_ij with P = exp(score(Q·Kᵀ) − LSE): the weight that each key gets from all queries.
//! It is a second pass over Q, K and the LSE of the forward pass.
//!
//! A consumer warpgroup owns 64 keys of one query head. With c = unit·log₂e and neg_lse_log2 = −LSE·log₂e, it
//! computes:
//!
//! ```text
//! for each work tile of the CTA:
//!     total = 0
//!     for each query block i that attends to one of the 64 keys, from the last to the first:
//!         Sᵀ = score(K·Qᵢᵀ), −∞ for masked keys
//!         Pᵀ = 2^(c·Sᵀ + neg_lse_log2)
//!         total = total + rowsum(Pᵀ)
//!     store total
//! ```
//!
//! Done for speed:
//!
//! 1. S is computed transposed, so that a key is a row. Its sum stays in registers until the work tile ends.
//! 2. Up to head dim 128 there are four consumers, each with one fragment of scores. The product of one overlaps the
//!    exponentials of the others (notebook 102, 120).
//! 3. Above head dim 128 there are two consumers with two fragments each. S of the next block, which may be the first
//!    of the next work tile, overlaps the exponentials of this block (`Mainloop::step`).
//! 4. Up to head dim 64, K is the left operand from registers, so that a product reads only Q from shared memory
//!    (notebook 110).
//! 5. Up to head dim 64, one exponential in sixteen is a polynomial, which takes no time of the SFU
//!    ([`crate::attention::exponential`], notebook 116).
//! 6. Up to head dim 128, the tail of a launch is split along keys ([`crate::attention::shared_tiles`], notebook 111).
//! 7. A second warp of the producer loads the LSE and stores `neg_lse_log2` next to Q's slot
//!    (`arch/sm90/total_neg_lse_log2.rs`, notebook 99).

use core::f32::consts::LOG2_E;

use crate::arch::TotalWarpgroup;
use crate::attention::exponential::exp2_polynomial;
use crate::attention::features::Features;
use crate::attention::masking::{ScorePlace, mask_any_transposed};
use crate::attention::score::{Distances, Score};
use crate::attention::shared_tiles::TilePart;
use crate::attention::total_steps::TotalTile;
use crate::attention::total_tiles::TotalTiles;
use crate::params::TotalParams;
use crate::tile::smem_total::TotalSmem;

/// Scores of a query block, and its slot of the ring, which has the block's `neg_lse_log2`.
struct Scores<W: TotalWarpgroup, const M8: usize> {
    s: W::Acc<M8>,
    q: W::Slot,
}

/// Sums of 64 keys so far.
struct Mainloop<'a, W: TotalWarpgroup, F> {
    p: &'a TotalParams<W::Tensor, F>,
    /// Sums over this thread's elements alone.
    total: W::Rows,
}

impl<W: TotalWarpgroup, F: Features> Mainloop<'_, W, F> {
    /// Processes one query block whose scores have arrived. Issues the scores of the block after it first, so that they
    /// overlap.
    #[inline(always)]
    fn step<const D8: usize, const M8: usize>(
        &mut self,
        wg: &mut W,
        scores: Scores<W, M8>,
        tile: &TotalTile,
        m_block: u32,
    ) -> Scores<W, M8> {
        let q = wg.wait_q();
        let following = wg.kq::<D8, M8>(q); // Sᵀ = K·Qᵀ of the block after it
        self.add::<M8>(wg, scores, tile, m_block);
        let s = wg.wait::<0, M8>(following);
        wg.release_q(q);
        Scores { s, q }
    }

    /// Adds a query block's P to the sums, and stores them after the last block of the work tile.
    #[inline(always)]
    fn add<const M8: usize>(&mut self, wg: &mut W, Scores { mut s, q }: Scores<W, M8>, tile: &TotalTile, m_block: u32) {
        let p = self.p;
        let (of, mask, score) = (p.item(tile.keys.batch).sequence(), p.features.mask(), p.features.score());
        let key = tile.first_key + wg.own_keys().first_key;
        let place = ScorePlace { pair: 0, row: m_block * 8 * M8 as u32, key };
        let of_head = score.of_head(wg, tile.keys.batch, tile.keys.head);
        let distances = Distances::of_keys(&of, mask, place.row, place.key, 8 * M8 as u32).one_by_one();
        score.curve(wg, &mut s);
        if let Some(missing) = score.bias(wg, &mut s, of_head, &distances) {
            wg.map_rows(&mut s, missing, |s, missing| s + missing);
        }
        if !tile.is_full(m_block) {
            mask_any_transposed(wg, &of, mask, &mut s, place);
        }
        let c = score.unit() * LOG2_E;
        // Sᵀ → Pᵀ
        wg.map_neg_lse_log2(q, &mut s, |s, neg_lse_log2, by_polynomial| {
            let x = W::fma(s, c, neg_lse_log2);
            if by_polynomial { exp2_polynomial::<W>(x) } else { W::exp2(x) }
        });
        // Sums the block first, then adds it to the total: the sum of a long column is too large to take small terms
        // one by one.
        self.total = wg.zip(self.total, wg.fold(&s, |a, p| a + p), |total, block| total + block);
        // Tests in every step for the end of the tile; `unknown` hides from compilers which steps can never be the
        // last. A branch that may need the sums keeps the exponentials before it. Without it, compilers wait for the
        // next scores first, and leave the exponentials until after that product.
        if m_block == W::unknown(tile.start) {
            let total = wg.reduce(self.total, |a, b| a + b);
            wg.store_keys(total, &p.total, tile, &p.item(tile.keys.batch).k);
            self.total = wg.rows(0.0);
        }
    }
}

/// Computes the totals of one consumer warpgroup's 64 keys, for every work tile of its CTA.
#[inline(always)]
pub fn consume<W: TotalWarpgroup, F: Features, const D8: usize, const M8: usize>(
    wg: &mut W,
    p: &TotalParams<W::Tensor, F>,
    smem: &TotalSmem,
    tiles: impl Iterator<Item = TilePart>,
) {
    let mut tiles = TotalTiles::new(p, 8 * M8 as u32, smem.block_n(), wg.own_keys(), tiles);
    let mut mainloop = Mainloop { p, total: wg.rows(0.0) };
    if smem.many_consumers() {
        for tile in tiles {
            wg.wait_k();
            let k = smem.keys_in_registers().then(|| wg.take_k::<D8>());
            for m_block in (tile.start..tile.end).rev() {
                let q = wg.wait_q();
                let s = match &k {
                    Some(k) => wg.taken_kq::<D8, M8>(k, q),
                    None => wg.kq::<D8, M8>(q),
                };
                let s = wg.wait::<0, M8>(s);
                wg.release_q(q);
                mainloop.add::<M8>(wg, Scores { s, q }, &tile, m_block);
            }
            wg.release_k();
            pass_over(wg, &tile);
        }
        return;
    }
    let Some(mut tile) = tiles.next() else { return };
    wg.wait_k();
    let q = wg.wait_q();
    let s = wg.kq::<D8, M8>(q);
    let mut scores = Scores { s: wg.wait::<0, M8>(s), q };
    wg.release_q(q);
    loop {
        let mut m_block = tile.end - 1;
        if (m_block - tile.start) % 2 == 1 {
            scores = mainloop.step::<D8, M8>(wg, scores, &tile, m_block);
            m_block -= 1;
        }
        // Two steps per iteration: the scores alternate between two fragments, and neither is copied.
        while m_block != tile.start {
            scores = mainloop.step::<D8, M8>(wg, scores, &tile, m_block);
            scores = mainloop.step::<D8, M8>(wg, scores, &tile, m_block - 1);
            m_block -= 2;
        }
        wg.release_k();
        let Some(next) = tiles.next() else { break };
        pass_over(wg, &tile);
        wg.wait_k();
        scores = mainloop.step::<D8, M8>(wg, scores, &tile, m_block);
        tile = next;
    }
    mainloop.add::<M8>(wg, scores, &tile, tile.start);
    pass_over(wg, &tile);
}

/// Skips the query blocks of a work tile that attend to keys of other warpgroups only: waits for them and releases
/// them.
#[inline(always)]
fn pass_over<W: TotalWarpgroup>(wg: &mut W, tile: &TotalTile) {
    for _ in 0..tile.passed {
        let q = wg.wait_q();
        wg.release_q(q);
    }
}
