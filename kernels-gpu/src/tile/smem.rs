//! Shared memory of a CTA: which bytes hold which tile, known to the host (how much to ask for) and the kernel alike.
//!
//! A tile of R rows × D columns of 16-bit elements lies as ⌈D / 64⌉ panels, each R rows of 128 bytes in the 128-byte
//! swizzle (PTX ISA, "Shared memory matrix layout"): what one box of the copy engine writes and what wgmma reads.
//! Panels start on 1024-byte boundaries, the period of the swizzle, because R is a multiple of 8.

use super::lane::WARPGROUP_ROWS;

/// How the gradients of a block of keys are shared out between two warpgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Each has half of the keys.
    Keys,
    /// One has dV and computes the weights of all keys, which it passes on; the other has dK and dS.
    Gradients,
}

impl Split {
    /// How many warpgroups write dSᵀ.
    pub const fn writers(self) -> u32 {
        match self {
            Split::Keys => 2,
            Split::Gradients => 1,
        }
    }
    /// The first key of a consumer within the block of keys.
    #[inline(always)]
    pub const fn first_key(self, consumer: u32) -> u32 {
        match self {
            Split::Keys => consumer * WARPGROUP_ROWS,
            Split::Gradients => 0,
        }
    }
}

/// Columns of a panel: 128 bytes of 16-bit elements.
pub const PANEL_COLUMNS: u32 = 64;
/// Bytes of a panel's row.
pub const PANEL_ROW_BYTES: u32 = 128;
/// What a CTA may have on sm_90: 227 KiB.
pub const SMEM_LIMIT: u32 = 227 * 1024;
/// Bytes of an mbarrier.
pub(super) const BARRIER_BYTES: u32 = 8;

/// Panels of a tile of so many columns; the last may be half used.
pub const fn panels(columns: u32) -> u32 {
    columns.div_ceil(PANEL_COLUMNS)
}

/// Bytes of a tile of `rows` × `columns` 16-bit elements.
pub const fn tile_bytes(rows: u32, columns: u32) -> u32 {
    panels(columns) * rows * PANEL_ROW_BYTES
}

/// Byte offset of columns 16·step of a tile of `rows` rows: where a k16 step of a product begins whose k runs along
/// rows.
#[inline(always)]
pub const fn columns_step(rows: u32, step: u32) -> u32 {
    // Four steps to a panel.
    step / 4 * rows * PANEL_ROW_BYTES + step % 4 * 32
}

/// Byte offset of row 16·step of a tile: where a k16 step of a product begins whose k runs along columns.
#[inline(always)]
pub const fn rows_step(step: u32) -> u32 {
    step * 16 * PANEL_ROW_BYTES
}

/// Offsets of a forward CTA's shared memory: a query tile of each pair for each consumer, the ring's slots, an output
/// tile for each consumer where there is room, the barriers.
#[derive(Clone, Copy, Debug)]
pub struct ForwardSmem {
    pub head_dim: u32,
    pub block_n: u32,
    pub consumers: u32,
    pub stages: u32,
    /// Pairs of Q and K.
    pub pairs: u32,
    /// CTAs of a cluster, which have the same tile in the same slot at the same time.
    pub cluster: u32,
}

impl ForwardSmem {
    /// Bytes of one consumer's query rows, of one pair.
    pub const fn q_bytes(&self) -> u32 {
        tile_bytes(64, self.head_dim)
    }
    /// Bytes of a slot of the ring: one tile of K or V.
    pub const fn slot_bytes(&self) -> u32 {
        tile_bytes(self.block_n, self.head_dim)
    }
    pub const fn q(&self, consumer: u32, pair: u32) -> u32 {
        (consumer * self.pairs + pair) * self.q_bytes()
    }
    pub const fn slot(&self, slot: u32) -> u32 {
        self.q(self.consumers, 0) + slot * self.slot_bytes()
    }
    /// One consumer's rows of O, on their way to the copy engine; only where [`ForwardSmem::stages_o`].
    pub const fn o(&self, consumer: u32) -> u32 {
        self.slot(self.stages) + consumer * self.q_bytes()
    }
    /// Whether there is room to stage O.
    pub const fn stages_o(&self) -> bool {
        self.o(self.consumers) + self.barrier_bytes() <= SMEM_LIMIT
    }
    const fn barrier_bytes(&self) -> u32 {
        (2 * self.stages + self.consumers) * BARRIER_BYTES
    }
    /// The barrier that says that a slot is full.
    pub const fn full(&self, slot: u32) -> u32 {
        let barriers = if self.stages_o() { self.o(self.consumers) } else { self.o(0) };
        barriers + slot * BARRIER_BYTES
    }
    /// The barrier that says that a slot is empty.
    pub const fn empty(&self, slot: u32) -> u32 {
        self.full(self.stages) + slot * BARRIER_BYTES
    }
    /// The barrier that says that a consumer's query rows are there.
    pub const fn q_full(&self, consumer: u32) -> u32 {
        self.empty(self.stages) + consumer * BARRIER_BYTES
    }
    /// All of it.
    pub const fn bytes(&self) -> u32 {
        self.q_full(self.consumers)
    }
}

