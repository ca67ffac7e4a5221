//! Entry points of the kernels, made from the table of variants.

use core::arch::nvptx::{_block_idx_x, _grid_dim_x};

use half::{bf16, f16};

use crate::arch::sm90::backward_dq;
use crate::arch::sm90::consumer::Consumer;
use crate::arch::sm90::cta::{self, Role};
use crate::arch::sm90::forward::ForwardPipe;
use crate::arch::sm90::fragment::{Fragment, Operand};
use crate::arch::sm90::math::Packed;
use crate::arch::sm90::producer::produce;
use crate::arch::sm90::rows;
use crate::arch::sm90::store::write_tile;
use crate::arch::sm90::total_neg_lse_log2::produce_neg_lse_log2;
use crate::arch::sm90::total_producer;
use crate::arch::{MaxUnit, Warpgroup};
use crate::attention::dropout::NoDropout;
use crate::attention::dropping::Dropping;
use crate::attention::first_tiles::FirstTiles;
use crate::attention::key_parts::{KeyParts, Sharing};
use crate::attention::mask::{Causal, Full, Mask};
use crate::attention::pairs::Pairs;
use crate::attention::scheduler::CtaTiles;
use crate::attention::shared_tiles::SharedTiles;
use crate::ground::tensor::TensorMap;
use crate::kernels::backward::consume as consume_backward;
use crate::kernels::backward_gradients::{consume_dk, consume_dv};
use crate::kernels::forward::consume;
use crate::kernels::total_attention::consume as consume_total;
use crate::params::{
    BackwardParams, BackwardSecond, BackwardSecondPair, FinishParams, ForwardParams, PrepareParams, Second, SecondPair,
    TotalParams, WithDropout,
};
use crate::tile::smem::Split;
use crate::tile::smem::{BackwardSmem, ForwardSmem};
use crate::tile::smem_total::TotalSmem;
use crate::variants::Op;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    cta::trap()
}

#[cfg(element = "bf16")]
type Element = bf16;
#[cfg(not(element = "bf16"))]
type Element = f16;

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
    let consumer = Consumer::<Element, ForwardPipe<()>>::forward(&SMEM, row, u64::from(tile));
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
fn forward<E: Packed, M: Mask, S: Second<TensorMap>, R: Dropping, const D8: usize, const N8: usize>(
    p: &ForwardParams<TensorMap, S>,
    parameters: u64,
    smem: &ForwardSmem,
    dropping: R,
) {
    cta::init_barriers(smem);
    let block_m = smem.consumers * crate::tile::lane::WARPGROUP_ROWS;
    // SAFETY: reads special registers.
    let (cta, ctas) = unsafe { (_block_idx_x() as u32, _grid_dim_x() as u32) };
    let tiles = CtaTiles::new(&p.order, cta, ctas);
    let role = cta::role();
    match role {
        Role::Producer => {
            cta::set_registers(role, smem.consumers);
            produce::<M, S>(p, parameters, smem, tiles);
        }
        Role::Consumer(index) => {
            cta::set_registers(role, smem.consumers);
            let mut consumer = Consumer::<E, ForwardPipe<S>>::forward(smem, index, parameters);
            consume::<_, M, S, R, D8, N8>(&mut consumer, p, block_m, tiles, dropping);
            consumer.finish();
        }
    }
    cta::leave(smem);
}

