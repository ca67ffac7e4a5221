//! Arithmetic instructions that rustc does not emit on its own.

use core::arch::asm;

use half::{bf16, f16};

use crate::element::Element;

macro_rules! unary {
    ($(#[$doc:meta])* $name:ident, $instruction:literal) => {
        $(#[$doc])*
        #[inline(always)]
        pub fn $name(x: f32) -> f32 {
            let y: f32;
            // SAFETY: register arithmetic without side effects.
            unsafe {
                asm!(concat!($instruction, " {0}, {1};"), out(reg32) y, in(reg32) x, options(pure, nomem, nostack));
            }
            y
        }
    };
}

unary!(
    /// Returns 2^x from the SFU, relative error 2⁻²² (PTX ISA, ex2.approx).
    exp2, "ex2.approx.ftz.f32"
);
unary!(
    /// Returns log₂ x from the SFU (PTX ISA, lg2.approx).
    log2, "lg2.approx.ftz.f32"
);
unary!(
    /// Returns 1 / x from the SFU, within one unit in the last place (PTX ISA, rcp.approx).
    recip, "rcp.approx.ftz.f32"
);

/// Returns a·b + c with one rounding.
#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    let d: f32;
    // SAFETY: register arithmetic without side effects.
    unsafe {
        asm!("fma.rn.f32 {0}, {1}, {2}, {3};", out(reg32) d, in(reg32) a, in(reg32) b, in(reg32) c,
             options(pure, nomem, nostack));
    }
    d
}

/// Returns the larger of two; NaN if one is NaN.
#[inline(always)]
pub fn larger(a: f32, b: f32) -> f32 {
    let c: f32;
    // SAFETY: register arithmetic without side effects.
    unsafe {
        asm!("max.NaN.f32 {0}, {1}, {2};", out(reg32) c, in(reg32) a, in(reg32) b, options(pure, nomem, nostack));
    }
    c
}

/// Returns `a` if `choose` is not negative, otherwise `b`. It is one instruction, which LLVM cannot turn into a branch.
#[inline(always)]
pub fn select(choose: i32, a: u32, b: u32) -> u32 {
    let d: u32;
    // SAFETY: register arithmetic without side effects.
    unsafe {
        asm!("slct.b32.s32 {0}, {1}, {2}, {3};", out(reg32) d, in(reg32) a, in(reg32) b, in(reg32) choose,
             options(pure, nomem, nostack));
    }
    d
}

/// Returns `a | b & !c`, in one instruction (`lop3`). With two, ptxas runs out of registers in backward at head dim 64.
#[inline(always)]
pub fn or_and_not(a: u32, b: u32, c: u32) -> u32 {
    let d: u32;
    // SAFETY: register arithmetic without side effects. Bit 4a + 2b + c of the table is the result.
    unsafe {
        asm!("lop3.b32 {0}, {1}, {2}, {3}, 0xf4;", out(reg32) d, in(reg32) a, in(reg32) b, in(reg32) c,
             options(pure, nomem, nostack));
    }
    d
}

/// Returns a word with the lowest `count` bits set; all bits from 32 on.
#[inline(always)]
pub fn ones(count: u32) -> u32 {
    let d: u32;
    // SAFETY: register arithmetic without side effects.
    unsafe { asm!("bmsk.clamp.b32 {0}, 0, {1};", out(reg32) d, in(reg32) count, options(pure, nomem, nostack)) }
    d
}

/// Returns the value that the lane `self XOR mask` holds. Every lane of the warp must call it.
#[inline(always)]
pub fn shuffle_xor<const MASK: u32>(x: u32) -> u32 {
    let y: u32;
    // SAFETY: I4, the warp is converged. The instruction touches registers only. It is not `pure`, so that it is
    // neither duplicated nor moved into a branch that only some lanes take.
    unsafe {
        asm!("shfl.sync.bfly.b32 {0}, {1}, {2}, 31, 0xffffffff;", out(reg32) y, in(reg32) x, const MASK,
             options(nomem, nostack));
    }
    y
}

/// Returns true, in every lane, if any lane of the warp has `x`. Every lane must call it.
#[inline(always)]
pub fn any(x: bool) -> bool {
    let y: u32;
    // SAFETY: I4, the warp is converged. The instruction touches registers only. It is not `pure`, so that it is
    // neither duplicated nor moved into a branch that only some lanes take.
    unsafe {
        asm!("{{ .reg .pred p, q; setp.ne.u32 p, {1}, 0; vote.sync.any.pred q, p, 0xffffffff; selp.u32 {0}, 1, 0, q; }}",
             out(reg32) y, in(reg32) x as u32, options(nomem, nostack));
    }
    y != 0
}

/// Returns `x`, opaque to LLVM. Values computed from it are rematerialised here, instead of kept from one iteration of
/// a loop to the next in a register that the fragments need.
#[inline(always)]
pub fn fresh(x: u32) -> u32 {
    let y: u32;
    // SAFETY: copies a register.
    unsafe { asm!("mov.b32 {0}, {1};", out(reg32) y, in(reg32) x, options(nomem, nostack)) }
    y
}

/// Returns, in each half, all ones if the magnitude of the f16 in `a` is not below the f16 in `b`, and zeros otherwise.
/// A NaN in `a` counts as not below.
#[inline(always)]
pub fn at_least_f16x2(a: u32, b: u32) -> u32 {
    let d: u32;
    // SAFETY: register arithmetic without side effects.
    unsafe {
        asm!("{{ .reg .b32 m; abs.f16x2 m, {1}; set.geu.u32.f16x2 {0}, m, {2}; }}", out(reg32) d, in(reg32) a, in(reg32) b,
             options(pure, nomem, nostack));
    }
    d
}

/// Element type that the tensor cores take.
pub trait Packed: Element {
    /// Rounds `low` and `high` and packs them in one register.
    fn pack(low: f32, high: f32) -> u32;
    /// Rounds and packs as [`Packed::pack`] does, with 0 for a value whose sign bit is set (`relu`).
    fn pack_positive(low: f32, high: f32) -> u32;
    /// Returns the two elements of a register.
    fn unpack(pair: u32) -> [f32; 2];
}

macro_rules! packed {
    ($element:ident, $instruction:literal, $positive:literal, $unpack:expr) => {
        impl Packed for $element {
            #[inline(always)]
            fn pack(low: f32, high: f32) -> u32 {
                let y: u32;
                // SAFETY: register arithmetic without side effects.
                unsafe {
                    asm!(concat!($instruction, " {0}, {1}, {2};"), out(reg32) y, in(reg32) high, in(reg32) low,
                         options(pure, nomem, nostack));
                }
                y
            }
            #[inline(always)]
            fn pack_positive(low: f32, high: f32) -> u32 {
                let y: u32;
                // SAFETY: register arithmetic without side effects.
                unsafe {
                    asm!(concat!($positive, " {0}, {1}, {2};"), out(reg32) y, in(reg32) high, in(reg32) low,
                         options(pure, nomem, nostack));
                }
                y
            }
            #[inline(always)]
            fn unpack(pair: u32) -> [f32; 2] {
                [pair as u16, (pair >> 16) as u16].map($unpack)
            }
        }
    };
}
packed!(f16, "cvt.rn.f16x2.f32", "cvt.rn.relu.f16x2.f32", |bits| {
    let y: f32;
    // SAFETY: register arithmetic without side effects.
    unsafe { asm!("cvt.f32.f16 {0}, {1};", out(reg32) y, in(reg16) bits, options(pure, nomem, nostack)) }
    y
});
packed!(bf16, "cvt.rn.bf16x2.f32", "cvt.rn.relu.bf16x2.f32", |bits| f32::from_bits((bits as u32) << 16));
