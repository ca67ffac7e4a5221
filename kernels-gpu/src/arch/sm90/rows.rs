//! Pre- and postprocess kernels of the backward pass. The first computes `neg_lse_log2` and δ of each query row. The
//! second converts dQ from the workspace, and sums the parts of dK and dV if there are any.

use core::arch::asm;
use core::arch::nvptx::{_block_idx_x, _grid_dim_x, _thread_idx_x};

use super::cta::await_grid_before;
use super::first_values::{FREE, READY};
use super::fragment::Fragment;
use super::load::{await_count, load_16_bytes, load_f32};
use super::math::{Packed, fresh, shuffle_xor};
use super::named_barrier::RowBarrier;
use super::store::{Lines, store_16_bytes, store_f32, store_lines};
use crate::attention::query_blocks::key_block;
use crate::attention::row_statistics::{self, delta};
use crate::attention::schedule::List;
use crate::ground::sequence::Span;
use crate::ground::shape::quotient;
use crate::ground::tensor::{RowArray, Strided};
use crate::params::{FinishParams, HeadRows, PrepareParams};
use crate::params::{PREPARE_ROWS, ROW_KERNEL_THREADS};
use crate::tile::lane::{WARPGROUP_ROWS, WARPGROUP_THREADS};

/// Number of lanes that share a row, each with eight elements at a time.
const LANES: u32 = 8;
const LARGEST_HEAD_DIM: u32 = 256;

/// Fills the workspace's rows of one CTA: `neg_lse_log2`, δ, and zeros for dQ if no work tile initialises it. Sets the
/// counters and states of key heads.
#[inline(always)]
pub fn prepare<E: Packed>(p: &PrepareParams) {
    // SAFETY: reads special registers.
    let (thread, cta) = unsafe { (_thread_idx_x() as u32, _block_idx_x() as u32) };
    if p.sequences.is_listed() {
        return prepare_listed::<E>(p, thread, cta);
    }
    // CTAs of one head follow one another, and so do heads.
    let ctas = quotient(p.workspace.rows, PREPARE_ROWS);
    let index = quotient(cta, ctas);
    let batch = quotient(index, p.shape.heads_q);
    let head = index - batch * p.shape.heads_q;
    // The first CTA of a query head also serves a key head, because there are no more key heads than query heads.
    let counts = cta == index * ctas && head < p.shape.heads_kv && thread == 0;
    let key_head = p.shape.key_head(batch, head);
    let first_values = if key_head < p.first.zeroed { READY } else { FREE };
    // SAFETY: I5, these are words of the workspace; I6, no other CTA sets them. 0.0 has the bits of 0.
    unsafe {
        store_f32(counts, p.workspace.tiles_counter(key_head), 0.0);
        store_f32(counts, p.workspace.first_values_word(key_head), f32::from_bits(first_values));
    }
    let zeroed = p.shape.key_head(batch, quotient(head, p.shape.group())) < p.first.zeroed;
    let rows = HeadRows::dense(&p.shape, batch, head);
    let block = QueryRows { span: Span::dense(batch, p.shape.seqlen_q), head, rows, zeroed };
    block.prepare::<E>(p, (cta - index * ctas) * PREPARE_ROWS, thread);
}

/// Fills the workspace's rows of one CTA if lengths differ. There is a CTA for each head of the most blocks of queries
/// that there may be.
#[inline(always)]
fn prepare_listed<E: Packed>(p: &PrepareParams, thread: u32, cta: u32) {
    let Some(ListedBlock { batch, head, m_block }) = listed_block(p.list, p.shape.heads_q, cta) else { return };
    // Rows of a gap have no workspace.
    if p.sequences.is_gap(batch) {
        return;
    }
    let item = p.sequences.listed_item(&p.shape, batch);
    let rows = HeadRows::of_sequence(&item, batch, head);
    QueryRows { span: item.q, head, rows, zeroed: true }.prepare::<E>(p, m_block * PREPARE_ROWS, thread);
}

/// Block of [`PREPARE_ROWS`] queries of one head.
struct ListedBlock {
    batch: u32,
    head: u32,
    m_block: u32,
}

/// Returns the block of a CTA from the list at `list`; nothing if it has fewer.
#[inline(always)]
fn listed_block(list: u64, heads: u32, cta: u32) -> Option<ListedBlock> {
    let list = List(list);
    if cta >= list.tiles() {
        return None;
    }
    let index = quotient(cta, heads);
    let [batch, m_block] = list.block(index);
    Some(ListedBlock { batch, head: cta - index * heads, m_block })
}

