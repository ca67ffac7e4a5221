//! [`ForwardWarpgroup`] on the CPU.

use std::boxed::Box;
use std::vec::Vec;

use super::convert;
use super::fragment::{ROWS, Rows, Tile};
use super::matmul::{Left, multiply_add};
use super::memory::{self, load_rows};
use super::pipeline::{Fault, Ring};
use super::warpgroup::CpuWarpgroup;
use crate::arch::{ForwardWarpgroup, Pending};
use crate::element::Dtype;
use crate::ground::places::KvBlock;
use crate::ground::places::WorkTile;
use crate::ground::sequence::Span;
use crate::ground::tensor::{Output, RowArray, Strided};
use crate::params::ForwardBase;
use crate::pipeline::order::KvTile;
use crate::tile::lane::WARPGROUP_ROWS;
use crate::tile::smem::ForwardSmem;

/// Consumer's end of the forward pipeline, with its own replay of the producer.
pub struct ForwardPipe<'a> {
    p: ForwardBase<Strided>,
    smem: ForwardSmem,
    index: u32,
    /// Query rows, of one pair after the other.
    q: Vec<f32>,
    q_full: bool,
    ring: Ring<Box<dyn Iterator<Item = KvTile> + 'a>>,
    /// Memory for a tile of K before it is transposed.
    rows: Vec<f32>,
}

impl<'a> CpuWarpgroup<ForwardPipe<'a>> {
    /// Makes consumer `index` of a CTA whose producer loads the tiles `loads`.
    ///
    /// # Safety
    /// `p` describes tensors of `dtype` in memory that is valid for reading (Q, K, V) and writing (O, LSE) while this
    /// lives; nothing else accesses this consumer's rows of O and LSE.
    pub unsafe fn forward(
        p: &ForwardBase<Strided>,
        dtype: Dtype,
        smem: ForwardSmem,
        index: u32,
        loads: impl Iterator<Item = KvTile> + 'a,
    ) -> Self {
        let loads: Box<dyn Iterator<Item = KvTile> + 'a> = Box::new(loads);
        let tile = smem.block_n as usize * smem.head_dim as usize;
        let q = std::vec![0.0; smem.pairs as usize * ROWS * smem.head_dim as usize];
        CpuWarpgroup {
            live: (p.shape.seqlen_q as usize).min(ROWS),
            dtype,
            pipe: ForwardPipe {
                p: *p,
                smem,
                index,
                q,
                q_full: false,
                ring: Ring::new(smem.stages, tile, loads),
                rows: std::vec![0.0; tile],
            },
        }
    }

    /// Returns the number of this warpgroup's rows of `tile` that its batch item has.
    fn rows_of(&self, tile: &WorkTile, rows: &Span) -> usize {
        (rows.len.saturating_sub(self.first_row(tile)) as usize).min(ROWS)
    }

    /// Checks that the pipeline is in its initial state again.
    pub fn finish(mut self) {
        self.pipe.ring.finish();
    }
}

/// Fills a slot. Rows and columns beyond those of the tensor become zeros.
///
/// # Safety
/// K and V are valid for reading, as [`CpuWarpgroup::forward`] requires.
unsafe fn load_kv(
    p: &ForwardBase<Strided>,
    dtype: Dtype,
    smem: &ForwardSmem,
    rows: &mut [f32],
    tile: KvTile,
    slot: &mut [f32],
) {
    let (KvTile::K(block) | KvTile::V(block)) = tile;
    let KvBlock { batch, head, n_block, pair } = block;
    let range = n_block * smem.block_n..(n_block + 1) * smem.block_n;
    let columns = smem.head_dim as usize;
    let span = p.item(batch).k;
    // SAFETY: the caller's promise.
    let load = |x, to| unsafe { load_rows(dtype, x, (&span, head), p.shape.head_dim, range, (to, columns)) };
    match tile {
        KvTile::K(_) => {
            load(&p.k[pair as usize], &mut *rows);
            convert::transpose(rows, columns, slot, smem.block_n as usize);
        }
        KvTile::V(_) => load(&p.v, slot),
    }
}

