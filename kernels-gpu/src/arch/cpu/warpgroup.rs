//! [`Warpgroup`] on the CPU.

use core::marker::PhantomData;

use super::dropout::Keep;
use super::fragment::{ROWS, Rows, Tile};
use crate::arch::{Pending, Warpgroup};
use crate::attention::dropout::{Dropout, Place};
use crate::element::Element;
use crate::params::Strided;

/// One consumer warpgroup, with its end `P` of the pipeline.
pub struct CpuWarpgroup<E, P> {
    /// Rows that are computed: all that the problem has, in a problem that has fewer than a tile.
    pub(super) live: usize,
    pub(super) pipe: P,
    element: PhantomData<E>,
}

impl<E, P> CpuWarpgroup<E, P> {
    pub(super) fn with_pipe(live: usize, pipe: P) -> Self {
        CpuWarpgroup { live, pipe, element: PhantomData }
    }
}

impl<E: Element, P> Warpgroup for CpuWarpgroup<E, P> {
    type Acc<const N8: usize> = Tile<N8>;
    /// Rounded to E, kept in f32.
    type Operand<const N8: usize> = Tile<N8>;
    type Rows = Rows;
    type Tensor = Strided;
    type Keep<const N8: usize> = Keep<N8>;

    fn zeros<const N8: usize>(&self) -> Tile<N8> {
        Tile::ZEROS
    }
    fn fill_outside<const N8: usize>(&self, x: &mut Tile<N8>, fill: f32, columns: impl Fn(u32) -> (i32, i32)) {
        for row in 0..self.live {
            let (start, end) = columns(row as u32);
            let [start, end] = [start, end].map(|column| column.clamp(0, 8 * N8 as i32) as usize);
            x.row_mut(row)[..start].fill(fill);
            x.row_mut(row)[end..].fill(fill);
        }
    }
    fn zip_with<const N8: usize>(&self, x: &mut Tile<N8>, y: &Tile<N8>, f: impl Fn(f32, f32) -> f32) {
        for row in 0..self.live {
            for (x, y) in x.row_mut(row).iter_mut().zip(y.row(row)) {
                *x = f(*x, *y);
            }
        }
    }
    fn map_rows<const N8: usize>(&self, x: &mut Tile<N8>, rows: Rows, f: impl Fn(f32, f32) -> f32) {
        for (row, value) in rows.into_iter().enumerate().take(self.live) {
            for x in x.row_mut(row) {
                *x = f(*x, value);
            }
        }
    }
    fn map_half<const N8: usize>(&self, x: &mut Tile<N8>, half: usize, rows: Rows, f: impl Fn(f32, f32) -> f32) {
        let groups = [0..N8 / 2, N8 / 2..N8][half].clone();
        for (row, value) in rows.into_iter().enumerate().take(self.live) {
            for x in x.0[row][groups.clone()].as_flattened_mut() {
                *x = f(*x, value);
            }
        }
    }
    fn scale_rows<const N8: usize>(&self, x: &mut Tile<N8>, factors: Rows, _: bool) {
        if factors.iter().any(|factor| *factor != 1.0) {
            self.map_rows(x, factors, |x, factor| x * factor);
        }
    }
    fn fold<const N8: usize>(&self, x: &Tile<N8>, f: impl Fn(f32, f32) -> f32) -> Rows {
        core::array::from_fn(|row| {
            // Eight chains, one a vector lane.
            let chains = x.0[row][1..].iter().fold(x.0[row][0], |mut chains, group| {
                chains.iter_mut().zip(group).for_each(|(chain, x)| *chain = f(*chain, *x));
                chains
            });
            chains[1..].iter().fold(chains[0], |a, x| f(a, *x))
        })
    }
    fn fold_half<const N8: usize>(&self, x: &Tile<N8>, half: usize, f: impl Fn(f32, f32) -> f32) -> Rows {
        let groups = [0..N8 / 2, N8 / 2..N8][half].clone();
        core::array::from_fn(|row| {
            let x = x.0[row][groups.clone()].as_flattened();
            x[1..].iter().fold(x[0], |a, x| f(a, *x))
        })
    }
    fn maxima<const N8: usize>(&self, x: &Tile<N8>, rows: Rows, _: bool) -> Rows {
        self.zip(rows, self.fold(x, f32::max), f32::max)
    }
    fn reduce(&self, rows: Rows, _: impl Fn(f32, f32) -> f32) -> Rows {
        rows
    }
    fn rows(&self, value: f32) -> Rows {
        [value; ROWS]
    }
    fn zip(&self, a: Rows, b: Rows, f: impl Fn(f32, f32) -> f32) -> Rows {
        core::array::from_fn(|row| f(a[row], b[row]))
    }
    fn pack<const N8: usize>(&self, x: &Tile<N8>) -> Tile<N8> {
        let mut packed = Tile::ZEROS;
        for row in 0..self.live {
            for (to, x) in packed.row_mut(row).iter_mut().zip(x.row(row)) {
                *to = E::from_f32(*x).to_f32();
            }
        }
        packed
    }
    fn keep<const N8: usize>(&self, dropout: &Dropout, at: &Place) -> Keep<N8> {
        Keep::new(dropout, at)
    }
    fn mark<const N8: usize>(&self, x: &mut Tile<N8>, keep: &Keep<N8>) {
        // A NaN may come with either sign.
        self.map_rows(x, [0.0; ROWS], |x, _| x.abs());
        keep.for_dropped(x, |x| -x);
    }
    fn drop_marked<const N8: usize>(&self, x: &mut Tile<N8>, weights: &Tile<N8>) {
        self.zip_with(x, weights, |x, p| if p.is_sign_negative() { 0.0 } else { x });
    }
    fn pack_unmarked<const N8: usize>(&self, x: &Tile<N8>) -> Tile<N8> {
        let mut kept = *x;
        self.drop_marked(&mut kept, x);
        self.pack(&kept)
    }
    fn drop_operand<const N8: usize>(&self, x: &mut Tile<N8>, keep: &Keep<N8>) {
        keep.for_dropped(x, |_| 0.0);
    }

    fn exp2(x: f32) -> f32 {
        x.exp2()
    }
    fn log2(x: f32) -> f32 {
        x.log2()
    }
    fn fma(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
    fn larger(a: f32, b: f32) -> f32 {
        if a.is_nan() || a > b { a } else { b }
    }
    fn recip(x: f32) -> f32 {
        x.recip()
    }

    fn compute<const N8: usize>(&self, _: &mut Tile<N8>) {}
    fn wait<const LATER: usize, const N8: usize>(&mut self, x: Pending<Tile<N8>>) -> Tile<N8> {
        x.0
    }
}
