//! Layout of the shared memory of a CTA that computes total attention: two tiles of K, for the current and the next
//! work tile, the ring of query tiles, `neg_lse_log2` for each of its slots, the barriers.
//!
//! The exponentials of a block run one step after its K·Qᵀ. By then the producer may have refilled the slot, so each
//! slot keeps two sets of `neg_lse_log2`, selected by phase parity. Two suffice: the producer fills pass n after the
//! consumers released pass n − 1, and they release it after the exponentials of all earlier blocks, pass n − 2
//! included.

use super::smem::{BARRIER_BYTES, tile_bytes};
use crate::tile::lane::WARPGROUP_ROWS;
use crate::tuning;

/// Offsets in the shared memory of a CTA that computes total attention.
#[derive(Clone, Copy, Debug)]
pub struct TotalSmem {
    pub head_dim: u32,
    /// Number of consumer warpgroups.
    pub consumers: u32,
    /// Number of queries of a slot of the ring.
    pub block_m: u32,
    pub stages: u32,
}

impl TotalSmem {
    /// Number of tiles of K.
    pub const K_STAGES: u32 = 2;

    /// Returns true if the consumers are so many that one fragment of scores each suffices: the exponentials of one
    /// overlap the products of the others. With fewer, each must overlap its exponentials with its own products.
    pub const fn many_consumers(&self) -> bool {
        self.consumers >= tuning::ONE_FRAGMENT_CONSUMERS
    }
    /// Returns true if a consumer has enough registers to keep its keys in them.
    pub const fn keys_in_registers(&self) -> bool {
        self.many_consumers() && self.head_dim <= tuning::KEYS_IN_REGISTERS_MAX_HEAD_DIM
    }
    /// Returns the number of parts that a work tile can be split into. With few consumers it is 1, because a part
    /// leaves consumers without keys and only many of them can do without some.
    pub const fn parts(&self) -> u32 {
        if self.many_consumers() { self.consumers } else { 1 }
    }

    /// Returns true if the exponential of a block's query `column` is a polynomial instead of the SFU's. That is one
    /// query in sixteen, at head dims where exponentials are the limit. With more of them, other units cost more than
    /// the SFU saves.
    ///
    /// Example: at D 64 a block has 128 queries, and the polynomials are those of queries 113, 115, …, 127.
    pub const fn by_polynomial(&self, column: u32) -> bool {
        self.head_dim <= tuning::POLYNOMIAL_MAX_HEAD_DIM
            && column % 2 == 1
            && column + tuning::POLYNOMIAL_QUERIES >= self.block_m
    }

    /// Returns the number of keys of a work tile: 64 for each consumer.
    pub const fn block_n(&self) -> u32 {
        self.consumers * WARPGROUP_ROWS
    }
    /// Returns the bytes of a tile of K.
    pub const fn k_bytes(&self) -> u32 {
        tile_bytes(self.block_n(), self.head_dim)
    }
    /// Returns the bytes of a slot of Q.
    pub const fn q_bytes(&self) -> u32 {
        tile_bytes(self.block_m, self.head_dim)
    }
    pub const fn k(&self, slot: u32) -> u32 {
        slot * self.k_bytes()
    }
    pub const fn q(&self, slot: u32) -> u32 {
        self.k(Self::K_STAGES) + slot * self.q_bytes()
    }
    /// Returns the offset of a slot's `neg_lse_log2`, one f32 per query. `lap` is the phase parity, 0 or 1.
    pub const fn neg_lse_log2(&self, slot: u32, lap: u32) -> u32 {
        self.q(self.stages) + (lap * self.stages + slot) * self.block_m * 4
    }
    const fn barrier(&self, index: u32) -> u32 {
        self.neg_lse_log2(0, 2) + index * BARRIER_BYTES
    }
    /// Returns the barrier that completes a phase when a tile of K has arrived; [`TotalSmem::k_empty`] is the one for a
    /// tile that is no longer needed.
    pub const fn k_full(&self, slot: u32) -> u32 {
        self.barrier(slot)
    }
    pub const fn k_empty(&self, slot: u32) -> u32 {
        self.barrier(Self::K_STAGES + slot)
    }
    pub const fn q_full(&self, slot: u32) -> u32 {
        self.barrier(2 * Self::K_STAGES + slot)
    }
    pub const fn q_empty(&self, slot: u32) -> u32 {
        self.q_full(self.stages + slot)
    }
    /// Returns the bytes of all of it.
    pub const fn bytes(&self) -> u32 {
        self.q_full(2 * self.stages)
    }
}

#[cfg(test)]
mod tests {
    use crate::tile::smem::{SMEM_LIMIT, panels};
    use crate::variants::TOTAL_VARIANTS;

    #[test]
    fn every_variant_fits() {
        for variant in TOTAL_VARIANTS {
            let smem = variant.smem();
            assert!(smem.bytes() <= SMEM_LIMIT, "{}", variant.symbol);
            for panel in [smem.k(1), smem.q(0), smem.q(1), smem.q_bytes() / panels(smem.head_dim)] {
                assert_eq!(panel % 1024, 0, "{}", variant.symbol);
            }
            assert_eq!(smem.neg_lse_log2(0, 0) % 8, 0, "{}", variant.symbol);
            assert_eq!(smem.k_full(0) % 8, 0, "{}", variant.symbol);
        }
    }
}
