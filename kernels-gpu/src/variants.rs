//! The single table of compiled variants: the compile-time choices, and the tiles that each runs with.
//!
//! The host picks a row, the build adds its launch bounds to the PTX, `entry` makes its symbol, and the CPU executor
//! runs the same row. Everything that is not in a row is a run-time parameter.

use crate::attention::block_info::Visits;
use crate::attention::mask::{Causal, Full};
use crate::attention::pairs::{ByDistance, OnePair};
use crate::attention::scheduler::TileOrder;
use crate::ground::shape::Shape;
use crate::tile::smem::ForwardSmem;
use crate::tuning;

mod backward;
#[cfg(not(target_arch = "nvptx64"))]
mod launches;
mod total;

pub use crate::element::Dtype;
pub use crate::params::{PREPARE_ROWS, ROW_KERNEL_THREADS};
pub use crate::tile::lane::{WARP_ROWS, WARP_THREADS, WARPGROUP_ROWS, WARPGROUP_THREADS};
pub use backward::{BACKWARD_DROPOUT_VARIANTS, BACKWARD_VARIANTS, BackwardVariant, backward};
#[cfg(not(target_arch = "nvptx64"))]
pub use launches::{Family, Launch, launches};
pub use total::{TOTAL_VARIANTS, TotalVariant, total};

/// Mask that a kernel was compiled for.
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

/// Operator that a kernel computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    Forward,
    /// Attention with two pairs of Q and K, selected by distance.
    Piecewise,
}

impl Op {
    pub const fn name(self) -> &'static str {
        match self {
            Op::Forward => "forward",
            Op::Piecewise => "piecewise",
        }
    }
    /// Returns the number of pairs of Q and K.
    pub const fn pairs(self) -> u32 {
        match self {
            Op::Forward => 1,
            Op::Piecewise => 2,
        }
    }
}

/// Compiled kernel of the forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    /// Name of the kernel's entry point.
    pub symbol: &'static str,
    pub op: Op,
    pub dtype: Dtype,
    /// Compiled head dim. Tensors with a smaller one use it too; TMA pads them with zeros.
    pub head_dim: u32,
    pub mask: MaskKind,
    /// Number of consumer warpgroups of a CTA, which has one producer warpgroup more.
    pub consumers: u32,
    /// Number of keys of one step of the mainloop.
    pub block_n: u32,
    /// Number of slots of the ring that K and V tiles pass through.
    pub stages: u32,
    /// Number of CTAs of a cluster, 1 or 2. Two load K and V for each other by multicast, and so read each tile once.
    pub cluster: u32,
}

impl Variant {
    /// Returns the number of query rows of a work tile.
    pub const fn block_m(&self) -> u32 {
        self.consumers * WARPGROUP_ROWS
    }
    /// Returns the number of threads of a CTA: the producer's warpgroup and the consumers'.
    pub const fn threads(&self) -> u32 {
        (self.consumers + 1) * WARPGROUP_THREADS
    }
    /// Returns the layout of a CTA's shared memory.
    pub const fn smem(&self) -> ForwardSmem {
        ForwardSmem {
            head_dim: self.head_dim,
            block_n: self.block_n,
            consumers: self.consumers,
            stages: self.stages,
            pairs: self.op.pairs(),
            cluster: self.cluster,
        }
    }
    /// Returns the dynamic shared memory of a CTA in bytes.
    pub const fn smem_bytes(&self) -> u32 {
        self.smem().bytes()
    }
}

impl MaskKind {
    /// Returns the number of key blocks that a query tile visits; with a threshold, through both pairs together.
    fn visits(self, shape: &Shape, dist_threshold: Option<i32>, m_block: u32, (block_m, block_n): (u32, u32)) -> u32 {
        let row = m_block * block_m;
        let distance = |t| ByDistance::new(t, shape);
        match (self, dist_threshold) {
            (MaskKind::None, None) => Visits::new::<Full, _>(shape, OnePair, row, block_m, block_n).count,
            (MaskKind::None, Some(t)) => Visits::new::<Full, _>(shape, distance(t), row, block_m, block_n).count,
            (MaskKind::Causal, None) => Visits::new::<Causal, _>(shape, OnePair, row, block_m, block_n).count,
            (MaskKind::Causal, Some(t)) => Visits::new::<Causal, _>(shape, distance(t), row, block_m, block_n).count,
        }
    }
}

