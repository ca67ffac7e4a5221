//! Start of a CTA: shared memory, barriers, roles and registers.

use core::arch::asm;
use core::arch::nvptx::_thread_idx_x;

use super::barrier::{Mbarrier, fence_mbarrier_init};
use super::named_barrier::{BackwardBarrier, ForwardBarrier, TotalBarrier};
use crate::tile::lane::{WARP_THREADS, WARPGROUP_THREADS};
use crate::tile::smem::Split;
use crate::tile::smem::{BackwardSmem, ForwardSmem};
use crate::tile::smem_total::TotalSmem;

core::arch::global_asm!(".extern .shared .align 1024 .b8 dynamic_smem[];");

/// Number of warps of a warpgroup. Each arrives by one lane.
const WARPS: u32 = WARPGROUP_THREADS / WARP_THREADS;

/// Returns the address of the dynamic shared memory in the shared window.
#[inline(always)]
pub fn smem_base() -> u32 {
    let base: u32;
    // SAFETY: reads the address of a symbol.
    unsafe { asm!("mov.u32 {0}, dynamic_smem;", out(reg32) base, options(pure, nomem, nostack)) }
    base
}

/// Predicate that is 1 in the thread that acts for many.
///
/// It is a predicate on instructions and not a `bool` to branch on. LLVM could merge such branches with later code that
/// all lanes of the warp must run together, and ptxas would have to allow for a diverged warp after them.
#[derive(Clone, Copy)]
pub struct Leader(pub u32);

impl Leader {
    /// Leader for code that a single thread runs.
    pub const SOLE: Leader = Leader(1);

    /// Selects the first thread of each warp.
    #[inline(always)]
    pub fn first_of_warp() -> Self {
        Leader((thread_of_warpgroup() % WARP_THREADS == 0) as u32)
    }

    /// Elects one thread of each warp (`elect.sync`), always the same one.
    #[inline(always)]
    pub fn of_warp() -> Self {
        let leader: u32;
        // SAFETY: I4, every caller's warp is converged.
        unsafe {
            asm!("{{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 {0}, 1, 0, p; }}", out(reg32) leader,
                 options(nomem, nostack));
        }
        Leader(leader)
    }

    /// Elects one thread of the warpgroup's first warp.
    #[inline(always)]
    pub fn of_warpgroup() -> Self {
        let leader: u32;
        // SAFETY: I4, every caller's warp is converged.
        unsafe {
            asm!(
                "{{ .reg .pred p, q; elect.sync _|p, 0xffffffff; setp.lt.and.u32 q, {1}, 32, p; selp.u32 {0}, 1, 0, q; }}",
                out(reg32) leader, in(reg32) thread_of_warpgroup(), options(nomem, nostack)
            );
        }
        Leader(leader)
    }

    /// Elects one thread of the warpgroup's first warp, given the number `warp` of this warp in its warpgroup. This
    /// saves the time for reading the thread's number.
    #[inline(always)]
    pub fn of_first_warp(warp: u32) -> Self {
        let leader: u32;
        // SAFETY: I4, every caller's warp is converged.
        unsafe {
            asm!(
                "{{ .reg .pred p, q; elect.sync _|p, 0xffffffff; setp.eq.and.u32 q, {1}, 0, p; selp.u32 {0}, 1, 0, q; }}",
                out(reg32) leader, in(reg32) warp, options(nomem, nostack)
            );
        }
        Leader(leader)
    }
}

/// Role of a warpgroup of the CTA.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Producer,
    Consumer(u32),
}

/// Returns `x`, which must be equal in all lanes of the warp, from lane 0. This tells ptxas that it is uniform.
#[inline(always)]
pub fn uniform(x: u32) -> u32 {
    let y: u32;
    // SAFETY: I4, every caller's warp is converged.
    unsafe {
        asm!("shfl.sync.idx.b32 {0}, {1}, 0, 31, 0xffffffff;", out(reg32) y, in(reg32) x, options(nomem, nostack));
    }
    y
}

/// Calls `f` after a barrier of the backward kernel's third warpgroup. The barrier tells ptxas that the warp is
/// converged.
#[inline(always)]
pub fn converged<T>(f: impl FnOnce() -> T) -> T {
    BackwardBarrier::sync_third();
    f()
}

