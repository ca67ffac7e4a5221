//! The tensors of total attention.

use kernels_gpu::{params::TotalParams, variants::Dtype};

use super::{
    AddressSpace, Memory, RawTensor, check_disjoint, check_dtype, check_floats, check_lse, check_tensor, lse_region,
};
use crate::{
    error::{Error, Operand, Result},
    overlap::Region,
    plan::TotalPlan,
    tensor::Tensor,
};

/// Tensors of total attention, named by their addresses, as frameworks hold them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawTotalAttention {
    /// Queries, (batch, heads_q, seqlen_q, head_dim).
    pub q: RawTensor,
    /// Keys, (batch, heads_kv, seqlen_k, head_dim).
    pub k: RawTensor,
    /// Address of the forward pass's LSE, f32 (batch, heads_q, seqlen_q), contiguous.
    pub lse: u64,
    /// Address of the result, f32 (batch, heads_q, seqlen_k), contiguous.
    pub total: u64,
}

impl RawTotalAttention {
    /// Checks everything that can be checked from addresses and layouts, by the rules of device memory: shapes,
    /// strides, alignment. The result must not share memory with an input.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`], [`Error::StrideNotMultiple`], [`Error::StrideTooLarge`], [`Error::SpanTooLarge`],
    /// [`Error::NullPointer`], [`Error::Misaligned`], [`Error::Overlap`].
    pub fn validate(&self, plan: &TotalPlan) -> Result<()> {
        let memory = |address| Memory { address, len: None };
        let tensor = |raw: &RawTensor| Tensor { data: memory(raw.address), layout: raw.layout };
        check_inputs(plan, &tensor(&self.q), &tensor(&self.k), memory(self.lse), AddressSpace::Device)?;
        check_total(plan, memory(self.total), AddressSpace::Device)?;
        self.check_overlaps(plan)
    }

    /// Lowers buffers of elements of `dtype` to addresses, and checks them as [`RawTotalAttention::validate`] does, and
    /// their sizes as well.
    ///
    /// # Errors
    /// Errors of [`RawTotalAttention::validate`], except alignment in the host's memory; [`Error::DtypeMismatch`],
    /// [`Error::BufferTooSmall`], [`Error::LseLength`], [`Error::TotalLength`].
    pub(crate) fn lower(
        plan: &TotalPlan,
        dtype: Dtype,
        space: AddressSpace,
        [q, k]: [Tensor<Memory>; 2],
        [lse, total]: [Memory; 2],
    ) -> Result<Self> {
        check_dtype(plan.problem(), dtype)?;
        check_inputs(plan, &q, &k, lse, space)?;
        check_total(plan, total, space)?;
        let args = RawTotalAttention { q: raw(&q), k: raw(&k), lse: lse.address, total: total.address };
        args.check_overlaps(plan)?;
        Ok(args)
    }

    /// Returns the launch parameters of a plan that has work tiles. `q` and `k` are as the machine names them.
    pub(crate) fn params<T>(&self, plan: &TotalPlan, [q, k]: [T; 2]) -> TotalParams<T> {
        TotalParams {
            q,
            k,
            lse: self.lse,
            total: self.total,
            scale: plan.scale(),
            shape: plan.problem().kernel_shape(),
            order: plan.order,
            shared_from: plan.shared_from,
            mask: plan.mask().window(),
        }
    }

    /// Checks that the result has memory of its own.
    fn check_overlaps(&self, plan: &TotalPlan) -> Result<()> {
        let bytes = plan.problem().total_len() as u128 * size_of::<f32>() as u128;
        let total = (Operand::Total, Region::of_bytes(self.total, bytes));
        let lse = lse_region(plan.problem(), self.lse);
        for other in [(Operand::Q, self.q.region()), (Operand::K, self.k.region()), (Operand::Lse, lse)] {
            check_disjoint(total, other)?;
        }
        Ok(())
    }
}

/// Checks each input alone.
pub(crate) fn check_inputs(
    plan: &TotalPlan,
    q: &Tensor<Memory>,
    k: &Tensor<Memory>,
    lse: Memory,
    space: AddressSpace,
) -> Result<()> {
    for (operand, tensor) in [(Operand::Q, q), (Operand::K, k)] {
        check_tensor(plan.problem(), operand, &raw(tensor), space, tensor.data.len)?;
    }
    check_lse(plan.problem(), Operand::Lse, lse, space)
}

/// Checks the result's array alone.
fn check_total(plan: &TotalPlan, memory: Memory, space: AddressSpace) -> Result<()> {
    let expected = plan.problem().total_len();
    if let Some(len) = memory.len
        && len != expected
    {
        return Err(Error::TotalLength { len, expected });
    }
    check_floats(Operand::Total, memory.address, expected, space)
}

