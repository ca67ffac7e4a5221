//! The plan of total attention: one kernel, without a workspace.

use std::fmt;

#[cfg(feature = "cuda")]
use kernels_gpu::ground::constants::Constants;
use kernels_gpu::{
    attention::{any_features::AnyFeatures, schedule::Blocks, scheduler::TileOrder, shared_tiles},
    variants::{self, Op, TotalVariant},
};

use super::{
    InputKinds, ListOf, MAX_WORK_TILES, Options, PassKind, Schedule, Settings, Sinks, accessors, checked_sm_count,
    features, most_blocks,
};
use crate::{
    dropout::PlanDropout,
    error::{Error, Result},
    problem::{Mask, Problem, at_most},
};

/// A validated problem, the kernel for its total attention and its launch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TotalPlan {
    settings: Settings,
    /// Mask and scores as launch parameters.
    pub(crate) features: AnyFeatures,
    variant: &'static TotalVariant,
    work_tiles: u32,
    grid: u32,
    /// Order of the work tiles; meaningless if there are none.
    pub(crate) order: TileOrder,
    /// First work tile that is split into parts, one for each consumer.
    pub(crate) shared_from: u32,
    /// Schedule of sequences, if lengths differ.
    pub(crate) schedule: Option<Schedule>,
}

accessors!(TotalPlan);

impl TotalPlan {
    /// Plans total attention for a machine with `sm_count` SMs, or threads on the CPU; 0 counts as 1. The options are
    /// those of the forward pass that gave the LSE. Dropout and sinks make no difference: weights count before dropout,
    /// and sinks enter through the LSE alone.
    ///
    /// # Errors
    /// Errors of [`Plan::forward`](super::Plan::forward). [`Error::NoVariant`] is also the error of options with a
    /// distance, because there is no total attention of two pairs.
    pub fn new(problem: &Problem, options: &Options, sm_count: u32) -> Result<TotalPlan> {
        let options = Options { dropout: PlanDropout::NONE, sinks: Sinks::None, ..*options };
        let settings = Settings::new(problem, &options)?;
        let sm_count = checked_sm_count(sm_count)?;
        let features = features(&settings)?;
        let variant = variants::total(problem.dtype, problem.head_dim as u32)
            .filter(|_| settings.op() == Op::Forward)
            .ok_or_else(|| Error::NoVariant { needs: settings.needs(PassKind::TotalAttention) })?;
        if let Some(sequences) = options.sequences {
            let shape = problem.kernel_shape();
            let (heads, section, block) = (shape.heads_q, shape.group(), variant.block_n());
            let list = ListOf { blocks: Blocks::OfKeys, block, heads, section };
            let schedule = Some(Schedule::new(problem, &sequences, &[list], 0)?);
            let most = most_blocks(problem, &sequences, &list) as u32 * heads;
            let work_tiles = if problem.seqlen_q == 0 { 0 } else { most };
            let (order, grid) = (TileOrder::of_list(&shape, section), work_tiles.min(sm_count));
            let shared_from = work_tiles;
            return Ok(TotalPlan { settings, features, variant, work_tiles, grid, order, shared_from, schedule });
        }
        let n_blocks = problem.seqlen_k.div_ceil(variant.block_n() as usize) as u128;
        let tiles = problem.batch as u128 * problem.heads_q as u128 * n_blocks;
        at_most("work_tiles", tiles, MAX_WORK_TILES)?;
        let work_tiles = if problem.seqlen_q == 0 { 0 } else { tiles as u32 };
        let parts = variant.smem().parts();
        let shared_from = shared_tiles::shared_from(work_tiles, parts, sm_count);
        let grid = shared_tiles::count(work_tiles, shared_from, parts).min(sm_count);
        let order = match work_tiles {
            0 => TileOrder::default(),
            _ => variant.order(&problem.kernel_shape(), &options.mask.window(problem), grid),
        };
        Ok(TotalPlan { settings, features, variant, work_tiles, grid, order, shared_from, schedule: None })
    }

    /// Returns the specialisation constants of the kernel.
    #[cfg(feature = "cuda")]
    pub(crate) fn constants(&self) -> Constants {
        self.features.constants().with(Constants::LENGTHS, self.schedule.is_some())
    }

    /// Memory that the kernels need in addition to the tensors, in bytes; see [`Plan::workspace_bytes`].
    ///
    /// [`Plan::workspace_bytes`]: super::Plan::workspace_bytes
    pub fn workspace_bytes(&self) -> usize {
        self.schedule.map_or(0, |schedule| schedule.end)
    }

