//! Who gives dQ of a key head its first values: the kernel that prepares, with zeros, or the work tile that stores
//! ([`crate::attention::first_tiles`]).
//!
//! A work tile that adds waits until they are there, which is long before it starts as a rule. Where nobody has begun
//! to store them, it fills dQ with zeros by itself, and whoever was to store adds: so no CTA waits for one that does
//! not run.

use core::arch::asm;
use core::arch::nvptx::_block_idx_x;

use super::cta::{self, Leader, thread_of_warpgroup};
use super::load::{claim, count_at};
use super::named_barrier::BackwardBarrier;
use super::store::store_16_bytes;
use crate::ground::places::KvBlock;
use crate::ground::shape::Shape;
use crate::params::Workspace;
use crate::tile::lane::WARPGROUP_THREADS;

/// Nobody has begun. Between this and [`READY`], one more than the number of the CTA that has.
pub const FREE: u32 = 0;
/// They are there.
pub const READY: u32 = u32::MAX;

/// Whether the work tile of `keys` is to store dQ. If not, all that it meets has values when this returns. Called by a
/// whole warpgroup.
#[inline(always)]
pub fn stores(workspace: &Workspace, shape: &Shape, head_dim: u32, keys: &KvBlock) -> bool {
    let address = workspace.first_values_word(shape.key_head(keys.batch, keys.head));
    // SAFETY: reads a special register.
    let own = 1 + unsafe { _block_idx_x() } as u32;
    // SAFETY: a word of the workspace. All warps find the same: what this CTA has claimed it alone makes ready.
    let claim = || unsafe { cta::uniform(claim(Leader::first_of_warp(), address, own)) };
    // SAFETY: as above.
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

/// Says that the first values are there, which all threads of the warpgroup have stored. `address` is
/// [`Workspace::first_values_word`].
#[inline(always)]
pub fn make_ready(address: u64) {
    BackwardBarrier::sync_third();
    let leader = cta::converged(Leader::of_warpgroup);
    // SAFETY: a word of the workspace that this CTA has claimed. The leader's release is for all, who have
    // synchronised.
    unsafe {
        asm!("{{ .reg .pred p; setp.ne.u32 p, {1}, 0; @p st.release.gpu.global.u32 [{0}], {2}; }}",
             in(reg64) address, in(reg32) leader.0, in(reg32) READY, options(nostack));
    }
    // The next work tile may be of the same head, and its warps must not find the word as this CTA claimed it.
    BackwardBarrier::sync_third();
}

/// Fills dQ of all queries of a key head.
#[inline(always)]
fn fill_with_zeros(workspace: &Workspace, shape: &Shape, head_dim: u32, keys: &KvBlock) {
    let row = workspace.row(shape, keys.batch, keys.head * shape.group(), 0);
    let rows = shape.group() as u64 * workspace.rows as u64;
    let line = 4 * head_dim as u64;
    let (mut address, end) = (workspace.dq + row * line + 16 * thread_of_warpgroup() as u64, (row + rows) * line);
    while address < workspace.dq + end {
        // SAFETY: these heads' part of the workspace, which nobody else accesses before it is ready.
        unsafe { store_16_bytes(true, address, [0; 4]) };
        address += 16 * WARPGROUP_THREADS as u64;
    }
}
