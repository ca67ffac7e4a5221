//! A consumer of the backward kernel: [`BackwardWarpgroup`] on Hopper.
//!
//! Rows of a fragment are keys, columns are queries. dSᵀ goes to shared memory in this orientation, for
//! [`super::backward_dq`].

use super::barrier::{Mbarrier, sync_warp};
use super::consumer::Consumer;
use super::cta;
use super::fragment::{Fragment, Operand};
use super::load::{load_shared_16_bytes, load_shared_pair};
use super::math::{Packed, fresh};
use super::named_barrier::BackwardBarrier;
use super::store::{Lines, fence_async_proxy, store_16_bytes, store_lines, store_shared_16_bytes, write_tile};
use super::wgmma::{self, Descriptor};
use crate::arch::{BackwardWarpgroup, Pending};
use crate::attention::dropout::Drops;
use crate::attention::features::Features;
use crate::attention::mask::Mask;
use crate::attention::query_blocks::MAX_QUERY_BLOCKS;
use crate::ground::places::KvBlock;
use crate::ground::places::QueryBlock;
use crate::ground::sequence::Span;
use crate::ground::tensor::Strided;
use crate::tile::lane::WARPGROUP_THREADS;
use crate::tile::smem::Split;
use crate::tile::smem::{BackwardSmem, PANEL_ROW_BYTES, columns_step, rows_step};
use crate::tuning;

/// Consumer's end of the backward pipeline.
pub struct BackwardPipe<'a> {
    smem: &'a BackwardSmem,
    /// Number of query blocks so far, at most [`MAX_QUERY_BLOCKS`], and in the top two bits the number of work tiles
    /// modulo 4. Slots and phase parities follow from it.
    count: u32,
    /// True if a consumer reads its index again at each use, which takes time but saves a register.
    rereads_index: bool,
    /// True if a consumer computes the slot that it releases again, which saves a uniform register.
    recomputes_slot: bool,
}

/// Increment of [`BackwardPipe::count`] for one work tile.
const KV: u32 = MAX_QUERY_BLOCKS + 1;

impl<'a, E: Packed> Consumer<E, BackwardPipe<'a>> {
    /// Makes a consumer of a kernel with the features `F`. Each consumer warpgroup calls this once, after the
    /// barriers were initialised.
    #[inline(always)]
    pub fn backward<F: Features>(smem: &'a BackwardSmem, index: u32, parameters: u64) -> Self {
        if smem.split == Split::Keys && index == 1 {
            BackwardBarrier::ping_pong(0).arrive(2 * WARPGROUP_THREADS);
        }
        let rereads_index = smem.head_dim <= tuning::REREAD_INDEX_MAX_HEAD_DIM || F::Weights::DROPS;
        let recomputes_slot = F::Weights::DROPS && F::Mask::PAIRS > 1;
        Self::with_pipe(index, parameters, BackwardPipe { smem, count: 0, rereads_index, recomputes_slot })
    }

    /// Returns the slot of the rings of Q and dO for the query block of this ordinal. Its phase has the parity of
    /// `parity`.
    #[inline(always)]
    fn slot(&self, ordinal: u32) -> u32 {
        ordinal % KV % self.pipe.smem.stages()
    }
    #[inline(always)]
    fn parity(&self, ordinal: u32) -> u32 {
        ordinal % KV / self.pipe.smem.stages() & 1
    }
    /// Returns the slot of the ring of dS, and the parity of its phase, for the query block of this ordinal.
    #[inline(always)]
    fn ds_slot(&self, ordinal: u32) -> (u32, u32) {
        (ordinal % BackwardSmem::DS_STAGES, ordinal / BackwardSmem::DS_STAGES & 1)
    }

    /// Returns the index of this consumer, for the loop over query blocks.
    #[inline(always)]
    fn short_lived_index(&self) -> u32 {
        if self.pipe.rereads_index { cta::consumer_of_thread() } else { self.index() }
    }

