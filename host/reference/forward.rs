//! Forward attention by its definition, one query row at a time.

use std::ops::Range;

use crate::element::Element;
use kernels_gpu::attention::dropout::Dropout as Launched;
use rayon::prelude::*;

use super::rule::Rule;
use super::scores::Scores;
use super::sequences::{rows_of, sequences};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::operands::{AddressSpace, Check, Inputs, Lines, OptionalInputs, Pair, Role, SeedOffset, Tensors, rows};
use crate::plan::{Options, Plan};
use crate::problem::{Mask, Problem};
use crate::tensor::Tensor;

/// Query rows to compute. All of them take seqlen_q × seqlen_k time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rows {
    /// Every row.
    All,
    /// These rows of every batch item and head, in this order.
    Some(Vec<usize>),
}

impl Rows {
    /// Returns at most `count` rows spread over `seqlen_q`, the first and the last among them.
    pub fn sample(seqlen_q: usize, count: usize) -> Self {
        if seqlen_q <= count || count < 2 {
            return Rows::All;
        }
        Rows::Some((0..count).map(|i| (i as u128 * (seqlen_q - 1) as u128 / (count - 1) as u128) as usize).collect())
    }

    /// Returns the rows of a problem with `seqlen_q` rows.
    ///
    /// # Errors
    /// [`Error::TooLarge`] for a row that it doesn't have.
    pub fn of(&self, seqlen_q: usize) -> Result<Vec<usize>> {
        match self {
            Rows::All => Ok((0..seqlen_q).collect()),
            Rows::Some(rows) => match rows.iter().find(|&&row| row >= seqlen_q) {
                None => Ok(rows.clone()),
                Some(&row) => Err(Error::TooLarge {
                    field: "rows",
                    value: row as u128,
                    limit: seqlen_q.saturating_sub(1) as u128,
                }),
            },
        }
    }
}

/// O and LSE for some rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Forward {
    /// (batch, heads_q, rows, head_dim), contiguous.
    pub o: Vec<f64>,
    /// (batch, heads_q, rows), natural log; for a row without a valid key −∞, or the sink.
    pub lse: Vec<f64>,
}

/// Returns the valid keys of query row `i`.
pub(super) fn live_keys(problem: &Problem, mask: Mask, i: usize) -> Range<usize> {
    let (m, n) = (problem.seqlen_q as i128, problem.seqlen_k as i128);
    let (left, right) = match mask {
        Mask::None => (None, None),
        Mask::Causal => (None, Some(0)),
        Mask::Window { left, right } => (left, right),
    };
    // i + seqlen_k − seqlen_q − left ≤ j ≤ i + seqlen_k − seqlen_q + right.
    let start = left.map_or(0, |left| i as i128 + n - m - i128::from(left)).clamp(0, n) as usize;
    let end = right.map_or(n, |right| i as i128 + n - m + i128::from(right) + 1).clamp(0, n) as usize;
    start.min(end)..end
}

/// Returns the factors of dropout for the weights of `keys` in query row `i`. `head` counts query heads over the batch.
pub(super) fn factors<R: Real>(dropout: &Option<Launched>, head: usize, i: usize, keys: Range<usize>) -> Vec<R> {
    let Some(dropout) = dropout else { return vec![R::from_f32(1.0); keys.len()] };
    let scale = R::from_f32(1.0) / R::from_f32(dropout.keeps());
    let factor = |j| if dropout.kept(head as u32, i as u32, j as u32) { scale } else { R::default() };
    keys.map(factor).collect()
}

/// Computes softmax(S + mask)·V in f64 with dropout of the weights, where `scores` defines the products in S. The
/// presence of slopes and sinks in `optional` decides; the options' own kinds are ignored, and so is a distance. Masked
/// keys take no part, even if they hold NaN or an infinity. A kernel gives them the weight 0 in the blocks that it
/// visits, so the two differ if V holds a NaN or an infinity at a masked key.
///
/// # Errors
/// Errors of [`Plan::forward`] and of the tensors' shapes; [`Error::TooLarge`] for a row that the problem doesn't have.
pub fn forward_f64<E: Element>(
    problem: &Problem,
    options: &Options,
    scores: Scores<Tensor<&[E]>>,
    v: Tensor<&[E]>,
    optional: OptionalInputs<&[f32]>,
    rows: &Rows,
) -> Result<Forward> {
    let plan = plan(problem, options, &optional)?;
    evaluate(&plan, scores, v, optional, rows, |rule: &Rule<f64>, p, [v, z], o| {
        let lse = rule.softmax(p);
        for ((p, z), v) in p.iter().zip(z).zip(v.chunks_exact(o.len())) {
            let p = p * z;
            for (o, v) in o.iter_mut().zip(v) {
                *o += p * v;
            }
        }
        lse
    })
}