impl ForwardWarpgroup for CpuWarpgroup<ForwardPipe<'_>> {
    /// Index of the slot of the K/V ring.
    type Slot = u32;

    #[inline(never)]
    fn first_row(&self, tile: &WorkTile) -> u32 {
        (tile.m_block * self.pipe.smem.consumers + self.pipe.index) * WARPGROUP_ROWS
    }
    #[inline(never)]
    fn load_q(&mut self, tile: &WorkTile, span: &Span) {
        let columns = self.pipe.smem.head_dim as usize;
        let first = self.first_row(tile);
        let (p, dtype) = (&self.pipe.p, self.dtype);
        let rows = first..first + WARPGROUP_ROWS;
        // The memory for Q limits the number of pairs.
        for (x, q) in p.q.iter().zip(self.pipe.q.chunks_exact_mut(ROWS * columns)) {
            let to = (q, columns);
            // SAFETY: `forward`'s caller has promised that the tensors are valid for reading.
            unsafe { load_rows(dtype, x, (span, tile.head), p.shape.head_dim, rows.clone(), to) };
        }
        self.pipe.q_full = true;
    }
    #[inline(never)]
    fn wait_q(&mut self) {
        if !core::mem::take(&mut self.pipe.q_full) {
            Fault::QueryWithoutLoad.raise();
        }
    }
    #[inline(never)]
    fn wait_kv(&mut self) -> u32 {
        let ForwardPipe { p, smem, ring, rows, .. } = &mut self.pipe;
        // SAFETY: `forward`'s caller has promised that the tensors are valid for reading.
        ring.wait(|tile, slot| unsafe { load_kv(p, self.dtype, smem, rows, tile, slot) })
    }
    #[inline(never)]
    fn release_kv(&mut self, slot: u32) {
        self.pipe.ring.release(slot);
    }

    #[inline(never)]
    fn qk<const D8: usize, const N8: usize>(&mut self, k: u32, pair: u32) -> Pending<Tile<N8>> {
        let mut s = Tile::ZEROS;
        let q = &self.pipe.q[pair as usize * ROWS * 8 * D8..][..ROWS * 8 * D8];
        let k = self.pipe.ring.k(k, pair);
        multiply_add(self.live, 8 * D8, Left::rows(q, 8 * D8), k, s.elements_mut(), 8 * N8);
        Pending(s)
    }
    #[inline(never)]
    fn pv<const N8: usize, const D8: usize>(&mut self, mut o: Tile<D8>, p: Tile<N8>, v: u32) -> Pending<Tile<D8>> {
        let (p, v) = (Left::rows(p.elements(), 8 * N8), self.pipe.ring.v(v));
        multiply_add(self.live, 8 * N8, p, v, o.elements_mut(), 8 * D8);
        Pending(o)
    }
    fn take_ping_pong(&mut self) {}
    fn pass_ping_pong(&mut self) {}

    #[inline(never)]
    fn store<const D8: usize>(
        &mut self,
        x: &Tile<D8>,
        to: &Output<Strided>,
        tile: &WorkTile,
        rows: &Span,
        head_dim: u32,
    ) {
        for row in 0..self.rows_of(tile, rows) {
            let (i, columns) = (self.first_row(tile) + row as u32, head_dim as usize);
            // SAFETY: the row lies in O and belongs to this warpgroup; `forward`'s caller has promised O.
            let line = unsafe { memory::row_mut(&to.rows, rows, tile.head, i, columns) };
            convert::narrow(self.dtype, x.row(row), line);
        }
    }
    #[inline(never)]
    fn store_rows(&mut self, values: Rows, to: &RowArray, tile: &WorkTile, rows: &Span) {
        for (row, value) in (self.first_row(tile)..).zip(values).take(self.rows_of(tile, rows)) {
            // SAFETY: the row lies in the LSE and belongs to this warpgroup; `forward`'s caller has promised the LSE.
            unsafe { memory::write_row(to, rows, tile.head, row, value) };
        }
    }
}
