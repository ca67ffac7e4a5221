//! The compiled kernels that this build holds.

use std::io::Read;

use flate2::read::ZlibDecoder;

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
pub(super) fn place(symbol: &str) -> Option<usize> {
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
    /// [`Error::BrokenKernel`] for a build whose PTX is damaged.
    pub fn ptx(&self) -> Result<String> {
        let mut text = String::new();
        let unpacked = ZlibDecoder::new(self.ptx).read_to_string(&mut text);
        unpacked.map_err(|error| self.broken(format!("its PTX is damaged: {error}")))?;
        Ok(text)
    }

    /// Bytes of its by-value parameter, as its PTX states.
    pub(super) fn parameter_bytes(&self) -> Result<u32> {
        let text = self.ptx()?;
        let stated = text.split_once("_param_0[").and_then(|(_, rest)| rest.split_once(']'));
        let stated = stated.and_then(|(bytes, _)| bytes.parse().ok());
        stated.ok_or_else(|| self.broken("its PTX states no parameter".to_owned()))
    }

    fn broken(&self, message: String) -> Error {
        Error::BrokenKernel { symbol: self.symbol, message }
    }
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