/// Computes the same result in the precision of a kernel, without its tiles. Products of 16-bit inputs, softcap, ALiBi
/// and softmax are f32. P is rounded to the inputs' dtype before the second product, and O at the end. Dropout is that
/// of flash-attention's `attention_ref` in its tests: kept weights are multiplied by V times the factor, which is
/// rounded to that dtype too.
///
/// # Errors
/// Errors of [`forward_f64`].
pub fn forward_plain<E: Element>(
    problem: &Problem,
    options: &Options,
    scores: Scores<Tensor<&[E]>>,
    v: Tensor<&[E]>,
    optional: OptionalInputs<&[f32]>,
    rows: &Rows,
) -> Result<Forward> {
    let plan = plan(problem, options, &optional)?;
    evaluate(&plan, scores, v, optional, rows, |rule: &Rule<f32>, p, [v, z], o| {
        let lse = rule.softmax(p);
        for ((p, z), v) in p.iter().zip(z).zip(v.chunks_exact(o.len())) {
            let p = E::from_f32(*p).to_f32();
            for (o, v) in o.iter_mut().zip(v) {
                *o += p * E::from_f32(v * z).to_f32();
            }
        }
        o.iter_mut().for_each(|o| *o = E::from_f32(*o).to_f32());
        lse
    })
}

/// Plans attention with these optional inputs, which are still to be checked. Pairs of Q and K are those of [`Scores`],
/// so the plan has one.
pub(super) fn plan(problem: &Problem, options: &Options, optional: &OptionalInputs<&[f32]>) -> Result<Plan> {
    let options = Options { dist_threshold: None, ..*options }.for_inputs(optional.kinds());
    let mut plan = Plan::forward(problem, &options, 1)?;
    plan.features = plan.features.with_seed_offset(optional.seed_offset.map(SeedOffset::address));
    Ok(plan)
}

/// Number type that a reference computes in.
pub(super) trait Real:
    Copy
    + Send
    + Sync
    + Default
    + Into<f64>
    + PartialOrd
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::AddAssign
{
    const NEG_INFINITY: Self;
    fn from_f32(x: f32) -> Self;
    fn exp(self) -> Self;
    fn ln(self) -> Self;
    fn tanh(self) -> Self;
}
impl Real for f64 {
    const NEG_INFINITY: Self = f64::NEG_INFINITY;
    fn from_f32(x: f32) -> Self {
        x.into()
    }
    fn exp(self) -> Self {
        self.exp()
    }
    fn ln(self) -> Self {
        self.ln()
    }
    fn tanh(self) -> Self {
        self.tanh()
    }
}
impl Real for f32 {
    const NEG_INFINITY: Self = f32::NEG_INFINITY;
    fn from_f32(x: f32) -> Self {
        x
    }
    fn exp(self) -> Self {
        self.exp()
    }
    fn ln(self) -> Self {
        self.ln()
    }
    fn tanh(self) -> Self {
        self.tanh()
    }
}

/// Returns q·k, in eight running sums that the compiler keeps in vector registers.
pub(super) fn dot<R: Real>(q: &[R], k: &[R]) -> R {
    let mut sums = [R::default(); 8];
    // Head dims are multiples of eight.
    for (q, k) in q.as_chunks::<8>().0.iter().zip(k.as_chunks::<8>().0) {
        for ((sum, q), k) in sums.iter_mut().zip(q).zip(k) {
            *sum += *q * *k;
        }
    }
    let mut total = R::default();
    sums.into_iter().for_each(|sum| total += sum);
    total
}

