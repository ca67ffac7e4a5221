//! Single instructions of a thread: selection of bytes, a product of two words, and a load of sixteen bytes.

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

/// Loads 16 bytes that nothing writes during the launch, where it stands: LLVM moves it out of no loop, which would
/// take four registers.
///
/// # Safety
/// The address is 16-byte aligned and readable, and nothing writes there during the launch.
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
pub unsafe fn load_constant_16_bytes(address: u64) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    // SAFETY: the caller's promise.
    unsafe {
        asm!("ld.global.nc.v4.b32 {{{0}, {1}, {2}, {3}}}, [{4}];", out(reg32) a, out(reg32) b, out(reg32) c,
             out(reg32) d, in(reg64) address, options(nostack));
    }
    [a, b, c, d]
}

/// Loads 16 bytes that nothing writes during the launch.
///
/// # Safety
/// The address is readable, and nothing writes there during the launch.
#[cfg(not(target_arch = "nvptx64"))]
pub unsafe fn load_constant_16_bytes(address: u64) -> [u32; 4] {
    let words: *const [u32; 4] = core::ptr::with_exposed_provenance(address as usize);
    // SAFETY: the caller's promise.
    unsafe { words.read_unaligned() }.map(u32::from_le)
}

/// Product of two words.
#[derive(Clone, Copy)]
pub struct Wide {
    pub low: u32,
    pub high: u32,
}

/// Returns the product of two words.
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
pub fn wide_product(a: u32, b: u32) -> Wide {
    let (low, high): (u32, u32);
    // LLVM multiplies words that it has widened in another block as numbers of 64 bits.
    // SAFETY: register arithmetic without side effects.
    unsafe {
        asm!("{{ .reg .b64 x; mul.wide.u32 x, {2}, {3}; mov.b64 {{{0}, {1}}}, x; }}", out(reg32) low, out(reg32) high,
             in(reg32) a, in(reg32) b, options(pure, nomem, nostack));
    }
    Wide { low, high }
}

/// Returns the product of two words.
#[cfg(not(target_arch = "nvptx64"))]
#[inline(always)]
pub fn wide_product(a: u32, b: u32) -> Wide {
    let x = a as u64 * b as u64;
    Wide { low: x as u32, high: (x >> 32) as u32 }
}
