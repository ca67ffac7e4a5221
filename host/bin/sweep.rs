//! Many steps of which any may be the last: Ctrl-C and errors end a sweep, and what was done before is kept.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use ferroflash::Result;

/// Exit code of a process that Ctrl-C ended.
pub const EXIT_INTERRUPTED: u8 = 130;

/// Set by the first Ctrl-C; a second one ends the process at once.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Whether the user has asked to stop.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// From now on, Ctrl-C asks to stop.
pub fn catch_interrupts() {
    let on_interrupt = || {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(EXIT_INTERRUPTED.into());
        }
    };
    if let Err(error) = ctrlc::set_handler(on_interrupt) {
        eprintln!("warning: Ctrl-C will lose what was measured: {error}");
    }
}

/// What a sweep got done, and the error that ended it early, if one did.
pub struct Swept<T> {
    pub done: Vec<T>,
    pub ended: Result<()>,
}

/// Takes a step for every item, until the last, an error or Ctrl-C; `name` says what an item is, on the progress bar
/// and beside an error.
pub fn sweep<I, T>(items: &[I], name: impl Fn(&I) -> String, mut step: impl FnMut(&I) -> Result<T>) -> Swept<T> {
    let bar = progress(items.len());
    let mut swept = Swept { done: Vec::new(), ended: Ok(()) };
    for item in items {
        if interrupted() {
            break;
        }
        bar.set_message(name(item));
        match step(item) {
            Ok(result) => swept.done.push(result),
            Err(error) => {
                bar.suspend(|| eprintln!("stopped at {}", name(item)));
                swept.ended = Err(error);
                break;
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    swept
}

/// The rest of a step, which any thread may do.
pub type Rest<T> = Box<dyn FnOnce() -> Result<T> + Send>;

/// Items whose rest is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InFlight {
    pub items: usize,
    pub bytes: u128,
}

/// Does a sweep whose steps have a second part. `launch` takes the first part of every item on this thread, one after
/// the other; the rest of several is done at the same time, on rayon's threads. Another item is launched when what is
/// under way and the item together stay within `at_most`, or when nothing is under way; `bytes` says what an item
/// takes. After Ctrl-C or an error what is under way is finished. Results have the order of the items, and end before
/// the first item that failed.
pub fn sweep_in_flight<I, T: Send>(
    items: &[I],
    name: impl Fn(&I) -> String,
    at_most: InFlight,
    bytes: impl Fn(&I) -> u128,
    mut launch: impl FnMut(&I) -> Result<Rest<T>>,
) -> Swept<T> {
    let bar = progress(items.len());
    let mut results: Vec<Option<Result<T>>> = Vec::new();
    let (sender, finished) = mpsc::channel::<(usize, std::thread::Result<Result<T>>)>();
    rayon::in_place_scope(|scope| {
        let mut now = InFlight { items: 0, bytes: 0 };
        let mut failed = false;
        // Waits for one item. The channel has a sender as long as something is under way.
        let finish_one = |now: &mut InFlight, results: &mut Vec<Option<Result<T>>>| {
            let Ok((at, result)) = finished.recv() else { return false };
            *now = InFlight { items: now.items - 1, bytes: now.bytes - bytes(&items[at]) };
            bar.inc(1);
            let result = result.unwrap_or_else(|panic| resume_unwind(panic));
            let ok = Result::is_ok(&result);
            results[at] = Some(result);
            ok
        };
        for (at, item) in items.iter().enumerate() {
            let fits = |now: InFlight| now.items < at_most.items && now.bytes + bytes(item) <= at_most.bytes;
            while !failed && now.items > 0 && !fits(now) {
                failed = !finish_one(&mut now, &mut results);
            }
            if failed || interrupted() {
                break;
            }
            bar.set_message(name(item));
            match launch(item) {
                Ok(rest) => {
                    results.push(None);
                    now = InFlight { items: now.items + 1, bytes: now.bytes + bytes(item) };
                    let sender = sender.clone();
                    // The receiver lives longer than the scope. It gets a panic too, instead of waiting for ever.
                    scope.spawn(move |_| drop(sender.send((at, catch_unwind(AssertUnwindSafe(rest))))));
                }
                Err(error) => {
                    results.push(Some(Err(error)));
                    break;
                }
            }
        }
        while now.items > 0 {
            finish_one(&mut now, &mut results);
        }
    });
    let mut swept = Swept { done: Vec::new(), ended: Ok(()) };
    for (item, result) in items.iter().zip(results.into_iter().flatten()) {
        match result {
            Ok(result) => swept.done.push(result),
            Err(error) => {
                bar.suspend(|| eprintln!("stopped at {}", name(item)));
                swept.ended = Err(error);
                break;
            }
        }
    }
    bar.finish_and_clear();
    swept
}

/// A progress bar on standard error, hidden where that is no terminal.
fn progress(steps: usize) -> indicatif::ProgressBar {
    let style = indicatif::ProgressStyle::with_template("{bar:30} {pos}/{len} {wide_msg} {eta}");
    let bar = indicatif::ProgressBar::new(steps as u64);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    use ferroflash::Error;

    use super::*;

    /// Launches items that take shorter the later they are. An item at `failing` fails, in its first part or its rest.
    fn swept(at_most: InFlight, failing: usize, in_first: bool) -> (Swept<usize>, usize) {
        let items: Vec<usize> = (0..20).collect();
        let (under_way, most) = (std::sync::Arc::new(AtomicUsize::new(0)), std::cell::Cell::new(0));
        let error = || Error::NoDevice { reason: "a test".to_owned() };
        let launch = |&item: &usize| -> Result<Rest<usize>> {
            if in_first && item == failing {
                return Err(error());
            }
            most.set(most.get().max(1 + under_way.fetch_add(1, Ordering::SeqCst)));
            let under_way = under_way.clone();
            Ok(Box::new(move || {
                std::thread::sleep(Duration::from_millis((20 - item as u64) / 4));
                under_way.fetch_sub(1, Ordering::SeqCst);
                if item == failing { Err(error()) } else { Ok(item) }
            }))
        };
        let swept = sweep_in_flight(&items, usize::to_string, at_most, |_| 10, launch);
        assert_eq!(under_way.load(Ordering::SeqCst), 0);
        (swept, most.get())
    }

    #[test]
    fn results_have_the_order_of_the_items() {
        for (at_most, bound) in [
            (InFlight { items: 5, bytes: 1000 }, 5),
            (InFlight { items: 5, bytes: 20 }, 2),
            (InFlight { items: 5, bytes: 0 }, 1),
            (InFlight { items: 0, bytes: 1000 }, 1),
        ] {
            let (swept, most) = swept(at_most, usize::MAX, false);
            assert_eq!((swept.done, swept.ended), ((0..20).collect(), Ok(())));
            assert!((1..=bound).contains(&most), "{at_most:?}: {most}");
        }
    }

    #[test]
    fn an_error_ends_the_sweep_and_keeps_what_was_before() {
        for in_first in [true, false] {
            let (swept, _) = swept(InFlight { items: 4, bytes: 1000 }, 7, in_first);
            assert_eq!(swept.done, (0..7).collect::<Vec<_>>());
            assert!(swept.ended.is_err());
        }
    }
}
