//! The tensors of a backward pass.

use kernels_gpu::{
    params::{BackwardParams, BackwardSecondPair, FinishParams, PrepareParams},
    variants::Dtype,
};

use super::{
    AddressSpace, BackwardInputs, Gradients, Memory, Pair, RawTensor, SecondTensors, check_address, check_disjoint,
    check_dtype, check_lse, check_rows_apart, check_second, check_span, check_tensor, lse_region, second_pair,
};
use crate::{
    error::{Error, Operand, Result},
    overlap::Region,
    plan::{BackwardPlan, WORKSPACE_ALIGNMENT},
    tensor::Tensor,
};

/// The second pair of piecewise attention in a backward pass: its tensors, and their gradients to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawSecond {
    /// Queries, (batch, heads_q, seqlen_q, head_dim), and keys, (batch, heads_kv, seqlen_k, head_dim).
    pub inputs: Pair<RawTensor>,
    /// Their gradients, of the same shapes.
    pub gradients: Pair<RawTensor>,
}

/// The tensors of a backward pass, named by their addresses: what a framework has at hand.
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
    /// What the forward pass gave, (batch, heads_q, seqlen_q, head_dim).
    pub o: RawTensor,
    /// The gradient of O, (batch, heads_q, seqlen_q, head_dim).
    pub d_o: RawTensor,
    /// Address of the LSE that the forward pass gave, f32 (batch, heads_q, seqlen_q), contiguous.
    pub lse: u64,
    /// Address of the gradient of the LSE, of the same shape; `None` where nothing depends on the LSE.
    pub d_lse: Option<u64>,
    /// The gradient of Q, (batch, heads_q, seqlen_q, head_dim).
    pub dq: RawTensor,
    /// The gradient of K, (batch, heads_kv, seqlen_k, head_dim).
    pub dk: RawTensor,
    /// The gradient of V, (batch, heads_kv, seqlen_k, head_dim).
    pub dv: RawTensor,
    /// Address of memory for the kernels' own use, a multiple of 256; its content does not matter.
    pub workspace: u64,
    /// Its size: at least [`BackwardPlan::workspace_bytes`].
    pub workspace_bytes: usize,
}

impl RawBackward {
    /// Checks everything that addresses and layouts tell, by the rules of device memory: shapes, strides, alignment,
    /// the workspace's size, and that outputs and workspace share memory neither with themselves nor with each other
    /// nor with an input.
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
    /// sizes beside. The workspace is left for the caller to fill in, with memory of its own.
    ///
    /// # Errors
    /// Those of [`RawBackward::validate`], of which the host's memory knows no alignment; [`Error::DtypeMismatch`],
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

