//! Global memory: rows of strided tensors, by address.

use core::ops::Range;
use core::ptr::{with_exposed_provenance, with_exposed_provenance_mut};
use core::slice;

use crate::element::Element;
use crate::params::{Shape, Strided};

/// The `columns` elements of one row.
///
/// # Safety
/// The row lies within a tensor of `E` that is valid for reading and is not written while the slice lives.
pub unsafe fn row<'a, E>(tensor: &Strided, batch: u32, head: u32, row: u32, columns: usize) -> &'a [E] {
    let data = with_exposed_provenance::<E>(tensor.address as usize);
    // SAFETY: the caller's promise.
    unsafe { slice::from_raw_parts(data.offset(tensor.row_offset(batch, head, row) as isize), columns) }
}

/// As [`row`], for writing.
///
/// # Safety
/// The row lies within a tensor of `E` that is valid for writing, and nobody else accesses it while the slice lives.
pub unsafe fn row_mut<'a, E>(tensor: &Strided, batch: u32, head: u32, row: u32, columns: usize) -> &'a mut [E] {
    let data = with_exposed_provenance_mut::<E>(tensor.address as usize);
    // SAFETY: the caller's promise.
    unsafe { slice::from_raw_parts_mut(data.offset(tensor.row_offset(batch, head, row) as isize), columns) }
}

/// `f(i, row)` for those of `rows` that are below `seqlen`, i counting from 0.
///
/// # Safety
/// As [`row`], for all of them.
pub unsafe fn for_rows<E: Element>(
    tensor: &Strided,
    (batch, head): (u32, u32),
    shape: &Shape,
    rows: Range<u32>,
    seqlen: u32,
    mut f: impl FnMut(usize, &[E]),
) {
    for row in rows.start..rows.end.min(seqlen) {
        // SAFETY: the caller's promise.
        let x = unsafe { self::row::<E>(tensor, batch, head, row, shape.head_dim as usize) };
        f((row - rows.start) as usize, x);
    }
}

/// Writes element `index` of the f32 array at `address`.
///
/// # Safety
/// The element is valid for writing, and nobody else accesses it.
pub unsafe fn write_f32(address: u64, index: usize, value: f32) {
    // SAFETY: the caller's promise.
    unsafe { with_exposed_provenance_mut::<f32>(address as usize).add(index).write(value) }
}

/// Reads element `index` of the f32 array at `address`.
///
/// # Safety
/// The element is valid for reading.
pub unsafe fn read_f32(address: u64, index: usize) -> f32 {
    // SAFETY: the caller's promise.
    unsafe { with_exposed_provenance::<f32>(address as usize).add(index).read() }
}

/// Adds to element `index` of the f32 array at `address`.
///
/// # Safety
/// The element is valid for reading and writing, and nobody else accesses it.
pub unsafe fn add_f32(address: u64, index: usize, value: f32) {
    // SAFETY: the caller's promise.
    unsafe { *with_exposed_provenance_mut::<f32>(address as usize).add(index) += value };
}
