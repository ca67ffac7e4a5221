//! The backward kernel's producer: one thread that loads each work tile's K and V, and keeps the rings of Q and dO full.

use core::mem::offset_of;

use super::barrier::Mbarrier;
use super::cta::{Leader, smem_base};
use super::load::load_bytes;
use super::math::fresh;
use super::tma::{BoxOrigin, MapAddress, load_box};
use crate::attention::mask::Mask;
use crate::attention::pairs::Pairs;
use crate::attention::query_blocks::{QueryBlock, QueryBlocks, key_block};
use crate::attention::scheduler::WorkTile;
use crate::params::{BackwardParams, Second, SecondPair, Shape, TensorMap};
use crate::pipeline::order::KvBlock;
use crate::tile::smem::{BackwardSmem, PANEL_COLUMNS, PANEL_ROW_BYTES, panels};

/// Loads what the work tiles need, in order. `parameters` is the address of `p` in the kernel's parameter space.
#[inline(always)]
pub fn produce<M: Mask, S: Second<TensorMap>>(
    p: &BackwardParams<TensorMap, S>,
    parameters: u64,
    smem: &BackwardSmem,
    tiles: impl Iterator<Item = WorkTile>,
) {
    if Leader::of_warpgroup().0 == 0 {
        return;
    }
    let base = smem_base();
    // SAFETY (of all blocks below): the barriers were initialised before the roles parted; what is loaded into is empty
    // once its wait returns, and each panel lies within it; the statistics are rows of the workspace.
    let load_tile = |tensor: usize, rows: u32, at: BoxOrigin, to: u32, full: Mbarrier| {
        for panel in 0..panels(smem.head_dim) {
            let origin = BoxOrigin { column: panel * PANEL_COLUMNS, ..at };
            let map = MapAddress(parameters + tensor as u64);
            // SAFETY: see above.
            unsafe { load_box(Leader::SOLE, map, origin, to + panel * rows * PANEL_ROW_BYTES, full) };
        }
    };
    let (q, k) = (offset_of!(BackwardParams<TensorMap, S>, q), offset_of!(BackwardParams<TensorMap, S>, k));
    let second = offset_of!(BackwardParams<TensorMap, S>, second);
    let (second_q, second_k) =
        (second + offset_of!(SecondPair<TensorMap>, q), second + offset_of!(SecondPair<TensorMap>, k));
    // Loads so far, of each ring; a slot and its phase follow from it. The top bit is the phase of K and V.
    const KV: u32 = 1 << 31;
    let mut loads = KV;
    for tile in tiles {
        let mut pairs_left = p.second.last() + 1;
        while pairs_left > 0 {
            pairs_left -= 1;
            let pair = pairs_left;
            // Computed anew each time: there are few registers to keep what follows from the shape.
            let shape = Shape {
                seqlen_q: fresh(p.shape.seqlen_q),
                seqlen_k: fresh(p.shape.seqlen_k),
                heads_q: fresh(p.shape.heads_q),
                ..p.shape
            };
            let keys = KvBlock { pair, ..key_block(&shape, smem.block_n, &tile) };
            let pairs = p.second.pairs(&shape);
            let blocks = QueryBlocks::<M, S::Pairs>::new(&shape, pairs, smem.block_m, smem.block_n, &keys);
            if S::Pairs::COUNT > 1 && blocks.count() == 0 {
                continue;
            }
            let full = Mbarrier(base + smem.kv_full());
            // SAFETY: see above.
            unsafe {
                Mbarrier(base + smem.kv_empty()).wait(loads / KV);
                full.arrive_expect(Leader::SOLE, 2 * smem.kv_bytes());
            }
            let at = BoxOrigin { column: 0, row: keys.n_block * smem.block_n, head: keys.head, batch: keys.batch };
            load_tile(if pair == 0 { k } else { second_k }, smem.block_n, at, base + smem.k(), full);
            load_tile(offset_of!(BackwardParams<TensorMap, S>, v), smem.block_n, at, base + smem.v(), full);
            loads ^= KV;
            let mut block = blocks.first();
            for _ in 0..blocks.count() {
                let base = fresh(base);
                let QueryBlock { batch, head, m_block, .. } = block;
                let (slot, parity) = (loads % BackwardSmem::STAGES, !(loads / BackwardSmem::STAGES) & 1);
                let at = BoxOrigin { column: 0, row: m_block * smem.block_m, head, batch };
                let statistics = |row| 4 * p.workspace.row(&p.shape, batch, head, row);
                let (q_full, do_full) = (Mbarrier(base + smem.q_full(slot)), Mbarrier(base + smem.do_full(slot)));
                // SAFETY: see above.
                unsafe {
                    Mbarrier(base + smem.q_empty(slot)).wait(parity);
                    q_full.arrive_expect(Leader::SOLE, smem.q_bytes() + smem.row_bytes());
                    let lse = p.workspace.lse + statistics(at.row);
                    load_bytes(Leader::SOLE, lse, smem.row_bytes(), base + smem.lse(slot), q_full);
                }
                load_tile(if fresh(pair) == 0 { q } else { second_q }, smem.block_m, at, base + smem.q(slot), q_full);
                // SAFETY: see above.
                unsafe {
                    Mbarrier(base + smem.do_empty(slot)).wait(parity);
                    do_full.arrive_expect(Leader::SOLE, smem.q_bytes() + smem.row_bytes());
                    let delta = p.workspace.delta + statistics(fresh(at.row));
                    load_bytes(Leader::SOLE, delta, smem.row_bytes(), base + smem.delta(slot), do_full);
                }
                load_tile(
                    offset_of!(BackwardParams<TensorMap, S>, d_o),
                    smem.block_m,
                    at,
                    base + smem.d_o(slot),
                    do_full,
                );
                loads += 1;
                block = blocks.after(&block);
            }
        }
    }
}
