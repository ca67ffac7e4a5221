//! Pairs of queries and keys, whose products are scores: one pair for plain attention, two for piecewise.

use super::{
    RawTensor,
    pass::{Pass, Role, TensorRow, Tensors, Visited, rows},
};
use crate::{error::Result, tensor::Tensor};

/// One value for queries and one for keys: the tensors whose products are scores, or their gradients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pair<T> {
    /// Value for the queries.
    pub q: T,
    /// Value for the keys.
    pub k: T,
}

impl<T> Pair<T> {
    /// Applies `f` to each.
    pub(crate) fn map<U>(self, mut f: impl FnMut(T) -> U) -> Pair<U> {
        Pair { q: f(self.q), k: f(self.k) }
    }

    /// Borrows both.
    pub(crate) fn as_ref(&self) -> Pair<&T> {
        Pair { q: &self.q, k: &self.k }
    }

    /// Borrows both for writing.
    pub(crate) fn as_mut(&mut self) -> Pair<&mut T> {
        Pair { q: &mut self.q, k: &mut self.k }
    }
}

/// Second pair of piecewise attention in a backward pass: its tensors, and its gradients to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackwardPair<T, O> {
    /// Queries, (batch, heads_q, seqlen_q, head_dim), and keys, (batch, heads_kv, seqlen_k, head_dim).
    pub inputs: Pair<T>,
    /// Gradients of both, of the same shapes.
    pub gradients: Pair<O>,
}

/// Second pair of a backward pass, named by addresses.
pub type RawSecond = BackwardPair<RawTensor, RawTensor>;

/// Second pair of a backward pass: tensors in memory of the machine.
pub type SecondTensors<S, M> = BackwardPair<Tensor<S>, Tensor<M>>;

/// Rows of the second pair.
pub(super) const SECOND: Pair<TensorRow> = Pair { q: rows::Q2, k: rows::K2 };
/// Rows of the second pair's gradients.
const SECOND_GRADIENTS: Pair<TensorRow> = Pair { q: rows::DQ2, k: rows::DK2 };

/// Gradients of the second pair of Q and K.
pub(crate) struct SecondGradients<O>(pub(crate) Pair<O>);

impl<O, X: Tensors<O>> Pass<X> for SecondGradients<O> {
    type Of = Pair<Visited<X, O>>;

    fn visit(self, visitor: &mut X) -> Result<Self::Of> {
        visitor.pair(SECOND_GRADIENTS, Role::Output, self.0)
    }
}

impl<T, O, X: Tensors<T> + Tensors<O>> Pass<X> for BackwardPair<T, O> {
    type Of = BackwardPair<Visited<X, T>, Visited<X, O>>;

    fn visit(self, visitor: &mut X) -> Result<Self::Of> {
        Ok(BackwardPair {
            inputs: visitor.pair(SECOND, Role::Input, self.inputs)?,
            gradients: SecondGradients(self.gradients).visit(visitor)?,
        })
    }
}
