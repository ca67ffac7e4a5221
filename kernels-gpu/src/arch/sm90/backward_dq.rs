//! The backward kernel's third warpgroup, which has no keys of its own. It issues all loads of the CTA, computes dS·K
//! from the dS that the two consumers publish, and accumulates dQ in the workspace.
//!
//! dSᵀ is MN-major, with one k (a key) per row, and so is the left operand of dQ = dS·K in the layout that the
//! consumers write. In the workspace, 64 rows of dQ have the accumulator layout: one n8 column group after another,
//! with sixteen bytes of each thread in order.

use core::num::NonZeroU32;

use super::backward_loads::Loads;
use super::barrier::{Mbarrier, sync_warp};
use super::cta::{self, Leader, smem_base, thread_of_warpgroup};
use super::first_values;
use super::fragment::Fragment;
use super::load::{add_global, increment_counter, spin_until};
use super::math::{Packed, fresh};
use super::named_barrier::BackwardBarrier;
use super::store::store_16_bytes;
use super::wgmma::{self, Descriptor};
use crate::arch::Pending;
use crate::attention::dropout::Drops;
use crate::attention::features::Features;
use crate::attention::first_tiles::FirstTiles;
use crate::attention::key_parts::KeyPart;
use crate::attention::mask::Mask;
use crate::attention::query_blocks::{QueryBlocks, blocks_per_semaphore, key_block};
use crate::ground::places::KvBlock;
use crate::ground::places::QueryBlock;
use crate::ground::sequence::Sequence;
use crate::ground::tensor::TensorMap;
use crate::params::{BackwardBase, BackwardParams, Workspace};
use crate::tile::lane::{WARPGROUP_ROWS, WARPGROUP_THREADS};
use crate::tile::smem::{BackwardSmem, PANEL_ROW_BYTES, columns_step, rows_step};
use crate::tuning;

/// Consumer's end of the ring of dSᵀ: computes dS·K and accumulates dQ, 8·N8 columns at a time. The columns are few
/// because the two consumer warpgroups need the registers.
struct DqAccumulator<'a, const N8: usize> {
    p: &'a BackwardBase<TensorMap>,
    smem: &'a BackwardSmem,
    /// Number of query blocks so far; a slot and its phase parity follow from it.
    count: u32,
    /// Tile of a query block's dQ whose product overlaps the next loads.
    loads_at: u32,
    /// Address of this thread's first element of the current query block's dQ; `row` is the block's first row in the
    /// workspace. The address moves from block to block in registers of its own. If it were computed again, ptxas would
    /// take its registers from the operands of the last reductions, which are busy until the reductions have drained.
    address: u64,
    row: u32,
    /// One more than the index of the dQ semaphore that has still to be incremented for the last reductions of an exact
    /// pass; 0 for none.
    semaphore: u32,
    /// Buffer that holds K of the current work tile.
    k: u32,
}

impl<'a, const N8: usize> DqAccumulator<'a, N8> {
    #[inline(always)]
    fn new(p: &'a BackwardBase<TensorMap>, smem: &'a BackwardSmem, loads_at: u32) -> Self {
        let address = p.workspace.dq + 16 * thread_of_warpgroup() as u64;
        DqAccumulator { p, smem, loads_at, count: 0, address, row: 0, semaphore: 0, k: 0 }
    }

    /// Accumulates dQ of all query blocks of a work tile. Calls `refill` once per query block, with its number,
    /// while a product of it is in flight.
    #[inline(always)]
    fn run<E: Packed, M: Mask, const STORES: bool>(
        &mut self,
        blocks: &QueryBlocks<M>,
        n_block: u32,
        mut refill: impl FnMut(u32),
    ) {
        let smem = self.smem;
        let mut at = blocks.first();
        for step in 0..blocks.count() {
            let (shared, tile) = (blocks_per_semaphore(smem.head_dim), (smem.block_m, smem.block_n));
            let at_now = QueryBlock { batch: fresh(at.batch), ..at };
            let earlier = blocks.earlier(&self.p.item(at_now.batch).sequence(), &at, n_block, shared, tile);
            self.add::<E, STORES>(&at_now, earlier, || refill(step));
            at = blocks.after(&at);
        }
    }

    /// Ends a work tile: signals the last dQ semaphore, and moves on to the next buffer of K.
    #[inline(always)]
    fn end_tile(&mut self) {
        self.signal_semaphore();
        self.k = (self.k + 1) % self.smem.k_stages;
    }

