//! Which weights of a tile are kept, on the CPU: a bit for each.

use super::fragment::{ROWS, Tile};
use crate::attention::dropout::{Dropout, Place, Rows};

/// `[row][column group]`, a bit a column.
#[derive(Clone, Copy)]
pub struct Keep<const N8: usize>([[u8; N8]; ROWS]);

impl<const N8: usize> Keep<N8> {
    /// Call by call: of all places, each takes the first that it decides on.
    pub fn new(dropout: &Dropout, at: &Place) -> Self {
        let mut keep = Keep([[0; N8]; ROWS]);
        for (row, column) in (0..ROWS as u32).flat_map(|row| (0..8 * N8 as u32).map(move |column| (row, column))) {
            let (r, c) = (at.row + row, at.column + column);
            let mut mark = |row: u32, column: u32, kept: bool| {
                let (row, column) = ((row - at.row) as usize, (column - at.column) as usize);
                keep.0[row][column / 8] |= (kept as u8) << (column % 8);
            };
            match at.rows {
                Rows::Queries => dropout.for_call(at.head, r, c, mark),
                Rows::Keys => dropout.for_call(at.head, c, r, |i, j, kept| mark(j, i, kept)),
            }
        }
        keep
    }

    /// `f(x)` for every element x that is dropped.
    pub fn for_dropped(&self, x: &mut Tile<N8>, f: impl Fn(f32) -> f32) {
        for (row, keep) in x.0.iter_mut().zip(&self.0) {
            for (group, keep) in row.iter_mut().zip(keep) {
                for (column, x) in group.iter_mut().enumerate() {
                    if keep >> column & 1 == 0 {
                        *x = f(*x);
                    }
                }
            }
        }
    }
}

/// Four of the eight bytes of `a` and `b`, as the digits of `selector` name them.
pub fn select_bytes(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = (a as u64 | (b as u64) << 32).to_le_bytes();
    u32::from_le_bytes(core::array::from_fn(|digit| bytes[(selector >> (4 * digit)) as usize % 8]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_keep_what_is_kept() {
        let dropout = Dropout::new(77, 1 << 40 | 3, 9);
        for rows in [Rows::Queries, Rows::Keys] {
            let at = Place { head: 6, row: 320, column: 192, rows };
            let mut tile = Tile::<16>([[[1.0; 8]; 16]; ROWS]);
            Keep::new(&dropout, &at).for_dropped(&mut tile, |_| 0.0);
            for (row, column) in (0..ROWS).flat_map(|row| (0..128).map(move |column| (row, column))) {
                let (r, c) = (at.row + row as u32, at.column + column as u32);
                let (i, j) = if rows == Rows::Queries { (r, c) } else { (c, r) };
                let expected = if dropout.kept(at.head, i, j) { 1.0 } else { 0.0 };
                assert_eq!(tile.row(row)[column], expected, "{at:?}: query {i}, key {j}");
            }
        }
    }
}
