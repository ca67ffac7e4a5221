//! The tensors of a forward pass.

use kernels_gpu::{
    attention::any_features::AnyFeatures,
    ground::tensor::Output,
    params::{ForwardBase, ForwardParams},
    variants::Dtype,
};

use super::{
    AddressSpace, Memory, Pair, RawTensor, check_disjoint, check_dtype, check_lse, check_rows_apart, check_second,
    check_tensor, lse_region,
};
#[cfg(doc)]
use crate::error::Error;
use crate::{
    error::{Operand, Result},
    plan::Plan,
    problem::Problem,
};

/// Tensors of a forward pass, named by their addresses, as frameworks hold them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawForward {
    /// Queries, (batch, heads_q, seqlen_q, head_dim).
    pub q: RawTensor,
    /// Keys, (batch, heads_kv, seqlen_k, head_dim).
    pub k: RawTensor,
    /// The second pair of queries and keys, of the same shapes, for a plan of piecewise attention; `None` for others.
    pub second: Option<Pair<RawTensor>>,
    /// Values, (batch, heads_kv, seqlen_k, head_dim).
    pub v: RawTensor,
    /// O, (batch, heads_q, seqlen_q, head_dim).
    pub o: RawTensor,
    /// Address of the LSE, f32 (batch, heads_q, seqlen_q), contiguous; `None` to omit it.
    pub lse: Option<u64>,
}

impl RawForward {
    /// Checks everything that can be checked from addresses and layouts, by the rules of device memory: shapes,
    /// strides, alignment. Outputs must not share memory with themselves or with another tensor.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`], [`Error::StrideNotMultiple`], [`Error::StrideTooLarge`], [`Error::SpanTooLarge`],
    /// [`Error::NullPointer`], [`Error::Misaligned`], [`Error::OutputAliasesItself`], [`Error::Overlap`].
    pub fn validate(&self, plan: &Plan) -> Result<()> {
        let problem = plan.problem();
        check_second(plan.variant().op, self.second.is_some())?;
        self.validate_tensors(problem, AddressSpace::Device, None)?;
        self.validate_outputs(problem)
    }

    /// Checks as [`RawForward::validate`] does, for buffers of known sizes.
    ///
    /// # Errors
    /// Errors of [`RawForward::validate`], except alignment in the host's memory; [`Error::DtypeMismatch`],
    /// [`Error::BufferTooSmall`], [`Error::LseLength`].
    pub(crate) fn validate_buffers(&self, plan: &Plan, space: AddressSpace, buffers: &Buffers) -> Result<()> {
        let problem = plan.problem();
        check_second(plan.variant().op, self.second.is_some())?;
        check_dtype(problem, buffers.dtype)?;
        self.validate_tensors(problem, space, Some(buffers))?;
        self.validate_outputs(problem)
    }

    /// Returns the launch parameters of a plan that has work tiles. `q`, `k`, `v` and `o`, and the far pair if there is
    /// one, are as the machine names them.
    pub(crate) fn params<T: Copy>(
        &self,
        plan: &Plan,
        [q, k, v, o]: [T; 4],
        far: Option<Pair<T>>,
    ) -> ForwardParams<T, AnyFeatures> {
        let far = far.unwrap_or(Pair { q, k });
        let base = ForwardBase {
            q: [q, far.q],
            k: [k, far.k],
            v,
            o: Output { tiles: o, rows: self.o.strided() },
            lse: self.lse.unwrap_or(0),
            scale: plan.scale(),
            shape: plan.problem().kernel_shape(),
            order: plan.order,
            last_pair: plan.features.mask.pairs() - 1,
        };
        ForwardParams { base, features: plan.features }
    }

