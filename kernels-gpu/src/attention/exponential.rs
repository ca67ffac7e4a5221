//! 2^x by multiplications and additions, without the SFU. Kernels compute a few elements of P in this way if a step
//! waits for the SFU, which computes the others (notebook 116).
//!
//! 2^x = 2^n·2^f with n the integer nearest to x. Adding a float so large that its last bit counts ones rounds x to n.
//! The sum has n in its lowest bits, and a shift makes n the exponent of the scale 2^n.

use crate::arch::Warpgroup;

/// Smallest exponent; those below it give 0. The scale 2^n is 0 there, because its exponent field is n + 127 = 0.
const LEAST: f32 = -127.0;
/// 1.5·2²³ + 127. The last bit of a float of this size counts ones, and its lowest eight bits are 127.
const ROUND: f32 = 12_583_039.0;
/// Coefficients of 2^f for |f| ≤ 1/2, lowest power first: the polynomial of least relative error among those that are
/// exact at 0.
const COEFFICIENTS: [f32; 5] = [1.0, 0.693_124_2, 0.240_240_99, 0.055_906_39, 0.009_582_836];

/// Returns 2^x for x below 128 with a relative error of 3·10⁻⁶. It is exact for whole x, 0 below −126.5, and NaN for
/// NaN.
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
