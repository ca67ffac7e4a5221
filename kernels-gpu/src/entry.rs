//! Entry points of the kernels, made from the table of variants.

use core::arch::nvptx::{_block_idx_x, _grid_dim_x};

use half::{bf16, f16};

use crate::arch::sm90::backward_dq;
use crate::arch::sm90::consumer::Consumer;
use crate::arch::sm90::cta::{self, Role};
use crate::arch::sm90::dropout_mask;
use crate::arch::sm90::forward::ForwardPipe;
use crate::arch::sm90::fragment::{Fragment, Operand};
use crate::arch::sm90::math::Packed;
use crate::arch::sm90::producer::produce;
use crate::arch::sm90::rows;
use crate::arch::sm90::schedule;
use crate::arch::sm90::sink_gradients;
use crate::arch::sm90::store::write_tile;
use crate::arch::sm90::total_neg_lse_log2::produce_neg_lse_log2;
use crate::arch::sm90::total_producer;
use crate::arch::{MaxUnit, Warpgroup};
use crate::attention::features::{self, Features};
use crate::attention::first_tiles::FirstTiles;
use crate::attention::key_parts::KeyParts;
use crate::attention::mask::Mask;
use crate::attention::schedule::ScheduleParams;
use crate::attention::scheduler::CtaTiles;
use crate::attention::shared_tiles::SharedTiles;
use crate::ground::tensor::TensorMap;
use crate::kernels::backward::{Both, consume as consume_backward};
use crate::kernels::backward_gradients::{Dk, Dv};
use crate::kernels::forward::consume;
use crate::kernels::total_attention::consume as consume_total;
use crate::params::{
    BackwardParams, DropoutMaskParams, FinishParams, ForwardParams, PrepareParams, SinkGradientParams, TotalParams,
};
use crate::tile::smem::Split;
use crate::tile::smem::{BackwardSmem, ForwardSmem};
use crate::tile::smem_total::TotalSmem;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    cta::trap()
}

/// Element type of the kernels. The build makes the f16 kernels from the PTX of bf16. It compiles f16 only to compare
/// the two.
#[cfg(element = "bf16")]
type Element = bf16;
#[cfg(not(element = "bf16"))]
type Element = f16;
#[cfg(element = "bf16")]
macro_rules! dtype {
    () => {
        "bf16"
    };
}
#[cfg(not(element = "bf16"))]
macro_rules! dtype {
    () => {
        "f16"
    };
}

/// Keeps the machine code of a family independent of which other kernels are compiled with it. No launch runs this.
///
/// LLVM replaces an argument by a constant if all calls in a module agree on it, and only then inlines the function.
/// So the functions that families share are called here with every kind of argument that some kernel has.
#[unsafe(no_mangle)]
pub unsafe extern "ptx-kernel" fn shared_functions(tile: u32, row: u32, x: i32, y: i32) {
    // These are the least and the largest width of a fragment.
    let tile = tile + (x.clamp(0, 64) + y.clamp(0, 176)) as u32;
    let scores = Fragment([[x as f32, y as f32, 1.0, 2.0]; 16]);
    const SMEM: ForwardSmem = ForwardSmem { head_dim: 64, block_n: 128, consumers: 2, stages: 2, pairs: 1, cluster: 1 };
    let consumer = Consumer::<Element, ForwardPipe>::forward(&SMEM, row, u64::from(tile));
    let maxima = |rows, unit| consumer.maxima(&scores, rows, unit);
    let [a, b] = maxima(maxima([x as f32; 2], MaxUnit::Float), MaxUnit::Integer);
    let tile = tile + a.to_bits() + b.to_bits();
    // SAFETY: nothing launches this kernel.
    unsafe {
        write_tile(&Operand([[tile; 2]; 8]), tile, 64, 0);
        write_tile(&Operand([[tile; 2]; 8]), tile, 128, row);
        write_tile(&Operand([[tile; 2]; 16]), tile, 64, 0);
        write_tile(&Operand([[tile; 2]; 16]), tile, 128, row);
    }
}

/// Runs a CTA of a forward kernel: one producer warpgroup, the others consumers.
#[inline(always)]
fn forward<E: Packed, F: Features, const D8: usize, const N8: usize>(
    p: &ForwardParams<TensorMap, F>,
    parameters: u64,
    smem: &ForwardSmem,
) {
    cta::init_barriers(smem);
    let block_m = smem.block_m();
    // SAFETY: reads special registers.
    let (cta, ctas) = unsafe { (_block_idx_x() as u32, _grid_dim_x() as u32) };
    let tiles = CtaTiles::new(&p.base.order, cta, ctas);
    let role = cta::role();
    match role {
        Role::Producer => {
            cta::set_registers(role, smem.consumers);
            produce(p, parameters, smem, tiles);
        }
        Role::Consumer(index) => {
            cta::set_registers(role, smem.consumers);
            let mut consumer = Consumer::<E, ForwardPipe>::forward(smem, index, parameters);
            consume::<_, F, D8, N8>(&mut consumer, p, block_m, tiles);
            consumer.finish();
        }
    }
    cta::leave(smem);
}

