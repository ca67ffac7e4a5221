//! A consumer of the forward kernel: [`ForwardWarpgroup`] on Hopper.

use core::mem::offset_of;

use super::barrier::Mbarrier;
use super::consumer::Consumer;
use super::cta::{self, Leader, thread_of_warpgroup};
use super::fragment::{Fragment, Operand, Rows};
use super::math::Packed;
use super::named_barrier::ForwardBarrier;
use super::store::{
    Lines, commit_stores, fence_async_proxy, store_box, store_f32, store_lines, wait_for_stores, write_tile,
};
use super::tma::{BoxOrigin, MapAddress, load_box};
use super::wgmma::{self, Descriptor};
use crate::arch::{ForwardWarpgroup, Pending};
use crate::ground::places::WorkTile;
use crate::ground::sequence::Span;
use crate::ground::tensor::{Output, RowArray, TensorMap};
use crate::params::ForwardBase;
use crate::pipeline::ring::Position;
use crate::tile::lane::{WARP_ROWS, WARPGROUP_ROWS, WARPGROUP_THREADS};
use crate::tile::smem::{ForwardSmem, PANEL_COLUMNS, PANEL_ROW_BYTES, columns_step, panels, rows_step};

/// Consumer's end of the forward pipeline.
pub struct ForwardPipe<'a> {
    smem: &'a ForwardSmem,
    q_parity: u32,
    position: Position,
}

/// Returns the work tile. If O is not staged, or if there are two pairs, also tells ptxas that all lanes of the warp
/// have the same tile. Without this ptxas takes the warp for diverged in the mainloop of those kernels, and
/// synchronises it in every step (measured, cause unknown). The others do without, because it takes 3 % of the time of
/// short causal sequences (notebook 139).
#[inline(always)]
fn uniform_tile(smem: &ForwardSmem, tile: &WorkTile) -> WorkTile {
    let WorkTile { batch, head, m_block } = *tile;
    if smem.stages_o() && smem.pairs == 1 {
        return *tile;
    }
    WorkTile { batch: cta::uniform(batch), head: cta::uniform(head), m_block: cta::uniform(m_block) }
}

impl<'a, E: Packed> Consumer<E, ForwardPipe<'a>> {
    /// Makes a consumer. Each consumer warpgroup calls this once, after the barriers were initialised; `parameters` is
    /// the address of the kernel's [`ForwardParams`](crate::params::ForwardParams).
    #[inline(always)]
    pub fn forward(smem: &'a ForwardSmem, index: u32, parameters: u64) -> Self {
        if index == smem.consumers - 1 {
            ForwardBarrier::ping_pong(0).arrive(2 * WARPGROUP_THREADS);
        }
        Self::with_pipe(index, parameters, ForwardPipe { smem, q_parity: 0, position: Position::CONSUMER })
    }

    /// Waits until TMA has read every staged output. It is the last thing that a consumer does.
    #[inline(always)]
    pub fn finish(self) {
        wait_for_stores();
    }

    #[inline(always)]
    fn q_full(&self) -> Mbarrier {
        Mbarrier(self.base() + self.pipe.smem.q_full(self.index()))
    }

    /// Stores rows of O by TMA. Each warp stores its sixteen rows, from its own part of the staging tile.
    #[inline(always)]
    fn store_tile<const D8: usize>(&self, x: &Operand<D8>, tile: &WorkTile, rows: &Span) {
        let first_row = thread_of_warpgroup() / 32 * WARP_ROWS;
        let staging = self.base() + self.pipe.smem.o(self.index());
        wait_for_stores();
        // SAFETY: I6, this part of the staging tile is the warp's own, and TMA has read its previous contents.
        unsafe { write_tile(x, staging, WARPGROUP_ROWS, 0) };
        fence_async_proxy();
        let map = MapAddress(self.parameters + offset_of!(ForwardBase<TensorMap>, o.tiles) as u64);
        let leader = Leader::of_warp();
        for panel in 0..panels(self.pipe.smem.head_dim) {
            let row = self.first_row(tile) + first_row;
            let origin = BoxOrigin::of(rows, tile.head, row, panel * PANEL_COLUMNS);
            let from = staging + first_row * PANEL_ROW_BYTES + panel * WARPGROUP_ROWS * PANEL_ROW_BYTES;
            // SAFETY: the box is what this warp has just staged; I6, its rows of O belong to this warp.
            unsafe { store_box(leader, map, origin, from) };
        }
        commit_stores();
    }
}

