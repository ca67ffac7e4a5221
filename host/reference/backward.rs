//! The gradients of attention by their definition: one row of P and of dS at a time, in a precision that is a
//! parameter.
//!
//! With S = scale·Q·Kᵀ and P = softmax(S + mask): dV = Pᵀ·dO, dP = dO·Vᵀ, δᵢ = Σⱼ Pᵢⱼ·dPᵢⱼ − dLSEᵢ, dS = P∘(dP − δ), dQ
//! = scale·dS·K and dK = scale·dSᵀ·Q (FlashAttention-2, arXiv 2307.08691, section 2.2). dLSE enters because ∂LSEᵢ/∂Sᵢⱼ
//! = Pᵢⱼ. With dropout, dV = (P∘Z)ᵀ·dO and dP = (dO·Vᵀ)∘Z, where Z is 0 or 1 / (1 − p). If scores come from two pairs
//! of Q and K, each dSᵢⱼ goes to the pair that Sᵢⱼ came from.

use std::ops::Range;

use crate::element::Element;
use rayon::prelude::*;

use super::forward::{Real, dot, factors, head_rows, live_keys};
use super::scores::{Scores, score};
use crate::backend::Backend;
use crate::dropout::Dropout;
use crate::error::Result;
use crate::operands::{AddressSpace, Check, ForwardInputs, Lines, Pair, Role, Tensors, rows};
use crate::plan::Plan;
use crate::problem::{Mask, Problem};
use crate::tensor::Tensor;

/// Gradients of the inputs, contiguous. If there are two pairs of Q and K, `dq` and `dk` are those of the first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Backward {
    /// (batch, heads_q, seqlen_q, head_dim); 0 for a row without a valid key.
    pub dq: Vec<f64>,
    /// (batch, heads_kv, seqlen_k, head_dim), summed over the query heads of a group.
    pub dk: Vec<f64>,
    /// (batch, heads_kv, seqlen_k, head_dim), summed over the query heads of a group.
    pub dv: Vec<f64>,
    /// dQ and dK of the second pair, if there is one.
    pub second: Option<Pair<Vec<f64>>>,
}

/// Returns the gradients in f64, given the gradient of O, `d_o`, and that of the natural-log LSE, `d_lse`: (batch,
/// heads_q, seqlen_q), contiguous, 0 if there is none. Masked keys take no part, even if they hold NaN or an infinity,
/// and rows without a valid key contribute nothing.
///
/// # Errors
/// Errors of [`Plan::forward`] and of the tensors' shapes.
pub fn backward_f64<E: Element>(
    problem: &Problem,
    mask: Mask,
    scale: f32,
    dropout: &Dropout,
    scores: Scores<Tensor<&[E]>>,
    [v, d_o]: [Tensor<&[E]>; 2],
    d_lse: Option<&[f32]>,
) -> Result<Backward> {
    let plan = Plan::forward(problem, mask, Some(scale), *dropout, 1)?;
    evaluate(&plan, scores, [v, d_o], (None, d_lse), |x: f64| x)
}

/// Returns the gradients in the precision of a kernel, without its tiles. Products of 16-bit operands, softmax, δ and
/// dS are f32. P and dS are rounded to the inputs' dtype before they are multiplied, and the gradients at the end.
///
/// `o` is the stored result of the forward pass if δ is to be computed from it, as a kernel does: δᵢ = dOᵢ·Oᵢ − dLSEᵢ.
/// Its rounding to 16 bits is then in δ too. If P is close to 1 and dP − δ close to 0, that is most of the error of dS.
///
/// # Errors
/// Errors of [`backward_f64`].
pub fn backward_plain<E: Element>(
    problem: &Problem,
    mask: Mask,
    scale: f32,
    dropout: &Dropout,
    scores: Scores<Tensor<&[E]>>,
    [v, d_o]: [Tensor<&[E]>; 2],
    (o, d_lse): (Option<Tensor<&[E]>>, Option<&[f32]>),
) -> Result<Backward> {
    let plan = Plan::forward(problem, mask, Some(scale), *dropout, 1)?;
    evaluate(&plan, scores, [v, d_o], (o, d_lse), |x: f32| E::from_f32(x).to_f32())
}

