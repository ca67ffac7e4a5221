//! The machine: what one consumer warpgroup can do.
//!
//! Kernels are written once against [`Warpgroup`] and compiled for two machines: `sm90`, where a fragment is one
//! thread's registers and a product is a `wgmma`, and `cpu`, where a fragment is the whole tile and a product is a
//! loop. The trait stands at the level of the whole warpgroup on purpose: element-wise code sees rows and
//! columns and never a lane, so it cannot depend on who holds what.
//!
//! Products are asynchronous. [`ForwardWarpgroup::qk`], [`ForwardWarpgroup::pv`] and their like return a [`Pending`]
//! fragment, which has no readable element until [`Warpgroup::wait`] has turned it into one.

pub mod bytes;
#[cfg(all(feature = "cpu", not(target_arch = "nvptx64")))]
pub mod cpu;
#[cfg(target_arch = "nvptx64")]
pub mod sm90;
mod total_attention;

pub use total_attention::TotalWarpgroup;

use crate::attention::dropout::{Dropout, Place};
use crate::ground::places::KvBlock;
use crate::ground::places::QueryBlock;
use crate::ground::places::WorkTile;
use crate::ground::shape::Shape;
use crate::ground::tensor::{Output, Strided};

/// A fragment that a product still in flight is writing.
#[must_use = "a product must be waited for"]
pub struct Pending<T>(pub(crate) T);

/// One warpgroup: its fragments, 64 rows each, and what can be done to them.
///
/// Widths are counted in columns of eight, the granule of a fragment: `N8 = 16` is 128 columns.
pub trait Warpgroup: Sized {
    /// 64 × 8·N8 elements in f32: an accumulator.
    type Acc<const N8: usize>: Copy;
    /// 64 × 8·N8 elements in the input's dtype: the left operand of a product.
    type Operand<const N8: usize>: Copy;
    /// One f32 a row.
    type Rows: Copy;
    /// How this machine names a tensor that is loaded by tiles.
    type Tensor: Copy;
    /// Which of 64 × 8·N8 weights are kept; N8 is a multiple of four.
    type Keep<const N8: usize>: Copy;

    fn zeros<const N8: usize>(&self) -> Self::Acc<N8>;
    /// Elements of row r outside the columns `start..end` of `columns(r)` become `fill`; rows and columns count from
    /// the fragment's corner.
    fn fill_outside<const N8: usize>(&self, x: &mut Self::Acc<N8>, fill: f32, columns: impl Fn(u32) -> (i32, i32));
    /// `f(x, y)` for every element x and the one of y in its place.
    fn zip_with<const N8: usize>(&self, x: &mut Self::Acc<N8>, y: &Self::Acc<N8>, f: impl Fn(f32, f32) -> f32);
    /// `f(x, r)` for every element x and its row's r.
    fn map_rows<const N8: usize>(&self, x: &mut Self::Acc<N8>, rows: Self::Rows, f: impl Fn(f32, f32) -> f32);
    /// The same for the left or right half of the columns, 0 or 1.
    fn map_half<const N8: usize>(
        &self,
        x: &mut Self::Acc<N8>,
        half: usize,
        rows: Self::Rows,
        f: impl Fn(f32, f32) -> f32,
    );
    /// Multiplies each row by its factor; looks first whether any is not 1, where told to.
    fn scale_rows<const N8: usize>(&self, x: &mut Self::Acc<N8>, factors: Self::Rows, look: bool);
    /// Folds each row's elements. Partial: only [`Warpgroup::reduce`] makes it the whole row's.
    fn fold<const N8: usize>(&self, x: &Self::Acc<N8>, f: impl Fn(f32, f32) -> f32) -> Self::Rows;
    /// Folds the elements of the left or right half of each row.
    fn fold_half<const N8: usize>(&self, x: &Self::Acc<N8>, half: usize, f: impl Fn(f32, f32) -> f32) -> Self::Rows;
    /// The largest of each of `rows` and the row's elements. `floats` tells that integers, which find positive ones
    /// sooner, are of no use: many may be −∞, or there is other work for them.
    fn maxima<const N8: usize>(&self, x: &Self::Acc<N8>, rows: Self::Rows, floats: bool) -> Self::Rows;
    /// Joins the partial folds of each row.
    fn reduce(&self, rows: Self::Rows, f: impl Fn(f32, f32) -> f32) -> Self::Rows;
    fn rows(&self, value: f32) -> Self::Rows;
    fn zip(&self, a: Self::Rows, b: Self::Rows, f: impl Fn(f32, f32) -> f32) -> Self::Rows;
    /// Rounds an accumulator to the input's dtype.
    fn pack<const N8: usize>(&self, x: &Self::Acc<N8>) -> Self::Operand<N8>;
    /// Which weights of the tile at a place are kept.
    fn keep<const N8: usize>(&self, dropout: &Dropout, at: &Place) -> Self::Keep<N8>;
    /// Weights that are dropped get a negative sign, the others a positive one.
    fn mark<const N8: usize>(&self, x: &mut Self::Acc<N8>, keep: &Self::Keep<N8>);
    /// Elements become 0 where the weight in their place has been marked.
    fn drop_marked<const N8: usize>(&self, x: &mut Self::Acc<N8>, weights: &Self::Acc<N8>);
    /// As [`Warpgroup::pack`], with 0 for weights that have been marked.
    fn pack_unmarked<const N8: usize>(&self, x: &Self::Acc<N8>) -> Self::Operand<N8>;
    /// Weights that are dropped become 0.
    fn drop_operand<const N8: usize>(&self, x: &mut Self::Operand<N8>, keep: &Self::Keep<N8>);

