//! The plan of a forward pass.

use std::fmt;

#[cfg(feature = "cuda")]
use kernels_gpu::ground::constants::Constants;
use kernels_gpu::{
    attention::any_features::AnyFeatures,
    attention::schedule::Blocks,
    attention::scheduler::TileOrder,
    ground::shape::Shape,
    variants::{self, Needed, Variant},
};

use super::{
    InputKinds, ListOf, MAX_WORK_TILES, Options, PassKind, Schedule, Settings, accessors_with_extra, checked_sm_count,
    features, most_blocks,
};
use crate::{
    dropout::PlanDropout,
    error::{Error, Result},
    lengths::Sequences,
    problem::{Mask, Problem, at_most},
};

/// Length of sequences, and number of batch items, for which a kernel is chosen if the host does not know them.
const LONG: usize = 8192;
const MANY: u32 = 64;

/// A validated problem, the kernel for it and its launch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    settings: Settings,
    /// Mask and dropout as launch parameters.
    pub(crate) features: AnyFeatures,
    pub(crate) variant: &'static Variant,
    pub(crate) work_tiles: u32,
    /// Order of the work tiles; meaningless if there are none.
    pub(crate) order: TileOrder,
    pub(crate) grid: u32,
    /// Schedule of sequences, if lengths differ.
    pub(crate) schedule: Option<Schedule>,
}

/// One way to run a problem, with its estimated time.
#[derive(Clone, Copy)]
struct Choice {
    variant: &'static Variant,
    work_tiles: u32,
    grid: u32,
    order: TileOrder,
    /// Estimated time.
    time: u64,
}

accessors_with_extra!(Plan);

impl Plan {
    /// Plans a forward pass for a machine with `sm_count` SMs, or threads on the CPU; 0 counts as 1.
    ///
    /// # Errors
    /// Errors of [`Problem::validate`]; [`Error::Scale`] for a scale that is not finite and above 0, [`Error::Softcap`]
    /// for such a softcap, and [`Error::ScoreFactor`] for two of which f32 holds no quotient; [`Error::Dropout`] for a
    /// probability that is not at least 0 and below 1; [`Error::NoVariant`]; [`Error::TooLarge`] for 2³¹ work tiles or
    /// more, or for an `sm_count` above 2²⁰.
    pub fn forward(problem: &Problem, options: &Options, sm_count: u32) -> Result<Plan> {
        let settings = Settings::new(problem, options)?;
        let sm_count = checked_sm_count(sm_count)?;
        let features = features(&settings)?;
        let shape = problem.kernel_shape();
        let mut best: Option<Choice> = None;
        let needed = Needed { dtype: problem.dtype, head_dim: problem.head_dim as u32, features };
        if let Some(sequences) = options.sequences {
            return Self::of_sequences(settings, features, &sequences, needed, sm_count);
        }
        for variant in variants::forward(needed) {
            let m_blocks = problem.seqlen_q.div_ceil(variant.block_m() as usize) as u128;
            let work_tiles = m_blocks * problem.heads_q as u128 * problem.batch as u128;
            at_most("work_tiles", work_tiles, MAX_WORK_TILES)?;
            let work_tiles = work_tiles as u32;
            // Only whole clusters.
            let grid = work_tiles.min(sm_count / variant.cluster * variant.cluster);
            if variant.cluster > 1 && (grid == 0 || !variant.shares(&shape, &features.mask)) {
                continue;
            }
            let (order, time) =
                if work_tiles == 0 { Default::default() } else { variant.order(&shape, &features.mask, grid) };
            if best.is_none_or(|best| time < best.time) {
                best = Some(Choice { variant, work_tiles, grid, order, time });
            }
        }
        let Some(Choice { variant, work_tiles, grid, order, .. }) = best else {
            return Err(Error::NoVariant { needs: settings.needs(PassKind::Forward) });
        };
        Ok(Plan { settings, features, variant, work_tiles, order, grid, schedule: None })
    }

    /// Plans for sequences of different lengths. The kernel depends on the hint of the longest, and not on the number
    /// of sequences, so that a sequence's bits do not depend on the others.
    fn of_sequences(
        settings: Settings,
        features: AnyFeatures,
        sequences: &Sequences,
        needed: Needed,
        sm_count: u32,
    ) -> Result<Plan> {
        let problem = &settings.problem;
        let shape = problem.kernel_shape();
        let [seqlen_q, seqlen_k] = sequences.longest.unwrap_or([LONG; 2]).map(|len| len.clamp(1, LONG) as u32);
        let alike = Shape { batch: MANY, seqlen_q, seqlen_k, ..shape };
        let time = |variant: &&Variant| variant.order(&alike, &features.mask, sm_count).1;
        let variants = variants::forward(needed).filter(|variant| variant.cluster == 1);
        let Some(variant) = variants.min_by_key(time) else {
            return Err(Error::NoVariant { needs: settings.needs(PassKind::Forward) });
        };
        let section = shape.group();
        let block = variant.block_m();
        let list = ListOf { blocks: Blocks::OfQueries, block, heads: shape.heads_q, section };
        let schedule = Schedule::new(problem, sequences, &[list], 0)?;
        let work_tiles = most_blocks(problem, sequences, &list) as u32 * shape.heads_q;
        let order = TileOrder::of_list(&shape, section);
        let grid = work_tiles.min(sm_count);
        Ok(Plan { settings, features, variant, work_tiles, order, grid, schedule: Some(schedule) })
    }

