//! 2^x by multiplications and additions alone, so that compilers vectorise loops over it.
//!
//! 2^x = 2^n·2^f with n the integer nearest to x. Adding [`ROUND`], a float so large that its last bit counts ones,
//! rounds x to n and puts n in the lowest bits. A shift then makes n the exponent of a scale.

/// Lower bound to which x is clamped; 2^x is 0 there.
const LEAST: f32 = -126.0;
/// Upper bound to which x is clamped; 2^x is +∞ there.
const GREATEST: f32 = 128.0;
/// Constant that rounds to an integer, 1.5·2²³ + 126. The last bit of a float of this size counts ones, and its lowest
/// eight bits are 126.
const ROUND: f32 = 12_583_038.0;
/// Coefficients of the polynomial (2^f − 1) / f for |f| ≤ 1/2, the highest power first (Cephes, exp2f).
const COEFFICIENTS: [f32; 6] =
    [1.535_336_2e-4, 1.339_887_4e-3, 9.618_437e-3, 5.550_332_7e-2, 2.402_264_7e-1, 6.931_472e-1];

/// Returns 2^x with a relative error of 2·10⁻⁷. It is exact for whole x, 0 up to −125.5, and NaN for NaN.
#[inline(always)]
pub fn exp2(x: f32) -> f32 {
    // A NaN passes both comparisons.
    let x = if x < LEAST { LEAST } else { x };
    let x = if x > GREATEST { GREATEST } else { x };
    let rounded = x + ROUND;
    let f = x - (rounded - ROUND);
    let [first, rest @ ..] = COEFFICIENTS;
    let mut power = first;
    for coefficient in rest {
        power = power * f + coefficient;
    }
    let power = power * f + 1.0;
    // The scale is 2^(n − 1) because 2^128 is not an f32.
    (power + power) * f32::from_bits(rounded.to_bits() << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error() {
        let mut worst = 0.0f64;
        for step in (-125_499_000..=127_999_000).step_by(29) {
            let x = step as f32 / 1e6;
            worst = worst.max((exp2(x) as f64 / (x as f64).exp2() - 1.0).abs());
        }
        assert!(worst < 2e-7, "{worst}");
    }

    #[test]
    fn exact_where_it_must_be() {
        for n in -125..=127 {
            assert_eq!(exp2(n as f32), (n as f32).exp2());
        }
        for x in [-126.0, -127.5, -1e10, f32::MIN, f32::NEG_INFINITY] {
            assert_eq!(exp2(x), 0.0, "{x}");
        }
        for x in [128.0, 1e10, f32::INFINITY] {
            assert_eq!(exp2(x), f32::INFINITY, "{x}");
        }
        assert!(exp2(f32::NAN).is_nan());
    }
}
