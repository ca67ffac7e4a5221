//! Cases in two parts: what needs the machine, and what follows from it and may happen on any thread.

use half::{bf16, f16};
use kernels_gpu::variants::Dtype;

use super::{BackwardOutcome, Case, Outcome, PiecewiseCase, TotalOutcome};
use crate::backend::Backend;
use crate::element::Element;
use crate::error::Result;
use crate::plan::Determinism;
use crate::reference::{Rows, Scores};

/// The judgement of a case that has run. It takes the reference's time, and needs no machine.
pub type Judging<T> = Box<dyn FnOnce() -> Result<T> + Send>;

impl Case {
    /// Runs the case, as [`Case::run`] does, and returns its judgement.
    ///
    /// # Errors
    /// Errors of [`Case::run`].
    pub fn launch<B: Backend>(&self, backend: &B, rows: Rows) -> Result<Judging<Outcome>> {
        match self.problem.dtype {
            Dtype::F16 => self.launch_with::<B, f16>(backend, rows),
            Dtype::Bf16 => self.launch_with::<B, bf16>(backend, rows),
        }
    }

    fn launch_with<B: Backend, E: Element>(&self, backend: &B, rows: Rows) -> Result<Judging<Outcome>> {
        let (case, inputs) = (*self, self.inputs::<E>()?);
        let output = case.output(backend, &inputs)?;
        Ok(Box::new(move || {
            let [q, k, v] = case.tensors(&inputs);
            case.judge_output(&output, Scores::plain(q, k), v, &rows)
        }))
    }

    /// Runs both passes of the case, as [`Case::run_backward`] does, and returns the judgement of the gradients.
    ///
    /// # Errors
    /// Errors of [`Case::run_backward`].
    pub fn launch_backward<B: Backend>(
        &self,
        backend: &B,
        determinism: Determinism,
    ) -> Result<Judging<BackwardOutcome>> {
        match self.problem.dtype {
            Dtype::F16 => self.launch_backward_with::<B, f16>(backend, determinism),
            Dtype::Bf16 => self.launch_backward_with::<B, bf16>(backend, determinism),
        }
    }

    fn launch_backward_with<B: Backend, E: Element>(
        &self,
        backend: &B,
        determinism: Determinism,
    ) -> Result<Judging<BackwardOutcome>> {
        let (case, data) = (*self, self.backward_data::<B, E>(backend)?);
        let found = case.gradients(backend, &data, determinism)?;
        Ok(Box::new(move || case.judge_found_gradients(&data, &found)))
    }

    /// Runs the case's total attention, as [`Case::run_total`] does, and returns its judgement.
    ///
    /// # Errors
    /// Errors of [`Case::run_total`].
    pub fn launch_total<B: Backend>(&self, backend: &B) -> Result<Judging<TotalOutcome>> {
        match self.problem.dtype {
            Dtype::F16 => self.launch_total_with::<B, f16>(backend),
            Dtype::Bf16 => self.launch_total_with::<B, bf16>(backend),
        }
    }

    fn launch_total_with<B: Backend, E: Element>(&self, backend: &B) -> Result<Judging<TotalOutcome>> {
        let (case, data) = (*self, self.total_data::<B, E>(backend)?);
        let found = case.total(backend, &data)?;
        Ok(Box::new(move || case.judge_found_total(&data, &found)))
    }
}

impl PiecewiseCase {
    /// Runs the case, as [`PiecewiseCase::run`] does, and returns its judgement.
    ///
    /// # Errors
    /// Errors of [`PiecewiseCase::run`].
    pub fn launch<B: Backend>(&self, backend: &B, rows: Rows) -> Result<Judging<Outcome>> {
        match self.case.problem.dtype {
            Dtype::F16 => self.launch_with::<B, f16>(backend, rows),
            Dtype::Bf16 => self.launch_with::<B, bf16>(backend, rows),
        }
    }

    fn launch_with<B: Backend, E: Element>(&self, backend: &B, rows: Rows) -> Result<Judging<Outcome>> {
        let (case, inputs) = (*self, self.inputs::<E>()?);
        let output = case.output(backend, &inputs)?;
        Ok(Box::new(move || case.judge(&inputs, &output, &rows)))
    }

    /// Runs both passes, as [`PiecewiseCase::run_backward`] does, and returns the judgement of the gradients.
    ///
    /// # Errors
    /// Errors of [`PiecewiseCase::run_backward`].
    pub fn launch_backward<B: Backend>(
        &self,
        backend: &B,
        determinism: Determinism,
    ) -> Result<Judging<BackwardOutcome>> {
        match self.case.problem.dtype {
            Dtype::F16 => self.launch_backward_with::<B, f16>(backend, determinism),
            Dtype::Bf16 => self.launch_backward_with::<B, bf16>(backend, determinism),
        }
    }

    fn launch_backward_with<B: Backend, E: Element>(
        &self,
        backend: &B,
        determinism: Determinism,
    ) -> Result<Judging<BackwardOutcome>> {
        let (case, inputs) = (*self, self.inputs::<E>()?);
        let output = case.output(backend, &inputs)?;
        let data = case.backward_data(inputs, output)?;
        let found = case.gradients(backend, &data, determinism)?;
        Ok(Box::new(move || case.judge_backward(&data, &found)))
    }
}
