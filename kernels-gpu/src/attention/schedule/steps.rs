//! The steps in which the threads of one CTA compute the schedule. Both machines run them: on a GPU a barrier follows
//! each step, on the CPU one thread runs after the other.

use crate::attention::schedule::{
    BUCKETS, Given, List, ListHeader, ListParams, RowRange, SCHEDULE_THREADS, ScheduleParams, Side, blocks, bucket,
    gap_of_keys, gap_of_queries,
};
use crate::attention::sequences::Sequences;
use crate::ground::sequence::{BatchItem, Span};

/// Memory as one thread of the CTA accesses it.
pub trait Memory: Copy {
    /// Reads an i32 of the lengths.
    fn read(self, address: u64) -> i32;
    /// Writes an item of the table, or half of a list's header.
    fn write_four(self, address: u64, words: [u32; 4]);
    /// Writes a block of a list.
    fn write_two(self, address: u64, words: [u32; 2]);
    /// Returns a word of the CTA's shared memory, one of [`SHARED_WORDS`].
    fn get(self, word: u32) -> u32;
    /// Sets a word of the CTA's shared memory.
    fn set(self, word: u32, x: u32);
}

// Rows of words in shared memory, with a word of each thread. The first are the buckets' numbers of blocks; after them
// come the largest rows that a thread's queries and keys reach, and a thread's sum.
const REACH_Q: u32 = BUCKETS;
const REACH_K: u32 = BUCKETS + 1;
const SUM: u32 = BUCKETS + 2;
const ROWS: u32 = BUCKETS + 3;

/// Number of words of a CTA's shared memory.
pub const SHARED_WORDS: u32 = word(ROWS, 0);

// The counts that a thread sums are consecutive, and of one bucket.
const _: () = assert!(SCHEDULE_THREADS.is_multiple_of(BUCKETS));

/// Returns the place of a row's word. One word in 33 is unused, because then threads that read [`BUCKETS`] consecutive
/// words each, all at the same time, find them in different banks.
#[inline(always)]
const fn word(row: u32, thread: u32) -> u32 {
    let index = row * SCHEDULE_THREADS + thread;
    index + index / 32
}

/// One thread of the CTA. It has the sequences `start..end`, of which the one after the last is the end of the tensors,
/// before which there is a gap.
pub struct Thread<'a, M> {
    p: &'a ScheduleParams,
    memory: M,
    thread: u32,
    start: u32,
    end: u32,
    /// Rows that the sequences before reach.
    taken_q: u32,
    taken_k: u32,
}

impl<'a, M: Memory> Thread<'a, M> {
    #[inline(always)]
    pub fn new(p: &'a ScheduleParams, thread: u32, memory: M) -> Self {
        let ends = p.sequences + 1;
        let each = ends.div_ceil(SCHEDULE_THREADS);
        let start = (thread * each).min(ends);
        Thread { p, memory, thread, start, end: (start + each).min(ends), taken_q: 0, taken_k: 0 }
    }

    /// True for the first thread of the CTA.
    #[inline(always)]
    pub fn is_first(&self) -> bool {
        self.thread == 0
    }

    /// Stores the largest rows that its sequences reach.
    #[inline(always)]
    pub fn store_reach(&self) {
        let (mut reach_q, mut reach_k) = (0, 0);
        for sequence in self.start..self.end.min(self.p.sequences) {
            reach_q = reach_q.max(self.given(&self.p.q, sequence).reach(self.p.q.rows));
            reach_k = reach_k.max(self.given(&self.p.k, sequence).reach(self.p.k.rows));
        }
        self.memory.set(word(REACH_Q, self.thread), reach_q);
        self.memory.set(word(REACH_K, self.thread), reach_k);
    }
    /// Loads the largest rows that the sequences of all threads before reach.
    #[inline(always)]
    pub fn load_taken(&mut self) {
        // Loads don't wait for each other if their number is constant.
        for other in 0..SCHEDULE_THREADS {
            let reach = [REACH_Q, REACH_K].map(|row| self.memory.get(word(row, other)));
            let [reach_q, reach_k] = if other < self.thread { reach } else { [0; 2] };
            (self.taken_q, self.taken_k) = (self.taken_q.max(reach_q), self.taken_k.max(reach_k));
        }
    }

    /// Writes its items of the table.
    #[inline(always)]
    pub fn write_table(&self) {
        self.for_each(|index, BatchItem { q, k }| {
            let address = self.p.table + Sequences::ITEM_BYTES * index as u64;
            self.memory.write_four(address, [q.batch, q.len, k.batch, k.len]);
        });
    }