    /// Returns the specialisation constants of the kernel.
    #[cfg(feature = "cuda")]
    pub(crate) fn constants(&self) -> Constants {
        self.features.constants().with(Constants::LENGTHS, self.schedule.is_some())
    }

    /// Returns the kernel.
    pub fn variant(&self) -> &'static Variant {
        self.variant
    }

    /// Number of work tiles: query tiles of each batch item and head. 0 if there is nothing to do. If lengths differ,
    /// it is the most that there may be.
    pub fn work_tiles(&self) -> u32 {
        self.work_tiles
    }

    /// Number of CTAs in the persistent grid. 0 if there is nothing to launch.
    pub fn grid(&self) -> u32 {
        self.grid
    }

    /// Number of threads per CTA.
    pub fn block(&self) -> u32 {
        self.variant.threads()
    }

    /// Dynamic shared memory per CTA, in bytes.
    pub fn smem_bytes(&self) -> u32 {
        self.variant.smem_bytes()
    }

    /// Memory that the kernels need in addition to the tensors, in bytes: none in a dense batch, and a table and a list
    /// of work tiles if lengths differ. The workspace starts at a multiple of 256.
    pub fn workspace_bytes(&self) -> usize {
        self.schedule.map_or(0, |schedule| schedule.end)
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.settings.write(f, self.variant.op.name())?;
        writeln!(
            f,
            "\nkernel {}: tiles {} × {}, head_dim {}, {} stages",
            self.variant.symbol,
            self.variant.block_m(),
            self.variant.block_n,
            self.variant.head_dim,
            self.variant.stages,
        )?;
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
    use kernels_gpu::attention::scheduler::CtaTiles;
    use kernels_gpu::ground::places::WorkTile;
    use kernels_gpu::variants::Dtype;
    use proptest::prelude::*;

    use super::*;

    const PROBLEM: Problem =
        Problem { batch: 2, heads_q: 6, heads_kv: 2, seqlen_q: 1000, seqlen_k: 300, head_dim: 64, dtype: Dtype::Bf16 };

    fn plan(problem: Problem) -> Result<Plan> {
        Plan::forward(&problem, &Options::default(), 132)
    }

    #[test]
    fn prints_what_will_run() {
        let plan = Plan::forward(&PROBLEM, &Options { mask: Mask::Causal, ..Options::default() }, 132).unwrap();
        let text = plan.to_string();
        for part in [
            "forward bf16: batch 2, heads 6/2, seqlen 1000 × 300, head_dim 64, mask causal, scale 0.125",
            plan.variant().symbol,
            &format!("{} work tiles on {} CTAs of {} threads", plan.work_tiles(), plan.grid(), plan.block()),
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
    }

    #[test]
    fn scale_must_be_finite_and_positive() {
        for scale in [0.0, -0.0, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error = Plan::forward(&PROBLEM, &Options { scale: Some(scale), ..Options::default() }, 1).unwrap_err();
            assert_eq!(error.to_string(), format!("scale is {scale}; a finite number above 0 is needed"));
        }
        assert_eq!(
            Plan::forward(&PROBLEM, &Options { scale: Some(f32::MIN_POSITIVE), ..Options::default() }, 1)
                .unwrap()
                .scale(),
            f32::MIN_POSITIVE
        );
        assert_eq!(plan(Problem { head_dim: 256, ..PROBLEM }).unwrap().scale(), 1.0 / 16.0);
    }

    #[test]
    fn work_tiles_have_a_limit() {
        let most = i32::MAX as usize;
        let many = Problem { batch: most, heads_q: 2, heads_kv: 1, seqlen_q: 1, ..PROBLEM };
        assert_eq!(
            plan(many),
            Err(Error::TooLarge { field: "work_tiles", value: 2 * most as u128, limit: most as u128 })
        );
        assert_eq!(plan(Problem { heads_q: 1, ..many }).unwrap().work_tiles(), most as u32);
    }

    #[test]
    fn nothing_to_do_is_nothing_to_launch() {
        for problem in [Problem { batch: 0, ..PROBLEM }, Problem { seqlen_q: 0, ..PROBLEM }] {
            let plan = plan(problem).unwrap();
            assert_eq!((plan.work_tiles(), plan.grid()), (0, 0));
        }
        // Without keys there are still zeros to write.
        assert!(plan(Problem { seqlen_k: 0, ..PROBLEM }).unwrap().work_tiles() > 0);
    }

    /// Query tiles of 192 rows waste much of a short causal problem, but little of a long one.
    #[test]
    fn tiles_follow_the_shape() {
        let tiles = |seqlen: usize, mask| {
            let problem = Problem { heads_q: 32, heads_kv: 32, seqlen_q: seqlen, seqlen_k: seqlen, ..PROBLEM };
            let problem = Problem { batch: 32768 / seqlen, ..problem };
            Plan::forward(&problem, &Options { mask, ..Options::default() }, 132).unwrap().variant().block_m()
        };
        assert_eq!([1024, 4096, 16384].map(|seqlen| tiles(seqlen, Mask::None)), [192; 3]);
        assert_eq!([1024, 16384].map(|seqlen| tiles(seqlen, Mask::Causal)), [128, 192]);
    }

    /// Smaller blocks of keys fit the edge of a causal mask better, but cost more per score.
    #[test]
    fn blocks_follow_the_shape() {
        let blocks = |seqlen: usize| {
            let problem = Problem { heads_q: 8, heads_kv: 8, seqlen_q: seqlen, seqlen_k: seqlen, ..PROBLEM };
            let problem = Problem { batch: 32768 / seqlen, head_dim: 256, ..problem };
            Plan::forward(&problem, &Options { mask: Mask::Causal, ..Options::default() }, 132)
                .unwrap()
                .variant()
                .block_n
        };
        assert_eq!([512, 1024, 2048, 4096, 16384].map(blocks), [64, 64, 80, 80, 80]);
    }

    /// The CTAs of a cluster have neighbouring work tiles with the same keys. For short problems the start of two CTAs
    /// takes longer than they save.
    #[test]
    fn clusters_share_their_keys() {
        let long = Problem { seqlen_k: 9000, head_dim: 256, ..PROBLEM };
        for (heads_q, heads_kv, seqlen_q, cluster) in
            [(6, 2, 1000, 2), (6, 2, 1100, 1), (4, 2, 1100, 2), (3, 3, 256, 2), (3, 3, 300, 1)]
        {
            let problem = Problem { heads_q, heads_kv, seqlen_q, ..long };
            for (mask, sm_count) in [(Mask::None, 132), (Mask::None, 131), (Mask::None, 1), (Mask::Causal, 132)] {
                let plan = Plan::forward(&problem, &Options { mask, ..Options::default() }, sm_count).unwrap();
                let expected = if sm_count == 1 || mask == Mask::Causal { 1 } else { cluster };
                assert_eq!(plan.variant().cluster, expected, "{plan} {sm_count}");
                if plan.variant().cluster == 1 {
                    continue;
                }
                assert!(plan.grid().is_multiple_of(2) && plan.work_tiles().is_multiple_of(2), "{plan}");
                let tiles: Vec<Vec<_>> =
                    (0..plan.grid()).map(|cta| CtaTiles::new(&plan.order, cta, plan.grid()).collect()).collect();
                for ctas in tiles.chunks_exact(2) {
                    let keys = |tile: &WorkTile| (tile.batch, tile.head as usize / (heads_q / heads_kv));
                    assert!(ctas[0].iter().map(keys).eq(ctas[1].iter().map(keys)), "{plan}");
                }
            }
        }
        assert_eq!(plan(Problem { head_dim: 256, ..PROBLEM }).unwrap().variant().cluster, 1);
    }

    proptest! {
        #[test]
        fn tiles_cover_every_row_once(
            batch in 0..4usize, heads in 1..5usize, seqlen_q in 0..2000usize, d in 1..=32usize, sm_count in 0..200u32,
        ) {
            let problem = Problem { batch, heads_q: heads, heads_kv: heads, seqlen_q, head_dim: 8 * d, ..PROBLEM };
            let plan = Plan::forward(&problem, &Options::default(), sm_count).unwrap();
            prop_assert!(plan.variant().head_dim as usize >= problem.head_dim);
            let m_blocks = seqlen_q.div_ceil(plan.variant().block_m() as usize);
            prop_assert_eq!(plan.work_tiles() as usize, batch * heads * m_blocks);
            let most = sm_count.max(1) / plan.variant().cluster * plan.variant().cluster;
            prop_assert_eq!(plan.grid(), plan.work_tiles().min(most));
            prop_assert_eq!(plan.workspace_bytes(), 0);
        }
    }
}
