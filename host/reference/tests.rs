//! Tests of softcap, ALiBi and sinks together, with masks and with one and two pairs of Q and K: the forward pass
//! against the definition, the gradients against differences of the forward pass.

use half::f16;
use kernels_gpu::variants::Dtype;

use super::*;
use crate::dropout::Dropout;
use crate::operands::Slopes;
use crate::plan::Options;
use crate::problem::{Mask, Problem};
use crate::tensor::Tensor;

const WINDOW: Mask = Mask::Window { left: Some(2), right: Some(1) };
const SHAPES: [(usize, usize, Mask); 6] = [
    (3, 4, Mask::None),
    (4, 2, Mask::Causal),
    (2, 5, Mask::Causal),
    (2, 0, Mask::None),
    (5, 3, WINDOW),
    (3, 6, WINDOW),
];

/// Q1, K1, Q2, K2, V, dO, dLSE, slopes and sinks of grouped heads.
struct Data {
    problem: Problem,
    options: Options,
    dist_threshold: Option<i32>,
    tensors: [Vec<f16>; 6],
    d_lse: Vec<f32>,
    slopes: Slopes<Vec<f32>>,
    sinks: Vec<f32>,
}

impl Data {
    fn new(index: usize, (seqlen_q, seqlen_k, mask): (usize, usize, Mask)) -> Self {
        let dtype = Dtype::F16;
        let problem = Problem { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q, seqlen_k, head_dim: 8, dtype };
        let value = |i: usize, step: usize| ((i * step + i * i / 3 + 3) % 17) as f32 / 8.0 - 1.0;
        let (q, kv) = (problem.q_shape(), problem.kv_shape());
        let tensors = [(q, 5), (kv, 7), (q, 9), (kv, 14), (kv, 11), (q, 3)]
            .map(|(shape, step)| (0..shape.iter().product()).map(|i| f16::from_f32(value(i, step))).collect());
        let lines = |len: usize, step| (0..len).map(|i| value(i, step) / 2.0).collect();
        let slopes = if index.is_multiple_of(2) { Slopes::PerHead(lines(4, 6)) } else { Slopes::PerItem(lines(8, 10)) };
        let dropout = Dropout { p: if index.is_multiple_of(3) { 0.3 } else { 0.0 }, seed: 2, offset: 3 }.into();
        Data {
            problem,
            options: Options { mask, scale: Some(0.7), softcap: Some(1.5), dropout, ..Options::default() },
            dist_threshold: index.is_multiple_of(2).then_some(1),
            tensors,
            d_lse: (0..problem.lse_len()).map(|i| value(i, 13)).collect(),
            slopes,
            sinks: lines(4, 8),
        }
    }

    fn all() -> impl Iterator<Item = Data> {
        SHAPES
            .into_iter()
            .cycle()
            .take(2 * SHAPES.len())
            .enumerate()
            .map(|(index, shape)| Data::new(if index < SHAPES.len() { index } else { index + 1 }, shape))
    }

    fn tensor(&self, operand: usize) -> Tensor<&[f16]> {
        let shape = if [0, 2, 5].contains(&operand) { self.problem.q_shape() } else { self.problem.kv_shape() };
        Tensor::bhsd(&self.tensors[operand], shape)
    }

    fn scores(&self) -> Scores<Tensor<&[f16]>> {
        let [first, second] = [0, 2].map(|q| Pair { q: self.tensor(q), k: self.tensor(q + 1) });
        match self.dist_threshold {
            Some(dist_threshold) => Scores::piecewise(first, second, dist_threshold),
            None => Scores::plain(first.q, first.k),
        }
    }

    fn optional(&self) -> OptionalInputs<&[f32]> {
        let slopes = match &self.slopes {
            Slopes::PerHead(slopes) => Slopes::PerHead(&slopes[..]),
            Slopes::PerItem(slopes) => Slopes::PerItem(&slopes[..]),
        };
        OptionalInputs { slopes: Some(slopes), sinks: Some(&self.sinks), ..OptionalInputs::NONE }
    }

    fn forward(&self) -> Forward {
        let optional = self.optional();
        forward_f64(&self.problem, &self.options, self.scores(), self.tensor(4), optional, &Rows::All).unwrap()
    }

    fn values(&self) -> [Tensor<&[f16]>; 2] {
        [self.tensor(4), self.tensor(5)]
    }

    /// Σ O∘dO + Σ LSE∘dLSE.
    fn loss(&self) -> f64 {
        let forward = self.forward();
        let of_o: f64 = forward.o.iter().zip(&self.tensors[5]).map(|(o, g)| o * f64::from(g.to_f32())).sum();
        of_o + forward.lse.iter().zip(&self.d_lse).map(|(lse, &g)| lse * f64::from(g)).sum::<f64>()
    }
}

