//! Sequences of different lengths that share one tensor, one after the other.
//!
//! Q, K and V then have a batch of 1, and as many rows as all sequences together. [`Lengths`] says where each sequence
//! lies: it is an input of every pass, in memory of the machine, so that the host need not know it.

use crate::error::{Error, Operand, Result};
use crate::operands::{Lines, Pass, Role, VisitedLine, rows};
use crate::problem::Problem;

/// Numbers i32 in memory of the machine.
///
/// They are made from `&[i32]` for [`Cpu`](crate::Cpu), from device memory of i32 for the GPU backend, and from an
/// address for raw calls; [`Backend::integers`](crate::Backend::integers) makes them for any backend. `L` is the
/// machine's memory of f32, as the other optional inputs have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Integers<L>(L);

impl<L> Integers<L> {
    /// Names memory of i32 by the same memory as f32.
    #[cfg(any(feature = "cli", feature = "cuda", test))]
    pub(crate) fn of_words(words: L) -> Self {
        Integers(words)
    }

    /// Returns the same memory as f32.
    pub(crate) fn into_words(self) -> L {
        self.0
    }
}

impl From<u64> for Integers<u64> {
    fn from(address: u64) -> Self {
        Integers(address)
    }
}

impl<'a> From<&'a [i32]> for Integers<&'a [f32]> {
    fn from(numbers: &'a [i32]) -> Self {
        Integers(bytemuck::cast_slice(numbers))
    }
}

impl<'a> From<&'a Vec<i32>> for Integers<&'a [f32]> {
    fn from(numbers: &'a Vec<i32>) -> Self {
        numbers[..].into()
    }
}

/// Places of the sequences on one side, queries or keys. Sequences follow one another in the tensor, and none begins
/// before the end of the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Places<L> {
    /// Cumulative lengths, (sequences + 1): sequence b has the rows from element b up to but not element b + 1.
    Cumulative(Integers<L>),
    /// Cumulative lengths, and the number of rows of each sequence that count, (sequences).
    Used {
        /// Cumulative lengths.
        cumulative: Integers<L>,
        /// Number of rows that count, at most those between the cumulative lengths.
        lengths: Integers<L>,
    },
    /// First row and number of rows of each sequence, (sequences) each. There may be gaps between sequences.
    Slots {
        /// First row.
        starts: Integers<L>,
        /// Number of rows.
        lengths: Integers<L>,
    },
}

/// Form in which [`Places`] are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PlacesKind {
    /// [`Places::Cumulative`].
    Cumulative,
    /// [`Places::Used`].
    Used,
    /// [`Places::Slots`].
    Slots,
}

impl<L> Places<L> {
    fn kind(&self) -> PlacesKind {
        match self {
            Places::Cumulative(_) => PlacesKind::Cumulative,
            Places::Used { .. } => PlacesKind::Used,
            Places::Slots { .. } => PlacesKind::Slots,
        }
    }

    fn visit_with<U>(self, mut f: impl FnMut(Array, L) -> Result<U>) -> Result<Places<U>> {
        let mut f = |array, numbers: Integers<L>| f(array, numbers.0).map(Integers);
        Ok(match self {
            Places::Cumulative(numbers) => Places::Cumulative(f(Array::Cumulative, numbers)?),
            Places::Used { cumulative, lengths } => {
                let cumulative = f(Array::Cumulative, cumulative)?;
                Places::Used { cumulative, lengths: f(Array::Lengths, lengths)? }
            }
            Places::Slots { starts, lengths } => {
                Places::Slots { starts: f(Array::Starts, starts)?, lengths: f(Array::Lengths, lengths)? }
            }
        })
    }
}

/// Arrays of [`Places`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Array {
    Cumulative,
    Starts,
    Lengths,
}

