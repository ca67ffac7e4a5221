//! The schedule of sequences of different lengths: memory for their table and lists of work tiles, and the parameters
//! of the kernel that writes them.

use kernels_gpu::attention::schedule::{Blocks, List, ListParams, ScheduleParams, Side};
use kernels_gpu::attention::sequences::Sequences as Table;

use super::{MAX_WORK_TILES, WORKSPACE_ALIGNMENT};
use crate::error::Result;
use crate::lengths::{Integers, Lengths, Places, Sequences};
use crate::problem::{Problem, at_most};

/// List of blocks that a pass needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ListOf {
    pub(crate) blocks: Blocks,
    /// Number of rows of a block.
    pub(crate) block: u32,
    /// Number of heads, and of those in a section of the order of work tiles.
    pub(crate) heads: u32,
    pub(crate) section: u32,
}

/// Memory of a schedule, at offsets from the start of the workspace, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Schedule {
    sequences: u32,
    table: usize,
    lists: [(ListOf, usize); 2],
    /// Number of lists.
    pub(crate) count: u32,
    /// End of its memory.
    pub(crate) end: usize,
}

impl Schedule {
    /// Lays a schedule out from `start` on.
    ///
    /// # Errors
    /// [`Error::TooLarge`](crate::Error::TooLarge) for more bytes than memory can have, or 2³¹ work tiles or more.
    pub(super) fn new(problem: &Problem, sequences: &Sequences, lists: &[ListOf], start: usize) -> Result<Self> {
        let count = sequences.count as u64;
        let mut end = start as u128;
        let mut region = |bytes: u64| {
            let start = end;
            end = (start + bytes as u128).next_multiple_of(WORKSPACE_ALIGNMENT as u128);
            start as usize
        };
        let table = region(Table::items(count) * Table::ITEM_BYTES);
        let mut place = |list: &ListOf| -> Result<(ListOf, usize)> {
            let most = most_blocks(problem, sequences, list);
            at_most("work_tiles", most as u128 * list.heads as u128, MAX_WORK_TILES)?;
            Ok((*list, region(List::bytes(most))))
        };
        let first = place(&lists[0])?;
        let second = lists.get(1).map_or(Ok(first), &mut place)?;
        at_most("workspace_bytes", end, isize::MAX as u128)?;
        let (lists, count) = ([first, second], lists.len() as u32);
        Ok(Schedule { sequences: sequences.count as u32, table, lists, count, end: end as usize })
    }

    /// Returns the table in the workspace at `address`.
    pub(crate) fn sequences(&self, address: u64) -> Table {
        Table::of_table(address.wrapping_add(self.table as u64), self.sequences)
    }

    /// Returns the address of a list.
    pub(crate) fn list(&self, index: usize, address: u64) -> u64 {
        address.wrapping_add(self.lists[index].1 as u64)
    }

    /// Returns the number of items of the table: sequences and gaps.
    pub(crate) fn items(&self) -> u32 {
        Table::items(self.sequences as u64) as u32
    }

    /// Returns the parameters of the kernel that writes the schedule to the workspace at `address`.
    pub(crate) fn params(&self, problem: &Problem, lengths: &Lengths<u64>, address: u64) -> ScheduleParams {
        let list = |index: usize| {
            let (ListOf { blocks, block, heads, section }, _) = self.lists[index];
            ListParams { list: self.list(index, address), blocks, block, heads, section }
        };
        ScheduleParams {
            q: side(&lengths.q, problem.seqlen_q),
            k: side(&lengths.k, problem.seqlen_k),
            sequences: self.sequences,
            table: address.wrapping_add(self.table as u64),
            lists: [list(0), list(1)],
        }
    }
}

/// Returns the most blocks that a list may have.
pub(super) fn most_blocks(problem: &Problem, sequences: &Sequences, list: &ListOf) -> u64 {
    let rows = match list.blocks {
        Blocks::OfQueries => problem.seqlen_q,
        Blocks::OfKeys => problem.seqlen_k,
    };
    List::most_blocks(rows as u64, sequences.count as u64, list.block as u64)
}

fn side(places: &Places<u64>, rows: usize) -> Side {
    let (starts, ends, lengths) = match *places {
        Places::Cumulative(numbers) => (numbers, after(numbers), 0),
        Places::Used { cumulative, lengths } => (cumulative, after(cumulative), lengths.into_words()),
        Places::Slots { starts, lengths } => (starts, 0, lengths.into_words()),
    };
    Side { starts: starts.into_words(), ends, lengths, rows: rows as u32 }
}

/// Returns the address of the second number.
fn after(numbers: Integers<u64>) -> u64 {
    numbers.into_words().wrapping_add(size_of::<i32>() as u64)
}
