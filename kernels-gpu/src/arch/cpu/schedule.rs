//! The schedule of sequences of different lengths, on the CPU: the steps of the GPU, one thread after the other.

use core::cell::Cell;
use std::vec;
use std::vec::Vec;

use super::memory;
use crate::attention::schedule::steps::{Memory, SHARED_WORDS, Thread};
use crate::attention::schedule::{SCHEDULE_THREADS, ScheduleParams};

/// Word of a CTA's shared memory, and the threads that have accessed it since the last barrier.
#[derive(Clone, Copy, Default)]
struct Word {
    value: u32,
    step: u32,
    access: Access,
}

/// Accesses to a word in one step.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Access {
    #[default]
    None,
    /// One thread has read it.
    Read(u32),
    /// Several threads have read it.
    Shared,
    /// One thread has written it.
    Written(u32),
}

/// Memory of one thread of a CTA in one step. Checks that no thread accesses a word that another one writes in the same
/// step: on a GPU there is no order between them.
#[derive(Clone, Copy)]
struct CtaMemory<'a> {
    words: &'a [Cell<Word>],
    step: &'a Cell<u32>,
    thread: u32,
}

impl CtaMemory<'_> {
    /// Returns a word with the accesses of the current step.
    fn word(&self, word: u32) -> Word {
        let found = self.words[word as usize].get();
        let step = self.step.get();
        if found.step == step { found } else { Word { step, access: Access::None, ..found } }
    }
}

impl Memory for CtaMemory<'_> {
    fn read(self, address: u64) -> i32 {
        // SAFETY: the promise of the caller of `schedule`.
        unsafe { memory::read_f32(address, 0) }.to_bits() as i32
    }
    fn write_four(self, address: u64, words: [u32; 4]) {
        write(address, &words);
    }
    fn write_two(self, address: u64, words: [u32; 2]) {
        write(address, &words);
    }
    fn get(self, word: u32) -> u32 {
        let found = self.word(word);
        let access = match found.access {
            Access::None => Access::Read(self.thread),
            Access::Read(thread) if thread != self.thread => Access::Shared,
            Access::Written(thread) if thread != self.thread => panic!("threads race for word {word} of the schedule"),
            same => same,
        };
        self.words[word as usize].set(Word { access, ..found });
        found.value
    }
    fn set(self, word: u32, value: u32) {
        let (found, thread) = (self.word(word), self.thread);
        let own = [Access::None, Access::Read(thread), Access::Written(thread)];
        assert!(own.contains(&found.access), "threads race for word {word} of the schedule");
        self.words[word as usize].set(Word { value, access: Access::Written(thread), ..found });
    }
}

fn write(address: u64, words: &[u32]) {
    for (index, word) in words.iter().enumerate() {
        // SAFETY: the promise of the caller of `schedule`.
        unsafe { memory::write_f32(address, index, f32::from_bits(*word)) };
    }
}

/// Writes the schedule of sequences of different lengths, one list for each of the first `lists`.
///
/// # Panics
/// If two threads of a CTA access the same word of shared memory in a step, and one of them writes.
///
/// # Safety
/// `p` describes lengths that are valid for reading, and a table and lists that are valid for writing, as large as
/// [`Sequences::items`](crate::attention::sequences::Sequences::items) and
/// [`List::most_blocks`](crate::attention::schedule::List::most_blocks) say, which nothing else accesses.
pub unsafe fn schedule(p: &ScheduleParams, lists: usize) {
    for cta in 0..lists.max(1) {
        let (words, step) = (vec![Cell::<Word>::default(); SHARED_WORDS as usize], Cell::new(1));
        let memory = |thread| CtaMemory { words: &words, step: &step, thread };
        let mut threads: Vec<_> = (0..SCHEDULE_THREADS).map(|thread| Thread::new(p, thread, memory(thread))).collect();
        let sync = || step.set(step.get() + 1);
        threads.iter().for_each(Thread::store_reach);
        sync();
        threads.iter_mut().for_each(Thread::load_taken);
        if cta == 0 {
            threads.iter().for_each(Thread::write_table);
        }
        if let Some(list) = p.lists[..lists].get(cta) {
            threads.iter().for_each(|thread| thread.count(list));
            sync();
            threads.iter().for_each(Thread::sum);
            sync();
            let blocks: Vec<u32> = threads.iter().map(Thread::place).collect();
            sync();
            threads.iter().for_each(|thread| thread.write_list(list));
            for (thread, blocks) in threads.iter().zip(blocks).filter(|(thread, _)| thread.is_first()) {
                thread.write_header(list, blocks);
            }
        }
    }
}

#[cfg(test)]
mod tests;
