//! Producer of the forward kernel: one thread that keeps the ring of K and V full.

use core::mem::offset_of;

use super::barrier::Mbarrier;
use super::cta::{Leader, cluster_rank, smem_base};
use super::tma::{BoxOrigin, MapAddress, load_box, load_box_for_both, prefetch_box, prefetch_map};
use crate::attention::features::Features;
use crate::attention::mask::Mask;
use crate::attention::visits::KvBlocks;
use crate::ground::places::KvBlock;
use crate::ground::places::WorkTile;
use crate::ground::tensor::TensorMap;
use crate::params::{ForwardBase, ForwardParams};
use crate::pipeline::order::{KvOrder, KvTile};
use crate::pipeline::ring::Position;
use crate::tile::lane::WARPGROUP_ROWS;
use crate::tile::smem::{ForwardSmem, PANEL_COLUMNS, PANEL_ROW_BYTES, panels};

/// Loads the K and V tiles of every work tile, in the order of [`KvOrder`], as slots become empty.
///
/// `parameters` is the address of `params` in the kernel's parameter space.
#[inline(always)]
pub fn produce<F: Features>(
    params: &ForwardParams<TensorMap, F>,
    parameters: u64,
    smem: &ForwardSmem,
    tiles: impl Iterator<Item = WorkTile>,
) {
    if Leader::of_warpgroup().0 == 0 {
        return;
    }
    let base = smem_base();
    let map = |offset: usize| MapAddress(parameters + offset as u64);
    let [q, k, v] = [
        offset_of!(ForwardBase<TensorMap>, q),
        offset_of!(ForwardBase<TensorMap>, k),
        offset_of!(ForwardBase<TensorMap>, v),
    ];
    let far_k = k + size_of::<TensorMap>();
    prefetch_map(map(k));
    prefetch_map(map(v));
    if const { F::Mask::PAIRS > 1 } {
        prefetch_map(map(far_k));
    }
    let block_m = smem.consumers * WARPGROUP_ROWS;
    let mut position = Position::PRODUCER;
    // CTA of the cluster that loads the next tile for both; the CTAs alternate.
    let mut multicast_rank = 0;
    // Prefetches Q into L2. The consumers load Q one step before they need it, while a work tile begins two steps
    // earlier here.
    let tiles = tiles.inspect(|tile| {
        for (part, panel) in
            (0..smem.consumers).flat_map(|part| (0..panels(smem.head_dim)).map(move |panel| (part, panel)))
        {
            let row = tile.m_block * block_m + part * WARPGROUP_ROWS;
            let at = BoxOrigin { column: panel * PANEL_COLUMNS, row, head: tile.head, batch: tile.batch };
            // SAFETY: I5, the host has made the tensor map.
            unsafe { prefetch_box(Leader::SOLE, map(q), at) };
        }
    });
    let (p, block_sizes) = (&params.base, (block_m, smem.block_n));
    let blocks = KvBlocks::new(p.shape.sequence(), *params.features.mask(), block_sizes, p.order.group, tiles);
    for tile in KvOrder::new(blocks) {
        let (tensor, KvBlock { batch, head, n_block, .. }) = match tile {
            KvTile::K(block) => (if block.pair == 0 { k } else { far_k }, block),
            KvTile::V(block) => (v, block),
        };
        let full = Mbarrier(base + smem.full(position.slot));
        let slot = base + smem.slot(position.slot);
        let mine = smem.cluster == 1 || multicast_rank == cluster_rank();
        multicast_rank ^= 1;
        // SAFETY: I1, the barriers are initialised; I3, the slot is empty once the wait returns, in both CTAs of a
        // cluster, and each panel lies within it.
        unsafe {
            Mbarrier(base + smem.empty(position.slot)).wait(position.parity);
            full.arrive_expect(Leader::SOLE, smem.slot_bytes());
            for panel in 0..if mine { panels(smem.head_dim) } else { 0 } {
                let origin = BoxOrigin { column: panel * PANEL_COLUMNS, row: n_block * smem.block_n, head, batch };
                let to = slot + panel * smem.block_n * PANEL_ROW_BYTES;
                match smem.cluster {
                    1 => load_box(Leader::SOLE, map(tensor), origin, to, full),
                    _ => load_box_for_both(map(tensor), origin, to, full),
                }
            }
        }
        position.advance(smem.stages);
    }
}
