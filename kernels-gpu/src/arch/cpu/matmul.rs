//! The tensor core's stand-in: C += A·B in f32, four rows by sixteen columns at a time.

use super::fragment::Tile;

/// Adds A·B to the first `rows` rows of C. A is row-major with `k` columns, B row-major with 8·N8.
pub fn multiply_add<const N8: usize>(rows: usize, a: &[f32], k: usize, b: &[f32], c: &mut Tile<N8>) {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: this processor has AVX2.
        return unsafe { multiply_add_avx2(rows, a, k, b, c) };
    }
    blocked(rows, a, k, b, c);
}

/// The same loop, compiled for eight lanes.
///
/// # Safety
/// The processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn multiply_add_avx2<const N8: usize>(rows: usize, a: &[f32], k: usize, b: &[f32], c: &mut Tile<N8>) {
    blocked(rows, a, k, b, c);
}

#[inline(always)]
fn blocked<const N8: usize>(rows: usize, a: &[f32], k: usize, b: &[f32], c: &mut Tile<N8>) {
    // Tiles are multiples of 16 columns wide.
    let (b, _) = b.as_chunks::<16>();
    let groups = N8 / 2;
    for first in (0..rows).step_by(4) {
        // A block that reaches past the live rows recomputes the last one.
        let lines = [0, 1, 2, 3].map(|i| (first + i).min(rows - 1));
        let a = lines.map(|row| &a[row * k..][..k]);
        for group in 0..groups {
            let mut sums = lines.map(|row| c.row(row).as_chunks::<16>().0[group]);
            for (step, b) in b.iter().skip(group).step_by(groups).take(k).enumerate() {
                for (sum, a) in sums.iter_mut().zip(a) {
                    for (sum, b) in sum.iter_mut().zip(b) {
                        *sum += a[step] * b;
                    }
                }
            }
            for (row, sum) in lines.into_iter().zip(sums) {
                c.row_mut(row).as_chunks_mut::<16>().0[group] = sum;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn equals_three_loops() {
        let value = |i: usize| ((i * 37) % 19) as f32 - 9.0;
        for (rows, k) in [(1, 1), (3, 8), (5, 24), (64, 64)] {
            let a: Vec<f32> = (0..64 * k).map(value).collect();
            let b: Vec<f32> = (0..k * 16).map(|i| value(i + 5)).collect();
            let mut c = Tile::<2>::ZEROS;
            multiply_add(rows, &a, k, &b, &mut c);
            for row in 0..64 {
                for column in 0..16 {
                    let sum: f32 = (0..k).map(|i| a[row * k + i] * b[i * 16 + column]).sum();
                    assert_eq!(c.row(row)[column], if row < rows { sum } else { 0.0 });
                }
            }
        }
    }
}