/// Query rows of a batch item and head, which a CTA prepares.
struct QueryRows {
    span: Span,
    head: u32,
    /// Their place in the workspace.
    rows: HeadRows,
    /// True if dQ gets zeros.
    zeroed: bool,
}

impl QueryRows {
    /// Fills [`PREPARE_ROWS`] rows, from row `first` on.
    #[inline(always)]
    fn prepare<E: Packed>(&self, p: &PrepareParams, first: u32, thread: u32) {
        for pass in 0..PREPARE_ROWS / (ROW_KERNEL_THREADS / LANES) {
            let row = first + thread / LANES + pass * (ROW_KERNEL_THREADS / LANES);
            prepare_row::<E>(p, self, row, thread % LANES);
        }
    }
}

/// Fills one row, by the lanes that share it.
#[inline(always)]
fn prepare_row<E: Packed>(p: &PrepareParams, of: &QueryRows, row: u32, lane: u32) {
    let live = row < of.span.len;
    let mut dot = 0.0;
    let (o, d_o) = (p.o.row(&of.span, of.head, row), p.d_o.row(&of.span, of.head, row));
    for chunk in 0..LARGEST_HEAD_DIM / (LANES * 8) {
        let column = (chunk * LANES + lane) * 8;
        if live && column < p.shape.head_dim {
            let offset = 2 * column as u64;
            // SAFETY: I5, these are eight elements of a row.
            let (x, y) = unsafe { (load_16_bytes(o + offset), load_16_bytes(d_o + offset)) };
            for i in 0..4 {
                let ([a, b], [c, d]) = (E::unpack(x[i]), E::unpack(y[i]));
                dot += a * c + b * d;
            }
        }
    }
    dot += f32::from_bits(shuffle_xor::<1>(dot.to_bits()));
    dot += f32::from_bits(shuffle_xor::<2>(dot.to_bits()));
    dot += f32::from_bits(shuffle_xor::<4>(dot.to_bits()));
    let (mut neg_lse_log2, mut statistic) = (f32::NEG_INFINITY, 0.0);
    if live {
        let at = |array: &RowArray| array.of(&of.span, of.head, row);
        // SAFETY: I5, these are elements of the arrays.
        unsafe {
            neg_lse_log2 = row_statistics::neg_lse_log2(load_f32(at(&p.lse)));
            statistic = delta(dot, if p.d_lse.is_none() { 0.0 } else { load_f32(at(&p.d_lse)) });
        }
    }
    let index = p.workspace.row(of.rows, row);
    // SAFETY: I5, this row is part of the workspace; I6, no other lane stores these elements.
    unsafe {
        store_f32(lane == 0, p.workspace.neg_lse_log2 + 4 * index, neg_lse_log2);
        store_f32(lane == 0, p.workspace.delta + 4 * index, statistic);
        for pair in 0..if of.zeroed { p.pairs } else { 0 } {
            let index = p.workspace.dq_row(&p.shape, pair, of.rows, row);
            let line = p.workspace.dq + index * p.head_dim as u64 * 4;
            for chunk in 0..LARGEST_HEAD_DIM / (LANES * 4) {
                let column = (chunk * LANES + lane) * 4;
                store_16_bytes(column < p.head_dim, line + 4 * column as u64, [0; 4]);
            }
        }
    }
}

