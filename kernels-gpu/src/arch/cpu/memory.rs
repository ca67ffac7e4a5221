//! Global memory: rows of strided tensors, by address. Elements of both dtypes are read and written as their 16 bits.

use core::ops::Range;
use core::ptr::{with_exposed_provenance, with_exposed_provenance_mut};
use core::slice;

use super::convert;
use crate::element::Dtype;
use crate::ground::sequence::Span;
use crate::ground::tensor::{RowArray, Strided};

/// Returns the first `columns` elements of one row.
///
/// # Safety
/// The row lies within a tensor that is valid for reading and is not written while the slice lives.
pub unsafe fn row<'a>(tensor: &Strided, span: &Span, head: u32, row: u32, columns: usize) -> &'a [u16] {
    // SAFETY: the caller's promise.
    unsafe { slice::from_raw_parts(with_exposed_provenance(tensor.row(span, head, row) as usize), columns) }
}

/// Returns the first `columns` elements of one row, for writing.
///
/// # Safety
/// The row lies within a tensor that is valid for writing, and nothing else accesses it while the slice lives.
pub unsafe fn row_mut<'a>(tensor: &Strided, span: &Span, head: u32, row: u32, columns: usize) -> &'a mut [u16] {
    // SAFETY: the caller's promise.
    unsafe { slice::from_raw_parts_mut(with_exposed_provenance_mut(tensor.row(span, head, row) as usize), columns) }
}

/// Loads a tile: those of `rows` that a batch item has, widened to f32, into `columns` elements of `to` each. All other
/// elements of `to` become 0.
///
/// # Safety
/// The rows lie within a tensor of that dtype that is valid for reading.
pub unsafe fn load_rows(
    dtype: Dtype,
    tensor: &Strided,
    (span, head): (&Span, u32),
    head_dim: u32,
    rows: Range<u32>,
    (to, columns): (&mut [f32], usize),
) {
    let head_dim = head_dim as usize;
    let there = rows.end.min(span.len).saturating_sub(rows.start) as usize;
    let (there, past) = to.split_at_mut(there * columns);
    past.fill(0.0);
    for (row, to) in rows.zip(there.chunks_exact_mut(columns)) {
        // SAFETY: the caller's promise.
        let from = unsafe { self::row(tensor, span, head, row, head_dim) };
        let (to, past) = to.split_at_mut(head_dim);
        convert::widen(dtype, from, to);
        past.fill(0.0);
    }
}

/// Returns `len` elements of the f32 array at `address`, from element `first` on, for writing.
///
/// # Safety
/// The elements are valid for reading and writing, and nothing else accesses them while the slice lives.
pub unsafe fn floats_mut<'a>(address: u64, first: usize, len: usize) -> &'a mut [f32] {
    // SAFETY: the caller's promise.
    unsafe { slice::from_raw_parts_mut(with_exposed_provenance_mut::<f32>(address as usize).add(first), len) }
}

/// Returns `len` elements of the f32 array at `address`, from element `first` on.
///
/// # Safety
/// The elements are valid for reading, and are not written while the slice lives.
pub unsafe fn floats<'a>(address: u64, first: usize, len: usize) -> &'a [f32] {
    // SAFETY: the caller's promise.
    unsafe { slice::from_raw_parts(with_exposed_provenance::<f32>(address as usize).add(first), len) }
}

/// Writes element `index` of the f32 array at `address`.
///
/// # Safety
/// The element is valid for writing, and nothing else accesses it.
pub unsafe fn write_f32(address: u64, index: usize, value: f32) {
    // SAFETY: the caller's promise.
    unsafe { with_exposed_provenance_mut::<f32>(address as usize).add(index).write(value) }
}

/// Writes a row's element of an array.
///
/// # Safety
/// The element is valid for writing, and nothing else accesses it.
pub unsafe fn write_row(array: &RowArray, span: &Span, head: u32, row: u32, value: f32) {
    // SAFETY: the caller's promise.
    unsafe { write_f32(array.of(span, head, row), 0, value) };
}

/// Reads a row's element of an array.
///
/// # Safety
/// The element is valid for reading.
pub unsafe fn read_row(array: &RowArray, span: &Span, head: u32, row: u32) -> f32 {
    // SAFETY: the caller's promise.
    unsafe { read_f32(array.of(span, head, row), 0) }
}

/// Reads element `index` of the f32 array at `address`.
///
/// # Safety
/// The element is valid for reading.
pub unsafe fn read_f32(address: u64, index: usize) -> f32 {
    // SAFETY: the caller's promise.
    unsafe { with_exposed_provenance::<f32>(address as usize).add(index).read() }
}
