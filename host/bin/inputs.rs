//! Random inputs that stay on the device from one step to the next: to make and upload them takes far longer than to
//! measure with them.
//!
//! A step first lets go of what it does not read ([`Inputs::keep`]), then takes what it lacks ([`Inputs::upload`]), so
//! memory never holds more than the inputs of one step.

use ferroflash::cases::normal_values;
use ferroflash::{Backend, Element, Inputs as AttentionInputs, Operand, Options, Pair, Plan, Problem, Result, Tensor};

use crate::op::OpName;

/// The inputs of any pass, of one dtype, each contiguous. Those that a step does not read are empty.
pub struct Inputs<B: Backend, E: Element> {
    pub q: Input<B, E>,
    pub k: Input<B, E>,
    pub v: Input<B, E>,
    /// Of piecewise attention.
    pub second: Pair<Input<B, E>>,
    /// Of a backward pass.
    pub d_o: Input<B, E>,
}

impl<B: Backend, E: Element> Inputs<B, E> {
    /// All of them empty.
    pub fn new(backend: &B) -> Result<Self> {
        let empty = |operand| Input::new(backend, operand, 0);
        Ok(Inputs {
            q: empty(Operand::Q)?,
            k: empty(Operand::K)?,
            v: empty(Operand::V)?,
            second: Pair { q: empty(Operand::Q2)?, k: empty(Operand::K2)? },
            d_o: empty(Operand::DO)?,
        })
    }

    /// Frees those that a step does not read: other operands, other lengths, another dtype.
    pub fn keep(&mut self, backend: &B, op: OpName, problem: &Problem) -> Result<()> {
        for (input, len) in self.with_lengths(op, problem) {
            if input.len != len {
                *input = Input::new(backend, input.operand, 0)?;
            }
        }
        Ok(())
    }

    /// Makes and uploads those that a step reads and that are not there yet.
    pub fn upload(&mut self, backend: &B, op: OpName, problem: &Problem) -> Result<&Self> {
        for (input, len) in self.with_lengths(op, problem) {
            if input.len != len {
                *input = Input::new(backend, input.operand, len)?;
            }
        }
        Ok(self)
    }

    /// What a forward pass reads.
    pub fn tensors(&self, plan: &Plan) -> AttentionInputs<B::Slice<'_, E>, B::Slice<'_, f32>> {
        let (of_q, of_kv) = (plan.problem().q_shape(), plan.problem().kv_shape());
        let options = plan.options();
        let (q, k, v) = (self.q.tensor(options, of_q), self.k.tensor(options, of_kv), self.v.tensor(options, of_kv));
        match plan.dist_threshold() {
            Some(_) => {
                let second = Pair { q: self.second.q.tensor(options, of_q), k: self.second.k.tensor(options, of_kv) };
                AttentionInputs::piecewise(Pair { q, k }, second, v)
            }
            None => AttentionInputs::new(q, k, v),
        }
    }

    /// Each with the length that a step asks of it: none where it does not read it.
    fn with_lengths(&mut self, op: OpName, problem: &Problem) -> impl Iterator<Item = (&mut Input<B, E>, usize)> {
        let tensors = if problem.dtype == E::DTYPE { op.tensors(problem) } else { Vec::new() };
        let Inputs { q, k, v, second, d_o } = self;
        [q, k, v, &mut second.q, &mut second.k, d_o].into_iter().map(move |input| {
            let bytes = tensors.iter().find(|(operand, _)| *operand == input.operand).map_or(0, |&(_, bytes)| bytes);
            (input, bytes as usize / size_of::<E>())
        })
    }
}

/// One of the inputs.
pub struct Input<B: Backend, E: Element> {
    operand: Operand,
    len: usize,
    pub buffer: B::Buffer<E>,
}

impl<B: Backend, E: Element> Input<B, E> {
    fn new(backend: &B, operand: Operand, len: usize) -> Result<Self> {
        // Every operand has numbers of its own.
        let values = normal_values::<E>(operand as u64, len);
        Ok(Input { operand, len, buffer: backend.upload(operand, &values)? })
    }

