//! Static order of work tiles, from which each CTA takes its own. Producer and consumers compute it alike, without
//! communication.
//!
//! A work tile is one m_block of one query head. Heads are taken in sections. Within a section the tiles run from the
//! last m_block to the first, which under a causal mask is from the longest to the shortest. The section before it runs
//! in the opposite direction, so that lengths never jump. The CTAs of the grid take tiles in waves of alternating
//! direction (snake order): the CTA that got the longest tile of a wave gets the shortest of the next.
//!
//! Small sections keep in L2 what their tiles share. A simulated schedule finds those that also balance the work
//! (notebook 5, 6).
//!
//! Sequences of different lengths have a list of blocks in device memory ([`super::schedule`]), which takes the place
//! of the m_blocks: every section has all of its blocks for some heads.

use super::schedule::List;
use crate::arch::constant::Constant;
use crate::ground::constants::Constants;
use crate::ground::divisor::Divisor;
use crate::ground::places::WorkTile;
use crate::ground::shape::Shape;
use crate::tuning;

/// Maximum number of CTAs of a persistent grid. With it, the index that ends a CTA's tiles ([`CtaTiles::next_index`])
/// fits in 32 bits, because it is below tiles + 2 · CTAs.
pub const MAX_CTAS: u32 = 1 << 20;

/// Bytes that the work tiles of a group of heads share.
#[derive(Clone, Copy, Debug)]
pub struct GroupBytes {
    pub all: u64,
    /// Bytes that they read and write at a time. They are fewer than `all` if a work tile goes through one head after
    /// the other.
    pub at_once: u64,
}

impl From<u64> for GroupBytes {
    fn from(bytes: u64) -> Self {
        GroupBytes { all: bytes, at_once: bytes }
    }
}

/// Order of all work tiles of one problem. The host makes it; it travels with the launch parameters.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TileOrder {
    /// Address of the list of blocks, if lengths differ. What depends on the number of blocks is then in the list.
    list: u64,
    is_listed: Constant<{ Constants::LENGTHS }>,
    heads_q: Divisor,
    /// Query heads per key/value head.
    pub group: Divisor,
    m_blocks: u32,
    /// Heads of a section, and of the last section.
    section: Divisor,
    last_section: Divisor,
    sections: u32,
    /// Work tiles of a full section, and of all sections.
    section_tiles: Divisor,
    tiles: u32,
    /// 1 for the fixed order: every section runs from its last m_block to its first, and every wave assigns tiles to
    /// CTAs in the same order. 0 for the snake order.
    one_way: u32,
}

impl TileOrder {
    /// Makes the order for query tiles of `block_m` rows, in sections of `section` heads. The host has checked that an
    /// i32 holds the number of all tiles, and so that of all heads.
    pub fn new(shape: &Shape, block_m: u32, section: u32) -> Self {
        let heads = shape.batch * shape.heads_q;
        let section = section.clamp(1, heads.max(1));
        let m_blocks = shape.seqlen_q.div_ceil(block_m);
        TileOrder {
            list: 0,
            is_listed: Constant::new(false),
            heads_q: Divisor::new(shape.heads_q),
            group: Divisor::new(shape.group()),
            m_blocks,
            section: Divisor::new(section),
            last_section: Divisor::new(heads - heads.saturating_sub(1) / section * section),
            sections: heads.div_ceil(section),
            section_tiles: Divisor::new(section * m_blocks),
            tiles: heads * m_blocks,
            one_way: 0,
        }
    }

    /// Makes the order of the blocks of a list, whose address is still missing, for all heads of the shape.
    pub fn of_list(shape: &Shape, section: u32) -> Self {
        let heads = Shape { batch: 1, seqlen_q: 0, ..*shape };
        TileOrder { is_listed: Constant::new(true), ..Self::new(&heads, 1, section) }
    }
    /// Sets the address of the list.
    pub fn with_list(self, list: u64) -> Self {
        TileOrder { list, ..self }
    }

    /// Disables the snake order: every section runs from its last m_block to its first, and every wave assigns tiles to
    /// CTAs in the same order. For exact passes, whose tiles wait for earlier ones: a CTA that once fell behind its
    /// predecessor stays behind and does not wait again.
    pub fn one_way(self) -> Self {
        TileOrder { one_way: 1, ..self }
    }

