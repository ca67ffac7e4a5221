//! Streams and the order between them: a call sees the writes of other streams, and they see its writes.
//!
//! Every buffer belongs to the stream that it was allocated on. If the tensors of a call belong to other streams than
//! its own, the call waits for those by an event, and makes them wait for it afterwards, all on the device. So memory
//! is freed, in its own stream's order, after all uses of it (CUDA driver API, stream ordered memory allocator).

use std::ptr;
use std::sync::Arc;

use super::Device;
use super::driver::check;
use super::sys::{self, Handle};
use crate::error::{Error, Operand, Result};

/// A stream of a device's primary context.
pub(super) struct Stream {
    pub(super) device: Arc<Device>,
    handle: Handle,
    owner: Owner,
}

/// Owner of a stream, which destroys it.
enum Owner {
    /// The caller, or the driver for the default stream.
    Caller,
    /// This crate, when the last user is gone.
    Crate,
    /// Another crate's value, kept alive here.
    #[cfg(any(feature = "cust", feature = "cudarc"))]
    Kept { _owner: Box<dyn std::any::Any + Send + Sync> },
}

// SAFETY: a stream handle names an object of a context, not of a thread, because `caller` refuses the one handle that
// means another stream in each thread. The value that an owner keeps is `Send`.
unsafe impl Send for Stream {}
// SAFETY: the driver's calls on a stream are thread-safe. The value that an owner keeps is `Sync`.
unsafe impl Sync for Stream {}

impl Stream {
    /// Returns the device's default stream. It and other blocking streams wait for each other.
    pub(super) fn default_of(device: Arc<Device>) -> Self {
        Stream { device, handle: ptr::null_mut(), owner: Owner::Caller }
    }

    /// Creates a stream that waits for no other.
    pub(super) fn new(device: Arc<Device>) -> Result<Self> {
        let entered = device.enter()?;
        let mut handle = ptr::null_mut();
        // SAFETY: writes one handle.
        let code = unsafe { (device.calls().cuStreamCreate)(&mut handle, sys::STREAM_NON_BLOCKING) };
        check(device.calls(), "cuStreamCreate", code)?;
        drop(entered);
        Ok(Stream { device, handle, owner: Owner::Crate })
    }

    /// Wraps a stream of the caller's.
    ///
    /// # Errors
    /// [`Error::ThreadStream`], [`Error::WrongDevice`] for a stream of another context, [`Error::Driver`].
    ///
    /// # Safety
    /// The handle is a stream, and lives as long as this value and the memory that was allocated on it.
    pub(super) unsafe fn caller(device: Arc<Device>, handle: Handle) -> Result<Self> {
        let handle = match handle as usize {
            sys::STREAM_PER_THREAD => return Err(Error::ThreadStream),
            sys::STREAM_LEGACY => ptr::null_mut(),
            _ => handle,
        };
        if !handle.is_null() {
            let _entered = device.enter()?;
            let mut context = ptr::null_mut();
            // SAFETY: by this function's contract the handle is a stream; the call writes one handle.
            let code = unsafe { (device.calls().cuStreamGetCtx)(handle, &mut context) };
            check(device.calls(), "cuStreamGetCtx", code)?;
            if context != device.context.handle() {
                return Err(Error::WrongContext { device: device.ordinal });
            }
        }
        Ok(Stream { device, handle, owner: Owner::Caller })
    }

    /// Keeps `owner` for as long as the stream is used.
    #[cfg(any(feature = "cust", feature = "cudarc"))]
    pub(super) fn kept_by(self, owner: Box<dyn std::any::Any + Send + Sync>) -> Self {
        Stream { device: self.device.clone(), handle: self.handle, owner: Owner::Kept { _owner: owner } }
    }

    pub(super) fn handle(&self) -> Handle {
        self.handle
    }

