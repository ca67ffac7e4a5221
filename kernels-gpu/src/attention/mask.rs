//! Masks. A mask gives each query row one interval of the keys that it attends to.
//!
//! The blocks to visit ([`super::blocks`]) and the masking of a single score both follow from that interval, so they
//! cannot disagree. Keys past the end are masked by the same interval.

#[cfg(not(target_arch = "nvptx64"))]
use core::mem::offset_of;

use crate::arch::constant::Constant;
#[cfg(not(target_arch = "nvptx64"))]
use crate::ground::constants::ConstantPlace;
use crate::ground::constants::Constants;
use crate::ground::sequence::Sequence;

/// Consecutive keys, or query rows, from `start` up to but not `end`. There are none if `end` is at most `start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval {
    pub start: u32,
    pub end: u32,
}

impl Interval {
    /// Returns the number of elements.
    #[inline(always)]
    pub fn len(&self) -> u32 {
        self.end.saturating_sub(self.start)
    }
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.end <= self.start
    }
    #[cfg(test)]
    pub fn contains(&self, index: u32) -> bool {
        (self.start..self.end).contains(&index)
    }
}

/// Rule that says which keys a query attends to. It is a value in the launch parameters.
///
/// A wrong rule gives wrong results, but never an access outside the tensors. An exact backward pass may wait for ever
/// if the two directions of the rule disagree.
pub trait Mask: Copy {
    /// Number of pairs of Q and K that scores come from. Each pair has an interval of its own; see
    /// [`ByDistance`](super::by_distance::ByDistance).
    const PAIRS: u32 = 1;

    /// Places of its specialisation constants, from its own start. A mask without any has one form of each kernel.
    #[cfg(not(target_arch = "nvptx64"))]
    const CONSTANTS: &'static [ConstantPlace] = &[];

    /// True if start and end of an interval move by one from row to row, unless they are 0 or beyond all keys, or all
    /// queries. Then masking finds the interval of one row from that of another.
    const IS_BAND: bool = false;

    /// True if a query may not attend to the first keys.
    fn bounds_left(&self) -> bool;
    /// Returns [`Mask::bounds_left`], read once for each `row`: a loop over rows keeps no register for it.
    fn bounds_left_for(&self, _row: u32) -> bool {
        self.bounds_left()
    }
    /// True if a query may not attend to the last keys.
    fn bounds_right(&self) -> bool;

    /// True if a query may attend to keys behind its place.
    fn sees_behind(&self) -> bool {
        true
    }

    /// True if there may be keys that no query attends to, although there are queries.
    fn leaves_keys_out(&self) -> bool {
        true
    }

    /// Returns the keys that query row `i` attends to through a pair, all below seqlen_k. Neither the start nor the end
    /// is less than that of row `i − 1`. Without a left bound the start is 0 in the last pair.
    fn keys(&self, of: &Sequence, pair: u32, i: u32) -> Interval;
    /// Returns the query rows that attend to key `j` through a pair, by the same rule. The end may be beyond seqlen_q,
    /// and without a left bound it is `u32::MAX` in the last pair.
    fn queries(&self, of: &Sequence, pair: u32, j: u32) -> Interval;
}

/// Window around a query's place: it attends to the keys from `left` before to `right` behind i + seqlen_k − seqlen_q,
/// both included. Without a bound it attends to all keys on that side. No mask and the causal mask are such windows.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Number of keys before a query's place; read if there is a left bound.
    left: i32,
    /// Number of keys behind a query's place; read if there is a right bound.
    right: i32,
    pub has_left: Constant<{ Constants::LEFT }>,
    pub has_right: Constant<{ Constants::RIGHT }>,
}

impl Window {
    /// No mask: every query attends to every key.
    pub const FULL: Window = Window::of(None, None);
    /// Causal mask, aligned to the bottom right: query `i` attends to key `j` if j ≤ i + seqlen_k − seqlen_q.
    pub const CAUSAL: Window = Window::of(None, Some(0));

    /// Makes a window from its bounds; `None` is no bound. See [`Window::new`] for the largest.
    const fn of(left: Option<u32>, right: Option<u32>) -> Self {
        const fn bound(bound: Option<u32>) -> (i32, bool) {
            match bound {
                Some(keys) => (keys as i32, true),
                None => (0, false),
            }
        }
        let ((left, has_left), (right, has_right)) = (bound(left), bound(right));
        Window { left, right, has_left: Constant::new(has_left), has_right: Constant::new(has_right) }
    }

