//! Reads of tables in memory, which kernels of every machine share: lengths and lists of work tiles.

#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

/// Reads four numbers.
///
/// # Safety
/// The address is that of four u32, a multiple of 16, which nothing writes during the launch.
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
pub unsafe fn read_four(address: u64) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    // SAFETY: the caller's promise.
    unsafe {
        asm!("ld.global.v4.b32 {{{0}, {1}, {2}, {3}}}, [{4}];", out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d,
             in(reg64) address, options(nostack));
    }
    [a, b, c, d]
}

/// Reads four numbers if `live`; otherwise returns `or`. It is one instruction with a predicate. After a branch, ptxas
/// would no longer know that all threads have the same numbers.
///
/// # Safety
/// If `live`, the address is that of four u32, a multiple of 16, which nothing writes during the launch.
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
pub unsafe fn read_four_or(live: bool, address: u64, or: [u32; 4]) -> [u32; 4] {
    let [mut a, mut b, mut c, mut d] = or;
    // SAFETY: the caller's promise.
    unsafe {
        asm!("{{ .reg .pred p; setp.ne.u32 p, {4}, 0; @p ld.global.v4.b32 {{{0}, {1}, {2}, {3}}}, [{5}]; }}",
             inout(reg32) a, inout(reg32) b, inout(reg32) c, inout(reg32) d, in(reg32) live as u32, in(reg64) address,
             options(nostack));
    }
    [a, b, c, d]
}

/// Reads two numbers.
///
/// # Safety
/// The address is that of two u32, a multiple of 8, which nothing writes during the launch.
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
pub unsafe fn read_two(address: u64) -> [u32; 2] {
    let (a, b): (u32, u32);
    // SAFETY: the caller's promise.
    unsafe {
        asm!("ld.global.v2.b32 {{{0}, {1}}}, [{2}];", out(reg32) a, out(reg32) b, in(reg64) address, options(nostack));
    }
    [a, b]
}

/// Reads four numbers.
///
/// # Safety
/// The address is that of four u32, aligned, which nothing writes meanwhile.
#[cfg(not(target_arch = "nvptx64"))]
pub unsafe fn read_four(address: u64) -> [u32; 4] {
    // SAFETY: the caller's promise.
    unsafe { core::ptr::with_exposed_provenance::<[u32; 4]>(address as usize).read() }
}

/// Reads four numbers if `live`; otherwise returns `or`.
///
/// # Safety
/// If `live`, the address is that of four u32, aligned, which nothing writes meanwhile.
#[cfg(not(target_arch = "nvptx64"))]
pub unsafe fn read_four_or(live: bool, address: u64, or: [u32; 4]) -> [u32; 4] {
    // SAFETY: the caller's promise.
    if live { unsafe { read_four(address) } } else { or }
}

/// Reads two numbers.
///
/// # Safety
/// The address is that of two u32, aligned, which nothing writes meanwhile.
#[cfg(not(target_arch = "nvptx64"))]
pub unsafe fn read_two(address: u64) -> [u32; 2] {
    // SAFETY: the caller's promise.
    unsafe { core::ptr::with_exposed_provenance::<[u32; 2]>(address as usize).read() }
}
