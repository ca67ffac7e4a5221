//! The CPU executor: the same kernels, a whole tile at a time.
//!
//! A CTA runs on the calling thread, one consumer warpgroup after the other. There are no threads inside it:
//! a consumer that waits for a tile pulls the producer along until it has filled every empty slot of the ring. So runs
//! are deterministic, and a kernel that breaks the pipeline's protocol is a [`pipeline::Fault`] with a name instead of
//! a hang.
//!
//! The entry points in `launch` are not generic, so kernels are compiled in this crate, once. A mainloop is compiled
//! for each tile shape, mask, number of pairs and for dropout; the dtype is a value. What a mainloop calls are loops
//! over slices (`elementwise`, `convert`, `matmul`), which are compiled for each instruction set and not for each
//! tile shape.

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
mod total_attention;
mod warpgroup;

pub use launch::{backward, forward, grid, total_attention};
pub use pipeline::Fault;
pub use rows::{add_parts, finish, prepare};
pub use warpgroup::CpuWarpgroup;
