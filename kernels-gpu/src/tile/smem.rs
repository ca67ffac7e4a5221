//! Layout of a CTA's shared memory. The host reads its size from it, and the kernel the places of tiles and barriers.
//!
//! A tile of R rows × D columns of 16-bit elements consists of ⌈D / 64⌉ panels, each R rows of 128 bytes in the
//! 128-byte swizzle (PTX ISA, "Shared memory matrix layout"). TMA writes a panel as one box, and wgmma reads this
//! layout. Panels start on 1024-byte boundaries, the period of the swizzle, because R is a multiple of 8.

use super::lane::WARPGROUP_ROWS;

/// Split of the gradients of a block of keys between two warpgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Each warpgroup has half of the keys.
    Keys,
    /// One warpgroup accumulates dV and computes P of all keys, which it writes to shared memory. The other accumulates
    /// dK and computes dS.
    Gradients,
}

impl Split {
    /// Returns the number of warpgroups that write dSᵀ.
    pub const fn writers(self) -> u32 {
        match self {
            Split::Keys => 2,
            Split::Gradients => 1,
        }
    }
    /// Returns the first key of a consumer within the block of keys.
    #[inline(always)]
    pub const fn first_key(self, consumer: u32) -> u32 {
        match self {
            Split::Keys => consumer * WARPGROUP_ROWS,
            Split::Gradients => 0,
        }
    }
}

/// Number of columns of a panel: 128 bytes of 16-bit elements.
pub const PANEL_COLUMNS: u32 = 64;
/// Number of bytes of a panel's row.
pub const PANEL_ROW_BYTES: u32 = 128;
/// Maximum shared memory of a CTA on sm_90: 227 KiB.
pub const SMEM_LIMIT: u32 = 227 * 1024;
/// Number of bytes of an mbarrier.
pub(super) const BARRIER_BYTES: u32 = 8;

/// Returns the number of panels of a tile of `columns` columns. The last panel may be half used.
pub const fn panels(columns: u32) -> u32 {
    columns.div_ceil(PANEL_COLUMNS)
}

/// Returns the bytes of a tile of `rows` × `columns` 16-bit elements.
pub const fn tile_bytes(rows: u32, columns: u32) -> u32 {
    panels(columns) * rows * PANEL_ROW_BYTES
}

/// Returns the byte offset of column 16·step of a tile of `rows` rows. A k16 step of a product starts there if k runs
/// along rows.
#[inline(always)]
pub const fn columns_step(rows: u32, step: u32) -> u32 {
    // A panel holds four steps.
    step / 4 * rows * PANEL_ROW_BYTES + step % 4 * 32
}

/// Returns the byte offset of row 16·step of a tile. A k16 step of a product starts there if k runs along columns.
#[inline(always)]
pub const fn rows_step(step: u32) -> u32 {
    step * 16 * PANEL_ROW_BYTES
}

/// Offsets in a forward CTA's shared memory, in this order: a query tile of each pair for each consumer, the ring's
/// slots, an output tile for each consumer if there is room, the barriers.
#[derive(Clone, Copy, Debug)]
pub struct ForwardSmem {
    pub head_dim: u32,
    pub block_n: u32,
    pub consumers: u32,
    pub stages: u32,
    /// Number of pairs of Q and K.
    pub pairs: u32,
    /// Number of CTAs of a cluster. They have the same tile in the same slot at the same time.
    pub cluster: u32,
}

