//! The interface between kernels and machines: operations of one consumer warpgroup.
//!
//! Kernels are written once against [`Warpgroup`] and compiled for two machines. On `sm90` a fragment is one thread's
//! registers and a product is a `wgmma`. On `cpu` a fragment is the whole tile and a product is a loop. The trait
//! stands at the level of the whole warpgroup on purpose. Element-wise code addresses rows and columns and never a
//! lane, so it cannot depend on which thread holds which element.
//!
//! Products are asynchronous. [`ForwardWarpgroup::qk`], [`ForwardWarpgroup::pv`] and the other products return a
//! [`Pending`] fragment. It has no readable element until [`Warpgroup::wait`] returns the fragment itself.

pub mod bytes;
pub mod constant;
#[cfg(all(feature = "cpu", not(target_arch = "nvptx64")))]
pub mod cpu;
#[cfg(target_arch = "nvptx64")]
pub mod sm90;
pub mod table;
mod total_attention;

pub use total_attention::TotalWarpgroup;

use crate::attention::dropout::{Dropout, Place};
use crate::ground::places::KvBlock;
use crate::ground::places::QueryBlock;
use crate::ground::places::WorkTile;
use crate::ground::sequence::Span;
use crate::ground::tensor::{Output, RowArray, Strided};

/// Fragment that a product in flight is still writing.
#[must_use = "a product must be waited for"]
pub struct Pending<T>(pub(crate) T);

/// Unit of a GPU that takes row maxima ([`Warpgroup::maxima`]).
#[derive(Clone, Copy)]
pub enum MaxUnit {
    /// Integers: compares bit patterns, which is faster if a row has positive elements and at least 128 columns.
    Integer,
    /// Floats: for many elements that may be −∞, or if the integer pipe has other work (Philox).
    Float,
}

/// Column that others are counted from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    First,
    Last,
}

/// Skip-rescale check of [`Warpgroup::scale_rows`]: tests if any factor differs from 1.
#[derive(Clone, Copy)]
pub enum RescaleCheck {
    /// Tests first, and skips the multiplication if all factors are 1.
    First,
    /// Multiplies always.
    Never,
}

/// A warpgroup: its fragments of 64 rows each, and the operations on them.
///
/// Widths are counted in n8 column groups, eight columns of a fragment: `N8 = 16` is 128 columns.
pub trait Warpgroup: Sized {
    /// Accumulator: 64 × 8·N8 elements in f32.
    type Acc<const N8: usize>: Copy;
    /// Left operand of a product: 64 × 8·N8 elements in the input's dtype.
    type Operand<const N8: usize>: Copy;
    /// One f32 per row.
    type Rows: Copy;
    /// Name of a tensor that is loaded by tiles: a tensor map on `sm90`, an address on `cpu`.
    type Tensor: Copy;
    /// Dropout mask of 64 × 8·N8 elements of P; N8 is a multiple of four.
    type Keep<const N8: usize>: Copy;

