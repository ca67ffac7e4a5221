//! Memory of a case on a backend: copies of its inputs and guarded outputs, made by the table of the pass.

use std::marker::PhantomData;

use super::guarded::{Guarded, GuardedLine};
use super::{BackwardData, Case};
use crate::backend::Backend;
use crate::element::Element;
use crate::error::Result;
use crate::operands::{
    BackwardPair, BackwardTensors, LineRow, Lines, OptionalInputs, Pair, Role, Slopes, TensorRow, Tensors,
};
use crate::tensor::{Layout, Tensor};

/// Inputs of a case in host memory, each in the case's layout.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a, E> {
    pub(super) q: &'a [E],
    pub(super) k: &'a [E],
    pub(super) v: &'a [E],
    pub(super) second: Option<SecondInputs<'a, E>>,
}

/// Second pair of a piecewise case.
#[derive(Clone, Copy)]
pub(super) struct SecondInputs<'a, E> {
    pub(super) pair: Pair<&'a [E]>,
    pub(super) dist_threshold: i32,
}

impl<'a, E> Inputs<'a, E> {
    /// Returns the inputs of plain attention.
    pub(super) fn plain([q, k, v]: &'a [Vec<E>; 3]) -> Self {
        Inputs { q, k, v, second: None }
    }

    /// Returns Q1, K1, Q2, K2 and V of piecewise attention.
    pub(super) fn piecewise([q, k, q2, k2, v]: &'a [Vec<E>; 5], dist_threshold: i32) -> Self {
        Inputs { q, k, v, second: Some(SecondInputs { pair: Pair { q: q2, k: k2 }, dist_threshold }) }
    }

    /// Adds the other inputs of a backward pass, and outputs for the gradients.
    pub(super) fn backward<const INPUTS: usize>(
        self,
        data: &'a BackwardData<E, INPUTS>,
        optional: OptionalInputs<&'a [f32]>,
    ) -> BackwardTensors<&'a [E], &'a [f32], Output<E>, Output<f32>> {
        let gradients = Pair { q: Output::new(), k: Output::new() };
        BackwardTensors {
            q: self.q,
            k: self.k,
            second: self.second.map(|second| BackwardPair { inputs: second.pair, gradients }),
            v: self.v,
            o: &data.o,
            d_o: &data.d_o,
            lse: &data.lse,
            d_lse: data.d_lse.as_deref(),
            optional,
            dq: Output::new(),
            dk: Output::new(),
            dv: Output::new(),
            d_sinks: optional.sinks.map(|_| Output::new()),
            workspace: 0,
            workspace_bytes: 0,
        }
    }
}

/// Returns optional inputs in a backend's memory for reading.
pub(super) fn optional_of<B: Backend>(uploaded: &OptionalInputs<B::Buffer<f32>>) -> OptionalInputs<B::Slice<'_, f32>> {
    OptionalInputs {
        slopes: uploaded.slopes.as_ref().map(slopes_of::<B>),
        sinks: uploaded.sinks.as_ref().map(B::slice),
        seed_offset: uploaded.seed_offset.as_ref().map(|numbers| numbers.as_ref().map(B::slice)),
        lengths: uploaded.lengths.as_ref().map(|lengths| lengths.map_ref(B::slice)),
    }
}

/// Returns slopes in a backend's memory for reading.
pub(super) fn slopes_of<B: Backend>(uploaded: &Slopes<B::Buffer<f32>>) -> Slopes<B::Slice<'_, f32>> {
    match uploaded {
        Slopes::PerHead(slopes) => Slopes::PerHead(B::slice(slopes)),
        Slopes::PerItem(slopes) => Slopes::PerItem(B::slice(slopes)),
    }
}

/// An output of elements `T`, for which [`Upload`] makes guarded memory.
pub(super) struct Output<T>(PhantomData<T>);

impl<T> Output<T> {
    pub(super) fn new() -> Self {
        Output(PhantomData)
    }
}

/// A tensor in memory of a backend.
pub(super) struct Uploaded<B: Backend, E: Element> {
    buffer: B::Buffer<E>,
    layout: Layout,
}

impl<B: Backend, E: Element> Uploaded<B, E> {
    /// Returns the tensor for reading.
    pub(super) fn tensor(&self) -> Tensor<B::Slice<'_, E>> {
        Tensor { data: B::slice(&self.buffer), layout: self.layout }
    }
}

/// Visitor that uploads the inputs of a case, and makes guarded memory for its outputs.
pub(super) struct Upload<'a, B> {
    backend: &'a B,
    case: &'a Case,
}

impl<'a, B> Upload<'a, B> {
    pub(super) fn new(backend: &'a B, case: &'a Case) -> Self {
        Upload { backend, case }
    }

    fn layout(&self, row: TensorRow) -> Layout {
        self.case.layout((row.shape)(&self.case.problem))
    }
}

impl<B: Backend, E: Element> Tensors<&[E]> for Upload<'_, B> {
    type To = Uploaded<B, E>;

    fn tensor(&mut self, row: TensorRow, _: Role, from: &[E]) -> Result<Uploaded<B, E>> {
        Ok(Uploaded { buffer: self.backend.upload(row.operand, from)?, layout: self.layout(row) })
    }
}

impl<B: Backend, E: Element> Tensors<Output<E>> for Upload<'_, B> {
    type To = Guarded<B, E>;

    fn tensor(&mut self, row: TensorRow, _: Role, _: Output<E>) -> Result<Guarded<B, E>> {
        Guarded::new(self.backend, row.operand, self.layout(row))
    }
}

impl<B: Backend> Lines<&[f32]> for Upload<'_, B> {
    type To = B::Buffer<f32>;

    fn line(&mut self, row: LineRow, _: Role, from: &[f32]) -> Result<B::Buffer<f32>> {
        self.backend.upload(row.operand, from)
    }
}

impl<B: Backend> Lines<Output<f32>> for Upload<'_, B> {
    type To = GuardedLine<B>;

    fn line(&mut self, row: LineRow, _: Role, _: Output<f32>) -> Result<GuardedLine<B>> {
        GuardedLine::new(self.backend, row.operand, (row.len)(&self.case.problem, self.case.items()))
    }
}
