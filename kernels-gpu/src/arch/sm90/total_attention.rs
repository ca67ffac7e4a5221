//! A consumer of the kernel of total attention: [`TotalWarpgroup`] on Hopper.
//!
//! Rows of a fragment are keys, columns are queries. Each thread loads one query's LSE a step ahead of its use, and hands
//! it to the others through shared memory, in one of two arrays in turn: what is written to one in a step was last read in
//! the step before, on the other side of this warpgroup's barrier.

use super::barrier::{Mbarrier, named_sync};
use super::consumer::Consumer;
use super::cta::{self, thread_of_warpgroup};
use super::fragment::{Fragment, Rows};
use super::load::{load_f32_or, load_shared_pair};
use super::math::Packed;
use super::store::{store_f32, store_shared_f32};
use super::wgmma::{self, Descriptor};
use crate::arch::{Pending, TotalWarpgroup};
use crate::attention::query_blocks::QueryBlock;
use crate::attention::row_statistics::exponent_offset;
use crate::params::Shape;
use crate::pipeline::order::KvBlock;
use crate::pipeline::ring::Position;
use crate::tile::smem::{PANEL_ROW_BYTES, columns_step};
use crate::tile::smem_total::TotalSmem;
use crate::variants::{WARPGROUP_ROWS, WARPGROUP_THREADS};

/// The consumer's end of the pipeline.
pub struct TotalPipe<'a> {
    smem: &'a TotalSmem,
    /// The tile of K in hand.
    k: Position,
    q: Position,
    /// This thread's part of the LSE that was last loaded.
    lse: f32,
    /// Which of the two arrays [`TotalWarpgroup::map_offsets`] reads.
    readable: u32,
}

impl<'a, E: Packed> Consumer<E, TotalPipe<'a>> {
    /// Each consumer calls it once, after the barriers were made.
    #[inline(always)]
    pub fn total(smem: &'a TotalSmem, index: u32, parameters: u64) -> Self {
        let pipe = TotalPipe { smem, k: Position::CONSUMER, q: Position::CONSUMER, lse: 0.0, readable: 1 };
        Self::with_pipe(index, parameters, pipe)
    }
}

impl<E: Packed> TotalWarpgroup for Consumer<E, TotalPipe<'_>> {
    type Slot = u32;

    #[inline(always)]
    fn first_key(&self) -> u32 {
        self.index() * WARPGROUP_ROWS
    }
    #[inline(always)]
    fn wait_k(&mut self) {
        let Position { slot, parity } = self.pipe.k;
        // SAFETY: initialised before the roles parted; so are all barriers below.
        unsafe { Mbarrier(self.base() + self.pipe.smem.k_full(slot)).wait(parity) };
    }
    #[inline(always)]
    fn release_k(&mut self) {
        // By every thread, as below: after an election in this loop ptxas takes the warp for one that may have diverged.
        // SAFETY: as above.
        unsafe { Mbarrier(self.base() + self.pipe.smem.k_empty(self.pipe.k.slot)).arrive() };
        self.pipe.k.advance(TotalSmem::K_STAGES);
    }
    #[inline(always)]
    fn wait_q(&mut self) -> u32 {
        let Position { slot, parity } = self.pipe.q;
        // SAFETY: as above.
        unsafe { Mbarrier(self.base() + self.pipe.smem.q_full(slot)).wait(parity) };
        self.pipe.q.advance(self.pipe.smem.stages);
        slot
    }
    #[inline(always)]
    fn release_q(&mut self, q: u32) {
        // SAFETY: as above.
        unsafe { Mbarrier(self.base() + self.pipe.smem.q_empty(q)).arrive() };
    }

    #[inline(always)]
    fn kq<const D8: usize, const M8: usize>(&mut self, q: u32) -> Pending<Fragment<M8>> {
        let smem = self.pipe.smem;
        let keys = self.base() + smem.k(self.pipe.k.slot) + self.first_key() * PANEL_ROW_BYTES;
        let (a, b) = (Descriptor::k_major(keys), Descriptor::k_major(self.base() + smem.q(q)));
        // SAFETY: both tiles are full, and stay so until this product is waited for.
        unsafe {
            wgmma::multiply::<E, M8>(D8 as u32 / 2, |step| {
                [a.offset(columns_step(TotalSmem::BLOCK_N, step)), b.offset(columns_step(smem.block_m, step))]
            })
        }
    }

    #[inline(always)]
    fn load_lse(&mut self, address: u64, shape: &Shape, at: &QueryBlock) {
        let line = (at.batch * shape.heads_q + at.head) as u64 * shape.seqlen_q as u64;
        let (thread, block_m) = (thread_of_warpgroup(), self.pipe.smem.block_m);
        let row = at.m_block * block_m + thread;
        let live = row < shape.seqlen_q && (block_m == WARPGROUP_THREADS || thread < block_m);
        // SAFETY: a live row lies within the array, which the host has checked.
        self.pipe.lse = unsafe { load_f32_or(live, address + 4 * (line + row as u64), f32::NEG_INFINITY) };
    }
    #[inline(always)]
    fn share_lse(&mut self) {
        let (thread, smem) = (thread_of_warpgroup(), self.pipe.smem);
        let to = self.base() + smem.lse(self.index(), self.pipe.readable ^ 1) + 4 * thread;
        let live = smem.block_m == WARPGROUP_THREADS || thread < smem.block_m;
        // SAFETY: this thread's element of the array that nobody has read since the last barrier.
        unsafe { store_shared_f32(live, to, -exponent_offset(self.pipe.lse)) };
    }
    #[inline(always)]
    fn wait_lse(&mut self) {
        named_sync(cta::WARPGROUP + self.index(), WARPGROUP_THREADS);
        self.pipe.readable ^= 1;
    }
    #[inline(always)]
    fn map_offsets<const M8: usize>(&self, x: &mut Fragment<M8>, f: impl Fn(f32, f32) -> f32) {
        let first = self.base() + self.pipe.smem.lse(self.index(), self.pipe.readable) + 4 * self.lane().column;
        for (group, registers) in x.0.iter_mut().enumerate() {
            // SAFETY: the array has as many elements as the tile columns, and the warpgroup has filled it.
            let offsets = unsafe { load_shared_pair(first + 32 * group as u32) };
            for (i, x) in registers.iter_mut().enumerate() {
                *x = f(*x, offsets[i % 2]);
            }
        }
    }

    #[inline(always)]
    fn store_keys(&mut self, values: Rows, address: u64, at: &KvBlock, shape: &Shape) {
        let lane = self.lane();
        let line = (at.batch * shape.heads_q + at.head) as u64 * shape.seqlen_k as u64;
        for (half, value) in values.into_iter().enumerate() {
            let key = at.n_block * TotalSmem::BLOCK_N + self.first_key() + lane.row(half as u32);
            // SAFETY: a live key lies within the array, which the host has checked; one lane of its quad stores it.
            unsafe { store_f32(key < shape.seqlen_k && lane.column == 0, address + 4 * (line + key as u64), value) };
        }
    }
}
