//! Which thread of a warpgroup holds which element of a 64-row tile (PTX ISA, wgmma, register fragments).
//!
//! A warp holds sixteen rows. Columns come in groups of eight; of each, a thread holds two neighbouring columns of two
//! rows that are eight apart, so a row belongs to a quad of four lanes.

/// Rows of a query tile that one consumer warpgroup owns: the M of wgmma.
pub const WARPGROUP_ROWS: u32 = 64;
/// Rows of it that one warp owns.
pub const WARP_ROWS: u32 = 16;
/// Threads of a warp.
pub const WARP_THREADS: u32 = 32;
/// Threads of a warpgroup.
pub const WARPGROUP_THREADS: u32 = 128;

/// A thread's place in its warpgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lane {
    /// Which of the 128 threads of a warpgroup it is.
    pub thread: u32,
    first_row: u32,
    /// Its first column in every group of eight; the second is the next.
    pub column: u32,
}

impl Lane {
    /// Of thread `0..128` of a warpgroup.
    #[inline(always)]
    pub fn new(thread: u32) -> Self {
        Lane { thread, first_row: thread / 32 * 16 + thread % 32 / 4, column: thread % 4 * 2 }
    }

    /// The upper (0) or lower (1) of its two rows.
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
