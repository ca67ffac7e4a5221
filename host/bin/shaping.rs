//! Softcap, ALiBi, sinks and lengths: their flags, and the slopes, sinks and lengths of a measurement.

use clap::{Args, ValueEnum};
use ferroflash::cases::CaseLengths;
use ferroflash::{
    Alibi, Backend, InputKinds, Lengths, Operand, OptionalInputs, Problem, Result, Sequences, Sinks, Slopes,
};

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
        InputKinds { alibi, sinks: if self.sinks { Sinks::PerHead } else { Sinks::None }, sequences: None }
    }
}

fn softcap(text: &str) -> std::result::Result<f32, String> {
    let cap = text.parse().ok().filter(|cap: &f32| cap.is_finite() && *cap > 0.0);
    cap.ok_or_else(|| "a finite number above 0 is needed".to_owned())
}

/// Softcap, ALiBi, sinks and lengths of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Shaping {
    pub softcap: Option<f32>,
    pub kinds: InputKinds,
    pub lengths: Option<CaseLengths>,
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
        if let Some(lengths) = self.lengths {
            *title += &format!(" {} sequences", lengths.sequences.len());
        }
    }
}

/// Slopes, sinks and lengths in a backend's memory.
pub struct Lines<B: Backend> {
    slopes: Option<Slopes<B::Buffer<f32>>>,
    sinks: Option<B::Buffer<f32>>,
    lengths: Option<Cumulative<B>>,
}

/// Cumulative lengths of queries and of keys.
struct Cumulative<B: Backend> {
    kind: Sequences,
    q: B::Buffer<i32>,
    k: B::Buffer<i32>,
}

impl<B: Backend> Cumulative<B> {
    fn new(backend: &B, lengths: CaseLengths) -> Result<Self> {
        let upload = |operand, side: usize| {
            let mut end = 0;
            let ends = lengths.sequences.iter().map(|sequence| {
                end += sequence[side] as i32;
                end
            });
            backend.upload(operand, &std::iter::once(0).chain(ends).collect::<Vec<i32>>())
        };
        let (q, k) = (upload(Operand::CumulativeQ, 0)?, upload(Operand::CumulativeK, 1)?);
        Ok(Cumulative { kind: sequences(lengths), q, k })
    }
}

/// Returns the kind of lengths without gaps, with the longest.
pub fn sequences(lengths: CaseLengths) -> Sequences {
    let longest = |side: usize| lengths.sequences.iter().map(|sequence| sequence[side]).max().unwrap_or_default();
    Sequences { longest: Some([longest(0), longest(1)]), ..Sequences::cumulative(lengths.sequences.len()) }
}

impl<B: Backend> Lines<B> {
    /// Returns the slopes of ALiBi's paper, 2^(−8·(h + 1) / heads_q), and sinks of 0.
    pub fn new(backend: &B, problem: &Problem, shaping: &Shaping) -> Result<Self> {
        let (heads, kinds) = (problem.heads_q, shaping.kinds);
        let items = shaping.lengths.map_or(problem.batch, |lengths| lengths.sequences.len());
        let slope = |head: usize| 2f32.powf(-8.0 * (head % heads + 1) as f32 / heads as f32);
        let slopes = |len| backend.upload(Operand::Slopes, &(0..len).map(slope).collect::<Vec<f32>>());
        Ok(Lines {
            slopes: match kinds.alibi {
                Alibi::None => None,
                Alibi::PerHead => Some(Slopes::PerHead(slopes(heads)?)),
                Alibi::PerItem => Some(Slopes::PerItem(slopes(items * heads)?)),
            },
            sinks: match kinds.sinks {
                Sinks::None => None,
                Sinks::PerHead => Some(backend.upload(Operand::Sinks, &vec![0.0; heads])?),
            },
            lengths: shaping.lengths.map(|lengths| Cumulative::new(backend, lengths)).transpose()?,
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
        inputs.lengths = self.lengths.as_ref().map(|Cumulative { kind, q, k }| {
            let [q, k] = [q, k].map(|numbers| B::integers(B::slice(numbers)));
            Lengths { longest: kind.longest, ..Lengths::cumulative(kind.count, q, k) }
        });
        inputs
    }
}
