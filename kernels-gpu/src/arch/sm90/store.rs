//! Stores to global memory: by the copy engine, from a tile in shared memory, or by each thread, predicated.
//!
//! A predicate is part of the instruction and not a branch around it: a branch that only some lanes take could be
//! merged with later code that all lanes of the warp must run together.

use core::arch::asm;

use super::cta::Leader;
use super::tma::{BoxOrigin, MapAddress};

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

/// Writes four 8 × 8 matrices to shared memory, as the fragments of a warp hold them: lane 8·i + r gives the address of
/// row r of matrix i, 16 bytes (PTX ISA, stmatrix).
///
/// # Safety
/// The whole warp calls it, converged, and nobody else accesses those rows.
#[inline(always)]
pub unsafe fn store_matrices(row: u32, x: [u32; 4]) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [{0}], {{{1}, {2}, {3}, {4}}};",
             in(reg32) row, in(reg32) x[0], in(reg32) x[1], in(reg32) x[2], in(reg32) x[3], options(nostack));
    }
}

/// Makes what this warp has written to shared memory visible to the copy engine.
#[inline(always)]
pub fn fence_for_copy_engine() {
    // SAFETY: fences have no operands; the warp is converged here.
    unsafe { asm!("fence.proxy.async.shared::cta; bar.warp.sync 0xffffffff;", options(nostack)) }
}

/// The leader starts the copy of one box from shared memory at `from`, as part of its open group; what lies past the
/// tensor's extents is not written.
///
/// # Safety
/// `map` is a tensor map whose box lies at `from`, visible to the copy engine, and stays unwritten until
/// [`wait_for_stores`]; its rows in global memory are nobody else's.
#[inline(always)]
pub unsafe fn store_box(leader: Leader, map: MapAddress, at: BoxOrigin, from: u32) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "{{ .reg .pred p; setp.ne.u32 p, {6}, 0;",
            "@p cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [{0}, {{{1}, {2}, {3}, {4}}}], [{5}]; }}",
            in(reg64) map.0, in(reg32) at.column, in(reg32) at.row, in(reg32) at.head, in(reg32) at.batch,
            in(reg32) from, in(reg32) leader.0, options(nostack)
        );
    }
}

/// Closes this thread's group of copies.
#[inline(always)]
pub fn commit_stores() {
    // SAFETY: no operands.
    unsafe { asm!("cp.async.bulk.commit_group;", options(nostack)) }
}

/// Waits until the copy engine has read what this warp's leader gave it.
#[inline(always)]
pub fn wait_for_stores() {
    // SAFETY: no operands; the warp is converged here.
    unsafe { asm!("cp.async.bulk.wait_group.read 0; bar.warp.sync 0xffffffff;", options(nostack)) }
}
