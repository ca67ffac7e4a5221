//! [`BackwardWarpgroup`] on the CPU.
//!
//! Warpgroups run one after the other here, so none can take another's dS: each adds what its own keys contribute to dQ. What
//! the first passes to the second is kept until that one runs.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::vec::Vec;

use super::fragment::{ROWS, Tile};
use super::matmul::multiply_add;
use super::memory::{self, for_rows};
use super::pipeline::Fault;
use super::warpgroup::CpuWarpgroup;
use crate::arch::{BackwardWarpgroup, Pending};
use crate::attention::key_parts::Part;
use crate::attention::mask::Mask;
use crate::attention::pairs::Pairs;
use crate::attention::query_blocks::{QueryBlock, QueryBlocks};
use crate::element::Element;
use crate::params::{BackwardParams, Second, Shape, Strided};
use crate::pipeline::order::KvBlock;
use crate::tile::smem::BackwardSmem;

/// Weights of query blocks, passed from one consumer to the other.
pub type Weights = RefCell<VecDeque<Vec<f32>>>;

/// A query block in a ring: rows of Q or dO with their statistics.
struct QueryTile {
    /// Rows × columns.
    rows: Vec<f32>,
    /// All columns × rows.
    transposed: Vec<f32>,
    statistics: Vec<f32>,
}

/// One of the two rings, filled when it is waited for.
struct QueryRing<M, P> {
    blocks: QueryBlocks<M, P>,
    upcoming: QueryBlock,
    /// The blocks that are held, the last of them number `count` − 1.
    held: VecDeque<QueryTile>,
    stages: u32,
    count: u32,
}

impl<M: Mask, P: Pairs> QueryRing<M, P> {
    fn new(blocks: QueryBlocks<M, P>, stages: u32) -> Self {
        QueryRing { blocks, upcoming: blocks.first(), held: VecDeque::new(), stages, count: 0 }
    }
    /// The next query block.
    fn next(&mut self) -> QueryBlock {
        let slot = self.count;
        if self.held.len() == self.stages as usize {
            Fault::WaitWithoutRelease { slot }.raise();
        }
        if slot == self.blocks.count() {
            Fault::WaitWithoutLoad { slot }.raise();
        }
        let block = self.upcoming;
        self.upcoming = self.blocks.after(&block);
        block
    }
    /// Holds it, and tells its number.
    fn hold(&mut self, tile: QueryTile) -> u32 {
        self.held.push_back(tile);
        self.count += 1;
        self.count - 1
    }
    fn first_held(&self) -> u32 {
        self.count - self.held.len() as u32
    }
    fn release(&mut self, slot: u32) {
        if self.held.is_empty() || slot != self.first_held() {
            Fault::ReleaseWithoutWait { slot }.raise();
        }
        self.held.pop_front();
    }
    fn get(&self, slot: u32) -> &QueryTile {
        let index = slot.checked_sub(self.first_held());
        let found = index.and_then(|index| self.held.get(index as usize));
        found.unwrap_or_else(|| Fault::WrongTile { slot, holds: None }.raise())
    }
    fn finish(&mut self) {
        if self.count < self.blocks.count() || !self.held.is_empty() {
            Fault::Unfinished.raise();
        }
    }
}

/// The consumer's end of the backward pipeline, and its own replay of the producer, for one block of keys.
pub struct BackwardPipe<'a, M, S: Second<Strided>> {
    p: &'a BackwardParams<Strided, S>,
    smem: BackwardSmem,
    index: u32,
    /// Weights that the consumer with dV, which runs first, has passed to the one with dK.
    weights: &'a Weights,
    /// The block of keys, and of its pairs those that are still to come: pairs below `keys.pair`.
    keys: KvBlock,
    /// Which part of the work tile it is.
    part: Part,
    /// This warpgroup's rows of K and V.
    k: Vec<f32>,
    v: Vec<f32>,
    /// Empty until K and V are there.
    q: Option<QueryRing<M, S::Pairs>>,
    d_o: Option<QueryRing<M, S::Pairs>>,
}

