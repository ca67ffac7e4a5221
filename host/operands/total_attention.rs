//! The tensors of total attention.

use kernels_gpu::{
    attention::{dropout::NoDropout, features::Chosen, schedule::ScheduleParams},
    params::TotalParams,
    variants::Dtype,
};

use super::{
    AddressSpace, Check, RawTensor, Slopes, TotalInputs,
    check::{check_dtype, check_kinds},
    lowered,
    pass::{Lines, Pass, Role, Tensors, Visited, VisitedLine, rows},
};
#[cfg(doc)]
use crate::error::Error;
use crate::{
    error::Result,
    lengths::Lengths,
    plan::{Alibi, InputKinds, Sinks, TotalPlan},
    tensor::Tensor,
};

/// Tensors of total attention. Q and K are named by a `T`, f32 inputs by an `L` and the result by an `R`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TotalTensors<T, L, R> {
    /// Queries, (batch, heads_q, seqlen_q, head_dim).
    pub q: T,
    /// Keys, (batch, heads_kv, seqlen_k, head_dim).
    pub k: T,
    /// LSE of the forward pass, f32 (batch, heads_q, seqlen_q), contiguous.
    pub lse: L,
    /// Slopes of ALiBi, of the kind that the plan is for; `None` for no ALiBi.
    pub slopes: Option<Slopes<L>>,
    /// Lengths of sequences, of the kind that the plan is for; `None` for a dense batch.
    pub lengths: Option<Lengths<L>>,
    /// The result, f32 (batch, heads_q, seqlen_k), contiguous.
    pub total: R,
    /// Address of memory for the kernels' own use, a multiple of 256; its content does not matter. It may be 0 if the
    /// plan needs none.
    pub workspace: u64,
    /// Size of the workspace in bytes: at least [`TotalPlan::workspace_bytes`].
    pub workspace_bytes: usize,
}

/// Tensors of total attention, named by their addresses, as frameworks hold them. Arrays of f32 are
/// the addresses of their first elements.
pub type RawTotalAttention = TotalTensors<RawTensor, u64, u64>;

impl<T, L, R, X: Tensors<T> + Lines<L> + Lines<R>> Pass<X> for TotalTensors<T, L, R> {
    type Of = TotalTensors<Visited<X, T>, VisitedLine<X, L>, VisitedLine<X, R>>;

    fn visit(self, visitor: &mut X) -> Result<Self::Of> {
        Ok(TotalTensors {
            q: visitor.tensor(rows::Q, Role::Input, self.q)?,
            k: visitor.tensor(rows::K, Role::Input, self.k)?,
            lse: visitor.line(rows::LSE, Role::Input, self.lse)?,
            slopes: self.slopes.map(|slopes| slopes.visit(visitor)).transpose()?,
            lengths: self.lengths.map(|lengths| lengths.visit(visitor)).transpose()?,
            total: visitor.line(rows::TOTAL, Role::Output, self.total)?,
            workspace: self.workspace,
            workspace_bytes: self.workspace_bytes,
        })
    }
}

impl<S, L, R> TotalTensors<Tensor<S>, L, R> {
    /// Adds the result to inputs.
    pub(crate) fn new(inputs: TotalInputs<S, L>, total: R) -> Self {
        let TotalInputs { q, k, lse, slopes, lengths } = inputs;
        TotalTensors { q, k, lse, slopes, lengths, total, workspace: 0, workspace_bytes: 0 }
    }
}

impl<T, L, R> TotalTensors<T, L, R> {
    /// Checks that the tensors' elements are of the plan's dtype, and visits them.
    pub(crate) fn lower<X>(self, plan: &TotalPlan, dtype: Dtype, visitor: &mut X) -> Result<<Self as Pass<X>>::Of>
    where
        Self: Pass<X>,
    {
        let alibi = self.slopes.as_ref().map_or(Alibi::None, Slopes::kind);
        let sequences = self.lengths.as_ref().map(Lengths::kind);
        check_kinds(InputKinds { alibi, sinks: Sinks::None, sequences }, plan.inputs())?;
        check_dtype(plan.problem(), dtype)?;
        self.visit(visitor)
    }
}

