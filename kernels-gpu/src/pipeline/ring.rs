//! A position in a ring of slots, and the phase bit that tells one lap from the next.
//!
//! Each slot has two barriers, full and empty. The n-th lap over a slot completes phase n of each; whoever waits names
//! the parity of the phase that must have completed (PTX ISA, mbarrier.try_wait). The producer starts with the parity
//! of a phase before the first, so that its first lap does not wait for anyone.

/// Where one end of the ring stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    pub slot: u32,
    pub parity: u32,
}

impl Position {
    /// The consumer waits for the first fill.
    pub const CONSUMER: Self = Position { slot: 0, parity: 0 };
    /// The producer finds every slot empty.
    pub const PRODUCER: Self = Position { slot: 0, parity: 1 };

    /// On to the next slot of `stages`.
    #[inline(always)]
    pub fn advance(&mut self, stages: u32) {
        self.slot += 1;
        if self.slot == stages {
            self.slot = 0;
            self.parity ^= 1;
        }
    }
}
