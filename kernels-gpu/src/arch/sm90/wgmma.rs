//! Asynchronous matrix products of a warpgroup, m64nNk16 (PTX ISA, wgmma.mma_async).
//!
//! Between issue and wait the hardware owns the accumulators, which LLVM does not know. So registers pass through
//! [`tie`] before they are handed over and after the wait. It is an empty `asm!`, opaque to LLVM, which keeps every
//! read and write of them on its side of the fence.

use core::arch::asm;
use core::mem::MaybeUninit;

use super::fragment::{Fragment, Operand};
use super::math::{Packed, fresh};
use crate::arch::Pending;
use crate::element::Dtype;

/// Matrix in shared memory, described for wgmma (PTX ISA, matrix descriptor), in the 128-byte swizzle.
#[derive(Clone, Copy)]
pub struct Descriptor {
    /// Start address and leading-dimension offset, in 16-byte units.
    low: u32,
    major: Major,
}

/// Dimension that is contiguous in a row of a tile.
#[derive(Clone, Copy)]
enum Major {
    /// K-major: a row holds consecutive k.
    K,
    /// MN-major: a row holds consecutive rows of the left operand, or columns of the right one, of one k.
    Mn,
}

impl Descriptor {
    /// Upper half of a descriptor: 1024 bytes from one group of eight rows to the next, 128-byte swizzle.
    const HIGH: u32 = 1 << 30 | 1024 >> 4;

    /// Describes a tile whose rows hold consecutive k: Q, and K as the right operand of Q·Kᵀ.
    #[inline(always)]
    pub fn k_major(address: u32) -> Self {
        Self::new(address, 16, Major::K)
    }

    /// Describes a tile whose rows hold one k each: V as the right operand of P·V, or dSᵀ as the left one of dS·K.
    /// `panel` is the distance in bytes from one 64-column panel to the next.
    #[inline(always)]
    pub fn mn_major(address: u32, panel: u32) -> Self {
        Self::new(address, panel, Major::Mn)
    }

    #[inline(always)]
    fn new(address: u32, leading: u32, major: Major) -> Self {
        Descriptor { low: (fresh(address) & 0x3ffff) >> 4 | leading >> 4 << 16, major }
    }

    /// Returns the descriptor of the matrix `bytes` further on.
    #[inline(always)]
    pub fn offset(self, bytes: u32) -> Self {
        Descriptor { low: self.low + (bytes >> 4), ..self }
    }

    #[inline(always)]
    fn bits(self) -> u64 {
        (Self::HIGH as u64) << 32 | self.low as u64
    }
}

/// Makes registers opaque to LLVM at this point: earlier accesses stay before it, later ones after it.
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

/// Makes the registers of a left operand opaque to LLVM, as [`tie`] does.
#[inline(always)]
fn tie_operand<const N8: usize>(x: &mut Operand<N8>) {
    for [a, b] in &mut x.0 {
        // SAFETY: emits a comment.
        unsafe { asm!("// {0} {1}", inout(reg32) * a, inout(reg32) * b, options(nostack)) }
    }
}

/// Orders register accesses before the products that follow (PTX ISA, wgmma.fence).
#[inline(always)]
fn fence() {
    // SAFETY: I4, all warps of the warpgroup are converged and run this.
    unsafe { asm!("wgmma.fence.sync.aligned;", options(nostack)) }
}

/// Closes a group of products.
#[inline(always)]
fn commit() {
    // SAFETY: I4, all warps of the warpgroup are converged and run this.
    unsafe { asm!("wgmma.commit_group.sync.aligned;", options(nostack)) }
}

/// Waits until at most `LATER` groups of products are in flight.
#[inline(always)]
pub fn wait<const LATER: usize>() {
    // SAFETY: I4, all warps of the warpgroup are converged and run this.
    unsafe { asm!("wgmma.wait_group.sync.aligned {0};", const LATER, options(nostack)) }
}

/// Issues A·B with both in shared memory. `operands` names the tiles of each k16 step.
///
/// # Safety
/// There is at least one step. The descriptors name tiles of 64 × 16 and 16 × 8·N8 elements of E. Both have the same
/// major, are full and stay unwritten until the wait.
#[inline(always)]
pub unsafe fn multiply<E: Packed, const N8: usize>(
    steps: u32,
    operands: impl Fn(u32) -> [Descriptor; 2],
) -> Pending<Fragment<N8>> {
    let mut d = MaybeUninit::uninit();
    fence();
    for step in 0..steps {
        let [a, b] = operands(step);
        // SAFETY: the caller's promise.
        unsafe {
            if step == 0 {
                start::<E, N8>(&mut d, a, b);
            } else {
                add::<E, N8>(&mut d, a, b);
            }
        }
    }
    commit();
    // SAFETY: the first step wrote every register.
    Pending(unsafe { d.assume_init() })
}

