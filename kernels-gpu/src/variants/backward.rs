//! Compiled kernels of the backward pass.

use std::vec::Vec;

use super::{Covers, Dtype, Kind, Needed, Op, features, prebuilt};
#[cfg(feature = "cpu")]
use crate::attention::any_features::AnyFeatures;
use crate::attention::any_features::{AnyMask, FromAny};
use crate::attention::dropout::NoDropout;
use crate::attention::features::Features;
use crate::attention::first_tiles::FirstTiles;
use crate::attention::mask::{Interval, Window};
use crate::attention::query_blocks::blocks_per_semaphore;
use crate::attention::scheduler::{GroupBytes, TileOrder};
use crate::ground::constants::{ConstantPlace, Form};
use crate::ground::shape::Shape;
#[cfg(feature = "cpu")]
use crate::ground::tensor::Strided;
#[cfg(feature = "cpu")]
use crate::params::BackwardParams;
use crate::params::ROW_PADDING;
use crate::tile::lane::WARPGROUP_THREADS;
use crate::tile::smem::BackwardSmem;
use crate::tile::smem::Split;
use crate::tuning;

/// Compiled backward kernel, with two consumer warpgroups and one producer warpgroup.
#[derive(Clone, Copy, Debug)]
pub struct BackwardVariant {
    /// Name of the kernel's entry point.
    pub symbol: &'static str,
    /// Names of its preprocess kernel, which fills the workspace, and its postprocess kernel, which converts dQ.
    pub prepare: &'static str,
    pub finish: &'static str,
    /// Operator whose gradients it computes.
    pub op: Op,
    /// Tells which features it has.
    pub covers: Covers,
    pub dtype: Dtype,
    /// Compiled head dim. Tensors with a smaller one use it too; TMA pads them with zeros.
    pub head_dim: u32,
    /// Number of queries of one step of the mainloop.
    pub block_m: u32,
    /// Number of keys of a work tile.
    pub block_n: u32,
    /// Split of the gradients between the consumer warpgroups.
    pub split: Split,
    /// Number of buffers of K. With two, K of the next work tile is loaded during the steps of the current one. At head
    /// dim 64 this would take a register that the consumers lack, with dropout one that the third warpgroup lacks, and
    /// at head dim 256 more shared memory than there is.
    pub k_stages: u32,
    /// Family in which it is compiled.
    pub family: &'static str,
    /// Returns the places of its specialisation constants, from the start of the features.
    pub constants: fn() -> Vec<ConstantPlace>,
    /// Forms that are built in advance.
    pub prebuilt: &'static [Form],
    /// Its mainloop on the CPU.
    #[cfg(feature = "cpu")]
    pub run: CpuBackward,
}

/// Runs a backward kernel for all blocks of keys of key head `.4` of batch item `.3`, in order.
///
/// # Panics
/// If the kernel breaks the pipeline's protocol, with the [`Fault`](crate::cpu::Fault); if the kernel has features of
/// another type.
///
/// # Safety
/// The parameters describe tensors of the dtype in memory that is valid for reading (Q, K, V, dO) and writing (dK, dV)
/// in all of their shape, which the layout of shared memory holds, and a workspace that
/// [`prepare`](crate::cpu::prepare) has filled for every query head of the group; nothing else accesses this head's
/// rows of dK and dV, or the workspace of its query heads. There is at least one key.
#[cfg(feature = "cpu")]
pub type CpuBackward = unsafe fn(Dtype, BackwardSmem, &BackwardParams<Strided, AnyFeatures>, u32, u32);

impl PartialEq for BackwardVariant {
    fn eq(&self, other: &Self) -> bool {
        self.symbol == other.symbol
    }
}