macro_rules! element {
    (F16) => {
        f16
    };
    (Bf16) => {
        bf16
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
macro_rules! second {
    (Forward) => {
        ()
    };
    (Piecewise) => {
        SecondPair<TensorMap>
    };
}
/// Compiles an entry point only with its family, which `variants::Family` names. Each rustc process compiles one.
///
/// The build makes the f16 kernels from the PTX of bf16. It compiles f16 only to compare the two.
macro_rules! in_family {
    ($family:literal, F16, $($entry:tt)*) => {
        #[cfg(all(family = $family, element = "f16"))]
        $($entry)*
    };
    ($family:literal, Bf16, $($entry:tt)*) => {
        #[cfg(all(family = $family, element = "bf16"))]
        $($entry)*
    };
    (Forward, 64, $($entry:tt)*) => { in_family! { "forward_d128", $($entry)* } };
    (Forward, 96, $($entry:tt)*) => { in_family! { "forward_d128", $($entry)* } };
    (Forward, 128, $($entry:tt)*) => { in_family! { "forward_d128", $($entry)* } };
    (Forward, 192, $($entry:tt)*) => { in_family! { "forward_d256", $($entry)* } };
    (Forward, 256, $($entry:tt)*) => { in_family! { "forward_d256", $($entry)* } };
    (Piecewise, $head_dim:tt, $($entry:tt)*) => { in_family! { "piecewise", $($entry)* } };
}
macro_rules! in_backward_family {
    (Forward, $($entry:tt)*) => { in_family! { "backward", $($entry)* } };
    (Piecewise, $($entry:tt)*) => { in_family! { "piecewise_backward", $($entry)* } };
}
macro_rules! forward_entries {
    ($($symbol:ident, $op:ident, $dtype:ident, $head_dim:tt, $mask:ident, $consumers:literal, $block_n:literal,
       $stages:literal, $cluster:literal;)*) => {$(
        in_family! { $op, $head_dim, $dtype,
            #[unsafe(no_mangle)]
            pub unsafe extern "ptx-kernel" fn $symbol(p: ForwardParams<TensorMap, second!($op)>) {
                const SMEM: ForwardSmem = ForwardSmem {
                    head_dim: $head_dim,
                    block_n: $block_n,
                    consumers: $consumers,
                    stages: $stages,
                    pairs: Op::$op.pairs(),
                    cluster: $cluster,
                };
                forward::<element!($dtype), mask!($mask), second!($op), NoDropout, { $head_dim / 8 }, { $block_n / 8 }>(
                    &p,
                    crate::parameter_address!($symbol),
                    &SMEM,
                    NoDropout,
                );
            }
        }
    )*};
}
crate::forward_variants!(forward_entries);

macro_rules! forward_dropout_entries {
    ($($symbol:ident, $op:ident, $dtype:ident, $head_dim:literal, $mask:ident, $consumers:literal, $block_n:literal,
       $stages:literal, $cluster:literal;)*) => {$(
        in_family! { "forward_dropout", $dtype,
            #[unsafe(no_mangle)]
            pub unsafe extern "ptx-kernel" fn $symbol(p: WithDropout<ForwardParams<TensorMap>>) {
                const SMEM: ForwardSmem = ForwardSmem {
                    head_dim: $head_dim,
                    block_n: $block_n,
                    consumers: $consumers,
                    stages: $stages,
                    pairs: Op::$op.pairs(),
                    cluster: $cluster,
                };
                forward::<element!($dtype), mask!($mask), (), _, { $head_dim / 8 }, { $block_n / 8 }>(
                    &p.params,
                    crate::parameter_address!($symbol),
                    &SMEM,
                    p.dropout,
                );
            }
        }
    )*};
}
crate::forward_dropout_variants!(forward_dropout_entries);

/// Runs a CTA of a backward kernel: a third warpgroup that loads and accumulates dQ, and two consumers.
#[inline(always)]
fn backward<E: Packed, M: Mask, S: BackwardSecond<TensorMap>, R: Dropping, const D8: usize, const M8: usize>(
    p: &BackwardParams<TensorMap, S>,
    parameters: u64,
    smem: &BackwardSmem,
    dropping: R,
) {
    cta::init_backward_barriers(smem);
    // The order of these two matters: a dependent grid, which may then start early, finds the workspace filled by the
    // preprocess kernel.
    cta::await_grid_before();
    cta::let_next_grid_start();
    // SAFETY: reads special registers.
    let (cta, ctas) = unsafe { (_block_idx_x() as u32, _grid_dim_x() as u32) };
    let first = if const { FirstTiles::is_for::<S::Pairs, R>(8 * D8 as u32) } { Some(&p.first) } else { None };
    let tiles = match const { Sharing::is_for::<M, S::Pairs>() } {
        true => KeyParts::new(&p.order, Some(&p.sharing), first, cta, p.sharing.ctas),
        false => KeyParts::new(&p.order, None, first, cta, ctas),
    };
    let role = cta::role();
    match role {
        Role::Producer => {
            cta::set_backward_registers(role, smem.split);
            // With two pairs the third warpgroup has registers for fewer columns at a time.
            match (smem.split, S::Pairs::COUNT) {
                (Split::Gradients, 1) => backward_dq::produce::<E, M, S, R, 8>(p, parameters, smem, tiles),
                _ => backward_dq::produce::<E, M, S, R, 4>(p, parameters, smem, tiles),
            }
        }
        Role::Consumer(index) => {
            cta::set_backward_registers(role, smem.split);
            let mut consumer = Consumer::<E, _>::backward(smem, index, parameters);
            match (smem.split, index) {
                (Split::Keys, _) => {
                    consume_backward::<_, M, S, R, D8, M8>(&mut consumer, p, smem.block_n, tiles, dropping)
                }
                (Split::Gradients, 0) => {
                    consume_dv::<_, M, S, R, D8, M8>(&mut consumer, p, smem.block_n, tiles, dropping)
                }
                (Split::Gradients, _) => {
                    consume_dk::<_, M, S, R, D8, M8>(&mut consumer, p, smem.block_n, tiles, dropping)
                }
            }
        }
    }
}

/// Makes the postprocess kernel. It is the same for every mask and operator, so only one row of them makes it.
macro_rules! finish_entry {
    (Forward, None, $finish:ident, $dtype:ident, $head_dim:literal, $block_n:literal) => {
        in_family! { "backward", $dtype,
            #[unsafe(no_mangle)]
            pub unsafe extern "ptx-kernel" fn $finish(p: FinishParams) {
                rows::finish::<element!($dtype), { $head_dim / 16 }>(&p, $block_n);
            }
        }
    };
    ($($other:tt)*) => {};
}
macro_rules! backward_smem {
    ($head_dim:literal, $block_m:literal, $block_n:literal, $split:ident, $k_stages:literal) => {
        BackwardSmem {
            head_dim: $head_dim,
            block_m: $block_m,
            block_n: $block_n,
            split: Split::$split,
            k_stages: $k_stages,
        }
    };
}
macro_rules! backward_second {
    (Forward) => {
        ()
    };
    (Piecewise) => {
        BackwardSecondPair<TensorMap>
    };
}
macro_rules! backward_entries {
    ($($symbol:ident, $prepare:ident, $finish:ident, $op:ident, $dtype:ident, $head_dim:literal, $mask:ident,
       $block_m:literal, $block_n:literal, $split:ident, $k_stages:literal;)*) => {$(
        in_backward_family! { $op, $dtype,
            #[unsafe(no_mangle)]
            pub unsafe extern "ptx-kernel" fn $symbol(p: BackwardParams<TensorMap, backward_second!($op)>) {
                const SMEM: BackwardSmem = backward_smem!($head_dim, $block_m, $block_n, $split, $k_stages);
                backward::<
                    element!($dtype), mask!($mask), backward_second!($op), NoDropout, { $head_dim / 8 },
                    { $block_m / 8 },
                >(&p, crate::parameter_address!($symbol), &SMEM, NoDropout);
            }
        }
        finish_entry!($op, $mask, $finish, $dtype, $head_dim, $block_n);
    )*};
}
crate::backward_variants!(backward_entries);

macro_rules! backward_dropout_entries {
    ($($symbol:ident, $prepare:ident, $finish:ident, $op:ident, $dtype:ident, $head_dim:literal, $mask:ident,
       $block_m:literal, $block_n:literal, $split:ident, $k_stages:literal;)*) => {$(
        in_family! { "backward_dropout", $dtype,
            #[unsafe(no_mangle)]
            pub unsafe extern "ptx-kernel" fn $symbol(p: WithDropout<BackwardParams<TensorMap>>) {
                const SMEM: BackwardSmem = backward_smem!($head_dim, $block_m, $block_n, $split, $k_stages);
                backward::<
                    element!($dtype), mask!($mask), (), _, { $head_dim / 8 },
                    { $block_m / 8 },
                >(&p.params, crate::parameter_address!($symbol), &SMEM, p.dropout);
            }
        }
    )*};
}
crate::backward_dropout_variants!(backward_dropout_entries);

/// Makes the two preprocess kernels. Their PTX differs by more than the dtype, so both are compiled.
macro_rules! prepare_entries {
    ($($prepare:ident, $dtype:ident;)*) => {$(
        #[cfg(family = "backward")]
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $prepare(p: PrepareParams) {
            rows::prepare::<element!($dtype)>(&p);
        }
    )*};
}
prepare_entries! {
    prepare_f16, F16;
    prepare_bf16, Bf16;
}

/// Runs a CTA of total attention: one producer warpgroup, the others consumers.
#[inline(always)]
fn total<E: Packed, M: Mask, const D8: usize, const M8: usize>(
    p: &TotalParams<TensorMap>,
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
                0 => total_producer::produce::<M>(p, parameters, smem, tiles),
                1 => produce_neg_lse_log2::<M>(p, smem, tiles),
                _ => {}
            }
        }
        Role::Consumer(index) => {
            cta::set_registers(role, smem.consumers);
            let mut consumer = Consumer::<E, _>::total(smem, index, parameters);
            consume_total::<_, M, D8, M8>(&mut consumer, p, smem, tiles);
        }
    }
}

macro_rules! total_entries {
    ($($symbol:ident, $dtype:ident, $head_dim:literal, $mask:ident, $consumers:literal, $block_m:literal,
       $stages:literal;)*) => {$(
        in_family! { "total", $dtype,
            #[unsafe(no_mangle)]
            pub unsafe extern "ptx-kernel" fn $symbol(p: TotalParams<TensorMap>) {
                const SMEM: TotalSmem =
                    TotalSmem { head_dim: $head_dim, consumers: $consumers, block_m: $block_m, stages: $stages };
                total::<element!($dtype), mask!($mask), { $head_dim / 8 }, { $block_m / 8 }>(
                    &p,
                    crate::parameter_address!($symbol),
                    &SMEM,
                );
            }
        }
    )*};
}
crate::total_variants!(total_entries);
