//! Specialisation constants: switches of a kernel that are set after rustc has compiled it, as in Vulkan's SPIR-V.
//!
//! A switch is an ordinary condition in the kernel's source. On the GPU its value comes from a placeholder, an
//! instruction whose operand is not a number yet: `mov.b32 %r1, FF_CONSTANT_0;`. LLVM can't know the value, so the PTX
//! has the code of both outcomes. Before ptxas sees the PTX, [`bind`] replaces every placeholder:
//!
//! - by a number. ptxas then drops what can't run, and allocates registers for the rest. The kernel is specialised.
//! - by a load of the launch parameter. The kernel has both outcomes, and is a few per cent slower.
//!
//! Each combination of these choices is a [`Form`] of the kernel. On the CPU the value is always read from the launch
//! parameter.
//!
//! [`bind`]: crate::specialise::bind

/// Values of all specialisation constants that a kernel has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Constants(u32);

impl Constants {
    /// Bit of the switch of masks with a left bound.
    pub const LEFT: u32 = 0;
    /// Bit of the switch of masks with a right bound.
    pub const RIGHT: u32 = 1;
    /// Bit of the switch of softcap.
    pub const CAP: u32 = 2;
    /// Bit of the switch of ALiBi.
    pub const ALIBI: u32 = 3;
    /// Bit of the switch of dropout whose seed and offset are read from device memory.
    pub const SEED: u32 = 4;
    /// Bit of the switch of sequences of different lengths.
    pub const LENGTHS: u32 = 5;
    /// Name of each constant, by its bit.
    pub const NAMES: [&'static str; 6] = ["left", "right", "cap", "alibi", "seed", "lengths"];

    /// All constants are 0.
    pub const NONE: Constants = Constants(0);
    /// All constants are 1.
    pub const ALL: Constants = Constants((1 << Self::NAMES.len()) - 1);

    /// Makes a set of the constants whose bits are 1.
    pub const fn from_bits(bits: u32) -> Self {
        Constants(bits)
    }
    /// Returns the bits of the constants that are 1.
    pub const fn bits(self) -> u32 {
        self.0
    }
    /// Sets one constant to a value.
    #[must_use]
    pub const fn with(self, bit: u32, value: bool) -> Self {
        Constants(self.0 & !(1 << bit) | (value as u32) << bit)
    }
    /// Returns the value of one constant.
    pub const fn has(self, bit: u32) -> bool {
        self.0 >> bit & 1 != 0
    }
    /// Returns the same values with 0 for constants that are not in `places`.
    #[must_use]
    pub fn only(self, places: &[ConstantPlace]) -> Self {
        places.iter().fold(Constants::NONE, |only, place| only.with(place.bit, self.has(place.bit)))
    }
}

/// Form of a kernel: the value of each specialisation constant, but of those that stay open. The kernel reads these
/// from its launch parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Form {
    /// Values of the constants; 0 for those that are open.
    values: Constants,
    open: Constants,
}

impl Form {
    /// The general form: every constant is open.
    pub const GENERAL: Form = Form { values: Constants::NONE, open: Constants::ALL };

    /// Returns the specialised form of these values.
    pub const fn of(values: Constants) -> Self {
        Form { values, open: Constants::NONE }
    }
    /// Makes a form from the bits of the constants that are 1, and of those that are open.
    pub const fn from_bits(values: u32, open: u32) -> Self {
        Form { values: Constants(values & !open), open: Constants(open) }
    }
    /// Leaves a constant open.
    #[must_use]
    pub const fn opening(self, bit: u32) -> Self {
        Form { values: self.values.with(bit, false), open: self.open.with(bit, true) }
    }
    /// Gives a constant a value.
    #[must_use]
    pub const fn closing(self, bit: u32, value: bool) -> Self {
        Form { values: self.values.with(bit, value), open: self.open.with(bit, false) }
    }
    /// Returns the values of the constants; 0 for those that are open.
    pub const fn values(self) -> Constants {
        self.values
    }
    /// Returns the constants that are open.
    pub const fn open(self) -> Constants {
        self.open
    }
    /// Returns the value of a constant, or nothing if it is open.
    pub const fn value(self, bit: u32) -> Option<bool> {
        if self.open.has(bit) { None } else { Some(self.values.has(bit)) }
    }
    /// Returns the same form of a kernel that has the constants in `places` alone.
    #[must_use]
    pub fn only(self, places: &[ConstantPlace]) -> Self {
        Form { values: self.values.only(places), open: self.open.only(places) }
    }
    /// True if a kernel in this form computes what the constants `wanted` say.
    pub const fn covers(self, wanted: Constants) -> bool {
        (self.values.bits() ^ wanted.bits()) & !self.open.bits() == 0
    }
}

/// Place of a specialisation constant in a kernel's launch parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConstantPlace {
    /// Bit of the constant in [`Constants`].
    pub bit: u32,
    /// Byte offset of its u32 from the start of the parameter.
    pub offset: u32,
}
