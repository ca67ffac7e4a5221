//! The schedule of sequences of different lengths: a table of their rows, and lists of work tiles from short to long.
//!
//! A CTA for each list computes it ahead of a pass, from lengths in device memory ([`steps`]). Each of its threads has
//! consecutive sequences:
//!
//! 1. It clamps their rows to the tensor, and to what the sequences before have left: the largest end of all sequences
//!    before is a running maximum.
//! 2. It counts the blocks of its sequences by their cost, in buckets.
//! 3. The sum over all buckets before, and over all threads before in the same bucket, is the place of a sequence's
//!    first block in the list. So the list is the same on every run.
//!
//! The order of work tiles runs from the last block of a list to the first, so long ones come first.

pub mod steps;

use crate::arch::table;
use crate::ground::divisor::Divisor;
use crate::ground::sequence::BatchItem;

/// Number of threads of the CTA.
pub const SCHEDULE_THREADS: u32 = 128;
/// Rows of the other side that count as one in the cost of a block.
const COST_ROWS: u32 = 64;
/// Number of buckets of costs. Two costs in a bucket differ by a factor of up to √2.
pub const BUCKETS: u32 = 32;

/// Lengths of all sequences on one side, queries or keys, in device memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Side {
    /// Address of the first row of each sequence, i32.
    pub starts: u64,
    /// Address of the row after the last one of each sequence, i32; 0 if lengths alone tell it.
    pub ends: u64,
    /// Address of the number of rows of each sequence, i32; 0 if `ends` alone tells it. With both, the smaller counts.
    pub lengths: u64,
    /// Number of rows of the tensor.
    pub rows: u32,
}

/// Side that the work tiles of a list are blocks of.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocks {
    OfQueries,
    OfKeys,
}

/// List of blocks that the schedule writes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListParams {
    /// Address of the list; see [`List`].
    pub list: u64,
    pub blocks: Blocks,
    /// Number of rows of a block.
    pub block: u32,
    /// Number of heads, and of those in a section of the order of work tiles.
    pub heads: u32,
    pub section: u32,
}

/// Parameters of the kernel that writes a schedule. It has a CTA for each list.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScheduleParams {
    pub q: Side,
    pub k: Side,
    pub sequences: u32,
    /// Address of the table; see [`Sequences`](super::sequences::Sequences).
    pub table: u64,
    pub lists: [ListParams; 2],
}

/// Name of that kernel.
pub const SCHEDULE: &str = "schedule";
/// Dynamic shared memory of its CTAs in bytes.
pub const SCHEDULE_SMEM_BYTES: u32 = 4 * steps::SHARED_WORDS;

/// Rows of one side, from `start` up to but not `end`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowRange {
    pub start: u32,
    pub end: u32,
}

impl RowRange {
    /// Returns their number.
    #[inline(always)]
    pub fn count(&self) -> u32 {
        self.end.saturating_sub(self.start)
    }
}

/// Numbers of a sequence on one side as they are in memory: start, end, length. Numbers that memory lacks are
/// `i32::MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Given {
    pub start: i32,
    pub end: i32,
    pub len: i32,
}

impl Given {
    /// Stands for the end of the tensor, after the last sequence.
    pub const NONE: Given = Given { start: i32::MAX, end: i32::MAX, len: 0 };

    /// Returns the rows, clamped to a tensor of `rows` rows.
    #[inline(always)]
    fn clamped(&self, rows: u32) -> RowRange {
        let within = |row: i32| (row.max(0) as u32).min(rows);
        let start = within(self.start);
        // Both are below 2³¹.
        let end = within(self.end).min(start + within(self.len));
        RowRange { start, end }
    }
    /// Returns the largest row that the sequence reaches, which no later sequence may begin before.
    #[inline(always)]
    pub fn reach(&self, rows: u32) -> u32 {
        let RowRange { start, end } = self.clamped(rows);
        start.max(end)
    }
    /// Returns the rows that are left for the sequence if those before it reach row `taken`, and the gap before it.
    #[inline(always)]
    pub fn after(&self, taken: u32, rows: u32) -> (RowRange, RowRange) {
        let RowRange { start, end } = self.clamped(rows);
        let start = start.max(taken);
        (RowRange { start, end: end.max(start) }, RowRange { start: taken, end: start })
    }
}

