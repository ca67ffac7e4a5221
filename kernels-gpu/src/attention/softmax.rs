//! Online softmax (FlashAttention-2, arXiv 2307.08691, algorithm 1): a running maximum m and sum l for each row.
//!
//! Scores stay in their unit, which is scale without softcap. The exponent is one fused multiply-add, p = 2^(x·c −
//! `max_scaled`), with c = unit·log₂e and `max_scaled` = m·c. A row without a valid key so far has m = −∞. Its
//! `max_scaled` is 0, so that masked scores give 0 and not NaN.

use core::f32::consts::{LN_2, LOG2_E};

use crate::arch::{MaxUnit, Warpgroup};

/// Running maximum and sum of 64 rows.
pub struct Softmax<W: Warpgroup> {
    /// Largest score so far.
    m: W::Rows,
    /// Σ 2^((x − m)·c) over this thread's elements alone.
    l: W::Rows,
    /// unit·log₂e.
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
    pub fn new(wg: &W, unit: f32) -> Self {
        Softmax { m: wg.rows(f32::NEG_INFINITY), l: wg.rows(0.0), c: unit * LOG2_E }
    }

    /// Turns the scores S of one block into P in place. Returns the rescale factor α, which brings earlier P, and so O
    /// and l, to the new maximum. `missing` are values that must be added to the scores of each row, if there are any;
    /// `unit` takes the maximum ([`Warpgroup::maxima`]).
    #[inline(always)]
    pub fn step<const N8: usize>(
        &mut self,
        wg: &W,
        s: &mut W::Acc<N8>,
        missing: Option<W::Rows>,
        unit: MaxUnit,
    ) -> W::Rows {
        let rescale = self.raise(wg, s, missing, unit);
        self.exponents(wg, s, rescale);
        rescale.factor
    }

    /// First half of [`Softmax::step`]: updates m.
    #[inline(always)]
    pub fn raise<const N8: usize>(
        &mut self,
        wg: &W,
        s: &W::Acc<N8>,
        missing: Option<W::Rows>,
        unit: MaxUnit,
    ) -> Rescale<W> {
        let c = self.c;
        let m = match missing {
            None => wg.maxima(s, self.m, unit),
            Some(missing) => {
                // The missing values may differ between the threads of a row.
                let block = wg.zip(wg.fold(s, f32::max), missing, |x, missing| x + missing);
                wg.zip(self.m, wg.reduce(block, f32::max), f32::max)
            }
        };
        let max_scaled = wg.zip(m, m, |m, _| max_scaled(m, c));
        // Uses `max_scaled` as rounded on both sides, so that α is exactly 1 while the maximum stays.
        let factor = wg.zip(self.m, max_scaled, |old, max_scaled| W::exp2(old * c - max_scaled));
        self.m = m;
        let max_scaled = match missing {
            None => max_scaled,
            Some(missing) => wg.zip(max_scaled, missing, |max_scaled, missing| W::fma(-missing, c, max_scaled)),
        };
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

    /// Returns what [`Softmax::finish`] does, with a sink in each row: a score that has no value. A row without a valid
    /// key gives 0 and the sink.
    #[inline(always)]
    pub fn finish_with_sink(self, wg: &W, sink: f32) -> (W::Rows, W::Rows) {
        let (l, c, sink_scaled) = (wg.reduce(self.l, |a, b| a + b), self.c, sink * LOG2_E);
        // Exponents are those of m or of the sink, whichever is larger, so that no power overflows.
        let top = wg.zip(self.m, l, |m, _| max_scaled(m, c).max(sink_scaled));
        let of_keys = wg.zip(self.m, top, |m, top| W::exp2(max_scaled(m, c) - top));
        let sum = wg.zip(wg.zip(l, of_keys, |l, a| l * a), top, |l, top| l + W::exp2(sink_scaled - top));
        let normaliser = wg.zip(of_keys, sum, |a, sum| a * W::recip(sum));
        let lse = wg.zip(top, sum, |top, sum| (top + W::log2(sum)) * LN_2);
        let select = |x: W::Rows, without: f32| wg.zip(l, x, |l, x| if l == 0.0 { without } else { x });
        (select(normaliser, 0.0), select(lse, sink))
    }
}
