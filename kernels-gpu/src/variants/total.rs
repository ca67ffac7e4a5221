//! Compiled variants of total attention.

use super::MaskKind;
use crate::attention::mask::{Causal, Full};
use crate::attention::query_blocks::MBlocks;
use crate::attention::scheduler::TileOrder;
use crate::element::Dtype;
use crate::ground::shape::Shape;
use crate::tile::lane::WARPGROUP_THREADS;
use crate::tile::smem_total::TotalSmem;

/// Compiled kernel of total attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TotalVariant {
    /// Name of the kernel's entry point.
    pub symbol: &'static str,
    pub dtype: Dtype,
    /// Compiled head dim. Tensors with a smaller one use it too; TMA pads them with zeros.
    pub head_dim: u32,
    pub mask: MaskKind,
    /// Number of consumer warpgroups of a CTA, which has one producer warpgroup more.
    pub consumers: u32,
    /// Number of queries of one step of the mainloop.
    pub block_m: u32,
    /// Number of slots of the ring that query tiles pass through.
    pub stages: u32,
}

impl TotalVariant {
    /// Returns the number of keys of a work tile.
    pub const fn block_n(&self) -> u32 {
        self.smem().block_n()
    }
    /// Returns the number of threads of a CTA: the producer's warpgroup and the consumers'.
    pub const fn threads(&self) -> u32 {
        (self.consumers + 1) * WARPGROUP_THREADS
    }
    /// Returns the layout of a CTA's shared memory.
    pub const fn smem(&self) -> TotalSmem {
        TotalSmem { head_dim: self.head_dim, consumers: self.consumers, block_m: self.block_m, stages: self.stages }
    }
    /// Returns the order in which `ctas` CTAs take the work tiles of a problem that has any. A work tile is a block of
    /// keys of one query head, and plays the part of a query tile in [`TileOrder`].
    pub fn order(&self, shape: &Shape, ctas: u32) -> TileOrder {
        let block_n = self.block_n();
        let n_blocks = shape.seqlen_k.div_ceil(block_n);
        // The keys take the place of the queries.
        let keys = Shape { seqlen_q: shape.seqlen_k, ..*shape };
        let q_bytes = 2 * shape.group() as u64 * shape.seqlen_q as u64 * shape.head_dim as u64;
        TileOrder::balanced(&keys, block_n, ctas, q_bytes, |index| {
            let first_key = (n_blocks - 1 - index) * block_n;
            let blocks = match self.mask {
                MaskKind::None => MBlocks::plain::<Full>(shape, first_key, block_n, self.block_m),
                MaskKind::Causal => MBlocks::plain::<Causal>(shape, first_key, block_n, self.block_m),
            };
            blocks.end - blocks.start
        })
        .0
    }
}

/// Returns the smallest compiled variant of total attention that holds `head_dim`.
pub fn total(dtype: Dtype, head_dim: u32, mask: MaskKind) -> Option<&'static TotalVariant> {
    TOTAL_VARIANTS
        .iter()
        .filter(|v| v.dtype == dtype && v.mask == mask && v.head_dim >= head_dim)
        .min_by_key(|v| v.head_dim)
}

/// Calls `$apply!` with one row per variant: `symbol, dtype, head_dim, mask, consumers, block_m, stages;`
#[macro_export]
macro_rules! total_variants {
    ($apply:ident) => {
        $apply! {
            total_f16_d64, F16, 64, None, 4, 128, 6;
            total_f16_d64_causal, F16, 64, Causal, 4, 128, 6;
            total_f16_d128, F16, 128, None, 4, 128, 2;
            total_f16_d128_causal, F16, 128, Causal, 4, 128, 2;
            total_f16_d256, F16, 256, None, 2, 96, 2;
            total_f16_d256_causal, F16, 256, Causal, 2, 96, 2;
            total_bf16_d64, Bf16, 64, None, 4, 128, 6;
            total_bf16_d64_causal, Bf16, 64, Causal, 4, 128, 6;
            total_bf16_d128, Bf16, 128, None, 4, 128, 2;
            total_bf16_d128_causal, Bf16, 128, Causal, 4, 128, 2;
            total_bf16_d256, Bf16, 256, None, 2, 96, 2;
            total_bf16_d256_causal, Bf16, 256, Causal, 2, 96, 2;
        }
    };
}

macro_rules! total_table {
    ($($symbol:ident, $dtype:ident, $head_dim:literal, $mask:ident, $consumers:literal, $block_m:literal,
     $stages:literal;)*) => {
        /// All compiled variants of total attention.
        pub static TOTAL_VARIANTS: &[TotalVariant] = &[$(
            TotalVariant {
                symbol: stringify!($symbol),
                dtype: Dtype::$dtype,
                head_dim: $head_dim,
                mask: MaskKind::$mask,
                consumers: $consumers,
                block_m: $block_m,
                stages: $stages,
            },
        )*];
    };
}
total_variants!(total_table);
