//! The problem: extents, element type, mask. It is validated once, here.
//!
//! O = softmax(scale · Q·Kᵀ + mask) · V (FlashAttention-2, arXiv 2307.08691, section 2.1), with Q and O
//! (batch, heads_q, seqlen_q, head_dim), K and V (batch, heads_kv, seqlen_k, head_dim). Query head h reads key head
//! h / (heads_q / heads_kv).

use std::{fmt, str::FromStr};

use kernels_gpu::{
    attention::mask::{Mask as _, Window},
    ground::shape::Shape,
    variants::Dtype,
};

use crate::error::{Error, Result};

/// Maximum extent: kernels count rows in 32-bit signed numbers.
pub(crate) const MAX_EXTENT: usize = i32::MAX as usize;
/// Maximum head dim.
pub(crate) const MAX_HEAD_DIM: usize = 256;
/// Head dims are multiples of this, because TMA moves units of 16 bytes.
pub(crate) const HEAD_DIM_STEP: usize = 8;
/// Size of an element of either dtype, in bytes.
pub(crate) const ELEMENT_BYTES: usize = 2;

/// Extents and element type of one attention.
///
/// `batch`, `seqlen_q` and `seqlen_k` may be 0. Without queries there is nothing to do, and without keys O is 0 and LSE
/// −∞.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Items of the batch.
    pub batch: usize,
    /// Query heads: a multiple of `heads_kv`.
    pub heads_q: usize,
    /// Key and value heads: `heads_q` in multi-head attention, 1 in multi-query attention.
    pub heads_kv: usize,
    /// Queries of each batch item and head.
    pub seqlen_q: usize,
    /// Keys and values of each batch item and head.
    pub seqlen_k: usize,
    /// Elements of a query, key or value: a multiple of 8 from 8 to 256.
    pub head_dim: usize,
    /// Element type of Q, K, V and O.
    pub dtype: Dtype,
}

impl Problem {
    /// Checks every rule for the extents.
    ///
    /// # Errors
    /// [`Error::Zero`] for no heads, [`Error::HeadsNotDivisible`], [`Error::HeadDim`], and [`Error::TooLarge`] for an
    /// extent above 2³¹ − 1 or a tensor of 2⁶³ bytes or more.
    pub fn validate(&self) -> Result<()> {
        for (field, value) in [("heads_q", self.heads_q), ("heads_kv", self.heads_kv)] {
            if value == 0 {
                return Err(Error::Zero { field });
            }
        }
        if !self.heads_q.is_multiple_of(self.heads_kv) {
            return Err(Error::HeadsNotDivisible { heads_q: self.heads_q, heads_kv: self.heads_kv });
        }
        if !(HEAD_DIM_STEP..=MAX_HEAD_DIM).contains(&self.head_dim) || !self.head_dim.is_multiple_of(HEAD_DIM_STEP) {
            return Err(Error::HeadDim { value: self.head_dim });
        }
        for (field, value) in [
            ("batch", self.batch),
            ("heads_q", self.heads_q),
            ("heads_kv", self.heads_kv),
            ("seqlen_q", self.seqlen_q),
            ("seqlen_k", self.seqlen_k),
        ] {
            at_most(field, value as u128, MAX_EXTENT as u128)?;
        }
        for (field, shape) in [("bytes of q", self.q_shape()), ("bytes of k", self.kv_shape())] {
            at_most(field, volume(shape).saturating_mul(ELEMENT_BYTES as u128), isize::MAX as u128)?;
        }
        Ok(())
    }

    /// Shape of Q and O: (batch, heads_q, seqlen_q, head_dim).
    pub fn q_shape(&self) -> [usize; 4] {
        [self.batch, self.heads_q, self.seqlen_q, self.head_dim]
    }

    /// Shape of K and V: (batch, heads_kv, seqlen_k, head_dim).
    pub fn kv_shape(&self) -> [usize; 4] {
        [self.batch, self.heads_kv, self.seqlen_k, self.head_dim]
    }

    /// Number of elements of the LSE, (batch, heads_q, seqlen_q); `usize::MAX` if a `usize` can't hold it.
    pub fn lse_len(&self) -> usize {
        self.batch.saturating_mul(self.heads_q).saturating_mul(self.seqlen_q)
    }

    /// Number of elements of the total attention, (batch, heads_q, seqlen_k); `usize::MAX` if a `usize` can't hold it.
    pub fn total_len(&self) -> usize {
        self.batch.saturating_mul(self.heads_q).saturating_mul(self.seqlen_k)
    }