    /// Computes dQ = dQ + dS·K of a query block, or dQ = dS·K if `STORES`. `load` runs while the product of its tile
    /// [`DqAccumulator::loads_at`] is in flight.
    #[inline(always)]
    fn add<E: Packed, const STORES: bool>(&mut self, at: &QueryBlock, earlier: u32, load: impl FnOnce()) {
        let smem = self.smem;
        let count = cta::uniform(self.count);
        let (slot, parity) = (count % BackwardSmem::DS_STAGES, count / BackwardSmem::DS_STAGES & 1);
        // SAFETY: I1, the barrier is initialised.
        unsafe { Mbarrier(smem_base() + smem.ds_full(slot)).wait(parity) };
        self.wait_semaphore(at, earlier);
        let tiles = smem.block_m / WARPGROUP_ROWS * self.columns();
        let mut load = Some(load);
        for tile in 0..tiles {
            let Pending(mut dq) = self.multiply::<E>(slot, tile);
            if tile == self.loads_at
                && let Some(load) = load.take()
            {
                load();
            }
            wgmma::wait::<0>();
            wgmma::tie(&mut dq);
            if tile + 1 == tiles {
                // SAFETY: I1, the barrier is initialised; I4, the warp is converged.
                unsafe { Mbarrier(smem_base() + smem.ds_empty(slot)).arrive_elected() };
            }
            self.add_global::<STORES>(&dq, at, tile);
            // ptxas moves no memory access across this barrier, so the registers of the reductions are free before the
            // next product needs them.
            sync_warp();
        }
        self.count += 1;
    }

    /// Returns the number of tiles per row of dQ.
    #[inline(always)]
    fn columns(&self) -> u32 {
        self.smem.head_dim / (8 * N8 as u32)
    }

    /// Issues a tile of dS·K.
    #[inline(always)]
    fn multiply<E: Packed>(&self, slot: u32, tile: u32) -> Pending<Fragment<N8>> {
        let (smem, base) = (self.smem, fresh(smem_base()));
        let panel = smem.block_n * PANEL_ROW_BYTES;
        let a = Descriptor::mn_major(base + smem.ds(slot) + tile / self.columns() * panel, panel);
        let b = columns_step(smem.block_n, tile % self.columns() * (N8 as u32 / 2));
        let b = Descriptor::mn_major(base + smem.k(self.k) + b, panel);
        // SAFETY: I2, dSᵀ and K are full until this product is waited for.
        unsafe { wgmma::multiply::<E, N8>(smem.block_n / 16, |step| [a, b].map(|x| x.offset(rows_step(step)))) }
    }

    /// Accumulates a tile of a query block's dQ in the workspace (`red.global.add`), or stores it there if `STORES`.
    #[inline(always)]
    fn add_global<const STORES: bool>(&mut self, dq: &Fragment<N8>, at: &QueryBlock, tile: u32) {
        if tile == 0 {
            let row = self.dq_row(at, at.m_block * self.smem.block_m) as u32;
            // `fresh` keeps this after the wait for the product; by then the last reductions have drained. The host has
            // checked that an i32 holds the step from any row to any other.
            let rows = fresh(row.wrapping_sub(self.row)) as i32;
            self.address = self.address.wrapping_add_signed(rows as i64 * (self.smem.head_dim * 4) as i64);
            self.row = row;
        }
        // ptxas gives consecutive tiles registers that overlap by one column group. That group is reduced first here,
        // so that the next product does not wait until the other reductions have drained.
        for group in 0..N8 {
            let group = if (tile + self.loads_at).is_multiple_of(2) { group } else { N8 - 1 - group };
            let place = tile * N8 as u32 + group as u32;
            let to = self.address + (place * 16 * WARPGROUP_THREADS) as u64;
            // SAFETY: I5, this is part of the query block in the workspace, which the host has made large enough.
            unsafe {
                match STORES {
                    true => store_16_bytes(true, to, dq.0[group].map(f32::to_bits)),
                    false => add_global(to, dq.0[group]),
                }
            }
        }
    }

