//! When a run is timed: after which warm-up, after what in the cache, and how often.

use std::time::{Duration, Instant};

use ferroflash::{Operand, Result};
use serde::Serialize;

use crate::machine::Timed;
use crate::sweep::interrupted;

/// Runs that a median is of, at least.
pub const FEWEST_RUNS: usize = 5;
/// Runs that are queued for one median, at most.
const MOST_RUNS: usize = 5000;
/// Runs that tell how many will fit the budget.
const ESTIMATED_RUNS: usize = 5;
/// A warm-up before runs with a cleared cache is this part of the budget.
const WARM_UP_PART: u32 = 3;
/// What a chip rests before runs with a cleared cache: what was measured before would weigh on its power limit.
const REST: Duration = Duration::from_millis(250);
/// Work that is queued at once: how long Ctrl-C waits at most, unless a single run is longer.
const QUEUED: Duration = Duration::from_millis(100);
/// Zeros that clear the L2 cache, several times what it holds.
const CLEARING_BYTES: usize = 256 << 20;
/// Runs of a warm-up as long as the measurement, at least.
const SUSTAINED_WARM_UP: usize = 2;

/// What runs find when they start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// None of their data in the L2 cache, and a chip that has warmed up for a short while. As
    /// `triton.testing.do_bench` measures, so figures can be held against those of others.
    L2Cleared,
    /// What the run before left in the cache, and a chip that has worked for as long as it will be measured: what it
    /// sustains under its power limit.
    Sustained,
}

/// How a problem is measured.
#[derive(Clone, Copy, Debug)]
pub struct Method {
    pub protocol: Protocol,
    /// How long the timed runs go on, all together.
    pub budget: Duration,
}

impl Method {
    /// The times of many runs; fewer than [`FEWEST_RUNS`] where Ctrl-C came before them.
    pub fn times<B: Timed>(&self, backend: &B, mut run: impl FnMut() -> Result<()>) -> Result<Vec<Duration>> {
        match self.protocol {
            Protocol::L2Cleared => {
                let mut cache = backend.allocate(Operand::Workspace, CLEARING_BYTES / size_of::<u32>())?;
                cleared(backend, &mut cache, &mut run, self.budget)
            }
            Protocol::Sustained => {
                run_for(backend, &mut run, SUSTAINED_WARM_UP, self.budget)?;
                run_for(backend, &mut run, FEWEST_RUNS, self.budget)
            }
        }
    }
}

/// Runs one after the other, each waited for.
fn run_for<B: Timed>(
    backend: &B,
    run: &mut impl FnMut() -> Result<()>,
    fewest: usize,
    budget: Duration,
) -> Result<Vec<Duration>> {
    let (start, mut times) = (Instant::now(), Vec::new());
    while (times.len() < fewest || start.elapsed() < budget) && !interrupted() {
        times.push(backend.time(&mut *run)?);
    }
    Ok(times)
}

/// Runs that are queued, zeros before each: the device is never idle, the host waits once for many.
fn cleared<B: Timed>(
    backend: &B,
    cache: &mut B::Buffer<u32>,
    run: &mut impl FnMut() -> Result<()>,
    budget: Duration,
) -> Result<Vec<Duration>> {
    // By itself, since it loads kernels.
    let first = backend.time(&mut *run)?;
    std::thread::sleep(REST);
    let runs = count(QUEUED, first).clamp(1, ESTIMATED_RUNS);
    let mut clear_and_run = || {
        backend.set_zero(cache)?;
        run()
    };
    let estimate = backend.time(|| (0..runs).try_for_each(|_| clear_and_run()))? / runs as u32;
    for runs in batches(count(budget / WARM_UP_PART, estimate), estimate) {
        backend.time(|| (0..runs).try_for_each(|_| run()))?;
    }
    let mut times = Vec::new();
    for runs in batches(count(budget, estimate).clamp(FEWEST_RUNS, MOST_RUNS), estimate) {
        times.extend(backend.time_each(runs, || backend.set_zero(cache), &mut *run)?);
    }
    Ok(times)
}

/// How many runs fit.
fn count(budget: Duration, run: Duration) -> usize {
    usize::try_from(budget.as_nanos() / run.as_nanos().max(1)).unwrap_or(usize::MAX)
}

/// `runs` in parts that are queued at once, until Ctrl-C.
fn batches(runs: usize, run: Duration) -> impl Iterator<Item = usize> {
    let most = count(QUEUED, run).max(1);
    (0..runs).step_by(most).map(move |done| most.min(runs - done)).take_while(|_| !interrupted())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use ferroflash::Cpu;

    use super::*;

    #[test]
    fn batches_are_all_runs_and_none_is_long() {
        let batches = |runs, ms| batches(runs, Duration::from_millis(ms)).collect::<Vec<_>>();
        assert!(batches(0, 1).is_empty());
        assert_eq!(batches(50, 1), [50]);
        assert_eq!(batches(250, 1), [100, 100, 50]);
        assert_eq!(batches(3, 700), [1, 1, 1]);
        assert_eq!(batches(5, 0), [5]);
    }

    #[test]
    fn as_many_runs_as_fit() {
        let count = |budget, run| count(Duration::from_millis(budget), Duration::from_millis(run));
        assert_eq!([count(150, 2), count(1, 2), count(0, 0)], [75, 0, 0]);
    }

    #[test]
    fn a_cleared_run_is_timed_without_the_clearing() {
        let ran = Cell::new(0);
        let mut run = || {
            ran.set(ran.get() + 1);
            std::thread::sleep(Duration::from_millis(2));
            Ok(())
        };
        let mut cache = vec![1; 1 << 10];
        let times = cleared(&Cpu, &mut cache, &mut run, Duration::from_millis(60)).unwrap();
        assert!((FEWEST_RUNS..=30).contains(&times.len()), "{}", times.len());
        assert!(times.iter().all(|time| time.as_millis() >= 2), "{times:?}");
        assert!(cache.iter().all(|&x| x == 0));
        // At least the first and one for the estimate come before.
        assert!(ran.get() >= times.len() + 2, "{} of {}", times.len(), ran.get());
    }

    #[test]
    fn no_budget_is_enough_for_a_median() {
        let times = cleared(&Cpu, &mut vec![1; 8], &mut || Ok(()), Duration::ZERO).unwrap();
        assert_eq!(times.len(), FEWEST_RUNS);
        let sustained = Method { protocol: Protocol::Sustained, budget: Duration::ZERO };
        assert_eq!(sustained.times(&Cpu, || Ok(())).unwrap().len(), FEWEST_RUNS);
    }

    #[test]
    fn names_in_the_json_file() {
        let names = [Protocol::L2Cleared, Protocol::Sustained].map(|protocol| serde_json::to_value(protocol).unwrap());
        assert_eq!(names, ["l2-cleared", "sustained"]);
    }
}
