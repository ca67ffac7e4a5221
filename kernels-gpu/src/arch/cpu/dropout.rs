//! Which weights of a tile are kept, on the CPU: a bit for each.

use super::fragment::{ROWS, Tile};
use crate::attention::dropout::{Dropout, Place, Rows};

/// `[row][column group]`, a bit a column.
#[derive(Clone, Copy)]
pub struct Keep<const N8: usize>([[u8; N8]; ROWS]);

impl<const N8: usize> Keep<N8> {
    /// Call by call: each decides on two rows by two columns, eight apart from their likes.
    pub fn new(dropout: &Dropout, at: &Place) -> Self {
        let mut keep = Keep([[0; N8]; ROWS]);
        for (row, column) in (0..ROWS / 4).flat_map(|row| (0..2 * N8).map(move |column| (row, column))) {
            let (r, c) = (at.row / 4 + row as u32, at.column / 4 + column as u32);
            let words = match at.rows {
                Rows::Queries => dropout.bytes(at.head, r, c),
                Rows::Keys => dropout.bytes(at.head, c, r),
            };
            let words = at.rows.words(words.map(|word| dropout.compare(word)));
            let (first_row, first_column) = (row / 4 * 16 + row % 4 * 2, column / 4 * 16 + column % 4 * 2);
            for (odd_row, words) in words.into_iter().enumerate() {
                for (odd_column, word) in words.into_iter().enumerate() {
                    for (down, right) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                        let kept = word.to_le_bytes()[at.rows.byte(down, right)] >> 7;
                        let (row, column) = (first_row + odd_row + 8 * down, first_column + odd_column + 8 * right);
                        keep.0[row][column / 8] |= kept << (column % 8);
                    }
                }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_keep_what_is_kept() {
        let dropout = Dropout::new(77, 1 << 40 | 3, 9);
        for rows in [Rows::Queries, Rows::Keys] {
            let at = Place { head: 6, row: 320, column: 96, rows };
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
