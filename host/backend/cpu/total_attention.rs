//! Total attention on the CPU: work tiles, spread over rayon's threads.
//!
//! A work tile is a block of keys of one query head, and each of its sums has one order. So the bits do not depend on
//! the number of threads.

use kernels_gpu::cpu::schedule;

use super::{Cpu, check, check_host_lengths, pool, reserve};
use crate::{
    backend::Workspace,
    element::Element,
    error::Result,
    operands::{RawTotalAttention, TotalTensors},
    plan::TotalPlan,
    tensor::Tensor,
};

/// Checks each input alone.
pub(super) fn check_inputs<E: Element>(plan: &TotalPlan, inputs: TotalTensors<Tensor<&[E]>, &[f32], ()>) -> Result<()> {
    inputs.lower(plan, E::DTYPE, &mut check(plan.problem(), plan.inputs()))?;
    check_host_lengths(plan.problem(), inputs.lengths.as_ref())
}

/// Checks everything and runs the plan.
pub(super) fn run_into<E: Element>(
    plan: &TotalPlan,
    tensors: TotalTensors<Tensor<&[E]>, &[f32], &mut [f32]>,
    workspace: &mut Workspace<Cpu>,
) -> Result<()> {
    let mut check = check(plan.problem(), plan.inputs());
    let args = tensors.lower(plan, E::DTYPE, &mut check)?;
    check.overlaps()?;
    // SAFETY: the arguments were checked, and come from slices that are borrowed until this function returns, `total`
    // mutably.
    unsafe { run(plan, args, workspace) }
}

/// Runs every CTA of a plan, in parallel, in the caller's workspace. Stops at the first fault. Without work tiles,
/// which means without queries, it writes zeros.
///
/// # Safety
/// The arguments, without a workspace, were checked against the plan. They are valid until this function returns, for
/// writing the result and for reading the rest.
pub(super) unsafe fn run(plan: &TotalPlan, mut args: RawTotalAttention, workspace: &mut Workspace<Cpu>) -> Result<()> {
    if plan.work_tiles() == 0 {
        let len = plan.problem().total_len();
        if len > 0 {
            let total: *mut f32 = std::ptr::with_exposed_provenance_mut(args.total as usize);
            // SAFETY: the caller promised so many elements for writing.
            unsafe { total.write_bytes(0, len) };
        }
        return Ok(());
    }
    args.workspace = reserve(workspace, plan.workspace_bytes())?;
    if let Some((params, lists)) = args.schedule(plan) {
        // SAFETY: the caller checked the arguments, and the workspace is as large as the plan says.
        unsafe { schedule(&params, lists as usize) };
    }
    let ctas = pool::ctas(plan.work_tiles());
    let params = args.params(plan, [&args.q, &args.k].map(|tensor| tensor.placed(plan.schedule.as_ref())));
    let variant = plan.variant();
    pool::for_each(variant.symbol, ctas, |cta| {
        // SAFETY: the caller promised the memory, and checked its layouts against the plan, which also has this
        // variant and tile count. The result aliases nothing, and each element of it belongs to one work tile of one
        // CTA, so CTAs may run at the same time.
        unsafe { (variant.run)(variant.dtype, variant.smem(), &params, cta, ctas) }
    })
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::operands::TotalInputs;
    use crate::plan::Options;
    use crate::problem::{Mask, Problem};
    use kernels_gpu::variants::Dtype;

    /// A machine with many SMs splits a few work tiles, and a machine with one SM splits none.
    #[test]
    fn parts_of_work_tiles_give_the_same_bits() {
        let problem = Problem {
            batch: 1,
            heads_q: 3,
            heads_kv: 1,
            seqlen_q: 300,
            seqlen_k: 700,
            head_dim: 40,
            dtype: Dtype::Bf16,
        };
        let values = |count: usize| -> Vec<bf16> {
            (0..count).map(|i| bf16::from_f32(((i * 7919) % 1009) as f32 / 300.0 - 1.7)).collect()
        };
        let (q, k) = (values(3 * 300 * 40), values(700 * 40));
        let (q, k) = (Tensor::bhsd(&q[..], [1, 3, 300, 40]), Tensor::bhsd(&k[..], [1, 1, 700, 40]));
        let lse: Vec<f32> = (0..3 * 300).map(|i| 4.0 + (i % 7) as f32).collect();
        for mask in [Mask::None, Mask::Causal] {
            let totals = [1, 7, 132].map(|sm_count| {
                let plan = TotalPlan::new(&problem, &Options { mask, ..Options::default() }, sm_count).unwrap();
                assert_eq!(plan.shared_from, if sm_count == 132 { 0 } else { 9 });
                let mut total = vec![f32::NAN; problem.total_len()];
                let tensors = TotalTensors::new(TotalInputs::new(q, k, &lse[..]), &mut total[..]);
                run_into(&plan, tensors, &mut Workspace::new()).unwrap();
                total.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            });
            assert!(totals[0] == totals[1] && totals[0] == totals[2], "{mask:?}");
        }
    }
}