/// Runs a CTA of a backward kernel: a third warpgroup that loads and accumulates dQ, and two consumers.
#[inline(always)]
fn backward<E: Packed, F: Features, const D8: usize, const M8: usize>(
    params: &BackwardParams<TensorMap, F>,
    parameters: u64,
    smem: &BackwardSmem,
) {
    cta::init_backward_barriers(smem);
    // The order of these two matters: a dependent grid, which may then start early, finds the workspace filled by the
    // preprocess kernel.
    cta::await_grid_before();
    cta::let_next_grid_start();
    let (p, mask) = (&params.base, params.features.mask());
    // SAFETY: reads special registers.
    let cta = unsafe { _block_idx_x() as u32 };
    let initialises = const { FirstTiles::is_for::<F::Mask, F::Weights>(8 * D8 as u32) };
    let first = if initialises { Some(&p.first) } else { None };
    let splits = !(mask.bounds_left() | mask.bounds_right());
    let sharing = if const { F::Mask::PAIRS == 1 } { Some((&p.sharing, splits)) } else { None };
    let tiles = KeyParts::new(&p.order, sharing, first, cta, p.sharing.ctas);
    let role = cta::role();
    match role {
        Role::Producer => {
            cta::set_backward_registers(role, smem.split);
            // With two pairs the third warpgroup has registers for fewer columns at a time.
            match (smem.split, F::Mask::PAIRS) {
                (Split::Gradients, 1) => backward_dq::produce::<E, F, 8>(params, parameters, smem, tiles),
                _ => backward_dq::produce::<E, F, 4>(params, parameters, smem, tiles),
            }
        }
        Role::Consumer(index) => {
            cta::set_backward_registers(role, smem.split);
            let wg = &mut Consumer::<E, _>::backward::<F>(smem, index, parameters);
            let block_n = smem.block_n;
            match (smem.split, index) {
                (Split::Keys, _) => consume_backward::<Both<_, D8, M8>, _, F, D8, M8>(wg, params, block_n, tiles),
                (Split::Gradients, 0) => consume_backward::<Dv<_, D8, M8>, _, F, D8, M8>(wg, params, block_n, tiles),
                (Split::Gradients, _) => consume_backward::<Dk<_, D8, M8>, _, F, D8, M8>(wg, params, block_n, tiles),
            }
        }
    }
}

/// Runs a CTA of total attention: one producer warpgroup, the others consumers.
#[inline(always)]
fn total<E: Packed, F: Features, const D8: usize, const M8: usize>(
    p: &TotalParams<TensorMap, F>,
    parameters: u64,
    smem: &TotalSmem,
) {
    cta::init_total_barriers(smem);
    // SAFETY: reads special registers.
    let (cta, ctas) = unsafe { (_block_idx_x() as u32, _grid_dim_x() as u32) };
    let tiles = SharedTiles::new(&p.order, p.shared_from, smem.parts(), cta, ctas);
    let role = cta::role();
    match role {
        Role::Producer => {
            cta::set_registers(role, smem.consumers);
            match cta::warp_of_warpgroup() {
                0 => total_producer::produce(p, parameters, smem, tiles),
                1 => produce_neg_lse_log2(p, smem, tiles),
                _ => {}
            }
        }
        Role::Consumer(index) => {
            cta::set_registers(role, smem.consumers);
            let mut consumer = Consumer::<E, _>::total(smem, index, parameters);
            consume_total::<_, F, D8, M8>(&mut consumer, p, smem, tiles);
        }
    }
}

// Each rustc process compiles one family: the `cfg` of that name, and the entry points of its rows.

