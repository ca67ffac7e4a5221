//! Lengths of a case's sequences, and where they lie in its tensors.

use std::fmt;
use std::str::FromStr;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;

use super::Case;
use crate::error::{Error, Result};
use crate::lengths::{Integers, Lengths, Places};
use crate::problem::Problem;

/// Changes the seed, so that lengths leave the other choices of a case as they are.
const SEED: u64 = 0x2545_f491_4f6c_dd1d;

/// Rows of a case's tensors that belong to no sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gaps {
    /// There are none: sequences have cumulative lengths.
    #[default]
    None,
    /// Behind the keys of each sequence that count: there are cumulative lengths, and numbers of keys that count.
    Used,
    /// Before and behind sequences, of queries and of keys: each sequence has a start and a length.
    Slots,
}

impl Gaps {
    /// All kinds, by the names of the flag.
    pub const NAMES: [(&'static str, Gaps); 3] = [("none", Gaps::None), ("used", Gaps::Used), ("slots", Gaps::Slots)];

    fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, gaps)| *gaps == self).map_or("", |(name, _)| name)
    }
}

/// Queries and keys of each sequence of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaseLengths {
    /// (queries, keys) of each sequence. They live as long as the program, so that a case can be copied.
    pub sequences: &'static [[usize; 2]],
    pub gaps: Gaps,
}

impl CaseLengths {
    /// Returns lengths without gaps. Their memory is never freed.
    pub fn new(sequences: Vec<[usize; 2]>) -> Self {
        CaseLengths { sequences: sequences.leak(), gaps: Gaps::None }
    }

    /// Returns `count` equal lengths of queries and keys with `tokens` tokens in all, from a log-normal distribution
    /// whose logarithm has a standard deviation of 1: a few long ones and many short ones, as in training data.
    pub fn log_normal(count: usize, tokens: usize, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let drawn: Vec<f64> = (0..count).map(|_| rng.sample::<f64, _>(StandardNormal).exp()).collect();
        let all: f64 = drawn.iter().sum();
        // Cumulative lengths are rounded, so that the last is the number of tokens.
        let (mut sum, mut start, mut sequences) = (0.0, 0, Vec::new());
        for len in drawn {
            sum += len;
            let end = (tokens as f64 * sum / all).round() as usize;
            sequences.push([end - start; 2]);
            start = end;
        }
        Self::new(sequences)
    }

    /// Returns random lengths of at most `tokens` queries and keys: few or many, of which some are empty, one token, at
    /// the edge of a tile, or one is huge.
    pub(super) fn random(seed: u64, tokens: usize) -> Self {
        let mut rng = StdRng::seed_from_u64(seed ^ SEED);
        let rng = &mut rng;
        let count = *[0, 1, 1, 2, 3, 3, 5, 8, 20, 60].choose(rng).unwrap_or(&3);
        let (mut left, alike) = (tokens, rng.random_bool(0.4));
        let mut sequences = Vec::new();
        for _ in 0..count {
            let mut len = || match rng.random_range(0..6) {
                0 => 0,
                1 => 1,
                2 => *[63, 64, 65, 127, 128, 129, 192, 193, 256].choose(rng).unwrap_or(&64),
                3 => rng.random_range(0..=left),
                _ => rng.random_range(0..=70),
            };
            let (q, k) = (len(), len());
            let pair = [q, if alike { q } else { k }].map(|len| len.min(left));
            left -= pair[0].max(pair[1]);
            sequences.push(pair);
        }
        let gaps = *[Gaps::None, Gaps::None, Gaps::Used, Gaps::Slots].choose(rng).unwrap_or(&Gaps::None);
        CaseLengths { gaps, ..Self::new(sequences) }
    }

