//! A case's total attention.

use std::fmt;

use crate::element::Element;
use kernels_gpu::variants::Dtype;

use super::Case;
use super::upload::{Output, Upload, slopes_of};
use crate::backend::Backend;
use crate::error::Result;
use crate::operands::{OptionalInputs, Pass, TotalInputs, TotalTensors};
use crate::reference::{Accuracy, Beyond, Limits, Scores, total_f64, total_plain};

/// Inputs of a case's total attention.
#[derive(Clone, Debug)]
pub struct TotalData<E> {
    /// Q, K and V in the case's layout. V is needed only for the LSE.
    pub inputs: [Vec<E>; 3],
    /// LSE of the backend's own forward pass.
    pub lse: Vec<f32>,
}

/// Result that a case's run wrote.
#[derive(Clone, Debug)]
pub struct CaseTotal {
    /// (batch, heads_q, seqlen_k), contiguous.
    pub total: Vec<f32>,
    /// True if the canaries are unchanged.
    pub untouched: bool,
}

impl CaseTotal {
    /// Returns the result as bits, so that NaN can be compared too.
    pub fn bits(&self) -> Vec<u32> {
        self.total.iter().map(|x| x.to_bits()).collect()
    }
}

/// Result of a case's total attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TotalOutcome {
    pub total: Accuracy,
    /// True if all memory outside of the result is unchanged.
    pub untouched: bool,
    /// Set if the result has no tolerance.
    pub beyond: Option<Beyond>,
}

impl TotalOutcome {
    /// True if the error is within the tolerance and nothing else was written.
    pub fn passed(&self) -> bool {
        self.total.passed() && self.untouched
    }

    /// True if other memory was written, or if the result is up to its limit and not within the tolerance.
    pub fn failed(&self) -> bool {
        !self.untouched || self.beyond.is_none() && !self.passed()
    }
}

impl fmt::Display for TotalOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Accuracy { error, bar, plain } = self.total;
        let mark = if self.total.passed() { "" } else { " FAILED" };
        writeln!(f, "total: error {error:.3e}, bar {bar:.3e}, plain {plain:.3e}{mark}")?;
        write!(f, "memory outside {}", if self.untouched { "untouched" } else { "WRITTEN" })
    }
}

impl Case {
    /// Runs the case's forward pass, then its total attention from the LSE, and judges that.
    ///
    /// # Errors
    /// Errors of [`Attention::forward_into`](crate::Attention::forward_into) and of
    /// [`Attention::total_attention_into`](crate::Attention::total_attention_into).
    pub fn run_total<B: Backend>(&self, backend: &B) -> Result<TotalOutcome> {
        match self.problem.dtype {
            Dtype::F16 => self.judge_total::<B, half::f16>(backend, &self.total_data(backend)?),
            Dtype::Bf16 => self.judge_total::<B, half::bf16>(backend, &self.total_data(backend)?),
        }
    }

    /// Computes the case's total attention from the given data and judges it.
    ///
    /// # Errors
    /// Errors of [`Attention::total_attention_into`](crate::Attention::total_attention_into).
    pub fn judge_total<B: Backend, E: Element>(&self, backend: &B, data: &TotalData<E>) -> Result<TotalOutcome> {
        self.judge_found_total(data, &self.total::<B, E>(backend, data)?)
    }

    /// Judges the total attention of a run from the given data.
    pub(super) fn judge_found_total<E: Element>(&self, data: &TotalData<E>, found: &CaseTotal) -> Result<TotalOutcome> {
        let (problem, options, shaping) = (&self.problem, &self.options(), self.shaping());
        let [q, k, v] = self.tensors(&data.inputs);
        let exact = total_f64(problem, options, [q, k], shaping.inputs())?;
        let plain = total_plain(problem, options, [q, k], shaping.inputs(), &data.lse)?;
        let total: Vec<f64> = found.total.iter().map(|&x| x.into()).collect();
        let limit = Limits::of(problem.dtype).total;
        let beyond = self.beyond("total attention", limit, &data.lse, Scores::plain(q, k), v)?;
        Ok(TotalOutcome { total: Accuracy::of_total(&total, &plain, &exact), untouched: found.untouched, beyond })
    }

    /// Returns random inputs, and the LSE of the backend's forward pass.
    ///
    /// # Errors
    /// Errors of [`Attention::forward_into`](crate::Attention::forward_into).
    pub fn total_data<B: Backend, E: Element>(&self, backend: &B) -> Result<TotalData<E>> {
        let inputs = self.inputs::<E>()?;
        let lse = self.output::<B, E>(backend, &inputs)?.lse;
        Ok(TotalData { inputs, lse })
    }

    /// Computes the case's total attention from the given data.
    ///
    /// # Errors
    /// Errors of [`Attention::total_attention_into`](crate::Attention::total_attention_into).
    pub fn total<B: Backend, E: Element>(&self, backend: &B, data: &TotalData<E>) -> Result<CaseTotal> {
        let [q, k, _] = data.inputs.each_ref().map(Vec::as_slice);
        let shaping = self.shaping();
        let OptionalInputs { slopes, lengths, .. } = shaping.inputs();
        let (total, workspace, workspace_bytes) = (Output::<f32>::new(), 0, 0);
        let lse = &data.lse[..];
        let tensors = TotalTensors { q, k, lse, slopes, lengths, total, workspace, workspace_bytes };
        let TotalTensors { q, k, lse, slopes, lengths, mut total, .. } =
            tensors.visit(&mut Upload::new(backend, self))?;
        let slopes = slopes.as_ref().map(slopes_of::<B>);
        let lengths = lengths.as_ref().map(|lengths| lengths.map_ref(B::slice));
        let inputs = TotalInputs { q: q.tensor(), k: k.tensor(), lse: B::slice(&lse), slopes, lengths };
        self.attention().total_attention_into(backend, inputs, total.line())?;
        let (total, untouched) = total.content(backend)?;
        Ok(CaseTotal { total, untouched })
    }
}
