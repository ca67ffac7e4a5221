//! The gradients of attention by their definition: one row of P and of dS at a time, in a precision that is a
//! parameter.
//!
//! With S = scale·Q·Kᵀ and P = softmax(S + mask): dV = Pᵀ·dO, dP = dO·Vᵀ, δᵢ = Σⱼ Pᵢⱼ·dPᵢⱼ − dLSEᵢ, dS = P∘(dP − δ), dQ
//! = scale·dS·K and dK = scale·dSᵀ·Q (FlashAttention-2, arXiv 2307.08691, section 2.2). dLSE enters because ∂LSEᵢ/∂Sᵢⱼ
//! = Pᵢⱼ. With softcap, dSᵢⱼ is multiplied by 1 − (Sᵢⱼ / cap)², where S is without ALiBi. A sink is the score of a key
//! without a value, so its gradient is −Σᵢ exp(sink − LSEᵢ)·δᵢ. With dropout, dV = (P∘Z)ᵀ·dO and dP = (dO·Vᵀ)∘Z, where
//! Z is 0 or 1 / (1 − p). If scores come from two pairs of Q and K, each dSᵢⱼ goes to the pair that Sᵢⱼ came from.

use std::ops::Range;

use crate::element::Element;
use rayon::prelude::*;

use super::forward::{Real, dot, factors, head_rows, live_keys, plan};
use super::rule::Rule;
use super::scores::Scores;
use super::sequences::{gather, rows_of, scatter, sequences};
use crate::backend::Backend;
use crate::error::Result;
use crate::operands::{AddressSpace, Check, Inputs, Lines, OptionalInputs, Pair, Role, Tensors, rows};
use crate::plan::{Options, Plan};
use crate::problem::Problem;
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
    /// Gradient of the sinks, (heads_q), if there are sinks.
    pub d_sinks: Option<Vec<f64>>,
    /// The largest sum of the absolute values of a head's terms in `d_sinks`; 0 if there are none.
    pub sink_terms: f64,
}

/// Returns the gradients in f64, given the gradient of O, `d_o`, and that of the natural-log LSE, `d_lse`: (batch,
/// heads_q, seqlen_q), contiguous, 0 if there is none. Masked keys take no part, even if they hold NaN or an infinity,
/// and rows without a valid key contribute nothing, except to the gradient of a sink.
///
/// # Errors
/// Errors of [`Plan::forward`] and of the tensors' shapes.
pub fn backward_f64<E: Element>(
    problem: &Problem,
    options: &Options,
    scores: Scores<Tensor<&[E]>>,
    [v, d_o]: [Tensor<&[E]>; 2],
    optional: OptionalInputs<&[f32]>,
    d_lse: Option<&[f32]>,
) -> Result<Backward> {
    let plan = plan(problem, options, &optional)?;
    evaluate(&plan, scores, [v, d_o], optional, (None, d_lse), |x: f64| x)
}

/// Returns the gradients in the precision of a kernel, without its tiles. Products of 16-bit operands, softmax, δ and
/// dS are f32. P and dS are rounded to the inputs' dtype before they are multiplied, and the gradients at the end. The
/// gradient of the sinks is f32, summed in the order of batch items and rows.
///
/// `o` is the stored result of the forward pass if δ is to be computed from it, as a kernel does: δᵢ = dOᵢ·Oᵢ − dLSEᵢ.
/// Its rounding to 16 bits is then in δ too. If P is close to 1 and dP − δ close to 0, that is most of the error of dS.
///
/// # Errors
/// Errors of [`backward_f64`].
pub fn backward_plain<E: Element>(
    problem: &Problem,
    options: &Options,
    scores: Scores<Tensor<&[E]>>,
    [v, d_o]: [Tensor<&[E]>; 2],
    optional: OptionalInputs<&[f32]>,
    (o, d_lse): (Option<Tensor<&[E]>>, Option<&[f32]>),
) -> Result<Backward> {
    let plan = plan(problem, options, &optional)?;
    evaluate(&plan, scores, [v, d_o], optional, (o, d_lse), |x: f32| E::from_f32(x).to_f32())
}

