//! The tensors of a backward pass.

use kernels_gpu::{
    attention::any_features::AnyFeatures,
    params::{BackwardBase, BackwardParams, FinishParams, PrepareParams},
    variants::Dtype,
};

use super::{
    AddressSpace, BackwardInputs, Gradients, Memory, Pair, RawTensor, SecondTensors, check_address, check_disjoint,
    check_dtype, check_lse, check_rows_apart, check_second, check_span, check_tensor, lse_region,
};
use crate::{
    error::{Error, Operand, Result},
    overlap::Region,
    plan::{BackwardPlan, WORKSPACE_ALIGNMENT},
    tensor::Tensor,
};

/// Second pair of piecewise attention in a backward pass: its tensors, and its gradients to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawSecond {
    /// Queries, (batch, heads_q, seqlen_q, head_dim), and keys, (batch, heads_kv, seqlen_k, head_dim).
    pub inputs: Pair<RawTensor>,
    /// Gradients of both, of the same shapes.
    pub gradients: Pair<RawTensor>,
}

/// Tensors of a backward pass, named by their addresses, as frameworks hold them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawBackward {
    /// Queries, (batch, heads_q, seqlen_q, head_dim).
    pub q: RawTensor,
    /// Keys, (batch, heads_kv, seqlen_k, head_dim).
    pub k: RawTensor,
    /// The second pair, for a plan of piecewise attention; `None` for others.
    pub second: Option<RawSecond>,
    /// Values, (batch, heads_kv, seqlen_k, head_dim).
    pub v: RawTensor,
    /// O of the forward pass, (batch, heads_q, seqlen_q, head_dim).
    pub o: RawTensor,
    /// The gradient of O, (batch, heads_q, seqlen_q, head_dim).
    pub d_o: RawTensor,
    /// Address of the forward pass's LSE, f32 (batch, heads_q, seqlen_q), contiguous.
    pub lse: u64,
    /// Address of the gradient of the LSE, of the same shape; `None` if nothing depends on the LSE.
    pub d_lse: Option<u64>,
    /// The gradient of Q, (batch, heads_q, seqlen_q, head_dim).
    pub dq: RawTensor,
    /// The gradient of K, (batch, heads_kv, seqlen_k, head_dim).
    pub dk: RawTensor,
    /// The gradient of V, (batch, heads_kv, seqlen_k, head_dim).
    pub dv: RawTensor,
    /// Address of memory for the kernels' own use, a multiple of 256; its content does not matter.
    pub workspace: u64,
    /// Size of the workspace in bytes: at least [`BackwardPlan::workspace_bytes`].
    pub workspace_bytes: usize,
}

impl RawBackward {
    /// Checks everything that can be checked from addresses and layouts, by the rules of device memory: shapes,
    /// strides, alignment and the workspace's size. Outputs and workspace must not share memory with themselves, with
    /// each other or with an input.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`], [`Error::StrideNotMultiple`], [`Error::StrideTooLarge`], [`Error::SpanTooLarge`],
    /// [`Error::NullPointer`], [`Error::Misaligned`], [`Error::WorkspaceTooSmall`], [`Error::OutputAliasesItself`],
    /// [`Error::Overlap`].
    pub fn validate(&self, plan: &BackwardPlan) -> Result<()> {
        let tensor = |raw: &RawTensor| Tensor { data: unsized_memory(raw.address), layout: raw.layout };
        let inputs = BackwardInputs {
            q: tensor(&self.q),
            k: tensor(&self.k),
            v: tensor(&self.v),
            o: tensor(&self.o),
            d_o: tensor(&self.d_o),
            lse: unsized_memory(self.lse),
            d_lse: self.d_lse.map(unsized_memory),
        };
        let outputs = Gradients { dq: tensor(&self.dq), dk: tensor(&self.dk), dv: tensor(&self.dv) };
        let second = self.second.as_ref();
        check_second(plan.variant().op, second.is_some())?;
        let second_inputs = second.map(|second| second.inputs.as_ref().map(tensor));
        let second_outputs = second.map(|second| second.gradients.as_ref().map(tensor));
        check_inputs(plan, &inputs, second_inputs.as_ref(), AddressSpace::Device)?;
        check_outputs(plan, &outputs, second_outputs.as_ref(), AddressSpace::Device)?;
        self.check_workspace(plan, AddressSpace::Device)?;
        self.check_overlaps(plan)
    }

