//! [`Warpgroup`] on the CPU.

use std::vec::Vec;

use super::convert;
use super::dropout::Keep;
use super::elementwise;
use super::exp2;
use super::fragment::{ROWS, Rows, Tile};
use super::memory;
use crate::arch::{MaxUnit, Pending, RescaleCheck, Warpgroup};
use crate::attention::dropout::{Dropout, Place};
use crate::attention::tanh;
use crate::element::Dtype;
use crate::ground::tensor::Strided;

/// Consumer warpgroup, with its end `P` of the pipeline.
///
/// The dtype of the tensors is a value and not a type, so that kernels are compiled once for both.
pub struct CpuWarpgroup<P> {
    /// Number of rows that are computed: fewer than a tile's if the problem has fewer rows.
    pub(super) live: usize,
    pub(super) dtype: Dtype,
    pub(super) pipe: P,
}

impl<P> CpuWarpgroup<P> {
    /// Returns the elements of the rows that are computed.
    fn live<'a, const N8: usize>(&self, x: &'a mut Tile<N8>) -> &'a mut [f32] {
        x.first_rows_mut(self.live)
    }
}

/// Returns the columns of the left (`half` 0) or right (1) half of a tile.
fn half_of<const N8: usize>(half: usize) -> core::ops::Range<usize> {
    let middle = N8 / 2 * 8;
    if half == 0 { 0..middle } else { middle..8 * N8 }
}

/// Returns the number of each column.
fn numbers<const N8: usize>() -> Vec<f32> {
    (0..8 * N8).map(|column| column as f32).collect()
}

impl<P> Warpgroup for CpuWarpgroup<P> {
    type Acc<const N8: usize> = Tile<N8>;
    /// Operand that is rounded to the dtype and kept in f32.
    type Operand<const N8: usize> = Tile<N8>;
    type Rows = Rows;
    type Tensor = Strided;
    type Keep<const N8: usize> = Keep<N8>;

