//! The mask as bytes, 1 for a kept element and 0 for a dropped one, four calls at a time.
//!
//! The four calls of two pairs of query rows and one tile of 32 keys decide on four whole rows of the tile, eight bytes
//! of a row to each word of a call. So both machines write rows of 32 bytes.

use super::{Dropout, EACH_BYTE, KEYS, QUERIES, bytes, parity};
use crate::arch::bytes::select_bytes;

/// Number of rows that four calls decide on.
pub const ROWS: usize = 4;

/// Part of a mask on which four calls decide: four rows of queries and 32 keys.
#[derive(Clone, Copy, Debug)]
pub struct MaskPart {
    /// Query head, counted over the batch.
    pub head: u32,
    /// Number of the call along the queries; sixteen queries have four.
    pub call: u32,
    /// Number of the tile along the keys.
    pub tile: u32,
}

impl MaskPart {
    /// Number of calls along `seqlen_q` queries.
    #[inline(always)]
    pub const fn calls(seqlen_q: u32) -> u32 {
        seqlen_q.div_ceil(QUERIES) * 4
    }
    /// Number of tiles along `seqlen_k` keys.
    #[inline(always)]
    pub const fn tiles(seqlen_k: u32) -> u32 {
        seqlen_k.div_ceil(KEYS)
    }
    /// Returns the query of one of the [`ROWS`] that [`Dropout::kept_rows`] returns.
    #[inline(always)]
    pub const fn query(&self, row: u32) -> u32 {
        self.call / 4 * QUERIES + self.call % 4 * 2 + (row + self.tile) % 2 + row / 2 * 8
    }
    /// Returns the part's first key.
    #[inline(always)]
    pub const fn key(&self) -> u32 {
        self.tile * KEYS
    }
}

impl Dropout {
    /// Returns the mask of a part: for each of its rows 32 bytes, four to a word.
    #[expect(clippy::needless_range_loop, reason = "the compiler unrolls these, and keeps the arrays in registers")]
    #[inline(always)]
    pub fn kept_rows(&self, part: &MaskPart) -> [[u32; 8]; ROWS] {
        let mut kept = [[[0; 4]; 2]; 4];
        for call in 0..4 {
            let words = self.philox.at([part.call, 4 * part.tile + call as u32, part.head, self.offset]);
            let parity = parity(words);
            let addend = self.chosen(parity, self.addends);
            for half in 0..2 {
                for word in 0..4 {
                    let bytes = bytes(words[word], parity, half as u32);
                    kept[call][half][word] = self.compare(bytes, addend) >> 7 & EACH_BYTE;
                }
            }
        }
        let mut rows = [[0; 8]; ROWS];
        for row in 0..ROWS {
            for index in 0..8 {
                // Two calls have four neighbouring keys of a row, in the bytes of upper or of lower rows.
                let (call, half, word) = (2 * (index % 2), index / 4, 2 * (row % 2) + index / 2 % 2);
                let (a, b) = (kept[call][half][word], kept[call + 1][half][word]);
                rows[row][index] = select_bytes(a, b, if row < 2 { 0x6420 } else { 0x7531 });
            }
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_the_mask() {
        let dropout = Dropout::new(0.37, 5, 1 << 40 | 6).unwrap();
        let (head, mut seen) = (9, std::collections::BTreeSet::new());
        for (call, tile) in (0..MaskPart::calls(48)).flat_map(|call| (0..MaskPart::tiles(96)).map(move |j| (call, j))) {
            let part = MaskPart { head, call, tile };
            for (row, line) in dropout.kept_rows(&part).iter().enumerate() {
                for (at, kept) in line.iter().flat_map(|word| word.to_le_bytes()).enumerate() {
                    let (i, j) = (part.query(row as u32), part.key() + at as u32);
                    assert_eq!(kept, u8::from(dropout.kept(head, i, j)), "query {i}, key {j}");
                    assert!(seen.insert((i, j)));
                }
            }
        }
        assert_eq!((seen.len(), seen.first(), seen.last()), (48 * 96, Some(&(0, 0)), Some(&(47, 95))));
    }
}
