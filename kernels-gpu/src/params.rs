//! Launch parameters: the one ABI, written by the host and read by every kernel.
//!
//! A kernel takes one `#[repr(C)]` struct by value. It is generic over the name of a tensor. On the GPU that is a
//! [`TensorMap`], which TMA (`cp.async.bulk.tensor`) reads; on the CPU executor it is a plain [`Strided`] address.

use core::mem::offset_of;

use crate::attention::dropout::{Dropout, mask::MaskPart};
use crate::attention::features::Scored;
use crate::attention::first_tiles::FirstTiles;
use crate::attention::key_parts::Sharing;
use crate::attention::schedule::ScheduleParams;
use crate::attention::scheduler::TileOrder;
pub use crate::attention::sequences::ROW_PADDING;
use crate::attention::sequences::{Sequences, padded_start};
use crate::ground::sequence::BatchItem;
use crate::ground::shape::Shape;
use crate::ground::tensor::{Output, PerHead, RowArray, Strided, TensorMap};
use crate::tile::lane::WARP_THREADS;

/// Launch parameters of the forward kernel, whatever its features.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ForwardBase<T> {
    /// Q and K of each pair. With one pair, both are the same.
    pub q: [T; 2],
    pub k: [T; 2],
    pub v: T,
    pub o: Output<T>,
    /// LSE, f32 (batch, heads_q, seqlen_q), contiguous; none if it is not wanted.
    pub lse: RowArray,
    /// Sinks, each a logit without a value in every row's softmax; none if the address is 0.
    pub sinks: PerHead,
    pub shape: Shape,
    pub sequences: Sequences,
    pub order: TileOrder,
    /// Number of the last pair of Q and K: 0, or 1 in piecewise attention. Because it is read from the launch
    /// parameters, it is opaque to the compiler, which would make a second copy of the mainloop for a constant.
    pub last_pair: u32,
}

impl<T> ForwardBase<T> {
    /// Returns the rows of a batch item.
    #[inline(always)]
    pub fn item(&self, batch: u32) -> BatchItem {
        self.sequences.item_by_branch(&self.shape, batch)
    }
}

/// Launch parameters of a kernel with the features `F`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Params<B, F> {
    pub base: B,
    pub features: F,
}

/// Launch parameters of the forward kernel.
pub type ForwardParams<T, F> = Params<ForwardBase<T>, F>;
/// Launch parameters of the backward kernel.
pub type BackwardParams<T, F> = Params<BackwardBase<T>, F>;

/// Launch parameters of the backward kernel, whatever its features.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BackwardBase<T> {
    /// Q and K of each pair. With one pair, both are the same.
    pub q: [T; 2],
    pub k: [T; 2],
    pub v: T,
    pub d_o: T,
    /// dK of each pair. With one pair, both are the same.
    pub dk: [Strided; 2],
    pub dv: Strided,
    pub workspace: Workspace,
    /// Softmax scale, finite and positive.
    pub scale: f32,
    pub shape: Shape,
    pub sequences: Sequences,
    /// Order of the work tiles, which are blocks of keys. Its `heads_q` counts key heads.
    pub order: TileOrder,
    /// Work tiles that are split along queries.
    pub sharing: Sharing,
    /// Work tiles that initialise dQ: they store it instead of accumulating.
    pub first: FirstTiles,
    /// Number of the last pair of Q and K; see [`ForwardBase::last_pair`].
    pub last_pair: u32,
}

impl<T> BackwardBase<T> {
    /// Returns the rows of a batch item.
    #[inline(always)]
    pub fn item(&self, batch: u32) -> BatchItem {
        self.sequences.item(&self.shape, batch)
    }
    /// Returns where the query rows of a batch item and query head lie in the workspace.
    #[inline(always)]
    pub fn head_rows(&self, batch: u32, head: u32) -> HeadRows {
        self.workspace.head_rows(&self.sequences, &self.shape, batch, head)
    }
    /// Returns the dK tensor of a pair.
    #[inline(always)]
    pub fn dk_of(&self, pair: u32) -> &Strided {
        if pair == 0 { &self.dk[0] } else { &self.dk[1] }
    }
}

