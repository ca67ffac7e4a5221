//! Entry points: they select the mainloop that is compiled for a row of the table of variants. The row is a value.

use std::boxed::Box;
use std::collections::VecDeque;

use super::backward::{BackwardPipe, Weights};
use super::forward::ForwardPipe;
use super::total_attention::TotalPipe;
use super::warpgroup::CpuWarpgroup;
use crate::attention::block_info::KvBlocks;
use crate::attention::dropout::Dropout;
use crate::attention::dropout::NoDropout;
use crate::attention::dropping::Dropping;
use crate::attention::key_parts::{KeyPart, SplitPart};
use crate::attention::mask::{Causal, Full, Mask};
use crate::attention::pairs::Pairs;
use crate::attention::query_blocks::{QueryBlocks, key_block};
use crate::attention::scheduler::{CtaTiles, TileOrder};
use crate::attention::shared_tiles::SharedTiles;
use crate::ground::places::KvBlock;
use crate::ground::places::QueryBlock;
use crate::ground::places::WorkTile;
use crate::ground::shape::Shape;
use crate::ground::tensor::Strided;
use crate::kernels::backward::consume as consume_backward;
use crate::kernels::backward_gradients::{consume_dk, consume_dv};
use crate::kernels::forward::consume;
use crate::kernels::total_attention::consume as consume_total;
use crate::params::{
    BackwardParams, BackwardSecond, BackwardSecondPair, ForwardParams, Second, SecondPair, TotalParams,
};
use crate::pipeline::order::KvOrder;
use crate::variants::{BackwardVariant, Op, TotalVariant, Variant};

macro_rules! by_split {
    (Keys, $mask:ty, $d8:expr, $m8:expr) => {
        run_keys::<$mask, S, R, { $d8 }, { $m8 }>
    };
    (Gradients, $mask:ty, $d8:expr, $m8:expr) => {
        run_gradients::<$mask, S, R, { $d8 }, { $m8 }>
    };
}
macro_rules! mask {
    (None) => {
        Full
    };
    (Causal) => {
        Causal
    };
}

/// Returns the number of work tiles of a problem.
pub fn grid(variant: &Variant, shape: &Shape) -> u32 {
    TileOrder::new(shape, variant.block_m(), 1).tiles()
}

/// Runs CTA `cta` of the `ctas` of the forward kernel, with all its work tiles.
///
/// # Panics
/// If the kernel breaks the pipeline's protocol, with the [`Fault`](super::Fault); if the variant has another operator
/// or other dropout than `p` and `dropout`, or is not in the table.
///
/// # Safety
/// `p` describes tensors of the variant's dtype in memory that is valid for reading (Q, K, V) and writing (O, LSE) in
/// all of `p.shape`, which the variant holds; nothing else accesses this CTA's rows of O and LSE; `cta` is below
/// `ctas`, which is at most [`grid`].
pub unsafe fn forward(
    variant: &Variant,
    p: &ForwardParams<Strided, Option<SecondPair<Strided>>>,
    dropout: Option<Dropout>,
    cta: u32,
    ctas: u32,
) {
    let ForwardParams { q, k, v, second, o, lse, scale, shape, order } = *p;
    let tiles = CtaTiles::new(&p.order, cta, ctas);
    // SAFETY: the caller's promise.
    unsafe {
        match (second, dropout) {
            (Some(second), _) => {
                let p = ForwardParams { q, k, v, second, o, lse, scale, shape, order };
                forward_with(variant, &p, NoDropout, tiles);
            }
            (None, dropout) => {
                let p = ForwardParams { q, k, v, second: (), o, lse, scale, shape, order };
                match dropout {
                    Some(dropout) => forward_with(variant, &p, dropout, tiles),
                    None => forward_with(variant, &p, NoDropout, tiles),
                }
            }
        }
    }
}

