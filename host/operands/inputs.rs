//! Inputs of the passes: queries, keys and values, and the optional inputs that a plan is for.

use super::{
    BackwardInputs, Pair, SeedOffset,
    check::{check_kinds, check_seed_offset},
    pass::{Lines, Pass, Role, VisitedLine, rows},
};
use crate::{
    dropout::PlanDropout,
    error::Result,
    lengths::Lengths,
    plan::{Alibi, InputKinds, Sinks},
    tensor::Tensor,
};

/// Slopes of ALiBi, f32, each a multiple of the distance to subtract from scores: −slope·|i + seqlen_k − seqlen_q − j|.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slopes<L> {
    /// One for each query head, (heads_q).
    PerHead(L),
    /// One for each batch item and query head, (batch, heads_q), contiguous.
    PerItem(L),
}

impl<L> Slopes<L> {
    /// Returns the kind of these slopes.
    pub fn kind(&self) -> Alibi {
        match self {
            Slopes::PerHead(_) => Alibi::PerHead,
            Slopes::PerItem(_) => Alibi::PerItem,
        }
    }

    /// Applies `f` to the array.
    pub fn map<U>(self, f: impl FnOnce(L) -> U) -> Slopes<U> {
        match self {
            Slopes::PerHead(line) => Slopes::PerHead(f(line)),
            Slopes::PerItem(line) => Slopes::PerItem(f(line)),
        }
    }
}

impl<L, X: Lines<L>> Pass<X> for Slopes<L> {
    type Of = Slopes<VisitedLine<X, L>>;

    fn visit(self, visitor: &mut X) -> Result<Self::Of> {
        Ok(match self {
            Slopes::PerHead(line) => Slopes::PerHead(visitor.line(rows::SLOPES, Role::Input, line)?),
            Slopes::PerItem(line) => Slopes::PerItem(visitor.line(rows::SLOPES_PER_ITEM, Role::Input, line)?),
        })
    }
}

/// Optional inputs of both passes. `L` is borrowed memory of f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct OptionalInputs<L> {
    /// Slopes of ALiBi; `None` for no ALiBi.
    pub slopes: Option<Slopes<L>>,
    /// Sinks, f32 (heads_q): logits without a value in every row's softmax; `None` for no sinks.
    pub sinks: Option<L>,
    /// Seed and offset of dropout, for a plan that reads them from memory; `None` for others.
    pub seed_offset: Option<SeedOffset<L>>,
    /// Lengths of sequences that share one tensor; `None` for a dense batch.
    pub lengths: Option<Lengths<L>>,
}

impl<L> OptionalInputs<L> {
    /// No optional input.
    pub const NONE: Self = OptionalInputs { slopes: None, sinks: None, seed_offset: None, lengths: None };

    /// Returns the kinds of slopes, sinks and lengths.
    pub fn kinds(&self) -> InputKinds {
        InputKinds {
            alibi: self.slopes.as_ref().map_or(Alibi::None, Slopes::kind),
            sinks: Sinks::of(&self.sinks),
            sequences: self.lengths.as_ref().map(Lengths::kind),
        }
    }

    /// Checks that the inputs are of the kinds that a plan is for, and that there are seed and offset if its dropout
    /// reads them.
    pub(crate) fn check(&self, planned: InputKinds, dropout: PlanDropout) -> Result<()> {
        check_kinds(self.kinds(), planned)?;
        check_seed_offset(self.seed_offset.is_some(), dropout)
    }
}

impl<L> Default for OptionalInputs<L> {
    fn default() -> Self {
        OptionalInputs::NONE
    }
}

impl<L, X: Lines<L>> Pass<X> for OptionalInputs<L> {
    type Of = OptionalInputs<VisitedLine<X, L>>;