    fn validate_tensors(&self, problem: &Problem, space: AddressSpace, buffers: Option<&Buffers>) -> Result<()> {
        for (operand, tensor, len) in [
            (Operand::Q, &self.q, buffers.map(|buffers| buffers.q)),
            (Operand::K, &self.k, buffers.map(|buffers| buffers.k)),
            (Operand::V, &self.v, buffers.map(|buffers| buffers.v)),
            (Operand::O, &self.o, buffers.map(|buffers| buffers.o)),
        ] {
            check_tensor(problem, operand, tensor, space, len)?;
        }
        if let Some(Pair { q, k }) = &self.second {
            let len = buffers.and_then(|buffers| buffers.second);
            check_tensor(problem, Operand::Q2, q, space, len.map(|len| len.q))?;
            check_tensor(problem, Operand::K2, k, space, len.map(|len| len.k))?;
        }
        let len = buffers.and_then(|buffers| buffers.lse);
        self.lse.map_or(Ok(()), |address| check_lse(problem, Operand::Lse, Memory { address, len }, space))
    }

    fn validate_outputs(&self, problem: &Problem) -> Result<()> {
        check_rows_apart(Operand::O, &self.o.layout)?;
        let lse = self.lse.and_then(|address| lse_region(problem, address));
        let mut inputs =
            vec![(Operand::Q, self.q.region()), (Operand::K, self.k.region()), (Operand::V, self.v.region())];
        if let Some(Pair { q, k }) = &self.second {
            inputs.extend([(Operand::Q2, q.region()), (Operand::K2, k.region())]);
        }
        let o = (Operand::O, self.o.region());
        for &other in &inputs {
            check_disjoint(o, other)?;
        }
        for other in inputs.into_iter().chain([o]) {
            check_disjoint((Operand::Lse, lse), other)?;
        }
        Ok(())
    }
}

/// Element type, and lengths in elements, of the buffers behind a [`RawForward`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Buffers {
    pub(crate) dtype: Dtype,
    pub(crate) q: usize,
    pub(crate) k: usize,
    pub(crate) second: Option<Pair<usize>>,
    pub(crate) v: usize,
    pub(crate) o: usize,
    pub(crate) lse: Option<usize>,
}

#[cfg(test)]
mod tests {
    use kernels_gpu::ground::tensor::Strided;

    use super::*;
    use crate::dropout::Dropout;
    use crate::{problem::Mask, tensor::Layout};

    const PROBLEM: Problem =
        Problem { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 10, seqlen_k: 20, head_dim: 16, dtype: Dtype::F16 };

    fn plan() -> Plan {
        Plan::forward(&PROBLEM, Mask::None, None, Dropout::NONE, 1).unwrap()
    }

    /// Returns contiguous tensors, far from each other.
    fn args() -> RawForward {
        let tensor = |address, shape| RawTensor { address, layout: Layout::bhsd(shape) };
        RawForward {
            q: tensor(0x10000, PROBLEM.q_shape()),
            k: tensor(0x20000, PROBLEM.kv_shape()),
            second: None,
            v: tensor(0x30000, PROBLEM.kv_shape()),
            o: tensor(0x40000, PROBLEM.q_shape()),
            lse: Some(0x50000),
        }
    }

    fn message(change: impl FnOnce(&mut RawForward)) -> String {
        let mut args = args();
        change(&mut args);
        args.validate(&plan()).unwrap_err().to_string()
    }

    #[test]
    fn contiguous_tensors_are_valid() {
        assert_eq!(args().validate(&plan()), Ok(()));
        assert_eq!(RawForward { lse: None, ..args() }.validate(&plan()), Ok(()));
    }

    #[test]
    fn device_addresses_are_aligned() {
        assert_eq!(message(|args| args.q.address = 0), "q is a null pointer; its tensor is not empty");
        assert_eq!(message(|args| args.lse = Some(0)), "lse is a null pointer; its tensor is not empty");
        assert_eq!(message(|args| args.v.address += 8), "v is at address 0x30008; a multiple of 16 bytes is needed");
        assert_eq!(
            message(|args| args.lse = Some(0x50002)),
            "lse is at address 0x50002; a multiple of 4 bytes is needed"
        );
        assert_eq!(RawForward { lse: Some(0x50004), ..args() }.validate(&plan()), Ok(()));
    }

