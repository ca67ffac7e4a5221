//! Initialisation of dQ by work tiles of the backward pass. The work tile of each key head's first keys, to which every
//! query of the head attends, stores dQ, and all others accumulate into it. So dQ need not be zeroed before.
//!
//! The stored dQ must be there before the others accumulate. So such a work tile comes earlier than its head's other
//! tiles: it takes the place of the corresponding tile of a head that comes some heads before. The heads that come
//! first have no such place. Their dQ is zeroed by the preprocess kernel, and all of their work tiles accumulate.

use super::dropout::Drops;
use super::mask::Mask;
use super::scheduler::TileOrder;
use crate::ground::places::WorkTile;
use crate::tuning;

/// Key heads, of all batch items, whose dQ is initialised by a work tile. The host makes it; it travels with the launch
/// parameters.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstTiles {
    /// Number of key heads whose dQ is zeroed instead. They are the first ones.
    pub zeroed: u32,
    /// Number of all key heads.
    pub heads: u32,
}

impl FirstTiles {
    /// Initialises dQ by a work tile for none of `heads` heads.
    pub const fn none(heads: u32) -> Self {
        FirstTiles { zeroed: heads, heads }
    }

    /// Selects the heads for `heads` key heads of `key_blocks` work tiles each, in sections of `section` heads, on
    /// `ctas` CTAs. Every query must attend to the first keys.
    ///
    /// Example: D 128, no mask, S 1024, batch 32, 16 heads, 132 CTAs. The 512 heads have 8 work tiles each and sections
    /// of 1 head, so three waves of 132 tiles are 49.5 heads: the first 50 are zeroed, and work tiles initialise the
    /// other 462. At S 4096 a head has 32 blocks of keys, which are too many, and all heads are zeroed.
    pub fn new(heads: u32, key_blocks: u32, section: u32, ctas: u32) -> Self {
        // The work tiles that initialise dQ may be the last ones of a section.
        let waves = tuning::DQ_INIT_WAVES.saturating_mul(ctas);
        let zeroed = waves.div_ceil(key_blocks.max(1)).saturating_add(section.saturating_sub(1));
        match key_blocks <= tuning::DQ_INIT_MAX_KEY_BLOCKS && zeroed <= heads / 2 {
            true => FirstTiles { zeroed, heads },
            false => Self::none(heads),
        }
    }

    /// True if kernels for such a mask and dropout support this initialisation. At head dim 64 it gains nothing
    /// (notebook 73).
    pub const fn is_for<M: Mask, R: Drops>(head_dim: u32) -> bool {
        M::PAIRS == 1 && !R::DROPS && head_dim >= tuning::DQ_INIT_MIN_HEAD_DIM
    }

    /// Returns the `index`-th work tile.
    #[inline(always)]
    pub fn tile(&self, order: &TileOrder, index: u32) -> WorkTile {
        order.tile_ahead(index, self.zeroed, self.heads)
    }

    /// Returns the key head in whose place in the order the first keys of `head` come.
    #[inline(always)]
    pub fn place(&self, head: u32) -> u32 {
        if head >= self.zeroed { head - self.zeroed } else { head + (self.heads - self.zeroed) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::key_parts::{KeyPart, Sharing, SplitPart};
    use super::*;
    use crate::ground::shape::Shape;
    use std::vec::Vec;

    /// Checks that every work tile comes once, and that those that initialise dQ are unsplit and come waves before
    /// those of the same head that accumulate.
    #[test]
    fn who_stores_comes_first() {
        for (batch, heads, seqlen, ctas) in [(2, 400, 256, 132), (1, 130, 1000, 132), (5, 20, 260, 8), (1, 41, 60, 4)] {
            let shape =
                Shape { batch, heads_q: heads, heads_kv: heads, seqlen_q: seqlen, seqlen_k: seqlen, head_dim: 128 };
            for section in [1, 3, 8] {
                let order = TileOrder::new(&shape, 64, section);
                let blocks = seqlen.div_ceil(64);
                let first = FirstTiles::new(batch * heads, blocks, section, ctas);
                assert!(first.zeroed < batch * heads, "{shape:?}");
                let sharing = Sharing::new(order.tiles(), ctas, 1, 16);
                let mut seen = Vec::new();
                let mut stored = std::vec![None; (batch * heads) as usize];
                for index in 0..sharing.count {
                    let KeyPart { tile, part } = KeyPart::new(&order, Some((&sharing, true)), Some(&first), index);
                    let head = tile.batch * heads + tile.head;
                    if tile.m_block + 1 == blocks {
                        let stores = head >= first.zeroed;
                        assert!(!stores || part == SplitPart::WHOLE, "{shape:?}: {tile:?}");
                        stored[head as usize] = Some(index);
                    } else if head >= first.zeroed {
                        let ahead = stored[head as usize].map(|first| index - first);
                        assert!(
                            ahead >= Some((tuning::DQ_INIT_WAVES - 1) * ctas),
                            "{shape:?}: {tile:?} {ahead:?} behind"
                        );
                    }
                    seen.push((head, tile.m_block));
                }
                seen.sort();
                seen.dedup();
                assert_eq!(seen.len() as u32, order.tiles(), "{shape:?}");
                let places: Vec<u32> = (0..batch * heads).map(|head| first.place(head)).collect();
                for (head, place) in (0..).zip(places) {
                    let place = WorkTile { batch: place / heads, head: place % heads, m_block: blocks - 1 };
                    let tile = first.tile(&order, order.index(&place));
                    assert_eq!(tile, WorkTile { batch: head / heads, head: head % heads, m_block: blocks - 1 });
                }
            }
        }
    }

    #[test]
    fn few_heads_or_long_ones_have_none() {
        for (heads, blocks, ctas, zeroed) in
            [(512, 8, 132, 50), (99, 8, 132, 99), (100, 8, 132, 50), (512, 17, 132, 512), (0, 8, 132, 0), (9, 0, 1, 3)]
        {
            assert_eq!(FirstTiles::new(heads, blocks, 1, ctas), FirstTiles { zeroed, heads });
        }
    }
}
