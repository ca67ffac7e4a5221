//! A case's forward pass.

use kernels_gpu::element::Element;
use kernels_gpu::variants::Dtype;

use super::Case;
use super::guarded::Guarded;
use crate::backend::Backend;
use crate::error::{Operand, Result};
use crate::reference::{Accuracy, Forward, Rows, forward_f64, forward_plain};
use crate::tensor::Tensor;

/// Elements of the canaries before and after the LSE, which is left with the least alignment allowed: that of f32.
const CANARY_LSE: usize = 65;
/// A NaN whose bits no kernel writes.
const POISON_LSE: u32 = 0xffff_ffff;

/// How a case ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    pub o: Accuracy,
    pub lse: Accuracy,
    /// Whether everything outside of the outputs' rows is as it was.
    pub untouched: bool,
}

impl Outcome {
    /// Within the bar, and nothing else written.
    pub fn passed(&self) -> bool {
        self.o.passed() && self.lse.passed() && self.untouched
    }
}

/// What a case's run wrote.
#[derive(Clone, Debug)]
pub struct CaseOutput<E> {
    /// In the case's layout, padding included.
    pub o: Vec<E>,
    pub lse: Vec<f32>,
    /// Whether canaries and padding are as they were.
    pub untouched: bool,
}

impl Case {
    /// Runs the case with its own inputs and judges the rows that `rows` names.
    ///
    /// # Errors
    /// Those of [`Attention::forward_into`](crate::Attention::forward_into).
    pub fn run<B: Backend>(&self, backend: &B, rows: &Rows) -> Result<Outcome> {
        match self.problem.dtype {
            Dtype::F16 => self.judge::<B, half::f16>(backend, &self.inputs()?, rows),
            Dtype::Bf16 => self.judge::<B, half::bf16>(backend, &self.inputs()?, rows),
        }
    }

    /// Runs the case with the given inputs and judges the rows that `rows` names.
    ///
    /// # Errors
    /// As [`Case::run`].
    pub fn judge<B: Backend, E: Element>(&self, backend: &B, inputs: &[Vec<E>; 3], rows: &Rows) -> Result<Outcome> {
        let (problem, mask, scale) = (&self.problem, self.mask, self.effective_scale());
        let output = self.output::<B, E>(backend, inputs)?;
        let tensors = self.tensors(inputs);
        let exact = forward_f64(problem, mask, scale, tensors, rows)?;
        let plain = forward_plain(problem, mask, scale, tensors, rows)?;
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
    /// As [`Case::run`].
    pub fn output<B: Backend, E: Element>(&self, backend: &B, [q, k, v]: &[Vec<E>; 3]) -> Result<CaseOutput<E>> {
        let problem = &self.problem;
        let layout = self.layout(problem.q_shape());
        let lse_len = problem.lse_len();
        let q = backend.upload(Operand::Q, q)?;
        let k = backend.upload(Operand::K, k)?;
        let v = backend.upload(Operand::V, v)?;
        let mut o = Guarded::<B, E>::new(backend, Operand::O, layout)?;
        let mut lse = backend.upload(Operand::Lse, &vec![f32::from_bits(POISON_LSE); lse_len + 2 * CANARY_LSE])?;
        let tensor = |data, shape| Tensor { data, layout: self.layout(shape) };
        crate::Attention::new(*problem).mask(self.mask).scale(self.effective_scale()).forward_into(
            backend,
            tensor(B::slice(&q), problem.q_shape()),
            tensor(B::slice(&k), problem.kv_shape()),
            tensor(B::slice(&v), problem.kv_shape()),
            o.tensor(),
            Some(B::slice_mut(&mut lse, CANARY_LSE..CANARY_LSE + lse_len)),
        )?;
        let (o, kept) = o.content(backend)?;
        let lse = backend.download(&lse)?;
        let edges = lse[..CANARY_LSE].iter().chain(&lse[CANARY_LSE + lse_len..]);
        let lse_kept = edges.into_iter().all(|x| x.to_bits() == POISON_LSE);
        Ok(CaseOutput { o, lse: lse[CANARY_LSE..CANARY_LSE + lse_len].to_vec(), untouched: kept && lse_kept })
    }
}
