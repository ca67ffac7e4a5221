//! Entry points of the backward pass.

use crate::element::Element;

use super::{Allocate, Attention, View};
use crate::{
    backend::{Backend, Workspace},
    error::Result,
    operands::{BackwardInputs, Gradients, PackedGradients, Pass},
    plan::BackwardPlan,
    tensor::Tensor,
};

impl Attention {
    /// Plans a backward pass for a machine with `sm_count` SMs, or threads on the CPU. Needs no such machine.
    ///
    /// # Errors
    /// Errors of [`BackwardPlan::new`].
    pub fn plan_backward(&self, sm_count: u32) -> Result<BackwardPlan> {
        BackwardPlan::new(&self.problem, &self.options(), self.determinism, sm_count)
    }

    /// Computes dQ, dK and dV into memory that the backend allocates, each contiguous in the order batch, heads,
    /// seqlen, head_dim.
    ///
    /// P are the probabilities, dP = dO·Vᵀ, and δ is the row sum of dO∘O less the LSE's gradient. Then dV = Pᵀ·dO, dS =
    /// P∘(dP − δ), dQ = scale·dS·K, dK = scale·dSᵀ·Q (FlashAttention-2, arXiv 2307.08691, algorithm 2). P is recomputed
    /// from Q, K and the LSE, so the memory needed is linear in the sequence: the results and
    /// [`BackwardPlan::workspace_bytes`]. Mask, scale and dropout must be those of the forward pass that gave O and the
    /// LSE. A query that attends to no key has dQ = 0 and contributes nothing.
    ///
    /// With softcap, dS is multiplied by 1 − (s / cap)², where s is the bounded score. The slopes of ALiBi have no
    /// gradient. A sink's gradient is −Σ exp(sink − LSE)·δ over batch items and queries; its bits are the same on every
    /// run.
    ///
    /// With dropout, dV = (P∘Z / (1 − p))ᵀ·dO and dP = (dO·Vᵀ)∘Z / (1 − p); the other formulas stay.
    ///
    /// ```
    /// use ferroflash::{Attention, Cpu, Dtype, Inputs, Mask, Problem, Tensor, bf16};
    ///
    /// let problem =
    ///     Problem { batch: 1, heads_q: 4, heads_kv: 2, seqlen_q: 50, seqlen_k: 70, head_dim: 64, dtype: Dtype::Bf16 };
    /// let (q_shape, kv_shape) = (problem.q_shape(), problem.kv_shape());
    /// let x: Vec<bf16> = (0..4 * 70 * 64).map(|i| bf16::from_f32((i as f32).sin())).collect();
    /// let (q, kv) = (Tensor::bhsd(&x[..], q_shape), Tensor::bhsd(&x[..], kv_shape));
    ///
    /// let attention = Attention::new(problem).mask(Mask::Causal);
    /// let out = attention.forward(&Cpu, q, kv, kv)?;
    /// let lse = out.lse.expect("returned unless omitted");
    /// let o = Tensor::bhsd(&out.o[..], q_shape);
    /// let gradients = attention.backward(&Cpu, Inputs::new(q, kv, kv).backward(o, q, &lse[..]))?;
    ///
    /// assert_eq!(gradients.dq.len(), 4 * 50 * 64); // (batch, heads_q, seqlen_q, head_dim)
    /// assert_eq!(gradients.dk.len(), 2 * 70 * 64); // (batch, heads_kv, seqlen_k, head_dim)
    /// # Ok::<(), ferroflash::Error>(())
    /// ```
    ///
    /// The gradients are as precise as those of a plain implementation in the same dtype if no |LSE| is above 2,048 in
    /// f16 and 16,384 in bf16. Above that, P has a relative error of up to about |LSE|·2⁻²³ (docs/numerics.md).
    ///
    /// # Errors
    /// Errors of [`BackwardPlan::new`]; [`Error::DtypeMismatch`](crate::Error::DtypeMismatch) and every error that
    /// names an input; [`Error::OutOfMemory`](crate::Error::OutOfMemory); errors of the machine.
    pub fn backward<B: Backend, E: Element>(
        &self,
        backend: &B,
        inputs: BackwardInputs<B::Slice<'_, E>, B::Slice<'_, f32>>,
    ) -> Result<Gradients<B::Buffer<E>, B::Buffer<f32>>> {
        self.backward_in(backend, &mut Workspace::new(), inputs)
    }