impl<E: Packed> ForwardWarpgroup for Consumer<E, ForwardPipe<'_>> {
    /// Index of the slot of the K/V ring.
    type Slot = u32;

    #[inline(always)]
    fn first_row(&self, tile: &WorkTile) -> u32 {
        (tile.m_block * self.pipe.smem.consumers + self.index()) * WARPGROUP_ROWS
    }
    #[inline(always)]
    fn load_q(&mut self, tile: &WorkTile, rows: &Span) {
        // After this barrier, every warp of this warpgroup has finished its last product with Q.
        ForwardBarrier::queries_read(self.index()).sync(WARPGROUP_THREADS);
        let leader = Leader::of_warpgroup();
        let (smem, pairs) = (self.pipe.smem, self.pipe.smem.pairs);
        // SAFETY: I1, the barrier is initialised; I3, no warp reads the query tiles any more, and each panel lies
        // within its own.
        unsafe {
            self.q_full().arrive_expect(leader, pairs * smem.q_bytes());
            for (pair, panel) in (0..pairs).flat_map(|pair| (0..panels(smem.head_dim)).map(move |panel| (pair, panel)))
            {
                let map = offset_of!(ForwardBase<TensorMap>, q) + pair as usize * size_of::<TensorMap>();
                let origin = BoxOrigin::of(rows, tile.head, self.first_row(tile), panel * PANEL_COLUMNS);
                let to = self.base() + smem.q(self.index(), pair) + panel * WARPGROUP_ROWS * PANEL_ROW_BYTES;
                load_box(leader, MapAddress(self.parameters + map as u64), origin, to, self.q_full());
            }
        }
    }
    #[inline(always)]
    fn wait_q(&mut self) {
        // SAFETY: I1, the barrier is initialised.
        unsafe { self.q_full().wait(self.pipe.q_parity) };
        self.pipe.q_parity ^= 1;
    }
    #[inline(always)]
    fn wait_kv(&mut self) -> u32 {
        let Position { slot, parity } = self.pipe.position;
        // SAFETY: I1, the barrier is initialised.
        unsafe { Mbarrier(self.base() + self.pipe.smem.full(slot)).wait(parity) };
        self.pipe.position.advance(self.pipe.smem.stages);
        slot
    }
    #[inline(always)]
    fn release_kv(&mut self, slot: u32) {
        let empty = Mbarrier(self.base() + self.pipe.smem.empty(slot));
        // SAFETY: I1, the barriers are initialised; I4, the warp is converged; no CTA of a cluster ends before the
        // other.
        unsafe {
            empty.arrive_elected();
            if self.pipe.smem.cluster > 1 {
                empty.arrive_elected_at(cta::cluster_rank() ^ 1);
            }
        }
    }

    #[inline(always)]
    fn qk<const D8: usize, const N8: usize>(&mut self, k: u32, pair: u32) -> Pending<Fragment<N8>> {
        let q = Descriptor::k_major(self.base + self.pipe.smem.q(self.index(), pair));
        let k = Descriptor::k_major(self.base + self.pipe.smem.slot(k));
        // SAFETY: I2, both tiles are full until this product is waited for.
        unsafe {
            wgmma::multiply::<E, N8>(D8 as u32 / 2, |step| {
                [q.offset(columns_step(WARPGROUP_ROWS, step)), k.offset(columns_step(8 * N8 as u32, step))]
            })
        }
    }
    #[inline(always)]
    fn pv<const N8: usize, const D8: usize>(
        &mut self,
        o: Fragment<D8>,
        p: Operand<N8>,
        v: u32,
    ) -> Pending<Fragment<D8>> {
        let v = Descriptor::mn_major(self.base + self.pipe.smem.slot(v), 8 * N8 as u32 * PANEL_ROW_BYTES);
        // SAFETY: I2, the tile of V is full until this product is waited for.
        unsafe { wgmma::accumulate::<E, N8, D8>(o, p, |step| v.offset(rows_step(step))) }
    }

    #[inline(always)]
    fn take_ping_pong(&mut self) {
        ForwardBarrier::ping_pong(self.index()).sync(2 * WARPGROUP_THREADS);
    }
    #[inline(always)]
    fn pass_ping_pong(&mut self) {
        let next = self.index() + 1;
        let next = if next == self.pipe.smem.consumers { 0 } else { next };
        ForwardBarrier::ping_pong(next).arrive(2 * WARPGROUP_THREADS);
    }

    #[inline(always)]
    fn store<const D8: usize>(
        &mut self,
        x: &Fragment<D8>,
        to: &Output<TensorMap>,
        tile: &WorkTile,
        rows: &Span,
        head_dim: u32,
    ) {
        let tile = &uniform_tile(self.pipe.smem, tile);
        let packed = x.pack::<E>();
        if self.pipe.smem.stages_o() {
            self.store_tile(&packed, tile, rows);
        } else {
            let at = Lines { rows: *rows, head: tile.head, row: self.first_row(tile), column: 0 };
            // SAFETY: I5, the host has checked the tensor; I6, the rows of this tile belong to this warpgroup.
            unsafe { store_lines(&packed, &to.rows, at, head_dim) };
        }
    }
    #[inline(always)]
    fn store_rows(&mut self, values: Rows, to: &RowArray, tile: &WorkTile, rows: &Span) {
        let lane = self.lane();
        for (half, value) in values.into_iter().enumerate() {
            let row = self.first_row(tile) + lane.row(half as u32);
            // SAFETY: I5, a row of the batch item lies within the array; I6, one lane of the row's quad stores it.
            unsafe { store_f32(row < rows.len && lane.column == 0, to.of(rows, tile.head, row), value) };
        }
    }
}
