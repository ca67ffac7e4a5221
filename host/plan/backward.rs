//! The plan of a backward pass: three kernels and the workspace between them.

use std::fmt;

#[cfg(feature = "cuda")]
use kernels_gpu::ground::constants::Constants;
use kernels_gpu::{
    attention::{
        any_features::AnyFeatures, first_tiles::FirstTiles, key_parts::Sharing, query_blocks::MAX_QUERY_BLOCKS,
        schedule::Blocks, scheduler::TileOrder,
    },
    ground::shape::Shape,
    variants::{self, BackwardVariant, Needed, Op, PREPARE_ROWS, WARPGROUP_ROWS},
};

use super::{
    InputKinds, ListOf, MAX_WORK_TILES, Options, PassKind, Schedule, Settings, WorkspaceLayout, accessors_with_extra,
    checked_sm_count, features, most_blocks,
};
use crate::{
    dropout::PlanDropout,
    error::{Error, Result},
    lengths::Sequences,
    problem::{Mask, Problem, at_most},
};

/// Choice between the fastest order of dQ's sums and a fixed one.
///
/// Every element of dQ is a sum over several work tiles, and the order of that sum decides its last bits. dK and dV
/// have the same bits every time, and so has every result of the CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Determinism {
    /// Work tiles accumulate into dQ in any order. The last bits of dQ may differ from run to run.
    #[default]
    Fast,
    /// Work tiles accumulate into dQ in the order of their keys, so it has the same bits on every run. This is slower,
    /// because tiles wait for each other. On a GPU the pass starts once all its CTAs can run at the same time (a
    /// cooperative launch). Of two exact passes on two streams, one waits if they do not fit together.
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
    settings: Settings,
    /// Mask and dropout as launch parameters of the main kernel.
    pub(crate) features: AnyFeatures,
    determinism: Determinism,
    variant: &'static BackwardVariant,
    work_tiles: u32,
    /// Order of the work tiles; meaningless if there are none.
    pub(crate) order: TileOrder,
    /// Split of the tail's work tiles along their queries.
    pub(crate) sharing: Sharing,
    /// Work tiles that store dQ instead of accumulating.
    pub(crate) first: FirstTiles,
    /// Layout of the workspace; all zeros if there is nothing to do.
    pub(crate) workspace: WorkspaceLayout,
    /// Schedule of sequences, if lengths differ: the list of query blocks, and that of key blocks.
    pub(crate) schedule: Option<Schedule>,
}

accessors_with_extra!(BackwardPlan);

impl BackwardPlan {
    /// Plans a backward pass for a machine with `sm_count` SMs, or threads on the CPU; 0 counts as 1. The options are
    /// those of the forward pass.
    ///
    /// # Errors
    /// Errors of [`Plan::forward`](super::Plan::forward); [`Error::TooLarge`] for more than 2³¹ query rows of all heads
    /// and pairs, each head's rounded up to 128, for 2³⁰ query blocks or more of one CTA, counted as if there was no
    /// mask, or for an `sm_count` above 2²⁰.
    pub fn new(problem: &Problem, options: &Options, determinism: Determinism, sm_count: u32) -> Result<BackwardPlan> {
        let settings = Settings::new(problem, options)?;
        let dist_threshold = options.dist_threshold;
        let sm_count = checked_sm_count(sm_count)?;
        let features = features(&settings)?;
        let op = settings.op();
        let needed = Needed { dtype: problem.dtype, head_dim: problem.head_dim as u32, features };
        let variant = variants::backward(&needed)
            .ok_or_else(|| Error::NoVariant { needs: settings.needs(PassKind::Backward(determinism)) })?;
        let shape = problem.kernel_shape();
        if let Some(sequences) = options.sequences {
            return Self::of_sequences(settings, features, &sequences, variant, determinism, sm_count);
        }
        let key_blocks = problem.seqlen_k.div_ceil(variant.block_n as usize) as u128;
        let work_tiles = problem.batch as u128 * problem.heads_kv as u128 * key_blocks;
        at_most("work_tiles", work_tiles, MAX_WORK_TILES)?;
        let work_tiles = work_tiles as u32;
        let exact = determinism == Determinism::Exact;
        // All work tiles take equally long if nothing is masked and there is one pair.
        let m_blocks = shape.seqlen_q.div_ceil(variant.block_m).max(1);
        let alike = !features.mask.is_bounded() && features.mask.pairs() == 1;
        let sharing = match determinism {
            Determinism::Fast if alike && shape.seqlen_q > 0 => {
                Sharing::new(work_tiles, sm_count, shape.group(), m_blocks)
            }
            _ => Sharing::none(work_tiles, sm_count, shape.group(), m_blocks),
        };
        let slots = sharing.slots();
        let idle = problem.batch == 0 || problem.seqlen_q == 0 && problem.seqlen_k == 0;
        let workspace =
            if idle { WorkspaceLayout::default() } else { WorkspaceLayout::new(variant, &shape, slots, exact)? };
        // Number of waves of work tiles, and of query blocks in each.
        let rounds = sharing.count.div_ceil(sharing.ctas.max(1)) as u128;
        let blocks = shape.group() as u128 * m_blocks as u128 * op.pairs() as u128;
        at_most("query blocks of a CTA", rounds * blocks, MAX_QUERY_BLOCKS as u128)?;
        let order = match determinism {
            _ if work_tiles == 0 => TileOrder::default(),
            Determinism::Fast => variant.order(&shape, &features.mask, sharing.ctas),
            Determinism::Exact => variant.exact_order(&shape, &features.mask, sharing.ctas),
        };
        let first = match (dist_threshold, features.dropout, determinism) {
            // Without work, nothing has limited the number of key heads.
            _ if idle => FirstTiles::none(0),
            (None, None, Determinism::Fast) => variant.first_tiles(&shape, &features.mask, &order, sharing.ctas),
            _ => FirstTiles::none(shape.batch * shape.heads_kv),
        };
        let schedule = None;
        Ok(BackwardPlan {
            settings,
            features,
            determinism,
            variant,
            work_tiles,
            order,
            sharing,
            first,
            workspace,
            schedule,
        })
    }

