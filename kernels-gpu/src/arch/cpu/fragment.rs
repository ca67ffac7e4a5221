//! A whole 64 × 8·N8 tile as one fragment.

/// Rows of a warpgroup.
pub const ROWS: usize = crate::variants::WARPGROUP_ROWS as usize;

/// `[row][column group][column]`, in f32.
#[derive(Clone, Copy)]
pub struct Tile<const N8: usize>(pub [[[f32; 8]; N8]; ROWS]);

/// One f32 a row.
pub type Rows = [f32; ROWS];

impl<const N8: usize> Tile<N8> {
    pub const ZEROS: Self = Tile([[[0.0; 8]; N8]; ROWS]);

    /// A row's elements.
    pub fn row(&self, row: usize) -> &[f32] {
        self.0[row].as_flattened()
    }

    /// `f(x, c)` for every element x of the first rows and its column's c.
    pub fn map_columns<C: Copy>(&mut self, rows: usize, columns: &[C], f: impl Fn(f32, C) -> f32) {
        for row in 0..rows {
            for (x, column) in self.row_mut(row).iter_mut().zip(columns) {
                *x = f(*x, *column);
            }
        }
    }

    /// A row's elements.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        self.0[row].as_flattened_mut()
    }
}
