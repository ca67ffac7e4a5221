//! A launch that may start before the kernel before it in the stream is complete: CUDA's programmatic dependent launch
//! (driver API, cuLaunchKernelEx; PTX ISA, griddepcontrol).
//!
//! `cust` binds an older driver, so the call is looked up by name, and its types are declared here as cuda.h of CUDA 12
//! has them.

use std::ffi::c_void;

use cust::sys;

use super::driver::check;
use crate::error::Result;

/// `cuLaunchKernelEx`: configuration, function, parameters, extra.
type LaunchKernelEx =
    unsafe extern "C" fn(*const LaunchConfig, sys::CUfunction, *mut *mut c_void, *mut *mut c_void) -> sys::CUresult;

/// `CUlaunchConfig`.
#[repr(C)]
struct LaunchConfig {
    grid: [u32; 3],
    block: [u32; 3],
    shared_memory: u32,
    stream: sys::CUstream,
    attributes: *const LaunchAttribute,
    attributes_len: u32,
}

/// `CUlaunchAttribute`, whose value is a union of 64 bytes, aligned to 8, that starts with an `int` in the one used here.
#[repr(C, align(8))]
struct LaunchAttribute {
    id: u32,
    padding: u32,
    value: i32,
    rest: [u32; 15],
}

const _: () = assert!(size_of::<LaunchConfig>() == 56 && size_of::<LaunchAttribute>() == 72);

/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`.
const PROGRAMMATIC_STREAM_SERIALIZATION: u32 = 6;

/// The driver's call.
#[derive(Clone, Copy)]
pub(super) struct EarlyLaunch(LaunchKernelEx);

impl EarlyLaunch {
    /// Looks it up in the driver. `None` where that is older than CUDA 12.3, the first to capture such launches into graphs:
    /// kernels that start after one another find what they would wait for.
    pub(super) fn find() -> Option<Self> {
        let mut address = std::ptr::null_mut();
        // SAFETY: the name is a C string; a driver that is older than the version asked for gives an error.
        let code = unsafe { sys::cuGetProcAddress(c"cuLaunchKernelEx".as_ptr(), &mut address, 12030, 0) };
        if code != sys::CUresult::CUDA_SUCCESS || address.is_null() {
            return None;
        }
        // SAFETY: the driver gave this address for a function of this signature.
        Some(EarlyLaunch(unsafe { std::mem::transmute::<*mut c_void, LaunchKernelEx>(address) }))
    }

    /// Launches `function`.
    ///
    /// # Safety
    /// As for `cuLaunchKernel`; and the kernel waits by itself for what it needs of the one before it in the stream.
    pub(super) unsafe fn launch(
        self,
        function: sys::CUfunction,
        grid: u32,
        block: u32,
        shared_memory: u32,
        stream: sys::CUstream,
        parameters: *mut *mut c_void,
    ) -> Result<()> {
        let attribute = LaunchAttribute { id: PROGRAMMATIC_STREAM_SERIALIZATION, padding: 0, value: 1, rest: [0; 15] };
        let config = LaunchConfig {
            grid: [grid, 1, 1],
            block: [block, 1, 1],
            shared_memory,
            stream,
            attributes: &attribute,
            attributes_len: 1,
        };
        // SAFETY: the caller's promise; the driver has read the configuration when it returns.
        check("cuLaunchKernelEx", unsafe { (self.0)(&config, function, parameters, std::ptr::null_mut()) })
    }
}
