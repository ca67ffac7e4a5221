//! The pair of queries and keys that a score comes from.
//!
//! Plain attention has one pair, Q and K. Piecewise attention has two. The score of query i and key j comes from the
//! second pair if their signed distance, i + seqlen_k − seqlen_q − j, is at least a threshold, and otherwise from the
//! first. The distance falls along a row, so each row's keys have one boundary: those before it belong to the second
//! pair, the rest to the first.

use std::ops::Range;

use crate::{operands::Pair, problem::Problem};

/// Pairs that scores come from, and the rule that selects one of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores<T> {
    first: Pair<T>,
    /// Second pair, with the smallest distance at which it counts.
    second: Option<(Pair<T>, i32)>,
}

impl<T> Scores<T> {
    /// Returns the scores of plain attention: every score is scale·q·k.
    pub fn plain(q: T, k: T) -> Self {
        Scores { first: Pair { q, k }, second: None }
    }

    /// Returns the scores of piecewise attention: score (i, j) is scale·q2ᵢ·k2ⱼ if i + seqlen_k − seqlen_q − j ≥
    /// `dist_threshold`, otherwise scale·q1ᵢ·k1ⱼ.
    pub fn piecewise(first: Pair<T>, second: Pair<T>, dist_threshold: i32) -> Self {
        Scores { first, second: Some((second, dist_threshold)) }
    }

    /// Returns the first pair, then the second if there is one.
    pub fn pairs(&self) -> impl Iterator<Item = &Pair<T>> {
        [&self.first].into_iter().chain(self.second.as_ref().map(|(pair, _)| pair))
    }

    /// Applies `f` to each pair.
    pub(super) fn map<U>(&self, mut f: impl FnMut(&Pair<T>) -> Pair<U>) -> Scores<U> {
        Scores { first: f(&self.first), second: self.second.as_ref().map(|(pair, distance)| (f(pair), *distance)) }
    }

    /// Returns the ranges of the valid keys whose score with query `i` comes from the first pair, and from the second.
    pub(super) fn keys(&self, problem: &Problem, i: usize, live: &Range<usize>) -> [Range<usize>; 2] {
        let cut = self.second.as_ref().map_or(live.start, |&(_, dist_threshold)| {
            // j ≤ i + seqlen_k − seqlen_q − dist_threshold.
            let end = i as i64 + problem.seqlen_k as i64 - problem.seqlen_q as i64 - i64::from(dist_threshold) + 1;
            end.clamp(live.start as i64, live.end as i64) as usize
        });
        [cut..live.end, live.start..cut]
    }
}

#[cfg(test)]
mod tests {
    use crate::element::Element;
    use half::{bf16, f16};

    use super::*;
    use crate::operands::OptionalInputs;
    use crate::plan::Options;
    use crate::problem::Mask;
    use crate::reference::{Backward, Forward, GradientAccuracy, Rows};
    use crate::reference::{backward_f64, backward_plain, forward_f64, forward_plain};
    use crate::tensor::Tensor;

    const NONE: OptionalInputs<&[f32]> = OptionalInputs::NONE;
    const SCALE: f32 = 0.7;
    const SHAPES: [(usize, usize, Mask); 6] = [
        (3, 5, Mask::None),
        (5, 3, Mask::None),
        (6, 4, Mask::Causal),
        (3, 5, Mask::Causal),
        (4, 4, Mask::Causal),
        (2, 0, Mask::None),
    ];

    /// Q1, K1, Q2, K2, V, dO and dLSE of grouped heads.
    struct Data<E> {
        problem: Problem,
        mask: Mask,
        tensors: [Vec<E>; 6],
        d_lse: Vec<f32>,
    }

    impl<E: Element> Data<E> {
        /// Returns multiples of 1/8 from −1 to 1, in an order that a wrong index would change.
        fn new((seqlen_q, seqlen_k, mask): (usize, usize, Mask)) -> Self {
            let problem =
                Problem { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q, seqlen_k, head_dim: 8, dtype: E::DTYPE };
            let value = |i: usize, step: usize| ((i * step + i * i / 3 + 3) % 17) as f32 / 8.0 - 1.0;
            let (q, kv) = (problem.q_shape(), problem.kv_shape());
            let tensors = [(q, 5), (kv, 7), (q, 9), (kv, 14), (kv, 11), (q, 3)]
                .map(|(shape, step)| (0..shape.iter().product()).map(|i| E::from_f32(value(i, step))).collect());
            Data { problem, mask, tensors, d_lse: (0..problem.lse_len()).map(|i| value(i, 13)).collect() }
        }

