//! The kernels before and after the backward kernel, on the CPU.

use std::vec::Vec;

use super::memory;
use crate::attention::query_blocks::key_block;
use crate::attention::row_statistics::{delta, exponent_offset};
use crate::attention::scheduler::WorkTile;
use crate::element::Element;
use crate::params::{FinishParams, PrepareParams};
use crate::variants::BackwardVariant;

/// Fills the workspace of one query head, dQ with zeros whatever the head: nobody stores it here.
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
            let (offset, delta) = if row < shape.seqlen_q {
                let index = ((batch * shape.heads_q + head) * shape.seqlen_q) as usize + row as usize;
                let o = memory::row::<E>(&p.o, batch, head, row, columns);
                let d_o = memory::row::<E>(&p.d_o, batch, head, row, columns);
                let dot = o.iter().zip(d_o).map(|(o, d_o)| o.to_f32() * d_o.to_f32()).sum();
                let d_lse = if p.d_lse == 0 { 0.0 } else { memory::read_f32(p.d_lse, index) };
                (exponent_offset(memory::read_f32(p.lse, index)), delta(dot, d_lse))
            } else {
                (f32::NEG_INFINITY, 0.0)
            };
            memory::write_f32(p.workspace.offsets, first + row as usize, offset);
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

/// Adds up the parts of dK and dV of one key head's work tiles, in their order.
///
/// # Safety
/// As [`prepare`], for a key head of which all parts are in the workspace, with dK and dV that are valid for writing.
pub unsafe fn add_parts<E: Element>(p: &FinishParams, variant: &BackwardVariant, batch: u32, head: u32) {
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
                let part = |slot| p.workspace.part(slot, gradient, block_n * variant.head_dim);
                // SAFETY: the caller's promise.
                let line = unsafe { memory::row_mut::<E>(to, batch, head, first + row, shape.head_dim as usize) };
                for (column, to) in (0..).zip(line) {
                    let index = (row * variant.head_dim + column) as usize;
                    // SAFETY: the caller's promise.
                    let sum = slots.iter().map(|slot| unsafe { memory::read_f32(part(*slot), index) }).sum();
                    *to = E::from_f32(sum);
                }
            }
        }
    }
}
