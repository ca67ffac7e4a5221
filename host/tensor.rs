//! Borrowed strided tensors: (batch, heads, seqlen, head_dim) in any stride order, head_dim contiguous.
//!
//! A [`Layout`] maps indices to offsets, in elements from the first; a [`Tensor`] adds the memory, a slice or device
//! memory. BHSD, BSHD and a part of a packed tensor are one type with different strides. Nothing here is checked on
//! construction: the backends check layouts against the problem before they access memory.

use crate::{
    error::Result,
    problem::{at_most, volume},
};

/// Positions of the elements of a (batch, heads, seqlen, head_dim) tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Extents: batch, heads, seqlen, head_dim.
    pub shape: [usize; 4],
    /// Strides of batch, heads and seqlen, in elements; that of head_dim is 1. The stride of an extent of 1 never
    /// matters. An input's stride may be 0, which repeats it along that dimension.
    pub strides: [usize; 3],
}

impl Layout {
    /// Returns the contiguous layout in the order batch, heads, seqlen, head_dim.
    pub fn bhsd(shape: [usize; 4]) -> Self {
        let [_, heads, seqlen, head_dim] = shape;
        let head = seqlen.saturating_mul(head_dim);
        Layout { shape, strides: [heads.saturating_mul(head), head, head_dim] }
    }

    /// Returns the contiguous layout in the order batch, seqlen, heads, head_dim. `shape` is nevertheless (batch,
    /// heads, seqlen, head_dim).
    pub fn bshd(shape: [usize; 4]) -> Self {
        let [_, heads, seqlen, head_dim] = shape;
        let row = heads.saturating_mul(head_dim);
        Layout { shape, strides: [seqlen.saturating_mul(row), head_dim, row] }
    }

    /// Returns a layout with the given strides: batch, head and row, in elements.
    pub fn strided(shape: [usize; 4], strides: [usize; 3]) -> Self {
        Layout { shape, strides }
    }

    /// True if there are no elements.
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// Number of elements from the first to the end of the last, which a buffer must hold. 0 if there are none.
    ///
    /// # Errors
    /// [`Error::TooLarge`](crate::Error::TooLarge) if a `usize` can't hold it.
    pub fn required_len(&self) -> Result<usize> {
        let span = self.span();
        at_most("elements spanned by the layout", span, usize::MAX as u128)?;
        Ok(span as usize)
    }

    /// Offset of the row (batch, head, row) from the first element, in elements. It wraps around for layouts that
    /// [`Layout::required_len`] refuses.
    pub fn offset(&self, batch: usize, head: usize, row: usize) -> usize {
        let [b, h, i] = self.strides;
        batch.wrapping_mul(b).wrapping_add(head.wrapping_mul(h)).wrapping_add(row.wrapping_mul(i))
    }

    /// Returns the strides as kernels and tensor maps take them. If no element depends on a stride, because the extent
    /// is 1 or the tensor empty, it is replaced by head_dim, which is within every limit.
    pub fn lowered_strides(&self) -> [usize; 3] {
        let mut strides = self.strides;
        for (stride, extent) in strides.iter_mut().zip(self.shape) {
            if extent <= 1 || self.is_empty() {
                *stride = self.shape[3];
            }
        }
        strides
    }

    /// [`Layout::required_len`], capped at `u128::MAX`.
    pub(crate) fn span(&self) -> u128 {
        if volume(self.shape) == 0 {
            return 0;
        }
        self.strides.iter().zip(self.shape).fold(self.shape[3] as u128, |span, (&stride, extent)| {
            span.saturating_add((extent as u128 - 1).saturating_mul(stride as u128))
        })
    }
}

/// Memory, and the layout of the tensor in it.
///
/// `S` is `&[E]` or `&mut [E]` for [`Cpu`](crate::Cpu), and device memory for the GPU backend.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<S> {
    /// Memory from the tensor's first element on.
    pub data: S,
    /// Layout of the elements in it.
    pub layout: Layout,
}