    #[test]
    fn spans_have_addresses() {
        let error = message(|args| args.k.address = u64::MAX - 15);
        assert_eq!(error, "k spans 2560 bytes from address 0xfffffffffffffff0; at most 16 are allowed");
        let error = message(|args| args.lse = Some(u64::MAX - 15));
        assert_eq!(error, "lse spans 320 bytes from address 0xfffffffffffffff0; at most 16 are allowed");
    }

    #[test]
    fn strides_are_checked_where_they_matter() {
        let error = message(|args| args.k.layout.strides[2] = 20);
        assert_eq!(error, "k.strides: the seqlen stride is 20 elements; a multiple of 8 (16 bytes) is needed");
        let error = message(|args| args.o.layout.strides[0] = 1 << 39);
        let rule = "at most 549755813880 are allowed (under 2^40 bytes)";
        assert_eq!(error, format!("o.strides: the batch stride is 549755813888 elements; {rule}"));
        let problem = Problem { batch: 1, seqlen_k: 1, ..PROBLEM };
        let plan = Plan::forward(&problem, Mask::None, None, Dropout::NONE, 1).unwrap();
        let mut args = args();
        for tensor in [&mut args.q, &mut args.o] {
            tensor.layout = Layout::strided(problem.q_shape(), [3, 160, 16]);
        }
        for tensor in [&mut args.k, &mut args.v] {
            tensor.layout = Layout::strided(problem.kv_shape(), [usize::MAX, 0, 7]);
        }
        assert_eq!(args.validate(&plan), Ok(()));
        assert_eq!(args.k.strided(), Strided { address: 0x20000, stride_batch: 16, stride_head: 0, stride_row: 16 });
    }

    #[test]
    fn outputs_have_memory_of_their_own() {
        let o = args().o;
        let o_bytes = 2 * o.layout.required_len().unwrap() as u64;
        assert_eq!(message(|args| args.o.address = args.q.address), "o overlaps q; an output needs memory of its own");
        let error = message(|args| args.o.address = args.k.address - o_bytes + 16);
        assert_eq!(error, "o overlaps k; an output needs memory of its own");
        let error = message(|args| args.lse = Some(args.o.address + o_bytes - 4));
        assert_eq!(error, "lse overlaps o; an output needs memory of its own");
        let error = message(|args| args.lse = Some(args.v.address - 4));
        assert_eq!(error, "lse overlaps v; an output needs memory of its own");
        let touching = RawForward { lse: Some(o.address + o_bytes), ..args() };
        assert_eq!(touching.validate(&plan()), Ok(()));
        let error = message(|args| args.o.layout.strides[1] = 0);
        let rule = "an output's rows must not share memory, so at least 16 are needed here";
        assert_eq!(error, format!("o.strides: the heads stride is 0 elements; {rule}"));
    }

    #[test]
    fn inputs_may_share_memory() {
        let args = RawForward { v: args().k, ..args() };
        assert_eq!(args.validate(&plan()), Ok(()));
    }

    #[test]
    fn addresses_of_nothing_do_not_matter() {
        for problem in [Problem { batch: 0, ..PROBLEM }, Problem { seqlen_q: 0, seqlen_k: 0, ..PROBLEM }] {
            let plan = Plan::forward(&problem, Mask::None, None, Dropout::NONE, 1).unwrap();
            let tensor = |shape| RawTensor { address: 1, layout: Layout::strided(shape, [usize::MAX; 3]) };
            let (q, k) = (tensor(problem.q_shape()), tensor(problem.kv_shape()));
            assert_eq!(RawForward { q, k, second: None, v: k, o: q, lse: Some(0) }.validate(&plan), Ok(()));
        }
    }
}
