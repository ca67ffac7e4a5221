//! The threads that run work tiles: as many as rayon's pool has, or one in a process that was forked from a process
//! with a pool.
//!
//! `fork` copies a process with the calling thread only. In the child rayon still counts the threads of its pool, and
//! would wait for them forever. So the first process that uses the pool is recorded, and in any other process all work
//! tiles run on one thread. The results have the same bits.

use std::{
    any::Any,
    process,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    thread,
};

use rayon::prelude::*;

use crate::error::{Error, Result};

/// Number of CTAs per thread of the pool. There are enough for threads to steal the work that a causal mask leaves to
/// the end, and few enough for several work tiles to follow one another in a CTA, as on a GPU.
const CTAS_PER_THREAD: u32 = 8;

/// Process that the pool's threads belong to; 0 before the pool is used.
static OWNER: AtomicU32 = AtomicU32::new(0);

/// True if the pool's threads belong to another process and do not exist in this one.
fn is_forked() -> bool {
    let process = process::id();
    match OWNER.compare_exchange(0, process, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => false,
        Err(owner) => owner != process,
    }
}

/// Number of threads that run work tiles.
pub(super) fn threads() -> u32 {
    if is_forked() { 1 } else { u32::try_from(rayon::current_num_threads()).unwrap_or(u32::MAX) }
}

/// Number of CTAs for `work_tiles` work tiles.
pub(super) fn ctas(work_tiles: u32) -> u32 {
    work_tiles.min(threads().saturating_mul(CTAS_PER_THREAD))
}

/// Maximum stack size of a part of a kernel. Fragments are whole tiles here, and without optimisation every function
/// keeps its own copies of them.
const STACK_BYTES: usize = 32 << 20;

/// Calls `run(i)` for every i below `count`, in parallel if there are threads. A panic becomes an error that names the
/// kernel, and nothing starts after it.
///
/// Each thread of the pool that takes part waits for a helper thread with a large enough stack, which runs one i after
/// the other.
pub(super) fn for_each(symbol: &'static str, count: u32, run: impl Fn(u32) + Sync) -> Result<()> {
    let next = AtomicU64::new(0);
    let take = || u32::try_from(next.fetch_add(1, Ordering::Relaxed)).ok().filter(|i| *i < count);
    let runner = || {
        if next.load(Ordering::Relaxed) >= u64::from(count) {
            return Ok(());
        }
        let current = AtomicU32::new(0);
        let work = || {
            while let Some(i) = take() {
                current.store(i, Ordering::Relaxed);
                run(i);
            }
        };
        let fault = |message| Error::KernelFault { symbol, cta: current.load(Ordering::Relaxed), message };
        thread::scope(|scope| {
            let thread = thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, work);
            let thread = thread.map_err(|error| fault(format!("no thread could be started: {error}")))?;
            thread.join().map_err(|panic| {
                next.store(u64::from(count), Ordering::Relaxed);
                fault(message(&*panic))
            })
        })
    };
    if is_forked() {
        return runner();
    }
    (0..threads().min(count)).into_par_iter().with_max_len(1).try_for_each(|_| runner())
}

/// Returns the text of a panic.
fn message(panic: &(dyn Any + Send)) -> String {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => (*text).to_owned(),
        (_, Some(text)) => text.clone(),
        _ => "panicked without a message".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn every_index_once() {
        for count in [0, 1, 2, 100] {
            let runs: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            for_each("kernel", count, |i| _ = runs[i as usize].fetch_add(1, Ordering::Relaxed)).unwrap();
            assert!(runs.iter().all(|runs| runs.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn panics_become_errors() {
        let error = |run: fn()| match for_each("kernel", 9, |i| {
            if i == 7 {
                run()
            }
        }) {
            Err(Error::KernelFault { symbol: "kernel", cta: 7, message }) => message,
            other => panic!("{other:?}"),
        };
        assert_eq!(error(|| panic!("plain")), "plain");
        assert_eq!(error(|| panic!("stage {}", 3)), "stage 3");
        assert_eq!(error(|| std::panic::panic_any(1)), "panicked without a message");
    }
}