    /// All of it, as a contiguous tensor.
    pub fn tensor(&self, options: &Options, shape: [usize; 4]) -> Tensor<B::Slice<'_, E>> {
        tensor(options, B::slice(&self.buffer), shape)
    }
}

/// Returns a contiguous tensor: (batch, heads, seqlen, head_dim) in a dense batch, and (tokens, heads, head_dim) if
/// sequences share it, as their users have it.
pub fn tensor<S>(options: &Options, data: S, shape: [usize; 4]) -> Tensor<S> {
    if options.sequences.is_some() { Tensor::bshd(data, shape) } else { Tensor::bhsd(data, shape) }
}

#[cfg(test)]
mod tests {
    use ferroflash::{Attention, Cpu, Dtype, bf16, f16};

    use super::*;

    const PROBLEM: Problem =
        Problem { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 10, seqlen_k: 20, head_dim: 64, dtype: Dtype::Bf16 };

    /// Where each input lies, and how long it is.
    fn places<E: Element>(inputs: &Inputs<Cpu, E>) -> [(*const E, usize); 6] {
        let Inputs { q, k, v, second, d_o } = inputs;
        [q, k, v, &second.q, &second.k, d_o].map(|input| (input.buffer.as_ptr(), input.buffer.len()))
    }

    fn step<E: Element>(inputs: &mut Inputs<Cpu, E>, op: OpName, problem: &Problem) {
        inputs.keep(&Cpu, op, problem).unwrap();
        inputs.upload(&Cpu, op, problem).unwrap();
    }

    #[test]
    fn what_agrees_stays_and_the_rest_goes() {
        let mut inputs = Inputs::<Cpu, bf16>::new(&Cpu).unwrap();
        step(&mut inputs, OpName::PiecewiseBackward, &PROBLEM);
        let (q_len, kv_len) = (2 * 4 * 10 * 64, 2 * 2 * 20 * 64);
        let first = places(&inputs);
        assert_eq!(first.map(|(_, len)| len), [q_len, kv_len, kv_len, q_len, kv_len, q_len]);
        // Other extents, the same lengths.
        step(&mut inputs, OpName::Backward, &Problem { seqlen_q: 20, seqlen_k: 40, head_dim: 32, ..PROBLEM });
        let second = places(&inputs);
        for i in [0, 1, 2, 5] {
            assert_eq!(second[i], first[i]);
        }
        assert_eq!(second.map(|(_, len)| len), [q_len, kv_len, kv_len, 0, 0, q_len]);
        step(&mut inputs, OpName::TotalAttention, &Problem { seqlen_k: 30, ..PROBLEM });
        let third = places(&inputs);
        assert_eq!(third[0], first[0]);
        assert_eq!(third.map(|(_, len)| len), [q_len, kv_len / 20 * 30, 0, 0, 0, 0]);
        inputs.keep(&Cpu, OpName::Forward, &Problem { dtype: Dtype::F16, ..PROBLEM }).unwrap();
        assert_eq!(places(&inputs).map(|(_, len)| len), [0; 6]);
    }

    #[test]
    fn every_input_has_numbers_of_its_own() {
        let problem = Problem { heads_kv: 4, seqlen_k: 10, dtype: Dtype::F16, ..PROBLEM };
        let mut inputs = Inputs::<Cpu, f16>::new(&Cpu).unwrap();
        step(&mut inputs, OpName::PiecewiseBackward, &problem);
        let Inputs { q, k, v, second, d_o } = &inputs;
        let all = [q, k, v, &second.q, &second.k, d_o].map(|input| &input.buffer);
        for (i, a) in all.iter().enumerate() {
            assert!(a.iter().filter(|x| x.to_f32() != 0.0).count() > a.len() / 2);
            assert!(all[i + 1..].iter().all(|b| a != b));
        }
    }

    #[test]
    fn a_pass_reads_them() {
        let mut inputs = Inputs::<Cpu, bf16>::new(&Cpu).unwrap();
        step(&mut inputs, OpName::Forward, &PROBLEM);
        let plan = Attention::new(PROBLEM).plan(1).unwrap();
        let tensors = inputs.tensors(&plan);
        Cpu.check_inputs::<bf16>(&plan, &tensors).unwrap();
    }
}
