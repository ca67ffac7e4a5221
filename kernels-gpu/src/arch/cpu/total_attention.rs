//! [`TotalWarpgroup`] on the CPU.

use std::boxed::Box;
use std::collections::VecDeque;
use std::vec::Vec;

use super::convert;
use super::elementwise;
use super::fragment::{ROWS, Rows, Tile};
use super::matmul::{Left, multiply_add};
use super::memory::{self, load_rows};
use super::pipeline::Fault;
use super::warpgroup::CpuWarpgroup;
use crate::arch::{Pending, TotalWarpgroup};
use crate::attention::row_statistics::neg_lse_log2;
use crate::attention::shared_tiles::SharedTiles;
use crate::attention::total_steps::{OwnKeys, TotalTile};
use crate::attention::total_tiles::TotalTiles;
use crate::element::Dtype;
use crate::ground::places::KvBlock;
use crate::ground::sequence::Span;
use crate::ground::tensor::{RowArray, Strided};
use crate::params::TotalParams;
use crate::tile::smem_total::TotalSmem;

/// Query block in the ring.
struct QueryTile {
    /// Number of query blocks before it; a slot and its pass over the ring follow from it.
    count: u32,
    keys: KvBlock,
    /// Elements, columns × queries; `None` after the block was released.
    transposed: Option<Vec<f32>>,
    /// The `neg_lse_log2` = −LSE·log₂e of each query.
    neg_lse_log2: Vec<f32>,
}

/// Consumer's end of the pipeline, with its own replays of the producer, for K and for Q.
pub struct TotalPipe<'a> {
    p: &'a TotalParams<Strided>,
    smem: TotalSmem,
    index: u32,
    k_loads: Box<dyn Iterator<Item = TotalTile> + 'a>,
    q_loads: Box<dyn Iterator<Item = (KvBlock, u32)> + 'a>,
    /// This warpgroup's rows of K.
    k: Option<(KvBlock, Vec<f32>)>,
    /// Block of keys whose rows of K were loaded last by `take_k`.
    taken: Option<KvBlock>,
    /// Query blocks that are held, and those of the pass before whose `neg_lse_log2` may still be read.
    q: VecDeque<QueryTile>,
    /// Number of query blocks that were waited for.
    waited: u32,
    /// True for the queries of a block whose exponential is the polynomial.
    by_polynomial: Vec<bool>,
}

impl<'a> CpuWarpgroup<TotalPipe<'a>> {
    /// Makes consumer `index` of a CTA with the work tiles `tiles`.
    ///
    /// # Safety
    /// `p` describes tensors of `dtype` in memory that is valid for reading (Q, K, the LSE) and writing (the result)
    /// while this lives; nothing else accesses this consumer's elements of the result.
    pub unsafe fn total(
        p: &'a TotalParams<Strided>,
        dtype: Dtype,
        smem: TotalSmem,
        index: u32,
        tiles: SharedTiles<'a>,
    ) -> Self {
        let (block_m, block_n) = (smem.block_m, smem.block_n());
        let loads = TotalTiles::new(p, block_m, block_n, OwnKeys::whole(block_n), tiles);
        let pipe = TotalPipe {
            p,
            smem,
            index,
            k_loads: Box::new(loads),
            q_loads: Box::new(loads.steps()),
            k: None,
            taken: None,
            q: VecDeque::new(),
            waited: 0,
            by_polynomial: (0..block_m).map(|column| smem.by_polynomial(column)).collect(),
        };
        CpuWarpgroup { live: (p.shape.seqlen_k as usize).min(ROWS), dtype, pipe }
    }

    /// Checks that the pipeline is in its initial state again.
    pub fn finish(mut self) {
        let left = self.pipe.k_loads.next().is_some() || self.pipe.q_loads.next().is_some();
        if left || self.pipe.k.is_some() || self.held() > 0 {
            Fault::Unfinished.raise();
        }
    }

    /// Returns the number of slots of the ring of Q that were not released.
    fn held(&self) -> usize {
        self.pipe.q.iter().filter(|tile| tile.transposed.is_some()).count()
    }

    /// Loads this warpgroup's rows of K, of the key head that the query head reads.
    fn load_k(&self, tile: &TotalTile) -> Vec<f32> {
        let TotalPipe { p, smem, .. } = &self.pipe;
        let columns = smem.head_dim as usize;
        let first = tile.first_key + self.own_keys().first_key;
        let mut k = std::vec![0.0; ROWS * columns];
        let (item, rows) = (p.item(tile.keys.batch), first..first + ROWS as u32);
        let at = (&item.k, p.order.group.divide(tile.keys.head).0);
        // SAFETY: `total`'s caller has promised that the tensor is valid for reading.
        unsafe { load_rows(self.dtype, &p.k, at, p.shape.head_dim, rows, (&mut k, columns)) };
        k
    }

