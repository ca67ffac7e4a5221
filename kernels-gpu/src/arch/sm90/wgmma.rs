//! Asynchronous matrix products of a warpgroup, m64nNk16 (PTX ISA, wgmma.mma_async).
//!
//! Between issue and wait the hardware owns the accumulators, and LLVM does not know it. So registers pass through
//! [`tie`] before they are handed over and after the wait: an empty `asm!` that LLVM may not look through, which keeps
//! every read and write of them on its side of the fence.

use core::arch::asm;
use core::mem::MaybeUninit;

use super::fragment::{Fragment, Operand};
use super::math::{Packed, fresh};
use crate::variants::Dtype;

/// A matrix in shared memory as wgmma sees it (PTX ISA, matrix descriptor), in the 128-byte swizzle.
#[derive(Clone, Copy)]
pub struct Descriptor {
    /// Start address and leading-dimension offset, in 16-byte units.
    low: u32,
}

impl Descriptor {
    /// The upper half: 1024 bytes from one group of eight rows to the next, 128-byte swizzle.
    const HIGH: u32 = 1 << 30 | 1024 >> 4;

    /// A tile whose rows hold consecutive k: Q, and K as the right operand of Q·Kᵀ.
    #[inline(always)]
    pub fn k_major(address: u32) -> Self {
        Self::new(address, 16)
    }

    /// A tile whose rows hold one k each: V as the right operand of P·V. `panel` is the bytes from one 64-column panel
    /// to the next.
    #[inline(always)]
    pub fn mn_major(address: u32, panel: u32) -> Self {
        Self::new(address, panel)
    }

    #[inline(always)]
    fn new(address: u32, leading: u32) -> Self {
        Descriptor { low: (fresh(address) & 0x3ffff) >> 4 | leading >> 4 << 16 }
    }

    /// The same matrix `bytes` further on.
    #[inline(always)]
    pub fn offset(self, bytes: u32) -> Self {
        Descriptor { low: self.low + (bytes >> 4) }
    }

    #[inline(always)]
    fn bits(self) -> u64 {
        (Self::HIGH as u64) << 32 | self.low as u64
    }
}

/// Puts registers beyond LLVM's sight: what comes before stays before, what comes after stays after.
#[inline(always)]
pub fn tie<const N8: usize>(x: &mut Fragment<N8>) {
    for [a, b, c, d] in &mut x.0 {
        // SAFETY: emits a comment.
        unsafe {
            asm!(
                "// {0} {1} {2} {3}",
                inout(reg32) * a,
                inout(reg32) * b,
                inout(reg32) * c,
                inout(reg32) * d,
                options(nostack)
            );
        }
    }
}

/// As [`tie`], for a left operand.
#[inline(always)]
pub fn tie_operand<const N8: usize>(x: &mut Operand<N8>) {
    for [a, b] in &mut x.0 {
        // SAFETY: emits a comment.
        unsafe { asm!("// {0} {1}", inout(reg32) * a, inout(reg32) * b, options(nostack)) }
    }
}

/// Orders register accesses before the products that follow (PTX ISA, wgmma.fence).
#[inline(always)]
pub fn fence() {
    // SAFETY: all warps of the warpgroup run this, converged.
    unsafe { asm!("wgmma.fence.sync.aligned;", options(nostack)) }
}

/// Closes a group of products.
#[inline(always)]
pub fn commit() {
    // SAFETY: as `fence`.
    unsafe { asm!("wgmma.commit_group.sync.aligned;", options(nostack)) }
}

/// Waits until at most `LATER` groups are in flight.
#[inline(always)]
pub fn wait<const LATER: usize>() {
    // SAFETY: as `fence`.
    unsafe { asm!("wgmma.wait_group.sync.aligned {0};", const LATER, options(nostack)) }
}

