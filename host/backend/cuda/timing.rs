//! Device time: what lies between two events of the default stream, where the safe calls run.

use std::time::Duration;

use super::Cuda;
use super::driver::Event;
use crate::error::Result;

impl Cuda {
    /// The device time of what `work` launches through this backend.
    ///
    /// # Errors
    /// Those of `work`; [`Error::Driver`](crate::Error::Driver).
    pub fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        self.device.make_current()?;
        let (start, stop) = (Event::new()?, Event::new()?);
        start.record()?;
        work()?;
        stop.record()?;
        stop.elapsed_since(&start)
    }
}
