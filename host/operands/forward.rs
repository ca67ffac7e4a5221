//! The tensors of a forward pass.

use kernels_gpu::{
    attention::any_features::AnyFeatures,
    attention::schedule::ScheduleParams,
    ground::tensor::Output,
    params::{ForwardBase, ForwardParams},
    variants::Dtype,
};

use super::{
    AddressSpace, Check, Inputs, OptionalInputs, Pair, RawTensor,
    check::{check_dtype, check_second},
    lowered,
    pair::SECOND,
    pass::{Lines, Pass, Role, Tensors, Visited, VisitedLine, rows},
};
#[cfg(doc)]
use crate::error::Error;
use crate::{error::Result, plan::Plan, tensor::Tensor};

/// Tensors of a forward pass. Inputs are named by a `T`, f32 inputs by an `L`, O by an `O` and the LSE by an `M`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForwardTensors<T, L, O, M> {
    /// Queries, (batch, heads_q, seqlen_q, head_dim).
    pub q: T,
    /// Keys, (batch, heads_kv, seqlen_k, head_dim).
    pub k: T,
    /// The second pair of queries and keys, of the same shapes, for a plan of piecewise attention; `None` for others.
    pub second: Option<Pair<T>>,
    /// Values, (batch, heads_kv, seqlen_k, head_dim).
    pub v: T,
    /// Slopes, sinks, and seed and offset of dropout, of the kinds that the plan is for.
    pub optional: OptionalInputs<L>,
    /// O, (batch, heads_q, seqlen_q, head_dim).
    pub o: O,
    /// The LSE, f32 (batch, heads_q, seqlen_q), contiguous; `None` to omit it.
    pub lse: Option<M>,
    /// Address of memory for the kernels' own use, a multiple of 256; its content does not matter. It may be 0 if the
    /// plan needs none.
    pub workspace: u64,
    /// Size of the workspace in bytes: at least [`Plan::workspace_bytes`].
    pub workspace_bytes: usize,
}

/// Tensors of a forward pass, named by their addresses, as frameworks hold them. The LSE and optional inputs are the
/// addresses of their first elements.
pub type RawForward = ForwardTensors<RawTensor, u64, RawTensor, u64>;

impl<T, L, O, M, X: Tensors<T> + Lines<L> + Tensors<O> + Lines<M>> Pass<X> for ForwardTensors<T, L, O, M> {
    type Of = ForwardTensors<Visited<X, T>, VisitedLine<X, L>, Visited<X, O>, VisitedLine<X, M>>;

    fn visit(self, visitor: &mut X) -> Result<Self::Of> {
        Ok(ForwardTensors {
            q: visitor.tensor(rows::Q, Role::Input, self.q)?,
            k: visitor.tensor(rows::K, Role::Input, self.k)?,
            v: visitor.tensor(rows::V, Role::Input, self.v)?,
            second: self.second.map(|second| visitor.pair(SECOND, Role::Input, second)).transpose()?,
            optional: self.optional.visit(visitor)?,
            o: visitor.tensor(rows::O, Role::Output, self.o)?,
            lse: visitor.optional_line(rows::LSE, Role::Output, self.lse)?,
            workspace: self.workspace,
            workspace_bytes: self.workspace_bytes,
        })
    }
}

impl<S, L, O, M> ForwardTensors<Tensor<S>, L, O, M> {
    /// Adds outputs to inputs. There is no workspace yet.
    pub(crate) fn new(inputs: Inputs<S, L>, o: O, lse: Option<M>) -> Self {
        let Inputs { q, k, second, v, optional } = inputs;
        ForwardTensors { q, k, second, v, optional, o, lse, workspace: 0, workspace_bytes: 0 }
    }
}

impl<T, L, O, M> ForwardTensors<T, L, O, M> {
    /// Checks that the tensors are of the plan's kind, with elements of `dtype`, and visits them.
    pub(crate) fn lower<X>(self, plan: &Plan, dtype: Dtype, visitor: &mut X) -> Result<<Self as Pass<X>>::Of>
    where
        Self: Pass<X>,
    {
        check_second(plan.variant().op, self.second.is_some())?;
        self.optional.check(plan.inputs(), plan.dropout())?;
        check_dtype(plan.problem(), dtype)?;
        self.visit(visitor)
    }
}

impl RawForward {
    /// Checks everything that can be checked from addresses and layouts, by the rules of device memory: shapes,
    /// strides, alignment. Outputs must not share memory with themselves or with another tensor.
    ///
    /// # Errors
    /// [`Error::OptionalInput`], [`Error::ShapeMismatch`], [`Error::StrideNotMultiple`], [`Error::StrideTooLarge`],
    /// [`Error::SpanTooLarge`], [`Error::NullPointer`], [`Error::Misaligned`], [`Error::OutputAliasesItself`],
    /// [`Error::Overlap`].
    pub fn validate(&self, plan: &Plan) -> Result<()> {
        let mut check = Check::new(plan.problem(), AddressSpace::Device).of_kinds(plan.inputs());
        self.lower(plan, plan.problem().dtype, &mut check)?;
        check.workspace(self.workspace, self.workspace_bytes, plan.workspace_bytes())?;
        check.overlaps()
    }