macro_rules! products {
    ($($n8:literal $n:literal [$first:literal $($i:literal)*];)*) => {
        /// One k16 step of A·B with both in shared memory, rows of consecutive k, into fresh accumulators.
        ///
        /// # Safety
        /// The descriptors name tiles of 64 × 16 and 8·N8 × 16 elements of E that stay unwritten until the wait.
        #[inline(always)]
        pub unsafe fn start<E: Packed, const N8: usize>(to: &mut MaybeUninit<Fragment<N8>>, a: Descriptor, b: Descriptor) {
            let d: *mut f32 = to.as_mut_ptr().cast();
            // SAFETY: `d` has 4·N8 registers, each arm's own count; the caller's promise covers the reads.
            unsafe {
                match (N8, E::DTYPE) {
                    $(($n8, Dtype::F16) => product!(out, d, $n, "f16", $first, $($i)*, smem a, b),
                      ($n8, Dtype::Bf16) => product!(out, d, $n, "bf16", $first, $($i)*, smem a, b),)*
                    _ => unreachable!(),
                }
            }
        }

        /// One k16 step of D + A·B with both in shared memory, rows of consecutive k.
        ///
        /// # Safety
        /// As [`start`], and `to` holds the steps before.
        #[inline(always)]
        pub unsafe fn add<E: Packed, const N8: usize>(to: &mut MaybeUninit<Fragment<N8>>, a: Descriptor, b: Descriptor) {
            let d: *mut f32 = to.as_mut_ptr().cast();
            // SAFETY: as `start`.
            unsafe {
                match (N8, E::DTYPE) {
                    $(($n8, Dtype::F16) => product!(inout, d, $n, "f16", $first, $($i)*, smem a, b),
                      ($n8, Dtype::Bf16) => product!(inout, d, $n, "bf16", $first, $($i)*, smem a, b),)*
                    _ => unreachable!(),
                }
            }
        }

        /// One k16 step of A·B with both in shared memory, rows of one k each, into fresh accumulators.
        ///
        /// # Safety
        /// As [`start`], with tiles of 16 × 64 and 16 × 8·N8 elements.
        #[inline(always)]
        pub unsafe fn start_transposed<E: Packed, const N8: usize>(
            to: &mut MaybeUninit<Fragment<N8>>,
            a: Descriptor,
            b: Descriptor,
        ) {
            let d: *mut f32 = to.as_mut_ptr().cast();
            // SAFETY: as `start`.
            unsafe {
                match (N8, E::DTYPE) {
                    $(($n8, Dtype::F16) => product!(out, d, $n, "f16", $first, $($i)*, transposed a, b),
                      ($n8, Dtype::Bf16) => product!(out, d, $n, "bf16", $first, $($i)*, transposed a, b),)*
                    _ => unreachable!(),
                }
            }
        }

        /// One k16 step of D + A·B with both in shared memory, rows of one k each.
        ///
        /// # Safety
        /// As [`start_transposed`], and `to` holds the steps before.
        #[inline(always)]
        pub unsafe fn add_transposed<E: Packed, const N8: usize>(
            to: &mut MaybeUninit<Fragment<N8>>,
            a: Descriptor,
            b: Descriptor,
        ) {
            let d: *mut f32 = to.as_mut_ptr().cast();
            // SAFETY: as `start`.
            unsafe {
                match (N8, E::DTYPE) {
                    $(($n8, Dtype::F16) => product!(inout, d, $n, "f16", $first, $($i)*, transposed a, b),
                      ($n8, Dtype::Bf16) => product!(inout, d, $n, "bf16", $first, $($i)*, transposed a, b),)*
                    _ => unreachable!(),
                }
            }
        }

        /// One k16 step of D + A·B with A in registers and B in shared memory, rows of one k each.
        ///
        /// # Safety
        /// `b` names a tile of 16 × 8·N8 elements of E that stays unwritten until the wait.
        #[inline(always)]
        pub unsafe fn add_registers<E: Packed, const N8: usize>(to: &mut Fragment<N8>, a: [u32; 4], b: Descriptor) {
            let d: *mut f32 = to.0.as_mut_ptr().cast();
            // SAFETY: as `start`.
            unsafe {
                match (N8, E::DTYPE) {
                    $(($n8, Dtype::F16) => product!(inout, d, $n, "f16", $first, $($i)*, registers a, b),
                      ($n8, Dtype::Bf16) => product!(inout, d, $n, "bf16", $first, $($i)*, registers a, b),)*
                    _ => unreachable!(),
                }
            }
        }
    };
}

