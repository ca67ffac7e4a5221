//! A consumer of the backward kernel: [`BackwardWarpgroup`] on Hopper.
//!
//! Rows of a fragment are keys, columns are queries. dSᵀ goes to shared memory as it is; with one k a row it is the left
//! operand of dQ = dS·K all the same. A warpgroup's part of dQ ([`DqPart`]) lies in the workspace as the threads hold it,
//! sixteen bytes of each in turn.

use super::barrier::{Mbarrier, named_sync};
use super::consumer::Consumer;
use super::cta::{self, Leader, thread_of_warpgroup};
use super::fragment::{Fragment, Operand};
use super::load::{add_global, count_turn, load_shared_pair, wait_turn};
use super::math::Packed;
use super::store::{Lines, fence_async_proxy, store_lines, write_tile};
use super::wgmma::{self, Descriptor};
use crate::arch::{BackwardWarpgroup, Pending, Split, Warpgroup};
use crate::attention::query_blocks::{DqPart, QueryBlock, turn_blocks};
use crate::params::{Shape, Strided, Workspace};
use crate::pipeline::order::KvBlock;
use crate::pipeline::ring::Position;
use crate::tile::smem::{BackwardSmem, PANEL_COLUMNS, PANEL_ROW_BYTES, columns_step, rows_step};
use crate::variants::{WARPGROUP_ROWS, WARPGROUP_THREADS};

/// The consumer's end of the backward pipeline.
pub struct BackwardPipe<'a> {
    smem: &'a BackwardSmem,
    split: Split,
    kv_parity: u32,
    q: Position,
    d_o: Position,
    /// Which of the two tiles of dSᵀ this step has.
    ds: u32,
    /// Where an exact pass has still to count this warpgroup's last additions to dQ; 0 for nowhere.
    counter: u64,
}

impl<'a, E: Packed> Consumer<E, BackwardPipe<'a>> {
    /// Each consumer calls it once, after the barriers were made.
    #[inline(always)]
    pub fn backward(smem: &'a BackwardSmem, split: Split, index: u32, parameters: u64) -> Self {
        let (q, d_o) = (Position::CONSUMER, Position::CONSUMER);
        Self::with_pipe(index, parameters, BackwardPipe { smem, split, kv_parity: 0, q, d_o, ds: 0, counter: 0 })
    }

    /// Counts this warpgroup's last additions to dQ, so that whoever is next may add.
    #[inline(always)]
    fn count_last(&mut self) {
        if self.pipe.counter != 0 {
            // All have issued them; the leader's release is for all.
            named_sync(cta::WARPGROUP + self.index(), WARPGROUP_THREADS);
            // SAFETY: a counter of the workspace.
            unsafe { count_turn(Leader::of_warpgroup(), self.pipe.counter) };
            self.pipe.counter = 0;
        }
    }

    /// x·Bᵀ for a tile B of query rows: scores, or their gradients; `rows` is where this warpgroup's keys are.
    #[inline(always)]
    fn scores<const D8: usize, const M8: usize>(&self, keys: u32, queries: u32) -> Pending<Fragment<M8>> {
        let smem = self.pipe.smem;
        let a = Descriptor::k_major(self.base() + keys + self.first_key() * PANEL_ROW_BYTES);
        let b = Descriptor::k_major(self.base() + queries);
        // SAFETY: both tiles are full, and stay so until this product is waited for.
        unsafe {
            wgmma::multiply::<E, M8>(D8 as u32 / 2, |step| {
                [a.offset(columns_step(smem.block_n, step)), b.offset(columns_step(smem.block_m, step))]
            })
        }
    }

    /// acc + x·B for this warpgroup's columns of a tile B of query rows.
    #[inline(always)]
    fn accumulate<const M8: usize, const C8: usize>(
        &self,
        acc: Fragment<C8>,
        x: Operand<M8>,
        queries: u32,
    ) -> Pending<Fragment<C8>> {
        let panel = self.pipe.smem.block_m * PANEL_ROW_BYTES;
        let first_panel = match self.pipe.split {
            Split::Keys => 0,
            Split::Columns => self.index() * (C8 as u32 * 8 / PANEL_COLUMNS),
        };
        let b = Descriptor::mn_major(self.base() + queries + first_panel * panel, panel);
        // SAFETY: the tile is full, and stays so until this product is waited for.
        unsafe { wgmma::accumulate::<E, M8, C8>(acc, x, |step| b.offset(rows_step(step))) }
    }

