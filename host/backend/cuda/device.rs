//! A device, opened once in a process: its primary context and the kernels loaded there.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::driver::{Context, EarlyLaunch, Entered, check};
use super::modules::Modules;
use super::sys::{self, Calls, attribute};
use super::tensor_map::Encoder;
use crate::error::{Error, Result};

/// Compute capability that the kernels are compiled for.
const CAPABILITY: (u32, u32) = (9, 0);

/// A device, its context and the kernels loaded there.
pub(super) struct Device {
    pub(super) modules: Modules,
    pub(super) context: Context,
    pub(super) ordinal: u32,
    pub(super) name: String,
    pub(super) sm_count: u32,
    /// True if memory is allocated and freed in a stream's order.
    pub(super) pools: bool,
    pub(super) encoder: Encoder,
    pub(super) early_launch: Option<EarlyLaunch>,
}

impl Device {
    /// Returns the driver's calls.
    pub(super) fn calls(&self) -> &'static Calls {
        self.context.calls
    }

    /// Makes the context the calling thread's current one for as long as the guard lives.
    pub(super) fn enter(&self) -> Result<Entered> {
        self.context.enter()
    }

    /// Returns the device of this number, shared by every [`Cuda`](super::Cuda) of it.
    pub(super) fn shared(ordinal: u32) -> Result<Arc<Self>> {
        static OPEN: Mutex<BTreeMap<u32, Weak<Device>>> = Mutex::new(BTreeMap::new());
        let calls = sys::calls()?;
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = open.get(&ordinal).and_then(Weak::upgrade) {
            return Ok(device);
        }
        let device = Arc::new(Device::open(calls, ordinal)?);
        open.insert(ordinal, Arc::downgrade(&device));
        Ok(device)
    }

    fn open(calls: &'static Calls, ordinal: u32) -> Result<Self> {
        let count = device_count(calls)?;
        if ordinal >= count {
            let reason = format!("device {ordinal} was asked for, and the driver shows {count}");
            return Err(Error::NoDevice { reason });
        }
        let mut device = 0;
        // SAFETY: writes one handle.
        check(calls, "cuDeviceGet", unsafe { (calls.cuDeviceGet)(&mut device, ordinal as i32) })?;
        let mut name = [0u8; 256];
        // SAFETY: the buffer has as many bytes as the call is told, and the written name ends with a zero.
        let code = unsafe { (calls.cuDeviceGetName)(name.as_mut_ptr().cast(), name.len() as i32, device) };
        check(calls, "cuDeviceGetName", code)?;
        let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
        let name = String::from_utf8_lossy(&name[..end]).into_owned();
        let get = |attribute| device_attribute(calls, attribute, device);
        let capability = (get(attribute::CAPABILITY_MAJOR)?, get(attribute::CAPABILITY_MINOR)?);
        if capability != CAPABILITY {
            let (major, minor) = capability;
            return Err(Error::UnsupportedDevice { name, major, minor, needed: "9.0" });
        }
        let sm_count = get(attribute::MULTIPROCESSOR_COUNT)?;
        let pools = get(attribute::MEMORY_POOLS_SUPPORTED)? != 0;
        let early_launch = EarlyLaunch::of(calls, driver_version(calls)?);
        let encoder = Encoder::of(calls)?;
        let context = Context::retain(calls, device)?;
        let modules = Modules::new();
        Ok(Device { modules, context, ordinal, name, sm_count, pools, encoder, early_launch })
    }
}

impl Drop for Device {
    /// Unloads the kernels once everything in the context has run.
    fn drop(&mut self) {
        let Ok(_entered) = self.context.enter() else { return };
        // SAFETY: the context is current. The wait fails while a stream is captured; then the modules stay loaded,
        // because the graph may use them.
        if unsafe { (self.calls().cuCtxSynchronize)() } == sys::SUCCESS {
            // SAFETY: functions are used only through a reference to this device, and all launches have run.
            unsafe { self.modules.unload() };
        }
    }
}

/// Returns the number of devices that the driver shows.
pub(super) fn device_count(calls: &Calls) -> Result<u32> {
    let mut count = 0;
    // SAFETY: writes one number.
    check(calls, "cuDeviceGetCount", unsafe { (calls.cuDeviceGetCount)(&mut count) })?;
    Ok(count.max(0) as u32)
}

/// Returns an attribute of a device that the driver named.
pub(super) fn device_attribute(calls: &Calls, attribute: i32, device: sys::DeviceHandle) -> Result<u32> {
    let mut value = 0;
    // SAFETY: writes one number; the device is one that the driver returned.
    let code = unsafe { (calls.cuDeviceGetAttribute)(&mut value, attribute, device) };
    check(calls, "cuDeviceGetAttribute", code)?;
    Ok(value.unsigned_abs())
}

/// Returns the CUDA version that the driver supports: 1000 times the major number and 10 times the minor one.
pub(super) fn driver_version(calls: &Calls) -> Result<i32> {
    let mut version = 0;
    // SAFETY: writes one number.
    check(calls, "cuDriverGetVersion", unsafe { (calls.cuDriverGetVersion)(&mut version) })?;
    Ok(version)
}
