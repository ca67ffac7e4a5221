//! How a backward pass runs: three kernels and the workspace between them.

use std::fmt;

use kernels_gpu::{
    attention::dropout::Dropout as Launched,
    attention::scheduler::TileOrder,
    variants::{self, BackwardVariant, Op, PREPARE_ROWS, WARPGROUP_ROWS},
};

use super::{Extra, MAX_WORK_TILES, WorkspaceLayout, checked_scale, op, write_problem, write_threshold};
use crate::{
    dropout::{Dropout, kind},
    error::{Error, Result},
    problem::{Mask, Problem, at_most},
};

/// Whether a backward pass gives the same bits every time.
///
/// Every element of dQ is a sum of parts that different work tiles contribute; the order in which they are added up is
/// what decides its last bits. dK and dV are the same bits every time, and so is all that the CPU computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Determinism {
    /// Parts of dQ are added as they come: the last bits of dQ may differ from run to run.
    #[default]
    Fast,
    /// Parts of dQ are added in the order of their keys: the same bits on every run. Slower, for tiles wait for each
    /// other. On a GPU the pass starts once all its CTAs can run at the same time (a cooperative launch), so of two exact
    /// passes on two streams one waits where they don't fit together.
    Exact,
}

impl fmt::Display for Determinism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Determinism::Fast => "fast",
            Determinism::Exact => "exact",
        })
    }
}

/// A validated problem, the kernels for its gradients, their launches and the workspace between them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BackwardPlan {
    problem: Problem,
    mask: Mask,
    scale: f32,
    dist_threshold: Option<i32>,
    dropout: Dropout,
    /// What the main kernel gets of it; `None` where nothing is dropped.
    pub(crate) launched: Option<Launched>,
    determinism: Determinism,
    variant: &'static BackwardVariant,
    work_tiles: u32,
    grid: u32,
    /// How CTAs take the work tiles; of no meaning where there are none.
    pub(crate) order: TileOrder,
    /// All zeros where there is nothing to do.
    pub(crate) workspace: WorkspaceLayout,
}

impl BackwardPlan {
    /// Plans a backward pass for a machine with `sm_count` multiprocessors, or threads on the CPU; the default scale is
    /// 1/√head_dim.
    ///
    /// # Errors
    /// Those of [`Problem::validate`]; [`Error::Scale`] for a scale that is not finite and above 0; [`Error::Dropout`] for a
    /// probability that is not at least 0 and below 1; [`Error::NoVariant`]; [`Error::TooLarge`] for 2³¹ work tiles or
    /// more, or for more than 2³¹ query rows of all heads and pairs, each head's rounded up to 128.
    pub fn new(
        problem: &Problem,
        mask: Mask,
        scale: Option<f32>,
        dropout: Dropout,
        determinism: Determinism,
        sm_count: u32,
    ) -> Result<BackwardPlan> {
        Self::plan(problem, mask, scale, Extra { dist_threshold: None, dropout }, determinism, sm_count)
    }

    /// As [`BackwardPlan::new`], for piecewise attention; see [`Plan::piecewise`](super::Plan::piecewise).
    ///
    /// # Errors
    /// Those of [`BackwardPlan::new`].
    pub fn piecewise(
        problem: &Problem,
        mask: Mask,
        scale: Option<f32>,
        dist_threshold: i32,
        determinism: Determinism,
        sm_count: u32,
    ) -> Result<BackwardPlan> {
        Self::plan(
            problem,
            mask,
            scale,
            Extra { dist_threshold: Some(dist_threshold), dropout: Dropout::NONE },
            determinism,
            sm_count,
        )
    }

    fn plan(
        problem: &Problem,
        mask: Mask,
        scale: Option<f32>,
        Extra { dist_threshold, dropout }: Extra,
        determinism: Determinism,
        sm_count: u32,
    ) -> Result<BackwardPlan> {
        let scale = checked_scale(problem, scale)?;
        let launched = dropout.launched()?;
        let (op, head_dim) = (op(dist_threshold), problem.head_dim as u32);
        let variant = variants::backward(op, problem.dtype, head_dim, mask.kind(), kind(&launched))
            .ok_or(Error::NoVariant { dtype: problem.dtype, head_dim: problem.head_dim, mask })?;
        let shape = problem.kernel_shape();
        let key_blocks = problem.seqlen_k.div_ceil(variant.block_n as usize) as u128;
        let work_tiles = problem.batch as u128 * problem.heads_kv as u128 * key_blocks;
        at_most("work_tiles", work_tiles, MAX_WORK_TILES)?;
        let work_tiles = work_tiles as u32;
        let exact = determinism == Determinism::Exact;
        let idle = problem.batch == 0 || problem.seqlen_q == 0 && problem.seqlen_k == 0;
        let workspace = if idle { WorkspaceLayout::default() } else { WorkspaceLayout::new(variant, &shape, exact)? };
        let grid = work_tiles.min(sm_count.max(1));
        let order = match determinism {
            _ if work_tiles == 0 => TileOrder::default(),
            Determinism::Fast => variant.order(&shape, dist_threshold, grid),
            Determinism::Exact => variant.exact_order(&shape, grid),
        };
        Ok(BackwardPlan {
            problem: *problem,
            mask,
            scale,
            dist_threshold,
            dropout,
            launched,
            determinism,
            variant,
            work_tiles,
            grid,
            order,
            workspace,
        })
    }