    /// Lowers buffers of elements of `dtype` to addresses, and checks them as [`RawBackward::validate`] does, and their
    /// sizes as well. The caller fills in the workspace later, with its own memory.
    ///
    /// # Errors
    /// Errors of [`RawBackward::validate`], except alignment in the host's memory; [`Error::DtypeMismatch`],
    /// [`Error::BufferTooSmall`], [`Error::LseLength`].
    pub(crate) fn lower(
        plan: &BackwardPlan,
        dtype: Dtype,
        space: AddressSpace,
        inputs: &BackwardInputs<Memory, Memory>,
        outputs: &Gradients<Tensor<Memory>>,
        second: Option<&SecondTensors<Memory, Memory>>,
    ) -> Result<Self> {
        check_second(plan.variant().op, second.is_some())?;
        check_dtype(plan.problem(), dtype)?;
        check_inputs(plan, inputs, second.map(|second| &second.inputs), space)?;
        check_outputs(plan, outputs, second.map(|second| &second.gradients), space)?;
        let args = RawBackward {
            q: raw(&inputs.q),
            k: raw(&inputs.k),
            second: second.map(|SecondTensors { inputs, gradients }| RawSecond {
                inputs: inputs.as_ref().map(raw),
                gradients: gradients.as_ref().map(raw),
            }),
            v: raw(&inputs.v),
            o: raw(&inputs.o),
            d_o: raw(&inputs.d_o),
            lse: inputs.lse.address,
            d_lse: inputs.d_lse.map(|memory| memory.address),
            dq: raw(&outputs.dq),
            dk: raw(&outputs.dk),
            dv: raw(&outputs.dv),
            workspace: 0,
            workspace_bytes: 0,
        };
        args.check_overlaps(plan)?;
        Ok(args)
    }

    /// Returns the parameters of the preprocess kernel.
    pub(crate) fn prepare(&self, plan: &BackwardPlan) -> PrepareParams {
        PrepareParams {
            o: self.o.strided(),
            d_o: self.d_o.strided(),
            lse: self.lse,
            d_lse: self.d_lse.unwrap_or(0),
            workspace: plan.workspace.at(self.workspace),
            shape: plan.problem().kernel_shape(),
            head_dim: plan.variant().head_dim,
            pairs: plan.variant().op.pairs(),
            first: plan.first,
        }
    }

    /// Returns the main kernel's parameters for a plan that has work tiles. `q`, `k`, `v` and `d_o`, and the far pair if
    /// there is one, are as the machine names them.
    pub(crate) fn params<T: Copy>(
        &self,
        plan: &BackwardPlan,
        [q, k, v, d_o]: [T; 4],
        far: Option<Pair<T>>,
    ) -> BackwardParams<T, AnyFeatures> {
        let far = far.unwrap_or(Pair { q, k });
        let far_dk = self.second.as_ref().map_or(&self.dk, |second| &second.gradients.k);
        let base = BackwardBase {
            q: [q, far.q],
            k: [k, far.k],
            v,
            d_o,
            dk: [self.dk.strided(), far_dk.strided()],
            dv: self.dv.strided(),
            workspace: plan.workspace.at(self.workspace),
            scale: plan.scale(),
            shape: plan.problem().kernel_shape(),
            order: plan.order,
            sharing: plan.sharing,
            first: plan.first,
            last_pair: plan.features.mask.pairs() - 1,
        };
        BackwardParams { base, features: plan.features }
    }

