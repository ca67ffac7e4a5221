//! A CTA's start: shared memory, barriers, roles and registers.

use core::arch::asm;
use core::arch::nvptx::_thread_idx_x;

use super::barrier::{Mbarrier, fence_mbarrier_init};
use super::named_barrier::{BackwardBarrier, ForwardBarrier, TotalBarrier};
use crate::tile::lane::{WARP_THREADS, WARPGROUP_THREADS};
use crate::tile::smem::Split;
use crate::tile::smem::{BackwardSmem, ForwardSmem};
use crate::tile::smem_total::TotalSmem;

core::arch::global_asm!(".extern .shared .align 1024 .b8 dynamic_smem[];");

/// Warps of a warpgroup, each of which arrives by one lane.
const WARPS: u32 = WARPGROUP_THREADS / WARP_THREADS;

/// Shared-window address of the dynamic shared memory.
#[inline(always)]
pub fn smem_base() -> u32 {
    let base: u32;
    // SAFETY: reads the address of a symbol.
    unsafe { asm!("mov.u32 {0}, dynamic_smem;", out(reg32) base, options(pure, nomem, nostack)) }
    base
}

/// Whether a thread is the one that acts for many.
///
/// It is a predicate on instructions and not a `bool` to branch on: LLVM could merge such branches with later code that
/// all lanes of the warp must run together, and ptxas would have to allow for a diverged warp after them.
#[derive(Clone, Copy)]
pub struct Leader(pub u32);

impl Leader {
    /// The thread that is alone here.
    pub const SOLE: Leader = Leader(1);

    /// The first thread of each warp.
    #[inline(always)]
    pub fn first_of_warp() -> Self {
        Leader((thread_of_warpgroup() % WARP_THREADS == 0) as u32)
    }

    /// One thread of each warp, always the same.
    #[inline(always)]
    pub fn of_warp() -> Self {
        let leader: u32;
        // SAFETY: the warp is converged here.
        unsafe {
            asm!("{{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 {0}, 1, 0, p; }}", out(reg32) leader,
                 options(nomem, nostack));
        }
        Leader(leader)
    }

    /// One thread of the warpgroup's first warp.
    #[inline(always)]
    pub fn of_warpgroup() -> Self {
        let leader: u32;
        // SAFETY: the warp is converged here.
        unsafe {
            asm!(
                "{{ .reg .pred p, q; elect.sync _|p, 0xffffffff; setp.lt.and.u32 q, {1}, 32, p; selp.u32 {0}, 1, 0, q; }}",
                out(reg32) leader, in(reg32) thread_of_warpgroup(), options(nomem, nostack)
            );
        }
        Leader(leader)
    }

    /// The same where it is known which `warp` of the warpgroup this is, without the time that reading a thread's
    /// number takes.
    #[inline(always)]
    pub fn of_first_warp(warp: u32) -> Self {
        let leader: u32;
        // SAFETY: the warp is converged here.
        unsafe {
            asm!(
                "{{ .reg .pred p, q; elect.sync _|p, 0xffffffff; setp.eq.and.u32 q, {1}, 0, p; selp.u32 {0}, 1, 0, q; }}",
                out(reg32) leader, in(reg32) warp, options(nomem, nostack)
            );
        }
        Leader(leader)
    }
}

/// What a warpgroup of the CTA does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Producer,
    Consumer(u32),
}

/// The same value, which the whole warp has: taking it from lane 0 lets ptxas know.
#[inline(always)]
pub fn uniform(x: u32) -> u32 {
    let y: u32;
    // SAFETY: the warp is converged here.
    unsafe {
        asm!("shfl.sync.idx.b32 {0}, {1}, 0, 31, 0xffffffff;", out(reg32) y, in(reg32) x, options(nomem, nostack));
    }
    y
}

/// Calls `f` after a barrier of the backward kernel's third warpgroup, which tells ptxas that the warp is converged.
#[inline(always)]
pub fn converged<T>(f: impl FnOnce() -> T) -> T {
    BackwardBarrier::sync_third();
    f()
}

/// This thread's role; the same for its whole warpgroup.
#[inline(always)]
pub fn role() -> Role {
    // SAFETY: reads a special register.
    let warpgroup = uniform(unsafe { _thread_idx_x() } as u32 / WARPGROUP_THREADS);
    if warpgroup == 0 { Role::Producer } else { Role::Consumer(warpgroup - 1) }
}

/// Which warp of its warpgroup this is.
#[inline(always)]
pub fn warp_of_warpgroup() -> u32 {
    uniform(thread_of_warpgroup() / WARP_THREADS)
}

/// This thread's place in its warpgroup. Read anew at each use, so that it holds no register in between.
#[inline(always)]
pub fn thread_of_warpgroup() -> u32 {
    let thread: u32;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {0}, %tid.x;", out(reg32) thread, options(nomem, nostack)) }
    thread % WARPGROUP_THREADS
}