        fn tensor(&self, operand: usize) -> Tensor<&[E]> {
            let shape = if [0, 2, 5].contains(&operand) { self.problem.q_shape() } else { self.problem.kv_shape() };
            Tensor::bhsd(&self.tensors[operand], shape)
        }

        fn options(&self) -> Options {
            Options { mask: self.mask, scale: Some(SCALE), ..Options::default() }
        }

        fn plain(&self, pair: usize) -> Scores<Tensor<&[E]>> {
            Scores::plain(self.tensor(2 * pair), self.tensor(2 * pair + 1))
        }

        fn piecewise(&self, dist_threshold: i32) -> Scores<Tensor<&[E]>> {
            let [first, second] = [0, 2].map(|q| Pair { q: self.tensor(q), k: self.tensor(q + 1) });
            Scores::piecewise(first, second, dist_threshold)
        }

        /// Returns the forward pass in f64, and in the precision of a kernel.
        fn forward(&self, scores: Scores<Tensor<&[E]>>) -> [Forward; 2] {
            [forward_f64::<E>, forward_plain::<E>]
                .map(|run| run(&self.problem, &self.options(), scores, self.tensor(4), NONE, &Rows::All).unwrap())
        }

        /// Returns the gradients in f64, and in the precision of a kernel.
        fn backward(&self, scores: Scores<Tensor<&[E]>>) -> [Backward; 2] {
            let (values, d_lse) = ([self.tensor(4), self.tensor(5)], Some(&self.d_lse[..]));
            [
                backward_f64(&self.problem, &self.options(), scores, values, NONE, d_lse).unwrap(),
                backward_plain(&self.problem, &self.options(), scores, values, NONE, (None, d_lse)).unwrap(),
            ]
        }

        /// Returns every threshold that makes a difference, and some beyond.
        fn thresholds(&self) -> impl Iterator<Item = i32> + use<E> {
            let (m, n) = (self.problem.seqlen_q as i32, self.problem.seqlen_k as i32);
            (-m - 1..=n + 1).chain([i32::MIN, i32::MAX])
        }
    }

    /// True if a score comes from the second pair, by the definition.
    fn is_second(problem: &Problem, i: usize, j: usize, dist_threshold: i32) -> bool {
        let dist = (i + problem.seqlen_k) as i128 - (problem.seqlen_q + j) as i128;
        dist >= i128::from(dist_threshold)
    }

    #[test]
    fn equal_pairs_are_plain_attention_whatever_the_threshold() {
        for shape in SHAPES {
            let mut data = Data::<f16>::new(shape);
            data.tensors[2] = data.tensors[0].clone();
            data.tensors[3] = data.tensors[1].clone();
            let (forward, backward) = (data.forward(data.plain(0)), data.backward(data.plain(0)));
            for threshold in data.thresholds() {
                assert_eq!(data.forward(data.piecewise(threshold)), forward, "{shape:?} {threshold}");
                let found = data.backward(data.piecewise(threshold));
                let [exact, plain] = &found;
                assert!(exact.dv == backward[0].dv && plain.dv == backward[1].dv, "{shape:?} {threshold}");
                // Each pair has a part of the sums. In f64 their order hardly matters.
                let second = exact.second.as_ref().unwrap();
                let parts = [(&exact.dq, &second.q, &backward[0].dq), (&exact.dk, &second.k, &backward[0].dk)];
                for (first, second, whole) in parts {
                    assert!(first.len() == whole.len() && second.len() == whole.len());
                    let mut sums = first.iter().zip(second).zip(whole);
                    assert!(sums.all(|((a, b), whole)| (a + b - whole).abs() < 1e-13), "{shape:?} {threshold}");
                }
            }
        }
    }

