//! CPU executor: runs the kernels of the GPU, a whole tile at a time.
//!
//! A CTA runs on the calling thread, one consumer warpgroup after the other, without threads inside it. A consumer that
//! waits for a tile advances the producer until it has filled every empty slot of the ring. So runs are deterministic.
//! A kernel that breaks the pipeline's protocol raises a [`pipeline::Fault`] with a name instead of a hang.
//!
//! The tables in `variants` hold the entry points of `launch`, so kernels are compiled in this crate, once. A mainloop
//! is compiled for each tile shape and type of features; masks and the dtype are values. Mainloops call loops over
//! slices (`elementwise`, `convert`, `matmul`). Those are compiled for each instruction set and not for each tile
//! shape.

mod backward;
mod convert;
mod dropout;
mod elementwise;
mod exp2;
mod forward;
mod fragment;
mod isa;
mod launch;
mod matmul;
mod memory;
mod pipeline;
mod rows;
mod schedule;
mod sink_gradients;
mod total_attention;
mod warpgroup;

pub use dropout::mask_rows;
pub use launch::{backward_by_gradients, backward_by_keys, forward, total_attention};
pub use pipeline::Fault;
pub use rows::{add_parts, finish, prepare};
pub use schedule::schedule;
pub use sink_gradients::sink_gradient;
pub use warpgroup::CpuWarpgroup;
