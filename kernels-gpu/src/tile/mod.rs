//! Tiles: where their bytes lie in shared memory, and which thread holds which element of a fragment.

pub mod lane;
pub mod smem;
pub mod smem_total;
