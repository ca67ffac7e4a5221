//! The compiled kernels of this build, each a module of its own, in all the forms that were prebuilt.
//!
//! They lie in compressed streams, two for each family of kernels. That of PTX has a text for each kernel, that of
//! cubins one for each form. The build writes the table, from source or when it makes a package.

use std::io::Read;
use std::ops::Range;
use std::sync::OnceLock;

use kernels_gpu::ground::constants::{ConstantPlace, Constants, Form};
use kernels_gpu::specialise;
use lzma_rust2::LzmaReader;

use super::Specialise;
use crate::error::{Error, Result};

/// One compiled kernel.
#[derive(Debug)]
pub struct Kernel {
    /// Name of its entry point.
    pub symbol: &'static str,
    /// Its family's streams.
    streams: &'static Streams,
    /// Its bytes in the stream of PTX.
    ptx: Range<usize>,
    /// Size of its by-value parameter in bytes, as its PTX declares it.
    pub parameter_bytes: u32,
    /// Places of its specialisation constants in that parameter.
    pub constants: &'static [ConstantPlace],
    /// Its forms that the build holds as machine code; none if the build had no ptxas.
    pub cubins: &'static [Cubin],
}

/// Machine code of one form of a kernel.
#[derive(Debug)]
pub struct Cubin {
    /// The form, of the kernel's own constants alone.
    pub form: Form,
    /// Its bytes in the stream of cubins.
    bytes: Range<usize>,
    /// Number of registers of a thread at entry.
    pub registers: u32,
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

    /// Returns the name of one of its forms: its symbol, followed by `_general`, or by the names of the constants that
    /// are 1 and of those that are open. A kernel without constants has its symbol alone.
    pub fn name(&self, form: Form) -> String {
        specialise::name(self.symbol, self.constants, form)
    }

    /// Finds a form, if the build holds it.
    pub fn find(&self, form: Form) -> Option<&'static Cubin> {
        self.cubins.iter().find(|cubin| cubin.form == form)
    }

    /// Returns the form specialised to `constants`. Constants that the kernel lacks are ignored.
    pub(super) fn specialised(&self, constants: Constants) -> Form {
        Form::of(constants.only(self.constants))
    }

    /// Returns the general form, or the only one of a kernel without constants.
    pub fn general(&self) -> Form {
        Form::GENERAL.only(self.constants)
    }

    /// Chooses the form to load for a launch that wants the form `specialised`, which is not loaded yet.
    pub(super) fn choose(&self, specialised: Form, policy: Specialise) -> Form {
        let open = |form: &Form| form.open().bits().count_ones();
        let covering = self.cubins.iter().map(|cubin| cubin.form).filter(|form| form.covers(specialised.values()));
        let chosen = match policy {
            Specialise::Prebuilt => covering.min_by_key(open),
            Specialise::AtFirstUse => None,
            Specialise::Never => covering.max_by_key(open),
        };
        chosen.unwrap_or(specialised)
    }

    /// Returns the machine code of one of its [`cubins`](Kernel::cubins). The first call of a family unpacks all cubins
    /// of that family.
    ///
    /// # Errors
    /// [`Error::BrokenKernel`] if the program's kernels are damaged.
    pub fn machine_code(&self, cubin: &Cubin) -> Result<&'static [u8]> {
        let streams = self.streams;
        let unpacked =
            streams.unpacked_cubins.get_or_init(|| unpack(streams.cubins, None).map_err(|error| error.to_string()));
        let bytes = unpacked.as_ref().map_err(|error| self.damaged(error))?;
        bytes.get(cubin.bytes.clone()).ok_or_else(|| self.damaged(&"its stream ends too early"))
    }

    /// Returns the PTX of a form. Every call unpacks it again, because few programs need it even once.
    ///
    /// # Errors
    /// [`Error::BrokenKernel`] if the program's kernels are damaged.
    pub fn ptx(&self, form: Form) -> Result<String> {
        let mut bytes = unpack(self.streams.ptx, Some(self.ptx.end)).map_err(|error| self.damaged(&error))?;
        if bytes.len() < self.ptx.end {
            return Err(self.damaged(&"its stream ends too early"));
        }
        bytes.drain(..self.ptx.start);
        let text = String::from_utf8(bytes).map_err(|error| self.damaged(&error))?;
        specialise::bind(&text, self.symbol, self.constants, form).map_err(|error| self.damaged(&error))
    }

    fn damaged(&self, reason: &dyn std::fmt::Display) -> Error {
        let message = format!("the kernels in this program are damaged, build it again: {reason}");
        Error::BrokenKernel { symbol: self.symbol, message }
    }
}

