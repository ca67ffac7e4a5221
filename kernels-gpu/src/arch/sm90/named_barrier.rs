//! Named barriers (`bar.sync`, `bar.arrive`) between the warpgroups of a CTA: one enum of ids per kernel family.
//!
//! The hardware has sixteen ids per CTA. A variant is named for what its barrier guards. The compiler refuses two
//! variants of one enum with the same id, so two uses in one kernel cannot collide.

use core::arch::asm;

use crate::tile::lane::WARPGROUP_THREADS;

/// Named barrier: an id of one of the enums below.
#[derive(Clone, Copy)]
pub struct NamedBarrier(u32);

impl NamedBarrier {
    /// Waits until `threads` threads have synchronised or arrived here.
    #[inline(always)]
    pub fn sync(self, threads: u32) {
        // SAFETY: I4, every caller's warps are converged; each id is used by one fixed set of warpgroups.
        unsafe { asm!("bar.sync {0}, {1};", in(reg32) self.0, in(reg32) threads, options(nostack)) }
    }

    /// Arrives without waiting.
    #[inline(always)]
    pub fn arrive(self, threads: u32) {
        // SAFETY: I4, every caller's warps are converged; each id is used by one fixed set of warpgroups.
        unsafe { asm!("bar.arrive {0}, {1};", in(reg32) self.0, in(reg32) threads, options(nostack)) }
    }
}

/// Named barriers of the forward kernels.
#[repr(u32)]
#[derive(Clone, Copy)]
pub enum ForwardBarrier {
    /// Start of the CTA: its mbarriers are initialised.
    Start = 0,
    /// Ping-pong: this consumer may issue its products.
    PingPong0 = 1,
    PingPong1 = 2,
    PingPong2 = 3,
    /// All warps of this consumer have finished their products with Q, so its query tile may be overwritten.
    QueriesRead0 = 8,
    QueriesRead1 = 9,
    QueriesRead2 = 10,
}

impl ForwardBarrier {
    /// Ping-pong barrier of a consumer.
    #[inline(always)]
    pub fn ping_pong(consumer: u32) -> NamedBarrier {
        NamedBarrier(ForwardBarrier::PingPong0 as u32 + consumer)
    }
    /// Barrier of a consumer's own threads, before its query tile is overwritten.
    #[inline(always)]
    pub fn queries_read(consumer: u32) -> NamedBarrier {
        NamedBarrier(ForwardBarrier::QueriesRead0 as u32 + consumer)
    }
}

/// Named barriers of the backward kernels.
#[repr(u32)]
#[derive(Clone, Copy)]
pub enum BackwardBarrier {
    /// Start of the CTA: its mbarriers are initialised.
    Start = 0,
    /// Ping-pong: this consumer may issue its products.
    PingPong0 = 1,
    PingPong1 = 2,
    /// Threads of the third warpgroup, which loads and accumulates dQ.
    Third = 8,
}

impl BackwardBarrier {
    /// Ping-pong barrier of a consumer.
    #[inline(always)]
    pub fn ping_pong(consumer: u32) -> NamedBarrier {
        NamedBarrier(BackwardBarrier::PingPong0 as u32 + consumer)
    }
    /// Waits until all threads of the third warpgroup have come here.
    #[inline(always)]
    pub fn sync_third() {
        BackwardBarrier::Third.barrier().sync(WARPGROUP_THREADS);
    }
}

/// Named barriers of the kernels before and after the backward kernel.
#[repr(u32)]
#[derive(Clone, Copy)]
pub enum RowBarrier {
    /// One thread has seen that dQ of a head is complete.
    DqComplete = 0,
    /// Each warp has stored its sum.
    SumsStored = 1,
    /// A step of the schedule is complete.
    ScheduleStep = 2,
}

/// Named barriers of the kernels of total attention.
#[repr(u32)]
#[derive(Clone, Copy)]
pub enum TotalBarrier {
    /// Start of the CTA: its mbarriers are initialised.
    Start = 0,
}

macro_rules! barriers {
    ($($ids:ident),*) => {$(
        impl $ids {
            /// The barrier of this variant.
            #[inline(always)]
            pub const fn barrier(self) -> NamedBarrier {
                NamedBarrier(self as u32)
            }
        }
    )*};
}
barriers!(ForwardBarrier, BackwardBarrier, RowBarrier, TotalBarrier);

// Barriers of one kind have consecutive ids, in the order of the consumers.
const _: () = {
    use BackwardBarrier as B;
    use ForwardBarrier as F;
    assert!(F::PingPong1 as u32 == F::PingPong0 as u32 + 1 && F::PingPong2 as u32 == F::PingPong0 as u32 + 2);
    assert!(
        F::QueriesRead1 as u32 == F::QueriesRead0 as u32 + 1 && F::QueriesRead2 as u32 == F::QueriesRead0 as u32 + 2
    );
    assert!(B::PingPong1 as u32 == B::PingPong0 as u32 + 1);
};
