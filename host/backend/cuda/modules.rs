//! The kernels that a device has loaded. Each is a module of its own, loaded at the first call.

use std::ffi::{CString, c_int, c_void};
use std::ptr;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::driver::{Function, check};
use super::kernels::{KERNELS, Kernel, place};
use super::sys::{self, Calls, Handle};
use crate::error::{Error, Result};

/// Number of bytes for the message of the driver's compiler about PTX that it refuses.
const LOG_BYTES: usize = 16 << 10;

/// A kernel on a device.
pub(super) struct Loaded {
    pub(super) function: Function,
    pub(super) load_time: Duration,
    module: Module,
}

/// A module of the current context.
struct Module {
    calls: &'static Calls,
    handle: Handle,
}

// SAFETY: a module handle names an object of a context, not of a thread; the driver takes it from any thread.
unsafe impl Send for Module {}
// SAFETY: the driver's calls on it are thread-safe.
unsafe impl Sync for Module {}

/// Kernels that one device has loaded, in the order of [`KERNELS`].
pub(super) struct Modules(Box<[OnceLock<Loaded>]>);

impl Modules {
    pub(super) fn new() -> Self {
        Modules(KERNELS.iter().map(|_| OnceLock::new()).collect())
    }

    /// Returns the kernel of this name with `smem_bytes` of dynamic shared memory. The first call loads it. The
    /// device's context is current.
    ///
    /// # Errors
    /// [`Error::BrokenKernel`] for a kernel that the build does not hold, [`Error::Driver`].
    pub(super) fn get(&self, calls: &'static Calls, symbol: &'static str, smem_bytes: u32) -> Result<&Loaded> {
        let missing = || Error::BrokenKernel { symbol, message: "this build does not hold it".to_owned() };
        let place = place(symbol).ok_or_else(missing)?;
        if let Some(loaded) = self.0[place].get() {
            return Ok(loaded);
        }
        let loaded = load(calls, &KERNELS[place], smem_bytes)?;
        // Another thread may have loaded it meanwhile. Then this module is not needed.
        match self.0[place].set(loaded) {
            Ok(()) => {}
            // SAFETY: nothing was launched from this module, and its context is current.
            Err(spare) => unsafe { spare.module.unload() },
        }
        self.0[place].get().ok_or_else(missing)
    }

    /// Unloads every module. Their context is current.
    ///
    /// # Safety
    /// Their functions are not used any more.
    pub(super) unsafe fn unload(&mut self) {
        for loaded in self.0.iter_mut().filter_map(OnceLock::take) {
            // SAFETY: the caller's promise.
            unsafe { loaded.module.unload() };
        }
    }
}

impl Module {
    /// # Safety
    /// Its context is current, and its functions are not used any more.
    unsafe fn unload(self) {
        // SAFETY: the caller's promise. An error here belongs to an earlier launch, and other calls report it.
        let _ = unsafe { (self.calls.cuModuleUnload)(self.handle) };
    }
}

fn load(calls: &'static Calls, kernel: &'static Kernel, smem_bytes: u32) -> Result<Loaded> {
    let start = Instant::now();
    let module = match kernel.cubin()?.map(|cubin| load_cubin(calls, cubin)) {
        Some(Ok(module)) => module,
        // A driver that is older than the build's ptxas refuses the cubin, and compiles the PTX instead.
        Some(Err(Error::Driver { code: sys::INVALID_IMAGE | sys::NO_BINARY_FOR_GPU, .. })) | None => {
            load_ptx(calls, kernel.symbol, kernel.ptx()?)?
        }
        Some(Err(error)) => return Err(error),
    };
    match function(calls, kernel, &module, smem_bytes) {
        Ok(function) => Ok(Loaded { function, load_time: start.elapsed(), module }),
        Err(error) => {
            // SAFETY: nothing was launched from it.
            unsafe { module.unload() };
            Err(error)
        }
    }
}

fn function(calls: &'static Calls, kernel: &'static Kernel, module: &Module, smem_bytes: u32) -> Result<Function> {
    let name = CString::new(kernel.symbol).unwrap_or_default();
    let mut handle = ptr::null_mut();
    // SAFETY: the module is live, the name a C string; writes one handle.
    let code = unsafe { (calls.cuModuleGetFunction)(&mut handle, module.handle, name.as_ptr()) };
    check(calls, "cuModuleGetFunction", code)?;
    let function = Function::new(calls, kernel.symbol, handle, kernel.parameter_bytes);
    function.set_shared_memory(smem_bytes)?;
    Ok(function)
}

