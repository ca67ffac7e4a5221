//! [`BackwardWarpgroup`] on the CPU, and the kernels before and after it.
//!
//! Warpgroups run one after the other here, so none can see another's dS: each adds what its own keys contribute to dQ.

use std::collections::VecDeque;
use std::vec::Vec;

use super::fragment::{ROWS, Tile};
use super::matmul::multiply_add;
use super::memory::{self, for_rows};
use super::pipeline::Fault;
use super::warpgroup::CpuWarpgroup;
use crate::arch::{BackwardWarpgroup, Pending, Split};
use crate::attention::mask::Mask;
use crate::attention::pairs::Pairs;
use crate::attention::query_blocks::{QueryBlock, QueryBlocks};
use crate::attention::row_statistics::{delta, exponent_offset};
use crate::element::Element;
use crate::params::{BackwardParams, FinishParams, PrepareParams, Second, Shape, Strided, Workspace};
use crate::pipeline::order::KvBlock;
use crate::tile::smem::BackwardSmem;

/// A query block in a ring: rows of Q or dO with their statistics.
struct QueryTile {
    slot: u32,
    /// Rows × this warpgroup's columns.
    rows: Vec<f32>,
    /// All columns × rows.
    transposed: Vec<f32>,
    statistics: Vec<f32>,
}

/// One of the two rings, filled when it is waited for.
struct QueryRing<M, P> {
    blocks: QueryBlocks<M, P>,
    upcoming: QueryBlock,
    held: VecDeque<QueryTile>,
    next_slot: u32,
}

impl<M: Mask, P: Pairs> QueryRing<M, P> {
    fn new(blocks: QueryBlocks<M, P>) -> Self {
        QueryRing { blocks, upcoming: blocks.first(), held: VecDeque::new(), next_slot: 0 }
    }
    /// The next query block, and the slot that it is to fill.
    fn next(&mut self) -> (QueryBlock, u32) {
        let slot = self.next_slot;
        if self.held.len() == BackwardSmem::STAGES as usize {
            Fault::WaitWithoutRelease { slot }.raise();
        }
        if slot == self.blocks.count() {
            Fault::WaitWithoutLoad { slot }.raise();
        }
        self.next_slot += 1;
        let block = self.upcoming;
        self.upcoming = self.blocks.after(&block);
        (block, slot)
    }
    fn release(&mut self, slot: u32) {
        match self.held.pop_front() {
            Some(tile) if tile.slot == slot => {}
            _ => Fault::ReleaseWithoutWait { slot }.raise(),
        }
    }
    fn get(&self, slot: u32) -> &QueryTile {
        let found = self.held.iter().find(|tile| tile.slot == slot);
        found.unwrap_or_else(|| Fault::WrongTile { slot, holds: None }.raise())
    }
    fn finish(&mut self) {
        if self.next_slot < self.blocks.count() || !self.held.is_empty() {
            Fault::Unfinished.raise();
        }
    }
}

/// The consumer's end of the backward pipeline, and its own replay of the producer, for one block of keys.
pub struct BackwardPipe<'a, M, S: Second<Strided>> {
    p: &'a BackwardParams<Strided, S>,
    smem: BackwardSmem,
    split: Split,
    index: u32,
    /// The block of keys, and of its pairs those that are still to come: pairs below `keys.pair`.
    keys: KvBlock,
    /// This warpgroup's rows of K and V.
    k: Vec<f32>,
    v: Vec<f32>,
    /// Empty until K and V are there.
    q: Option<QueryRing<M, S::Pairs>>,
    d_o: Option<QueryRing<M, S::Pairs>>,
    /// The dSᵀ last shared, keys × queries.
    ds: Vec<f32>,
}

impl<M: Mask, S: Second<Strided>> BackwardPipe<'_, M, S> {
    /// This warpgroup's columns of dK, dV and its part of dQ.
    fn columns(&self) -> core::ops::Range<usize> {
        let head_dim = self.smem.head_dim as usize;
        match self.split {
            Split::Keys => 0..head_dim,
            Split::Columns => {
                let half = head_dim / 2;
                self.index as usize * half..(self.index as usize + 1) * half
            }
        }
    }

    /// The query blocks of the next pair that has any.
    fn next_pair(&mut self) -> Option<QueryBlocks<M, S::Pairs>> {
        let (shape, smem) = (&self.p.shape, &self.smem);
        while self.keys.pair > 0 {
            self.keys.pair -= 1;
            let blocks = QueryBlocks::new(shape, self.p.second.pairs(shape), smem.block_m, smem.block_n, &self.keys);
            if blocks.count() > 0 {
                return Some(blocks);
            }
        }
        None
    }

    fn q(&mut self) -> &mut QueryRing<M, S::Pairs> {
        self.q.as_mut().unwrap_or_else(|| Fault::QueryWithoutLoad.raise())
    }
    fn d_o(&mut self) -> &mut QueryRing<M, S::Pairs> {
        self.d_o.as_mut().unwrap_or_else(|| Fault::QueryWithoutLoad.raise())
    }
    fn held_q(&self, slot: u32) -> &QueryTile {
        self.q.as_ref().unwrap_or_else(|| Fault::QueryWithoutLoad.raise()).get(slot)
    }
    fn held_do(&self, slot: u32) -> &QueryTile {
        self.d_o.as_ref().unwrap_or_else(|| Fault::QueryWithoutLoad.raise()).get(slot)
    }
}