/// Returns this thread's role, which is that of its whole warpgroup.
#[inline(always)]
pub fn role() -> Role {
    // SAFETY: reads a special register.
    let warpgroup = uniform(unsafe { _thread_idx_x() } as u32 / WARPGROUP_THREADS);
    if warpgroup == 0 { Role::Producer } else { Role::Consumer(warpgroup - 1) }
}

/// Returns the number of this warp in its warpgroup.
#[inline(always)]
pub fn warp_of_warpgroup() -> u32 {
    uniform(thread_of_warpgroup() / WARP_THREADS)
}

/// Returns the number of this thread in its warpgroup. It is rematerialised at each use, so that it holds no register
/// in between.
#[inline(always)]
pub fn thread_of_warpgroup() -> u32 {
    let thread: u32;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {0}, %tid.x;", out(reg32) thread, options(nomem, nostack)) }
    thread % WARPGROUP_THREADS
}

/// Returns the index of this thread's consumer. It is rematerialised at each use, so that it holds no register in
/// between.
#[inline(always)]
pub fn consumer_of_thread() -> u32 {
    let thread: u32;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {0}, %tid.x;", out(reg32) thread, options(nomem, nostack)) }
    thread / WARPGROUP_THREADS - 1
}

/// Initialises every mbarrier of a forward CTA. All threads of the CTA call it once, first.
#[inline(always)]
pub fn init_barriers(smem: &ForwardSmem) {
    let base = smem_base();
    // SAFETY: one thread initialises each barrier once, in the bytes that the layout gives it, before any thread uses
    // it.
    unsafe {
        if _thread_idx_x() == 0 {
            for slot in 0..smem.stages {
                Mbarrier(base + smem.full(slot)).init(1);
                Mbarrier(base + smem.empty(slot)).init(WARPS * smem.consumers * smem.cluster);
            }
            for consumer in 0..smem.consumers {
                Mbarrier(base + smem.q_full(consumer)).init(1);
            }
            fence_mbarrier_init();
        }
    }
    match smem.cluster {
        1 => ForwardBarrier::Start.barrier().sync((smem.consumers + 1) * WARPGROUP_THREADS),
        _ => sync_cluster(),
    }
}

/// Waits until the whole cluster is done, because until then each CTA may arrive at barriers of the other. All threads
/// call it, last.
#[inline(always)]
pub fn leave(smem: &ForwardSmem) {
    if smem.cluster > 1 {
        sync_cluster();
    }
}

/// Waits for all threads of the cluster.
#[inline(always)]
fn sync_cluster() {
    // SAFETY: every thread of the cluster executes this.
    unsafe { asm!("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;", options(nostack)) }
}

/// Returns the rank of this CTA in its cluster.
#[inline(always)]
pub fn cluster_rank() -> u32 {
    let rank: u32;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {0}, %cluster_ctarank;", out(reg32) rank, options(pure, nomem, nostack)) }
    rank
}

/// Initialises every mbarrier of a backward CTA, which has two consumers. All threads of the CTA call it once, first.
#[inline(always)]
pub fn init_backward_barriers(smem: &BackwardSmem) {
    let base = smem_base();
    // SAFETY: one thread initialises each barrier once, in the bytes that the layout gives it, before any thread uses
    // it.
    unsafe {
        if _thread_idx_x() == 0 {
            for full in [smem.k_full(0), smem.k_full(1), smem.v_full()] {
                Mbarrier(base + full).init(1);
            }
            for slot in 0..smem.stages() {
                Mbarrier(base + smem.q_full(slot)).init(1);
                Mbarrier(base + smem.do_full(slot)).init(1);
                // Every thread arrives, because each has read `neg_lse_log2` and δ there.
                Mbarrier(base + smem.empty(slot)).init(2 * WARPGROUP_THREADS);
            }
            for slot in 0..BackwardSmem::DS_STAGES {
                Mbarrier(base + smem.ds_full(slot)).init(smem.split.writers() * WARPS);
                Mbarrier(base + smem.ds_empty(slot)).init(WARPS);
            }
            for barrier in [smem.weights_full(), smem.weights_empty()] {
                Mbarrier(base + barrier).init(WARPGROUP_THREADS);
            }
            fence_mbarrier_init();
        }
    }
    BackwardBarrier::Start.barrier().sync(3 * WARPGROUP_THREADS);
}

