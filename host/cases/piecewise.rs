//! Piecewise cases: a case with a second pair of queries and keys, and the distance from which on that pair counts.

use std::fmt;

use half::{bf16, f16};
use kernels_gpu::variants::Dtype;

use crate::element::Element;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::upload::Inputs;
use super::{BackwardData, BackwardOutcome, Case, CaseGradients, CaseOutput, Outcome};
use crate::attention::PiecewiseGradients;
use crate::backend::Backend;
use crate::error::Result;
use crate::operands::{Gradients, Pair};
use crate::plan::Determinism;
use crate::reference::{Backward, Limits, Rows, Scores};
use crate::tensor::Tensor;

/// Changes the seed, so that the second pair has other numbers than the first.
const SECOND_SEED: u64 = 0xd1b5_4a32_d192_ed03;
/// Changes the seed, so that the threshold is another number than the case's first.
const THRESHOLD_SEED: u64 = 0x8cb9_2ba7_2f3d_8dd7;

/// One piecewise attention with random inputs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PiecewiseCase {
    /// All but the threshold. Q1, K1 and V are its inputs.
    pub case: Case,
    /// The signed distance i + seqlen_k − seqlen_q − j from which on the second pair counts.
    pub dist_threshold: i32,
}

impl PiecewiseCase {
    /// Returns [`Case::random`] with a random threshold, every third time with dropout.
    pub fn random(seed: u64, limit: f64) -> Self {
        let case = if seed.is_multiple_of(3) { Case::random_dropout(seed, limit) } else { Case::random(seed, limit) };
        PiecewiseCase::with_random_threshold(case, seed)
    }

    /// Adds a threshold: 0, negative, beyond every distance, next to an edge of tiles, half the keys or next to that,
    /// or any distance.
    pub fn with_random_threshold(case: Case, seed: u64) -> Self {
        const TILES: [i64; 9] = [16, 64, 80, 96, 112, 128, 160, 176, 192];
        let mut rng = StdRng::seed_from_u64(seed ^ THRESHOLD_SEED);
        let rng = &mut rng;
        let [m, n] = [case.problem.seqlen_q, case.problem.seqlen_k].map(|x| x as i64);
        // Distances of the last key to the first query, and of the first key to the last query.
        let (least, largest) = ((1 - m).min(n), n - 1);
        let threshold = match rng.random_range(0..8) {
            0 => 0,
            1 => rng.random_range(least.min(-1)..=-1),
            2 => {
                let beyond = [largest + 1, largest + 2, i32::MAX.into(), least, least - 1, i32::MIN.into()];
                *beyond.choose(rng).unwrap_or(&0)
            }
            3 | 4 => {
                let tile = *TILES.choose(rng).unwrap_or(&64);
                // Tiles are counted from the first query and key, but distances from the last.
                let origin = if rng.random() { n - m } else { 0 };
                let blocks = rng.random_range(least.min(0) / tile..=largest.max(0) / tile);
                origin + blocks * tile + rng.random_range(-1..=1)
            }
            5 => n / 2 + rng.random_range(-1..=1),
            _ => rng.random_range(least..=largest.max(least)),
        };
        let dist_threshold = threshold.clamp(i32::MIN.into(), i32::MAX.into()) as i32;
        PiecewiseCase { case, dist_threshold }
    }

    /// Returns Q1, K1, Q2, K2 and V: normal values, with NaN in the padding.
    pub fn inputs<E: Element>(&self) -> Result<[Vec<E>; 5]> {
        let [q1, k1, v] = self.case.inputs()?;
        let second = Case { seed: self.case.seed ^ SECOND_SEED, ..self.case };
        let [q2, k2, _] = second.inputs()?;
        Ok([q1, k1, q2, k2, v])
    }

