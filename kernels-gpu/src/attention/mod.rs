//! Parts of attention that all kernels share. Nothing here names an architecture.

#[cfg(not(target_arch = "nvptx64"))]
pub mod any_features;
pub mod blocks;
pub mod by_distance;
pub mod dropout;
pub mod dropping;
pub mod epilogue;
pub mod exponential;
pub mod features;
pub mod first_tiles;
pub mod key_parts;
pub mod mask;
pub mod masking;
pub mod philox;
pub mod query_blocks;
pub mod row_statistics;
pub mod schedule;
pub mod scheduler;
pub mod score;
pub mod sequences;
pub mod shared_tiles;
pub mod softmax;
pub mod tanh;
pub mod total_steps;
pub mod total_tiles;
pub mod visits;
