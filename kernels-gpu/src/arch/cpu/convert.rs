//! Conversions between 16-bit elements and f32. The dtype is known at run time, and each loop is compiled for both
//! dtypes.

use half::f16;

use super::isa::dispatched;
use crate::element::Dtype;

/// Converts elements to f32, up to the length of the shorter slice.
pub fn widen(dtype: Dtype, from: &[u16], to: &mut [f32]) {
    match dtype {
        Dtype::Bf16 => widen_bf16(from, to),
        Dtype::F16 => widen_f16(from, to),
    }
}

/// Rounds elements to the dtype, to nearest with ties to even, up to the length of the shorter slice.
pub fn narrow(dtype: Dtype, from: &[f32], to: &mut [u16]) {
    match dtype {
        Dtype::Bf16 => narrow_bf16(from, to),
        Dtype::F16 => narrow_f16(from, to),
    }
}

/// Rounds elements to the dtype and keeps them in f32, up to the length of the shorter slice.
pub fn round(dtype: Dtype, from: &[f32], to: &mut [f32]) {
    match dtype {
        Dtype::Bf16 => round_bf16(from, to),
        Dtype::F16 => round_f16(from, to),
    }
}

dispatched! {
    fn widen_bf16(from: &[u16], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = f32::from_bits((*from as u32) << 16);
        }
    }
}

/// Returns the bits of an f32 whose upper half is x rounded to bf16.
#[inline(always)]
fn bf16_above(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    // A NaN stays a NaN: its payload must not round to the bits of infinity, or beyond.
    if bits & 0x7fff_ffff > 0x7f80_0000 { bits | 0x0040_0000 } else { rounded }
}

dispatched! {
    fn narrow_bf16(from: &[f32], to: &mut [u16]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = (bf16_above(*from) >> 16) as u16;
        }
    }
}

dispatched! {
    fn round_bf16(from: &[f32], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = f32::from_bits(bf16_above(*from) & 0xffff_0000);
        }
    }
}

/// Defines a loop over f16: eight elements at a time by F16C if the processor has it, otherwise one by one.
macro_rules! f16_loop {
    ($name:ident, $from:ty => $to:ty, $eight:ident, $one:expr) => {
        fn $name(from: &[$from], to: &mut [$to]) {
            let len = from.len().min(to.len());
            let (from, to) = (&from[..len], &mut to[..len]);
            #[cfg(target_arch = "x86_64")]
            if super::isa::Isa::best() >= super::isa::Isa::Avx2 {
                let ((groups, rest), (to_groups, to_rest)) = (from.as_chunks::<8>(), to.as_chunks_mut::<8>());
                // SAFETY: this processor has AVX and F16C.
                unsafe { f16c::$eight(groups, to_groups) };
                return to_rest.iter_mut().zip(rest).for_each(|(to, from)| *to = $one(*from));
            }
            to.iter_mut().zip(from).for_each(|(to, from)| *to = $one(*from));
        }
    };
}
f16_loop!(widen_f16, u16 => f32, widen, |x| f16::from_bits(x).to_f32());
f16_loop!(narrow_f16, f32 => u16, narrow, |x| f16::from_f32(x).to_bits());
f16_loop!(round_f16, f32 => f32, round, |x| f16::from_f32(x).to_f32());

/// Conversions of eight f16 at a time.
#[cfg(target_arch = "x86_64")]
mod f16c {
    use core::arch::x86_64::*;

    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;

