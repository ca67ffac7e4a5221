//! What the backward kernel loads: each work tile's K and V, and the query blocks that fill the rings of Q and dO.

use core::mem::offset_of;

use super::barrier::Mbarrier;
use super::cta::{self, Leader, smem_base};
use super::load::load_bytes;
use super::math::fresh;
use super::tma::{BoxOrigin, MapAddress, load_box};
use crate::attention::query_blocks::QueryBlock;
use crate::params::{BackwardParams, Second, SecondPair, TensorMap};
use crate::pipeline::order::KvBlock;
use crate::tile::smem::{BackwardSmem, PANEL_COLUMNS, PANEL_ROW_BYTES, panels};

/// The producer's end of the rings. All threads of its warpgroup wait for slots, one of them loads.
pub struct Loads<'a, S: Second<TensorMap>> {
    p: &'a BackwardParams<TensorMap, S>,
    /// Address of `p` in the kernel's parameter space.
    parameters: u64,
    smem: &'a BackwardSmem,
    /// Query blocks so far; a slot and its phase follow from it. The top bit is the phase of K and V.
    count: u32,
}

/// The top bit of [`Loads::count`].
const KV: u32 = 1 << 31;

impl<'a, S: Second<TensorMap>> Loads<'a, S> {
    #[inline(always)]
    pub fn new(p: &'a BackwardParams<TensorMap, S>, parameters: u64, smem: &'a BackwardSmem) -> Self {
        Loads { p, parameters, smem, count: KV }
    }

    /// Loads the panels of a tile of a tensor, which lies so many bytes into the parameters.
    #[inline(always)]
    fn tile(&self, leader: Leader, tensor: usize, rows: u32, at: BoxOrigin, to: u32, full: Mbarrier) {
        for panel in 0..panels(self.smem.head_dim) {
            let origin = BoxOrigin { column: panel * PANEL_COLUMNS, ..at };
            let map = MapAddress(self.parameters + tensor as u64);
            // SAFETY: the callers have waited until what is loaded into is empty; each panel lies within it.
            unsafe { load_box(leader, map, origin, to + panel * rows * PANEL_ROW_BYTES, full) };
        }
    }

    /// Loads K and V of a block of keys, once nobody needs those before.
    #[inline(always)]
    pub fn keys(&mut self, keys: &KvBlock) {
        let (smem, base, leader) = (self.smem, smem_base(), cta::converged(Leader::of_warpgroup));
        let full = Mbarrier(base + smem.kv_full());
        // SAFETY: the barriers were initialised before the roles parted.
        unsafe {
            Mbarrier(base + smem.kv_empty()).wait(self.count / KV);
            full.arrive_expect(leader, 2 * smem.kv_bytes());
        }
        let k = match keys.pair {
            0 => offset_of!(BackwardParams<TensorMap, S>, k),
            _ => offset_of!(BackwardParams<TensorMap, S>, second) + offset_of!(SecondPair<TensorMap>, k),
        };
        let at = BoxOrigin { column: 0, row: keys.n_block * smem.block_n, head: keys.head, batch: keys.batch };
        self.tile(leader, k, smem.block_n, at, base + smem.k(), full);
        self.tile(leader, offset_of!(BackwardParams<TensorMap, S>, v), smem.block_n, at, base + smem.v(), full);
        self.count ^= KV;
    }

    /// Loads Q, dO and the statistics of a query block into the next slots, once they are empty; the leader is one thread of
    /// the warpgroup.
    #[inline(always)]
    pub fn queries(&mut self, block: &QueryBlock, leader: Leader) {
        let (p, smem, base) = (self.p, self.smem, fresh(smem_base()));
        let QueryBlock { batch, head, m_block, pair } = *block;
        let batch = fresh(batch);
        let count = cta::uniform(self.count & !KV);
        let (slot, parity) = (count % smem.stages(), !(count / smem.stages()) & 1);
        let at = BoxOrigin { column: 0, row: m_block * smem.block_m, head, batch };
        let statistics = 4 * p.workspace.row(&p.shape, batch, head, at.row);
        let (q_full, do_full) = (Mbarrier(base + smem.q_full(slot)), Mbarrier(base + smem.do_full(slot)));
        let (row_bytes, bytes) = (smem.row_bytes(), smem.q_bytes() + smem.row_bytes());
        let q = match fresh(pair) {
            0 => offset_of!(BackwardParams<TensorMap, S>, q),
            _ => offset_of!(BackwardParams<TensorMap, S>, second) + offset_of!(SecondPair<TensorMap>, q),
        };
        // SAFETY: as above; the statistics are rows of the workspace.
        unsafe {
            Mbarrier(base + smem.empty(slot)).wait(parity);
            q_full.arrive_expect(leader, bytes);
            load_bytes(leader, p.workspace.offsets + statistics, row_bytes, base + smem.offsets(slot), q_full);
        }
        self.tile(leader, q, smem.block_m, at, base + smem.q(slot), q_full);
        // SAFETY: as above.
        unsafe {
            do_full.arrive_expect(leader, bytes);
            load_bytes(leader, p.workspace.delta + statistics, row_bytes, base + smem.delta(slot), do_full);
        }
        let d_o = offset_of!(BackwardParams<TensorMap, S>, d_o);
        self.tile(leader, d_o, smem.block_m, at, base + smem.d_o(slot), do_full);
        self.count += 1;
    }
}
