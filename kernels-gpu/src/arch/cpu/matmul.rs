//! Replacement of the tensor core: C += A·B in f32, one block of C in registers at a time.
//!
//! With AVX-512 a block has 8 × 32 elements, with AVX2 4 × 16, and the terms of an element are added in order by fused
//! multiply-add. Without them, products are rounded before they are added. A panel of B, as wide as a block, is read
//! again for each block of rows, and stays in the nearest cache.

use super::isa::Isa;

/// Number of rows of the largest block. A and C have memory for a multiple of it.
const BLOCK_ROWS: usize = 8;

/// Left matrix: element (i, s) lies at `i * row + s * step`.
#[derive(Clone, Copy)]
pub struct Left<'a> {
    pub data: &'a [f32],
    pub row: usize,
    pub step: usize,
}

impl<'a> Left<'a> {
    /// Takes a row-major matrix.
    pub fn rows(data: &'a [f32], columns: usize) -> Self {
        Left { data, row: columns, step: 1 }
    }
    /// Takes the transpose of a row-major matrix.
    pub fn columns(data: &'a [f32], columns: usize) -> Self {
        Left { data, row: 1, step: columns }
    }
}

/// Adds A·B to the first `rows` rows of C, and possibly further ones up to a multiple of eight. A has `k` columns; B
/// and C are row-major with `columns` columns, a multiple of 16.
pub fn multiply_add(rows: usize, k: usize, a: Left, b: &[f32], c: &mut [f32], columns: usize) {
    multiply_add_on(Isa::best(), rows, k, a, b, c, columns);
}

fn multiply_add_on(isa: Isa, rows: usize, k: usize, a: Left, b: &[f32], c: &mut [f32], columns: usize) {
    if rows == 0 || k == 0 {
        return;
    }
    let rows = rows.next_multiple_of(BLOCK_ROWS);
    let fits = (rows - 1) * a.row + (k - 1) * a.step < a.data.len()
        && k * columns <= b.len()
        && rows * columns <= c.len()
        && columns.is_multiple_of(16);
    assert!(fits, "a product of {rows} × {k} by {k} × {columns} has too little memory");
    match isa {
        // SAFETY: the processor has these features; all elements of the matrices lie in their slices.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { x86::avx512(rows, k, a, b, c, columns) },
        // SAFETY: the processor has these features; all elements of the matrices lie in their slices.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::avx2(rows, k, a, b, c, columns) },
        _ => portable(rows, k, a, b, c, columns),
    }
}

/// Returns the sum of the products of two vectors, with the roundings of an element of [`multiply_add`].
///
/// In the backward pass dP and δ are such sums. If a query has all its weight on one key, they are sums of the same
/// numbers, and their difference has to be 0.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    dot_on(Isa::best(), a, b)
}

fn dot_on(isa: Isa, a: &[f32], b: &[f32]) -> f32 {
    match isa {
        // SAFETY: the processor has these features.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx2 => unsafe { x86::dot(a, b) },
        _ => a.iter().zip(b).fold(0.0, |sum, (a, b)| sum + a * b),
    }
}