impl<S> Tensor<S> {
    /// Returns a contiguous tensor in the order batch, heads, seqlen, head_dim.
    pub fn bhsd(data: S, shape: [usize; 4]) -> Self {
        Tensor { data, layout: Layout::bhsd(shape) }
    }

    /// Returns a contiguous tensor in the order batch, seqlen, heads, head_dim. `shape` is nevertheless (batch, heads,
    /// seqlen, head_dim).
    pub fn bshd(data: S, shape: [usize; 4]) -> Self {
        Tensor { data, layout: Layout::bshd(shape) }
    }

    /// Returns a tensor with the given strides: batch, head and row, in elements.
    pub fn strided(data: S, shape: [usize; 4], strides: [usize; 3]) -> Self {
        Tensor { data, layout: Layout::strided(shape, strides) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HUGE: Layout = Layout { shape: [usize::MAX; 4], strides: [usize::MAX; 3] };

    /// Returns the largest offset of an element, plus 1.
    fn brute_force_len(layout: &Layout) -> usize {
        let [batch, heads, seqlen, head_dim] = layout.shape;
        let mut len = 0;
        for b in 0..batch {
            for h in 0..heads {
                for i in 0..seqlen {
                    for d in 0..head_dim {
                        len = len.max(layout.offset(b, h, i) + d + 1);
                    }
                }
            }
        }
        len
    }

    proptest! {
        #[test]
        fn required_len_is_the_last_element(
            shape in [0..4usize, 0..4usize, 0..6usize, 0..9usize],
            strides in [0..50usize, 0..50usize, 0..50usize],
        ) {
            let layout = Layout::strided(shape, strides);
            prop_assert_eq!(layout.required_len(), Ok(brute_force_len(&layout)));
        }

        #[test]
        fn contiguous_layouts_fill_their_span(shape in [0..4usize, 0..4usize, 0..6usize, 0..9usize]) {
            let volume = shape.iter().product();
            prop_assert_eq!(Layout::bhsd(shape).required_len(), Ok(volume));
            prop_assert_eq!(Layout::bshd(shape).required_len(), Ok(volume));
        }

        #[test]
        fn lowering_moves_no_element(
            shape in [0..3usize, 0..3usize, 0..3usize, 1..9usize],
            strides in [0..50usize, 0..50usize, 0..50usize],
        ) {
            let layout = Layout::strided(shape, strides);
            let lowered = Layout::strided(shape, layout.lowered_strides());
            for (b, h, i) in (0..shape[0]).flat_map(|b| (0..shape[1]).map(move |h| (b, h))).flat_map(|(b, h)| {
                (0..shape[2]).map(move |i| (b, h, i))
            }) {
                prop_assert_eq!(layout.offset(b, h, i), lowered.offset(b, h, i));
            }
        }
    }

    #[test]
    fn orders_differ_in_strides_alone() {
        let shape = [2, 3, 5, 8];
        assert_eq!(Layout::bhsd(shape).strides, [120, 40, 8]);
        assert_eq!(Layout::bshd(shape).strides, [120, 8, 24]);
        assert_eq!(Layout::bshd(shape).offset(1, 2, 4), 120 + 2 * 8 + 4 * 24);
    }

    #[test]
    fn strides_that_do_not_matter_are_lowered() {
        let layout = Layout::strided([1, 2, 1, 64], [usize::MAX, 640, 3]);
        assert_eq!(layout.lowered_strides(), [64, 640, 64]);
        let empty = Layout::strided([4, 2, 0, 64], [usize::MAX; 3]);
        assert_eq!(empty.lowered_strides(), [64; 3]);
    }

    #[test]
    fn huge_layouts_are_errors() {
        let error = HUGE.required_len().unwrap_err().to_string();
        assert!(error.starts_with("elements spanned by the layout is "), "{error}");
        assert!(error.ends_with("; at most 18446744073709551615 is allowed"), "{error}");
        assert!(Layout::bhsd([usize::MAX; 4]).required_len().is_err());
        assert!(Layout::bshd([usize::MAX; 4]).required_len().is_err());
        HUGE.offset(usize::MAX, usize::MAX, usize::MAX);
    }
}
