//! A case's backward pass.

use std::fmt;

use kernels_gpu::element::Element;
use kernels_gpu::variants::Dtype;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;

use super::guarded::Guarded;
use super::{Case, for_rows};
use crate::Attention;
use crate::backend::Backend;
use crate::error::{Operand, Result};
use crate::operands::{BackwardInputs, Gradients};
use crate::plan::Determinism;
use crate::reference::{Backward, GradientAccuracy, backward_f64, backward_plain};
use crate::tensor::{Layout, Tensor};

/// Makes the gradients of a case other numbers than its inputs.
const GRADIENT_SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// What a case's backward pass starts from, each tensor in the case's layout.
#[derive(Clone, Debug)]
pub struct BackwardData<E> {
    /// Q, K and V.
    pub inputs: [Vec<E>; 3],
    /// What the backend's own forward pass gave.
    pub o: Vec<E>,
    /// What the backend's own forward pass gave.
    pub lse: Vec<f32>,
    /// Standard normal values.
    pub d_o: Vec<E>,
    /// Standard normal values, for every second seed.
    pub d_lse: Option<Vec<f32>>,
}

/// What a case's backward pass wrote.
#[derive(Clone, PartialEq)]
pub struct CaseGradients<E> {
    /// dQ, dK and dV in the case's layout, padding included.
    pub gradients: [Vec<E>; 3],
    /// Whether canaries and padding are as they were.
    pub untouched: bool,
}

impl<E: Element> CaseGradients<E> {
    /// dQ, dK and dV as bits, as NaN can be compared too.
    pub fn bits(&self) -> [Vec<u16>; 3] {
        self.gradients.each_ref().map(|x| x.iter().map(|x| x.to_bits()).collect())
    }
}

/// How a case's backward pass ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BackwardOutcome {
    pub gradients: GradientAccuracy,
    /// Whether everything outside of the outputs' rows is as it was.
    pub untouched: bool,
}

impl BackwardOutcome {
    /// Within the bar, and nothing else written.
    pub fn passed(&self) -> bool {
        self.gradients.passed() && self.untouched
    }
}

impl fmt::Display for BackwardOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let GradientAccuracy { dq, dk, dv } = &self.gradients;
        for (name, found) in [("dq", dq), ("dk", dk), ("dv", dv)] {
            let mark = if found.passed() { "" } else { " FAILED" };
            writeln!(f, "{name}: error {:.3e}, bar {:.3e}, plain {:.3e}{mark}", found.error, found.bar, found.plain)?;
        }
        write!(f, "memory outside {}", if self.untouched { "untouched" } else { "WRITTEN" })
    }
}

impl Case {
    /// Runs the case's forward pass, then its backward pass with a random dO and, for every second seed, a random dLSE,
    /// and judges the gradients.
    ///
    /// # Errors
    /// Those of [`Attention::forward_into`] and of [`Attention::backward_into`].
    pub fn run_backward<B: Backend>(&self, backend: &B, determinism: Determinism) -> Result<BackwardOutcome> {
        match self.problem.dtype {
            Dtype::F16 => self.judge_backward::<B, half::f16>(backend, &self.backward_data(backend)?, determinism),
            Dtype::Bf16 => self.judge_backward::<B, half::bf16>(backend, &self.backward_data(backend)?, determinism),
        }
    }

    /// Runs the case's backward pass from the given data and judges the gradients.
    ///
    /// # Errors
    /// Those of [`Attention::backward_into`].
    pub fn judge_backward<B: Backend, E: Element>(
        &self,
        backend: &B,
        data: &BackwardData<E>,
        determinism: Determinism,
    ) -> Result<BackwardOutcome> {
        let (problem, mask, scale) = (&self.problem, self.mask, self.effective_scale());
        let found = self.gradients::<B, E>(backend, data, determinism)?;
        let [q, k, v] = self.tensors(&data.inputs);
        let tensors = [q, k, v, Tensor { data: &data.d_o[..], layout: self.layout(problem.q_shape()) }];
        let exact = backward_f64(problem, mask, scale, tensors, data.d_lse.as_deref())?;
        let o = Tensor { data: &data.o[..], layout: self.layout(problem.q_shape()) };
        let plain = backward_plain(problem, mask, scale, tensors, Some(o), data.d_lse.as_deref())?;
        let of = |gradient: &[E], shape| gather(gradient, &self.layout(shape));
        let [dq, dk, dv] = &found.gradients;
        let (of_q, of_kv) = (problem.q_shape(), problem.kv_shape());
        let gathered = Backward { dq: of(dq, of_q), dk: of(dk, of_kv), dv: of(dv, of_kv) };
        let gradients = GradientAccuracy::of(&gathered, &plain, &exact, self.cancelled(data));
        Ok(BackwardOutcome { gradients, untouched: found.untouched })
    }

