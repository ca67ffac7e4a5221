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
use crate::ground::sequence::Span;
use crate::ground::tensor::TensorMap;
use crate::params::{ForwardBase, ForwardParams};
use crate::pipeline::order::{KvOrder, KvStep};
use crate::pipeline::ring::Position;
use crate::tile::lane::WARPGROUP_ROWS;
use crate::tile::smem::{ForwardSmem, PANEL_COLUMNS, PANEL_ROW_BYTES, panels};

/// Producer's end of the K/V ring.
struct KvLoads<'a> {
    smem: &'a ForwardSmem,
    base: u32,
    position: Position,
    /// CTA of the cluster that loads the next tile for both; the CTAs alternate.
    multicast_rank: u32,
}

impl KvLoads<'_> {
    /// Waits for the next slot and starts loading a tile of K or V into it. `rows` are those of its batch item.
    #[inline(always)]
    fn load(&mut self, map: MapAddress, rows: &Span, KvBlock { head, n_block, .. }: KvBlock) {
        let (smem, Position { slot, parity }) = (self.smem, self.position);
        let full = Mbarrier(self.base + smem.full(slot));
        let mine = smem.cluster == 1 || self.multicast_rank == cluster_rank();
        self.multicast_rank ^= 1;
        // SAFETY: I1, the barriers are initialised; I3, the slot is empty once the wait returns, in both CTAs of a
        // cluster, and each panel lies within it.
        unsafe {
            Mbarrier(self.base + smem.empty(slot)).wait(parity);
            full.arrive_expect(Leader::SOLE, smem.slot_bytes());
            for panel in 0..if mine { panels(smem.head_dim) } else { 0 } {
                let origin = BoxOrigin::of(rows, head, n_block * smem.block_n, panel * PANEL_COLUMNS);
                let to = self.base + smem.slot(slot) + panel * smem.block_n * PANEL_ROW_BYTES;
                match smem.cluster {
                    1 => load_box(Leader::SOLE, map, origin, to, full),
                    _ => load_box_for_both(map, origin, to, full),
                }
            }
        }
        self.position.advance(smem.stages);
    }
}

/// Prefetches Q of a work tile into L2. The consumers load Q one step before they need it, while a work tile begins two
/// steps earlier in the producer.
#[inline(always)]
fn prefetch_q(smem: &ForwardSmem, q: MapAddress, tile: &WorkTile, rows: &Span) {
    for (part, panel) in (0..smem.consumers).flat_map(|part| (0..panels(smem.head_dim)).map(move |panel| (part, panel)))
    {
        let row = (tile.m_block * smem.consumers + part) * WARPGROUP_ROWS;
        let at = BoxOrigin::of(rows, tile.head, row, panel * PANEL_COLUMNS);
        // SAFETY: I5, the host has made the tensor map.
        unsafe { prefetch_box(Leader::SOLE, q, at) };
    }
}

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
    let map = |offset: usize| MapAddress(parameters + offset as u64);
    let q = map(offset_of!(ForwardBase<TensorMap>, q));
    let k_of = |pair: u32| map(offset_of!(ForwardBase<TensorMap>, k) + pair as usize * size_of::<TensorMap>());
    let v = map(offset_of!(ForwardBase<TensorMap>, v));
    for pair in 0..F::Mask::PAIRS {
        prefetch_map(k_of(pair));
    }
    prefetch_map(v);
    let (p, block_sizes) = (&params.base, (smem.block_m(), smem.block_n));
    let tiles = tiles.inspect(|tile| prefetch_q(smem, q, tile, &p.item(tile.batch).q));
    let sequence = |batch| p.item(batch).sequence();
    let blocks = KvBlocks::new(sequence, *params.features.mask(), block_sizes, p.order.group, tiles);
    let mut loads = KvLoads { smem, base: smem_base(), position: Position::PRODUCER, multicast_rank: 0 };
    for KvStep { k, v: v_block } in KvOrder::new(blocks) {
        if let Some(block) = k {
            loads.load(k_of(block.pair), &p.item(block.batch).k, block);
        }
        if let Some(block) = v_block {
            loads.load(v, &p.item(block.batch).k, block);
        }
    }
}
