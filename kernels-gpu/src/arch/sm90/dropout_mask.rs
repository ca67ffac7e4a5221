//! The kernel that writes a dropout mask to device memory.

use core::arch::nvptx::{_block_idx_x, _grid_dim_x, _thread_idx_x};

use super::store::{store_8_bits, store_16_bytes, store_f32};
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
        } else if live && key + KEYS <= p.seqlen_k {
            write_unaligned(words, address);
        } else {
            for at in 0..KEYS {
                // SAFETY: I5, I6, the byte is one of the row if it is live.
                unsafe { store_8_bits(live && key + at < p.seqlen_k, address + at as u64, byte(words, at)) };
            }
        }
    }
}

/// Writes 32 bytes at any address: whole words where they are aligned, and the bytes before and after them.
#[inline(always)]
fn write_unaligned(words: &[u32; 8], address: u64) {
    let lead = (address.wrapping_neg() % 4) as u32;
    for word in 0..7 {
        let pair = words[word] as u64 | (words[word + 1] as u64) << 32;
        let kept = f32::from_bits((pair >> (8 * lead)) as u32);
        // SAFETY: I5, I6, these are bytes of the row that the caller has checked.
        unsafe { store_f32(true, address + lead as u64 + 4 * word as u64, kept) };
    }
    for at in (0..4).map(|i| if i < lead { i } else { 28 + i }) {
        // SAFETY: I5, I6, these are bytes of the row that the caller has checked.
        unsafe { store_8_bits(true, address + at as u64, byte(words, at)) };
    }
}

/// Returns a word whose lowest byte is one of the 32.
#[inline(always)]
fn byte(words: &[u32; 8], at: u32) -> u32 {
    let mut word = words[0];
    for (i, x) in words.iter().enumerate() {
        word = if at / 4 == i as u32 { *x } else { word };
    }
    word >> (8 * (at % 4))
}