    /// The problem, validated.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// Which keys a query sees.
    pub fn mask(&self) -> Mask {
        self.mask
    }

    /// The factor of the scores, finite and above 0.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// The distance from which on scores come from the second pair of Q and K; `None` where there is one pair.
    pub fn dist_threshold(&self) -> Option<i32> {
        self.dist_threshold
    }

    /// Which weights are dropped.
    pub fn dropout(&self) -> Dropout {
        self.dropout
    }

    /// Whether dQ is the same bits every time.
    pub fn determinism(&self) -> Determinism {
        self.determinism
    }

    /// The kernels.
    pub fn variant(&self) -> &'static BackwardVariant {
        self.variant
    }

    /// Work tiles of the main kernel: blocks of keys of each batch item and key head. 0 where there is no key.
    pub fn work_tiles(&self) -> u32 {
        self.work_tiles
    }

    /// Work tiles of one key head.
    pub(crate) fn key_blocks(&self) -> u32 {
        (self.problem.seqlen_k as u32).div_ceil(self.variant.block_n)
    }

    /// CTAs of the main kernel's persistent grid. 0 where there is nothing to launch.
    pub fn grid(&self) -> u32 {
        self.grid
    }

    /// Threads of a CTA of the main kernel.
    pub fn block(&self) -> u32 {
        self.variant.threads()
    }

    /// Dynamic shared memory of a CTA of the main kernel, in bytes.
    pub fn smem_bytes(&self) -> u32 {
        self.variant.smem().bytes()
    }

    /// Memory that the kernels need beside the tensors, in bytes: linear in seqlen_q. It starts at a multiple of 256.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace.bytes
    }

    /// CTAs of the kernel that prepares the workspace. 0 where there is nothing to do at all.
    pub fn prepare_grid(&self) -> u32 {
        self.workspace_rows().div_ceil(PREPARE_ROWS)
    }

    /// CTAs of the kernel that turns the workspace's dQ into the tensor, one for 64 rows. 0 where there is no query.
    pub fn finish_grid(&self) -> u32 {
        if self.problem.seqlen_q == 0 { 0 } else { self.workspace_rows() / WARPGROUP_ROWS }
    }

    /// Query rows of all heads; that they fit was checked with the workspace's layout.
    fn workspace_rows(&self) -> u32 {
        match self.workspace.rows {
            0 => 0,
            rows => self.problem.batch as u32 * self.problem.heads_q as u32 * rows,
        }
    }
}

impl fmt::Display for BackwardPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pass = match self.variant.op {
            Op::Forward => "backward",
            Op::Piecewise => "piecewise backward",
        };
        let BackwardVariant { symbol, prepare, finish, head_dim, block_m, block_n, .. } = self.variant;
        write_problem(f, pass, &self.problem, self.mask, self.scale, self.dropout)?;
        write_threshold(f, self.dist_threshold)?;
        writeln!(f, ", {}", self.determinism)?;
        writeln!(f, "kernels {prepare}, {symbol}, {finish}: tiles {block_m} × {block_n}, head_dim {head_dim}")?;
        write!(
            f,
            "launch: {} work tiles on {} CTAs of {} threads, {} bytes of shared memory, {} bytes of workspace",
            self.work_tiles,
            self.grid,
            self.block(),
            self.smem_bytes(),
            self.workspace_bytes(),
        )
    }
}

#[cfg(test)]
mod tests {
    use kernels_gpu::variants::Dtype;
    use proptest::prelude::*;

    use super::*;

    const PROBLEM: Problem =
        Problem { batch: 2, heads_q: 6, heads_kv: 2, seqlen_q: 1000, seqlen_k: 300, head_dim: 64, dtype: Dtype::Bf16 };

    fn plan(problem: Problem, determinism: Determinism) -> Result<BackwardPlan> {
        BackwardPlan::new(&problem, Mask::None, None, Dropout::NONE, determinism, 132)
    }

    #[test]
    fn prints_what_will_run() {
        let plan = BackwardPlan::new(&PROBLEM, Mask::Causal, None, Dropout::NONE, Determinism::Exact, 5).unwrap();
        let workspace = 12 * 1024 * (4 + 4 + 4 * 64) + 256 + (4 * 12 * 8_usize).next_multiple_of(256);
        assert_eq!(plan.workspace_bytes(), workspace);
        let smem = plan.smem_bytes();
        assert_eq!(
            plan.to_string(),
            format!(
                "backward bf16: batch 2, heads 6/2, seqlen 1000 × 300, head_dim 64, mask causal, scale 0.125, exact\n\
                 kernels prepare_bf16, backward_bf16_d64_causal, finish_bf16_d64: tiles 128 × 128, head_dim 64\n\
                 launch: 12 work tiles on 5 CTAs of 384 threads, {smem} bytes of shared memory, {workspace} bytes of \
                 workspace"
            )
        );
    }

