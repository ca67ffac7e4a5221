//! The threads that work tiles run on: as many as rayon's pool has, or one in a process that was forked from one with a
//! pool.
//!
//! `fork` copies a process with the calling thread only. In the child rayon still counts the threads of its pool, and
//! would wait for them without end. So the process that first uses the pool is remembered, and in any other one all
//! work tiles run on one thread. The results are the same bits.

use std::{
    any::Any,
    process,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    thread,
};

use rayon::prelude::*;

use crate::error::{Error, Result};

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

/// Stack that a part of a kernel needs at most: fragments are whole tiles here, and without optimisation every function
/// keeps its own copies of them.
const STACK_BYTES: usize = 32 << 20;

/// `run(i)` for every i below `count`, in parallel if there are threads. A panic becomes an error that names the
/// kernel, and nothing starts after it.
///
/// Each thread of the pool that takes part waits for a thread with the stack for it, which takes one i after the other.
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

/// The text of a panic.
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
