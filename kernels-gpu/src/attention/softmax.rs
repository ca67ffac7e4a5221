//! Online softmax (FlashAttention-2, arXiv 2307.08691, algorithm 1): a running maximum m and sum l for each row.
//!
//! Scores stay unscaled. The exponent is one fused multiply-add, p = 2^(x·c − `max_scaled`), with c = scale·log₂e and
//! `max_scaled` = m·c. A row without a valid key so far has m = −∞. Its `max_scaled` is 0, so that masked scores give 0
//! and not NaN.

use core::f32::consts::{LN_2, LOG2_E};

use crate::arch::{MaxUnit, Warpgroup};

/// Running maximum and sum of 64 rows.
pub struct Softmax<W: Warpgroup> {
    /// Largest unscaled score so far.
    m: W::Rows,
    /// Σ 2^((x − m)·c) over this thread's elements alone.
    l: W::Rows,
    /// scale·log₂e.
    c: f32,
}

/// Result of an update of m, for each row.
pub struct Rescale<W: Warpgroup> {
    /// `max_scaled` = m·c, which exponents subtract.
    pub max_scaled: W::Rows,
    /// Rescale factor α for earlier P.
    pub factor: W::Rows,
}

impl<W: Warpgroup> Clone for Rescale<W> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}
impl<W: Warpgroup> Copy for Rescale<W> {}

/// Returns `max_scaled` = m·c, or 0 for a row without a valid key.
#[inline(always)]
fn max_scaled(m: f32, c: f32) -> f32 {
    if m == f32::NEG_INFINITY { 0.0 } else { m * c }
}

impl<W: Warpgroup> Softmax<W> {
    #[inline(always)]
    pub fn new(wg: &W, scale: f32) -> Self {
        Softmax { m: wg.rows(f32::NEG_INFINITY), l: wg.rows(0.0), c: scale * LOG2_E }
    }

    /// Turns the scores S of one block into P in place. Returns the rescale factor α, which brings earlier P, and so O
    /// and l, to the new maximum. `unit` takes the maximum ([`Warpgroup::maxima`]).
    #[inline(always)]
    pub fn step<const N8: usize>(&mut self, wg: &W, s: &mut W::Acc<N8>, unit: MaxUnit) -> W::Rows {
        let rescale = self.raise(wg, s, unit);
        self.exponents(wg, s, rescale);
        rescale.factor
    }

    /// First half of [`Softmax::step`]: updates m.
    #[inline(always)]
    pub fn raise<const N8: usize>(&mut self, wg: &W, s: &W::Acc<N8>, unit: MaxUnit) -> Rescale<W> {
        let c = self.c;
        let m = wg.maxima(s, self.m, unit);
        let max_scaled = wg.zip(m, m, |m, _| max_scaled(m, c));
        // Uses `max_scaled` as rounded on both sides, so that α is exactly 1 while the maximum stays.
        let factor = wg.zip(self.m, max_scaled, |old, max_scaled| W::exp2(old * c - max_scaled));
        self.m = m;
        Rescale { max_scaled, factor }
    }

    /// Second half of [`Softmax::step`]: turns S into P, and updates l.
    #[inline(always)]
    pub fn exponents<const N8: usize>(
        &mut self,
        wg: &W,
        s: &mut W::Acc<N8>,
        Rescale { max_scaled, factor }: Rescale<W>,
    ) {
        let c = self.c;
        wg.map_rows(s, max_scaled, |x, max_scaled| W::exp2(W::fma(x, c, -max_scaled)));
        // Sums the block first, then adds it to l: the l of a long row is too large to take small terms one by one.
        let block = wg.fold(s, |a, p| a + p);
        let l = wg.zip(self.l, factor, |l, a| l * a);
        self.l = wg.zip(l, block, |l, b| l + b);
    }

    /// Does the work of [`Softmax::exponents`] for one half of the columns. The left half, 0, must come first, and the
    /// right one, 1, in a second call.
    #[inline(always)]
    pub fn half_the_exponents<const N8: usize>(
        &mut self,
        wg: &W,
        s: &mut W::Acc<N8>,
        Rescale { max_scaled, factor }: Rescale<W>,
        half: usize,
    ) {
        let c = self.c;
        wg.map_half(s, half, max_scaled, |x, max_scaled| W::exp2(W::fma(x, c, -max_scaled)));
        let part = wg.fold_half(s, half, |a, p| a + p);
        if half == 0 {
            self.l = wg.zip(self.l, factor, |l, a| l * a);
        }
        self.l = wg.zip(self.l, part, |l, b| l + b);
    }

    /// Returns 1/l, which normalises O, and the LSE (natural log). A row without a valid key gives 0 and −∞.
    #[inline(always)]
    pub fn finish(self, wg: &W) -> (W::Rows, W::Rows) {
        let (l, c) = (wg.reduce(self.l, |a, b| a + b), self.c);
        // Computes 1/l for every row and then selects. A branch would keep ptxas from interleaving the other
        // instructions at the end of a work tile (notebook 29).
        let normaliser = wg.zip(l, wg.zip(l, l, |l, _| W::recip(l)), |l, r| if l == 0.0 { 0.0 } else { r });
        let lse = wg.zip(self.m, l, |m, l| (max_scaled(m, c) + W::log2(l)) * LN_2);
        let lse = wg.zip(l, lse, |l, lse| if l == 0.0 { f32::NEG_INFINITY } else { lse });
        (normaliser, lse)
    }
}
