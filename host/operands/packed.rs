//! Packed tensors: queries, keys and values in one tensor, one after the other along the heads.
//!
//! A tensor (…, seqlen, 3, heads, head_dim) is one of 3·heads heads, of which the first third is Q, the next K and the
//! last V ([`Tensor::packed`]). For reading, each is a view ([`Tensor::heads`]). For writing, a backward pass takes the
//! packed tensor as a whole, because its parts lie between each other, and Rust lends no two parts of a slice that do.

use std::ops::Range;

use super::pass::{Lines, Role, Tensors, rows};
use super::{BackwardInputs, BackwardPair, BackwardTensors, Pair, RawBackward, RawTensor};
use crate::error::{Error, Result};
use crate::plan::BackwardPlan;
use crate::problem::{ELEMENT_BYTES, Problem};
use crate::tensor::{Layout, Tensor};

/// Memory whose first elements can be left out.
pub trait Skip: sealed::Sealed {
    /// Returns the memory from element `start` on, or none of it if there are fewer.
    fn skip(self, start: usize) -> Self;
}

impl<T> Skip for &[T] {
    fn skip(self, start: usize) -> Self {
        self.get(start..).unwrap_or_default()
    }
}

mod sealed {
    /// Restricts implementations of [`Skip`](super::Skip) to this crate.
    pub trait Sealed {}
    impl<T> Sealed for &[T] {}
    #[cfg(feature = "cuda")]
    impl<T> Sealed for crate::cuda::DeviceSlice<'_, T> {}
}

impl<S> Tensor<S> {
    /// Returns a contiguous tensor (batch, seqlen, parts, heads, head_dim), as one of parts · heads heads: packed Q, K
    /// and V of three parts, or K and V of two.
    ///
    /// ```
    /// use ferroflash::{Attention, Cpu, Dtype, Problem, Tensor, bf16};
    ///
    /// let problem =
    ///     Problem { batch: 2, heads_q: 4, heads_kv: 4, seqlen_q: 50, seqlen_k: 50, head_dim: 64, dtype: Dtype::Bf16 };
    /// let x: Vec<bf16> = (0..2 * 50 * 3 * 4 * 64).map(|i| bf16::from_f32((i as f32).sin())).collect();
    /// let qkv = Tensor::packed(&x[..], 3, problem.q_shape());
    /// let out = Attention::new(problem).forward(&Cpu, qkv.heads(0..4), qkv.heads(4..8), qkv.heads(8..12))?;
    /// assert_eq!(out.o.len(), 2 * 4 * 50 * 64);
    /// # Ok::<(), ferroflash::Error>(())
    /// ```
    ///
    /// `shape` is that of one part, (batch, heads, seqlen, head_dim).
    pub fn packed(data: S, parts: usize, shape: [usize; 4]) -> Self {
        let [batch, heads, seqlen, head_dim] = shape;
        Tensor::bshd(data, [batch, parts.saturating_mul(heads), seqlen, head_dim])
    }

    /// Returns a view of some heads. It is empty if the tensor has fewer.
    pub fn heads(self, heads: Range<usize>) -> Self
    where
        S: Skip,
    {
        let [batch, all, seqlen, head_dim] = self.layout.shape;
        let heads = if heads.start <= heads.end && heads.end <= all { heads } else { 0..0 };
        let start = if heads.is_empty() { 0 } else { self.layout.offset(0, heads.start, 0) };
        let layout = Layout { shape: [batch, heads.len(), seqlen, head_dim], ..self.layout };
        Tensor { data: self.data.skip(start), layout }
    }
}

/// Gradients that are written into a packed tensor. `T` is for 16-bit elements and `M` for f32.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedGradients<T, M> {
    /// Gradient of Q; `None` if it is packed too.
    pub dq: Option<T>,
    /// Gradients of K and V, (batch, 2·heads_kv, seqlen_k, head_dim); or of Q, K and V, (batch, heads_q + 2·heads_kv,
    /// seqlen_k, head_dim), for as many queries as keys.
    pub packed: T,
    /// Gradient of the sinks, f32 (heads_q); `None` if there are no sinks, or to omit it.
    pub d_sinks: Option<M>,
}