    /// Computes dQ, dK and dV as [`Attention::backward`] does, in a workspace that the caller keeps.
    ///
    /// # Errors
    /// Errors of [`Attention::backward`].
    pub fn backward_in<B: Backend, E: Element>(
        &self,
        backend: &B,
        workspace: &mut Workspace<B>,
        inputs: BackwardInputs<B::Slice<'_, E>, B::Slice<'_, f32>>,
    ) -> Result<Gradients<B::Buffer<E>, B::Buffer<f32>>> {
        let plan = self.for_inputs(inputs.kinds()).plan_backward(backend.sm_count())?;
        backend.check_backward_inputs(&plan, &inputs, None)?;
        let nothing = Gradients { dq: (), dk: (), dv: (), d_sinks: inputs.optional.sinks.map(|_| ()) };
        let mut gradients = nothing.visit(&mut Allocate::<B, E>::new(backend, &self.problem))?;
        let views = gradients.as_mut().visit(&mut View::<B, E>::new(&self.problem))?;
        backend.backward_into(&plan, inputs, views, None, workspace)?;
        Ok(gradients)
    }

    /// Computes dQ, dK and dV into a packed tensor of the caller's, in a workspace that the caller keeps. The inputs
    /// may be views of a packed tensor, too, or not.
    ///
    /// ```
    /// use ferroflash::{
    ///     Attention, Cpu, Dtype, Inputs, PackedGradients, Problem, Tensor, Workspace, bf16,
    /// };
    ///
    /// let problem =
    ///     Problem { batch: 2, heads_q: 4, heads_kv: 4, seqlen_q: 50, seqlen_k: 50, head_dim: 64, dtype: Dtype::Bf16 };
    /// let x: Vec<bf16> = (0..2 * 50 * 3 * 4 * 64).map(|i| bf16::from_f32((i as f32).sin())).collect();
    /// let qkv = Tensor::packed(&x[..], 3, problem.q_shape());
    /// let inputs = Inputs::new(qkv.heads(0..4), qkv.heads(4..8), qkv.heads(8..12));
    /// let attention = Attention::new(problem);
    /// let out = attention.forward_with(&Cpu, inputs)?;
    ///
    /// let (lse, o) = (out.lse.expect("returned unless omitted"), Tensor::bhsd(&out.o[..], problem.q_shape()));
    /// let mut dqkv = vec![bf16::ZERO; x.len()];
    /// let packed = PackedGradients::qkv(Tensor::packed(&mut dqkv[..], 3, problem.q_shape()));
    /// let inputs = inputs.backward(o, o, &lse[..]);
    /// attention.backward_packed_into(&Cpu, inputs, packed, &mut Workspace::new())?;
    /// # Ok::<(), ferroflash::Error>(())
    /// ```
    ///
    /// # Errors
    /// Errors of [`Attention::backward`], every error that names an output, and
    /// [`Error::PackedLengths`](crate::Error::PackedLengths). Unless the error comes from running, nothing was written.
    pub fn backward_packed_into<B: Backend, E: Element>(
        &self,
        backend: &B,
        inputs: BackwardInputs<B::Slice<'_, E>, B::Slice<'_, f32>>,
        outputs: PackedGradients<Tensor<B::SliceMut<'_, E>>, B::SliceMut<'_, f32>>,
        workspace: &mut Workspace<B>,
    ) -> Result<()> {
        let plan = self.for_inputs(inputs.kinds()).plan_backward(backend.sm_count())?;
        backend.backward_packed_into(&plan, inputs, outputs, workspace)
    }

    /// Computes dQ, dK and dV into the caller's memory; the workspace is allocated. [`BackwardPlan::run`] takes the
    /// caller's.
    ///
    /// `dq` is (batch, heads_q, seqlen_q, head_dim), `dk` and `dv` are (batch, heads_kv, seqlen_k, head_dim). Each may
    /// have any stride order, but no two rows may share memory. `d_sinks` is (heads_q). Memory between rows is not
    /// written. See [`Attention::backward`] for the formulas.
    ///
    /// # Errors
    /// Errors of [`Attention::backward`], and every error that names an output. Unless the error comes from running,
    /// nothing was written.
    pub fn backward_into<B: Backend, E: Element>(
        &self,
        backend: &B,
        inputs: BackwardInputs<B::Slice<'_, E>, B::Slice<'_, f32>>,
        outputs: Gradients<Tensor<B::SliceMut<'_, E>>, B::SliceMut<'_, f32>>,
    ) -> Result<()> {
        let plan = self.for_inputs(inputs.kinds()).plan_backward(backend.sm_count())?;
        plan.run(backend, inputs, None, outputs, &mut Workspace::new())
    }
}
