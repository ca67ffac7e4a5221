//! The threads that work tiles run on: rayon's, or in a process that was forked from one which had them, the caller's
//! alone.
//!
//! `fork` copies a process with the calling thread only. In the child rayon still counts the threads of its pool, and
//! would wait for them without end. So the process that first uses the pool is remembered, and in any other one work
//! tiles run one after the other on the calling thread. The results are the same bits.

use std::{
    process,
    sync::atomic::{AtomicU32, Ordering},
};

use rayon::prelude::*;

use crate::error::Result;

/// CTAs for each thread of the pool: enough that threads can steal what a causal mask leaves to the end, few enough
/// that work tiles follow one another in a CTA as they do on a GPU.
const CTAS_PER_THREAD: u32 = 8;

/// The process whose threads the pool has; 0 before it is used.
static OWNER: AtomicU32 = AtomicU32::new(0);

/// True if the pool's threads are those of another process, and so gone.
fn is_forked() -> bool {
    let process = process::id();
    match OWNER.compare_exchange(0, process, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => false,
        Err(owner) => owner != process,
    }
}

/// Number of threads that work tiles run on.
pub(super) fn threads() -> u32 {
    if is_forked() { 1 } else { u32::try_from(rayon::current_num_threads()).unwrap_or(u32::MAX) }
}

/// Number of CTAs that share so many work tiles.
pub(super) fn ctas(work_tiles: u32) -> u32 {
    work_tiles.min(threads().saturating_mul(CTAS_PER_THREAD))
}

/// `run(i)` for every i below `count`, in parallel if there are threads; stops at the first error.
pub(super) fn for_each(count: u32, run: impl Fn(u32) -> Result<()> + Sync) -> Result<()> {
    if is_forked() {
        return (0..count).try_for_each(run);
    }
    (0..count).into_par_iter().with_max_len(1).try_for_each(&run)
}
