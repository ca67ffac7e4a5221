//! A position in a ring of slots, with the phase parity that distinguishes consecutive passes over the ring.
//!
//! Each slot has two barriers, full and empty. The n-th pass over a slot completes phase n of each. A waiting thread
//! names the parity of the phase that must have completed (PTX ISA, mbarrier.try_wait). The producer starts with the
//! parity of the phase before the first, so its first pass does not wait.

/// Position of one end of the ring: the producer's or a consumer's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    pub slot: u32,
    pub parity: u32,
}

impl Position {
    /// Start of a consumer, which waits for the first fill.
    pub const CONSUMER: Self = Position { slot: 0, parity: 0 };
    /// Start of the producer, which finds every slot empty.
    pub const PRODUCER: Self = Position { slot: 0, parity: 1 };

    /// Advances to the next of `stages` slots.
    #[inline(always)]
    pub fn advance(&mut self, stages: u32) {
        self.slot += 1;
        if self.slot == stages {
            self.slot = 0;
            self.parity ^= 1;
        }
    }
}