/// Issues A·B with A in registers and B in shared memory. The columns of B hold consecutive k; `b` names its tile of
/// each k16 step.
///
/// # Safety
/// K8 is not 0. The descriptors name tiles of 16 × 8·N8 elements of E that are full and stay unwritten until the wait.
#[inline(always)]
pub unsafe fn multiply_registers<E: Packed, const K8: usize, const N8: usize>(
    a: &Operand<K8>,
    b: impl Fn(u32) -> Descriptor,
) -> Pending<Fragment<N8>> {
    let mut d = MaybeUninit::uninit();
    fence();
    for step in 0..K8 / 2 {
        let [[a0, a1], [a2, a3]] = [a.0[2 * step], a.0[2 * step + 1]];
        // SAFETY: the caller's promise.
        unsafe {
            if step == 0 {
                start_registers::<E, N8>(&mut d, [a0, a1, a2, a3], b(0));
            } else {
                add_registers::<E, N8>(d.assume_init_mut(), [a0, a1, a2, a3], b(step as u32));
            }
        }
    }
    commit();
    // SAFETY: the first step wrote every register.
    Pending(unsafe { d.assume_init() })
}

/// Issues D + A·B with A in registers and B in shared memory. The rows of B hold one k each; `b` names its tile of each
/// k16 step.
///
/// # Safety
/// The descriptors name tiles of 16 × 8·N8 elements of E that are full and stay unwritten until the wait.
#[inline(always)]
pub unsafe fn accumulate<E: Packed, const K8: usize, const N8: usize>(
    mut d: Fragment<N8>,
    mut a: Operand<K8>,
    b: impl Fn(u32) -> Descriptor,
) -> Pending<Fragment<N8>> {
    tie(&mut d);
    tie_operand(&mut a);
    fence();
    for step in 0..K8 / 2 {
        let [[a0, a1], [a2, a3]] = [a.0[2 * step], a.0[2 * step + 1]];
        // SAFETY: the caller's promise.
        unsafe { add_registers::<E, N8>(&mut d, [a0, a1, a2, a3], b(step as u32)) };
    }
    commit();
    Pending(d)
}

