//! Entry points: the mainloops, compiled for the features and tiles of each row of the tables. The dtype is a value.

use std::boxed::Box;
use std::collections::VecDeque;

use super::backward::{BackwardPipe, BlocksOf, Weights};
use super::forward::ForwardPipe;
use super::total_attention::TotalPipe;
use super::warpgroup::CpuWarpgroup;
use crate::attention::any_features::{AnyFeatures, FromAny};
use crate::attention::features::{Features, Scored};
use crate::attention::key_parts::{KeyPart, SplitPart};
use crate::attention::query_blocks::{QueryBlocks, key_block};
use crate::attention::scheduler::CtaTiles;
use crate::attention::shared_tiles::SharedTiles;
use crate::attention::visits::KvBlocks;
use crate::element::Dtype;
use crate::ground::places::KvBlock;
use crate::ground::places::QueryBlock;
use crate::ground::places::WorkTile;
use crate::ground::tensor::Strided;
use crate::kernels::backward::{Both, consume as consume_backward};
use crate::kernels::backward_gradients::{Dk, Dv};
use crate::kernels::forward::consume;
use crate::kernels::total_attention::consume as consume_total;
use crate::params::{BackwardParams, ForwardParams, TotalParams};
use crate::pipeline::order::KvOrder;
use crate::tile::smem::{BackwardSmem, ForwardSmem};
use crate::tile::smem_total::TotalSmem;

/// Returns the features of a kernel. The row of a plan covers the plan, so they have the kernel's types.
///
/// # Panics
/// If they have others.
fn features<F: FromAny>(any: &AnyFeatures) -> F {
    F::from_any(any).unwrap_or_else(|| panic!("the kernel has other features than {any:?}"))
}

/// Runs one CTA of the forward kernel, one consumer after the other. This is a
/// [`CpuForward`](crate::variants::CpuForward).
///
/// # Safety
/// See there.
pub unsafe fn forward<F: FromAny, const D8: usize, const N8: usize>(
    dtype: Dtype,
    smem: ForwardSmem,
    p: &ForwardParams<Strided, AnyFeatures>,
    cta: u32,
    ctas: u32,
) {
    let (block_m, tiles) = (smem.block_m(), CtaTiles::new(&p.base.order, cta, ctas));
    let p = ForwardParams { base: p.base, features: features::<F>(&p.features) };
    for consumer in 0..smem.consumers {
        let (sequence, group) = (|batch| p.base.item(batch).sequence(), p.base.order.group);
        let blocks = KvBlocks::new(sequence, *p.features.mask(), (block_m, smem.block_n), group, tiles);
        // SAFETY: the caller's promise; consumers own different rows of each work tile.
        let mut warpgroup = unsafe {
            CpuWarpgroup::<ForwardPipe>::forward(&p.base, dtype, smem, consumer, KvOrder::new(blocks).flatten())
        };
        consume::<_, F, D8, N8>(&mut warpgroup, &p, block_m, tiles);
        warpgroup.finish();
    }
}

/// Returns a function that lists the query blocks which a block of keys, or a part of it, visits through its pair.
fn blocks_of<'a, F: Features + 'a>(
    smem: BackwardSmem,
    p: &'a BackwardParams<Strided, F>,
    part: SplitPart,
) -> Box<BlocksOf<'a>> {
    Box::new(move |keys: &KvBlock| {
        let (of, tile) = (p.base.item(keys.batch).sequence(), (smem.block_m, smem.block_n));
        let blocks = QueryBlocks::new(&of, *p.features.mask(), p.base.sharing.heads, tile, keys);
        let blocks = blocks.part(&p.base.sharing, part);
        let mut listed: VecDeque<QueryBlock> = VecDeque::new();
        for _ in 0..blocks.count() {
            listed.push_back(listed.back().map_or_else(|| blocks.first(), |last| blocks.after(last)));
        }
        listed
    })
}

/// Runs a function for each block of keys of a key head, or each part of one, in order.
fn for_each_part<F: Features>(
    smem: BackwardSmem,
    p: &BackwardParams<Strided, F>,
    (batch, head): (u32, u32),
    mut run: impl FnMut(KeyPart),
) {
    for m_block in 0..p.base.item(batch).k.len.div_ceil(smem.block_n) {
        if p.base.order.is_listed() {
            run(KeyPart { tile: WorkTile { batch, head, m_block }, part: SplitPart::WHOLE });
            continue;
        }
        p.base.sharing.parts_of(&p.base.order, WorkTile { batch, head, m_block }).for_each(&mut run);
    }
}

