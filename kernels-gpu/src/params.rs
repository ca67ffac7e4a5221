//! Launch parameters: the one ABI, written by the host and read by every kernel.
//!
//! A kernel takes one `#[repr(C)]` struct by value. It is generic over how a tensor is named: on the GPU a
//! [`TensorMap`], which TMA reads; on the CPU executor a plain [`Strided`] address.

use core::mem::offset_of;

use crate::attention::dropout::Dropout;
use crate::attention::first_tiles::FirstTiles;
use crate::attention::key_parts::Sharing;
use crate::attention::pairs::{ByDistance, OnePair, Pairs};
use crate::attention::scheduler::TileOrder;
use crate::ground::shape::Shape;
use crate::ground::tensor::{Output, Strided, TensorMap};

/// What a kernel's parameters say of a second pair of Q and K: nothing, `()`, or a [`SecondPair`].
pub trait Second<T>: Copy {
    /// The rule by which scores come from the pairs.
    type Pairs: Pairs;
    fn pairs(&self, shape: &Shape) -> Self::Pairs;
    /// The number of the last pair.
    fn last(&self) -> u32;
    /// Its tensors, where there is one.
    fn tensors(&self) -> Option<(&T, &T)>;
}

impl<T> Second<T> for () {
    type Pairs = OnePair;
    #[inline(always)]
    fn pairs(&self, _: &Shape) -> OnePair {
        OnePair
    }
    #[inline(always)]
    fn last(&self) -> u32 {
        0
    }
    #[inline(always)]
    fn tensors(&self) -> Option<(&T, &T)> {
        None
    }
}

/// The second pair of piecewise attention.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SecondPair<T> {
    pub q: T,
    pub k: T,
    /// The distance from which on scores come from this pair.
    pub dist_threshold: i32,
    /// This pair's number, 1. Read from here, it is no constant that a compiler would make a second mainloop for.
    pub number: u32,
    /// Up to the next boundary for a tensor map, since one follows in [`ForwardParams`].
    padding: [u32; 14],
}

impl<T> SecondPair<T> {
    /// A pair of tensors, and the distance from which on scores come from it.
    pub const fn new(q: T, k: T, dist_threshold: i32) -> Self {
        SecondPair { q, k, dist_threshold, number: 1, padding: [0; 14] }
    }
}

impl<T: Copy> Second<T> for SecondPair<T> {
    type Pairs = ByDistance;
    #[inline(always)]
    fn pairs(&self, shape: &Shape) -> ByDistance {
        ByDistance::new(self.dist_threshold, shape)
    }
    #[inline(always)]
    fn last(&self) -> u32 {
        self.number
    }
    #[inline(always)]
    fn tensors(&self) -> Option<(&T, &T)> {
        Some((&self.q, &self.k))
    }
}

/// As [`Second`], of a backward pass.
pub trait BackwardSecond<T>: Second<T> {
    /// The gradient of the pair's K, where there is one.
    fn dk(&self) -> Option<Strided>;
}

impl<T> BackwardSecond<T> for () {
    #[inline(always)]
    fn dk(&self) -> Option<Strided> {
        None
    }
}

/// The second pair of piecewise attention's backward pass.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BackwardSecondPair<T> {
    pub pair: SecondPair<T>,
    pub dk: Strided,
}

impl<T: Copy> Second<T> for BackwardSecondPair<T> {
    type Pairs = ByDistance;
    #[inline(always)]
    fn pairs(&self, shape: &Shape) -> ByDistance {
        self.pair.pairs(shape)
    }
    #[inline(always)]
    fn last(&self) -> u32 {
        self.pair.number
    }
    #[inline(always)]
    fn tensors(&self) -> Option<(&T, &T)> {
        self.pair.tensors()
    }
}

impl<T: Copy> BackwardSecond<T> for BackwardSecondPair<T> {
    #[inline(always)]
    fn dk(&self) -> Option<Strided> {
        Some(self.dk)
    }
}

