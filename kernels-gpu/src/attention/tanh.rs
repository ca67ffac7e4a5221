//! tanh, which softcap needs: a polynomial for small arguments, and two operations of the SFU for any.
//!
//! The hardware's own tanh (PTX ISA, tanh.approx) has a relative error of 2⁻¹¹. A score of 16 would be wrong by 0.008,
//! and P by more than the rounding of f16.

use core::f32::consts::LOG2_E;

/// tanh(x/4) for |x| < 2 as x·p(x²).
pub struct Polynomial;

impl Polynomial {
    /// Factor from arguments of tanh to arguments of the polynomial.
    pub const SCALE: f32 = 4.0;
    /// Bit of a float which says that its magnitude is 2 or more.
    pub const OUTSIDE: u32 = 1 << 30;
    /// Coefficients of the polynomial of least relative error, lowest power first.
    const COEFFICIENTS: [f32; 5] = [0.25, -0.005_208_292, 0.000_130_124_8, -3.234_013_3e-6, 6.536_486_6e-8];

    /// Replaces each x, with a magnitude below 2, by tanh(x/4). The relative error is 1.5·10⁻⁷.
    ///
    /// A step of all elements comes before the next step of any, so that none waits for its own last result.
    #[inline(always)]
    pub fn map<const N: usize>(x: &mut [f32; N], fma: impl Fn(f32, f32, f32) -> f32) {
        let [c0, c1, c2, c3, c4] = Self::COEFFICIENTS;
        let square: [f32; N] = core::array::from_fn(|i| x[i] * x[i]);
        let mut sum = [c4; N];
        for c in [c3, c2, c1, c0] {
            for (sum, square) in sum.iter_mut().zip(&square) {
                *sum = fma(*sum, *square, c);
            }
        }
        for (x, sum) in x.iter_mut().zip(&sum) {
            *x *= sum;
        }
    }
}

/// Returns tanh(x/4) for any x, with an absolute error of 5·10⁻⁷.
#[inline(always)]
pub fn exact(x: f32, exp2: impl Fn(f32) -> f32, recip: impl Fn(f32) -> f32, fma: impl Fn(f32, f32, f32) -> f32) -> f32 {
    // tanh(x/4) = 2 / (1 + exp(−x/2)) − 1.
    fma(2.0, recip(1.0 + exp2(x * (-0.5 * LOG2_E))), -1.0)
}

#[cfg(all(test, feature = "cpu"))]
mod tests {
    use super::*;
    use crate::arch::Warpgroup;
    use crate::arch::cpu::CpuWarpgroup;

    type Wg = CpuWarpgroup<()>;

    fn polynomial(x: f32) -> f32 {
        let mut x = [x];
        Polynomial::map(&mut x, Wg::fma);
        x[0]
    }

    fn exact(x: f32) -> f32 {
        super::exact(x, Wg::exp2, Wg::recip, Wg::fma)
    }

    #[test]
    fn errors() {
        let (mut relative, mut absolute) = (0.0f64, 0.0f64);
        let tanh = |x: f32| (f64::from(x) / 4.0).tanh();
        for x in (-19_999..=19_999).map(|step| step as f32 / 1e4) {
            let error = (f64::from(polynomial(x)) - tanh(x)).abs();
            relative = relative.max(if x == 0.0 { error } else { error / tanh(x).abs() });
        }
        assert!(relative < 1.5e-7, "{relative}");
        for x in (-6000..=6000).map(|step| step as f32 / 100.0) {
            absolute = absolute.max((f64::from(exact(x)) - tanh(x)).abs());
        }
        assert!(absolute < 5e-7, "{absolute}");
    }

    #[test]
    fn infinities_and_nan() {
        assert_eq!(exact(f32::INFINITY), 1.0);
        assert_eq!(exact(f32::NEG_INFINITY), -1.0);
        assert!(exact(f32::NAN).is_nan());
        for x in [f32::INFINITY, f32::NAN, 2.0, -2.0, f32::MAX] {
            assert!(x.to_bits() & Polynomial::OUTSIDE != 0, "{x}");
        }
        assert!(2.0f32.next_down().to_bits() & Polynomial::OUTSIDE == 0);
    }
}
