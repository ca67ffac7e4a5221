//! The compiled kernels of this build, each a module of its own.
//!
//! They lie in compressed streams, two for each family of kernels. The build writes the table, from source or when it
//! makes a package.

use std::io::Read;
use std::ops::Range;
use std::sync::OnceLock;

use lzma_rust2::LzmaReader;

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
    /// All cubins, unpacked at the first request for one.
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
pub(super) fn place(symbol: &str) -> Option<usize> {
    KERNELS.binary_search_by(|kernel| kernel.symbol.cmp(symbol)).ok()
}

/// Unpacks the first `size` bytes of a stream, or all if it is `None`.
fn unpack(stream: &[u8], size: Option<usize>) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let reader = LzmaReader::new_mem_limit(stream, u32::MAX, None)?;
    reader.take(size.map_or(u64::MAX, |size| size as u64)).read_to_end(&mut bytes)?;
    Ok(bytes)
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
    /// [`Error::BrokenKernel`] if the program's kernels are damaged.
    pub fn cubin(&self) -> Result<Option<&'static [u8]>> {
        let Some(range) = self.cubin.clone() else { return Ok(None) };
        let streams = self.streams;
        let unpacked =
            streams.unpacked_cubins.get_or_init(|| unpack(streams.cubins, None).map_err(|error| error.to_string()));
        let bytes = unpacked.as_ref().map_err(|error| self.damaged(error))?;
        bytes.get(range).map(Some).ok_or_else(|| self.damaged(&"its stream ends too early"))
    }

    /// Returns its PTX. Every call unpacks it again, because few programs need it even once.
    ///
    /// # Errors
    /// [`Error::BrokenKernel`] if the program's kernels are damaged.
    pub fn ptx(&self) -> Result<String> {
        let mut bytes = unpack(self.streams.ptx, Some(self.ptx.end)).map_err(|error| self.damaged(&error))?;
        if bytes.len() < self.ptx.end {
            return Err(self.damaged(&"its stream ends too early"));
        }
        bytes.drain(..self.ptx.start);
        String::from_utf8(bytes).map_err(|error| self.damaged(&error))
    }

    fn damaged(&self, reason: &dyn std::fmt::Display) -> Error {
        let message = format!("the kernels in this program are damaged, build it again: {reason}");
        Error::BrokenKernel { symbol: self.symbol, message }
    }
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
