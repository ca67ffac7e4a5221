//! The CPU executor: the GPU's own kernels, with work tiles spread over rayon's threads.
//!
//! It runs the same plan as the GPU, with the same variant, tiles and order. A kernel that violates the pipeline's
//! protocol panics with a name for the violation, which becomes [`Error::KernelFault`].

use std::ops::Range;

use crate::{
    backend::{Backend, Workspace, sealed::Sealed},
    dropout::{Dropout, MaskShape},
    element::Element,
    error::{Error, Operand, Result},
    lengths::{HostLengths, Integers},
    operands::{
        AddressSpace, BackwardInputs, Check, ForwardTensors, Gradients, Inputs, PackedGradients, Pair, RawForward,
        RawTensor, SecondTensors, SeedOffset, TotalInputs, TotalTensors,
    },
    plan::{BackwardPlan, InputKinds, Plan, TotalPlan},
    problem::Problem,
    tensor::Tensor,
};
use bytemuck::Pod;
use kernels_gpu::cpu::schedule;

mod backward;
pub(crate) mod dropout_mask;
mod pool;
mod raw;
mod total_attention;

/// The CPU. Tensors are slices, of any alignment; work tiles run on the current rayon thread pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cpu;

impl Sealed for Cpu {}

impl Backend for Cpu {
    type Slice<'a, T: Pod> = &'a [T];
    type SliceMut<'a, T: Pod> = &'a mut [T];
    type Buffer<T: Pod> = Vec<T>;

    fn sm_count(&self) -> u32 {
        Cpu::sm_count(self)
    }

    /// Allocates zeros.
    fn allocate<T: Pod>(&self, operand: Operand, len: usize) -> Result<Vec<T>> {
        bytemuck::allocation::try_zeroed_vec(len)
            .map_err(|()| Error::OutOfMemory { operand, bytes: len as u128 * size_of::<T>() as u128 })
    }

    fn upload<T: Pod>(&self, operand: Operand, from: &[T]) -> Result<Vec<T>> {
        copy(operand, from)
    }

    fn download<T: Pod>(&self, from: &Vec<T>) -> Result<Vec<T>> {
        copy(Operand::Download, from)
    }

    fn slice<T: Pod>(buffer: &Vec<T>) -> &[T] {
        buffer
    }

    fn slice_mut<T: Pod>(buffer: &mut Vec<T>, range: Range<usize>) -> &mut [T] {
        buffer.get_mut(range).unwrap_or_default()
    }

