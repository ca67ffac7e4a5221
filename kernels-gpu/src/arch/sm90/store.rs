//! Predicated stores to global memory.
//!
//! The predicate is part of the instruction and not a branch around it: a branch that only some lanes take could be
//! merged with later code that all lanes of the warp must run together.

use core::arch::asm;

/// Stores 16 bytes at `address` where `live`.
///
/// # Safety
/// Where `live`, the address is 16-byte aligned and writable, and no other thread accesses it.
#[inline(always)]
pub unsafe fn store_16_bytes(live: bool, address: u64, x: [u32; 4]) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "{{ .reg .pred p; setp.ne.u32 p, {0}, 0; @p st.global.v4.b32 [{1}], {{{2}, {3}, {4}, {5}}}; }}",
            in(reg32) live as u32, in(reg64) address, in(reg32) x[0], in(reg32) x[1], in(reg32) x[2], in(reg32) x[3],
            options(nostack)
        );
    }
}

/// Stores an f32 at `address` where `live`.
///
/// # Safety
/// As [`store_16_bytes`], 4-byte aligned.
#[inline(always)]
pub unsafe fn store_f32(live: bool, address: u64, x: f32) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("{{ .reg .pred p; setp.ne.u32 p, {0}, 0; @p st.global.f32 [{1}], {2}; }}",
             in(reg32) live as u32, in(reg64) address, in(reg32) x, options(nostack));
    }
}