    /// The pair that takes no part may hold any values.
    #[test]
    fn one_side_of_the_threshold_is_plain_attention() {
        for shape @ (m, n, mask) in SHAPES {
            let (m, n) = (m as i32, n as i32);
            // Under the causal mask, no query attends to a key after it.
            let least = if mask == Mask::Causal { 0 } else { 1 - m };
            for (used, thresholds) in [(0, [n, n + 1, i32::MAX]), (1, [least, least.min(1 - m), i32::MIN])] {
                let mut data = Data::<f16>::new(shape);
                let unused = 1 - used;
                data.tensors[2 * unused].fill(f16::NAN);
                data.tensors[2 * unused + 1].fill(f16::INFINITY);
                let forward = data.forward(data.plain(used));
                let backward = data.backward(data.plain(used));
                for threshold in thresholds {
                    assert_eq!(data.forward(data.piecewise(threshold)), forward, "{shape:?} {threshold}");
                    let zeros = |x: &Vec<f64>| vec![0.0; x.len()];
                    let expected = backward.clone().map(|Backward { dq, dk, dv, .. }| {
                        let zero = Pair { q: zeros(&dq), k: zeros(&dk) };
                        let pair = Pair { q: dq, k: dk };
                        let (Pair { q, k }, second) = if used == 0 { (pair, zero) } else { (zero, pair) };
                        Backward { dq: q, dk: k, dv, second: Some(second), ..Backward::default() }
                    });
                    assert_eq!(data.backward(data.piecewise(threshold)), expected, "{shape:?} {threshold}");
                }
            }
        }
    }

    /// Scores of the first pair are 0, those of the second are 1, and V is the identity. So O·exp(LSE) reveals each
    /// score.
    #[test]
    fn a_threshold_moves_the_scores_at_its_distance() {
        for (m, n) in [(5, 7), (7, 5), (6, 6), (1, 8), (8, 1)] {
            for mask in [Mask::None, Mask::Causal] {
                let mut data = Data::<f16>::new((m, n, mask));
                let one = |at: usize, of: usize| if at == of { f16::ONE } else { f16::ZERO };
                data.tensors[0].fill(f16::ZERO);
                data.tensors[2].iter_mut().enumerate().for_each(|(at, x)| *x = one(at % 8, 0));
                data.tensors[3].iter_mut().enumerate().for_each(|(at, x)| *x = one(at % 8, 0));
                data.tensors[4].iter_mut().enumerate().for_each(|(at, x)| *x = one(at % 8, at / 8 % n));
                for threshold in data.thresholds() {
                    let [found, _] = data.forward(data.piecewise(threshold));
                    for (row, lse) in found.lse.iter().enumerate() {
                        let i = row % m;
                        for j in 0..n {
                            let score = match (mask, is_second(&data.problem, i, j, threshold)) {
                                (Mask::Causal, _) if !is_second(&data.problem, i, j, 0) => f64::NEG_INFINITY,
                                (_, second) => f64::from(u8::from(second)) * f64::from(SCALE),
                            };
                            let weight = if lse.is_finite() { found.o[row * 8 + j] * lse.exp() } else { 0.0 };
                            assert!((weight - score.exp()).abs() < 1e-12, "{m} {n} {mask} {threshold} {i} {j}");
                        }
                    }
                }
            }
        }
    }

    /// Compares the gradients with central differences of Σ O∘dO + Σ LSE∘dLSE. The step is exact in f16 when added to
    /// any of the values.
    #[test]
    fn gradients_equal_the_differences_of_the_forward() {
        const STEP: f32 = 1.0 / 1024.0;
        for (shape, threshold) in SHAPES.into_iter().zip([1, -1, 1, 2, 0, 0]) {
            let mut data = Data::<f16>::new(shape);
            let [Backward { dq, dk, dv, second: Some(second), .. }, _] = data.backward(data.piecewise(threshold))
            else {
                panic!("no second pair");
            };
            let loss = |data: &Data<f16>| -> f64 {
                let [forward, _] = data.forward(data.piecewise(threshold));
                let of_o: f64 = forward.o.iter().zip(&data.tensors[5]).map(|(o, g)| o * f64::from(g.to_f32())).sum();
                let lse = forward.lse.iter().zip(&data.d_lse).filter(|(lse, _)| lse.is_finite());
                of_o + lse.map(|(lse, &g)| lse * f64::from(g)).sum::<f64>()
            };
            for (operand, gradient) in [dq, dk, second.q, second.k, dv].into_iter().enumerate() {
                assert_eq!(gradient.len(), data.tensors[operand].len());
                let largest = gradient.iter().fold(0.0f64, |a, x| a.max(x.abs()));
                // With a threshold of 0 and a causal mask the first pair takes no part.
                let used = shape.1 > 0 && (threshold != 0 || operand > 1);
                assert_eq!(largest > 0.05, used, "{shape:?} {operand}: {largest}");
                for (at, gradient) in gradient.iter().enumerate() {
                    let x = data.tensors[operand][at].to_f32();
                    let [above, below] = [x + STEP, x - STEP].map(|x| {
                        data.tensors[operand][at] = f16::from_f32(x);
                        assert_eq!(data.tensors[operand][at].to_f32(), x);
                        loss(&data)
                    });
                    data.tensors[operand][at] = f16::from_f32(x);
                    let expected = (above - below) / (2.0 * f64::from(STEP));
                    assert!((gradient - expected).abs() < 1e-6, "{shape:?} {operand} {at}: {gradient} not {expected}");
                }
            }
        }
    }