/// Runs [`row`] over every row, key heads in parallel. `round` rounds P, dS and the gradients.
fn evaluate<E: Element, R: Real>(
    plan: &Plan,
    scores: Scores<Tensor<&[E]>>,
    [v, d_o]: [Tensor<&[E]>; 2],
    optional: OptionalInputs<&[f32]>,
    (o, d_lse): (Option<Tensor<&[E]>>, Option<&[f32]>),
    round: impl Fn(R) -> R + Sync,
) -> Result<Backward> {
    let problem = plan.problem();
    scores
        .pairs()
        .try_for_each(|pair| crate::Cpu.check_inputs(plan, &Inputs::new(pair.q, pair.k, v).optional(optional)))?;
    let mut check = Check::new(problem, AddressSpace::Host);
    o.map_or(Ok(()), |o| check.tensor(rows::O, Role::Input, o).map(drop))?;
    check.tensor(rows::D_O, Role::Input, d_o)?;
    check.optional_line(rows::D_LSE, Role::Input, d_lse)?;
    let Some(sequences) = sequences(problem, plan.options(), &optional)? else {
        return evaluate_item(plan, scores, [v, d_o], optional, (o, d_lse), 0, round);
    };
    let [of_q, of_kv] = [problem.q_shape(), problem.kv_shape()].map(|shape| vec![0.0; shape.iter().product()]);
    let mut all = Backward {
        dq: of_q.clone(),
        dk: of_kv.clone(),
        dv: of_kv.clone(),
        second: scores.pairs().nth(1).map(|_| Pair { q: of_q, k: of_kv }),
        d_sinks: optional.sinks.map(|sinks| vec![0.0; sinks.len()]),
        ..Backward::default()
    };
    let (d, queries, keys) = (problem.head_dim, problem.seqlen_q, problem.seqlen_k);
    for of in sequences {
        let plan = super::forward::plan(&of.problem, &of.options, &of.optional)?;
        let scores = scores.map(|pair| Pair { q: rows_of(&pair.q, &of.q), k: rows_of(&pair.k, &of.k) });
        let (tensors, o) = ([rows_of(&v, &of.k), rows_of(&d_o, &of.q)], o.map(|o| rows_of(&o, &of.q)));
        let d_lse = d_lse.map(|d_lse| gather(d_lse, 1, queries, &of.q));
        let found = evaluate_item(&plan, scores, tensors, of.optional, (o, d_lse.as_deref()), of.index, &round)?;
        scatter(&found.dq, &mut all.dq, d, queries, &of.q);
        scatter(&found.dk, &mut all.dk, d, keys, &of.k);
        scatter(&found.dv, &mut all.dv, d, keys, &of.k);
        if let (Some(found), Some(all)) = (&found.second, &mut all.second) {
            scatter(&found.q, &mut all.q, d, queries, &of.q);
            scatter(&found.k, &mut all.k, d, keys, &of.k);
        }
        if let (Some(found), Some(all)) = (&found.d_sinks, &mut all.d_sinks) {
            all.iter_mut().zip(found).for_each(|(all, found)| *all += found);
        }
        all.sink_terms += found.sink_terms;
    }
    Ok(all)
}

/// Evaluates a dense batch, whose first item has the number `first_item`. The inputs have been checked.
fn evaluate_item<E: Element, R: Real>(
    plan: &Plan,
    scores: Scores<Tensor<&[E]>>,
    [v, d_o]: [Tensor<&[E]>; 2],
    optional: OptionalInputs<&[f32]>,
    (o, d_lse): (Option<Tensor<&[E]>>, Option<&[f32]>),
    first_item: usize,
    round: impl Fn(R) -> R + Sync,
) -> Result<Backward> {
    let problem = plan.problem();
    let mut all = Backward { second: scores.pairs().nth(1).map(|_| Pair::default()), ..Backward::default() };
    if d_o.layout.is_empty() && v.layout.is_empty() {
        all.d_sinks = optional.sinks.map(|sinks| vec![0.0; sinks.len()]);
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
            // Terms of the gradients of the group's sinks, row by row.
            let mut of_sinks = Vec::new();
            for head in head_kv * group..(head_kv + 1) * group {
                let rule = Rule::new(plan, &optional, batch, head);
                let q: Vec<Vec<R>> = scores.pairs().map(|pair| head_rows(&pair.q, batch, head)).collect();
                let d_o: Vec<R> = head_rows(&d_o, batch, head);
                let o: Option<Vec<R>> = o.as_ref().map(|o| head_rows(o, batch, head));
                for i in 0..problem.seqlen_q {
                    let live = live_keys(problem, plan.mask(), i);
                    let z =
                        factors(&plan.features.dropout, (first_item + batch) * problem.heads_q + head, i, live.clone());
                    let at = (batch * problem.heads_q + head) * problem.seqlen_q + i;
                    let d_lse = d_lse.map_or(R::default(), |d_lse| R::from_f32(d_lse[at]));
                    let dq_row = head % group * problem.seqlen_q + i;
                    let pairs = q.iter().zip(&k).zip(&mut grads).zip(scores.keys(problem, i, &live));
                    let parts = pairs.map(|(((q, k), grads), keys)| {
                        let rows = keys.start * d..keys.end * d;
                        let (dq, dk) = (&mut grads.q[dq_row * d..][..d], &mut grads.k[rows.clone()]);
                        Part { keys, first: live.start, q: &q[i * d..][..d], k: &k[rows], dq, dk }
                    });
                    let o = o.as_ref().map(|o| &o[i * d..][..d]);
                    let rows = live.start * d..live.end * d;
                    let values = [&v[rows.clone()], &d_o[i * d..][..d], &z];
                    of_sinks.push(row((&rule, i), parts.collect(), values, o, d_lse, &mut dv[rows], &round));
                }
            }
            // The scale is still missing in dQ and dK.
            grads.iter_mut().flat_map(|Pair { q, k }| q.iter_mut().chain(k)).for_each(|x| *x = round(scale * *x));
            dv.iter_mut().for_each(|x| *x = round(*x));
            (grads, dv, of_sinks)
        })
        .collect();
    if optional.sinks.is_some() {
        let terms: Vec<&[R]> = heads.iter().map(|(_, _, of_sinks)| &of_sinks[..]).collect();
        all.add_sinks(problem, &terms);
    }
    for (grads, dv, _) in heads {
        let second = all.second.as_mut().map(|Pair { q, k }| [q, k]);
        for (to, Pair { q, k }) in [[&mut all.dq, &mut all.dk]].into_iter().chain(second).zip(grads) {
            to.into_iter().zip([q, k]).for_each(|(to, x)| to.extend(x.into_iter().map(Into::into)));
        }
        all.dv.extend(dv.into_iter().map(Into::into));
    }
    Ok(all)
}