impl Variant {
    /// Returns true if the CTAs of a cluster, which take neighbouring work tiles, always visit the same blocks of keys.
    /// That holds without a mask if the number of work tiles of a key head's query heads is a multiple of the cluster
    /// size.
    pub fn shares(&self, shape: &Shape) -> bool {
        let tiles = shape.group() as u64 * shape.seqlen_q.div_ceil(self.block_m()) as u64;
        self.cluster == 1 || self.mask == MaskKind::None && tiles.is_multiple_of(self.cluster as u64)
    }

    /// Returns the order in which `ctas` CTAs take the work tiles of a problem that has any, and an estimate of the
    /// makespan: the number of scores of the CTA with most work, weighted by cost. `dist_threshold` is that of
    /// piecewise attention.
    ///
    /// Examples, on 132 CTAs, by the constants of [`tuning`]:
    /// - D 256, causal, S 1024, batch 32, 8 heads: blocks of 80 keys are estimated at 1 382 400 and those of 64, with
    ///   6.5 % more per score, at 1 369 743. At S 2048 it is 2 426 880 and 2 486 476. So blocks of 64 win up to S 1024.
    /// - D 256, no mask: a cluster saves 2 % of each score and costs 10 000 scores, so it wins from 500 000 scores per
    ///   CTA on, some 100 µs. S 1024, batch 32, 8 heads: 2 293 760 without and 2 257 884 with clusters. S 512, batch 8,
    ///   8 heads: 163 840 without and 170 563 with them.
    /// - D 64, causal, batch 32768 / S, 32 heads: three consumers, at 850 per score, are estimated at 6 225 100 for
    ///   S 1024 and 16 586 342 for S 4096, two at 5 652 480 and 17 907 712. So two win in short sequences.
    pub fn order(&self, shape: &Shape, dist_threshold: Option<i32>, ctas: u32) -> (TileOrder, u64) {
        let (block_m, block_n) = (self.block_m(), self.block_n);
        // Bytes of K and V of a key head.
        let group_bytes = 2 * 2 * shape.seqlen_k as u64 * shape.head_dim as u64;
        let (order, blocks) = TileOrder::balanced(shape, block_m, ctas, group_bytes, |m_block| {
            self.mask.visits(shape, dist_threshold, m_block, (block_m, block_n))
        });
        // Cost of a score in thousandths. Two consumers overlap less of each other's softmax than three, and the fixed
        // cost of a step weighs less in a larger step. Two CTAs that share K and V take half of it from L2; short
        // launches were slower with them.
        let (saved, start) =
            if self.cluster > 1 { (tuning::CLUSTER_SAVING_PERMILLE, tuning::CLUSTER_START_COST) } else { (0, 0) };
        let step = match block_n {
            tuning::LARGE_STEP_KEYS.. => tuning::LARGE_STEP_PERMILLE,
            tuning::MEDIUM_STEP_KEYS.. => 0,
            _ => tuning::SMALL_STEP_PERMILLE,
        };
        let score = if self.consumers < 3 { 1000 } else { tuning::THREE_CONSUMERS_PERMILLE };
        let permille = (score + step - saved) as u64;
        (order, start + blocks.saturating_mul(block_m as u64 * block_n as u64 * permille) / 1000)
    }
}

/// Dropout that a kernel was compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DropoutKind {
    None,
    Philox,
}

impl DropoutKind {
    /// Returns the table of the forward kernels.
    pub fn variants(self) -> &'static [Variant] {
        match self {
            DropoutKind::None => VARIANTS,
            DropoutKind::Philox => DROPOUT_VARIANTS,
        }
    }
    /// Returns the table of the backward kernels.
    pub fn backward_variants(self) -> &'static [BackwardVariant] {
        match self {
            DropoutKind::None => BACKWARD_VARIANTS,
            DropoutKind::Philox => BACKWARD_DROPOUT_VARIANTS,
        }
    }
}

