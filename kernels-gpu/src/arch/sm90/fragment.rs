//! Fragment: one thread's share of a 64 × 8·N8 tile (PTX ISA, wgmma accumulator layout).
//!
//! Columns come in n8 column groups of eight. Of each group a thread holds two neighbouring columns of two rows that
//! are eight apart, so a row belongs to a quad of four lanes. The left operand of a product has the same layout with
//! pairs of columns packed into one register, so P needs no exchange between lanes.

use super::math::{self, Packed};
use crate::tile::lane::Lane;

/// Accumulators: `[column group][2·(row half) + column]`.
#[derive(Clone, Copy)]
pub struct Fragment<const N8: usize>(pub [[f32; 4]; N8]);

/// Packed pairs: `[column group][row half]`.
#[derive(Clone, Copy)]
pub struct Operand<const N8: usize>(pub [[u32; 2]; N8]);

/// Number of column groups whose columns, of one thread and row, are the bits of a word.
const GROUPS_PER_WORD: usize = 16;

/// One f32 for each of the two rows of a thread.
pub type Rows = [f32; 2];

impl<const N8: usize> Fragment<N8> {
    /// Sets the elements of row r outside the columns `start..end` of `columns(r)` to `fill`. The valid columns of a
    /// row are computed as bits, one for each column of this thread. ptxas moves several bits at a time to predicates,
    /// which leaves little more than one selection for each element.
    #[inline(always)]
    pub fn fill_outside(&mut self, lane: Lane, fill: f32, columns: impl Fn(u32) -> (i32, i32)) {
        const { assert!(N8 <= 2 * GROUPS_PER_WORD, "a row's columns of one thread are bits of two words") };
        // Returns the number of this thread's columns before a column: the even ones plus the odd ones.
        let before = |column: i32| {
            let column = column.clamp(0, 8 * N8 as i32) - lane.column as i32;
            ((column + 7) >> 3) + ((column + 6) >> 3)
        };
        for half in 0..2 {
            let (start, end) = columns(lane.row(half as u32));
            let [start, end] = [before(start), before(end)];
            let live = [0, 1].map(|word| {
                let [start, end] = [start, end].map(|count| math::ones((count - 32 * word).max(0) as u32));
                end & !start
            });
            for group in 0..N8 {
                for i in 0..2 {
                    if live[group / GROUPS_PER_WORD] & 1 << (2 * (group % GROUPS_PER_WORD) + i) == 0 {
                        self.0[group][2 * half + i] = fill;
                    }
                }
            }
        }
    }

    #[inline(always)]
    pub fn zip_with(&mut self, y: &Self, f: impl Fn(f32, f32) -> f32) {
        for (x, y) in self.0.as_flattened_mut().iter_mut().zip(y.0.as_flattened()) {
            *x = f(*x, *y);
        }
    }

    #[inline(always)]
    pub fn map_rows(&mut self, rows: Rows, f: impl Fn(f32, f32) -> f32) {
        for registers in &mut self.0 {
            for (i, x) in registers.iter_mut().enumerate() {
                *x = f(*x, rows[i / 2]);
            }
        }
    }

    /// Applies [`Fragment::map_rows`] to the left or right half of the columns.
    #[inline(always)]
    pub fn map_half(&mut self, half: usize, rows: Rows, f: impl Fn(f32, f32) -> f32) {
        for (group, registers) in self.0.iter_mut().enumerate() {
            if (group >= N8 / 2) == (half == 1) {
                for (i, x) in registers.iter_mut().enumerate() {
                    *x = f(*x, rows[i / 2]);
                }
            }
        }
    }

    /// Applies [`Fragment::fold`] to the left or right half of the columns.
    #[inline(always)]
    pub fn fold_half(&self, half: usize, f: impl Fn(f32, f32) -> f32) -> Rows {
        let first = half * (N8 / 2);
        let mut chains = self.0[first];
        for (group, registers) in self.0.iter().enumerate() {
            if (group >= N8 / 2) == (half == 1) && group != first {
                for (chain, x) in chains.iter_mut().zip(registers) {
                    *chain = f(*chain, *x);
                }
            }
        }
        [f(chains[0], chains[1]), f(chains[2], chains[3])]
    }