/// Parameters of the forward kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ForwardParams<T, S = ()> {
    pub q: T,
    pub k: T,
    pub v: T,
    pub second: S,
    pub o: Output<T>,
    /// Address of the LSE, f32 (batch, heads_q, seqlen_q), contiguous; 0 where it is not wanted.
    pub lse: u64,
    /// The softmax scale, finite and positive.
    pub scale: f32,
    pub shape: Shape,
    pub order: TileOrder,
}

/// Parameters of a forward or backward kernel with dropout: those of the one without, and which weights are dropped.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct WithDropout<P> {
    pub params: P,
    pub dropout: Dropout,
}

/// Query rows of a head in the backward pass's workspace are padded to a multiple of this: the largest block_m.
pub const ROW_PADDING: u32 = 128;

/// Parameters of the backward kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BackwardParams<T, S = ()> {
    pub q: T,
    pub k: T,
    pub v: T,
    pub d_o: T,
    pub second: S,
    pub dk: Strided,
    pub dv: Strided,
    pub workspace: Workspace,
    /// The softmax scale, finite and positive.
    pub scale: f32,
    pub shape: Shape,
    /// Of blocks of keys: `heads_q` of it are key heads.
    pub order: TileOrder,
    /// Which of them are taken in parts.
    pub sharing: Sharing,
    /// Which of them store dQ.
    pub first: FirstTiles,
}

/// What the kernels of a backward pass hand to each other, by addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workspace {
    /// f32 (batch, heads_q, rows): what exponents add, the negative LSE in base 2; −∞ for rows without a key and for
    /// rows of padding.
    pub offsets: u64,
    /// f32 (batch, heads_q, rows): rowsum(dO∘O) less the gradient of the LSE.
    pub delta: u64,
    /// f32 (pairs, batch, heads_q, rows, compiled head_dim), unscaled; within a query block in an order of the
    /// machine's own.
    pub dq: u64,
    /// u32 (pairs, batch, heads_q, query blocks, 2): how many key blocks have added to a part of dQ; 0 where order is
    /// free.
    pub turns: u64,
    /// u32 (batch, heads_kv): how many work tiles of a key head have added all that they have to dQ.
    pub tiles: u64,
    /// u32 (batch, heads_kv): who gives dQ of a key head its first values, in a code of the machine's own.
    pub first_values: u64,
    /// f32 (slots, {dK, dV}, block of keys, compiled head_dim): what parts of work tiles contribute, each gradient in
    /// an order of the machine's own.
    pub parts: u64,
    /// Query rows of a head, padding included.
    pub rows: u32,
}

impl Workspace {
    /// The index of a query row in `lse` and `delta`.
    #[inline(always)]
    pub fn row(&self, shape: &Shape, batch: u32, head: u32, row: u32) -> u64 {
        (batch * shape.heads_q + head) as u64 * self.rows as u64 + row as u64
    }
    /// Address of the counter of a key head's work tiles; see [`Shape::key_head`].
    #[inline(always)]
    pub fn tiles_counter(&self, key_head: u32) -> u64 {
        self.tiles + 4 * key_head as u64
    }
    /// Address of what says who gives a key head's dQ its first values.
    #[inline(always)]
    pub fn first_values_word(&self, key_head: u32) -> u64 {
        self.first_values + 4 * key_head as u64
    }
    /// Address of what the part in a slot contributes to dK, 0, or dV, 1, which have so many elements each.
    #[inline(always)]
    pub fn part(&self, slot: u32, gradient: u32, elements: u32) -> u64 {
        self.parts + 4 * (2 * slot + gradient) as u64 * elements as u64
    }
}

/// Threads of a CTA of the kernels that prepare and finish.
pub const ROW_KERNEL_THREADS: u32 = 256;
/// Rows of the workspace that a CTA of the preparing kernel takes: eight lanes a row, several rows one after the other.
pub const PREPARE_ROWS: u32 = ROW_PADDING;