    /// Floating-point operations of a forward pass by the field's convention: 4 · batch · heads_q · seqlen_q · seqlen_k
    /// · head_dim, and half of that when causal, for any lengths. With a window, only the keys that a query attends to
    /// count.
    pub fn flops_forward(&self, mask: Mask) -> f64 {
        let full = 4.0
            * self.batch as f64
            * self.heads_q as f64
            * self.seqlen_q as f64
            * self.seqlen_k as f64
            * self.head_dim as f64;
        match mask {
            Mask::None => full,
            Mask::Causal => full / 2.0,
            Mask::Window { .. } => {
                let (of, window) = (self.kernel_shape().sequence(), mask.window(self));
                let keys = |i| window.keys(&of, 0, i).len() as f64;
                let scores: f64 = (0..of.seqlen_q).map(keys).sum();
                full * (scores / (f64::from(of.seqlen_q) * f64::from(of.seqlen_k)).max(1.0))
            }
        }
    }

    /// Minimum number of bytes that a forward pass moves: Q, K and V read once, O and LSE written once.
    pub fn bytes_forward(&self) -> f64 {
        let elements = |shape: [usize; 4]| shape.iter().map(|&extent| extent as f64).product::<f64>();
        let lse = self.batch as f64 * self.heads_q as f64 * self.seqlen_q as f64;
        let tensors = 2.0 * elements(self.q_shape()) + 2.0 * elements(self.kv_shape());
        tensors * ELEMENT_BYTES as f64 + lse * size_of::<f32>() as f64
    }

    /// Returns the extents as kernels take them. They fit because [`Problem::validate`] passed.
    pub(crate) fn kernel_shape(&self) -> Shape {
        Shape {
            batch: self.batch as u32,
            heads_q: self.heads_q as u32,
            heads_kv: self.heads_kv as u32,
            seqlen_q: self.seqlen_q as u32,
            seqlen_k: self.seqlen_k as u32,
            head_dim: self.head_dim as u32,
        }
    }
}

/// Mask of the scores: the keys that a query attends to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Mask {
    /// A query attends to every key.
    #[default]
    None,
    /// Query i attends to key j if j ≤ i + seqlen_k − seqlen_q. This is aligned to the bottom right, so that the last
    /// query attends to every key. PyTorch's `is_causal` is aligned to the top left; the two agree if the lengths are
    /// equal.
    Causal,
    /// Query i attends to key j if −left ≤ j − (i + seqlen_k − seqlen_q) ≤ right: a window around the query's place,
    /// aligned to the bottom right, both ends included. `None` is no bound. Without bounds this is [`Mask::None`], and
    /// [`Mask::Causal`] has no left bound and a right bound of 0.
    Window {
        /// Number of keys before the query's place.
        left: Option<u32>,
        /// Number of keys behind the query's place.
        right: Option<u32>,
    },
}

impl Mask {
    /// Returns the mask as a launch parameter: every mask is a window.
    pub(crate) fn window(self, problem: &Problem) -> Window {
        match self {
            Mask::None => Window::FULL,
            Mask::Causal => Window::CAUSAL,
            Mask::Window { left, right } => Window::new(left, right, &problem.kernel_shape().sequence()),
        }
    }

    /// Returns the mask of this name. A window is `window:LEFT:RIGHT`, with `none` for no bound.
    fn parse(text: &str) -> Option<Self> {
        let bound = |text: &str| match text {
            "none" => Some(None),
            number => number.parse().ok().map(Some),
        };
        match text {
            "none" => Some(Mask::None),
            "causal" => Some(Mask::Causal),
            window => {
                let (left, right) = window.strip_prefix("window:")?.split_once(':')?;
                Some(Mask::Window { left: bound(left)?, right: bound(right)? })
            }
        }
    }
}

impl fmt::Display for Mask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bound = |bound: Option<u32>| bound.map_or_else(|| "none".to_owned(), |keys| keys.to_string());
        match *self {
            Mask::None => f.pad("none"),
            Mask::Causal => f.pad("causal"),
            Mask::Window { left, right } => f.pad(&format!("window:{}:{}", bound(left), bound(right))),
        }
    }
}

impl FromStr for Mask {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Mask::parse(text).ok_or_else(|| Error::UnknownMask { value: text.to_owned() })
    }
}

/// Number of elements of a tensor of `shape`, capped at `u128::MAX`.
pub(crate) fn volume(shape: [usize; 4]) -> u128 {
    if shape.contains(&0) {
        return 0;
    }
    shape.iter().fold(1, |product: u128, &extent| product.saturating_mul(extent as u128))
}

