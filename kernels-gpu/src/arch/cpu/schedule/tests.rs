use core::cell::Cell;
use std::vec;
use std::vec::Vec;

use super::{CtaMemory, Word, schedule};
use crate::attention::schedule::steps::{SHARED_WORDS, Thread};
use crate::attention::schedule::{Blocks, List, ListParams, ScheduleParams, Side, bucket};
use crate::attention::sequences::Sequences;

/// Numbers that look random, the same on every run (SplitMix64).
struct Numbers(u64);

impl Numbers {
    /// Returns one from `from` up to but not `to`.
    fn next(&mut self, from: i64, to: i64) -> i64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        from + ((x ^ x >> 31) % (to - from) as u64) as i64
    }
}

/// What the numbers of a side are like.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// Sequences follow each other, with gaps if there is more than one row for each.
    Valid,
    /// Any numbers about the tensor.
    Near,
    /// Any numbers at all.
    Any,
}

/// Arrays that memory has of a side.
#[derive(Clone, Copy, Debug)]
enum Arrays {
    Ends,
    Lengths,
    Both,
}

/// Numbers of one side in memory.
struct Numbered {
    starts: Vec<i32>,
    ends: Vec<i32>,
    lengths: Vec<i32>,
    arrays: Arrays,
    rows: u32,
}

impl Numbered {
    fn draw(numbers: &mut Numbers, sequences: usize, kind: Kind) -> Self {
        let arrays = [Arrays::Ends, Arrays::Lengths, Arrays::Both][numbers.next(0, 3) as usize];
        let longest = [2, 10, 700][numbers.next(0, 3) as usize];
        let [mut starts, mut ends, mut lengths] = [const { Vec::new() }; 3];
        let mut row = 0;
        for _ in 0..sequences {
            let gap = if numbers.next(0, 3) == 0 { numbers.next(0, longest) } else { 0 };
            let len = if numbers.next(0, 4) == 0 { 0 } else { numbers.next(0, longest) };
            // With both arrays, there may be padding behind a sequence.
            let padding = if matches!(arrays, Arrays::Both) { numbers.next(0, 3) } else { 0 };
            starts.push((row + gap) as i32);
            lengths.push(len as i32);
            row += gap + len + padding;
            ends.push(row as i32);
        }
        let rows = (row + numbers.next(0, 2) * numbers.next(0, longest)) as u32;
        let range = match kind {
            Kind::Valid => 0..0,
            Kind::Near => -20..i64::from(rows) + 20,
            Kind::Any => i64::from(i32::MIN)..i64::from(i32::MAX) + 1,
        };
        for number in [&mut starts, &mut ends, &mut lengths].into_iter().flatten().filter(|_| !range.is_empty()) {
            if numbers.next(0, 3) == 0 {
                *number = numbers.next(range.start, range.end) as i32;
            }
        }
        Numbered { starts, ends, lengths, arrays, rows }
    }

    fn side(&self) -> Side {
        let [starts, ends, lengths] =
            [&self.starts, &self.ends, &self.lengths].map(|array| array.as_ptr().expose_provenance() as u64);
        let (ends, lengths) = match self.arrays {
            Arrays::Ends => (ends, 0),
            Arrays::Lengths => (0, lengths),
            Arrays::Both => (ends, lengths),
        };
        Side { starts, ends, lengths, rows: self.rows }
    }

    /// Returns start and end of the rows of a valid sequence.
    fn valid(&self, sequence: usize) -> (u32, u32) {
        let start = self.starts[sequence];
        let end = match self.arrays {
            Arrays::Ends => self.ends[sequence],
            _ => start + self.lengths[sequence],
        };
        (start as u32, end as u32)
    }
}

/// What the memory behind the table and the lists has.
const GUARD: u32 = 0x5afe_cafe;
/// Words of that memory.
const GUARDS: usize = 8;

/// Items and their lengths, as the table has them: end and length of the queries, end and length of the keys.
type Table = Vec<[u32; 4]>;

/// Checks that each row of a side is in one item, within the tensor. `at` is the place of the side's end in an item.
fn check_rows(table: &Table, at: usize, rows: u32) {
    let mut seen = vec![0; rows as usize];
    for item in table {
        let (end, len) = (item[at], item[at + 1]);
        assert!(len <= end && end <= rows || len == 0, "{item:?} of {rows} rows");
        seen[(end - len) as usize..end as usize].iter_mut().for_each(|seen| *seen += 1);
    }
    assert!(seen.iter().all(|&seen| seen == 1), "{seen:?}");
}

/// Checks a list's order and completeness. Returns the number of its blocks.
fn check_list(list: &ListParams, table: &Table) -> u32 {
    let header = List(list.list).header();
    let (rows, others) = match list.blocks {
        Blocks::OfQueries => (1, 3),
        Blocks::OfKeys => (3, 1),
    };
    let mut left: Vec<u32> = table.iter().map(|item| item[rows].div_ceil(list.block)).collect();
    assert_eq!(header.blocks, left.iter().sum::<u32>());
    let mut before = None;
    let mut least = 0;
    for index in 0..header.blocks {
        let [item, block] = List(list.list).block(index);
        left[item as usize] -= 1;
        if block > 0 {
            assert_eq!(before, Some([item, block - 1]), "blocks of an item are not consecutive");
        }
        let bucket = bucket(table[item as usize][others] / 64);
        assert!(bucket >= least, "a shorter block follows a longer one");
        (before, least) = (Some([item, block]), bucket);
    }
    assert!(left.iter().all(|&left| left == 0));
    assert_eq!((header.tiles, header.section_tiles.value), (header.blocks * list.heads, header.blocks * list.section));
    header.blocks
}