/// Converts 64 rows of the workspace's dQ to rows of the tensor. Each warpgroup converts half of the columns, in the
/// accumulator layout in which the backward kernel stored them. CTAs after those for dQ sum the parts of dK and dV.
///
/// The kernel runs on SMs that the backward kernel has left while other CTAs of it still compute their last work tiles.
/// CTAs of this kernel start only when all CTAs of the backward kernel are running or done. So no CTA that they wait
/// for needs their place.
#[inline(always)]
pub fn finish<E: Packed, const Q8: usize>(p: &FinishParams, block_n: u32) {
    // SAFETY: reads special registers.
    let (thread, cta) = unsafe { (_thread_idx_x() as u32, _block_idx_x() as u32) };
    let (part, thread) = (thread / WARPGROUP_THREADS, thread % WARPGROUP_THREADS);
    let head_dim = 2 * 8 * Q8 as u32;
    if p.sequences.is_listed() {
        return finish_listed::<E, Q8>(p, part, thread, cta);
    }
    let blocks = quotient(p.workspace.rows, WARPGROUP_ROWS);
    let ctas = p.shape.batch * p.shape.heads_q * blocks;
    if cta >= ctas {
        return add_parts::<E>(p, (head_dim, block_n), cta - ctas);
    }
    let place = quotient(cta, blocks);
    let row = (cta - place * blocks) * WARPGROUP_ROWS;
    // Heads whose dQ was filled with zeros come last, because the work tiles of their first keys do.
    let heads = p.shape.batch * p.shape.heads_q;
    let head_index = place + p.first.zeroed * p.shape.group();
    let head_index = if head_index >= heads { head_index - heads } else { head_index };
    let batch = quotient(head_index, p.shape.heads_q);
    let head = head_index - batch * p.shape.heads_q;
    await_dq(p, batch, head, cta);
    // Rows of padding may never have been stored.
    if row >= p.shape.seqlen_q {
        return;
    }
    let rows = p.workspace.dq_row(&p.shape, p.pair, HeadRows::dense(&p.shape, batch, head), row);
    let at = Lines { rows: Span::dense(batch, p.shape.seqlen_q), head, row, column: part * 8 * Q8 as u32 };
    convert::<E, Q8>(p, rows, at, part, thread);
}

/// Converts 64 rows of dQ if lengths differ. There are two CTAs for each head of the most blocks of queries that there
/// may be. Rows of a gap become 0.
#[inline(always)]
fn finish_listed<E: Packed, const Q8: usize>(p: &FinishParams, part: u32, thread: u32, cta: u32) {
    await_grid_before();
    let (block, half) = (cta / (PREPARE_ROWS / WARPGROUP_ROWS), cta % (PREPARE_ROWS / WARPGROUP_ROWS));
    let Some(ListedBlock { batch, head, m_block }) = listed_block(p.list, p.shape.heads_q, block) else { return };
    let item = p.sequences.listed_item(&p.shape, batch);
    let row = m_block * PREPARE_ROWS + half * WARPGROUP_ROWS;
    let at = Lines { rows: item.q, head, row, column: part * 8 * Q8 as u32 };
    if p.sequences.is_gap(batch) {
        let zeros = Fragment([[0.0; 4]; Q8]);
        // SAFETY: as in `convert`.
        unsafe { store_lines(&zeros.pack::<E>(), &p.dq, at, p.shape.head_dim) };
    } else if row < item.q.len {
        let rows = HeadRows::of_sequence(&item, batch, head);
        convert::<E, Q8>(p, p.workspace.dq_row(&p.shape, p.pair, rows, row), at, part, thread);
    }
}

/// Converts 64 rows of dQ, from index `rows` of the workspace on, for the rows of the tensor at `at`.
#[inline(always)]
fn convert<E: Packed, const Q8: usize>(p: &FinishParams, rows: u64, at: Lines, part: u32, thread: u32) {
    let head_dim = 2 * 8 * Q8 as u32;
    let first = rows * head_dim as u64;
    let address = p.workspace.dq + 4 * (first + (part * WARPGROUP_ROWS * head_dim / 2) as u64) + 16 * thread as u64;
    let mut dq = Fragment([[0.0; 4]; Q8]);
    for (group, x) in dq.0.iter_mut().enumerate() {
        // SAFETY: I5, these are this warpgroup's elements of the workspace.
        let loaded = unsafe { load_16_bytes(address + (group as u32 * 16 * WARPGROUP_THREADS) as u64) };
        *x = loaded.map(|x| f32::from_bits(x) * p.scale);
    }
    // SAFETY: I5, the host has checked the tensor; I6, these rows and columns belong to this warpgroup.
    unsafe { store_lines(&dq.pack::<E>(), &p.dq, at, p.shape.head_dim) };
}

/// Number of n8 column groups of the parts that a warpgroup sums.
const PART_N8: usize = 4;