/// Lengths of a batch of sequences, an optional input of every pass.
///
/// ```
/// use ferroflash::{Attention, Cpu, Dtype, Inputs, Lengths, Mask, Problem, Tensor, bf16};
///
/// // Three sequences of 30, 0 and 20 tokens.
/// let cumulative = [0, 30, 30, 50];
/// let problem =
///     Problem { batch: 1, heads_q: 4, heads_kv: 2, seqlen_q: 50, seqlen_k: 50, head_dim: 64, dtype: Dtype::Bf16 };
/// let x: Vec<bf16> = (0..50 * 4 * 64).map(|i| bf16::from_f32((i as f32).sin())).collect();
/// // Rows are (tokens, heads, head_dim).
/// let (q, kv) = (Tensor::bshd(&x[..], problem.q_shape()), Tensor::bshd(&x[..50 * 2 * 64], problem.kv_shape()));
///
/// let attention = Attention::new(problem).mask(Mask::Causal);
/// let lengths = Lengths::cumulative(3, &cumulative[..], &cumulative[..]);
/// let out = attention.forward_with(&Cpu, Inputs::new(q, kv, kv).lengths(lengths))?;
/// assert_eq!(out.lse.expect("returned unless omitted").len(), 4 * 50); // (heads_q, tokens)
/// # Ok::<(), ferroflash::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths<L> {
    /// Number of sequences.
    pub sequences: usize,
    /// Places of the queries.
    pub q: Places<L>,
    /// Places of the keys.
    pub k: Places<L>,
    /// Largest number of queries and of keys of a sequence, if the host knows it. It is a hint, from which a plan
    /// chooses tiles; results do not depend on whether it is true.
    pub longest: Option<[usize; 2]>,
}

impl<L> Lengths<L> {
    /// Returns the lengths of `sequences` sequences by cumulative lengths of their queries and keys.
    pub fn cumulative(sequences: usize, q: impl Into<Integers<L>>, k: impl Into<Integers<L>>) -> Self {
        Lengths { sequences, q: Places::Cumulative(q.into()), k: Places::Cumulative(k.into()), longest: None }
    }

    /// Sets the hint [`Lengths::longest`].
    pub fn longest(self, queries: usize, keys: usize) -> Self {
        Lengths { longest: Some([queries, keys]), ..self }
    }

    /// Lets the first `lengths` keys of each sequence count. The keys then have cumulative lengths.
    ///
    /// Lengths whose keys are given as slots stay as they are, because slots have lengths already.
    pub fn used_keys(self, lengths: impl Into<Integers<L>>) -> Self {
        let k = match self.k {
            Places::Cumulative(cumulative) | Places::Used { cumulative, .. } => {
                Places::Used { cumulative, lengths: lengths.into() }
            }
            slots @ Places::Slots { .. } => slots,
        };
        Lengths { k, ..self }
    }

    /// Applies `f` to each array, and stops at the first error.
    #[cfg(feature = "cuda")]
    pub(crate) fn try_map_ref<'a, U>(&'a self, f: impl Fn(&'a L) -> Result<U>) -> Result<Lengths<U>> {
        let one = |numbers: &'a Integers<L>| f(&numbers.0).map(Integers);
        let places = |places: &'a Places<L>| -> Result<Places<U>> {
            Ok(match places {
                Places::Cumulative(numbers) => Places::Cumulative(one(numbers)?),
                Places::Used { cumulative, lengths } => {
                    Places::Used { cumulative: one(cumulative)?, lengths: one(lengths)? }
                }
                Places::Slots { starts, lengths } => Places::Slots { starts: one(starts)?, lengths: one(lengths)? },
            })
        };
        Ok(Lengths { sequences: self.sequences, q: places(&self.q)?, k: places(&self.k)?, longest: self.longest })
    }

    /// Applies `f` to each array.
    #[cfg(any(feature = "cli", feature = "cuda"))]
    pub(crate) fn map_ref<'a, U>(&'a self, f: impl Fn(&'a L) -> U) -> Lengths<U> {
        let one = |numbers: &'a Integers<L>| Integers(f(&numbers.0));
        let places = |places: &'a Places<L>| match places {
            Places::Cumulative(numbers) => Places::Cumulative(one(numbers)),
            Places::Used { cumulative, lengths } => Places::Used { cumulative: one(cumulative), lengths: one(lengths) },
            Places::Slots { starts, lengths } => Places::Slots { starts: one(starts), lengths: one(lengths) },
        };
        Lengths { sequences: self.sequences, q: places(&self.q), k: places(&self.k), longest: self.longest }
    }

    /// Returns the kind of these lengths.
    pub fn kind(&self) -> Sequences {
        let Lengths { sequences, q, k, longest } = self;
        Sequences { count: *sequences, q: q.kind(), k: k.kind(), longest: *longest }
    }
}