/// Returns every row of one head, one after the other.
pub(super) fn head_rows<E: Element, R: Real>(tensor: &Tensor<&[E]>, batch: usize, head: usize) -> Vec<R> {
    let [_, _, seqlen, d] = tensor.layout.shape;
    let mut rows = Vec::with_capacity(seqlen * d);
    (0..seqlen).for_each(|i| rows.extend(head_row::<E, R>(tensor, batch, head, i)));
    rows
}

/// Returns one row of one head.
fn head_row<E: Element, R: Real>(
    tensor: &Tensor<&[E]>,
    batch: usize,
    head: usize,
    i: usize,
) -> impl Iterator<Item = R> {
    let start = tensor.layout.offset(batch, head, i);
    tensor.data[start..start + tensor.layout.shape[3]].iter().map(|x| R::from_f32(x.to_f32()))
}

/// Runs `row(rule, s, [v, z], o) -> lse` over every row that has a valid key, heads and rows in parallel. s and v hold
/// the scores and the values of the valid keys only, and z the factors of their weights.
fn evaluate<E: Element, R: Real>(
    plan: &Plan,
    scores: Scores<Tensor<&[E]>>,
    v: Tensor<&[E]>,
    optional: OptionalInputs<&[f32]>,
    rows: &Rows,
    row: impl Fn(&Rule<R>, &mut [R], [&[R]; 2], &mut [R]) -> R + Sync,
) -> Result<Forward> {
    scores
        .pairs()
        .try_for_each(|pair| crate::Cpu.check_inputs(plan, &Inputs::new(pair.q, pair.k, v).optional(optional)))?;
    let problem = plan.problem();
    let Some(sequences) = sequences(problem, plan.options(), &optional)? else {
        return evaluate_item(plan, scores, v, optional, rows, 0, row);
    };
    let (rows, d) = (rows.of(problem.seqlen_q)?, problem.head_dim);
    let mut o = vec![0.0; problem.heads_q * rows.len() * d];
    let sink = |head: usize| optional.sinks.map_or(f64::NEG_INFINITY, |sinks| sinks[head].into());
    let mut lse: Vec<f64> = (0..problem.heads_q).flat_map(|head| vec![sink(head); rows.len()]).collect();
    for of in sequences {
        let plan = self::plan(&of.problem, &of.options, &of.optional)?;
        let scores = scores.map(|pair| Pair { q: rows_of(&pair.q, &of.q), k: rows_of(&pair.k, &of.k) });
        let places: Vec<usize> = (0..rows.len()).filter(|&place| of.q.contains(&rows[place])).collect();
        let of_sequence = Rows::Some(places.iter().map(|&place| rows[place] - of.q.start).collect());
        let v = rows_of(&v, &of.k);
        let found = evaluate_item(&plan, scores, v, of.optional, &of_sequence, of.index, &row)?;
        for (at, (found_o, found_lse)) in found.o.chunks_exact(d).zip(&found.lse).enumerate() {
            let to = at / places.len() * rows.len() + places[at % places.len()];
            o[to * d..][..d].copy_from_slice(found_o);
            lse[to] = *found_lse;
        }
    }
    Ok(Forward { o, lse })
}

