//! Device time: what lies between two events of the default stream, where the safe calls run.

use std::time::Duration;

use super::Cuda;
use super::driver::Event;
use crate::error::Result;

impl Cuda {
    /// The device time of what `work` launches through this backend; waits until that has run.
    ///
    /// # Errors
    /// Those of `work`; [`Error::Driver`](crate::Error::Driver).
    pub fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        self.device.make_current()?;
        let interval = Interval::new()?;
        interval.around(work)?;
        interval.elapsed()
    }

    /// The device time of each of `runs` calls of `work`, before each of which `before` is called and not timed. What
    /// they launch follows one another without a wait on the host; waits at the end until all has run.
    ///
    /// # Errors
    /// Those of `before` and `work`; [`Error::Driver`](crate::Error::Driver).
    pub fn time_each(
        &self,
        runs: usize,
        mut before: impl FnMut() -> Result<()>,
        mut work: impl FnMut() -> Result<()>,
    ) -> Result<Vec<Duration>> {
        self.device.make_current()?;
        // All of them beforehand, so that the host is never behind the device.
        let intervals = (0..runs).map(|_| Interval::new()).collect::<Result<Vec<_>>>()?;
        for interval in &intervals {
            before()?;
            interval.around(&mut work)?;
        }
        intervals.iter().map(Interval::elapsed).collect()
    }
}

/// Two events, with what is timed between them.
struct Interval {
    start: Event,
    stop: Event,
}

impl Interval {
    /// The context in which it will be recorded is current.
    fn new() -> Result<Self> {
        Ok(Interval { start: Event::new()?, stop: Event::new()? })
    }

    fn around(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.start.record()?;
        work()?;
        self.stop.record()
    }

    /// Waits until the device has come to its end.
    fn elapsed(&self) -> Result<Duration> {
        self.stop.elapsed_since(&self.start)
    }
}