/// Returns the compiled variants of an operator with the smallest head dim that holds `head_dim`; they differ in their
/// tiles.
pub fn forward(
    op: Op,
    dtype: Dtype,
    head_dim: u32,
    mask: MaskKind,
    dropout: DropoutKind,
) -> impl Iterator<Item = &'static Variant> {
    let variants = dropout.variants();
    let fits = move |v: &&Variant| v.op == op && v.dtype == dtype && v.mask == mask && v.head_dim >= head_dim;
    let smallest = variants.iter().filter(fits).map(|v| v.head_dim).min();
    variants.iter().filter(fits).filter(move |v| Some(v.head_dim) == smallest)
}

/// Calls `$apply!` with one row per variant: `symbol, op, dtype, head_dim, mask, consumers, block_n, stages, cluster;`
#[macro_export]
macro_rules! forward_variants {
    ($apply:ident) => {
        $apply! {
            forward_f16_d64, Forward, F16, 64, None, 3, 128, 6, 1;
            forward_f16_d64_causal, Forward, F16, 64, Causal, 3, 128, 6, 1;
            forward_f16_d64_m128, Forward, F16, 64, None, 2, 128, 6, 1;
            forward_f16_d64_m128_causal, Forward, F16, 64, Causal, 2, 128, 6, 1;
            forward_f16_d96, Forward, F16, 96, None, 2, 128, 5, 1;
            forward_f16_d96_c2, Forward, F16, 96, None, 2, 128, 5, 2;
            forward_f16_d96_causal, Forward, F16, 96, Causal, 2, 128, 5, 1;
            forward_f16_d128, Forward, F16, 128, None, 2, 128, 5, 1;
            forward_f16_d128_n176, Forward, F16, 128, None, 2, 176, 4, 1;
            forward_f16_d128_n176_c2, Forward, F16, 128, None, 2, 176, 4, 2;
            forward_f16_d128_causal, Forward, F16, 128, Causal, 2, 128, 5, 1;
            forward_f16_d192, Forward, F16, 192, None, 2, 112, 4, 1;
            forward_f16_d192_c2, Forward, F16, 192, None, 2, 112, 4, 2;
            forward_f16_d192_causal, Forward, F16, 192, Causal, 2, 112, 4, 1;
            forward_f16_d256, Forward, F16, 256, None, 2, 80, 4, 1;
            forward_f16_d256_c2, Forward, F16, 256, None, 2, 80, 4, 2;
            forward_f16_d256_causal, Forward, F16, 256, Causal, 2, 80, 4, 1;
            forward_f16_d256_n64_causal, Forward, F16, 256, Causal, 2, 64, 5, 1;
            forward_bf16_d64, Forward, Bf16, 64, None, 3, 128, 6, 1;
            forward_bf16_d64_causal, Forward, Bf16, 64, Causal, 3, 128, 6, 1;
            forward_bf16_d64_m128, Forward, Bf16, 64, None, 2, 128, 6, 1;
            forward_bf16_d64_m128_causal, Forward, Bf16, 64, Causal, 2, 128, 6, 1;
            forward_bf16_d96, Forward, Bf16, 96, None, 2, 128, 5, 1;
            forward_bf16_d96_c2, Forward, Bf16, 96, None, 2, 128, 5, 2;
            forward_bf16_d96_causal, Forward, Bf16, 96, Causal, 2, 128, 5, 1;
            forward_bf16_d128, Forward, Bf16, 128, None, 2, 128, 5, 1;
            forward_bf16_d128_n176, Forward, Bf16, 128, None, 2, 176, 4, 1;
            forward_bf16_d128_n176_c2, Forward, Bf16, 128, None, 2, 176, 4, 2;
            forward_bf16_d128_causal, Forward, Bf16, 128, Causal, 2, 128, 5, 1;
            forward_bf16_d192, Forward, Bf16, 192, None, 2, 112, 4, 1;
            forward_bf16_d192_c2, Forward, Bf16, 192, None, 2, 112, 4, 2;
            forward_bf16_d192_causal, Forward, Bf16, 192, Causal, 2, 112, 4, 1;
            forward_bf16_d256, Forward, Bf16, 256, None, 2, 80, 4, 1;
            forward_bf16_d256_c2, Forward, Bf16, 256, None, 2, 80, 4, 2;
            forward_bf16_d256_causal, Forward, Bf16, 256, Causal, 2, 80, 4, 1;
            forward_bf16_d256_n64_causal, Forward, Bf16, 256, Causal, 2, 64, 5, 1;
            piecewise_f16_d64, Piecewise, F16, 64, None, 3, 128, 6, 1;
            piecewise_f16_d64_causal, Piecewise, F16, 64, Causal, 3, 128, 6, 1;
            piecewise_f16_d64_m128, Piecewise, F16, 64, None, 2, 128, 6, 1;
            piecewise_f16_d64_m128_causal, Piecewise, F16, 64, Causal, 2, 128, 6, 1;
            piecewise_f16_d128, Piecewise, F16, 128, None, 2, 128, 4, 1;
            piecewise_f16_d128_causal, Piecewise, F16, 128, Causal, 2, 128, 4, 1;
            piecewise_f16_d256, Piecewise, F16, 256, None, 2, 64, 3, 1;
            piecewise_f16_d256_causal, Piecewise, F16, 256, Causal, 2, 64, 3, 1;
            piecewise_bf16_d64, Piecewise, Bf16, 64, None, 3, 128, 6, 1;
            piecewise_bf16_d64_causal, Piecewise, Bf16, 64, Causal, 3, 128, 6, 1;
            piecewise_bf16_d64_m128, Piecewise, Bf16, 64, None, 2, 128, 6, 1;
            piecewise_bf16_d64_m128_causal, Piecewise, Bf16, 64, Causal, 2, 128, 6, 1;
            piecewise_bf16_d128, Piecewise, Bf16, 128, None, 2, 128, 4, 1;
            piecewise_bf16_d128_causal, Piecewise, Bf16, 128, Causal, 2, 128, 4, 1;
            piecewise_bf16_d256, Piecewise, Bf16, 256, None, 2, 64, 3, 1;
            piecewise_bf16_d256_causal, Piecewise, Bf16, 256, Causal, 2, 64, 3, 1;
        }
    };
}

