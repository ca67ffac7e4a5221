//! Tests of the gradients against differences of the forward pass, and of what takes no part.

use half::{bf16, f16};
use kernels_gpu::variants::Dtype;

use super::*;
use crate::dropout::Dropout;
use crate::error::{Error, Operand};
use crate::problem::Mask;
use crate::reference::{GradientAccuracy, Rows, forward_f64};

const WINDOW: Mask = Mask::Window { left: Some(1), right: Some(1) };
const SHAPES: [(usize, usize, Mask); 6] = [
    (3, 4, Mask::None),
    (4, 2, Mask::Causal),
    (2, 4, Mask::Causal),
    (2, 0, Mask::None),
    (5, 3, WINDOW),
    (3, 6, WINDOW),
];

const NONE: OptionalInputs<&[f32]> = OptionalInputs::NONE;

fn options(mask: Mask, scale: f32) -> Options {
    Options { mask, scale: Some(scale), ..Options::default() }
}

fn problem(seqlen_q: usize, seqlen_k: usize, heads_q: usize, heads_kv: usize) -> Problem {
    Problem { batch: 2, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim: 8, dtype: Dtype::F16 }
}

/// Returns Q, K, V and dO, and dLSE: multiples of 1/8 from −1 to 1, in an order that a wrong index would change.
fn inputs<E: Element>(problem: &Problem) -> ([Vec<E>; 4], Vec<f32>) {
    let value = |i: usize, step: usize| ((i * step + i * i / 3 + 3) % 17) as f32 / 8.0 - 1.0;
    let (q, kv) = (problem.q_shape(), problem.kv_shape());
    let tensors = [(q, 5), (kv, 7), (kv, 11), (q, 3)]
        .map(|(shape, step)| (0..shape.iter().product()).map(|i| E::from_f32(value(i, step))).collect());
    (tensors, (0..problem.lse_len()).map(|i| value(i, 13)).collect())
}

fn tensors<'a, E>(problem: &Problem, [q, k, v, d_o]: &'a [Vec<E>; 4]) -> [Tensor<&'a [E]>; 4] {
    let (of_q, of_kv) = (problem.q_shape(), problem.kv_shape());
    [Tensor::bhsd(q, of_q), Tensor::bhsd(k, of_kv), Tensor::bhsd(v, of_kv), Tensor::bhsd(d_o, of_q)]
}

fn exact<E: Element>(
    problem: &Problem,
    mask: Mask,
    scale: f32,
    [q, k, v, d_o]: [Tensor<&[E]>; 4],
    d_lse: Option<&[f32]>,
) -> Result<Backward> {
    backward_f64(problem, &options(mask, scale), Scores::plain(q, k), [v, d_o], NONE, d_lse)
}

fn plain<E: Element>(
    problem: &Problem,
    mask: Mask,
    scale: f32,
    [q, k, v, d_o]: [Tensor<&[E]>; 4],
    d_lse: Option<&[f32]>,
) -> Result<Backward> {
    backward_plain(problem, &options(mask, scale), Scores::plain(q, k), [v, d_o], NONE, (None, d_lse))
}

/// Compares the gradients with central differences of Σ O∘dO + Σ LSE∘dLSE. The step is exact in f16 when added to
/// any of the values.
#[test]
fn equals_the_differences_of_the_forward() {
    const STEP: f32 = 1.0 / 1024.0;
    for ((m, n, mask), p) in SHAPES.into_iter().flat_map(|shape| [(shape, 0.0), (shape, 0.3)]) {
        let problem = problem(m, n, 4, 2);
        let options = Options { dropout: Dropout { p, seed: 2, offset: 3 }.into(), ..options(mask, 0.7) };
        let (mut inputs, d_lse) = inputs::<f16>(&problem);
        let [q, k, v, d_o] = tensors(&problem, &inputs);
        let scores = Scores::plain(q, k);
        let found = backward_f64(&problem, &options, scores, [v, d_o], NONE, Some(&d_lse)).unwrap();
        let loss = |inputs: &[Vec<f16>; 4]| -> f64 {
            let [q, k, v, _] = tensors(&problem, inputs);
            let forward = forward_f64(&problem, &options, Scores::plain(q, k), v, NONE, &Rows::All).unwrap();
            let of_o: f64 = forward.o.iter().zip(&inputs[3]).map(|(o, g)| o * f64::from(g.to_f32())).sum();
            let lse = forward.lse.iter().zip(&d_lse).filter(|(lse, _)| lse.is_finite());
            of_o + lse.map(|(lse, &g)| lse * f64::from(g)).sum::<f64>()
        };
        for (operand, gradient) in [&found.dq, &found.dk, &found.dv].into_iter().enumerate() {
            assert_eq!(gradient.len(), inputs[operand].len());
            assert!(n == 0 || gradient.iter().any(|x| x.abs() > 0.1));
            for (at, gradient) in gradient.iter().enumerate() {
                let x = inputs[operand][at].to_f32();
                let [above, below] = [x + STEP, x - STEP].map(|x| {
                    inputs[operand][at] = f16::from_f32(x);
                    assert_eq!(inputs[operand][at].to_f32(), x);
                    loss(&inputs)
                });
                inputs[operand][at] = f16::from_f32(x);
                let expected = (above - below) / (2.0 * f64::from(STEP));
                assert!((gradient - expected).abs() < 1e-6, "{m} {n} {operand} {at}: {gradient} not {expected}");
            }
        }
    }
}