/// Offsets of a backward CTA's shared memory: K, V, the rings of Q, dO and dSᵀ, weights that are passed on, the
/// statistics of the query rows in the rings, the barriers.
#[derive(Clone, Copy, Debug)]
pub struct BackwardSmem {
    pub head_dim: u32,
    pub block_m: u32,
    pub block_n: u32,
    pub split: Split,
    /// Buffers of K.
    pub k_stages: u32,
}

impl BackwardSmem {
    /// Slots of the ring of dSᵀ.
    pub const DS_STAGES: u32 = 2;
    /// Slots of the rings of Q and dO.
    pub const fn stages(&self) -> u32 {
        if self.head_dim <= 128 { 3 } else { 2 }
    }

    /// Bytes of the tile of K, and of V.
    pub const fn kv_bytes(&self) -> u32 {
        tile_bytes(self.block_n, self.head_dim)
    }
    /// Bytes of a slot of Q, and of dO.
    pub const fn q_bytes(&self) -> u32 {
        tile_bytes(self.block_m, self.head_dim)
    }
    const fn ds_bytes(&self) -> u32 {
        tile_bytes(self.block_n, self.block_m)
    }
    /// Bytes of the statistics of a slot: one f32 a query row.
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
    /// Weights of a query block, in f32, where one warpgroup passes them to the other.
    pub const fn weights(&self) -> u32 {
        self.ds(Self::DS_STAGES)
    }
    const fn weights_bytes(&self) -> u32 {
        match self.split {
            Split::Keys => 0,
            Split::Gradients => self.block_n * self.block_m * 4,
        }
    }
    pub const fn offsets(&self, slot: u32) -> u32 {
        self.weights() + self.weights_bytes() + slot * self.row_bytes()
    }
    pub const fn delta(&self, slot: u32) -> u32 {
        self.offsets(self.stages()) + slot * self.row_bytes()
    }
    const fn barrier(&self, index: u32) -> u32 {
        self.delta(self.stages()) + index * BARRIER_BYTES
    }
    /// The barriers that say that K and V are there. That they are no longer needed, a work tile's last dS says.
    pub const fn k_full(&self, buffer: u32) -> u32 {
        // That of the second buffer is the last of all.
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
    /// Of the slots of both.
    pub const fn empty(&self, slot: u32) -> u32 {
        self.q_full(2 * self.stages() + slot)
    }
    pub const fn ds_full(&self, slot: u32) -> u32 {
        self.q_full(3 * self.stages() + slot)
    }
    pub const fn ds_empty(&self, slot: u32) -> u32 {
        self.q_full(3 * self.stages() + Self::DS_STAGES + slot)
    }
    /// The barriers that say that weights are there, and that they have been taken.
    pub const fn weights_full(&self) -> u32 {
        self.q_full(3 * self.stages() + 2 * Self::DS_STAGES)
    }
    pub const fn weights_empty(&self) -> u32 {
        self.q_full(3 * self.stages() + 2 * Self::DS_STAGES + 1)
    }
    /// All of it.
    pub const fn bytes(&self) -> u32 {
        self.k_full(1) + BARRIER_BYTES
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use std::collections::BTreeSet;

    /// Byte offset of element (row, column) in a tile of `rows` rows: panel, row, then 16-byte chunks XORed with row
    /// mod 8.
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

    /// Steps begin where the swizzle leaves the first row of its period alone.
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
        for variant in crate::variants::VARIANTS.iter().chain(crate::variants::DROPOUT_VARIANTS) {
            let smem = variant.smem();
            assert!(smem.bytes() <= SMEM_LIMIT, "{}", variant.symbol);
            for panel in [smem.q(1, 0), smem.slot(0), smem.slot(1), smem.slot_bytes() / panels(smem.head_dim)] {
                assert_eq!(panel % 1024, 0, "{}", variant.symbol);
            }
        }
        for variant in crate::variants::BACKWARD_VARIANTS.iter().chain(crate::variants::BACKWARD_DROPOUT_VARIANTS) {
            let smem = variant.smem();
            assert!(smem.bytes() <= SMEM_LIMIT, "{}", variant.symbol);
            for panel in [smem.v(), smem.q(1), smem.d_o(0), smem.d_o(1), smem.ds(0), smem.ds(1)] {
                assert_eq!(panel % 1024, 0, "{}", variant.symbol);
            }
            // The ring of dS and what is passed on have a barrier for full and one for empty; Q and dO share the
            // latter.
            let barriers = 3 + 3 * smem.stages() + 2 * (BackwardSmem::DS_STAGES + 1);
            assert_eq!(smem.bytes(), smem.k_full(0) + barriers * BARRIER_BYTES, "{}", variant.symbol);
        }
    }
}
