//! Tests of sequences of different lengths on the CPU executor.

use ferroflash::cases::{Case, PiecewiseCase};
use ferroflash::reference::Rows;
use ferroflash::{
    Attention, Backend, Cpu, Determinism, Dtype, Error, Inputs, Lengths, Mask, Operand, PackedGradients, Places,
    Problem, Tensor, Workspace, bf16,
};
use proptest::prelude::*;

use super::common::lengths;
use super::{common, random};

#[test]
fn named_cases() {
    for (name, case) in lengths::named() {
        println!("{name}");
        common::shaping::pass_all(&Cpu, &case, Determinism::Fast);
        common::pass_backward(&Cpu, &case, Determinism::Exact);
    }
}

#[test]
fn each_sequence_has_the_bits_of_itself_alone() {
    lengths::alone(&Cpu);
}

#[test]
fn nothing_crosses_from_one_sequence_to_the_next() {
    lengths::nothing_crosses(&Cpu);
}

#[test]
fn rows_of_no_sequence_are_never_read() {
    lengths::gaps_are_never_read(&Cpu);
}

#[test]
fn permutations_permute() {
    lengths::permutations_permute(&Cpu);
}

proptest! {
    #![proptest_config(random(100))]

    #[test]
    fn random_cases_are_within_the_bar(seed: u64, exact: bool) {
        let case = Case::random_lengths(seed, 5e6);
        let outcome = case.run(&Cpu, &Rows::All).unwrap();
        prop_assert!(!outcome.failed(), "{case}\n{outcome:#?}");
        let determinism = if exact { Determinism::Exact } else { Determinism::Fast };
        let outcome = case.run_backward(&Cpu, determinism).unwrap();
        prop_assert!(!outcome.failed(), "{case}\n{outcome}");
        let outcome = case.run_total(&Cpu).unwrap();
        prop_assert!(!outcome.failed(), "{case}\n{outcome}");
    }

    #[test]
    fn random_piecewise_cases_are_within_the_bar(seed: u64, exact: bool) {
        let case = PiecewiseCase::with_random_threshold(Case::random_lengths(seed, 5e6), seed);
        let outcome = case.run(&Cpu, &Rows::All).unwrap();
        prop_assert!(!outcome.failed(), "{case}\n{outcome:#?}");
        let determinism = if exact { Determinism::Exact } else { Determinism::Fast };
        let outcome = case.run_backward(&Cpu, determinism).unwrap();
        prop_assert!(!outcome.failed(), "{case}\n{outcome}");
    }
}

const PROBLEM: Problem =
    Problem { batch: 1, heads_q: 2, heads_kv: 1, seqlen_q: 20, seqlen_k: 30, head_dim: 16, dtype: Dtype::Bf16 };

fn forward(problem: Problem, lengths: Lengths<&[f32]>) -> Result<(), Error> {
    let (q, kv) = (vec![bf16::ONE; 2 * 20 * 16 * problem.batch], vec![bf16::ONE; 30 * 16 * problem.batch]);
    let (q, kv) = (Tensor::bshd(&q[..], problem.q_shape()), Tensor::bshd(&kv[..], problem.kv_shape()));
    Attention::new(problem).forward_with(&Cpu, Inputs::new(q, kv, kv).lengths(lengths)).map(drop)
}

/// Bad lengths are refused by name, before anything runs.
#[test]
fn bad_lengths_are_named() {
    let lengths = |q: &'static [i32], k: &'static [i32]| Lengths::cumulative(2, q, k);
    assert_eq!(forward(PROBLEM, lengths(&[0, 5, 20], &[0, 5, 30])), Ok(()));
    let place = |operand, index, value, least, most| Error::SequencePlace { operand, index, value, least, most };
    let q = Operand::CumulativeQ;
    assert_eq!(forward(PROBLEM, lengths(&[0, 5, 4], &[0, 5, 30])), Err(place(q, 2, 4, 5, 20)));
    assert_eq!(forward(PROBLEM, lengths(&[-3, 5, 6], &[0, 5, 30])), Err(place(q, 0, -3, 0, 20)));
    assert_eq!(forward(PROBLEM, lengths(&[0, 5, 6], &[0, 5, 31])), Err(place(Operand::CumulativeK, 2, 31, 5, 30)));
    let short = Error::LengthsLength { operand: q, len: 2, expected: 3 };
    assert_eq!(forward(PROBLEM, lengths(&[0, 5], &[0, 5, 30])), Err(short));
    let two = Problem { batch: 2, ..PROBLEM };
    assert_eq!(forward(two, lengths(&[0, 5, 20], &[0, 5, 30])), Err(Error::BatchOfSequences { value: 2 }));
    let used = [6, 0];
    let used = lengths(&[0, 5, 20], &[0, 5, 30]).used_keys(&used[..]);
    assert_eq!(forward(PROBLEM, used), Err(place(Operand::LengthsK, 0, 6, 0, 5)));
    assert!(Cpu.check_lengths(&PROBLEM, &used).is_err());
    let (starts, lens) = ([0, 4], [5, 1]);
    let slots = Places::Slots { starts: starts[..].into(), lengths: lens[..].into() };
    let slots = Lengths { q: slots, ..used };
    assert_eq!(forward(PROBLEM, slots), Err(place(Operand::StartsQ, 1, 4, 5, 20)));
}