/// Runs [`row`] over every row, key heads in parallel. `round` rounds P, dS and the gradients.
fn evaluate<E: Element, R: Real>(
    plan: &Plan,
    scores: Scores<Tensor<&[E]>>,
    [v, d_o]: [Tensor<&[E]>; 2],
    (o, d_lse): (Option<Tensor<&[E]>>, Option<&[f32]>),
    round: impl Fn(R) -> R + Sync,
) -> Result<Backward> {
    let problem = plan.problem();
    scores.pairs().try_for_each(|pair| crate::Cpu.check_inputs(plan, &ForwardInputs::plain(pair.q, pair.k, v)))?;
    let mut check = Check::new(problem, AddressSpace::Host);
    o.map_or(Ok(()), |o| check.tensor(rows::O, Role::Input, o).map(drop))?;
    check.tensor(rows::D_O, Role::Input, d_o)?;
    check.optional_line(rows::D_LSE, Role::Input, d_lse)?;
    let mut all = Backward { second: scores.pairs().nth(1).map(|_| Pair::default()), ..Backward::default() };
    if d_o.layout.is_empty() && v.layout.is_empty() {
        return Ok(all);
    }
    let (d, group, scale) = (problem.head_dim, problem.heads_q / problem.heads_kv, R::from_f32(plan.scale()));
    let heads: Vec<_> = (0..problem.batch * problem.heads_kv)
        .into_par_iter()
        .map(|item| {
            let (batch, head_kv) = (item / problem.heads_kv, item % problem.heads_kv);
            let v: Vec<R> = head_rows(&v, batch, head_kv);
            let k: Vec<Vec<R>> = scores.pairs().map(|pair| head_rows(&pair.k, batch, head_kv)).collect();
            let zeros = |rows: usize| vec![R::default(); rows * d];
            let of_pair = |_| Pair { q: zeros(group * problem.seqlen_q), k: zeros(problem.seqlen_k) };
            let mut grads: Vec<Pair<Vec<R>>> = scores.pairs().map(of_pair).collect();
            let mut dv = zeros(problem.seqlen_k);
            for head in head_kv * group..(head_kv + 1) * group {
                let q: Vec<Vec<R>> = scores.pairs().map(|pair| head_rows(&pair.q, batch, head)).collect();
                let d_o: Vec<R> = head_rows(&d_o, batch, head);
                let o: Option<Vec<R>> = o.as_ref().map(|o| head_rows(o, batch, head));
                for i in 0..problem.seqlen_q {
                    let live = live_keys(problem, plan.mask(), i);
                    let z = factors(&plan.features.dropout, batch * problem.heads_q + head, i, live.clone());
                    let at = (batch * problem.heads_q + head) * problem.seqlen_q + i;
                    let d_lse = d_lse.map_or(R::default(), |d_lse| R::from_f32(d_lse[at]));
                    let dq_row = head % group * problem.seqlen_q + i;
                    let pairs = q.iter().zip(&k).zip(&mut grads).zip(scores.keys(problem, i, &live));
                    let parts = pairs.map(|(((q, k), grads), keys)| {
                        let rows = keys.start * d..keys.end * d;
                        let (dq, dk) = (&mut grads.q[dq_row * d..][..d], &mut grads.k[rows.clone()]);
                        let keys = keys.start - live.start..keys.end - live.start;
                        Part { keys, q: &q[i * d..][..d], k: &k[rows], dq, dk }
                    });
                    let o = o.as_ref().map(|o| &o[i * d..][..d]);
                    let rows = live.start * d..live.end * d;
                    let values = [&v[rows.clone()], &d_o[i * d..][..d], &z];
                    row(parts.collect(), values, o, [d_lse, scale], &mut dv[rows], &round);
                }
            }
            // The scale is still missing in dQ and dK.
            grads.iter_mut().flat_map(|Pair { q, k }| q.iter_mut().chain(k)).for_each(|x| *x = round(scale * *x));
            dv.iter_mut().for_each(|x| *x = round(*x));
            (grads, dv)
        })
        .collect();
    for (grads, dv) in heads {
        let second = all.second.as_mut().map(|Pair { q, k }| [q, k]);
        for (to, Pair { q, k }) in [[&mut all.dq, &mut all.dk]].into_iter().chain(second).zip(grads) {
            to.into_iter().zip([q, k]).for_each(|(to, x)| to.extend(x.into_iter().map(Into::into)));
        }
        all.dv.extend(dv.into_iter().map(Into::into));
    }
    Ok(all)
}

/// One pair's part in a query row: the query, the keys whose scores come from the pair, and the gradients of both.
struct Part<'a, R> {
    keys: Range<usize>,
    q: &'a [R],
    k: &'a [R],
    dq: &'a mut [R],
    dk: &'a mut [R],
}