    /// 2^x, −∞ giving 0.
    fn exp2(x: f32) -> f32;
    /// log₂ x.
    fn log2(x: f32) -> f32;
    /// a·b + c with one rounding.
    fn fma(a: f32, b: f32, c: f32) -> f32;
    /// The larger of two; NaN if one is.
    fn larger(a: f32, b: f32) -> f32;
    /// 1 / x.
    fn recip(x: f32) -> f32;

    /// Has x computed here, beside the products in flight, and not where it is first needed.
    fn compute<const N8: usize>(&self, x: &mut Self::Acc<N8>);
    /// Waits until at most `LATER` products issued after this one's are still in flight.
    fn wait<const LATER: usize, const N8: usize>(&mut self, x: Pending<Self::Acc<N8>>) -> Self::Acc<N8>;
}

/// A consumer warpgroup of the forward kernel: 64 rows of a query tile, and its end of the K/V ring.
pub trait ForwardWarpgroup: Warpgroup {
    /// A filled slot of the K/V ring.
    type Slot: Copy;

    /// The query row of `tile` where this warpgroup's 64 begin.
    fn first_row(&self, tile: &WorkTile) -> u32;
    /// Starts loading this warpgroup's query rows of `tile`, of every pair; every earlier product with Q must have been
    /// waited for.
    fn load_q(&mut self, tile: &WorkTile);
    /// Waits until the rows that [`ForwardWarpgroup::load_q`] asked for are there.
    fn wait_q(&mut self);
    /// Waits for the next tile of the K/V ring, in the order of [`crate::pipeline::order::KvOrder`].
    fn wait_kv(&mut self) -> Self::Slot;
    /// Gives a slot back to the producer; every product that reads it must have been waited for.
    fn release_kv(&mut self, slot: Self::Slot);

    /// S = Q·Kᵀ of one pair, in flight.
    fn qk<const D8: usize, const N8: usize>(&mut self, k: Self::Slot, pair: u32) -> Pending<Self::Acc<N8>>;
    /// O + P·V, in flight.
    fn pv<const N8: usize, const D8: usize>(
        &mut self,
        o: Self::Acc<D8>,
        p: Self::Operand<N8>,
        v: Self::Slot,
    ) -> Pending<Self::Acc<D8>>;
    /// Waits until it is this warpgroup's turn to issue products, so that another's softmax runs beside them.
    fn take_turn(&mut self);
    /// Lets the next warpgroup issue.
    fn pass_turn(&mut self);

    /// Stores this warpgroup's rows of `tile` in the input's dtype, as far as they are rows and columns of `shape`.
    fn store<const D8: usize>(&mut self, x: &Self::Acc<D8>, to: &Output<Self::Tensor>, tile: &WorkTile, shape: &Shape);
    /// Stores one f32 for each of this warpgroup's rows of `tile` in the (batch, heads_q, seqlen_q) array at `address`.
    fn store_rows(&mut self, values: Self::Rows, address: u64, tile: &WorkTile, shape: &Shape);
}