/// Number of sequences of different lengths in a tensor, and the form of their lengths. A plan is made for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sequences {
    /// Number of sequences.
    pub count: usize,
    /// Form of the places of queries.
    pub q: PlacesKind,
    /// Form of the places of keys.
    pub k: PlacesKind,
    /// The hint [`Lengths::longest`].
    pub longest: Option<[usize; 2]>,
}

impl Sequences {
    /// Returns `count` sequences with cumulative lengths of queries and of keys.
    pub fn cumulative(count: usize) -> Self {
        Sequences { count, q: PlacesKind::Cumulative, k: PlacesKind::Cumulative, longest: None }
    }
}

impl<L, X: Lines<L>> Pass<X> for Lengths<L> {
    type Of = Lengths<VisitedLine<X, L>>;

    fn visit(self, visitor: &mut X) -> Result<Self::Of> {
        let q = self.q.visit_with(|array, numbers| {
            let row = match array {
                Array::Cumulative => rows::CUMULATIVE_Q,
                Array::Starts => rows::STARTS_Q,
                Array::Lengths => rows::LENGTHS_Q,
            };
            visitor.line(row, Role::Input, numbers)
        })?;
        let k = self.k.visit_with(|array, numbers| {
            let row = match array {
                Array::Cumulative => rows::CUMULATIVE_K,
                Array::Starts => rows::STARTS_K,
                Array::Lengths => rows::LENGTHS_K,
            };
            visitor.line(row, Role::Input, numbers)
        })?;
        Ok(Lengths { sequences: self.sequences, q, k, longest: self.longest })
    }
}

/// Lengths in the host's memory, which can be checked.
pub(crate) type HostLengths<'a> = Lengths<&'a [f32]>;

impl Lengths<u64> {
    /// Returns lengths in the host's memory. `read` gets the address and the number of elements of each array.
    pub(crate) fn read_with<'a>(self, read: impl Fn(u64, usize) -> &'a [f32]) -> Result<HostLengths<'a>> {
        let Lengths { sequences, q, k, longest } = self;
        let array = |array, address| Ok(read(address, sequences + usize::from(array == Array::Cumulative)));
        Ok(Lengths { sequences, q: q.visit_with(array)?, k: k.visit_with(array)?, longest })
    }
}

impl<'a> Lengths<&'a [f32]> {
    /// Returns cumulative lengths in the host's memory after checking them, with the hint of the longest.
    ///
    /// # Errors
    /// [`Error::SequencePlace`], which names the entry and what it may be; [`Error::LengthsLength`] for arrays of
    /// different lengths.
    pub fn from_host(problem: &Problem, cumulative_q: &'a [i32], cumulative_k: &'a [i32]) -> Result<Self> {
        let sequences = cumulative_q.len().saturating_sub(1);
        let lengths = Lengths::cumulative(sequences, cumulative_q, cumulative_k);
        let expected = sequences + 1;
        for (operand, len) in [(Operand::CumulativeQ, cumulative_q.len()), (Operand::CumulativeK, cumulative_k.len())] {
            if len != expected {
                return Err(Error::LengthsLength { operand, len, expected });
            }
        }
        lengths.check(problem)?;
        let longest =
            |numbers: &[i32]| numbers.windows(2).map(|pair| (pair[1] - pair[0]) as usize).max().unwrap_or_default();
        Ok(lengths.longest(longest(cumulative_q), longest(cumulative_k)))
    }

    /// Checks every entry: sequences lie within the problem's rows, and none begins before the end of the one before.
    ///
    /// # Errors
    /// [`Error::SequencePlace`].
    pub fn check(&self, problem: &Problem) -> Result<()> {
        let operands = [Operand::CumulativeQ, Operand::StartsQ, Operand::LengthsQ];
        self.q.check(operands, self.sequences, problem.seqlen_q)?;
        let operands = [Operand::CumulativeK, Operand::StartsK, Operand::LengthsK];
        self.k.check(operands, self.sequences, problem.seqlen_k)
    }

    /// Returns the rows of each sequence, (queries, keys). They have been checked.
    pub fn rows(&self) -> Vec<[std::ops::Range<usize>; 2]> {
        (0..self.sequences).map(|index| [self.q.rows(index), self.k.rows(index)]).collect()
    }
}

/// Returns the numbers as i32.
fn numbers<'a>(words: &Integers<&'a [f32]>) -> &'a [i32] {
    bytemuck::cast_slice(words.0)
}

