//! [`TotalWarpgroup`] on the CPU.

use std::collections::VecDeque;
use std::vec::Vec;

use super::fragment::{ROWS, Rows, Tile};
use super::matmul::multiply_add;
use super::memory::{self, for_rows};
use super::pipeline::Fault;
use super::warpgroup::CpuWarpgroup;
use crate::arch::{Pending, TotalWarpgroup};
use crate::attention::mask::Mask;
use crate::attention::query_blocks::QueryBlock;
use crate::attention::row_statistics::exponent_offset;
use crate::attention::scheduler::CtaTiles;
use crate::attention::total_steps::{TotalStep, TotalSteps};
use crate::element::Element;
use crate::params::{Shape, Strided, TotalParams, quotient};
use crate::pipeline::order::KvBlock;
use crate::tile::smem_total::TotalSmem;

/// A query block in the ring.
struct QueryTile {
    slot: u32,
    keys: KvBlock,
    /// Columns × queries.
    transposed: Vec<f32>,
}

/// The LSE on its way from memory to [`TotalWarpgroup::map_offsets`].
#[derive(Default)]
struct Offsets {
    loaded: Option<Vec<f32>>,
    shared: Option<Vec<f32>>,
    readable: Vec<f32>,
}

/// The consumer's end of the pipeline, and its own replays of the producer, for K and for Q.
pub struct TotalPipe<'a, M> {
    p: &'a TotalParams<Strided>,
    smem: TotalSmem,
    index: u32,
    k_loads: TotalSteps<'a, M, CtaTiles<'a>>,
    q_loads: TotalSteps<'a, M, CtaTiles<'a>>,
    /// This warpgroup's rows of K.
    k: Option<(KvBlock, Vec<f32>)>,
    q: VecDeque<QueryTile>,
    next_slot: u32,
    lse: Offsets,
}

impl<'a, E: Element, M: Mask> CpuWarpgroup<E, TotalPipe<'a, M>> {
    /// Consumer `index` of a CTA that has `tiles`.
    ///
    /// # Safety
    /// `p` describes tensors of `E` in memory that is valid for reading (Q, K, the LSE) and writing (the result) while this
    /// lives; nobody else accesses this consumer's elements of the result.
    pub unsafe fn total(p: &'a TotalParams<Strided>, smem: TotalSmem, index: u32, tiles: CtaTiles<'a>) -> Self {
        let loads = TotalSteps::<M, _>::new(&p.shape, smem.block_m, TotalSmem::BLOCK_N, tiles);
        let live = (p.shape.seqlen_k as usize).min(ROWS);
        let pipe = TotalPipe {
            p,
            smem,
            index,
            k_loads: loads,
            q_loads: loads,
            k: None,
            q: VecDeque::new(),
            next_slot: 0,
            lse: Offsets::default(),
        };
        Self::with_pipe(live, pipe)
    }

    /// Checks that the pipeline was left as it was found.
    pub fn finish(mut self) {
        let left = self.pipe.k_loads.any(|step| step.is_first()) || self.pipe.q_loads.next().is_some();
        let held = self.pipe.k.is_some() || !self.pipe.q.is_empty();
        if left || held || self.pipe.lse.loaded.is_some() || self.pipe.lse.shared.is_some() {
            Fault::Unfinished.raise();
        }
    }

    /// This warpgroup's rows of K, of the head that the query head reads.
    fn load_k(&self, keys: &KvBlock) -> Vec<f32> {
        let TotalPipe { p, smem, .. } = &self.pipe;
        let head_dim = smem.head_dim as usize;
        let first = keys.n_block * TotalSmem::BLOCK_N + self.first_key();
        let mut tile = std::vec![0.0; ROWS * head_dim];
        let copy = |i: usize, row: &[E]| {
            for (to, x) in tile[i * head_dim..].iter_mut().zip(row) {
                *to = x.to_f32();
            }
        };
        let head = quotient(keys.head, p.shape.group());
        // SAFETY: `total`'s caller promised it.
        unsafe { for_rows(&p.k, (keys.batch, head), &p.shape, first..first + ROWS as u32, p.shape.seqlen_k, copy) };
        tile
    }

