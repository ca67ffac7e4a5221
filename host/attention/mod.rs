//! The public entry points: an [`Attention`] describes a computation, a [`Backend`] executes it.

use crate::element::Element;

use crate::{
    backend::{Backend, Workspace},
    dropout::PlanDropout,
    error::Result,
    operands::{Inputs, Lines, Role, Tensors, rows},
    plan::{Determinism, InputKinds, Options, Plan},
    problem::{Mask, Problem},
    tensor::Tensor,
};

mod backward;
mod piecewise;
mod plans;
mod results;
mod total_attention;

pub use piecewise::{Piecewise, PiecewiseGradients};
pub use plans::Plans;
use results::{Allocate, View};

/// Choice of a forward pass that allocates its results: return the LSE or omit it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Lse {
    /// Only O.
    Omit,
    /// O and the LSE, for a backward pass or to combine partial results.
    #[default]
    Return,
}

/// One attention: a problem and the options of its computation.
///
/// O = softmax(scale · Q·Kᵀ + mask) · V. The LSE is the natural log-sum-exp of each query's scaled, masked scores, f32
/// (batch, heads_q, seqlen_q) (FlashAttention-2, arXiv 2307.08691, algorithm 1). Scores, softmax and accumulators are
/// f32. A query that attends to no key gets O = 0 and LSE = −∞. [`Attention::dropout`] replaces the weights P =
/// softmax(…) by P∘Z / (1 − p), where Z is 0 for a dropped weight and 1 for a kept one; the LSE does not change.
/// [`Attention::softcap`] bounds the scores. ALiBi and sinks are inputs ([`Attention::forward_with`]).
///
/// ```
/// use ferroflash::{Attention, Dtype, Mask, Problem};
///
/// let problem =
///     Problem { batch: 2, heads_q: 8, heads_kv: 2, seqlen_q: 300, seqlen_k: 500, head_dim: 96, dtype: Dtype::F16 };
/// let attention = Attention::new(problem).mask(Mask::Causal);
/// println!("{}", attention.plan(132)?);
/// # Ok::<(), ferroflash::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    problem: Problem,
    mask: Mask,
    scale: Option<f32>,
    softcap: Option<f32>,
    /// Optional inputs that a plan is made for. Calls that take inputs set it from these.
    inputs: InputKinds,
    lse: Lse,
    determinism: Determinism,
    dropout: PlanDropout,
}

impl Attention {
    /// Returns attention without a mask and without dropout, with the scale 1/√head_dim, the LSE and fast gradients.
    /// The problem is checked when it is planned or run.
    pub fn new(problem: Problem) -> Self {
        Attention {
            problem,
            mask: Mask::default(),
            scale: None,
            softcap: None,
            inputs: InputKinds::default(),
            lse: Lse::default(),
            determinism: Determinism::default(),
            dropout: PlanDropout::NONE,
        }
    }

    /// Sets the mask, which selects the keys that a query attends to.
    pub fn mask(mut self, mask: Mask) -> Self {
        self.mask = mask;
        self
    }

    /// Sets the factor of the scores, which must be finite and above 0.
    pub fn scale(mut self, scale: f32) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Bounds the scores (softcap): a score is cap·tanh(scale·q·k / cap), as in Gemma 2. `cap` must be finite and above
    /// 0. ALiBi and the mask apply to the bounded scores.
    ///
    /// ```
    /// use ferroflash::{Attention, Cpu, Dtype, Mask, Problem, Tensor, bf16};
    ///
    /// let problem =
    ///     Problem { batch: 1, heads_q: 4, heads_kv: 2, seqlen_q: 50, seqlen_k: 70, head_dim: 64, dtype: Dtype::Bf16 };
    /// let x: Vec<bf16> = (0..4 * 70 * 64).map(|i| bf16::from_f32(20.0 * (i as f32).sin())).collect();
    /// let (q, kv) = (Tensor::bhsd(&x[..], problem.q_shape()), Tensor::bhsd(&x[..], problem.kv_shape()));
    ///
    /// let out = Attention::new(problem).mask(Mask::Causal).softcap(50.0).forward(&Cpu, q, kv, kv)?;
    /// // No score is above 50, and no query attends to more than 70 keys.
    /// let largest = 50.0 + 70f32.ln();
    /// assert!(out.lse.expect("returned unless omitted").iter().all(|lse| *lse <= largest));
    /// # Ok::<(), ferroflash::Error>(())
    /// ```
    pub fn softcap(mut self, cap: f32) -> Self {
        self.softcap = Some(cap);
        self
    }