/// Evaluates the rows of a dense batch, whose first item has the number `first_item`.
fn evaluate_item<E: Element, R: Real>(
    plan: &Plan,
    scores: Scores<Tensor<&[E]>>,
    v: Tensor<&[E]>,
    optional: OptionalInputs<&[f32]>,
    rows: &Rows,
    first_item: usize,
    row: impl Fn(&Rule<R>, &mut [R], [&[R]; 2], &mut [R]) -> R + Sync,
) -> Result<Forward> {
    let problem = plan.problem();
    let rows = rows.of(problem.seqlen_q)?;
    if rows.is_empty() {
        // Nothing has limited the number of heads in this case.
        return Ok(Forward { o: Vec::new(), lse: Vec::new() });
    }
    let (d, group) = (problem.head_dim, problem.heads_q / problem.heads_kv);
    let heads: Vec<(usize, usize)> =
        (0..problem.batch).flat_map(|b| (0..problem.heads_kv).map(move |h| (b, h))).collect();
    let heads: Vec<(Vec<R>, Vec<R>)> = heads
        .into_par_iter()
        .flat_map_iter(|(batch, head_kv)| {
            let v: Vec<R> = head_rows(&v, batch, head_kv);
            let keys: Vec<Vec<R>> = scores.pairs().map(|pair| head_rows(&pair.k, batch, head_kv)).collect();
            let results: Vec<(Vec<R>, Vec<R>)> = (0..group)
                .map(|g| {
                    let head = head_kv * group + g;
                    let rule = Rule::<R>::new(plan, &optional, batch, head);
                    let mut o = vec![R::default(); rows.len() * d];
                    let lse = o
                        .par_chunks_exact_mut(d)
                        .zip(&rows)
                        .map(|(o, &i)| {
                            let live = live_keys(problem, plan.mask(), i);
                            if live.is_empty() {
                                return rule.sink.unwrap_or(R::NEG_INFINITY);
                            }
                            let mut s = vec![R::default(); live.len()];
                            for ((pair, k), part) in scores.pairs().zip(&keys).zip(scores.keys(problem, i, &live)) {
                                let q: Vec<R> = head_row(&pair.q, batch, head, i).collect();
                                let s = &mut s[part.start - live.start..part.end - live.start];
                                let k = &k[part.start * d..part.end * d];
                                let of_keys = rule.scores(&q, k, i, &part);
                                s.iter_mut().zip(of_keys).for_each(|(s, score)| *s = score.value);
                            }
                            let head = (first_item + batch) * problem.heads_q + head;
                            let z = factors(&plan.features.dropout, head, i, live.clone());
                            row(&rule, &mut s, [&v[live.start * d..live.end * d], &z], o)
                        })
                        .collect();
                    (o, lse)
                })
                .collect();
            results
        })
        .collect();
    let (mut o, mut lse) = (Vec::new(), Vec::new());
    for (head_o, head_lse) in heads {
        o.extend(head_o.into_iter().map(Into::into));
        lse.extend(head_lse.into_iter().map(Into::into));
    }
    Ok(Forward { o, lse })
}

