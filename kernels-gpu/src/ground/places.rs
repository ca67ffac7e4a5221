//! Places in a problem: a work tile, a block of keys, a block of queries.

use super::shape::Shape;

/// One m_block of one query head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkTile {
    pub batch: u32,
    pub head: u32,
    pub m_block: u32,
}

/// One block of keys of one head, and the pair of Q and K that its scores come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvBlock {
    pub batch: u32,
    /// The key/value head.
    pub head: u32,
    pub n_block: u32,
    pub pair: u32,
}

/// One query block of one head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueryBlock {
    pub batch: u32,
    /// The query head.
    pub head: u32,
    pub m_block: u32,
    /// The pair that scores come from.
    pub pair: u32,
}

impl QueryBlock {
    /// The batch item whose dQ of this pair has this place in the workspace: those of the second pair follow those of
    /// the first.
    #[inline(always)]
    pub fn dq_batch(&self, shape: &Shape) -> u32 {
        self.batch + self.pair * shape.batch
    }
}
