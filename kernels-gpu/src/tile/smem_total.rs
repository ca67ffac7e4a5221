//! Shared memory of a CTA that computes total attention: tiles of K, one for the work tile in hand and one for the
//! next, the ring of query tiles, beside each of its slots what exponents add, the barriers.
//!
//! Weights are computed one step after the product that read a query tile, when its slot may already be filled anew. So
//! a slot has the offsets of two laps of the ring: who fills lap n knows that lap n − 1 of the slot was given back,
//! which a consumer does after the weights of every block before that one, and so of lap n − 2.

use super::smem::{BARRIER_BYTES, tile_bytes};
use crate::tile::lane::WARPGROUP_ROWS;

/// Offsets of such a CTA's shared memory.
#[derive(Clone, Copy, Debug)]
pub struct TotalSmem {
    pub head_dim: u32,
    /// Consumer warpgroups.
    pub consumers: u32,
    /// Queries of a slot of the ring.
    pub block_m: u32,
    pub stages: u32,
}

impl TotalSmem {
    /// Tiles of K.
    pub const K_STAGES: u32 = 2;

    /// Whether so many consumers work beside each other's products, with one fragment of scores each, that none has to
    /// work beside its own.
    pub const fn many_consumers(&self) -> bool {
        self.consumers >= 4
    }
    /// Whether such a consumer has registers for its keys.
    pub const fn keys_in_registers(&self) -> bool {
        self.many_consumers() && self.head_dim <= 64
    }
    /// Parts that a work tile can be shared out in: only many consumers can do without some of them.
    pub const fn parts(&self) -> u32 {
        if self.many_consumers() { self.consumers } else { 1 }
    }

    /// Whether the weights of a block's query `column` are computed without the special-function unit: one in sixteen,
    /// where exponentials are the limit. With more of them other units cost more than that one saves.
    pub const fn by_polynomial(&self, column: u32) -> bool {
        self.head_dim <= 64 && column % 2 == 1 && column + 16 >= self.block_m
    }

    /// Keys of a work tile: 64 for each consumer.
    pub const fn block_n(&self) -> u32 {
        self.consumers * WARPGROUP_ROWS
    }
    /// Bytes of a tile of K.
    pub const fn k_bytes(&self) -> u32 {
        tile_bytes(self.block_n(), self.head_dim)
    }
    /// Bytes of a slot of Q.
    pub const fn q_bytes(&self) -> u32 {
        tile_bytes(self.block_m, self.head_dim)
    }
    pub const fn k(&self, slot: u32) -> u32 {
        slot * self.k_bytes()
    }
    pub const fn q(&self, slot: u32) -> u32 {
        self.k(Self::K_STAGES) + slot * self.q_bytes()
    }
    /// What exponents add, one f32 a query, in even and odd laps.
    pub const fn offsets(&self, slot: u32, lap: u32) -> u32 {
        self.q(self.stages) + (lap * self.stages + slot) * self.block_m * 4
    }
    const fn barrier(&self, index: u32) -> u32 {
        self.offsets(0, 2) + index * BARRIER_BYTES
    }
    /// The barriers that say that a tile of K is there, and that it is no longer needed.
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
    /// All of it.
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
            assert_eq!(smem.offsets(0, 0) % 8, 0, "{}", variant.symbol);
            assert_eq!(smem.k_full(0) % 8, 0, "{}", variant.symbol);
        }
    }
}