impl Forward {
    /// Gathers the rows that `rows` names from whole tensors: O in any layout, the LSE contiguous.
    ///
    /// # Errors
    /// Errors of the problem and of the shapes of `o` and `lse`; [`Error::TooLarge`] for a row that the problem doesn't
    /// have.
    pub fn gather<E: Element>(problem: &Problem, o: Tensor<&[E]>, lse: Option<&[f32]>, rows: &Rows) -> Result<Self> {
        problem.validate()?;
        let rows = rows.of(problem.seqlen_q)?;
        let layout = o.layout;
        let mut check = Check::new(problem, AddressSpace::Host);
        check.tensor(rows::O, Role::Input, o)?;
        check.optional_line(rows::LSE, Role::Input, lse)?;
        let (mut out, mut out_lse) = (Vec::new(), Vec::new());
        for batch in 0..problem.batch {
            for head in 0..problem.heads_q {
                for &i in &rows {
                    let start = layout.offset(batch, head, i);
                    out.extend(o.data[start..start + problem.head_dim].iter().map(|x| f64::from(x.to_f32())));
                    if let Some(lse) = lse {
                        out_lse.push(lse[(batch * problem.heads_q + head) * problem.seqlen_q + i].into());
                    }
                }
            }
        }
        Ok(Forward { o: out, lse: out_lse })
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use kernels_gpu::variants::Dtype;

    use super::*;

    const NONE: OptionalInputs<&[f32]> = OptionalInputs::NONE;

    fn options(mask: Mask, scale: f32) -> Options {
        Options { mask, scale: Some(scale), ..Options::default() }
    }

    fn problem(seqlen_q: usize, seqlen_k: usize, heads_q: usize, heads_kv: usize) -> Problem {
        Problem { batch: 2, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim: 8, dtype: Dtype::Bf16 }
    }

    fn values(len: usize, step: usize) -> Vec<bf16> {
        (0..len).map(|i| bf16::from_f32(((i * step + 3) % 17) as f32 / 8.0 - 1.0)).collect()
    }

    /// Compares with three loops over the whole score matrix.
    #[test]
    fn equals_the_definition() {
        let window = Mask::Window { left: Some(1), right: Some(2) };
        let masks = [(3, 5, Mask::None), (5, 3, Mask::Causal), (4, 4, Mask::Causal), (2, 0, Mask::None)];
        for (m, n, mask) in masks.into_iter().chain([(7, 4, window), (4, 7, window)]) {
            let problem = problem(m, n, 4, 2);
            let [q, k, v] = [(4 * m, 5), (2 * n, 7), (2 * n, 11)].map(|(rows, step)| values(2 * rows * 8, step));
            let [k, v] = [&k[..], &v[..]].map(|x| Tensor::bhsd(x, problem.kv_shape()));
            let scores = Scores::plain(Tensor::bhsd(&q[..], problem.q_shape()), k);
            let result = forward_f64(&problem, &options(mask, 0.5), scores, v, NONE, &Rows::All).unwrap();
            for (row, lse) in result.lse.iter().enumerate() {
                let (head, i) = (row / m, row % m);
                let kv = head / 4 * 2 + head % 4 / 2;
                let at = |x: &[bf16], row: usize, d: usize| f64::from(x[row * 8 + d].to_f32());
                let live = |j: usize| match mask {
                    Mask::None => true,
                    Mask::Causal => j + m <= i + n,
                    Mask::Window { .. } => j + m <= i + n + 2 && j + m + 1 >= i + n,
                };
                let s: Vec<f64> =
                    (0..n).map(|j| (0..8).map(|d| 0.5 * at(&q, row, d) * at(k.data, kv * n + j, d)).sum()).collect();
                let l: f64 = (0..n).filter(|&j| live(j)).map(|j| s[j].exp()).sum();
                assert!((l.ln() - lse).abs() < 1e-12 || l == 0.0 && *lse == f64::NEG_INFINITY);
                for d in 0..8 {
                    let sum: f64 = (0..n).filter(|&j| live(j)).map(|j| s[j].exp() * at(v.data, kv * n + j, d)).sum();
                    let expected = if l == 0.0 { 0.0 } else { sum / l };
                    assert!((result.o[row * 8 + d] - expected).abs() < 1e-12);
                }
            }
            let plain = forward_plain(&problem, &options(mask, 0.5), scores, v, NONE, &Rows::All).unwrap();
            assert!(plain.o.iter().zip(&result.o).all(|(a, b)| (a - b).abs() < 0.02));
        }
    }

    #[test]
    fn samples_are_rows_of_the_whole() {
        let problem = problem(9, 6, 2, 2);
        let data = values(2 * 2 * 9 * 8, 5);
        let q = Tensor::bhsd(&data[..], problem.q_shape());
        let kv = Tensor::bhsd(&data[..2 * 2 * 6 * 8], problem.kv_shape());
        let all =
            forward_f64(&problem, &options(Mask::Causal, 1.0), Scores::plain(q, kv), kv, NONE, &Rows::All).unwrap();
        let rows = Rows::sample(9, 3);
        assert_eq!(rows, Rows::Some(vec![0, 4, 8]));
        let some = forward_f64(&problem, &options(Mask::Causal, 1.0), Scores::plain(q, kv), kv, NONE, &rows).unwrap();
        let expected: Vec<f64> = (0..4).flat_map(|head| [0, 4, 8].map(|i| all.lse[head * 9 + i])).collect();
        assert_eq!(some.lse, expected);
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        let problem = problem(3, 3, 2, 2);
        let data = values(2 * 2 * 3 * 8, 5);
        let x = Tensor::bhsd(&data[..], problem.q_shape());
        let short = Tensor { data: &data[1..], ..x };
        let beyond = Rows::Some(vec![0, 3]);
        let none = Error::TooLarge { field: "rows", value: 3, limit: 2 };
        assert_eq!(
            forward_f64(&problem, &options(Mask::None, 1.0), Scores::plain(x, x), x, NONE, &beyond),
            Err(none.clone())
        );
        assert_eq!(Forward::gather(&problem, x, None, &beyond), Err(none));
        assert!(
            forward_plain(&problem, &options(Mask::None, 1.0), Scores::plain(x, short), x, NONE, &Rows::All).is_err()
        );
        assert!(Forward::gather(&problem, short, None, &Rows::All).is_err());
        assert!(Forward::gather(&problem, x, Some(&[0.0; 11]), &Rows::All).is_err());
        assert_eq!(Forward::gather(&problem, x, Some(&[0.0; 12]), &Rows::All).unwrap().lse.len(), 12);
    }
}
