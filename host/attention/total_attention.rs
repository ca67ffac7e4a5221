//! Entry points of total attention.

use crate::element::Element;

use super::{Allocate, Attention, View};
use crate::{
    backend::Backend,
    error::Result,
    operands::{Lines, Role, TotalInputs, rows},
    plan::TotalPlan,
    tensor::Tensor,
};

impl Attention {
    /// Plans total attention for a machine with `sm_count` SMs, or threads on the CPU. Needs no such machine.
    ///
    /// # Errors
    /// Errors of [`TotalPlan::new`].
    pub fn plan_total_attention(&self, sm_count: u32) -> Result<TotalPlan> {
        TotalPlan::new(&self.problem, &self.options(), sm_count)
    }

    /// Computes the attention that each key got: total_j = Σᵢ exp(scale·qᵢ·kⱼ − LSEᵢ) over the queries i that attend to
    /// key j, f32 (batch, heads_q, seqlen_k), contiguous, into memory that the backend allocates.
    ///
    /// Counts weights before dropout, so [`Attention::dropout`] makes no difference here.
    ///
    /// It is a second pass over Q, K and the LSE of the forward pass, with the same mask and scale, and stores no
    /// score. Every query head has its own line, also if several share a key head. A query that attends to no key (LSE
    /// = −∞) counts nothing, so a line adds up to the number of queries that attend to a key. Without queries all
    /// elements are 0. The bits are the same on every run.
    ///
    /// ```
    /// use ferroflash::{Attention, Cpu, Dtype, Mask, Problem, Tensor, bf16};
    ///
    /// let problem =
    ///     Problem { batch: 1, heads_q: 4, heads_kv: 2, seqlen_q: 50, seqlen_k: 70, head_dim: 64, dtype: Dtype::Bf16 };
    /// let x: Vec<bf16> = (0..4 * 70 * 64).map(|i| bf16::from_f32((i as f32).sin())).collect();
    /// let (q, kv) = (Tensor::bhsd(&x[..], problem.q_shape()), Tensor::bhsd(&x[..], problem.kv_shape()));
    ///
    /// let attention = Attention::new(problem).mask(Mask::Causal);
    /// let lse = attention.forward(&Cpu, q, kv, kv)?.lse.expect("returned unless omitted");
    /// let total = attention.total_attention(&Cpu, q, kv, &lse[..])?;
    ///
    /// assert_eq!(total.len(), 4 * 70); // (batch, heads_q, seqlen_k)
    /// assert!((total[..70].iter().sum::<f32>() - 50.0).abs() < 1e-3); // every query gives away 1
    /// # Ok::<(), ferroflash::Error>(())
    /// ```
    ///
    /// A weight has a relative error of up to about |LSE|·2⁻²³, which is 10⁻⁵ or less if no |LSE| is above 128
    /// (docs/numerics.md).
    ///
    /// # Errors
    /// Errors of [`TotalPlan::new`]; [`Error::DtypeMismatch`](crate::Error::DtypeMismatch) and every error that names
    /// `q`, `k` or `lse`; [`Error::OutOfMemory`](crate::Error::OutOfMemory); errors of the machine.
    pub fn total_attention<'a, B: Backend, E: Element>(
        &self,
        backend: &B,
        q: Tensor<B::Slice<'a, E>>,
        k: Tensor<B::Slice<'a, E>>,
        lse: B::Slice<'a, f32>,
    ) -> Result<B::Buffer<f32>> {
        self.total_attention_with(backend, TotalInputs::new(q, k, lse))
    }

    /// Computes total attention as [`Attention::total_attention`] does, from inputs that may have ALiBi's slopes: those
    /// of the forward pass. Sinks enter through the LSE alone, so a line then adds up to less than the number of
    /// queries.
    ///
    /// # Errors
    /// Errors of [`Attention::total_attention`]; [`Error::HeadsLength`](crate::Error::HeadsLength).
    pub fn total_attention_with<B: Backend, E: Element>(
        &self,
        backend: &B,
        inputs: TotalInputs<B::Slice<'_, E>, B::Slice<'_, f32>>,
    ) -> Result<B::Buffer<f32>> {
        let plan = self.for_inputs(inputs.kinds()).plan_total_attention(backend.sm_count())?;
        backend.check_total_inputs(&plan, &inputs)?;
        let mut total = Allocate::<B, E>::new(backend, &self.problem).line(rows::TOTAL, Role::Output, ())?;
        let view = View::<B, E>::new(&self.problem).line(rows::TOTAL, Role::Output, &mut total)?;
        plan.run(backend, inputs, view)?;
        Ok(total)
    }

    /// Computes total attention into the caller's memory. `total` has exactly batch · heads_q · seqlen_k elements. See
    /// [`Attention::total_attention`].
    ///
    /// # Errors
    /// Errors of [`Attention::total_attention`], and every error that names `total`. Unless the error comes from
    /// running, nothing was written.
    pub fn total_attention_into<B: Backend, E: Element>(
        &self,
        backend: &B,
        inputs: TotalInputs<B::Slice<'_, E>, B::Slice<'_, f32>>,
        total: B::SliceMut<'_, f32>,
    ) -> Result<()> {
        let plan = self.for_inputs(inputs.kinds()).plan_total_attention(backend.sm_count())?;
        plan.run(backend, inputs, total)
    }
}