    /// Folds each row's elements of this thread, in four independent chains, so that none waits for its own last
    /// result.
    #[inline(always)]
    pub fn fold(&self, f: impl Fn(f32, f32) -> f32) -> Rows {
        let mut chains = self.0[0];
        for registers in &self.0[1..] {
            for (chain, x) in chains.iter_mut().zip(registers) {
                *chain = f(*chain, *x);
            }
        }
        [f(chains[0], chains[1]), f(chains[2], chains[3])]
    }

    /// Returns the maximum of `rows` and each row's elements.
    #[inline(always)]
    pub fn maxima(&self, rows: Rows) -> Rows {
        let [a, b] = self.fold(f32::max);
        reduce([a.max(rows[0]), b.max(rows[1])], f32::max)
    }

    /// Returns the maxima of [`Fragment::maxima`]. It is faster unless a thread of the warp finds only negative numbers
    /// in a row.
    ///
    /// The bits of floats that are not negative, read as integers, have the order of the floats and lie above those of
    /// all negative ones. Integers have an instruction for the maximum of three, which halves the work.
    #[inline(always)]
    pub fn maxima_mostly_positive(&self, rows: Rows) -> Rows {
        let bits = |x: f32| x.to_bits() as i32;
        let mut chains = self.0[0].map(bits);
        for registers in &self.0[1..] {
            for (chain, x) in chains.iter_mut().zip(registers) {
                *chain = (*chain).max(bits(*x));
            }
        }
        let [a, b] = [0, 1].map(|half| chains[2 * half].max(chains[2 * half + 1]).max(bits(rows[half])));
        let negative = math::any(a | b < 0);
        // Computed before the branch, so that it need not wait for the branch.
        let maxima = reduce([a, b].map(|x| f32::from_bits(x as u32)), f32::max);
        if negative { self.maxima(rows) } else { maxima }
    }

    #[inline(always)]
    pub fn pack<E: Packed>(&self) -> Operand<N8> {
        self.pack_with(E::pack)
    }

    #[inline(always)]
    pub fn pack_with(&self, pack: impl Fn(f32, f32) -> u32) -> Operand<N8> {
        let mut packed = Operand([[0; 2]; N8]);
        for (to, from) in packed.0.iter_mut().zip(&self.0) {
            *to = [pack(from[0], from[1]), pack(from[2], from[3])];
        }
        packed
    }
}

/// Joins the folds that the four lanes of a quad hold of each row.
#[inline(always)]
pub fn reduce(mut rows: Rows, f: impl Fn(f32, f32) -> f32) -> Rows {
    for x in &mut rows {
        *x = f(*x, f32::from_bits(math::shuffle_xor::<1>(x.to_bits())));
        *x = f(*x, f32::from_bits(math::shuffle_xor::<2>(x.to_bits())));
    }
    rows
}

/// Transposes four registers across the four lanes of a quad: lane i gets every lane's register i, in lane order.
///
/// Selections are instructions and not branches, because a branch by lane could take the shuffles with it.
#[inline(always)]
pub fn transpose_quad(lane: Lane, mut x: [u32; 4]) -> [u32; 4] {
    let [odd, upper] = [-((lane.column as i32) >> 1 & 1), -((lane.column as i32) >> 2)];
    let exchange = |x: &mut [u32; 4], a: usize, b: usize, second: i32, shuffle: fn(u32) -> u32| {
        let received = shuffle(math::select(second, x[b], x[a]));
        (x[a], x[b]) = (math::select(second, x[a], received), math::select(second, received, x[b]));
    };
    exchange(&mut x, 0, 1, odd, math::shuffle_xor::<1>);
    exchange(&mut x, 2, 3, odd, math::shuffle_xor::<1>);
    exchange(&mut x, 0, 2, upper, math::shuffle_xor::<2>);
    exchange(&mut x, 1, 3, upper, math::shuffle_xor::<2>);
    x
}
