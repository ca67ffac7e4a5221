//! The compiled kernels, each a module of its own that is loaded when it is first called.
//!
//! They lie in compressed streams, two for each family of kernels. The build writes the table, from source or when it
//! makes a package.

use std::io::Read;
use std::ops::Range;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use cust::module::Module;
use lzma_rust2::LzmaReader;

use super::driver::{Function, failed};
use crate::error::{Error, Result};

/// One compiled kernel.
#[derive(Debug)]
pub struct Kernel {
    /// Name of its entry point.
    pub symbol: &'static str,
    /// Its family's streams.
    streams: &'static Streams,
    /// Its bytes in the stream of cubins, if the build had ptxas.
    cubin: Option<Range<usize>>,
    /// Its bytes in the stream of PTX.
    ptx: Range<usize>,
    /// Number of registers of a thread at entry, if the build had ptxas.
    pub registers: Option<u32>,
    /// Size of its by-value parameter in bytes, as its PTX declares it.
    pub parameter_bytes: u32,
}

/// The kernels of a family, compressed.
#[derive(Debug)]
struct Streams {
    cubins: &'static [u8],
    ptx: &'static [u8],
    /// All cubins, unpacked when one is first asked for.
    unpacked_cubins: OnceLock<std::result::Result<Vec<u8>, String>>,
}

impl Streams {
    const fn new(cubins: &'static [u8], ptx: &'static [u8]) -> Self {
        Streams { cubins, ptx, unpacked_cubins: OnceLock::new() }
    }
}

include!(env!("FERROFLASH_KERNEL_TABLE"));

/// Origin of the kernels: `source` if this build compiled them, `prebuilt` if they came with the package.
pub const KERNEL_ORIGIN: &str = env!("FERROFLASH_KERNEL_ORIGIN");

/// Index of the kernel of this name in [`KERNELS`].
fn place(symbol: &str) -> Option<usize> {
    KERNELS.binary_search_by(|kernel| kernel.symbol.cmp(symbol)).ok()
}

/// Unpacks the first `size` bytes of a stream, or all if it is `None`.
fn unpack(stream: &[u8], size: Option<usize>) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let reader = LzmaReader::new_mem_limit(stream, u32::MAX, None)?;
    reader.take(size.map_or(u64::MAX, |size| size as u64)).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn damaged(call: &'static str, reason: &str) -> Error {
    let message = format!("the kernels in this program are damaged, build it again: {reason}");
    Error::Driver { call, message }
}

impl Kernel {
    /// Finds the compiled kernel of this name.
    pub fn of(symbol: &str) -> Option<&'static Kernel> {
        place(symbol).map(|place| &KERNELS[place])
    }

    /// True if the build holds its machine code.
    pub fn has_cubin(&self) -> bool {
        self.cubin.is_some()
    }

    /// Returns its machine code, if the build had ptxas. The first call of a family unpacks all cubins of that family.
    ///
    /// # Errors
    /// [`Error::Driver`] if the program's kernels are damaged.
    pub fn cubin(&self) -> Result<Option<&'static [u8]>> {
        let Some(range) = self.cubin.clone() else { return Ok(None) };
        let streams = self.streams;
        let unpacked =
            streams.unpacked_cubins.get_or_init(|| unpack(streams.cubins, None).map_err(|error| error.to_string()));
        let bytes = unpacked.as_ref().map_err(|error| damaged("cubin", error))?;
        bytes.get(range).map(Some).ok_or_else(|| damaged("cubin", "a stream ends too early"))
    }

    /// Returns its PTX. Every call unpacks it again, because few programs need it even once.
    ///
    /// # Errors
    /// [`Error::Driver`] if the program's kernels are damaged.
    pub fn ptx(&self) -> Result<String> {
        let mut bytes =
            unpack(self.streams.ptx, Some(self.ptx.end)).map_err(|error| damaged("PTX", &error.to_string()))?;
        if bytes.len() < self.ptx.end {
            return Err(damaged("PTX", "a stream ends too early"));
        }
        bytes.drain(..self.ptx.start);
        String::from_utf8(bytes).map_err(|error| damaged("PTX", &error.to_string()))
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
    let cubin = kernel.cubin()?.and_then(|cubin| Module::from_cubin(cubin, &[]).ok());
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
    fn every_kernel_is_in_its_streams() {
        for kernel in KERNELS {
            let symbol = kernel.symbol;
            let ptx = kernel.ptx().unwrap();
            assert!(ptx.contains(&format!(".entry {symbol}(")), "{symbol}");
            assert!(ptx.contains(&format!("{symbol}_param_0[{}]", kernel.parameter_bytes)), "{symbol}");
            assert!(Kernel::of(symbol).is_some_and(|found| found.symbol == symbol), "{symbol}");
            assert_eq!(kernel.has_cubin(), kernel.registers.is_some(), "{symbol}");
            if let Some(cubin) = kernel.cubin().unwrap() {
                // A cubin is an ELF file, and its string table has the kernel's name.
                assert!(cubin.starts_with(b"\x7fELF"), "{symbol}");
                let name = format!(".text.{symbol}\0");
                assert!(cubin.windows(name.len()).any(|bytes| bytes == name.as_bytes()), "{symbol}");
            }
        }
    }

    #[test]
    fn a_damaged_stream_is_an_error() {
        static CUT: Streams = Streams::new(b"not a stream", b"neither");
        let (symbol, cubin) = ("none", Some(0..8));
        let kernel = Kernel { symbol, streams: &CUT, cubin, ptx: 0..8, registers: None, parameter_bytes: 0 };
        assert!(kernel.cubin().unwrap_err().to_string().contains("damaged"));
        assert!(kernel.ptx().unwrap_err().to_string().contains("damaged"));
    }
}
