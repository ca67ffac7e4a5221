//! The tensors of a backward pass.

use kernels_gpu::{
    attention::any_features::AnyFeatures,
    attention::schedule::ScheduleParams,
    params::{BackwardBase, BackwardParams, FinishParams, PrepareParams, SinkGradientParams},
    variants::Dtype,
};

use super::{
    AddressSpace, BackwardInputs, BackwardPair, Check, Gradients, OptionalInputs, Pair, RawTensor,
    check::{check_d_sinks, check_dtype, check_second},
    lowered,
    pass::{Lines, Pass, Role, Tensors, Visited, VisitedLine, rows},
};
#[cfg(doc)]
use crate::error::Error;
use crate::{error::Result, plan::BackwardPlan, tensor::Tensor};

/// Tensors of a backward pass. Inputs are named by a `T` and f32 inputs by an `L`, gradients by an `O` and that of the
/// sinks by an `M`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackwardTensors<T, L, O, M> {
    /// Queries, (batch, heads_q, seqlen_q, head_dim).
    pub q: T,
    /// Keys, (batch, heads_kv, seqlen_k, head_dim).
    pub k: T,
    /// The second pair, for a plan of piecewise attention; `None` for others.
    pub second: Option<BackwardPair<T, O>>,
    /// Values, (batch, heads_kv, seqlen_k, head_dim).
    pub v: T,
    /// O of the forward pass, (batch, heads_q, seqlen_q, head_dim).
    pub o: T,
    /// The gradient of O, (batch, heads_q, seqlen_q, head_dim).
    pub d_o: T,
    /// LSE of the forward pass, f32 (batch, heads_q, seqlen_q), contiguous.
    pub lse: L,
    /// The gradient of the LSE, of the same shape; `None` if nothing depends on the LSE.
    pub d_lse: Option<L>,
    /// Slopes, sinks, and seed and offset of dropout of the forward pass, of the kinds that the plan is for.
    pub optional: OptionalInputs<L>,
    /// The gradient of Q, (batch, heads_q, seqlen_q, head_dim).
    pub dq: O,
    /// The gradient of K, (batch, heads_kv, seqlen_k, head_dim).
    pub dk: O,
    /// The gradient of V, (batch, heads_kv, seqlen_k, head_dim).
    pub dv: O,
    /// The gradient of the sinks, f32 (heads_q); `None` to omit it.
    pub d_sinks: Option<M>,
    /// Address of memory for the kernels' own use, a multiple of 256; its content does not matter.
    pub workspace: u64,
    /// Size of the workspace in bytes: at least [`BackwardPlan::workspace_bytes`].
    pub workspace_bytes: usize,
}

/// Tensors of a backward pass, named by their addresses, as frameworks hold them. Arrays of f32 are the
/// addresses of their first elements.
pub type RawBackward = BackwardTensors<RawTensor, u64, RawTensor, u64>;

impl<T, L, O, M, X: Tensors<T> + Lines<L> + Tensors<O> + Lines<M>> Pass<X> for BackwardTensors<T, L, O, M> {
    type Of = BackwardTensors<Visited<X, T>, VisitedLine<X, L>, Visited<X, O>, VisitedLine<X, M>>;

    fn visit(self, visitor: &mut X) -> Result<Self::Of> {
        let q = visitor.tensor(rows::Q, Role::Input, self.q)?;
        let k = visitor.tensor(rows::K, Role::Input, self.k)?;
        let v = visitor.tensor(rows::V, Role::Input, self.v)?;
        let o = visitor.tensor(rows::O, Role::Input, self.o)?;
        let d_o = visitor.tensor(rows::D_O, Role::Input, self.d_o)?;
        let lse = visitor.line(rows::LSE, Role::Input, self.lse)?;
        let d_lse = visitor.optional_line(rows::D_LSE, Role::Input, self.d_lse)?;
        let optional = self.optional.visit(visitor)?;
        let gradients = Gradients { dq: self.dq, dk: self.dk, dv: self.dv, d_sinks: self.d_sinks };
        let Gradients { dq, dk, dv, d_sinks } = gradients.visit(visitor)?;
        let second = self.second.map(|second| second.visit(visitor)).transpose()?;
        let (workspace, workspace_bytes) = (self.workspace, self.workspace_bytes);
        Ok(BackwardTensors {
            q,
            k,
            second,
            v,
            o,
            d_o,
            lse,
            d_lse,
            optional,
            dq,
            dk,
            dv,
            d_sinks,
            workspace,
            workspace_bytes,
        })
    }
}

