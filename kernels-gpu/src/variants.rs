//! The tables of compiled kernels: the compile-time choices of each, and the tiles that it runs with.
//!
//! A row says what it covers, a plan says what it needs ([`Needed`]), and of the rows that cover a plan the cheapest
//! one wins. `entry` makes the symbols, the build adds launch bounds to the PTX, and the CPU executor runs the same
//! rows. What is not in a row is a launch parameter, or a specialisation constant ([`crate::ground::constants`]).

use std::vec::Vec;

use crate::attention::any_features::{AnyFeatures, AnyMask, FromAny};
use crate::attention::features::{self, Features};
use crate::attention::mask::Mask;
use crate::attention::scheduler::TileOrder;
use crate::ground::constants::{ConstantPlace, Constants, Form};
use crate::ground::shape::Shape;
#[cfg(feature = "cpu")]
use crate::ground::tensor::Strided;
#[cfg(feature = "cpu")]
use crate::params::ForwardParams;
use crate::tile::smem::ForwardSmem;
use crate::tuning;

mod backward;
mod launches;
mod total;

pub use crate::element::Dtype;
pub use crate::params::{PREPARE_ROWS, ROW_KERNEL_THREADS};
pub use crate::tile::lane::{WARP_ROWS, WARP_THREADS, WARPGROUP_ROWS, WARPGROUP_THREADS};
#[cfg(feature = "cpu")]
pub use backward::CpuBackward;
pub use backward::{BACKWARD_VARIANTS, BackwardVariant, backward};
pub use launches::{DROPOUT_MASK, Family, Launch, launches};
#[cfg(feature = "cpu")]
pub use total::CpuTotal;
pub use total::{TOTAL_VARIANTS, TotalVariant, total};

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

/// Masks that a row is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Masks {
    /// Any window.
    Any,
    /// Windows without bounds: every query attends to every key.
    Full,
    /// Windows with a bound.
    Bounded,
}

impl Masks {
    fn covers(self, mask: &AnyMask) -> bool {
        match self {
            Masks::Any => true,
            Masks::Full => !mask.is_bounded(),
            Masks::Bounded => mask.is_bounded(),
        }
    }
}

/// Properties that a plan needs of a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Needed {
    pub dtype: Dtype,
    pub head_dim: u32,
    pub features: AnyFeatures,
}

/// Tells if kernels with features of a row's type cover these.
pub type Covers = fn(&AnyFeatures) -> bool;

impl Needed {
    /// True if a kernel of these properties can compute it.
    fn is_covered_by(&self, covers: Covers, dtype: Dtype, head_dim: u32) -> bool {
        covers(&self.features) && dtype == self.dtype && head_dim >= self.head_dim
    }
}

/// Forms of a text that are built in advance. Together they cover everything that the text can do.
mod prebuilt {
    use super::{Constants, Form};

    /// No mask, and neither softcap nor ALiBi.
    const PLAIN: Form = Form::of(Constants::NONE);
    /// The causal mask.
    const RIGHT: Form = Form::of(Constants::NONE.with(Constants::RIGHT, true));
    /// Any window, and nothing else.
    const WINDOW: Form = PLAIN.opening(Constants::LEFT).opening(Constants::RIGHT);
    /// Softcap, without a mask and with the causal mask.
    const CAP: Form = PLAIN.closing(Constants::CAP, true);
    const CAP_AND_RIGHT: Form = RIGHT.closing(Constants::CAP, true);
    /// Everything but softcap. If both outcomes of softcap were in one form, registers would spill.
    const UNCAPPED: Form = WINDOW.opening(Constants::ALIBI).opening(Constants::SEED);
    /// Everything, with softcap.
    const CAPPED: Form = Form::GENERAL.closing(Constants::CAP, true).closing(Constants::LENGTHS, false);
    /// The same for sequences of different lengths.
    const RAGGED: Form = PLAIN.closing(Constants::LENGTHS, true);
    const RAGGED_RIGHT: Form = RIGHT.closing(Constants::LENGTHS, true);
    const RAGGED_WINDOW: Form = WINDOW.closing(Constants::LENGTHS, true);
    const RAGGED_UNCAPPED: Form = UNCAPPED.closing(Constants::LENGTHS, true);
    const RAGGED_CAPPED: Form = CAPPED.closing(Constants::LENGTHS, true);

