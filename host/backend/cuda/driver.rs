//! Calls of the driver with their results checked. Each error names the call and has the driver's code and message.

use std::ffi::c_void;
use std::ptr;

use kernels_gpu::attention::any_features::{AnyFeatures, WithFeatures};
use kernels_gpu::attention::features::Features;
use kernels_gpu::params::Params;

use super::sys::{self, Calls, Code, DeviceHandle, Handle};
use crate::error::{Error, Result};

/// Returns nothing, or the error of `call`.
pub(super) fn check(calls: &Calls, call: &'static str, code: Code) -> Result<()> {
    match code {
        sys::SUCCESS => Ok(()),
        code => Err(Error::Driver { call, code, message: calls.describe(code) }),
    }
}

/// A device's primary context, retained: the one that CUDA's runtime and the frameworks on it use.
pub(super) struct Context {
    pub(super) calls: &'static Calls,
    pub(super) device: DeviceHandle,
    handle: Handle,
}

// SAFETY: a context handle names an object of the device, not of a thread; the driver takes it from any thread.
unsafe impl Send for Context {}
// SAFETY: the driver's calls on it are thread-safe.
unsafe impl Sync for Context {}

impl Context {
    pub(super) fn retain(calls: &'static Calls, device: DeviceHandle) -> Result<Self> {
        let mut handle = ptr::null_mut();
        // SAFETY: writes one handle; the device is one that the driver returned.
        check(calls, "cuDevicePrimaryCtxRetain", unsafe { (calls.cuDevicePrimaryCtxRetain)(&mut handle, device) })?;
        Ok(Context { calls, device, handle })
    }

    /// Returns the driver's handle of the context.
    pub(super) fn handle(&self) -> Handle {
        self.handle
    }

    /// Makes it the calling thread's current context for as long as the guard lives.
    pub(super) fn enter(&self) -> Result<Entered> {
        let calls = self.calls;
        let mut current = ptr::null_mut();
        // SAFETY: writes one handle.
        check(calls, "cuCtxGetCurrent", unsafe { (calls.cuCtxGetCurrent)(&mut current) })?;
        let pushed = current != self.handle;
        if pushed {
            // SAFETY: the context is retained, so it is live.
            check(calls, "cuCtxPushCurrent", unsafe { (calls.cuCtxPushCurrent_v2)(self.handle) })?;
        }
        Ok(Entered { calls, pushed, of_thread: std::marker::PhantomData })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained by `retain`. The call leaves every thread's current context as it is.
        let _ = unsafe { (self.calls.cuDevicePrimaryCtxRelease_v2)(self.device) };
    }
}

/// Guard of a current context. Dropping it restores the context that was current before.
pub(super) struct Entered {
    calls: &'static Calls,
    pushed: bool,
    /// Restricts the guard to the thread that made it.
    of_thread: std::marker::PhantomData<*const ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = ptr::null_mut();
            // SAFETY: the context that is popped was pushed by `enter` on this thread, and guards end in reverse order.
            let _ = unsafe { (self.calls.cuCtxPopCurrent_v2)(&mut popped) };
        }
    }
}

/// Sets `words` 32-bit words to 0, on the stream. Neither allocates nor waits.
///
/// # Safety
/// The words are valid at `address`, a multiple of 4, until that has run. `stream` is a stream of the current context
/// or null.
pub(super) unsafe fn zero_words(calls: &Calls, address: u64, words: usize, stream: Handle) -> Result<()> {
    // SAFETY: the caller's promise.
    check(calls, "cuMemsetD32Async", unsafe { (calls.cuMemsetD32Async)(address, 0, words, stream) })
}

/// A kernel, in the context it was loaded in.
#[derive(Clone, Copy)]
pub(super) struct Function {
    calls: &'static Calls,
    symbol: &'static str,
    handle: Handle,
    /// Size of its parameter in bytes, as its PTX states.
    parameter_bytes: u32,
    start: Start,
}

/// Condition for the start of a kernel.
#[derive(Clone, Copy)]
enum Start {
    /// Starts after the kernel before it in the stream.
    After,
    /// Starts after the kernel before it, once there is room for all CTAs at the same time.
    Together,
    /// May start before the kernel before it is complete: CUDA's programmatic dependent launch (PTX ISA,
    /// griddepcontrol).
    Early(EarlyLaunch),
}

/// Driver's call for launches that may start early.
#[derive(Clone, Copy)]
pub(super) struct EarlyLaunch(
    unsafe extern "C" fn(*const sys::LaunchConfig, Handle, *mut *mut c_void, *mut *mut c_void) -> Code,
);

impl EarlyLaunch {
    /// First driver that captures such launches into graphs, CUDA 12.3.
    const FIRST_DRIVER: i32 = 12030;

    /// Returns `None` for an older driver. The kernels then start one after the other, and their waits end at once.
    pub(super) fn of(calls: &Calls, driver: i32) -> Option<Self> {
        calls.cuLaunchKernelEx.filter(|_| driver >= Self::FIRST_DRIVER).map(EarlyLaunch)
    }
}

