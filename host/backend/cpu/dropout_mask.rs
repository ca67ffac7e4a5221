//! The dropout mask on the CPU, by blocks of rows that are spread over rayon's threads.

use std::sync::{Mutex, PoisonError};

use kernels_gpu::attention::dropout::{Dropout, mask::MaskPart};
use kernels_gpu::cpu::mask_rows;
use kernels_gpu::variants::DROPOUT_MASK;

use super::pool;
use crate::error::Result;

/// Number of weights, about, of a thread's next block.
const BLOCK_WEIGHTS: usize = 1 << 16;
/// Keys of a part of the mask.
const KEYS: usize = 32;
/// Rows of a block of a single head are a multiple of this, so that no block repeats calls of another.
const CALL_ROWS: usize = 16;

/// A block of rows of the mask: of whole heads, or of a part of one.
struct Block<'a, T> {
    head: usize,
    row: usize,
    kept: &'a mut [T],
}

/// Writes a mask of (heads, seqlen_q, seqlen_k), contiguous; `of` turns 0 or 1 into an element. The number of heads and
/// both lengths fit in 32 bits.
pub(crate) fn write<T: Send>(
    kept: &mut [T],
    [seqlen_q, seqlen_k]: [usize; 2],
    dropout: &Dropout,
    of: impl Fn(u8) -> T + Sync,
) -> Result<()> {
    if kept.is_empty() {
        return Ok(());
    }
    let head_len = seqlen_q * seqlen_k;
    let heads = (BLOCK_WEIGHTS / head_len).max(1);
    let rows = (BLOCK_WEIGHTS / seqlen_k).max(1).next_multiple_of(CALL_ROWS);
    let of_heads = |(index, kept)| {
        let rows = if heads > 1 { heads * seqlen_q } else { rows };
        let blocks = <[T]>::chunks_mut(kept, rows * seqlen_k).enumerate();
        blocks.map(move |(block, kept)| Block { head: index * heads, row: block * rows, kept })
    };
    let blocks: Vec<Block<'_, T>> = kept.chunks_mut(heads * head_len).enumerate().flat_map(of_heads).collect();
    // A mask of this machine's memory has fewer blocks than 32 bits count.
    let count = u32::try_from(blocks.len()).unwrap_or(u32::MAX);
    let blocks = Mutex::new(blocks.into_iter());
    pool::for_each(DROPOUT_MASK, count, |_| {
        let block = blocks.lock().unwrap_or_else(PoisonError::into_inner).next();
        if let Some(Block { head, row, kept }) = block {
            for (index, kept) in kept.chunks_mut(head_len).enumerate() {
                write_rows(kept, (head + index) as u32, row as u32, seqlen_k, dropout, &of);
            }
        }
    })
}

/// Writes rows of one head, from query `first` on, which is a multiple of [`CALL_ROWS`].
fn write_rows<T>(kept: &mut [T], head: u32, first: u32, seqlen_k: usize, dropout: &Dropout, of: &impl Fn(u8) -> T) {
    let rows = (kept.len() / seqlen_k) as u32;
    let calls = MaskPart::calls(first)..MaskPart::calls(first + rows);
    for (call, tile) in calls.flat_map(|call| (0..MaskPart::tiles(seqlen_k as u32)).map(move |tile| (call, tile))) {
        let part = MaskPart { head, call, tile };
        for (row, bytes) in mask_rows(dropout, &part).iter().enumerate() {
            let query = part.query(row as u32);
            if query - first >= rows {
                continue;
            }
            let (key, line) = (part.key() as usize, (query - first) as usize * seqlen_k);
            let kept = &mut kept[line + key..line + seqlen_k];
            // The compiler makes vectors of a loop of a known length.
            match kept.first_chunk_mut::<KEYS>() {
                Some(kept) => (0..KEYS).for_each(|at| kept[at] = of(bytes[at])),
                None => kept.iter_mut().zip(bytes).for_each(|(kept, byte)| *kept = of(*byte)),
            }
        }
    }
}
