//! [`Warpgroup`] on the CPU.

use std::vec::Vec;

use super::fragment::{ROWS, Rows, Tile};
use super::matmul::multiply_add;
use super::memory;
use super::pipeline::{Fault, Ring};
use crate::arch::{Pending, Warpgroup};
use crate::attention::scheduler::WorkTile;
use crate::element::Element;
use crate::params::{ForwardParams, Shape, Strided};
use crate::pipeline::order::{KvOrder, KvTile};
use crate::tile::smem::ForwardSmem;
use crate::variants::WARPGROUP_ROWS;

/// One consumer warpgroup and its own replay of the producer.
pub struct CpuWarpgroup<'a, E> {
    p: &'a ForwardParams<Strided>,
    smem: ForwardSmem,
    index: u32,
    tile: WorkTile,
    /// Rows that lie before seqlen_q; the others are never computed.
    live: usize,
    q: Vec<f32>,
    q_full: bool,
    ring: Ring,
    element: core::marker::PhantomData<E>,
}

impl<'a, E: Element> CpuWarpgroup<'a, E> {
    /// Consumer `index` of a CTA that runs `tile`, which visits `n_blocks`.
    ///
    /// # Safety
    /// `p` describes tensors of `E` in memory that is valid for reading (Q, K, V) and writing (O, LSE) while this lives;
    /// nobody else accesses this consumer's rows of O and LSE.
    pub unsafe fn new(
        p: &'a ForwardParams<Strided>,
        smem: ForwardSmem,
        index: u32,
        tile: WorkTile,
        n_blocks: u32,
    ) -> Self {
        let (head_dim, block_n) = (smem.head_dim as usize, smem.block_n as usize);
        let first = (tile.m_block * smem.consumers + index) * WARPGROUP_ROWS;
        CpuWarpgroup {
            p,
            smem,
            index,
            tile,
            live: (p.shape.seqlen_q.saturating_sub(first) as usize).min(ROWS),
            q: std::vec![0.0; ROWS * head_dim],
            q_full: false,
            ring: Ring::new(smem.stages, block_n * head_dim, KvOrder::new(n_blocks)),
            element: core::marker::PhantomData,
        }
    }

    /// `f(i, row)` for the rows `first..first + count` of a tensor that exist, i counting from 0.
    fn for_rows(
        &self,
        tensor: &Strided,
        head: u32,
        seqlen: u32,
        first: u32,
        count: u32,
        mut f: impl FnMut(usize, &[E]),
    ) {
        let columns = self.p.shape.head_dim as usize;
        for i in 0..count.min(seqlen.saturating_sub(first)) {
            // SAFETY: the row is one of the tensor's; `new`'s caller promised that it is valid.
            f(i as usize, unsafe { memory::row::<E>(tensor, self.tile.batch, head, first + i, columns) });
        }
    }

    /// Fills a slot; rows and columns that the tensor does not have are zeros.
    fn load_kv(&self, tile: KvTile, slot: &mut [f32]) {
        slot.fill(0.0);
        let block_n = self.smem.block_n;
        let (columns, seqlen) = (self.smem.head_dim as usize, self.p.shape.seqlen_k);
        let head = self.tile.head / self.p.shape.group();
        match tile {
            KvTile::K(n_block) => {
                self.for_rows(&self.p.k, head, seqlen, n_block * block_n, block_n, |n, row| {
                    for (d, x) in row.iter().enumerate() {
                        slot[d * block_n as usize + n] = x.to_f32();
                    }
                });
            }
            KvTile::V(n_block) => {
                self.for_rows(&self.p.v, head, seqlen, n_block * block_n, block_n, |n, row| {
                    for (to, x) in slot[n * columns..].iter_mut().zip(row) {
                        *to = x.to_f32();
                    }
                });
            }
        }
    }
}

