//! Compiled kernels of total attention.

use super::prebuilt;
use crate::attention::mask::{Interval, Window};
use crate::attention::query_blocks::blocks_of;
use crate::attention::scheduler::TileOrder;
use crate::element::Dtype;
use crate::ground::constants::Form;
use crate::ground::shape::Shape;
#[cfg(feature = "cpu")]
use crate::ground::tensor::Strided;
#[cfg(feature = "cpu")]
use crate::params::TotalParams;
use crate::tile::lane::WARPGROUP_THREADS;
use crate::tile::smem_total::TotalSmem;

/// Compiled kernel of total attention.
#[derive(Clone, Copy, Debug)]
pub struct TotalVariant {
    /// Name of the kernel's entry point.
    pub symbol: &'static str,
    pub dtype: Dtype,
    /// Compiled head dim. Tensors with a smaller one use it too; TMA pads them with zeros.
    pub head_dim: u32,
    /// Number of consumer warpgroups of a CTA, which has one producer warpgroup more.
    pub consumers: u32,
    /// Number of queries of one step of the mainloop.
    pub block_m: u32,
    /// Number of slots of the ring that query tiles pass through.
    pub stages: u32,
    /// Forms that are built in advance.
    pub prebuilt: &'static [Form],
    /// Its mainloop on the CPU.
    #[cfg(feature = "cpu")]
    pub run: CpuTotal,
}

/// Runs CTA `.3` of the `.4` of a kernel of total attention, with all its work tiles.
///
/// # Panics
/// If the kernel breaks the pipeline's protocol, with the [`Fault`](crate::cpu::Fault).
///
/// # Safety
/// The parameters describe tensors of the dtype in memory that is valid for reading (Q, K, the LSE) and writing (the
/// result) in all of their shape, which the layout of shared memory holds; nothing else accesses this CTA's elements of
/// the result; the CTA is below their number, which is at most the number of work tiles, with split tiles counted by
/// their parts. There is at least one query.
#[cfg(feature = "cpu")]
pub type CpuTotal = unsafe fn(Dtype, TotalSmem, &TotalParams<Strided>, u32, u32);

impl PartialEq for TotalVariant {
    fn eq(&self, other: &Self) -> bool {
        self.symbol == other.symbol
    }
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
    pub fn order(&self, shape: &Shape, window: &Window, ctas: u32) -> TileOrder {
        let block_n = self.block_n();
        let n_blocks = shape.seqlen_k.div_ceil(block_n);
        // The keys take the place of the queries.
        let keys = Shape { seqlen_q: shape.seqlen_k, ..*shape };
        let q_bytes = 2 * shape.group() as u64 * shape.seqlen_q as u64 * shape.head_dim as u64;
        TileOrder::balanced(&keys, block_n, ctas, q_bytes, |index| {
            let start = (n_blocks - 1 - index) * block_n;
            blocks_of(&shape.sequence(), window, 0, Interval { start, end: start + block_n }, self.block_m).count()
        })
        .0
    }
}

/// Returns the smallest compiled kernel of total attention that holds `head_dim`.
pub fn total(dtype: Dtype, head_dim: u32) -> Option<&'static TotalVariant> {
    TOTAL_VARIANTS.iter().filter(|v| v.dtype == dtype && v.head_dim >= head_dim).min_by_key(|v| v.head_dim)
}

macro_rules! total_table {
    ($($row:ident: {
        head_dim: $head_dim:literal, consumers: $consumers:literal, block_m: $block_m:literal, stages: $stages:literal,
    })*) => {
        &[$(
            total_table!(@row Bf16, "bf16", $row, $head_dim, $consumers, $block_m, $stages),
            total_table!(@row F16, "f16", $row, $head_dim, $consumers, $block_m, $stages),
        )*]
    };
    (@row $dtype:ident, $name:literal, $row:ident, $head_dim:literal, $consumers:literal, $block_m:literal,
     $stages:literal) => {
        TotalVariant {
            symbol: concat!("total_", $name, "_", stringify!($row)),
            dtype: Dtype::$dtype,
            head_dim: $head_dim,
            consumers: $consumers,
            block_m: $block_m,
            stages: $stages,
            prebuilt: prebuilt::MOST,
            #[cfg(feature = "cpu")]
            run: crate::arch::cpu::total_attention::<{ $head_dim / 8 }, { $block_m / 8 }>,
        }
    };
}
/// All compiled kernels of total attention.
pub static TOTAL_VARIANTS: &[TotalVariant] = crate::total_rows!(total_table);