impl<M: Mask, S: Second<Strided>> BackwardPipe<'_, M, S> {
    /// The query blocks of the next pair that has any.
    fn next_pair(&mut self) -> Option<QueryBlocks<M, S::Pairs>> {
        let (shape, smem) = (&self.p.shape, &self.smem);
        while self.keys.pair > 0 {
            self.keys.pair -= 1;
            let blocks = QueryBlocks::new(shape, self.p.second.pairs(shape), smem.block_m, smem.block_n, &self.keys);
            let blocks = blocks.part(&self.p.sharing, self.part);
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
    /// Consumer `index` of a CTA that has `keys`, or a part of that work tile.
    ///
    /// # Safety
    /// `p` describes tensors of `E` in memory that is valid for reading (Q, K, V, dO) and writing (dK, dV, the workspace)
    /// while this lives; nobody else accesses these keys' rows of dK and dV, or the workspace of these heads.
    pub unsafe fn backward(
        p: &'a BackwardParams<Strided, S>,
        smem: BackwardSmem,
        index: u32,
        keys: &KvBlock,
        part: Part,
        weights: &'a Weights,
    ) -> Self {
        let keys = KvBlock { pair: S::Pairs::COUNT, ..*keys };
        let (k, v) = (Vec::new(), Vec::new());
        Self::with_pipe(ROWS, BackwardPipe { p, smem, index, weights, keys, part, k, v, q: None, d_o: None })
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
        let weights_left = self.pipe.index == 1 && !self.pipe.weights.borrow().is_empty();
        if weights_left || self.pipe.q.is_some() || self.pipe.d_o.is_some() || self.pipe.next_pair().is_some() {
            Fault::Unfinished.raise();
        }
    }

    /// Rows of `tensor` that `block` names, and their statistics from the array at `statistics`.
    fn load(&self, tensor: &Strided, statistics: u64, block: &QueryBlock) -> QueryTile {
        let BackwardPipe { p, smem, .. } = &self.pipe;
        let (block_m, head_dim) = (smem.block_m as usize, smem.head_dim as usize);
        let first = block.m_block * smem.block_m;
        let mut rows = std::vec![0.0; block_m * head_dim];
        let mut transposed = std::vec![0.0; head_dim * block_m];
        let copy = |i: usize, row: &[E]| {
            for (d, x) in row.iter().enumerate() {
                transposed[d * block_m + i] = x.to_f32();
                rows[i * head_dim + d] = x.to_f32();
            }
        };
        let range = first..first + smem.block_m;
        let index = p.workspace.row(&p.shape, block.batch, block.head, first);
        // SAFETY: `backward`'s caller promised it.
        let statistics = unsafe {
            for_rows(tensor, (block.batch, block.head), &p.shape, range, p.shape.seqlen_q, copy);
            (0..block_m).map(|i| memory::read_f32(statistics, index as usize + i)).collect()
        };
        QueryTile { rows, transposed, statistics }
    }
}

/// The statistics of a fragment's columns, group by group.
fn columns<const M8: usize>(statistics: &[f32]) -> [[f32; 8]; M8] {
    core::array::from_fn(|group| core::array::from_fn(|column| statistics[8 * group + column]))
}

impl<E: Element, M: Mask, S: Second<Strided>> BackwardWarpgroup for CpuWarpgroup<E, BackwardPipe<'_, M, S>> {
    type Slot = u32;
    type Columns<const M8: usize> = [[f32; 8]; M8];

    fn first_key(&self) -> u32 {
        self.pipe.smem.split.first_key(self.pipe.index)
    }
    fn wait_k(&mut self) {
        let Some(blocks) = self.pipe.next_pair() else { Fault::WaitWithoutLoad { slot: 0 }.raise() };
        let p = self.pipe.p;
        let k = match p.second.tensors() {
            Some((_, k)) if self.pipe.keys.pair == 1 => k,
            _ => &p.k,
        };
        (self.pipe.k, self.pipe.v) = (self.load_keys(k), self.load_keys(&p.v));
        if self.pipe.q.replace(QueryRing::new(blocks, self.pipe.smem.stages())).is_some() {
            Fault::WaitWithoutRelease { slot: 0 }.raise();
        }
        self.pipe.d_o = Some(QueryRing::new(blocks, self.pipe.smem.stages()));
    }
    fn wait_v(&mut self) {
        if self.pipe.d_o.is_none() {
            Fault::WaitWithoutLoad { slot: 0 }.raise();
        }
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
        let block = self.pipe.q().next();
        let p = self.pipe.p;
        let q = match p.second.tensors() {
            Some((q, _)) if block.pair == 1 => q,
            _ => &p.q,
        };
        let tile = self.load(q, p.workspace.offsets, &block);
        self.pipe.q().hold(tile)
    }
    fn wait_do(&mut self, slot: u32) {
        let block = self.pipe.d_o().next();
        let tile = self.load(&self.pipe.p.d_o, self.pipe.p.workspace.delta, &block);
        if self.pipe.d_o().hold(tile) != slot {
            Fault::WrongTile { slot, holds: None }.raise();
        }
    }
    fn release(&mut self, slot: u32) {
        self.pipe.q().release(slot);
        self.pipe.d_o().release(slot);
    }

    fn offsets<const M8: usize>(&self, slot: u32) -> [[f32; 8]; M8] {
        columns(&self.pipe.held_q(slot).statistics)
    }
    fn delta<const M8: usize>(&self, slot: u32) -> [[f32; 8]; M8] {
        columns(&self.pipe.held_do(slot).statistics)
    }
    fn read<const M8: usize>(&self, columns: [[f32; 8]; M8]) -> [[f32; 8]; M8] {
        columns
    }
    fn map_columns<const M8: usize>(&self, x: &mut Tile<M8>, columns: &[[f32; 8]; M8], f: impl Fn(f32, f32) -> f32) {
        x.map_columns(ROWS, columns.as_flattened(), f);
    }

    fn kq<const D8: usize, const M8: usize>(&mut self, slot: u32) -> Pending<Tile<M8>> {
        let mut s = Tile::ZEROS;
        multiply_add(ROWS, &self.pipe.k, 8 * D8, &self.pipe.held_q(slot).transposed, &mut s);
        Pending(s)
    }
    fn v_do<const D8: usize, const M8: usize>(&mut self, slot: u32) -> Pending<Tile<M8>> {
        let mut dp = Tile::ZEROS;
        multiply_add(ROWS, &self.pipe.v, 8 * D8, &self.pipe.held_do(slot).transposed, &mut dp);
        Pending(dp)
    }
    fn p_do<const M8: usize, const D8: usize>(
        &mut self,
        mut dv: Tile<D8>,
        p: Tile<M8>,
        slot: u32,
    ) -> Pending<Tile<D8>> {
        multiply_add(ROWS, p.0.as_flattened().as_flattened(), 8 * M8, &self.pipe.held_do(slot).rows, &mut dv);
        Pending(dv)
    }
    fn ds_q<const M8: usize, const D8: usize>(
        &mut self,
        mut dk: Tile<D8>,
        ds: Tile<M8>,
        slot: u32,
    ) -> Pending<Tile<D8>> {
        multiply_add(ROWS, ds.0.as_flattened().as_flattened(), 8 * M8, &self.pipe.held_q(slot).rows, &mut dk);
        Pending(dk)
    }
    fn take_turn(&mut self) {}
    fn pass_turn(&mut self) {}
    fn wait_ds(&mut self, _: u32) {}
    fn add_dq<const M8: usize>(&mut self, ds: &Tile<M8>, _: u32, at: &QueryBlock) {
        let BackwardPipe { p, smem, k, .. } = &self.pipe;
        let head_dim = smem.head_dim as usize;
        let mut dq = std::vec![0.0; 8 * M8 * head_dim];
        for (row, k) in k.chunks_exact(head_dim).enumerate() {
            for (ds, dq) in ds.row(row).iter().zip(dq.chunks_exact_mut(head_dim)) {
                for (dq, k) in dq.iter_mut().zip(k) {
                    *dq += ds * k;
                }
            }
        }
        let first = p.workspace.row(&p.shape, at.dq_batch(&p.shape), at.head, at.m_block * smem.block_m) as usize;
        for (i, x) in dq.into_iter().enumerate() {
            // SAFETY: `backward`'s caller promised this head's workspace.
            unsafe { memory::add_f32(p.workspace.dq, first * head_dim + i, x) };
        }
    }

    fn pass_ds(&mut self, _: u32) {}
    fn pass_weights<const M8: usize>(&mut self, p: &Tile<M8>, _: u32) {
        self.pipe.weights.borrow_mut().push_back(p.0.as_flattened().as_flattened().to_vec());
    }
    fn take_weights<const M8: usize>(&mut self, slot: u32) -> Tile<M8> {
        let weights = self.pipe.weights.borrow_mut().pop_front();
        let weights = weights.unwrap_or_else(|| Fault::WaitWithoutLoad { slot }.raise());
        let mut p = Tile::ZEROS;
        p.0.as_flattened_mut().as_flattened_mut().copy_from_slice(&weights);
        p
    }

    fn store_kv<const D8: usize>(&mut self, x: &Tile<D8>, to: &Strided, at: &KvBlock, shape: &Shape) {
        let first = at.n_block * self.pipe.smem.block_n + self.first_key();
        for row in 0..ROWS.min(shape.seqlen_k.saturating_sub(first) as usize) {
            let columns = shape.head_dim as usize;
            // SAFETY: the row is the tensor's and, in these columns, this warpgroup's; `backward`'s caller promised it.
            let line = unsafe { memory::row_mut::<E>(to, at.batch, at.head, first + row as u32, columns) };
            for (to, x) in line.iter_mut().zip(x.row(row)) {
                *to = E::from_f32(*x);
            }
        }
    }
    fn store_part<const D8: usize>(&mut self, x: &Tile<D8>, to: u64) {
        let first = self.first_key() as usize * 8 * D8;
        for (i, x) in x.0.as_flattened().as_flattened().iter().enumerate() {
            // SAFETY: this warpgroup's part of a slot of the workspace; `backward`'s caller promised it.
            unsafe { memory::write_f32(to, first + i, *x) };
        }
    }
}
