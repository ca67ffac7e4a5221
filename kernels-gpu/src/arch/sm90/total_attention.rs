//! A consumer of the kernel of total attention: [`TotalWarpgroup`] on Hopper.
//!
//! Rows of a fragment are keys, columns are queries. The `neg_lse_log2` of a query block arrives with its Q, and
//! outlives it in the ring ([`TotalSmem`]).

use super::barrier::Mbarrier;
use super::consumer::Consumer;
use super::fragment::{Fragment, Operand, Rows};
use super::load::{load_shared_pair, read_tile};
use super::math::{Packed, fresh};
use super::store::store_f32;
use super::wgmma::{self, Descriptor};
use crate::arch::{Pending, TotalWarpgroup};
use crate::attention::total_steps::{OwnKeys, TotalTile};
use crate::ground::sequence::Span;
use crate::ground::tensor::RowArray;
use crate::pipeline::ring::Position;
use crate::tile::lane::WARPGROUP_ROWS;
use crate::tile::smem::{PANEL_ROW_BYTES, columns_step};
use crate::tile::smem_total::TotalSmem;

/// Consumer's end of the pipeline.
pub struct TotalPipe<'a> {
    smem: &'a TotalSmem,
    /// Current tile of K.
    k: Position,
    q: Position,
}

impl<'a, E: Packed> Consumer<E, TotalPipe<'a>> {
    /// Makes a consumer. Each consumer warpgroup calls this once, after the barriers were initialised.
    #[inline(always)]
    pub fn total(smem: &'a TotalSmem, index: u32, parameters: u64) -> Self {
        let pipe = TotalPipe { smem, k: Position::CONSUMER, q: Position::CONSUMER };
        Self::with_pipe(index, parameters, pipe)
    }
}

impl<E: Packed> TotalWarpgroup for Consumer<E, TotalPipe<'_>> {
    /// Slot of the ring of Q. Its parity selects one of the slot's two sets of `neg_lse_log2`.
    type Slot = Position;

    #[inline(always)]
    fn own_keys(&self) -> OwnKeys {
        let first_key = self.index() * WARPGROUP_ROWS;
        OwnKeys { first_key, keys: WARPGROUP_ROWS, most_passed: self.pipe.smem.stages - 1 }
    }
    #[inline(always)]
    fn wait_k(&mut self) {
        let Position { slot, parity } = self.pipe.k;
        // SAFETY: I1, the barrier is initialised.
        unsafe { Mbarrier(self.base() + self.pipe.smem.k_full(slot)).wait(parity) };
    }
    #[inline(always)]
    fn release_k(&mut self) {
        // Every thread arrives, here and in `release_q`: after an election in this loop, ptxas assumes that the warp
        // may have diverged.
        unsafe { Mbarrier(self.base() + self.pipe.smem.k_empty(self.pipe.k.slot)).arrive() };
        self.pipe.k.advance(TotalSmem::K_STAGES);
    }
    #[inline(always)]
    fn wait_q(&mut self) -> Position {
        let q = self.pipe.q;
        // SAFETY: I1, the barrier is initialised.
        unsafe { Mbarrier(self.base() + self.pipe.smem.q_full(q.slot)).wait(q.parity) };
        self.pipe.q.advance(self.pipe.smem.stages);
        q
    }
    #[inline(always)]
    fn release_q(&mut self, q: Position) {
        // SAFETY: I1, the barrier is initialised.
        unsafe { Mbarrier(self.base() + self.pipe.smem.q_empty(q.slot)).arrive() };
    }

    #[inline(always)]
    fn take_k<const D8: usize>(&mut self) -> Operand<D8> {
        let smem = self.pipe.smem;
        // SAFETY: I2, the tile is full; I4, the warp is converged.
        unsafe { read_tile(self.base() + smem.k(self.pipe.k.slot), smem.block_n(), self.own_keys().first_key) }
    }
    #[inline(always)]
    fn taken_kq<const D8: usize, const M8: usize>(&mut self, k: &Operand<D8>, q: Position) -> Pending<Fragment<M8>> {
        let smem = self.pipe.smem;
        let b = Descriptor::k_major(self.base() + smem.q(q.slot));
        // SAFETY: I2, the tile is full until this product is waited for.
        unsafe { wgmma::multiply_registers::<E, D8, M8>(k, |step| b.offset(columns_step(smem.block_m, step))) }
    }

    #[inline(always)]
    fn kq<const D8: usize, const M8: usize>(&mut self, q: Position) -> Pending<Fragment<M8>> {
        let smem = self.pipe.smem;
        let keys = self.base() + smem.k(self.pipe.k.slot) + self.own_keys().first_key * PANEL_ROW_BYTES;
        let (a, b) = (Descriptor::k_major(keys), Descriptor::k_major(self.base() + smem.q(q.slot)));
        // SAFETY: I2, both tiles are full until this product is waited for.
        unsafe {
            wgmma::multiply::<E, M8>(D8 as u32 / 2, |step| {
                [a.offset(columns_step(smem.block_n(), step)), b.offset(columns_step(smem.block_m, step))]
            })
        }
    }

    #[inline(always)]
    fn map_neg_lse_log2<const M8: usize>(&self, q: Position, x: &mut Fragment<M8>, f: impl Fn(f32, f32, bool) -> f32) {
        let first = self.base() + self.pipe.smem.neg_lse_log2(q.slot, q.parity) + 4 * self.lane().column;
        for (group, registers) in x.0.iter_mut().enumerate() {
            // SAFETY: I2, the array was full when Q was; it has as many elements as the tile has columns.
            let neg_lse_log2 = unsafe { load_shared_pair(first + 32 * group as u32) };
            for (i, x) in registers.iter_mut().enumerate() {
                // The columns of all lanes differ by an even number from these.
                let by_polynomial = self.pipe.smem.by_polynomial((8 * group + i % 2) as u32);
                *x = f(*x, neg_lse_log2[i % 2], by_polynomial);
            }
        }
    }
    #[inline(always)]
    fn unknown(x: u32) -> u32 {
        fresh(x)
    }

    #[inline(always)]
    fn store_keys(&mut self, values: Rows, to: &RowArray, at: &TotalTile, keys: &Span) {
        let lane = self.lane();
        for (half, value) in values.into_iter().enumerate() {
            let key = at.first_key + self.own_keys().first_key + lane.row(half as u32);
            // SAFETY: I5, a key of the batch item lies within the array; I6, one lane of its quad stores it.
            unsafe { store_f32(key < keys.len && lane.column == 0, to.of(keys, at.keys.head, key), value) };
        }
    }
}
