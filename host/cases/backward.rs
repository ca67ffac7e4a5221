//! A case's backward pass.

use std::fmt;

use crate::element::Element;
use kernels_gpu::variants::Dtype;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;

use super::guarded::{Guarded, GuardedLine};
use super::upload::{Inputs, SecondInputs, Upload, Uploaded, optional_of};
use super::{Case, CaseOutput, for_rows};
use crate::attention::{Piecewise, PiecewiseGradients};
use crate::backend::Backend;
use crate::error::Result;
use crate::operands::{BackwardInputs, BackwardPair, BackwardTensors, Gradients, Pair, Pass};
use crate::plan::Determinism;
use crate::problem::Problem;
use crate::reference::{Backward, Beyond, GradientAccuracy, Limits, Scores, backward_f64, backward_plain};
use crate::tensor::Tensor;

/// Changes the seed, so that the gradients of a case are other numbers than its inputs.
const GRADIENT_SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// Gradients in the host's memory.
type Downloaded<E> = PiecewiseGradients<Vec<E>, Vec<f32>>;

/// Inputs of a case's backward pass, each tensor in the case's layout.
#[derive(Clone, Debug)]
pub struct BackwardData<E, const INPUTS: usize = 3> {
    /// Q, K and V; or Q1, K1, Q2, K2 and V.
    pub inputs: [Vec<E>; INPUTS],
    /// O of the backend's own forward pass.
    pub o: Vec<E>,
    /// LSE of the backend's own forward pass.
    pub lse: Vec<f32>,
    /// Standard normal values.
    pub d_o: Vec<E>,
    /// Standard normal values, for every second seed.
    pub d_lse: Option<Vec<f32>>,
}

/// Gradients that a case's backward pass wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct CaseGradients<E, const INPUTS: usize = 3> {
    /// Gradients of the inputs, in their order and in the case's layout, padding included.
    pub gradients: [Vec<E>; INPUTS],
    /// Gradient of the sinks, if there are sinks.
    pub d_sinks: Option<Vec<f32>>,
    /// True if canaries and padding are unchanged.
    pub untouched: bool,
}

impl<E: Element, const INPUTS: usize> CaseGradients<E, INPUTS> {
    /// Returns the gradients as bits, so that NaN can be compared too.
    pub fn bits(&self) -> [Vec<u16>; INPUTS] {
        self.gradients.each_ref().map(|x| x.iter().map(|x| x.to_bits()).collect())
    }

    /// Returns the gradient of the sinks as bits.
    pub fn sink_bits(&self) -> Vec<u32> {
        self.d_sinks.iter().flatten().map(|x| x.to_bits()).collect()
    }

    /// Returns the gradient of the sinks as the reference has it.
    pub(super) fn sinks(&self) -> Option<Vec<f64>> {
        Some(self.d_sinks.as_ref()?.iter().map(|&x| x.into()).collect())
    }
}

/// Result of a case's backward pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BackwardOutcome {
    pub gradients: GradientAccuracy,
    /// True if all memory outside of the outputs' rows is unchanged.
    pub untouched: bool,
    /// Set if the gradients have no tolerance.
    pub beyond: Option<Beyond>,
}

impl BackwardOutcome {
    /// True if the errors are within the tolerance and nothing else was written.
    pub fn passed(&self) -> bool {
        self.gradients.passed() && self.untouched
    }

    /// True if other memory was written, or if the gradients are up to their limit and not within the tolerance.
    pub fn failed(&self) -> bool {
        !self.untouched || self.beyond.is_none() && !self.passed()
    }
}

impl fmt::Display for BackwardOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, found) in self.gradients.named() {
            let mark = if found.passed() { "" } else { " FAILED" };
            writeln!(f, "{name}: error {:.3e}, bar {:.3e}, plain {:.3e}{mark}", found.error, found.bar, found.plain)?;
        }
        write!(f, "memory outside {}", if self.untouched { "untouched" } else { "WRITTEN" })
    }
}

impl Case {
    /// Runs the case's forward pass, then its backward pass with a random dO and, for every second seed, a random dLSE.
    /// Judges the gradients.
    ///
    /// # Errors
    /// Errors of [`Attention::forward_into`](crate::Attention::forward_into) and of
    /// [`Attention::backward_into`](crate::Attention::backward_into).
    pub fn run_backward<B: Backend>(&self, backend: &B, determinism: Determinism) -> Result<BackwardOutcome> {
        match self.problem.dtype {
            Dtype::F16 => self.judge_backward::<B, half::f16>(backend, &self.backward_data(backend)?, determinism),
            Dtype::Bf16 => self.judge_backward::<B, half::bf16>(backend, &self.backward_data(backend)?, determinism),
        }
    }