    /// What is benchmarked, without a mask and with the causal mask, and any window.
    pub const FULL_AND_CAUSAL: &[Form] = &[PLAIN, RIGHT, WINDOW, RAGGED, RAGGED_RIGHT, RAGGED_WINDOW];
    pub const FULL: &[Form] = &[PLAIN, RAGGED];
    /// Without sequences of different lengths, which have no clusters.
    pub const CLUSTERED: &[Form] = &[PLAIN];
    pub const CAUSAL: &[Form] = &[RIGHT, WINDOW, RAGGED_RIGHT, RAGGED_WINDOW];
    /// All of these, softcap in the same way, and everything else.
    pub const ALL: &[Form] = &[
        PLAIN,
        RIGHT,
        WINDOW,
        CAP,
        CAP_AND_RIGHT,
        UNCAPPED,
        CAPPED,
        RAGGED,
        RAGGED_RIGHT,
        RAGGED_UNCAPPED,
        RAGGED_CAPPED,
    ];
    /// The same without a form for windows alone, and without those for softcap.
    pub const MOST: &[Form] = &[PLAIN, RIGHT, UNCAPPED, CAPPED, RAGGED, RAGGED_RIGHT, RAGGED_UNCAPPED, RAGGED_CAPPED];
    /// What another row has not: softcap and ALiBi.
    pub const SCORED: &[Form] = &[CAP, CAP_AND_RIGHT, UNCAPPED, CAPPED, RAGGED_UNCAPPED, RAGGED_CAPPED];
    /// Everything, up to 4 % slower than what is benchmarked.
    pub const OPEN: &[Form] = &[UNCAPPED, CAPPED, RAGGED_UNCAPPED, RAGGED_CAPPED];
}

/// Compiled kernel of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Variant {
    /// Name of the kernel's entry point.
    pub symbol: &'static str,
    pub op: Op,
    /// Tells which features it has.
    pub covers: Covers,
    pub dtype: Dtype,
    /// Compiled head dim. Tensors with a smaller one use it too; TMA pads them with zeros.
    pub head_dim: u32,
    pub masks: Masks,
    /// Number of consumer warpgroups of a CTA, which has one producer warpgroup more.
    pub consumers: u32,
    /// Number of keys of one step of the mainloop.
    pub block_n: u32,
    /// Number of slots of the ring that K and V tiles pass through.
    pub stages: u32,
    /// Number of CTAs of a cluster, 1 or 2. Two load K and V for each other by multicast, and so read each tile once.
    pub cluster: u32,
    /// Family in which it is compiled.
    pub family: &'static str,
    /// Returns the places of its specialisation constants, from the start of the features.
    pub constants: fn() -> Vec<ConstantPlace>,
    /// Forms that are built in advance.
    pub prebuilt: &'static [Form],
    /// Its mainloop on the CPU.
    #[cfg(feature = "cpu")]
    pub run: CpuForward,
}

/// Runs CTA `.3` of the `.4` of a forward kernel, with all its work tiles.
///
/// # Panics
/// If the kernel breaks the pipeline's protocol, with the [`Fault`](crate::cpu::Fault); if the kernel has features of
/// another type.
///
/// # Safety
/// The parameters describe tensors of the dtype in memory that is valid for reading (Q, K, V) and writing (O,
/// LSE) in all of their shape, which the layout of shared memory
/// holds; nothing else accesses this CTA's rows of O and LSE; the CTA is
/// below their number, which is at most [`Variant::work_tiles`].
#[cfg(feature = "cpu")]
pub type CpuForward = unsafe fn(Dtype, ForwardSmem, &ForwardParams<Strided, AnyFeatures>, u32, u32);

impl PartialEq for Variant {
    fn eq(&self, other: &Self) -> bool {
        self.symbol == other.symbol
    }
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
    /// Returns the number of work tiles of a problem.
    pub fn work_tiles(&self, shape: &Shape) -> u32 {
        TileOrder::new(shape, self.block_m(), 1).tiles()
    }
}

impl Variant {
    /// Returns true if the CTAs of a cluster, which take neighbouring work tiles, always visit the same blocks of keys.
    /// That holds without a mask if the number of work tiles of a key head's query heads is a multiple of the cluster
    /// size.
    pub fn shares(&self, shape: &Shape, mask: &AnyMask) -> bool {
        let tiles = shape.group() as u64 * shape.seqlen_q.div_ceil(self.block_m()) as u64;
        self.cluster == 1 || !mask.is_bounded() && tiles.is_multiple_of(self.cluster as u64)
    }