    fn zeros<const N8: usize>(&self) -> Tile<N8> {
        Tile::ZEROS
    }
    #[inline(never)]
    fn fill_outside<const N8: usize>(&self, x: &mut Tile<N8>, fill: f32, columns: impl Fn(u32) -> (i32, i32)) {
        for (row, x) in (0..).zip(self.live(x).chunks_exact_mut(8 * N8)) {
            elementwise::fill_outside(x, fill, columns(row));
        }
    }
    #[inline(never)]
    fn zip_with<const N8: usize>(&self, x: &mut Tile<N8>, y: &Tile<N8>, f: impl Fn(f32, f32) -> f32) {
        elementwise::zip_with(self.live(x), y.first_rows(self.live), f);
    }
    #[inline(never)]
    fn map_rows<const N8: usize>(&self, x: &mut Tile<N8>, rows: Rows, f: impl Fn(f32, f32) -> f32) {
        elementwise::map_rows(self.live(x), 8 * N8, 0..8 * N8, &rows, f);
    }
    #[inline(never)]
    fn map_half<const N8: usize>(&self, x: &mut Tile<N8>, half: usize, rows: Rows, f: impl Fn(f32, f32) -> f32) {
        elementwise::map_rows(self.live(x), 8 * N8, half_of::<N8>(half), &rows, f);
    }
    #[inline(never)]
    fn scale_rows<const N8: usize>(&self, x: &mut Tile<N8>, factors: Rows, _: RescaleCheck) {
        if factors.iter().any(|factor| *factor != 1.0) {
            elementwise::scale_rows(self.live(x), 8 * N8, &factors);
        }
    }
    #[inline(never)]
    fn fold<const N8: usize>(&self, x: &Tile<N8>, f: impl Fn(f32, f32) -> f32) -> Rows {
        elementwise::fold(x.first_rows(self.live), 8 * N8, 0..8 * N8, f)
    }
    #[inline(never)]
    fn fold_half<const N8: usize>(&self, x: &Tile<N8>, half: usize, f: impl Fn(f32, f32) -> f32) -> Rows {
        elementwise::fold(x.first_rows(self.live), 8 * N8, half_of::<N8>(half), f)
    }
    #[inline(never)]
    fn maxima<const N8: usize>(&self, x: &Tile<N8>, rows: Rows, _: MaxUnit) -> Rows {
        elementwise::maxima(x.first_rows(self.live), 8 * N8, &rows)
    }
    fn reduce(&self, rows: Rows, _: impl Fn(f32, f32) -> f32) -> Rows {
        rows
    }
    fn rows(&self, value: f32) -> Rows {
        [value; ROWS]
    }
    fn rows_of(&self, f: impl Fn(u32) -> f32) -> Rows {
        core::array::from_fn(|row| f(row as u32))
    }
    #[inline(never)]
    fn tanh<const N8: usize>(&self, x: &mut Tile<N8>, factor: f32) {
        let factor = factor * tanh::Polynomial::SCALE;
        let factors = [factor; ROWS];
        elementwise::map_rows(self.live(x), 8 * N8, 0..8 * N8, &factors, |x, factor| {
            tanh::exact(x * factor, Self::exp2, Self::recip, Self::fma)
        });
    }
    #[inline(never)]
    fn add_columns<const N8: usize>(&self, x: &mut Tile<N8>, slope: f32) -> Rows {
        elementwise::map_columns(self.live(x), &numbers::<N8>(), |x, column| Self::fma(column, slope, x));
        [0.0; ROWS]
    }
    #[inline(never)]
    fn subtract_distances<const N8: usize>(&self, x: &mut Tile<N8>, first: Rows, slope: f32) {
        for (x, first) in self.live(x).chunks_exact_mut(8 * N8).zip(first) {
            elementwise::map_columns(x, &numbers::<N8>(), |x, column| Self::fma((first + column).abs(), -slope, x));
        }
    }
    fn read_f32(&self, address: u64) -> f32 {
        // SAFETY: the caller of the kernel has promised its operands, and this lies within one.
        unsafe { memory::read_f32(address, 0) }
    }
    #[inline(never)]
    fn zip(&self, a: Rows, b: Rows, f: impl Fn(f32, f32) -> f32) -> Rows {
        elementwise::zip_rows(&a, &b, f)
    }
    #[inline(never)]
    fn pack<const N8: usize>(&self, x: &Tile<N8>) -> Tile<N8> {
        let mut packed = Tile::ZEROS;
        convert::round(self.dtype, x.first_rows(self.live), packed.elements_mut());
        packed
    }
    #[inline(never)]
    fn keep<const N8: usize>(&self, dropout: &Dropout, at: &Place) -> Keep<N8> {
        Keep::new(dropout, at)
    }
    #[inline(never)]
    fn drop<const N8: usize>(&self, x: &mut Tile<N8>, keep: &Keep<N8>) {
        keep.drop(x);
    }
    #[inline(never)]
    fn mark<const N8: usize>(&self, x: &mut Tile<N8>, keep: &Keep<N8>) {
        // A NaN may have either sign.
        x.elements_mut().iter_mut().for_each(|x| *x = x.abs());
        keep.negate_dropped(x);
    }
    #[inline(never)]
    fn drop_marked<const N8: usize>(&self, x: &mut Tile<N8>, weights: &Tile<N8>) {
        elementwise::drop_marked(self.live(x), weights.first_rows(self.live));
    }
    #[inline(never)]
    fn pack_unmarked<const N8: usize>(&self, x: &Tile<N8>) -> Tile<N8> {
        let mut kept = *x;
        self.drop_marked(&mut kept, x);
        self.pack(&kept)
    }
    #[inline(never)]
    fn drop_operand<const N8: usize>(&self, x: &mut Tile<N8>, keep: &Keep<N8>) {
        keep.drop(x);
    }

    #[inline(always)]
    fn exp2(x: f32) -> f32 {
        exp2::exp2(x)
    }
    #[inline(always)]
    fn log2(x: f32) -> f32 {
        x.log2()
    }
    #[inline(always)]
    fn fma(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
    #[inline(always)]
    fn larger(a: f32, b: f32) -> f32 {
        if a.is_nan() || a > b { a } else { b }
    }
    #[inline(always)]
    fn recip(x: f32) -> f32 {
        x.recip()
    }

    fn compute<const N8: usize>(&self, _: &mut Tile<N8>) {}
    #[inline(always)]
    fn wait<const LATER: usize, const N8: usize>(&mut self, x: Pending<Tile<N8>>) -> Tile<N8> {
        x.0
    }
}