    /// Runs the case's backward pass from the given data and judges the gradients.
    ///
    /// # Errors
    /// Errors of [`Attention::backward_into`](crate::Attention::backward_into).
    pub fn judge_backward<B: Backend, E: Element>(
        &self,
        backend: &B,
        data: &BackwardData<E>,
        determinism: Determinism,
    ) -> Result<BackwardOutcome> {
        self.judge_found_gradients(data, &self.gradients::<B, E>(backend, data, determinism)?)
    }

    /// Judges the gradients of a run from the given data.
    pub(super) fn judge_found_gradients<E: Element>(
        &self,
        data: &BackwardData<E>,
        found: &CaseGradients<E>,
    ) -> Result<BackwardOutcome> {
        let [q, k, v] = self.tensors(&data.inputs);
        let [dq, dk, dv] = &found.gradients;
        let (of_q, of_kv) = (self.problem.q_shape(), self.problem.kv_shape());
        let gradients = Backward {
            dq: self.gather(dq, of_q),
            dk: self.gather(dk, of_kv),
            dv: self.gather(dv, of_kv),
            d_sinks: found.sinks(),
            ..Backward::default()
        };
        let scores = Scores::plain(q, k);
        let gradients = self.judge_gradients(&gradients, data, scores, v)?;
        let beyond = self.beyond("gradients", Limits::of(self.problem.dtype).gradients, &data.lse, scores, v)?;
        Ok(BackwardOutcome { gradients, untouched: found.untouched, beyond })
    }

    /// Judges the gradients of a run with the given scores and values.
    pub(super) fn judge_gradients<E: Element, const INPUTS: usize>(
        &self,
        found: &Backward,
        data: &BackwardData<E, INPUTS>,
        scores: Scores<Tensor<&[E]>>,
        v: Tensor<&[E]>,
    ) -> Result<GradientAccuracy> {
        let (problem, options, shaping) = (&self.problem, &self.options(), self.shaping());
        let [o, d_o] = [&data.o, &data.d_o].map(|x| Tensor { data: &x[..], layout: self.layout(problem.q_shape()) });
        let d_lse = data.d_lse.as_deref();
        let exact = backward_f64(problem, options, scores, [v, d_o], shaping.inputs(), d_lse)?;
        let plain = backward_plain(problem, options, scores, [v, d_o], shaping.inputs(), (Some(o), d_lse))?;
        Ok(GradientAccuracy::of(found, &plain, &exact, self.cancelled(&scores, [&data.o, &data.d_o])))
    }

    /// Returns the size of the terms that dQ and dK subtract from each other, if no query attends to more than one key;
    /// otherwise 1.
    fn cancelled<E: Element>(&self, scores: &Scores<Tensor<&[E]>>, outputs: [&[E]; 2]) -> f64 {
        let Problem { seqlen_k, head_dim, .. } = self.problem;
        let single = match self.lengths {
            None => seqlen_k <= 1,
            Some(lengths) => lengths.sequences.iter().any(|sequence| sequence[1] <= 1),
        };
        if !single {
            return 1.0;
        }
        let [o, d_o] = outputs.map(|x| self.gather(x, self.problem.q_shape()));
        let terms = o
            .chunks_exact(head_dim)
            .zip(d_o.chunks_exact(head_dim))
            .fold(0.0, |largest: f64, (o, d_o)| largest.max(o.iter().zip(d_o).map(|(o, d_o)| (o * d_o).abs()).sum()));
        let factors = scores.pairs().flat_map(|pair| [pair.q, pair.k]);
        let factor = factors.flat_map(|x| self.gather(x.data, x.layout.shape)).fold(0.0, |a: f64, x| a.max(x.abs()));
        terms * factor * f64::from(self.effective_scale())
    }

    /// Returns the rows of a tensor in the case's layout, one after the other.
    pub(super) fn gather<E: Element>(&self, data: &[E], shape: [usize; 4]) -> Vec<f64> {
        let mut rows = Vec::new();
        for_rows(&self.layout(shape), |start| {
            rows.extend(data[start..start + shape[3]].iter().map(|x| f64::from(x.to_f32())));
        });
        rows
    }