// SAFETY: a function handle names an object of a context, not of a thread; the driver takes it from any thread.
unsafe impl Send for Function {}
// SAFETY: the driver's calls on it are thread-safe.
unsafe impl Sync for Function {}

/// CTAs, threads per CTA, and bytes of dynamic shared memory per CTA.
#[derive(Clone, Copy)]
pub(super) struct Extent {
    pub(super) grid: u32,
    pub(super) block: u32,
    pub(super) shared_memory: u32,
}

impl Function {
    pub(super) fn new(calls: &'static Calls, symbol: &'static str, handle: Handle, parameter_bytes: u32) -> Self {
        Function { calls, symbol, handle, parameter_bytes, start: Start::After }
    }

    /// Makes the launch cooperative, for a kernel whose CTAs wait for each other: it starts once there is room for all
    /// of them at the same time.
    pub(super) fn cooperative(self) -> Self {
        Function { start: Start::Together, ..self }
    }

    /// Lets the kernel start before the one before it in the stream is complete, if the kernel and the driver allow it.
    /// The kernel itself must wait for the results that it needs.
    pub(super) fn early(self, launch: Option<EarlyLaunch>) -> Self {
        Function { start: launch.map_or(Start::After, Start::Early), ..self }
    }

    /// Allows the kernel `bytes` of dynamic shared memory.
    pub(super) fn set_shared_memory(self, bytes: u32) -> Result<()> {
        let attribute = sys::FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the handle is a loaded function.
        let code = unsafe { (self.calls.cuFuncSetAttribute)(self.handle, attribute, bytes as i32) };
        check(self.calls, "cuFuncSetAttribute", code)
    }

    /// Launches a kernel with the features of its plan; see [`Function::launch`].
    ///
    /// # Errors
    /// Errors of [`Function::launch`].
    ///
    /// # Safety
    /// The requirements of [`Function::launch`], with the features as a value of the kernel's type.
    pub(super) unsafe fn launch_with<B: Copy>(
        self,
        extent: Extent,
        stream: Handle,
        params: Params<B, AnyFeatures>,
    ) -> Result<()> {
        struct Launch<B>(Function, Extent, Handle, B);
        impl<B: Copy> WithFeatures for Launch<B> {
            type Output = Result<()>;
            fn with<F: Features>(self, features: F) -> Result<()> {
                let Launch(function, extent, stream, base) = self;
                // SAFETY: made by `launch_with` alone, whose caller has promised what this needs.
                unsafe { function.launch(extent, stream, &Params { base, features }) }
            }
        }
        params.features.chosen(Launch(self, extent, stream, params.base))
    }

    /// Launches the kernel with one by-value parameter. Neither allocates nor waits.
    ///
    /// # Errors
    /// [`Error::BrokenKernel`] if the size of the parameter differs from the size that the kernel's PTX states;
    /// [`Error::Driver`].
    ///
    /// # Safety
    /// `parameter` is the kernel's parameter, and the addresses in it are valid until the kernel has run. `stream` is a
    /// stream of the kernel's context or null, and the context is current. A kernel that starts early itself waits for
    /// the results that it needs.
    pub(super) unsafe fn launch<P: Copy>(self, extent: Extent, stream: Handle, parameter: &P) -> Result<()> {
        if size_of::<P>() != self.parameter_bytes as usize {
            let message =
                format!("it takes {} bytes of parameters, and was given {}", self.parameter_bytes, size_of::<P>());
            return Err(Error::BrokenKernel { symbol: self.symbol, message });
        }
        let Extent { grid, block, shared_memory } = extent;
        let mut parameters: [*mut c_void; 1] = [ptr::from_ref(parameter).cast_mut().cast()];
        let (calls, f, parameters, none) = (self.calls, self.handle, parameters.as_mut_ptr(), ptr::null_mut());
        // SAFETY: the caller's promise; the driver copies the parameter before it returns.
        unsafe {
            match self.start {
                Start::After => {
                    let launch = calls.cuLaunchKernel;
                    let code = launch(f, grid, 1, 1, block, 1, 1, shared_memory, stream, parameters, none);
                    check(calls, "cuLaunchKernel", code)
                }
                Start::Together => {
                    let launch = calls.cuLaunchCooperativeKernel;
                    let code = launch(f, grid, 1, 1, block, 1, 1, shared_memory, stream, parameters);
                    check(calls, "cuLaunchCooperativeKernel", code)
                }
                Start::Early(EarlyLaunch(launch)) => {
                    let id = sys::PROGRAMMATIC_STREAM_SERIALIZATION;
                    let attribute = sys::LaunchAttribute { id, padding: 0, value: 1, rest: [0; 15] };
                    let config = sys::LaunchConfig {
                        grid: [grid, 1, 1],
                        block: [block, 1, 1],
                        shared_memory,
                        stream,
                        attributes: &attribute,
                        attributes_len: 1,
                    };
                    check(calls, "cuLaunchKernelEx", launch(&config, f, parameters, none))
                }
            }
        }
    }
}
