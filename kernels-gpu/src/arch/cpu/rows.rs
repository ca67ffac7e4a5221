//! Pre- and postprocess kernels of the backward pass, on the CPU.

use std::vec::Vec;

use super::convert;
use super::matmul::dot;
use super::memory;
use crate::attention::query_blocks::key_block;
use crate::attention::row_statistics::{delta, neg_lse_log2};
use crate::element::Dtype;
use crate::ground::places::WorkTile;
use crate::params::{FinishParams, PrepareParams};
use crate::variants::BackwardVariant;

/// Fills the workspace of one query head. dQ of every head gets zeros, because all work tiles accumulate here.
///
/// # Safety
/// `p` describes tensors of `dtype`, valid for reading, and a workspace that is valid for writing and that nothing else
/// accesses for this head.
pub unsafe fn prepare(p: &PrepareParams, dtype: Dtype, batch: u32, head: u32) {
    let shape = &p.shape;
    let first = p.workspace.row(shape, batch, head, 0) as usize;
    let columns = shape.head_dim as usize;
    let (mut wide_o, mut wide_do) = (std::vec![0.0; columns], std::vec![0.0; columns]);
    for row in 0..p.workspace.rows {
        // SAFETY: the caller's promise; rows below seqlen_q are the tensors' and the arrays'.
        unsafe {
            let (neg_lse_log2, delta) = if row < shape.seqlen_q {
                let index = ((batch * shape.heads_q + head) * shape.seqlen_q) as usize + row as usize;
                let o = memory::row(&p.o, batch, head, row, columns);
                let d_o = memory::row(&p.d_o, batch, head, row, columns);
                convert::widen(dtype, o, &mut wide_o);
                convert::widen(dtype, d_o, &mut wide_do);
                let dot = dot(&wide_o, &wide_do);
                let d_lse = if p.d_lse == 0 { 0.0 } else { memory::read_f32(p.d_lse, index) };
                (neg_lse_log2(memory::read_f32(p.lse, index)), delta(dot, d_lse))
            } else {
                (f32::NEG_INFINITY, 0.0)
            };
            memory::write_f32(p.workspace.neg_lse_log2, first + row as usize, neg_lse_log2);
            memory::write_f32(p.workspace.delta, first + row as usize, delta);
        }
    }
    for pair in 0..p.pairs {
        let first = p.workspace.row(shape, batch + pair * shape.batch, head, 0) as usize * p.head_dim as usize;
        let len = p.workspace.rows as usize * p.head_dim as usize;
        // SAFETY: the caller's promise.
        unsafe { memory::floats_mut(p.workspace.dq, first, len) }.fill(0.0);
    }
}

/// Converts the workspace's dQ of one query head to the tensor.
///
/// # Safety
/// `p` describes a tensor of the variant's dtype, valid for writing, and a workspace whose dQ of this head is complete
/// and that nothing else accesses.
pub unsafe fn finish(p: &FinishParams, variant: &BackwardVariant, batch: u32, head: u32) {
    let head_dim = variant.head_dim as usize;
    let first = p.workspace.row(&p.shape, batch + p.pair * p.shape.batch, head, 0) as usize;
    for row in 0..p.shape.seqlen_q {
        let columns = p.shape.head_dim as usize;
        // SAFETY: the caller's promise.
        let (line, dq) = unsafe {
            let line = memory::row_mut(&p.dq, batch, head, row, columns);
            (line, memory::floats_mut(p.workspace.dq, (first + row as usize) * head_dim, columns))
        };
        dq.iter_mut().for_each(|x| *x *= p.scale);
        convert::narrow(variant.dtype, dq, line);
    }
}

/// Sums the parts of dK and dV of one key head's work tiles, in their order.
///
/// # Safety
/// `p` describes dK and dV of the variant's dtype, valid for writing, and a workspace that has all parts of this key
/// head. Nothing else accesses them.
pub unsafe fn add_parts(p: &FinishParams, variant: &BackwardVariant, batch: u32, head: u32) {
    let (shape, block_n) = (&p.shape, variant.block_n);
    for m_block in 0..p.key_blocks {
        let tile = WorkTile { batch, head, m_block };
        let slots: Vec<u32> = p.sharing.parts_of(&p.order, tile).filter_map(|at| at.part.slot()).collect();
        if slots.is_empty() {
            continue;
        }
        let first = key_block(shape, block_n, &tile).n_block * block_n;
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
                let line = unsafe { memory::row_mut(to, batch, head, first + row, columns) };
                convert::narrow(variant.dtype, &sum, line);
            }
        }
    }
}