    /// Returns where the sequences lie. The seed decides on the gaps.
    fn placed(&self, seed: u64) -> [Side; 2] {
        let mut rng = StdRng::seed_from_u64(seed ^ SEED);
        let mut gap = || if rng.random_bool(0.5) { 0 } else { rng.random_range(0..40) };
        let mut sides = [Side::default(), Side::default()];
        let mut rows = [0, 0];
        for sequence in self.sequences {
            for (index, (side, rows)) in sides.iter_mut().zip(&mut rows).enumerate() {
                *rows += if self.gaps == Gaps::Slots { gap() } else { 0 };
                side.starts.push(*rows as i32);
                side.lengths.push(sequence[index] as i32);
                *rows += sequence[index] + if self.gaps == Gaps::Used && index == 1 { gap() } else { 0 };
            }
        }
        for (side, rows) in sides.iter_mut().zip(rows) {
            side.rows = rows + if self.gaps == Gaps::Slots { gap() } else { 0 };
            side.cumulative = side.starts.iter().copied().chain([rows as i32]).collect();
        }
        sides
    }

    /// Returns the lengths as an input, as f32 of the same memory.
    pub(super) fn input(&self, seed: u64) -> Lengths<Vec<f32>> {
        let [q, k] = self.placed(seed);
        let slots = |side: &Side| Places::Slots { starts: words(&side.starts), lengths: words(&side.lengths) };
        let cumulative = |side: &Side| Places::Cumulative(words(&side.cumulative));
        let (q, k) = match self.gaps {
            Gaps::None => (cumulative(&q), cumulative(&k)),
            Gaps::Used => {
                (cumulative(&q), Places::Used { cumulative: words(&k.cumulative), lengths: words(&k.lengths) })
            }
            Gaps::Slots => (slots(&q), slots(&k)),
        };
        let longest = |side: usize| self.sequences.iter().map(|sequence| sequence[side]).max().unwrap_or_default();
        let hint = seed.is_multiple_of(2).then(|| [longest(0), longest(1)]);
        Lengths { sequences: self.sequences.len(), q, k, longest: hint }
    }

    /// Returns a problem with as many rows as the sequences and their gaps.
    fn problem(&self, problem: Problem, seed: u64) -> Problem {
        let [q, k] = self.placed(seed);
        Problem { batch: 1, seqlen_q: q.rows, seqlen_k: k.rows, ..problem }
    }
}

/// Places of sequences on one side.
#[derive(Debug, Default)]
struct Side {
    starts: Vec<i32>,
    lengths: Vec<i32>,
    cumulative: Vec<i32>,
    rows: usize,
}

fn words(numbers: &[i32]) -> Integers<Vec<f32>> {
    Integers::of_words(numbers.iter().map(|&number| f32::from_bits(number as u32)).collect())
}

impl CaseLengths {
    /// Returns the problem of each sequence alone.
    pub fn problems(self, problem: Problem) -> impl Iterator<Item = Problem> {
        self.sequences.iter().map(move |&[seqlen_q, seqlen_k]| Problem { batch: 1, seqlen_q, seqlen_k, ..problem })
    }
}

impl Case {
    /// Returns the case with sequences of these lengths, which share one tensor.
    pub fn with_lengths(self, lengths: CaseLengths) -> Self {
        Case { lengths: Some(lengths), problem: lengths.problem(self.problem, self.seed), ..self }
    }

    /// Returns a case as [`Case::random`] does, with sequences of random lengths.
    pub fn random_lengths(seed: u64, limit: f64) -> Self {
        let case = Case::random(seed, limit);
        let Problem { heads_q, head_dim, seqlen_q, seqlen_k, batch, .. } = case.problem;
        // Tokens of one sequence that takes all operations.
        let most = (limit / (4.0 * heads_q as f64 * head_dim as f64)).sqrt() as usize;
        let tokens = (batch * seqlen_q.max(seqlen_k)).clamp(1, most.max(1));
        let case = case.with_lengths(CaseLengths::random(seed, tokens));
        Case { mask: super::random_mask(&mut StdRng::seed_from_u64(seed), &case.problem), ..case }
    }

