//! The kernel that writes the schedule of sequences of different lengths ([`crate::attention::schedule`]).

use core::arch::asm;
use core::arch::nvptx::{_block_idx_x, _thread_idx_x};

use super::cta::smem_base;
use super::named_barrier::RowBarrier;
use super::store::{store_8_bytes, store_16_bytes};
use crate::attention::schedule::steps::{Memory, Thread};
use crate::attention::schedule::{ListParams, SCHEDULE_THREADS, ScheduleParams};

/// Memory of the GPU: the first byte of the CTA's shared memory.
#[derive(Clone, Copy)]
struct CtaMemory(u32);

impl Memory for CtaMemory {
    #[inline(always)]
    fn read(self, address: u64) -> i32 {
        let x: i32;
        // SAFETY: I5, the host has checked the arrays of lengths.
        unsafe { asm!("ld.global.s32 {0}, [{1}];", out(reg32) x, in(reg64) address, options(nostack)) }
        x
    }
    #[inline(always)]
    fn write_four(self, address: u64, words: [u32; 4]) {
        // SAFETY: I5, the table has as many items, and a list has a header; I6, no other thread writes this.
        unsafe { store_16_bytes(true, address, words) }
    }
    #[inline(always)]
    fn write_two(self, address: u64, words: [u32; 2]) {
        // SAFETY: I5, the list has room for all blocks; I6, no other thread writes this one.
        unsafe { store_8_bytes(address, words) }
    }
    #[inline(always)]
    fn get(self, word: u32) -> u32 {
        let x: u32;
        // SAFETY: the launch has shared memory for all words.
        unsafe { asm!("ld.shared.u32 {0}, [{1}];", out(reg32) x, in(reg32) self.0 + 4 * word, options(nostack)) }
        x
    }
    #[inline(always)]
    fn set(self, word: u32, x: u32) {
        // SAFETY: the launch has shared memory for all words; no other thread accesses this one in the same step.
        unsafe { asm!("st.shared.u32 [{0}], {1};", in(reg32) self.0 + 4 * word, in(reg32) x, options(nostack)) }
    }
}

/// Writes the list of one CTA, and in the first CTA the table.
#[inline(always)]
pub fn schedule(p: &ScheduleParams) {
    // SAFETY: reads special registers.
    let (thread, cta) = unsafe { (_thread_idx_x() as u32, _block_idx_x() as u32) };
    let mut thread = Thread::new(p, thread, CtaMemory(smem_base()));
    thread.store_reach();
    sync();
    thread.load_taken();
    // Reads of parameters by a number that is unknown would copy them to memory.
    if cta == 0 {
        thread.write_table();
        write_list(&thread, &p.lists[0]);
    } else {
        write_list(&thread, &p.lists[1]);
    }
}

#[inline(always)]
fn write_list(thread: &Thread<CtaMemory>, list: &ListParams) {
    thread.count(list);
    sync();
    thread.sum();
    sync();
    let blocks = thread.place();
    sync();
    thread.write_list(list);
    if thread.is_first() {
        thread.write_header(list, blocks);
    }
}

/// Waits until all threads have completed a step.
#[inline(always)]
fn sync() {
    RowBarrier::ScheduleStep.barrier().sync(SCHEDULE_THREADS);
}