/// Computes in blocks of 4 × 16, which the compiler vectorises as far as the target allows.
fn portable(rows: usize, k: usize, a: Left, b: &[f32], c: &mut [f32], columns: usize) {
    let (b, _) = b.as_chunks::<16>();
    let groups = columns / 16;
    for first in (0..rows).step_by(4) {
        let lines = [first, first + 1, first + 2, first + 3];
        for group in 0..groups {
            let mut sums = lines.map(|row| c[row * columns..].as_chunks::<16>().0[group]);
            for (step, b) in b.iter().skip(group).step_by(groups).take(k).enumerate() {
                for (sum, row) in sums.iter_mut().zip(lines) {
                    let a = a.data[row * a.row + step * a.step];
                    for (sum, b) in sum.iter_mut().zip(b) {
                        *sum += a * b;
                    }
                }
            }
            for (row, sum) in lines.into_iter().zip(sums) {
                c[row * columns..].as_chunks_mut::<16>().0[group] = sum;
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use core::arch::x86_64::*;

    use super::Left;

    /// Returns the sum of products by fused multiply-add, in order.
    #[target_feature(enable = "fma")]
    pub fn dot(a: &[f32], b: &[f32]) -> f32 {
        let mut sum = 0.0f32;
        for (a, b) in a.iter().zip(b) {
            sum = a.mul_add(*b, sum);
        }
        sum
    }

    macro_rules! blocked {
        ($name:ident, $block:ident, $features:literal, $rows:literal, $lanes:literal, $zero:ident, $load:ident,
         $store:ident, $splat:ident, $fma:ident) => {
            /// Computes C += A·B.
            ///
            /// # Safety
            /// The processor has the features; `rows` is a multiple of eight and `columns` of 16; A has `rows` rows of
            /// `k` elements, B `k` and C `rows` of `columns`.
            #[target_feature(enable = $features)]
            pub unsafe fn $name(rows: usize, k: usize, a: Left, b: &[f32], c: &mut [f32], columns: usize) {
                let mut first = 0;
                while first < columns {
                    let two = first + 2 * $lanes <= columns;
                    for row in (0..rows).step_by($rows) {
                        // SAFETY: the block's rows are below `rows` and its columns below `columns`.
                        unsafe {
                            let (b, c) = (b.as_ptr().add(first), c.as_mut_ptr().add(row * columns + first));
                            let data = a.data.as_ptr().add(row * a.row);
                            if two {
                                $block::<2>(k, data, (a.row, a.step), b, c, columns);
                            } else {
                                $block::<1>(k, data, (a.row, a.step), b, c, columns);
                            }
                        }
                    }
                    first += if two { 2 * $lanes } else { $lanes };
                }
            }

            /// Computes one block, `VECTORS` vectors wide.
            ///
            /// # Safety
            /// The processor has the features; the block lies within C, its rows within A and its columns within B.
            #[target_feature(enable = $features)]
            unsafe fn $block<const VECTORS: usize>(
                k: usize,
                a: *const f32,
                (row, step): (usize, usize),
                b: *const f32,
                c: *mut f32,
                columns: usize,
            ) {
                let mut sums = [[$zero(); VECTORS]; $rows];
                for i in 0..$rows {
                    for v in 0..VECTORS {
                        // SAFETY: an element of C and the elements after it lie in the block.
                        sums[i][v] = unsafe { $load(c.add(i * columns + v * $lanes)) };
                    }
                }
                for s in 0..k {
                    let mut line = [$zero(); VECTORS];
                    for v in 0..VECTORS {
                        // SAFETY: an element of B and the elements after it lie in the block.
                        line[v] = unsafe { $load(b.add(s * columns + v * $lanes)) };
                    }
                    for i in 0..$rows {
                        // SAFETY: the element lies in A.
                        let a = $splat(unsafe { *a.add(i * row + s * step) });
                        for v in 0..VECTORS {
                            sums[i][v] = $fma(a, line[v], sums[i][v]);
                        }
                    }
                }
                for i in 0..$rows {
                    for v in 0..VECTORS {
                        // SAFETY: an element of C and the elements after it lie in the block.
                        unsafe { $store(c.add(i * columns + v * $lanes), sums[i][v]) };
                    }
                }
            }
        };
    }
    blocked!(
        avx512,
        block_512,
        "avx512f",
        8,
        16,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_set1_ps,
        _mm512_fmadd_ps
    );
    blocked!(
        avx2,
        block_256,
        "avx2,fma",
        4,
        8,
        _mm256_setzero_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_set1_ps,
        _mm256_fmadd_ps
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn dot_rounds_as_products_do() {
        let value = |i: usize| (i as f32 * 1.7).sin();
        let a: Vec<f32> = (0..8 * 72).map(value).collect();
        let b: Vec<f32> = (0..72 * 16).map(|i| value(i + 5)).collect();
        for isa in [Isa::Target, Isa::Avx2, Isa::Avx512].into_iter().filter(|isa| *isa <= Isa::best()) {
            let mut c = std::vec![0.0; 8 * 16];
            multiply_add_on(isa, 8, 72, Left::rows(&a, 72), &b, &mut c, 16);
            for (row, column) in (0..8).flat_map(|row| (0..16).map(move |column| (row, column))) {
                let b: Vec<f32> = (0..72).map(|s| b[s * 16 + column]).collect();
                assert_eq!(dot_on(isa, &a[row * 72..][..72], &b).to_bits(), c[row * 16 + column].to_bits(), "{isa:?}");
            }
        }
    }

    #[test]
    fn equals_three_loops() {
        let value = |i: usize| ((i * 37) % 19) as f32 - 9.0;
        for isa in [Isa::Target, Isa::Avx2, Isa::Avx512].into_iter().filter(|isa| *isa <= Isa::best()) {
            for (rows, k, columns) in [(1, 1, 16), (3, 8, 48), (5, 24, 32), (64, 64, 176)] {
                let a: Vec<f32> = (0..64 * k).map(value).collect();
                let b: Vec<f32> = (0..k * columns).map(|i| value(i + 5)).collect();
                for a in [Left::rows(&a, k), Left::columns(&a, 64)] {
                    let mut c: Vec<f32> = (0..64 * columns).map(|i| value(i + 3)).collect();
                    let before = c.clone();
                    multiply_add_on(isa, rows, k, a, &b, &mut c, columns);
                    for (row, column) in (0..64).flat_map(|row| (0..columns).map(move |column| (row, column))) {
                        let at = row * columns + column;
                        let product = |s: usize| a.data[row * a.row + s * a.step] * b[s * columns + column];
                        let sum: f32 = if row < rows.next_multiple_of(8) { (0..k).map(product).sum() } else { 0.0 };
                        assert_eq!(c[at], before[at] + sum, "{isa:?} {rows} {k} {columns}");
                    }
                }
            }
        }
    }
}
