//! The kernels' entry points, made from the table of variants.

use core::arch::nvptx::{_block_idx_x, _grid_dim_x};

use half::{bf16, f16};

use crate::arch::sm90::consumer::Consumer;
use crate::arch::sm90::cta::{self, Role};
use crate::arch::sm90::math::Packed;
use crate::arch::sm90::producer::produce;
use crate::attention::mask::{Causal, Full, Mask};
use crate::attention::scheduler::CtaTiles;
use crate::kernels::forward::consume;
use crate::params::{ForwardParams, TensorMap};
use crate::tile::smem::ForwardSmem;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    cta::trap()
}

/// A forward CTA: one producer warpgroup, the others consumers.
#[inline(always)]
fn forward<E: Packed, M: Mask, const D8: usize, const N8: usize>(
    p: &ForwardParams<TensorMap>,
    parameters: u64,
    smem: &ForwardSmem,
) {
    cta::init_barriers(smem);
    let block_m = smem.consumers * crate::variants::WARPGROUP_ROWS;
    // SAFETY: reads special registers.
    let (cta, ctas) = unsafe { (_block_idx_x() as u32, _grid_dim_x() as u32) };
    let tiles = CtaTiles::new(&p.order, cta, ctas);
    let role = cta::role();
    match role {
        Role::Producer => {
            cta::set_registers(role, smem.consumers);
            produce::<M>(p, parameters, smem, tiles);
        }
        Role::Consumer(index) => {
            cta::set_registers(role, smem.consumers);
            let mut consumer = Consumer::<E, _>::forward(smem, index, parameters);
            consume::<_, M, D8, N8>(&mut consumer, p, block_m, tiles);
            consumer.finish();
        }
    }
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
macro_rules! forward_entries {
    ($($symbol:ident, $dtype:ident, $head_dim:literal, $mask:ident, $consumers:literal, $block_n:literal, $stages:literal;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $symbol(p: ForwardParams<TensorMap>) {
            const SMEM: ForwardSmem =
                ForwardSmem { head_dim: $head_dim, block_n: $block_n, consumers: $consumers, stages: $stages };
            forward::<element!($dtype), mask!($mask), { $head_dim / 8 }, { $block_n / 8 }>(
                &p,
                crate::parameter_address!($symbol),
                &SMEM,
            );
        }
    )*};
}
crate::forward_variants!(forward_entries);
