//! Second warp of total attention's producer: computes `neg_lse_log2` = −LSE·log₂e of each query tile and stores it in
//! the tile's slot.
//!
//! The LSE has no alignment that TMA could use, so it passes through registers. Loads run one block ahead of stores, so
//! that their latency overlaps the wait for a slot.

use super::barrier::Mbarrier;
use super::cta::{smem_base, thread_of_warpgroup};
use super::load::load_f32_or;
use super::store::store_shared_f32;
use crate::attention::features::Features;
use crate::attention::row_statistics::neg_lse_log2;
use crate::attention::shared_tiles::TilePart;
use crate::attention::total_steps::OwnKeys;
use crate::attention::total_tiles::TotalTiles;
use crate::ground::places::KvBlock;
use crate::ground::tensor::TensorMap;
use crate::params::TotalParams;
use crate::pipeline::ring::Position;
use crate::tile::lane::{WARP_THREADS, WARPGROUP_THREADS};
use crate::tile::smem_total::TotalSmem;

/// Maximum number of queries of a block per lane.
const LANE_ROWS: usize = (WARPGROUP_THREADS / WARP_THREADS) as usize;

/// Follows the producer of tiles through the ring of Q, in one whole warp. A block has at most 128 queries.
#[inline(always)]
pub fn produce_neg_lse_log2<F: Features>(
    p: &TotalParams<TensorMap, F>,
    smem: &TotalSmem,
    tiles: impl Iterator<Item = TilePart>,
) {
    let (base, lane, block_m) = (smem_base(), thread_of_warpgroup() % WARP_THREADS, smem.block_m);
    let rows = |i: usize| WARP_THREADS * i as u32 + lane;
    let load = |(keys, m_block): (KvBlock, u32)| {
        let queries = p.item(keys.batch).q;
        core::array::from_fn::<f32, LANE_ROWS, _>(|i| {
            let row = m_block * block_m + rows(i);
            let live = rows(i) < block_m && row < queries.len;
            // SAFETY: I5, a row of the batch item lies within the array.
            unsafe { load_f32_or(live, p.lse.of(&queries, keys.head, row), f32::NEG_INFINITY) }
        })
    };
    let block_n = smem.block_n();
    let mut steps = TotalTiles::new(p, block_m, block_n, OwnKeys::whole(block_n), tiles).steps();
    let mut position = Position::PRODUCER;
    let mut loaded = steps.next().map(load);
    while let Some(lse) = loaded {
        loaded = steps.next().map(load);
        let Position { slot, parity } = position;
        // SAFETY: I1, the barriers are initialised; I3, once the wait returns, no thread reads this parity's set of the
        // slot any more; I6, each lane stores its own elements.
        unsafe {
            Mbarrier(base + smem.q_empty(slot)).wait(parity);
            for (i, lse) in lse.into_iter().enumerate() {
                let to = base + smem.neg_lse_log2(slot, parity ^ 1) + 4 * rows(i);
                store_shared_f32(rows(i) < block_m, to, neg_lse_log2(lse));
            }
            Mbarrier(base + smem.q_full(slot)).arrive();
        }
        position.advance(smem.stages);
    }
}
