//! Mbarriers in shared memory, between threads and TMA, and the fences and warp barriers that go with them.

use core::arch::asm;

use super::cta::Leader;

/// Mbarrier, named by its address in the shared window.
#[derive(Clone, Copy)]
pub struct Mbarrier(pub u32);

impl Mbarrier {
    /// Initialises the barrier. A phase completes after `arrivals` arrivals.
    ///
    /// # Safety
    /// The address is that of 8 aligned bytes of shared memory that nothing else uses. One thread calls this once.
    #[inline(always)]
    pub unsafe fn init(self, arrivals: u32) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!("mbarrier.init.shared::cta.b64 [{0}], {1};", in(reg32) self.0, in(reg32) arrivals, options(nostack))
        }
    }

    /// Arrives once for the whole warp, by one elected thread (`elect.sync`).
    ///
    /// # Safety
    /// The barrier has been initialised, visibly to this warp, and the warp is converged.
    #[inline(always)]
    pub unsafe fn arrive_elected(self) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "{{ .reg .pred p; elect.sync _|p, 0xffffffff;",
                "@p mbarrier.arrive.release.cta.shared::cta.b64 _, [{0}]; }}",
                in(reg32) self.0, options(nostack)
            );
        }
    }

    /// Arrives once for the whole warp at the barrier in the same place of another CTA of the cluster. The arrival does
    /// not order generic accesses: its scope is the CTA (PTX ISA, mbarrier.arrive).
    ///
    /// # Safety
    /// The barrier there has been initialised, visibly to this warp, the warp is converged, and the other CTA is
    /// running.
    #[inline(always)]
    pub unsafe fn arrive_elected_at(self, rank: u32) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "{{ .reg .pred p; .reg .b32 there; mapa.shared::cluster.u32 there, {0}, {1}; elect.sync _|p, 0xffffffff;",
                "@p mbarrier.arrive.shared::cluster.b64 _, [there]; }}",
                in(reg32) self.0, in(reg32) rank, options(nostack)
            );
        }
    }

    /// Arrives once for the whole warp, after all reads and writes of the warp's lanes.
    ///
    /// # Safety
    /// The barrier has been initialised, visibly to this warp, and the warp is converged.
    #[inline(always)]
    pub unsafe fn arrive_together(self) {
        sync_warp();
        // SAFETY: the caller's promise.
        unsafe { self.arrive_elected() }
    }

    /// Arrives for this thread, after all that it has read.
    ///
    /// # Safety
    /// The barrier has been initialised, visibly to this thread.
    #[inline(always)]
    pub unsafe fn arrive(self) {
        // SAFETY: the caller's promise.
        unsafe { asm!("mbarrier.arrive.release.cta.shared::cta.b64 _, [{0}];", in(reg32) self.0, options(nostack)) }
    }

    /// Arrives once, by the leader, and makes the phase wait for `bytes` from TMA as well.
    ///
    /// # Safety
    /// The barrier has been initialised, visibly to this thread.
    #[inline(always)]
    pub unsafe fn arrive_expect(self, leader: Leader, bytes: u32) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "{{ .reg .pred p; setp.ne.u32 p, {2}, 0;",
                "@p mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [{0}], {1}; }}",
                in(reg32) self.0, in(reg32) bytes, in(reg32) leader.0, options(nostack)
            );
        }
    }

    /// Waits until the phase of this parity has completed.
    ///
    /// # Safety
    /// The barrier has been initialised, visibly to this thread.
    #[inline(always)]
    pub unsafe fn wait(self, parity: u32) {
        let mut done = 0u32;
        while done == 0 {
            // SAFETY: the caller's promise.
            unsafe {
                asm!(
                    "{{ .reg .pred p;",
                    "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [{1}], {2};",
                    "selp.u32 {0}, 1, 0, p; }}",
                    out(reg32) done, in(reg32) self.0, in(reg32) parity, options(nostack)
                );
            }
        }
    }
}

/// Makes initialised mbarriers visible to the cluster and to TMA.
#[inline(always)]
pub fn fence_mbarrier_init() {
    // SAFETY: a fence has no operands.
    unsafe { asm!("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;", options(nostack)) }
}

/// Orders the memory accesses of a warp's lanes before this barrier before those after it.
#[inline(always)]
pub fn sync_warp() {
    // SAFETY: I4, every caller's warp is converged.
    unsafe { asm!("bar.warp.sync 0xffffffff;", options(nostack)) }
}
