//! Piecewise attention: two pairs of queries and keys, and the distance that selects between them.

use crate::element::Element;

use super::{Allocate, Attention, Output, View};
use crate::{
    backend::{Backend, Workspace},
    error::Result,
    operands::{
        BackwardInputs, Gradients, Inputs, Lines, Pair, Pass, SecondGradients, SecondTensors, Tensors, Visited,
        VisitedLine,
    },
    plan::{BackwardPlan, Determinism, InputKinds, Options, Plan},
    tensor::Tensor,
};

/// Attention whose scores come from one of two pairs of queries and keys, selected by distance. It is for position
/// embeddings that change with the distance.
///
/// score(i, j) = scale · q2ᵢ·k2ⱼ if i + seqlen_k − seqlen_q − j ≥ dist_threshold, otherwise scale · q1ᵢ·k1ⱼ. Mask,
/// softmax and V are as in [`Attention`], which also holds problem, scale, LSE, determinism and dropout.
/// The distance is signed, and positive for a key behind its query. A block of scores that the threshold crosses costs
/// twice as much as in plain attention, any other block the same.
///
/// ```
/// use ferroflash::{Attention, Cpu, Dtype, Mask, Pair, Piecewise, Problem, Tensor, bf16};
///
/// let problem =
///     Problem { batch: 1, heads_q: 4, heads_kv: 2, seqlen_q: 50, seqlen_k: 70, head_dim: 64, dtype: Dtype::Bf16 };
/// let x: Vec<bf16> = (0..4 * 70 * 64).map(|i| bf16::from_f32((i as f32).sin())).collect();
/// let (q, kv) = (Tensor::bhsd(&x[..], problem.q_shape()), Tensor::bhsd(&x[..], problem.kv_shape()));
///
/// // Near keys by one pair, those 32 or more behind the query by the other.
/// let piecewise = Piecewise::new(Attention::new(problem).mask(Mask::Causal), 32);
/// let (near, far) = (Pair { q, k: kv }, Pair { q, k: kv });
/// let out = piecewise.forward(&Cpu, near, far, kv)?;
/// assert_eq!(out.o.len(), 4 * 50 * 64); // (batch, heads_q, seqlen_q, head_dim)
/// # Ok::<(), ferroflash::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Piecewise {
    pub(super) attention: Attention,
    pub(super) dist_threshold: i32,
}

/// Gradients of piecewise attention: memory that a backward pass returns, or tensors that it is to write.
#[derive(Clone, Debug, PartialEq)]
pub struct PiecewiseGradients<T, M> {
    /// Gradients of Q1, K1 and V, and of the sinks.
    pub first: Gradients<T, M>,
    /// Gradients of Q2 and K2, of the same shapes.
    pub second: Pair<T>,
}

impl<T, M> PiecewiseGradients<T, M> {
    /// Borrows each for writing.
    fn as_mut(&mut self) -> PiecewiseGradients<&mut T, &mut M> {
        PiecewiseGradients { first: self.first.as_mut(), second: self.second.as_mut() }
    }
}

impl<T, M, X: Tensors<T> + Lines<M>> Pass<X> for PiecewiseGradients<T, M> {
    type Of = PiecewiseGradients<Visited<X, T>, VisitedLine<X, M>>;

    fn visit(self, visitor: &mut X) -> Result<Self::Of> {
        let (first, second) = (self.first.visit(visitor)?, SecondGradients(self.second).visit(visitor)?);
        Ok(PiecewiseGradients { first, second })
    }
}

impl Piecewise {
    /// Adds a second pair to `attention`. The second pair counts from the distance `dist_threshold` on; any number is
    /// allowed.
    pub fn new(attention: Attention, dist_threshold: i32) -> Self {
        Piecewise { attention, dist_threshold }
    }

    /// Sets whether the gradients have the same bits on every run; see [`Attention::determinism`].
    pub fn determinism(mut self, determinism: Determinism) -> Self {
        self.attention = self.attention.determinism(determinism);
        self
    }

    /// Sets the optional inputs that a plan is made for; see [`Attention::for_inputs`].
    pub fn for_inputs(mut self, kinds: InputKinds) -> Self {
        self.attention = self.attention.for_inputs(kinds);
        self
    }

    /// Returns the options of a plan.
    pub fn options(&self) -> Options {
        Options { dist_threshold: Some(self.dist_threshold), ..self.attention.options() }
    }

    /// Plans a forward pass for a machine with `sm_count` SMs, or threads on the CPU.
    ///
    /// # Errors
    /// Errors of [`Plan::forward`].
    pub fn plan(&self, sm_count: u32) -> Result<Plan> {
        Plan::forward(&self.attention.problem, &self.options(), sm_count)
    }

    /// Plans a backward pass for a machine with `sm_count` SMs, or threads on the CPU.
    ///
    /// # Errors
    /// Errors of [`BackwardPlan::new`].
    pub fn plan_backward(&self, sm_count: u32) -> Result<BackwardPlan> {
        let Attention { problem, determinism, .. } = &self.attention;
        BackwardPlan::new(problem, &self.options(), *determinism, sm_count)
    }

