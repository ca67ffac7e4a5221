//! The machines that run a [`Plan`], a [`BackwardPlan`] or a [`TotalPlan`]: what they have in common.
//!
//! A backend checks the tensors against the plan (in `operands`, the same rules for all), then runs the plan's kernels
//! over its work tiles. Call it through [`Attention`](crate::Attention).

use std::ops::Range;

use kernels_gpu::element::Element;

use crate::{
    error::{Operand, Result},
    operands::{BackwardInputs, ForwardInputs, Gradients, Pair, SecondTensors},
    plan::{BackwardPlan, Plan, TotalPlan},
    tensor::Tensor,
};

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;

/// A machine that runs attention. The crate implements it for each; others can't.
pub trait Backend: sealed::Sealed {
    /// Borrowed elements.
    type Slice<'a, T: Copy + Send + Sync + 'static>: Copy;
    /// Mutably borrowed elements.
    type SliceMut<'a, T: Copy + Send + Sync + 'static>;
    /// Owned elements.
    type Buffer<T: Copy + Send + Sync + 'static>;

    /// How many CTAs run at once, each on a multiprocessor: threads on the CPU.
    fn sm_count(&self) -> u32;

    /// Allocates `len` elements, each `fill` where the memory must hold something; `operand` is what errors call it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory); those of the machine.
    fn allocate<T: Copy + Send + Sync + 'static>(
        &self,
        operand: Operand,
        len: usize,
        fill: T,
    ) -> Result<Self::Buffer<T>>;

    /// A buffer with a copy of host memory; `operand` is what errors call it.
    ///
    /// # Errors
    /// As [`Backend::allocate`].
    fn upload<T: Copy + Send + Sync + 'static>(&self, operand: Operand, from: &[T]) -> Result<Self::Buffer<T>>;

    /// A buffer's content, once everything that was started before has run.
    ///
    /// # Errors
    /// Those of the machine.
    fn download<T: Copy + Send + Sync + 'static>(&self, from: &Self::Buffer<T>) -> Result<Vec<T>>;

    /// All of a buffer.
    fn slice<T: Copy + Send + Sync + 'static>(buffer: &Self::Buffer<T>) -> Self::Slice<'_, T>;

    /// A range of a buffer, empty where the buffer does not have it.
    fn slice_mut<T: Copy + Send + Sync + 'static>(
        buffer: &mut Self::Buffer<T>,
        range: Range<usize>,
    ) -> Self::SliceMut<'_, T>;

    /// Checks the inputs of a forward pass by themselves, before memory for its results is allocated.
    ///
    /// # Errors
    /// Every error that names `q`, `k` or `v`.
    fn check_inputs<E: Element>(&self, plan: &Plan, inputs: &ForwardInputs<Self::Slice<'_, E>>) -> Result<()>;

    /// Runs a forward plan; see [`Attention::forward_into`](crate::Attention::forward_into).
    ///
    /// # Errors
    /// As there.
    fn forward_into<E: Element>(
        &self,
        plan: &Plan,
        inputs: ForwardInputs<Self::Slice<'_, E>>,
        o: Tensor<Self::SliceMut<'_, E>>,
        lse: Option<Self::SliceMut<'_, f32>>,
    ) -> Result<()>;

    /// Checks the inputs of a backward pass by themselves, before memory for its results is allocated.
    ///
    /// # Errors
    /// Every error that names `q`, `k`, `v`, `o`, `d_o`, `lse` or `d_lse`.
    fn check_backward_inputs<E: Element>(
        &self,
        plan: &BackwardPlan,
        inputs: &BackwardInputs<Self::Slice<'_, E>, Self::Slice<'_, f32>>,
        second: Option<&Pair<Tensor<Self::Slice<'_, E>>>>,
    ) -> Result<()>;

    /// Runs a backward plan; see [`Attention::backward_into`](crate::Attention::backward_into).
    ///
    /// # Errors
    /// As there.
    fn backward_into<E: Element>(
        &self,
        plan: &BackwardPlan,
        inputs: BackwardInputs<Self::Slice<'_, E>, Self::Slice<'_, f32>>,
        outputs: Gradients<Tensor<Self::SliceMut<'_, E>>>,
        second: Option<SecondTensors<Self::Slice<'_, E>, Self::SliceMut<'_, E>>>,
    ) -> Result<()>;

    /// Checks the inputs of total attention by themselves, before memory for its result is allocated.
    ///
    /// # Errors
    /// Every error that names `q`, `k` or `lse`.
    fn check_total_inputs<E: Element>(
        &self,
        plan: &TotalPlan,
        q: &Tensor<Self::Slice<'_, E>>,
        k: &Tensor<Self::Slice<'_, E>>,
        lse: &Self::Slice<'_, f32>,
    ) -> Result<()>;

    /// Runs a plan of total attention; see [`Attention::total_attention_into`](crate::Attention::total_attention_into).
    ///
    /// # Errors
    /// As there.
    fn total_attention_into<E: Element>(
        &self,
        plan: &TotalPlan,
        q: Tensor<Self::Slice<'_, E>>,
        k: Tensor<Self::Slice<'_, E>>,
        lse: Self::Slice<'_, f32>,
        total: Self::SliceMut<'_, f32>,
    ) -> Result<()>;
}

mod sealed {
    /// Keeps [`Backend`](super::Backend) to this crate, so that it can grow.
    pub trait Sealed {}
}