/// Selects and runs the mainloop of the variant's row.
///
/// # Safety
/// The promises of [`forward`] hold.
unsafe fn forward_with<S: Second<Strided>, R: Dropping>(
    variant: &Variant,
    p: &ForwardParams<Strided, S>,
    dropping: R,
    tiles: CtaTiles,
) {
    assert!(S::Pairs::COUNT == variant.op.pairs(), "{} has other parameters", variant.symbol);
    macro_rules! dispatch {
        ($($symbol:ident, $op:ident, $dtype:ident, $head_dim:literal, $mask:ident, $consumers:literal, $block_n:literal,
           $stages:literal, $cluster:literal;)*) => {
            match variant.symbol {
                $(stringify!($symbol) if const { S::Pairs::COUNT == Op::$op.pairs() } => {
                    run_forward::<mask!($mask), S, R, { $head_dim / 8 }, { $block_n / 8 }>
                })*
                other => unreachable!("{other} is not in the table of variants"),
            }
        };
    }
    let run: unsafe fn(&Variant, &ForwardParams<Strided, S>, CtaTiles, R) = if const { R::DROPS } {
        crate::forward_dropout_variants!(dispatch)
    } else {
        crate::forward_variants!(dispatch)
    };
    // SAFETY: the caller's promise.
    unsafe { run(variant, p, tiles, dropping) }
}

/// Runs one CTA, one consumer after the other.
///
/// # Safety
/// The promises of [`forward`] hold.
#[inline(never)]
unsafe fn run_forward<M: Mask, S: Second<Strided>, R: Dropping, const D8: usize, const N8: usize>(
    variant: &Variant,
    p: &ForwardParams<Strided, S>,
    tiles: CtaTiles,
    dropping: R,
) {
    let (smem, block_m) = (variant.smem(), variant.block_m());
    for consumer in 0..smem.consumers {
        let pairs = p.second.pairs(&p.shape);
        let blocks = KvBlocks::<M, _, _>::new(&p.shape, pairs, (block_m, smem.block_n), p.order.group, tiles);
        // SAFETY: the caller's promise; consumers own different rows of each work tile.
        let mut warpgroup =
            unsafe { CpuWarpgroup::<ForwardPipe>::forward(p, variant.dtype, smem, consumer, KvOrder::new(blocks)) };
        consume::<_, M, S, R, D8, N8>(&mut warpgroup, p, block_m, tiles, dropping);
        warpgroup.finish();
    }
}

/// Runs the backward kernel for all blocks of keys of one key head, in order.
///
/// # Panics
/// If the kernel breaks the pipeline's protocol, with the [`Fault`](super::Fault); if the variant has another operator
/// or other dropout than `p` and `dropout`, or is not in the table.
///
/// # Safety
/// `p` describes tensors of the variant's dtype in memory that is valid for reading (Q, K, V, dO) and writing (dK, dV)
/// in all of `p.shape`, which the variant holds, and a workspace that [`prepare`](super::prepare) has filled for every
/// query head of the group; nothing else accesses this head's rows of dK and dV, or the workspace of its query heads.
/// There is at least one key.
pub unsafe fn backward(
    variant: &BackwardVariant,
    p: &BackwardParams<Strided, Option<BackwardSecondPair<Strided>>>,
    dropout: Option<Dropout>,
    batch: u32,
    head: u32,
) {
    let BackwardParams { q, k, v, d_o, second, dk, dv, workspace, scale, shape, order, sharing, first } = *p;
    // SAFETY: the caller's promise.
    unsafe {
        match (second, dropout) {
            (Some(second), _) => {
                let p = BackwardParams { q, k, v, d_o, second, dk, dv, workspace, scale, shape, order, sharing, first };
                backward_with(variant, &p, NoDropout, batch, head);
            }
            (None, dropout) => {
                let second = ();
                let p = BackwardParams { q, k, v, d_o, second, dk, dv, workspace, scale, shape, order, sharing, first };
                match dropout {
                    Some(dropout) => backward_with(variant, &p, dropout, batch, head),
                    None => backward_with(variant, &p, NoDropout, batch, head),
                }
            }
        }
    }
}