    /// Waits, on the host, until all work of the stream has run. Its context is current.
    pub(super) fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream is live.
        let code = unsafe { (self.device.calls().cuStreamSynchronize)(self.handle) };
        check(self.device.calls(), "cuStreamSynchronize", code)
    }

    /// True if new work on the stream becomes part of a graph and does not run. Its context is current.
    pub(super) fn is_capturing(&self) -> Result<bool> {
        let mut status = 0;
        // SAFETY: the stream is live; writes one number.
        let code = unsafe { (self.device.calls().cuStreamIsCapturing)(self.handle, &mut status) };
        check(self.device.calls(), "cuStreamIsCapturing", code)?;
        Ok(status != 0)
    }

    /// Orders later work of this stream after the earlier work of the other. Their context is current.
    fn wait_for(&self, other: &Stream) -> Result<()> {
        let event = Event::new(&self.device, sys::EVENT_DISABLE_TIMING)?;
        event.record(other)?;
        // SAFETY: both are live; the driver keeps the parts of the event that it needs.
        let code = unsafe { (self.device.calls().cuStreamWaitEvent)(self.handle, event.handle, 0) };
        check(self.device.calls(), "cuStreamWaitEvent", code)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Owner::Crate = self.owner
            && let Ok(_entered) = self.device.enter()
        {
            // SAFETY: made by `new`, used no more. The driver lets the stream's work finish.
            let _ = unsafe { (self.device.calls().cuStreamDestroy_v2)(self.handle) };
        }
    }
}

/// Device and stream that memory belongs to. There is no stream if the caller is responsible for the memory's order.
#[derive(Clone, Copy)]
pub(super) struct Home<'a> {
    pub(super) ordinal: u32,
    pub(super) stream: Option<&'a Stream>,
}

impl std::fmt::Debug for Home<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "device {}, stream {:?}", self.ordinal, self.stream.map(Stream::handle))
    }
}

/// Streams that the tensors of one call belong to, except the call's own.
pub(super) struct Order<'a> {
    stream: &'a Stream,
    others: Vec<&'a Stream>,
}

impl<'a> Order<'a> {
    /// Returns the order of a call on `stream`, so far without other streams.
    pub(super) fn on(stream: &'a Stream) -> Self {
        Order { stream, others: Vec::new() }
    }

    /// Adds a tensor of the given device and stream.
    ///
    /// # Errors
    /// [`Error::WrongDevice`] for another device than the call's.
    pub(super) fn add(&mut self, operand: Operand, home: Home<'a>) -> Result<()> {
        if home.ordinal != self.stream.device.ordinal {
            return Err(Error::WrongDevice { operand, found: home.ordinal, expected: self.stream.device.ordinal });
        }
        if let Some(other) = home.stream
            && other.handle != self.stream.handle
            && !self.others.iter().any(|known| known.handle == other.handle)
        {
            self.others.push(other);
        }
        Ok(())
    }

    /// Runs `work`, which launches on the call's stream, after the other streams' earlier work and before their later
    /// work. The context is current.
    pub(super) fn run(self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.others.iter().try_for_each(|other| self.stream.wait_for(other))?;
        let worked = work();
        // Also after a failure, because some of the work may have been launched.
        let waited = self.others.iter().try_for_each(|other| other.wait_for(self.stream));
        worked.and(waited)
    }
}

/// A point in a stream's work.
pub(super) struct Event<'a> {
    device: &'a Device,
    handle: Handle,
}

impl<'a> Event<'a> {
    /// Creates an event. The device's context is current.
    pub(super) fn new(device: &'a Device, flags: u32) -> Result<Self> {
        let mut handle = ptr::null_mut();
        // SAFETY: writes one handle.
        check(device.calls(), "cuEventCreate", unsafe { (device.calls().cuEventCreate)(&mut handle, flags) })?;
        Ok(Event { device, handle })
    }

    /// Records the event after the stream's earlier work.
    pub(super) fn record(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both are live and of one context.
        let code = unsafe { (self.device.calls().cuEventRecord)(self.handle, stream.handle) };
        check(self.device.calls(), "cuEventRecord", code)
    }

    /// Waits for this event. Returns the device time since `start` in milliseconds, in steps of about half a
    /// microsecond.
    pub(super) fn milliseconds_since(&self, start: &Event<'_>) -> Result<f32> {
        let (calls, mut milliseconds) = (self.device.calls(), 0.0);
        // SAFETY: both handles are recorded events.
        unsafe {
            check(calls, "cuEventSynchronize", (calls.cuEventSynchronize)(self.handle))?;
            let code = (calls.cuEventElapsedTime)(&mut milliseconds, start.handle, self.handle);
            check(calls, "cuEventElapsedTime", code)?;
        }
        Ok(milliseconds)
    }
}

impl Drop for Event<'_> {
    fn drop(&mut self) {
        // An event is destroyed without a current context, because the driver knows its context. SAFETY: made by `new`,
        // used no more.
        let _ = unsafe { (self.device.calls().cuEventDestroy_v2)(self.handle) };
    }
}
