//! Total attention by its definition: total_j = Σᵢ P_ij, one row of P at a time.

use crate::element::Element;
use rayon::prelude::*;

use super::forward::{Real, head_rows, live_keys, plan};
use super::rule::Rule;
use super::sequences::{rows_of, scatter, sequences};
use crate::dropout::PlanDropout;
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::operands::{AddressSpace, Check, Lines, OptionalInputs, Pass, Role, Tensors, rows};
use crate::plan::Options;
use crate::problem::Problem;
use crate::tensor::Tensor;

/// Computes Σᵢ softmax(S + mask)ᵢⱼ in f64, (batch, heads_q, seqlen_k), contiguous, where S are the scores with softcap
/// and ALiBi. A sink takes its share of the softmax. Rows without a valid key count nothing. Masked keys take no part,
/// even if they hold NaN or an infinity.
///
/// # Errors
/// Errors of [`TotalPlan::new`](crate::TotalPlan::new) and of the tensors' shapes.
pub fn total_f64<E: Element>(
    problem: &Problem,
    options: &Options,
    tensors: [Tensor<&[E]>; 2],
    optional: OptionalInputs<&[f32]>,
) -> Result<Vec<f64>> {
    evaluate(problem, options, tensors, optional, |rule: &Rule<f64>, s, _| {
        rule.softmax(s);
    })
}

/// Computes the same sums in the precision of a kernel, without its tiles. Products of 16-bit inputs, softcap, ALiBi, P
/// = exp(s − LSE) and its sums are f32. `lse` is the LSE that a kernel is given: (batch, heads_q, seqlen_q),
/// contiguous; it has the sinks.
///
/// # Errors
/// Errors of [`total_f64`]; [`Error::LseLength`].
pub fn total_plain<E: Element>(
    problem: &Problem,
    options: &Options,
    tensors: [Tensor<&[E]>; 2],
    optional: OptionalInputs<&[f32]>,
    lse: &[f32],
) -> Result<Vec<f64>> {
    Check::new(problem, AddressSpace::Host).line(rows::LSE, Role::Input, lse)?;
    evaluate(problem, options, tensors, optional, |_: &Rule<f32>, s, row| {
        let lse = lse[row];
        s.iter_mut().for_each(|s| *s = if lse == f32::NEG_INFINITY { 0.0 } else { (*s - lse).exp() });
    })
}

/// Adds up the results of `weights(rule, scores, row)` for each row that has a valid key. It takes the scores of the
/// row's valid keys only, and the row's index in the LSE. Heads run in parallel.
fn evaluate<E: Element, R: Real>(
    problem: &Problem,
    options: &Options,
    [q, k]: [Tensor<&[E]>; 2],
    optional: OptionalInputs<&[f32]>,
    weights: impl Fn(&Rule<R>, &mut [R], usize) + Sync,
) -> Result<Vec<f64>> {
    let plan = plan(problem, &Options { dropout: PlanDropout::NONE, ..*options }, &optional)?;
    let options = plan.options();
    let mut check = Check::new(problem, AddressSpace::Host).of_kinds(optional.kinds());
    check.tensor(rows::Q, Role::Input, q)?;
    check.tensor(rows::K, Role::Input, k)?;
    optional.visit(&mut check)?;
    if k.layout.is_empty() {
        return Ok(Vec::new());
    }
    let Some(sequences) = sequences(problem, options, &optional)? else {
        return evaluate_item(problem, options, [q, k], optional, |rule: &Rule<R>, s, row| weights(rule, s, row));
    };
    let mut total = vec![0.0; problem.total_len()];
    for of in sequences {
        let tensors = [rows_of(&q, &of.q), rows_of(&k, &of.k)];
        let rows = of.q.len().max(1);
        let of_rows = |rule: &Rule<R>, s: &mut [R], row: usize| {
            weights(rule, s, row / rows * problem.seqlen_q + of.q.start + row % rows);
        };
        let found = evaluate_item(&of.problem, &of.options, tensors, of.optional, of_rows)?;
        scatter(&found, &mut total, 1, problem.seqlen_k, &of.k);
    }
    Ok(total)
}