    fn zeros<const N8: usize>(&self) -> Self::Acc<N8>;
    /// Sets the elements of row r outside the columns `start..end` of `columns(r)` to `fill`. Rows and columns count
    /// from the fragment's first element.
    fn fill_outside<const N8: usize>(&self, x: &mut Self::Acc<N8>, fill: f32, columns: impl Fn(u32) -> (i32, i32));
    /// Replaces every element x by `f(x, y)` with the element y in the same place.
    fn zip_with<const N8: usize>(&self, x: &mut Self::Acc<N8>, y: &Self::Acc<N8>, f: impl Fn(f32, f32) -> f32);
    /// Replaces every element x by `f(x, r)` with r of its row.
    fn map_rows<const N8: usize>(&self, x: &mut Self::Acc<N8>, rows: Self::Rows, f: impl Fn(f32, f32) -> f32);
    /// Replaces the elements of the left (`half` 0) or right (1) half of the columns as [`Warpgroup::map_rows`] does.
    fn map_half<const N8: usize>(
        &self,
        x: &mut Self::Acc<N8>,
        half: usize,
        rows: Self::Rows,
        f: impl Fn(f32, f32) -> f32,
    );
    /// Replaces every element x by tanh(factor·x).
    fn tanh<const N8: usize>(&self, x: &mut Self::Acc<N8>, factor: f32);
    /// Adds slope·c to every element, with c its column's distance from the column at an edge, but for a part that is
    /// still missing from each row: the one returned. Columns before the edge have a negative c. The part is partial,
    /// as the result of [`Warpgroup::fold`] is: each thread's belongs to its own elements.
    fn add_columns<const N8: usize>(&self, x: &mut Self::Acc<N8>, slope: f32, edge: Edge) -> Self::Rows;
    /// Subtracts slope·|first + c| from every element of column c, with `first` of its row.
    fn subtract_distances<const N8: usize>(&self, x: &mut Self::Acc<N8>, first: Self::Rows, slope: f32);
    /// Multiplies each row by its factor, after the skip-rescale check if `check` asks for it.
    fn scale_rows<const N8: usize>(&self, x: &mut Self::Acc<N8>, factors: Self::Rows, check: RescaleCheck);
    /// Folds each row's elements. The result is partial: [`Warpgroup::reduce`] joins it to that of the whole row.
    fn fold<const N8: usize>(&self, x: &Self::Acc<N8>, f: impl Fn(f32, f32) -> f32) -> Self::Rows;
    /// Folds the elements of the left (`half` 0) or right (1) half of each row. The result is partial, as that of
    /// [`Warpgroup::fold`].
    fn fold_half<const N8: usize>(&self, x: &Self::Acc<N8>, half: usize, f: impl Fn(f32, f32) -> f32) -> Self::Rows;
    /// Returns the maximum of `rows` and each row's elements, taken by `unit`.
    fn maxima<const N8: usize>(&self, x: &Self::Acc<N8>, rows: Self::Rows, unit: MaxUnit) -> Self::Rows;
    /// Joins the partial folds of each row to the fold of the whole row.
    fn reduce(&self, rows: Self::Rows, f: impl Fn(f32, f32) -> f32) -> Self::Rows;
    fn rows(&self, value: f32) -> Self::Rows;
    /// Returns `f` of each row's number.
    fn rows_of(&self, f: impl Fn(u32) -> f32) -> Self::Rows;
    fn zip(&self, a: Self::Rows, b: Self::Rows, f: impl Fn(f32, f32) -> f32) -> Self::Rows;
    /// Rounds an accumulator to the input's dtype.
    fn pack<const N8: usize>(&self, x: &Self::Acc<N8>) -> Self::Operand<N8>;
    /// Returns the dropout mask of the elements of P in the tile at a place.
    fn keep<const N8: usize>(&self, dropout: &Dropout, at: &Place) -> Self::Keep<N8>;
    /// Sets dropped elements to 0.
    fn drop<const N8: usize>(&self, x: &mut Self::Acc<N8>, keep: &Self::Keep<N8>);
    /// Marks dropped elements of P by their sign bit: set if dropped, clear if kept.
    fn mark<const N8: usize>(&self, x: &mut Self::Acc<N8>, keep: &Self::Keep<N8>);
    /// Sets the elements of `x` to 0 whose element of P, in `weights`, has its sign bit set ([`Warpgroup::mark`]).
    fn drop_marked<const N8: usize>(&self, x: &mut Self::Acc<N8>, weights: &Self::Acc<N8>);
    /// Rounds to the input's dtype as [`Warpgroup::pack`] does, but packs elements with the sign bit set as 0.
    fn pack_unmarked<const N8: usize>(&self, x: &Self::Acc<N8>) -> Self::Operand<N8>;
    /// Sets dropped elements of P to 0.
    fn drop_operand<const N8: usize>(&self, x: &mut Self::Operand<N8>, keep: &Self::Keep<N8>);

    /// Reads a number of an operand with one number for each head, at an address within it.
    fn read_f32(&self, address: u64) -> f32;

    /// Returns 2^x; 0 for −∞.
    fn exp2(x: f32) -> f32;
    /// Returns log₂ x.
    fn log2(x: f32) -> f32;
    /// Returns a·b + c with one rounding.
    fn fma(a: f32, b: f32, c: f32) -> f32;
    /// Returns the larger of two; NaN if one is NaN.
    fn larger(a: f32, b: f32) -> f32;
    /// Returns 1 / x.
    fn recip(x: f32) -> f32;