/// Compares with loops over the whole score matrix.
#[test]
fn equals_the_definition() {
    for data in Data::all() {
        let (m, n) = (data.problem.seqlen_q, data.problem.seqlen_k);
        let keeps_all = data.options.dropout.p() == 0.0;
        let found = data.forward();
        for (row, lse) in found.lse.iter().enumerate() {
            let (head, i) = (row / m, row % m);
            let kv = head / 4 * 2 + head % 4 / 2;
            let slope = match &data.slopes {
                Slopes::PerHead(slopes) => slopes[head % 4],
                Slopes::PerItem(slopes) => slopes[head],
            };
            let at = |operand: usize, row: usize, d: usize| f64::from(data.tensors[operand][row * 8 + d].to_f32());
            let score = |j: usize| -> Option<f64> {
                let behind = i as i32 + n as i32 - m as i32 - j as i32;
                let live = match data.options.mask {
                    Mask::None => true,
                    Mask::Causal => behind >= 0,
                    Mask::Window { .. } => (-1..=2).contains(&behind),
                };
                let pair = if data.dist_threshold.is_some_and(|threshold| behind >= threshold) { 2 } else { 0 };
                let dot: f64 = (0..8).map(|d| at(pair, row, d) * at(pair + 1, kv * n + j, d)).sum();
                let bounded = 1.5 * (f64::from(0.7f32) * dot / 1.5).tanh();
                live.then_some(bounded - f64::from(slope) * f64::from(behind.abs()))
            };
            let scores: Vec<(usize, f64)> = (0..n).filter_map(|j| Some((j, score(j)?))).collect();
            let sum: f64 = scores.iter().map(|(_, s)| s.exp()).sum();
            let sum = sum + f64::from(data.sinks[head % 4]).exp();
            assert!((sum.ln() - lse).abs() < 1e-12, "{m} {n} {row}");
            for d in (0..8).filter(|_| keeps_all) {
                let of_v: f64 = scores.iter().map(|&(j, s)| s.exp() / sum * at(4, kv * n + j, d)).sum();
                assert!((found.o[row * 8 + d] - of_v).abs() < 1e-12, "{m} {n} {row} {d}");
            }
        }
    }
}

/// The step is exact in f16 when added to any of the values, and in f32 to any sink.
#[test]
fn gradients_equal_the_differences_of_the_forward() {
    const STEP: f32 = 1.0 / 1024.0;
    for mut data in Data::all() {
        let optional = data.optional();
        let found =
            backward_f64(&data.problem, &data.options, data.scores(), data.values(), optional, Some(&data.d_lse));
        let Backward { dq, dk, dv, second, d_sinks, sink_terms } = found.unwrap();
        let second = second.unwrap_or_default();
        let difference = |above: f64, below: f64| (above - below) / (2.0 * f64::from(STEP));
        for (operand, gradient) in [dq, dk, second.q, second.k, dv].into_iter().enumerate() {
            for (at, gradient) in gradient.iter().enumerate() {
                let x = data.tensors[operand][at];
                let [above, below] = [STEP, -STEP].map(|step| {
                    data.tensors[operand][at] = f16::from_f32(x.to_f32() + step);
                    data.loss()
                });
                data.tensors[operand][at] = x;
                let expected = difference(above, below);
                assert!((gradient - expected).abs() < 2e-6, "{operand} {at}: {gradient} not {expected}");
            }
        }
        let d_sinks = d_sinks.unwrap();
        assert_eq!(d_sinks.len(), 4);
        assert!(d_sinks.iter().all(|x| x.abs() <= sink_terms));
        for (head, gradient) in d_sinks.into_iter().enumerate() {
            let x = data.sinks[head];
            let [above, below] = [STEP, -STEP].map(|step| {
                data.sinks[head] = x + step;
                data.loss()
            });
            data.sinks[head] = x;
            let expected = difference(above, below);
            assert!((gradient - expected).abs() < 2e-6, "sink {head}: {gradient} not {expected}");
        }
    }
}

#[test]
fn plain_is_close() {
    for data in Data::all() {
        let (optional, d_lse) = (data.optional(), Some(&data.d_lse[..]));
        let (problem, options, scores, values) = (&data.problem, &data.options, data.scores(), data.values());
        let exact = backward_f64(problem, options, scores, values, optional, d_lse).unwrap();
        let plain = backward_plain(problem, options, scores, values, optional, (None, d_lse)).unwrap();
        let accuracy = GradientAccuracy::of(&plain, &plain, &exact, 1.0);
        assert!(accuracy.passed());
        for (name, accuracy) in accuracy.named() {
            assert!(accuracy.error < 0.02, "{name} {accuracy:?}");
        }
        assert!(accuracy.d_sinks.is_some_and(|d_sinks| d_sinks.error < 1e-4));
        let forward = data.forward();
        let plain = forward_plain(problem, options, scores, data.tensor(4), optional, &Rows::All).unwrap();
        assert!(plain.o.iter().zip(&forward.o).all(|(a, b)| (a - b).abs() < 0.01));
        assert!(plain.lse.iter().zip(&forward.lse).all(|(a, b)| (a - b).abs() < 1e-5));
    }
}

/// The sums of total attention and of the sinks' shares are 1 for each query.
#[test]
fn total_attention_and_sinks_share_each_query() {
    for data in Data::all().filter(|data| data.dist_threshold.is_none()) {
        let (optional, m, n) = (data.optional(), data.problem.seqlen_q, data.problem.seqlen_k);
        let lse: Vec<f32> = data.forward().lse.iter().map(|&lse| lse as f32).collect();
        let tensors = [data.tensor(0), data.tensor(1)];
        let exact = total_f64(&data.problem, &data.options, tensors, optional).unwrap();
        let plain = total_plain(&data.problem, &data.options, tensors, optional, &lse).unwrap();
        for head in 0..8 {
            let of_sink: f64 = lse[head * m..][..m].iter().map(|lse| f64::from(data.sinks[head % 4] - lse).exp()).sum();
            for total in [&exact, &plain] {
                let of_keys: f64 = total[head * n..][..n].iter().sum();
                assert!((of_keys + of_sink - m as f64).abs() < 1e-5, "{m} {n} {head}");
            }
        }
    }
}
