//! Total attention on the CPU: work tiles, spread over rayon's threads.
//!
//! A work tile is a block of keys of one query head, and each of its sums has one order. So the bits do not depend on
//! the number of threads.

use kernels_gpu::variants::Dtype;

use super::pool;
use crate::{
    element::Element,
    error::Result,
    operands::{AddressSpace, Memory, RawTotalAttention, check_dtype, check_total_inputs},
    plan::TotalPlan,
    tensor::Tensor,
};

/// Checks each input alone.
pub(super) fn check_inputs<E: Element>(
    plan: &TotalPlan,
    q: &Tensor<&[E]>,
    k: &Tensor<&[E]>,
    lse: &[f32],
) -> Result<()> {
    check_dtype(plan.problem(), E::DTYPE)?;
    check_total_inputs(plan, &tensor(q), &tensor(k), memory(lse), AddressSpace::Host)
}

/// Checks everything and runs the plan.
pub(super) fn run_into<E: Element>(
    plan: &TotalPlan,
    q: Tensor<&[E]>,
    k: Tensor<&[E]>,
    lse: &[f32],
    total: &mut [f32],
) -> Result<()> {
    let (tensors, lse) = ([tensor(&q), tensor(&k)], memory(lse));
    // SAFETY: these are slices that are borrowed until this function returns.
    unsafe { run(plan, E::DTYPE, tensors, lse, total) }
}

fn tensor<E>(tensor: &Tensor<&[E]>) -> Tensor<Memory> {
    Tensor { data: memory(tensor.data), layout: tensor.layout }
}

/// Returns a slice's address and length.
fn memory<T>(data: &[T]) -> Memory {
    Memory { address: data.as_ptr().expose_provenance() as u64, len: Some(data.len()) }
}

/// Checks everything and runs every CTA of `plan`, in parallel. Stops at the first fault.
///
/// # Safety
/// The tensors and the LSE are valid for reading until this function returns.
unsafe fn run(
    plan: &TotalPlan,
    dtype: Dtype,
    tensors: [Tensor<Memory>; 2],
    lse: Memory,
    total: &mut [f32],
) -> Result<()> {
    let result = Memory { address: total.as_mut_ptr().expose_provenance() as u64, len: Some(total.len()) };
    let args = RawTotalAttention::lower(plan, dtype, AddressSpace::Host, tensors, [lse, result])?;
    let ctas = pool::ctas(plan.work_tiles());
    if ctas == 0 {
        total.fill(0.0);
        return Ok(());
    }
    let params = args.params(plan, [args.q.strided(), args.k.strided()]);
    let variant = plan.variant();
    pool::for_each(variant.symbol, ctas, |cta| {
        // SAFETY: the memory is valid, and its layouts were checked against the plan, which also has this variant and
        // tile count. The result aliases nothing, and each element of it belongs to one work tile of one CTA, so CTAs
        // may run at the same time.
        unsafe { (variant.run)(variant.dtype, variant.smem(), &params, cta, ctas) }
    })
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
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
                let plan = TotalPlan::new(&problem, mask, None, sm_count).unwrap();
                assert_eq!(plan.shared_from, if sm_count == 132 { 0 } else { 9 });
                let mut total = vec![f32::NAN; problem.total_len()];
                run_into(&plan, q, k, &lse, &mut total).unwrap();
                total.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            });
            assert!(totals[0] == totals[1] && totals[0] == totals[2], "{mask:?}");
        }
    }
}
