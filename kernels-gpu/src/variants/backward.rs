//! Compiled variants of the backward pass.

use super::{DropoutKind, MaskKind, Op};
use crate::attention::dropout::NoDropout;
use crate::attention::first_tiles::FirstTiles;
use crate::attention::mask::{Causal, Full, Mask};
use crate::attention::pairs::{ByDistance, OnePair, Pairs};
use crate::attention::query_blocks::{MBlocks, blocks_per_semaphore};
use crate::attention::scheduler::{GroupBytes, TileOrder};
use crate::element::Dtype;
use crate::ground::shape::Shape;
use crate::params::ROW_PADDING;
use crate::tile::lane::WARPGROUP_THREADS;
use crate::tile::smem::BackwardSmem;
use crate::tile::smem::Split;
use crate::tuning;

/// Compiled backward kernel, with two consumer warpgroups and one producer warpgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackwardVariant {
    /// Name of the kernel's entry point.
    pub symbol: &'static str,
    /// Names of its preprocess kernel, which fills the workspace, and its postprocess kernel, which converts dQ.
    pub prepare: &'static str,
    pub finish: &'static str,
    /// Operator whose gradients it computes.
    pub op: Op,
    pub dtype: Dtype,
    /// Compiled head dim. Tensors with a smaller one use it too; TMA pads them with zeros.
    pub head_dim: u32,
    pub mask: MaskKind,
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
    /// keys of one key head, and plays the part of a query tile of one query head in [`TileOrder`]. `dist_threshold` is
    /// that of piecewise attention.
    pub fn order(&self, shape: &Shape, dist_threshold: Option<i32>, ctas: u32) -> TileOrder {
        let n_blocks = shape.seqlen_k.div_ceil(self.block_n);
        // Bytes of Q and dO, and of dQ in f32. A work tile visits the query heads of its group one after the other.
        let at_once = (2 + 2 + 4) * shape.seqlen_q as u64 * shape.head_dim as u64;
        let bytes = GroupBytes { all: at_once * shape.group() as u64, at_once };
        TileOrder::balanced(&self.keys(shape), self.block_n, ctas, bytes, |index| {
            self.mask.met(shape, dist_threshold, n_blocks - 1 - index, (self.block_m, self.block_n)) * shape.group()
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
    pub fn exact_order(&self, shape: &Shape, ctas: u32) -> TileOrder {
        let steps = shape.seqlen_q.div_ceil(self.block_m);
        // Under a causal mask a key block has half of the steps on average, and neighbouring key blocks differ in their
        // number. With grouped queries, the steps of one query head count there, by measurement. Heads of the largest
        // head dim are so large that fewer of them stay in L2.
        let large = self.head_dim > tuning::EXACT_LARGE_ABOVE_HEAD_DIM;
        let steps = match self.mask {
            MaskKind::None => (steps * shape.group()).max(1),
            MaskKind::Causal => (steps / 2).max(tuning::EXACT_MIN_STEPS_CAUSAL),
        };
        let fewest = match (self.mask, large) {
            (MaskKind::None, false) => tuning::EXACT_MIN_SECTION,
            (MaskKind::None, true) => tuning::EXACT_MIN_SECTION_LARGE,
            (MaskKind::Causal, false) => tuning::EXACT_MIN_SECTION_CAUSAL,
            (MaskKind::Causal, true) => tuning::EXACT_MIN_SECTION_CAUSAL_LARGE,
        };
        let stagger = ctas * blocks_per_semaphore(self.head_dim);
        let section = if large { (stagger + steps / 2) / steps } else { (stagger + ctas).div_ceil(steps) }.max(fewest);
        let section = match self.mask {
            MaskKind::None => section,
            // Rounds to the nearest whole fraction of the CTAs, so that consecutive key blocks start together.
            MaskKind::Causal => ctas / ((2 * ctas + section - 1) / (2 * section)).max(1),
        };
        TileOrder::new(&self.keys(shape), self.block_n, section).one_way()
    }
    /// Returns the work tiles of a fast pass of plain attention that initialise dQ, on `ctas` CTAs that take them in
    /// this order.
    pub fn first_tiles(&self, shape: &Shape, order: &TileOrder, ctas: u32) -> FirstTiles {
        let (heads, key_blocks) = (shape.batch * shape.heads_kv, shape.seqlen_k.div_ceil(self.block_n));
        let all = shape.seqlen_q.div_ceil(self.block_m);
        let knows = FirstTiles::is_for::<OnePair, NoDropout>(self.head_dim);
        if !knows || key_blocks == 0 || self.mask.met(shape, None, 0, (self.block_m, self.block_n)) < all {
            return FirstTiles::none(heads);
        }
        FirstTiles::new(heads, key_blocks, order.section(), ctas)
    }
    /// Returns a shape with the keys in the place of the queries.
    fn keys(&self, shape: &Shape) -> Shape {
        Shape { heads_q: shape.heads_kv, seqlen_q: shape.seqlen_k, ..*shape }
    }
}

/// Returns the smallest compiled backward variant of an operator that holds `head_dim`.
pub fn backward(
    op: Op,
    dtype: Dtype,
    head_dim: u32,
    mask: MaskKind,
    dropout: DropoutKind,
) -> Option<&'static BackwardVariant> {
    let fits = |v: &&BackwardVariant| v.op == op && v.dtype == dtype && v.mask == mask && v.head_dim >= head_dim;
    dropout.backward_variants().iter().filter(fits).min_by_key(|v| v.head_dim)
}

impl MaskKind {
    /// Returns the number of query blocks of a head that a key block visits; with a threshold, through both pairs
    /// together.
    fn met(self, shape: &Shape, dist_threshold: Option<i32>, n_block: u32, tile: (u32, u32)) -> u32 {
        fn count<M: Mask, P: Pairs>(shape: &Shape, pairs: P, n_block: u32, (block_m, block_n): (u32, u32)) -> u32 {
            let blocks = |pair| MBlocks::new::<M, P>(shape, pairs, pair, n_block * block_n, block_n, block_m);
            (0..P::COUNT).map(blocks).map(|blocks| blocks.end - blocks.start).sum()
        }
        match (self, dist_threshold) {
            (MaskKind::None, None) => count::<Full, _>(shape, OnePair, n_block, tile),
            (MaskKind::None, Some(t)) => count::<Full, _>(shape, ByDistance::new(t, shape), n_block, tile),
            (MaskKind::Causal, None) => count::<Causal, _>(shape, OnePair, n_block, tile),
            (MaskKind::Causal, Some(t)) => count::<Causal, _>(shape, ByDistance::new(t, shape), n_block, tile),
        }
    }
}

/// Calls `$apply!` with one row per variant: `symbol, prepare, finish, op, dtype, head_dim, mask, block_m, block_n,
/// split, k_stages;`
#[macro_export]
macro_rules! backward_variants {
    ($apply:ident) => {
        $apply! {
            backward_f16_d64, prepare_f16, finish_f16_d64, Forward, F16, 64, None, 128, 128, Keys, 1;
            backward_f16_d64_causal, prepare_f16, finish_f16_d64, Forward, F16, 64, Causal, 128, 128, Keys, 1;
            backward_f16_d128, prepare_f16, finish_f16_d128, Forward, F16, 128, None, 64, 128, Keys, 2;
            backward_f16_d128_causal, prepare_f16, finish_f16_d128, Forward, F16, 128, Causal, 64, 128, Keys, 2;
            backward_f16_d256, prepare_f16, finish_f16_d256, Forward, F16, 256, None, 64, 64, Gradients, 1;
            backward_f16_d256_causal, prepare_f16, finish_f16_d256, Forward, F16, 256, Causal, 64, 64, Gradients, 1;
            backward_bf16_d64, prepare_bf16, finish_bf16_d64, Forward, Bf16, 64, None, 128, 128, Keys, 1;
            backward_bf16_d64_causal, prepare_bf16, finish_bf16_d64, Forward, Bf16, 64, Causal, 128, 128, Keys, 1;
            backward_bf16_d128, prepare_bf16, finish_bf16_d128, Forward, Bf16, 128, None, 64, 128, Keys, 2;
            backward_bf16_d128_causal, prepare_bf16, finish_bf16_d128, Forward, Bf16, 128, Causal, 64, 128, Keys, 2;
            backward_bf16_d256, prepare_bf16, finish_bf16_d256, Forward, Bf16, 256, None, 64, 64, Gradients, 1;
            backward_bf16_d256_causal, prepare_bf16, finish_bf16_d256, Forward, Bf16, 256, Causal, 64, 64, Gradients, 1;
            piecewise_backward_f16_d64, prepare_f16, finish_f16_d64, Piecewise, F16, 64, None, 64, 128, Keys, 1;
            piecewise_backward_f16_d64_causal, prepare_f16, finish_f16_d64, Piecewise, F16, 64, Causal, 64, 128, Keys, 1;
            piecewise_backward_f16_d128, prepare_f16, finish_f16_d128, Piecewise, F16, 128, None, 64, 128, Keys, 1;
            piecewise_backward_f16_d128_causal, prepare_f16, finish_f16_d128, Piecewise, F16, 128, Causal, 64, 128, Keys, 1;
            piecewise_backward_f16_d256, prepare_f16, finish_f16_d256, Piecewise, F16, 256, None, 64, 64, Gradients, 1;
            piecewise_backward_f16_d256_causal, prepare_f16, finish_f16_d256, Piecewise, F16, 256, Causal, 64, 64, Gradients, 1;
            piecewise_backward_bf16_d64, prepare_bf16, finish_bf16_d64, Piecewise, Bf16, 64, None, 64, 128, Keys, 1;
            piecewise_backward_bf16_d64_causal, prepare_bf16, finish_bf16_d64, Piecewise, Bf16, 64, Causal, 64, 128, Keys, 1;
            piecewise_backward_bf16_d128, prepare_bf16, finish_bf16_d128, Piecewise, Bf16, 128, None, 64, 128, Keys, 1;
            piecewise_backward_bf16_d128_causal, prepare_bf16, finish_bf16_d128, Piecewise, Bf16, 128, Causal, 64, 128, Keys, 1;
            piecewise_backward_bf16_d256, prepare_bf16, finish_bf16_d256, Piecewise, Bf16, 256, None, 64, 64, Gradients, 1;
            piecewise_backward_bf16_d256_causal, prepare_bf16, finish_bf16_d256, Piecewise, Bf16, 256, Causal, 64, 64, Gradients, 1;
        }
    };
}

/// Calls `$apply!` with the rows of the kernels with dropout, as [`backward_variants`] does. Their pre- and postprocess
/// kernels are those without dropout.
#[macro_export]
macro_rules! backward_dropout_variants {
    ($apply:ident) => {
        $apply! {
            backward_f16_d64_dropout, prepare_f16, finish_f16_d64, Forward, F16, 64, None, 64, 128, Keys, 1;
            backward_f16_d64_causal_dropout, prepare_f16, finish_f16_d64, Forward, F16, 64, Causal, 64, 128, Keys, 1;
            backward_f16_d128_dropout, prepare_f16, finish_f16_d128, Forward, F16, 128, None, 64, 128, Keys, 1;
            backward_f16_d128_causal_dropout, prepare_f16, finish_f16_d128, Forward, F16, 128, Causal, 64, 128, Keys, 1;
            backward_f16_d256_dropout, prepare_f16, finish_f16_d256, Forward, F16, 256, None, 64, 64, Gradients, 1;
            backward_f16_d256_causal_dropout, prepare_f16, finish_f16_d256, Forward, F16, 256, Causal, 64, 64, Gradients, 1;
            backward_bf16_d64_dropout, prepare_bf16, finish_bf16_d64, Forward, Bf16, 64, None, 64, 128, Keys, 1;
            backward_bf16_d64_causal_dropout, prepare_bf16, finish_bf16_d64, Forward, Bf16, 64, Causal, 64, 128, Keys, 1;
            backward_bf16_d128_dropout, prepare_bf16, finish_bf16_d128, Forward, Bf16, 128, None, 64, 128, Keys, 1;
            backward_bf16_d128_causal_dropout, prepare_bf16, finish_bf16_d128, Forward, Bf16, 128, Causal, 64, 128, Keys, 1;
            backward_bf16_d256_dropout, prepare_bf16, finish_bf16_d256, Forward, Bf16, 256, None, 64, 64, Gradients, 1;
            backward_bf16_d256_causal_dropout, prepare_bf16, finish_bf16_d256, Forward, Bf16, 256, Causal, 64, 64, Gradients, 1;
        }
    };
}

macro_rules! backward_table {
    ($($symbol:ident, $prepare:ident, $finish:ident, $op:ident, $dtype:ident, $head_dim:literal, $mask:ident,
       $block_m:literal, $block_n:literal, $split:ident, $k_stages:literal;)*) => {
        &[$(
            BackwardVariant {
                symbol: stringify!($symbol),
                prepare: stringify!($prepare),
                finish: stringify!($finish),
                op: Op::$op,
                dtype: Dtype::$dtype,
                head_dim: $head_dim,
                mask: MaskKind::$mask,
                block_m: $block_m,
                block_n: $block_n,
                split: Split::$split,
                k_stages: $k_stages,
            },
        )*]
    };
}
/// All compiled backward variants without dropout.
pub static BACKWARD_VARIANTS: &[BackwardVariant] = backward_variants!(backward_table);
/// All compiled backward variants with dropout.
pub static BACKWARD_DROPOUT_VARIANTS: &[BackwardVariant] = backward_dropout_variants!(backward_table);

#[cfg(test)]
mod tests {
    use super::*;

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
            let variant = backward(Op::Forward, Dtype::Bf16, head_dim, MaskKind::Causal, DropoutKind::None).unwrap();
            let (batch, seqlen_q, seqlen_k) = (32768 / seqlen, seqlen, seqlen);
            let shape = Shape { batch, heads_q, heads_kv: heads_q / 4, seqlen_q, seqlen_k, head_dim };
            assert_eq!(variant.order(&shape, None, 132).section(), section, "{head_dim} {seqlen}");
        }
    }

    /// Sections of exact passes that were measured best on 132 CTAs, heads = 2048 / D and batch = 32768 / S.
    #[test]
    fn exact_sections() {
        for (head_dim, mask, sections) in [
            (64, MaskKind::None, [83, 21, 6]),
            (64, MaskKind::Causal, [66, 44, 16]),
            (128, MaskKind::None, [42, 11, 3]),
            (128, MaskKind::Causal, [66, 22, 16]),
            (256, MaskKind::None, [17, 4, 2]),
            (256, MaskKind::Causal, [33, 8, 4]),
        ] {
            let variant = backward(Op::Forward, Dtype::Bf16, head_dim, mask, DropoutKind::None).unwrap();
            for (seqlen, section) in [1024, 4096, 16384].into_iter().zip(sections) {
                let heads = 2048 / head_dim;
                let (batch, seqlen_q, seqlen_k) = (32768 / seqlen, seqlen, seqlen);
                let shape = Shape { batch, heads_q: heads, heads_kv: heads, seqlen_q, seqlen_k, head_dim };
                assert_eq!(variant.exact_order(&shape, 132).section(), section, "{head_dim} {mask:?} {seqlen}");
            }
        }
    }
}