/// Calls `$apply!` with the rows of the kernels with dropout, as [`forward_variants`] does. Their blocks are multiples
/// of 32.
#[macro_export]
macro_rules! forward_dropout_variants {
    ($apply:ident) => {
        $apply! {
            forward_f16_d64_dropout, Forward, F16, 64, None, 2, 128, 6, 1;
            forward_f16_d64_causal_dropout, Forward, F16, 64, Causal, 2, 128, 6, 1;
            forward_f16_d128_dropout, Forward, F16, 128, None, 2, 128, 5, 1;
            forward_f16_d128_causal_dropout, Forward, F16, 128, Causal, 2, 128, 5, 1;
            forward_f16_d256_dropout, Forward, F16, 256, None, 2, 64, 4, 1;
            forward_f16_d256_causal_dropout, Forward, F16, 256, Causal, 2, 64, 4, 1;
            forward_bf16_d64_dropout, Forward, Bf16, 64, None, 2, 128, 6, 1;
            forward_bf16_d64_causal_dropout, Forward, Bf16, 64, Causal, 2, 128, 6, 1;
            forward_bf16_d128_dropout, Forward, Bf16, 128, None, 2, 128, 5, 1;
            forward_bf16_d128_causal_dropout, Forward, Bf16, 128, Causal, 2, 128, 5, 1;
            forward_bf16_d256_dropout, Forward, Bf16, 256, None, 2, 64, 4, 1;
            forward_bf16_d256_causal_dropout, Forward, Bf16, 256, Causal, 2, 64, 4, 1;
        }
    };
}

macro_rules! forward_table {
    ($($symbol:ident, $op:ident, $dtype:ident, $head_dim:literal, $mask:ident, $consumers:literal, $block_n:literal,
       $stages:literal, $cluster:literal;)*) => {
        &[$(
            Variant {
                symbol: stringify!($symbol),
                op: Op::$op,
                dtype: Dtype::$dtype,
                head_dim: $head_dim,
                mask: MaskKind::$mask,
                consumers: $consumers,
                block_n: $block_n,
                stages: $stages,
                cluster: $cluster,
            },
        )*]
    };
}
/// All compiled variants without dropout.
pub static VARIANTS: &[Variant] = forward_variants!(forward_table);
/// All compiled variants with dropout.
pub static DROPOUT_VARIANTS: &[Variant] = forward_dropout_variants!(forward_table);