    /// Returns the inputs as tensors.
    pub fn tensors<'a, E>(&self, [q1, k1, q2, k2, v]: &'a [Vec<E>; 5]) -> [Tensor<&'a [E]>; 5] {
        let [of_q, of_kv] = [self.case.problem.q_shape(), self.case.problem.kv_shape()].map(|x| self.case.layout(x));
        [(q1, of_q), (k1, of_kv), (q2, of_q), (k2, of_kv), (v, of_kv)]
            .map(|(data, layout)| Tensor { data: &data[..], layout })
    }

    /// Runs the forward pass and judges the rows that `rows` names.
    ///
    /// # Errors
    /// Errors of the operator and of the reference.
    pub fn run<B: Backend>(&self, backend: &B, rows: &Rows) -> Result<Outcome> {
        match self.case.problem.dtype {
            Dtype::F16 => self.run_with::<B, f16>(backend, rows),
            Dtype::Bf16 => self.run_with::<B, bf16>(backend, rows),
        }
    }

    fn run_with<B: Backend, E: Element>(&self, backend: &B, rows: &Rows) -> Result<Outcome> {
        let inputs = self.inputs::<E>()?;
        self.judge(&inputs, &self.output(backend, &inputs)?, rows)
    }

    /// Runs both passes and judges the gradients.
    ///
    /// # Errors
    /// Errors of the operator and of the reference.
    pub fn run_backward<B: Backend>(&self, backend: &B, determinism: Determinism) -> Result<BackwardOutcome> {
        match self.case.problem.dtype {
            Dtype::F16 => self.run_backward_with::<B, f16>(backend, determinism),
            Dtype::Bf16 => self.run_backward_with::<B, bf16>(backend, determinism),
        }
    }

    fn run_backward_with<B: Backend, E: Element>(
        &self,
        backend: &B,
        determinism: Determinism,
    ) -> Result<BackwardOutcome> {
        let inputs = self.inputs::<E>()?;
        let output = self.output(backend, &inputs)?;
        let data = self.backward_data(inputs, output)?;
        self.judge_backward(&data, &self.gradients(backend, &data, determinism)?)
    }

    /// Returns the outputs of a forward pass with the given inputs.
    ///
    /// # Errors
    /// Errors of the operator.
    pub fn output<B: Backend, E: Element>(&self, backend: &B, inputs: &[Vec<E>; 5]) -> Result<CaseOutput<E>> {
        self.case.output_of(backend, Inputs::piecewise(inputs, self.dist_threshold))
    }

    /// Returns the gradients of a backward pass with the given data.
    ///
    /// # Errors
    /// Errors of the operator.
    pub fn gradients<B: Backend, E: Element>(
        &self,
        backend: &B,
        data: &BackwardData<E, 5>,
        determinism: Determinism,
    ) -> Result<CaseGradients<E, 5>> {
        let inputs = Inputs::piecewise(&data.inputs, self.dist_threshold);
        let (gradients, untouched) = self.case.gradients_of(backend, inputs, data, determinism)?;
        let PiecewiseGradients { first: Gradients { dq, dk, dv, d_sinks }, second } = gradients;
        Ok(CaseGradients { gradients: [dq, dk, second.q, second.k, dv], d_sinks, untouched })
    }

    /// Judges the rows that `rows` names in the outputs of a forward pass with the given inputs.
    ///
    /// # Errors
    /// Errors of the reference.
    pub fn judge<E: Element>(&self, inputs: &[Vec<E>; 5], output: &CaseOutput<E>, rows: &Rows) -> Result<Outcome> {
        let (scores, v) = self.scores(inputs);
        self.case.judge_output(output, scores, v, rows)
    }

    /// Returns the inputs of a backward pass: the given inputs, the forward pass's results, and random gradients of
    /// these.
    ///
    /// # Errors
    /// Errors of the layouts.
    pub fn backward_data<E: Element>(&self, inputs: [Vec<E>; 5], output: CaseOutput<E>) -> Result<BackwardData<E, 5>> {
        self.case.with_gradients(inputs, output)
    }

    /// Judges the gradients of a backward pass with the given data: dQ1, dK1, dQ2, dK2 and dV.
    ///
    /// # Errors
    /// Errors of the reference.
    pub fn judge_backward<E: Element>(
        &self,
        data: &BackwardData<E, 5>,
        found: &CaseGradients<E, 5>,
    ) -> Result<BackwardOutcome> {
        let (scores, v) = self.scores(&data.inputs);
        let [dq1, dk1, dq2, dk2, dv] = &found.gradients;
        let (of_q, of_kv) = (self.case.problem.q_shape(), self.case.problem.kv_shape());
        let gradients = Backward {
            dq: self.case.gather(dq1, of_q),
            dk: self.case.gather(dk1, of_kv),
            dv: self.case.gather(dv, of_kv),
            second: Some(Pair { q: self.case.gather(dq2, of_q), k: self.case.gather(dk2, of_kv) }),
            d_sinks: found.sinks(),
            ..Backward::default()
        };
        let gradients = self.case.judge_gradients(&gradients, data, scores, v)?;
        let limit = Limits::of(self.case.problem.dtype).gradients;
        let beyond = self.case.beyond("gradients", limit, &data.lse, scores, v)?;
        Ok(BackwardOutcome { gradients, untouched: found.untouched, beyond })
    }

    fn scores<'a, E>(&self, inputs: &'a [Vec<E>; 5]) -> (Scores<Tensor<&'a [E]>>, Tensor<&'a [E]>) {
        let [q1, k1, q2, k2, v] = self.tensors(inputs);
        (Scores::piecewise(Pair { q: q1, k: k1 }, Pair { q: q2, k: k2 }, self.dist_threshold), v)
    }
}