impl Backward {
    /// Sets the gradient of the sinks, given the terms of each batch item's key heads.
    fn add_sinks<R: Real>(&mut self, problem: &Problem, terms: &[&[R]]) {
        let group = problem.heads_q / problem.heads_kv;
        let mut d_sinks = Vec::new();
        for head in 0..problem.heads_q {
            let (mut sum, mut size) = (R::default(), 0.0);
            for item in terms.chunks_exact(problem.heads_kv) {
                for &term in &item[head / group][head % group * problem.seqlen_q..][..problem.seqlen_q] {
                    sum += term;
                    size += Into::<f64>::into(term).abs();
                }
            }
            d_sinks.push(sum.into());
            self.sink_terms = self.sink_terms.max(size);
        }
        self.d_sinks = Some(d_sinks);
    }
}

/// One pair's part in a query row: the query, the keys whose scores come from the pair, and the gradients of both.
struct Part<'a, R> {
    keys: Range<usize>,
    /// First valid key of the row.
    first: usize,
    q: &'a [R],
    k: &'a [R],
    dq: &'a mut [R],
    dk: &'a mut [R],
}

impl<R> Part<'_, R> {
    /// Returns the place of the keys among the row's valid keys.
    fn live(&self) -> Range<usize> {
        self.keys.start - self.first..self.keys.end - self.first
    }
}

/// Adds the contribution of query row `i`, and returns its term of the sink's gradient. V and dV hold its valid keys
/// only, and z the factors of their weights. The scale is still missing in dQ and dK.
fn row<R: Real>(
    (rule, i): (&Rule<R>, usize),
    parts: Vec<Part<'_, R>>,
    [v, d_o, z]: [&[R]; 3],
    o: Option<&[R]>,
    d_lse: R,
    dv: &mut [R],
    round: impl Fn(R) -> R,
) -> R {
    let d = d_o.len();
    let mut p = vec![R::default(); v.len() / d];
    let mut derivatives = p.clone();
    for part in &parts {
        let of_keys = p[part.live()].iter_mut().zip(&mut derivatives[part.live()]);
        for ((p, derivative), score) in of_keys.zip(rule.scores(part.q, part.k, i, &part.keys)) {
            (*p, *derivative) = (score.value, score.derivative);
        }
    }
    let lse = rule.softmax(&mut p);
    let dp: Vec<R> = v.chunks_exact(d).zip(z).map(|(v, &z)| dot(d_o, v) * z).collect();
    let mut delta = R::default();
    match o {
        Some(o) => delta = dot(d_o, o),
        None => p.iter().zip(&dp).for_each(|(&p, &dp)| delta += p * dp),
    }
    let delta = delta - d_lse;
    // to += factor·x.
    let add = |to: &mut [R], factor, x: &[R]| to.iter_mut().zip(x).for_each(|(to, &x)| *to += factor * x);
    for part in parts {
        let live = part.live();
        let of_scores = p[live.clone()].iter().zip(&dp[live.clone()]).zip(&z[live.clone()]);
        let of_scores = of_scores.zip(&derivatives[live.clone()]);
        let of_values = of_scores.zip(dv[live.start * d..].chunks_exact_mut(d));
        let of_keys = part.k.chunks_exact(d).zip(part.dk.chunks_exact_mut(d));
        for (((((&p, &dp), &z), &derivative), dv), (k, dk)) in of_values.zip(of_keys) {
            let ds = round(p * (dp - delta) * derivative);
            add(dv, round(p) * z, d_o);
            add(dk, ds, part.q);
            add(part.dq, ds, k);
        }
    }
    rule.sink.map_or(R::default(), |sink| (R::default() - (sink - lse).exp()) * delta)
}

#[cfg(test)]
mod tests;
