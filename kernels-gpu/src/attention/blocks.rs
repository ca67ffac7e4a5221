//! Blocks of columns that a tile of rows visits: blocks of keys for a query tile, query blocks for a block of keys. A
//! skipped block has no valid element, a full block has only valid ones.

use super::mask::Interval;

/// Blocks of columns that a tile visits. Of `start..end`, those in `full_start..full_end` are full; the others are
/// masked. They are ordered: start ≤ full_start ≤ full_end ≤ end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    pub start: u32,
    pub full_start: u32,
    pub full_end: u32,
    pub end: u32,
}

impl Blocks {
    /// Computes the blocks of `size` columns from the intervals of the tile's first and last row. Neither starts nor
    /// ends fall from row to row, so the intervals of all rows lie between the first start and the last end. If all
    /// intervals are empty, some blocks may be visited for nothing, wholly masked.
    #[inline(always)]
    pub fn new(first: Interval, last: Interval, size: u32) -> Self {
        // The selection comes before the division, so that LLVM makes no branch of it.
        let end = (if first.start < last.end { last.end } else { 0 }).div_ceil(size);
        let start = (first.start / size).min(end);
        let full_start = last.start.div_ceil(size).max(start).min(end);
        let full_end = (first.end / size).max(full_start).min(end);
        Blocks { start, full_start, full_end, end }
    }
    /// Returns the number of blocks.
    #[inline(always)]
    pub fn count(&self) -> u32 {
        self.end - self.start
    }
}