/// Workspace that the three kernels of a backward pass share.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workspace {
    /// Address of f32 (batch, heads_q, rows): `neg_lse_log2` = −LSE·log₂e; −∞ for rows without a key and for rows of
    /// padding.
    pub neg_lse_log2: u64,
    /// Address of f32 (batch, heads_q, rows): δ = rowsum(dO∘O) − dLSE, with dLSE the gradient of the LSE.
    pub delta: u64,
    /// Address of f32 (pairs, batch, heads_q, rows, compiled head_dim): dQ, unscaled. Within a query block the layout
    /// is unspecified: each machine has its own.
    pub dq: u64,
    /// Address of u32 (pairs, batch, heads_q, query blocks): dQ semaphores, each the number of key blocks that have
    /// accumulated into dQ of its query blocks. 0 if the order of accumulation is free.
    pub dq_semaphores: u64,
    /// Address of u32 (batch, heads_kv): number of a key head's work tiles whose contributions to dQ are complete.
    pub tiles: u64,
    /// Address of u32 (batch, heads_kv): state of the dQ initialisation of a key head. The values are those of the
    /// machine (`arch/sm90/first_values`).
    pub first_values: u64,
    /// Address of f32 (slots, {dK, dV}, block of keys, compiled head_dim): contributions of split work tiles' parts.
    /// The layout of each gradient is unspecified: each machine has its own.
    pub parts: u64,
    /// Number of query rows of a head, padding included. If lengths differ, those of all sequences together.
    pub rows: u32,
}

/// Query rows of one head and batch item in the workspace, from row 0 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadRows {
    /// Number of the head, counted over all batch items, or over the sequences together if lengths differ.
    head: u32,
    /// First row of the sequence within the head's.
    first: u32,
}

impl HeadRows {
    /// Returns those of an item of a dense batch.
    #[inline(always)]
    pub fn dense(shape: &Shape, batch: u32, head: u32) -> Self {
        HeadRows { head: batch * shape.heads_q + head, first: 0 }
    }
    /// Returns those of a sequence of a batch in which lengths differ.
    #[inline(always)]
    pub fn of_sequence(item: &BatchItem, batch: u32, head: u32) -> Self {
        HeadRows { head, first: padded_start(item.q.batch.wrapping_sub(item.q.len), batch) }
    }
}

impl Workspace {
    /// Returns where the rows of a batch item and query head lie.
    #[inline(always)]
    pub fn head_rows(&self, sequences: &Sequences, shape: &Shape, batch: u32, head: u32) -> HeadRows {
        if sequences.differ() {
            HeadRows::of_sequence(&sequences.item(shape, batch), batch, head)
        } else {
            HeadRows::dense(shape, batch, head)
        }
    }
    /// Returns the same for kernels without specialisation constants.
    #[inline(always)]
    pub fn listed_head_rows(&self, sequences: &Sequences, shape: &Shape, batch: u32, head: u32) -> HeadRows {
        if sequences.is_listed() {
            HeadRows::of_sequence(&sequences.listed_item(shape, batch), batch, head)
        } else {
            HeadRows::dense(shape, batch, head)
        }
    }
    /// Returns the index of a query row in `neg_lse_log2` and `delta`.
    #[inline(always)]
    pub fn row(&self, rows: HeadRows, row: u32) -> u64 {
        rows.head as u64 * self.rows as u64 + (rows.first + row) as u64
    }
    /// Returns the index of a query row in the dQ of a pair. The dQ of the second pair follow those of the first.
    #[inline(always)]
    pub fn dq_row(&self, shape: &Shape, pair: u32, rows: HeadRows, row: u32) -> u64 {
        self.row(HeadRows { head: rows.head + pair * shape.batch * shape.heads_q, ..rows }, row)
    }
    /// Returns the address of the counter of a key head's completed work tiles; see [`Shape::key_head`].
    #[inline(always)]
    pub fn tiles_counter(&self, key_head: u32) -> u64 {
        self.tiles + 4 * key_head as u64
    }
    /// Returns the address of the state of a key head's dQ initialisation.
    #[inline(always)]
    pub fn first_values_word(&self, key_head: u32) -> u64 {
        self.first_values + 4 * key_head as u64
    }
    /// Returns the address of a part's contribution to dK (`gradient` 0) or dV (1), of `elements` elements each. `slot`
    /// is the number of the part's slot.
    #[inline(always)]
    pub fn part(&self, slot: u32, gradient: u32, elements: u32) -> u64 {
        self.parts + 4 * (2 * slot + gradient) as u64 * elements as u64
    }
}

/// Number of threads of a CTA of the pre- and postprocess kernels.
pub const ROW_KERNEL_THREADS: u32 = 256;
/// Number of workspace rows per CTA of the preprocess kernel. Eight lanes share a row, and each takes several rows one
/// after the other.
pub const PREPARE_ROWS: u32 = ROW_PADDING;

/// Parameters of the preprocess kernel, which fills a backward pass's workspace.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PrepareParams {
    pub o: Strided,
    pub d_o: Strided,
    /// LSE, f32 (batch, heads_q, seqlen_q).
    pub lse: RowArray,
    /// Gradient of the LSE, of the same shape; none if there is none.
    pub d_lse: RowArray,
    pub workspace: Workspace,
    pub shape: Shape,
    pub sequences: Sequences,
    /// Address of the list of blocks of [`PREPARE_ROWS`] queries, if lengths differ.
    pub list: u64,
    /// Compiled head dim of the backward kernel.
    pub head_dim: u32,
    /// Number of pairs of Q and K.
    pub pairs: u32,
    /// Work tiles that initialise dQ. The other key heads' dQ gets zeros.
    pub first: FirstTiles,
}

