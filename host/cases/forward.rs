//! A case's forward pass.

use crate::element::Element;
use kernels_gpu::variants::Dtype;

use super::Case;
use super::guarded::{Guarded, GuardedLine};
use crate::backend::Backend;
use crate::error::{Operand, Result};
use crate::reference::{Accuracy, Forward, Rows, Scores, forward_f64, forward_plain};
use crate::tensor::Tensor;

/// Result of a case.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    pub o: Accuracy,
    pub lse: Accuracy,
    /// True if all memory outside of the outputs' rows is unchanged.
    pub untouched: bool,
}

impl Outcome {
    /// True if the errors are within the tolerance and nothing else was written.
    pub fn passed(&self) -> bool {
        self.o.passed() && self.lse.passed() && self.untouched
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
        let (problem, mask, scale, dropout) = (&self.problem, self.mask, self.effective_scale(), self.dropped());
        let exact = forward_f64(problem, mask, scale, &dropout, scores, v, rows)?;
        let plain = forward_plain(problem, mask, scale, &dropout, scores, v, rows)?;
        let o = Tensor { data: &output.o[..], layout: self.layout(problem.q_shape()) };
        let found = Forward::gather(problem, o, Some(&output.lse), rows)?;
        Ok(Outcome {
            o: Accuracy::of_o(&found, &plain, &exact),
            lse: Accuracy::of_lse(&found, &plain, &exact),
            untouched: output.untouched,
        })
    }

    /// Runs the case with the given inputs.
    ///
    /// # Errors
    /// Errors of [`Case::run`].
    pub fn output<B: Backend, E: Element>(&self, backend: &B, [q, k, v]: &[Vec<E>; 3]) -> Result<CaseOutput<E>> {
        let problem = &self.problem;
        let q = backend.upload(Operand::Q, q)?;
        let k = backend.upload(Operand::K, k)?;
        let v = backend.upload(Operand::V, v)?;
        let tensor = |data, shape| Tensor { data, layout: self.layout(shape) };
        let attention = self.attention();
        self.output_of(backend, |o, lse| {
            attention.forward_into(
                backend,
                tensor(B::slice(&q), problem.q_shape()),
                tensor(B::slice(&k), problem.kv_shape()),
                tensor(B::slice(&v), problem.kv_shape()),
                o,
                Some(lse),
            )
        })
    }

    /// Returns the O and the LSE that `forward` writes.
    pub(super) fn output_of<B: Backend, E: Element>(
        &self,
        backend: &B,
        forward: impl FnOnce(Tensor<B::SliceMut<'_, E>>, B::SliceMut<'_, f32>) -> Result<()>,
    ) -> Result<CaseOutput<E>> {
        let mut o = Guarded::<B, E>::new(backend, Operand::O, self.layout(self.problem.q_shape()))?;
        let mut lse = GuardedLine::<B>::new(backend, Operand::Lse, self.problem.lse_len())?;
        forward(o.tensor(), lse.line())?;
        let (o, kept) = o.content(backend)?;
        let (lse, lse_kept) = lse.content(backend)?;
        Ok(CaseOutput { o, lse, untouched: kept && lse_kept })
    }
}