    /// Returns the rows of queries, and those of keys, that belong to no sequence.
    pub fn rows_of_gaps(&self) -> [Vec<usize>; 2] {
        let Some(lengths) = self.lengths else { return Default::default() };
        lengths.placed(self.seed).map(|side| {
            let places = || side.starts.iter().zip(&side.lengths).map(|(&start, &len)| (start, start + len));
            let is_free = |row: &usize| !places().any(|(start, end)| (start..end).contains(&(*row as i32)));
            (0..side.rows).filter(is_free).collect()
        })
    }

    /// Returns the number of items of the batch: sequences, if lengths differ.
    pub(super) fn items(&self) -> usize {
        self.lengths.map_or(self.problem.batch, |lengths| lengths.sequences.len())
    }
}

/// Writes the flags of `ferroflash check`.
impl fmt::Display for CaseLengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sequences: Vec<String> = self.sequences.iter().map(|[q, k]| format!("{q}x{k}")).collect();
        write!(f, "--lengths {}", if sequences.is_empty() { "none".to_owned() } else { sequences.join(",") })?;
        if self.gaps == Gaps::None { Ok(()) } else { write!(f, " --gaps {}", self.gaps.name()) }
    }
}

/// Reads lengths without gaps: `7x7,0x12,137x349`, `none` for no sequence, or `log-normal:SEQUENCES:TOKENS:SEED`.
impl FromStr for CaseLengths {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "none" {
            return Ok(CaseLengths::new(Vec::new()));
        }
        if let Some(mix) = text.strip_prefix("log-normal:") {
            let numbers: Vec<u64> = mix.split(':').map_while(|number| number.parse().ok()).collect();
            return match numbers[..] {
                [count, tokens, seed] => Ok(CaseLengths::log_normal(count as usize, tokens as usize, seed)),
                _ => Err(Error::UnknownLengths { value: text.to_owned() }),
            };
        }
        let one = |pair: &str| {
            let (q, k) = pair.split_once('x')?;
            Some([q.trim().parse().ok()?, k.trim().parse().ok()?])
        };
        let sequences: Option<Vec<[usize; 2]>> = text.split(',').map(one).collect();
        sequences.map(CaseLengths::new).ok_or_else(|| Error::UnknownLengths { value: text.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_read_as_they_are_written() {
        for text in ["7x7,0x12,137x349", "none", "1x1"] {
            let lengths: CaseLengths = text.parse().unwrap();
            assert_eq!(lengths.to_string(), format!("--lengths {text}"));
        }
        let error = "7x7,12".parse::<CaseLengths>().unwrap_err().to_string();
        assert!(error.contains("7x7,12") && error.contains("137x349"), "{error}");
    }

    #[test]
    fn a_log_normal_mix_has_its_tokens() {
        let lengths: CaseLengths = "log-normal:64:65536:7".parse().unwrap();
        assert_eq!(lengths.sequences.len(), 64);
        assert_eq!(lengths.sequences.iter().map(|[q, _]| q).sum::<usize>(), 65536);
        let longest = lengths.sequences.iter().map(|[q, _]| *q).max().unwrap();
        assert!((2 * 1024..20 * 1024).contains(&longest), "{longest}");
        assert_eq!(lengths.sequences, CaseLengths::log_normal(64, 65536, 7).sequences);
        assert!("log-normal:64".parse::<CaseLengths>().is_err());
    }

    #[test]
    fn random_lengths_are_valid() {
        for seed in 0..300 {
            let case = Case::random_lengths(seed, 1e6);
            let lengths = case.lengths.unwrap();
            let input = lengths.input(case.seed);
            let borrowed = super::super::shaping::lengths_of(&input);
            borrowed.check(&case.problem).unwrap();
            let rows = borrowed.rows();
            let found: Vec<[usize; 2]> = rows.iter().map(|[q, k]| [q.len(), k.len()]).collect();
            assert_eq!(found, lengths.sequences, "{case}");
        }
    }
}