    /// Returns random inputs, the results of the backend's forward pass, and random gradients of these results.
    ///
    /// # Errors
    /// Errors of [`Attention::forward_into`](crate::Attention::forward_into).
    pub fn backward_data<B: Backend, E: Element>(&self, backend: &B) -> Result<BackwardData<E>> {
        let inputs = self.inputs::<E>()?;
        let output = self.output::<B, E>(backend, &inputs)?;
        self.with_gradients(inputs, output)
    }

    /// Adds random gradients to inputs and the results of their forward pass.
    pub(super) fn with_gradients<E: Element, const INPUTS: usize>(
        &self,
        inputs: [Vec<E>; INPUTS],
        output: CaseOutput<E>,
    ) -> Result<BackwardData<E, INPUTS>> {
        let mut rng = StdRng::seed_from_u64(self.seed ^ GRADIENT_SEED);
        let d_o = self.normal(&mut rng, self.problem.q_shape(), 1.0)?;
        let has_d_lse = self.seed % 2 == 1;
        let d_lse = has_d_lse.then(|| (0..self.problem.lse_len()).map(|_| rng.sample(StandardNormal)).collect());
        Ok(BackwardData { inputs, o: output.o, lse: output.lse, d_o, d_lse })
    }

    /// Runs the case's backward pass from the given data.
    ///
    /// # Errors
    /// Errors of [`Attention::backward_into`](crate::Attention::backward_into).
    pub fn gradients<B: Backend, E: Element>(
        &self,
        backend: &B,
        data: &BackwardData<E>,
        determinism: Determinism,
    ) -> Result<CaseGradients<E>> {
        let (gradients, untouched) = self.gradients_of(backend, Inputs::plain(&data.inputs), data, determinism)?;
        let Gradients { dq, dk, dv, d_sinks } = gradients.first;
        Ok(CaseGradients { gradients: [dq, dk, dv], d_sinks, untouched })
    }

    /// Returns the gradients of a backward pass of `inputs`, and true if nothing else was written. The second pair's
    /// are empty if there is no such pair.
    pub(super) fn gradients_of<B: Backend, E: Element, const INPUTS: usize>(
        &self,
        backend: &B,
        inputs: Inputs<'_, E>,
        data: &BackwardData<E, INPUTS>,
        determinism: Determinism,
    ) -> Result<(Downloaded<E>, bool)> {
        let shaping = self.shaping();
        let uploaded = inputs.backward(data, shaping.inputs()).visit(&mut Upload::new(backend, self))?;
        let BackwardTensors { q, k, second, v, o, d_o, lse, d_lse, optional, dq, dk, dv, d_sinks, .. } = uploaded;
        let tensors = BackwardInputs {
            q: q.tensor(),
            k: k.tensor(),
            v: v.tensor(),
            o: o.tensor(),
            d_o: d_o.tensor(),
            lse: B::slice(&lse),
            d_lse: d_lse.as_ref().map(B::slice),
            optional: optional_of::<B>(&optional),
        };
        let mut first = Gradients { dq, dk, dv, d_sinks };
        let first_views = Gradients {
            dq: first.dq.tensor(),
            dk: first.dk.tensor(),
            dv: first.dv.tensor(),
            d_sinks: first.d_sinks.as_mut().map(GuardedLine::line),
        };
        let attention = self.attention().determinism(determinism);
        let mut untouched = true;
        let mut content = |output: &Guarded<B, E>| -> Result<Vec<E>> {
            let (content, kept) = output.content(backend)?;
            untouched &= kept;
            Ok(content)
        };
        let second = match (inputs.second, second) {
            (Some(SecondInputs { dist_threshold, .. }), Some(BackwardPair { inputs: pair, mut gradients })) => {
                let outputs =
                    PiecewiseGradients { first: first_views, second: gradients.as_mut().map(Guarded::tensor) };
                let pair = pair.as_ref().map(Uploaded::tensor);
                Piecewise::new(attention, dist_threshold).backward_into(backend, tensors, pair, outputs)?;
                Pair { q: content(&gradients.q)?, k: content(&gradients.k)? }
            }
            _ => {
                attention.backward_into(backend, tensors, first_views)?;
                Pair::default()
            }
        };
        let [dq, dk, dv] = [content(&first.dq)?, content(&first.dk)?, content(&first.dv)?];
        let mut d_sinks = None;
        if let Some(line) = &first.d_sinks {
            let (found, kept) = line.content(backend)?;
            untouched &= kept;
            d_sinks = Some(found);
        }
        let first = Gradients { dq, dk, dv, d_sinks };
        Ok((PiecewiseGradients { first, second }, untouched))
    }
}
