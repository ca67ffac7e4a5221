//! Dropout mask of a tile of P on the CPU: one bit per element.

use super::fragment::{ROWS, Tile};
use crate::attention::dropout::mask::MaskPart;
use crate::attention::dropout::{Dropout, Place, Rows};

/// Returns [`Dropout::kept_rows`] as bytes.
pub fn mask_rows(dropout: &Dropout, part: &MaskPart) -> [[u8; 32]; 4] {
    let mut rows = [[0; 32]; 4];
    for (row, words) in rows.iter_mut().zip(dropout.kept_rows(part)) {
        for (bytes, word) in row.as_chunks_mut().0.iter_mut().zip(words) {
            *bytes = word.to_le_bytes();
        }
    }
    rows
}

/// Dropout mask, `[row][column group]`, with one bit per column, set if the element is kept.
#[derive(Clone, Copy)]
pub struct Keep<const N8: usize>([[u8; N8]; ROWS]);

impl<const N8: usize> Keep<N8> {
    /// Computes the mask of the tile at a place.
    pub fn new(dropout: &Dropout, at: &Place) -> Self {
        let mut keep = Keep([[0; N8]; ROWS]);
        fill(keep.0.as_flattened_mut(), N8, dropout, at);
        keep
    }
    /// Sets elements that are dropped to 0.
    pub fn drop(&self, x: &mut Tile<N8>) {
        for_dropped(self.0.as_flattened(), x.elements_mut(), |x| *x = 0.0);
    }
    /// Negates elements that are dropped.
    pub fn negate_dropped(&self, x: &mut Tile<N8>) {
        for_dropped(self.0.as_flattened(), x.elements_mut(), |x| *x = -*x);
    }
}

/// Sets the bits of kept elements, call by call. A Philox call is made at the first of the elements that it decides on.
fn fill(keep: &mut [u8], groups: usize, dropout: &Dropout, at: &Place) {
    for (row, column) in (0..ROWS as u32).flat_map(|row| (0..8 * groups as u32).map(move |column| (row, column))) {
        let (r, c) = (at.row + row, at.column + column);
        let mut mark = |row: u32, column: u32, kept: bool| {
            let (row, column) = ((row - at.row) as usize, (column - at.column) as usize);
            keep[row * groups + column / 8] |= (kept as u8) << (column % 8);
        };
        match at.rows {
            Rows::Queries => dropout.for_call(at.head, r, c, mark),
            Rows::Keys => dropout.for_call(at.head, c, r, |i, j, kept| mark(j, i, kept)),
        }
    }
}

/// Applies `f` to every dropped element.
fn for_dropped(keep: &[u8], x: &mut [f32], f: impl Fn(&mut f32)) {
    for (keep, group) in keep.iter().zip(x.as_chunks_mut::<8>().0) {
        for (column, x) in group.iter_mut().enumerate() {
            if keep >> column & 1 == 0 {
                f(x);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_keep_what_is_kept() {
        let dropout = Dropout::new(0.3, 1 << 40 | 3, 9).unwrap();
        for rows in [Rows::Queries, Rows::Keys] {
            let at = Place { head: 6, row: 320, column: 192, rows };
            let mut tile = Tile::<16>([[[1.0; 8]; 16]; ROWS]);
            Keep::new(&dropout, &at).drop(&mut tile);
            for (row, column) in (0..ROWS).flat_map(|row| (0..128).map(move |column| (row, column))) {
                let (r, c) = (at.row + row as u32, at.column + column as u32);
                let (i, j) = if rows == Rows::Queries { (r, c) } else { (c, r) };
                let expected = if dropout.kept(at.head, i, j) { 1.0 } else { 0.0 };
                assert_eq!(tile.row(row)[column], expected, "{at:?}: query {i}, key {j}");
            }
        }
    }
}