/// A plan for other lengths than the call's is refused, and so is a missing one.
#[test]
fn lengths_are_those_of_the_plan() {
    let (q, kv) = (vec![bf16::ONE; 2 * 20 * 16], vec![bf16::ONE; 30 * 16]);
    let (q, kv) = (Tensor::bshd(&q[..], PROBLEM.q_shape()), Tensor::bshd(&kv[..], PROBLEM.kv_shape()));
    let plan = Attention::new(PROBLEM).plan(1).unwrap();
    let mut o = vec![bf16::ZERO; 2 * 20 * 16];
    let mut run = |inputs| plan.run(&Cpu, inputs, Tensor::bshd(&mut o[..], PROBLEM.q_shape()), None);
    assert_eq!(run(Inputs::new(q, kv, kv)), Ok(()));
    let cumulative = [0, 5, 20];
    let lengths = Lengths::cumulative(2, &cumulative[..], &cumulative[..]);
    assert!(matches!(run(Inputs::new(q, kv, kv).lengths(lengths)), Err(Error::OptionalInput { .. })));
}

/// Packed gradients have the bits of separate ones, dense and with lengths, and nothing else is written.
#[test]
fn packed_gradients_are_the_separate_ones() {
    for lengths in [false, true] {
        let (heads, head_dim) = (4, 24);
        let problem = Problem {
            batch: 1,
            heads_q: heads,
            heads_kv: heads,
            seqlen_q: 90,
            seqlen_k: 90,
            head_dim,
            dtype: Dtype::Bf16,
        };
        let values = |len: usize, step: usize| -> Vec<bf16> {
            (0..len).map(|i| bf16::from_f32(((i * step) % 1009) as f32 / 300.0 - 1.7)).collect()
        };
        let (x, d_o) = (values(90 * 3 * heads * head_dim, 7919), values(90 * heads * head_dim, 104_729));
        let qkv = Tensor::packed(&x[..], 3, problem.q_shape());
        let [q, k, v] = [0, 1, 2].map(|part| qkv.heads(part * heads..(part + 1) * heads));
        let cumulative = [0, 33, 90];
        let mut inputs = Inputs::new(q, k, v);
        if lengths {
            inputs = inputs.lengths(Lengths::cumulative(2, &cumulative[..], &cumulative[..]));
        }
        let attention = Attention::new(problem).mask(Mask::Causal).determinism(Determinism::Exact);
        let out = attention.forward_with(&Cpu, inputs).unwrap();
        let (o, lse) = (Tensor::bhsd(&out.o[..], problem.q_shape()), out.lse.unwrap());
        let inputs = inputs.backward(o, Tensor::bshd(&d_o[..], problem.q_shape()), &lse[..]);
        let expected = attention.backward(&Cpu, inputs).unwrap();
        let part = |packed: &[bf16], parts: usize, part: usize| -> Vec<bf16> {
            let tensor = Tensor::packed(packed, parts, problem.q_shape()).heads(part * heads..(part + 1) * heads);
            let rows = (0..heads).flat_map(|head| (0..90).map(move |row| (head, row)));
            rows.flat_map(|(head, row)| tensor.data[tensor.layout.offset(0, head, row)..][..head_dim].to_vec())
                .collect()
        };
        let workspace = &mut Workspace::new();
        let mut dqkv = vec![bf16::NAN; x.len()];
        let packed = PackedGradients::qkv(Tensor::packed(&mut dqkv[..], 3, problem.q_shape()));
        attention.backward_packed_into(&Cpu, inputs, packed, workspace).unwrap();
        let found = [0, 1, 2].map(|index| part(&dqkv, 3, index));
        assert!(found == [expected.dq.clone(), expected.dk.clone(), expected.dv.clone()], "{lengths}");
        let (mut dq, mut dkv) = (vec![bf16::NAN; expected.dq.len()], vec![bf16::NAN; 2 * expected.dk.len()]);
        let dq_tensor = Tensor::bhsd(&mut dq[..], problem.q_shape());
        let packed = PackedGradients::kv(dq_tensor, Tensor::packed(&mut dkv[..], 2, problem.kv_shape()));
        attention.backward_packed_into(&Cpu, inputs, packed, workspace).unwrap();
        assert!(dq == expected.dq && [0, 1].map(|index| part(&dkv, 2, index)) == [expected.dk, expected.dv]);
    }
}

/// Packed gradients of other shapes are refused by name.
#[test]
fn packed_gradients_are_checked() {
    let (q, kv) = (vec![bf16::ONE; 2 * 20 * 16], vec![bf16::ONE; 30 * 16]);
    let (q, kv) = (Tensor::bshd(&q[..], PROBLEM.q_shape()), Tensor::bshd(&kv[..], PROBLEM.kv_shape()));
    let attention = Attention::new(PROBLEM);
    let lse = attention.forward(&Cpu, q, kv, kv).unwrap().lse.unwrap();
    let run = |packed| {
        let inputs = Inputs::new(q, kv, kv).backward(q, q, &lse[..]);
        attention.backward_packed_into(&Cpu, inputs, packed, &mut Workspace::new())
    };
    let mut memory = vec![bf16::ONE; 4 * 30 * 16];
    let packed = PackedGradients::qkv(Tensor::bshd(&mut memory[..], [1, 4, 30, 16]));
    assert_eq!(run(packed), Err(Error::PackedLengths { seqlen_q: 20, seqlen_k: 30 }));
    let mut dq = vec![bf16::ONE; 2 * 20 * 16];
    let dq = Tensor::bshd(&mut dq[..], PROBLEM.q_shape());
    let mut others = vec![bf16::ONE; 3 * 30 * 16];
    let error = run(PackedGradients::kv(dq, Tensor::bshd(&mut others[..], [1, 3, 30, 16]))).unwrap_err();
    assert!(error.to_string().starts_with("dkv"), "{error}");
    let qkv = Tensor::packed(&[bf16::ONE; 96][..], 3, [1, 2, 1, 16]);
    assert_eq!((qkv.heads(2..4).data.len(), qkv.heads(5..7).layout.shape), (64, [1, 0, 1, 16]));
}