    /// Returns the order in which `ctas` CTAs finish soonest, and its makespan: the steps of the CTA with most work.
    /// m_block i takes `blocks(i)` steps of the mainloop; the work tiles of a group of heads share `bytes`.
    ///
    /// Example: forward, causal, D 128, S 4096, batch 8, 16 heads, 132 CTAs. m_block i of 32 costs i + 2 steps, so an
    /// even schedule has 543 steps per CTA. Sections of 1 head have a makespan of 560. Those of 2, 3, 4, 6 and 7 have
    /// 555 or more, which gains less than 1 %. Those of 8 have 544: they are taken, because 16 MiB of K and V stay in
    /// L2, and end the search, because 544 is within 2 % of 543.
    pub fn balanced(
        shape: &Shape,
        block_m: u32,
        ctas: u32,
        bytes: impl Into<GroupBytes>,
        blocks: impl Fn(u32) -> u32,
    ) -> (Self, u64) {
        let (group, bytes) = (shape.group().max(1), bytes.into());
        let smallest = Self::new(shape, block_m, group);
        let tiles = smallest.tiles() as u64;
        if tiles == 0 || ctas == 0 {
            return (smallest, 0);
        }
        let cost = |m_block| blocks(m_block) as u64 + tuning::TILE_START_BLOCKS;
        if blocks(0) == blocks(smallest.m_blocks - 1) {
            return (smallest, tiles.div_ceil(ctas as u64) * cost(0));
        }
        // Steps of each CTA if all took equally many.
        let all: u64 = (0..smallest.m_blocks).map(cost).sum();
        let heads = shape.batch * shape.heads_q;
        let even = (all as u128 * heads as u128 / ctas as u128) as u64;
        let scale = |(busiest, tried): (u64, u64)| (busiest as u128 * tiles as u128 / tried as u128) as u64;
        let mut best = (smallest, scale(smallest.trial(ctas, cost)));
        for groups in tuning::SECTION_GROUPS {
            let even_enough = best.1 * 100 <= even * tuning::EVEN_ENOUGH_PERCENT;
            if even_enough
                || bytes.at_once.saturating_mul(groups) > tuning::SECTION_L2_BYTES
                || groups * group as u64 > heads as u64
            {
                break;
            }
            let order = Self::new(shape, block_m, groups as u32 * group);
            let time = scale(order.trial(ctas, cost));
            // A larger section must gain more than it costs in L2: 1 %, or 2.5 % if it does not stay there.
            let worth = if bytes.all.saturating_mul(groups) > tuning::SECTION_L2_BYTES {
                tuning::SECTION_MIN_GAIN_INVERSE_BEYOND_L2
            } else {
                tuning::SECTION_MIN_GAIN_INVERSE
            };
            if time * (worth + 1) < best.1 * worth {
                best = (order, time);
            }
        }
        best
    }

    /// Simulates the schedule of the first tiles on `ctas` CTAs. Returns the makespan and the number of those tiles.
    fn trial(&self, ctas: u32, cost: impl Fn(u32) -> u64) -> (u64, u64) {
        let each = tuning::TRIAL_TILES.div_ceil(ctas) as usize;
        let mut tried = 0;
        let mut busiest = 0;
        for cta in 0..ctas {
            let tiles = CtaTiles::new(self, cta, ctas).take(each);
            let time = tiles.inspect(|_| tried += 1).map(|tile| cost(tile.m_block)).sum();
            busiest = u64::max(busiest, time);
        }
        (busiest, tried.max(1))
    }

    /// Returns the number of heads of a section.
    pub fn section(&self) -> u32 {
        self.section.value
    }

    /// Returns the number of work tiles.
    #[inline(always)]
    pub fn tiles(&self) -> u32 {
        if self.is_listed() { List(self.list).tiles() } else { self.tiles }
    }
    /// True if work tiles are in a list.
    #[inline(always)]
    pub fn is_listed(&self) -> bool {
        self.is_listed.get()
    }

    /// Returns the `index`-th work tile: batch item, query head, m_block.
    #[inline(always)]
    pub fn tile(&self, index: u32) -> WorkTile {
        if self.is_listed() {
            return self.listed_tile(index);
        }
        let (head, m_block) = self.place(index);
        self.work_tile(head, m_block)
    }

    /// Returns the `index`-th work tile of those in the list.
    #[inline(always)]
    fn listed_tile(&self, index: u32) -> WorkTile {
        let list = List(self.list);
        let header = list.header();
        let (section, within) = header.section_tiles.divide(index);
        let (from_last, place) = self.heads_of(section).divide(within);
        let block = if self.descends(section) { header.blocks - 1 - from_last } else { from_last };
        let [batch, m_block] = list.block(block);
        WorkTile { batch, head: section * self.section.value + place, m_block }
    }

    /// Returns the `index`-th work tile of a changed order: the last m_block of each head has the place that belongs to
    /// the head `lead` before it, of `heads` that follow each other in a circle.
    #[inline(always)]
    pub fn tile_ahead(&self, index: u32, lead: u32, heads: u32) -> WorkTile {
        let (head, m_block) = self.place(index);
        let head = if m_block + 1 == self.m_blocks { head + lead } else { head };
        self.work_tile(if head >= heads { head - heads } else { head }, m_block)
    }

