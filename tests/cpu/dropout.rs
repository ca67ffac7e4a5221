//! Tests of dropout on the CPU executor: its mask, and both passes against the reference.

use ferroflash::cases::Case;
use ferroflash::reference::Rows;
use ferroflash::{
    Attention, BackwardInputs, Cpu, Determinism, Dropout, Dtype, Error, Gradients, Inputs, Mask, OptionalInputs, Pair,
    Piecewise, PlanDropout, Plans, Problem, Tensor, bf16, dropout_mask,
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
        prop_assert!(!outcome.failed(), "{case}\n{outcome:#?}");
        let outcome = case.run_backward(&Cpu, Determinism::Fast).unwrap();
        prop_assert!(!outcome.failed(), "{case}\n{outcome}");
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

/// Seed and offset in memory give the bits of the same fixed numbers, in both passes of plain and piecewise attention.
#[test]
fn numbers_may_lie_in_memory() {
    let case = Case { seed: 1, ..Case::new(PROBLEM, Mask::Causal) };
    let data = case.backward_data::<_, bf16>(&Cpu).unwrap();
    let [q, k, v] = case.tensors(&data.inputs);
    let (o, d_o) = (Tensor::bhsd(&data.o[..], PROBLEM.q_shape()), Tensor::bhsd(&data.d_o[..], PROBLEM.q_shape()));
    let far = Pair { q: d_o, k: v };
    let run = |dropout: PlanDropout, numbers: Option<&[u64]>, piecewise: bool| -> [Vec<bf16>; 6] {
        let attention = Attention::new(PROBLEM).mask(Mask::Causal).dropout(dropout);
        let mut inputs = Inputs::new(q, k, v);
        if piecewise {
            inputs = Inputs::piecewise(Pair { q, k }, far, v);
        }
        if let Some(numbers) = numbers {
            inputs = inputs.seed_offset(numbers);
        }
        let backward = inputs.backward(o, d_o, &data.lse[..]);
        if piecewise {
            let piecewise = Piecewise::new(attention, 20);
            let gradients = piecewise.backward(&Cpu, backward, far).unwrap();
            let (Gradients { dq, dk, dv, .. }, Pair { q: dq2, k: dk2 }) = (gradients.first, gradients.second);
            [piecewise.forward_with(&Cpu, inputs).unwrap().o, dq, dk, dv, dq2, dk2]
        } else {
            let Gradients { dq, dk, dv, .. } = attention.backward(&Cpu, backward).unwrap();
            [attention.forward_with(&Cpu, inputs).unwrap().o, dq, dk, dv, vec![], vec![]]
        }
    };
    for piecewise in [false, true] {
        let mut before = None;
        for numbers in [[7, 1 << 33 | 5], [1 << 40 | 7, 5], [u64::MAX, u64::MAX]] {
            let fixed = run(Dropout { p: 0.17, seed: numbers[0], offset: numbers[1] }.into(), None, piecewise);
            let drawn = run(Dropout::from_memory(0.17), Some(&numbers), piecewise);
            assert!(fixed == drawn, "{numbers:?}");
            assert!(before.replace(drawn) != Some(fixed));
        }
        // Nothing is dropped, so that nothing is read; the numbers must be given all the same.
        let none = run(Dropout::NONE.into(), None, piecewise);
        assert!(none == run(Dropout::from_memory(0.0), Some(&[1, 2]), piecewise));
    }
}

#[test]
fn numbers_in_memory_are_given_if_they_are_read() {
    let inputs = Case::new(PROBLEM, Mask::None).inputs::<bf16>().unwrap();
    let [q, k, v] = Case::new(PROBLEM, Mask::None).tensors(&inputs);
    let attention = Attention::new(PROBLEM).dropout(Dropout::from_memory(0.5));
    let plan = attention.plan(1).unwrap();
    assert_eq!(Plans::new().forward(&attention, 1), Ok(plan));
    assert!(plan.to_string().contains("dropout 0.5, seed and offset from memory"), "{plan}");
    let mut o = vec![bf16::NAN; inputs[0].len()];
    let lse = vec![0.0; PROBLEM.lse_len()];
    let mut message = |attention: &Attention, numbers: Option<&[u64]>| {
        let inputs = Inputs::new(q, k, v);
        let inputs = if let Some(numbers) = numbers { inputs.seed_offset(numbers) } else { inputs };
        let o = Tensor::bhsd(&mut o[..], PROBLEM.q_shape());
        let forward = attention.forward_into(&Cpu, inputs, o, None).unwrap_err().to_string();
        let backward = attention.backward(&Cpu, inputs.backward(q, q, &lse[..])).unwrap_err().to_string();
        assert_eq!(forward, backward);
        forward
    };
    let missing = "seed_offset: the call has none; the plan needs seed and offset in memory";
    assert_eq!(message(&attention, None), missing);
    let given = "seed_offset: the call has seed and offset in memory; the plan needs none";
    assert_eq!(message(&Attention::new(PROBLEM), Some(&[1, 2])), given);
    for numbers in [&[][..], &[1], &[1, 2, 3]] {
        let text = format!("seed_offset has {} elements; exactly 2 are needed (seed, offset)", numbers.len());
        assert_eq!(message(&attention, Some(numbers)), text);
    }
    assert_eq!(attention.forward(&Cpu, q, k, v).unwrap_err().to_string(), missing);
    assert!(o.iter().all(|x| x.is_nan()));
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
