//! Stores to global memory, by TMA from a tile in shared memory or by each thread with a predicate, and stores to
//! shared memory.
//!
//! A predicate is part of the instruction and not a branch around it. A branch that only some lanes take could be
//! merged with later code that all lanes of the warp must run together.

use core::arch::asm;

use super::cta::{Leader, thread_of_warpgroup};
use super::fragment::{Operand, transpose_quad};
use super::tma::{BoxOrigin, MapAddress};
use crate::ground::sequence::Span;
use crate::ground::tensor::Strided;
use crate::tile::lane::Lane;
use crate::tile::lane::WARP_ROWS;
use crate::tile::smem::PANEL_ROW_BYTES;

/// Stores 16 bytes at `address` if `live`.
///
/// # Safety
/// If `live`, the address is 16-byte aligned and writable, and no other thread accesses it.
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

/// Stores 8 bytes at `address`.
///
/// # Safety
/// The address is 8-byte aligned and writable, and no other thread accesses it.
#[inline(always)]
pub unsafe fn store_8_bytes(address: u64, [a, b]: [u32; 2]) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("st.global.v2.b32 [{0}], {{{1}, {2}}};", in(reg64) address, in(reg32) a, in(reg32) b, options(nostack));
    }
}

/// Stores the lowest byte of `x` at `address` if `live`.
///
/// # Safety
/// If `live`, the address is writable, and no other thread accesses it.
#[inline(always)]
pub unsafe fn store_8_bits(live: bool, address: u64, x: u32) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("{{ .reg .pred p; setp.ne.u32 p, {0}, 0; @p st.global.b8 [{1}], {2}; }}",
             in(reg32) live as u32, in(reg64) address, in(reg32) x, options(nostack));
    }
}

/// Stores an f32 at `address` if `live`.
///
/// # Safety
/// If `live`, the address is 4-byte aligned and writable, and no other thread accesses it.
#[inline(always)]
pub unsafe fn store_f32(live: bool, address: u64, x: f32) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("{{ .reg .pred p; setp.ne.u32 p, {0}, 0; @p st.global.f32 [{1}], {2}; }}",
             in(reg32) live as u32, in(reg64) address, in(reg32) x, options(nostack));
    }
}

/// Stores 16 bytes to shared memory at `address`.
///
/// # Safety
/// The address is 16-byte aligned, and no other thread accesses the 16 bytes.
#[inline(always)]
pub unsafe fn store_shared_16_bytes(address: u32, x: [u32; 4]) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("st.shared.v4.b32 [{0}], {{{1}, {2}, {3}, {4}}};", in(reg32) address, in(reg32) x[0], in(reg32) x[1],
             in(reg32) x[2], in(reg32) x[3], options(nostack));
    }
}

/// Stores an f32 to shared memory at `address` if `live`.
///
/// # Safety
/// If `live`, the address is 4-byte aligned, and no other thread accesses it.
#[inline(always)]
pub unsafe fn store_shared_f32(live: bool, address: u32, x: f32) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("{{ .reg .pred p; setp.ne.u32 p, {0}, 0; @p st.shared.f32 [{1}], {2}; }}",
             in(reg32) live as u32, in(reg32) address, in(reg32) x, options(nostack));
    }
}

/// Writes four 8 × 8 matrices of a warp's fragments to shared memory (PTX ISA, stmatrix). Lane 8·i + r gives the
/// address of row r of matrix i, 16 bytes.
///
/// # Safety
/// The whole warp calls it, converged, and no other warp accesses those rows.
#[inline(always)]
unsafe fn store_matrices(row: u32, x: [u32; 4]) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [{0}], {{{1}, {2}, {3}, {4}}};",
             in(reg32) row, in(reg32) x[0], in(reg32) x[1], in(reg32) x[2], in(reg32) x[3], options(nostack));
    }
}

/// Makes this warp's writes to shared memory visible to TMA and to products (the async proxy).
#[inline(always)]
pub fn fence_async_proxy() {
    // SAFETY: I4, the warp is converged; fences have no operands.
    unsafe { asm!("fence.proxy.async.shared::cta; bar.warp.sync 0xffffffff;", options(nostack)) }
}

