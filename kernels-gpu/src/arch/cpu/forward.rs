//! [`ForwardWarpgroup`] on the CPU.

use std::vec::Vec;

use super::fragment::{ROWS, Rows, Tile};
use super::matmul::multiply_add;
use super::memory::{self, for_rows};
use super::pipeline::{Fault, Ring};
use super::warpgroup::CpuWarpgroup;
use crate::arch::{ForwardWarpgroup, Pending};
use crate::attention::scheduler::WorkTile;
use crate::element::Element;
use crate::params::{ForwardParams, Output, Second, Shape, Strided};
use crate::pipeline::order::{KvBlock, KvTile};
use crate::tile::smem::ForwardSmem;
use crate::variants::WARPGROUP_ROWS;

/// The consumer's end of the forward pipeline, and its own replay of the producer.
pub struct ForwardPipe<'a, S, I> {
    p: &'a ForwardParams<Strided, S>,
    smem: ForwardSmem,
    index: u32,
    /// Query rows, of one pair after the other.
    q: Vec<f32>,
    q_full: bool,
    ring: Ring<I>,
}

impl<'a, E: Element, S: Second<Strided>, I: Iterator<Item = KvTile>> CpuWarpgroup<E, ForwardPipe<'a, S, I>> {
    /// Consumer `index` of a CTA whose producer sends `loads`.
    ///
    /// # Safety
    /// `p` describes tensors of `E` in memory that is valid for reading (Q, K, V) and writing (O, LSE) while this lives;
    /// nobody else accesses this consumer's rows of O and LSE.
    pub unsafe fn forward(p: &'a ForwardParams<Strided, S>, smem: ForwardSmem, index: u32, loads: I) -> Self {
        let (head_dim, block_n) = (smem.head_dim as usize, smem.block_n as usize);
        let ring = Ring::new(smem.stages, block_n * head_dim, loads);
        let q = std::vec![0.0; smem.pairs as usize * ROWS * head_dim];
        let live = (p.shape.seqlen_q as usize).min(ROWS);
        Self::with_pipe(live, ForwardPipe { p, smem, index, q, q_full: false, ring })
    }

    /// Rows of `tile` that lie before seqlen_q.
    fn rows_of(&self, tile: &WorkTile) -> usize {
        (self.pipe.p.shape.seqlen_q.saturating_sub(self.first_row(tile)) as usize).min(ROWS)
    }

    /// Checks that the pipeline was left as it was found.
    pub fn finish(mut self) {
        self.pipe.ring.finish();
    }
}

/// Fills a slot; rows and columns that the tensor does not have are zeros.
///
/// # Safety
/// K and V are as [`CpuWarpgroup::forward`] asks.
unsafe fn load_kv<E: Element, S: Second<Strided>>(
    p: &ForwardParams<Strided, S>,
    smem: ForwardSmem,
    tile: KvTile,
    slot: &mut [f32],
) {
    slot.fill(0.0);
    let (KvTile::K(block) | KvTile::V(block)) = tile;
    let KvBlock { batch, head, n_block, pair } = block;
    let k = match p.second.tensors() {
        Some((_, k)) if pair == 1 => k,
        _ => &p.k,
    };
    let rows = n_block * smem.block_n..(n_block + 1) * smem.block_n;
    // SAFETY: the caller's promise.
    unsafe {
        match tile {
            KvTile::K(_) => for_rows::<E>(k, (batch, head), &p.shape, rows, p.shape.seqlen_k, |n, row| {
                for (d, x) in row.iter().enumerate() {
                    slot[d * smem.block_n as usize + n] = x.to_f32();
                }
            }),
            KvTile::V(_) => for_rows::<E>(&p.v, (batch, head), &p.shape, rows, p.shape.seqlen_k, |n, row| {
                for (to, x) in slot[n * smem.head_dim as usize..].iter_mut().zip(row) {
                    *to = x.to_f32();
                }
            }),
        }
    }
}

