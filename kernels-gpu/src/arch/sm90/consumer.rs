//! A consumer warpgroup: [`Warpgroup`] on Hopper.

use core::marker::PhantomData;
use core::mem::{MaybeUninit, offset_of};

use super::barrier::{Mbarrier, named_arrive, named_sync};
use super::cta::{self, Leader, smem_base, thread_of_warpgroup};
use super::fragment::{self, Fragment, Operand, Rows};
use super::math::{self, Packed, fresh};
use super::store::{
    commit_stores, fence_for_copy_engine, store_16_bytes, store_box, store_f32, store_matrices, wait_for_stores,
};
use super::tma::{BoxOrigin, MapAddress, load_box};
use super::wgmma::{self, Descriptor};
use crate::arch::{Pending, Warpgroup};
use crate::attention::scheduler::WorkTile;
use crate::params::{ForwardParams, Output, Shape, Strided, TensorMap};
use crate::pipeline::ring::Position;
use crate::tile::lane::Lane;
use crate::tile::smem::{ForwardSmem, PANEL_COLUMNS, PANEL_ROW_BYTES, columns_step, panels, rows_step};
use crate::variants::{WARP_ROWS, WARPGROUP_ROWS, WARPGROUP_THREADS};

/// One of the CTA's consumers.
pub struct Consumer<'a, E> {
    smem: &'a ForwardSmem,
    /// Shared-window address of the CTA's shared memory.
    base: u32,
    /// Which consumer this is.
    index: u32,
    /// Address of the kernel's parameters, where the tensor maps lie.
    parameters: u64,
    q_parity: u32,
    position: Position,
    element: PhantomData<E>,
}

impl<'a, E: Packed> Consumer<'a, E> {
    /// `parameters` is the address of the kernel's [`ForwardParams`]. Each consumer calls it once, after the barriers
    /// were made.
    #[inline(always)]
    pub fn new(smem: &'a ForwardSmem, index: u32, parameters: u64) -> Self {
        if index == smem.consumers - 1 {
            named_arrive(cta::TURN, 2 * WARPGROUP_THREADS);
        }
        Consumer {
            smem,
            base: smem_base(),
            index,
            parameters,
            q_parity: 0,
            position: Position::CONSUMER,
            element: PhantomData,
        }
    }

    #[inline(always)]
    fn lane(&self) -> Lane {
        Lane::new(thread_of_warpgroup())
    }

    /// Waits until the copy engine has read every output; the last thing that a consumer does.
    #[inline(always)]
    pub fn finish(self) {
        wait_for_stores();
    }

    /// Stores rows of O by the copy engine: each warp its sixteen, from its own part of the staging tile.
    #[inline(always)]
    fn store_tile<const D8: usize>(&self, x: &Operand<D8>, tile: &WorkTile) {
        let thread = thread_of_warpgroup();
        let first_row = thread / 32 * WARP_ROWS;
        let staged = fresh(self.base) + self.smem.o(fresh(self.index)) + first_row * PANEL_ROW_BYTES;
        // Lane 8·i + r holds the address of row r of matrix i: upper and lower rows of one column group, then of the next.
        let (row, group) = (thread % 16, thread / 16 % 2);
        let line = staged + row * PANEL_ROW_BYTES;
        wait_for_stores();
        for pair in 0..D8 / 2 {
            let (panel, chunk) = (pair as u32 / 4 * WARPGROUP_ROWS * PANEL_ROW_BYTES, pair as u32 % 4 * 2);
            let address = line + panel + (((chunk + group) ^ (row % 8)) * 16);
            let [[a, b], [c, d]] = [x.0[2 * pair], x.0[2 * pair + 1]];
            // SAFETY: the rows are this warp's own part of the staging tile, which the copy engine has read.
            unsafe { store_matrices(address, [a, b, c, d]) };
        }
        fence_for_copy_engine();
        let map = MapAddress(self.parameters + offset_of!(ForwardParams<TensorMap>, o.tiles) as u64);
        let leader = Leader::of_warp();
        for panel in 0..panels(self.smem.head_dim) {
            let origin = BoxOrigin {
                column: panel * PANEL_COLUMNS,
                row: self.first_row(tile) + first_row,
                head: tile.head,
                batch: tile.batch,
            };
            // SAFETY: the box is what this warp has just staged; its rows of O belong to this warp.
            unsafe { store_box(leader, map, origin, staged + panel * WARPGROUP_ROWS * PANEL_ROW_BYTES) };
        }
        commit_stores();
    }