    /// Pins the computation of `x` here, overlapped with the products in flight: a scheduling fence. Without it the
    /// compiler may move the computation to the first use of `x`.
    fn compute<const N8: usize>(&self, x: &mut Self::Acc<N8>);
    /// Waits for the product that writes `x` and returns its fragment. At most `LATER` products issued after it remain
    /// in flight.
    fn wait<const LATER: usize, const N8: usize>(&mut self, x: Pending<Self::Acc<N8>>) -> Self::Acc<N8>;
}

/// Consumer warpgroup of the forward kernel: 64 rows of a query tile, and the consumer's end of the K/V ring.
pub trait ForwardWarpgroup: Warpgroup {
    /// Filled slot of the K/V ring.
    type Slot: Copy;

    /// Returns the first of this warpgroup's 64 query rows of `tile`.
    fn first_row(&self, tile: &WorkTile) -> u32;
    /// Starts loading this warpgroup's query rows of `tile`, of every pair of Q and K. `rows` are those of its batch
    /// item. Every earlier product with Q must have been waited for.
    fn load_q(&mut self, tile: &WorkTile, rows: &Span);
    /// Waits until the rows that [`ForwardWarpgroup::load_q`] requested have arrived.
    fn wait_q(&mut self);
    /// Waits for the next tile of the K/V ring, in the order of [`crate::pipeline::order::KvOrder`].
    fn wait_kv(&mut self) -> Self::Slot;
    /// Releases a slot to the producer. Every product that reads it must have been waited for.
    fn release_kv(&mut self, slot: Self::Slot);

    /// Issues S = Q·Kᵀ of one pair.
    fn qk<const D8: usize, const N8: usize>(&mut self, k: Self::Slot, pair: u32) -> Pending<Self::Acc<N8>>;
    /// Issues O + P·V.
    fn pv<const N8: usize, const D8: usize>(
        &mut self,
        o: Self::Acc<D8>,
        p: Self::Operand<N8>,
        v: Self::Slot,
    ) -> Pending<Self::Acc<D8>>;
    /// Waits at this warpgroup's ping-pong barrier before it issues products. So another warpgroup's softmax overlaps
    /// them.
    fn take_ping_pong(&mut self);
    /// Opens the ping-pong barrier of the next warpgroup, which may then issue its products.
    fn pass_ping_pong(&mut self);

    /// Stores this warpgroup's rows of `tile` in the input's dtype. Rows beyond those of its batch item, `rows`, and
    /// columns beyond `head_dim` are left out.
    fn store<const D8: usize>(
        &mut self,
        x: &Self::Acc<D8>,
        to: &Output<Self::Tensor>,
        tile: &WorkTile,
        rows: &Span,
        head_dim: u32,
    );
    /// Stores one f32 for each of this warpgroup's rows of `tile`, as far as they are rows of its batch item.
    fn store_rows(&mut self, values: Self::Rows, to: &RowArray, tile: &WorkTile, rows: &Span);
}

/// Consumer warpgroup of the backward kernel: 64 keys, and the consumer's end of the rings of Q, dO and dS.
///
/// Scores are transposed, keys × queries, so that Pᵀ and dSᵀ become left operands without a change of layout.
pub trait BackwardWarpgroup: Warpgroup {
    /// Slot of the rings of Q and dO.
    type Slot: Copy;
    /// One f32 per column.
    type Columns<const M8: usize>: Copy;

