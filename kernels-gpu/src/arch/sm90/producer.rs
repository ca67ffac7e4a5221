//! The producer: one thread that keeps the ring full.

use core::mem::offset_of;

use super::barrier::Mbarrier;
use super::cta::{Leader, smem_base};
use super::tma::{BoxOrigin, MapAddress, load_box, prefetch_map};
use crate::attention::block_info::NBlocks;
use crate::attention::mask::Mask;
use crate::attention::scheduler::WorkTile;
use crate::params::{ForwardParams, TensorMap, quotient};
use crate::pipeline::order::{KvOrder, KvTile};
use crate::pipeline::ring::Position;
use crate::tile::smem::{ForwardSmem, PANEL_COLUMNS, PANEL_ROW_BYTES};

/// Loads the K and V tiles of every work tile, in the order of [`KvOrder`], as slots become empty.
///
/// `parameters` is the address of `p` in the kernel's parameter space.
#[inline(always)]
pub fn produce<M: Mask>(
    p: &ForwardParams<TensorMap>,
    parameters: u64,
    smem: &ForwardSmem,
    tiles: impl Iterator<Item = WorkTile>,
) {
    if Leader::of_warpgroup().0 == 0 {
        return;
    }
    let base = smem_base();
    let k = MapAddress(parameters + offset_of!(ForwardParams<TensorMap>, k) as u64);
    let v = MapAddress(parameters + offset_of!(ForwardParams<TensorMap>, v) as u64);
    prefetch_map(k);
    prefetch_map(v);
    let group = p.shape.group();
    let block_m = smem.consumers * crate::variants::WARPGROUP_ROWS;
    let mut position = Position::PRODUCER;
    for tile in tiles {
        let blocks = NBlocks::new::<M>(&p.shape, tile.m_block * block_m, block_m, smem.block_n);
        for kv in KvOrder::new(blocks.end) {
            let (map, n_block) = match kv {
                KvTile::K(n_block) => (k, n_block),
                KvTile::V(n_block) => (v, n_block),
            };
            let full = Mbarrier(base + smem.full(position.slot));
            let slot = base + smem.slot(position.slot);
            // SAFETY: the barriers were initialised before the roles parted; the slot is empty once the wait returns,
            // and each panel lies within it.
            unsafe {
                Mbarrier(base + smem.empty(position.slot)).wait(position.parity);
                full.arrive_expect(Leader::SOLE, smem.slot_bytes());
                for panel in 0..smem.head_dim / PANEL_COLUMNS {
                    let origin = BoxOrigin {
                        column: panel * PANEL_COLUMNS,
                        row: n_block * smem.block_n,
                        head: quotient(tile.head, group),
                        batch: tile.batch,
                    };
                    load_box(Leader::SOLE, map, origin, slot + panel * smem.block_n * PANEL_ROW_BYTES, full);
                }
            }
            position.advance(smem.stages);
        }
    }
}
