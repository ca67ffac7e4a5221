//! First warp of total attention's producer: one thread loads each work tile's K, and keeps the ring of Q full.

use core::mem::offset_of;

use super::barrier::Mbarrier;
use super::cta::{Leader, smem_base};
use super::tma::{BoxOrigin, MapAddress, load_box, prefetch_map};
use crate::attention::features::Features;
use crate::attention::shared_tiles::TilePart;
use crate::attention::total_steps::OwnKeys;
use crate::attention::total_tiles::TotalTiles;
use crate::ground::places::KvBlock;
use crate::ground::tensor::TensorMap;
use crate::params::TotalParams;
use crate::pipeline::ring::Position;
use crate::tile::smem::{PANEL_COLUMNS, PANEL_ROW_BYTES, panels};
use crate::tile::smem_total::TotalSmem;

/// Loads K and Q of the work tiles, in order, in the first warp of the warpgroup. `parameters` is the address of `p` in
/// the kernel's parameter space.
#[inline(always)]
pub fn produce<F: Features>(
    p: &TotalParams<TensorMap, F>,
    parameters: u64,
    smem: &TotalSmem,
    tiles: impl Iterator<Item = TilePart>,
) {
    if Leader::of_warpgroup().0 == 0 {
        return;
    }
    let base = smem_base();
    let map = |tensor: usize| MapAddress(parameters + tensor as u64);
    let (q, k) = (offset_of!(TotalParams<TensorMap, F>, q), offset_of!(TotalParams<TensorMap, F>, k));
    prefetch_map(map(q));
    prefetch_map(map(k));
    // Waits for the slot, then fills it.
    let load_tile = |tensor: usize, rows: u32, at: BoxOrigin, to: u32, [empty, full]: [Mbarrier; 2], parity: u32| {
        // SAFETY: I1, the barriers are initialised; I3, the slot is empty once the wait returns, and each panel lies
        // within it.
        unsafe {
            empty.wait(parity);
            full.arrive_expect(Leader::SOLE, panels(smem.head_dim) * rows * PANEL_ROW_BYTES);
            for panel in 0..panels(smem.head_dim) {
                let origin = BoxOrigin { column: panel * PANEL_COLUMNS, ..at };
                load_box(Leader::SOLE, map(tensor), origin, to + panel * rows * PANEL_ROW_BYTES, full);
            }
        }
    };
    let (block_m, block_n) = (smem.block_m, smem.block_n());
    let (mut k_position, mut q_position) = (Position::PRODUCER, Position::PRODUCER);
    for tile in TotalTiles::new(p, block_m, block_n, OwnKeys::whole(block_n), tiles) {
        let KvBlock { batch, head, .. } = tile.keys;
        let item = p.item(batch);
        let Position { slot, parity } = k_position;
        let at = BoxOrigin::of(&item.k, p.order.group.divide(head).0, tile.first_key, 0);
        let barriers = [smem.k_empty(slot), smem.k_full(slot)].map(|barrier| Mbarrier(base + barrier));
        load_tile(k, block_n, at, base + smem.k(slot), barriers, parity);
        k_position.advance(TotalSmem::K_STAGES);
        for m_block in (tile.start..tile.end).rev() {
            let Position { slot, parity } = q_position;
            let at = BoxOrigin::of(&item.q, head, m_block * block_m, 0);
            let barriers = [smem.q_empty(slot), smem.q_full(slot)].map(|barrier| Mbarrier(base + barrier));
            load_tile(q, block_m, at, base + smem.q(slot), barriers, parity);
            q_position.advance(smem.stages);
        }
    }
}
