//! [`BackwardWarpgroup`] on the CPU.
//!
//! Warpgroups run one after the other here, so none can read another's dS: each accumulates what its own keys
//! contribute to dQ. P that the first warpgroup writes for the second is kept until the second runs.

use std::boxed::Box;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::vec::Vec;

use super::convert;
use super::elementwise;
use super::fragment::{ROWS, Tile};
use super::matmul::{Left, multiply_add};
use super::memory::{self, load_rows};
use super::pipeline::Fault;
use super::warpgroup::CpuWarpgroup;
use crate::arch::{BackwardWarpgroup, Pending};
use crate::element::Dtype;
use crate::ground::places::KvBlock;
use crate::ground::places::QueryBlock;
use crate::ground::sequence::Span;
use crate::ground::tensor::Strided;
use crate::params::BackwardBase;
use crate::tile::smem::BackwardSmem;

/// P of query blocks, from one consumer to the other.
pub type Weights = RefCell<VecDeque<Vec<f32>>>;

/// Query block in a ring: rows of Q with `neg_lse_log2`, or rows of dO with δ.
#[derive(Default)]
struct QueryTile {
    /// Elements, rows × columns.
    rows: Vec<f32>,
    /// Elements transposed, columns × rows.
    transposed: Vec<f32>,
    statistics: Vec<f32>,
}

/// Ring of Q or dO, whose blocks are loaded when they are waited for.
struct QueryRing {
    upcoming: VecDeque<QueryBlock>,
    /// Blocks that the consumer holds. The last one has number `count` − 1.
    held: VecDeque<QueryTile>,
    /// Memory of blocks that were released.
    spare: Vec<QueryTile>,
    stages: u32,
    count: u32,
}

impl QueryRing {
    fn new(blocks: VecDeque<QueryBlock>, stages: u32) -> Self {
        QueryRing { upcoming: blocks, held: VecDeque::new(), spare: Vec::new(), stages, count: 0 }
    }
    /// Returns the next query block.
    fn next(&mut self) -> QueryBlock {
        let ordinal = self.count;
        if self.held.len() == self.stages as usize {
            Fault::WaitWithoutRelease { slot: ordinal }.raise();
        }
        self.upcoming.pop_front().unwrap_or_else(|| Fault::WaitWithoutLoad { slot: ordinal }.raise())
    }
    /// Returns memory for a query block.
    fn memory(&mut self) -> QueryTile {
        self.spare.pop().unwrap_or_default()
    }
    /// Adds a query block to those that are held, and returns its number.
    fn hold(&mut self, tile: QueryTile) -> u32 {
        self.held.push_back(tile);
        self.count += 1;
        self.count - 1
    }
    fn first_held(&self) -> u32 {
        self.count - self.held.len() as u32
    }
    fn release(&mut self, ordinal: u32) {
        if self.held.is_empty() || ordinal != self.first_held() {
            Fault::ReleaseWithoutWait { slot: ordinal }.raise();
        }
        self.spare.extend(self.held.pop_front());
    }
    fn get(&self, ordinal: u32) -> &QueryTile {
        let index = ordinal.checked_sub(self.first_held());
        let found = index.and_then(|index| self.held.get(index as usize));
        found.unwrap_or_else(|| Fault::WrongTile { slot: ordinal, holds: None }.raise())
    }
    fn finish(&mut self) {
        if !self.upcoming.is_empty() || !self.held.is_empty() {
            Fault::Unfinished.raise();
        }
    }
}

/// Function that lists the query blocks which a block of keys visits through its pair.
pub type BlocksOf<'a> = dyn Fn(&KvBlock) -> VecDeque<QueryBlock> + 'a;

/// Consumer's end of the backward pipeline, with its own replay of the producer, for one block of keys.
pub struct BackwardPipe<'a> {
    p: &'a BackwardBase<Strided>,
    smem: BackwardSmem,
    index: u32,
    /// P that the consumer with dV, which runs first, has written for the one with dK.
    weights: &'a Weights,
    /// Current block of keys. The pairs below `keys.pair` are still to come.
    keys: KvBlock,
    blocks_of: Box<BlocksOf<'a>>,
    /// This warpgroup's rows of K and V.
    k: Vec<f32>,
    v: Vec<f32>,
    /// Rings of Q and dO; `None` until K and V have been loaded.
    q: Option<QueryRing>,
    d_o: Option<QueryRing>,
}

