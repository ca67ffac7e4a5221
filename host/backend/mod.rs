//! The backends that run a [`Plan`], a [`BackwardPlan`] or a [`TotalPlan`], and their common interface.
//!
//! A backend checks the tensors against the plan (in `operands`, by the same rules for all), and then runs the plan's
//! kernels over its work tiles. Call it through [`Attention`](crate::Attention).

use std::ops::Range;

use bytemuck::Pod;

use crate::{
    dropout::Dropout,
    element::Element,
    error::{Operand, Result},
    lengths::{Integers, Lengths},
    operands::{BackwardInputs, Gradients, Inputs, PackedGradients, Pair, SecondTensors, SeedOffset, TotalInputs},
    plan::{BackwardPlan, Plan, TotalPlan},
    problem::Problem,
    tensor::Tensor,
};

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;

/// A machine that runs attention. Only this crate implements the trait.
pub trait Backend: sealed::Sealed {
    /// Borrowed elements.
    type Slice<'a, T: Pod>: Copy;
    /// Mutably borrowed elements.
    type SliceMut<'a, T: Pod>;
    /// Owned elements.
    type Buffer<T: Pod>;

    /// Number of CTAs that run at once: SMs, or threads on the CPU.
    fn sm_count(&self) -> u32;

    /// Allocates `len` elements with unspecified values. Errors name the memory `operand`.
    ///
    /// Elements are plain data, for which any bits are a value. The compiler refuses a type with invalid values, such
    /// as a reference:
    ///
    /// ```compile_fail,E0277
    /// use ferroflash::{Backend, Cpu, Operand};
    ///
    /// let references = Cpu.allocate::<&'static str>(Operand::O, 1)?;
    /// # Ok::<(), ferroflash::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory); errors of the machine.
    fn allocate<T: Pod>(&self, operand: Operand, len: usize) -> Result<Self::Buffer<T>>;

    /// Returns a buffer with a copy of host memory. Errors name the memory `operand`.
    ///
    /// # Errors
    /// Errors of [`Backend::allocate`].
    fn upload<T: Pod>(&self, operand: Operand, from: &[T]) -> Result<Self::Buffer<T>>;

    /// Returns a buffer's content after all earlier work has run.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory); errors of the machine.
    fn download<T: Pod>(&self, from: &Self::Buffer<T>) -> Result<Vec<T>>;

    /// Returns a whole buffer as a slice.
    fn slice<T: Pod>(buffer: &Self::Buffer<T>) -> Self::Slice<'_, T>;

    /// Returns a range of a buffer, or an empty slice if the range is not within the buffer.
    fn slice_mut<T: Pod>(buffer: &mut Self::Buffer<T>, range: Range<usize>) -> Self::SliceMut<'_, T>;

