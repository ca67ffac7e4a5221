//! The kernels, in the paper's notation.

pub mod backward;
pub mod backward_gradients;
pub mod forward;
pub mod total_attention;
