//! Inputs and outputs of a backward pass, generic over the memory of the machine.

use crate::tensor::Tensor;

/// Inputs of a backward pass: the inputs and results of the forward pass, and the gradients of the results.
///
/// `S` is borrowed memory of 16-bit elements and `L` of f32: `&[E]` and `&[f32]` for [`Cpu`](crate::Cpu), device memory
/// for the GPU backend.
#[derive(Clone, Copy, Debug)]
pub struct BackwardInputs<S, L> {
    /// Queries, (batch, heads_q, seqlen_q, head_dim).
    pub q: Tensor<S>,
    /// Keys, (batch, heads_kv, seqlen_k, head_dim).
    pub k: Tensor<S>,
    /// Values, (batch, heads_kv, seqlen_k, head_dim).
    pub v: Tensor<S>,
    /// O of the forward pass, (batch, heads_q, seqlen_q, head_dim).
    pub o: Tensor<S>,
    /// The gradient of O, (batch, heads_q, seqlen_q, head_dim).
    pub d_o: Tensor<S>,
    /// LSE of the forward pass, f32 (batch, heads_q, seqlen_q), contiguous.
    pub lse: L,
    /// The gradient of the LSE, of the same shape; `None` if nothing depends on the LSE.
    pub d_lse: Option<L>,
}

impl<S, L> BackwardInputs<S, L> {
    /// Converts the memory of each input.
    pub(crate) fn map<T, M>(&self, tensor: impl Fn(&S) -> T, line: impl Fn(&L) -> M) -> BackwardInputs<T, M> {
        let of = |x: &Tensor<S>| Tensor { data: tensor(&x.data), layout: x.layout };
        BackwardInputs {
            q: of(&self.q),
            k: of(&self.k),
            v: of(&self.v),
            o: of(&self.o),
            d_o: of(&self.d_o),
            lse: line(&self.lse),
            d_lse: self.d_lse.as_ref().map(line),
        }
    }
}

/// Gradients of the inputs: memory that a backward pass returns, or tensors that it is to write.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients<T> {
    /// Gradient of Q, (batch, heads_q, seqlen_q, head_dim); 0 for a query that attends to no key.
    pub dq: T,
    /// Gradient of K, (batch, heads_kv, seqlen_k, head_dim), summed over the query heads of a group; 0 for a key that
    /// no query attends to.
    pub dk: T,
    /// Gradient of V, (batch, heads_kv, seqlen_k, head_dim), summed over the query heads of a group; 0 for a key that
    /// no query attends to.
    pub dv: T,
}

impl<T> Gradients<T> {
    /// Applies `f` to each.
    pub(crate) fn map<U>(self, mut f: impl FnMut(T) -> U) -> Gradients<U> {
        Gradients { dq: f(self.dq), dk: f(self.dk), dv: f(self.dv) }
    }
}
