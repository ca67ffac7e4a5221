//! Gradient of the sinks, on the CPU.

use core::f32::consts::LOG2_E;

use super::exp2::exp2;
use super::memory;
use crate::attention::row_statistics::sink_gradient as of_row;
use crate::params::{ROW_KERNEL_THREADS, SinkGradientParams};

/// Number of partial sums.
const SUMS: usize = ROW_KERNEL_THREADS as usize;

/// Computes the gradient of one head's sink. As on a GPU, rows are added to partial sums, which are then added in a
/// fixed order.
///
/// # Safety
/// `p` describes sinks that are valid for reading, a gradient that is valid for writing and whose element of this head
/// nothing else accesses, and a workspace that [`prepare`](super::prepare) has filled for this head of every batch
/// item.
pub unsafe fn sink_gradient(p: &SinkGradientParams, head: u32) {
    let mut sums = [0.0; SUMS];
    // SAFETY: the caller's promise.
    let sink_log2 = unsafe { memory::read_f32(p.sinks.address, head as usize) } * LOG2_E;
    for batch in 0..if p.sequences.is_listed() { p.sequences.count() } else { p.shape.batch } {
        let rows = p.workspace.listed_head_rows(&p.sequences, &p.shape, batch, head);
        let first = p.workspace.row(rows, 0) as usize;
        for row in 0..p.sequences.listed_item(&p.shape, batch).q.len as usize {
            // SAFETY: the caller's promise.
            let (neg_lse_log2, delta) = unsafe {
                let at = first + row;
                (memory::read_f32(p.workspace.neg_lse_log2, at), memory::read_f32(p.workspace.delta, at))
            };
            sums[row / 4 % SUMS] += of_row(exp2(sink_log2 + neg_lse_log2), delta);
        }
    }
    let mut width = SUMS;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            sums[i] += sums[i + width];
        }
    }
    // SAFETY: the caller's promise.
    unsafe { memory::write_f32(p.d_sinks, head as usize, sums[0]) };
}
