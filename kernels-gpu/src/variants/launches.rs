//! All compiled kernels in one list: their launches, and the families in which they are compiled.

use std::vec::Vec;

use super::{BACKWARD_DROPOUT_VARIANTS, BACKWARD_VARIANTS, DROPOUT_VARIANTS, Op, TOTAL_VARIANTS, VARIANTS};
use crate::ground::constants::{ConstantPlace, Constants};
use crate::params::ROW_KERNEL_THREADS;

/// Kernels that one rustc process compiles, and that one compressed stream holds. `entry` selects them by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    ForwardD128,
    Piecewise,
    ForwardDropout,
    ForwardD256,
    Backward,
    BackwardDropout,
    PiecewiseBackward,
    Total,
}

impl Family {
    /// All families. The one that takes longest to compile is first, so that parallel processes end together.
    pub const ALL: [Family; 8] = [
        Family::ForwardD128,
        Family::Piecewise,
        Family::ForwardDropout,
        Family::ForwardD256,
        Family::Backward,
        Family::BackwardDropout,
        Family::PiecewiseBackward,
        Family::Total,
    ];

    /// Value of the `cfg` with which `entry` compiles this family.
    pub const fn name(self) -> &'static str {
        match self {
            Family::Piecewise => "piecewise",
            Family::ForwardDropout => "forward_dropout",
            Family::ForwardD256 => "forward_d256",
            Family::ForwardD128 => "forward_d128",
            Family::Backward => "backward",
            Family::BackwardDropout => "backward_dropout",
            Family::PiecewiseBackward => "piecewise_backward",
            Family::Total => "total",
        }
    }

    fn forward(op: Op, head_dim: u32) -> Family {
        match (op, head_dim) {
            (Op::Piecewise, _) => Family::Piecewise,
            (Op::Forward, ..=128) => Family::ForwardD128,
            (Op::Forward, _) => Family::ForwardD256,
        }
    }

    fn backward(op: Op) -> Family {
        match op {
            Op::Forward => Family::Backward,
            Op::Piecewise => Family::PiecewiseBackward,
        }
    }
}

/// Facts that the build needs about a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Name of the kernel's entry point.
    pub symbol: &'static str,
    pub family: Family,
    /// Number of threads of a CTA.
    pub threads: u32,
    /// Number of CTAs of a cluster.
    pub cluster: u32,
    /// True if the kernel has a mainloop, with tensor cores, TMA and register reallocation.
    pub mainloop: bool,
    /// Places of its specialisation constants.
    pub constants: Vec<ConstantPlace>,
    /// Combinations of its constants for which the build makes a specialised form. The general one is made in any case.
    pub prebuilt: &'static [Constants],
}

impl Launch {
    /// Returns a kernel without specialisation constants.
    const fn new(symbol: &'static str, family: Family, threads: u32, cluster: u32, mainloop: bool) -> Self {
        Launch { symbol, family, threads, cluster, mainloop, constants: Vec::new(), prebuilt: &[] }
    }
    /// Returns the forms that the build makes: the general one, or the only one of a kernel without constants, then
    /// those of `prebuilt`.
    pub fn forms(&self) -> impl Iterator<Item = Option<Constants>> {
        core::iter::once(None).chain(self.prebuilt.iter().copied().map(Some))
    }
}

/// Lists every kernel, each once.
pub fn launches() -> Vec<Launch> {
    let mainloop = |symbol, family, threads, cluster| Launch::new(symbol, family, threads, cluster, true);
    let forward = VARIANTS.iter().map(|v| (v, Family::forward(v.op, v.head_dim)));
    let dropout = DROPOUT_VARIANTS.iter().map(|v| (v, Family::ForwardDropout));
    let forward = forward.chain(dropout).map(|(v, family)| mainloop(v.symbol, family, v.threads(), v.cluster));
    let backward = BACKWARD_VARIANTS.iter().map(|v| (v, Family::backward(v.op)));
    let dropout = BACKWARD_DROPOUT_VARIANTS.iter().map(|v| (v, Family::BackwardDropout));
    let backward = backward.chain(dropout).map(|(v, family)| mainloop(v.symbol, family, v.threads(), 1));
    let total = TOTAL_VARIANTS.iter().map(|v| mainloop(v.symbol, Family::Total, v.threads(), 1));
    let mut rows: Vec<&str> = BACKWARD_VARIANTS.iter().flat_map(|v| [v.prepare, v.finish]).collect();
    rows.sort_unstable();
    rows.dedup();
    let (family, threads) = (Family::Backward, ROW_KERNEL_THREADS);
    let rows = rows.into_iter().map(|symbol| Launch::new(symbol, family, threads, 1, false));
    forward.chain(backward).chain(total).chain(rows).collect()
}
