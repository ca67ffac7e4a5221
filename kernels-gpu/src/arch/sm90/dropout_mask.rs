//! The kernel that writes a dropout mask to device memory.

use core::arch::nvptx::{_block_idx_x, _grid_dim_x, _thread_idx_x};

use super::store::{store_8_bits, store_16_bytes};
use crate::attention::dropout::mask::MaskPart;
use crate::params::{DropoutMaskParams, ROW_KERNEL_THREADS};

/// Number of keys of a part's row.
const KEYS: u32 = 32;

/// Writes the parts of one thread: every so many of them as the launch has threads. Neighbouring threads have
/// neighbouring keys.
#[inline(always)]
pub fn write(p: &DropoutMaskParams) {
    // SAFETY: reads special registers.
    let (thread, cta, ctas) = unsafe { (_thread_idx_x() as u32, _block_idx_x() as u32, _grid_dim_x() as u32) };
    let (calls, tiles) = (MaskPart::calls(p.seqlen_q), MaskPart::tiles(p.seqlen_k));
    let threads = ctas as u64 * ROW_KERNEL_THREADS as u64;
    let mut index = cta as u64 * ROW_KERNEL_THREADS as u64 + thread as u64;
    while index < p.parts {
        // The maximum keeps a panic out of the code. Nothing is launched without parts.
        let row = index / tiles.max(1) as u64;
        let head = row / calls.max(1) as u64;
        let tile = (index - row * tiles as u64) as u32;
        write_part(p, &MaskPart { head: head as u32, call: (row - head * calls as u64) as u32, tile });
        index += threads;
    }
}

/// Writes a part's rows, as far as they are in the mask.
#[inline(always)]
fn write_part(p: &DropoutMaskParams, part: &MaskPart) {
    let rows = p.dropout.kept_rows(part);
    for (row, words) in rows.iter().enumerate() {
        let (query, key) = (part.query(row as u32), part.key());
        let offset = (part.head as u64 * p.seqlen_q as u64 + query as u64) * p.seqlen_k as u64 + key as u64;
        let (address, live) = (p.kept + offset, query < p.seqlen_q);
        let [a, b, c, d, e, f, g, h] = *words;
        if live && address % 16 == 0 && key + KEYS <= p.seqlen_k {
            // SAFETY: I5, these are 32 bytes of a row; I6, no other thread has this part.
            unsafe {
                store_16_bytes(true, address, [a, b, c, d]);
                store_16_bytes(true, address + 16, [e, f, g, h]);
            }
        } else {
            for (word, kept) in words.iter().enumerate() {
                for byte in 0..4 {
                    let at = 4 * word as u32 + byte;
                    // SAFETY: I5, I6, the byte is one of the row if it is live.
                    unsafe { store_8_bits(live && key + at < p.seqlen_k, address + at as u64, kept >> (8 * byte)) };
                }
            }
        }
    }
}
