//! Many steps of which any may be the last: Ctrl-C and errors end a sweep, and what was done before is kept.

use std::sync::atomic::{AtomicBool, Ordering};

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

/// A progress bar on standard error, hidden where that is no terminal.
fn progress(steps: usize) -> indicatif::ProgressBar {
    let style = indicatif::ProgressStyle::with_template("{bar:30} {pos}/{len} {wide_msg} {eta}");
    let bar = indicatif::ProgressBar::new(steps as u64);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
