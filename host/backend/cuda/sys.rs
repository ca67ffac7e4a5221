//! The CUDA driver, opened at run time: the calls that the backend makes, without interpretation.
//!
//! A result is a plain `u32`, because drivers return codes that this crate does not list, and as an enum each of them
//! would be undefined behaviour. Names, types and numbers are those of cuda.h of CUDA 12. The library stays open for
//! the life of the process, so the addresses of its functions stay valid.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use crate::error::{Error, Result};

/// `CUresult`.
pub(super) type Code = u32;
/// `CUdevice`: an ordinal.
pub(super) type DeviceHandle = c_int;
/// `CUcontext`, `CUmodule`, `CUfunction`, `CUstream`, `CUevent`: each the address of an object of the driver.
pub(super) type Handle = *mut c_void;
/// `CUdeviceptr`.
pub(super) type DevicePointer = u64;

pub(super) const SUCCESS: Code = 0;
pub(super) const OUT_OF_MEMORY: Code = 2;
pub(super) const INVALID_IMAGE: Code = 200;
pub(super) const NO_BINARY_FOR_GPU: Code = 209;

#[cfg(test)]
const NOT_SUPPORTED: Code = 801;

pub(super) const EVENT_DISABLE_TIMING: c_uint = 2;
pub(super) const STREAM_NON_BLOCKING: c_uint = 1;
/// `CU_STREAM_LEGACY`, another name of the null stream.
pub(super) const STREAM_LEGACY: usize = 1;
/// `CU_STREAM_PER_THREAD`, a name for a different stream in each thread.
pub(super) const STREAM_PER_THREAD: usize = 2;
pub(super) const JIT_ERROR_LOG_BUFFER: c_int = 5;
pub(super) const JIT_ERROR_LOG_BUFFER_SIZE_BYTES: c_int = 6;
pub(super) const FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES: c_int = 8;
#[cfg(feature = "cust")]
pub(super) const POINTER_DEVICE_ORDINAL: c_int = 9;

/// `CUdevice_attribute`.
pub(super) mod attribute {
    pub(in super::super) const CLOCK_RATE: i32 = 13;
    pub(in super::super) const MULTIPROCESSOR_COUNT: i32 = 16;
    pub(in super::super) const CAPABILITY_MAJOR: i32 = 75;
    pub(in super::super) const CAPABILITY_MINOR: i32 = 76;
    pub(in super::super) const MEMORY_POOLS_SUPPORTED: i32 = 115;
}

/// `CUlaunchConfig`.
#[repr(C)]
pub(super) struct LaunchConfig {
    pub(super) grid: [c_uint; 3],
    pub(super) block: [c_uint; 3],
    pub(super) shared_memory: c_uint,
    pub(super) stream: Handle,
    pub(super) attributes: *const LaunchAttribute,
    pub(super) attributes_len: c_uint,
}

/// `CUlaunchAttribute`, whose value is a union of 64 bytes, aligned to 8, that starts with an `int` in the one used
/// here.
#[repr(C, align(8))]
pub(super) struct LaunchAttribute {
    pub(super) id: c_uint,
    pub(super) padding: c_uint,
    pub(super) value: c_int,
    pub(super) rest: [u32; 15],
}

const _: () = assert!(size_of::<LaunchConfig>() == 56 && size_of::<LaunchAttribute>() == 72);

