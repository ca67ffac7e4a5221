//! NVIDIA Hopper, sm_90a: a fragment is one thread's registers, a product is `wgmma`, a load is TMA
//! (`cp.async.bulk.tensor`).
//!
//! `asm!` is here and in `arch/bytes.rs` alone. Each file wraps one hardware facility in functions as small as the
//! instruction allows. [`consumer`] and [`producer`] build the two roles of a CTA from them, and [`cta`] assigns the
//! roles to warpgroups (warp specialization).
//!
//! SAFETY comments cite these invariants:
//!
//! - I1: barriers are initialised. One thread has initialised every mbarrier, and all threads have synchronised since
//!   (`cta::init_barriers`), before warp specialization begins.
//! - I2: the slot is full. Its full barrier has been waited for, or a later barrier that implies it. The slot is not
//!   released before the last read of it, nor before a product that reads it has been waited for.
//! - I3: the slot is empty. Its empty barrier has been waited for, or a later barrier that implies it. No other thread
//!   accesses the slot until its full barrier completes the phase.
//! - I4: the warp is converged. All 32 lanes execute the instruction together.
//! - I5: the host has checked the tensors and the arrays, and has made the workspace large enough. All rows below the
//!   sequence length and all columns below the head dim lie within them.
//! - I6: no other thread, warp or warpgroup accesses the rows, columns or words that are written here.

pub mod backward;
pub mod backward_dq;
pub mod backward_loads;
pub mod barrier;
pub mod consumer;
pub mod cta;
pub mod dropout;
pub mod dropout_mask;
pub mod first_values;
pub mod forward;
pub mod fragment;
pub mod load;
pub mod math;
pub mod named_barrier;
pub mod producer;
pub mod rows;
pub mod schedule;
pub mod scores;
pub mod sink_gradients;
pub mod store;
pub mod tma;
pub mod total_attention;
pub mod total_neg_lse_log2;
pub mod total_producer;
pub mod wgmma;
