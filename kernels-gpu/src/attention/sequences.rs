//! Where the rows of each batch item lie: in a dense batch, or in one tensor of sequences of different lengths.
//!
//! Lengths are in device memory, because the host may not know them. A small kernel ([`super::schedule`]) turns them
//! into a table, which has the rows of each item, and into lists of work tiles. All lengths in the table are within the
//! tensors, and no two items share a row, whatever the lengths in memory are.
//!
//! Rows that belong to no sequence are items too: gaps, which have queries without keys or keys without queries. So
//! results and gradients are defined in all rows.

#[cfg(not(target_arch = "nvptx64"))]
use core::mem::offset_of;

use crate::arch::constant::Constant;
use crate::arch::table;
#[cfg(not(target_arch = "nvptx64"))]
use crate::ground::constants::ConstantPlace;
use crate::ground::constants::Constants;
use crate::ground::sequence::{BatchItem, Span};
use crate::ground::shape::Shape;

/// Multiple to which the query rows of an item are padded in the backward pass's workspace: the largest block_m.
pub const ROW_PADDING: u32 = 128;

/// Rows of all batch items, as kernels find them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequences {
    /// Address of the table, u32 (items, 4): end and length of an item's queries, end and length of its keys. Read if
    /// lengths differ; 0 in a dense batch.
    table: u64,
    is_table: Constant<{ Constants::LENGTHS }>,
    /// Number of sequences. Gaps are the items from this one on.
    sequences: u32,
}

impl Sequences {
    /// Rows of a dense batch.
    pub const DENSE: Sequences = Sequences { table: 0, is_table: Constant::new(false), sequences: 0 };
    /// Bytes of an item in the table.
    pub const ITEM_BYTES: u64 = 16;

    /// Places of its specialisation constants, from its own start.
    #[cfg(not(target_arch = "nvptx64"))]
    pub const CONSTANTS: &'static [ConstantPlace] =
        &[ConstantPlace { bit: Constants::LENGTHS, offset: offset_of!(Sequences, is_table) as u32 }];

    /// Makes those of a table of `sequences` sequences and their gaps.
    pub const fn of_table(table: u64, sequences: u32) -> Self {
        Sequences { table, is_table: Constant::new(true), sequences }
    }
    /// Returns the number of items of a table: sequences, and a gap of queries and one of keys before each of them and
    /// at the end.
    pub const fn items(sequences: u64) -> u64 {
        3 * sequences + 2
    }

    /// Returns the number of sequences of a table.
    #[inline(always)]
    pub fn count(&self) -> u32 {
        self.sequences
    }
    /// True if lengths differ. Kernels with specialisation constants decide it when they are built.
    #[inline(always)]
    pub fn differ(&self) -> bool {
        self.is_table.get()
    }
    /// True if lengths differ, for kernels without specialisation constants.
    #[inline(always)]
    pub fn is_listed(&self) -> bool {
        self.table != 0
    }

    /// Returns the rows of a batch item.
    #[inline(always)]
    pub fn item(&self, shape: &Shape, batch: u32) -> BatchItem {
        self.choose(self.differ(), shape, batch)
    }
    /// Returns the rows of a batch item as [`Sequences::item`] does, with a branch in the place of a predicate. ptxas
    /// takes the warps of some forward kernels for diverged without it, and a backward kernel spills with it (measured,
    /// cause unknown).
    #[inline(always)]
    pub fn item_by_branch(&self, shape: &Shape, batch: u32) -> BatchItem {
        if self.differ() {
            // SAFETY: as in `choose`.
            let words = unsafe { table::read_four(self.table + Self::ITEM_BYTES * batch as u64) };
            let [q_end, q_len, k_end, k_len] = words;
            BatchItem { q: Span::ending(q_end, q_len, shape.seqlen_q), k: Span::ending(k_end, k_len, shape.seqlen_k) }
        } else {
            BatchItem { q: Span::dense(batch, shape.seqlen_q), k: Span::dense(batch, shape.seqlen_k) }
        }
    }
    /// Returns the rows of a batch item, for kernels without specialisation constants.
    #[inline(always)]
    pub fn listed_item(&self, shape: &Shape, batch: u32) -> BatchItem {
        self.choose(self.is_listed(), shape, batch)
    }

    #[inline(always)]
    fn choose(&self, differ: bool, shape: &Shape, batch: u32) -> BatchItem {
        let dense = [batch, shape.seqlen_q, batch, shape.seqlen_k];
        let address = self.table.wrapping_add(Self::ITEM_BYTES * batch as u64);
        // SAFETY: the host has made the table as large as the number of items, and the lists name only these.
        let [q_batch, q_len, k_batch, k_len] = unsafe { table::read_four_or(differ, address, dense) };
        // An item of a dense batch begins at row 0.
        let first = |rows: u32, len: u32| if differ { rows.wrapping_sub(len) } else { 0 };
        BatchItem {
            q: Span { batch: q_batch, first: first(shape.seqlen_q, q_len), len: q_len },
            k: Span { batch: k_batch, first: first(shape.seqlen_k, k_len), len: k_len },
        }
    }

    /// True if an item is a gap, for kernels without specialisation constants.
    #[inline(always)]
    pub fn is_gap(&self, batch: u32) -> bool {
        self.is_listed() && batch >= self.sequences
    }
}

/// Returns the first row of a sequence in the backward pass's workspace, where each begins at a multiple of
/// [`ROW_PADDING`]. `start` is its first row in the tensor. Rows of different sequences don't overlap, because a
/// sequence begins `ROW_PADDING` rows later for each one before it.
#[inline(always)]
pub fn padded_start(start: u32, sequence: u32) -> u32 {
    (start / ROW_PADDING + sequence) * ROW_PADDING
}

/// Returns the rows of a head in the workspace, for sequences in a tensor of `rows` rows.
pub const fn padded_rows(rows: u64, sequences: u64) -> u64 {
    (rows.div_ceil(ROW_PADDING as u64) + sequences) * ROW_PADDING as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padded_sequences_do_not_overlap() {
        let (mut start, mut end) = (0, 0);
        for (sequence, len) in [0, 1, 127, 128, 129, 0, 0, 5, 300, 1, 64, 200].into_iter().enumerate() {
            let first = padded_start(start, sequence as u32);
            assert!(first >= end && first.is_multiple_of(ROW_PADDING));
            end = first + u32::next_multiple_of(len, ROW_PADDING);
            start += len;
            assert!(u64::from(end) <= padded_rows(u64::from(start), sequence as u64 + 1));
        }
    }
}