impl<E: Element, S: Second<Strided>, I: Iterator<Item = KvTile>> ForwardWarpgroup
    for CpuWarpgroup<E, ForwardPipe<'_, S, I>>
{
    type Slot = u32;

    fn first_row(&self, tile: &WorkTile) -> u32 {
        (tile.m_block * self.pipe.smem.consumers + self.pipe.index) * WARPGROUP_ROWS
    }
    fn load_q(&mut self, tile: &WorkTile) {
        let columns = self.pipe.smem.head_dim as usize;
        let first = self.first_row(tile);
        let (p, q) = (self.pipe.p, &mut self.pipe.q);
        q.fill(0.0);
        let rows = first..first + WARPGROUP_ROWS;
        let tensors = core::iter::once(&p.q).chain(p.second.tensors().map(|(q, _)| q));
        for (tensor, q) in tensors.zip(q.chunks_exact_mut(ROWS * columns)) {
            let copy = |i: usize, row: &[E]| {
                for (to, x) in q[i * columns..].iter_mut().zip(row) {
                    *to = x.to_f32();
                }
            };
            // SAFETY: the maker's promise.
            unsafe { for_rows(tensor, (tile.batch, tile.head), &p.shape, rows.clone(), p.shape.seqlen_q, copy) };
        }
        self.pipe.q_full = true;
    }
    fn wait_q(&mut self) {
        if !core::mem::take(&mut self.pipe.q_full) {
            Fault::QueryWithoutLoad.raise();
        }
    }
    fn wait_kv(&mut self) -> u32 {
        let (p, smem) = (self.pipe.p, self.pipe.smem);
        // SAFETY: the maker's promise.
        self.pipe.ring.wait(|tile, slot| unsafe { load_kv::<E, S>(p, smem, tile, slot) })
    }
    fn release_kv(&mut self, slot: u32) {
        self.pipe.ring.release(slot);
    }

    fn qk<const D8: usize, const N8: usize>(&mut self, k: u32, pair: u32) -> Pending<Tile<N8>> {
        let mut s = Tile::ZEROS;
        let q = &self.pipe.q[pair as usize * ROWS * 8 * D8..][..ROWS * 8 * D8];
        multiply_add(self.live, q, 8 * D8, self.pipe.ring.k(k, pair), &mut s);
        Pending(s)
    }
    fn pv<const N8: usize, const D8: usize>(&mut self, mut o: Tile<D8>, p: Tile<N8>, v: u32) -> Pending<Tile<D8>> {
        multiply_add(self.live, p.0.as_flattened().as_flattened(), 8 * N8, self.pipe.ring.v(v), &mut o);
        Pending(o)
    }
    fn take_turn(&mut self) {}
    fn pass_turn(&mut self) {}

    fn store<const D8: usize>(&mut self, x: &Tile<D8>, to: &Output<Strided>, tile: &WorkTile, shape: &Shape) {
        for row in 0..self.rows_of(tile) {
            let (i, columns) = (self.first_row(tile) + row as u32, shape.head_dim as usize);
            // SAFETY: the row is one of O's and belongs to this warpgroup; `new`'s caller promised the rest.
            let line = unsafe { memory::row_mut::<E>(&to.rows, tile.batch, tile.head, i, columns) };
            for (to, x) in line.iter_mut().zip(x.row(row)) {
                *to = E::from_f32(*x);
            }
        }
    }
    fn store_rows(&mut self, values: Rows, address: u64, tile: &WorkTile, shape: &Shape) {
        let line = (tile.batch * shape.heads_q + tile.head) as usize * shape.seqlen_q as usize;
        for (row, value) in values.into_iter().enumerate().take(self.rows_of(tile)) {
            let index = line + self.first_row(tile) as usize + row;
            // SAFETY: the row is one of the LSE's and belongs to this warpgroup; `new`'s caller promised the rest.
            unsafe { memory::write_f32(address, index, value) };
        }
    }
}