impl RawTotalAttention {
    /// Checks everything that can be checked from addresses and layouts, by the rules of device memory: shapes,
    /// strides, alignment. The result must not share memory with an input.
    ///
    /// # Errors
    /// [`Error::OptionalInput`], [`Error::ShapeMismatch`], [`Error::StrideNotMultiple`], [`Error::StrideTooLarge`],
    /// [`Error::SpanTooLarge`], [`Error::NullPointer`], [`Error::Misaligned`], [`Error::Overlap`].
    pub fn validate(&self, plan: &TotalPlan) -> Result<()> {
        let mut check = Check::new(plan.problem(), AddressSpace::Device).of_kinds(plan.inputs());
        self.lower(plan, plan.problem().dtype, &mut check)?;
        check.workspace(self.workspace, self.workspace_bytes, plan.workspace_bytes())?;
        check.overlaps()
    }

    /// Returns the parameters of the kernel that writes the schedule, and the number of its lists, if lengths differ.
    pub(crate) fn schedule(&self, plan: &TotalPlan) -> Option<(ScheduleParams, u32)> {
        let (schedule, lengths) = (plan.schedule.as_ref()?, self.lengths.as_ref()?);
        Some((schedule.params(plan.problem(), lengths, self.workspace), schedule.count))
    }

    /// Returns the launch parameters of a plan that has work tiles. `q` and `k` are as the machine names them.
    pub(crate) fn params<T>(&self, plan: &TotalPlan, [q, k]: [T; 2]) -> TotalParams<T> {
        let (problem, schedule) = (plan.problem(), plan.schedule.as_ref());
        TotalParams {
            q,
            k,
            lse: lowered::row_array(Some(self.lse), problem.seqlen_q, problem, schedule),
            total: lowered::row_array(Some(self.total), problem.seqlen_k, problem, schedule),
            shape: problem.kernel_shape(),
            sequences: lowered::sequences(schedule, self.workspace),
            order: schedule.map_or(plan.order, |schedule| plan.order.with_list(schedule.list(0, self.workspace))),
            shared_from: plan.shared_from,
            features: Chosen {
                mask: plan.mask().window(plan.problem()),
                score: lowered::with_slopes(plan.features.score, self.slopes, plan.problem()),
                weights: NoDropout,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operands::place::Memory;
    use crate::{
        error::{Error, Operand},
        plan::Options,
        problem::Problem,
        tensor::{Layout, Tensor},
    };

    const PROBLEM: Problem =
        Problem { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 10, seqlen_k: 20, head_dim: 16, dtype: Dtype::F16 };

    fn plan(problem: &Problem) -> TotalPlan {
        TotalPlan::new(problem, &Options::default(), 1).unwrap()
    }

    /// Returns contiguous tensors, far from each other.
    fn args() -> RawTotalAttention {
        let tensor = |address, shape| RawTensor { address, layout: Layout::bhsd(shape) };
        RawTotalAttention {
            q: tensor(0x10000, PROBLEM.q_shape()),
            k: tensor(0x20000, PROBLEM.kv_shape()),
            lse: 0x30000,
            slopes: None,
            lengths: None,
            total: 0x40000,
            workspace: 0,
            workspace_bytes: 0,
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
        let lower = |dtype, lse, total| {
            let tensors = TotalTensors {
                q: tensor(0x10000, PROBLEM.q_shape()),
                k: tensor(0x20000, PROBLEM.kv_shape()),
                lse: memory(0x30000, lse),
                slopes: None,
                lengths: None,
                total: memory(0x40000, total),
                workspace: 0,
                workspace_bytes: 0,
            };
            tensors.lower(&plan(&PROBLEM), dtype, &mut Check::new(&PROBLEM, AddressSpace::Host))
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
            ..args()
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