impl Places<&[f32]> {
    fn rows(&self, index: usize) -> std::ops::Range<usize> {
        let at = |words: &Integers<&[f32]>, index: usize| numbers(words).get(index).map_or(0, |&x| x.max(0) as usize);
        match self {
            Places::Cumulative(cumulative) => at(cumulative, index)..at(cumulative, index + 1),
            Places::Used { cumulative, lengths } => {
                let start = at(cumulative, index);
                start..start + at(lengths, index)
            }
            Places::Slots { starts, lengths } => {
                let start = at(starts, index);
                start..start + at(lengths, index)
            }
        }
    }

    fn check(
        &self,
        [cumulative_name, starts_name, lengths_name]: [Operand; 3],
        count: usize,
        rows: usize,
    ) -> Result<()> {
        let rows = rows as i64;
        let within = |operand, index, value: i32, least: i64, most: i64| {
            if (least..=most).contains(&i64::from(value)) {
                return Ok(i64::from(value));
            }
            Err(Error::SequencePlace { operand, index, value, least, most: most.max(least) })
        };
        let mut end = 0;
        match self {
            Places::Cumulative(cumulative) => {
                for (index, &value) in numbers(cumulative).iter().take(count + 1).enumerate() {
                    end = within(cumulative_name, index, value, end, rows)?;
                }
            }
            Places::Used { cumulative, lengths } => {
                Places::Cumulative(*cumulative).check(
                    [cumulative_name, starts_name, lengths_name],
                    count,
                    rows as usize,
                )?;
                for (index, (pair, &len)) in numbers(cumulative).windows(2).zip(numbers(lengths)).enumerate() {
                    within(lengths_name, index, len, 0, i64::from(pair[1]) - i64::from(pair[0]))?;
                }
            }
            Places::Slots { starts, lengths } => {
                for (index, (&start, &len)) in numbers(starts).iter().zip(numbers(lengths)).take(count).enumerate() {
                    let start = within(starts_name, index, start, end, rows)?;
                    end = start + within(lengths_name, index, len, 0, rows - start)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use kernels_gpu::variants::Dtype;

    use super::*;

    const PROBLEM: Problem =
        Problem { batch: 1, heads_q: 1, heads_kv: 1, seqlen_q: 10, seqlen_k: 20, head_dim: 8, dtype: Dtype::F16 };

    fn message(q: &[i32], k: &[i32]) -> String {
        Lengths::from_host(&PROBLEM, q, k).unwrap_err().to_string()
    }

    #[test]
    fn good_lengths_have_rows_and_a_longest() {
        let lengths = Lengths::from_host(&PROBLEM, &[0, 3, 3, 10], &[0, 20, 20, 20]).unwrap();
        assert_eq!(lengths.longest, Some([7, 20]));
        assert_eq!(lengths.rows(), [[0..3, 0..20], [3..3, 20..20], [3..10, 20..20]]);
        let used = [5, 0, 0];
        let used = lengths.used_keys(&used[..]);
        assert_eq!(used.check(&PROBLEM), Ok(()));
        assert_eq!(used.rows()[0], [0..3, 0..5]);
    }

    #[test]
    fn bad_lengths_are_named() {
        assert_eq!(
            message(&[0, 5, 3], &[0, 0, 0]),
            "cu_seqlens_q[2] is 3; a number from 5 to 10 is needed, because sequences follow one another in the tensor"
        );
        assert!(message(&[0, 11], &[0, 0]).starts_with("cu_seqlens_q[1] is 11; a number from 0 to 10 "));
        assert!(message(&[-1, 5], &[0, 0]).starts_with("cu_seqlens_q[0] is -1; a number from 0 "));
        assert!(message(&[0, 5], &[0, 21]).starts_with("cu_seqlens_k[1] is 21; "));
        assert_eq!(message(&[0, 5], &[0]), "cu_seqlens_k has 1 element; exactly 2 are needed");
        let (starts, lens) = ([0, 4], [5, 1]);
        let slots = Places::Slots { starts: starts[..].into(), lengths: lens[..].into() };
        let lengths = Lengths { sequences: 2, q: slots, k: slots, longest: None };
        let error = lengths.check(&PROBLEM).unwrap_err().to_string();
        assert!(error.starts_with("starts_q[1] is 4; a number from 5 to 10 "), "{error}");
    }
}
