//! Mainloops of the kernels, in the papers' notation.

pub mod backward;
pub mod backward_gradients;
pub mod forward;
pub mod total_attention;
