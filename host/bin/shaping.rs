//! Softcap, ALiBi and sinks: their flags, and the slopes and sinks of a measurement.

use clap::{Args, ValueEnum};
use ferroflash::{Alibi, Backend, InputKinds, Operand, OptionalInputs, Problem, Result, Sinks, Slopes};

#[derive(Args, Clone, Copy)]
pub struct ShapingArgs {
    /// Bound of the scores, cap·tanh(score / cap): finite and above 0.
    #[arg(long, value_parser = softcap, value_name = "CAP", allow_negative_numbers = true)]
    pub softcap: Option<f32>,
    /// ALiBi, with a slope for each query head (heads), or for each batch item and query head (items).
    #[arg(long, value_name = "heads|items", num_args = 0..=1, require_equals = false, default_missing_value = "heads")]
    alibi: Option<AlibiName>,
    /// A sink for each query head, which is a logit without a value in every row's softmax.
    #[arg(long)]
    sinks: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum AlibiName {
    Heads,
    Items,
}

impl ShapingArgs {
    /// Returns the kinds of the optional inputs.
    pub fn kinds(&self) -> InputKinds {
        let alibi = match self.alibi {
            None => Alibi::None,
            Some(AlibiName::Heads) => Alibi::PerHead,
            Some(AlibiName::Items) => Alibi::PerItem,
        };
        InputKinds { alibi, sinks: if self.sinks { Sinks::PerHead } else { Sinks::None } }
    }
}

fn softcap(text: &str) -> std::result::Result<f32, String> {
    let cap = text.parse().ok().filter(|cap: &f32| cap.is_finite() && *cap > 0.0);
    cap.ok_or_else(|| "a finite number above 0 is needed".to_owned())
}

/// Softcap, ALiBi and sinks of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Shaping {
    pub softcap: Option<f32>,
    pub kinds: InputKinds,
}

impl Shaping {
    /// Adds what there is to a title.
    pub fn add_to(&self, title: &mut String) {
        if let Some(cap) = self.softcap {
            *title += &format!(" softcap {cap}");
        }
        *title += match self.kinds.alibi {
            Alibi::None => "",
            Alibi::PerHead => " alibi",
            Alibi::PerItem => " alibi per item",
        };
        *title += match self.kinds.sinks {
            Sinks::None => "",
            Sinks::PerHead => " sinks",
        };
    }
}

/// Slopes and sinks in a backend's memory.
pub struct Lines<B: Backend> {
    slopes: Option<Slopes<B::Buffer<f32>>>,
    sinks: Option<B::Buffer<f32>>,
}

impl<B: Backend> Lines<B> {
    /// Returns the slopes of ALiBi's paper, 2^(−8·(h + 1) / heads_q), and sinks of 0.
    pub fn new(backend: &B, problem: &Problem, kinds: InputKinds) -> Result<Self> {
        let heads = problem.heads_q;
        let slope = |head: usize| 2f32.powf(-8.0 * (head % heads + 1) as f32 / heads as f32);
        let slopes = |len| backend.upload(Operand::Slopes, &(0..len).map(slope).collect::<Vec<f32>>());
        Ok(Lines {
            slopes: match kinds.alibi {
                Alibi::None => None,
                Alibi::PerHead => Some(Slopes::PerHead(slopes(heads)?)),
                Alibi::PerItem => Some(Slopes::PerItem(slopes(problem.batch * heads)?)),
            },
            sinks: match kinds.sinks {
                Sinks::None => None,
                Sinks::PerHead => Some(backend.upload(Operand::Sinks, &vec![0.0; heads])?),
            },
        })
    }

    /// Returns them as inputs.
    pub fn inputs(&self) -> OptionalInputs<B::Slice<'_, f32>> {
        let mut inputs = OptionalInputs::NONE;
        inputs.slopes = self.slopes.as_ref().map(|slopes| match slopes {
            Slopes::PerHead(slopes) => Slopes::PerHead(B::slice(slopes)),
            Slopes::PerItem(slopes) => Slopes::PerItem(B::slice(slopes)),
        });
        inputs.sinks = self.sinks.as_ref().map(B::slice);
        inputs
    }
}
