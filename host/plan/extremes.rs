//! Plans of the most extreme valid problems. Each is made, or refused by [`Error::TooLarge`], and nothing overflows.

use std::{hint::black_box, panic::catch_unwind};

use kernels_gpu::{attention::scheduler::TileOrder, variants::Dtype};
use proptest::prelude::*;

use super::{BackwardPlan, Determinism, Options, Plan, TotalPlan};
use crate::{
    dropout::{Dropout, PlanDropout},
    error::{Error, Result},
    problem::{Mask, Problem},
};

const MOST: usize = i32::MAX as usize;

/// Generates lengths and numbers of batch items.
fn extent() -> impl Strategy<Value = usize> {
    prop::sample::select(vec![0, 1, 2, 127, 128, 129, 65535, 65536, 65537, 1 << 30, MOST - 128, MOST - 1, MOST])
}

fn problem() -> impl Strategy<Value = Problem> {
    let heads = || prop::sample::select(vec![1, 2, 3, 127, 128, 65535, 65536, 65537, (1 << 30) - 1, 1 << 30, MOST]);
    let head_dim = prop::sample::select(vec![8, 64, 72, 96, 128, 136, 192, 256]);
    (extent(), heads(), heads(), extent(), extent(), head_dim)
        .prop_map(|(batch, heads_kv, group, seqlen_q, seqlen_k, head_dim)| Problem {
            batch,
            heads_q: heads_kv.saturating_mul(group),
            heads_kv,
            seqlen_q,
            seqlen_k,
            head_dim,
            dtype: Dtype::F16,
        })
        .prop_filter("invalid", |problem| problem.validate().is_ok())
}

fn sm_count() -> impl Strategy<Value = u32> {
    prop::sample::select(vec![0, 1, 2, 7, 132, 1 << 20, (1 << 20) + 1, u32::MAX])
}

fn mask() -> impl Strategy<Value = Mask> {
    prop::sample::select(vec![Mask::None, Mask::Causal])
}

fn threshold() -> impl Strategy<Value = i32> {
    prop::sample::select(vec![i32::MIN, i32::MIN + 1, -1, 0, 1, 1 << 30, i32::MAX - 1, i32::MAX])
}

fn determinism() -> impl Strategy<Value = Determinism> {
    prop::sample::select(vec![Determinism::Fast, Determinism::Exact])
}

fn dropout() -> impl Strategy<Value = PlanDropout> {
    let fixed = |p| Dropout { p, seed: u64::MAX, offset: u64::MAX }.into();
    prop::sample::select(vec![fixed(0.0), fixed(0.5), Dropout::from_memory(0.5)])
}

/// Returns the plan, or `None` if one of its numbers is too large.
fn planned<P>(plan: Result<P>) -> Option<P> {
    match plan {
        Ok(plan) => Some(plan),
        Err(Error::TooLarge { value, limit, .. }) if value > limit => None,
        Err(error) => panic!("{error}"),
    }
}

/// Checks the first and the last work tile of an order, and their way back to indices.
fn check_order(order: &TileOrder, tiles: u32) {
    if tiles > 0 {
        assert_eq!(order.tiles(), tiles);
        for index in [0, tiles / 2, tiles - 1] {
            assert_eq!(order.index(&order.tile(index)), index);
        }
    }
}

fn check_forward(plan: Result<Plan>) {
    let Some(plan) = planned(plan) else { return };
    check_order(&plan.order, plan.work_tiles());
    assert!(plan.grid() <= plan.work_tiles());
    assert!(plan.grid() > 0 || plan.work_tiles() == 0);
    plan.to_string();
}

fn check_backward(plan: Result<BackwardPlan>) {
    let Some(plan) = planned(plan) else { return };
    check_order(&plan.order, plan.work_tiles());
    assert!(plan.grid() > 0 || plan.work_tiles() == 0);
    let problem = plan.problem();
    let rows = problem.batch as u128 * problem.heads_q as u128 * problem.seqlen_q as u128;
    assert!(plan.prepare_grid() as u128 * 128 >= rows);
    assert!(plan.finish_grid() as u128 * 64 >= rows);
    assert!(plan.workspace_bytes() as u128 >= 8 * rows);
    plan.workspace.at((plan.workspace_bytes() as u64).wrapping_neg());
    for index in [0, plan.sharing.count / 2, plan.sharing.count.saturating_sub(1)] {
        if plan.work_tiles() > 0 {
            plan.first.tile(&plan.order, index.min(plan.work_tiles() - 1));
        }
    }
    let (shared, _) = plan.shared();
    assert!(shared <= plan.grid());
    plan.to_string();
}

