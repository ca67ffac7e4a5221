//! What kernels do with dropout, as a choice at compile time: [`NoDropout`] leaves nothing of it in the code.

use super::dropout::{Dropout, Drops, NoDropout, Place};
use crate::arch::Warpgroup;

/// A kernel's dropout: a choice at compile time, of which [`NoDropout`] leaves nothing in the code.
pub trait Dropping: Drops {
    /// Which weights of a tile are kept.
    type Keep<W: Warpgroup, const N8: usize>: Copy;

    /// Of the tile at `place`.
    fn keep<W: Warpgroup, const N8: usize>(&self, wg: &W, place: impl FnOnce(&W) -> Place) -> Self::Keep<W, N8>;
    /// Packed weights that are dropped become 0; the others still lack the scale.
    fn drop_operand<W: Warpgroup, const N8: usize>(wg: &W, x: &mut W::Operand<N8>, keep: &Self::Keep<W, N8>);
    /// Marks weights that are dropped by a negative sign, so that no register has to say so beside them.
    fn mark<W: Warpgroup, const N8: usize>(wg: &W, p: &mut W::Acc<N8>, keep: &Self::Keep<W, N8>);
    /// Packs weights, marked ones as 0; the others still lack the scale.
    fn pack_unmarked<W: Warpgroup, const N8: usize>(wg: &W, p: &W::Acc<N8>) -> W::Operand<N8>;
    /// Gradients of marked weights become 0; the others still lack the scale.
    fn drop_marked<W: Warpgroup, const N8: usize>(wg: &W, dp: &mut W::Acc<N8>, p: &W::Acc<N8>);
    /// A weight without its mark.
    fn unmarked(p: f32) -> f32;
    /// Multiplies rows of factors by the scale.
    fn scale_factors<W: Warpgroup>(&self, wg: &W, factors: W::Rows) -> W::Rows;
    /// Multiplies a sum over kept weights by the scale.
    fn scale<W: Warpgroup, const N8: usize>(&self, wg: &W, x: &mut W::Acc<N8>);
    /// scale·dP − delta.
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