/// Adds the contribution of one query row. V and dV hold its valid keys only, and z the factors of their weights. The
/// scale is still missing in dQ and dK.
fn row<R: Real>(
    parts: Vec<Part<'_, R>>,
    [v, d_o, z]: [&[R]; 3],
    o: Option<&[R]>,
    [d_lse, scale]: [R; 2],
    dv: &mut [R],
    round: impl Fn(R) -> R,
) {
    let d = d_o.len();
    let mut p = vec![R::default(); v.len() / d];
    parts.iter().for_each(|part| score(&mut p[part.keys.clone()], scale, part.q, part.k));
    let m = p.iter().fold(R::NEG_INFINITY, |m, &s| if s > m { s } else { m });
    let mut l = R::default();
    for p in &mut p {
        *p = (*p - m).exp();
        l += *p;
    }
    p.iter_mut().for_each(|p| *p = *p / l);
    let dp: Vec<R> = v.chunks_exact(d).zip(z).map(|(v, &z)| dot(d_o, v) * z).collect();
    let mut delta = R::default();
    match o {
        Some(o) => delta = dot(d_o, o),
        None => p.iter().zip(&dp).for_each(|(&p, &dp)| delta += p * dp),
    }
    let delta = delta - d_lse;
    // to += factor·x.
    let add = |to: &mut [R], factor, x: &[R]| to.iter_mut().zip(x).for_each(|(to, &x)| *to += factor * x);
    for Part { keys, q, k, dq, dk } in parts {
        let of_scores = p[keys.clone()].iter().zip(&dp[keys.clone()]).zip(&z[keys.clone()]);
        let of_values = of_scores.zip(dv[keys.start * d..].chunks_exact_mut(d));
        let of_keys = k.chunks_exact(d).zip(dk.chunks_exact_mut(d));
        for ((((&p, &dp), &z), dv), (k, dk)) in of_values.zip(of_keys) {
            let ds = round(p * (dp - delta));
            add(dv, round(p) * z, d_o);
            add(dk, ds, q);
            add(dq, ds, k);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use kernels_gpu::variants::Dtype;

    use super::*;
    use crate::error::{Error, Operand};
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
        backward_f64(problem, mask, scale, &Dropout::NONE, Scores::plain(q, k), [v, d_o], d_lse)
    }

    fn plain<E: Element>(
        problem: &Problem,
        mask: Mask,
        scale: f32,
        [q, k, v, d_o]: [Tensor<&[E]>; 4],
        d_lse: Option<&[f32]>,
    ) -> Result<Backward> {
        backward_plain(problem, mask, scale, &Dropout::NONE, Scores::plain(q, k), [v, d_o], (None, d_lse))
    }

    /// Compares the gradients with central differences of Σ O∘dO + Σ LSE∘dLSE. The step is exact in f16 when added to
    /// any of the values.
    #[test]
    fn equals_the_differences_of_the_forward() {
        const STEP: f32 = 1.0 / 1024.0;
        for ((m, n, mask), p) in SHAPES.into_iter().flat_map(|shape| [(shape, 0.0), (shape, 0.3)]) {
            let (problem, dropout) = (problem(m, n, 4, 2), Dropout { p, seed: 2, offset: 3 });
            let (mut inputs, d_lse) = inputs::<f16>(&problem);
            let [q, k, v, d_o] = tensors(&problem, &inputs);
            let scores = Scores::plain(q, k);
            let found = backward_f64(&problem, mask, 0.7, &dropout, scores, [v, d_o], Some(&d_lse)).unwrap();
            let loss = |inputs: &[Vec<f16>; 4]| -> f64 {
                let [q, k, v, _] = tensors(&problem, inputs);
                let forward = forward_f64(&problem, mask, 0.7, &dropout, Scores::plain(q, k), v, &Rows::All).unwrap();
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
        let (mask, none, scores) = (Mask::Causal, &Dropout::NONE, Scores::plain(q, k));
        let forward = forward_f64(&problem, mask, 0.7, none, scores, v, &Rows::All).unwrap();
        let run = |o: Option<&[f16]>| {
            let o = o.map(|o| Tensor::bhsd(o, problem.q_shape()));
            backward_plain(&problem, mask, 0.7, none, scores, [v, d_o], (o, Some(&d_lse))).unwrap()
        };
        let o: Vec<f16> = forward.o.iter().map(|&x| f16::from_f64(x)).collect();
        let (without, with, zero) = (run(None), run(Some(&o)), run(Some(&vec![f16::ZERO; o.len()])));
        let differ = |a: &[f64], b: &[f64]| a.iter().zip(b).any(|(a, b)| (a - b).abs() > 0.01);
        assert!(!differ(&with.dq, &without.dq) && !differ(&with.dk, &without.dk));
        assert!(differ(&zero.dq, &without.dq) && differ(&zero.dk, &without.dk));
        assert!(with.dv == without.dv && zero.dv == without.dv);
        let short = Some(Tensor::bhsd(&o[1..], problem.q_shape()));
        let error = backward_plain(&problem, mask, 0.7, none, scores, [v, d_o], (short, None)).unwrap_err();
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
}