macro_rules! forward_entries {
    ($($row:ident: {
        family: $family:literal, features: $features:ident, head_dim: $head_dim:literal, consumers: $consumers:literal,
        block_n: $block_n:literal, stages: $stages:literal, cluster: $cluster:literal, masks: $masks:ident,
        prebuilt: $prebuilt:ident,
    })*) => {$(
        #[cfg(family = $family)]
        #[unsafe(export_name = concat!("forward_", dtype!(), "_", stringify!($row)))]
        pub unsafe extern "ptx-kernel" fn $row(p: ForwardParams<TensorMap, features::$features>) {
            const SMEM: ForwardSmem = ForwardSmem {
                head_dim: $head_dim,
                block_n: $block_n,
                consumers: $consumers,
                stages: $stages,
                pairs: <features::$features as Features>::Mask::PAIRS,
                cluster: $cluster,
            };
            let parameters = crate::parameter_address!(concat!("forward_", dtype!(), "_", stringify!($row)));
            forward::<Element, features::$features, { $head_dim / 8 }, { $block_n / 8 }>(&p, parameters, &SMEM);
        }
    )*};
}
mod forward_kernels {
    use super::*;
    crate::forward_rows!(forward_entries);
}

macro_rules! backward_entries {
    ($($row:ident: {
        family: $family:literal, features: $features:ident, head_dim: $head_dim:literal, block_m: $block_m:literal,
        block_n: $block_n:literal, split: $split:ident, k_stages: $k_stages:literal, prebuilt: $prebuilt:ident,
    })*) => {$(
        #[cfg(family = $family)]
        #[unsafe(export_name = concat!("backward_", dtype!(), "_", stringify!($row)))]
        pub unsafe extern "ptx-kernel" fn $row(p: BackwardParams<TensorMap, features::$features>) {
            const SMEM: BackwardSmem = BackwardSmem {
                head_dim: $head_dim,
                block_m: $block_m,
                block_n: $block_n,
                split: Split::$split,
                k_stages: $k_stages,
            };
            let parameters = crate::parameter_address!(concat!("backward_", dtype!(), "_", stringify!($row)));
            backward::<Element, features::$features, { $head_dim / 8 }, { $block_m / 8 }>(&p, parameters, &SMEM);
        }
    )*};
}
mod backward_kernels {
    use super::*;
    crate::backward_rows!(backward_entries);
}

macro_rules! total_entries {
    ($($row:ident: {
        head_dim: $head_dim:literal, consumers: $consumers:literal, block_m: $block_m:literal, stages: $stages:literal,
    })*) => {$(
        #[cfg(family = "total")]
        #[unsafe(export_name = concat!("total_", dtype!(), "_", stringify!($row)))]
        pub unsafe extern "ptx-kernel" fn $row(p: TotalParams<TensorMap, features::Scored>) {
            const SMEM: TotalSmem =
                TotalSmem { head_dim: $head_dim, consumers: $consumers, block_m: $block_m, stages: $stages };
            let parameters = crate::parameter_address!(concat!("total_", dtype!(), "_", stringify!($row)));
            total::<Element, features::Scored, { $head_dim / 8 }, { $block_m / 8 }>(&p, parameters, &SMEM);
        }
    )*};
}
mod total_kernels {
    use super::*;
    crate::total_rows!(total_entries);
}

/// Makes the postprocess kernel of each head dim of the backward pass.
macro_rules! finish_entries {
    ($($row:ident: { head_dim: $head_dim:literal, block_n: $block_n:literal })*) => {$(
        #[cfg(family = "backward")]
        #[unsafe(export_name = concat!("finish_", dtype!(), "_", stringify!($row)))]
        pub unsafe extern "ptx-kernel" fn $row(p: FinishParams) {
            rows::finish::<Element, { $head_dim / 16 }>(&p, $block_n);
        }
    )*};
}
mod finish_kernels {
    use super::*;
    crate::finish_rows!(finish_entries);
}

// The PTX of the two preprocess kernels differs by more than the dtype, so both are compiled.

#[cfg(family = "backward")]
#[unsafe(no_mangle)]
pub unsafe extern "ptx-kernel" fn prepare_f16(p: PrepareParams) {
    rows::prepare::<f16>(&p);
}
#[cfg(family = "backward")]
#[unsafe(no_mangle)]
pub unsafe extern "ptx-kernel" fn prepare_bf16(p: PrepareParams) {
    rows::prepare::<bf16>(&p);
}

/// Computes the gradient of the sinks. Its workspace and results are f32, so it serves both dtypes.
#[cfg(family = "backward")]
#[unsafe(export_name = "sink_gradients")]
pub unsafe extern "ptx-kernel" fn gradients_of_sinks(p: SinkGradientParams) {
    sink_gradients::sink_gradients(&p);
}

#[cfg(family = "backward")]
#[unsafe(export_name = "schedule")]
pub unsafe extern "ptx-kernel" fn write_schedule(p: ScheduleParams) {
    schedule::schedule(&p);
}

#[cfg(family = "backward")]
#[unsafe(export_name = "dropout_mask")]
pub unsafe extern "ptx-kernel" fn write_dropout_mask(p: DropoutMaskParams) {
    dropout_mask::write(&p);
}