#[test]
fn what_takes_no_part_is_zero_and_poisons_nothing() {
    // The first three of five queries attend to no key.
    let dead = problem(5, 2, 2, 1);
    let (mut inputs_dead, mut d_lse_dead) = inputs::<f16>(&dead);
    for row in (0..20).filter(|row| row % 5 < 3) {
        inputs_dead[0][row * 8..][..8].fill(f16::NAN);
        inputs_dead[3][row * 8..][..8].fill(f16::INFINITY);
        d_lse_dead[row] = f32::NAN;
    }
    // Of three queries only the last attends to the last of five keys.
    let hidden = problem(3, 5, 2, 1);
    let (mut inputs_hidden, _) = inputs::<f16>(&hidden);
    for (operand, head) in [(1, 0), (1, 1), (2, 0), (2, 1)] {
        inputs_hidden[operand][(head * 5 + 4) * 8..][..8].fill(f16::NAN);
    }
    for run in [exact::<f16>, plain::<f16>] {
        let found = run(&dead, Mask::Causal, 0.7, tensors(&dead, &inputs_dead), Some(&d_lse_dead)).unwrap();
        assert!((0..20).all(|row| (found.dq[row * 8..][..8] == [0.0; 8]) == (row % 5 < 3)));
        assert!(found.dk.iter().chain(&found.dv).all(|x| x.is_finite()));
        let found = run(&hidden, Mask::Causal, 0.7, tensors(&hidden, &inputs_hidden), None).unwrap();
        assert!(found.dq.iter().enumerate().all(|(at, x)| x.is_nan() == (at / 8 % 3 == 2)));
        // The mask is aligned to the bottom right, so the last query attends to every key. A key has no query only
        // if there are none.
        let unseen = problem(0, 3, 2, 1);
        let found = run(&unseen, Mask::Causal, 0.7, tensors(&unseen, &inputs(&unseen).0), Some(&[])).unwrap();
        assert_eq!(found, Backward { dk: vec![0.0; 48], dv: vec![0.0; 48], ..Backward::default() });
    }
}

#[test]
fn groups_are_sums_of_heads() {
    let (grouped, separate) = (problem(4, 3, 4, 1), problem(4, 3, 4, 4));
    let (inputs, d_lse) = inputs::<f16>(&grouped);
    let [q, k, v, d_o] = tensors(&grouped, &inputs);
    // A stride of 0 repeats the one key head.
    let [k4, v4] = [k, v].map(|x| Tensor::strided(x.data, separate.kv_shape(), [24, 0, 8]));
    let found = exact(&grouped, Mask::Causal, 0.7, [q, k, v, d_o], Some(&d_lse)).unwrap();
    let heads = exact(&separate, Mask::Causal, 0.7, [q, k4, v4, d_o], Some(&d_lse)).unwrap();
    assert_eq!(found.dq, heads.dq);
    for (found, heads) in [(&found.dk, &heads.dk), (&found.dv, &heads.dv)] {
        for (at, x) in found.iter().enumerate() {
            let sum: f64 = (0..4).map(|head| heads[(at / 24 * 4 + head) * 24 + at % 24]).sum();
            assert!((x - sum).abs() < 1e-12);
        }
    }
}

