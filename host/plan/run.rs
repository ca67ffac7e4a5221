//! Runs of a plan that is kept, with other tensors of the same problem.

use super::{BackwardPlan, Plan, TotalPlan};
use crate::{
    backend::{Backend, Workspace},
    element::Element,
    error::Result,
    operands::{BackwardInputs, Gradients, Inputs, SecondTensors, TotalInputs},
    tensor::Tensor,
};

impl Plan {
    /// Runs the plan: computes O, and the LSE if a buffer for it is given, into the caller's memory.
    ///
    /// A plan may be run any number of times, on any backend. It is fastest on a machine with as many SMs as it was
    /// made for. See [`Attention::forward_into`](crate::Attention::forward_into) for the tensors.
    ///
    /// ```
    /// use ferroflash::{Attention, Backend, Cpu, Dtype, Inputs, Problem, Tensor, bf16};
    ///
    /// let problem =
    ///     Problem { batch: 1, heads_q: 2, heads_kv: 2, seqlen_q: 40, seqlen_k: 40, head_dim: 32, dtype: Dtype::Bf16 };
    /// let plan = Attention::new(problem).plan(Cpu.sm_count())?;
    /// let mut o = vec![bf16::ZERO; 2 * 40 * 32];
    /// for step in 1..3 {
    ///     let x: Vec<bf16> = (0..o.len()).map(|i| bf16::from_f32((i as f32 / step as f32).sin())).collect();
    ///     let x = Tensor::bhsd(&x[..], problem.q_shape());
    ///     plan.run(&Cpu, Inputs::new(x, x, x), Tensor::bhsd(&mut o[..], problem.q_shape()), None)?;
    /// }
    /// # Ok::<(), ferroflash::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::SecondPair`](crate::Error::SecondPair) and [`Error::OptionalInput`](crate::Error::OptionalInput) for
    /// inputs of another kind than the plan's, and the errors of
    /// [`Attention::forward_into`](crate::Attention::forward_into), except those of planning.
    pub fn run<B: Backend, E: Element>(
        &self,
        backend: &B,
        inputs: Inputs<B::Slice<'_, E>, B::Slice<'_, f32>>,
        o: Tensor<B::SliceMut<'_, E>>,
        lse: Option<B::SliceMut<'_, f32>>,
    ) -> Result<()> {
        self.run_in(backend, inputs, o, lse, &mut Workspace::new())
    }

    /// Runs the plan as [`Plan::run`] does, in a workspace that the caller keeps and that grows if it is too small.
    /// Only plans of sequences of different lengths use it.
    ///
    /// # Errors
    /// Errors of [`Plan::run`]; [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub fn run_in<B: Backend, E: Element>(
        &self,
        backend: &B,
        inputs: Inputs<B::Slice<'_, E>, B::Slice<'_, f32>>,
        o: Tensor<B::SliceMut<'_, E>>,
        lse: Option<B::SliceMut<'_, f32>>,
        workspace: &mut Workspace<B>,
    ) -> Result<()> {
        backend.forward_into(self, inputs, o, lse, workspace)
    }
}

impl BackwardPlan {
    /// Runs the plan: computes the gradients into the caller's memory, in a workspace that the caller keeps and that
    /// grows if it is too small. `second` is for a plan of piecewise attention.
    ///
    /// A plan may be run any number of times, on any backend. It is fastest on a machine with as many SMs as it was
    /// made for. See [`Attention::backward_into`](crate::Attention::backward_into) for the tensors.
    ///
    /// # Errors
    /// [`Error::SecondPair`](crate::Error::SecondPair) and [`Error::OptionalInput`](crate::Error::OptionalInput) for
    /// inputs of another kind than the plan's, and the errors of
    /// [`Attention::backward_into`](crate::Attention::backward_into), except those of planning.
    pub fn run<B: Backend, E: Element>(
        &self,
        backend: &B,
        inputs: BackwardInputs<B::Slice<'_, E>, B::Slice<'_, f32>>,
        second: Option<SecondTensors<B::Slice<'_, E>, B::SliceMut<'_, E>>>,
        outputs: Gradients<Tensor<B::SliceMut<'_, E>>, B::SliceMut<'_, f32>>,
        workspace: &mut Workspace<B>,
    ) -> Result<()> {
        backend.backward_into(self, inputs, outputs, second, workspace)
    }
}

impl TotalPlan {
    /// Runs the plan: computes total attention into the caller's memory.
    ///
    /// A plan may be run any number of times, on any backend. See
    /// [`Attention::total_attention_into`](crate::Attention::total_attention_into) for the tensors.
    ///
    /// # Errors
    /// Errors of [`Attention::total_attention_into`](crate::Attention::total_attention_into), except those of planning.
    pub fn run<B: Backend, E: Element>(
        &self,
        backend: &B,
        inputs: TotalInputs<B::Slice<'_, E>, B::Slice<'_, f32>>,
        total: B::SliceMut<'_, f32>,
    ) -> Result<()> {
        self.run_in(backend, inputs, total, &mut Workspace::new())
    }

    /// Runs the plan as [`TotalPlan::run`] does, in a workspace that the caller keeps and that grows if it is too
    /// small. Only plans of sequences of different lengths use it.
    ///
    /// # Errors
    /// Errors of [`TotalPlan::run`]; [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub fn run_in<B: Backend, E: Element>(
        &self,
        backend: &B,
        inputs: TotalInputs<B::Slice<'_, E>, B::Slice<'_, f32>>,
        total: B::SliceMut<'_, f32>,
        workspace: &mut Workspace<B>,
    ) -> Result<()> {
        backend.total_attention_into(self, inputs, total, workspace)
    }
}