impl<S, L, O, M> BackwardTensors<Tensor<S>, L, O, M> {
    /// Adds outputs to inputs. There is no workspace yet.
    pub(crate) fn new(
        inputs: BackwardInputs<S, L>,
        second: Option<BackwardPair<Tensor<S>, O>>,
        outputs: Gradients<O, M>,
    ) -> Self {
        let BackwardInputs { q, k, v, o, d_o, lse, d_lse, optional } = inputs;
        let Gradients { dq, dk, dv, d_sinks } = outputs;
        let (workspace, workspace_bytes) = (0, 0);
        BackwardTensors {
            q,
            k,
            second,
            v,
            o,
            d_o,
            lse,
            d_lse,
            optional,
            dq,
            dk,
            dv,
            d_sinks,
            workspace,
            workspace_bytes,
        }
    }
}

impl<S, L> BackwardTensors<Tensor<S>, L, (), ()> {
    /// Returns inputs whose outputs have no memory yet.
    pub(crate) fn inputs(inputs: BackwardInputs<S, L>, second: Option<Pair<Tensor<S>>>) -> Self {
        let second = second.map(|inputs| BackwardPair { inputs, gradients: Pair::default() });
        Self::new(inputs, second, Gradients { dq: (), dk: (), dv: (), d_sinks: None })
    }
}

impl<T, L, O, M> BackwardTensors<T, L, O, M> {
    /// Checks that the tensors are of the plan's kind, with elements of `dtype`, and visits them.
    pub(crate) fn lower<X>(self, plan: &BackwardPlan, dtype: Dtype, visitor: &mut X) -> Result<<Self as Pass<X>>::Of>
    where
        Self: Pass<X>,
    {
        check_second(plan.variant().op, self.second.is_some())?;
        self.optional.check(plan.inputs(), plan.dropout())?;
        check_d_sinks(&self.d_sinks, plan.inputs())?;
        check_dtype(plan.problem(), dtype)?;
        self.visit(visitor)
    }
}

impl RawBackward {
    /// Checks everything that can be checked from addresses and layouts, by the rules of device memory: shapes,
    /// strides, alignment and the workspace's size. Outputs and workspace must not share memory with themselves, with
    /// each other or with an input.
    ///
    /// # Errors
    /// [`Error::OptionalInput`], [`Error::ShapeMismatch`], [`Error::StrideNotMultiple`], [`Error::StrideTooLarge`],
    /// [`Error::SpanTooLarge`], [`Error::NullPointer`], [`Error::Misaligned`], [`Error::WorkspaceTooSmall`],
    /// [`Error::OutputAliasesItself`], [`Error::Overlap`].
    pub fn validate(&self, plan: &BackwardPlan) -> Result<()> {
        let mut check = Check::new(plan.problem(), AddressSpace::Device).of_kinds(plan.inputs());
        self.lower(plan, plan.problem().dtype, &mut check)?;
        check.workspace(self.workspace, self.workspace_bytes, plan.workspace_bytes())?;
        check.overlaps()
    }

    /// Returns the parameters of the kernel that writes the schedule, and the number of its lists, if lengths differ.
    pub(crate) fn schedule(&self, plan: &BackwardPlan) -> Option<(ScheduleParams, u32)> {
        let (schedule, lengths) = (plan.schedule.as_ref()?, self.optional.lengths.as_ref()?);
        Some((schedule.params(plan.problem(), lengths, self.workspace), schedule.count))
    }