/// Runs the backward kernel for one key head, with the keys split: each consumer has half of them. This is a
/// [`CpuBackward`](crate::variants::CpuBackward).
///
/// # Safety
/// See there.
pub unsafe fn backward_by_keys<F: FromAny, const D8: usize, const M8: usize>(
    dtype: Dtype,
    smem: BackwardSmem,
    p: &BackwardParams<Strided, AnyFeatures>,
    batch: u32,
    head: u32,
) {
    let p = BackwardParams { base: p.base, features: features::<F>(&p.features) };
    let weights = Weights::default();
    for_each_part(smem, &p, (batch, head), |at| {
        for consumer in 0..2 {
            // SAFETY: the caller's promise; consumers own different keys.
            let mut warpgroup = unsafe { warpgroup(dtype, smem, &p, consumer, &at, &weights) };
            consume_backward::<Both<_, D8, M8>, _, F, D8, M8>(&mut warpgroup, &p, smem.block_n, core::iter::once(at));
            warpgroup.finish();
        }
    });
}

/// Runs the backward kernel for one key head, with the gradients split: one consumer has dV and the other dK. This is a
/// [`CpuBackward`](crate::variants::CpuBackward).
///
/// # Safety
/// See there.
pub unsafe fn backward_by_gradients<F: FromAny, const D8: usize, const M8: usize>(
    dtype: Dtype,
    smem: BackwardSmem,
    p: &BackwardParams<Strided, AnyFeatures>,
    batch: u32,
    head: u32,
) {
    let p = BackwardParams { base: p.base, features: features::<F>(&p.features) };
    let weights = Weights::default();
    for_each_part(smem, &p, (batch, head), |at| {
        // SAFETY: the caller's promise; one consumer writes dV and the other dK.
        let mut dv = unsafe { warpgroup(dtype, smem, &p, 0, &at, &weights) };
        consume_backward::<Dv<_, D8, M8>, _, F, D8, M8>(&mut dv, &p, smem.block_n, core::iter::once(at));
        dv.finish();
        // SAFETY: the caller's promise; one consumer writes dV and the other dK.
        let mut dk = unsafe { warpgroup(dtype, smem, &p, 1, &at, &weights) };
        consume_backward::<Dk<_, D8, M8>, _, F, D8, M8>(&mut dk, &p, smem.block_n, core::iter::once(at));
        dk.finish();
    });
}

/// Makes a consumer of a block of keys, or of a part of it.
///
/// # Safety
/// The promises of [`CpuBackward`](crate::variants::CpuBackward) hold, and nothing else accesses what this consumer
/// writes.
unsafe fn warpgroup<'a, F: Features + 'a>(
    dtype: Dtype,
    smem: BackwardSmem,
    p: &'a BackwardParams<Strided, F>,
    consumer: u32,
    at: &KeyPart,
    weights: &'a Weights,
) -> CpuWarpgroup<BackwardPipe<'a>> {
    let keys = key_block(&p.base.item(at.tile.batch).sequence(), smem.block_n, &at.tile);
    let blocks = blocks_of(smem, p, at.part);
    // SAFETY: the caller's promise.
    unsafe { CpuWarpgroup::backward(&p.base, dtype, smem, consumer, &keys, blocks, weights) }
}

/// Runs one CTA of the kernel of total attention, one consumer after the other. This is a
/// [`CpuTotal`](crate::variants::CpuTotal).
///
/// # Safety
/// See there.
pub unsafe fn total_attention<const D8: usize, const M8: usize>(
    dtype: Dtype,
    smem: TotalSmem,
    p: &TotalParams<Strided>,
    cta: u32,
    ctas: u32,
) {
    let tiles = SharedTiles::new(&p.order, p.shared_from, smem.parts(), cta, ctas);
    for consumer in 0..smem.consumers {
        // SAFETY: the caller's promise; consumers own different keys of each work tile.
        let mut warpgroup = unsafe { CpuWarpgroup::<TotalPipe>::total(p, dtype, smem, consumer, tiles) };
        consume_total::<_, Scored, D8, M8>(&mut warpgroup, p, &smem, tiles);
        warpgroup.finish();
    }
}