/// Fails with [`Error::TooLarge`] if `value` is above `limit`.
pub(crate) fn at_most(field: &'static str, value: u128, limit: u128) -> Result<()> {
    if value > limit {
        return Err(Error::TooLarge { field, value, limit });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROBLEM: Problem =
        Problem { batch: 2, heads_q: 6, heads_kv: 2, seqlen_q: 100, seqlen_k: 300, head_dim: 64, dtype: Dtype::Bf16 };

    fn message(problem: Problem) -> String {
        problem.validate().unwrap_err().to_string()
    }

    #[test]
    fn errors_name_field_value_and_rule() {
        assert_eq!(message(Problem { heads_q: 0, ..PROBLEM }), "heads_q is 0; at least 1 is needed");
        assert_eq!(message(Problem { heads_kv: 0, ..PROBLEM }), "heads_kv is 0; at least 1 is needed");
        let error = message(Problem { heads_kv: 4, ..PROBLEM });
        assert_eq!(error, "heads_q is 6; a multiple of heads_kv, which is 4, is needed");
        for head_dim in [0, 4, 7, 12, 129, 257, 264, usize::MAX] {
            let error = message(Problem { head_dim, ..PROBLEM });
            assert_eq!(error, format!("head_dim is {head_dim}; allowed are the multiples of 8 from 8 to 256"));
        }
        let seqlen_k = 1 << 31;
        let error = message(Problem { seqlen_k, ..PROBLEM });
        assert_eq!(error, "seqlen_k is 2147483648; at most 2147483647 is allowed");
    }

    #[test]
    fn head_dims_are_the_multiples_of_8_to_256() {
        let valid = (0..1000).filter(|&head_dim| Problem { head_dim, ..PROBLEM }.validate().is_ok());
        assert!(valid.eq((8..=256).step_by(8)));
    }

    #[test]
    fn every_extent_has_a_limit() {
        for problem in [
            Problem { batch: usize::MAX, ..PROBLEM },
            Problem { heads_q: usize::MAX, heads_kv: 1, ..PROBLEM },
            Problem { heads_q: usize::MAX, heads_kv: usize::MAX, ..PROBLEM },
            Problem { seqlen_q: usize::MAX, ..PROBLEM },
            Problem { seqlen_k: usize::MAX, ..PROBLEM },
            Problem { batch: MAX_EXTENT, heads_q: MAX_EXTENT, heads_kv: 1, ..PROBLEM },
            Problem { batch: MAX_EXTENT, seqlen_k: MAX_EXTENT, seqlen_q: 0, ..PROBLEM },
        ] {
            assert!(matches!(problem.validate(), Err(Error::TooLarge { .. })), "{problem:?}");
        }
    }

    #[test]
    fn nothing_to_do_is_valid() {
        for problem in [
            Problem { batch: 0, ..PROBLEM },
            Problem { seqlen_q: 0, ..PROBLEM },
            Problem { seqlen_k: 0, ..PROBLEM },
            Problem { batch: 0, heads_q: MAX_EXTENT, heads_kv: 1, seqlen_q: MAX_EXTENT, ..PROBLEM },
        ] {
            assert_eq!(problem.validate(), Ok(()), "{problem:?}");
        }
    }

    #[test]
    fn costs_follow_the_convention() {
        assert_eq!(PROBLEM.flops_forward(Mask::None), 4.0 * 2.0 * 6.0 * 100.0 * 300.0 * 64.0);
        assert_eq!(PROBLEM.flops_forward(Mask::Causal), PROBLEM.flops_forward(Mask::None) / 2.0);
        // Each of the last 100 of 300 places has two keys before it and itself.
        let window = Mask::Window { left: Some(2), right: Some(0) };
        assert_eq!(PROBLEM.flops_forward(window), 4.0 * 2.0 * 6.0 * 100.0 * 3.0 * 64.0);
        let (q, k, lse) = (2 * 6 * 100 * 64 * 2, 2 * 2 * 300 * 64 * 2, 2 * 6 * 100 * 4);
        assert_eq!(PROBLEM.bytes_forward(), (2 * q + 2 * k + lse) as f64);
        assert_eq!((PROBLEM.lse_len(), PROBLEM.total_len()), (2 * 6 * 100, 2 * 6 * 300));
    }

    #[test]
    fn masks_are_read_as_they_are_written() {
        let windows = [(None, Some(0)), (Some(3), None), (Some(0), Some(u32::MAX))];
        let windows = windows.map(|(left, right)| Mask::Window { left, right });
        for mask in [Mask::None, Mask::Causal].into_iter().chain(windows) {
            assert_eq!(mask.to_string().parse(), Ok(mask));
        }
        for text in ["Causal", "window", "window:", "window:1", "window:1:", "window:-1:2", "window:1:2:3"] {
            let error = text.parse::<Mask>().unwrap_err().to_string();
            let allowed = "allowed are \"none\", \"causal\" and \"window:LEFT:RIGHT\", with none for no bound";
            assert_eq!(error, format!("mask is {text:?}; {allowed}"));
        }
    }
}
