//! Exact attention for NVIDIA GPUs, in Rust from the kernel to the command line.
//!
//! ferroflash computes O = softmax(scale · Q·Kᵀ + mask) · V and its log-sum-exp, exactly, in memory that grows with the
//! sequence and not with its square (FlashAttention-2, arXiv 2307.08691; FlashAttention-3, arXiv 2407.08608). A kernel
//! is an ordinary generic Rust function over a small tile algebra. rustc compiles it to PTX for the GPU, and the same
//! function to native code for the CPU, where it is tested.
//!
//! ```
//! use ferroflash::{Attention, Cpu, Dtype, Mask, Problem, Tensor, bf16};
//!
//! let problem =
//!     Problem { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 100, seqlen_k: 150, head_dim: 64, dtype: Dtype::Bf16 };
//! let elements = |shape: [usize; 4], seed: f32| -> Vec<bf16> {
//!     (0..shape.iter().product::<usize>()).map(|i| bf16::from_f32((i as f32 * seed).sin())).collect()
//! };
//! let (q, k, v) =
//!     (elements(problem.q_shape(), 1.7), elements(problem.kv_shape(), 2.3), elements(problem.kv_shape(), 3.1));
//!
//! let out = Attention::new(problem).mask(Mask::Causal).forward(
//!     &Cpu,
//!     Tensor::bhsd(&q, problem.q_shape()),
//!     Tensor::bhsd(&k, problem.kv_shape()),
//!     Tensor::bhsd(&v, problem.kv_shape()),
//! )?;
//!
//! assert_eq!(out.o.len(), 2 * 4 * 100 * 64); // (batch, heads_q, seqlen_q, head_dim)
//! let lse = out.lse.expect("returned unless omitted");
//! assert_eq!(lse.len(), 2 * 4 * 100); // (batch, heads_q, seqlen_q)
//! assert!(lse.iter().all(|x| x.is_finite()));
//! # Ok::<(), ferroflash::Error>(())
//! ```
//!
//! # Terms
//! - **Shapes** are (batch, heads, seqlen, head_dim) for every tensor, in any stride order with a contiguous head_dim
//!   ([`Layout`]): [`Tensor::bhsd`], [`Tensor::bshd`], or [`Tensor::strided`] for a part of a packed tensor. Strides
//!   count elements.
//! - **Dtypes** are [`f16`](struct@f16) and [`bf16`]; scores, softmax, accumulators and LSE are f32. Head dims are the
//!   multiples of 8 up to 256.
//! - **Grouped heads**: query head h reads key head h / (heads_q / heads_kv).
//! - **Causal** is aligned to the bottom right: query i attends to key j if j ≤ i + seqlen_k − seqlen_q, so the last
//!   query attends to every key. PyTorch's `is_causal` is aligned to the top left, which differs if the lengths do.
//! - **Rows without a key**, by the mask or because seqlen_k is 0, give O = 0 and LSE = −∞, never NaN; with
//!   sinks LSE = sink.
//! - **Softcap** ([`Attention::softcap`]) bounds scores. **ALiBi** and **sinks** are inputs ([`Inputs::slopes`],
//!   [`Inputs::sinks`]). The order is scale, softcap, ALiBi, mask, softmax with the sink, dropout. The LSE includes all
//!   but dropout.
//! - **Dropout** ([`Attention::dropout`]) drops weights after the softmax. Its random numbers are a function of seed,
//!   offset, head, query and key, so both passes drop the same weights on every machine. Seed and offset are fixed, or
//!   an input that kernels read ([`Inputs::seed_offset`]), so that a captured graph draws again. The LSE includes all
//!   weights.
//! - **Gradients** ([`Attention::backward`]) have the inputs' dtype and are accumulated in f32. [`Determinism`] selects
//!   whether dQ has the same bits on every run.
//! - **LSE** is the natural logarithm of the sum of the exponentials of the scaled scores.
//! - **Total attention** ([`Attention::total_attention`]) is the weight that each key got from all queries, f32 (batch,
//!   heads_q, seqlen_k).
//! - **Errors**: every mistake that a caller can make is an [`Error`] that names the field, its value and what is
//!   allowed, before anything is launched. The library does not panic.
//!
//! # Backends
//! [`Cpu`] runs everywhere, on [rayon](https://docs.rs/rayon)'s threads. With the feature `cuda`, `Cuda` runs the same
//! kernels on a GPU of compute capability 9.0. It takes slices of device memory or, for frameworks, raw device pointers
//! ([`RawForward`], [`RawBackward`], [`RawTotalAttention`]). Raw calls run on the caller's stream, without allocation
//! or synchronisation.
//!
//! # Where things are
//! [`Problem`] and [`Mask`] define the computation. [`Plan`], [`BackwardPlan`] and [`TotalPlan`] describe its execution
//! (kernel, tiles, grid); they are pure and printable. [`Attention`] is the entry point. [`mod@reference`] is the f64
//! oracle that both backends are tested against.

#![deny(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]

mod attention;
pub mod backend;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cases;
mod dropout;
mod element;
mod error;
mod lengths;
mod operands;
mod overlap;
mod plan;
mod problem;
pub mod reference;
mod tensor;

pub use attention::{Attention, Lse, Output, Piecewise, PiecewiseGradients, Plans};
#[cfg(feature = "cuda")]
pub use backend::cuda::{self, Cuda};
pub use backend::{Backend, Workspace, cpu::Cpu};
pub use bytemuck::Pod;
pub use dropout::{Dropout, PlanDropout, dropout_mask, dropout_mask_into};
pub use element::Element;
pub use error::{Dim, Error, Operand, Result};
pub use half::{bf16, f16};
pub use kernels_gpu::variants::{
    BACKWARD_VARIANTS, BackwardVariant, Dtype, Op, TOTAL_VARIANTS, TotalVariant, VARIANTS, Variant,
};
pub use lengths::{Integers, Lengths, Places, PlacesKind, Sequences};
pub use operands::{
    AddressSpace, BackwardInputs, BackwardPair, BackwardTensors, ForwardTensors, Gradients, Inputs, OptionalInputs,
    PackedGradients, Pair, RawBackward, RawForward, RawSecond, RawTensor, RawTotalAttention, SecondTensors, SeedOffset,
    Skip, Slopes, TotalInputs, TotalTensors,
};
pub use plan::{Alibi, BackwardPlan, Determinism, InputKinds, Needs, Options, PassKind, Plan, Sinks, TotalPlan};
pub use problem::{Mask, Problem};
pub use tensor::{Layout, Tensor};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(doctest)]
#[doc = include_str!("../docs/options.md")]
struct OptionsPage;
