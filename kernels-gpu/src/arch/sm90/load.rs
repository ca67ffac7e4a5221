//! Loads of a few values at a time, reductions to global memory, and counters.

use core::arch::asm;

use super::barrier::Mbarrier;
use super::cta::Leader;
use super::fragment::Operand;
use super::store::matrices_of_pair;

/// Loads two f32 from shared memory.
///
/// # Safety
/// The address is 8-byte aligned and readable, and its contents have been made visible to this thread.
#[inline(always)]
pub unsafe fn load_shared_pair(address: u32) -> [f32; 2] {
    let (a, b): (f32, f32);
    // SAFETY: the caller's promise. The instruction is not `pure`, because the contents change.
    unsafe {
        asm!("ld.shared.v2.f32 {{{0}, {1}}}, [{2}];", out(reg32) a, out(reg32) b, in(reg32) address, options(nostack));
    }
    [a, b]
}

/// Loads 16 bytes from shared memory.
///
/// # Safety
/// The address is 16-byte aligned and readable, and its contents have been made visible to this thread.
#[inline(always)]
pub unsafe fn load_shared_16_bytes(address: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    // SAFETY: the caller's promise.
    unsafe {
        asm!("ld.shared.v4.b32 {{{0}, {1}, {2}, {3}}}, [{4}];", out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d,
             in(reg32) address, options(nostack));
    }
    [a, b, c, d]
}

/// Reads the rows of a tile of `rows` rows in shared memory, at `tile`, from row `first_row` on, as a left operand
/// (`ldmatrix`). Each warp reads its own sixteen rows, in the layout of [`super::store::write_tile`].
///
/// # Safety
/// All lanes of the warp run it together. The rows are readable, and have been made visible to this thread.
#[inline(always)]
pub unsafe fn read_tile<const N8: usize>(tile: u32, rows: u32, first_row: u32) -> Operand<N8> {
    let mut x = Operand([[0; 2]; N8]);
    for pair in 0..N8 / 2 {
        let address = matrices_of_pair(tile, rows, first_row, pair as u32);
        let (a, b, c, d): (u32, u32, u32, u32);
        // SAFETY: the caller's promise.
        unsafe {
            asm!("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{0}, {1}, {2}, {3}}}, [{4}];", out(reg32) a, out(reg32) b,
                 out(reg32) c, out(reg32) d, in(reg32) address, options(nostack));
        }
        [x.0[2 * pair], x.0[2 * pair + 1]] = [[a, b], [c, d]];
    }
    x
}

/// Loads 16 bytes from global memory.
///
/// # Safety
/// The address is 16-byte aligned and readable.
#[inline(always)]
pub unsafe fn load_16_bytes(address: u64) -> [u32; 4] {
    let mut x = [0u32; 4];
    let [a, b, c, d] = &mut x;
    // SAFETY: the caller's promise.
    unsafe {
        asm!("ld.global.v4.b32 {{{0}, {1}, {2}, {3}}}, [{4}];", out(reg32) *a, out(reg32) *b, out(reg32) *c, out(reg32) *d,
             in(reg64) address, options(nostack));
    }
    x
}

/// Loads an f32 from global memory.
///
/// # Safety
/// The address is 4-byte aligned and readable.
#[inline(always)]
pub unsafe fn load_f32(address: u64) -> f32 {
    let x: f32;
    // SAFETY: the caller's promise.
    unsafe { asm!("ld.global.f32 {0}, [{1}];", out(reg32) x, in(reg64) address, options(nostack)) }
    x
}

/// Loads an f32 from global memory that no kernel of the launch writes.
///
/// # Safety
/// The address is 4-byte aligned and readable, and nothing writes there during the launch.
#[inline(always)]
pub unsafe fn load_constant_f32(address: u64) -> f32 {
    let x: f32;
    // SAFETY: the caller's promise.
    unsafe {
        asm!("ld.global.nc.f32 {0}, [{1}];", out(reg32) x, in(reg64) address, options(pure, nomem, nostack));
    }
    x
}