impl<'a, E: Element, M: Mask, S: Second<Strided>> CpuWarpgroup<E, BackwardPipe<'a, M, S>> {
    /// Consumer `index` of a CTA that has `keys`.
    ///
    /// # Safety
    /// `p` describes tensors of `E` in memory that is valid for reading (Q, K, V, dO) and writing (dK, dV, the workspace)
    /// while this lives; nobody else accesses these keys' rows of dK and dV, or the workspace of these heads.
    pub unsafe fn backward(
        p: &'a BackwardParams<Strided, S>,
        smem: BackwardSmem,
        split: Split,
        index: u32,
        keys: &KvBlock,
    ) -> Self {
        let keys = KvBlock { pair: S::Pairs::COUNT, ..*keys };
        let (k, v, ds) = (Vec::new(), Vec::new(), Vec::new());
        Self::with_pipe(ROWS, BackwardPipe { p, smem, split, index, keys, k, v, q: None, d_o: None, ds })
    }

    /// This warpgroup's rows of a tensor of keys.
    fn load_keys(&self, tensor: &Strided) -> Vec<f32> {
        let BackwardPipe { p, smem, keys, .. } = &self.pipe;
        let mut tile = std::vec![0.0; ROWS * smem.head_dim as usize];
        let copy = |i: usize, row: &[E]| {
            for (to, x) in tile[i * smem.head_dim as usize..].iter_mut().zip(row) {
                *to = x.to_f32();
            }
        };
        let first = keys.n_block * smem.block_n + self.first_key();
        let rows = first..first + ROWS as u32;
        // SAFETY: `backward`'s caller promised it.
        unsafe { for_rows(tensor, (keys.batch, keys.head), &p.shape, rows, p.shape.seqlen_k, copy) };
        tile
    }

    /// Checks that the pipeline was left as it was found.
    pub fn finish(mut self) {
        if self.pipe.q.is_some() || self.pipe.d_o.is_some() || self.pipe.next_pair().is_some() {
            Fault::Unfinished.raise();
        }
    }

    /// Rows of `tensor` that `block` names, and their statistics from the array at `statistics`.
    fn load(&self, tensor: &Strided, statistics: u64, block: &QueryBlock, slot: u32) -> QueryTile {
        let BackwardPipe { p, smem, .. } = &self.pipe;
        let (block_m, head_dim, own) = (smem.block_m as usize, smem.head_dim as usize, self.pipe.columns());
        let first = block.m_block * smem.block_m;
        let mut rows = std::vec![0.0; block_m * own.len()];
        let mut transposed = std::vec![0.0; head_dim * block_m];
        let copy = |i: usize, row: &[E]| {
            for (d, x) in row.iter().enumerate() {
                transposed[d * block_m + i] = x.to_f32();
                if own.contains(&d) {
                    rows[i * own.len() + d - own.start] = x.to_f32();
                }
            }
        };
        let range = first..first + smem.block_m;
        let index = p.workspace.row(&p.shape, block.batch, block.head, first);
        // SAFETY: `backward`'s caller promised it.
        let statistics = unsafe {
            for_rows(tensor, (block.batch, block.head), &p.shape, range, p.shape.seqlen_q, copy);
            (0..block_m).map(|i| memory::read_f32(statistics, index as usize + i)).collect()
        };
        QueryTile { slot, rows, transposed, statistics }
    }
}

/// `f(x, s)` for every element and its column's statistic.
fn map_columns<const M8: usize>(x: &mut Tile<M8>, statistics: &[f32], f: impl Fn(f32, f32) -> f32) {
    for row in 0..ROWS {
        for (x, s) in x.row_mut(row).iter_mut().zip(statistics) {
            *x = f(*x, *s);
        }
    }
}

