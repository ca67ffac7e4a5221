//! The kernels, in the paper's notation.

pub mod forward;
