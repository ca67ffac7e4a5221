//! Tests of piecewise attention on the CPU executor, against the reference.

use crate::common::piecewise;
use crate::random;
use ferroflash::cases::{Case, PiecewiseCase};
use ferroflash::reference::Rows;
use ferroflash::{
    Attention, Cpu, Determinism, Dropout, Dtype, Error, Op, Options, Pair, Piecewise, Plan, Problem, Tensor, bf16,
};
use proptest::prelude::*;

#[test]
fn named_cases() {
    for case in piecewise::named() {
        piecewise::pass(&Cpu, &case, &Rows::All);
        piecewise::pass_backward(&Cpu, &case, Determinism::Fast);
    }
}

#[test]
fn long_cases() {
    for case in piecewise::long() {
        piecewise::pass(&Cpu, &case, &Rows::sample(case.case.problem.seqlen_q, 40));
    }
}

#[test]
fn becomes_plain() {
    piecewise::becomes_plain(&Cpu);
}

#[test]
fn moves_one_distance() {
    piecewise::moves_one_distance(&Cpu);
}

#[test]
fn exact_gradients_repeat() {
    let case = PiecewiseCase::with_random_threshold(Case::random(3, 1e7), 3);
    let problem = Problem { dtype: Dtype::Bf16, ..case.case.problem };
    piecewise::repeats_backward(&Cpu, &PiecewiseCase { case: Case { problem, ..case.case }, ..case }, 2);
}

#[test]
fn another_threshold_fails() {
    piecewise::another_threshold_fails(&Cpu);
}

proptest! {
    #![proptest_config(random(100))]

    #[test]
    fn random_cases_are_within_the_bar(seed: u64) {
        let case = PiecewiseCase::random(seed, 2e7);
        let outcome = case.run(&Cpu, &Rows::All).unwrap();
        prop_assert!(!outcome.failed(), "{case}\n{outcome:#?}");
    }

    #[test]
    fn random_gradients_are_within_the_bar(seed: u64, exact: bool) {
        let case = PiecewiseCase::random(seed, 1e7);
        let determinism = if exact { Determinism::Exact } else { Determinism::Fast };
        let outcome = case.run_backward(&Cpu, determinism).unwrap();
        prop_assert!(!outcome.failed(), "{case}\n{outcome}");
    }
}

/// A bad second pair is named before anything runs.
#[test]
fn errors_name_the_second_pair() {
    let problem =
        Problem { batch: 1, heads_q: 2, heads_kv: 1, seqlen_q: 10, seqlen_k: 20, head_dim: 16, dtype: Dtype::Bf16 };
    let x = vec![bf16::ONE; 2 * 20 * 16];
    let (q, kv) = (Tensor::bhsd(&x[..], problem.q_shape()), Tensor::bhsd(&x[..], problem.kv_shape()));
    let piecewise = Piecewise::new(Attention::new(problem), 3);
    let first = Pair { q, k: kv };
    let error = |second| piecewise.forward(&Cpu, first, second, kv).unwrap_err().to_string();
    let short = Tensor { data: &x[..10], ..q };
    assert_eq!(error(Pair { q: short, k: kv }), "q2 has 10 elements; its layout needs 320");
    assert!(error(Pair { q: kv, k: kv }).starts_with("q2.shape is [1, 1, 20, 16]; the problem needs [1, 2, 10, 16]"));
    assert!(error(Pair { q, k: q }).starts_with("k2.shape is"));
    let plan = Plan::forward(&problem, &Options { dist_threshold: Some(3), ..Options::default() }, 1).unwrap();
    assert_eq!(plan.dist_threshold(), Some(3));
    assert!(plan.to_string().contains("piecewise bf16: batch 1") && plan.to_string().contains("dist_threshold 3"));
    let missing = Error::SecondPair { op: Op::Piecewise, given: false }.to_string();
    assert_eq!(missing, "second is missing; a plan of piecewise needs a second pair of queries and keys");
}

/// A plan of piecewise attention takes dropout as every plan does.
#[test]
fn dropout_is_checked() {
    let problem =
        Problem { batch: 1, heads_q: 2, heads_kv: 1, seqlen_q: 10, seqlen_k: 20, head_dim: 16, dtype: Dtype::Bf16 };
    let with = |p| Piecewise::new(Attention::new(problem).dropout(Dropout { p, seed: 1, offset: 2 }), 3);
    assert_eq!(with(0.1).plan(1).unwrap().dropout().p(), 0.1);
    assert_eq!(with(0.1).plan_backward(1).unwrap().dropout().p(), 0.1);
    assert_eq!(with(1.0).plan(1), Err(Error::Dropout { value: 1.0 }));
    assert_eq!(with(1.0).plan_backward(1), Err(Error::Dropout { value: 1.0 }));
}