    /// Stores rows of O by each thread, 16 bytes at a time.
    #[inline(always)]
    fn store_lines<const D8: usize>(&self, x: &Operand<D8>, to: &Strided, tile: &WorkTile, shape: &Shape) {
        let lane = self.lane();
        for half in 0..2 {
            let row = self.first_row(tile) + lane.row(half as u32);
            let line = to.address + 2 * to.row_offset(tile.batch, tile.head, row) as u64;
            for groups in 0..D8 / 4 {
                let quad = [0, 1, 2, 3].map(|i| x.0[4 * groups + i][half]);
                let chunk = fragment::transpose_quad(lane, quad);
                let column = 32 * groups as u32 + 4 * lane.column;
                let live = row < shape.seqlen_q && column < shape.head_dim;
                // SAFETY: a live row's eight columns lie within the tensor, which the host has checked, and belong to
                // this lane alone.
                unsafe { store_16_bytes(live, line + 2 * column as u64, chunk) };
            }
        }
    }

    #[inline(always)]
    fn q_full(&self) -> Mbarrier {
        Mbarrier(fresh(self.base) + self.smem.q_full(fresh(self.index)))
    }
}

impl<E: Packed> Warpgroup for Consumer<'_, E> {
    type Acc<const N8: usize> = Fragment<N8>;
    type Operand<const N8: usize> = Operand<N8>;
    type Rows = Rows;
    type Tensor = TensorMap;
    type Slot = u32;

    #[inline(always)]
    fn zeros<const N8: usize>(&self) -> Fragment<N8> {
        Fragment([[0.0; 4]; N8])
    }
    #[inline(always)]
    fn truncate_rows<const N8: usize>(&self, x: &mut Fragment<N8>, fill: f32, end: impl Fn(u32) -> i32) {
        x.truncate_rows(self.lane(), fill, end);
    }
    #[inline(always)]
    fn map_rows<const N8: usize>(&self, x: &mut Fragment<N8>, rows: Rows, f: impl Fn(f32, f32) -> f32) {
        x.map_rows(rows, f);
    }
    #[inline(always)]
    fn scale_rows<const N8: usize>(&self, x: &mut Fragment<N8>, factors: Rows) {
        // Below some width, a branch between the instructions around it costs more than it saves.
        if N8 <= 16 || math::any(factors[0] != 1.0 || factors[1] != 1.0) {
            x.map_rows(factors, |x, factor| x * factor);
        }
    }
    #[inline(always)]
    fn fold<const N8: usize>(&self, x: &Fragment<N8>, f: impl Fn(f32, f32) -> f32) -> Rows {
        x.fold(f)
    }
    #[inline(always)]
    fn reduce(&self, rows: Rows, f: impl Fn(f32, f32) -> f32) -> Rows {
        fragment::reduce(rows, f)
    }
    #[inline(always)]
    fn rows(&self, value: f32) -> Rows {
        [value; 2]
    }
    #[inline(always)]
    fn zip(&self, a: Rows, b: Rows, f: impl Fn(f32, f32) -> f32) -> Rows {
        [f(a[0], b[0]), f(a[1], b[1])]
    }
    #[inline(always)]
    fn pack<const N8: usize>(&self, x: &Fragment<N8>) -> Operand<N8> {
        x.pack::<E>()
    }

    #[inline(always)]
    fn exp2(x: f32) -> f32 {
        math::exp2(x)
    }
    #[inline(always)]
    fn log2(x: f32) -> f32 {
        math::log2(x)
    }
    #[inline(always)]
    fn fma(a: f32, b: f32, c: f32) -> f32 {
        math::fma(a, b, c)
    }
    #[inline(always)]
    fn recip(x: f32) -> f32 {
        math::recip(x)
    }

    #[inline(always)]
    fn first_row(&self, tile: &WorkTile) -> u32 {
        (tile.m_block * self.smem.consumers + fresh(self.index)) * WARPGROUP_ROWS
    }
    #[inline(always)]
    fn load_q(&mut self, tile: &WorkTile) {
        // Every warp of this warpgroup is past its last product with Q.
        named_sync(cta::WARPGROUP + fresh(self.index), WARPGROUP_THREADS);
        let leader = Leader::of_warpgroup();
        let to = fresh(self.base) + self.smem.q(fresh(self.index));
        let map = MapAddress(self.parameters + offset_of!(ForwardParams<TensorMap>, q) as u64);
        // SAFETY: nobody reads the query tile any more, each panel lies within it, and the barrier is ready.
        unsafe {
            self.q_full().arrive_expect(leader, self.smem.q_bytes());
            for panel in 0..panels(self.smem.head_dim) {
                let origin = BoxOrigin {
                    column: panel * PANEL_COLUMNS,
                    row: self.first_row(tile),
                    head: tile.head,
                    batch: tile.batch,
                };
                load_box(leader, map, origin, to + panel * WARPGROUP_ROWS * PANEL_ROW_BYTES, self.q_full());
            }
        }
    }
    #[inline(always)]
    fn wait_q(&mut self) {
        // SAFETY: initialised before the roles parted.
        unsafe { self.q_full().wait(self.q_parity) };
        self.q_parity ^= 1;
    }
    #[inline(always)]
    fn wait_kv(&mut self) -> u32 {
        let Position { slot, parity } = self.position;
        // SAFETY: initialised before the roles parted.
        unsafe { Mbarrier(fresh(self.base) + self.smem.full(slot)).wait(parity) };
        self.position.advance(self.smem.stages);
        slot
    }
    #[inline(always)]
    fn release_kv(&mut self, slot: u32) {
        // SAFETY: initialised before the roles parted.
        unsafe { Mbarrier(fresh(self.base) + self.smem.empty(slot)).arrive_elected() };
    }

    #[inline(always)]
    fn qk<const D8: usize, const N8: usize>(&mut self, k: u32) -> Pending<Fragment<N8>> {
        let q = Descriptor::k_major(self.base + self.smem.q(fresh(self.index)));
        let k = Descriptor::k_major(self.base + self.smem.slot(k));
        let mut s = MaybeUninit::uninit();
        wgmma::fence();
        for step in 0..D8 as u32 / 2 {
            let (a, b) = (q.offset(columns_step(WARPGROUP_ROWS, step)), k.offset(columns_step(8 * N8 as u32, step)));
            // SAFETY: both tiles are full, and stay so until this product is waited for.
            unsafe {
                if step == 0 {
                    wgmma::start::<E, N8>(&mut s, a, b);
                } else {
                    wgmma::add::<E, N8>(&mut s, a, b);
                }
            }
        }
        wgmma::commit();
        // SAFETY: the first step wrote every register.
        Pending(unsafe { s.assume_init() })
    }
    #[inline(always)]
    fn pv<const N8: usize, const D8: usize>(
        &mut self,
        mut o: Fragment<D8>,
        mut p: Operand<N8>,
        v: u32,
    ) -> Pending<Fragment<D8>> {
        let v = Descriptor::mn_major(self.base + self.smem.slot(v), 8 * N8 as u32 * PANEL_ROW_BYTES);
        wgmma::tie(&mut o);
        wgmma::tie_operand(&mut p);
        wgmma::fence();
        for step in 0..N8 / 2 {
            let [[a0, a1], [a2, a3]] = [p.0[2 * step], p.0[2 * step + 1]];
            let b = v.offset(rows_step(step as u32));
            // SAFETY: the tile of V is full, and stays so until this product is waited for.
            unsafe { wgmma::add_registers::<E, D8>(&mut o, [a0, a1, a2, a3], b) };
        }
        wgmma::commit();
        Pending(o)
    }
    #[inline(always)]
    fn wait<const LATER: usize, const N8: usize>(&mut self, x: Pending<Fragment<N8>>) -> Fragment<N8> {
        let Pending(mut x) = x;
        wgmma::wait::<LATER>();
        wgmma::tie(&mut x);
        x
    }

    #[inline(always)]
    fn take_turn(&mut self) {
        named_sync(cta::TURN + fresh(self.index), 2 * WARPGROUP_THREADS);
    }
    #[inline(always)]
    fn pass_turn(&mut self) {
        let next = fresh(self.index) + 1;
        let next = if next == self.smem.consumers { 0 } else { next };
        named_arrive(cta::TURN + next, 2 * WARPGROUP_THREADS);
    }

    #[inline(always)]
    fn store<const D8: usize>(&mut self, x: &Fragment<D8>, to: &Output<TensorMap>, tile: &WorkTile, shape: &Shape) {
        let packed = x.pack::<E>();
        if self.smem.stages_o() {
            self.store_tile(&packed, tile);
        } else {
            self.store_lines(&packed, &to.rows, tile, shape);
        }
    }
    #[inline(always)]
    fn store_rows(&mut self, values: Rows, address: u64, tile: &WorkTile, shape: &Shape) {
        let lane = self.lane();
        let line = (tile.batch * shape.heads_q + tile.head) as u64 * shape.seqlen_q as u64;
        for (half, value) in values.into_iter().enumerate() {
            let row = self.first_row(tile) + lane.row(half as u32);
            // SAFETY: a live row lies within the array, which the host has checked; one lane of its quad stores it.
            unsafe { store_f32(row < shape.seqlen_q && lane.column == 0, address + 4 * (line + row as u64), value) };
        }
    }
}
