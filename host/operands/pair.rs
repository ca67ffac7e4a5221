//! Queries and keys that scores are made of: one pair for plain attention, two for piecewise.

use crate::{error::Operand, tensor::Tensor};

/// A thing of queries and the same of keys: the tensors whose products are scores, or their gradients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pair<T> {
    /// That of the queries.
    pub q: T,
    /// That of the keys.
    pub k: T,
}

impl<T> Pair<T> {
    /// `f` of each.
    pub(crate) fn map<U>(self, mut f: impl FnMut(T) -> U) -> Pair<U> {
        Pair { q: f(self.q), k: f(self.k) }
    }

    /// Both by reference.
    pub(crate) fn as_ref(&self) -> Pair<&T> {
        Pair { q: &self.q, k: &self.k }
    }
}

/// The inputs of a forward pass; the second pair for a plan of piecewise attention.
#[derive(Clone, Copy, Debug)]
pub struct ForwardInputs<S> {
    pub(crate) q: Tensor<S>,
    pub(crate) k: Tensor<S>,
    pub(crate) second: Option<Pair<Tensor<S>>>,
    pub(crate) v: Tensor<S>,
}

impl<S> ForwardInputs<S> {
    /// Those of plain attention.
    pub fn plain(q: Tensor<S>, k: Tensor<S>, v: Tensor<S>) -> Self {
        ForwardInputs { q, k, second: None, v }
    }

    /// Those of piecewise attention.
    pub fn piecewise(first: Pair<Tensor<S>>, second: Pair<Tensor<S>>, v: Tensor<S>) -> Self {
        ForwardInputs { q: first.q, k: first.k, second: Some(second), v }
    }

    /// Each with what errors call it.
    pub(crate) fn named(&self) -> impl Iterator<Item = (Operand, &Tensor<S>)> {
        let second = self.second.as_ref().map(|Pair { q, k }| [(Operand::Q2, q), (Operand::K2, k)]);
        let first = [(Operand::Q, &self.q), (Operand::K, &self.k), (Operand::V, &self.v)];
        first.into_iter().chain(second.into_iter().flatten())
    }
}

/// The second pair of a piecewise backward pass, and memory for its gradients.
#[derive(Clone, Copy, Debug)]
pub struct SecondTensors<S, M> {
    /// Queries and keys.
    pub inputs: Pair<Tensor<S>>,
    /// Their gradients.
    pub gradients: Pair<Tensor<M>>,
}