/// Initialises every mbarrier of a CTA of total attention. All threads of the CTA call it once, first.
#[inline(always)]
pub fn init_total_barriers(smem: &TotalSmem) {
    // Every thread of every consumer arrives.
    let consumer_threads = smem.consumers * WARPGROUP_THREADS;
    let base = smem_base();
    // SAFETY: one thread initialises each barrier once, in the bytes that the layout gives it, before any thread uses
    // it.
    unsafe {
        if _thread_idx_x() == 0 {
            for slot in 0..TotalSmem::K_STAGES {
                Mbarrier(base + smem.k_full(slot)).init(1);
                Mbarrier(base + smem.k_empty(slot)).init(consumer_threads);
            }
            for slot in 0..smem.stages {
                // The arrivals are those of the thread that loads the tile, and of the warp that writes `neg_lse_log2`.
                Mbarrier(base + smem.q_full(slot)).init(1 + WARP_THREADS);
                Mbarrier(base + smem.q_empty(slot)).init(consumer_threads);
            }
            fence_mbarrier_init();
        }
    }
    TotalBarrier::Start.barrier().sync((smem.consumers + 1) * WARPGROUP_THREADS);
}

/// Waits until the primary grid, the one before this in the stream, is complete and all its writes are visible. That
/// takes time only if this dependent grid was allowed to start earlier (PTX ISA, griddepcontrol).
#[inline(always)]
pub fn await_grid_before() {
    // SAFETY: no operands.
    unsafe { asm!("griddepcontrol.wait;", options(nostack)) }
}

/// Lets the dependent grid, the next one in the stream, start as soon as all CTAs have called this, if it may start
/// early.
#[inline(always)]
pub fn let_next_grid_start() {
    // SAFETY: no operands.
    unsafe { asm!("griddepcontrol.launch_dependents;", options(nostack)) }
}

/// Reallocates registers in the backward kernel, whose producer also computes dS·K.
#[inline(always)]
pub fn set_backward_registers(role: Role, split: Split) {
    // SAFETY: all threads of the warpgroup run this, converged, in a kernel with a register cap at entry. The totals
    // stay within 64 Ki registers: 128·56 + 256·224, or 128·72 + 256·216.
    unsafe {
        match (role, split) {
            (Role::Producer, Split::Keys) => asm!("setmaxnreg.dec.sync.aligned.u32 56;", options(nostack)),
            (Role::Producer, Split::Gradients) => asm!("setmaxnreg.dec.sync.aligned.u32 72;", options(nostack)),
            (Role::Consumer(_), Split::Keys) => asm!("setmaxnreg.inc.sync.aligned.u32 224;", options(nostack)),
            (Role::Consumer(_), Split::Gradients) => asm!("setmaxnreg.inc.sync.aligned.u32 216;", options(nostack)),
        }
    }
}

/// Reallocates registers from the producer to the consumers (`setmaxnreg`): the producer keeps few, and the consumers
/// get the most that the register file holds.
#[inline(always)]
pub fn set_registers(role: Role, consumers: u32) {
    // SAFETY: all threads of the warpgroup run this, converged, in a kernel with a register cap at entry. The totals
    // stay within 64 Ki registers: 128·40 + 256·232, 128·32 + 384·160, or 128·32 + 512·112, of 640·96.
    unsafe {
        match (role, consumers) {
            (Role::Producer, 3 | 4) => asm!("setmaxnreg.dec.sync.aligned.u32 32;", options(nostack)),
            (Role::Producer, _) => asm!("setmaxnreg.dec.sync.aligned.u32 40;", options(nostack)),
            (Role::Consumer(_), 3) => asm!("setmaxnreg.inc.sync.aligned.u32 160;", options(nostack)),
            (Role::Consumer(_), 4) => asm!("setmaxnreg.inc.sync.aligned.u32 112;", options(nostack)),
            (Role::Consumer(_), _) => asm!("setmaxnreg.inc.sync.aligned.u32 232;", options(nostack)),
        }
    }
}

/// Returns the address of the by-value parameter of the kernel named `$symbol`, from which TMA reads tensor maps.
#[macro_export]
macro_rules! parameter_address {
    ($symbol:expr) => {{
        let address: u64;
        // SAFETY: takes the address of this kernel's own parameter.
        unsafe {
            core::arch::asm!(
                concat!("mov.b64 {0}, ", $symbol, "_param_0; cvta.param.u64 {0}, {0};"),
                out(reg64) address, options(pure, nomem, nostack)
            );
        }
        address
    }};
}

/// Ends the kernel with an error.
#[inline(always)]
pub fn trap() -> ! {
    // SAFETY: stops the kernel.
    unsafe { asm!("trap;", options(noreturn, nostack)) }
}
