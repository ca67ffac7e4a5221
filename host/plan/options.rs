//! The options of an attention, in addition to its problem.

use crate::dropout::PlanDropout;
use crate::lengths::Sequences;
use crate::problem::Mask;

/// Options of an attention, which every plan takes. The default is plain attention: no mask, the scale 1/√head_dim, one
/// pair of queries and keys, and nothing else.
///
/// ```
/// use ferroflash::{Alibi, Dtype, Mask, Options, Plan, Problem};
///
/// let problem =
///     Problem { batch: 2, heads_q: 8, heads_kv: 2, seqlen_q: 300, seqlen_k: 500, head_dim: 96, dtype: Dtype::F16 };
/// let options = Options { mask: Mask::Causal, softcap: Some(50.0), alibi: Alibi::PerHead, ..Options::default() };
/// println!("{}", Plan::forward(&problem, &options, 132)?);
/// # Ok::<(), ferroflash::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Options {
    /// Keys that a query attends to.
    pub mask: Mask,
    /// Factor of the scores, finite and above 0; `None` is 1/√head_dim.
    pub scale: Option<f32>,
    /// Bound of the scores, finite and above 0: a score is cap·tanh(scale·q·k / cap). `None` is no bound.
    pub softcap: Option<f32>,
    /// Presence and shape of ALiBi's slopes. They are an input of each pass and of total attention.
    pub alibi: Alibi,
    /// Presence of sinks. They are an input of both passes.
    pub sinks: Sinks,
    /// Dropout of attention weights, with fixed numbers or numbers in memory, which are an input of both passes. Total
    /// attention ignores it.
    pub dropout: PlanDropout,
    /// Number of sequences of different lengths, if they share one tensor; `None` for a dense batch. Their lengths are
    /// an input of every pass.
    pub sequences: Option<Sequences>,
    /// Distance from which on scores come from a second pair of queries and keys, in piecewise attention; `None` if
    /// there is one pair. The score of query i and key j comes from the second pair if i + seqlen_k − seqlen_q − j is
    /// at least the distance.
    pub dist_threshold: Option<i32>,
}

impl Options {
    /// Returns the same options for other slopes, sinks and lengths.
    pub fn for_inputs(self, InputKinds { alibi, sinks, sequences }: InputKinds) -> Self {
        Options { alibi, sinks, sequences, ..self }
    }
}

/// Presence and shape of the slopes of ALiBi, which subtracts slope·|i + seqlen_k − seqlen_q − j| from the score of
/// query i and key j.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Alibi {
    /// No ALiBi.
    #[default]
    None,
    /// A slope for each query head, (heads_q).
    PerHead,
    /// A slope for each batch item and query head, (batch, heads_q).
    PerItem,
}

impl Alibi {
    /// Returns what errors call the slopes.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Alibi::None => "none",
            Alibi::PerHead => "one for each query head",
            Alibi::PerItem => "one for each batch item and query head",
        }
    }
}

/// Presence of sinks, each a logit without a value in every row's softmax.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Sinks {
    /// No sinks.
    #[default]
    None,
    /// A sink for each query head, (heads_q).
    PerHead,
}

impl Sinks {
    /// Returns the sinks of a call, which are given or not.
    pub(crate) fn of<L>(sinks: &Option<L>) -> Self {
        if sinks.is_some() { Sinks::PerHead } else { Sinks::None }
    }

    /// Returns what errors call the sinks.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Sinks::None => "none",
            Sinks::PerHead => "one for each query head",
        }
    }
}

/// Kinds of the slopes, sinks and lengths of a call, for which its plan is made. Seed and offset of dropout follow the
/// options' dropout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct InputKinds {
    /// Slopes of ALiBi.
    pub alibi: Alibi,
    /// Sinks.
    pub sinks: Sinks,
    /// Sequences of different lengths.
    pub sequences: Option<Sequences>,
}
