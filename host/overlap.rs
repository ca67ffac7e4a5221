//! Test for sets of rows that share memory. Outputs must not, for slices and raw pointers alike.
//!
//! A tensor's rows are a comb of combs of combs: a row of contiguous bytes, repeated at three strides. An exact test
//! for common bytes of two such sets is a Diophantine problem. The rules here are exact for layouts whose dimensions
//! nest (each stride at least the span of the dimensions within it), as is usual in practice, and err towards "shared"
//! otherwise.

use crate::{error::Dim, tensor::Layout};

/// Repetition of inner dimensions at a stride, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Step {
    stride: u128,
    count: u128,
}

impl Step {
    /// A step without repetition.
    const ONCE: Step = Step { stride: 0, count: 1 };
}

/// Bytes that a tensor's rows occupy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    start: u128,
    row_bytes: u128,
    /// Steps with the largest stride first. An extent of 1 or a stride of 0 counts as no repetition.
    steps: [Step; 3],
}

impl Region {
    /// Returns the rows of a tensor at `address`, or `None` if it is empty.
    pub(crate) fn of_rows(address: u64, layout: &Layout, element_bytes: usize) -> Option<Region> {
        if layout.is_empty() {
            return None;
        }
        let bytes = |elements: usize| (elements as u128).saturating_mul(element_bytes as u128);
        let mut steps = [Step::ONCE; 3];
        for ((step, stride), extent) in steps.iter_mut().zip(layout.strides).zip(layout.shape) {
            if extent > 1 && stride > 0 {
                *step = Step { stride: bytes(stride), count: extent as u128 };
            }
        }
        steps.sort_unstable_by_key(|step| std::cmp::Reverse(step.stride));
        Some(Region { start: address as u128, row_bytes: bytes(layout.shape[3]), steps })
    }

    /// Returns contiguous bytes, or `None` if there are none.
    pub(crate) fn of_bytes(address: u64, bytes: u128) -> Option<Region> {
        (bytes > 0).then_some(Region { start: address as u128, row_bytes: bytes, steps: [Step::ONCE; 3] })
    }

    /// Address of the end of the last row.
    fn end(&self) -> u128 {
        self.steps.iter().fold(self.start.saturating_add(self.row_bytes), |end, step| {
            end.saturating_add((step.count - 1).saturating_mul(step.stride))
        })
    }

    /// Returns the first of the repetitions at `stride` if this is the outermost stride; otherwise all of the region.
    fn within(self, stride: u128) -> Region {
        let [outer, middle, inner] = self.steps;
        if outer.stride == stride { Region { steps: [middle, inner, Step::ONCE], ..self } } else { self }
    }

    /// True if the two surely share no byte.
    ///
    /// If one ends before the other starts, they share none. Otherwise let both together, at the outermost stride, lie
    /// within one period of it. Then different periods can't share bytes, and it suffices to compare a single period.
    /// This tells Q and O apart in one packed (batch, seqlen, parts, heads, head_dim) tensor.
    pub(crate) fn is_disjoint(&self, other: &Region) -> bool {
        let (mut a, mut b) = (*self, *other);
        loop {
            if a.end() <= b.start || b.end() <= a.start {
                return true;
            }
            let stride = a.steps[0].stride.max(b.steps[0].stride);
            (a, b) = (a.within(stride), b.within(stride));
            let period = a.end().max(b.end()) - a.start.min(b.start);
            if period > stride {
                return false;
            }
        }
    }
}

/// Dimension whose stride is too small to keep rows apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alias {
    pub(crate) dim: Dim,
    pub(crate) stride: usize,
    /// Number of elements that the inner dimensions span, and so the smallest safe stride.
    pub(crate) required: u128,
}

