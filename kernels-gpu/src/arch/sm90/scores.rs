//! Softcap and ALiBi on a fragment of scores.

use super::fragment::{Fragment, Rows};
use super::math;
use crate::attention::tanh::{Polynomial, exact};

/// Number of n8 column groups whose polynomials are evaluated together: 16 independent chains for each thread.
const TOGETHER: usize = 4;

/// Replaces every element x by tanh(factor·x).
///
/// Most scores are small compared with the cap. If all of a warp's are below half of it, a polynomial does, which takes
/// no time of the SFU. Otherwise the warp takes two operations of the SFU for each element.
#[inline(always)]
pub fn tanh<const N8: usize>(x: &mut Fragment<N8>, factor: f32) {
    let argument = factor * Polynomial::SCALE;
    let mut bits = 0;
    for x in x.0.as_flattened_mut() {
        *x *= argument;
        bits |= x.to_bits();
    }
    if math::any(bits & Polynomial::OUTSIDE != 0) {
        for x in x.0.as_flattened_mut() {
            *x = exact(*x, math::exp2, math::recip, math::fma);
        }
    } else {
        let (many, rest) = x.0.as_flattened_mut().as_chunks_mut::<{ 4 * TOGETHER }>();
        many.iter_mut().for_each(|x| Polynomial::map(x, math::fma));
        rest.as_chunks_mut::<4>().0.iter_mut().for_each(|x| Polynomial::map(x, math::fma));
    }
}

/// Adds slope·c to every element, with c the column's distance from the thread's first column.
#[inline(always)]
pub fn add_columns<const N8: usize>(x: &mut Fragment<N8>, slope: f32) {
    for (group, registers) in x.0.iter_mut().enumerate() {
        for (i, x) in registers.iter_mut().enumerate() {
            *x = math::fma((8 * group + i % 2) as f32, slope, *x);
        }
    }
}

/// Subtracts slope·|first + c| from every element, with c as in [`add_columns`] and `first` of the row.
#[inline(always)]
pub fn subtract_distances<const N8: usize>(x: &mut Fragment<N8>, first: Rows, slope: f32) {
    for (group, registers) in x.0.iter_mut().enumerate() {
        for (i, x) in registers.iter_mut().enumerate() {
            let distance = first[i / 2] + (8 * group + i % 2) as f32;
            *x = math::fma(distance.abs(), -slope, *x);
        }
    }
}
