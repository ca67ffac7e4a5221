//! TMA, the Tensor Memory Accelerator: copies boxes of a tensor into shared memory (PTX ISA, cp.async.bulk.tensor).
//!
//! A tensor map describes (head_dim, seqlen, heads, batch); a box is 64 columns × some rows. Elements beyond an extent
//! arrive as zeros. This pads short sequences and odd head dims.

use core::arch::asm;

use super::barrier::Mbarrier;
use super::cta::Leader;
use crate::ground::sequence::Span;

/// Address of a tensor map in the kernel's parameters.
#[derive(Clone, Copy)]
pub struct MapAddress(pub u64);

/// Place in a tensor where a box begins.
#[derive(Clone, Copy)]
pub struct BoxOrigin {
    pub column: u32,
    pub row: u32,
    pub head: u32,
    pub batch: u32,
}

impl BoxOrigin {
    /// Returns the place of a row of a batch item's head.
    #[inline(always)]
    pub fn of(span: &Span, head: u32, row: u32, column: u32) -> Self {
        BoxOrigin { column, row: span.first + row, head, batch: span.batch }
    }
}

/// Issues, by the leader, the TMA load of one box to shared memory at `to`. Its bytes count at `barrier`.
///
/// # Safety
/// `map` is a tensor map whose box fits at `to`. No thread reads or writes there until `barrier`'s phase completes.
#[inline(always)]
pub unsafe fn load_box(leader: Leader, map: MapAddress, at: BoxOrigin, to: u32, barrier: Mbarrier) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "{{ .reg .pred p; setp.ne.u32 p, {7}, 0;",
            "@p cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [{0}], [{1}, {{{2}, {3}, {4}, {5}}}], [{6}]; }}",
            in(reg32) to, in(reg64) map.0, in(reg32) at.column, in(reg32) at.row, in(reg32) at.head, in(reg32) at.batch,
            in(reg32) barrier.0, in(reg32) leader.0, options(nostack)
        );
    }
}

/// Issues the multicast TMA load of one box to the same place in both CTAs of a cluster. Its bytes count at the barrier
/// in the same place of each.
///
/// # Safety
/// `map` is a tensor map whose box fits at `to`. No thread of either CTA reads or writes there until the phase of its
/// CTA's `barrier` completes. One thread calls this.
#[inline(always)]
pub unsafe fn load_box_for_both(map: MapAddress, at: BoxOrigin, to: u32, barrier: Mbarrier) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "{{ .reg .b16 both; mov.b16 both, 3;",
            "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [{0}], [{1}, {{{2}, {3}, {4}, {5}}}], [{6}], both; }}",
            in(reg32) to, in(reg64) map.0, in(reg32) at.column, in(reg32) at.row, in(reg32) at.head, in(reg32) at.batch,
            in(reg32) barrier.0, options(nostack)
        );
    }
}

/// Issues, by the leader, a prefetch of one box into L2, so that a later load is faster.
///
/// # Safety
/// `map` is a tensor map.
#[inline(always)]
pub unsafe fn prefetch_box(leader: Leader, map: MapAddress, at: BoxOrigin) {
    // SAFETY: the caller's promise; a prefetch writes nowhere but to L2.
    unsafe {
        asm!(
            "{{ .reg .pred p; setp.ne.u32 p, {5}, 0;",
            "@p cp.async.bulk.prefetch.tensor.4d.L2.global.tile [{0}, {{{1}, {2}, {3}, {4}}}]; }}",
            in(reg64) map.0, in(reg32) at.column, in(reg32) at.row, in(reg32) at.head, in(reg32) at.batch,
            in(reg32) leader.0, options(nostack)
        );
    }
}

/// Prefetches a tensor map into the descriptor cache.
#[inline(always)]
pub fn prefetch_map(map: MapAddress) {
    // SAFETY: a hint; the address is that of a kernel parameter.
    unsafe { asm!("prefetch.tensormap [{0}];", in(reg64) map.0, options(nostack)) }
}
