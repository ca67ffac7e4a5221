//! Gradient of the sinks: a sum over the rows of the backward pass's workspace.

use core::arch::nvptx::{_block_idx_x, _thread_idx_x};
use core::f32::consts::LOG2_E;

use super::cta::smem_base;
use super::load::{load_16_bytes, load_f32, load_shared_16_bytes};
use super::math::{exp2, shuffle_xor};
use super::named_barrier::RowBarrier;
use super::store::{store_f32, store_shared_f32};
use crate::attention::row_statistics::sink_gradient;
use crate::params::{ROW_KERNEL_THREADS, SinkGradientParams};
use crate::tile::lane::WARP_THREADS;

/// Number of rows that a thread loads at once.
const ROWS: u32 = 4;

/// Computes the gradient of one head's sink in one CTA. Each thread sums its rows of all batch items in order; then the
/// sums of lanes and of warps are added in a fixed order. So the bits are the same on every run.
#[inline(always)]
pub fn sink_gradients(p: &SinkGradientParams) {
    // SAFETY: reads special registers.
    let (thread, head) = unsafe { (_thread_idx_x() as u32, _block_idx_x() as u32) };
    // SAFETY: I5, the host has checked the array.
    let sink_log2 = unsafe { load_f32(p.sinks.of(0, head)) } * LOG2_E;
    let mut sum = 0.0;
    for batch in 0..if p.sequences.is_listed() { p.sequences.count() } else { p.shape.batch } {
        let seqlen_q = p.sequences.listed_item(&p.shape, batch).q.len;
        let first = p.workspace.row(p.workspace.listed_head_rows(&p.sequences, &p.shape, batch, head), 0);
        let mut start = 0;
        while start < seqlen_q {
            let row = start + ROWS * thread;
            start += ROWS * ROW_KERNEL_THREADS;
            if row >= seqlen_q {
                continue;
            }
            let at = 4 * (first + row as u64);
            // SAFETY: I5, these are rows of the workspace, in which the rows of a head are padded.
            let (neg_lse_log2, delta) =
                unsafe { (load_16_bytes(p.workspace.neg_lse_log2 + at), load_16_bytes(p.workspace.delta + at)) };
            for i in 0..ROWS {
                let p_sink = exp2(sink_log2 + f32::from_bits(neg_lse_log2[i as usize]));
                let of_row = sink_gradient(p_sink, f32::from_bits(delta[i as usize]));
                // Rows of padding count nothing, whatever they hold.
                sum += if row + i < seqlen_q { of_row } else { 0.0 };
            }
        }
    }
    sum += f32::from_bits(shuffle_xor::<1>(sum.to_bits()));
    sum += f32::from_bits(shuffle_xor::<2>(sum.to_bits()));
    sum += f32::from_bits(shuffle_xor::<4>(sum.to_bits()));
    sum += f32::from_bits(shuffle_xor::<8>(sum.to_bits()));
    sum += f32::from_bits(shuffle_xor::<16>(sum.to_bits()));
    let sums = smem_base();
    // SAFETY: the launch has shared memory for a sum of each warp, and the barrier makes them visible.
    let of_warps = unsafe {
        store_shared_f32(thread % WARP_THREADS == 0, sums + 4 * (thread / WARP_THREADS), sum);
        RowBarrier::SumsStored.barrier().sync(ROW_KERNEL_THREADS);
        [load_shared_16_bytes(sums), load_shared_16_bytes(sums + 16)]
    };
    let sum = of_warps.as_flattened().iter().fold(0.0, |sum, x| sum + f32::from_bits(*x));
    // SAFETY: I5, the host has checked the array; I6, no other CTA stores this element.
    unsafe { store_f32(thread == 0, p.d_sinks + 4 * head as u64, sum) };
}