    /// In an exact pass, waits at the dQ semaphore until the `earlier` key blocks, which come before this one, have
    /// accumulated into this query block.
    #[inline(always)]
    fn wait_semaphore(&mut self, at: &QueryBlock, earlier: u32) {
        if self.p.workspace.dq_semaphores == 0 {
            return;
        }
        let blocks = self.dq_row(at, 0) / self.smem.block_m as u64;
        let semaphore = 1 + blocks as u32 + at.m_block / blocks_per_semaphore(self.smem.head_dim);
        if semaphore != self.semaphore {
            // By now the last step's reductions have drained, so incrementing their semaphore stalls no thread.
            self.signal_semaphore();
            self.semaphore = semaphore;
            // SAFETY: I5, the address is a dQ semaphore of the workspace.
            unsafe { spin_until(self.semaphore_address(), earlier) };
        }
    }

    /// Increments the dQ semaphore of the last reductions, so that the CTA of the next key block may accumulate.
    #[inline(always)]
    fn signal_semaphore(&mut self) {
        if self.semaphore != 0 {
            // Every thread has issued its reductions before this barrier, so the leader's release covers all of them.
            BackwardBarrier::sync_third();
            // SAFETY: I5, the address is a dQ semaphore of the workspace.
            unsafe { increment_counter(Leader::of_warpgroup(), self.semaphore_address()) };
            self.semaphore = 0;
        }
    }

    /// Returns the index of a query row in the workspace's dQ, counted from the first of the block's batch item.
    #[inline(always)]
    fn dq_row(&self, at: &QueryBlock, row: u32) -> u64 {
        self.p.workspace.dq_row(&self.p.shape, at.pair, self.p.head_rows(at.batch, at.head), row)
    }

    /// Returns the address of the pending dQ semaphore. There must be one.
    #[inline(always)]
    fn semaphore_address(&self) -> u64 {
        self.p.workspace.dq_semaphores + 4 * (self.semaphore - 1) as u64
    }
}

/// Completion of the last finished work tile, which is signalled after the first loads of the next one have been
/// issued. So these loads do not wait for the reductions to drain.
struct Completion<'a> {
    workspace: &'a Workspace,
    /// One more than the key head of the tile, while its completion is not yet signalled.
    pending: Option<NonZeroU32>,
    /// True if the tile, or the current one while it runs, initialises dQ.
    stores: bool,
}

impl Completion<'_> {
    /// Signals that the pending work tile is complete, if there is one. Increments the counter of its key head; the
    /// postprocess kernel reads dQ when the counter reaches the number of key blocks. If the tile initialised dQ, also
    /// sets the key head's state to READY, so that other tiles may accumulate into it.
    #[inline(always)]
    fn signal(&mut self) {
        if let Some(pending) = self.pending {
            let head = pending.get() - 1;
            BackwardBarrier::sync_third();
            let leader = cta::converged(Leader::of_warpgroup);
            // SAFETY: I5, the address is a counter of the workspace. All threads have issued their reductions before
            // the barrier, so the leader's release covers all of them.
            unsafe { increment_counter(leader, self.workspace.tiles_counter(head)) };
            if self.stores {
                first_values::make_ready(self.workspace.first_values_word(head));
                self.stores = false;
            }
            self.pending = None;
        }
    }
}

/// Returns the tile of dQ whose product overlaps the loads. It is early, because the slots are empty by then, unless
/// registers are needed for something else.
#[inline(always)]
fn loads_at<M: Mask>(smem: &BackwardSmem) -> u32 {
    match (smem.head_dim, M::PAIRS) {
        (64, 1) => tuning::LOADS_AT_DQ_TILE_D64,
        (128, 1) => tuning::LOADS_AT_DQ_TILE_D128,
        (128, 2) => tuning::LOADS_AT_DQ_TILE_D128_TWO_PAIRS,
        (256, 1) => tuning::LOADS_AT_DQ_TILE_D256,
        _ => 0,
    }
}