    /// Computes O, and the LSE unless it is omitted, into memory that the backend allocates; tensors as in
    /// [`Attention::forward`].
    ///
    /// # Errors
    /// Errors of [`Piecewise::plan`] and [`Attention::forward`], and every error that names `q2` or `k2`.
    pub fn forward<'a, B: Backend, E: Element>(
        &self,
        backend: &B,
        first: Pair<Tensor<B::Slice<'a, E>>>,
        second: Pair<Tensor<B::Slice<'a, E>>>,
        v: Tensor<B::Slice<'a, E>>,
    ) -> Result<Output<B::Buffer<E>, B::Buffer<f32>>> {
        self.forward_with(backend, Inputs::piecewise(first, second, v))
    }

    /// Computes O, and the LSE unless it is omitted, from [`Inputs::piecewise`], which may have ALiBi's slopes and
    /// sinks; see [`Attention::forward_with`].
    ///
    /// # Errors
    /// Errors of [`Piecewise::forward`]; [`Error::SecondPair`](crate::Error::SecondPair) for inputs of plain attention;
    /// [`Error::HeadsLength`](crate::Error::HeadsLength).
    pub fn forward_with<B: Backend, E: Element>(
        &self,
        backend: &B,
        inputs: Inputs<B::Slice<'_, E>, B::Slice<'_, f32>>,
    ) -> Result<Output<B::Buffer<E>, B::Buffer<f32>>> {
        self.attention.run(backend, &self.for_inputs(inputs.kinds()).plan(backend.sm_count())?, inputs)
    }

    /// Computes O, and the LSE if a buffer for it is given, into the caller's memory; see [`Attention::forward_into`].
    ///
    /// # Errors
    /// Errors of [`Piecewise::forward_with`], and every error that names `o` or `lse`.
    pub fn forward_into<B: Backend, E: Element>(
        &self,
        backend: &B,
        inputs: Inputs<B::Slice<'_, E>, B::Slice<'_, f32>>,
        o: Tensor<B::SliceMut<'_, E>>,
        lse: Option<B::SliceMut<'_, f32>>,
    ) -> Result<()> {
        let plan = self.for_inputs(inputs.kinds()).plan(backend.sm_count())?;
        plan.run(backend, inputs, o, lse)
    }

    /// Computes the gradients of Q1, K1, Q2, K2 and V into memory that the backend allocates. The gradient of each
    /// score goes to the pair that the score came from. `inputs` has Q1 and K1; see [`Attention::backward`].
    ///
    /// # Errors
    /// Errors of [`Piecewise::plan_backward`] and [`Attention::backward`], and every error that names `q2` or `k2`.
    pub fn backward<B: Backend, E: Element>(
        &self,
        backend: &B,
        inputs: BackwardInputs<B::Slice<'_, E>, B::Slice<'_, f32>>,
        second: Pair<Tensor<B::Slice<'_, E>>>,
    ) -> Result<PiecewiseGradients<B::Buffer<E>, B::Buffer<f32>>> {
        let plan = self.for_inputs(inputs.kinds()).plan_backward(backend.sm_count())?;
        backend.check_backward_inputs(&plan, &inputs, Some(&second))?;
        let problem = &self.attention.problem;
        let d_sinks = inputs.optional.sinks.map(|_| ());
        let first = Gradients { dq: (), dk: (), dv: (), d_sinks };
        let nothing = PiecewiseGradients { first, second: Pair { q: (), k: () } };
        let mut gradients = nothing.visit(&mut Allocate::<B, E>::new(backend, problem))?;
        let PiecewiseGradients { first, second: views } = gradients.as_mut().visit(&mut View::<B, E>::new(problem))?;
        let second = SecondTensors { inputs: second, gradients: views };
        backend.backward_into(&plan, inputs, first, Some(second), &mut Workspace::new())?;
        Ok(gradients)
    }

    /// Computes the gradients of Q1, K1, Q2, K2 and V into the caller's memory; see [`Attention::backward_into`].
    ///
    /// # Errors
    /// Errors of [`Piecewise::backward`], and every error that names an output.
    pub fn backward_into<B: Backend, E: Element>(
        &self,
        backend: &B,
        inputs: BackwardInputs<B::Slice<'_, E>, B::Slice<'_, f32>>,
        second: Pair<Tensor<B::Slice<'_, E>>>,
        outputs: PiecewiseGradients<Tensor<B::SliceMut<'_, E>>, B::SliceMut<'_, f32>>,
    ) -> Result<()> {
        let second = SecondTensors { inputs: second, gradients: outputs.second };
        let plan = self.for_inputs(inputs.kinds()).plan_backward(backend.sm_count())?;
        plan.run(backend, inputs, Some(second), outputs.first, &mut Workspace::new())
    }
}