impl BackwardPipe<'_> {
    /// Returns the query blocks of the next pair that has any.
    fn next_pair(&mut self) -> Option<VecDeque<QueryBlock>> {
        while self.keys.pair > 0 {
            self.keys.pair -= 1;
            let blocks = (self.blocks_of)(&self.keys);
            if !blocks.is_empty() {
                return Some(blocks);
            }
        }
        None
    }

    fn q(&mut self) -> &mut QueryRing {
        self.q.as_mut().unwrap_or_else(|| Fault::QueryWithoutLoad.raise())
    }
    fn d_o(&mut self) -> &mut QueryRing {
        self.d_o.as_mut().unwrap_or_else(|| Fault::QueryWithoutLoad.raise())
    }
    fn held_q(&self, ordinal: u32) -> &QueryTile {
        self.q.as_ref().unwrap_or_else(|| Fault::QueryWithoutLoad.raise()).get(ordinal)
    }
    fn held_do(&self, ordinal: u32) -> &QueryTile {
        self.d_o.as_ref().unwrap_or_else(|| Fault::QueryWithoutLoad.raise()).get(ordinal)
    }

    /// Loads this warpgroup's rows of K or V of the block of keys.
    fn load_keys(&self, dtype: Dtype, first_key: u32, tensor: &Strided, to: &mut Vec<f32>) {
        let BackwardPipe { p, smem, keys, .. } = self;
        let columns = smem.head_dim as usize;
        to.resize(ROWS * columns, 0.0);
        let first = keys.n_block * smem.block_n + first_key;
        let (item, rows) = (p.item(keys.batch), first..first + ROWS as u32);
        // SAFETY: `backward`'s caller has promised that the tensor is valid for reading.
        unsafe { load_rows(dtype, tensor, (&item.k, keys.head), p.shape.head_dim, rows, (to, columns)) };
    }

    /// Loads the rows of `tensor` that `block` names, and their `neg_lse_log2` or δ from the array at `statistics`.
    fn load(&self, dtype: Dtype, tensor: &Strided, statistics: u64, block: &QueryBlock, to: &mut QueryTile) {
        let BackwardPipe { p, smem, .. } = self;
        let (block_m, columns) = (smem.block_m as usize, smem.head_dim as usize);
        let first = block.m_block * smem.block_m;
        to.rows.resize(block_m * columns, 0.0);
        to.transposed.resize(columns * block_m, 0.0);
        to.statistics.clear();
        let index = p.workspace.row(p.head_rows(block.batch, block.head), first) as usize;
        let (item, rows) = (p.item(block.batch), first..first + smem.block_m);
        // SAFETY: `backward`'s caller has promised that the tensor is valid for reading.
        unsafe {
            load_rows(dtype, tensor, (&item.q, block.head), p.shape.head_dim, rows, (&mut to.rows, columns));
            to.statistics.extend_from_slice(memory::floats(statistics, index, block_m));
        }
        convert::transpose(&to.rows, columns, &mut to.transposed, block_m);
    }
}

impl<'a> CpuWarpgroup<BackwardPipe<'a>> {
    /// Makes consumer `index` of a CTA for the work tile of `keys`, or a part of it. `blocks_of` lists the query blocks
    /// that it visits through each pair.
    ///
    /// # Safety
    /// `p` describes tensors of `dtype` in memory that is valid for reading (Q, K, V, dO) and writing (dK, dV, the
    /// workspace) while this lives; nothing else accesses these keys' rows of dK and dV, or the workspace of these
    /// heads.
    pub unsafe fn backward(
        p: &'a BackwardBase<Strided>,
        dtype: Dtype,
        smem: BackwardSmem,
        index: u32,
        keys: &KvBlock,
        blocks_of: Box<BlocksOf<'a>>,
        weights: &'a Weights,
    ) -> Self {
        let keys = KvBlock { pair: p.last_pair + 1, ..*keys };
        let (k, v) = (Vec::new(), Vec::new());
        let pipe = BackwardPipe { p, smem, index, weights, keys, blocks_of, k, v, q: None, d_o: None };
        CpuWarpgroup { live: ROWS, dtype, pipe }
    }

    /// Checks that the pipeline is in its initial state again.
    pub fn finish(mut self) {
        let weights_left = self.pipe.index == 1 && !self.pipe.weights.borrow().is_empty();
        if weights_left || self.pipe.q.is_some() || self.pipe.d_o.is_some() || self.pipe.next_pair().is_some() {
            Fault::Unfinished.raise();
        }
    }
}

