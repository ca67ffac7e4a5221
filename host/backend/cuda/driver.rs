//! The driver calls that `cust` does not wrap: each checks its result and gives an [`Error`] that names the call.

use std::ffi::{CStr, c_void};
use std::fmt::Write as _;
use std::mem::MaybeUninit;
use std::ptr;
use std::time::Duration;

use cust::error::CudaError;
use cust::sys;

use super::early_launch::EarlyLaunch;
use crate::error::{Error, Result};

/// What a failed driver call becomes.
pub(super) fn failed(call: &'static str) -> impl Fn(CudaError) -> Error {
    move |error| Error::Driver { call, message: words(error) }
}

/// What the driver says of an error, or its name: without a driver, `cust` can't even print one.
pub(super) fn words(error: CudaError) -> String {
    let mut text = String::new();
    match write!(text, "{error}") {
        Ok(()) => text,
        Err(_) => format!("{error:?}"),
    }
}

/// Nothing, or the error of `call`.
pub(super) fn check(call: &'static str, code: sys::CUresult) -> Result<()> {
    match code {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(Error::Driver { call, message: describe(code) }),
    }
}

/// The driver's own words for an error code.
fn describe(code: sys::CUresult) -> String {
    let mut text = ptr::null();
    // SAFETY: the driver writes the address of a static string, or null for a code that it does not know.
    let text = unsafe {
        let _ = sys::cuGetErrorString(code, &mut text);
        (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
    };
    text.unwrap_or_else(|| format!("{code:?}"))
}

/// Allocates device memory in the current context.
pub(super) fn allocate(bytes: usize) -> Result<u64> {
    let mut address = 0;
    // SAFETY: writes one address.
    check("cuMemAlloc", unsafe { sys::cuMemAlloc_v2(&mut address, bytes) })?;
    Ok(address)
}

/// Frees memory of [`allocate`].
///
/// # Safety
/// The address came from [`allocate`] in the current context and is used no more.
pub(super) unsafe fn free(address: u64) {
    // SAFETY: the caller's promise. An error here is one of an earlier launch, which has its own way to be reported.
    let _ = unsafe { sys::cuMemFree_v2(address) };
}

/// Copies host memory to the device and waits.
///
/// # Safety
/// As many bytes as `from` has are valid at `to`.
pub(super) unsafe fn copy_to_device(to: u64, from: &[u8]) -> Result<()> {
    // SAFETY: the caller's promise.
    check("cuMemcpyHtoD", unsafe { sys::cuMemcpyHtoD_v2(to, from.as_ptr().cast(), from.len()) })
}

/// Copies device memory to the host and waits.
///
/// # Safety
/// As many bytes as `to` has are valid at `from`.
pub(super) unsafe fn copy_to_host(to: &mut [MaybeUninit<u8>], from: u64) -> Result<()> {
    // SAFETY: the caller's promise.
    check("cuMemcpyDtoH", unsafe { sys::cuMemcpyDtoH_v2(to.as_mut_ptr().cast(), from, to.len()) })
}

/// Sets `words` 32-bit words to 0, on the stream; neither allocates nor waits.
///
/// # Safety
/// They are valid at `address`, a multiple of 4, until that has run; `stream` is a stream of the current context or null.
pub(super) unsafe fn zero_words(address: u64, words: usize, stream: sys::CUstream) -> Result<()> {
    // SAFETY: the caller's promise.
    check("cuMemsetD32Async", unsafe { sys::cuMemsetD32Async(address, 0, words, stream) })
}

/// A kernel, in the context it was loaded in.
#[derive(Clone, Copy)]
pub(super) struct Function {
    handle: sys::CUfunction,
    start: Start,
}

/// When a kernel starts.
#[derive(Clone, Copy)]
enum Start {
    /// After the one before it in the stream.
    After,
    /// After it, and once there is room for all CTAs at the same time.
    Together,
    /// Before it is complete.
    Early(EarlyLaunch),
}

// SAFETY: a function handle is a name for something in a context, not in a thread; the driver takes it from any.
unsafe impl Send for Function {}
// SAFETY: as above; the driver's calls on it are thread-safe.
unsafe impl Sync for Function {}

impl Function {
    pub(super) fn new(handle: sys::CUfunction) -> Self {
        Function { handle, start: Start::After }
    }

    /// As a kernel whose CTAs wait for each other: it starts once there is room for all of them at the same time.
    pub(super) fn cooperative(self) -> Self {
        Function { start: Start::Together, ..self }
    }

    /// As a kernel that waits by itself for what it needs of the one before it in the stream, and may start before that is
    /// complete, as far as it and the driver allow.
    pub(super) fn early(self, launch: Option<EarlyLaunch>) -> Self {
        Function { start: launch.map_or(Start::After, Start::Early), ..self }
    }

    /// Lets the kernel have `bytes` of dynamic shared memory.
    pub(super) fn set_shared_memory(self, bytes: u32) -> Result<()> {
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the handle is a loaded function.
        check("cuFuncSetAttribute", unsafe { sys::cuFuncSetAttribute(self.handle, attribute, bytes as i32) })
    }

    /// Launches the kernel with one by-value parameter; neither allocates nor waits.
    ///
    /// # Safety
    /// `parameter` is what the kernel takes, the addresses in it are valid until the kernel has run, `stream` is a
    /// stream of the kernel's context or null, and the context is current. One that starts early waits by itself for what
    /// it needs of the one before it.
    pub(super) unsafe fn launch<P>(
        self,
        grid: u32,
        block: u32,
        shared_memory: u32,
        stream: sys::CUstream,
        parameter: &P,
    ) -> Result<()> {
        let mut parameters: [*mut c_void; 1] = [ptr::from_ref(parameter).cast_mut().cast()];
        let (f, parameters) = (self.handle, parameters.as_mut_ptr());
        // SAFETY: the caller's promise; the driver copies the parameter before it returns.
        unsafe {
            match self.start {
                Start::After => {
                    let none = ptr::null_mut();
                    let code = sys::cuLaunchKernel(f, grid, 1, 1, block, 1, 1, shared_memory, stream, parameters, none);
                    check("cuLaunchKernel", code)
                }
                Start::Together => {
                    let code =
                        sys::cuLaunchCooperativeKernel(f, grid, 1, 1, block, 1, 1, shared_memory, stream, parameters);
                    check("cuLaunchCooperativeKernel", code)
                }
                Start::Early(launch) => launch.launch(f, grid, block, shared_memory, stream, parameters),
            }
        }
    }
}

/// A point in the default stream's work.
pub(super) struct Event(sys::CUevent);

impl Event {
    pub(super) fn new() -> Result<Self> {
        let mut event = ptr::null_mut();
        // SAFETY: writes one handle.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut event, 0) })?;
        Ok(Event(event))
    }

    pub(super) fn record(&self) -> Result<()> {
        // SAFETY: the handle is an event of the current context; null is its default stream.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.0, ptr::null_mut()) })
    }

    /// Waits for this event; the device time since `start`, in steps of about half a microsecond.
    pub(super) fn elapsed_since(&self, start: &Event) -> Result<Duration> {
        let mut milliseconds = 0.0;
        // SAFETY: both handles are recorded events.
        unsafe {
            check("cuEventSynchronize", sys::cuEventSynchronize(self.0))?;
            check("cuEventElapsedTime", sys::cuEventElapsedTime(&mut milliseconds, start.0, self.0))?;
        }
        Ok(Duration::from_secs_f64(f64::from(milliseconds) / 1e3))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `new`, used no more.
        let _ = unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}