fn check_total(plan: Result<TotalPlan>) {
    let Some(plan) = planned(plan) else { return };
    check_order(&plan.order, plan.work_tiles());
    assert!(plan.grid() > 0 || plan.work_tiles() == 0);
    assert!(plan.shared_from <= plan.work_tiles());
    let problem = plan.problem();
    let len = problem.batch as u128 * problem.heads_q as u128 * problem.seqlen_k as u128;
    assert_eq!(problem.total_len() as u128, len);
    plan.to_string();
}

/// Checks that this build panics on overflow. Without that the tests here would show nothing.
#[test]
fn tests_have_overflow_checks() {
    assert!(catch_unwind(|| black_box(u32::MAX) + black_box(1)).is_err());
}

const PROBLEM: Problem =
    Problem { batch: 1, heads_q: 1, heads_kv: 1, seqlen_q: 1, seqlen_k: 1, head_dim: 64, dtype: Dtype::F16 };

fn fast(problem: &Problem, sm_count: u32) -> Result<BackwardPlan> {
    BackwardPlan::new(problem, &Options::default(), Determinism::Fast, sm_count)
}

/// Problems with more key heads than 32 bits count are valid if no head has anything to do.
#[test]
fn heads_without_work_are_not_counted() {
    let problem = Problem { batch: 1 << 16, heads_q: 1 << 16, heads_kv: 1 << 16, seqlen_q: 0, seqlen_k: 0, ..PROBLEM };
    let plan = fast(&problem, 132).unwrap();
    assert_eq!((plan.prepare_grid(), plan.grid(), plan.finish_grid(), plan.workspace_bytes()), (0, 0, 0, 0));
}

/// The consumers of a CTA count its query blocks in 30 bits.
#[test]
fn query_blocks_of_a_cta_have_a_limit() {
    // 2²³ heads with one query block each, and 128 blocks of keys on one CTA.
    let problem = Problem { batch: 1 << 23, seqlen_k: 128 * 128, head_dim: 8, ..PROBLEM };
    let (limit, field) = ((1 << 30) - 1, "query blocks of a CTA");
    let error = |value| Err(Error::TooLarge { field, value, limit });
    assert_eq!(fast(&problem, 1), error(1 << 30));
    assert_eq!(fast(&problem, 0), error(1 << 30));
    assert!(fast(&Problem { batch: (1 << 23) - 1, ..problem }, 1).is_ok());
    assert!(fast(&problem, 2).is_ok());
    // Each pair counts.
    let piecewise = |sm_count| {
        BackwardPlan::new(
            &problem,
            &Options { mask: Mask::Causal, dist_threshold: Some(0), ..Options::default() },
            Determinism::Exact,
            sm_count,
        )
    };
    assert_eq!(piecewise(2), error(1 << 30));
    assert!(piecewise(3).is_ok());
}

#[test]
fn multiprocessors_have_a_limit() {
    let error = "sm_count is 1048577; at most 1048576 is allowed";
    let many = (1 << 20) + 1;
    assert_eq!(Plan::forward(&PROBLEM, &Options::default(), many).unwrap_err().to_string(), error);
    assert_eq!(fast(&PROBLEM, many).unwrap_err().to_string(), error);
    assert_eq!(TotalPlan::new(&PROBLEM, &Options::default(), many).unwrap_err().to_string(), error);
    assert_eq!(fast(&PROBLEM, 0), fast(&PROBLEM, 1));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn forward(problem in problem(), mask in mask(), dropout in dropout(), sm_count in sm_count()) {
        check_forward(Plan::forward(&problem, &Options { mask, dropout, ..Options::default() }, sm_count));
    }

    #[test]
    fn piecewise(problem in problem(), mask in mask(), threshold in threshold(), sm_count in sm_count()) {
        check_forward(Plan::forward(&problem, &Options { mask, dist_threshold: Some(threshold), ..Options::default() }, sm_count));
    }

    #[test]
    fn backward(
        problem in problem(), mask in mask(), dropout in dropout(), determinism in determinism(),
        sm_count in sm_count(),
    ) {
        check_backward(BackwardPlan::new(&problem, &Options { mask, dropout, ..Options::default() }, determinism, sm_count));
    }

    #[test]
    fn piecewise_backward(
        problem in problem(), mask in mask(), threshold in threshold(), determinism in determinism(),
        sm_count in sm_count(),
    ) {
        check_backward(BackwardPlan::new(&problem, &Options { mask, dist_threshold: Some(threshold), ..Options::default() }, determinism, sm_count));
    }

    #[test]
    fn total(problem in problem(), mask in mask(), sm_count in sm_count()) {
        check_total(TotalPlan::new(&problem, &Options { mask, ..Options::default() }, sm_count));
    }
}