    /// Where no query sees more than one key, the size of what dQ and dK subtract from each other; otherwise 1.
    fn cancelled<E: Element>(&self, data: &BackwardData<E>) -> f64 {
        if self.problem.seqlen_k > 1 {
            return 1.0;
        }
        let rows = |x: &[E], shape| {
            let mut rows: Vec<Vec<f64>> = Vec::new();
            for_rows(&self.layout(shape), |start| {
                rows.push(x[start..start + shape[3]].iter().map(|x| f64::from(x.to_f32()).abs()).collect());
            });
            rows
        };
        let (of_q, of_kv) = (self.problem.q_shape(), self.problem.kv_shape());
        let terms = rows(&data.o, of_q)
            .iter()
            .zip(rows(&data.d_o, of_q))
            .fold(0.0, |largest: f64, (o, d_o)| largest.max(o.iter().zip(&d_o).map(|(o, d_o)| o * d_o).sum()));
        let [q, k, _] = &data.inputs;
        let factor = rows(q, of_q).into_iter().chain(rows(k, of_kv)).flatten().fold(0.0, f64::max);
        terms * factor * f64::from(self.effective_scale())
    }

    /// Random inputs, what the backend's forward pass makes of them, and random gradients of that.
    ///
    /// # Errors
    /// Those of [`Attention::forward_into`].
    pub fn backward_data<B: Backend, E: Element>(&self, backend: &B) -> Result<BackwardData<E>> {
        let inputs = self.inputs::<E>()?;
        let output = self.output::<B, E>(backend, &inputs)?;
        let mut rng = StdRng::seed_from_u64(self.seed ^ GRADIENT_SEED);
        let d_o = self.normal(&mut rng, self.problem.q_shape(), 1.0)?;
        let has_d_lse = self.seed % 2 == 1;
        let d_lse = has_d_lse.then(|| (0..self.problem.lse_len()).map(|_| rng.sample(StandardNormal)).collect());
        Ok(BackwardData { inputs, o: output.o, lse: output.lse, d_o, d_lse })
    }

    /// Runs the case's backward pass from the given data.
    ///
    /// # Errors
    /// Those of [`Attention::backward_into`].
    pub fn gradients<B: Backend, E: Element>(
        &self,
        backend: &B,
        data: &BackwardData<E>,
        determinism: Determinism,
    ) -> Result<CaseGradients<E>> {
        let of_q = self.layout(self.problem.q_shape());
        let of_kv = self.layout(self.problem.kv_shape());
        let [q, k, v] = &data.inputs;
        let q = backend.upload(Operand::Q, q)?;
        let k = backend.upload(Operand::K, k)?;
        let v = backend.upload(Operand::V, v)?;
        let o = backend.upload(Operand::O, &data.o)?;
        let d_o = backend.upload(Operand::DO, &data.d_o)?;
        let lse = backend.upload(Operand::Lse, &data.lse)?;
        let d_lse = data.d_lse.as_ref().map(|d_lse| backend.upload(Operand::DLse, d_lse)).transpose()?;
        let mut outputs = Gradients {
            dq: Guarded::<B, E>::new(backend, Operand::Dq, of_q)?,
            dk: Guarded::<B, E>::new(backend, Operand::Dk, of_kv)?,
            dv: Guarded::<B, E>::new(backend, Operand::Dv, of_kv)?,
        };
        let inputs = BackwardInputs {
            q: Tensor { data: B::slice(&q), layout: of_q },
            k: Tensor { data: B::slice(&k), layout: of_kv },
            v: Tensor { data: B::slice(&v), layout: of_kv },
            o: Tensor { data: B::slice(&o), layout: of_q },
            d_o: Tensor { data: B::slice(&d_o), layout: of_q },
            lse: B::slice(&lse),
            d_lse: d_lse.as_ref().map(B::slice),
        };
        let attention = Attention::new(self.problem).mask(self.mask).scale(self.effective_scale());
        attention.determinism(determinism).backward_into(
            backend,
            inputs,
            Gradients { dq: outputs.dq.tensor(), dk: outputs.dk.tensor(), dv: outputs.dv.tensor() },
        )?;
        let (dq, dq_kept) = outputs.dq.content(backend)?;
        let (dk, dk_kept) = outputs.dk.content(backend)?;
        let (dv, dv_kept) = outputs.dv.content(backend)?;
        Ok(CaseGradients { gradients: [dq, dk, dv], untouched: dq_kept && dk_kept && dv_kept })
    }
}

/// The rows of a tensor, one after the other.
fn gather<E: Element>(data: &[E], layout: &Layout) -> Vec<f64> {
    let mut rows = Vec::new();
    for_rows(layout, |start| rows.extend(data[start..start + layout.shape[3]].iter().map(|x| f64::from(x.to_f32()))));
    rows
}
