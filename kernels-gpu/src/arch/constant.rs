//! The switch of a kernel that a specialisation constant sets, as the kernel's source reads it.

#[cfg(doc)]
use crate::ground::constants::Constants;

/// Switch of a kernel, 0 or 1, which [`bind`](crate::specialise::bind) may fix. It lies in the launch parameters, where
/// the general kernel and the CPU read it. `BIT` is its bit in [`Constants`].
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Constant<const BIT: u32>(u32);

impl<const BIT: u32> Constant<BIT> {
    /// Makes the launch parameter.
    pub const fn new(value: bool) -> Self {
        Constant(value as u32)
    }
    /// Returns its value. On the GPU this is a placeholder.
    ///
    /// LLVM can't move a placeholder across a branch. So code that selects between two values reads the switch before
    /// it computes them.
    #[cfg(target_arch = "nvptx64")]
    #[inline(always)]
    pub fn get(self) -> bool {
        let value: u32;
        // SAFETY: `specialise::bind` replaces the instruction by one that writes the register and nothing else.
        unsafe {
            core::arch::asm!(
                "mov.b32 {0}, FF_CONSTANT_{1};", out(reg32) value, const BIT, options(pure, nomem, nostack)
            );
        }
        value != 0
    }
    /// Returns its value, read once for each value of `of`. LLVM moves no such placeholder out of a loop that changes
    /// `of`, so that the general kernel keeps the switch in constant memory instead of a register.
    #[cfg(target_arch = "nvptx64")]
    #[inline(always)]
    pub fn get_for(self, of: u32) -> bool {
        let value: u32;
        // SAFETY: as for `get`; the first line is a comment.
        unsafe {
            core::arch::asm!(
                "// {1}", "mov.b32 {0}, FF_CONSTANT_{2};", out(reg32) value, in(reg32) of, const BIT,
                options(pure, nomem, nostack)
            );
        }
        value != 0
    }
    /// Returns its value.
    #[cfg(not(target_arch = "nvptx64"))]
    #[inline(always)]
    pub fn get_for(self, _: u32) -> bool {
        self.get()
    }
    /// Returns its value.
    #[cfg(not(target_arch = "nvptx64"))]
    #[inline(always)]
    pub fn get(self) -> bool {
        self.0 != 0
    }
}
