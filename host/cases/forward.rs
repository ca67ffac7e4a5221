//! A case's forward pass.

use crate::element::Element;
use kernels_gpu::variants::Dtype;

use super::Case;
use super::guarded::GuardedLine;
use super::upload::{Inputs, Output, SecondInputs, Upload, Uploaded, optional_of};
use crate::attention::Piecewise;
use crate::backend::Backend;
use crate::error::Result;
use crate::operands::{ForwardTensors, Inputs as AttentionInputs, Pair, Pass};
use crate::reference::{Accuracy, Beyond, Forward, Limits, Rows, Scores, forward_f64, forward_plain, largest_lse};
use crate::tensor::Tensor;

/// Result of a case.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    pub o: Accuracy,
    pub lse: Accuracy,
    /// True if all memory outside of the outputs' rows is unchanged.
    pub untouched: bool,
    /// The largest exact |LSE| of the rows that were judged.
    pub largest_lse: f64,
    pub limits: Limits,
}

impl Outcome {
    /// True if the errors are within the tolerance and nothing else was written.
    pub fn passed(&self) -> bool {
        self.o.passed() && self.lse.passed() && self.untouched
    }

    /// Returns the results whose limit is exceeded, if any is.
    pub fn beyond(&self) -> Option<Beyond> {
        let Outcome { largest_lse, limits, .. } = *self;
        Beyond::of("O and LSE", largest_lse, limits.lse).or(Beyond::of("O", largest_lse, limits.o))
    }

    /// True if a promise is broken: that of the tolerance up to the limits; up to the LSE's limit, that of a finite O
    /// and of the LSE's tolerance; and in every case that of other memory.
    pub fn failed(&self) -> bool {
        let kept = if self.largest_lse > self.limits.lse {
            true
        } else if self.largest_lse > self.limits.o {
            self.o.error.is_finite() && self.lse.passed()
        } else {
            self.o.passed() && self.lse.passed()
        };
        !(kept && self.untouched)
    }
}

/// Outputs that a case's run wrote.
#[derive(Clone, Debug)]
pub struct CaseOutput<E> {
    /// In the case's layout, padding included.
    pub o: Vec<E>,
    pub lse: Vec<f32>,
    /// True if canaries and padding are unchanged.
    pub untouched: bool,
}

impl<E: Element> CaseOutput<E> {
    /// Returns the bits of O and the LSE, padding included.
    pub fn bits(&self) -> (Vec<u16>, Vec<u32>) {
        (self.o.iter().map(|x| x.to_bits()).collect(), self.lse.iter().map(|x| x.to_bits()).collect())
    }
}

impl Case {
    /// Runs the case with its own inputs and judges the rows that `rows` names.
    ///
    /// # Errors
    /// Errors of [`Attention::forward_into`](crate::Attention::forward_into).
    pub fn run<B: Backend>(&self, backend: &B, rows: &Rows) -> Result<Outcome> {
        match self.problem.dtype {
            Dtype::F16 => self.judge::<B, half::f16>(backend, &self.inputs()?, rows),
            Dtype::Bf16 => self.judge::<B, half::bf16>(backend, &self.inputs()?, rows),
        }
    }

    /// Runs the case with the given inputs and judges the rows that `rows` names.
    ///
    /// # Errors
    /// Errors of [`Case::run`].
    pub fn judge<B: Backend, E: Element>(&self, backend: &B, inputs: &[Vec<E>; 3], rows: &Rows) -> Result<Outcome> {
        let output = self.output::<B, E>(backend, inputs)?;
        let [q, k, v] = self.tensors(inputs);
        self.judge_output(&output, Scores::plain(q, k), v, rows)
    }

    /// Judges the rows that `rows` names in the outputs of a run with the given scores and values.
    pub(super) fn judge_output<E: Element>(
        &self,
        output: &CaseOutput<E>,
        scores: Scores<Tensor<&[E]>>,
        v: Tensor<&[E]>,
        rows: &Rows,
    ) -> Result<Outcome> {
        let (problem, options, shaping) = (&self.problem, &self.options(), self.shaping());
        let exact = forward_f64(problem, options, scores, v, shaping.inputs(), rows)?;
        let plain = forward_plain(problem, options, scores, v, shaping.inputs(), rows)?;
        let o = Tensor { data: &output.o[..], layout: self.layout(problem.q_shape()) };
        let found = Forward::gather(problem, o, Some(&output.lse), rows)?;
        Ok(Outcome {
            o: Accuracy::of_o(&found, &plain, &exact),
            lse: Accuracy::of_lse(&found, &plain, &exact),
            untouched: output.untouched,
            largest_lse: largest_lse(&exact.lse),
            limits: Limits::of(problem.dtype),
        })
    }

    /// Runs the case with the given inputs.
    ///
    /// # Errors
    /// Errors of [`Case::run`].
    pub fn output<B: Backend, E: Element>(&self, backend: &B, inputs: &[Vec<E>; 3]) -> Result<CaseOutput<E>> {
        self.output_of(backend, Inputs::plain(inputs))
    }

    /// Returns the O and the LSE of the given inputs.
    pub(super) fn output_of<B: Backend, E: Element>(
        &self,
        backend: &B,
        inputs: Inputs<'_, E>,
    ) -> Result<CaseOutput<E>> {
        let Inputs { q, k, v, second } = inputs;
        let pair = second.map(|second| second.pair);
        let (shaping, o, lse) = (self.shaping(), Output::<E>::new(), Some(Output::<f32>::new()));
        let (optional, workspace, workspace_bytes) = (shaping.inputs(), 0, 0);
        let tensors = ForwardTensors { q, k, second: pair, v, optional, o, lse, workspace, workspace_bytes };
        let uploaded = tensors.visit(&mut Upload::new(backend, self))?;
        let ForwardTensors { q, k, second: pair, v, optional, mut o, mut lse, .. } = uploaded;
        let optional = optional_of::<B>(&optional);
        let (attention, line) = (self.attention(), lse.as_mut().map(GuardedLine::line));
        match (second, &pair) {
            (Some(SecondInputs { dist_threshold, .. }), Some(pair)) => {
                let first = Pair { q: q.tensor(), k: k.tensor() };
                let pair = pair.as_ref().map(Uploaded::tensor);
                let inputs = AttentionInputs::piecewise(first, pair, v.tensor()).optional(optional);
                Piecewise::new(attention, dist_threshold).forward_into(backend, inputs, o.tensor(), line)?;
            }
            _ => {
                let inputs = AttentionInputs::new(q.tensor(), k.tensor(), v.tensor()).optional(optional);
                attention.forward_into(backend, inputs, o.tensor(), line)?;
            }
        }
        let (o, kept) = o.content(backend)?;
        let (lse, lse_kept) = lse.map_or(Ok((Vec::new(), true)), |lse| lse.content(backend))?;
        Ok(CaseOutput { o, lse, untouched: kept && lse_kept })
    }
}