impl BackwardVariant {
    /// Returns the number of threads of a CTA: the producer's warpgroup and the consumers'.
    pub const fn threads(&self) -> u32 {
        3 * WARPGROUP_THREADS
    }
    /// Returns the layout of a CTA's shared memory.
    pub const fn smem(&self) -> BackwardSmem {
        BackwardSmem {
            head_dim: self.head_dim,
            block_m: self.block_m,
            block_n: self.block_n,
            split: self.split,
            k_stages: self.k_stages,
        }
    }
    /// Returns the number of query rows of a head in the workspace.
    pub fn rows(&self, shape: &Shape) -> u32 {
        shape.seqlen_q.next_multiple_of(ROW_PADDING).max(ROW_PADDING)
    }
    /// Returns the number of query blocks of a head in the workspace.
    pub fn m_blocks(&self, shape: &Shape) -> u32 {
        self.rows(shape) / self.block_m
    }
    /// Returns the bytes of a part's contributions to dK and dV, in f32.
    pub const fn part_bytes(&self) -> u32 {
        2 * self.block_n * self.head_dim * 4
    }
    /// Returns the order in which `ctas` CTAs take the work tiles of a problem that has any. A work tile is a block of
    /// keys of one key head, and plays the part of a query tile of one query head in [`TileOrder`].
    pub fn order(&self, shape: &Shape, mask: &AnyMask, ctas: u32) -> TileOrder {
        let n_blocks = shape.seqlen_k.div_ceil(self.block_n);
        // Bytes of Q and dO, and of dQ in f32. A work tile visits the query heads of its group one after the other.
        let at_once = (2 + 2 + 4) * shape.seqlen_q as u64 * shape.head_dim as u64;
        let bytes = GroupBytes { all: at_once * shape.group() as u64, at_once };
        TileOrder::balanced(&self.keys(shape), self.block_n, ctas, bytes, |index| {
            self.query_blocks(shape, mask, n_blocks - 1 - index) * shape.group()
        })
        .0
    }
    /// Returns the order of [`BackwardVariant::order`] for an exact pass. The key blocks of one head accumulate dQ in
    /// order, each some steps of the dQ semaphore behind the one before. With more heads in a section, fewer key blocks
    /// of one head run at once, and their wait at the start of a launch is short compared with a work tile. With fewer
    /// heads, more of Q, dO and dQ stays in L2.
    ///
    /// Example: D 128, S 4096, batch 8, 16 heads, 132 CTAs. A head has 64 steps, and a key block is five steps behind
    /// the one before: the four query blocks of a semaphore counter, and one more. Without a mask, sections
    /// have 132 · 5 / 64 heads, rounded up: 11. Under a causal mask, they have 132 · 5 / 32 or 21 heads; the nearest
    /// whole fraction of the CTAs is a sixth, 22.
    pub fn exact_order(&self, shape: &Shape, mask: &AnyMask, ctas: u32) -> TileOrder {
        let steps = shape.seqlen_q.div_ceil(self.block_m);
        // Under a causal mask a key block has half of the steps on average, and neighbouring key blocks differ in their
        // number. With grouped queries, the steps of one query head count there, by measurement. Heads of the largest
        // head dim are so large that fewer of them stay in L2.
        let large = self.head_dim > tuning::EXACT_LARGE_ABOVE_HEAD_DIM;
        let bounded = mask.is_bounded();
        let steps = match bounded {
            false => (steps * shape.group()).max(1),
            true => (steps / 2).max(tuning::EXACT_MIN_STEPS_CAUSAL),
        };
        let fewest = match (bounded, large) {
            (false, false) => tuning::EXACT_MIN_SECTION,
            (false, true) => tuning::EXACT_MIN_SECTION_LARGE,
            (true, false) => tuning::EXACT_MIN_SECTION_CAUSAL,
            (true, true) => tuning::EXACT_MIN_SECTION_CAUSAL_LARGE,
        };
        let stagger = ctas * blocks_per_semaphore(self.head_dim);
        let section = if large { (stagger + steps / 2) / steps } else { (stagger + ctas).div_ceil(steps) }.max(fewest);
        let section = match bounded {
            false => section,
            // Rounds to the nearest whole fraction of the CTAs, so that consecutive key blocks start together.
            true => ctas / ((2 * ctas + section - 1) / (2 * section)).max(1),
        };
        TileOrder::new(&self.keys(shape), self.block_n, section).one_way()
    }
    /// Returns the work tiles of a fast pass of plain attention that initialise dQ, on `ctas` CTAs that take them in
    /// this order.
    pub fn first_tiles(&self, shape: &Shape, mask: &AnyMask, order: &TileOrder, ctas: u32) -> FirstTiles {
        let (heads, key_blocks) = (shape.batch * shape.heads_kv, shape.seqlen_k.div_ceil(self.block_n));
        let all = shape.seqlen_q.div_ceil(self.block_m);
        let knows = FirstTiles::is_for::<Window, NoDropout>(self.head_dim);
        if !knows || key_blocks == 0 || self.query_blocks(shape, mask, 0) < all {
            return FirstTiles::none(heads);
        }
        FirstTiles::new(heads, key_blocks, order.section(), ctas)
    }
    /// Returns the number of query blocks of a head that a block of keys visits, through all pairs together.
    fn query_blocks(&self, shape: &Shape, mask: &AnyMask, n_block: u32) -> u32 {
        let start = n_block * self.block_n;
        mask.query_blocks(&shape.sequence(), Interval { start, end: start + self.block_n }, self.block_m)
    }
    /// Returns a shape with the keys in the place of the queries.
    fn keys(&self, shape: &Shape) -> Shape {
        Shape { heads_q: shape.heads_kv, seqlen_q: shape.seqlen_k, ..*shape }
    }
}

/// Returns the backward kernel that covers `needed`, of the smallest head dim that does.
pub fn backward(needed: &Needed) -> Option<&'static BackwardVariant> {
    let covers = |v: &&BackwardVariant| needed.is_covered_by(v.covers, v.dtype, v.head_dim);
    BACKWARD_VARIANTS.iter().filter(covers).min_by_key(|v| v.head_dim)
}

