//! The kernels that a device has loaded. Each form of a kernel is a module of its own, loaded at the first call.

use std::ffi::{CString, c_int, c_void};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use std::{mem, ptr};

use kernels_gpu::ground::constants::{Constants, Form};

use super::Specialise;
use super::driver::{Function, check};
use super::kernels::{KERNELS, Kernel, place};
use super::sys::{self, Calls, Handle};
use crate::error::{Error, Result};

/// Number of bytes for the message of the driver's compiler about PTX that it refuses.
const LOG_BYTES: usize = 16 << 10;

/// A form of a kernel on a device.
pub(super) struct Loaded {
    pub(super) function: Function,
    pub(super) load_time: Duration,
    form: Form,
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

/// Forms of one kernel that a device has loaded: a list that grows at its end, so that reading it takes no lock.
#[derive(Default)]
struct Forms(OnceLock<Box<(Loaded, Forms)>>);

impl Forms {
    /// Finds a form.
    fn find(&self, form: Form) -> Option<&Loaded> {
        let mut forms = self;
        while let Some((loaded, others)) = forms.0.get().map(Box::as_ref) {
            if loaded.form == form {
                return Some(loaded);
            }
            forms = others;
        }
        None
    }

    /// Returns the best form of `kernel`, as [`Modules::get`] does.
    fn get(
        &self,
        calls: &'static Calls,
        kernel: &'static Kernel,
        constants: Constants,
        smem_bytes: u32,
        policy: Specialise,
    ) -> Result<&Loaded> {
        let specialised = kernel.specialised(constants);
        if let (true, Some(loaded)) = (policy != Specialise::Never, self.find(specialised)) {
            return Ok(loaded);
        }
        let chosen = kernel.choose(specialised, policy);
        if let Some(loaded) = self.find(chosen) {
            return Ok(loaded);
        }
        let loaded = load(calls, kernel, chosen, specialised, smem_bytes)?;
        let form = loaded.form;
        self.add(loaded);
        self.find(form).ok_or_else(|| missing(kernel.symbol))
    }

    /// Unloads every form. The device's context is current.
    ///
    /// # Safety
    /// Their functions are not used any more.
    unsafe fn unload(&mut self) {
        let mut forms = mem::take(self);
        while let Some((loaded, others)) = forms.0.take().map(|form| *form) {
            // SAFETY: the caller's promise.
            unsafe { loaded.module.unload() };
            forms = others;
        }
    }

    /// Adds a form. The device's context is current.
    fn add(&self, loaded: Loaded) {
        let (mut forms, mut new) = (self, Box::new((loaded, Forms::default())));
        while let Err(refused) = forms.0.set(new) {
            // Another thread may have loaded the same form meanwhile. Then this module is not needed.
            let Some((loaded, others)) = forms.0.get().map(Box::as_ref) else { return };
            if loaded.form == refused.0.form {
                // SAFETY: nothing was launched from this module, and its context is current.
                unsafe { refused.0.module.unload() };
                return;
            }
            (forms, new) = (others, refused);
        }
    }
}

/// Kernels that one device has loaded, in the order of [`KERNELS`].
pub(super) struct Modules(Box<[Forms]>);

impl Modules {
    pub(super) fn new() -> Self {
        Modules(KERNELS.iter().map(|_| Forms::default()).collect())
    }

    /// Returns the kernel of this name, in the best form for `constants`, with `smem_bytes` of dynamic shared memory.
    /// That is the specialised form if it is loaded or, by `policy`, is to be compiled. Otherwise it is the prebuilt
    /// form that covers them with the fewest open constants. The first call loads it. Constants that the kernel lacks
    /// are ignored. The device's context is current.
    ///
    /// # Errors
    /// [`Error::BrokenKernel`] for a kernel that the build does not hold, [`Error::Driver`].
    pub(super) fn get(
        &self,
        calls: &'static Calls,
        symbol: &'static str,
        constants: Constants,
        smem_bytes: u32,
        policy: Specialise,
    ) -> Result<&Loaded> {
        let place = place(symbol).ok_or_else(|| missing(symbol))?;
        self.0[place].get(calls, &KERNELS[place], constants, smem_bytes, policy)
    }

    /// Unloads every module. Their context is current.
    ///
    /// # Safety
    /// Their functions are not used any more.
    pub(super) unsafe fn unload(&mut self) {
        for forms in &mut self.0 {
            // SAFETY: the caller's promise.
            unsafe { forms.unload() };
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

fn missing(symbol: &'static str) -> Error {
    Error::BrokenKernel { symbol, message: "this build does not hold it".to_owned() }
}

/// Loads the form `chosen` of a kernel. If the driver has to compile PTX, loads the form `specialised` instead, because
/// compiling that takes no longer.
fn load(
    calls: &'static Calls,
    kernel: &'static Kernel,
    chosen: Form,
    specialised: Form,
    smem_bytes: u32,
) -> Result<Loaded> {
    let start = Instant::now();
    let code = kernel.find(chosen).map(|cubin| kernel.machine_code(cubin)).transpose()?;
    let (module, form) = match code.map(|code| load_cubin(calls, code)) {
        Some(Ok(module)) => (module, chosen),
        // A driver that is older than the build's ptxas refuses the cubin, and compiles the PTX instead.
        Some(Err(Error::Driver { code: sys::INVALID_IMAGE | sys::NO_BINARY_FOR_GPU, .. })) | None => {
            (load_ptx(calls, kernel.symbol, kernel.ptx(specialised)?)?, specialised)
        }
        Some(Err(error)) => return Err(error),
    };
    match function(calls, kernel, &module, smem_bytes) {
        Ok(function) => Ok(Loaded { function, load_time: start.elapsed(), form, module }),
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
mod tests;