impl ForwardSmem {
    /// Returns the number of query rows of a work tile.
    pub const fn block_m(&self) -> u32 {
        self.consumers * WARPGROUP_ROWS
    }
    /// Returns the bytes of one consumer's query rows, of one pair.
    pub const fn q_bytes(&self) -> u32 {
        tile_bytes(64, self.head_dim)
    }
    /// Returns the bytes of a slot of the ring: one tile of K or V.
    pub const fn slot_bytes(&self) -> u32 {
        tile_bytes(self.block_n, self.head_dim)
    }
    pub const fn q(&self, consumer: u32, pair: u32) -> u32 {
        (consumer * self.pairs + pair) * self.q_bytes()
    }
    pub const fn slot(&self, slot: u32) -> u32 {
        self.q(self.consumers, 0) + slot * self.slot_bytes()
    }
    /// Returns the offset of one consumer's staging tile of O, which TMA stores. It exists only if
    /// [`ForwardSmem::stages_o`].
    pub const fn o(&self, consumer: u32) -> u32 {
        self.slot(self.stages) + consumer * self.q_bytes()
    }
    /// Returns true if there is room to stage O.
    pub const fn stages_o(&self) -> bool {
        self.o(self.consumers) + self.barrier_bytes() <= SMEM_LIMIT
    }
    const fn barrier_bytes(&self) -> u32 {
        (2 * self.stages + self.consumers) * BARRIER_BYTES
    }
    /// Returns the barrier that completes a phase when a slot is full.
    pub const fn full(&self, slot: u32) -> u32 {
        let barriers = if self.stages_o() { self.o(self.consumers) } else { self.o(0) };
        barriers + slot * BARRIER_BYTES
    }
    /// Returns the barrier that completes a phase when a slot is empty.
    pub const fn empty(&self, slot: u32) -> u32 {
        self.full(self.stages) + slot * BARRIER_BYTES
    }
    /// Returns the barrier that completes a phase when a consumer's query rows have arrived.
    pub const fn q_full(&self, consumer: u32) -> u32 {
        self.empty(self.stages) + consumer * BARRIER_BYTES
    }
    /// Returns the bytes of all of it.
    pub const fn bytes(&self) -> u32 {
        self.q_full(self.consumers)
    }
}

/// Offsets in a backward CTA's shared memory, in this order: K, V, the rings of Q, dO and dSᵀ, P that one consumer
/// writes for the other, `neg_lse_log2` and δ of the query rows in the rings, the barriers.
#[derive(Clone, Copy, Debug)]
pub struct BackwardSmem {
    pub head_dim: u32,
    pub block_m: u32,
    pub block_n: u32,
    pub split: Split,
    /// Number of buffers of K.
    pub k_stages: u32,
}

impl BackwardSmem {
    /// Number of slots of the ring of dSᵀ.
    pub const DS_STAGES: u32 = 2;
    /// Returns the number of slots of the rings of Q and dO.
    pub const fn stages(&self) -> u32 {
        if self.head_dim <= 128 { 3 } else { 2 }
    }

