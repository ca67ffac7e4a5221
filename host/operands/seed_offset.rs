//! Seed and offset of dropout as an input of both passes.

use super::{
    pass::{Lines, Pass, Role, VisitedLine, rows},
    place::Slice,
};
use crate::error::Result;

/// Number of f32 that seed and offset take.
pub(super) const WORDS: usize = 2 * WORDS_EACH;
/// Number of f32 that a u64 takes.
pub(super) const WORDS_EACH: usize = size_of::<u64>() / size_of::<f32>();

/// Seed and offset of dropout, two u64 in memory of the machine. Kernels read them, so that a captured graph draws
/// other weights when the memory has other numbers ([`Dropout::from_memory`](crate::Dropout::from_memory)).
///
/// It is made from `&[u64]` for [`Cpu`](crate::Cpu), from device memory of u64 for the GPU backend, and from an address
/// for raw calls; [`Backend::seed_offset`](crate::Backend::seed_offset) makes it for any backend. On a GPU the address
/// is a multiple of 16. `L` is the machine's memory of f32, as the other optional inputs have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeedOffset<L>(L);

impl<L> SeedOffset<L> {
    /// Applies `f` to the memory.
    #[cfg(feature = "cli")]
    pub(crate) fn map<U>(self, f: impl FnOnce(L) -> U) -> SeedOffset<U> {
        SeedOffset(f(self.0))
    }

    /// Borrows the memory.
    #[cfg(feature = "cli")]
    pub(crate) fn as_ref(&self) -> SeedOffset<&L> {
        SeedOffset(&self.0)
    }

    /// Names memory of u64 by the same memory as f32.
    #[cfg(any(feature = "cuda", test))]
    pub(crate) fn of_words(words: L) -> Self {
        SeedOffset(words)
    }

    /// Returns the address.
    pub(crate) fn address(self) -> u64
    where
        L: Slice,
    {
        self.0.memory().address
    }
}

impl SeedOffset<u64> {
    /// Names seed and offset by their address.
    pub const fn at(address: u64) -> Self {
        SeedOffset(address)
    }

    /// Returns the address.
    pub const fn raw(self) -> u64 {
        self.0
    }
}

impl From<u64> for SeedOffset<u64> {
    fn from(address: u64) -> Self {
        SeedOffset::at(address)
    }
}

impl<'a> From<&'a [u64]> for SeedOffset<&'a [f32]> {
    fn from(numbers: &'a [u64]) -> Self {
        SeedOffset(as_words(numbers))
    }
}

impl<'a, const LEN: usize> From<&'a [u64; LEN]> for SeedOffset<&'a [f32]> {
    fn from(numbers: &'a [u64; LEN]) -> Self {
        SeedOffset(as_words(numbers))
    }
}

/// Returns the same memory as f32.
fn as_words(numbers: &[u64]) -> &[f32] {
    bytemuck::cast_slice(numbers)
}

impl<L, X: Lines<L>> Pass<X> for SeedOffset<L> {
    type Of = SeedOffset<VisitedLine<X, L>>;

    fn visit(self, visitor: &mut X) -> Result<Self::Of> {
        Ok(SeedOffset(visitor.line(rows::SEED_OFFSET, Role::Input, self.0)?))
    }
}