    /// `f(x, s)` for every element and its column's statistic, from the array in shared memory at `statistics`.
    #[inline(always)]
    fn map_columns<const M8: usize>(&self, x: &mut Fragment<M8>, statistics: u32, f: impl Fn(f32, f32) -> f32) {
        let first = self.base() + statistics + 4 * self.lane().column;
        for (group, registers) in x.0.iter_mut().enumerate() {
            // SAFETY: the array has as many elements as the tile columns, and is full.
            let statistics = unsafe { load_shared_pair(first + 32 * group as u32) };
            for (i, x) in registers.iter_mut().enumerate() {
                *x = f(*x, statistics[i % 2]);
            }
        }
    }
}

impl<E: Packed> BackwardWarpgroup for Consumer<E, BackwardPipe<'_>> {
    type Slot = u32;
    type DQ<const Q8: usize> = Fragment<Q8>;

    #[inline(always)]
    fn first_key(&self) -> u32 {
        match self.pipe.split {
            Split::Keys => self.index() * WARPGROUP_ROWS,
            Split::Columns => 0,
        }
    }
    #[inline(always)]
    fn wait_kv(&mut self) {
        // SAFETY: initialised before the roles parted; so are all barriers below.
        unsafe { Mbarrier(self.base() + self.pipe.smem.kv_full()).wait(self.pipe.kv_parity) };
        self.pipe.kv_parity ^= 1;
    }
    #[inline(always)]
    fn release_kv(&mut self) {
        self.count_last();
        // SAFETY: as above.
        unsafe { Mbarrier(self.base() + self.pipe.smem.kv_empty()).arrive_elected() };
    }
    #[inline(always)]
    fn wait_q(&mut self) -> u32 {
        let Position { slot, parity } = self.pipe.q;
        // SAFETY: as above.
        unsafe { Mbarrier(self.base() + self.pipe.smem.q_full(slot)).wait(parity) };
        self.pipe.q.advance(BackwardSmem::STAGES);
        slot
    }
    #[inline(always)]
    fn release_q(&mut self, q: u32) {
        // SAFETY: as above.
        unsafe { Mbarrier(self.base() + self.pipe.smem.q_empty(q)).arrive() };
    }
    #[inline(always)]
    fn wait_do(&mut self) -> u32 {
        let Position { slot, parity } = self.pipe.d_o;
        // SAFETY: as above.
        unsafe { Mbarrier(self.base() + self.pipe.smem.do_full(slot)).wait(parity) };
        self.pipe.d_o.advance(BackwardSmem::STAGES);
        slot
    }
    #[inline(always)]
    fn release_do(&mut self, d_o: u32) {
        // SAFETY: as above.
        unsafe { Mbarrier(self.base() + self.pipe.smem.do_empty(d_o)).arrive() };
    }

    #[inline(always)]
    fn map_lse<const M8: usize>(&self, x: &mut Fragment<M8>, q: u32, f: impl Fn(f32, f32) -> f32) {
        self.map_columns(x, self.pipe.smem.lse(q), f);
    }
    #[inline(always)]
    fn map_delta<const M8: usize>(&self, x: &mut Fragment<M8>, d_o: u32, f: impl Fn(f32, f32) -> f32) {
        self.map_columns(x, self.pipe.smem.delta(d_o), f);
    }

    #[inline(always)]
    fn kq<const D8: usize, const M8: usize>(&mut self, q: u32) -> Pending<Fragment<M8>> {
        self.scores::<D8, M8>(self.pipe.smem.k(), self.pipe.smem.q(q))
    }
    #[inline(always)]
    fn v_do<const D8: usize, const M8: usize>(&mut self, d_o: u32) -> Pending<Fragment<M8>> {
        self.scores::<D8, M8>(self.pipe.smem.v(), self.pipe.smem.d_o(d_o))
    }
    #[inline(always)]
    fn p_do<const M8: usize, const C8: usize>(
        &mut self,
        dv: Fragment<C8>,
        p: Operand<M8>,
        d_o: u32,
    ) -> Pending<Fragment<C8>> {
        self.accumulate(dv, p, self.pipe.smem.d_o(d_o))
    }
    #[inline(always)]
    fn ds_q<const M8: usize, const C8: usize>(
        &mut self,
        dk: Fragment<C8>,
        ds: Operand<M8>,
        q: u32,
    ) -> Pending<Fragment<C8>> {
        self.accumulate(dk, ds, self.pipe.smem.q(q))
    }
    #[inline(always)]
    fn share<const M8: usize>(&mut self, ds: &Operand<M8>) {
        self.pipe.ds ^= 1;
        let smem = self.pipe.smem;
        // Where both have the same keys, one writes for both.
        if self.pipe.split == Split::Keys || self.index() == 0 {
            // SAFETY: this warpgroup's rows of the tile that the step before the last read; every product that did so was
            // waited for before the barrier of the last step.
            unsafe { write_tile(ds, self.base() + smem.ds(self.pipe.ds), smem.block_n, self.first_key()) };
        }
        fence_async_proxy();
        named_sync(cta::EXCHANGE, 2 * WARPGROUP_THREADS);
    }
    #[inline(always)]
    fn ds_k<const M8: usize, const Q8: usize>(&mut self) -> Pending<Fragment<Q8>> {
        let smem = self.pipe.smem;
        let panel = smem.block_n * PANEL_ROW_BYTES;
        let part = DqPart::new(smem.block_m, smem.head_dim, self.index());
        let (rows, columns) = (part.row / PANEL_COLUMNS * panel, part.column / PANEL_COLUMNS * panel);
        let a = Descriptor::mn_major(self.base() + smem.ds(self.pipe.ds) + rows, panel);
        let b = Descriptor::mn_major(self.base() + smem.k() + columns, panel);
        // SAFETY: both warpgroups have written dSᵀ, K is full, and both stay so until this product is waited for.
        unsafe { wgmma::multiply::<E, Q8>(smem.block_n / 16, |step| [a, b].map(|x| x.offset(rows_step(step)))) }
    }
    #[inline(always)]
    fn wait_dq<const LATER: usize, const Q8: usize>(&mut self, x: Pending<Fragment<Q8>>) -> Fragment<Q8> {
        self.wait::<LATER, Q8>(x)
    }
    #[inline(always)]
    fn await_turn(&mut self, to: &Workspace, shape: &Shape, at: &QueryBlock, turn: u32) {
        if to.turns == 0 {
            return;
        }
        let blocks = to.row(shape, at.dq_batch(shape), at.head, 0) / self.pipe.smem.block_m as u64;
        let index = (blocks + (at.m_block / turn_blocks(self.pipe.smem.head_dim)) as u64) * 2 + self.index() as u64;
        let counter = to.turns + index * 4;
        if counter != self.pipe.counter {
            // By now the last step's additions have arrived, and counting them holds nobody up.
            self.count_last();
            self.pipe.counter = counter;
            // SAFETY: a counter of the workspace.
            unsafe { wait_turn(counter, turn) };
        }
    }
    #[inline(always)]
    fn add_dq<const Q8: usize>(&mut self, dq: &Fragment<Q8>, to: &Workspace, shape: &Shape, at: &QueryBlock) {
        let smem = self.pipe.smem;
        let block_bytes = (smem.block_m * smem.head_dim * 4) as u64;
        let first = to.row(shape, at.dq_batch(shape), at.head, at.m_block * smem.block_m);
        let address = to.dq + first * (smem.head_dim * 4) as u64 + self.index() as u64 * (block_bytes / 2);
        let address = address + 16 * thread_of_warpgroup() as u64;
        for (group, x) in dq.0.iter().enumerate() {
            // SAFETY: this warpgroup's part of the query block in the workspace, which the host has made large enough.
            unsafe { add_global(address + (group as u32 * 16 * WARPGROUP_THREADS) as u64, *x) };
        }
    }

    #[inline(always)]
    fn store_kv<const C8: usize>(&mut self, x: &Fragment<C8>, to: &Strided, at: &KvBlock, shape: &Shape) {
        let column = match self.pipe.split {
            Split::Keys => 0,
            Split::Columns => self.index() * 8 * C8 as u32,
        };
        let row = at.n_block * self.pipe.smem.block_n + self.first_key();
        let at = Lines { batch: at.batch, head: at.head, row, column };
        // SAFETY: the host has checked the tensor, of which these rows and columns belong to this warpgroup.
        unsafe { store_lines(&x.pack::<E>(), to, at, shape.seqlen_k, shape) };
    }
}