    /// Plans for sequences of different lengths. No work tile is split, and all accumulate into dQ.
    fn of_sequences(
        settings: Settings,
        features: AnyFeatures,
        sequences: &Sequences,
        variant: &'static BackwardVariant,
        determinism: Determinism,
        sm_count: u32,
    ) -> Result<BackwardPlan> {
        let problem = &settings.problem;
        let shape = problem.kernel_shape();
        let exact = determinism == Determinism::Exact;
        let queries = ListOf { blocks: Blocks::OfQueries, block: PREPARE_ROWS, heads: shape.heads_q, section: 1 };
        // In an exact pass, blocks of keys of one head wait for each other. With all heads in a section, few of one
        // head run at once.
        let section = if exact { shape.heads_kv } else { 1 };
        let keys = ListOf { blocks: Blocks::OfKeys, block: variant.block_n, heads: shape.heads_kv, section };
        let workspace = WorkspaceLayout::of_sequences(variant, &shape, sequences, exact)?;
        let schedule = Schedule::new(problem, sequences, &[queries, keys], workspace.bytes)?;
        let work_tiles = most_blocks(problem, sequences, &keys) as u32 * shape.heads_kv;
        let m_blocks = shape.seqlen_q.div_ceil(variant.block_m).max(1);
        let sharing = Sharing::none(work_tiles, sm_count, shape.group(), m_blocks);
        let rounds = work_tiles.div_ceil(sharing.ctas.max(1)) as u128;
        let blocks = shape.group() as u128 * m_blocks as u128 * settings.op().pairs() as u128;
        at_most("query blocks of a CTA", rounds * blocks, MAX_QUERY_BLOCKS as u128)?;
        let order = TileOrder::of_list(&Shape { heads_q: shape.heads_kv, ..shape }, section);
        Ok(BackwardPlan {
            settings,
            features,
            determinism,
            variant,
            work_tiles,
            order: if exact { order.one_way() } else { order },
            sharing,
            first: FirstTiles::none(shape.heads_kv),
            workspace,
            schedule: Some(schedule),
        })
    }

    /// Returns the specialisation constants of the main kernel.
    #[cfg(feature = "cuda")]
    pub(crate) fn constants(&self) -> Constants {
        self.features.constants().with(Constants::LENGTHS, self.schedule.is_some())
    }

    /// Plans the same pass for a machine with another number of SMs.
    pub(crate) fn on(&self, sm_count: u32) -> Result<BackwardPlan> {
        Self::new(&self.settings.problem, &self.settings.options, self.determinism, sm_count)
    }

    /// Returns the order of dQ's sums.
    pub fn determinism(&self) -> Determinism {
        self.determinism
    }

