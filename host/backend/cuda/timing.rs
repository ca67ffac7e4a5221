//! Device time: what lies between two events of the backend's stream, where the safe calls run.

use std::time::Duration;

use super::Cuda;
use super::stream::{Event, Stream};
use crate::error::Result;

impl Cuda {
    /// The device time of what `work` launches through this backend; waits until that has run.
    ///
    /// # Errors
    /// Errors of `work`; [`Error::Driver`](crate::Error::Driver).
    pub fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        let _entered = self.device().enter()?;
        let interval = Interval::new(self)?;
        interval.around(work)?;
        interval.elapsed()
    }

    /// The device time of each of `runs` calls of `work`, before each of which `before` is called and not timed. What
    /// they launch follows one another without a wait on the host; waits at the end until all has run.
    ///
    /// # Errors
    /// Errors of `before` and `work`; [`Error::Driver`](crate::Error::Driver).
    pub fn time_each(
        &self,
        runs: usize,
        mut before: impl FnMut() -> Result<()>,
        mut work: impl FnMut() -> Result<()>,
    ) -> Result<Vec<Duration>> {
        let _entered = self.device().enter()?;
        // All of them beforehand, so that the host is never behind the device.
        let intervals = (0..runs).map(|_| Interval::new(self)).collect::<Result<Vec<_>>>()?;
        for interval in &intervals {
            before()?;
            interval.around(&mut work)?;
        }
        intervals.iter().map(Interval::elapsed).collect()
    }
}

/// Flags of an event that notes the time: none.
const TIMED: u32 = 0;

/// Two events, with what is timed between them.
struct Interval<'a> {
    stream: &'a Stream,
    start: Event<'a>,
    stop: Event<'a>,
}

impl<'a> Interval<'a> {
    /// On the backend's stream, whose context is current.
    fn new(cuda: &'a Cuda) -> Result<Self> {
        let event = || Event::new(cuda.device(), TIMED);
        Ok(Interval { stream: &cuda.stream, start: event()?, stop: event()? })
    }

    fn around(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.start.record(self.stream)?;
        work()?;
        self.stop.record(self.stream)
    }

    /// Waits until the device has come to its end.
    fn elapsed(&self) -> Result<Duration> {
        let milliseconds = self.stop.milliseconds_since(&self.start)?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds) / 1e3))
    }
}