/// Computes a schedule and checks it.
fn check(numbers: &mut Numbers, sequences: usize, kinds: [Kind; 2]) {
    let sides = kinds.map(|kind| Numbered::draw(numbers, sequences, kind));
    let blocks = [Blocks::OfQueries, Blocks::OfKeys];
    let block = [0; 2].map(|_| [1, 64, 128, 176][numbers.next(0, 4) as usize]);
    let most = [0, 1].map(|i| List::most_blocks(sides[i].rows.into(), sequences as u64, block[i].into()) as usize);
    let items = Sequences::items(sequences as u64) as usize;
    let mut table = vec![GUARD; 4 * items + GUARDS];
    let mut lists = most.map(|most| vec![GUARD; List::bytes(most as u64) as usize / 4 + GUARDS]);
    let p = ScheduleParams {
        q: sides[0].side(),
        k: sides[1].side(),
        sequences: sequences as u32,
        table: table.as_mut_ptr().expose_provenance() as u64,
        lists: [0, 1].map(|i| {
            let list = lists[i].as_mut_ptr().expose_provenance() as u64;
            ListParams { list, blocks: blocks[i], block: block[i], heads: 6, section: 4 }
        }),
    };
    // SAFETY: the arrays have as many numbers, and the table and the lists are as large as they must be.
    unsafe { schedule(&p, 2) };

    let (written, behind) = table.split_at(4 * items);
    assert!(behind.iter().all(|&word| word == GUARD));
    let table: Table = written.as_chunks().0.to_vec();
    assert!(table[sequences..=2 * sequences].iter().all(|item| item[3] == 0), "a gap of queries has keys");
    assert!(table[2 * sequences + 1..].iter().all(|item| item[1] == 0), "a gap of keys has queries");
    for (side, at, kind) in [(&sides[0], 0, kinds[0]), (&sides[1], 2, kinds[1])] {
        check_rows(&table, at, side.rows);
        for sequence in (0..sequences).filter(|_| kind == Kind::Valid) {
            let [end, len] = [table[sequence][at], table[sequence][at + 1]];
            assert_eq!((end - len, end), side.valid(sequence), "sequence {sequence}");
        }
    }
    for ((list, words), most) in p.lists.iter().zip(&lists).zip(most) {
        assert!(check_list(list, &table) as usize <= most);
        assert!(words[words.len() - GUARDS..].iter().all(|&word| word == GUARD));
    }
}

#[test]
fn every_row_and_block_has_its_place() {
    let kinds = [Kind::Valid, Kind::Near, Kind::Any];
    let numbers = &mut Numbers(1);
    for sequences in [0, 1, 2, 3, 5, 20, 126, 127, 128, 129, 300, 1000] {
        for (q, k) in kinds.into_iter().flat_map(|q| kinds.map(|k| (q, k))) {
            for _ in 0..if sequences < 30 { 40 } else { 2 } {
                check(numbers, sequences, [q, k]);
            }
        }
    }
}

#[test]
fn a_tensor_without_rows_has_no_blocks() {
    let (mut table, mut list) = ([0; 20], [GUARD; 8]);
    let side =
        |starts: &[i32; 1]| Side { starts: starts.as_ptr().expose_provenance() as u64, ends: 0, lengths: 0, rows: 0 };
    let list_of = ListParams {
        list: list.as_mut_ptr().expose_provenance() as u64,
        blocks: Blocks::OfQueries,
        block: 128,
        heads: 1,
        section: 1,
    };
    let p = ScheduleParams {
        q: side(&[7]),
        k: side(&[-7]),
        sequences: 1,
        table: table.as_mut_ptr().expose_provenance() as u64,
        lists: [list_of; 2],
    };
    // SAFETY: there is room for five items, and for a list without blocks.
    unsafe { schedule(&p, 1) };
    assert_eq!((table, List(list_of.list).tiles()), ([0; 20], 0));
}

#[test]
#[should_panic(expected = "race")]
fn a_missing_barrier_is_found() {
    let side = Side { starts: 0, ends: 0, lengths: 0, rows: 100 };
    let list = ListParams { list: 0, blocks: Blocks::OfKeys, block: 64, heads: 1, section: 1 };
    let p = ScheduleParams { q: side, k: side, sequences: 0, table: 0, lists: [list; 2] };
    let (words, step) = (vec![Cell::<Word>::default(); SHARED_WORDS as usize], Cell::new(1));
    let threads = [0, 1].map(|thread| Thread::new(&p, thread, CtaMemory { words: &words, step: &step, thread }));
    threads.iter().for_each(|thread| thread.count(&list));
    threads.iter().for_each(Thread::sum);
}