impl<E: Element, M: Mask, S: Second<Strided>> BackwardWarpgroup for CpuWarpgroup<E, BackwardPipe<'_, M, S>> {
    type Slot = u32;
    /// Query rows × this warpgroup's columns.
    type DQ<const Q8: usize> = Vec<f32>;

    fn first_key(&self) -> u32 {
        match self.pipe.split {
            Split::Keys => self.pipe.index * ROWS as u32,
            Split::Columns => 0,
        }
    }
    fn wait_kv(&mut self) {
        let Some(blocks) = self.pipe.next_pair() else { Fault::WaitWithoutLoad { slot: 0 }.raise() };
        let p = self.pipe.p;
        let k = match p.second.tensors() {
            Some((_, k)) if self.pipe.keys.pair == 1 => k,
            _ => &p.k,
        };
        (self.pipe.k, self.pipe.v) = (self.load_keys(k), self.load_keys(&p.v));
        if self.pipe.q.replace(QueryRing::new(blocks)).is_some() {
            Fault::WaitWithoutRelease { slot: 0 }.raise();
        }
        self.pipe.d_o = Some(QueryRing::new(blocks));
    }
    fn release_kv(&mut self) {
        for ring in [&mut self.pipe.q, &mut self.pipe.d_o] {
            match ring {
                Some(ring) => ring.finish(),
                None => Fault::ReleaseWithoutWait { slot: 0 }.raise(),
            }
            *ring = None;
        }
    }
    fn wait_q(&mut self) -> u32 {
        let (block, slot) = self.pipe.q().next();
        let p = self.pipe.p;
        let q = match p.second.tensors() {
            Some((q, _)) if block.pair == 1 => q,
            _ => &p.q,
        };
        let tile = self.load(q, p.workspace.lse, &block, slot);
        self.pipe.q().held.push_back(tile);
        slot
    }
    fn release_q(&mut self, q: u32) {
        self.pipe.q().release(q);
    }
    fn wait_do(&mut self) -> u32 {
        let (block, slot) = self.pipe.d_o().next();
        let tile = self.load(&self.pipe.p.d_o, self.pipe.p.workspace.delta, &block, slot);
        self.pipe.d_o().held.push_back(tile);
        slot
    }
    fn release_do(&mut self, d_o: u32) {
        self.pipe.d_o().release(d_o);
    }

    fn map_lse<const M8: usize>(&self, x: &mut Tile<M8>, q: u32, f: impl Fn(f32, f32) -> f32) {
        map_columns(x, &self.pipe.held_q(q).statistics, f);
    }
    fn map_delta<const M8: usize>(&self, x: &mut Tile<M8>, d_o: u32, f: impl Fn(f32, f32) -> f32) {
        map_columns(x, &self.pipe.held_do(d_o).statistics, f);
    }

    fn kq<const D8: usize, const M8: usize>(&mut self, q: u32) -> Pending<Tile<M8>> {
        let mut s = Tile::ZEROS;
        multiply_add(ROWS, &self.pipe.k, 8 * D8, &self.pipe.held_q(q).transposed, &mut s);
        Pending(s)
    }
    fn v_do<const D8: usize, const M8: usize>(&mut self, d_o: u32) -> Pending<Tile<M8>> {
        let mut dp = Tile::ZEROS;
        multiply_add(ROWS, &self.pipe.v, 8 * D8, &self.pipe.held_do(d_o).transposed, &mut dp);
        Pending(dp)
    }
    fn p_do<const M8: usize, const C8: usize>(&mut self, mut dv: Tile<C8>, p: Tile<M8>, d_o: u32) -> Pending<Tile<C8>> {
        multiply_add(ROWS, p.0.as_flattened().as_flattened(), 8 * M8, &self.pipe.held_do(d_o).rows, &mut dv);
        Pending(dv)
    }
    fn ds_q<const M8: usize, const C8: usize>(&mut self, mut dk: Tile<C8>, ds: Tile<M8>, q: u32) -> Pending<Tile<C8>> {
        multiply_add(ROWS, ds.0.as_flattened().as_flattened(), 8 * M8, &self.pipe.held_q(q).rows, &mut dk);
        Pending(dk)
    }
    fn share<const M8: usize>(&mut self, ds: &Tile<M8>) {
        self.pipe.ds = ds.0.as_flattened().as_flattened().to_vec();
    }
    fn ds_k<const M8: usize, const Q8: usize>(&mut self) -> Pending<Vec<f32>> {
        let (own, head_dim) = (self.pipe.columns(), self.pipe.smem.head_dim as usize);
        let mut dq = std::vec![0.0; 8 * M8 * own.len()];
        for (ds, k) in self.pipe.ds.chunks_exact(8 * M8).zip(self.pipe.k.chunks_exact(head_dim)) {
            for (ds, dq) in ds.iter().zip(dq.chunks_exact_mut(own.len())) {
                for (dq, k) in dq.iter_mut().zip(&k[own.clone()]) {
                    *dq += ds * k;
                }
            }
        }
        Pending(dq)
    }
    fn wait_dq<const LATER: usize, const Q8: usize>(&mut self, x: Pending<Vec<f32>>) -> Vec<f32> {
        x.0
    }
    fn await_turn(&mut self, _: &Workspace, _: &Shape, _: &QueryBlock, _: u32) {}
    fn add_dq<const Q8: usize>(&mut self, dq: &Vec<f32>, to: &Workspace, shape: &Shape, at: &QueryBlock) {
        let (own, head_dim) = (self.pipe.columns(), self.pipe.smem.head_dim as usize);
        let first = to.row(shape, at.dq_batch(shape), at.head, at.m_block * self.pipe.smem.block_m) as usize;
        for (i, dq) in dq.chunks_exact(own.len()).enumerate() {
            for (d, x) in own.clone().zip(dq) {
                // SAFETY: `backward`'s caller promised this head's workspace.
                unsafe { memory::add_f32(to.dq, (first + i) * head_dim + d, *x) };
            }
        }
    }

    fn store_kv<const C8: usize>(&mut self, x: &Tile<C8>, to: &Strided, at: &KvBlock, shape: &Shape) {
        let first = at.n_block * self.pipe.smem.block_n + self.first_key();
        let own = self.pipe.columns();
        for row in 0..ROWS.min(shape.seqlen_k.saturating_sub(first) as usize) {
            let columns = shape.head_dim as usize;
            // SAFETY: the row is the tensor's and, in these columns, this warpgroup's; `backward`'s caller promised it.
            let line = unsafe { memory::row_mut::<E>(to, at.batch, at.head, first + row as u32, columns) };
            for (to, x) in line.iter_mut().skip(own.start).zip(x.row(row)) {
                *to = E::from_f32(*x);
            }
        }
    }
}