/// Loads an f32 from global memory if `live`; otherwise returns `or`.
///
/// # Safety
/// If `live`, the address is 4-byte aligned and readable.
#[inline(always)]
pub unsafe fn load_f32_or(live: bool, address: u64, or: f32) -> f32 {
    let mut x = or;
    // SAFETY: the caller's promise.
    unsafe {
        asm!("{{ .reg .pred p; setp.ne.u32 p, {1}, 0; @p ld.global.f32 {0}, [{2}]; }}",
             inout(reg32) x, in(reg32) live as u32, in(reg64) address, options(nostack));
    }
    x
}

/// Accumulates four f32 in global memory, each atomically (PTX ISA, red).
///
/// # Safety
/// The address is 16-byte aligned and writable.
#[inline(always)]
pub unsafe fn add_global(address: u64, x: [f32; 4]) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("red.relaxed.gpu.global.add.v4.f32 [{0}], {{{1}, {2}, {3}, {4}}};", in(reg64) address,
             in(reg32) x[0], in(reg32) x[1], in(reg32) x[2], in(reg32) x[3], options(nostack));
    }
}

/// Issues, by the leader, a TMA copy of `bytes` of global memory to shared memory at `to` (`cp.async.bulk`). The bytes
/// count at `barrier`.
///
/// # Safety
/// Both addresses and `bytes` are multiples of 16, and the source is readable. No thread reads or writes the
/// destination until `barrier`'s phase completes.
#[inline(always)]
pub unsafe fn load_bytes(leader: Leader, from: u64, bytes: u32, to: u32, barrier: Mbarrier) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "{{ .reg .pred p; setp.ne.u32 p, {4}, 0;",
            "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{0}], [{1}], {2}, [{3}]; }}",
            in(reg32) to, in(reg64) from, in(reg32) bytes, in(reg32) barrier.0, in(reg32) leader.0, options(nostack)
        );
    }
}

/// Waits until the counter at `address` has reached `count`, without a pause between reads.
///
/// # Safety
/// The address is that of a counter that other CTAs increase by [`increment_counter`].
#[inline(always)]
pub unsafe fn spin_until(address: u64, count: u32) {
    let mut found = 0u32;
    while found < count {
        // SAFETY: the caller's promise.
        found = unsafe { count_at(address) };
    }
}

/// Returns the counter at `address`. Writes that came before its increase are visible then (`ld.acquire`).
///
/// # Safety
/// The address is that of a counter that other CTAs increase by [`increment_counter`].
#[inline(always)]
pub unsafe fn count_at(address: u64) -> u32 {
    let count: u32;
    // SAFETY: the caller's promise.
    unsafe { asm!("ld.acquire.gpu.global.u32 {0}, [{1}];", out(reg32) count, in(reg64) address, options(nostack)) }
    count
}

/// Waits until the counter at `address` has reached `count`, and sleeps between reads, for waits that may be long.
///
/// # Safety
/// The address is that of a counter that other CTAs increase by [`increment_counter`].
#[inline(always)]
pub unsafe fn await_count(address: u64, count: u32) {
    // SAFETY: the caller's promise.
    while unsafe { count_at(address) } < count {
        // SAFETY: the only operand is a time, in nanoseconds.
        unsafe { asm!("nanosleep.u32 200;", options(nostack)) }
    }
}

/// Increases the counter at `address`, by the leader. The increase follows all that its warpgroup wrote before and
/// synchronised on (`red.release`).
///
/// # Safety
/// The address is that of a counter that CTAs increase by this function.
#[inline(always)]
pub unsafe fn increment_counter(leader: Leader, address: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("{{ .reg .pred p; setp.ne.u32 p, {1}, 0; @p red.release.gpu.global.add.u32 [{0}], 1; }}",
             in(reg64) address, in(reg32) leader.0, options(nostack));
    }
}

/// Sets the word at `address` to `owner` if it is 0, and returns its value afterwards, in the `leader`. In other
/// threads the result is meaningless.
///
/// # Safety
/// The address is that of a word that, while it is 0, only this function changes.
#[inline(always)]
pub unsafe fn claim(leader: Leader, address: u64, owner: u32) -> u32 {
    let mut found = 0u32;
    // SAFETY: the caller's promise.
    unsafe {
        asm!("{{ .reg .pred p; setp.ne.u32 p, {2}, 0; @p atom.acquire.gpu.global.cas.b32 {0}, [{1}], 0, {3}; }}",
             inout(reg32) found, in(reg64) address, in(reg32) leader.0, in(reg32) owner, options(nostack));
    }
    if found == 0 { owner } else { found }
}
