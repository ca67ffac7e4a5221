//! The compiled kernels, each a module of its own that is loaded when it is first called.

use std::io::Read;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use cust::module::Module;
use flate2::read::ZlibDecoder;

use super::driver::{Function, failed};
use crate::error::{Error, Result};

/// One compiled kernel.
#[derive(Debug)]
pub struct Kernel {
    /// Name of its entry point.
    pub symbol: &'static str,
    /// Its PTX, compressed by zlib, which the driver compiles where there is no cubin.
    ptx: &'static [u8],
    /// Its machine code, where the build had ptxas.
    pub cubin: Option<&'static [u8]>,
    /// Registers of a thread at entry, where the build had ptxas.
    pub registers: Option<u32>,
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Where the kernel of this name is in [`KERNELS`].
fn place(symbol: &str) -> Option<usize> {
    KERNELS.binary_search_by(|kernel| kernel.symbol.cmp(symbol)).ok()
}

impl Kernel {
    /// The compiled kernel of this name.
    pub fn of(symbol: &str) -> Option<&'static Kernel> {
        place(symbol).map(|place| &KERNELS[place])
    }

    /// Its PTX, unpacked.
    ///
    /// # Errors
    /// [`Error::Driver`] for a build whose PTX is damaged.
    pub fn ptx(&self) -> Result<String> {
        let mut text = String::new();
        let unpacked = ZlibDecoder::new(self.ptx).read_to_string(&mut text);
        unpacked.map_err(|error| Error::Driver { call: "PTX", message: error.to_string() })?;
        Ok(text)
    }
}

/// A kernel on a device.
pub(super) struct Loaded {
    pub(super) function: Function,
    pub(super) load_time: Duration,
    /// Owns the function.
    _module: Module,
}

/// The kernels that one device has loaded, in the order of [`KERNELS`].
pub(super) struct Modules(Box<[OnceLock<Loaded>]>);

impl Modules {
    pub(super) fn new() -> Self {
        Modules(KERNELS.iter().map(|_| OnceLock::new()).collect())
    }

    /// The kernel of this name, which has `smem_bytes` of dynamic shared memory, loaded on the first call; the device's
    /// context is current.
    pub(super) fn get(&self, symbol: &str, smem_bytes: u32) -> Result<&Loaded> {
        let missing =
            || Error::Driver { call: "cuModuleGetFunction", message: format!("the build holds no kernel {symbol}") };
        let place = place(symbol).ok_or_else(missing)?;
        if let Some(loaded) = self.0[place].get() {
            return Ok(loaded);
        }
        // Two threads may both get here; one of the two modules is then dropped again.
        let loaded = load(&KERNELS[place], smem_bytes)?;
        Ok(self.0[place].get_or_init(|| loaded))
    }
}

fn load(kernel: &Kernel, smem_bytes: u32) -> Result<Loaded> {
    let start = Instant::now();
    // A driver that is older than the build's ptxas refuses the cubin, and compiles the PTX instead.
    let cubin = kernel.cubin.and_then(|cubin| Module::from_cubin(cubin, &[]).ok());
    let module = match cubin {
        Some(module) => module,
        None => Module::from_ptx(kernel.ptx()?, &[]).map_err(failed("cuModuleLoadData"))?,
    };
    let function = module.get_function(kernel.symbol).map_err(failed("cuModuleGetFunction"))?;
    let function = Function::new(function.to_raw());
    function.set_shared_memory(smem_bytes)?;
    Ok(Loaded { function, load_time: start.elapsed(), _module: module })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_has_its_ptx() {
        for kernel in KERNELS {
            let ptx = kernel.ptx().unwrap();
            assert!(ptx.contains(&format!(".entry {}(", kernel.symbol)), "{}", kernel.symbol);
            assert!(Kernel::of(kernel.symbol).is_some_and(|found| found.symbol == kernel.symbol), "{}", kernel.symbol);
        }
    }
}