/// The instruction: direction of the accumulators, where they are, N, dtype, their indices, and the operands.
macro_rules! product {
    (@mnemonic $n:literal $dtype:literal) => {
        concat!("wgmma.mma_async.sync.aligned.m64n", $n, "k16.f32.", $dtype, ".", $dtype, " ")
    };
    (out, $($rest:tt)*) => { product!(@emit out, "0", $($rest)*) };
    (inout, $($rest:tt)*) => { product!(@emit inout, "1", $($rest)*) };
    (@emit $direction:ident, $accumulate:literal, $d:ident, $n:literal, $dtype:literal, $first:literal, $($i:literal)*,
     smem $a:ident, $b:ident) => {
        product!(@descriptors "0, 0", $direction, $accumulate, $d, $n, $dtype, $first, $($i)*, $a, $b)
    };
    (@emit $direction:ident, $accumulate:literal, $d:ident, $n:literal, $dtype:literal, $first:literal, $($i:literal)*,
     transposed $a:ident, $b:ident) => {
        product!(@descriptors "1, 1", $direction, $accumulate, $d, $n, $dtype, $first, $($i)*, $a, $b)
    };
    (@descriptors $transpose:literal, $direction:ident, $accumulate:literal, $d:ident, $n:literal, $dtype:literal,
     $first:literal, $($i:literal)*, $a:ident, $b:ident) => {
        asm!(
            concat!("{{ .reg .pred p; setp.ne.b32 p, ", $accumulate, ", 0; ", product!(@mnemonic $n $dtype),
                    "{{{", $first, "}", $(", {", $i, "}",)* "}}, {a}, {b}, p, 1, 1, ", $transpose, "; }}"),
            $direction(reg32) *$d.add($first), $($direction(reg32) *$d.add($i),)*
            a = in(reg64) $a.bits(), b = in(reg64) $b.bits(), options(nostack)
        )
    };
    (@emit $direction:ident, $accumulate:literal, $d:ident, $n:literal, $dtype:literal, $first:literal, $($i:literal)*,
     registers $a:ident, $b:ident) => {
        asm!(
            concat!("{{ .reg .pred p; setp.ne.b32 p, ", $accumulate, ", 0; ", product!(@mnemonic $n $dtype),
                    "{{{", $first, "}", $(", {", $i, "}",)* "}}, {{{a0}, {a1}, {a2}, {a3}}}, {b}, p, 1, 1, 1; }}"),
            $direction(reg32) *$d.add($first), $($direction(reg32) *$d.add($i),)*
            a0 = in(reg32) $a[0], a1 = in(reg32) $a[1], a2 = in(reg32) $a[2], a3 = in(reg32) $a[3],
            b = in(reg64) $b.bits(), options(nostack)
        )
    };
}

products! {
    8 64 [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23
         24 25 26 27 28 29 30 31];
    10 80 [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23
         24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39];
    12 96 [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23
         24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47];
    14 112 [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23
         24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47
         48 49 50 51 52 53 54 55];
    16 128 [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23
         24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47
         48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63];
    22 176 [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23
         24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47
         48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64 65 66 67 68 69 70 71
         72 73 74 75 76 77 78 79 80 81 82 83 84 85 86 87];
    24 192 [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23
         24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47
         48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64 65 66 67 68 69 70 71
         72 73 74 75 76 77 78 79 80 81 82 83 84 85 86 87 88 89 90 91 92 93 94 95];
    32 256 [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23
         24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47
         48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64 65 66 67 68 69 70 71
         72 73 74 75 76 77 78 79 80 81 82 83 84 85 86 87 88 89 90 91 92 93 94 95
         96 97 98 99 100 101 102 103 104 105 106 107 108 109 110 111 112 113 114 115 116 117 118 119
         120 121 122 123 124 125 126 127];
}