fn raw(tensor: &Tensor<Memory>) -> RawTensor {
    RawTensor { address: tensor.data.address, layout: tensor.layout }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        problem::{Mask, Problem},
        tensor::Layout,
    };

    const PROBLEM: Problem =
        Problem { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 10, seqlen_k: 20, head_dim: 16, dtype: Dtype::F16 };

    fn plan(problem: &Problem) -> TotalPlan {
        TotalPlan::new(problem, Mask::None, None, 1).unwrap()
    }

    /// Returns contiguous tensors, far from each other.
    fn args() -> RawTotalAttention {
        let tensor = |address, shape| RawTensor { address, layout: Layout::bhsd(shape) };
        RawTotalAttention {
            q: tensor(0x10000, PROBLEM.q_shape()),
            k: tensor(0x20000, PROBLEM.kv_shape()),
            lse: 0x30000,
            total: 0x40000,
        }
    }

    #[track_caller]
    fn message(change: impl FnOnce(&mut RawTotalAttention)) -> String {
        let mut args = args();
        change(&mut args);
        args.validate(&plan(&PROBLEM)).unwrap_err().to_string()
    }

    #[test]
    fn contiguous_tensors_are_valid() {
        assert_eq!(args().validate(&plan(&PROBLEM)), Ok(()));
        // The arrays need no more than 4-byte alignment.
        assert_eq!(RawTotalAttention { lse: 0x30004, total: 0x4000c, ..args() }.validate(&plan(&PROBLEM)), Ok(()));
    }

    #[test]
    fn everything_is_checked() {
        assert_eq!(message(|args| args.q.address = 0), "q is a null pointer; its tensor is not empty");
        assert_eq!(message(|args| args.lse = 0), "lse is a null pointer; its tensor is not empty");
        assert_eq!(message(|args| args.total = 0), "total is a null pointer; its tensor is not empty");
        assert_eq!(message(|args| args.k.address += 8), "k is at address 0x20008; a multiple of 16 bytes is needed");
        assert_eq!(message(|args| args.lse += 2), "lse is at address 0x30002; a multiple of 4 bytes is needed");
        assert_eq!(message(|args| args.total += 1), "total is at address 0x40001; a multiple of 4 bytes is needed");
        let error = message(|args| args.total = u64::MAX - 15);
        assert_eq!(error, "total spans 640 bytes from address 0xfffffffffffffff0; at most 16 are allowed");
        let error = message(|args| args.k.layout.strides[2] = 20);
        assert!(error.starts_with("k.strides: the seqlen stride is 20 elements; a multiple of 8"), "{error}");
        assert!(message(|args| args.q.layout.shape[2] = 7).starts_with("q.shape is [2, "));
    }

    #[test]
    fn the_result_has_memory_of_its_own() {
        let rule = "an output needs memory of its own";
        assert_eq!(message(|args| args.total = args.q.address + 16), format!("total overlaps q; {rule}"));
        assert_eq!(message(|args| args.total = args.k.address - 636), format!("total overlaps k; {rule}"));
        assert_eq!(message(|args| args.total = args.lse + 316), format!("total overlaps lse; {rule}"));
        let touching = RawTotalAttention { total: args().lse + 320, ..args() };
        assert_eq!(touching.validate(&plan(&PROBLEM)), Ok(()));
    }

    #[test]
    fn buffers_are_as_long_as_they_must_be() {
        let memory = |address, len| Memory { address, len: Some(len) };
        let tensor = |address, shape: [usize; 4]| Tensor {
            data: memory(address, shape.iter().product()),
            layout: Layout::bhsd(shape),
        };
        let inputs = [tensor(0x10000, PROBLEM.q_shape()), tensor(0x20000, PROBLEM.kv_shape())];
        let lower = |dtype, lse, total| {
            let lines = [memory(0x30000, lse), memory(0x40000, total)];
            RawTotalAttention::lower(&plan(&PROBLEM), dtype, AddressSpace::Host, inputs, lines)
        };
        assert_eq!(lower(Dtype::F16, 80, 160), Ok(args()));
        assert!(matches!(lower(Dtype::Bf16, 80, 160), Err(Error::DtypeMismatch { .. })));
        assert!(matches!(lower(Dtype::F16, 79, 160), Err(Error::LseLength { operand: Operand::Lse, len: 79, .. })));
        let error = lower(Dtype::F16, 80, 161).unwrap_err().to_string();
        assert_eq!(error, "total has 161 elements; exactly 160 are needed (batch × heads_q × seqlen_k)");
    }

    #[test]
    fn addresses_of_nothing_do_not_matter() {
        let nothing = |problem: &Problem| RawTotalAttention {
            q: RawTensor { address: 1, layout: Layout::strided(problem.q_shape(), [usize::MAX; 3]) },
            k: RawTensor { address: 1, layout: Layout::strided(problem.kv_shape(), [usize::MAX; 3]) },
            lse: 0,
            total: 0,
        };
        for problem in [Problem { batch: 0, ..PROBLEM }, Problem { seqlen_q: 0, seqlen_k: 0, ..PROBLEM }] {
            assert_eq!(nothing(&problem).validate(&plan(&problem)), Ok(()));
        }
        // Without queries there are still zeros to write.
        let problem = Problem { seqlen_q: 0, ..PROBLEM };
        let args = RawTotalAttention { k: args().k, ..nothing(&problem) };
        assert!(args.validate(&plan(&problem)).is_err());
        assert_eq!(RawTotalAttention { total: 0x40000, ..args }.validate(&plan(&problem)), Ok(()));
    }
}
