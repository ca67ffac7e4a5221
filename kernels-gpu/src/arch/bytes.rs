//! Selection of four of the eight bytes of two words.

#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

/// Returns the four of the eight bytes of `a` and `b` that the digits of `selector` name (PTX ISA, prmt).
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
pub fn select_bytes(a: u32, b: u32, selector: u32) -> u32 {
    let d: u32;
    // SAFETY: register arithmetic without side effects.
    unsafe {
        asm!("prmt.b32 {0}, {1}, {2}, {3};", out(reg32) d, in(reg32) a, in(reg32) b, in(reg32) selector,
             options(pure, nomem, nostack));
    }
    d
}

/// Returns the four of the eight bytes of `a` and `b` that the digits of `selector` name.
#[cfg(not(target_arch = "nvptx64"))]
#[inline(always)]
pub fn select_bytes(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = a as u64 | (b as u64) << 32;
    let mut selected = 0;
    for digit in 0..4 {
        let byte = bytes >> (8 * (selector >> (4 * digit) & 7)) & 0xff;
        selected |= (byte as u32) << (8 * digit);
    }
    selected
}
