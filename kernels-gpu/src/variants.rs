//! The single table of compiled variants: what is a compile-time axis, and which tiles each choice runs with.
//!
//! The host picks a row, the build adds its launch bounds to the PTX, `entry` makes its symbol and the CPU
//! executor runs the same row. Everything that is not in a row is a run-time parameter.

use crate::attention::block_info::NBlocks;
use crate::attention::mask::{Causal, Full};
use crate::attention::scheduler::TileOrder;
use crate::params::Shape;
use crate::tile::smem::ForwardSmem;

/// Element type of Q, K, V and O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    F16,
    Bf16,
}

impl Dtype {
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
        }
    }
}

/// Which mask a kernel was compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MaskKind {
    None,
    Causal,
}

impl MaskKind {
    pub const fn name(self) -> &'static str {
        match self {
            MaskKind::None => "none",
            MaskKind::Causal => "causal",
        }
    }
}

/// What a kernel computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    Forward,
}

impl Op {
    pub const fn name(self) -> &'static str {
        match self {
            Op::Forward => "forward",
        }
    }
}

/// Rows of a query tile that one consumer warpgroup owns: the M of wgmma.
pub const WARPGROUP_ROWS: u32 = 64;
/// Rows of it that one warp owns.
pub const WARP_ROWS: u32 = 16;
/// Threads of a warpgroup.
pub const WARPGROUP_THREADS: u32 = 128;

/// One compiled kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    /// Name of the kernel's entry point.
    pub symbol: &'static str,
    pub op: Op,
    pub dtype: Dtype,
    /// The compiled head dim; smaller ones run in it, padded with zeros by the copy engine.
    pub head_dim: u32,
    pub mask: MaskKind,
    /// Consumer warpgroups of a CTA, beside one producer warpgroup.
    pub consumers: u32,
    /// Keys of one step of the mainloop.
    pub block_n: u32,
    /// Slots of the ring that K and V tiles pass through.
    pub stages: u32,
}

impl Variant {
    /// Query rows of a work tile.
    pub const fn block_m(&self) -> u32 {
        self.consumers * WARPGROUP_ROWS
    }
    /// Threads of a CTA: the producer's warpgroup and the consumers'.
    pub const fn threads(&self) -> u32 {
        (self.consumers + 1) * WARPGROUP_THREADS
    }
    /// Where everything lies in a CTA's shared memory.
    pub const fn smem(&self) -> ForwardSmem {
        ForwardSmem { head_dim: self.head_dim, block_n: self.block_n, consumers: self.consumers, stages: self.stages }
    }
    /// Dynamic shared memory of a CTA in bytes.
    pub const fn smem_bytes(&self) -> u32 {
        self.smem().bytes()
    }
}

impl MaskKind {
    /// The n_blocks that a query tile visits.
    pub fn n_blocks(self, shape: &Shape, first_row: u32, block_m: u32, block_n: u32) -> NBlocks {
        match self {
            MaskKind::None => NBlocks::new::<Full>(shape, first_row, block_m, block_n),
            MaskKind::Causal => NBlocks::new::<Causal>(shape, first_row, block_m, block_n),
        }
    }
}

impl Variant {
    /// The order in which `ctas` CTAs take the work tiles of a problem that has any, and about how long they take: in
    /// scores that the busiest one computes.
    pub fn order(&self, shape: &Shape, ctas: u32) -> (TileOrder, u64) {
        let (block_m, block_n) = (self.block_m(), self.block_n);
        let (order, blocks) = TileOrder::balanced(shape, block_m, ctas, |m_block| {
            self.mask.n_blocks(shape, m_block * block_m, block_m, block_n).end
        });
        // Two consumers hide less of each other's softmax than three.
        let percent = if self.consumers < 3 { 100 } else { 85 };
        (order, blocks.saturating_mul(block_m as u64 * block_n as u64 * percent) / 100)
    }
}

/// The compiled forward variants of the smallest head dim that holds `head_dim`; they differ in their tiles.
pub fn forward(dtype: Dtype, head_dim: u32, mask: MaskKind) -> impl Iterator<Item = &'static Variant> {
    let fits = move |v: &&Variant| v.op == Op::Forward && v.dtype == dtype && v.mask == mask && v.head_dim >= head_dim;
    let smallest = VARIANTS.iter().filter(fits).map(|v| v.head_dim).min();
    VARIANTS.iter().filter(fits).filter(move |v| Some(v.head_dim) == smallest)
}

/// Calls `$apply!` with one row a variant:
/// `symbol, dtype, head_dim, mask, consumers, block_n, stages;`
#[macro_export]
macro_rules! forward_variants {
    ($apply:ident) => {
        $apply! {
            forward_f16_d64, F16, 64, None, 3, 128, 6;
            forward_f16_d64_causal, F16, 64, Causal, 3, 128, 6;
            forward_f16_d64_m128, F16, 64, None, 2, 128, 6;
            forward_f16_d64_m128_causal, F16, 64, Causal, 2, 128, 6;
            forward_f16_d96, F16, 96, None, 2, 128, 5;
            forward_f16_d96_causal, F16, 96, Causal, 2, 128, 5;
            forward_f16_d128, F16, 128, None, 2, 128, 5;
            forward_f16_d128_causal, F16, 128, Causal, 2, 128, 5;
            forward_f16_d192, F16, 192, None, 2, 112, 4;
            forward_f16_d192_causal, F16, 192, Causal, 2, 112, 4;
            forward_f16_d256, F16, 256, None, 2, 80, 4;
            forward_f16_d256_causal, F16, 256, Causal, 2, 80, 4;
            forward_bf16_d64, Bf16, 64, None, 3, 128, 6;
            forward_bf16_d64_causal, Bf16, 64, Causal, 3, 128, 6;
            forward_bf16_d64_m128, Bf16, 64, None, 2, 128, 6;
            forward_bf16_d64_m128_causal, Bf16, 64, Causal, 2, 128, 6;
            forward_bf16_d96, Bf16, 96, None, 2, 128, 5;
            forward_bf16_d96_causal, Bf16, 96, Causal, 2, 128, 5;
            forward_bf16_d128, Bf16, 128, None, 2, 128, 5;
            forward_bf16_d128_causal, Bf16, 128, Causal, 2, 128, 5;
            forward_bf16_d192, Bf16, 192, None, 2, 112, 4;
            forward_bf16_d192_causal, Bf16, 192, Causal, 2, 112, 4;
            forward_bf16_d256, Bf16, 256, None, 2, 80, 4;
            forward_bf16_d256_causal, Bf16, 256, Causal, 2, 80, 4;
        }
    };
}

macro_rules! forward_table {
    ($($symbol:ident, $dtype:ident, $head_dim:literal, $mask:ident, $consumers:literal, $block_n:literal, $stages:literal;)*) => {
        /// Every compiled variant.
        pub static VARIANTS: &[Variant] = &[$(
            Variant {
                symbol: stringify!($symbol),
                op: Op::Forward,
                dtype: Dtype::$dtype,
                head_dim: $head_dim,
                mask: MaskKind::$mask,
                consumers: $consumers,
                block_n: $block_n,
                stages: $stages,
            },
        )*];
    };
}
forward_variants!(forward_table);