    /// Returns the order in which `ctas` CTAs take the work tiles of a problem that has any, and an estimate of the
    /// makespan: the number of scores of the CTA with most work, weighted by cost.     ///
    /// Examples, on 132 CTAs, by the constants of [`tuning`]:
    /// - D 256, causal, S 1024, batch 32, 8 heads: blocks of 80 keys are estimated at 1 382 400 and those of 64, with
    ///   6.5 % more per score, at 1 369 743. At S 2048 it is 2 426 880 and 2 486 476. So blocks of 64 win up to S 1024.
    /// - D 256, no mask: a cluster saves 2 % of each score and costs 10 000 scores, so it wins from 500 000 scores per
    ///   CTA on, some 100 µs. S 1024, batch 32, 8 heads: 2 293 760 without and 2 257 884 with clusters. S 512, batch 8,
    ///   8 heads: 163 840 without and 170 563 with them.
    /// - D 64, causal, batch 32768 / S, 32 heads: three consumers, at 850 per score, are estimated at 6 225 100 for
    ///   S 1024 and 16 586 342 for S 4096, two at 5 652 480 and 17 907 712. So two win in short sequences.
    pub fn order(&self, shape: &Shape, mask: &AnyMask, ctas: u32) -> (TileOrder, u64) {
        let (block_m, block_n) = (self.block_m(), self.block_n);
        // Bytes of K and V of a key head.
        let group_bytes = 2 * 2 * shape.seqlen_k as u64 * shape.head_dim as u64;
        let (order, blocks) = TileOrder::balanced(shape, block_m, ctas, group_bytes, |m_block| {
            mask.visits(&shape.sequence(), m_block * block_m, (block_m, block_n))
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

/// Returns the forward kernels that cover `needed`, of the smallest head dim that does; they differ in their tiles.
pub fn forward(needed: Needed) -> impl Iterator<Item = &'static Variant> {
    let covers = move |v: &&Variant| {
        needed.is_covered_by(v.covers, v.dtype, v.head_dim) && v.masks.covers(&needed.features.mask)
    };
    let head_dim = VARIANTS.iter().filter(covers).map(|v| v.head_dim).min();
    VARIANTS.iter().filter(covers).filter(move |v| Some(v.head_dim) == head_dim)
}

macro_rules! forward_table {
    ($($row:ident: {
        family: $family:literal, features: $features:ident, head_dim: $head_dim:literal, consumers: $consumers:literal,
        block_n: $block_n:literal, stages: $stages:literal, cluster: $cluster:literal, masks: $masks:ident,
        prebuilt: $prebuilt:ident,
    })*) => {
        &[$(
            forward_table!(@row Bf16, concat!("forward_bf16_", stringify!($row)), $family, $features, $head_dim,
                $consumers, $block_n, $stages, $cluster, $masks, $prebuilt),
            forward_table!(@row F16, concat!("forward_f16_", stringify!($row)), $family, $features, $head_dim,
                $consumers, $block_n, $stages, $cluster, $masks, $prebuilt),
        )*]
    };
    (@row $dtype:ident, $symbol:expr, $family:literal, $features:ident, $head_dim:literal, $consumers:literal,
     $block_n:literal, $stages:literal, $cluster:literal, $masks:ident, $prebuilt:ident) => {
        Variant {
            symbol: $symbol,
            op: <features::$features as Kind>::OP,
            covers: <features::$features as FromAny>::covers,
            dtype: Dtype::$dtype,
            head_dim: $head_dim,
            masks: Masks::$masks,
            consumers: $consumers,
            block_n: $block_n,
            stages: $stages,
            cluster: $cluster,
            family: $family,
            constants: <features::$features as Features>::constants,
            prebuilt: prebuilt::$prebuilt,
            #[cfg(feature = "cpu")]
            run: crate::arch::cpu::forward::<features::$features, { $head_dim / 8 }, { $block_n / 8 }>,
        }
    };
}

/// Kind of kernel that has these features.
trait Kind {
    const OP: Op;
}
impl<F: Features> Kind for F {
    const OP: Op = if F::Mask::PAIRS == 2 { Op::Piecewise } else { Op::Forward };
}

/// All compiled kernels of the forward pass.
pub static VARIANTS: &[Variant] = crate::forward_rows!(forward_table);