/// Sums the parts of 64 rows of dK or dV of a split work tile, in the order of the parts. Each warpgroup sums
/// [`PART_N8`] column groups of its half of the columns.
#[inline(always)]
fn add_parts<E: Packed>(p: &FinishParams, (head_dim, block_n): (u32, u32), index: u32) {
    // SAFETY: reads a special register.
    let thread = unsafe { _thread_idx_x() } as u32;
    let (half, thread) = (thread / WARPGROUP_THREADS, thread % WARPGROUP_THREADS);
    let columns = 8 * PART_N8 as u32;
    let (chunks, blocks) = (head_dim / 2 / columns, block_n / WARPGROUP_ROWS);
    let (index, chunk) = (index / chunks, index % chunks);
    let (index, block) = (index / blocks, index % blocks);
    let (tile, gradient) = (index / 2, index % 2);
    let keys = key_block(&p.shape.sequence(), block_n, &p.first.tile(&p.order, p.sharing.from + tile));
    let column = half * head_dim / 2 + chunk * columns;
    // The 64 rows have the accumulator layout: one n8 column group after another, with sixteen bytes of each thread in
    // order.
    let first = block * WARPGROUP_ROWS * head_dim + column * WARPGROUP_ROWS;
    let elements = block_n * head_dim;
    let address = p.workspace.part(tile * p.sharing.parts.value, gradient, elements) + (4 * first + 16 * thread) as u64;
    await_grid_before();
    let load = |part: u32| {
        let address = address + part as u64 * (2 * 4 * elements) as u64;
        // SAFETY: I5, these are this thread's elements of a slot, which the backward kernel has filled.
        [0, 1, 2, 3].map(|group| unsafe { load_16_bytes(address + group * (16 * WARPGROUP_THREADS) as u64) })
    };
    let mut sum = Fragment([[0.0; 4]; PART_N8]);
    let parts = p.sharing.parts.value;
    for first in (0..parts).step_by(2) {
        // Two parts are loaded at once. ptxas would unroll further, and take registers for that from all CTAs.
        // SAFETY: a pragma emits no instruction.
        unsafe { asm!(".pragma \"nounroll\";", options(nostack)) };
        let second = first + 1;
        let [x, y] = [load(first), load(second.min(parts - 1))];
        for group in 0..PART_N8 {
            for i in 0..4 {
                sum.0[group][i] += f32::from_bits(x[group][i]);
                if second < parts {
                    sum.0[group][i] += f32::from_bits(y[group][i]);
                }
            }
        }
    }
    let to = choose(gradient, &p.dk, &p.dv);
    let row = keys.n_block * block_n + block * WARPGROUP_ROWS;
    let at = Lines { rows: Span::dense(keys.batch, p.shape.seqlen_k), head: keys.head, row, column };
    // SAFETY: I5, the host has checked the tensors; I6, these rows and columns belong to this warpgroup.
    unsafe { store_lines(&sum.pack::<E>(), &to, at, p.shape.head_dim) };
}

/// Returns the first (`second` 0) or the second (1) of two tensors, by arithmetic. A choice between two addresses of
/// parameters would make the compiler copy them to memory.
#[inline(always)]
fn choose(second: u32, a: &Strided, b: &Strided) -> Strided {
    let mask = fresh(second.wrapping_neg()) as i32 as i64;
    let of = |a: i64, b: i64| a ^ (a ^ b) & mask;
    Strided {
        address: of(a.address as i64, b.address as i64) as u64,
        stride_batch: of(a.stride_batch, b.stride_batch),
        stride_head: of(a.stride_head, b.stride_head),
        stride_row: of(a.stride_row, b.stride_row),
    }
}

/// Waits until all work tiles have accumulated their part of a head's dQ. If some tiles may have been split, and in the
/// last CTA, it waits for the whole backward kernel instead. So a grid that waits for this one finds dK and dV
/// complete, too.
#[inline(always)]
fn await_dq(p: &FinishParams, batch: u32, head: u32, cta: u32) {
    // SAFETY: reads special registers.
    let (thread, ctas) = unsafe { (_thread_idx_x() as u32, _grid_dim_x() as u32) };
    let key_head = p.shape.key_head(batch, quotient(head, p.shape.group()));
    if cta + 1 == ctas || key_head.max(p.first.place(key_head)) >= p.shared_head {
        await_grid_before();
    } else if thread == 0 {
        // SAFETY: I5, the address is a counter of the workspace.
        unsafe { await_count(p.workspace.tiles_counter(key_head), p.key_blocks) };
    }
    // After this barrier, what one thread has acquired is visible to all threads.
    RowBarrier::DqComplete.barrier().sync(ROW_KERNEL_THREADS);
}