/// A consumer warpgroup of the backward kernel: 64 keys, and its end of the rings of Q, dO and dS.
///
/// Scores are transposed here, keys × queries, so that Pᵀ and dSᵀ are left operands as they come.
pub trait BackwardWarpgroup: Warpgroup {
    /// A slot of the rings of Q and dO.
    type Slot: Copy;
    /// One f32 a column.
    type Columns<const M8: usize>: Copy;

    /// This warpgroup's first key within the block of keys.
    fn first_key(&self) -> u32;
    /// Waits for K of the next work tile.
    fn wait_k(&mut self);
    /// Waits for V of the same.
    fn wait_v(&mut self);
    /// Gives K and V back; every product that reads them must have been waited for, and the last dS been passed on.
    fn release_kv(&mut self);
    /// Waits for the next query block's Q and what its exponents add.
    fn wait_q(&mut self) -> Self::Slot;
    /// Waits for the query block's dO and delta.
    fn wait_do(&mut self, slot: Self::Slot);
    /// Waits until it is this warpgroup's turn to issue products, so that the other's exponentials run beside them.
    fn take_turn(&mut self);
    /// Lets the other warpgroup issue.
    fn pass_turn(&mut self);
    /// Waits for room for the query block's dS.
    fn wait_ds(&mut self, slot: Self::Slot);
    /// Gives a query block back; every product that reads it must have been waited for.
    fn release(&mut self, slot: Self::Slot);

    /// What exponents add for each query of the block.
    fn offsets<const M8: usize>(&self, slot: Self::Slot) -> Self::Columns<M8>;
    /// Delta of each query of the block.
    fn delta<const M8: usize>(&self, slot: Self::Slot) -> Self::Columns<M8>;
    /// Reads them now, and not a few at a time where they are used: ahead of a wait, for as many registers.
    fn read<const M8: usize>(&self, columns: Self::Columns<M8>) -> Self::Columns<M8>;
    /// `f(x, c)` for every element x and its column's c.
    fn map_columns<const M8: usize>(
        &self,
        x: &mut Self::Acc<M8>,
        columns: &Self::Columns<M8>,
        f: impl Fn(f32, f32) -> f32,
    );

    /// Sᵀ = K·Qᵀ, in flight.
    fn kq<const D8: usize, const M8: usize>(&mut self, slot: Self::Slot) -> Pending<Self::Acc<M8>>;
    /// dPᵀ = V·dOᵀ, in flight.
    fn v_do<const D8: usize, const M8: usize>(&mut self, slot: Self::Slot) -> Pending<Self::Acc<M8>>;
    /// dV + Pᵀ·dO, in flight.
    fn p_do<const M8: usize, const D8: usize>(
        &mut self,
        dv: Self::Acc<D8>,
        p: Self::Operand<M8>,
        slot: Self::Slot,
    ) -> Pending<Self::Acc<D8>>;
    /// dK + dSᵀ·Q, in flight.
    fn ds_q<const M8: usize, const D8: usize>(
        &mut self,
        dk: Self::Acc<D8>,
        ds: Self::Operand<M8>,
        slot: Self::Slot,
    ) -> Pending<Self::Acc<D8>>;
    /// Passes the query block's weights to the warpgroup that has dK, once it has taken those before.
    fn pass_weights<const M8: usize>(&mut self, p: &Self::Acc<M8>, slot: Self::Slot);
    /// Takes them.
    fn take_weights<const M8: usize>(&mut self, slot: Self::Slot) -> Self::Acc<M8>;
    /// Adds dS·K to dQ of the query block: now, or leaves it to another warpgroup, which may from [`Self::pass_ds`] on.
    fn add_dq<const M8: usize>(&mut self, ds: &Self::Operand<M8>, slot: Self::Slot, at: &QueryBlock);
    /// Waits until what was left is in memory, and passes it on.
    fn pass_ds(&mut self, slot: Self::Slot);

    /// Stores this warpgroup's part of dK or dV, in the input's dtype, as far as it is rows and columns of `shape`.
    fn store_kv<const D8: usize>(&mut self, x: &Self::Acc<D8>, to: &Strided, at: &KvBlock, shape: &Shape);
    /// Stores this warpgroup's part of dK or dV as a part of a work tile contributes it, in f32, to the workspace at
    /// `to`.
    fn store_part<const D8: usize>(&mut self, x: &Self::Acc<D8>, to: u64);
}
