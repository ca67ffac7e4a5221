//! Tensors in memory, as kernels name them.

use super::sequence::Span;

/// Tensor (batch, heads, seqlen, head_dim) in memory. Strides are in elements, and head_dim is contiguous.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strided {
    /// Address of element (0, 0, 0, 0).
    pub address: u64,
    pub stride_batch: i64,
    pub stride_head: i64,
    pub stride_row: i64,
}

impl Strided {
    /// Returns the address of a row of two-byte elements. It wraps before it reaches the row of a [`Span`] that does
    /// not begin at the tensor's first element.
    #[inline(always)]
    pub fn row(&self, span: &Span, head: u32, row: u32) -> u64 {
        let row = span.first as i64 + row as i64;
        let offset = span.batch as i64 * self.stride_batch + head as i64 * self.stride_head + row * self.stride_row;
        self.address.wrapping_add_signed(2 * offset)
    }
}

/// Tensor that a kernel writes, either row by row or by tiles through TMA.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Output<T> {
    pub tiles: T,
    pub rows: Strided,
}

/// Tensor map of TMA: the driver's opaque `CUtensorMap`.
///
/// TMA requires 64-byte alignment. The declared alignment is 16, the most that a by-value kernel parameter may have in
/// rustc; the PTX pass of the build raises the parameter's own alignment to 64. The assertions at the end of `params`
/// check the place of each map within its parameters.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug)]
pub struct TensorMap(pub [u64; 16]);

/// Array of one f32 for each row of each head.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowArray {
    /// Address of the first; 0 if there is no array.
    pub address: u64,
    /// Number of elements from one batch item to the next.
    pub stride_batch: u64,
    /// Number of elements from one head to the next.
    pub stride_head: u64,
}

impl RowArray {
    pub const NONE: RowArray = RowArray { address: 0, stride_batch: 0, stride_head: 0 };

    /// Returns the address of a row's element. It wraps before it reaches the row of a [`Span`] that does not begin at
    /// the array's first element.
    #[inline(always)]
    pub fn of(&self, span: &Span, head: u32, row: u32) -> u64 {
        let heads = span.batch as u64 * self.stride_batch + head as u64 * self.stride_head;
        self.address.wrapping_add(4 * (heads + span.first as u64 + row as u64))
    }
    #[inline(always)]
    pub fn is_none(&self) -> bool {
        self.address == 0
    }
}

/// One f32 for each query head, or for each batch item and query head.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PerHead {
    /// Address of the first; 0 if there are none.
    pub address: u64,
    /// Number of values from one batch item to the next: heads_q, or 0 if all have the same.
    pub stride_batch: u64,
}

impl PerHead {
    pub const NONE: PerHead = PerHead { address: 0, stride_batch: 0 };

    /// Returns the address of a head's value.
    #[inline(always)]
    pub fn of(&self, batch: u32, head: u32) -> u64 {
        self.address + 4 * (batch as u64 * self.stride_batch + head as u64)
    }
    #[inline(always)]
    pub fn is_none(&self) -> bool {
        self.address == 0
    }
}