    /// Returns the parameters of the kernel that writes the schedule, and the number of its lists, if lengths differ.
    pub(crate) fn schedule(&self, plan: &Plan) -> Option<(ScheduleParams, u32)> {
        let (schedule, lengths) = (plan.schedule.as_ref()?, self.optional.lengths.as_ref()?);
        Some((schedule.params(plan.problem(), lengths, self.workspace), schedule.count))
    }

    /// Returns the launch parameters of a plan that has work tiles. `q`, `k`, `v` and `o`, and the far pair if there is
    /// one, are as the machine names them.
    pub(crate) fn params<T: Copy>(
        &self,
        plan: &Plan,
        [q, k, v, o]: [T; 4],
        far: Option<Pair<T>>,
    ) -> ForwardParams<T, AnyFeatures> {
        let (far, schedule) = (far.unwrap_or(Pair { q, k }), plan.schedule.as_ref());
        let base = ForwardBase {
            q: [q, far.q],
            k: [k, far.k],
            v,
            o: Output { tiles: o, rows: self.o.placed(schedule) },
            lse: lowered::row_array(self.lse, plan.problem().seqlen_q, plan.problem(), schedule),
            sinks: lowered::sinks_at(self.optional.sinks),
            shape: plan.problem().kernel_shape(),
            sequences: lowered::sequences(schedule, self.workspace),
            order: schedule.map_or(plan.order, |schedule| plan.order.with_list(schedule.list(0, self.workspace))),
            last_pair: plan.features.mask.pairs() - 1,
        };
        ForwardParams { base, features: lowered::features(&plan.features, &self.optional, plan.problem()) }
    }
}

#[cfg(test)]
mod tests {
    use kernels_gpu::ground::tensor::Strided;

    use super::*;
    use crate::dropout::Dropout;
    use crate::operands::SeedOffset;
    use crate::plan::Options;
    use crate::{problem::Problem, tensor::Layout};

    const PROBLEM: Problem =
        Problem { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 10, seqlen_k: 20, head_dim: 16, dtype: Dtype::F16 };

    fn plan() -> Plan {
        Plan::forward(&PROBLEM, &Options::default(), 1).unwrap()
    }

    /// Returns contiguous tensors, far from each other.
    fn args() -> RawForward {
        let tensor = |address, shape| RawTensor { address, layout: Layout::bhsd(shape) };
        RawForward {
            q: tensor(0x10000, PROBLEM.q_shape()),
            k: tensor(0x20000, PROBLEM.kv_shape()),
            second: None,
            optional: OptionalInputs::NONE,
            v: tensor(0x30000, PROBLEM.kv_shape()),
            o: tensor(0x40000, PROBLEM.q_shape()),
            lse: Some(0x50000),
            workspace: 0,
            workspace_bytes: 0,
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
    fn seed_and_offset_are_an_aligned_input() {
        let dropout = Dropout::from_memory(0.5);
        let plan = Plan::forward(&PROBLEM, &Options { dropout, ..Options::default() }, 1).unwrap();
        let at = |address| {
            let optional = OptionalInputs { seed_offset: Some(SeedOffset::at(address)), ..OptionalInputs::NONE };
            RawForward { optional, ..args() }
        };
        let message = |address| at(address).validate(&plan).unwrap_err().to_string();
        assert_eq!(at(0x60010).validate(&plan), Ok(()));
        assert_eq!(message(0x60008), "seed_offset is at address 0x60008; a multiple of 16 bytes is needed");
        assert_eq!(message(0), "seed_offset is a null pointer; its tensor is not empty");
        assert_eq!(message(args().o.address), "o overlaps seed_offset; an output needs memory of its own");
        let features = at(0x60010).params(&plan, [(); 4], None).features;
        assert_eq!(features, plan.features.with_seed_offset(Some(0x60010)));
        assert_ne!(features, plan.features);
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
        let plan = Plan::forward(&problem, &Options::default(), 1).unwrap();
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
            let plan = Plan::forward(&problem, &Options::default(), 1).unwrap();
            let tensor = |shape| RawTensor { address: 1, layout: Layout::strided(shape, [usize::MAX; 3]) };
            let (q, k) = (tensor(problem.q_shape()), tensor(problem.kv_shape()));
            let lse = Some(0);
            let args = RawForward { q, k, second: None, v: k, o: q, lse, ..args() };
            assert_eq!(args.validate(&plan), Ok(()));
        }
    }
}