    /// Sets the optional inputs that a plan is made for ([`Attention::plan`], [`Attention::plan_backward`],
    /// [`Attention::plan_total_attention`]). Calls that take inputs ignore it: the inputs alone decide.
    pub fn for_inputs(mut self, kinds: InputKinds) -> Self {
        self.inputs = kinds;
        self
    }

    /// Returns the options of a plan. Piecewise attention adds its distance.
    pub fn options(&self) -> Options {
        let Attention { mask, scale, softcap, dropout, inputs, .. } = *self;
        Options { mask, scale, softcap, dropout, ..Options::default() }.for_inputs(inputs)
    }

    /// Sets whether [`Attention::forward`] returns the LSE.
    pub fn lse(mut self, lse: Lse) -> Self {
        self.lse = lse;
        self
    }

    /// Sets whether the gradients have the same bits on every run. The forward pass's results always have.
    pub fn determinism(mut self, determinism: Determinism) -> Self {
        self.determinism = determinism;
        self
    }

    /// Sets the dropout of attention weights. A backward pass must have the dropout of its forward pass. Total
    /// attention counts weights before dropout. With [`Dropout::from_memory`](crate::Dropout::from_memory), calls take
    /// seed and offset as an input.
    pub fn dropout(mut self, dropout: impl Into<PlanDropout>) -> Self {
        self.dropout = dropout.into();
        self
    }

    /// Plans a forward pass for a machine with `sm_count` SMs, or threads on the CPU. Needs no such machine.
    ///
    /// # Errors
    /// Errors of [`Plan::forward`].
    pub fn plan(&self, sm_count: u32) -> Result<Plan> {
        Plan::forward(&self.problem, &self.options(), sm_count)
    }

