//! Fragment on the CPU: a whole 64 × 8·N8 tile.

/// Number of rows of a warpgroup.
pub const ROWS: usize = crate::tile::lane::WARPGROUP_ROWS as usize;

/// Tile in f32, `[row][column group][column]`.
#[derive(Clone, Copy)]
pub struct Tile<const N8: usize>(pub [[[f32; 8]; N8]; ROWS]);

/// One f32 per row.
pub type Rows = [f32; ROWS];

impl<const N8: usize> Tile<N8> {
    pub const ZEROS: Self = Tile([[[0.0; 8]; N8]; ROWS]);
    /// Number of columns.
    pub const WIDTH: usize = 8 * N8;

    /// Returns all elements, row by row.
    pub fn elements(&self) -> &[f32] {
        self.0.as_flattened().as_flattened()
    }
    /// Returns all elements, row by row.
    pub fn elements_mut(&mut self) -> &mut [f32] {
        self.0.as_flattened_mut().as_flattened_mut()
    }
    /// Returns the elements of the first rows.
    pub fn first_rows(&self, rows: usize) -> &[f32] {
        self.0[..rows].as_flattened().as_flattened()
    }
    /// Returns the elements of the first rows.
    pub fn first_rows_mut(&mut self, rows: usize) -> &mut [f32] {
        self.0[..rows].as_flattened_mut().as_flattened_mut()
    }
    /// Returns the elements of a row.
    pub fn row(&self, row: usize) -> &[f32] {
        self.0[row].as_flattened()
    }
}
