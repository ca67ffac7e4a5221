//! tanh, which softcap needs: a polynomial for small arguments, and two operations of the SFU for any.
//!
//! The hardware's own tanh (PTX ISA, tanh.approx) has a relative error of 2⁻¹¹. A score of 16 would be wrong by 0.008,
//! and P by more than the rounding of f16.

use core::f32::consts::LOG2_E;

/// tanh(x/2) for |x| < 2 as x·p(x²).
pub struct Polynomial;

impl Polynomial {
    /// Factor from arguments of tanh to arguments of the polynomial.
    pub const SCALE: f32 = 2.0;
    /// Bit of a float which says that its magnitude is 2 or more.
    pub const OUTSIDE: u32 = 1 << 30;
    /// Coefficients of the polynomial of least relative error, lowest power first.
    const COEFFICIENTS: [f32; 6] =
        [0.499_999_7, -0.041_661_303, 0.004_150_448, -0.000_403_169_34, 0.000_032_701_395, -0.000_001_497_588_1];

    /// Returns tanh(x/2) for |x| below 2, with a relative error of 8·10⁻⁷.
    #[inline(always)]
    pub fn at(x: f32, fma: impl Fn(f32, f32, f32) -> f32) -> f32 {
        let square = x * x;
        let [c0, c1, c2, c3, c4, c5] = Self::COEFFICIENTS;
        x * fma(fma(fma(fma(fma(c5, square, c4), square, c3), square, c2), square, c1), square, c0)
    }
}

/// Returns tanh(x/2) for any x, with an absolute error of 5·10⁻⁷.
#[inline(always)]
pub fn exact(x: f32, exp2: impl Fn(f32) -> f32, recip: impl Fn(f32) -> f32) -> f32 {
    // tanh(x/2) = (1 − e)/(1 + e) with e = exp(−x), for x ≥ 0.
    let e = exp2(x.abs() * -LOG2_E);
    ((1.0 - e) * recip(1.0 + e)).copysign(x)
}

#[cfg(all(test, feature = "cpu"))]
mod tests {
    use super::*;
    use crate::arch::Warpgroup;
    use crate::arch::cpu::CpuWarpgroup;

    type Wg = CpuWarpgroup<()>;

    #[test]
    fn errors() {
        let (mut relative, mut absolute) = (0.0f64, 0.0f64);
        for step in -19_999..=19_999 {
            let x = step as f32 / 1e4;
            let expected = (f64::from(x) / 2.0).tanh();
            let found = f64::from(Polynomial::at(x, Wg::fma));
            let error = (found - expected).abs();
            relative = relative.max(if x == 0.0 { error } else { error / expected.abs() });
            absolute = absolute.max((f64::from(exact(x, Wg::exp2, Wg::recip)) - expected).abs());
        }
        assert!(relative < 8e-7, "{relative}");
        for step in -3000..=3000 {
            let x = step as f32 / 100.0;
            let expected = (f64::from(x) / 2.0).tanh();
            absolute = absolute.max((f64::from(exact(x, Wg::exp2, Wg::recip)) - expected).abs());
        }
        assert!(absolute < 5e-7, "{absolute}");
    }

    #[test]
    fn infinities_and_nan() {
        assert_eq!(exact(f32::INFINITY, Wg::exp2, Wg::recip), 1.0);
        assert_eq!(exact(f32::NEG_INFINITY, Wg::exp2, Wg::recip), -1.0);
        assert!(exact(f32::NAN, Wg::exp2, Wg::recip).is_nan());
        for x in [f32::INFINITY, f32::NAN, 2.0, -2.0, f32::MAX] {
            assert!(x.to_bits() & Polynomial::OUTSIDE != 0, "{x}");
        }
        assert!(2.0f32.next_down().to_bits() & Polynomial::OUTSIDE == 0);
    }
}
