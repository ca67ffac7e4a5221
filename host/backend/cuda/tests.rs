//! Tests that tensors of another device are refused, for every operand. Without a second device, slices claim to lie on
//! one.

use half::bf16;
use kernels_gpu::element::Dtype;

use super::stream::Home;
use super::{Cuda, DeviceBuffer, DeviceSlice, DeviceSliceMut};
use crate::backend::{Backend, Workspace};
use crate::error::{Error, Operand};
use crate::operands::{BackwardInputs, Gradients, Inputs, OptionalInputs, Pair, SecondTensors, TotalInputs};
use crate::tensor::Tensor;
use crate::{Attention, Piecewise, Problem};

const PROBLEM: Problem =
    Problem { batch: 1, heads_q: 2, heads_kv: 1, seqlen_q: 20, seqlen_k: 30, head_dim: 64, dtype: Dtype::Bf16 };

/// Memory of a test: one buffer that is long enough for every operand.
struct Memory {
    cuda: Cuda,
    elements: DeviceBuffer<bf16>,
    lse: DeviceBuffer<f32>,
    total: DeviceBuffer<f32>,
    /// Operand that claims to lie elsewhere.
    elsewhere: Operand,
}

impl Memory {
    fn home(&self, operand: Operand) -> Home<'_> {
        let ordinal = self.cuda.ordinal() + u32::from(operand == self.elsewhere);
        Home { ordinal, stream: Some(&self.cuda.stream) }
    }
    fn shape(operand: Operand) -> [usize; 4] {
        match operand {
            Operand::K | Operand::V | Operand::K2 | Operand::Dk | Operand::Dv | Operand::Dk2 => PROBLEM.kv_shape(),
            _ => PROBLEM.q_shape(),
        }
    }
    fn read(&self, operand: Operand) -> Tensor<DeviceSlice<'_, bf16>> {
        let slice = DeviceSlice { home: self.home(operand), ..self.elements.as_slice() };
        Tensor::bhsd(slice, Self::shape(operand))
    }
    fn write(&self, operand: Operand) -> Tensor<DeviceSliceMut<'_, bf16>> {
        // SAFETY: refused before anything is written.
        let slice = unsafe { DeviceSliceMut::from_raw(&self.cuda, self.elements.address(), self.elements.len()) };
        Tensor::bhsd(DeviceSliceMut { home: self.home(operand), ..slice }, Self::shape(operand))
    }
    fn line(&self, operand: Operand) -> DeviceSlice<'_, f32> {
        DeviceSlice { home: self.home(operand), ..self.lse.as_slice() }
    }
    fn line_mut(&self, operand: Operand) -> DeviceSliceMut<'_, f32> {
        let buffer = if operand == Operand::Total { &self.total } else { &self.lse };
        // SAFETY: refused before anything is written.
        let slice = unsafe { DeviceSliceMut::from_raw(&self.cuda, buffer.address(), buffer.len()) };
        DeviceSliceMut { home: self.home(operand), ..slice }
    }
    fn pair(&self) -> Pair<Tensor<DeviceSlice<'_, bf16>>> {
        Pair { q: self.read(Operand::Q2), k: self.read(Operand::K2) }
    }

    /// Returns the error of the pass that takes the operand.
    fn refused(&self) -> Option<Error> {
        let sm_count = self.cuda.sm_count();
        let piecewise = Piecewise::new(Attention::new(PROBLEM), 5);
        let (q, k, v) = (self.read(Operand::Q), self.read(Operand::K), self.read(Operand::V));
        match self.elsewhere {
            Operand::Q | Operand::K | Operand::V | Operand::Q2 | Operand::K2 | Operand::O | Operand::Lse => {
                let inputs = Inputs::piecewise(Pair { q, k }, self.pair(), v);
                let (o, lse) = (self.write(Operand::O), Some(self.line_mut(Operand::Lse)));
                piecewise.plan(sm_count).unwrap().run(&self.cuda, inputs, o, lse).err()
            }
            Operand::Total => {
                let (lse, total) = (self.line(Operand::Lse), self.line_mut(Operand::Total));
                let plan = Attention::new(PROBLEM).plan_total_attention(sm_count).unwrap();
                plan.run(&self.cuda, TotalInputs::new(q, k, lse), total).err()
            }
            _ => {
                let inputs = BackwardInputs {
                    q,
                    k,
                    v,
                    o: self.read(Operand::O),
                    d_o: self.read(Operand::DO),
                    lse: self.line(Operand::Lse),
                    d_lse: Some(self.line(Operand::DLse)),
                    optional: OptionalInputs::NONE,
                };
                let gradients = Pair { q: self.write(Operand::Dq2), k: self.write(Operand::Dk2) };
                let second = Some(SecondTensors { inputs: self.pair(), gradients });
                let outputs = Gradients {
                    dq: self.write(Operand::Dq),
                    dk: self.write(Operand::Dk),
                    dv: self.write(Operand::Dv),
                    d_sinks: None,
                };
                let plan = piecewise.plan_backward(sm_count).unwrap();
                plan.run(&self.cuda, inputs, second, outputs, &mut Workspace::new()).err()
            }
        }
    }
}

#[test]
fn every_operand_of_another_device_is_refused() {
    let Ok(cuda) = Cuda::new(0).inspect_err(|error| println!("skipped: {error}")) else { return };
    let operands = [
        Operand::Q,
        Operand::K,
        Operand::V,
        Operand::Q2,
        Operand::K2,
        Operand::O,
        Operand::Lse,
        Operand::DO,
        Operand::DLse,
        Operand::Dq,
        Operand::Dk,
        Operand::Dv,
        Operand::Dq2,
        Operand::Dk2,
        Operand::Total,
    ];
    for elsewhere in operands {
        let memory = Memory {
            cuda: cuda.clone(),
            elements: cuda.allocate(Operand::Q, 2 * 30 * 64).unwrap(),
            lse: cuda.allocate(Operand::Lse, PROBLEM.lse_len()).unwrap(),
            total: cuda.allocate(Operand::Total, PROBLEM.total_len()).unwrap(),
            elsewhere,
        };
        let expected = Error::WrongDevice { operand: elsewhere, found: 1, expected: 0 };
        assert_eq!(memory.refused(), Some(expected));
    }
}