#[test]
fn plain_is_close() {
    for (m, n, mask) in SHAPES.into_iter().chain([(70, 90, Mask::Causal)]) {
        let problem = Problem { dtype: Dtype::Bf16, ..problem(m, n, 4, 2) };
        let (inputs, d_lse) = inputs::<bf16>(&problem);
        let [exact, plain] =
            [exact, plain].map(|run| run(&problem, mask, 0.7, tensors(&problem, &inputs), Some(&d_lse)).unwrap());
        let accuracy = GradientAccuracy::of(&plain, &plain, &exact, 1.0);
        assert!(accuracy.passed() && !GradientAccuracy::of(&Backward::default(), &plain, &exact, 1.0).passed());
        for (accuracy, exact) in [(accuracy.dq, &exact.dq), (accuracy.dk, &exact.dk), (accuracy.dv, &exact.dv)] {
            let largest = exact.iter().fold(0.0f64, |a, x| a.max(x.abs()));
            assert!(accuracy.error <= largest / 128.0 && (accuracy.error > 0.0 || n == 0), "{m} {n} {accuracy:?}");
        }
    }
}

/// With one query, dK and dV are products of one dS and one P, which the exact gradients reveal.
#[test]
fn plain_rounds_each_factor_and_product() {
    let problem = Problem { dtype: Dtype::Bf16, ..problem(1, 9, 1, 1) };
    let (inputs, _) = inputs::<bf16>(&problem);
    let [exact, plain] =
        [exact, plain].map(|run| run(&problem, Mask::None, 1.0, tensors(&problem, &inputs), None).unwrap());
    for (exact, plain, x) in [(exact.dk, plain.dk, &inputs[0]), (exact.dv, plain.dv, &inputs[3])] {
        for (at, (exact, plain)) in exact.into_iter().zip(plain).enumerate() {
            let x = x[at / 72 * 8 + at % 8].to_f64();
            let factor = bf16::from_f64(if x == 0.0 { 0.0 } else { exact / x });
            assert_eq!(plain, bf16::from_f64(factor.to_f64() * x).to_f64(), "{at}");
        }
    }
}

/// The O of the inputs changes next to nothing. Another O changes δ, and so only dQ and dK.
#[test]
fn delta_comes_from_the_stored_output() {
    let problem = problem(6, 5, 4, 2);
    let (inputs, d_lse) = inputs::<f16>(&problem);
    let [q, k, v, d_o] = tensors(&problem, &inputs);
    let (options, scores) = (&options(Mask::Causal, 0.7), Scores::plain(q, k));
    let forward = forward_f64(&problem, options, scores, v, NONE, &Rows::All).unwrap();
    let run = |o: Option<&[f16]>| {
        let o = o.map(|o| Tensor::bhsd(o, problem.q_shape()));
        backward_plain(&problem, options, scores, [v, d_o], NONE, (o, Some(&d_lse))).unwrap()
    };
    let o: Vec<f16> = forward.o.iter().map(|&x| f16::from_f64(x)).collect();
    let (without, with, zero) = (run(None), run(Some(&o)), run(Some(&vec![f16::ZERO; o.len()])));
    let differ = |a: &[f64], b: &[f64]| a.iter().zip(b).any(|(a, b)| (a - b).abs() > 0.01);
    assert!(!differ(&with.dq, &without.dq) && !differ(&with.dk, &without.dk));
    assert!(differ(&zero.dq, &without.dq) && differ(&zero.dk, &without.dk));
    assert!(with.dv == without.dv && zero.dv == without.dv);
    let short = Some(Tensor::bhsd(&o[1..], problem.q_shape()));
    let error = backward_plain(&problem, options, scores, [v, d_o], NONE, (short, None)).unwrap_err();
    assert!(error.to_string().starts_with("o has "), "{error}");
}

#[test]
fn what_is_not_there_is_an_error() {
    let problem = problem(3, 3, 2, 2);
    let (inputs, _) = inputs::<f16>(&problem);
    let all = tensors(&problem, &inputs);
    let mut short = all;
    short[3].data = &short[3].data[1..];
    for run in [exact::<f16>, plain::<f16>] {
        assert!(run(&problem, Mask::None, 1.0, short, None).is_err());
        assert!(run(&problem, Mask::None, 0.0, all, None).is_err());
        let length = Error::LseLength { operand: Operand::DLse, len: 11, expected: 12 };
        assert_eq!(run(&problem, Mask::None, 1.0, all, Some(&[0.0; 11])), Err(length));
        let nothing = Problem { batch: usize::MAX >> 33, seqlen_q: 0, seqlen_k: 0, ..problem };
        let none: [Vec<f16>; 4] = Default::default();
        assert_eq!(run(&nothing, Mask::None, 1.0, tensors(&nothing, &none), None), Ok(Backward::default()));
    }
}
