//! NVIDIA Hopper, sm_90a: a fragment is one thread's registers, a product is `wgmma`, a load is the copy engine's.
//!
//! This is the only place with `asm!`. Each file wraps one hardware facility in functions as small as the instruction
//! allows; [`consumer`] and [`producer`] build the two roles of a CTA from them, and [`cta`] deals the roles out.

pub mod backward;
pub mod backward_dq;
pub mod backward_loads;
pub mod barrier;
pub mod consumer;
pub mod cta;
pub mod dropout;
pub mod first_values;
pub mod forward;
pub mod fragment;
pub mod load;
pub mod math;
pub mod named_barrier;
pub mod producer;
pub mod rows;
pub mod store;
pub mod tma;
pub mod total_attention;
pub mod total_offsets;
pub mod total_producer;
pub mod wgmma;
