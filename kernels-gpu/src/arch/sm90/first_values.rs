//! Initialisation of one key head's dQ: zeros from the preprocess kernel, or the product of the head's storing work
//! tile ([`crate::attention::first_tiles`]).
//!
//! A state word per key head arbitrates: [`FREE`], claimed by a CTA, [`READY`]. An accumulating tile waits for READY,
//! which is normally set long before. If it finds FREE, it claims the word and writes zeros itself; the storing tile
//! then accumulates instead. So no CTA ever waits for a CTA that has not started.

use core::arch::asm;
use core::arch::nvptx::_block_idx_x;

use super::cta::{self, Leader, thread_of_warpgroup};
use super::load::{claim, count_at};
use super::named_barrier::BackwardBarrier;
use super::store::store_16_bytes;
use crate::ground::places::KvBlock;
use crate::ground::shape::Shape;
use crate::params::{HeadRows, Workspace};
use crate::tile::lane::WARPGROUP_THREADS;

/// State in which no CTA has begun to initialise dQ. A claimed word holds one more than the number of the claiming CTA,
/// between this and [`READY`].
pub const FREE: u32 = 0;
/// State in which dQ is initialised.
pub const READY: u32 = u32::MAX;

/// Returns true if the work tile of `keys` is to store dQ. If it returns false, dQ of the key head is initialised. A
/// whole warpgroup calls it.
#[inline(always)]
pub fn stores(workspace: &Workspace, shape: &Shape, head_dim: u32, keys: &KvBlock) -> bool {
    let address = workspace.first_values_word(shape.key_head(keys.batch, keys.head));
    // SAFETY: reads a special register.
    let own = 1 + unsafe { _block_idx_x() } as u32;
    // SAFETY: I5, the address is a word of the workspace. All warps find the same value: if this CTA has claimed the
    // word, it alone makes it ready.
    let claim = || unsafe { cta::uniform(claim(Leader::first_of_warp(), address, own)) };
    // SAFETY: I5, the address is a word of the workspace.
    let read = || unsafe { cta::uniform(count_at(address)) };
    let mut state = if keys.n_block == 0 { claim() } else { read() };
    while state != READY && state != own {
        state = if state == FREE { claim() } else { read() };
    }
    let own = state == own;
    if own && keys.n_block > 0 {
        fill_with_zeros(workspace, shape, head_dim, keys);
        make_ready(address);
        return false;
    }
    own
}

/// Sets the state to [`READY`], after all threads of the warpgroup have stored their part of dQ. `address` is
/// [`Workspace::first_values_word`].
#[inline(always)]
pub fn make_ready(address: u64) {
    BackwardBarrier::sync_third();
    let leader = cta::converged(Leader::of_warpgroup);
    // SAFETY: I5, the address is a word of the workspace, which this CTA has claimed. All threads have synchronised, so
    // the leader's release covers the stores of all.
    unsafe {
        asm!("{{ .reg .pred p; setp.ne.u32 p, {1}, 0; @p st.release.gpu.global.u32 [{0}], {2}; }}",
             in(reg64) address, in(reg32) leader.0, in(reg32) READY, options(nostack));
    }
    // The next work tile may be of the same head, and its warps must not find the word still claimed by this CTA.
    BackwardBarrier::sync_third();
}

/// Fills dQ of all queries of a key head with zeros.
#[inline(always)]
fn fill_with_zeros(workspace: &Workspace, shape: &Shape, head_dim: u32, keys: &KvBlock) {
    let row = workspace.row(HeadRows::dense(shape, keys.batch, keys.head * shape.group()), 0);
    let rows = shape.group() as u64 * workspace.rows as u64;
    let line = 4 * head_dim as u64;
    let (mut address, end) = (workspace.dq + row * line + 16 * thread_of_warpgroup() as u64, (row + rows) * line);
    while address < workspace.dq + end {
        // SAFETY: I5, these rows are part of the workspace; I6, no other CTA accesses them before the state is READY.
        unsafe { store_16_bytes(true, address, [0; 4]) };
        address += 16 * WARPGROUP_THREADS as u64;
    }
}