/// Parameters of the kernel that prepares a backward pass's workspace.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PrepareParams {
    pub o: Strided,
    pub d_o: Strided,
    /// Address of the LSE, f32 (batch, heads_q, seqlen_q).
    pub lse: u64,
    /// Address of the gradient of the LSE, of the same shape; 0 where there is none.
    pub d_lse: u64,
    pub workspace: Workspace,
    pub shape: Shape,
    /// The backward kernel's compiled head dim.
    pub head_dim: u32,
    /// Pairs of Q and K.
    pub pairs: u32,
    /// Which work tiles store dQ: the others' heads get zeros.
    pub first: FirstTiles,
}

/// Parameters of the kernel that turns the workspace's dQ into the tensor, and adds up parts of dK and dV.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct FinishParams {
    pub dq: Strided,
    pub workspace: Workspace,
    pub scale: f32,
    pub shape: Shape,
    /// The pair whose dQ it is.
    pub pair: u32,
    /// Work tiles of a key head.
    pub key_blocks: u32,
    /// The first key head, of all batch items, of whose work tiles some may have been taken in parts.
    pub shared_head: u32,
    pub dk: Strided,
    pub dv: Strided,
    /// Those of the main kernel.
    pub order: TileOrder,
    pub sharing: Sharing,
    /// Likewise.
    pub first: FirstTiles,
}

/// Parameters of the kernel that computes total attention.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct TotalParams<T> {
    pub q: T,
    pub k: T,
    /// Address of the LSE, f32 (batch, heads_q, seqlen_q), contiguous; natural logarithms, −∞ for a row without a key.
    pub lse: u64,
    /// Address of the result, f32 (batch, heads_q, seqlen_k), contiguous.
    pub total: u64,
    /// The softmax scale, finite and positive.
    pub scale: f32,
    pub shape: Shape,
    /// Of blocks of keys of query heads.
    pub order: TileOrder,
    /// The first of them that is shared out in parts.
    pub shared_from: u32,
}

/// Alignment of a tensor map that the copy engine reads, in bytes.
const MAP_ALIGNMENT: usize = 64;
/// Maximum size of a kernel's parameters that every driver takes, in bytes.
const MAX_PARAMETER_BYTES: usize = 4096;

/// Checks at compile time that parameters fit, and that the named fields of them, tensor maps, are aligned.
macro_rules! check_parameters {
    ($($params:ty: $($($map:ident).+),*;)*) => {
        const _: () = {
            $(
                assert!(size_of::<$params>() <= MAX_PARAMETER_BYTES);
                $(assert!(offset_of!($params, $($map).+) % MAP_ALIGNMENT == 0);)*
            )*
        };
    };
}
check_parameters! {
    ForwardParams<TensorMap>: q, k, v, o.tiles;
    ForwardParams<TensorMap, SecondPair<TensorMap>>: q, k, v, second.q, second.k, o.tiles;
    WithDropout<ForwardParams<TensorMap>>: params.q, params.k, params.v, params.o.tiles;
    BackwardParams<TensorMap>: q, k, v, d_o;
    BackwardParams<TensorMap, BackwardSecondPair<TensorMap>>: q, k, v, d_o, second.pair.q, second.pair.k;
    WithDropout<BackwardParams<TensorMap>>: params.q, params.k, params.v, params.d_o;
    TotalParams<TensorMap>: q, k;
    PrepareParams: ;
    FinishParams: ;
}
// Kernels find tensor maps by the offsets of the plain structs, also within those with dropout or a second gradient.
const _: () = {
    assert!(size_of::<TensorMap>() == 128);
    assert!(offset_of!(BackwardSecondPair<TensorMap>, pair) == 0);
    assert!(offset_of!(WithDropout<ForwardParams<TensorMap>>, params) == 0);
    assert!(offset_of!(WithDropout<BackwardParams<TensorMap>>, params) == 0);
};
