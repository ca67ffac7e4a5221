//! Tests of the kernels on the CPU executor, against the reference.

mod common;
#[path = "cpu/dropout.rs"]
mod dropout;
#[path = "cpu/lengths.rs"]
mod lengths;
#[path = "cpu/piecewise.rs"]
mod piecewise;
#[path = "cpu/shaping.rs"]
mod shaping;

use ferroflash::cases::Case;
use ferroflash::reference::Rows;
use ferroflash::{Cpu, Determinism, Dtype, Mask, Problem, bf16};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

#[test]
fn named_cases() {
    for (name, case) in common::named() {
        println!("{name}");
        common::pass(&Cpu, &case);
    }
}

#[test]
fn named_cases_backward() {
    for (name, case) in common::named_backward() {
        println!("{name}");
        common::pass_backward(&Cpu, &case, Determinism::Fast);
    }
}

/// Returns a configuration with this number of random cases. Cases that once failed are kept next to this file and run
/// first.
pub fn random(cases: u32) -> ProptestConfig {
    let failure_persistence = Some(Box::new(FileFailurePersistence::WithSource("regressions")) as _);
    ProptestConfig { cases, failure_persistence, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(random(100))]

    #[test]
    fn random_gradients_are_within_the_bar(seed: u64, exact: bool) {
        let determinism = if exact { Determinism::Exact } else { Determinism::Fast };
        let case = Case::random(seed, 1e7);
        let outcome = case.run_backward(&Cpu, determinism).unwrap();
        prop_assert!(!outcome.failed(), "{case}\n{outcome}");
    }
}

proptest! {
    #![proptest_config(random(150))]

    #[test]
    fn random_cases_are_within_the_bar(seed: u64) {
        let case = Case::random(seed, 3e7);
        let outcome = case.run(&Cpu, &Rows::All).unwrap();
        prop_assert!(!outcome.failed(), "{case}\n{outcome:#?}");
    }
}

#[test]
fn large_logits() {
    common::large_logits(&Cpu, Mask::None);
    common::large_logits(&Cpu, Mask::Causal);
}

#[test]
fn negative_scores() {
    for (head_dim, mask) in [(64, Mask::None), (64, Mask::Causal), (128, Mask::None), (128, Mask::Causal)] {
        common::negative_scores(&Cpu, head_dim, mask);
    }
}

#[test]
fn nan_stays_in_its_head() {
    common::nan_stays_in_its_head(&Cpu);
}

#[test]
fn padding_is_never_read() {
    common::padding_is_never_read(&Cpu);
}

#[test]
fn same_bits_whatever_the_threads() {
    let case = Case::random(7, 1e7);
    let problem = Problem { dtype: Dtype::Bf16, batch: 2, seqlen_q: 300, seqlen_k: 200, ..case.problem };
    let case = Case { problem, ..case };
    common::repeats(&Cpu, &case, 3);
    let inputs = case.inputs::<bf16>().unwrap();
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        common::bits(&pool.install(|| case.output(&Cpu, &inputs).unwrap()))
    };
    assert!(on(1) == on(3));
}

#[test]
fn nan_gradient_stays_in_its_head() {
    common::nan_gradient_stays_in_its_head(&Cpu);
}

#[test]
fn same_gradients_whatever_the_threads() {
    for (head_dim, mask) in [(64, Mask::Causal), (128, Mask::None), (256, Mask::Causal)] {
        let problem =
            Problem { batch: 2, heads_q: 6, heads_kv: 3, seqlen_q: 300, seqlen_k: 200, head_dim, dtype: Dtype::Bf16 };
        let case = Case { seed: 1, ..Case::new(problem, mask) };
        common::repeats_backward(&Cpu, &case, Determinism::Exact, 2);
        let data = case.backward_data::<_, bf16>(&Cpu).unwrap();
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| case.gradients(&Cpu, &data, Determinism::Fast).unwrap().bits())
        };
        assert!(on(1) == on(3) && on(1) == on(8), "{case}");
    }
}

/// Without optimisation kernels need a large stack, which the caller's threads need not have.
#[test]
fn small_stacks_are_enough() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).stack_size(128 << 10).build().unwrap();
    let problem =
        Problem { batch: 1, heads_q: 2, heads_kv: 1, seqlen_q: 300, seqlen_k: 100, head_dim: 256, dtype: Dtype::Bf16 };
    let case = Case::new(problem, Mask::Causal);
    let data = case.backward_data::<_, bf16>(&Cpu).unwrap();
    pool.install(|| {
        case.output(&Cpu, &data.inputs).unwrap();
        case.gradients(&Cpu, &data, Determinism::Fast).unwrap();
    });
}
