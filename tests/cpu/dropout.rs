//! Tests of dropout on the CPU executor: its mask, and both passes against the reference.

use ferroflash::cases::Case;
use ferroflash::reference::Rows;
use ferroflash::{
    Attention, BackwardInputs, Cpu, Determinism, Dropout, Dtype, Error, Mask, OptionalInputs, Problem, Tensor, bf16,
    dropout_mask,
};
use proptest::prelude::*;

use super::{common, random};

const PROBLEM: Problem =
    Problem { batch: 2, heads_q: 6, heads_kv: 2, seqlen_q: 133, seqlen_k: 151, head_dim: 64, dtype: Dtype::Bf16 };

#[test]
fn named_cases() {
    for (name, case) in common::dropout::named() {
        println!("{name}");
        common::pass(&Cpu, &case);
        common::pass_backward(&Cpu, &case, Determinism::Fast);
    }
}

proptest! {
    #![proptest_config(random(60))]

    #[test]
    fn random_cases_are_within_the_bar(seed: u64) {
        let case = Case::random_dropout(seed, 1e7);
        let outcome = case.run(&Cpu, &Rows::All).unwrap();
        prop_assert!(outcome.passed(), "{case}\n{outcome:#?}");
        let case = common::shaping::without_softcap(case);
        let outcome = case.run_backward(&Cpu, Determinism::Fast).unwrap();
        prop_assert!(outcome.passed(), "{case}\n{outcome}");
    }
}

/// The kernels use the mask weight by weight, for any tiles.
#[test]
fn the_mask_is_recovered() {
    for (head_dim, mask) in [(64, Mask::None), (128, Mask::Causal), (256, Mask::None), (40, Mask::Causal)] {
        common::dropout::mask_is_recovered(&Cpu, head_dim, mask);
    }
}

/// Every work tile has its own mask, also if a CTA goes on from one to the next. On one thread a few CTAs have many
/// work tiles.
#[test]
fn work_tiles_have_their_own_masks() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    for mask in [Mask::None, Mask::Causal] {
        let case = Case { dropout: 0.5, ..Case::new(PROBLEM, mask) };
        pool.install(|| common::pass(&Cpu, &case));
    }
}

/// A probability that drops nothing changes neither a bit nor the kernel.
#[test]
fn no_dropout_changes_nothing() {
    let case = Case { seed: 1, ..Case::new(PROBLEM, Mask::Causal) };
    let data = case.backward_data::<_, bf16>(&Cpu).unwrap();
    let [q, k, v] = case.tensors(&data.inputs);
    let o = Tensor::bhsd(&data.o[..], PROBLEM.q_shape());
    let run = |attention: Attention| {
        let out = attention.forward(&Cpu, q, k, v).unwrap();
        let d_o = Tensor::bhsd(&data.d_o[..], PROBLEM.q_shape());
        let inputs = BackwardInputs {
            q,
            k,
            v,
            o,
            d_o,
            lse: &data.lse[..],
            d_lse: data.d_lse.as_deref(),
            optional: OptionalInputs::NONE,
        };
        let gradients = attention.backward(&Cpu, inputs).unwrap();
        let symbols =
            (attention.plan(8).unwrap().variant().symbol, attention.plan_backward(8).unwrap().variant().symbol);
        (out, gradients, symbols)
    };
    let without = Attention::new(PROBLEM).mask(Mask::Causal);
    for p in [0.0, -0.0, 1e-13] {
        assert!(run(without) == run(without.dropout(Dropout { p, seed: 3, offset: 4 })), "{p}");
    }
    let with = run(without.dropout(Dropout { p: 0.5, seed: 3, offset: 4 }));
    let (out, gradients, symbols) = run(without);
    assert!(with.0.o != out.o && with.1.dq != gradients.dq && with.1.dk != gradients.dk && with.1.dv != gradients.dv);
    assert!(with.2.0 != symbols.0 && with.2.1 != symbols.1);
    // The LSE is that of the undropped scores and does not depend on the mask by a bit. Without dropout its terms are
    // added in another order. Half of them missing would make it 0.7 less.
    let other = run(Attention::new(PROBLEM).mask(Mask::Causal).dropout(Dropout { p: 0.9, seed: 5, offset: 6 }));
    assert!(with.0.o != other.0.o);
    assert_eq!(with.0.lse, other.0.lse);
    let [with, out] = [with.0.lse, out.lse].map(Option::unwrap);
    assert_eq!(with.len(), out.len());
    assert!(with.iter().zip(&out).all(|(a, b)| a == b || (a - b).abs() < 1e-6), "{with:?}, {out:?}");
}

/// Equal seed and offset give the same mask, and others give another.
#[test]
fn seed_and_offset_choose_the_mask() {
    let inputs = Case::new(PROBLEM, Mask::None).inputs::<bf16>().unwrap();
    let case = Case::new(PROBLEM, Mask::None);
    let [q, k, v] = case.tensors(&inputs);
    let o = |dropout| Attention::new(PROBLEM).dropout(dropout).forward(&Cpu, q, k, v).unwrap().o;
    let dropout = Dropout { p: 0.2, seed: 1, offset: 2 };
    let first = o(dropout);
    assert!(first == o(dropout));
    for other in
        [Dropout { seed: 2, ..dropout }, Dropout { offset: 3, ..dropout }, Dropout { offset: 1 << 40, ..dropout }]
    {
        assert!(first != o(other), "{other:?}");
        assert_ne!(dropout_mask(&PROBLEM, &dropout), dropout_mask(&PROBLEM, &other));
    }
}

#[test]
fn probabilities_out_of_range_are_refused() {
    for value in [-0.1, 1.0, 2.0, f32::INFINITY, f32::NAN] {
        let dropout = Dropout { p: value, seed: 0, offset: 0 };
        let attention = Attention::new(PROBLEM).dropout(dropout);
        let refused = |error: Error| {
            assert!(matches!(error, Error::Dropout { .. }), "{error:?}");
            assert_eq!(error.to_string(), format!("dropout.p is {value}; at least 0 and below 1 is needed"));
        };
        refused(attention.plan(1).unwrap_err());
        refused(attention.plan_backward(1).unwrap_err());
        refused(dropout_mask(&PROBLEM, &dropout).unwrap_err());
        let inputs = Case::new(PROBLEM, Mask::None).inputs::<bf16>().unwrap();
        let [q, k, v] = Case::new(PROBLEM, Mask::None).tensors(&inputs);
        refused(attention.forward(&Cpu, q, k, v).unwrap_err());
    }
}

#[test]
fn plans_say_what_is_dropped() {
    let attention = Attention::new(PROBLEM).dropout(Dropout { p: 0.1, seed: 0, offset: 0 });
    for text in [attention.plan(8).unwrap().to_string(), attention.plan_backward(8).unwrap().to_string()] {
        assert!(
            (text.contains("dropout 0.1\n") || text.contains("dropout 0.1, ")) && text.contains("_dropout"),
            "{text}"
        );
    }
}