/// Which consumer this thread belongs to; read anew at each use, as [`thread_of_warpgroup`].
#[inline(always)]
pub fn consumer_of_thread() -> u32 {
    let thread: u32;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {0}, %tid.x;", out(reg32) thread, options(nomem, nostack)) }
    thread / WARPGROUP_THREADS - 1
}

/// Makes every barrier; all threads of the CTA call it once, first.
#[inline(always)]
pub fn init_barriers(smem: &ForwardSmem) {
    let base = smem_base();
    // SAFETY: one thread initialises each barrier once, in the bytes that the layout gives it, before anyone uses it.
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

/// Waits until the whole cluster is done: until then each CTA may arrive at barriers of the other. All threads call it,
/// last.
#[inline(always)]
pub fn leave(smem: &ForwardSmem) {
    if smem.cluster > 1 {
        sync_cluster();
    }
}

/// Waits for all threads of the cluster.
#[inline(always)]
fn sync_cluster() {
    // SAFETY: every thread of the cluster comes here.
    unsafe { asm!("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;", options(nostack)) }
}

/// This CTA's place in its cluster.
#[inline(always)]
pub fn cluster_rank() -> u32 {
    let rank: u32;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {0}, %cluster_ctarank;", out(reg32) rank, options(pure, nomem, nostack)) }
    rank
}

/// As [`init_barriers`], for the backward kernel's two consumers.
#[inline(always)]
pub fn init_backward_barriers(smem: &BackwardSmem) {
    let base = smem_base();
    // SAFETY: as in `init_barriers`.
    unsafe {
        if _thread_idx_x() == 0 {
            for full in [smem.k_full(0), smem.k_full(1), smem.v_full()] {
                Mbarrier(base + full).init(1);
            }
            for slot in 0..smem.stages() {
                Mbarrier(base + smem.q_full(slot)).init(1);
                Mbarrier(base + smem.do_full(slot)).init(1);
                // Every thread has read statistics there by itself.
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

/// As [`init_barriers`], for the kernel of total attention.
#[inline(always)]
pub fn init_total_barriers(smem: &TotalSmem) {
    // Every thread arrives by itself.
    let consumer_threads = smem.consumers * WARPGROUP_THREADS;
    let base = smem_base();
    // SAFETY: as in `init_barriers`.
    unsafe {
        if _thread_idx_x() == 0 {
            for slot in 0..TotalSmem::K_STAGES {
                Mbarrier(base + smem.k_full(slot)).init(1);
                Mbarrier(base + smem.k_empty(slot)).init(consumer_threads);
            }
            for slot in 0..smem.stages {
                // The thread that loads the tile, and the warp that fills in what exponents add.
                Mbarrier(base + smem.q_full(slot)).init(1 + WARP_THREADS);
                Mbarrier(base + smem.q_empty(slot)).init(consumer_threads);
            }
            fence_mbarrier_init();
        }
    }
    TotalBarrier::Start.barrier().sync((smem.consumers + 1) * WARPGROUP_THREADS);
}

/// Waits until the grid before this one in the stream is complete, and sees all that it wrote, where this one was let
/// start before that (PTX ISA, griddepcontrol).
#[inline(always)]
pub fn await_grid_before() {
    // SAFETY: no operands.
    unsafe { asm!("griddepcontrol.wait;", options(nostack)) }
}

/// Lets the grid behind this one in the stream start, if it may start early, as soon as all CTAs have called this.
#[inline(always)]
pub fn let_next_grid_start() {
    // SAFETY: no operands.
    unsafe { asm!("griddepcontrol.launch_dependents;", options(nostack)) }
}

/// As [`set_registers`], for the backward kernel, whose producer multiplies too.
#[inline(always)]
pub fn set_backward_registers(role: Role, split: Split) {
    // SAFETY: as in `set_registers`; 128·56 + 256·224, or 128·72 + 256·216.
    unsafe {
        match (role, split) {
            (Role::Producer, Split::Keys) => asm!("setmaxnreg.dec.sync.aligned.u32 56;", options(nostack)),
            (Role::Producer, Split::Gradients) => asm!("setmaxnreg.dec.sync.aligned.u32 72;", options(nostack)),
            (Role::Consumer(_), Split::Keys) => asm!("setmaxnreg.inc.sync.aligned.u32 224;", options(nostack)),
            (Role::Consumer(_), Split::Gradients) => asm!("setmaxnreg.inc.sync.aligned.u32 216;", options(nostack)),
        }
    }
}

/// Gives registers to the consumers: the producer keeps few, they get the most that the register file holds.
#[inline(always)]
pub fn set_registers(role: Role, consumers: u32) {
    // SAFETY: all threads of the warpgroup run this, converged, in a kernel with a register cap at entry; the totals
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

/// Address of the by-value parameter of the kernel named `$symbol`, which the copy engine reads tensor maps from.
#[macro_export]
macro_rules! parameter_address {
    ($symbol:ident) => {{
        let address: u64;
        // SAFETY: takes the address of this kernel's own parameter.
        unsafe {
            core::arch::asm!(
                concat!("mov.b64 {0}, ", stringify!($symbol), "_param_0; cvta.param.u64 {0}, {0};"),
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
