//! Pre- and postprocess kernels of the backward pass, on the CPU.

use std::vec::Vec;

use super::convert;
use super::matmul::dot;
use super::memory;
use crate::attention::query_blocks::key_block;
use crate::attention::row_statistics::{delta, neg_lse_log2};
use crate::element::Dtype;
use crate::ground::places::WorkTile;
use crate::ground::sequence::Span;
use crate::ground::tensor::RowArray;
use crate::params::{FinishParams, PrepareParams, ROW_PADDING};
use crate::variants::BackwardVariant;

/// Fills the workspace of one batch item and query head. dQ gets zeros, because all work tiles accumulate here. Rows of
/// a gap have no workspace.
///
/// # Safety
/// `p` describes tensors of `dtype`, valid for reading, and a workspace that is valid for writing and that nothing else
/// accesses for this head.
pub unsafe fn prepare(p: &PrepareParams, dtype: Dtype, batch: u32, head: u32) {
    if p.sequences.is_gap(batch) {
        return;
    }
    let span = p.sequences.listed_item(&p.shape, batch).q;
    let head_rows = p.workspace.listed_head_rows(&p.sequences, &p.shape, batch, head);
    let first = p.workspace.row(head_rows, 0) as usize;
    let rows = if p.sequences.is_listed() { span.len.next_multiple_of(ROW_PADDING) } else { p.workspace.rows };
    let columns = p.shape.head_dim as usize;
    let (mut wide_o, mut wide_do) = (std::vec![0.0; columns], std::vec![0.0; columns]);
    for row in 0..rows {
        // SAFETY: the caller's promise; rows below seqlen_q are the tensors' and the arrays'.
        unsafe {
            let (neg_lse_log2, delta) = if row < span.len {
                let o = memory::row(&p.o, &span, head, row, columns);
                let d_o = memory::row(&p.d_o, &span, head, row, columns);
                let read = |array: &RowArray| memory::read_row(array, &span, head, row);
                convert::widen(dtype, o, &mut wide_o);
                convert::widen(dtype, d_o, &mut wide_do);
                let dot = dot(&wide_o, &wide_do);
                let d_lse = if p.d_lse.is_none() { 0.0 } else { read(&p.d_lse) };
                (neg_lse_log2(read(&p.lse)), delta(dot, d_lse))
            } else {
                (f32::NEG_INFINITY, 0.0)
            };
            memory::write_f32(p.workspace.neg_lse_log2, first + row as usize, neg_lse_log2);
            memory::write_f32(p.workspace.delta, first + row as usize, delta);
        }
    }
    for pair in 0..p.pairs {
        let first = p.workspace.dq_row(&p.shape, pair, head_rows, 0) as usize * p.head_dim as usize;
        let len = rows as usize * p.head_dim as usize;
        // SAFETY: the caller's promise.
        unsafe { memory::floats_mut(p.workspace.dq, first, len) }.fill(0.0);
    }
}

/// Converts the workspace's dQ of one batch item and query head to the tensor. Rows of a gap become 0.
///
/// # Safety
/// `p` describes a tensor of the variant's dtype, valid for writing, and a workspace whose dQ of this head is complete
/// and that nothing else accesses.
pub unsafe fn finish(p: &FinishParams, variant: &BackwardVariant, batch: u32, head: u32) {
    let (head_dim, columns) = (variant.head_dim as usize, p.shape.head_dim as usize);
    let span = p.sequences.listed_item(&p.shape, batch).q;
    if p.sequences.is_gap(batch) {
        for row in 0..span.len {
            // SAFETY: the caller's promise.
            unsafe { memory::row_mut(&p.dq, &span, head, row, columns) }.fill(0);
        }
        return;
    }
    let rows = p.workspace.listed_head_rows(&p.sequences, &p.shape, batch, head);
    let first = p.workspace.dq_row(&p.shape, p.pair, rows, 0) as usize;
    for row in 0..span.len {
        // SAFETY: the caller's promise.
        let (line, dq) = unsafe {
            let line = memory::row_mut(&p.dq, &span, head, row, columns);
            (line, memory::floats_mut(p.workspace.dq, (first + row as usize) * head_dim, columns))
        };
        dq.iter_mut().for_each(|x| *x *= p.scale);
        convert::narrow(variant.dtype, dq, line);
    }
}

/// Sums the parts of dK and dV of one key head's work tiles, in their order. If lengths differ, none is split.
///
/// # Safety
/// `p` describes dK and dV of the variant's dtype, valid for writing, and a workspace that has all parts of this key
/// head. Nothing else accesses them.
pub unsafe fn add_parts(p: &FinishParams, variant: &BackwardVariant, batch: u32, head: u32) {
    let (shape, block_n) = (&p.shape, variant.block_n);
    let span = Span::dense(batch, shape.seqlen_k);
    for m_block in 0..if p.sequences.is_listed() { 0 } else { p.key_blocks } {
        let tile = WorkTile { batch, head, m_block };
        let slots: Vec<u32> = p.sharing.parts_of(&p.order, tile).filter_map(|at| at.part.slot()).collect();
        if slots.is_empty() {
            continue;
        }
        let first = key_block(&shape.sequence(), block_n, &tile).n_block * block_n;
        for (gradient, to) in [(0, &p.dk), (1, &p.dv)] {
            for row in 0..block_n.min(shape.seqlen_k - first) {
                let columns = shape.head_dim as usize;
                let mut sum = std::vec![0.0; columns];
                for slot in &slots {
                    let part = p.workspace.part(*slot, gradient, block_n * variant.head_dim);
                    // SAFETY: the caller's promise.
                    let part = unsafe { memory::floats(part, (row * variant.head_dim) as usize, columns) };
                    sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
                }
                // SAFETY: the caller's promise.
                let line = unsafe { memory::row_mut(to, &span, head, first + row, columns) };
                convert::narrow(variant.dtype, &sum, line);
            }
        }
    }
}
