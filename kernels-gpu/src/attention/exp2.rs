//! 2^x by multiply-add units, to take some exponentials off a special-function unit that is the limit.
//!
//! x = n + f, with n the nearest integer: 2^n is bits of an exponent, 2^f a polynomial (as in FlashAttention-4 and in Cody
//! and Waite, *Software Manual for the Elementary Functions*, 1980, chapter 6). Eleven instructions instead of one.

use crate::arch::Warpgroup;

/// 1.5·2²³ + 127. Beside it f32 has integers alone, so a sum with it is rounded to one, whose lowest bits are n + 127, the
/// exponent's field of 2^n.
const ROUND: f32 = 12_583_039.0;

/// From here on down the field of 2^n is 0, and so is the result.
const ZERO: f32 = -127.0;

/// 2^f for |f| ≤ 1/2: the smallest largest relative error that degree 5 allows with 1 for f = 0, 1.15·10⁻⁷. Highest degree
/// first.
const COEFFICIENTS: [f32; 6] = [0.001_331_38, 0.009_672_881, 0.055_505_7, 0.240_222_16, 0.693_147_06, 1.0];

/// 2^x for x up to 127: relative error 2·10⁻⁷, of the polynomial and of rounding, exact for whole x. Below −126 the result
/// is at most 2⁻¹²⁶, from −127 down, and so for a masked score, exactly 0; NaN stays NaN.
#[inline(always)]
pub fn exp2<W: Warpgroup>(x: f32) -> f32 {
    let x = W::max(x, ZERO);
    let rounded = x + ROUND;
    let f = x - (rounded - ROUND);
    let [first, rest @ ..] = COEFFICIENTS;
    let mut p = first;
    for coefficient in rest {
        p = W::fma(p, f, coefficient);
    }
    p * f32::from_bits(rounded.to_bits() << 23)
}

#[cfg(test)]
mod tests {
    use crate::cpu::CpuWarpgroup;
    use half::f16;

    fn exp2(x: f32) -> f32 {
        super::exp2::<CpuWarpgroup<f16, ()>>(x)
    }

    #[test]
    fn is_within_its_error() {
        let mut worst = 0.0f64;
        for i in -126 * 8192..=127 * 8192 {
            let x = i as f32 / 8192.0;
            worst = worst.max((f64::from(exp2(x)) / f64::from(x).exp2() - 1.0).abs());
        }
        assert!(worst < 2e-7, "{worst}");
    }

    #[test]
    fn whole_powers_are_exact() {
        for n in -126..=127 {
            assert_eq!(exp2(n as f32), (n as f32).exp2());
        }
    }

    #[test]
    fn what_is_too_small_is_zero() {
        for x in [-127.0, -127.25, -150.0, f32::MIN, f32::NEG_INFINITY] {
            assert_eq!(exp2(x).to_bits(), 0, "{x}");
        }
        for i in 0..8192 {
            let y = exp2(-126.0 - i as f32 / 8192.0);
            assert!((0.0..=f32::MIN_POSITIVE).contains(&y), "{i}: {y}");
        }
    }

    #[test]
    fn nan_stays() {
        assert!(exp2(f32::NAN).is_nan() && exp2(-f32::NAN).is_nan());
    }
}