    /// Returns the kernels.
    pub fn variant(&self) -> &'static BackwardVariant {
        self.variant
    }

    /// Number of work tiles of the main kernel: blocks of keys of each batch item and key head. 0 if there is no key.
    pub fn work_tiles(&self) -> u32 {
        self.work_tiles
    }

    /// Number of work tiles of one key head.
    pub(crate) fn key_blocks(&self) -> u32 {
        (self.settings.problem.seqlen_k as u32).div_ceil(self.variant.block_n)
    }

    /// Returns the number of split work tiles, and the first key head, of all batch items, that may have one of them.
    pub(crate) fn shared(&self) -> (u32, u32) {
        match self.work_tiles - self.sharing.from {
            0 => (0, u32::MAX),
            shared => (shared, self.order.first_head(self.sharing.from)),
        }
    }

    /// Number of CTAs in the main kernel's persistent grid. 0 if there is nothing to launch.
    pub fn grid(&self) -> u32 {
        self.sharing.ctas
    }

    /// Number of threads per CTA of the main kernel.
    pub fn block(&self) -> u32 {
        self.variant.threads()
    }

    /// Dynamic shared memory per CTA of the main kernel, in bytes.
    pub fn smem_bytes(&self) -> u32 {
        self.variant.smem().bytes()
    }

    /// Size of the workspace in bytes: linear in seqlen_q, plus a constant if some work tiles are split. The workspace
    /// starts at a multiple of 256.
    pub fn workspace_bytes(&self) -> usize {
        self.schedule.map_or(self.workspace.bytes, |schedule| schedule.end)
    }

    /// Number of CTAs of the preprocess kernel. 0 if there is nothing to do at all.
    pub fn prepare_grid(&self) -> u32 {
        if let Some(blocks) = self.listed_blocks() {
            // Keys without queries still get zeros.
            return blocks.max((self.settings.problem.seqlen_k > 0).into());
        }
        self.workspace_rows().div_ceil(PREPARE_ROWS)
    }

    /// Number of CTAs of the postprocess kernel: one for 64 rows of dQ, which it converts to the tensor, and one for 64
    /// rows and columns of dK and dV of split work tiles, which it sums. 0 if there is no query.
    pub fn finish_grid(&self) -> u32 {
        if let Some(blocks) = self.listed_blocks() {
            return blocks * (PREPARE_ROWS / WARPGROUP_ROWS);
        }
        let BackwardVariant { block_n, head_dim, .. } = self.variant;
        let parts = self.shared().0 * 2 * (block_n / WARPGROUP_ROWS) * (head_dim / 64);
        if self.settings.problem.seqlen_q == 0 { 0 } else { self.workspace_rows() / WARPGROUP_ROWS + parts }
    }

    /// Returns the most blocks of queries of all heads, if lengths differ.
    fn listed_blocks(&self) -> Option<u32> {
        let (problem, sequences) = (&self.settings.problem, self.settings.options.sequences?);
        let heads = problem.heads_q as u32;
        let list = ListOf { blocks: Blocks::OfQueries, block: PREPARE_ROWS, heads, section: 1 };
        Some(most_blocks(problem, &sequences, &list) as u32 * heads)
    }

    /// Number of query rows of all heads. The workspace's layout has checked that it fits.
    fn workspace_rows(&self) -> u32 {
        match self.workspace.rows {
            0 => 0,
            rows => self.settings.problem.batch as u32 * self.settings.problem.heads_q as u32 * rows,
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
        self.settings.write(f, pass)?;
        writeln!(f, ", {}", self.determinism)?;
        writeln!(f, "kernels {prepare}, {symbol}, {finish}: tiles {block_m} × {block_n}, head_dim {head_dim}")?;
        write!(f, "launch: {} work tiles", self.work_tiles)?;
        if let (shared @ 1.., _) = self.shared() {
            write!(f, ", the last {shared} in {} parts each,", self.sharing.parts.value)?;
        }
        if self.first.zeroed < self.first.heads {
            write!(f, ", zeros for dQ of the first {} of {} key heads,", self.first.zeroed, self.first.heads)?;
        }
        write!(
            f,
            " on {} CTAs of {} threads, {} bytes of shared memory, {} bytes of workspace",
            self.grid(),
            self.block(),
            self.smem_bytes(),
            self.workspace_bytes(),
        )
    }
}

#[cfg(test)]
mod tests;