    /// Returns the kernel.
    pub fn variant(&self) -> &'static TotalVariant {
        self.variant
    }

    /// Number of work tiles: blocks of keys of each batch item and query head. 0 if there is no key, or no query; the
    /// result is then zeros, which no kernel has to compute.
    pub fn work_tiles(&self) -> u32 {
        self.work_tiles
    }

    /// Number of CTAs in the persistent grid. 0 if there is no kernel to launch.
    pub fn grid(&self) -> u32 {
        self.grid
    }

    /// Number of threads per CTA.
    pub fn block(&self) -> u32 {
        self.variant.threads()
    }

    /// Dynamic shared memory per CTA, in bytes.
    pub fn smem_bytes(&self) -> u32 {
        self.variant.smem().bytes()
    }
}

impl fmt::Display for TotalPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let TotalVariant { symbol, head_dim, block_m, stages, .. } = self.variant;
        let block_n = self.variant.block_n();
        self.settings.write(f, "total attention")?;
        writeln!(f, "\nkernel {symbol}: tiles {block_m} × {block_n}, head_dim {head_dim}, {stages} stages")?;
        write!(
            f,
            "launch: {} work tiles on {} CTAs of {} threads, {} bytes of shared memory",
            self.work_tiles,
            self.grid,
            self.block(),
            self.smem_bytes(),
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

    fn plan(problem: Problem) -> Result<TotalPlan> {
        TotalPlan::new(&problem, &Options::default(), 132)
    }

    #[test]
    fn prints_what_will_run() {
        let plan = TotalPlan::new(&PROBLEM, &Options { mask: Mask::Causal, ..Options::default() }, 5).unwrap();
        let smem = plan.smem_bytes();
        assert_eq!(
            plan.to_string(),
            format!(
                "total attention bf16: batch 2, heads 6/2, seqlen 1000 × 300, head_dim 64, mask causal, scale 0.125\n\
                 kernel total_bf16_d64: tiles 128 × 256, head_dim 64, 6 stages\n\
                 launch: 24 work tiles on 5 CTAs of 640 threads, {smem} bytes of shared memory"
            )
        );
    }

    #[test]
    fn scale_must_be_finite_and_positive() {
        for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            let error = TotalPlan::new(&PROBLEM, &Options { scale: Some(scale), ..Options::default() }, 1).unwrap_err();
            assert_eq!(error.to_string(), format!("scale is {scale}; a finite number above 0 is needed"));
        }
    }

    #[test]
    fn work_tiles_have_a_limit() {
        let most = i32::MAX as usize;
        let many = Problem { batch: most, heads_q: 2, heads_kv: 1, seqlen_q: 1, seqlen_k: 1, ..PROBLEM };
        let error = Error::TooLarge { field: "work_tiles", value: 2 * most as u128, limit: most as u128 };
        assert_eq!(plan(many), Err(error.clone()));
        // The size of the result is limited too, also if no kernel runs.
        assert_eq!(plan(Problem { seqlen_q: 0, ..many }), Err(error));
        assert_eq!(plan(Problem { heads_q: 1, ..many }).unwrap().work_tiles(), most as u32);
    }

    #[test]
    fn nothing_to_compute_is_nothing_to_launch() {
        for problem in
            [Problem { batch: 0, ..PROBLEM }, Problem { seqlen_q: 0, ..PROBLEM }, Problem { seqlen_k: 0, ..PROBLEM }]
        {
            let plan = plan(problem).unwrap();
            assert_eq!((plan.work_tiles(), plan.grid()), (0, 0));
        }
    }

    proptest! {
        #[test]
        fn tiles_cover_every_key_once(
            batch in 0..4usize, heads in 1..5usize, seqlen_k in 0..2000usize, d in 1..=32usize, sm_count in 0..200u32,
        ) {
            let problem = Problem { batch, heads_q: 2 * heads, heads_kv: heads, seqlen_k, head_dim: 8 * d, ..PROBLEM };
            let plan = TotalPlan::new(&problem, &Options { mask: Mask::Causal, ..Options::default() }, sm_count).unwrap();
            prop_assert!(plan.variant().head_dim as usize >= problem.head_dim);
            let n_blocks = seqlen_k.div_ceil(plan.variant().block_n() as usize);
            prop_assert_eq!(plan.work_tiles() as usize, batch * 2 * heads * n_blocks);
            let (tiles, most) = (plan.work_tiles(), sm_count.max(1));
            let taken = shared_tiles::count(tiles, plan.shared_from, plan.variant().smem().parts());
            prop_assert_eq!(plan.grid(), taken.min(most));
            // Whole waves stay unsplit, and splitting the tail adds no wave.
            prop_assert!(plan.shared_from == tiles || plan.shared_from.is_multiple_of(most));
            prop_assert_eq!(taken.div_ceil(most), tiles.div_ceil(most));
            if plan.work_tiles() > 0 {
                prop_assert_eq!(plan.order.tiles(), plan.work_tiles());
            }
        }
    }
}