    /// Returns the parameters of the postprocess kernel for each pair.
    pub(crate) fn finish(&self, plan: &BackwardPlan) -> impl Iterator<Item = FinishParams> {
        let (_, shared_head) = plan.shared();
        let finish = |pair, dq: &RawTensor| FinishParams {
            dq: dq.strided(),
            workspace: plan.workspace.at(self.workspace),
            scale: plan.scale(),
            shape: plan.problem().kernel_shape(),
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

    fn check_workspace(&self, plan: &BackwardPlan, space: AddressSpace) -> Result<()> {
        let (bytes, required) = (self.workspace_bytes, plan.workspace_bytes());
        if bytes < required {
            return Err(Error::WorkspaceTooSmall { bytes, required });
        }
        if required == 0 {
            return Ok(());
        }
        check_span(Operand::Workspace, self.workspace, required as u128)?;
        check_address(Operand::Workspace, self.workspace, WORKSPACE_ALIGNMENT, space)
    }

    /// Checks that outputs and workspace have memory of their own.
    fn check_overlaps(&self, plan: &BackwardPlan) -> Result<()> {
        let lse = |address| lse_region(plan.problem(), address);
        let workspace = match self.workspace {
            0 => None,
            address => Region::of_bytes(address, plan.workspace_bytes() as u128),
        };
        let mut others = vec![
            (Operand::Q, self.q.region()),
            (Operand::K, self.k.region()),
            (Operand::V, self.v.region()),
            (Operand::O, self.o.region()),
            (Operand::DO, self.d_o.region()),
            (Operand::Lse, lse(self.lse)),
            (Operand::DLse, self.d_lse.and_then(lse)),
        ];
        let mut outputs =
            vec![(Operand::Dq, self.dq.region()), (Operand::Dk, self.dk.region()), (Operand::Dv, self.dv.region())];
        if let Some(RawSecond { inputs, gradients }) = &self.second {
            others.extend([(Operand::Q2, inputs.q.region()), (Operand::K2, inputs.k.region())]);
            outputs.extend([(Operand::Dq2, gradients.q.region()), (Operand::Dk2, gradients.k.region())]);
        }
        for output in outputs.into_iter().chain([(Operand::Workspace, workspace)]) {
            for &other in &others {
                check_disjoint(output, other)?;
            }
            others.push(output);
        }
        Ok(())
    }
}

/// Checks each input alone.
pub(crate) fn check_inputs(
    plan: &BackwardPlan,
    inputs: &BackwardInputs<Memory, Memory>,
    second: Option<&Pair<Tensor<Memory>>>,
    space: AddressSpace,
) -> Result<()> {
    let BackwardInputs { q, k, v, o, d_o, lse, d_lse } = inputs;
    let mut tensors = vec![(Operand::Q, q), (Operand::K, k), (Operand::V, v), (Operand::O, o), (Operand::DO, d_o)];
    if let Some(Pair { q, k }) = second {
        tensors.extend([(Operand::Q2, q), (Operand::K2, k)]);
    }
    for (operand, tensor) in tensors {
        check_tensor(plan.problem(), operand, &raw(tensor), space, tensor.data.len)?;
    }
    check_lse(plan.problem(), Operand::Lse, *lse, space)?;
    d_lse.map_or(Ok(()), |d_lse| check_lse(plan.problem(), Operand::DLse, d_lse, space))
}

/// Checks each output alone.
fn check_outputs(
    plan: &BackwardPlan,
    outputs: &Gradients<Tensor<Memory>>,
    second: Option<&Pair<Tensor<Memory>>>,
    space: AddressSpace,
) -> Result<()> {
    let Gradients { dq, dk, dv } = outputs;
    let mut tensors = vec![(Operand::Dq, dq), (Operand::Dk, dk), (Operand::Dv, dv)];
    if let Some(Pair { q, k }) = second {
        tensors.extend([(Operand::Dq2, q), (Operand::Dk2, k)]);
    }
    for (operand, tensor) in tensors {
        check_tensor(plan.problem(), operand, &raw(tensor), space, tensor.data.len)?;
        check_rows_apart(operand, &tensor.layout)?;
    }
    Ok(())
}

fn raw(tensor: &Tensor<Memory>) -> RawTensor {
    RawTensor { address: tensor.data.address, layout: tensor.layout }
}

fn unsized_memory(address: u64) -> Memory {
    Memory { address, len: None }
}

#[cfg(test)]
mod tests;
