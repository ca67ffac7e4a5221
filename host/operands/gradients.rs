//! Inputs and outputs of a backward pass, generic over the memory of the machine.

use super::OptionalInputs;
use super::pass::{Lines, Pass, Role, Tensors, Visited, VisitedLine, rows};
use crate::{error::Result, tensor::Tensor};

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
    /// Slopes, sinks, and seed and offset of dropout of the forward pass.
    pub optional: OptionalInputs<L>,
}

/// Gradients of the inputs: memory that a backward pass returns, or tensors that it is to write. `T` is for 16-bit
/// elements and `M` for f32.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients<T, M> {
    /// Gradient of Q, (batch, heads_q, seqlen_q, head_dim); 0 for a query that attends to no key.
    pub dq: T,
    /// Gradient of K, (batch, heads_kv, seqlen_k, head_dim), summed over the query heads of a group; 0 for a key that
    /// no query attends to.
    pub dk: T,
    /// Gradient of V, (batch, heads_kv, seqlen_k, head_dim), summed over the query heads of a group; 0 for a key that
    /// no query attends to.
    pub dv: T,
    /// Gradient of the sinks, f32 (heads_q), summed over batch items and queries; `None` if there are no sinks, or to
    /// omit it.
    pub d_sinks: Option<M>,
}

impl<T, M> Gradients<T, M> {
    /// Borrows each for writing.
    pub(crate) fn as_mut(&mut self) -> Gradients<&mut T, &mut M> {
        let d_sinks = self.d_sinks.as_mut();
        Gradients { dq: &mut self.dq, dk: &mut self.dk, dv: &mut self.dv, d_sinks }
    }
}

impl<O, M, X: Tensors<O> + Lines<M>> Pass<X> for Gradients<O, M> {
    type Of = Gradients<Visited<X, O>, VisitedLine<X, M>>;

    fn visit(self, visitor: &mut X) -> Result<Self::Of> {
        Ok(Gradients {
            dq: visitor.tensor(rows::DQ, Role::Output, self.dq)?,
            dk: visitor.tensor(rows::DK, Role::Output, self.dk)?,
            dv: visitor.tensor(rows::DV, Role::Output, self.dv)?,
            d_sinks: visitor.optional_line(rows::D_SINKS, Role::Output, self.d_sinks)?,
        })
    }
}