    /// Issues x·Bᵀ of a tile x of keys, at byte offset `keys`, and a tile B of query rows, at `queries`: Sᵀ or dPᵀ.
    #[inline(always)]
    fn scores<const D8: usize, const M8: usize>(&self, keys: u32, queries: u32) -> Pending<Fragment<M8>> {
        let smem = self.pipe.smem;
        let a = Descriptor::k_major(self.base() + keys + self.first_key() * PANEL_ROW_BYTES);
        let b = Descriptor::k_major(self.base() + queries);
        // SAFETY: I2, both tiles are full until this product is waited for.
        unsafe {
            wgmma::multiply::<E, M8>(D8 as u32 / 2, |step| {
                [a.offset(columns_step(smem.block_n, step)), b.offset(columns_step(smem.block_m, step))]
            })
        }
    }

    /// Issues acc + x·B of a tile B of query rows, at byte offset `queries`.
    #[inline(always)]
    fn accumulate<const M8: usize, const D8: usize>(
        &self,
        acc: Fragment<D8>,
        x: Operand<M8>,
        queries: u32,
    ) -> Pending<Fragment<D8>> {
        let b = Descriptor::mn_major(self.base() + queries, self.pipe.smem.block_m * PANEL_ROW_BYTES);
        // SAFETY: I2, the tile is full until this product is waited for.
        unsafe { wgmma::accumulate::<E, M8, D8>(acc, x, |step| b.offset(rows_step(step))) }
    }

    /// Returns the shared-memory address of this thread's P in an n8 column group. The thread that writes P and the one
    /// that reads it have the same place in their warpgroups.
    #[inline(always)]
    fn weights(&self, group: usize) -> u32 {
        let first = self.base() + self.pipe.smem.weights() + 16 * cta::thread_of_warpgroup();
        first + group as u32 * 16 * WARPGROUP_THREADS
    }
}

/// One f32 per column: the shared-memory address of the values of all columns, or the values of this thread's columns.
#[derive(Clone, Copy)]
pub enum Columns<const M8: usize> {
    At(u32),
    Read([[f32; 2]; M8]),
}

impl<const M8: usize> Columns<M8> {
    /// Returns the values of this thread's two columns of an n8 column group. `first` is its first column in the first
    /// group.
    #[inline(always)]
    fn pair(&self, first: u32, group: usize) -> [f32; 2] {
        match self {
            // SAFETY: I2, the slot's array is full; it has as many elements as the tile has columns.
            Columns::At(address) => unsafe { load_shared_pair(address + 4 * first + 32 * group as u32) },
            Columns::Read(pairs) => pairs[group],
        }
    }
}