    /// Makes a window from its bounds, for sequences of up to `longest` queries and keys; `None` is no bound. Bounds
    /// that no key lies beyond are none. So the sums in [`Mask::keys`] can't overflow for up to 2³⁰ queries and keys.
    pub fn new(left: Option<u32>, right: Option<u32>, longest: &Sequence) -> Self {
        // The first key is seqlen_k − 1 before the last place, the last one seqlen_q − 1 behind the first place.
        let left = left.filter(|&left| left < longest.seqlen_k);
        let right = right.filter(|&right| right < longest.seqlen_q);
        Window::of(left, right)
    }
}

impl Mask for Window {
    const IS_BAND: bool = true;
    #[cfg(not(target_arch = "nvptx64"))]
    const CONSTANTS: &'static [ConstantPlace] = &[
        ConstantPlace { bit: Constants::LEFT, offset: offset_of!(Window, has_left) as u32 },
        ConstantPlace { bit: Constants::RIGHT, offset: offset_of!(Window, has_right) as u32 },
    ];

    #[inline(always)]
    fn bounds_left(&self) -> bool {
        self.has_left.get()
    }
    #[inline(always)]
    fn bounds_left_for(&self, row: u32) -> bool {
        self.has_left.get_for(row)
    }
    #[inline(always)]
    fn bounds_right(&self) -> bool {
        self.has_right.get()
    }
    #[inline(always)]
    fn sees_behind(&self) -> bool {
        !self.has_right.get() || self.right > 0
    }
    #[inline(always)]
    fn leaves_keys_out(&self) -> bool {
        self.has_left.get()
    }
    #[inline(always)]
    fn keys(&self, of: &Sequence, _: u32, i: u32) -> Interval {
        let (has_left, has_right) = (self.bounds_left(), self.bounds_right());
        let place = of.place(i);
        let within = |key: i32| key.max(0).min(of.seqlen_k as i32) as u32;
        let start = within(place.wrapping_sub(self.left));
        let end = within(place.wrapping_add(1).wrapping_add(self.right));
        Interval { start: if has_left { start } else { 0 }, end: if has_right { end } else { of.seqlen_k } }
    }
    #[inline(always)]
    fn queries(&self, of: &Sequence, _: u32, j: u32) -> Interval {
        let (has_left, has_right) = (self.bounds_left(), self.bounds_right());
        let row = of.row(j);
        let start = row.wrapping_sub(self.right).max(0) as u32;
        // The sum saturates: then ptxas needs a register less in the backward kernels (measured, cause unknown).
        let end = row.wrapping_add(1).saturating_add(self.left).max(0) as u32;
        Interval { start: if has_right { start } else { 0 }, end: if has_left { end } else { u32::MAX } }
    }
}

#[cfg(test)]
pub mod tests {
    use std::vec::Vec;

    use super::*;

    /// Windows of all kinds for sequences of up to 40.
    pub fn windows() -> Vec<Window> {
        let bounds = [None, Some(0), Some(1), Some(5), Some(13), Some(60)];
        bounds.into_iter().flat_map(|left| bounds.map(|right| Window::of(left, right))).collect()
    }

    #[test]
    fn intervals_and_rule_agree() {
        let bounds = [None, Some(0), Some(1), Some(5), Some(13), Some(i32::MAX as u32), Some(u32::MAX)];
        for (left, right) in bounds.into_iter().flat_map(|left| bounds.map(|right| (left, right))) {
            for (seqlen_q, seqlen_k) in [(1, 1), (5, 9), (9, 5), (16, 16), (3, 0)] {
                let of = Sequence { seqlen_q, seqlen_k };
                let window = Window::new(left, right, &of);
                for (i, j) in (0..seqlen_q).flat_map(|i| (0..seqlen_k).map(move |j| (i, j))) {
                    let behind = i64::from(j) - (i64::from(i) + i64::from(seqlen_k) - i64::from(seqlen_q));
                    let live = left.is_none_or(|left| -behind <= i64::from(left))
                        && right.is_none_or(|right| behind <= i64::from(right));
                    assert_eq!(live, window.keys(&of, 0, i).contains(j), "{window:?} {of:?} at {i}, {j}");
                    assert_eq!(live, window.queries(&of, 0, j).contains(i), "{window:?} {of:?} at {i}, {j}");
                }
            }
        }
    }
}
