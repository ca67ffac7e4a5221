//! Steps of a work tile of total attention, which is a block of keys of one query head. They are the query blocks that
//! attend to a key of it, from the last to the first. [`super::total_tiles`] has all work tiles of a CTA.
//!
//! Producer and consumers walk the same steps. The producer loads every query block that attends to any key of the
//! tile. A consumer computes those that attend to its own 64 keys, and with a left bound also those that come before
//! them. It skips the rest, which comes last: the order runs from the last query block to the first. Keys to which no
//! query attends visit one query block, wholly masked, so that every work tile has at least one step. If a work tile is
//! split ([`super::shared_tiles`]), the first consumer has all keys of a part, and the other consumers skip all of its
//! query blocks.

use super::mask::{Interval, Mask};
use super::query_blocks::{blocks_of, key_block};
use super::shared_tiles::TilePart;
use crate::ground::places::KvBlock;
use crate::ground::sequence::Sequence;

/// Keys of a work tile that the producer or a consumer walks.
#[derive(Clone, Copy, Debug)]
pub struct OwnKeys {
    /// First of the keys, within the work tile.
    pub first_key: u32,
    pub keys: u32,
    /// Maximum number of query blocks that are skipped in a row; blocks beyond it are visited.
    pub most_passed: u32,
}

impl OwnKeys {
    /// Returns all `block_n` keys.
    #[inline(always)]
    pub const fn whole(block_n: u32) -> Self {
        OwnKeys { first_key: 0, keys: block_n, most_passed: 0 }
    }
}

/// One work tile as the producer or a consumer walks it, by its [`OwnKeys`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TotalTile {
    /// Block of keys; `head` is the query head.
    pub keys: KvBlock,
    /// First key of the work tile, or of the part of a split one.
    pub first_key: u32,
    /// Query blocks `start..end` are visited, from the last to the first.
    pub start: u32,
    pub end: u32,
    /// Number of query blocks that follow and are skipped.
    pub passed: u32,
    full_start: u32,
    full_blocks: u32,
}

impl TotalTile {
    /// Makes that of a work tile, or of a part of it, whose batch item has the lengths `of`.
    #[inline(always)]
    pub fn new<M: Mask>(
        of: &Sequence,
        mask: &M,
        block_m: u32,
        block_n: u32,
        own_keys: &OwnKeys,
        at: &TilePart,
    ) -> Self {
        let keys = key_block(of, block_n, &at.tile);
        let part_keys = block_n / at.parts;
        let tile_key = keys.n_block * block_n + at.part * part_keys;
        let blocks = |start, keys| blocks_of(of, mask, 0, Interval { start, end: start + keys }, block_m);
        // A part of a tile may have keys of padding alone.
        let all = blocks(tile_key.min(of.seqlen_k - 1), part_keys);
        let (all_start, end) = (all.start.min(all.end.max(1) - 1), all.end.max(1));
        if own_keys.first_key >= part_keys {
            let passed = end - all_start;
            return TotalTile { keys, first_key: tile_key, start: end, end, passed, full_start: end, full_blocks: 0 };
        }
        let first_key = tile_key + own_keys.first_key;
        let own = blocks(first_key.min(of.seqlen_k - 1), own_keys.keys.min(part_keys));
        let start = if first_key < of.seqlen_k && own.count() > 0 { own.start } else { end - 1 };
        let passed = (start - all_start).min(own_keys.most_passed);
        TotalTile {
            keys,
            first_key: tile_key,
            start: all_start + passed,
            end,
            passed,
            full_start: own.full_start,
            full_blocks: (of.seqlen_q / block_m).min(own.full_end).saturating_sub(own.full_start),
        }
    }
    /// True if the block has as many queries as rows, and each attends to every key of the part.
    #[inline(always)]
    pub fn is_full(&self, m_block: u32) -> bool {
        m_block.wrapping_sub(self.full_start) < self.full_blocks
    }
}
