//! [`Warpgroup`] on the CPU.

use core::ops::Range;
use std::vec::Vec;

use super::fragment::{ROWS, Rows, Tile};
use super::matmul::multiply_add;
use super::memory;
use super::pipeline::{Fault, Ring};
use crate::arch::{Pending, Warpgroup};
use crate::attention::scheduler::WorkTile;
use crate::element::Element;
use crate::params::{ForwardParams, Output, Shape, Strided};
use crate::pipeline::order::{KvBlock, KvTile};
use crate::tile::smem::ForwardSmem;
use crate::variants::WARPGROUP_ROWS;

/// One consumer warpgroup and its own replay of the producer.
pub struct CpuWarpgroup<'a, E, I> {
    p: &'a ForwardParams<Strided>,
    smem: ForwardSmem,
    index: u32,
    /// Rows that are computed: all that the problem has, in a problem that has fewer than a tile.
    live: usize,
    q: Vec<f32>,
    q_full: bool,
    ring: Ring<I>,
    element: core::marker::PhantomData<E>,
}

impl<'a, E: Element, I: Iterator<Item = KvTile>> CpuWarpgroup<'a, E, I> {
    /// Consumer `index` of a CTA whose producer sends `loads`.
    ///
    /// # Safety
    /// `p` describes tensors of `E` in memory that is valid for reading (Q, K, V) and writing (O, LSE) while this lives;
    /// nobody else accesses this consumer's rows of O and LSE.
    pub unsafe fn new(p: &'a ForwardParams<Strided>, smem: ForwardSmem, index: u32, loads: I) -> Self {
        let (head_dim, block_n) = (smem.head_dim as usize, smem.block_n as usize);
        CpuWarpgroup {
            p,
            smem,
            index,
            live: (p.shape.seqlen_q as usize).min(ROWS),
            q: std::vec![0.0; ROWS * head_dim],
            q_full: false,
            ring: Ring::new(smem.stages, block_n * head_dim, loads),
            element: core::marker::PhantomData,
        }
    }

    /// Rows of `tile` that lie before seqlen_q.
    fn rows_of(&self, tile: &WorkTile) -> usize {
        (self.p.shape.seqlen_q.saturating_sub(self.first_row(tile)) as usize).min(ROWS)
    }

    /// Checks that the pipeline was left as it was found.
    pub fn finish(mut self) {
        self.ring.finish();
    }
}

/// `f(i, row)` for those of `rows` that are below `seqlen`, i counting from 0.
///
/// Called for tensors of a [`CpuWarpgroup`], whose maker promised that they are valid.
fn for_rows<E: Element>(
    tensor: &Strided,
    (batch, head): (u32, u32),
    shape: &Shape,
    rows: Range<u32>,
    seqlen: u32,
    mut f: impl FnMut(usize, &[E]),
) {
    for row in rows.start..rows.end.min(seqlen) {
        // SAFETY: the row is one of the tensor's, which is valid.
        let x = unsafe { memory::row::<E>(tensor, batch, head, row, shape.head_dim as usize) };
        f((row - rows.start) as usize, x);
    }
}

/// Fills a slot; rows and columns that the tensor does not have are zeros.
fn load_kv<E: Element>(p: &ForwardParams<Strided>, smem: ForwardSmem, tile: KvTile, slot: &mut [f32]) {
    slot.fill(0.0);
    let (KvTile::K(KvBlock { batch, head, n_block }) | KvTile::V(KvBlock { batch, head, n_block })) = tile;
    let rows = n_block * smem.block_n..(n_block + 1) * smem.block_n;
    match tile {
        KvTile::K(_) => for_rows::<E>(&p.k, (batch, head), &p.shape, rows, p.shape.seqlen_k, |n, row| {
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

impl<E: Element, I: Iterator<Item = KvTile>> Warpgroup for CpuWarpgroup<'_, E, I> {
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
    fn scale_rows<const N8: usize>(&self, x: &mut Tile<N8>, factors: Rows) {
        if factors.iter().any(|factor| *factor != 1.0) {
            self.map_rows(x, factors, |x, factor| x * factor);
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
        let first = self.first_row(tile);
        let shape = &self.p.shape;
        let q = &mut self.q;
        q.fill(0.0);
        let rows = first..first + WARPGROUP_ROWS;
        for_rows::<E>(&self.p.q, (tile.batch, tile.head), shape, rows, shape.seqlen_q, |i, row| {
            for (to, x) in q[i * columns..].iter_mut().zip(row) {
                *to = x.to_f32();
            }
        });
        self.q_full = true;
    }
    fn wait_q(&mut self) {
        if !core::mem::take(&mut self.q_full) {
            Fault::QueryWithoutLoad.raise();
        }
    }
    fn wait_kv(&mut self) -> u32 {
        let (p, smem) = (self.p, self.smem);
        self.ring.wait(|tile, slot| load_kv::<E>(p, smem, tile, slot))
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
