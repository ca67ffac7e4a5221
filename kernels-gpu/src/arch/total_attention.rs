//! What a consumer warpgroup of the kernel of total attention can do.

use super::{Pending, Warpgroup};
use crate::attention::query_blocks::QueryBlock;
use crate::params::Shape;
use crate::pipeline::order::KvBlock;

/// A consumer warpgroup of the kernel of total attention: 64 keys, its end of the rings of K and Q, and where the
/// exponents of the query block in hand start, shared by the warpgroup's threads.
///
/// Scores are transposed, keys × queries, so that a fragment's row is a key.
pub trait TotalWarpgroup: Warpgroup {
    /// A filled slot of the ring of Q.
    type Slot: Copy;

    /// This warpgroup's first key within the block of keys.
    fn first_key(&self) -> u32;
    /// Waits for K of the next work tile, which products then read.
    fn wait_k(&mut self);
    /// Gives K back; every product that reads it must have been waited for.
    fn release_k(&mut self);
    /// Waits for the next query block.
    fn wait_q(&mut self) -> Self::Slot;
    /// Gives a query block back; every product that reads it must have been waited for.
    fn release_q(&mut self, q: Self::Slot);

    /// Sᵀ = K·Qᵀ, in flight.
    fn kq<const D8: usize, const M8: usize>(&mut self, q: Self::Slot) -> Pending<Self::Acc<M8>>;

    /// Starts loading the LSE of a query block from the f32 array (batch, heads_q, seqlen_q) at `address`.
    fn load_lse(&mut self, address: u64, shape: &Shape, at: &QueryBlock);
    /// Shares what was loaded, in base 2 and negated: what exponents add to a scaled score. −∞ for a row without a live
    /// key and for what is not a row.
    fn share_lse(&mut self);
    /// Waits until the whole warpgroup has shared; from here on [`TotalWarpgroup::map_offsets`] reads that.
    fn wait_lse(&mut self);
    /// `f(x, o)` for every element x and its column's o = −LSE·log₂e.
    fn map_offsets<const M8: usize>(&self, x: &mut Self::Acc<M8>, f: impl Fn(f32, f32) -> f32);

    /// Stores one f32 for each of this warpgroup's keys in the (batch, heads_q, seqlen_k) array at `address`.
    fn store_keys(&mut self, values: Self::Rows, address: u64, at: &KvBlock, shape: &Shape);
}
