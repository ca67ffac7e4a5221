//! Tests of total attention on the CPU executor, against the reference.

#[path = "common/total.rs"]
mod total;

use ferroflash::cases::Case;
use ferroflash::{Attention, Cpu, Dropout, Dtype, Error, Mask, Problem, Tensor, TotalInputs, bf16};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

#[test]
fn named_cases() {
    for (name, case) in total::named() {
        println!("{name}");
        total::pass(&Cpu, &case);
    }
}

/// Returns a configuration with this number of random cases. Cases that once failed are kept next to this file and run
/// first.
fn random(cases: u32) -> ProptestConfig {
    let failure_persistence = Some(Box::new(FileFailurePersistence::WithSource("regressions")) as _);
    ProptestConfig { cases, failure_persistence, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(random(150))]

    #[test]
    fn random_cases_are_within_the_bar(seed: u64) {
        let case = Case::random(seed, 3e7);
        let outcome = case.run_total(&Cpu).unwrap();
        prop_assert!(!outcome.failed(), "{case}\n{outcome}");
    }
}

#[test]
fn weights_add_up() {
    total::weights_add_up(&Cpu);
}

#[test]
fn nan_stays_in_its_head() {
    total::nan_stays_in_its_head(&Cpu);
}

#[test]
fn an_infinite_key_without_weight() {
    total::infinite_key(&Cpu);
}

#[test]
fn padding_is_never_read() {
    total::padding_is_never_read(&Cpu);
}

#[test]
fn same_bits_whatever_the_threads() {
    for (head_dim, mask) in [(64, Mask::Causal), (128, Mask::None), (256, Mask::Causal)] {
        let problem =
            Problem { batch: 2, heads_q: 6, heads_kv: 3, seqlen_q: 300, seqlen_k: 400, head_dim, dtype: Dtype::Bf16 };
        let case = Case::new(problem, mask);
        total::repeats(&Cpu, &case, 2);
        let data = case.total_data::<_, bf16>(&Cpu).unwrap();
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| case.total(&Cpu, &data).unwrap().bits())
        };
        assert!(on(1) == on(3) && on(1) == on(8), "{case}");
    }
}

/// Every mistake is found before anything is written.
#[test]
fn errors_come_before_results() {
    let problem =
        Problem { batch: 1, heads_q: 4, heads_kv: 2, seqlen_q: 10, seqlen_k: 20, head_dim: 16, dtype: Dtype::Bf16 };
    let data = vec![bf16::ONE; 4 * 20 * 16];
    let (q, k) = (Tensor::bhsd(&data[..], problem.q_shape()), Tensor::bhsd(&data[..], problem.kv_shape()));
    let attention = Attention::new(problem);
    let (lse, mut total) = ([0.0; 40], [7.0; 80]);
    let error = |attention: &Attention, q, k, lse: &[f32], total: &mut [f32]| {
        let error = attention.total_attention_into(&Cpu, TotalInputs::new(q, k, lse), total).unwrap_err();
        assert!(error.is_bad_input() && total.iter().all(|&x| x == 7.0), "{error}");
        error.to_string()
    };
    let length = error(&attention, q, k, &lse[1..], &mut total);
    assert_eq!(length, "lse has 39 elements; exactly 40 are needed (batch × heads_q × seqlen_q)");
    let length = error(&attention, q, k, &lse, &mut total[1..]);
    assert_eq!(length, "total has 79 elements; exactly 80 are needed (batch × heads_q × seqlen_k)");
    assert!(error(&attention, q, q, &lse, &mut total).starts_with("k.shape is [1, 4, 10, 16]"));
    let short = Tensor { data: &data[..100], ..q };
    assert!(error(&attention, short, k, &lse, &mut total).starts_with("q has 100 elements"));
    assert!(error(&attention.scale(-1.0), q, k, &lse, &mut total).starts_with("scale is -1"));
    let f16 = Attention::new(Problem { dtype: Dtype::F16, ..problem });
    assert!(error(&f16, q, k, &lse, &mut total).starts_with("the tensors' elements are bf16"));
    // The call that allocates checks first.
    assert!(matches!(attention.total_attention(&Cpu, q, k, &lse[1..]), Err(Error::LseLength { .. })));
    attention.total_attention_into(&Cpu, TotalInputs::new(q, k, &lse), &mut total).unwrap();
    // There are ten queries, each with exp(16 / √16) for every key.
    let expected = 10.0 * 4.0f32.exp();
    assert!(total.iter().all(|&x| (x - expected).abs() < 1e-3), "{total:?}");
}

/// Weights are counted before dropout, and the LSE does not depend on it either.
#[test]
fn dropout_makes_no_difference() {
    let problem =
        Problem { batch: 1, heads_q: 4, heads_kv: 2, seqlen_q: 50, seqlen_k: 70, head_dim: 16, dtype: Dtype::Bf16 };
    let data: Vec<bf16> = (0..4 * 70 * 16).map(|i| bf16::from_f32((i as f32).sin())).collect();
    let (q, k) = (Tensor::bhsd(&data[..], problem.q_shape()), Tensor::bhsd(&data[..], problem.kv_shape()));
    let run = |dropout| {
        let attention = Attention::new(problem).dropout(dropout);
        let out = attention.forward(&Cpu, q, k, k).unwrap();
        let total = attention.total_attention(&Cpu, q, k, out.lse.as_deref().unwrap()).unwrap();
        (out.o, total)
    };
    let (without, with) = (run(Dropout::NONE), run(Dropout { p: 0.5, seed: 3, offset: 0 }));
    assert!(without.0 != with.0);
    assert_eq!(without.1, with.1);
}