    /// Returns the head, counted over all batch items, and the m_block of the `index`-th work tile.
    #[inline(always)]
    fn place(&self, index: u32) -> (u32, u32) {
        let (section, within) = self.section_tiles.divide(index);
        let heads = self.heads_of(section);
        let (from_last, place) = heads.divide(within);
        let m_block = if self.descends(section) { self.m_blocks - 1 - from_last } else { from_last };
        (section * self.section.value + place, m_block)
    }

    #[inline(always)]
    fn work_tile(&self, head: u32, m_block: u32) -> WorkTile {
        let (batch, head) = self.heads_q.divide(head);
        WorkTile { batch, head, m_block }
    }

    #[inline(always)]
    fn heads_of(&self, section: u32) -> Divisor {
        if section + 1 == self.sections { self.last_section } else { self.section }
    }

    /// True if a section runs from its last m_block to its first. The last section does, the one before it does not,
    /// and so on. In the fixed order all do.
    #[inline(always)]
    fn descends(&self, section: u32) -> bool {
        (self.sections - section) & 1 | self.one_way == 1
    }

    /// Returns the index of a work tile: the inverse of [`TileOrder::tile`].
    pub fn index(&self, tile: &WorkTile) -> u32 {
        let (section, place) = self.section.divide(tile.batch * self.heads_q.value + tile.head);
        let heads = self.heads_of(section);
        let from_last = if self.descends(section) { self.m_blocks - 1 - tile.m_block } else { tile.m_block };
        section * self.section_tiles.value + from_last * heads.value + place
    }

    /// Returns the first head, counted over all batch items, of the `index`-th work tile's section. All tiles of the
    /// heads before it come before its own, and its own do not begin after the `index`-th.
    pub fn first_head(&self, index: u32) -> u32 {
        self.section_tiles.divide(index).0 * self.section.value
    }
}

/// Work tiles of one CTA of a persistent grid.
#[derive(Clone, Copy, Debug)]
pub struct CtaTiles<'a> {
    order: &'a TileOrder,
    cta: u32,
    ctas: u32,
    /// Number of tiles that it has taken, which is the number of its current wave.
    round: u32,
}

impl<'a> CtaTiles<'a> {
    /// Makes the iterator for CTA `cta` of `ctas`, of which there are at most [`MAX_CTAS`].
    #[inline(always)]
    pub fn new(order: &'a TileOrder, cta: u32, ctas: u32) -> Self {
        CtaTiles { order, cta, ctas, round: 0 }
    }
    /// Returns the order of all work tiles.
    #[inline(always)]
    pub fn order(&self) -> &'a TileOrder {
        self.order
    }
    /// Returns the index of this CTA's next tile, of `tiles` in all.
    #[inline(always)]
    pub fn next_index(&mut self, tiles: u32) -> Option<u32> {
        // Waves assign tiles from the first CTA to the last and from the last to the first, alternately.
        let forth = self.round.is_multiple_of(2) || self.order.one_way == 1;
        let place = if forth { self.cta } else { self.ctas - 1 - self.cta };
        let index = self.round * self.ctas + place;
        self.round += 1;
        (index < tiles).then_some(index)
    }
}

