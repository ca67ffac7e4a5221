//! The CPU executor: the same kernels, a whole tile at a time.
//!
//! A CTA runs on the calling thread, one consumer warpgroup after the other. There are no threads inside it:
//! a consumer that waits for a tile pulls the producer along until it has filled every empty slot of the ring. So runs
//! are deterministic, and a kernel that breaks the pipeline's protocol is a [`pipeline::Fault`] with a name instead of
//! a hang.

mod backward;
mod dropout;
mod forward;
mod fragment;
mod matmul;
mod memory;
mod pipeline;
mod rows;
mod total_attention;
mod warpgroup;

pub use dropout::select_bytes;
pub use pipeline::Fault;
pub use rows::{add_parts, finish, prepare};
pub use warpgroup::CpuWarpgroup;

use crate::arch::Split;
use crate::attention::block_info::KvBlocks;
use crate::attention::dropping::Dropping;
use crate::attention::mask::{Causal, Full, Mask};
use crate::attention::pairs::Pairs;
use crate::attention::query_blocks::key_block;
use crate::attention::scheduler::{CtaTiles, TileOrder, WorkTile};
use crate::attention::shared_tiles::SharedTiles;
use crate::element::Element;
use crate::kernels::backward::consume as consume_backward;
use crate::kernels::backward_gradients::{consume_dk, consume_dv};
use crate::kernels::forward::consume;
use crate::kernels::total_attention::consume as consume_total;
use crate::params::{BackwardParams, BackwardSecond, ForwardParams, Second, Shape, Strided, TotalParams};
use crate::pipeline::order::KvOrder;
use crate::tile::smem::ForwardSmem;
use crate::variants::{BackwardVariant, Op, TotalVariant, Variant};
use backward::{BackwardPipe, Weights};
use total_attention::TotalPipe;

macro_rules! mask {
    (None) => {
        Full
    };
    (Causal) => {
        Causal
    };
}
/// Number of work tiles of a problem.
pub fn grid(variant: &Variant, shape: &Shape) -> u32 {
    TileOrder::new(shape, variant.block_m(), 1).tiles()
}

/// Runs CTA `cta` of the `ctas` of the forward kernel, with all its work tiles.
///
/// # Panics
/// Where the kernel breaks the pipeline's protocol, with the [`Fault`]; where `E` is not the variant's dtype, `S` not
/// what its operator takes, or the variant drops weights and `R` does not.
///
/// # Safety
/// `p` describes tensors of `E` in memory that is valid for reading (Q, K, V) and writing (O, LSE) in all of `p.shape`,
/// which the variant holds; nobody else accesses this CTA's rows of O and LSE; `cta` is below `ctas`, which is at most
/// [`grid`].
pub unsafe fn forward<E: Element, S: Second<Strided>, R: Dropping>(
    variant: &Variant,
    p: &ForwardParams<Strided, S>,
    dropping: R,
    cta: u32,
    ctas: u32,
) {
    assert!(E::DTYPE == variant.dtype, "{} runs on {} tensors", variant.symbol, variant.dtype.name());
    assert!(S::Pairs::COUNT == variant.op.pairs(), "{} has other parameters", variant.symbol);
    macro_rules! dispatch {
        ($($symbol:ident, $op:ident, $dtype:ident, $head_dim:literal, $mask:ident, $consumers:literal, $block_n:literal,
           $stages:literal, $cluster:literal;)*) => {
            match variant.symbol {
                $(stringify!($symbol) if const { S::Pairs::COUNT == Op::$op.pairs() } => {
                    // SAFETY: the caller's promise; the assertion above says that `E` is this row's dtype.
                    unsafe { run::<mask!($mask), E, S, _, { $head_dim / 8 }, { $block_n / 8 }>(variant.smem(), p, CtaTiles::new(&p.order, cta, ctas), dropping) }
                })*
                other => unreachable!("{other} is not in the table of variants"),
            }
        };
    }
    if const { R::DROPS } { crate::forward_dropout_variants!(dispatch) } else { crate::forward_variants!(dispatch) }
}

/// One CTA, its consumers in turn.
///
/// # Safety
/// As [`forward`].
unsafe fn run<M: Mask, E: Element, S: Second<Strided>, R: Dropping, const D8: usize, const N8: usize>(
    smem: ForwardSmem,
    p: &ForwardParams<Strided, S>,
    tiles: CtaTiles,
    dropping: R,
) {
    let block_m = smem.consumers * crate::variants::WARPGROUP_ROWS;
    for consumer in 0..smem.consumers {
        let loads = KvOrder::new(KvBlocks::<M, _, _>::new(
            &p.shape,
            p.second.pairs(&p.shape),
            (block_m, smem.block_n),
            p.order.group,
            tiles,
        ));
        // SAFETY: the caller's promise; consumers own different rows of each work tile.
        let mut warpgroup = unsafe { CpuWarpgroup::<E, _>::forward(p, smem, consumer, loads) };
        consume::<_, M, S, R, D8, N8>(&mut warpgroup, p, block_m, tiles, dropping);
        warpgroup.finish();
    }
}