    #[target_feature(enable = "avx,f16c")]
    pub fn widen(from: &[[u16; 8]], to: &mut [[f32; 8]]) {
        for (from, to) in from.iter().zip(to) {
            // SAFETY: both are arrays of eight elements, and the instructions require no alignment.
            unsafe { _mm256_storeu_ps(to.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast()))) };
        }
    }
    #[target_feature(enable = "avx,f16c")]
    pub fn narrow(from: &[[f32; 8]], to: &mut [[u16; 8]]) {
        for (from, to) in from.iter().zip(to) {
            // SAFETY: both are arrays of eight elements, and the instructions require no alignment.
            unsafe {
                let narrow = _mm256_cvtps_ph::<NEAREST>(_mm256_loadu_ps(from.as_ptr()));
                _mm_storeu_si128(to.as_mut_ptr().cast(), narrow);
            }
        }
    }
    #[target_feature(enable = "avx,f16c")]
    pub fn round(from: &[[f32; 8]], to: &mut [[f32; 8]]) {
        for (from, to) in from.iter().zip(to) {
            // SAFETY: both are arrays of eight elements, and the instructions require no alignment.
            unsafe {
                let narrow = _mm256_cvtps_ph::<NEAREST>(_mm256_loadu_ps(from.as_ptr()));
                _mm256_storeu_ps(to.as_mut_ptr(), _mm256_cvtph_ps(narrow));
            }
        }
    }
}

dispatched! {
    /// Transposes a row-major matrix: element (r, c) of `from`, which has `columns` per row, goes to (c, r) of `to`,
    /// which has `stride` per row.
    pub fn transpose(from: &[f32], columns: usize, to: &mut [f32], stride: usize) {
        // Takes eight rows at a time, so that each write is contiguous.
        for (block, rows) in from.chunks(8 * columns).enumerate() {
            if rows.len() < 8 * columns {
                for (r, row) in rows.chunks_exact(columns).enumerate() {
                    for (c, x) in row.iter().enumerate() {
                        to[c * stride + 8 * block + r] = *x;
                    }
                }
                continue;
            }
            for (c, to) in to.chunks_exact_mut(stride).enumerate().take(columns) {
                let to = &mut to[8 * block..][..8];
                for (r, to) in to.iter_mut().enumerate() {
                    *to = rows[r * columns + c];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;
    use std::vec::Vec;

    /// Compares with conversions of one element at a time, for all 16-bit patterns and values between neighbours.
    #[test]
    fn equals_half() {
        let bits: Vec<u16> = (0..=u16::MAX).collect();
        for dtype in [Dtype::F16, Dtype::Bf16] {
            let to_f32 = |x: u16| match dtype {
                Dtype::F16 => f16::from_bits(x).to_f32(),
                Dtype::Bf16 => bf16::from_bits(x).to_f32(),
            };
            let from_f32 = |x: f32| match dtype {
                Dtype::F16 => f16::from_f32(x).to_bits(),
                Dtype::Bf16 => bf16::from_f32(x).to_bits(),
            };
            let same = |x: f32, y: f32| x.to_bits() == y.to_bits() || x.is_nan() && y.is_nan();
            let mut wide = std::vec![0.0; bits.len()];
            widen(dtype, &bits, &mut wide);
            assert!(bits.iter().zip(&wide).all(|(bits, x)| same(to_f32(*bits), *x)));
            for nudge in [-1, 0, 1, 0xfff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001i32] {
                let between: Vec<f32> =
                    wide.iter().map(|x| f32::from_bits(x.to_bits().wrapping_add_signed(nudge))).collect();
                let (mut narrowed, mut rounded) = (std::vec![0; bits.len()], std::vec![0.0; bits.len()]);
                narrow(dtype, &between, &mut narrowed);
                round(dtype, &between, &mut rounded);
                for ((x, narrowed), rounded) in between.iter().zip(narrowed).zip(rounded) {
                    assert!(same(to_f32(from_f32(*x)), to_f32(narrowed)), "{x} {narrowed:x}");
                    assert!(same(to_f32(from_f32(*x)), rounded), "{x} {rounded}");
                }
            }
        }
    }

    #[test]
    fn transposes() {
        for rows in [1, 7, 8, 21] {
            let from: Vec<f32> = (0..rows * 24).map(|i| i as f32).collect();
            let mut to = std::vec![-1.0; 24 * 32];
            transpose(&from, 24, &mut to, 32);
            for (r, c) in (0..rows).flat_map(|r| (0..24).map(move |c| (r, c))) {
                assert_eq!(to[c * 32 + r], from[r * 24 + c]);
            }
        }
    }
}