/// Selects and runs the mainloop of the variant's row.
///
/// # Safety
/// The promises of [`backward`] hold.
unsafe fn backward_with<S: BackwardSecond<Strided>, R: Dropping>(
    variant: &BackwardVariant,
    p: &BackwardParams<Strided, S>,
    dropping: R,
    batch: u32,
    head: u32,
) {
    assert!(S::Pairs::COUNT == variant.op.pairs(), "{} has other parameters", variant.symbol);
    macro_rules! dispatch {
        ($($symbol:ident, $prepare:ident, $finish:ident, $op:ident, $dtype:ident, $head_dim:literal, $mask:ident,
           $block_m:literal, $block_n:literal, $split:ident, $k_stages:literal;)*) => {
            match variant.symbol {
                $(stringify!($symbol) if const { S::Pairs::COUNT == Op::$op.pairs() } => {
                    by_split!($split, mask!($mask), $head_dim / 8, $block_m / 8)
                })*
                other => unreachable!("{other} is not in the table of variants"),
            }
        };
    }
    let run: unsafe fn(&BackwardVariant, &BackwardParams<Strided, S>, WorkTile, R) = if const { R::DROPS } {
        crate::backward_dropout_variants!(dispatch)
    } else {
        crate::backward_variants!(dispatch)
    };
    let n_blocks = p.shape.seqlen_k.div_ceil(variant.block_n);
    for m_block in 0..n_blocks {
        // SAFETY: the caller's promise.
        unsafe { run(variant, p, WorkTile { batch, head, m_block }, dropping) }
    }
}

/// Returns a function that lists the query blocks which a block of keys, or a part of it, visits through its pair.
fn blocks_of<'a, M: Mask + 'a, S: BackwardSecond<Strided>>(
    variant: &'a BackwardVariant,
    p: &'a BackwardParams<Strided, S>,
    part: SplitPart,
) -> Box<super::backward::BlocksOf<'a>> {
    Box::new(move |keys: &KvBlock| {
        let pairs = p.second.pairs(&p.shape);
        let blocks = QueryBlocks::<M, _>::new(&p.shape, pairs, variant.block_m, variant.block_n, keys);
        let blocks = blocks.part(&p.sharing, part);
        let mut listed: VecDeque<QueryBlock> = VecDeque::new();
        for _ in 0..blocks.count() {
            listed.push_back(listed.back().map_or_else(|| blocks.first(), |last| blocks.after(last)));
        }
        listed
    })
}

/// Runs one block of keys of one key head, split by keys: each consumer has half of them.
///
/// # Safety
/// The promises of [`backward`] hold.
#[inline(never)]
unsafe fn run_keys<M: Mask, S: BackwardSecond<Strided>, R: Dropping, const D8: usize, const M8: usize>(
    variant: &BackwardVariant,
    p: &BackwardParams<Strided, S>,
    tile: WorkTile,
    dropping: R,
) {
    let weights = Weights::default();
    for (at, consumer) in p.sharing.parts_of(&p.order, tile).flat_map(|at| [(at, 0), (at, 1)]) {
        // SAFETY: the caller's promise; consumers own different keys.
        let mut warpgroup = unsafe { warpgroup::<M, S>(variant, p, consumer, &at, &weights) };
        let parts = core::iter::once(at);
        consume_backward::<_, M, S, R, D8, M8>(&mut warpgroup, p, variant.block_n, parts, dropping);
        warpgroup.finish();
    }
}

