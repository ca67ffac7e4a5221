//! Division by a number that stays constant during a launch, by a multiplication and a shift (Granlund and Montgomery,
//! "Division by invariant integers using multiplication", PLDI 1994). A plain division takes some twenty instructions
//! on a GPU.

/// Divisor, with the multiplier and the shift that the host has computed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Divisor {
    pub value: u32,
    /// ⌈2^(31 + shift) / value⌉.
    multiplier: u32,
    /// ⌈log₂ value⌉.
    shift: u32,
}

impl Divisor {
    /// Makes a divisor of a value up to 2³¹. The value may be 0 if nothing is ever divided by it.
    pub const fn new(value: u32) -> Self {
        let divisor = if value == 0 { 1 } else { value };
        let shift = u32::BITS - (divisor - 1).leading_zeros();
        Divisor { value, multiplier: (1u64 << (31 + shift)).div_ceil(divisor as u64) as u32, shift }
    }

    /// Returns the divisor as numbers, for memory.
    pub const fn words(self) -> [u32; 3] {
        [self.value, self.multiplier, self.shift]
    }
    /// Returns the divisor of these numbers. Others than those of [`Divisor::words`] give meaningless quotients.
    #[inline(always)]
    pub const fn from_words([value, multiplier, shift]: [u32; 3]) -> Self {
        Divisor { value, multiplier, shift: shift % u32::BITS }
    }

    /// Returns quotient and remainder of a dividend below 2³¹.
    #[inline(always)]
    pub fn divide(self, dividend: u32) -> (u32, u32) {
        // SAFETY: ⌈log₂ value⌉ of a value up to 2³¹ is less than 32. A shift by a number that might be more would need
        // a mask, which takes a register.
        unsafe { core::hint::assert_unchecked(self.shift < u32::BITS) };
        let quotient = (((2 * dividend) as u64 * self.multiplier as u64) >> 32) as u32 >> self.shift;
        (quotient, dividend - quotient * self.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divides() {
        let edges = (0..31).flat_map(|bit| [(1u32 << bit) - 1, 1 << bit, (1 << bit) + 1]);
        let values: std::vec::Vec<u32> = edges.chain([3, 7, 10, 132, 641, 999_983, (1 << 31) - 1]).collect();
        for &value in values.iter().filter(|&&value| value > 0) {
            let divisor = Divisor::new(value);
            let multiples = (1..20).flat_map(|k| [k * value as u64 - 1, k * value as u64, k * value as u64 + 1]);
            for dividend in values.iter().map(|&x| x as u64).chain(multiples).filter(|&x| x < 1 << 31) {
                let dividend = dividend as u32;
                assert_eq!(divisor.divide(dividend), (dividend / value, dividend % value), "{dividend} / {value}");
            }
        }
    }
}
