//! Exact attention for [candle](https://docs.rs/candle-core), with gradients, on NVIDIA GPUs and on the CPU.
//!
//! - [`FlashAttn`] has every option.
//! - [`flash_attn`] and the functions beginning with its name are those of the crate candle-flash-attn, and
//!   [`flash_attn_with_lse`] is one in their manner.
//! - The functions for sequences of different lengths exist too, so that a program compiles with either crate. What
//!   ferroflash does not support so far is an error that names the argument.
//!
//! Tensors have the shape (batch, seqlen, heads, head_dim), and the dtype F16 or BF16. With the feature `cuda` they may
//! be on a GPU of compute capability 9.0; candle then compiles its own CUDA kernels, with nvcc.
//!
//! ```
//! use candle_core::{DType, Device, Tensor, Var};
//! use ferroflash_candle::flash_attn;
//!
//! let random = |shape| Tensor::randn(0f32, 1., shape, &Device::Cpu)?.to_dtype(DType::BF16);
//! let q = Var::from_tensor(&random((2, 100, 8, 64))?)?;
//! let (k, v) = (random((2, 100, 2, 64))?, random((2, 100, 2, 64))?);
//!
//! let o = flash_attn(&q, &k, &v, 1. / 8., true)?;
//! let gradients = o.to_dtype(DType::F32)?.sqr()?.mean_all()?.backward()?;
//! assert_eq!(gradients.get(&q).unwrap().dims(), q.dims());
//! # Ok::<(), candle_core::Error>(())
//! ```

#![deny(missing_docs)]
#![deny(unsafe_code)]

mod flash;
mod functions;
mod lse;
#[allow(unsafe_code)]
mod machine;
mod op;
mod optional;
mod passed;
mod shapes;
mod sinks;
mod unsupported;

pub use ferroflash::{Determinism, Dropout, Mask};
pub use flash::FlashAttn;
pub use functions::{
    flash_attn, flash_attn_alibi, flash_attn_alibi_windowed, flash_attn_alibi_windowed_softcap, flash_attn_windowed,
    flash_attn_with_lse,
};
pub use unsupported::{
    flash_attn_varlen, flash_attn_varlen_alibi, flash_attn_varlen_alibi_windowed,
    flash_attn_varlen_alibi_windowed_softcap, flash_attn_varlen_paged_windowed, flash_attn_varlen_windowed,
};

#[cfg(doctest)]
#[doc = include_str!("../../../docs/candle.md")]
struct Page;