/// Runs one block of keys of one key head, split by gradients: one consumer has dV and the other dK.
///
/// # Safety
/// The promises of [`backward`] hold.
#[inline(never)]
unsafe fn run_gradients<M: Mask, S: BackwardSecond<Strided>, R: Dropping, const D8: usize, const M8: usize>(
    variant: &BackwardVariant,
    p: &BackwardParams<Strided, S>,
    tile: WorkTile,
    dropping: R,
) {
    let weights = Weights::default();
    for at in p.sharing.parts_of(&p.order, tile) {
        let parts = core::iter::once(at);
        // SAFETY: the caller's promise; one consumer writes dV and the other dK.
        let mut dv = unsafe { warpgroup::<M, S>(variant, p, 0, &at, &weights) };
        consume_dv::<_, M, S, R, D8, M8>(&mut dv, p, variant.block_n, parts.clone(), dropping);
        dv.finish();
        // SAFETY: the caller's promise; one consumer writes dV and the other dK.
        let mut dk = unsafe { warpgroup::<M, S>(variant, p, 1, &at, &weights) };
        consume_dk::<_, M, S, R, D8, M8>(&mut dk, p, variant.block_n, parts, dropping);
        dk.finish();
    }
}

/// Makes a consumer of a block of keys, or of a part of it.
///
/// # Safety
/// The promises of [`backward`] hold, and nothing else accesses what this consumer writes.
unsafe fn warpgroup<'a, M: Mask + 'a, S: BackwardSecond<Strided>>(
    variant: &'a BackwardVariant,
    p: &'a BackwardParams<Strided, S>,
    consumer: u32,
    at: &KeyPart,
    weights: &'a Weights,
) -> CpuWarpgroup<BackwardPipe<'a>> {
    let keys = key_block(&p.shape, variant.block_n, &at.tile);
    let blocks = blocks_of::<M, S>(variant, p, at.part);
    // SAFETY: the caller's promise.
    unsafe { CpuWarpgroup::backward(p, variant.dtype, variant.smem(), consumer, &keys, blocks, weights) }
}

/// Runs CTA `cta` of the `ctas` of the kernel of total attention, with all its work tiles.
///
/// # Panics
/// If the kernel breaks the pipeline's protocol, with the [`Fault`](super::Fault), or the variant is not in the table.
///
/// # Safety
/// `p` describes tensors of the variant's dtype in memory that is valid for reading (Q, K, the LSE) and writing (the
/// result) in all of `p.shape`, which the variant holds; nothing else accesses this CTA's elements of the result; `cta`
/// is below `ctas`, which is at most the number of work tiles, with split tiles counted by their parts. There is at
/// least one query.
pub unsafe fn total_attention(variant: &TotalVariant, p: &TotalParams<Strided>, cta: u32, ctas: u32) {
    let tiles = SharedTiles::new(&p.order, p.shared_from, variant.smem().parts(), cta, ctas);
    macro_rules! dispatch {
        ($($symbol:ident, $dtype:ident, $head_dim:literal, $mask:ident, $consumers:literal, $block_m:literal,
           $stages:literal;)*) => {
            match variant.symbol {
                $(stringify!($symbol) => run_total::<mask!($mask), { $head_dim / 8 }, { $block_m / 8 }>,)*
                other => unreachable!("{other} is not in the table of variants"),
            }
        };
    }
    let run: unsafe fn(&TotalVariant, &TotalParams<Strided>, SharedTiles) = crate::total_variants!(dispatch);
    // SAFETY: the caller's promise.
    unsafe { run(variant, p, tiles) }
}

/// Runs one CTA, one consumer after the other.
///
/// # Safety
/// The promises of [`total_attention`] hold.
#[inline(never)]
unsafe fn run_total<M: Mask, const D8: usize, const M8: usize>(
    variant: &TotalVariant,
    p: &TotalParams<Strided>,
    tiles: SharedTiles,
) {
    let smem = variant.smem();
    for consumer in 0..smem.consumers {
        // SAFETY: the caller's promise; consumers own different keys of each work tile.
        let mut warpgroup = unsafe { CpuWarpgroup::<TotalPipe>::total::<M>(p, variant.dtype, smem, consumer, tiles) };
        consume_total::<_, M, D8, M8>(&mut warpgroup, p, &smem, tiles);
        warpgroup.finish();
    }
}