    fn seed_offset(from: Self::Slice<'_, u64>) -> SeedOffset<Self::Slice<'_, f32>> {
        from.into()
    }

    fn integers(from: Self::Slice<'_, i32>) -> Integers<Self::Slice<'_, f32>> {
        from.into()
    }

    fn check_lengths(&self, problem: &Problem, lengths: &HostLengths) -> Result<()> {
        lengths.check(problem)
    }

    fn check_inputs<E: Element>(&self, plan: &Plan, inputs: &Inputs<&[E], &[f32]>) -> Result<()> {
        let tensors = ForwardTensors::new(*inputs, (), None::<()>);
        tensors.lower(plan, E::DTYPE, &mut check(plan.problem(), plan.inputs()))?;
        check_host_lengths(plan.problem(), inputs.optional.lengths.as_ref())
    }

    fn forward_into<E: Element>(
        &self,
        plan: &Plan,
        inputs: Inputs<&[E], &[f32]>,
        o: Tensor<&mut [E]>,
        lse: Option<&mut [f32]>,
        workspace: &mut Workspace<Self>,
    ) -> Result<()> {
        let mut check = check(plan.problem(), plan.inputs());
        let args = ForwardTensors::new(inputs, o, lse).lower(plan, E::DTYPE, &mut check)?;
        check.overlaps()?;
        check_host_lengths(plan.problem(), inputs.optional.lengths.as_ref())?;
        // SAFETY: the arguments were checked, and come from slices that are borrowed until this function returns, `o`
        // and `lse` mutably.
        unsafe { run(plan, args, workspace) }
    }

    fn check_backward_inputs<E: Element>(
        &self,
        plan: &BackwardPlan,
        inputs: &BackwardInputs<&[E], &[f32]>,
        second: Option<&Pair<Tensor<&[E]>>>,
    ) -> Result<()> {
        backward::check_inputs(plan, *inputs, second.copied())
    }

    fn backward_into<E: Element>(
        &self,
        plan: &BackwardPlan,
        inputs: BackwardInputs<&[E], &[f32]>,
        outputs: Gradients<Tensor<&mut [E]>, &mut [f32]>,
        second: Option<SecondTensors<&[E], &mut [E]>>,
        workspace: &mut Workspace<Self>,
    ) -> Result<()> {
        backward::run_into(plan, inputs, outputs, second, workspace)
    }

    fn backward_packed_into<E: Element>(
        &self,
        plan: &BackwardPlan,
        inputs: BackwardInputs<&[E], &[f32]>,
        outputs: PackedGradients<Tensor<&mut [E]>, &mut [f32]>,
        workspace: &mut Workspace<Self>,
    ) -> Result<()> {
        backward::run_packed(plan, inputs, outputs, workspace)
    }

    fn check_total_inputs<E: Element>(&self, plan: &TotalPlan, inputs: &TotalInputs<&[E], &[f32]>) -> Result<()> {
        total_attention::check_inputs(plan, TotalTensors::new(*inputs, ()))
    }

    fn total_attention_into<E: Element>(
        &self,
        plan: &TotalPlan,
        inputs: TotalInputs<&[E], &[f32]>,
        total: &mut [f32],
        workspace: &mut Workspace<Self>,
    ) -> Result<()> {
        check_host_lengths(plan.problem(), inputs.lengths.as_ref())?;
        total_attention::run_into(plan, TotalTensors::new(inputs, total), workspace)
    }

    fn dropout_mask_into(&self, problem: &Problem, dropout: &Dropout, kept: &mut [u8]) -> Result<()> {
        let shape = MaskShape::of(problem)?;
        let launched = dropout.launched()?;
        shape.check_len(kept.len())?;
        match launched {
            Some(launched) => dropout_mask::write(kept, shape.lens, &launched, |kept| kept)?,
            None => kept.fill(1),
        }
        Ok(())
    }
}

/// Starts the checks of a call's tensors.
fn check(problem: &Problem, kinds: InputKinds) -> Check<'_> {
    Check::new(problem, AddressSpace::Host).of_kinds(kinds)
}

/// Checks lengths, if there are any. What may be read has been checked before.
fn check_host_lengths(problem: &Problem, lengths: Option<&HostLengths>) -> Result<()> {
    lengths.map_or(Ok(()), |lengths| lengths.check(problem))
}

/// Takes memory for a plan's workspace, and returns its address.
fn reserve(workspace: &mut Workspace<Cpu>, bytes: usize) -> Result<u64> {
    if bytes == 0 {
        return Ok(0);
    }
    // Tables are read by 16 bytes.
    let memory = workspace.reserve(&Cpu, bytes + TABLE_ALIGNMENT)?;
    Ok((memory.as_mut_ptr().expose_provenance() as u64).next_multiple_of(TABLE_ALIGNMENT as u64))
}

/// Alignment of the tables in a workspace, in bytes.
const TABLE_ALIGNMENT: usize = 16;

/// Copies host memory.
fn copy<T: Pod>(operand: Operand, from: &[T]) -> Result<Vec<T>> {
    let mut to = Vec::new();
    to.try_reserve_exact(from.len()).map_err(|_| Error::OutOfMemory { operand, bytes: size_of_val(from) as u128 })?;
    to.extend_from_slice(from);
    Ok(to)
}

/// Runs every CTA of `plan`, in parallel, in the caller's workspace. Stops at the first fault.
///
/// # Safety
/// The arguments, without a workspace, were checked against the plan. They are valid until this function returns, for
/// writing (O, LSE) and for reading (the rest).
unsafe fn run(plan: &Plan, mut args: RawForward, workspace: &mut Workspace<Cpu>) -> Result<()> {
    args.workspace = reserve(workspace, plan.workspace_bytes())?;
    if let Some((params, lists)) = args.schedule(plan) {
        // SAFETY: the caller checked the arguments, and the workspace is as large as the plan says.
        unsafe { schedule(&params, lists as usize) };
    }
    let placed = |tensor: &RawTensor| tensor.placed(plan.schedule.as_ref());
    let tensors = [&args.q, &args.k, &args.v, &args.o].map(placed);
    let second = args.second.map(|pair| pair.as_ref().map(placed));
    let ctas = pool::ctas(plan.work_tiles());
    if ctas == 0 {
        return Ok(());
    }
    let params = args.params(plan, tensors, second);
    let variant = plan.variant();
    pool::for_each(variant.symbol, ctas, |cta| {
        // SAFETY: the caller checked the arguments against the plan, which also has this variant and tile count, and
        // promised the memory. Outputs alias nothing, and each row of them belongs to one work tile of one CTA, so CTAs
        // may run at the same time. A CTA that panics leaves only its rows of the output unfinished, which the error
        // calls unspecified.
        unsafe { (variant.run)(variant.dtype, variant.smem(), &params, cta, ctas) }
    })
}

#[cfg(test)]
mod tests {
    use kernels_gpu::variants::Dtype;

    use super::*;
    use crate::plan::Options;
    use crate::problem::Mask;

    #[test]
    fn plan_and_kernel_count_the_same_tiles() {
        for (mask, head_dim, seqlen_q) in [(Mask::None, 64, 1), (Mask::Causal, 128, 1000), (Mask::None, 256, 384)] {
            let problem =
                Problem { batch: 3, heads_q: 6, heads_kv: 2, seqlen_q, seqlen_k: 50, head_dim, dtype: Dtype::F16 };
            let plan = Plan::forward(&problem, &Options { mask, ..Options::default() }, 1).unwrap();
            assert_eq!(plan.work_tiles(), plan.variant().work_tiles(&problem.kernel_shape()));
        }
    }

    #[test]
    fn memory_that_can_not_be_had_is_an_error() {
        let error = Cpu.allocate::<u16>(Operand::O, usize::MAX).unwrap_err();
        assert_eq!(error, Error::OutOfMemory { operand: Operand::O, bytes: 2 * usize::MAX as u128 });
    }
}