macro_rules! products {
    ($($n8:literal $n:literal [$first:literal $($i:literal)*];)*) => {
        /// Issues one k16 step of A·B with both in shared memory, into new accumulators.
        ///
        /// # Safety
        /// The promises of [`multiply`] hold.
        #[inline(always)]
        unsafe fn start<E: Packed, const N8: usize>(to: &mut MaybeUninit<Fragment<N8>>, a: Descriptor, b: Descriptor) {
            let d: *mut f32 = to.as_mut_ptr().cast();
            // SAFETY: `d` has 4·N8 registers, each arm's own count; the caller's promise covers the reads.
            unsafe {
                match (N8, E::DTYPE, a.major) {
                    $(($n8, Dtype::F16, Major::K) => product!(out, d, $n, "f16", $first, $($i)*, smem "0, 0", a, b),
                      ($n8, Dtype::Bf16, Major::K) => product!(out, d, $n, "bf16", $first, $($i)*, smem "0, 0", a, b),
                      ($n8, Dtype::F16, Major::Mn) => product!(out, d, $n, "f16", $first, $($i)*, smem "1, 1", a, b),
                      ($n8, Dtype::Bf16, Major::Mn) => product!(out, d, $n, "bf16", $first, $($i)*, smem "1, 1", a, b),)*
                    _ => unreachable!(),
                }
            }
        }

        /// Issues one k16 step of D + A·B with both in shared memory.
        ///
        /// # Safety
        /// The promises of [`multiply`] hold, and `to` holds the sum of the steps before.
        #[inline(always)]
        unsafe fn add<E: Packed, const N8: usize>(to: &mut MaybeUninit<Fragment<N8>>, a: Descriptor, b: Descriptor) {
            let d: *mut f32 = to.as_mut_ptr().cast();
            // SAFETY: `d` has 4·N8 registers, each arm's own count; the caller's promise covers the reads.
            unsafe {
                match (N8, E::DTYPE, a.major) {
                    $(($n8, Dtype::F16, Major::K) => product!(inout, d, $n, "f16", $first, $($i)*, smem "0, 0", a, b),
                      ($n8, Dtype::Bf16, Major::K) => product!(inout, d, $n, "bf16", $first, $($i)*, smem "0, 0", a, b),
                      ($n8, Dtype::F16, Major::Mn) => product!(inout, d, $n, "f16", $first, $($i)*, smem "1, 1", a, b),
                      ($n8, Dtype::Bf16, Major::Mn) => product!(inout, d, $n, "bf16", $first, $($i)*, smem "1, 1", a, b),)*
                    _ => unreachable!(),
                }
            }
        }

        /// Issues one k16 step of A·B with A in registers, into new accumulators.
        ///
        /// # Safety
        /// The promises of [`multiply_registers`] hold.
        #[inline(always)]
        unsafe fn start_registers<E: Packed, const N8: usize>(
            to: &mut MaybeUninit<Fragment<N8>>,
            a: [u32; 4],
            b: Descriptor,
        ) {
            let d: *mut f32 = to.as_mut_ptr().cast();
            // SAFETY: `d` has 4·N8 registers, each arm's own count; the caller's promise covers the reads.
            unsafe {
                match (N8, E::DTYPE, b.major) {
                    $(($n8, Dtype::F16, Major::K) => product!(out, d, $n, "f16", $first, $($i)*, registers "0", a, b),
                      ($n8, Dtype::Bf16, Major::K) => product!(out, d, $n, "bf16", $first, $($i)*, registers "0", a, b),)*
                    _ => unreachable!(),
                }
            }
        }

        /// Issues one k16 step of D + A·B with A in registers.
        ///
        /// # Safety
        /// The promises of [`accumulate`] hold.
        #[inline(always)]
        unsafe fn add_registers<E: Packed, const N8: usize>(to: &mut Fragment<N8>, a: [u32; 4], b: Descriptor) {
            let d: *mut f32 = to.0.as_mut_ptr().cast();
            // SAFETY: `d` has 4·N8 registers, each arm's own count; the caller's promise covers the reads.
            unsafe {
                match (N8, E::DTYPE, b.major) {
                    $(($n8, Dtype::F16, Major::K) => product!(inout, d, $n, "f16", $first, $($i)*, registers "0", a, b),
                      ($n8, Dtype::Bf16, Major::K) => product!(inout, d, $n, "bf16", $first, $($i)*, registers "0", a, b),
                      ($n8, Dtype::F16, Major::Mn) => product!(inout, d, $n, "f16", $first, $($i)*, registers "1", a, b),
                      ($n8, Dtype::Bf16, Major::Mn) => product!(inout, d, $n, "bf16", $first, $($i)*, registers "1", a, b),)*
                    _ => unreachable!(),
                }
            }
        }
    };
}

/// Emits the instruction. The arguments are the direction of the accumulators, their place, N, the dtype, the
/// accumulators' indices, and the operands.
macro_rules! product {
    (@mnemonic $n:literal $dtype:literal) => {
        concat!("wgmma.mma_async.sync.aligned.m64n", $n, "k16.f32.", $dtype, ".", $dtype, " ")
    };
    (out, $($rest:tt)*) => { product!(@emit out, "0", $($rest)*) };
    (inout, $($rest:tt)*) => { product!(@emit inout, "1", $($rest)*) };
    (@emit $direction:ident, $accumulate:literal, $d:ident, $n:literal, $dtype:literal, $first:literal, $($i:literal)*,
     smem $transpose:literal, $a:ident, $b:ident) => {
        asm!(
            concat!("{{ .reg .pred p; setp.ne.b32 p, ", $accumulate, ", 0; ", product!(@mnemonic $n $dtype),
                    "{{{", $first, "}", $(", {", $i, "}",)* "}}, {a}, {b}, p, 1, 1, ", $transpose, "; }}"),
            $direction(reg32) *$d.add($first), $($direction(reg32) *$d.add($i),)*
            a = in(reg64) $a.bits(), b = in(reg64) $b.bits(), options(nostack)
        )
    };
    (@emit $direction:ident, $accumulate:literal, $d:ident, $n:literal, $dtype:literal, $first:literal, $($i:literal)*,
     registers $transpose:literal, $a:ident, $b:ident) => {
        asm!(
            concat!("{{ .reg .pred p; setp.ne.b32 p, ", $accumulate, ", 0; ", product!(@mnemonic $n $dtype),
                    "{{{", $first, "}", $(", {", $i, "}",)* "}}, {{{a0}, {a1}, {a2}, {a3}}}, {b}, p, 1, 1, ", $transpose, "; }}"),
            $direction(reg32) *$d.add($first), $($direction(reg32) *$d.add($i),)*
            a0 = in(reg32) $a[0], a1 = in(reg32) $a[1], a2 = in(reg32) $a[2], a3 = in(reg32) $a[3],
            b = in(reg64) $b.bits(), options(nostack)
        )
    };
}

products! {
    4 32 [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15];
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
