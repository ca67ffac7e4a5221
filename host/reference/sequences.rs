//! Sequences of different lengths, each as a dense attention of its own.

use std::ops::Range;

use crate::error::Result;
use crate::operands::{OptionalInputs, Slopes};
use crate::plan::Options;
use crate::problem::Problem;
use crate::tensor::{Layout, Tensor};

/// A sequence as a batch item of its own.
pub(super) struct Sequence<'a> {
    /// Its number, which takes the place of the batch item's.
    pub(super) index: usize,
    /// Its rows in the tensors of queries, and in those of keys.
    pub(super) q: Range<usize>,
    pub(super) k: Range<usize>,
    pub(super) problem: Problem,
    pub(super) options: Options,
    pub(super) optional: OptionalInputs<&'a [f32]>,
}

/// Returns the sequences of a batch in which lengths differ, or nothing for a dense batch. The inputs have been
/// checked.
///
/// # Errors
/// [`Error::SequencePlace`](crate::Error::SequencePlace).
pub(super) fn sequences<'a>(
    problem: &Problem,
    options: &Options,
    optional: &OptionalInputs<&'a [f32]>,
) -> Result<Option<Vec<Sequence<'a>>>> {
    let Some(lengths) = optional.lengths else { return Ok(None) };
    lengths.check(problem)?;
    let one = |(index, [q, k]): (usize, [Range<usize>; 2])| {
        let slopes = optional.slopes.map(|slopes| match slopes {
            Slopes::PerItem(slopes) => Slopes::PerItem(&slopes[index * problem.heads_q..][..problem.heads_q]),
            slopes => slopes,
        });
        Sequence {
            index,
            problem: Problem { batch: 1, seqlen_q: q.len(), seqlen_k: k.len(), ..*problem },
            options: Options { sequences: None, ..*options },
            optional: OptionalInputs { slopes, lengths: None, ..*optional },
            q,
            k,
        }
    };
    Ok(Some(lengths.rows().into_iter().enumerate().map(one).collect()))
}

/// Returns some rows of every head of a tensor.
pub(super) fn rows_of<'a, E>(tensor: &Tensor<&'a [E]>, rows: &Range<usize>) -> Tensor<&'a [E]> {
    let Layout { shape: [batch, heads, _, head_dim], strides } = tensor.layout;
    let first = if rows.is_empty() { 0 } else { tensor.layout.offset(0, 0, rows.start) };
    Tensor { data: &tensor.data[first..], layout: Layout { shape: [batch, heads, rows.len(), head_dim], strides } }
}

/// Returns some rows of every head of an array of `width` elements for each of `all` rows.
pub(super) fn gather<T: Copy>(array: &[T], width: usize, all: usize, rows: &Range<usize>) -> Vec<T> {
    let mut gathered = Vec::new();
    for head in array.chunks_exact((all * width).max(1)) {
        gathered.extend_from_slice(&head[rows.start * width..rows.end * width]);
    }
    gathered
}

/// Copies `from`, which has some rows of every head, to their places among all rows of every head.
pub(super) fn scatter<T: Copy>(from: &[T], to: &mut [T], width: usize, all: usize, rows: &Range<usize>) {
    let heads = to.chunks_exact_mut((all * width).max(1));
    for (from, to) in from.chunks_exact((rows.len() * width).max(1)).zip(heads) {
        to[rows.start * width..rows.end * width].copy_from_slice(from);
    }
}