    /// Parameters of the kernel that prepares the workspace.
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
        }
    }

    /// The second pair where there is one, as kernels take it, its tensors as the machine names them.
    pub(crate) fn second<T>(&self, plan: &BackwardPlan, named: Option<Pair<T>>) -> Option<BackwardSecondPair<T>> {
        let pair = second_pair(plan.dist_threshold(), named)?;
        Some(BackwardSecondPair { pair, dk: self.second?.gradients.k.strided() })
    }

    /// Parameters of the main kernel of a plan that has work tiles; `q`, `k`, `v` and `d_o` as the machine names them, and
    /// what [`RawBackward::second`] made of the second pair.
    pub(crate) fn params<T, S>(&self, plan: &BackwardPlan, [q, k, v, d_o]: [T; 4], second: S) -> BackwardParams<T, S> {
        BackwardParams {
            second,
            q,
            k,
            v,
            d_o,
            dk: self.dk.strided(),
            dv: self.dv.strided(),
            workspace: plan.workspace.at(self.workspace),
            scale: plan.scale(),
            shape: plan.problem().kernel_shape(),
            order: plan.order,
        }
    }

    /// Parameters of the kernel that turns the workspace's dQ into the tensor, for each pair.
    pub(crate) fn finish(&self, plan: &BackwardPlan) -> impl Iterator<Item = FinishParams> {
        let finish = |pair, dq: &RawTensor| FinishParams {
            dq: dq.strided(),
            workspace: plan.workspace.at(self.workspace),
            scale: plan.scale(),
            shape: plan.problem().kernel_shape(),
            pair,
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

    /// Checks that what is written has memory of its own.
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

/// Checks the inputs by themselves.
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

/// Checks each output by itself.
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
mod tests {
    use super::*;
    use crate::dropout::Dropout;
    use crate::{
        plan::Determinism,
        problem::{Mask, Problem},
        tensor::Layout,
    };

    const PROBLEM: Problem =
        Problem { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 10, seqlen_k: 20, head_dim: 16, dtype: Dtype::F16 };

    fn plan(problem: &Problem) -> BackwardPlan {
        BackwardPlan::new(problem, Mask::None, None, Dropout::NONE, Determinism::Exact, 1).unwrap()
    }

    fn tensor(address: u64, shape: [usize; 4]) -> RawTensor {
        RawTensor { address, layout: Layout::bhsd(shape) }
    }

    /// Contiguous tensors, far from each other.
    fn args() -> RawBackward {
        let (q, kv) = (PROBLEM.q_shape(), PROBLEM.kv_shape());
        RawBackward {
            q: tensor(0x10000, q),
            k: tensor(0x20000, kv),
            second: None,
            v: tensor(0x30000, kv),
            o: tensor(0x40000, q),
            d_o: tensor(0x50000, q),
            lse: 0x60000,
            d_lse: Some(0x70000),
            dq: tensor(0x80000, q),
            dk: tensor(0x90000, kv),
            dv: tensor(0xa0000, kv),
            workspace: 0x1000000,
            workspace_bytes: plan(&PROBLEM).workspace_bytes(),
        }
    }

    #[track_caller]
    fn message(change: impl FnOnce(&mut RawBackward)) -> String {
        let mut args = args();
        change(&mut args);
        args.validate(&plan(&PROBLEM)).unwrap_err().to_string()
    }

    /// Every tensor of 16-bit elements.
    fn tensors(args: &mut RawBackward) -> [(&'static str, &mut RawTensor); 8] {
        let RawBackward { q, k, v, o, d_o, dq, dk, dv, .. } = args;
        [("q", q), ("k", k), ("v", v), ("o", o), ("d_o", d_o), ("dq", dq), ("dk", dk), ("dv", dv)]
    }

    #[test]
    fn contiguous_tensors_are_valid() {
        assert_eq!(args().validate(&plan(&PROBLEM)), Ok(()));
        assert_eq!(RawBackward { d_lse: None, ..args() }.validate(&plan(&PROBLEM)), Ok(()));
        assert_eq!(RawBackward { workspace_bytes: usize::MAX, ..args() }.validate(&plan(&PROBLEM)), Ok(()));
    }

    #[test]
    fn every_tensor_is_checked() {
        for i in 0..8 {
            let name = tensors(&mut args())[i].0;
            let error = message(|args| tensors(args)[i].1.address = 0);
            assert_eq!(error, format!("{name} is a null pointer; its tensor is not empty"));
            let error = message(|args| tensors(args)[i].1.address += 8);
            assert!(error.starts_with(&format!("{name} is at address 0x")) && error.ends_with("of 16 bytes is needed"));
            let error = message(|args| tensors(args)[i].1.address = u64::MAX - 15);
            assert!(error.starts_with(&format!("{name} spans ")), "{error}");
            let error = message(|args| tensors(args)[i].1.layout.strides[2] = 20);
            assert!(error.starts_with(&format!("{name}.strides: the seqlen stride is 20 elements; a multiple of 8")));
            let error = message(|args| tensors(args)[i].1.layout.strides[0] = 1 << 39);
            assert!(error.starts_with(&format!("{name}.strides: the batch stride is 549755813888 elements; at most")));
            let error = message(|args| tensors(args)[i].1.layout.shape[2] = 7);
            assert!(error.starts_with(&format!("{name}.shape is [2, ")), "{error}");
        }
    }

    #[test]
    fn lines_are_checked() {
        assert_eq!(message(|args| args.lse = 0), "lse is a null pointer; its tensor is not empty");
        assert_eq!(message(|args| args.d_lse = Some(0)), "d_lse is a null pointer; its tensor is not empty");
        let error = message(|args| args.d_lse = Some(0x70002));
        assert_eq!(error, "d_lse is at address 0x70002; a multiple of 4 bytes is needed");
        let error = message(|args| args.lse = u64::MAX - 15);
        assert_eq!(error, "lse spans 320 bytes from address 0xfffffffffffffff0; at most 16 are allowed");
    }

    #[test]
    fn the_workspace_is_checked() {
        let required = plan(&PROBLEM).workspace_bytes();
        let error = message(|args| args.workspace_bytes -= 1);
        assert_eq!(error, format!("workspace has {} bytes; the plan needs {required}", required - 1));
        assert_eq!(message(|args| args.workspace = 0), "workspace is a null pointer; its tensor is not empty");
        let error = message(|args| args.workspace += 128);
        assert_eq!(error, "workspace is at address 0x1000080; a multiple of 256 bytes is needed");
        let error = message(|args| args.workspace = u64::MAX - 255);
        assert!(error.starts_with(&format!("workspace spans {required} bytes from address 0xffffffffffffff00; ")));
    }

    #[test]
    fn outputs_have_memory_of_their_own() {
        let rule = "an output needs memory of its own";
        for output in 5..8 {
            for other in (0..8).filter(|&other| other != output) {
                let mut args = args();
                let address = tensors(&mut args)[other].1.address;
                let names = [output, other].map(|i| tensors(&mut args)[i].0);
                tensors(&mut args)[output].1.address = address + 16;
                let found = args.validate(&plan(&PROBLEM)).unwrap_err().to_string();
                // Of two outputs, the later one is at fault.
                let [output, other] = if other > output && other >= 5 { [names[1], names[0]] } else { names };
                assert_eq!(found, format!("{output} overlaps {other}; {rule}"));
            }
            let name = tensors(&mut args())[output].0;
            for (line, address) in [("lse", 0x60000), ("d_lse", 0x70000)] {
                let found = message(|args| tensors(args)[output].1.address = address);
                assert_eq!(found, format!("{name} overlaps {line}; {rule}"));
            }
            let found = message(|args| tensors(args)[output].1.layout.strides[1] = 0);
            assert!(found.starts_with(&format!("{name}.strides: the heads stride is 0 elements; an output's rows")));
        }
    }

    #[test]
    fn the_workspace_has_memory_of_its_own() {
        let rule = "an output needs memory of its own";
        for i in 0..8 {
            let name = tensors(&mut args())[i].0;
            let last = args().workspace + args().workspace_bytes as u64 - 16;
            let found = message(|args| tensors(args)[i].1.address = last);
            assert_eq!(found, format!("workspace overlaps {name}; {rule}"));
        }
        let found = message(|args| args.lse = args.workspace - 4);
        assert_eq!(found, format!("workspace overlaps lse; {rule}"));
        let found = message(|args| args.d_lse = Some(args.workspace + 4));
        assert_eq!(found, format!("workspace overlaps d_lse; {rule}"));
    }

    #[test]
    fn gradients_may_be_parts_of_one_tensor_and_inputs_shared() {
        // (batch, seqlen, q and k and v, heads, head_dim)
        let problem = Problem { heads_kv: 4, seqlen_k: 10, ..PROBLEM };
        let layout = Layout::strided(problem.q_shape(), [10 * 192, 16, 192]);
        let part = |i: u64| RawTensor { address: 0x80000 + 128 * i, layout };
        let q = tensor(0x10000, problem.q_shape());
        let parts = RawBackward { q, k: q, v: q, d_o: q, dq: part(0), dk: part(1), dv: part(2), ..args() };
        assert_eq!(parts.validate(&plan(&problem)), Ok(()));
        assert!(RawBackward { dv: part(1), ..parts }.validate(&plan(&problem)).is_err());
    }

    #[test]
    fn addresses_of_nothing_do_not_matter() {
        for problem in [Problem { batch: 0, ..PROBLEM }, Problem { seqlen_q: 0, seqlen_k: 0, ..PROBLEM }] {
            let tensor = |shape| RawTensor { address: 1, layout: Layout::strided(shape, [usize::MAX; 3]) };
            let (q, k) = (tensor(problem.q_shape()), tensor(problem.kv_shape()));
            let args = RawBackward {
                q,
                k,
                second: None,
                v: k,
                o: q,
                d_o: q,
                lse: 0,
                d_lse: Some(0),
                dq: q,
                dk: k,
                dv: k,
                workspace: 0,
                workspace_bytes: 0,
            };
            assert_eq!(args.validate(&plan(&problem)), Ok(()));
        }
    }
}
