//! Operations of dropout in kernels, as a choice at compile time. [`NoDropout`] leaves none of them in the code.

use super::dropout::{Dropout, Drops, NoDropout, Place};
use crate::arch::Warpgroup;

/// Dropout of a kernel, chosen at compile time. [`NoDropout`] leaves nothing of it in the code. The elements are those
/// of P, and the scale is 1 / (1 − dropout probability).
pub trait Dropping: Drops {
    /// Record of which elements of a tile are kept.
    type Keep<W: Warpgroup, const N8: usize>: Copy;

    /// Makes the record of the tile at `place`.
    fn keep<W: Warpgroup, const N8: usize>(&self, wg: &W, place: impl FnOnce(&W) -> Place) -> Self::Keep<W, N8>;
    /// Zeroes dropped elements of a packed P. The others still lack the scale.
    fn drop_operand<W: Warpgroup, const N8: usize>(wg: &W, x: &mut W::Operand<N8>, keep: &Self::Keep<W, N8>);
    /// Marks dropped elements by their sign bit, so that no further register has to say which they are.
    fn mark<W: Warpgroup, const N8: usize>(wg: &W, p: &mut W::Acc<N8>, keep: &Self::Keep<W, N8>);
    /// Packs P, with 0 for marked elements. The others still lack the scale.
    fn pack_unmarked<W: Warpgroup, const N8: usize>(wg: &W, p: &W::Acc<N8>) -> W::Operand<N8>;
    /// Zeroes dP of dropped elements. The others still lack the scale.
    fn drop_scores<W: Warpgroup, const N8: usize>(wg: &W, dp: &mut W::Acc<N8>, keep: &Self::Keep<W, N8>);
    /// Zeroes dP of marked elements. The others still lack the scale.
    fn drop_marked<W: Warpgroup, const N8: usize>(wg: &W, dp: &mut W::Acc<N8>, p: &W::Acc<N8>);
    /// Returns an element without its mark.
    fn unmarked(p: f32) -> f32;
    /// Multiplies one factor per row by the scale.
    fn scale_factors<W: Warpgroup>(&self, wg: &W, factors: W::Rows) -> W::Rows;
    /// Multiplies a sum over kept elements by the scale.
    fn scale<W: Warpgroup, const N8: usize>(&self, wg: &W, x: &mut W::Acc<N8>);
    /// Returns scale·dP − δ.
    fn less_delta<W: Warpgroup>(&self, dp: f32, delta: f32) -> f32;
}

impl Dropping for NoDropout {
    type Keep<W: Warpgroup, const N8: usize> = ();

    #[inline(always)]
    fn keep<W: Warpgroup, const N8: usize>(&self, _: &W, _: impl FnOnce(&W) -> Place) {}
    #[inline(always)]
    fn drop_operand<W: Warpgroup, const N8: usize>(_: &W, _: &mut W::Operand<N8>, _: &()) {}
    #[inline(always)]
    fn mark<W: Warpgroup, const N8: usize>(_: &W, _: &mut W::Acc<N8>, _: &()) {}
    #[inline(always)]
    fn pack_unmarked<W: Warpgroup, const N8: usize>(wg: &W, p: &W::Acc<N8>) -> W::Operand<N8> {
        wg.pack(p)
    }
    #[inline(always)]
    fn drop_scores<W: Warpgroup, const N8: usize>(_: &W, _: &mut W::Acc<N8>, _: &()) {}
    #[inline(always)]
    fn drop_marked<W: Warpgroup, const N8: usize>(_: &W, _: &mut W::Acc<N8>, _: &W::Acc<N8>) {}
    #[inline(always)]
    fn unmarked(p: f32) -> f32 {
        p
    }
    #[inline(always)]
    fn scale_factors<W: Warpgroup>(&self, _: &W, factors: W::Rows) -> W::Rows {
        factors
    }
    #[inline(always)]
    fn scale<W: Warpgroup, const N8: usize>(&self, _: &W, _: &mut W::Acc<N8>) {}
    #[inline(always)]
    fn less_delta<W: Warpgroup>(&self, dp: f32, delta: f32) -> f32 {
        dp - delta
    }
}

impl Dropping for Dropout {
    type Keep<W: Warpgroup, const N8: usize> = W::Keep<N8>;

    #[inline(always)]
    fn keep<W: Warpgroup, const N8: usize>(&self, wg: &W, place: impl FnOnce(&W) -> Place) -> W::Keep<N8> {
        wg.keep::<N8>(self, &place(wg))
    }
    #[inline(always)]
    fn drop_operand<W: Warpgroup, const N8: usize>(wg: &W, x: &mut W::Operand<N8>, keep: &W::Keep<N8>) {
        wg.drop_operand::<N8>(x, keep);
    }
    #[inline(always)]
    fn mark<W: Warpgroup, const N8: usize>(wg: &W, p: &mut W::Acc<N8>, keep: &W::Keep<N8>) {
        wg.mark::<N8>(p, keep);
    }
    #[inline(always)]
    fn pack_unmarked<W: Warpgroup, const N8: usize>(wg: &W, p: &W::Acc<N8>) -> W::Operand<N8> {
        wg.pack_unmarked(p)
    }
    #[inline(always)]
    fn drop_scores<W: Warpgroup, const N8: usize>(wg: &W, dp: &mut W::Acc<N8>, keep: &W::Keep<N8>) {
        wg.drop(dp, keep);
    }
    #[inline(always)]
    fn drop_marked<W: Warpgroup, const N8: usize>(wg: &W, dp: &mut W::Acc<N8>, p: &W::Acc<N8>) {
        wg.drop_marked(dp, p);
    }
    #[inline(always)]
    fn unmarked(p: f32) -> f32 {
        p.abs()
    }
    #[inline(always)]
    fn scale_factors<W: Warpgroup>(&self, wg: &W, factors: W::Rows) -> W::Rows {
        wg.zip(factors, wg.rows(self.scale), |factor, scale| factor * scale)
    }
    #[inline(always)]
    fn scale<W: Warpgroup, const N8: usize>(&self, wg: &W, x: &mut W::Acc<N8>) {
        wg.map_rows(x, wg.rows(self.scale), |x, scale| x * scale);
    }
    #[inline(always)]
    fn less_delta<W: Warpgroup>(&self, dp: f32, delta: f32) -> f32 {
        W::fma(dp, self.scale, -delta)
    }
}