    fn visit(self, visitor: &mut X) -> Result<Self::Of> {
        Ok(OptionalInputs {
            slopes: self.slopes.map(|slopes| slopes.visit(visitor)).transpose()?,
            sinks: visitor.optional_line(rows::SINKS, Role::Input, self.sinks)?,
            seed_offset: self.seed_offset.map(|numbers| numbers.visit(visitor)).transpose()?,
            lengths: self.lengths.map(|lengths| lengths.visit(visitor)).transpose()?,
        })
    }
}

/// Gives inputs the builder methods of the optional ones.
macro_rules! optional_inputs {
    ($inputs:ident) => {
        impl<S, L> $inputs<S, L> {
            /// Adds ALiBi with a slope for each query head, f32 (heads_q): slope·|i + seqlen_k − seqlen_q − j| is
            /// subtracted from the score of query i and key j. Slopes have no gradient.
            pub fn slopes(mut self, slopes: L) -> Self {
                self.optional.slopes = Some(Slopes::PerHead(slopes));
                self
            }

            /// Adds ALiBi with a slope for each batch item and query head, f32 (batch, heads_q), contiguous.
            pub fn slopes_per_item(mut self, slopes: L) -> Self {
                self.optional.slopes = Some(Slopes::PerItem(slopes));
                self
            }

            /// Adds a sink to each query head, f32 (heads_q): one more logit in every row's softmax, without a value.
            /// The LSE includes it. A query that attends to no key gets O = 0 and LSE = sink.
            pub fn sinks(mut self, sinks: L) -> Self {
                self.optional.sinks = Some(sinks);
                self
            }

            /// Adds seed and offset of dropout, two u64 in memory of the machine. The dropout is then one that reads
            /// them ([`Dropout::from_memory`](crate::Dropout::from_memory)), and both passes draw the mask of the
            /// numbers that are there when they run.
            pub fn seed_offset(mut self, numbers: impl Into<SeedOffset<L>>) -> Self {
                self.optional.seed_offset = Some(numbers.into());
                self
            }

            /// Adds lengths of sequences that share one tensor: the problem then has a batch of 1, and as many queries
            /// and keys as all sequences together. A mask aligns to each sequence's own lengths. Rows that belong to no
            /// sequence get zeros, and an LSE of −∞ or the sink.
            pub fn lengths(mut self, lengths: Lengths<L>) -> Self {
                self.optional.lengths = Some(lengths);
                self
            }

            /// Returns the kinds of slopes, sinks and lengths, for which a plan can be made in advance
            /// ([`Attention::for_inputs`](crate::Attention::for_inputs)).
            pub fn kinds(&self) -> InputKinds {
                self.optional.kinds()
            }
        }
    };
}

/// Inputs of a forward pass: queries, keys and values, and what else there is.
///
/// `S` is borrowed memory of 16-bit elements and `L` of f32: `&[E]` and `&[f32]` for [`Cpu`](crate::Cpu), device memory
/// for the GPU backend.
///
/// ```
/// use ferroflash::{Attention, Cpu, Dtype, Inputs, Mask, Problem, Tensor, bf16};
///
/// let problem =
///     Problem { batch: 1, heads_q: 4, heads_kv: 2, seqlen_q: 50, seqlen_k: 70, head_dim: 64, dtype: Dtype::Bf16 };
/// let x: Vec<bf16> = (0..4 * 70 * 64).map(|i| bf16::from_f32((i as f32).sin())).collect();
/// let (q, kv) = (Tensor::bhsd(&x[..], problem.q_shape()), Tensor::bhsd(&x[..], problem.kv_shape()));
///
/// let attention = Attention::new(problem).mask(Mask::Causal);
/// let (slopes, sinks) = ([0.5, 0.25, 0.125, 0.0625], [1.0, 0.0, -1.0, 2.0]);
/// let out = attention.forward_with(&Cpu, Inputs::new(q, kv, kv).slopes(&slopes[..]).sinks(&sinks[..]))?;
/// assert_eq!(out.o.len(), 4 * 50 * 64); // (batch, heads_q, seqlen_q, head_dim)
/// # Ok::<(), ferroflash::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Inputs<S, L> {
    pub(crate) q: Tensor<S>,
    pub(crate) k: Tensor<S>,
    pub(crate) second: Option<Pair<Tensor<S>>>,
    pub(crate) v: Tensor<S>,
    pub(crate) optional: OptionalInputs<L>,
}