impl ListParams {
    /// Returns the number of an item's rows that the list has blocks of, and the cost of the longest block.
    #[inline(always)]
    pub fn rows_and_cost(&self, item: &BatchItem) -> (u32, u32) {
        let (rows, others) = match self.blocks {
            Blocks::OfQueries => (item.q.len, item.k.len),
            Blocks::OfKeys => (item.k.len, item.q.len),
        };
        (rows, others / COST_ROWS)
    }
}

/// Returns the item of the gap of queries before a sequence, or at the end.
#[inline(always)]
pub fn gap_of_queries(p: &ScheduleParams, sequence: u32) -> u32 {
    p.sequences + sequence
}
/// Returns the item of the gap of keys before a sequence, or at the end.
#[inline(always)]
pub fn gap_of_keys(p: &ScheduleParams, sequence: u32) -> u32 {
    2 * p.sequences + 1 + sequence
}

/// Returns the bucket of a cost: 0 for none, and otherwise one for each factor of √2.
#[inline(always)]
pub fn bucket(cost: u32) -> u32 {
    if cost < 2 {
        return cost;
    }
    let log = u32::BITS - 1 - cost.leading_zeros();
    (2 * log + (cost >> (log - 1) & 1)).min(BUCKETS - 1)
}

/// Returns the number of blocks of `block` rows.
#[inline(always)]
pub fn blocks(rows: u32, block: u32) -> u32 {
    // A block has rows; without this, the compiler would keep a panic for none.
    rows.div_ceil(block.max(1))
}

/// List of blocks in device memory: a header of eight u32, then two u32 for each block, its item and its number within
/// the item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct List(pub u64);

/// Header of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListHeader {
    /// Number of blocks.
    pub blocks: u32,
    /// Number of work tiles: blocks of all heads.
    pub tiles: u32,
    /// Number of work tiles of a full section.
    pub section_tiles: Divisor,
}

impl ListHeader {
    /// Makes the header of a list of `blocks` blocks.
    #[inline(always)]
    pub fn new(blocks: u32, heads: u32, section: u32) -> Self {
        ListHeader { blocks, tiles: blocks * heads, section_tiles: Divisor::new(blocks * section) }
    }
    /// Returns the header as it is in memory.
    #[inline(always)]
    pub fn words(&self) -> [u32; 8] {
        let [value, multiplier, shift] = self.section_tiles.words();
        [self.blocks, self.tiles, 0, 0, value, multiplier, shift, 0]
    }
}

impl List {
    /// Bytes of a list's header, and of a block in it.
    pub const HEADER_BYTES: u64 = 32;
    pub const BLOCK_BYTES: u64 = 8;

    /// Returns the bytes of a list of up to so many blocks.
    pub const fn bytes(most_blocks: u64) -> u64 {
        Self::HEADER_BYTES + Self::BLOCK_BYTES * most_blocks
    }
    /// Returns the most blocks that sequences of `rows` rows in all, and their gaps, can have.
    pub fn most_blocks(rows: u64, sequences: u64, block: u64) -> u64 {
        rows / block + rows.min(2 * sequences + 1)
    }

    /// Returns the number of work tiles.
    #[inline(always)]
    pub fn tiles(self) -> u32 {
        // SAFETY: the schedule has written the header.
        let [_, tiles, ..] = unsafe { table::read_four(self.0) };
        tiles
    }
    /// Returns the header.
    #[inline(always)]
    pub fn header(self) -> ListHeader {
        // SAFETY: the schedule has written the header.
        let ([blocks, tiles, ..], [value, multiplier, shift, _]) =
            unsafe { (table::read_four(self.0), table::read_four(self.0 + 16)) };
        ListHeader { blocks, tiles, section_tiles: Divisor::from_words([value, multiplier, shift]) }
    }
    /// Returns the address of a block.
    #[inline(always)]
    pub fn block_address(self, index: u32) -> u64 {
        self.0 + Self::HEADER_BYTES + Self::BLOCK_BYTES * index as u64
    }
    /// Returns the item of a block below the header's number of them, and its number within the item.
    #[inline(always)]
    pub fn block(self, index: u32) -> [u32; 2] {
        // SAFETY: the schedule has written the block.
        unsafe { table::read_two(self.block_address(index)) }
    }
}