/// Runs the backward kernel for all blocks of keys of one key head, in order.
///
/// # Panics
/// As [`forward`].
///
/// # Safety
/// `p` describes tensors of `E` in memory that is valid for reading (Q, K, V, dO) and writing (dK, dV) in all of `p.shape`,
/// which the variant holds, and a workspace that [`prepare`] has filled for every query head of the group; nobody else
/// accesses this head's rows of dK and dV, or the workspace of its query heads. There is at least one key.
pub unsafe fn backward<E: Element, S: BackwardSecond<Strided>, R: Dropping>(
    variant: &BackwardVariant,
    p: &BackwardParams<Strided, S>,
    dropping: R,
    batch: u32,
    head: u32,
) {
    assert!(E::DTYPE == variant.dtype, "{} runs on {} tensors", variant.symbol, variant.dtype.name());
    assert!(S::Pairs::COUNT == variant.op.pairs(), "{} has other parameters", variant.symbol);
    macro_rules! dispatch {
        ($($symbol:ident, $prepare:ident, $finish:ident, $op:ident, $dtype:ident, $head_dim:literal, $mask:ident,
           $block_m:literal, $block_n:literal, $split:ident, $k_stages:literal;)*) => {
            match variant.symbol {
                $(stringify!($symbol) if const { S::Pairs::COUNT == Op::$op.pairs() } => {
                    // SAFETY: the caller's promise; the assertion above says that `E` is this row's dtype.
                    unsafe {
                        run_backward::<
                            mask!($mask),
                            E,
                            S,
                            _,
                            { $head_dim / 8 },
                            { $block_m / 8 },
                        >(variant, p, batch, head, dropping)
                    }
                })*
                other => unreachable!("{other} is not in the table of variants"),
            }
        };
    }
    if const { R::DROPS } { crate::backward_dropout_variants!(dispatch) } else { crate::backward_variants!(dispatch) }
}

/// One key head, a function of its own for each variant: without optimisation their tiles would not fit one stack frame.
///
/// # Safety
/// As [`backward`].
#[inline(never)]
unsafe fn run_backward<
    M: Mask,
    E: Element,
    S: BackwardSecond<Strided>,
    R: Dropping,
    const D8: usize,
    const M8: usize,
>(
    variant: &BackwardVariant,
    p: &BackwardParams<Strided, S>,
    batch: u32,
    head: u32,
    dropping: R,
) {
    let n_blocks = p.shape.seqlen_k.div_ceil(variant.block_n);
    let tiles = (0..n_blocks).map(|m_block| WorkTile { batch, head, m_block });
    let parts = tiles.flat_map(|tile| p.sharing.parts_of(&p.order, tile));
    let weights = Weights::default();
    for (at, consumer) in parts.flat_map(|at| [(at, 0), (at, 1)]) {
        let keys = key_block(&p.shape, variant.block_n, &at.tile);
        // SAFETY: the caller's promise; consumers own different parts of dK and dV.
        let mut warpgroup = unsafe {
            CpuWarpgroup::<E, BackwardPipe<M, S>>::backward(p, variant.smem(), consumer, &keys, at.part, &weights)
        };
        let tiles = core::iter::once(at);
        let block_n = variant.block_n;
        match (variant.split, consumer) {
            (Split::Keys, _) => consume_backward::<_, M, S, R, D8, M8>(&mut warpgroup, p, block_n, tiles, dropping),
            (Split::Gradients, 0) => consume_dv::<_, M, S, R, D8, M8>(&mut warpgroup, p, block_n, tiles, dropping),
            (Split::Gradients, _) => consume_dk::<_, M, S, R, D8, M8>(&mut warpgroup, p, block_n, tiles, dropping),
        }
        warpgroup.finish();
    }
}

/// Runs CTA `cta` of the `ctas` of the kernel of total attention, with all its work tiles.
///
/// # Panics
/// As [`forward`].
///
/// # Safety
/// `p` describes tensors of `E` in memory that is valid for reading (Q, K, the LSE) and writing (the result) in all of
/// `p.shape`, which the variant holds; nobody else accesses this CTA's elements of the result; `cta` is below `ctas`, which
/// is at most the number of work tiles, those that are shared out counted by their parts. There is at least one query.
pub unsafe fn total_attention<E: Element>(variant: &TotalVariant, p: &TotalParams<Strided>, cta: u32, ctas: u32) {
    assert!(E::DTYPE == variant.dtype, "{} runs on {} tensors", variant.symbol, variant.dtype.name());
    let tiles = SharedTiles::new(&p.order, p.shared_from, variant.smem().parts(), cta, ctas);
    macro_rules! dispatch {
        ($($symbol:ident, $dtype:ident, $head_dim:literal, $mask:ident, $consumers:literal, $block_m:literal,
           $stages:literal;)*) => {
            match variant.symbol {
                $(stringify!($symbol) => {
                    // SAFETY: the caller's promise; the assertion above says that `E` is this row's dtype.
                    unsafe { run_total::<mask!($mask), E, { $head_dim / 8 }, { $block_m / 8 }>(variant, p, tiles) }
                })*
                other => unreachable!("{other} is not in the table of variants"),
            }
        };
    }
    crate::total_variants!(dispatch);
}

/// One CTA, its consumers in turn.
///
/// # Safety
/// As [`total_attention`].
#[inline(never)]
unsafe fn run_total<M: Mask, E: Element, const D8: usize, const M8: usize>(
    variant: &TotalVariant,
    p: &TotalParams<Strided>,
    tiles: SharedTiles,
) {
    let smem = variant.smem();
    for consumer in 0..smem.consumers {
        // SAFETY: the caller's promise; consumers own different keys of each work tile.
        let mut warpgroup = unsafe { CpuWarpgroup::<E, TotalPipe<M>>::total(p, smem, consumer, tiles) };
        consume_total::<_, M, D8, M8>(&mut warpgroup, p, &smem, tiles);
        warpgroup.finish();
    }
}
