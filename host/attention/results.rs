//! Memory for results: allocated, and then viewed as contiguous tensors, by the table of the pass.

use std::marker::PhantomData;

use crate::{
    backend::Backend,
    element::Element,
    error::Result,
    operands::{LineRow, Lines, Role, TensorRow, Tensors},
    problem::Problem,
    tensor::Tensor,
};

/// Visitor that allocates memory of a backend for each result: elements `E` for tensors, f32 for lines.
pub(super) struct Allocate<'a, B, E> {
    backend: &'a B,
    problem: &'a Problem,
    elements: PhantomData<E>,
}

impl<'a, B: Backend, E: Element> Allocate<'a, B, E> {
    pub(super) fn new(backend: &'a B, problem: &'a Problem) -> Self {
        Allocate { backend, problem, elements: PhantomData }
    }
}

impl<B: Backend, E: Element> Tensors<()> for Allocate<'_, B, E> {
    type To = B::Buffer<E>;

    fn tensor(&mut self, row: TensorRow, _: Role, (): ()) -> Result<B::Buffer<E>> {
        self.backend.allocate(row.operand, row.len(self.problem)?)
    }
}

impl<B: Backend, E: Element> Lines<()> for Allocate<'_, B, E> {
    type To = B::Buffer<f32>;

    fn line(&mut self, row: LineRow, _: Role, (): ()) -> Result<B::Buffer<f32>> {
        self.backend.allocate(row.operand, (row.len)(self.problem, self.problem.batch))
    }
}

/// Visitor that returns the memory that [`Allocate`] has allocated as contiguous tensors and as lines, for writing.
pub(super) struct View<'a, B, E> {
    problem: &'a Problem,
    elements: PhantomData<(B, E)>,
}

impl<'a, B: Backend, E: Element> View<'a, B, E> {
    pub(super) fn new(problem: &'a Problem) -> Self {
        View { problem, elements: PhantomData }
    }
}

impl<'b, B: Backend, E: Element> Tensors<&'b mut B::Buffer<E>> for View<'_, B, E>
where
    B::Buffer<E>: 'b,
{
    type To = Tensor<B::SliceMut<'b, E>>;

    fn tensor(&mut self, row: TensorRow, _: Role, buffer: &'b mut B::Buffer<E>) -> Result<Self::To> {
        Ok(Tensor::bhsd(B::slice_mut(buffer, 0..row.len(self.problem)?), (row.shape)(self.problem)))
    }
}

impl<'b, B: Backend, E: Element> Lines<&'b mut B::Buffer<f32>> for View<'_, B, E>
where
    B::Buffer<f32>: 'b,
{
    type To = B::SliceMut<'b, f32>;

    fn line(&mut self, row: LineRow, _: Role, buffer: &'b mut B::Buffer<f32>) -> Result<Self::To> {
        Ok(B::slice_mut(buffer, 0..(row.len)(self.problem, self.problem.batch)))
    }
}