impl<E: Packed> BackwardWarpgroup for Consumer<E, BackwardPipe<'_>> {
    /// Ordinal of the query block, counted from the first, with the top two bits of [`BackwardPipe::count`]. Slots of
    /// the rings and phase parities follow from it.
    type Slot = u32;
    type Columns<const M8: usize> = Columns<M8>;

    #[inline(always)]
    fn first_key(&self) -> u32 {
        self.pipe.smem.split.first_key(self.index())
    }
    #[inline(always)]
    fn wait_k(&mut self) {
        let (smem, tile) = (self.pipe.smem, self.pipe.count / KV);
        let (buffer, parity) = (tile % smem.k_stages, tile / smem.k_stages & 1);
        // SAFETY: I1, the barrier is initialised.
        unsafe { Mbarrier(self.base() + smem.k_full(buffer)).wait(parity) };
        self.pipe.count = self.pipe.count.wrapping_add(KV);
    }
    #[inline(always)]
    fn wait_v(&mut self) {
        // SAFETY: I1, the barrier is initialised.
        unsafe { Mbarrier(self.base() + self.pipe.smem.v_full()).wait(self.pipe.count / KV & 1 ^ 1) };
    }
    #[inline(always)]
    fn release_kv(&mut self) {
        // Signals nothing: the last dS that was published implies that K and V are no longer needed.
    }
    #[inline(always)]
    fn wait_q(&mut self) -> u32 {
        let count = self.pipe.count;
        self.pipe.count = count.wrapping_add(1);
        // SAFETY: I1, the barrier is initialised.
        unsafe { Mbarrier(self.base() + self.pipe.smem.q_full(self.slot(count))).wait(self.parity(count)) };
        count
    }
    #[inline(always)]
    fn wait_do(&mut self, ordinal: u32) {
        // SAFETY: I1, the barrier is initialised.
        unsafe { Mbarrier(self.base() + self.pipe.smem.do_full(self.slot(ordinal))).wait(self.parity(ordinal)) };
    }
    #[inline(always)]
    fn take_ping_pong(&mut self) {
        BackwardBarrier::ping_pong(self.short_lived_index()).sync(2 * WARPGROUP_THREADS);
    }
    #[inline(always)]
    fn pass_ping_pong(&mut self) {
        BackwardBarrier::ping_pong(1 - self.short_lived_index()).arrive(2 * WARPGROUP_THREADS);
    }
    #[inline(always)]
    fn wait_ds(&mut self, ordinal: u32) {
        let (slot, parity) = self.ds_slot(ordinal);
        // SAFETY: I1, the barrier is initialised.
        unsafe { Mbarrier(self.base() + self.pipe.smem.ds_empty(slot)).wait(parity ^ 1) };
    }
    #[inline(always)]
    fn release(&mut self, ordinal: u32) {
        let slot = self.slot(if self.pipe.recomputes_slot { fresh(ordinal) } else { ordinal });
        // SAFETY: I1, the barrier is initialised.
        unsafe { Mbarrier(self.base() + self.pipe.smem.empty(slot)).arrive() };
    }

    #[inline(always)]
    fn neg_lse_log2<const M8: usize>(&self, ordinal: u32) -> Columns<M8> {
        Columns::At(self.base() + self.pipe.smem.neg_lse_log2(self.slot(ordinal)))
    }
    #[inline(always)]
    fn delta<const M8: usize>(&self, ordinal: u32) -> Columns<M8> {
        Columns::At(self.base() + self.pipe.smem.delta(self.slot(ordinal)))
    }
    #[inline(always)]
    fn read<const M8: usize>(&self, columns: Columns<M8>) -> Columns<M8> {
        let first = self.lane().column;
        Columns::Read(core::array::from_fn(|group| columns.pair(first, group)))
    }
    #[inline(always)]
    fn map_columns<const M8: usize>(&self, x: &mut Fragment<M8>, columns: &Columns<M8>, f: impl Fn(f32, f32) -> f32) {
        let first = self.lane().column;
        for (group, registers) in x.0.iter_mut().enumerate() {
            let pair = columns.pair(first, group);
            for (i, x) in registers.iter_mut().enumerate() {
                *x = f(*x, pair[i % 2]);
            }
        }
    }

    #[inline(always)]
    fn kq<const D8: usize, const M8: usize>(&mut self, ordinal: u32) -> Pending<Fragment<M8>> {
        let smem = self.pipe.smem;
        let buffer = (self.pipe.count / KV).wrapping_sub(1) % smem.k_stages;
        self.scores::<D8, M8>(smem.k(buffer), smem.q(self.slot(ordinal)))
    }
    #[inline(always)]
    fn v_do<const D8: usize, const M8: usize>(&mut self, ordinal: u32) -> Pending<Fragment<M8>> {
        self.scores::<D8, M8>(self.pipe.smem.v(), self.pipe.smem.d_o(self.slot(ordinal)))
    }
    #[inline(always)]
    fn p_do<const M8: usize, const D8: usize>(
        &mut self,
        dv: Fragment<D8>,
        p: Operand<M8>,
        ordinal: u32,
    ) -> Pending<Fragment<D8>> {
        self.accumulate(dv, p, self.pipe.smem.d_o(self.slot(ordinal)))
    }
    #[inline(always)]
    fn ds_q<const M8: usize, const D8: usize>(
        &mut self,
        dk: Fragment<D8>,
        ds: Operand<M8>,
        ordinal: u32,
    ) -> Pending<Fragment<D8>> {
        self.accumulate(dk, ds, self.pipe.smem.q(self.slot(ordinal)))
    }
    #[inline(always)]
    fn add_dq<const M8: usize>(&mut self, ds: &Operand<M8>, ordinal: u32, _: &QueryBlock) {
        let (smem, (slot, _)) = (self.pipe.smem, self.ds_slot(ordinal));
        // SAFETY: I3, the slot is empty; I6, these rows of it are this warpgroup's.
        unsafe {
            let first_key = smem.split.first_key(self.short_lived_index());
            write_tile(ds, self.base() + smem.ds(slot), smem.block_n, first_key);
        }
    }
    #[inline(always)]
    fn pass_ds(&mut self, ordinal: u32) {
        let (slot, _) = self.ds_slot(ordinal);
        fence_async_proxy();
        // SAFETY: I1, the barrier is initialised; I4, the warp is converged.
        unsafe { Mbarrier(self.base() + self.pipe.smem.ds_full(slot)).arrive_together() };
    }

    #[inline(always)]
    fn pass_weights<const M8: usize>(&mut self, p: &Fragment<M8>, by: Option<&Fragment<M8>>, ordinal: u32) {
        let smem = self.pipe.smem;
        // SAFETY: I1, the barriers are initialised. Each thread overwrites only what one thread of the other warpgroup
        // has read (the empty barrier), and that thread alone reads it next.
        unsafe {
            Mbarrier(self.base() + smem.weights_empty()).wait(ordinal & 1 ^ 1);
            for (group, p) in p.0.iter().enumerate() {
                let p = match by {
                    Some(by) => core::array::from_fn(|i| p[i] * by.0[group][i]),
                    None => *p,
                };
                store_shared_16_bytes(self.weights(group), p.map(f32::to_bits));
            }
            Mbarrier(self.base() + smem.weights_full()).arrive();
        }
    }
    #[inline(always)]
    fn take_weights<const M8: usize>(&mut self, ordinal: u32) -> Fragment<M8> {
        let smem = self.pipe.smem;
        let mut p = Fragment([[0.0; 4]; M8]);
        // SAFETY: I1, the barriers are initialised. Each thread reads what one thread of the other warpgroup has
        // written, after the full barrier.
        unsafe {
            Mbarrier(self.base() + smem.weights_full()).wait(ordinal & 1);
            for (group, p) in p.0.iter_mut().enumerate() {
                *p = load_shared_16_bytes(self.weights(group)).map(f32::from_bits);
            }
            Mbarrier(self.base() + smem.weights_empty()).arrive();
        }
        p
    }

    #[inline(always)]
    fn store_kv<const D8: usize>(&mut self, x: &Fragment<D8>, to: &Strided, at: &KvBlock, rows: &Span, head_dim: u32) {
        let row = at.n_block * self.pipe.smem.block_n + self.first_key();
        let at = Lines { rows: *rows, head: at.head, row, column: 0 };
        // SAFETY: I5, the host has checked the tensor; I6, these rows and columns belong to this warpgroup.
        unsafe { store_lines(&x.pack::<E>(), to, at, head_dim) };
        // Tells ptxas that the warp is converged. After a branch, it would otherwise turn the predicate of the last
        // store into a branch, too, and would not know that the warp is converged.
        sync_warp();
    }
    #[inline(always)]
    fn store_part<const D8: usize>(&mut self, x: &Fragment<D8>, to: u64) {
        let first = self.first_key() * 8 * D8 as u32 * 4 + 16 * cta::thread_of_warpgroup();
        for (group, x) in x.0.iter().enumerate() {
            let address = to + (first + group as u32 * 16 * WARPGROUP_THREADS) as u64;
            // SAFETY: I6, this thread's elements of a slot of the workspace; I5, the host has made the slot large
            // enough.
            unsafe { store_16_bytes(true, address, x.map(f32::to_bits)) };
        }
    }
}
