//! Tiles: their places in shared memory, and the layout of fragments over threads.

pub mod lane;
pub mod smem;
pub mod smem_total;
