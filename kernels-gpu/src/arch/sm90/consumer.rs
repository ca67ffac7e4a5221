//! A consumer warpgroup: [`Warpgroup`] on Hopper.

use core::marker::PhantomData;

use super::cta::{smem_base, thread_of_warpgroup};
use super::dropout::Keep;
use super::fragment::{self, Fragment, Operand, Rows};
use super::load::load_constant_f32;
use super::math::{self, Packed, fresh};
use super::scores;
use super::wgmma;
use crate::arch::{Edge, MaxUnit, Pending, RescaleCheck, Warpgroup};
use crate::attention::dropout::{Dropout, Place};
use crate::ground::tensor::TensorMap;
use crate::tile::lane::Lane;

/// Consumer warpgroup of a CTA, with its end `P` of the pipeline.
pub struct Consumer<E, P> {
    /// Address of the CTA's shared memory in the shared window.
    pub(super) base: u32,
    /// Index of this consumer in the CTA.
    index: u32,
    /// Address of the kernel's parameters, which contain the tensor maps.
    pub(super) parameters: u64,
    pub(super) pipe: P,
    element: PhantomData<E>,
}

impl<E: Packed, P> Consumer<E, P> {
    /// Makes a consumer. `parameters` is the address of the kernel's parameters.
    #[inline(always)]
    pub(super) fn with_pipe(index: u32, parameters: u64, pipe: P) -> Self {
        Consumer { base: smem_base(), index, parameters, pipe, element: PhantomData }
    }

    #[inline(always)]
    pub(super) fn base(&self) -> u32 {
        fresh(self.base)
    }
    #[inline(always)]
    pub(super) fn index(&self) -> u32 {
        fresh(self.index)
    }
    #[inline(always)]
    pub(super) fn lane(&self) -> Lane {
        Lane::new(thread_of_warpgroup())
    }
}

impl<E: Packed, P> Warpgroup for Consumer<E, P> {
    type Acc<const N8: usize> = Fragment<N8>;
    type Operand<const N8: usize> = Operand<N8>;
    type Rows = Rows;
    type Tensor = TensorMap;
    type Keep<const N8: usize> = Keep<N8>;