    /// Counts the blocks of its items in each bucket.
    #[inline(always)]
    pub fn count(&self, list: &ListParams) {
        for bucket in 0..BUCKETS {
            self.memory.set(word(bucket, self.thread), 0);
        }
        self.for_each(|_, item| {
            let (bucket, blocks) = bucket_and_blocks(list, item);
            let count = word(bucket, self.thread);
            self.memory.set(count, self.memory.get(count) + blocks);
        });
    }
    /// Sums consecutive counts, which are those of several threads in one bucket.
    #[inline(always)]
    pub fn sum(&self) {
        let mut sum = 0;
        for place in 0..BUCKETS {
            sum += self.memory.get(self.summed(place));
        }
        self.memory.set(word(SUM, self.thread), sum);
    }
    /// Replaces these counts by the number of blocks before them in the list. Returns the number of all blocks.
    #[inline(always)]
    pub fn place(&self) -> u32 {
        let (mut before, mut all) = (0, 0);
        for other in 0..SCHEDULE_THREADS {
            let sum = self.memory.get(word(SUM, other));
            before += if other < self.thread { sum } else { 0 };
            all += sum;
        }
        for place in 0..BUCKETS {
            let place = self.summed(place);
            let count = self.memory.get(place);
            self.memory.set(place, before);
            before += count;
        }
        all
    }
    /// Returns the place of one of the counts that this thread sums.
    #[inline(always)]
    fn summed(&self, place: u32) -> u32 {
        word(0, self.thread * BUCKETS + place)
    }

    /// Writes the blocks of its items.
    #[inline(always)]
    pub fn write_list(&self, list: &ListParams) {
        self.for_each(|index, item| {
            let (bucket, blocks) = bucket_and_blocks(list, item);
            let place = word(bucket, self.thread);
            let first = self.memory.get(place);
            self.memory.set(place, first + blocks);
            for block in 0..blocks {
                self.memory.write_two(List(list.list).block_address(first + block), [index, block]);
            }
        });
    }
    /// Writes the header of a list of `blocks` blocks.
    #[inline(always)]
    pub fn write_header(&self, list: &ListParams, blocks: u32) {
        let [a, b, c, d, e, f, g, h] = ListHeader::new(blocks, list.heads, list.section).words();
        self.memory.write_four(list.list, [a, b, c, d]);
        self.memory.write_four(list.list + 16, [e, f, g, h]);
    }

    /// Calls `f` with each of its items and their numbers.
    #[inline(always)]
    fn for_each(&self, mut f: impl FnMut(u32, &BatchItem)) {
        let p = self.p;
        let (mut taken_q, mut taken_k) = (self.taken_q, self.taken_k);
        let span = |of: RowRange, side: &Side| Span::ending(of.end, of.count(), side.rows);
        let none = |side: &Side| Span::ending(0, 0, side.rows);
        for sequence in self.start..self.end {
            let (q, k) = (self.given(&p.q, sequence), self.given(&p.k, sequence));
            let ((rows_q, gap_q), (rows_k, gap_k)) = (q.after(taken_q, p.q.rows), k.after(taken_k, p.k.rows));
            (taken_q, taken_k) = (taken_q.max(q.reach(p.q.rows)), taken_k.max(k.reach(p.k.rows)));
            f(gap_of_queries(p, sequence), &BatchItem { q: span(gap_q, &p.q), k: none(&p.k) });
            f(gap_of_keys(p, sequence), &BatchItem { q: none(&p.q), k: span(gap_k, &p.k) });
            if sequence < p.sequences {
                f(sequence, &BatchItem { q: span(rows_q, &p.q), k: span(rows_k, &p.k) });
            }
        }
    }

    /// Reads the numbers of a sequence, or returns the end of the tensor after the last one.
    #[inline(always)]
    fn given(&self, side: &Side, sequence: u32) -> Given {
        if sequence >= self.p.sequences {
            return Given::NONE;
        }
        let read = |address: u64| match address {
            0 => i32::MAX,
            _ => self.memory.read(address + 4 * sequence as u64),
        };
        Given { start: read(side.starts), end: read(side.ends), len: read(side.lengths) }
    }
}

/// Returns the bucket of an item's blocks in a list, and their number.
#[inline(always)]
fn bucket_and_blocks(list: &ListParams, item: &BatchItem) -> (u32, u32) {
    let (rows, cost) = list.rows_and_cost(item);
    (bucket(cost), blocks(rows, list.block))
}