impl<T, M> PackedGradients<T, M> {
    /// Returns the gradients of packed Q, K and V, without that of sinks.
    pub fn qkv(packed: T) -> Self {
        PackedGradients { dq: None, packed, d_sinks: None }
    }

    /// Returns the gradient of Q, and those of packed K and V, without that of sinks.
    pub fn kv(dq: T, packed: T) -> Self {
        PackedGradients { dq: Some(dq), packed, d_sinks: None }
    }

    /// Checks and lowers a backward pass that writes these gradients, as [`BackwardTensors::lower`] does.
    pub(crate) fn lower<S, L, X>(
        self,
        inputs: BackwardInputs<S, L>,
        plan: &BackwardPlan,
        dtype: kernels_gpu::variants::Dtype,
        visitor: &mut X,
    ) -> Result<RawBackward>
    where
        X: Tensors<Tensor<S>, To = RawTensor> + Lines<L, To = u64>,
        X: Tensors<T, To = RawTensor> + Lines<M, To = u64>,
        X: Tensors<(), To = ()> + Lines<(), To = ()>,
    {
        let problem = plan.problem();
        let without = BackwardTensors::inputs(inputs, None);
        let BackwardTensors { q, k, second, v, o, d_o, lse, d_lse, optional, .. } =
            without.lower(plan, dtype, visitor)?;
        let (dq, first_key) = match self.dq {
            Some(dq) => (Some(visitor.tensor(rows::DQ, Role::Output, dq)?), 0),
            None => (None, problem.heads_q),
        };
        if dq.is_none() && problem.seqlen_q != problem.seqlen_k {
            return Err(Error::PackedLengths { seqlen_q: problem.seqlen_q, seqlen_k: problem.seqlen_k });
        }
        let row = if dq.is_some() { rows::DKV } else { rows::DQKV };
        let packed = visitor.tensor(row, Role::Output, self.packed)?;
        let part = |first: usize, heads: usize| heads_of(&packed, first, heads);
        Ok(BackwardTensors {
            q,
            k,
            // A packed tensor has one pair of Q and K.
            second: second
                .map(|BackwardPair { inputs, .. }| BackwardPair { inputs, gradients: Pair { q: packed, k: packed } }),
            v,
            o,
            d_o,
            lse,
            d_lse,
            optional,
            dq: dq.unwrap_or_else(|| part(0, problem.heads_q)),
            dk: part(first_key, problem.heads_kv),
            dv: part(first_key + problem.heads_kv, problem.heads_kv),
            d_sinks: visitor.optional_line(rows::D_SINKS, Role::Output, self.d_sinks)?,
            workspace: 0,
            workspace_bytes: 0,
        })
    }
}

/// Returns some heads of a tensor that was checked.
fn heads_of(tensor: &RawTensor, first: usize, heads: usize) -> RawTensor {
    let Layout { shape: [batch, _, seqlen, head_dim], strides } = tensor.layout;
    let offset = first.wrapping_mul(tensor.layout.lowered_strides()[1]).wrapping_mul(ELEMENT_BYTES);
    let layout = Layout { shape: [batch, heads, seqlen, head_dim], strides };
    RawTensor { address: tensor.address.wrapping_add(offset as u64), layout }
}

/// Shape of the gradients of packed Q, K and V.
pub(super) fn qkv_shape(problem: &Problem) -> [usize; 4] {
    let heads = problem.heads_q.saturating_add(problem.heads_kv.saturating_mul(2));
    [problem.batch, heads, problem.seqlen_k, problem.head_dim]
}

/// Shape of the gradients of packed K and V.
pub(super) fn kv_shape(problem: &Problem) -> [usize; 4] {
    [problem.batch, problem.heads_kv.saturating_mul(2), problem.seqlen_k, problem.head_dim]
}