    /// Loads a query block, transposed.
    fn load_q(&self, (keys, m_block): (KvBlock, u32)) -> Vec<f32> {
        let TotalPipe { p, smem, .. } = &self.pipe;
        let (block_m, columns) = (smem.block_m as usize, smem.head_dim as usize);
        let first = m_block * smem.block_m;
        let mut q = std::vec![0.0; block_m * columns];
        let (item, rows) = (p.item(keys.batch), first..first + smem.block_m);
        // SAFETY: `total`'s caller has promised that the tensor is valid for reading.
        unsafe { load_rows(self.dtype, &p.q, (&item.q, keys.head), p.shape.head_dim, rows, (&mut q, columns)) };
        let mut transposed = std::vec![0.0; columns * block_m];
        convert::transpose(&q, columns, &mut transposed, block_m);
        transposed
    }

    /// Loads the LSE of a query block and returns its `neg_lse_log2`.
    fn load_neg_lse_log2(&self, (keys, m_block): (KvBlock, u32)) -> Vec<f32> {
        let TotalPipe { p, smem, .. } = &self.pipe;
        let queries = p.item(keys.batch).q;
        let first = m_block * smem.block_m;
        let of_row = |row: u32| {
            let lse = if row < queries.len {
                // SAFETY: a row of the batch item lies within the array, which `total`'s caller has promised.
                unsafe { memory::read_row(&p.lse, &queries, keys.head, row) }
            } else {
                f32::NEG_INFINITY
            };
            neg_lse_log2(lse)
        };
        (first..first + smem.block_m).map(of_row).collect()
    }
}

