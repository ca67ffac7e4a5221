//! The native half of the Python package: torch tensors in, kernels launched, torch tensors out.
//!
//! A function here reads its tensors through their Python attributes, so that no libtorch is linked and any torch
//! version is served. It checks them, allocates results with torch, plans, and runs on the tensors' device: the CPU, or
//! a GPU on torch's current stream. The interpreter's lock is released while a pass runs or is launched.
//!
//! The functions are the package's own: `python/ferroflash/ops.py` has those for users.

#![deny(unsafe_code)]

mod backward;
mod dropout;
mod error;
mod forward;
#[cfg_attr(not(feature = "cuda"), path = "no_gpu.rs")]
mod gpu;
mod lengths;
mod machine;
mod optional;
mod settings;
mod tensor;
mod torch;
mod total_attention;

use pyo3::pymodule;

/// Native functions of the package; see `_native.pyi`.
#[pymodule]
mod _native {
    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "Python's name of it")]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    #[pymodule_export]
    use crate::{
        backward::backward,
        dropout::dropout_mask,
        forward::forward,
        machine::{device_count, kernel_count},
        total_attention::total_attention,
    };
}
