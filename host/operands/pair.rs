//! Pairs of queries and keys, whose products are scores: one pair for plain attention, two for piecewise.

use crate::{error::Operand, tensor::Tensor};

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
}

/// Inputs of a forward pass, with the second pair for a plan of piecewise attention.
#[derive(Clone, Copy, Debug)]
pub struct ForwardInputs<S> {
    pub(crate) q: Tensor<S>,
    pub(crate) k: Tensor<S>,
    pub(crate) second: Option<Pair<Tensor<S>>>,
    pub(crate) v: Tensor<S>,
}

impl<S> ForwardInputs<S> {
    /// Returns the inputs of plain attention.
    pub fn plain(q: Tensor<S>, k: Tensor<S>, v: Tensor<S>) -> Self {
        ForwardInputs { q, k, second: None, v }
    }

    /// Returns the inputs of piecewise attention.
    pub fn piecewise(first: Pair<Tensor<S>>, second: Pair<Tensor<S>>, v: Tensor<S>) -> Self {
        ForwardInputs { q: first.q, k: first.k, second: Some(second), v }
    }

    /// Returns each tensor with its name in errors.
    pub(crate) fn named(&self) -> impl Iterator<Item = (Operand, &Tensor<S>)> {
        let second = self.second.as_ref().map(|Pair { q, k }| [(Operand::Q2, q), (Operand::K2, k)]);
        let first = [(Operand::Q, &self.q), (Operand::K, &self.k), (Operand::V, &self.v)];
        first.into_iter().chain(second.into_iter().flatten())
    }
}

/// Second pair of a piecewise backward pass, and memory for its gradients.
#[derive(Clone, Copy, Debug)]
pub struct SecondTensors<S, M> {
    /// Queries and keys.
    pub inputs: Pair<Tensor<S>>,
    /// Gradients of both.
    pub gradients: Pair<Tensor<M>>,
}