/// Issues, by the leader, the TMA store of one box from shared memory at `from`, as part of its open group. Elements
/// beyond the tensor's extents are not written.
///
/// # Safety
/// `map` is a tensor map whose box lies at `from`, visible to TMA, and stays unwritten until [`wait_for_stores`]. No
/// other thread accesses its rows in global memory.
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

/// Closes this thread's group of TMA stores.
#[inline(always)]
pub fn commit_stores() {
    // SAFETY: no operands.
    unsafe { asm!("cp.async.bulk.commit_group;", options(nostack)) }
}

/// Waits until TMA has read the boxes that this warp's leader has issued.
#[inline(always)]
pub fn wait_for_stores() {
    // SAFETY: I4, the warp is converged; there are no operands.
    unsafe { asm!("cp.async.bulk.wait_group.read 0; bar.warp.sync 0xffffffff;", options(nostack)) }
}

/// Returns the address that this lane gives for the four 8 × 8 matrices of a pair of n8 column groups, in the sixteen
/// rows of its warp. The rows lie in a tile of `rows` rows, from row `first_row` on.
#[inline(always)]
pub fn matrices_of_pair(tile: u32, rows: u32, first_row: u32, pair: u32) -> u32 {
    let thread = thread_of_warpgroup();
    // Lane 8·i + r holds the address of row r of matrix i: upper and lower rows of one column group, then of the next.
    let (row, group) = (first_row + thread / 32 * WARP_ROWS + thread % 16, thread / 16 % 2);
    // Chunks of 16 bytes are XORed with the row; those of the other pairs differ in the chunk's upper bits.
    let first = tile + row * PANEL_ROW_BYTES + (group ^ (row % 8)) * 16;
    (first ^ (pair % 4 * 32)) + pair / 4 * rows * PANEL_ROW_BYTES
}

/// Writes a fragment's rows to a tile of `rows` rows in shared memory, at `tile`, from row `first_row` on; each warp
/// writes its own sixteen.
///
/// # Safety
/// The whole warp calls it, converged, and no other warp accesses those rows.
#[inline(always)]
pub unsafe fn write_tile<const N8: usize>(x: &Operand<N8>, tile: u32, rows: u32, first_row: u32) {
    for pair in 0..N8 / 2 {
        let address = matrices_of_pair(tile, rows, first_row, pair as u32);
        let [[a, b], [c, d]] = [x.0[2 * pair], x.0[2 * pair + 1]];
        // SAFETY: I4, the warp is converged; I6, the rows are this warp's own.
        unsafe { store_matrices(address, [a, b, c, d]) };
    }
}

/// Place in a tensor of a fragment's first element.
#[derive(Clone, Copy)]
pub struct Lines {
    /// Rows of the batch item.
    pub rows: Span,
    pub head: u32,
    pub row: u32,
    pub column: u32,
}

/// Stores a fragment to a tensor, with its first element at `at`. Each thread stores 16 bytes at a time; rows beyond
/// the batch item's and columns beyond `head_dim` are left out.
///
/// # Safety
/// The item's rows and columns below `head_dim` are the tensor's, and no other thread accesses them.
#[inline(always)]
pub unsafe fn store_lines<const D8: usize>(x: &Operand<D8>, to: &Strided, at: Lines, head_dim: u32) {
    let lane = Lane::new(thread_of_warpgroup());
    for half in 0..2 {
        let row = at.row + lane.row(half as u32);
        let line = to.row(&at.rows, at.head, row);
        for groups in 0..D8 / 4 {
            let quad = [0, 1, 2, 3].map(|i| x.0[4 * groups + i][half]);
            let chunk = transpose_quad(lane, quad);
            let column = at.column + 32 * groups as u32 + 4 * lane.column;
            let live = row < at.rows.len && column < head_dim;
            // SAFETY: if `live`, the eight columns lie within the tensor and belong to this lane alone.
            unsafe { store_16_bytes(live, line + 2 * column as u64, chunk) };
        }
    }
}