impl TotalWarpgroup for CpuWarpgroup<TotalPipe<'_>> {
    /// Number of the query block, counted from the first. Its slot follows from it.
    type Slot = u32;

    fn own_keys(&self) -> OwnKeys {
        let keys = ROWS as u32;
        OwnKeys { first_key: self.pipe.index * keys, keys, most_passed: self.pipe.smem.stages - 1 }
    }
    #[inline(never)]
    fn wait_k(&mut self) {
        if self.pipe.k.is_some() {
            Fault::WaitWithoutRelease { slot: 0 }.raise();
        }
        let Some(tile) = self.pipe.k_loads.next() else { Fault::WaitWithoutLoad { slot: 0 }.raise() };
        self.pipe.k = Some((tile.keys, self.load_k(&tile)));
    }
    #[inline(never)]
    fn release_k(&mut self) {
        if self.pipe.k.take().is_none() {
            Fault::ReleaseWithoutWait { slot: 0 }.raise();
        }
    }
    #[inline(never)]
    fn wait_q(&mut self) -> u32 {
        let (count, stages) = (self.pipe.waited, self.pipe.smem.stages);
        let slot = count % stages;
        if self.held() == stages as usize {
            Fault::WaitWithoutRelease { slot }.raise();
        }
        let Some(step) = self.pipe.q_loads.next() else { Fault::WaitWithoutLoad { slot }.raise() };
        let (transposed, neg_lse_log2) = (Some(self.load_q(step)), self.load_neg_lse_log2(step));
        self.pipe.q.push_back(QueryTile { count, keys: step.0, transposed, neg_lse_log2 });
        self.pipe.waited += 1;
        count
    }
    #[inline(never)]
    fn release_q(&mut self, q: u32) {
        let stages = self.pipe.smem.stages;
        // Blocks are released in order, because the producer waits for the oldest.
        match self.pipe.q.iter_mut().find(|tile| tile.transposed.is_some()) {
            Some(tile) if tile.count == q => tile.transposed = None,
            _ => Fault::ReleaseWithoutWait { slot: q % stages }.raise(),
        }
        // The next block in this slot overwrites the `neg_lse_log2` of the pass before.
        self.pipe.q.retain(|tile| tile.count + stages > q);
    }

    #[inline(never)]
    fn take_k<const D8: usize>(&mut self) -> Tile<D8> {
        let mut taken = Tile::ZEROS;
        if let Some((keys, k)) = &self.pipe.k {
            taken.elements_mut().copy_from_slice(k);
            self.pipe.taken = Some(*keys);
        }
        taken
    }
    #[inline(never)]
    fn taken_kq<const D8: usize, const M8: usize>(&mut self, k: &Tile<D8>, q: u32) -> Pending<Tile<M8>> {
        let mut s = Tile::ZEROS;
        match self.pipe.q.iter().find(|tile| tile.count == q) {
            Some(QueryTile { keys, transposed: Some(transposed), .. }) if self.pipe.taken == Some(*keys) => {
                let k = Left::rows(k.elements(), 8 * D8);
                multiply_add(self.live, 8 * D8, k, transposed, s.elements_mut(), 8 * M8);
            }
            _ => Fault::WrongTile { slot: q % self.pipe.smem.stages, holds: None }.raise(),
        }
        Pending(s)
    }

    #[inline(never)]
    fn kq<const D8: usize, const M8: usize>(&mut self, q: u32) -> Pending<Tile<M8>> {
        let mut s = Tile::ZEROS;
        let tile = self.pipe.q.iter().find(|tile| tile.count == q);
        match (&self.pipe.k, tile) {
            (Some((keys, k)), Some(QueryTile { keys: of, transposed: Some(transposed), .. })) if keys == of => {
                let k = Left::rows(k, 8 * D8);
                multiply_add(self.live, 8 * D8, k, transposed, s.elements_mut(), 8 * M8);
            }
            _ => Fault::WrongTile { slot: q % self.pipe.smem.stages, holds: None }.raise(),
        }
        Pending(s)
    }

    #[inline(never)]
    fn map_neg_lse_log2<const M8: usize>(&self, q: u32, x: &mut Tile<M8>, f: impl Fn(f32, f32, bool) -> f32) {
        let Some(tile) = self.pipe.q.iter().find(|tile| tile.count == q) else {
            Fault::WrongTile { slot: q % self.pipe.smem.stages, holds: None }.raise()
        };
        let x = x.first_rows_mut(self.live);
        elementwise::map_flagged_columns(x, &tile.neg_lse_log2, &self.pipe.by_polynomial, f);
    }
    fn unknown(x: u32) -> u32 {
        x
    }

    #[inline(never)]
    fn store_keys(&mut self, values: Rows, to: &RowArray, at: &TotalTile, keys: &Span) {
        let first = at.first_key + self.own_keys().first_key;
        for (key, value) in (first..keys.len).zip(values) {
            // SAFETY: the key's element belongs to this warpgroup; `total`'s caller has promised the array.
            unsafe { memory::write_row(to, keys, at.keys.head, key, value) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Warpgroup;
    use crate::attention::dropout::NoDropout;
    use crate::attention::features::Chosen;
    use crate::attention::mask::Window;
    use crate::attention::scheduler::TileOrder;
    use crate::attention::score::Shaped;
    use crate::attention::sequences::Sequences;
    use crate::ground::shape::Shape;
    use half::f16;

    /// Runs `run` with one work tile of one query block, all zeros.
    fn warpgroup(run: impl FnOnce(CpuWarpgroup<TotalPipe<'_>>)) {
        let (data, lse) = ([f16::ZERO; 8], [0.0f32]);
        let x = Strided {
            address: data.as_ptr().expose_provenance() as u64,
            stride_batch: 8,
            stride_head: 8,
            stride_row: 8,
        };
        let shape = Shape { batch: 1, heads_q: 1, heads_kv: 1, seqlen_q: 1, seqlen_k: 1, head_dim: 8 };
        let smem = TotalSmem { head_dim: 64, consumers: 2, block_m: 128, stages: 2 };
        let order = TileOrder::new(&shape, smem.block_n(), 1);
        let lse = RowArray { address: lse.as_ptr().expose_provenance() as u64, stride_batch: 1, stride_head: 1 };
        let p = TotalParams {
            q: x,
            k: x,
            lse,
            total: RowArray::NONE,
            shape,
            sequences: Sequences::DENSE,
            order,
            shared_from: order.tiles(),
            features: Chosen { mask: Window::FULL, score: Shaped::new(1.0, None, false), weights: NoDropout },
        };
        // SAFETY: the arrays have the sizes of the shape, and nothing is stored.
        let tiles = SharedTiles::new(&order, order.tiles(), 1, 0, 1);
        run(unsafe { CpuWarpgroup::total(&p, Dtype::F16, smem, 0, tiles) });
    }

    #[test]
    fn a_whole_run_passes() {
        warpgroup(|mut wg| {
            wg.wait_k();
            let q = wg.wait_q();
            let s = wg.kq::<8, 16>(q);
            let mut s = wg.wait::<0, 16>(s);
            wg.release_q(q);
            wg.release_k();
            wg.map_neg_lse_log2(q, &mut s, |s, neg_lse_log2, _| s + neg_lse_log2);
            assert_eq!((s.row(0)[0], s.row(0)[1]), (0.0, f32::NEG_INFINITY));
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
    #[should_panic = "Unfinished"]
    fn leaving_a_tile_behind() {
        warpgroup(|mut wg| {
            wg.wait_k();
            wg.release_k();
            wg.finish();
        });
    }
}