/// Loads machine code.
fn load_cubin(calls: &'static Calls, cubin: &[u8]) -> Result<Module> {
    let (none, mut handle) = (ptr::null_mut(), ptr::null_mut());
    // SAFETY: the image is a whole cubin, whose header says where it ends; writes one handle.
    let code = unsafe { (calls.cuModuleLoadDataEx)(&mut handle, cubin.as_ptr().cast(), 0, none, ptr::null_mut()) };
    check(calls, "cuModuleLoadDataEx", code)?;
    Ok(Module { calls, handle })
}

/// Lets the driver compile PTX. An error has the message of the driver's compiler.
fn load_ptx(calls: &'static Calls, symbol: &'static str, text: String) -> Result<Module> {
    let broken = |_| Error::BrokenKernel { symbol, message: "its PTX holds a zero".to_owned() };
    let text = CString::new(text).map_err(broken)?;
    let (mut log, mut handle) = (vec![0u8; LOG_BYTES], ptr::null_mut());
    let mut options: [c_int; 2] = [sys::JIT_ERROR_LOG_BUFFER, sys::JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // The driver takes a number as the value of the pointer.
    let mut values: [*mut c_void; 2] = [log.as_mut_ptr().cast(), ptr::without_provenance_mut(log.len())];
    // SAFETY: the text ends with a zero. Of the two options, the first is a buffer and the second is its size in bytes.
    // Writes one handle.
    let code = unsafe {
        let (options, values) = (options.as_mut_ptr(), values.as_mut_ptr());
        (calls.cuModuleLoadDataEx)(&mut handle, text.as_ptr().cast(), 2, options, values)
    };
    match check(calls, "cuModuleLoadDataEx", code) {
        Ok(()) => Ok(Module { calls, handle }),
        Err(Error::Driver { call, code, message }) => {
            let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
            let said = String::from_utf8_lossy(&log[..end]);
            let message = match said.trim() {
                "" => format!("{message}, compiling kernel {symbol}"),
                said => format!("{message}, compiling kernel {symbol}: {said}"),
            };
            Err(Error::Driver { call, code, message })
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cuda::Cuda;
    use crate::backend::cuda::driver::Extent;

    /// Returns the first device, if there is one that kernels run on.
    fn device() -> Option<Cuda> {
        Cuda::new(0).inspect_err(|error| println!("skipped: {error}")).ok()
    }

    #[test]
    fn without_a_device_the_error_says_what_is_missing() {
        match sys::calls() {
            Ok(_) => println!("skipped: there is a driver"),
            Err(Error::NoDevice { reason }) => {
                assert!(reason.contains("NVIDIA's driver"), "{reason}");
                assert!(matches!(Cuda::new(0), Err(Error::NoDevice { .. })));
                assert_eq!(Cuda::device_count(), 0);
            }
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn refused_ptx_carries_the_compilers_words() {
        let Some(cuda) = device() else { return };
        let _entered = cuda.device().enter().unwrap();
        let text = ".version 8.1\n.target sm_90a\n.address_size 64\n.visible .entry k() { mov.u32 %nothing, 1; ret; }";
        let error = load_ptx(cuda.device().calls(), "k", text.to_owned()).err().unwrap();
        assert!(matches!(error, Error::Driver { code, .. } if code != sys::SUCCESS), "{error}");
        assert!(error.to_string().contains("nothing"), "{error}");
    }

    #[test]
    fn parameters_of_another_size_are_refused() {
        let Some(cuda) = device() else { return };
        let _entered = cuda.device().enter().unwrap();
        let function = cuda.kernel("prepare_bf16", 0).unwrap().function;
        let extent = Extent { grid: 1, block: 32, shared_memory: 0 };
        // SAFETY: refused before the launch.
        let error = unsafe { function.launch(extent, ptr::null_mut(), &0u64) }.err().unwrap();
        assert!(matches!(error, Error::BrokenKernel { symbol: "prepare_bf16", .. }), "{error}");
    }

    #[test]
    fn codes_without_a_name_are_described() {
        let Some(cuda) = device() else { return };
        for code in [912, 54321, u32::MAX] {
            assert!(cuda.device().calls().describe(code).contains(&code.to_string()));
        }
    }
}