    /// Returns the address of a list of the schedule; 0 if there is none.
    fn list(&self, plan: &BackwardPlan, index: usize) -> u64 {
        plan.schedule.map_or(0, |schedule| schedule.list(index, self.workspace))
    }

    /// Returns the parameters of the preprocess kernel.
    pub(crate) fn prepare(&self, plan: &BackwardPlan) -> PrepareParams {
        let (problem, schedule) = (plan.problem(), plan.schedule.as_ref());
        let row_array = |address| lowered::row_array(address, problem.seqlen_q, problem, schedule);
        PrepareParams {
            o: self.o.placed(schedule),
            d_o: self.d_o.placed(schedule),
            lse: row_array(Some(self.lse)),
            d_lse: row_array(self.d_lse),
            workspace: plan.workspace.at(self.workspace),
            shape: problem.kernel_shape(),
            sequences: lowered::sequences(schedule, self.workspace),
            list: self.list(plan, 0),
            head_dim: plan.variant().head_dim,
            pairs: plan.variant().op.pairs(),
            first: plan.first,
        }
    }

    /// Returns the main kernel's parameters for a plan that has work tiles. `q`, `k`, `v` and `d_o`, and the far pair
    /// if there is one, are as the machine names them.
    pub(crate) fn params<T: Copy>(
        &self,
        plan: &BackwardPlan,
        [q, k, v, d_o]: [T; 4],
        far: Option<Pair<T>>,
    ) -> BackwardParams<T, AnyFeatures> {
        let (far, schedule) = (far.unwrap_or(Pair { q, k }), plan.schedule.as_ref());
        let far_dk = self.second.as_ref().map_or(&self.dk, |second| &second.gradients.k);
        let base = BackwardBase {
            q: [q, far.q],
            k: [k, far.k],
            v,
            d_o,
            dk: [self.dk.placed(schedule), far_dk.placed(schedule)],
            dv: self.dv.placed(schedule),
            workspace: plan.workspace.at(self.workspace),
            scale: plan.scale(),
            shape: plan.problem().kernel_shape(),
            sequences: lowered::sequences(schedule, self.workspace),
            order: plan.order.with_list(self.list(plan, 1)),
            sharing: plan.sharing,
            first: plan.first,
            last_pair: plan.features.mask.pairs() - 1,
        };
        BackwardParams { base, features: lowered::features(&plan.features, &self.optional, plan.problem()) }
    }

    /// Returns the parameters of the postprocess kernel for each pair.
    pub(crate) fn finish(&self, plan: &BackwardPlan) -> impl Iterator<Item = FinishParams> {
        let (_, shared_head) = plan.shared();
        let schedule = plan.schedule.as_ref();
        let finish = |pair, dq: &RawTensor| FinishParams {
            dq: dq.placed(schedule),
            workspace: plan.workspace.at(self.workspace),
            scale: plan.scale(),
            shape: plan.problem().kernel_shape(),
            sequences: lowered::sequences(schedule, self.workspace),
            list: self.list(plan, 0),
            pair,
            key_blocks: plan.key_blocks(),
            shared_head,
            dk: self.dk.strided(),
            dv: self.dv.strided(),
            order: plan.order,
            sharing: plan.sharing,
            first: plan.first,
        };
        let second = self.second.as_ref().map(|second| finish(1, &second.gradients.q));
        [finish(0, &self.dq)].into_iter().chain(second)
    }

    /// Returns the parameters of the kernel that computes the gradient of the sinks, if it is wanted.
    pub(crate) fn sink_gradients(&self, plan: &BackwardPlan) -> Option<SinkGradientParams> {
        Some(SinkGradientParams {
            sinks: lowered::sinks_at(self.optional.sinks),
            d_sinks: self.d_sinks?,
            workspace: plan.workspace.at(self.workspace),
            shape: plan.problem().kernel_shape(),
            sequences: lowered::sequences(plan.schedule.as_ref(), self.workspace),
        })
    }
}

#[cfg(test)]
mod tests;
