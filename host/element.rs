//! The element types of tensors, which kernels compute with and which may be copied between machines as plain data.

use bytemuck::Pod;
use half::{bf16, f16};
use kernels_gpu::element::Element as KernelElement;

/// A 16-bit floating-point element, [`f16`](struct@f16) or [`bf16`]; products accumulate in f32.
pub trait Element: KernelElement + Pod {}

impl Element for f16 {}
impl Element for bf16 {}
