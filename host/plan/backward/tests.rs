use kernels_gpu::variants::Dtype;
use proptest::prelude::*;

use super::*;

const PROBLEM: Problem =
    Problem { batch: 2, heads_q: 6, heads_kv: 2, seqlen_q: 1000, seqlen_k: 300, head_dim: 64, dtype: Dtype::Bf16 };

fn plan(problem: Problem, determinism: Determinism) -> Result<BackwardPlan> {
    BackwardPlan::new(&problem, &Options::default(), determinism, 132)
}

#[test]
fn prints_what_will_run() {
    let plan =
        BackwardPlan::new(&PROBLEM, &Options { mask: Mask::Causal, ..Options::default() }, Determinism::Exact, 5)
            .unwrap();
    let workspace = 12 * 1024 * (4 + 4 + 4 * 64) + 2 * 256 + (4 * 12 * 8_usize).next_multiple_of(256);
    assert_eq!(plan.workspace_bytes(), workspace);
    let smem = plan.smem_bytes();
    assert_eq!(
        plan.to_string(),
        format!(
            "backward bf16: batch 2, heads 6/2, seqlen 1000 × 300, head_dim 64, mask causal, scale 0.125, exact\n\
             kernels prepare_bf16, backward_bf16_d64, finish_bf16_d64: tiles 128 × 128, head_dim 64\n\
             launch: 12 work tiles on 5 CTAs of 384 threads, {smem} bytes of shared memory, {workspace} bytes of \
             workspace"
        )
    );
}

#[test]
fn scale_must_be_finite_and_positive() {
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let error =
            BackwardPlan::new(&PROBLEM, &Options { scale: Some(scale), ..Options::default() }, Determinism::Fast, 1)
                .unwrap_err();
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
    // Without keys, dQ is 0; without queries, dK and dV are. Either way there are zeros to write.
    let no_keys = plan(Problem { seqlen_k: 0, ..PROBLEM }, Determinism::Fast).unwrap();
    assert_eq!((no_keys.prepare_grid(), no_keys.grid(), no_keys.finish_grid()), (12 * 1024 / 128, 0, 12 * 16));
    let no_queries = plan(Problem { seqlen_q: 0, ..PROBLEM }, Determinism::Fast).unwrap();
    assert_eq!((no_queries.prepare_grid(), no_queries.grid(), no_queries.finish_grid()), (12, 12, 0));
}

#[test]
fn shares_what_the_last_round_leaves() {
    // 2 batch items, 2 key heads and 3 blocks of keys: 12 work tiles, each of 3 heads with 8 query blocks.
    let on = |mask, determinism, sm_count| {
        BackwardPlan::new(&PROBLEM, &Options { mask, ..Options::default() }, determinism, sm_count).unwrap()
    };
    let fast = |sm_count| on(Mask::None, Determinism::Fast, sm_count);
    let whole = 12 * 1024 * (4 + 4 + 4 * 64) + 2 * 256;
    for (sm_count, shared, first_head, parts, grid) in
        [(132, 12, 0, 8, 96), (31, 12, 0, 2, 24), (10, 2, 3, 5, 10), (5, 2, 3, 2, 5), (11, 1, 3, 8, 11)]
    {
        let plan = fast(sm_count);
        assert_eq!((plan.shared(), plan.sharing.parts.value), ((shared, first_head), parts), "{plan}");
        assert_eq!((plan.grid(), plan.finish_grid()), (grid, 12 * 16 + shared * 4));
        assert_eq!(plan.workspace_bytes(), whole + (shared * parts * 2 * 128 * 64 * 4) as usize);
        assert!(plan.to_string().contains(&format!(", the last {shared} in {parts} parts each, on {grid} CTAs")));
    }
    let (causal, exact) = (on(Mask::Causal, Determinism::Fast, 10), on(Mask::None, Determinism::Exact, 10));
    let piecewise =
        BackwardPlan::new(&PROBLEM, &Options { dist_threshold: Some(5), ..Options::default() }, Determinism::Fast, 10)
            .unwrap();
    for plan in [fast(12), fast(23), fast(6), fast(7), causal, exact, piecewise] {
        assert_eq!(
            (plan.shared(), plan.sharing),
            ((0, u32::MAX), Sharing::none(12, plan.grid(), 3, 1000_u32.div_ceil(plan.variant().block_m))),
            "{plan}"
        );
        assert_eq!((plan.grid(), plan.finish_grid()), (plan.work_tiles().min(plan.grid()), 12 * 16));
    }
}

/// Ten times the queries need at most ten times the bytes, for any number of keys.
#[test]
fn the_workspace_is_linear() {
    let bytes = |seqlen_q, seqlen_k, determinism| {
        plan(Problem { seqlen_q, seqlen_k, ..PROBLEM }, determinism).unwrap().workspace_bytes()
    };
    for determinism in [Determinism::Fast, Determinism::Exact] {
        // Parts of work tiles come in addition; there are at most as many as CTAs.
        let parts = 132 * 2 * 128 * 64 * 4;
        assert!(bytes(1 << 20, 1 << 20, determinism).abs_diff(bytes(1 << 20, 1, determinism)) <= parts);
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
        let plan = BackwardPlan::new(&problem, &Options { mask: Mask::Causal, ..Options::default() }, determinism, sm_count).unwrap();
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