/// Returns `neg_lse_log2` or δ of a fragment's columns, one column group after another.
fn columns<const M8: usize>(statistics: &[f32]) -> [[f32; 8]; M8] {
    let mut columns = [[0.0; 8]; M8];
    columns.as_flattened_mut().copy_from_slice(statistics);
    columns
}

/// Returns the product of this warpgroup's rows of K or V with a transposed query block.
fn product<const D8: usize, const M8: usize>(keys: &[f32], transposed: &[f32]) -> Tile<M8> {
    let mut product = Tile::ZEROS;
    multiply_add(ROWS, 8 * D8, Left::rows(keys, 8 * D8), transposed, product.elements_mut(), 8 * M8);
    product
}

/// Adds the product of P or dS with a query block.
fn add_product<const M8: usize, const D8: usize>(sum: &mut Tile<D8>, weights: &Tile<M8>, rows: &[f32]) {
    multiply_add(ROWS, 8 * M8, Left::rows(weights.elements(), 8 * M8), rows, sum.elements_mut(), 8 * D8);
}

impl BackwardWarpgroup for CpuWarpgroup<BackwardPipe<'_>> {
    /// Ordinal of the query block, counted from the first. Slots of the rings and phase parities follow from it.
    type Slot = u32;
    type Columns<const M8: usize> = [[f32; 8]; M8];

    fn first_key(&self) -> u32 {
        self.pipe.smem.split.first_key(self.pipe.index)
    }
    #[inline(never)]
    fn wait_k(&mut self) {
        let Some(blocks) = self.pipe.next_pair() else { Fault::WaitWithoutLoad { slot: 0 }.raise() };
        let (mut k, mut v) = (core::mem::take(&mut self.pipe.k), core::mem::take(&mut self.pipe.v));
        let (dtype, p) = (self.dtype, self.pipe.p);
        self.pipe.load_keys(dtype, self.first_key(), &p.k[self.pipe.keys.pair as usize], &mut k);
        self.pipe.load_keys(dtype, self.first_key(), &p.v, &mut v);
        (self.pipe.k, self.pipe.v) = (k, v);
        if self.pipe.q.replace(QueryRing::new(blocks.clone(), self.pipe.smem.stages())).is_some() {
            Fault::WaitWithoutRelease { slot: 0 }.raise();
        }
        self.pipe.d_o = Some(QueryRing::new(blocks, self.pipe.smem.stages()));
    }
    fn wait_v(&mut self) {
        if self.pipe.d_o.is_none() {
            Fault::WaitWithoutLoad { slot: 0 }.raise();
        }
    }
    #[inline(never)]
    fn release_kv(&mut self) {
        for ring in [&mut self.pipe.q, &mut self.pipe.d_o] {
            match ring {
                Some(ring) => ring.finish(),
                None => Fault::ReleaseWithoutWait { slot: 0 }.raise(),
            }
            *ring = None;
        }
    }
    #[inline(never)]
    fn wait_q(&mut self) -> u32 {
        let block = self.pipe.q().next();
        let mut tile = self.pipe.q().memory();
        let (dtype, p) = (self.dtype, self.pipe.p);
        self.pipe.load(dtype, &p.q[block.pair as usize], p.workspace.neg_lse_log2, &block, &mut tile);
        self.pipe.q().hold(tile)
    }
    #[inline(never)]
    fn wait_do(&mut self, ordinal: u32) {
        let block = self.pipe.d_o().next();
        let mut tile = self.pipe.d_o().memory();
        self.pipe.load(self.dtype, &self.pipe.p.d_o, self.pipe.p.workspace.delta, &block, &mut tile);
        if self.pipe.d_o().hold(tile) != ordinal {
            Fault::WrongTile { slot: ordinal, holds: None }.raise();
        }
    }
    #[inline(never)]
    fn release(&mut self, ordinal: u32) {
        self.pipe.q().release(ordinal);
        self.pipe.d_o().release(ordinal);
    }

    #[inline(never)]
    fn neg_lse_log2<const M8: usize>(&self, ordinal: u32) -> [[f32; 8]; M8] {
        columns(&self.pipe.held_q(ordinal).statistics)
    }
    #[inline(never)]
    fn delta<const M8: usize>(&self, ordinal: u32) -> [[f32; 8]; M8] {
        columns(&self.pipe.held_do(ordinal).statistics)
    }
    fn read<const M8: usize>(&self, columns: [[f32; 8]; M8]) -> [[f32; 8]; M8] {
        columns
    }
    #[inline(never)]
    fn map_columns<const M8: usize>(&self, x: &mut Tile<M8>, columns: &[[f32; 8]; M8], f: impl Fn(f32, f32) -> f32) {
        elementwise::map_columns(x.elements_mut(), columns.as_flattened(), f);
    }

    #[inline(never)]
    fn kq<const D8: usize, const M8: usize>(&mut self, ordinal: u32) -> Pending<Tile<M8>> {
        Pending(product::<D8, M8>(&self.pipe.k, &self.pipe.held_q(ordinal).transposed))
    }
    #[inline(never)]
    fn v_do<const D8: usize, const M8: usize>(&mut self, ordinal: u32) -> Pending<Tile<M8>> {
        Pending(product::<D8, M8>(&self.pipe.v, &self.pipe.held_do(ordinal).transposed))
    }
    #[inline(never)]
    fn p_do<const M8: usize, const D8: usize>(
        &mut self,
        mut dv: Tile<D8>,
        p: Tile<M8>,
        ordinal: u32,
    ) -> Pending<Tile<D8>> {
        add_product(&mut dv, &p, &self.pipe.held_do(ordinal).rows);
        Pending(dv)
    }
    #[inline(never)]
    fn ds_q<const M8: usize, const D8: usize>(
        &mut self,
        mut dk: Tile<D8>,
        ds: Tile<M8>,
        ordinal: u32,
    ) -> Pending<Tile<D8>> {
        add_product(&mut dk, &ds, &self.pipe.held_q(ordinal).rows);
        Pending(dk)
    }
    fn take_ping_pong(&mut self) {}
    fn pass_ping_pong(&mut self) {}
    fn wait_ds(&mut self, _: u32) {}
    #[inline(never)]
    fn add_dq<const M8: usize>(&mut self, ds: &Tile<M8>, _: u32, at: &QueryBlock) {
        let BackwardPipe { p, smem, k, .. } = &self.pipe;
        let (rows, columns) = (8 * M8, smem.head_dim as usize);
        let head_rows = p.head_rows(at.batch, at.head);
        let first = p.workspace.dq_row(&p.shape, at.pair, head_rows, at.m_block * smem.block_m) as usize;
        // SAFETY: `backward`'s caller has promised this head's workspace.
        let dq = unsafe { memory::floats_mut(p.workspace.dq, first * columns, rows * columns) };
        multiply_add(rows, ROWS, Left::columns(ds.elements(), 8 * M8), k, dq, columns);
    }
    fn pass_ds(&mut self, _: u32) {}
    #[inline(never)]
    fn pass_weights<const M8: usize>(&mut self, p: &Tile<M8>, by: Option<&Tile<M8>>, _: u32) {
        let mut passed = p.elements().to_vec();
        if let Some(by) = by {
            elementwise::zip_with(&mut passed, by.elements(), |p, by| p * by);
        }
        self.pipe.weights.borrow_mut().push_back(passed);
    }
    #[inline(never)]
    fn take_weights<const M8: usize>(&mut self, ordinal: u32) -> Tile<M8> {
        let weights = self.pipe.weights.borrow_mut().pop_front();
        let weights = weights.unwrap_or_else(|| Fault::WaitWithoutLoad { slot: ordinal }.raise());
        let mut p = Tile::ZEROS;
        p.elements_mut().copy_from_slice(&weights);
        p
    }

    #[inline(never)]
    fn store_kv<const D8: usize>(&mut self, x: &Tile<D8>, to: &Strided, at: &KvBlock, rows: &Span, head_dim: u32) {
        let first = at.n_block * self.pipe.smem.block_n + self.first_key();
        for row in 0..ROWS.min(rows.len.saturating_sub(first) as usize) {
            let columns = head_dim as usize;
            // SAFETY: the row lies in the tensor and, in these columns, belongs to this warpgroup; `backward`'s caller
            // has promised the tensor.
            let line = unsafe { memory::row_mut(to, rows, at.head, first + row as u32, columns) };
            convert::narrow(self.dtype, x.row(row), line);
        }
    }
    #[inline(never)]
    fn store_part<const D8: usize>(&mut self, x: &Tile<D8>, to: u64) {
        // SAFETY: this is this warpgroup's share of a slot of the workspace, which `backward`'s caller has promised.
        let part = unsafe { memory::floats_mut(to, self.first_key() as usize * 8 * D8, ROWS * 8 * D8) };
        part.copy_from_slice(x.elements());
    }
}