impl Iterator for CtaTiles<'_> {
    type Item = WorkTile;

    #[inline(always)]
    fn next(&mut self) -> Option<WorkTile> {
        self.next_index(self.order.tiles()).map(|index| self.order.tile(index))
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::attention::schedule::ListHeader;
    use std::vec::Vec;

    fn shape(batch: u32, heads_q: u32, heads_kv: u32, seqlen: u32) -> Shape {
        Shape { batch, heads_q, heads_kv, seqlen_q: seqlen, seqlen_k: seqlen, head_dim: 128 }
    }
    fn kv_bytes(shape: &Shape) -> u64 {
        4 * shape.seqlen_k as u64 * shape.head_dim as u64
    }

    #[test]
    fn every_tile_once_whatever_the_grid() {
        for s in [shape(1, 1, 1, 1), shape(2, 6, 2, 700), shape(3, 5, 5, 40_000), shape(1, 71, 1, 129)] {
            let (order, _) = TileOrder::balanced(&s, 128, 132, kv_bytes(&s), |m_block| m_block + 1);
            assert!((0..order.tiles()).all(|index| order.index(&order.tile(index)) == index));
            for ctas in [1, 2, 7, 132].into_iter().filter(|&c| c <= order.tiles()) {
                let mut seen: Vec<WorkTile> = (0..ctas).flat_map(|cta| CtaTiles::new(&order, cta, ctas)).collect();
                seen.sort_by_key(|t| (t.batch, t.head, t.m_block));
                let all: Vec<WorkTile> = (0..s.batch)
                    .flat_map(|batch| (0..s.heads_q).map(move |head| (batch, head)))
                    .flat_map(|(batch, head)| {
                        (0..s.seqlen_q.div_ceil(128)).map(move |m_block| WorkTile { batch, head, m_block })
                    })
                    .collect();
                assert_eq!(seen, all, "{s:?} on {ctas} CTAs");
            }
        }
    }

    /// Returns the words of a list with these numbers of blocks of its items.
    fn list(items: &[u32], heads: u32, section: u32) -> Vec<u32> {
        let blocks: Vec<[u32; 2]> =
            (0..).zip(items).flat_map(|(item, &blocks)| (0..blocks).map(move |block| [item, block])).collect();
        let header = ListHeader::new(blocks.len() as u32, heads, section).words();
        header.into_iter().chain(blocks.into_iter().flatten()).collect()
    }

    #[test]
    fn every_tile_of_a_list_once_whatever_the_grid() {
        for items in [&[][..], &[0], &[1], &[3, 0, 2], &[1, 1, 40, 7]] {
            for (heads, section) in [1, 2, 6, 71].into_iter().flat_map(|heads| [1, 2, 4, 6, 100].map(|s| (heads, s))) {
                let s = shape(9, heads, 1, 0);
                for order in [TileOrder::of_list(&s, section), TileOrder::of_list(&s, section).one_way()] {
                    let list = list(items, heads, order.section());
                    let order = order.with_list(list.as_ptr().expose_provenance() as u64);
                    let blocks =
                        (0..).zip(items).flat_map(|(batch, &blocks)| (0..blocks).map(move |block| (batch, block)));
                    let all: Vec<WorkTile> = blocks
                        .flat_map(|(batch, m_block)| (0..heads).map(move |head| WorkTile { batch, head, m_block }))
                        .collect();
                    assert_eq!(order.tiles() as usize, all.len());
                    for ctas in [1, 2, 7, 132] {
                        let mut seen: Vec<WorkTile> =
                            (0..ctas).flat_map(|cta| CtaTiles::new(&order, cta, ctas)).collect();
                        seen.sort_by_key(|t| (t.batch, t.m_block, t.head));
                        assert_eq!(seen, all, "{items:?} of {heads} heads on {ctas} CTAs");
                    }
                    // The last section runs from the last block, which is the longest, to the first.
                    let last =
                        all.len() - items.iter().sum::<u32>() as usize * ((heads - 1) % order.section() + 1) as usize;
                    let tiles: Vec<_> = (last as u32..order.tiles()).map(|i| order.tile(i)).collect();
                    assert!(tiles.is_sorted_by_key(|t| (u32::MAX - t.batch, u32::MAX - t.m_block)));
                }
            }
        }
    }

    #[test]
    fn long_tiles_come_first_within_a_section() {
        let order = TileOrder::new(&shape(1, 4, 4, 1024), 128, 4);
        let blocks: Vec<u32> = (0..order.tiles()).map(|i| order.tile(i).m_block).collect();
        assert!(blocks.is_sorted_by(|a, b| a >= b));
    }

    #[test]
    fn causal_work_is_dealt_out_evenly() {
        // Shapes in which the number of tiles of one head is close to a multiple or a divisor of the number of CTAs.
        for (batch, heads, seqlen, block_m) in [(2, 8, 16384, 128), (8, 32, 4096, 192), (8, 16, 4096, 128)] {
            let s = shape(batch, heads, heads, seqlen);
            let blocks = |m_block: u32| ((m_block + 1) * block_m).div_ceil(128);
            let (order, time) = TileOrder::balanced(&s, block_m, 132, kv_bytes(&s), blocks);
            let loads: Vec<u64> = (0..132)
                .map(|cta| CtaTiles::new(&order, cta, 132).map(|tile| blocks(tile.m_block) as u64 + 1).sum())
                .collect();
            let (most, all) = (*loads.iter().max().unwrap(), loads.iter().sum::<u64>());
            assert!(all as f64 / 132.0 / most as f64 > 0.96, "{s:?}: busiest {most} of {all}");
            assert!(time.abs_diff(most) * 20 < most, "{s:?}: {time} estimated, {most} in fact");
        }
    }

    /// Checks that a section of more than one group takes no more of L2 than there is, whatever the balance.
    #[test]
    fn sections_stay_in_l2() {
        let s = shape(32, 8, 8, 1024);
        let sections = [1, 2, 8, 48].map(|mb| {
            let (order, _) = TileOrder::balanced(&s, 64, 132, mb << 20, |m_block| m_block + 1);
            let bytes = order.section.value as u64 * (mb << 20);
            assert!(order.section.value == 1 || bytes <= tuning::SECTION_L2_BYTES, "{mb} MB");
            order.section.value
        });
        assert!(sections[0] > sections[3] && sections[3] == 1, "{sections:?}");
    }
}