#[cfg(test)]
impl Kernel {
    /// Returns a kernel of this build, with other constants and other forms. All forms have the code of the first.
    pub(super) fn with_forms(&self, constants: &'static [ConstantPlace], forms: &[Form]) -> Self {
        let bytes = self.cubins.first().map_or(0..0, |cubin| cubin.bytes.clone());
        let cubin = |&form: &_| Cubin { form, bytes: bytes.clone(), registers: 0 };
        let cubins = forms.iter().map(cubin).collect::<Vec<_>>().leak();
        Kernel { ptx: self.ptx.clone(), constants, cubins, ..*self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RIGHT: Constants = Constants::NONE.with(Constants::RIGHT, true);
    const BOTH: Constants = RIGHT.with(Constants::LEFT, true);

    /// Every combination of a kernel's constants.
    fn combinations(kernel: &Kernel) -> Vec<Constants> {
        let mut all: Vec<_> =
            (0..1 << Constants::NAMES.len()).map(|bits| Constants::from_bits(bits).only(kernel.constants)).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    #[test]
    fn every_kernel_is_in_its_streams() {
        for kernel in KERNELS {
            let symbol = kernel.symbol;
            assert!(Kernel::of(symbol).is_some_and(|found| found.symbol == symbol), "{symbol}");
            assert!(kernel.constants.iter().all(|place| place.offset + 4 <= kernel.parameter_bytes), "{symbol}");
            // Every text that the host may give to the driver's compiler, and the general one.
            for form in combinations(kernel).into_iter().map(Form::of).chain([kernel.general()]) {
                let ptx = kernel.ptx(form).unwrap();
                assert!(ptx.contains(&format!(".entry {symbol}(")), "{symbol}");
                assert!(ptx.contains(&format!("{symbol}_param_0[{}]", kernel.parameter_bytes)), "{symbol}");
                assert!(!ptx.contains("FF_CONSTANT"), "{symbol}");
            }
            for cubin in kernel.cubins {
                let code = kernel.machine_code(cubin).unwrap();
                // A cubin is an ELF file, and its string table has the kernel's name.
                assert!(code.starts_with(b"\x7fELF"), "{symbol}");
                let name = format!(".text.{symbol}\0");
                assert!(code.windows(name.len()).any(|bytes| bytes == name.as_bytes()), "{symbol}");
            }
        }
    }

    #[test]
    fn machine_code_has_every_form_once_and_covers_every_combination() {
        for kernel in KERNELS.iter().filter(|_| KERNEL_ASSEMBLER.is_some()) {
            for cubin in kernel.cubins {
                assert!(kernel.find(cubin.form).is_some_and(|found| found.bytes == cubin.bytes));
                assert_eq!(cubin.form, cubin.form.only(kernel.constants));
            }
            // Rows for some masks alone, which never need others, are told by their names.
            if kernel.symbol.contains("_c2") || kernel.symbol.contains("_n") {
                continue;
            }
            for constants in combinations(kernel) {
                assert!(kernel.cubins.iter().any(|cubin| cubin.form.covers(constants)), "{}", kernel.symbol);
            }
        }
    }

    static CUT: Streams = Streams::new(b"not a stream", b"neither");

    const fn kernel(constants: &'static [ConstantPlace], cubins: &'static [Cubin]) -> Kernel {
        Kernel { symbol: "none", streams: &CUT, ptx: 0..8, parameter_bytes: 8, constants, cubins }
    }

    const PLACES: &[ConstantPlace] =
        &[ConstantPlace { bit: Constants::LEFT, offset: 0 }, ConstantPlace { bit: Constants::RIGHT, offset: 4 }];
    const GENERAL: Form = Form::of(Constants::NONE).opening(Constants::LEFT).opening(Constants::RIGHT);
    const ONE: &[Cubin] = &[Cubin { form: Form::of(Constants::NONE), bytes: 0..8, registers: 168 }];
    const THREE: &[Cubin] = &[
        Cubin { form: GENERAL, bytes: 0..8, registers: 168 },
        Cubin { form: Form::of(RIGHT), bytes: 8..16, registers: 168 },
        Cubin { form: Form::of(BOTH).opening(Constants::RIGHT), bytes: 8..16, registers: 168 },
    ];

    #[test]
    fn the_prebuilt_form_with_the_fewest_open_constants_is_preferred_to_a_compiler() {
        let chosen = |kernel: &Kernel, constants, policy| kernel.choose(kernel.specialised(constants), policy);
        let built = kernel(PLACES, THREE);
        assert_eq!(chosen(&built, RIGHT, Specialise::Prebuilt), Form::of(RIGHT));
        assert_eq!(chosen(&built, RIGHT, Specialise::AtFirstUse), Form::of(RIGHT));
        assert_eq!(chosen(&built, Constants::NONE, Specialise::Prebuilt), GENERAL);
        assert_eq!(chosen(&built, BOTH, Specialise::Prebuilt), Form::of(BOTH).opening(Constants::RIGHT));
        assert_eq!(chosen(&built, BOTH, Specialise::AtFirstUse), Form::of(BOTH));
        assert_eq!(chosen(&built, RIGHT, Specialise::Never), GENERAL);
        // Without machine code the driver compiles in any case, so it may as well compile the specialised form.
        assert_eq!(chosen(&kernel(PLACES, &[]), BOTH, Specialise::Prebuilt), Form::of(BOTH));
        // A constant that the kernel lacks does not matter.
        assert_eq!(chosen(&kernel(&PLACES[1..], THREE), BOTH, Specialise::Prebuilt), Form::of(RIGHT));
        for (cubins, policy) in
            [(ONE, Specialise::Prebuilt), (ONE, Specialise::AtFirstUse), (&[], Specialise::Prebuilt)]
        {
            assert_eq!(chosen(&kernel(&[], cubins), BOTH, policy), Form::of(Constants::NONE));
        }
    }

    #[test]
    fn a_damaged_stream_is_an_error() {
        let kernel = kernel(PLACES, THREE);
        for cubin in kernel.cubins {
            assert!(kernel.machine_code(cubin).unwrap_err().to_string().contains("damaged"));
        }
        for form in [GENERAL, Form::of(RIGHT)] {
            assert!(kernel.ptx(form).unwrap_err().to_string().contains("damaged"));
        }
    }
}
