//! The interface of a consumer warpgroup of the kernel of total attention.

use super::{Pending, Warpgroup};
use crate::attention::total_steps::{OwnKeys, TotalTile};
use crate::ground::sequence::Span;
use crate::ground::tensor::RowArray;

/// Consumer warpgroup of the kernel of total attention: 64 keys, and the consumer's end of the rings of K and Q. Each
/// slot of Q comes with `neg_lse_log2` of its queries.
///
/// Scores are transposed, keys × queries, so that a fragment's row is a key.
pub trait TotalWarpgroup: Warpgroup {
    /// Filled slot of the ring of Q.
    type Slot: Copy;

    /// Returns this warpgroup's keys within an unsplit work tile. While some keys of a tile are its own, it skips fewer
    /// query blocks at once than the ring of Q has slots.
    fn own_keys(&self) -> OwnKeys;
    /// Waits for K of the next work tile. Later products read it.
    fn wait_k(&mut self);
    /// Releases K. Every product that reads it must have been waited for.
    fn release_k(&mut self);
    /// Waits for the next query block and its `neg_lse_log2`.
    fn wait_q(&mut self) -> Self::Slot;
    /// Releases a query block. Every product that reads it must have been waited for. Its `neg_lse_log2` stays readable
    /// by [`TotalWarpgroup::map_neg_lse_log2`] until the next block in the same slot is released.
    fn release_q(&mut self, q: Self::Slot);

    /// Loads this warpgroup's rows of K, after [`TotalWarpgroup::wait_k`], from shared memory into registers. It does
    /// not release K, because the loads may still be in flight until a product with these registers has been waited
    /// for.
    fn take_k<const D8: usize>(&mut self) -> Self::Operand<D8>;
    /// Issues Sᵀ = K·Qᵀ with K in registers.
    fn taken_kq<const D8: usize, const M8: usize>(
        &mut self,
        k: &Self::Operand<D8>,
        q: Self::Slot,
    ) -> Pending<Self::Acc<M8>>;

    /// Issues Sᵀ = K·Qᵀ.
    fn kq<const D8: usize, const M8: usize>(&mut self, q: Self::Slot) -> Pending<Self::Acc<M8>>;

    /// Replaces every element x by `f(x, neg_lse_log2, by_polynomial)`. `neg_lse_log2` = −LSE·log₂e belongs to the
    /// element's query in the block of `q` and is to be added to the scaled score. It is −∞ for a query without a valid
    /// key and for rows beyond the last query. `by_polynomial` is true for a few fixed queries of each block, whose
    /// exponential is to be computed without the SFU ([`TotalSmem::by_polynomial`]).
    ///
    /// [`TotalSmem::by_polynomial`]: crate::tile::smem_total::TotalSmem::by_polynomial
    fn map_neg_lse_log2<const M8: usize>(
        &self,
        q: Self::Slot,
        x: &mut Self::Acc<M8>,
        f: impl Fn(f32, f32, bool) -> f32,
    );
    /// Returns `x` in a form opaque to the compiler, so that a branch that depends on it stays where it is.
    fn unknown(x: u32) -> u32;

    /// Stores one f32 for each of this warpgroup's keys of a work tile, as far as they are keys of its batch item.
    fn store_keys(&mut self, values: Self::Rows, to: &RowArray, at: &TotalTile, keys: &Span);
}