/// Writes the flags of `ferroflash check` that run both passes of the case again.
impl fmt::Display for PiecewiseCase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "--op piecewise,piecewise-backward --dist-threshold {} {}", self.dist_threshold, self.case)
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use kernels_gpu::variants::Dtype;

    use super::*;
    use crate::problem::{Mask, Problem};
    use crate::reference::{backward_plain, forward_plain};

    /// Returns the outputs of a plain implementation of `piecewise`, as a case's.
    fn output(piecewise: &PiecewiseCase, inputs: &[Vec<bf16>; 5]) -> CaseOutput<bf16> {
        let case = &piecewise.case;
        let (scores, v) = piecewise.scores(inputs);
        let found =
            forward_plain(&case.problem, &case.options(), scores, v, case.shaping().inputs(), &Rows::All).unwrap();
        let lse = found.lse.iter().map(|&x| x as f32).collect();
        CaseOutput { o: elements(&found.o), lse, untouched: true }
    }

    /// Returns the gradients of a plain implementation of `piecewise`, as a case's.
    fn gradients(piecewise: &PiecewiseCase, data: &BackwardData<bf16, 5>) -> CaseGradients<bf16, 5> {
        let case = &piecewise.case;
        let (scores, v) = piecewise.scores(&data.inputs);
        let [o, d_o] =
            [&data.o, &data.d_o].map(|x| Tensor { data: &x[..], layout: case.layout(case.problem.q_shape()) });
        let (shaping, results) = (case.shaping(), (Some(o), data.d_lse.as_deref()));
        let found =
            backward_plain(&case.problem, &case.options(), scores, [v, d_o], shaping.inputs(), results).unwrap();
        let Pair { q, k } = found.second.unwrap();
        let gradients = [found.dq, found.dk, q, k, found.dv].map(|x| elements(&x));
        CaseGradients { gradients, d_sinks: None, untouched: true }
    }

    fn elements(x: &[f64]) -> Vec<bf16> {
        x.iter().map(|&x| bf16::from_f64(x)).collect()
    }

    fn case(dist_threshold: i32) -> PiecewiseCase {
        let problem =
            Problem { batch: 1, heads_q: 4, heads_kv: 2, seqlen_q: 30, seqlen_k: 40, head_dim: 16, dtype: Dtype::Bf16 };
        PiecewiseCase { case: Case { seed: 7, ..Case::new(problem, Mask::Causal) }, dist_threshold }
    }

    /// Only the right threshold passes, and its neighbours fail.
    #[test]
    fn the_threshold_is_judged() {
        let right = case(12);
        let inputs = right.inputs().unwrap();
        let data = right.backward_data(inputs.clone(), output(&right, &inputs)).unwrap();
        assert!(data.d_lse.is_some());
        for dist_threshold in [0, 11, 12, 13, 40] {
            let run = case(dist_threshold);
            let forward = right.judge(&inputs, &output(&run, &inputs), &Rows::All).unwrap();
            assert_eq!(forward.passed(), run == right, "{dist_threshold}: {forward:?}");
            let backward = right.judge_backward(&data, &gradients(&run, &data)).unwrap();
            assert_eq!(backward.passed(), run == right, "{dist_threshold}\n{backward}");
        }
    }

    #[test]
    fn every_output_is_judged() {
        let case = case(12);
        let inputs = case.inputs().unwrap();
        let found = output(&case, &inputs);
        for wrong in [
            CaseOutput { o: vec![bf16::ZERO; found.o.len()], ..found.clone() },
            CaseOutput { lse: vec![0.0; found.lse.len()], ..found.clone() },
            CaseOutput { untouched: false, ..found.clone() },
        ] {
            assert!(!case.judge(&inputs, &wrong, &Rows::All).unwrap().passed());
        }
        let data = case.backward_data(inputs, found).unwrap();
        let found = gradients(&case, &data);
        assert!(case.judge_backward(&data, &found).unwrap().passed());
        for gradient in 0..5 {
            let mut wrong = found.clone();
            wrong.gradients[gradient].fill(bf16::ZERO);
            let outcome = case.judge_backward(&data, &wrong).unwrap();
            let failed: Vec<_> = outcome.gradients.named().iter().map(|(_, accuracy)| !accuracy.passed()).collect();
            assert!(failed.iter().enumerate().all(|(at, &failed)| failed == (at == gradient)), "{outcome}");
        }
        assert!(!case.judge_backward(&data, &CaseGradients { untouched: false, ..found }).unwrap().passed());
    }

    #[test]
    fn pairs_are_different_and_the_first_is_that_of_the_case() {
        let case = PiecewiseCase { case: Case { padding: 8, ..case(0).case }, ..case(0) };
        let bits = |x: &Vec<bf16>| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let [q1, k1, q2, k2, v] = case.inputs::<bf16>().unwrap().each_ref().map(bits);
        assert_eq!([&q1, &k1, &v].map(Clone::clone), case.case.inputs::<bf16>().unwrap().each_ref().map(bits));
        assert!(q1.len() == q2.len() && k1.len() == k2.len());
        assert!(q1 != q2 && k1 != k2 && v != k2);
    }

    #[test]
    fn random_thresholds_are_of_every_kind() {
        let cases: Vec<PiecewiseCase> = (0..4000).map(|seed| PiecewiseCase::random(seed, 1e7)).collect();
        let count = |kind: fn(i64, i64, i64) -> bool| {
            let kinds = cases.iter().filter(|x| {
                let Problem { seqlen_q, seqlen_k, .. } = x.case.problem;
                seqlen_q > 100 && seqlen_k > 100 && kind(x.dist_threshold.into(), seqlen_q as i64, seqlen_k as i64)
            });
            kinds.count()
        };
        let kinds: [fn(i64, i64, i64) -> bool; 7] = [
            |t, _, _| t == 0,
            |t, m, _| t < 0 && t > -m,
            |t, _, n| t >= n,
            |t, m, _| t <= 1 - m,
            |t, _, n| (t - n / 2).abs() <= 1,
            |t, m, n| t > 0 && t < n && (t % 64).min((t - n + m).rem_euclid(64)) == 0,
            |t, m, n| t > 1 - m && t < n && t % 16 > 1 && t % 16 < 15,
        ];
        assert!(kinds.iter().all(|&kind| count(kind) > 20), "{:?}", kinds.map(count));
        assert_eq!(PiecewiseCase::random(5, 1e7), cases[5]);
    }

    #[test]
    fn a_case_prints_its_flags() {
        let line = case(-3).to_string();
        let start = "--op piecewise,piecewise-backward --dist-threshold -3 --batch 1 --heads-q 4 --heads-kv 2 ";
        assert!(line.starts_with(start) && line.ends_with(&case(-3).case.to_string()), "{line}");
    }
}