    /// Returns memory of i32 as numbers of [`Lengths`].
    fn integers(from: Self::Slice<'_, i32>) -> Integers<Self::Slice<'_, f32>>;

    /// Checks lengths where they are: every entry lies within the problem, and no sequence begins before the end of the
    /// one before it. A GPU copies them to the host, and waits for that. No pass needs it, because with any lengths
    /// kernels read and write nothing outside the tensors; results are then unspecified.
    ///
    /// # Errors
    /// [`Error::SequencePlace`](crate::Error::SequencePlace), which names the entry; errors of the machine.
    fn check_lengths(&self, problem: &Problem, lengths: &Lengths<Self::Slice<'_, f32>>) -> Result<()>;

    /// Returns memory of u64 as seed and offset of dropout, for [`Inputs::seed_offset`].
    fn seed_offset(from: Self::Slice<'_, u64>) -> SeedOffset<Self::Slice<'_, f32>>;

    /// Checks the inputs of a forward pass alone, before memory for its results is allocated.
    ///
    /// # Errors
    /// Every error that names an input.
    fn check_inputs<E: Element>(
        &self,
        plan: &Plan,
        inputs: &Inputs<Self::Slice<'_, E>, Self::Slice<'_, f32>>,
    ) -> Result<()>;

    /// Runs a forward plan in a workspace, which grows if it is too small; see
    /// [`Attention::forward_into`](crate::Attention::forward_into).
    ///
    /// # Errors
    /// Errors of [`Attention::forward_into`](crate::Attention::forward_into), except those of planning.
    fn forward_into<E: Element>(
        &self,
        plan: &Plan,
        inputs: Inputs<Self::Slice<'_, E>, Self::Slice<'_, f32>>,
        o: Tensor<Self::SliceMut<'_, E>>,
        lse: Option<Self::SliceMut<'_, f32>>,
        workspace: &mut Workspace<Self>,
    ) -> Result<()>
    where
        Self: Sized;

    /// Checks the inputs of a backward pass alone, before memory for its results is allocated.
    ///
    /// # Errors
    /// Every error that names an input.
    fn check_backward_inputs<E: Element>(
        &self,
        plan: &BackwardPlan,
        inputs: &BackwardInputs<Self::Slice<'_, E>, Self::Slice<'_, f32>>,
        second: Option<&Pair<Tensor<Self::Slice<'_, E>>>>,
    ) -> Result<()>;

    /// Runs a backward plan in a workspace, which grows if it is too small; see
    /// [`Attention::backward_into`](crate::Attention::backward_into).
    ///
    /// # Errors
    /// Errors of [`Attention::backward_into`](crate::Attention::backward_into), except those of planning.
    fn backward_into<E: Element>(
        &self,
        plan: &BackwardPlan,
        inputs: BackwardInputs<Self::Slice<'_, E>, Self::Slice<'_, f32>>,
        outputs: Gradients<Tensor<Self::SliceMut<'_, E>>, Self::SliceMut<'_, f32>>,
        second: Option<SecondTensors<Self::Slice<'_, E>, Self::SliceMut<'_, E>>>,
        workspace: &mut Workspace<Self>,
    ) -> Result<()>
    where
        Self: Sized;

    /// Runs a backward plan of one pair of Q and K that writes packed gradients; see
    /// [`Attention::backward_packed_into`](crate::Attention::backward_packed_into).
    ///
    /// # Errors
    /// Errors of [`Attention::backward_packed_into`](crate::Attention::backward_packed_into), except those of planning.
    fn backward_packed_into<E: Element>(
        &self,
        plan: &BackwardPlan,
        inputs: BackwardInputs<Self::Slice<'_, E>, Self::Slice<'_, f32>>,
        outputs: PackedGradients<Tensor<Self::SliceMut<'_, E>>, Self::SliceMut<'_, f32>>,
        workspace: &mut Workspace<Self>,
    ) -> Result<()>
    where
        Self: Sized;

    /// Checks the inputs of total attention alone, before memory for its result is allocated.
    ///
    /// # Errors
    /// Every error that names an input.
    fn check_total_inputs<E: Element>(
        &self,
        plan: &TotalPlan,
        inputs: &TotalInputs<Self::Slice<'_, E>, Self::Slice<'_, f32>>,
    ) -> Result<()>;

    /// Runs a plan of total attention in a workspace, which grows if it is too small; see
    /// [`Attention::total_attention_into`](crate::Attention::total_attention_into).
    ///
    /// # Errors
    /// Errors of [`Attention::total_attention_into`](crate::Attention::total_attention_into), except those of planning.
    fn total_attention_into<E: Element>(
        &self,
        plan: &TotalPlan,
        inputs: TotalInputs<Self::Slice<'_, E>, Self::Slice<'_, f32>>,
        total: Self::SliceMut<'_, f32>,
        workspace: &mut Workspace<Self>,
    ) -> Result<()>
    where
        Self: Sized;

    /// Writes a dropout mask; see [`dropout_mask_into`](crate::dropout_mask_into).
    ///
    /// # Errors
    /// Errors of [`dropout_mask_into`](crate::dropout_mask_into).
    fn dropout_mask_into(&self, problem: &Problem, dropout: &Dropout, kept: Self::SliceMut<'_, u8>) -> Result<()>;
}

/// Workspace of passes. It can be kept and used again, so that a pass allocates nothing. Backward passes need one, and
/// every pass of sequences of different lengths.
///
/// It is empty at first, and grows if a plan needs more ([`BackwardPlan::workspace_bytes`]). Its content carries
/// nothing from one pass to the next.
///
/// ```
/// use ferroflash::{Attention, Cpu, Dtype, Inputs, Problem, Tensor, Workspace, bf16};
///
/// let problem =
///     Problem { batch: 1, heads_q: 2, heads_kv: 2, seqlen_q: 40, seqlen_k: 40, head_dim: 32, dtype: Dtype::Bf16 };
/// let x: Vec<bf16> = (0..2 * 40 * 32).map(|i| bf16::from_f32((i as f32).sin())).collect();
/// let x = Tensor::bhsd(&x[..], problem.q_shape());
/// let attention = Attention::new(problem);
/// let out = attention.forward(&Cpu, x, x, x)?;
/// let lse = out.lse.expect("returned unless omitted");
///
/// let mut workspace = Workspace::new();
/// for _ in 0..2 {
///     let o = Tensor::bhsd(&out.o[..], problem.q_shape());
///     attention.backward_in(&Cpu, &mut workspace, Inputs::new(x, x, x).backward(o, x, &lse[..]))?;
/// }
/// # Ok::<(), ferroflash::Error>(())
/// ```
pub struct Workspace<B: Backend> {
    buffer: Option<(B::Buffer<f32>, usize)>,
}

impl<B: Backend> Workspace<B> {
    /// Returns an empty workspace.
    pub fn new() -> Self {
        Workspace { buffer: None }
    }

    /// Size of the workspace in bytes.
    pub fn bytes(&self) -> usize {
        self.buffer.as_ref().map_or(0, |(_, len)| len * size_of::<f32>())
    }

    /// Returns the whole workspace, which has at least `bytes` bytes.
    pub(crate) fn reserve(&mut self, backend: &B, bytes: usize) -> Result<B::SliceMut<'_, f32>> {
        let len = bytes.div_ceil(size_of::<f32>());
        let buffer = match self.buffer.take() {
            Some((buffer, held)) if held >= len => (buffer, held),
            smaller => {
                // The smaller one is freed before the larger one is allocated.
                drop(smaller);
                (backend.allocate(Operand::Workspace, len)?, len)
            }
        };
        let (buffer, len) = self.buffer.insert(buffer);
        Ok(B::slice_mut(buffer, 0..*len))
    }
}

impl<B: Backend> Default for Workspace<B> {
    fn default() -> Self {
        Self::new()
    }
}

mod sealed {
    /// Restricts implementations of [`Backend`](super::Backend) to this crate, so that the trait can grow.
    pub trait Sealed {}
}
