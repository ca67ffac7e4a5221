//! Device time: the interval between two events of the backend's stream, where the safe calls run.

use std::time::Duration;

use super::Cuda;
use super::stream::{Event, Stream};
use crate::error::Result;

impl Cuda {
    /// Returns the device time of the launches of `work` through this backend. Waits until they have run.
    ///
    /// # Errors
    /// Errors of `work`; [`Error::Driver`](crate::Error::Driver).
    pub fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        let _entered = self.device().enter()?;
        let interval = Interval::new(self)?;
        interval.around(work)?;
        interval.elapsed()
    }

    /// Returns the device time of each of `runs` calls of `work`. Before each, `before` is called and not timed. Their
    /// launches follow one another without a wait on the host; at the end it waits until all have run.
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
        // All events are made beforehand, so that the host is never behind the device.
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

/// Two events around the timed work.
struct Interval<'a> {
    stream: &'a Stream,
    start: Event<'a>,
    stop: Event<'a>,
}

impl<'a> Interval<'a> {
    /// Creates the events on the backend's stream, whose context is current.
    fn new(cuda: &'a Cuda) -> Result<Self> {
        let event = || Event::new(cuda.device(), TIMED);
        Ok(Interval { stream: &cuda.stream, start: event()?, stop: event()? })
    }

    fn around(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.start.record(self.stream)?;
        work()?;
        self.stop.record(self.stream)
    }

    /// Waits until the device has reached the second event.
    fn elapsed(&self) -> Result<Duration> {
        let milliseconds = self.stop.milliseconds_since(&self.start)?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds) / 1e3))
    }
}