    /// Returns this warpgroup's first key within the block of keys.
    fn first_key(&self) -> u32;
    /// Waits for K of the next work tile.
    fn wait_k(&mut self);
    /// Waits for V of the work tile that [`BackwardWarpgroup::wait_k`] waited for.
    fn wait_v(&mut self);
    /// Releases K and V. Every product that reads them must have been waited for, and the last dS must have been
    /// published.
    fn release_kv(&mut self);
    /// Waits for the next query block's Q and `neg_lse_log2`.
    fn wait_q(&mut self) -> Self::Slot;
    /// Waits for the query block's dO and δ.
    fn wait_do(&mut self, slot: Self::Slot);
    /// Waits at this warpgroup's ping-pong barrier before it issues products. So the other warpgroup's exponentials
    /// overlap them.
    fn take_ping_pong(&mut self);
    /// Opens the ping-pong barrier of the other warpgroup, which may then issue its products.
    fn pass_ping_pong(&mut self);
    /// Waits until the query block's slot in the ring of dS is empty.
    fn wait_ds(&mut self, slot: Self::Slot);
    /// Releases a query block. Every product that reads it must have been waited for.
    fn release(&mut self, slot: Self::Slot);

    /// Returns `neg_lse_log2` = −LSE·log₂e of each query of the block.
    fn neg_lse_log2<const M8: usize>(&self, slot: Self::Slot) -> Self::Columns<M8>;
    /// Returns δ of each query of the block.
    fn delta<const M8: usize>(&self, slot: Self::Slot) -> Self::Columns<M8>;
    /// Reads the values of all columns into registers now, ahead of a wait, instead of a few at a time at their use.
    /// This takes as many registers as there are values per thread.
    fn read<const M8: usize>(&self, columns: Self::Columns<M8>) -> Self::Columns<M8>;
    /// Replaces every element x by `f(x, c)` with c of its column.
    fn map_columns<const M8: usize>(
        &self,
        x: &mut Self::Acc<M8>,
        columns: &Self::Columns<M8>,
        f: impl Fn(f32, f32) -> f32,
    );

    /// Issues Sᵀ = K·Qᵀ.
    fn kq<const D8: usize, const M8: usize>(&mut self, slot: Self::Slot) -> Pending<Self::Acc<M8>>;
    /// Issues dPᵀ = V·dOᵀ.
    fn v_do<const D8: usize, const M8: usize>(&mut self, slot: Self::Slot) -> Pending<Self::Acc<M8>>;
    /// Issues dV + Pᵀ·dO.
    fn p_do<const M8: usize, const D8: usize>(
        &mut self,
        dv: Self::Acc<D8>,
        p: Self::Operand<M8>,
        slot: Self::Slot,
    ) -> Pending<Self::Acc<D8>>;
    /// Issues dK + dSᵀ·Q.
    fn ds_q<const M8: usize, const D8: usize>(
        &mut self,
        dk: Self::Acc<D8>,
        ds: Self::Operand<M8>,
        slot: Self::Slot,
    ) -> Pending<Self::Acc<D8>>;
    /// Writes the query block's P, times `by` if that is something, to shared memory, for the warpgroup that
    /// accumulates dK. Waits first until that warpgroup has read the P before it.
    fn pass_weights<const M8: usize>(&mut self, p: &Self::Acc<M8>, by: Option<&Self::Acc<M8>>, slot: Self::Slot);
    /// Waits for the query block's P in shared memory and reads it.
    fn take_weights<const M8: usize>(&mut self, slot: Self::Slot) -> Self::Acc<M8>;
    /// Accumulates dS·K into dQ of the query block, at once (`cpu`) or by another warpgroup (`sm90`). In the second
    /// case it writes dSᵀ to its ring; the other warpgroup reads it after [`Self::pass_ds`].
    fn add_dq<const M8: usize>(&mut self, ds: &Self::Operand<M8>, slot: Self::Slot, at: &QueryBlock);
    /// Publishes dS: makes what [`Self::add_dq`] wrote visible to the other warpgroup and signals it.
    fn pass_ds(&mut self, slot: Self::Slot);

    /// Stores this warpgroup's part of dK or dV in the input's dtype. Rows beyond those of its batch item, `rows`, and
    /// columns beyond `head_dim` are left out.
    fn store_kv<const D8: usize>(&mut self, x: &Self::Acc<D8>, to: &Strided, at: &KvBlock, rows: &Span, head_dim: u32);
    /// Stores this warpgroup's share of dK or dV of a split work tile's part, in f32, to the workspace at `to`.
    fn store_part<const D8: usize>(&mut self, x: &Self::Acc<D8>, to: u64);
}