/// Returns the first dimension, from the innermost, that does not nest; `None` if all rows are surely apart.
pub(crate) fn self_alias(layout: &Layout) -> Option<Alias> {
    if layout.is_empty() {
        return None;
    }
    let mut dims = [0, 1, 2];
    dims.sort_unstable_by_key(|&d| layout.strides[d]);
    let mut span = layout.shape[3] as u128;
    for d in dims {
        let (stride, extent) = (layout.strides[d], layout.shape[d]);
        if extent > 1 {
            if (stride as u128) < span {
                return Some(Alias { dim: Dim::ALL[d], stride, required: span });
            }
            span = span.saturating_add((extent as u128 - 1).saturating_mul(stride as u128));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn rows(layout: &Layout) -> impl Iterator<Item = usize> {
        let [batch, heads, seqlen, _] = layout.shape;
        (0..batch)
            .flat_map(move |b| (0..heads).flat_map(move |h| (0..seqlen).map(move |i| (b, h, i))))
            .map(|(b, h, i)| layout.offset(b, h, i))
    }

    fn bytes(address: u64, layout: &Layout) -> HashSet<u64> {
        rows(layout)
            .flat_map(|row| (0..layout.shape[3] * 2).map(move |byte| address + (row * 2 + byte) as u64))
            .collect()
    }

    fn are_disjoint(a: (u64, &Layout), b: (u64, &Layout)) -> bool {
        match (Region::of_rows(a.0, a.1, 2), Region::of_rows(b.0, b.1, 2)) {
            (Some(a), Some(b)) => a.is_disjoint(&b),
            _ => true,
        }
    }

    fn layout() -> impl Strategy<Value = Layout> {
        ([0..4usize, 0..4usize, 0..5usize, 1..4usize], [0..20usize, 0..20usize, 0..20usize])
            .prop_map(|(shape, strides)| Layout::strided(shape, strides))
    }

    /// Generates dimensions that nest, in any order, with gaps.
    fn nested() -> impl Strategy<Value = Layout> {
        (
            [1..4usize, 1..4usize, 1..5usize, 1..4usize],
            [0..3usize, 0..3usize, 0..3usize],
            Just([0, 1, 2]).prop_shuffle(),
        )
            .prop_map(|(shape, gaps, order)| {
                let mut strides = [0; 3];
                let mut span = shape[3];
                for (d, gap) in order.into_iter().zip(gaps) {
                    strides[d] = span + gap;
                    span = strides[d] * shape[d];
                }
                Layout::strided(shape, strides)
            })
    }

    proptest! {
        #[test]
        fn disjoint_regions_share_no_byte(a in layout(), b in layout(), at in 0..120u64) {
            let shared = bytes(60, &a).intersection(&bytes(at, &b)).count();
            prop_assert!(shared == 0 || !are_disjoint((60, &a), (at, &b)));
            prop_assert_eq!(are_disjoint((60, &a), (at, &b)), are_disjoint((at, &b), (60, &a)));
        }

        #[test]
        fn apart_ranges_are_disjoint(a in layout(), b in layout(), gap in 0..3u64) {
            let at = 2 * a.required_len().unwrap() as u64 + gap;
            prop_assert!(are_disjoint((0, &a), (at, &b)));
        }

        #[test]
        fn layouts_without_alias_have_distinct_rows(layout in layout()) {
            if self_alias(&layout).is_none() {
                let all = rows(&layout).count();
                prop_assert_eq!(bytes(0, &layout).len(), all * layout.shape[3] * 2);
            }
        }

        #[test]
        fn nested_layouts_have_no_alias(layout in nested()) {
            prop_assert_eq!(self_alias(&layout), None);
        }

        #[test]
        fn parts_of_a_packed_tensor_are_disjoint(
            batch in 1..3usize, seqlen in 1..4usize, heads_q in 1..4usize, heads_kv in 1..3usize, head_dim in 1..3usize,
        ) {
            let row = (2 * heads_q + 2 * heads_kv) * head_dim;
            let part = |first: usize, heads| {
                let strides = [seqlen * row, head_dim, row];
                ((first * head_dim * 2) as u64, Layout::strided([batch, heads, seqlen, head_dim], strides))
            };
            let parts = [
                part(0, heads_q), part(heads_q, heads_kv), part(heads_q + heads_kv, heads_kv),
                part(heads_q + 2 * heads_kv, heads_q),
            ];
            for (i, a) in parts.iter().enumerate() {
                for (j, b) in parts.iter().enumerate() {
                    prop_assert_eq!(are_disjoint((a.0, &a.1), (b.0, &b.1)), i != j);
                }
            }
        }
    }

    #[test]
    fn broadcast_rows_alias() {
        let alias = self_alias(&Layout::strided([2, 3, 4, 8], [96, 0, 8]));
        assert_eq!(alias, Some(Alias { dim: Dim::Heads, stride: 0, required: 8 }));
        let alias = self_alias(&Layout::strided([2, 3, 4, 8], [64, 32, 8]));
        assert_eq!(alias, Some(Alias { dim: Dim::Batch, stride: 64, required: 96 }));
        assert_eq!(self_alias(&Layout::strided([1, 3, 1, 8], [0, 8, 0])), None);
    }

    #[test]
    fn huge_layouts_do_not_overflow() {
        let huge = Layout::strided([usize::MAX; 4], [usize::MAX; 3]);
        assert!(!are_disjoint((u64::MAX, &huge), (u64::MAX, &huge)));
        assert!(self_alias(&huge).is_some());
    }
}
