//! Specialisation constants: switches of a kernel that are set after rustc has compiled it, as in Vulkan's SPIR-V.
//!
//! A switch is an ordinary condition in the kernel's source. On the GPU its value comes from a placeholder, an
//! instruction whose operand is not a number yet: `mov.b32 %r1, FF_CONSTANT_0;`. LLVM can't know the value, so the PTX
//! has the code of both outcomes. Before ptxas sees the PTX, [`bind`] replaces every placeholder:
//!
//! - by a number. ptxas then drops what can't run, and allocates registers for the rest. The kernel is specialised.
//! - by a load of the launch parameter. The kernel is general, and a few per cent slower.
//!
//! On the CPU the value is always read from the launch parameter.
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
    /// Name of each constant, by its bit.
    pub const NAMES: [&'static str; 2] = ["left", "right"];

    /// All constants are 0.
    pub const NONE: Constants = Constants(0);

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

/// Place of a specialisation constant in a kernel's launch parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConstantPlace {
    /// Bit of the constant in [`Constants`].
    pub bit: u32,
    /// Byte offset of its u32 from the start of the parameter.
    pub offset: u32,
}
