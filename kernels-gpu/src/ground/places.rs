//! Places in a problem: work tiles, blocks of keys, blocks of queries.

/// Work tile: one m_block of one query head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkTile {
    pub batch: u32,
    pub head: u32,
    pub m_block: u32,
}

/// Work tile with head and m_block in one 64-bit value. The forward mainloop carries it from tile to tile. If it
/// carried a [`WorkTile`], ptxas would take the warp for diverged, and synchronise it in every step (measured, cause
/// unknown; notebook 139).
#[derive(Clone, Copy)]
pub struct PackedTile {
    head_and_block: u64,
    batch: u32,
}

impl PackedTile {
    #[inline(always)]
    pub fn new(tile: WorkTile) -> Self {
        PackedTile { head_and_block: (tile.m_block as u64) << 32 | tile.head as u64, batch: tile.batch }
    }
    #[inline(always)]
    pub fn tile(self) -> WorkTile {
        let PackedTile { head_and_block, batch } = self;
        WorkTile { batch, head: head_and_block as u32, m_block: (head_and_block >> 32) as u32 }
    }
}

/// Block of keys of one head, and the pair of Q and K that its scores come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvBlock {
    pub batch: u32,
    /// Key/value head.
    pub head: u32,
    pub n_block: u32,
    pub pair: u32,
}

/// Query block of one head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueryBlock {
    pub batch: u32,
    /// Query head.
    pub head: u32,
    pub m_block: u32,
    /// Pair of Q and K that scores come from.
    pub pair: u32,
}