    /// Returns the bytes of the tile of K, and of that of V.
    pub const fn kv_bytes(&self) -> u32 {
        tile_bytes(self.block_n, self.head_dim)
    }
    /// Returns the bytes of a slot of Q, and of one of dO.
    pub const fn q_bytes(&self) -> u32 {
        tile_bytes(self.block_m, self.head_dim)
    }
    const fn ds_bytes(&self) -> u32 {
        tile_bytes(self.block_n, self.block_m)
    }
    /// Returns the bytes of a slot's `neg_lse_log2`, and of its δ: one f32 per query row.
    pub const fn row_bytes(&self) -> u32 {
        self.block_m * 4
    }
    pub const fn k(&self, buffer: u32) -> u32 {
        buffer * self.kv_bytes()
    }
    pub const fn v(&self) -> u32 {
        self.k(self.k_stages)
    }
    pub const fn q(&self, slot: u32) -> u32 {
        self.v() + self.kv_bytes() + slot * self.q_bytes()
    }
    pub const fn d_o(&self, slot: u32) -> u32 {
        self.q(self.stages()) + slot * self.q_bytes()
    }
    pub const fn ds(&self, slot: u32) -> u32 {
        self.d_o(self.stages()) + slot * self.ds_bytes()
    }
    /// Returns the offset of P of a query block, in f32. One warpgroup writes it there and the other reads it
    /// ([`Split::Gradients`]).
    pub const fn weights(&self) -> u32 {
        self.ds(Self::DS_STAGES)
    }
    const fn weights_bytes(&self) -> u32 {
        match self.split {
            Split::Keys => 0,
            Split::Gradients => self.block_n * self.block_m * 4,
        }
    }
    pub const fn neg_lse_log2(&self, slot: u32) -> u32 {
        self.weights() + self.weights_bytes() + slot * self.row_bytes()
    }
    pub const fn delta(&self, slot: u32) -> u32 {
        self.neg_lse_log2(self.stages()) + slot * self.row_bytes()
    }
    const fn barrier(&self, index: u32) -> u32 {
        self.delta(self.stages()) + index * BARRIER_BYTES
    }
    /// Returns the barrier that completes a phase when K has arrived in a buffer; [`BackwardSmem::v_full`] is that of
    /// V. K and V have no barrier for empty: the last dS of a work tile implies that they are no longer needed.
    pub const fn k_full(&self, buffer: u32) -> u32 {
        // The barrier of the second buffer is the last of all barriers.
        self.barrier(buffer * (2 + 3 * self.stages() + 2 * Self::DS_STAGES + 2))
    }
    pub const fn v_full(&self) -> u32 {
        self.barrier(1)
    }
    pub const fn q_full(&self, slot: u32) -> u32 {
        self.barrier(2 + slot)
    }
    pub const fn do_full(&self, slot: u32) -> u32 {
        self.q_full(self.stages() + slot)
    }
    /// Returns the barrier that completes a phase when a slot of Q and that of dO are empty.
    pub const fn empty(&self, slot: u32) -> u32 {
        self.q_full(2 * self.stages() + slot)
    }
    pub const fn ds_full(&self, slot: u32) -> u32 {
        self.q_full(3 * self.stages() + slot)
    }
    pub const fn ds_empty(&self, slot: u32) -> u32 {
        self.q_full(3 * self.stages() + Self::DS_STAGES + slot)
    }
    /// Returns the barrier that completes a phase when P has been written; [`BackwardSmem::weights_empty`] is the one
    /// for P that has been read.
    pub const fn weights_full(&self) -> u32 {
        self.q_full(3 * self.stages() + 2 * Self::DS_STAGES)
    }
    pub const fn weights_empty(&self) -> u32 {
        self.q_full(3 * self.stages() + 2 * Self::DS_STAGES + 1)
    }
    /// Returns the bytes of all of it.
    pub const fn bytes(&self) -> u32 {
        self.k_full(1) + BARRIER_BYTES
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use std::collections::BTreeSet;

    /// Returns the byte offset of element (row, column) in a tile of `rows` rows: panel, row, then 16-byte chunks XORed
    /// with row mod 8.
    fn swizzled_offset(rows: u32, row: u32, column: u32) -> u32 {
        let panel = column / PANEL_COLUMNS;
        let chunk = column % PANEL_COLUMNS / 8;
        panel * rows * PANEL_ROW_BYTES + row * PANEL_ROW_BYTES + (chunk ^ (row % 8)) * 16 + column % 8 * 2
    }

    #[test]
    fn swizzle_is_a_permutation_that_keeps_chunks_whole() {
        let (rows, columns) = (16, 128);
        let mut seen = BTreeSet::new();
        for row in 0..rows {
            for column in 0..columns {
                let offset = swizzled_offset(rows, row, column);
                assert_eq!(offset % 16, column % 8 * 2);
                assert!(seen.insert(offset) && offset < tile_bytes(rows, columns));
            }
        }
    }

    #[test]
    fn eight_rows_of_one_chunk_touch_every_bank() {
        let banks: BTreeSet<u32> =
            (0..8).flat_map(|row| (0..4).map(move |word| (swizzled_offset(8, row, 0) / 4 + word) % 32)).collect();
        assert_eq!(banks.len(), 32);
    }

    /// Steps begin at rows and columns where the swizzle is the identity.
    #[test]
    fn steps_begin_at_their_element() {
        for rows in [64, 80, 128] {
            for step in 0..16 {
                assert_eq!(columns_step(rows, step), swizzled_offset(rows, 0, 16 * step));
            }
            for step in 0..rows / 16 {
                assert_eq!(rows_step(step), swizzled_offset(rows, 16 * step, 0));
            }
        }
    }

    #[test]
    fn every_variant_fits() {
        for variant in crate::variants::VARIANTS {
            let smem = variant.smem();
            assert!(smem.bytes() <= SMEM_LIMIT, "{}", variant.symbol);
            for panel in [smem.q(1, 0), smem.slot(0), smem.slot(1), smem.slot_bytes() / panels(smem.head_dim)] {
                assert_eq!(panel % 1024, 0, "{}", variant.symbol);
            }
        }
        for variant in crate::variants::BACKWARD_VARIANTS {
            let smem = variant.smem();
            assert!(smem.bytes() <= SMEM_LIMIT, "{}", variant.symbol);
            for panel in [smem.v(), smem.q(1), smem.d_o(0), smem.d_o(1), smem.ds(0), smem.ds(1)] {
                assert_eq!(panel % 1024, 0, "{}", variant.symbol);
            }
            // The ring of dS and the P between consumers have a barrier for full and one for empty each. Q and dO share
            // the one for empty.
            let barriers = 3 + 3 * smem.stages() + 2 * (BackwardSmem::DS_STAGES + 1);
            assert_eq!(smem.bytes(), smem.k_full(0) + barriers * BARRIER_BYTES, "{}", variant.symbol);
        }
    }
}
