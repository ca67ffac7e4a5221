//! What a consumer warpgroup of the kernel of total attention can do.

use super::{Pending, Warpgroup};
use crate::attention::total_steps::{Part, TotalTile};
use crate::ground::shape::Shape;

/// A consumer warpgroup of the kernel of total attention: 64 keys, and its end of the rings of K and Q, with what
/// exponents add beside Q.
///
/// Scores are transposed, keys × queries, so that a fragment's row is a key.
pub trait TotalWarpgroup: Warpgroup {
    /// A filled slot of the ring of Q.
    type Slot: Copy;

    /// Which keys of a whole work tile are this warpgroup's. While it has some of a tile's, it passes over less than a
    /// lap of the ring of Q at once.
    fn part(&self) -> Part;
    /// Waits for K of the next work tile, which products then read.
    fn wait_k(&mut self);
    /// Gives K back; every product that reads it must have been waited for.
    fn release_k(&mut self);
    /// Waits for the next query block, and for what its exponents add.
    fn wait_q(&mut self) -> Self::Slot;
    /// Gives a query block back; every product that reads it must have been waited for. What exponents add stays for
    /// [`TotalWarpgroup::map_offsets`] until its slot's next block is given back.
    fn release_q(&mut self, q: Self::Slot);

    /// Takes this warpgroup's part of K, which has been waited for, into registers. It is not given back here: loads
    /// may still be reading it, until a product with these registers has been waited for.
    fn take_k<const D8: usize>(&mut self) -> Self::Operand<D8>;
    /// Sᵀ = K·Qᵀ with K in registers, in flight.
    fn taken_kq<const D8: usize, const M8: usize>(
        &mut self,
        k: &Self::Operand<D8>,
        q: Self::Slot,
    ) -> Pending<Self::Acc<M8>>;

    /// Sᵀ = K·Qᵀ, in flight.
    fn kq<const D8: usize, const M8: usize>(&mut self, q: Self::Slot) -> Pending<Self::Acc<M8>>;

    /// `f(x, o, by_polynomial)` for every element x and its query's o = −LSE·log₂e, what exponents add to a scaled
    /// score of the block in `q`: −∞ for a query without a live key and for what is not a query. For a few queries,
    /// always the same of a block, the weight is to be computed without the special-function unit
    /// ([`TotalSmem::by_polynomial`]).
    ///
    /// [`TotalSmem::by_polynomial`]: crate::tile::smem_total::TotalSmem::by_polynomial
    fn map_offsets<const M8: usize>(&self, q: Self::Slot, x: &mut Self::Acc<M8>, f: impl Fn(f32, f32, bool) -> f32);
    /// The same number, of which compilers know nothing: a branch that depends on it stays where it is.
    fn unknown(x: u32) -> u32;

    /// Stores one f32 for each of this warpgroup's keys of a work tile in the (batch, heads_q, seqlen_k) array at
    /// `address`.
    fn store_keys(&mut self, values: Self::Rows, address: u64, at: &TotalTile, shape: &Shape);
}