    /// Computes O, and the LSE unless it is omitted, into memory that the backend allocates.
    ///
    /// `q` is (batch, heads_q, seqlen_q, head_dim), `k` and `v` are (batch, heads_kv, seqlen_k, head_dim), each in any
    /// stride order. Strides of dimensions longer than 1 are multiples of 8 elements; those of inputs may be 0.
    ///
    /// O is as precise as that of a plain implementation in the same dtype if scaled scores are up to 4,000 in f16 and
    /// 32,000 in bf16. Above that one rounding of P, 2⁻¹¹ or 2⁻⁸, may be its error. O is finite, and the LSE right, for
    /// scaled scores up to 6.7·10⁷ in f16 and 5.3·10⁸ in bf16 (docs/numerics.md).
    ///
    /// # Errors
    /// Errors of [`Plan::forward`]; [`Error::DtypeMismatch`](crate::Error::DtypeMismatch) and every error that names
    /// `q`, `k` or `v`; [`Error::OutOfMemory`](crate::Error::OutOfMemory); errors of the machine.
    pub fn forward<'a, B: Backend, E: Element>(
        &self,
        backend: &B,
        q: Tensor<B::Slice<'a, E>>,
        k: Tensor<B::Slice<'a, E>>,
        v: Tensor<B::Slice<'a, E>>,
    ) -> Result<Output<B::Buffer<E>, B::Buffer<f32>>> {
        self.forward_with(backend, Inputs::new(q, k, v))
    }

    /// Computes O, and the LSE unless it is omitted, as [`Attention::forward`] does, from inputs that may have ALiBi's
    /// slopes and sinks. Their presence alone decides.
    ///
    /// ALiBi (arXiv 2108.12409) subtracts slope·|i + seqlen_k − seqlen_q − j| from the score of query i and key j. A
    /// slope is of any sign, is not scaled, and has no gradient. The LSE includes the bias.
    ///
    /// ```
    /// use ferroflash::{Attention, Cpu, Dtype, Inputs, Mask, Problem, Tensor, bf16};
    ///
    /// let problem =
    ///     Problem { batch: 1, heads_q: 4, heads_kv: 2, seqlen_q: 50, seqlen_k: 70, head_dim: 64, dtype: Dtype::Bf16 };
    /// let x: Vec<bf16> = (0..4 * 70 * 64).map(|i| bf16::from_f32((i as f32).sin())).collect();
    /// let (q, kv) = (Tensor::bhsd(&x[..], problem.q_shape()), Tensor::bhsd(&x[..], problem.kv_shape()));
    /// let attention = Attention::new(problem).mask(Mask::Causal);
    ///
    /// // ALiBi, with one slope for each query head.
    /// let slopes: Vec<f32> = (1..=4).map(|head| 2f32.powi(-2 * head)).collect();
    /// let near = attention.forward_with(&Cpu, Inputs::new(q, kv, kv).slopes(&slopes))?;
    ///
    /// // A large sink takes all attention: O is nearly 0.
    /// let sunk = attention.forward_with(&Cpu, Inputs::new(q, kv, kv).sinks(&[1e4; 4]))?;
    /// assert!(near.o.iter().any(|o| o.to_f32() != 0.0) && sunk.o.iter().all(|o| o.to_f32() == 0.0));
    /// # Ok::<(), ferroflash::Error>(())
    /// ```
    ///
    /// # Errors
    /// Errors of [`Attention::forward`]; [`Error::HeadsLength`](crate::Error::HeadsLength).
    pub fn forward_with<B: Backend, E: Element>(
        &self,
        backend: &B,
        inputs: Inputs<B::Slice<'_, E>, B::Slice<'_, f32>>,
    ) -> Result<Output<B::Buffer<E>, B::Buffer<f32>>> {
        self.run(backend, &self.for_inputs(inputs.kinds()).plan(backend.sm_count())?, inputs)
    }

    /// Runs a forward plan into memory that the backend allocates.
    fn run<B: Backend, E: Element>(
        &self,
        backend: &B,
        plan: &Plan,
        inputs: Inputs<B::Slice<'_, E>, B::Slice<'_, f32>>,
    ) -> Result<Output<B::Buffer<E>, B::Buffer<f32>>> {
        backend.check_inputs(plan, &inputs)?;
        let mut allocate = Allocate::<B, E>::new(backend, &self.problem);
        let mut o = allocate.tensor(rows::O, Role::Output, ())?;
        let mut lse = match self.lse {
            Lse::Return => Some(allocate.line(rows::LSE, Role::Output, ())?),
            Lse::Omit => None,
        };
        let mut view = View::<B, E>::new(&self.problem);
        let o_view = view.tensor(rows::O, Role::Output, &mut o)?;
        let lse_view = view.optional_line(rows::LSE, Role::Output, lse.as_mut())?;
        backend.forward_into(plan, inputs, o_view, lse_view, &mut Workspace::new())?;
        Ok(Output { o, lse })
    }

    /// Computes O, and the LSE if a buffer for it is given, into the caller's memory.
    ///
    /// `o` is (batch, heads_q, seqlen_q, head_dim) in any stride order, but no two rows may share memory. Memory
    /// between rows is not written. `lse` has exactly batch · heads_q · seqlen_q elements. See
    /// [`Attention::forward_with`] for the inputs.
    ///
    /// # Errors
    /// Errors of [`Attention::forward_with`], and every error that names `o` or `lse`. Unless the error comes from
    /// running, nothing was written.
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
}

/// Results of a forward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct Output<O, L> {
    /// O, (batch, heads_q, seqlen_q, head_dim), contiguous in that order.
    pub o: O,
    /// The LSE, f32 (batch, heads_q, seqlen_q), contiguous; `None` if it was omitted.
    pub lse: Option<L>,
}
