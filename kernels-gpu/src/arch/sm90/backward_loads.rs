//! Loads of the backward kernel: K and V of each work tile, and the query blocks that fill the rings of Q and dO.

use core::mem::offset_of;

use super::barrier::Mbarrier;
use super::cta::{self, Leader, smem_base};
use super::load::load_bytes;
use super::math::fresh;
use super::tma::{BoxOrigin, MapAddress, load_box};
use crate::attention::mask::Mask;
use crate::attention::query_blocks::QueryBlocks;
use crate::ground::places::KvBlock;
use crate::ground::places::QueryBlock;
use crate::ground::tensor::TensorMap;
use crate::params::BackwardBase;
use crate::tile::smem::{BackwardSmem, PANEL_COLUMNS, PANEL_ROW_BYTES, panels};

/// Producer's end of the rings. All threads of its warpgroup wait for slots, and one of them issues the loads.
pub struct Loads<'a> {
    p: &'a BackwardBase<TensorMap>,
    /// Address of `p` in the kernel's parameter space.
    parameters: u64,
    smem: &'a BackwardSmem,
    /// Number of query blocks so far; a slot and its phase parity follow from it.
    count: u32,
}

impl<'a> Loads<'a> {
    #[inline(always)]
    pub fn new(p: &'a BackwardBase<TensorMap>, parameters: u64, smem: &'a BackwardSmem) -> Self {
        Loads { p, parameters, smem, count: 0 }
    }

    /// Loads the panels of a tile of a tensor. The tensor's map lies at byte offset `tensor` in the parameters.
    #[inline(always)]
    fn tile(&self, leader: Leader, tensor: usize, rows: u32, at: BoxOrigin, to: u32, full: Mbarrier) {
        for panel in 0..panels(self.smem.head_dim) {
            let origin = BoxOrigin { column: panel * PANEL_COLUMNS, ..at };
            let map = MapAddress(self.parameters + tensor as u64);
            // SAFETY: I3, the callers have waited until the destination is empty; each panel lies within it.
            unsafe { load_box(leader, map, origin, to + panel * rows * PANEL_ROW_BYTES, full) };
        }
    }

    /// Loads K of a block of keys into a buffer that no thread reads any more.
    #[inline(always)]
    pub fn k(&self, keys: &KvBlock, buffer: u32, leader: Leader) {
        let (smem, base) = (self.smem, fresh(smem_base()));
        let tensor = match keys.pair {
            0 => offset_of!(BackwardBase<TensorMap>, k),
            _ => offset_of!(BackwardBase<TensorMap>, k) + size_of::<TensorMap>(),
        };
        self.keys(leader, tensor, keys, base + smem.k(buffer), Mbarrier(base + smem.k_full(buffer)));
    }

    /// Loads V of a block of keys. No thread may still read the V before it.
    #[inline(always)]
    pub fn v(&self, keys: &KvBlock, leader: Leader) {
        let (smem, base) = (self.smem, fresh(smem_base()));
        let tensor = offset_of!(BackwardBase<TensorMap>, v);
        self.keys(leader, tensor, keys, base + smem.v(), Mbarrier(base + smem.v_full()));
    }

    #[inline(always)]
    fn keys(&self, leader: Leader, tensor: usize, keys: &KvBlock, to: u32, full: Mbarrier) {
        // SAFETY: I1, the barrier is initialised.
        unsafe { full.arrive_expect(leader, self.smem.kv_bytes()) };
        let row = keys.n_block * self.smem.block_n;
        let at = BoxOrigin::of(&self.p.item(fresh(keys.batch)).k, fresh(keys.head), row, 0);
        self.tile(leader, tensor, self.smem.block_n, at, to, full);
    }

    /// Starts loading V of a work tile, and as many query blocks as the rings have slots. `upcoming` is the first query
    /// block; it becomes the first that is not loaded.
    #[inline(always)]
    pub fn begin<M: Mask>(
        &mut self,
        keys: &KvBlock,
        leader: Leader,
        blocks: &QueryBlocks<M>,
        upcoming: &mut QueryBlock,
    ) {
        self.v(keys, leader);
        for _ in 0..self.smem.stages().min(blocks.count()) {
            self.next_queries(blocks, upcoming, cta::converged(Leader::of_warpgroup));
        }
    }

    /// Loads the upcoming query block, as [`Loads::queries`] does, and moves on to the one after it.
    #[inline(always)]
    pub fn next_queries<M: Mask>(&mut self, blocks: &QueryBlocks<M>, upcoming: &mut QueryBlock, leader: Leader) {
        self.queries(upcoming, leader);
        *upcoming = blocks.after(upcoming);
    }

    /// Loads Q, dO, `neg_lse_log2` and δ of a query block into the next slots, once they are empty. The leader is one
    /// thread of the warpgroup.
    #[inline(always)]
    fn queries(&mut self, block: &QueryBlock, leader: Leader) {
        let (p, smem, base) = (self.p, self.smem, fresh(smem_base()));
        let QueryBlock { batch, head, m_block, pair } = *block;
        let batch = fresh(batch);
        let count = cta::uniform(self.count);
        let (slot, parity) = (count % smem.stages(), !(count / smem.stages()) & 1);
        let row = m_block * smem.block_m;
        let at = BoxOrigin::of(&p.item(batch).q, head, row, 0);
        let statistics = 4 * p.workspace.row(p.head_rows(batch, head), row);
        let (q_full, do_full) = (Mbarrier(base + smem.q_full(slot)), Mbarrier(base + smem.do_full(slot)));
        let (row_bytes, bytes) = (smem.row_bytes(), smem.q_bytes() + smem.row_bytes());
        let q = match fresh(pair) {
            0 => offset_of!(BackwardBase<TensorMap>, q),
            _ => offset_of!(BackwardBase<TensorMap>, q) + size_of::<TensorMap>(),
        };
        // SAFETY: I1, the barriers are initialised; I3, the slot is empty after the wait; I5, the host has made the
        // workspace large enough, whose rows the statistics are.
        unsafe {
            Mbarrier(base + smem.empty(slot)).wait(parity);
            q_full.arrive_expect(leader, bytes);
            load_bytes(
                leader,
                p.workspace.neg_lse_log2 + statistics,
                row_bytes,
                base + smem.neg_lse_log2(slot),
                q_full,
            );
        }
        self.tile(leader, q, smem.block_m, at, base + smem.q(slot), q_full);
        // SAFETY: I1, the barrier is initialised; I3, the slot of dO shares the empty barrier of Q; I5, the statistics
        // are rows of the workspace.
        unsafe {
            do_full.arrive_expect(leader, bytes);
            load_bytes(leader, p.workspace.delta + statistics, row_bytes, base + smem.delta(slot), do_full);
        }
        let d_o = offset_of!(BackwardBase<TensorMap>, d_o);
        self.tile(leader, d_o, smem.block_m, at, base + smem.d_o(slot), do_full);
        self.count += 1;
    }
}
