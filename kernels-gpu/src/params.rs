//! Launch parameters: the one ABI, written by the host and read by every kernel.
//!
//! A kernel takes one `#[repr(C)]` struct by value. It is generic over how a tensor is named: on the GPU a
//! [`TensorMap`], which the copy engine reads; on the CPU executor a plain [`Strided`] address.

use crate::attention::scheduler::TileOrder;

/// A tensor (batch, heads, seqlen, head_dim) in memory; strides are in elements and head_dim is contiguous.
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
    /// Offset in elements of the row (batch, head, row) from [`Strided::address`].
    #[inline(always)]
    pub fn row_offset(&self, batch: u32, head: u32, row: u32) -> i64 {
        batch as i64 * self.stride_batch + head as i64 * self.stride_head + row as i64 * self.stride_row
    }
}

/// A tensor that a kernel writes: row by row, or by tiles through the copy engine.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Output<T> {
    pub tiles: T,
    pub rows: Strided,
}

/// The driver's opaque `CUtensorMap`.
///
/// The copy engine wants it 64-byte aligned; the declared alignment is 16, the most that a by-value kernel
/// parameter may have in rustc, and the PTX pass of the build raises the parameter's own alignment to 64.
/// Its size keeps every map of a parameter struct on such a boundary.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug)]
pub struct TensorMap(pub [u64; 16]);

/// Extents of one attention problem, checked by the host to fit.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub batch: u32,
    pub heads_q: u32,
    pub heads_kv: u32,
    pub seqlen_q: u32,
    pub seqlen_k: u32,
    /// The tensors' own head dim; at most the variant's compiled one.
    pub head_dim: u32,
}

impl Shape {
    /// Query heads that share one key/value head.
    #[inline(always)]
    pub fn group(&self) -> u32 {
        quotient(self.heads_q, self.heads_kv)
    }
}

/// a / b for b ≥ 1, without the panic that a division by zero would compile to: kernels have none.
#[inline(always)]
pub fn quotient(a: u32, b: u32) -> u32 {
    a / b.max(1)
}

/// Parameters of the forward kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ForwardParams<T> {
    pub q: T,
    pub k: T,
    pub v: T,
    pub o: Output<T>,
    /// Address of the LSE, f32 (batch, heads_q, seqlen_q), contiguous; 0 where it is not wanted.
    pub lse: u64,
    /// The softmax scale, finite and positive.
    pub scale: f32,
    pub shape: Shape,
    pub order: TileOrder,
}