/// Parameters of the postprocess kernel, which converts the workspace's dQ to the tensor and sums the parts of dK and
/// dV.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct FinishParams {
    pub dq: Strided,
    pub workspace: Workspace,
    pub scale: f32,
    pub shape: Shape,
    pub sequences: Sequences,
    /// Address of the list of blocks of [`PREPARE_ROWS`] queries, if lengths differ.
    pub list: u64,
    /// Pair whose dQ is converted.
    pub pair: u32,
    /// Number of work tiles of a key head.
    pub key_blocks: u32,
    /// First key head, counted over all batch items, of which some work tiles may have been split.
    pub shared_head: u32,
    pub dk: Strided,
    pub dv: Strided,
    /// Order of the main kernel's work tiles.
    pub order: TileOrder,
    pub sharing: Sharing,
    /// Main kernel's work tiles that initialise dQ.
    pub first: FirstTiles,
}

/// Parameters of the kernel that computes the gradient of the sinks. It reads the workspace that the preprocess kernel
/// has filled.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SinkGradientParams {
    /// Sinks, f32 (heads_q).
    pub sinks: PerHead,
    /// Address of the result, f32 (heads_q).
    pub d_sinks: u64,
    pub workspace: Workspace,
    pub shape: Shape,
    pub sequences: Sequences,
}

/// Name of that kernel. It has one CTA for each query head.
pub const SINK_GRADIENTS: &str = "sink_gradients";
/// Shared memory of its CTAs, in bytes: a sum of each warp.
pub const SINK_GRADIENTS_SMEM_BYTES: u32 = ROW_KERNEL_THREADS / WARP_THREADS * 4;

/// Parameters of the kernel that writes a dropout mask.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DropoutMaskParams {
    /// Address of u8 (batch · heads_q, seqlen_q, seqlen_k), contiguous.
    pub kept: u64,
    /// Number of parts of the mask, at least 1: of heads, calls along the queries and tiles along the keys.
    pub parts: u64,
    pub seqlen_q: u32,
    pub seqlen_k: u32,
    pub dropout: Dropout,
}

impl DropoutMaskParams {
    /// Returns the parameters of a mask, which has an element, of so many heads.
    pub fn new(kept: u64, heads: u64, [seqlen_q, seqlen_k]: [u32; 2], dropout: Dropout) -> Self {
        let [calls, tiles] = [MaskPart::calls(seqlen_q), MaskPart::tiles(seqlen_k)];
        // More parts than 64 bits count are more elements than an address does.
        let parts = heads.saturating_mul(calls as u64).saturating_mul(tiles as u64);
        DropoutMaskParams { kept, parts, seqlen_q, seqlen_k, dropout }
    }
}

/// Launch parameters of the kernel that computes total attention.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct TotalParams<T, F = Scored> {
    pub q: T,
    pub k: T,
    /// LSE, f32 (batch, heads_q, seqlen_q), contiguous; natural logarithms, −∞ for a row without a key.
    pub lse: RowArray,
    /// Result, f32 (batch, heads_q, seqlen_k), contiguous.
    pub total: RowArray,
    pub shape: Shape,
    pub sequences: Sequences,
    /// Order of the work tiles, which are blocks of keys of query heads.
    pub order: TileOrder,
    /// First work tile that is split.
    pub shared_from: u32,
    pub features: F,
}

impl<T, F> TotalParams<T, F> {
    /// Returns the rows of a batch item.
    #[inline(always)]
    pub fn item(&self, batch: u32) -> BatchItem {
        self.sequences.item(&self.shape, batch)
    }
}

/// Alignment of a tensor map for TMA, in bytes.
const MAP_ALIGNMENT: usize = 64;
/// Maximum size of a kernel's parameters that every driver takes, in bytes.
const MAX_PARAMETER_BYTES: usize = 4096;

/// Checks at compile time that parameters fit, and that their tensor maps, the fields named here, are aligned.
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
    ForwardBase<TensorMap>: q, k, v, o.tiles;
    ForwardParams<TensorMap, Widest>: base.q;
    BackwardBase<TensorMap>: q, k, v, d_o;
    BackwardParams<TensorMap, Widest>: base.q;
    TotalParams<TensorMap>: q, k;
    PrepareParams: ;
    FinishParams: ;
    SinkGradientParams: ;
    DropoutMaskParams: ;
    ScheduleParams: ;
}
/// Stands for the largest features.
type Widest = [u32; 64];
// Kernels compute the addresses of tensor maps from field offsets of the base. So it must be at offset 0.
const _: () = {
    assert!(size_of::<TensorMap>() == 128);
    assert!(offset_of!(ForwardParams<TensorMap, Widest>, base) == 0);
    assert!(offset_of!(BackwardParams<TensorMap, Widest>, base) == 0);
};
