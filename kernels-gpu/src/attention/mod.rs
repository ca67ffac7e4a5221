//! Parts of attention that all kernels share. Nothing here names an architecture.

pub mod block_info;
pub mod dropout;
pub mod dropping;
pub mod epilogue;
pub mod exponential;
pub mod first_tiles;
pub mod key_parts;
pub mod mask;
pub mod masking;
pub mod pairs;
pub mod philox;
pub mod query_blocks;
pub mod row_statistics;
pub mod scheduler;
pub mod shared_tiles;
pub mod softmax;
pub mod total_steps;