    #[inline(always)]
    fn zeros<const N8: usize>(&self) -> Fragment<N8> {
        Fragment([[0.0; 4]; N8])
    }
    #[inline(always)]
    fn fill_outside<const N8: usize>(&self, x: &mut Fragment<N8>, fill: f32, columns: impl Fn(u32) -> (i32, i32)) {
        x.fill_outside(self.lane(), fill, columns);
    }
    #[inline(always)]
    fn zip_with<const N8: usize>(&self, x: &mut Fragment<N8>, y: &Fragment<N8>, f: impl Fn(f32, f32) -> f32) {
        x.zip_with(y, f);
    }
    #[inline(always)]
    fn map_rows<const N8: usize>(&self, x: &mut Fragment<N8>, rows: Rows, f: impl Fn(f32, f32) -> f32) {
        x.map_rows(rows, f);
    }
    #[inline(always)]
    fn map_half<const N8: usize>(&self, x: &mut Fragment<N8>, half: usize, rows: Rows, f: impl Fn(f32, f32) -> f32) {
        x.map_half(half, rows, f);
    }
    #[inline(always)]
    fn fold_half<const N8: usize>(&self, x: &Fragment<N8>, half: usize, f: impl Fn(f32, f32) -> f32) -> Rows {
        x.fold_half(half, f)
    }
    #[inline(always)]
    fn scale_rows<const N8: usize>(&self, x: &mut Fragment<N8>, factors: Rows, check: RescaleCheck) {
        if matches!(check, RescaleCheck::Never) || math::any(factors[0] != 1.0 || factors[1] != 1.0) {
            x.map_rows(factors, |x, factor| x * factor);
        }
    }
    #[inline(always)]
    fn fold<const N8: usize>(&self, x: &Fragment<N8>, f: impl Fn(f32, f32) -> f32) -> Rows {
        x.fold(f)
    }
    #[inline(always)]
    fn maxima<const N8: usize>(&self, x: &Fragment<N8>, rows: Rows, unit: MaxUnit) -> Rows {
        // With fewer elements the branch costs more than integer comparisons save.
        if matches!(unit, MaxUnit::Float) || N8 < 16 { x.maxima(rows) } else { x.maxima_mostly_positive(rows) }
    }
    #[inline(always)]
    fn reduce(&self, rows: Rows, f: impl Fn(f32, f32) -> f32) -> Rows {
        fragment::reduce(rows, f)
    }
    #[inline(always)]
    fn rows(&self, value: f32) -> Rows {
        [value; 2]
    }
    #[inline(always)]
    fn rows_of(&self, f: impl Fn(u32) -> f32) -> Rows {
        [0, 1].map(|half| f(self.lane().row(half)))
    }
    #[inline(always)]
    fn tanh<const N8: usize>(&self, x: &mut Fragment<N8>, factor: f32) {
        scores::tanh(x, factor);
    }
    #[inline(always)]
    fn add_columns<const N8: usize>(&self, x: &mut Fragment<N8>, slope: f32, edge: Edge) -> Rows {
        match edge {
            Edge::First => scores::add_columns(x, slope, 0),
            Edge::Last => scores::add_columns(x, slope, 8 * N8 as i32 - 1),
        }
        [self.lane().column as f32 * slope; 2]
    }
    #[inline(always)]
    fn subtract_distances<const N8: usize>(&self, x: &mut Fragment<N8>, first: Rows, slope: f32) {
        let column = self.lane().column as f32;
        scores::subtract_distances(x, first.map(|first| first + column), slope);
    }
    #[inline(always)]
    fn read_f32(&self, address: u64) -> f32 {
        // SAFETY: I5, the host has checked the array.
        unsafe { load_constant_f32(address) }
    }
    #[inline(always)]
    fn zip(&self, a: Rows, b: Rows, f: impl Fn(f32, f32) -> f32) -> Rows {
        [f(a[0], b[0]), f(a[1], b[1])]
    }
    #[inline(always)]
    fn pack<const N8: usize>(&self, x: &Fragment<N8>) -> Operand<N8> {
        x.pack::<E>()
    }
    #[inline(always)]
    fn keep<const N8: usize>(&self, dropout: &Dropout, at: &Place) -> Keep<N8> {
        Keep::new(dropout, at, self.lane())
    }
    #[inline(always)]
    fn drop<const N8: usize>(&self, x: &mut Fragment<N8>, keep: &Keep<N8>) {
        keep.drop(x);
    }
    #[inline(always)]
    fn mark<const N8: usize>(&self, x: &mut Fragment<N8>, keep: &Keep<N8>) {
        keep.mark(x);
    }
    #[inline(always)]
    fn drop_marked<const N8: usize>(&self, x: &mut Fragment<N8>, weights: &Fragment<N8>) {
        x.zip_with(weights, |x, p| f32::from_bits(x.to_bits() & !((p.to_bits() as i32 >> 31) as u32)));
    }
    #[inline(always)]
    fn pack_unmarked<const N8: usize>(&self, x: &Fragment<N8>) -> Operand<N8> {
        x.pack_with(E::pack_positive)
    }
    #[inline(always)]
    fn drop_operand<const N8: usize>(&self, x: &mut Operand<N8>, keep: &Keep<N8>) {
        keep.apply_operand(x);
    }

    #[inline(always)]
    fn exp2(x: f32) -> f32 {
        math::exp2(x)
    }
    #[inline(always)]
    fn log2(x: f32) -> f32 {
        math::log2(x)
    }
    #[inline(always)]
    fn fma(a: f32, b: f32, c: f32) -> f32 {
        math::fma(a, b, c)
    }
    #[inline(always)]
    fn larger(a: f32, b: f32) -> f32 {
        math::larger(a, b)
    }
    #[inline(always)]
    fn recip(x: f32) -> f32 {
        math::recip(x)
    }

    #[inline(always)]
    fn compute<const N8: usize>(&self, x: &mut Fragment<N8>) {
        wgmma::tie(x);
    }
    #[inline(always)]
    fn wait<const LATER: usize, const N8: usize>(&mut self, x: Pending<Fragment<N8>>) -> Fragment<N8> {
        let Pending(mut x) = x;
        wgmma::wait::<LATER>();
        wgmma::tie(&mut x);
        x
    }
}
