//! 2^x by multiplications and additions: for a few weights where the special-function unit, which computes the others,
//! is what a step waits for.
//!
//! 2^x = 2^n·2^f with n the integer nearest to x. A float so large that its last bit counts ones rounds x to n, and has
//! n in its lowest bits, from where a shift makes it the exponent of a scale.

use crate::arch::Warpgroup;

/// Exponents below it give 0: the scale 2^n, whose bits are n + 127 in the place of the exponent, is 0 there.
const LEAST: f32 = -127.0;
/// 1.5·2²³ + 127: the last bit of a float of this size counts ones, and its lowest eight bits are 127.
const ROUND: f32 = 12_583_039.0;
/// 2^f for |f| ≤ 1/2, the lowest power first: the polynomial of least relative error among those that are exact at 0.
const COEFFICIENTS: [f32; 5] = [1.0, 0.693_124_2, 0.240_240_99, 0.055_906_39, 0.009_582_836];

/// 2^x for x below 128, with a relative error of 3·10⁻⁶; exact for whole x, 0 below −126.5, NaN for NaN.
#[inline(always)]
pub fn exp2_polynomial<W: Warpgroup>(x: f32) -> f32 {
    let x = W::larger(x, LEAST);
    let rounded = x + ROUND;
    let f = x - (rounded - ROUND);
    let [c0, c1, c2, c3, c4] = COEFFICIENTS;
    let power = W::fma(W::fma(W::fma(W::fma(c4, f, c3), f, c2), f, c1), f, c0);
    power * f32::from_bits(rounded.to_bits() << 23)
}

#[cfg(all(test, feature = "cpu"))]
mod tests {
    use super::*;
    use crate::arch::cpu::CpuWarpgroup;

    fn exp2(x: f32) -> f32 {
        exp2_polynomial::<CpuWarpgroup<()>>(x)
    }

    #[test]
    fn error() {
        let mut worst = 0.0f64;
        for step in (-126_499_000..=0).step_by(29) {
            let x = step as f32 / 1e6;
            worst = worst.max((exp2(x) as f64 / (x as f64).exp2() - 1.0).abs());
        }
        assert!(worst < 3e-6, "{worst}");
    }

    #[test]
    fn exact_where_it_must_be() {
        for n in -126..=127 {
            assert_eq!(exp2(n as f32), (n as f32).exp2());
        }
        for x in [-126.51, -127.0, -127.5, -1e10, f32::MIN, f32::NEG_INFINITY] {
            assert_eq!(exp2(x), 0.0, "{x}");
        }
        assert!(exp2(f32::NAN).is_nan());
    }
}