impl<E: Element> Warpgroup for CpuWarpgroup<'_, E> {
    type Acc<const N8: usize> = Tile<N8>;
    /// Rounded to E, kept in f32.
    type Operand<const N8: usize> = Tile<N8>;
    type Rows = Rows;
    type Tensor = Strided;
    type Slot = u32;

    fn zeros<const N8: usize>(&self) -> Tile<N8> {
        Tile::ZEROS
    }
    fn truncate_rows<const N8: usize>(&self, x: &mut Tile<N8>, fill: f32, end: impl Fn(u32) -> i32) {
        for row in 0..self.live {
            let end = (end(row as u32).max(0) as usize).min(8 * N8);
            x.row_mut(row)[end..].fill(fill);
        }
    }
    fn map_rows<const N8: usize>(&self, x: &mut Tile<N8>, rows: Rows, f: impl Fn(f32, f32) -> f32) {
        for (row, value) in rows.into_iter().enumerate().take(self.live) {
            for x in x.row_mut(row) {
                *x = f(*x, value);
            }
        }
    }
    fn fold<const N8: usize>(&self, x: &Tile<N8>, f: impl Fn(f32, f32) -> f32) -> Rows {
        core::array::from_fn(|row| {
            // Eight chains, one a vector lane.
            let chains = x.0[row][1..].iter().fold(x.0[row][0], |mut chains, group| {
                chains.iter_mut().zip(group).for_each(|(chain, x)| *chain = f(*chain, *x));
                chains
            });
            chains[1..].iter().fold(chains[0], |a, x| f(a, *x))
        })
    }
    fn reduce(&self, rows: Rows, _: impl Fn(f32, f32) -> f32) -> Rows {
        rows
    }
    fn rows(&self, value: f32) -> Rows {
        [value; ROWS]
    }
    fn zip(&self, a: Rows, b: Rows, f: impl Fn(f32, f32) -> f32) -> Rows {
        core::array::from_fn(|row| f(a[row], b[row]))
    }
    fn pack<const N8: usize>(&self, x: &Tile<N8>) -> Tile<N8> {
        let mut packed = Tile::ZEROS;
        for row in 0..self.live {
            for (to, x) in packed.row_mut(row).iter_mut().zip(x.row(row)) {
                *to = E::from_f32(*x).to_f32();
            }
        }
        packed
    }

    fn exp2(x: f32) -> f32 {
        x.exp2()
    }
    fn log2(x: f32) -> f32 {
        x.log2()
    }
    fn fma(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
    fn recip(x: f32) -> f32 {
        x.recip()
    }

    fn first_row(&self, tile: &WorkTile) -> u32 {
        (tile.m_block * self.smem.consumers + self.index) * WARPGROUP_ROWS
    }
    fn load_q(&mut self, tile: &WorkTile) {
        let columns = self.smem.head_dim as usize;
        let mut q = core::mem::take(&mut self.q);
        let seqlen = self.p.shape.seqlen_q;
        self.for_rows(&self.p.q, tile.head, seqlen, self.first_row(tile), WARPGROUP_ROWS, |i, row| {
            for (to, x) in q[i * columns..].iter_mut().zip(row) {
                *to = x.to_f32();
            }
        });
        self.q = q;
        self.q_full = true;
    }
    fn wait_q(&mut self) {
        if !core::mem::take(&mut self.q_full) {
            Fault::QueryWithoutLoad.raise();
        }
    }
    fn wait_kv(&mut self) -> u32 {
        let empty = Ring::new(0, 0, KvOrder::new(0));
        let mut ring = core::mem::replace(&mut self.ring, empty);
        let slot = ring.wait(|tile, slot| self.load_kv(tile, slot));
        self.ring = ring;
        slot
    }
    fn release_kv(&mut self, slot: u32) {
        self.ring.release(slot);
    }

    fn qk<const D8: usize, const N8: usize>(&mut self, k: u32) -> Pending<Tile<N8>> {
        let mut s = Tile::ZEROS;
        multiply_add(self.live, &self.q, 8 * D8, self.ring.k(k), &mut s);
        Pending(s)
    }
    fn pv<const N8: usize, const D8: usize>(&mut self, mut o: Tile<D8>, p: Tile<N8>, v: u32) -> Pending<Tile<D8>> {
        multiply_add(self.live, p.0.as_flattened().as_flattened(), 8 * N8, self.ring.v(v), &mut o);
        Pending(o)
    }
    fn wait<const LATER: usize, const N8: usize>(&mut self, x: Pending<Tile<N8>>) -> Tile<N8> {
        x.0
    }

    fn take_turn(&mut self) {}
    fn pass_turn(&mut self) {}

    fn store<const D8: usize>(&mut self, x: &Tile<D8>, to: &Strided, tile: &WorkTile, shape: &Shape) {
        self.ring.finish();
        for row in 0..self.live {
            let (i, columns) = (self.first_row(tile) + row as u32, shape.head_dim as usize);
            // SAFETY: the row is one of O's and belongs to this warpgroup; `new`'s caller promised the rest.
            let line = unsafe { memory::row_mut::<E>(to, tile.batch, tile.head, i, columns) };
            for (to, x) in line.iter_mut().zip(x.row(row)) {
                *to = E::from_f32(*x);
            }
        }
    }
    fn store_rows(&mut self, values: Rows, address: u64, tile: &WorkTile, shape: &Shape) {
        let line = (tile.batch * shape.heads_q + tile.head) as usize * shape.seqlen_q as usize;
        for (row, value) in values.into_iter().enumerate().take(self.live) {
            let index = line + self.first_row(tile) as usize + row;
            // SAFETY: the row is one of the LSE's and belongs to this warpgroup; `new`'s caller promised the rest.
            unsafe { memory::write_f32(address, index, value) };
        }
    }
}