/// Evaluates a dense batch. The inputs have been checked.
fn evaluate_item<E: Element, R: Real>(
    problem: &Problem,
    options: &Options,
    [q, k]: [Tensor<&[E]>; 2],
    optional: OptionalInputs<&[f32]>,
    weights: impl Fn(&Rule<R>, &mut [R], usize) + Sync,
) -> Result<Vec<f64>> {
    let plan = &plan(problem, &Options { dropout: PlanDropout::NONE, ..*options }, &optional)?;
    let (d, group) = (problem.head_dim, problem.heads_q / problem.heads_kv);
    let heads: Vec<Vec<R>> = (0..problem.batch * problem.heads_q)
        .into_par_iter()
        .map(|item| {
            let (batch, head) = (item / problem.heads_q, item % problem.heads_q);
            let rule = Rule::<R>::new(plan, &optional, batch, head);
            let (q, k): (Vec<R>, Vec<R>) = (head_rows(&q, batch, head), head_rows(&k, batch, head / group));
            let mut total = vec![R::default(); problem.seqlen_k];
            for (i, q) in q.chunks_exact(d).enumerate() {
                let live = live_keys(problem, options.mask, i);
                if live.is_empty() {
                    continue;
                }
                let k = &k[live.start * d..live.end * d];
                let mut p: Vec<R> = rule.scores(q, k, i, &live).map(|score| score.value).collect();
                weights(&rule, &mut p, item * problem.seqlen_q + i);
                total[live].iter_mut().zip(p).for_each(|(total, p)| *total += p);
            }
            total
        })
        .collect();
    Ok(heads.into_iter().flatten().map(Into::into).collect())
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use kernels_gpu::variants::Dtype;

    use super::*;
    use crate::problem::Mask;
    use crate::reference::Scores;
    use crate::reference::{Rows, forward_f64};

    fn values(len: usize, step: usize) -> Vec<bf16> {
        (0..len).map(|i| bf16::from_f32(((i * step + 3) % 17) as f32 / 8.0 - 1.0)).collect()
    }

    const NONE: OptionalInputs<&[f32]> = OptionalInputs::NONE;
    const WINDOW: Mask = Mask::Window { left: Some(3), right: Some(1) };

    /// The forward pass gives P·V. If V is one key's unit vector, the sum of its rows is that key's total.
    #[test]
    fn agrees_with_the_forward_pass() {
        for (m, n, mask) in
            [(3, 5, Mask::None), (5, 3, Mask::Causal), (4, 4, Mask::Causal), (2, 7, Mask::Causal), (5, 8, WINDOW)]
        {
            let problem = Problem {
                batch: 2,
                heads_q: 4,
                heads_kv: 2,
                seqlen_q: m,
                seqlen_k: n,
                head_dim: 8,
                dtype: Dtype::Bf16,
            };
            let (q, k) = (values(2 * 4 * m * 8, 5), values(2 * 2 * n * 8, 7));
            let mut v = vec![bf16::ZERO; k.len()];
            for (row, v) in v.chunks_exact_mut(8).enumerate() {
                v[row % n] = bf16::ONE;
            }
            let q = Tensor::bhsd(&q[..], problem.q_shape());
            let [k, v] = [&k, &v].map(|x| Tensor::bhsd(&x[..], problem.kv_shape()));
            let options = Options { mask, scale: Some(0.5), ..Options::default() };
            let forward = forward_f64(&problem, &options, Scores::plain(q, k), v, NONE, &Rows::All).unwrap();
            let total = total_f64(&problem, &options, [q, k], NONE).unwrap();
            let lse: Vec<f32> = forward.lse.iter().map(|&x| x as f32).collect();
            let plain = total_plain(&problem, &options, [q, k], NONE, &lse).unwrap();
            for (index, (total, plain)) in total.iter().zip(&plain).enumerate() {
                let (head, j) = (index / n, index % n);
                let expected: f64 = (0..m).map(|i| forward.o[(head * m + i) * 8 + j]).sum();
                assert!((total - expected).abs() < 1e-12, "{m} by {n}: head {head}, key {j}");
                assert!((plain - expected).abs() < 1e-5, "{m} by {n}: head {head}, key {j}");
            }
            assert_eq!(total.len(), problem.total_len());
        }
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        let problem =
            Problem { batch: 1, heads_q: 2, heads_kv: 2, seqlen_q: 3, seqlen_k: 3, head_dim: 8, dtype: Dtype::Bf16 };
        let data = values(2 * 3 * 8, 5);
        let x = Tensor::bhsd(&data[..], problem.q_shape());
        let options = Options::default();
        assert!(total_f64(&problem, &options, [x, Tensor { data: &data[1..], ..x }], NONE).is_err());
        assert!(total_plain(&problem, &options, [x, x], NONE, &[0.0; 5]).is_err());
        assert_eq!(total_plain(&problem, &options, [x, x], NONE, &[f32::NEG_INFINITY; 6]).unwrap(), [0.0; 6]);
    }
}