/// Issues the loads of all work tiles, and accumulates their dQ. `parameters` is the address of
/// `params` in the kernel's parameter space.
#[inline(always)]
pub fn produce<E: Packed, F: Features, const N8: usize>(
    params: &BackwardParams<TensorMap, F>,
    parameters: u64,
    smem: &BackwardSmem,
    tiles: impl Iterator<Item = KeyPart>,
) {
    let (p, mask) = (&params.base, params.features.mask());
    let mut loads = Loads::new(p, parameters, smem);
    let mut dq = DqAccumulator::<N8>::new(p, smem, loads_at::<F::Mask>(smem));
    let mut completion = Completion { workspace: &p.workspace, pending: None, stores: false };
    let warp = cta::warp_of_warpgroup();
    let knows_first = FirstTiles::is_for::<F::Mask, F::Weights>(smem.head_dim);
    let mut tiles = tiles;
    // Each work tile is taken from the iterator one iteration ahead. Such a tile lives in uniform registers, while a
    // tile that is computed in its own iteration takes registers of each thread.
    let mut next = tiles.next();
    let mut is_k_prefetched = false;
    while let Some(at) = next {
        next = tiles.next();
        let mut pairs_left = if const { F::Mask::PAIRS == 1 } { 1 } else { p.last_pair + 1 };
        while pairs_left > 0 {
            pairs_left -= 1;
            let (keys, blocks) = keys_of(params, smem, &at, pairs_left);
            if blocks.count() == 0 {
                // No loads of this tile follow, after which the tile before would be signalled.
                completion.signal();
                continue;
            }
            // All dS of the work tile before has arrived and has been multiplied. So neither its consumers nor its dQ
            // still need its K and V.
            let mut upcoming = blocks.first();
            let leader = cta::converged(Leader::of_warpgroup);
            if !is_k_prefetched {
                loads.k(&keys, dq.k, leader);
            }
            loads.begin(&keys, leader, &blocks, &mut upcoming);
            is_k_prefetched = prefetch_k(&loads, mask, p, smem, next, dq.k ^ 1);
            completion.signal();
            completion.stores = knows_first
                && !p.sequences.differ()
                && first_values::stores(&p.workspace, &p.shape, smem.head_dim, &keys);
            // Called while a product of a query block's dQ is in flight. By then the consumers no longer need the
            // block's slot for anything else.
            let mut refill = |step| {
                if step + smem.stages() < blocks.count() {
                    loads.next_queries(&blocks, &mut upcoming, dq_leader(loads_at::<F::Mask>(smem), warp));
                }
            };
            match completion.stores {
                true => dq.run::<E, F::Mask, true>(&blocks, keys.n_block, &mut refill),
                false => dq.run::<E, F::Mask, false>(&blocks, keys.n_block, &mut refill),
            }
            dq.end_tile();
        }
        completion.pending = NonZeroU32::new(1 + p.shape.key_head(at.tile.batch, at.tile.head));
    }
    completion.signal();
}

/// Returns the keys of a work tile or part, and the query blocks that attend to them through a pair. What follows from
/// the shape is rematerialised for each pair, because few registers are left to keep it.
#[inline(always)]
fn keys_of<F: Features>(
    params: &BackwardParams<TensorMap, F>,
    smem: &BackwardSmem,
    at: &KeyPart,
    pair: u32,
) -> (KvBlock, QueryBlocks<F::Mask>) {
    let p = &params.base;
    let Sequence { seqlen_q, seqlen_k } = p.item(at.tile.batch).sequence();
    let of = Sequence { seqlen_q: fresh(seqlen_q), seqlen_k: fresh(seqlen_k) };
    let keys = KvBlock { pair, ..key_block(&of, smem.block_n, &at.tile) };
    let tile = (smem.block_m, smem.block_n);
    let blocks = QueryBlocks::new(&of, *params.features.mask(), p.sharing.heads, tile, &keys);
    (keys, blocks.part(&p.sharing, at.part))
}

/// If there are two buffers, loads K of the next work tile into that of the work tile before, whose dQ is complete.
/// Returns true if it does. A tile that no query attends to would leave its K in the buffer.
#[inline(always)]
fn prefetch_k<M: Mask>(
    loads: &Loads,
    mask: &M,
    p: &BackwardBase<TensorMap>,
    smem: &BackwardSmem,
    next: Option<KeyPart>,
    buffer: u32,
) -> bool {
    let may_prefetch = smem.k_stages == 2 && !mask.leaves_keys_out();
    let Some(KeyPart { tile, .. }) = next else { return false };
    let of = p.item(tile.batch).sequence();
    let prefetches = may_prefetch && (!p.sequences.differ() || of.seqlen_q > 0);
    if prefetches {
        let leader = cta::converged(Leader::of_warpgroup);
        loads.k(&key_block(&of, smem.block_n, &tile), buffer, leader);
    }
    prefetches
}

/// Returns the leader that loads while the product of tile `loads_at` is in flight. Right after the first product ptxas
/// knows without a barrier that the warp is converged, but this takes registers.
#[inline(always)]
fn dq_leader(loads_at: u32, warp: u32) -> Leader {
    match loads_at {
        0 => Leader::of_first_warp(warp),
        _ => cta::converged(Leader::of_warpgroup),
    }
}