    /// A query block, transposed.
    fn load_q(&self, step: &TotalStep) -> Vec<f32> {
        let TotalPipe { p, smem, .. } = &self.pipe;
        let block_m = smem.block_m as usize;
        let first = step.m_block * smem.block_m;
        let mut transposed = std::vec![0.0; smem.head_dim as usize * block_m];
        let copy = |i: usize, row: &[E]| {
            for (d, x) in row.iter().enumerate() {
                transposed[d * block_m + i] = x.to_f32();
            }
        };
        let at = (step.keys.batch, step.keys.head);
        // SAFETY: `total`'s caller promised it.
        unsafe { for_rows(&p.q, at, &p.shape, first..first + smem.block_m, p.shape.seqlen_q, copy) };
        transposed
    }
}

impl<E: Element, M: Mask> TotalWarpgroup for CpuWarpgroup<E, TotalPipe<'_, M>> {
    type Slot = u32;

    fn first_key(&self) -> u32 {
        self.pipe.index * ROWS as u32
    }
    fn wait_k(&mut self) {
        if self.pipe.k.is_some() {
            Fault::WaitWithoutRelease { slot: 0 }.raise();
        }
        let Some(step) = self.pipe.k_loads.find(|step| step.is_first()) else {
            Fault::WaitWithoutLoad { slot: 0 }.raise()
        };
        self.pipe.k = Some((step.keys, self.load_k(&step.keys)));
    }
    fn release_k(&mut self) {
        if self.pipe.k.take().is_none() {
            Fault::ReleaseWithoutWait { slot: 0 }.raise();
        }
    }
    fn wait_q(&mut self) -> u32 {
        let slot = self.pipe.next_slot;
        if self.pipe.q.len() == self.pipe.smem.stages as usize {
            Fault::WaitWithoutRelease { slot }.raise();
        }
        let Some(step) = self.pipe.q_loads.next() else { Fault::WaitWithoutLoad { slot }.raise() };
        let transposed = self.load_q(&step);
        self.pipe.q.push_back(QueryTile { slot, keys: step.keys, transposed });
        self.pipe.next_slot = (slot + 1) % self.pipe.smem.stages;
        slot
    }
    fn release_q(&mut self, q: u32) {
        match self.pipe.q.pop_front() {
            Some(tile) if tile.slot == q => {}
            _ => Fault::ReleaseWithoutWait { slot: q }.raise(),
        }
    }

    fn kq<const D8: usize, const M8: usize>(&mut self, q: u32) -> Pending<Tile<M8>> {
        let mut s = Tile::ZEROS;
        let tile = self.pipe.q.iter().find(|tile| tile.slot == q);
        match (&self.pipe.k, tile) {
            (Some((keys, k)), Some(tile)) if *keys == tile.keys => {
                multiply_add(self.live, k, 8 * D8, &tile.transposed, &mut s);
            }
            _ => Fault::WrongTile { slot: q, holds: None }.raise(),
        }
        Pending(s)
    }

    fn load_lse(&mut self, address: u64, shape: &Shape, at: &QueryBlock) {
        let line = (at.batch * shape.heads_q + at.head) as usize * shape.seqlen_q as usize;
        let first = at.m_block * self.pipe.smem.block_m;
        let value = |row: u32| {
            // SAFETY: a row below seqlen_q lies within the array; `total`'s caller promised it.
            if row < shape.seqlen_q {
                unsafe { memory::read_f32(address, line + row as usize) }
            } else {
                f32::NEG_INFINITY
            }
        };
        let loaded = (first..first + self.pipe.smem.block_m).map(value).collect();
        if self.pipe.lse.loaded.replace(loaded).is_some() {
            Fault::WaitWithoutRelease { slot: 0 }.raise();
        }
    }
    fn share_lse(&mut self) {
        let Offsets { loaded, shared, .. } = &mut self.pipe.lse;
        match (loaded.take(), &shared) {
            (Some(lse), None) => *shared = Some(lse.into_iter().map(|lse| -exponent_offset(lse)).collect()),
            _ => Fault::WaitWithoutLoad { slot: 0 }.raise(),
        }
    }
    fn wait_lse(&mut self) {
        let Some(offsets) = self.pipe.lse.shared.take() else { Fault::WaitWithoutLoad { slot: 0 }.raise() };
        self.pipe.lse.readable = offsets;
    }
    fn map_offsets<const M8: usize>(&self, x: &mut Tile<M8>, f: impl Fn(f32, f32) -> f32) {
        for row in 0..self.live {
            for (x, offset) in x.row_mut(row).iter_mut().zip(&self.pipe.lse.readable) {
                *x = f(*x, *offset);
            }
        }
    }

    fn store_keys(&mut self, values: Rows, address: u64, at: &KvBlock, shape: &Shape) {
        let line = (at.batch * shape.heads_q + at.head) as usize * shape.seqlen_k as usize;
        let first = at.n_block * TotalSmem::BLOCK_N + self.first_key();
        for (key, value) in (first..shape.seqlen_k).zip(values) {
            // SAFETY: the key's element is this warpgroup's; `total`'s caller promised it.
            unsafe { memory::write_f32(address, line + key as usize, value) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::mask::Full;
    use crate::attention::scheduler::TileOrder;
    use half::f16;

    /// One work tile of one query block, of zeros.
    fn warpgroup(run: impl FnOnce(CpuWarpgroup<f16, TotalPipe<'_, Full>>)) {
        let (data, lse) = ([f16::ZERO; 8], [0.0f32]);
        let x = Strided {
            address: data.as_ptr().expose_provenance() as u64,
            stride_batch: 8,
            stride_head: 8,
            stride_row: 8,
        };
        let shape = Shape { batch: 1, heads_q: 1, heads_kv: 1, seqlen_q: 1, seqlen_k: 1, head_dim: 8 };
        let order = TileOrder::new(&shape, TotalSmem::BLOCK_N, 1);
        let lse = lse.as_ptr().expose_provenance() as u64;
        let p = TotalParams { q: x, k: x, lse, total: 0, scale: 1.0, shape, order };
        let smem = TotalSmem { head_dim: 64, block_m: 128, stages: 2 };
        // SAFETY: the arrays hold what the shape says, and nothing is stored.
        run(unsafe { CpuWarpgroup::total(&p, smem, 0, CtaTiles::new(&order, 0, 1)) });
    }

    #[test]
    fn a_whole_run_passes() {
        warpgroup(|mut wg| {
            wg.load_lse(wg.pipe.p.lse, &wg.pipe.p.shape, &QueryBlock { batch: 0, head: 0, m_block: 0, pair: 0 });
            wg.wait_k();
            let q = wg.wait_q();
            let _ = wg.kq::<8, 16>(q);
            wg.release_q(q);
            wg.release_k();
            wg.share_lse();
            wg.wait_lse();
            wg.finish();
        });
    }

    #[test]
    #[should_panic = "WrongTile"]
    fn scores_without_keys() {
        warpgroup(|mut wg| {
            let q = wg.wait_q();
            let _ = wg.kq::<8, 16>(q);
        });
    }

    #[test]
    #[should_panic = "WaitWithoutRelease"]
    fn keys_that_were_not_given_back() {
        warpgroup(|mut wg| {
            wg.wait_k();
            wg.wait_k();
        });
    }

    #[test]
    #[should_panic = "WaitWithoutLoad"]
    fn more_queries_than_there_are() {
        warpgroup(|mut wg| {
            wg.wait_q();
            wg.wait_q();
        });
    }

    #[test]
    #[should_panic = "WaitWithoutLoad"]
    fn an_lse_that_nobody_loaded() {
        warpgroup(|mut wg| wg.share_lse());
    }

    #[test]
    #[should_panic = "Unfinished"]
    fn leaving_a_tile_behind() {
        warpgroup(|mut wg| {
            wg.wait_k();
            wg.release_k();
            wg.finish();
        });
    }
}