    #[test]
    fn scale_must_be_finite_and_positive() {
        for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            let error =
                BackwardPlan::new(&PROBLEM, Mask::None, Some(scale), Dropout::NONE, Determinism::Fast, 1).unwrap_err();
            assert_eq!(error.to_string(), format!("scale is {scale}; a finite number above 0 is needed"));
        }
    }

    #[test]
    fn counts_have_limits() {
        let many =
            Problem { batch: 1 << 24, heads_q: 1, heads_kv: 1, seqlen_q: 1, seqlen_k: 1 << 14, head_dim: 8, ..PROBLEM };
        assert_eq!(
            plan(many, Determinism::Fast),
            Err(Error::TooLarge { field: "work_tiles", value: 1 << 31, limit: (1 << 31) - 1 })
        );
        assert_eq!(
            plan(Problem { batch: (1 << 24) - 1, ..many }, Determinism::Fast).unwrap().work_tiles(),
            i32::MAX as u32 - 127
        );
        let many = Problem { batch: 1 << 25, seqlen_k: 1, ..many };
        let error = plan(many, Determinism::Fast).unwrap_err();
        assert_eq!(error.to_string(), "workspace_rows is 4294967296; at most 2147483648 is allowed");
        assert!(plan(Problem { heads_q: 5, ..PROBLEM }, Determinism::Fast).is_err());
    }

    #[test]
    fn nothing_to_do_is_nothing_to_launch() {
        for problem in [
            Problem { batch: 0, ..PROBLEM },
            Problem { seqlen_q: 0, seqlen_k: 0, ..PROBLEM },
            Problem { batch: 0, heads_q: 1 << 30, heads_kv: 1, seqlen_q: 1 << 30, ..PROBLEM },
        ] {
            let plan = plan(problem, Determinism::Exact).unwrap();
            assert_eq!((plan.prepare_grid(), plan.grid(), plan.finish_grid()), (0, 0, 0));
            assert_eq!(plan.workspace_bytes(), 0);
        }
        // Without keys dQ is 0, without queries dK and dV are: there are zeros to write.
        let no_keys = plan(Problem { seqlen_k: 0, ..PROBLEM }, Determinism::Fast).unwrap();
        assert_eq!((no_keys.prepare_grid(), no_keys.grid(), no_keys.finish_grid()), (12 * 1024 / 128, 0, 12 * 16));
        let no_queries = plan(Problem { seqlen_q: 0, ..PROBLEM }, Determinism::Fast).unwrap();
        assert_eq!((no_queries.prepare_grid(), no_queries.grid(), no_queries.finish_grid()), (12, 12, 0));
    }

    /// Ten times the queries are at most ten times the bytes, whatever the keys.
    #[test]
    fn the_workspace_is_linear() {
        let bytes = |seqlen_q, seqlen_k, determinism| {
            plan(Problem { seqlen_q, seqlen_k, ..PROBLEM }, determinism).unwrap().workspace_bytes()
        };
        for determinism in [Determinism::Fast, Determinism::Exact] {
            assert_eq!(bytes(1 << 20, 1, determinism), bytes(1 << 20, 1 << 20, determinism));
            assert!(bytes(10 << 20, 1, determinism) <= 10 * bytes(1 << 20, 1, determinism));
        }
    }

    proptest! {
        #[test]
        fn tiles_cover_every_key_once(
            batch in 0..4usize, heads in 1..5usize, seqlen_k in 0..2000usize, d in 1..=32usize, sm_count in 0..200u32,
            exact: bool,
        ) {
            let problem = Problem { batch, heads_q: 2 * heads, heads_kv: heads, seqlen_k, head_dim: 8 * d, ..PROBLEM };
            let determinism = if exact { Determinism::Exact } else { Determinism::Fast };
            let plan = BackwardPlan::new(&problem, Mask::Causal, None, Dropout::NONE, determinism, sm_count).unwrap();
            prop_assert!(plan.variant().head_dim as usize >= problem.head_dim);
            let n_blocks = seqlen_k.div_ceil(plan.variant().block_n as usize);
            prop_assert_eq!(plan.work_tiles() as usize, batch * heads * n_blocks);
            prop_assert_eq!(plan.grid(), plan.work_tiles().min(sm_count.max(1)));
            prop_assert_eq!(plan.key_blocks() as usize, n_blocks);
            if plan.work_tiles() > 0 {
                prop_assert_eq!(plan.order.tiles(), plan.work_tiles());
            }
        }
    }
}
