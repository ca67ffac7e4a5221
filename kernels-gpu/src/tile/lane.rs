//! Layout of a 64-row tile over the threads of a warpgroup (PTX ISA, wgmma, register fragments).
//!
//! A warp holds sixteen rows. Columns come in n8 column groups of eight. Of each group, a thread holds two neighbouring
//! columns of two rows that are eight apart, so a row belongs to a quad of four lanes.

/// Number of rows of a query tile per consumer warpgroup: the M of wgmma.
pub const WARPGROUP_ROWS: u32 = 64;
/// Number of rows of a query tile per warp.
pub const WARP_ROWS: u32 = 16;
/// Number of threads of a warp.
pub const WARP_THREADS: u32 = 32;
/// Number of threads of a warpgroup.
pub const WARPGROUP_THREADS: u32 = 128;

/// Place of a thread in its warpgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lane {
    /// Number of the thread in its warpgroup, below 128.
    pub thread: u32,
    first_row: u32,
    /// First of its two columns in every n8 column group; the second is the next one.
    pub column: u32,
}

impl Lane {
    /// Returns the place of thread `0..128` of a warpgroup.
    #[inline(always)]
    pub fn new(thread: u32) -> Self {
        Lane { thread, first_row: thread / 32 * 16 + thread % 32 / 4, column: thread % 4 * 2 }
    }

    /// Returns the upper (`half` 0) or lower (1) of its two rows.
    #[inline(always)]
    pub fn row(self, half: u32) -> u32 {
        self.first_row + 8 * half
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_element_has_one_holder() {
        let held: BTreeSet<(u32, u32)> = (0..128)
            .map(Lane::new)
            .flat_map(|lane| [0, 1].map(|half| (lane.row(half), lane.column)))
            .flat_map(|(row, column)| [(row, column), (row, column + 1)])
            .collect();
        assert_eq!(held, (0..64).flat_map(|row| (0..8).map(move |column| (row, column))).collect());
    }

    /// The corners of the PTX ISA's figure of D for m64nNk16: T0 holds (0, 0..2) and (8, 0..2), T3 (0, 6..8), T4 begins
    /// row 1, T31 ends row 7 and 15, and each warp begins sixteen rows further down.
    #[test]
    fn matches_the_isa() {
        for (thread, row, column) in [(0, 0, 0), (3, 0, 6), (4, 1, 0), (31, 7, 6), (32, 16, 0), (127, 55, 6)] {
            let lane = Lane::new(thread);
            assert_eq!((lane.row(0), lane.row(1), lane.column), (row, row + 8, column), "thread {thread}");
        }
    }
}