/// Fills the workspace of one query head.
///
/// # Safety
/// `p` describes tensors of `E`, valid for reading, and a workspace that is valid for writing and that nobody else
/// accesses for this head.
pub unsafe fn prepare<E: Element>(p: &PrepareParams, batch: u32, head: u32) {
    let shape = &p.shape;
    let first = p.workspace.row(shape, batch, head, 0) as usize;
    let columns = shape.head_dim as usize;
    for row in 0..p.workspace.rows {
        // SAFETY: the caller's promise; rows below seqlen_q are the tensors' and the arrays'.
        unsafe {
            let (lse, delta) = if row < shape.seqlen_q {
                let index = ((batch * shape.heads_q + head) * shape.seqlen_q) as usize + row as usize;
                let o = memory::row::<E>(&p.o, batch, head, row, columns);
                let d_o = memory::row::<E>(&p.d_o, batch, head, row, columns);
                let dot = o.iter().zip(d_o).map(|(o, d_o)| o.to_f32() * d_o.to_f32()).sum();
                let d_lse = if p.d_lse == 0 { 0.0 } else { memory::read_f32(p.d_lse, index) };
                (exponent_offset(memory::read_f32(p.lse, index)), delta(dot, d_lse))
            } else {
                (f32::INFINITY, 0.0)
            };
            memory::write_f32(p.workspace.lse, first + row as usize, lse);
            memory::write_f32(p.workspace.delta, first + row as usize, delta);
            for pair in 0..p.pairs {
                let first =
                    p.workspace.row(shape, batch + pair * shape.batch, head, row) as usize * p.head_dim as usize;
                for index in first..first + p.head_dim as usize {
                    memory::write_f32(p.workspace.dq, index, 0.0);
                }
            }
        }
    }
}

/// Turns the workspace's dQ of one query head into the tensor.
///
/// # Safety
/// As [`prepare`], with a tensor that is valid for writing.
pub unsafe fn finish<E: Element>(p: &FinishParams, head_dim: u32, batch: u32, head: u32) {
    let first = p.workspace.row(&p.shape, batch + p.pair * p.shape.batch, head, 0) as usize;
    for row in 0..p.shape.seqlen_q {
        // SAFETY: the caller's promise.
        let line = unsafe { memory::row_mut::<E>(&p.dq, batch, head, row, p.shape.head_dim as usize) };
        for (column, to) in line.iter_mut().enumerate() {
            let index = (first + row as usize) * head_dim as usize + column;
            // SAFETY: the caller's promise.
            *to = E::from_f32(unsafe { memory::read_f32(p.workspace.dq, index) } * p.scale);
        }
    }
}