impl<S, L> Inputs<S, L> {
    /// Returns the inputs of plain attention.
    pub fn new(q: Tensor<S>, k: Tensor<S>, v: Tensor<S>) -> Self {
        Inputs { q, k, second: None, v, optional: OptionalInputs::NONE }
    }

    /// Returns the inputs of piecewise attention.
    pub fn piecewise(first: Pair<Tensor<S>>, second: Pair<Tensor<S>>, v: Tensor<S>) -> Self {
        Inputs { q: first.q, k: first.k, second: Some(second), v, optional: OptionalInputs::NONE }
    }

    /// Sets all optional inputs.
    pub fn optional(self, optional: OptionalInputs<L>) -> Self {
        Inputs { optional, ..self }
    }

    /// Returns the inputs of the backward pass, except a second pair: these inputs, O and LSE of their forward pass,
    /// and the gradient of O.
    pub fn backward(self, o: Tensor<S>, d_o: Tensor<S>, lse: L) -> BackwardInputs<S, L> {
        let Inputs { q, k, v, optional, .. } = self;
        BackwardInputs { q, k, v, o, d_o, lse, d_lse: None, optional }
    }
}

/// Inputs of total attention: queries and keys, the LSE of the forward pass, and what else there is.
#[derive(Clone, Copy, Debug)]
pub struct TotalInputs<S, L> {
    pub(crate) q: Tensor<S>,
    pub(crate) k: Tensor<S>,
    pub(crate) lse: L,
    pub(crate) slopes: Option<Slopes<L>>,
    pub(crate) lengths: Option<Lengths<L>>,
}

impl<S, L> TotalInputs<S, L> {
    /// Returns the inputs without slopes. `lse` is f32 (batch, heads_q, seqlen_q), contiguous.
    pub fn new(q: Tensor<S>, k: Tensor<S>, lse: L) -> Self {
        TotalInputs { q, k, lse, slopes: None, lengths: None }
    }

    /// Adds the slopes of ALiBi, f32 (heads_q); see [`Inputs::slopes`].
    pub fn slopes(self, slopes: L) -> Self {
        TotalInputs { slopes: Some(Slopes::PerHead(slopes)), ..self }
    }

    /// Adds the slopes of ALiBi, f32 (batch, heads_q), contiguous.
    pub fn slopes_per_item(self, slopes: L) -> Self {
        TotalInputs { slopes: Some(Slopes::PerItem(slopes)), ..self }
    }

    /// Adds lengths of sequences that share one tensor; see [`Inputs::lengths`].
    pub fn lengths(self, lengths: Lengths<L>) -> Self {
        TotalInputs { lengths: Some(lengths), ..self }
    }

    /// Takes slopes and lengths of optional inputs.
    pub fn optional(self, optional: OptionalInputs<L>) -> Self {
        TotalInputs { slopes: optional.slopes, lengths: optional.lengths, ..self }
    }

    /// Returns the kinds of the optional inputs. There are no sinks, because they enter through the LSE alone.
    pub fn kinds(&self) -> InputKinds {
        let alibi = self.slopes.as_ref().map_or(Alibi::None, Slopes::kind);
        InputKinds { alibi, sinks: Sinks::None, sequences: self.lengths.as_ref().map(Lengths::kind) }
    }
}

optional_inputs!(Inputs);
optional_inputs!(BackwardInputs);

impl<S, L> BackwardInputs<S, L> {
    /// Adds the gradient of the LSE, f32 (batch, heads_q, seqlen_q), contiguous.
    pub fn d_lse(mut self, d_lse: L) -> Self {
        self.d_lse = Some(d_lse);
        self
    }
}
