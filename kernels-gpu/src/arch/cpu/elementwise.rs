//! Loops over the elements of a tile, which is a slice of rows here. They are compiled once for each function of
//! elements, instead of once for each width of a tile.

use core::ops::Range;

use super::fragment::{ROWS, Rows};
use super::isa::dispatched;

dispatched! {
    /// Replaces every element x of these columns by `f(x, r)` with r of its row, in as many rows as `rows` has.
    pub fn map_rows(x: &mut [f32], width: usize, columns: Range<usize>, rows: &[f32], f: impl Fn(f32, f32) -> f32) {
        for (x, row) in x.chunks_exact_mut(width).zip(rows) {
            for x in &mut x[columns.clone()] {
                *x = f(*x, *row);
            }
        }
    }
}

dispatched! {
    /// Replaces every element x by `f(x, c)` with c of its column, in as many rows as `x` has.
    pub fn map_columns(x: &mut [f32], columns: &[f32], f: impl Fn(f32, f32) -> f32) {
        for x in x.chunks_exact_mut(columns.len()) {
            for (x, column) in x.iter_mut().zip(columns) {
                *x = f(*x, *column);
            }
        }
    }
}

dispatched! {
    /// Replaces every element x by `f(x, c, flag)` with c and the flag of its column.
    pub fn map_flagged_columns(x: &mut [f32], columns: &[f32], flags: &[bool], f: impl Fn(f32, f32, bool) -> f32) {
        for x in x.chunks_exact_mut(columns.len()) {
            for ((x, column), flag) in x.iter_mut().zip(columns).zip(flags) {
                *x = f(*x, *column, *flag);
            }
        }
    }
}

dispatched! {
    /// Replaces every element x by `f(x, y)` with the element y in the same place.
    pub fn zip_with(x: &mut [f32], y: &[f32], f: impl Fn(f32, f32) -> f32) {
        for (x, y) in x.iter_mut().zip(y) {
            *x = f(*x, *y);
        }
    }
}

dispatched! {
    /// Returns `f(x, y)` for the x and the y of each row.
    pub fn zip_rows(x: &Rows, y: &Rows, f: impl Fn(f32, f32) -> f32) -> Rows {
        let mut rows = *x;
        for (x, y) in rows.iter_mut().zip(y) {
            *x = f(*x, *y);
        }
        rows
    }
}

dispatched! {
    /// Folds the elements of these columns in each row, in eight chains, which are joined at the end.
    pub fn fold(x: &[f32], width: usize, columns: Range<usize>, f: impl Fn(f32, f32) -> f32) -> Rows {
        let mut folded = [0.0; ROWS];
        for (x, folded) in x.chunks_exact(width).zip(&mut folded) {
            let (groups, _) = x[columns.clone()].as_chunks::<8>();
            if let Some((first, rest)) = groups.split_first() {
                let mut chains = *first;
                for group in rest {
                    for (chain, x) in chains.iter_mut().zip(group) {
                        *chain = f(*chain, *x);
                    }
                }
                let [a, b, c, d, e, g, h, i] = chains;
                *folded = f(f(f(a, e), f(c, h)), f(f(b, g), f(d, i)));
            }
        }
        folded
    }
}

dispatched! {
    /// Multiplies each row by its factor.
    pub fn scale_rows(x: &mut [f32], width: usize, factors: &[f32]) {
        for (x, factor) in x.chunks_exact_mut(width).zip(factors) {
            x.iter_mut().for_each(|x| *x *= factor);
        }
    }
}

dispatched! {
    /// Returns the maximum of `rows` and each row's elements; NaN is ignored.
    pub fn maxima(x: &[f32], width: usize, rows: &Rows) -> Rows {
        let mut maxima = *rows;
        for (x, maximum) in x.chunks_exact(width).zip(&mut maxima) {
            let mut chains = [*maximum; 16];
            for group in x.as_chunks::<16>().0 {
                for (chain, x) in chains.iter_mut().zip(group) {
                    *chain = if *x > *chain { *x } else { *chain };
                }
            }
            *maximum = chains.into_iter().fold(*maximum, f32::max);
        }
        maxima
    }
}

dispatched! {
    /// Sets an element to 0 if the element of P in the same place, in `weights`, has its sign bit set.
    pub fn drop_marked(x: &mut [f32], weights: &[f32]) {
        for (x, weight) in x.iter_mut().zip(weights) {
            *x = if weight.is_sign_negative() { 0.0 } else { *x };
        }
    }
}

/// Sets the elements of a row outside `start..end` to `fill`.
pub fn fill_outside(x: &mut [f32], fill: f32, (start, end): (i32, i32)) {
    let [start, end] = [start, end].map(|column| column.clamp(0, x.len() as i32) as usize);
    x[..start].fill(fill);
    x[end..].fill(fill);
}