#[cfg(feature = "cpu")]
macro_rules! split {
    (Keys, $features:ident, $d8:expr, $m8:expr) => {
        crate::arch::cpu::backward_by_keys::<features::$features, { $d8 }, { $m8 }>
    };
    (Gradients, $features:ident, $d8:expr, $m8:expr) => {
        crate::arch::cpu::backward_by_gradients::<features::$features, { $d8 }, { $m8 }>
    };
}
macro_rules! finish {
    ($dtype:literal, 64) => {
        concat!("finish_", $dtype, "_d64")
    };
    ($dtype:literal, 128) => {
        concat!("finish_", $dtype, "_d128")
    };
    ($dtype:literal, 256) => {
        concat!("finish_", $dtype, "_d256")
    };
}
macro_rules! backward_table {
    ($($row:ident: {
        family: $family:literal, features: $features:ident, head_dim: $head_dim:tt, block_m: $block_m:literal,
        block_n: $block_n:literal, split: $split:ident, k_stages: $k_stages:literal, prebuilt: $prebuilt:ident,
    })*) => {
        &[$(
            backward_table!(@row Bf16, "bf16", $row, $family, $features, $head_dim, $block_m, $block_n, $split,
                $k_stages, $prebuilt),
            backward_table!(@row F16, "f16", $row, $family, $features, $head_dim, $block_m, $block_n, $split,
                $k_stages, $prebuilt),
        )*]
    };
    (@row $dtype:ident, $name:literal, $row:ident, $family:literal, $features:ident, $head_dim:tt, $block_m:literal,
     $block_n:literal, $split:ident, $k_stages:literal, $prebuilt:ident) => {
        BackwardVariant {
            symbol: concat!("backward_", $name, "_", stringify!($row)),
            prepare: concat!("prepare_", $name),
            finish: finish!($name, $head_dim),
            op: <features::$features as Kind>::OP,
            covers: <features::$features as FromAny>::covers,
            dtype: Dtype::$dtype,
            head_dim: $head_dim,
            block_m: $block_m,
            block_n: $block_n,
            split: Split::$split,
            k_stages: $k_stages,
            family: $family,
            constants: <features::$features as Features>::constants,
            prebuilt: prebuilt::$prebuilt,
            #[cfg(feature = "cpu")]
            run: split!($split, $features, $head_dim / 8, $block_m / 8),
        }
    };
}
/// All compiled kernels of the backward pass.
pub static BACKWARD_VARIANTS: &[BackwardVariant] = crate::backward_rows!(backward_table);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::any_features::AnyFeatures;
    use crate::attention::score::Shaped;

    fn plain(head_dim: u32, window: Window) -> (&'static BackwardVariant, AnyMask) {
        let mask = AnyMask::new(window, None);
        let features = AnyFeatures { mask, score: Shaped::new(1.0, None, false), dropout: None };
        (backward(&Needed { dtype: Dtype::Bf16, head_dim, features }).unwrap(), mask)
    }

    /// Sections of fast passes that were measured best with four query heads for each key head, batch = 32768 / S. For
    /// long sequences, sections of 256 work tiles were best although they do not stay in L2; for short ones, smaller
    /// sections.
    #[test]
    fn sections_of_grouped_queries() {
        for (head_dim, heads_q, seqlen, section) in [
            (64, 32, 1024, 1),
            (64, 32, 16384, 2),
            (128, 32, 1024, 1),
            (128, 32, 2048, 1),
            (128, 32, 4096, 8),
            (128, 32, 8192, 4),
            (128, 32, 16384, 2),
            (256, 16, 4096, 4),
            (256, 16, 16384, 1),
        ] {
            let (variant, mask) = plain(head_dim, Window::CAUSAL);
            let (batch, seqlen_q, seqlen_k) = (32768 / seqlen, seqlen, seqlen);
            let shape = Shape { batch, heads_q, heads_kv: heads_q / 4, seqlen_q, seqlen_k, head_dim };
            assert_eq!(variant.order(&shape, &mask, 132).section(), section, "{head_dim} {seqlen}");
        }
    }

    /// Sections of exact passes that were measured best on 132 CTAs, heads = 2048 / D and batch = 32768 / S.
    #[test]
    fn exact_sections() {
        for (head_dim, window, sections) in [
            (64, Window::FULL, [83, 21, 6]),
            (64, Window::CAUSAL, [66, 44, 16]),
            (128, Window::FULL, [42, 11, 3]),
            (128, Window::CAUSAL, [66, 22, 16]),
            (256, Window::FULL, [17, 4, 2]),
            (256, Window::CAUSAL, [33, 8, 4]),
        ] {
            let (variant, mask) = plain(head_dim, window);
            for (seqlen, section) in [1024, 4096, 16384].into_iter().zip(sections) {
                let heads = 2048 / head_dim;
                let (batch, seqlen_q, seqlen_k) = (32768 / seqlen, seqlen, seqlen);
                let shape = Shape { batch, heads_q: heads, heads_kv: heads, seqlen_q, seqlen_k, head_dim };
                assert_eq!(
                    variant.exact_order(&shape, &mask, 132).section(),
                    section,
                    "{head_dim} {window:?} {seqlen}"
                );
            }
        }
    }
}