    #[test]
    fn rows_without_a_key_are_zero() {
        for (shape @ (m, n, _), dead) in [((5, 2, Mask::Causal), 3), ((2, 0, Mask::None), 2)] {
            let mut data = Data::<f16>::new(shape);
            for row in (0..8 * m).filter(|row| row % m < dead) {
                for operand in [0, 2, 5] {
                    data.tensors[operand][row * 8..][..8].fill(f16::NAN);
                }
                data.d_lse[row] = f32::NAN;
            }
            for threshold in data.thresholds() {
                for found in data.forward(data.piecewise(threshold)) {
                    for (row, (o, &lse)) in found.o.chunks(8).zip(&found.lse).enumerate() {
                        let is_dead = lse == f64::NEG_INFINITY && o == [0.0; 8];
                        assert!(if row % m < dead { is_dead } else { lse.is_finite() }, "{shape:?} {threshold} {row}");
                    }
                }
                for Backward { dq, dk, dv, second, .. } in data.backward(data.piecewise(threshold)) {
                    let Pair { q, k } = second.unwrap();
                    let is_dead = |(at, x): (usize, &f64)| if at / 8 % m < dead { *x == 0.0 } else { x.is_finite() };
                    assert!(dq.iter().enumerate().all(is_dead) && q.iter().enumerate().all(is_dead));
                    assert!([dk, k, dv].iter().flatten().all(|x| x.is_finite()) || n == 0);
                }
            }
        }
    }

    #[test]
    fn plain_is_close_and_rounds_every_gradient() {
        for (shape, threshold) in [((3, 5, Mask::None), 1), ((6, 4, Mask::Causal), 1), ((70, 90, Mask::Causal), 30)] {
            let data = Data::<bf16>::new(shape);
            let [exact, plain] = data.backward(data.piecewise(threshold));
            let accuracy = GradientAccuracy::of(&plain, &plain, &exact, 1.0);
            assert!(accuracy.passed());
            let Pair { q, k } = plain.second.as_ref().unwrap();
            for ((name, accuracy), x) in accuracy.named().into_iter().zip([&plain.dq, &plain.dk, q, k, &plain.dv]) {
                let largest = x.iter().fold(0.0f64, |a, x| a.max(x.abs()));
                assert!((1e-9..=largest / 64.0).contains(&accuracy.error), "{shape:?} {name} {accuracy:?}");
                assert!(x.iter().all(|&x| bf16::from_f64(x).to_f64() == x), "{shape:?} {name}");
            }
        }
    }

    #[test]
    fn each_tensor_is_checked() {
        let data = Data::<f16>::new((3, 5, Mask::None));
        let fitting = || [0, 2].map(|q| Pair { q: data.tensor(q), k: data.tensor(q + 1) });
        for pair in 0..2 {
            for of_k in [false, true] {
                let mut pairs = fitting();
                let tensor = if of_k { &mut pairs[pair].k } else { &mut pairs[pair].q };
                tensor.data = &tensor.data[1..];
                let scores = Scores::piecewise(pairs[0], pairs[1], 0);
                let [v, d_o] = [data.tensor(4), data.tensor(5)];
                assert!(forward_f64(&data.problem, &data.options(), scores, v, NONE, &Rows::All).is_err());
                assert!(backward_f64(&data.problem, &data.options(), scores, [v, d_o], NONE, None).is_err());
            }
        }
        let nothing = Problem { seqlen_q: 0, seqlen_k: 0, ..data.problem };
        let none = |shape| Tensor::bhsd(&[][..], shape);
        let (q, kv) = (none(nothing.q_shape()), none(nothing.kv_shape()));
        let scores = Scores::piecewise(Pair { q, k: kv }, Pair { q, k: kv }, 0);
        let found = backward_f64::<f16>(&nothing, &data.options(), scores, [kv, q], NONE, None);
        assert_eq!(found, Ok(Backward { second: Some(Pair::default()), ..Backward::default() }));
    }
}