/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`.
pub(super) const PROGRAMMATIC_STREAM_SERIALIZATION: c_uint = 6;

/// Declares the table of calls: the calls that every driver has, and those that only newer drivers have.
macro_rules! calls {
    (needed { $($(#[$attribute:meta])* $needed:ident($($parameter:ty),*);)* }
     newer { $($newer:ident($($other:ty),*);)* }) => {
        /// The driver's functions, by their names.
        #[allow(non_snake_case)]
        pub(super) struct Calls {
            $($(#[$attribute])* pub(super) $needed: unsafe extern "C" fn($($parameter),*) -> Code,)*
            $(pub(super) $newer: Option<unsafe extern "C" fn($($other),*) -> Code>,)*
        }

        impl Calls {
            /// Returns a driver for tests, whose functions do nothing and fail.
            #[cfg(test)]
            pub(super) fn failing() -> Self {
                Calls {
                    $($(#[$attribute])* $needed: {
                        unsafe extern "C" fn fail($(_: $parameter),*) -> Code {
                            NOT_SUPPORTED
                        }
                        fail
                    },)*
                    $($newer: None,)*
                }
            }

            /// Looks up every function.
            fn of(library: &libloading::Library) -> std::result::Result<Self, libloading::Error> {
                // SAFETY: each type is the one that cuda.h gives the function of this name, and `open` never closes the
                // library, so the addresses stay valid.
                unsafe {
                    Ok(Calls {
                        $($(#[$attribute])* $needed: *library.get(concat!(stringify!($needed), "\0").as_bytes())?,)*
                        $($newer: library.get(concat!(stringify!($newer), "\0").as_bytes()).ok().map(|call| *call),)*
                    })
                }
            }
        }
    };
}

calls! {
    needed {
        cuInit(c_uint);
        cuDriverGetVersion(*mut c_int);
        cuGetErrorName(Code, *mut *const c_char);
        cuGetErrorString(Code, *mut *const c_char);
        cuDeviceGetCount(*mut c_int);
        cuDeviceGet(*mut DeviceHandle, c_int);
        cuDeviceGetName(*mut c_char, c_int, DeviceHandle);
        cuDeviceGetAttribute(*mut c_int, c_int, DeviceHandle);
        cuDeviceTotalMem_v2(*mut usize, DeviceHandle);
        cuDevicePrimaryCtxRetain(*mut Handle, DeviceHandle);
        cuDevicePrimaryCtxRelease_v2(DeviceHandle);
        cuCtxGetCurrent(*mut Handle);
        cuCtxPushCurrent_v2(Handle);
        cuCtxPopCurrent_v2(*mut Handle);
        cuCtxSynchronize();
        cuModuleLoadDataEx(*mut Handle, *const c_void, c_uint, *mut c_int, *mut *mut c_void);
        cuModuleUnload(Handle);
        cuModuleGetFunction(*mut Handle, Handle, *const c_char);
        cuFuncSetAttribute(Handle, c_int, c_int);
        cuMemAlloc_v2(*mut DevicePointer, usize);
        cuMemFree_v2(DevicePointer);
        cuMemAllocAsync(*mut DevicePointer, usize, Handle);
        cuMemFreeAsync(DevicePointer, Handle);
        cuMemcpyHtoDAsync_v2(DevicePointer, *const c_void, usize, Handle);
        cuMemcpyDtoHAsync_v2(*mut c_void, DevicePointer, usize, Handle);
        cuMemsetD32Async(DevicePointer, c_uint, usize, Handle);
        cuStreamCreate(*mut Handle, c_uint);
        cuStreamDestroy_v2(Handle);
        cuStreamSynchronize(Handle);
        cuStreamWaitEvent(Handle, Handle, c_uint);
        cuStreamIsCapturing(Handle, *mut c_int);
        cuStreamGetCtx(Handle, *mut Handle);
        cuEventCreate(*mut Handle, c_uint);
        cuEventDestroy_v2(Handle);
        cuEventRecord(Handle, Handle);
        cuEventSynchronize(Handle);
        cuEventElapsedTime(*mut f32, Handle, Handle);
        cuLaunchKernel(Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void,
            *mut *mut c_void);
        cuLaunchCooperativeKernel(Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle,
            *mut *mut c_void);
        #[cfg(feature = "cust")]
        cuCtxGetDevice(*mut DeviceHandle);
        #[cfg(feature = "cust")]
        cuPointerGetAttribute(*mut c_void, c_int, DevicePointer);
    }
    newer {
        cuLaunchKernelEx(*const LaunchConfig, Handle, *mut *mut c_void, *mut *mut c_void);
        cuTensorMapEncodeTiled(*mut c_void, c_uint, c_uint, *mut c_void, *const u64, *const u64, *const u32, *const u32,
            c_uint, c_uint, c_uint, c_uint);
    }
}

/// Paths of the driver, found by the loader's own rules. The second is its place under WSL.
const LIBRARIES: [&str; 2] = ["libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1"];

/// Returns the driver, which the first call opens and initialises.
///
/// # Errors
/// [`Error::NoDevice`] if there is no driver, it lacks a call, or it finds no device.
pub(super) fn calls() -> Result<&'static Calls> {
    static CALLS: OnceLock<std::result::Result<Calls, String>> = OnceLock::new();
    CALLS.get_or_init(open).as_ref().map_err(|reason| Error::NoDevice { reason: reason.clone() })
}

fn open() -> std::result::Result<Calls, String> {
    let library = open_library()?;
    let calls = Calls::of(&library).map_err(|error| {
        format!("NVIDIA's driver is too old, CUDA 12.0 or newer is needed ({}): install a newer driver", words(&error))
    })?;
    // The functions are used until the process ends.
    std::mem::forget(library);
    // SAFETY: takes flags, of which there are none.
    match unsafe { (calls.cuInit)(0) } {
        SUCCESS => Ok(calls),
        code => Err(format!("the driver could not start: {}", calls.describe(code))),
    }
}

/// The loader's own words, which libloading keeps as the source of its error.
fn words(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

fn open_library() -> std::result::Result<libloading::Library, String> {
    let mut reasons = Vec::new();
    for name in LIBRARIES {
        // SAFETY: NVIDIA's driver may be loaded at any time; its initialisers set up nothing but itself.
        match unsafe { libloading::Library::new(name) } {
            Ok(library) => return Ok(library),
            Err(error) => reasons.push(words(&error)),
        }
    }
    let reason = reasons.swap_remove(0);
    Err(format!("NVIDIA's driver is not installed, or not where programs look for it ({reason})"))
}

impl Calls {
    /// Returns the driver's name and message for a code, as far as it has any.
    pub(super) fn describe(&self, code: Code) -> String {
        let (mut name, mut words) = (std::ptr::null(), std::ptr::null());
        // SAFETY: each call writes the address of a static string, or null or nothing for a code that the driver does
        // not know.
        let text = |address: *const c_char| unsafe {
            (!address.is_null()).then(|| CStr::from_ptr(address).to_string_lossy().into_owned())
        };
        // SAFETY: each call writes the address of a static string, or null or nothing for a code that the driver does
        // not know.
        unsafe {
            let _ = (self.cuGetErrorName)(code, &mut name);
            let _ = (self.cuGetErrorString)(code, &mut words);
        }
        match (text(words), text(name)) {
            (Some(words), Some(name)) => format!("{words} ({name}, code {code})"),
            _ => format!("code {code}, for which the driver has no words"),
        }
    }
}
