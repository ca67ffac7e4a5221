//! A backward pass that runs again and again, in memory that was taken once.

use ferroflash::{
    Backend, BackwardInputs, BackwardPlan, Element, Gradients, Operand, Pair, Plan, Result, SecondTensors, Sinks,
    Workspace,
};

use crate::inputs::{Inputs, tensor};
use crate::shaping::{Lines, Shaping};

/// The tensors of a backward pass, each contiguous, and its workspace.
pub struct BackwardMemory<'a, B: Backend, E: Element> {
    inputs: &'a Inputs<B, E>,
    o: B::Buffer<E>,
    lse: B::Buffer<f32>,
    dq: B::Buffer<E>,
    dk: B::Buffer<E>,
    dv: B::Buffer<E>,
    /// Of the second pair of a piecewise pass.
    second: Option<Pair<B::Buffer<E>>>,
    /// Of a pass with sinks.
    d_sinks: Option<B::Buffer<f32>>,
    lines: Lines<B>,
    workspace: Workspace<B>,
}

impl<'a, B: Backend, E: Element> BackwardMemory<'a, B, E> {
    /// Memory for the gradients, and O and the LSE from one forward pass over the inputs.
    pub fn new(backend: &B, forward: &Plan, shaping: &Shaping, inputs: &'a Inputs<B, E>) -> Result<Self> {
        let problem = forward.problem();
        let [q_len, kv_len] = [problem.q_shape(), problem.kv_shape()].map(|shape| shape.iter().product());
        let memory = |operand, len| backend.allocate::<E>(operand, len);
        let mut o = memory(Operand::O, q_len)?;
        let mut lse = backend.allocate(Operand::Lse, problem.lse_len())?;
        let o_view = tensor(forward.options(), B::slice_mut(&mut o, 0..q_len), problem.q_shape());
        let lse_view = B::slice_mut(&mut lse, 0..problem.lse_len());
        let lines = Lines::new(backend, problem, shaping)?;
        forward.run(backend, inputs.tensors(forward).optional(lines.inputs()), o_view, Some(lse_view))?;
        let d_sinks = match forward.options().sinks {
            Sinks::None => None,
            Sinks::PerHead => Some(backend.allocate(Operand::DSinks, problem.heads_q)?),
        };
        let second = match forward.dist_threshold() {
            Some(_) => Some(Pair { q: memory(Operand::Dq2, q_len)?, k: memory(Operand::Dk2, kv_len)? }),
            None => None,
        };
        let (dq, dk, dv) = (memory(Operand::Dq, q_len)?, memory(Operand::Dk, kv_len)?, memory(Operand::Dv, kv_len)?);
        let workspace = Workspace::new();
        Ok(BackwardMemory { inputs, o, lse, dq, dk, dv, second, d_sinks, lines, workspace })
    }

    /// Runs the pass; only the first run allocates.
    pub fn run(&mut self, backend: &B, plan: &BackwardPlan) -> Result<()> {
        let (of_q, of_kv) = (plan.problem().q_shape(), plan.problem().kv_shape());
        let (q_len, kv_len) = (of_q.iter().product(), of_kv.iter().product());
        let Inputs { q, k, v, second, d_o } = self.inputs;
        let options = plan.options();
        let inputs = BackwardInputs {
            q: q.tensor(options, of_q),
            k: k.tensor(options, of_kv),
            v: v.tensor(options, of_kv),
            o: tensor(options, B::slice(&self.o), of_q),
            d_o: d_o.tensor(options, of_q),
            lse: B::slice(&self.lse),
            d_lse: None,
            optional: self.lines.inputs(),
        };
        let outputs = Gradients {
            dq: tensor(options, B::slice_mut(&mut self.dq, 0..q_len), of_q),
            dk: tensor(options, B::slice_mut(&mut self.dk, 0..kv_len), of_kv),
            dv: tensor(options, B::slice_mut(&mut self.dv, 0..kv_len), of_kv),
            d_sinks: self.d_sinks.as_mut().map(|d_sinks| B::slice_mut(d_sinks, 0..plan.problem().heads_q)),
        };
        let second = self.second.as_mut().map(|Pair { q: dq, k: dk }| SecondTensors {
            inputs: Pair { q: second.q.tensor(options, of_q), k: second.k.tensor(options, of_kv) },
            gradients: Pair {
                q: tensor(options, B::slice_mut(dq, 0..q_len), of_q),
                k: tensor(options, B::slice_mut(dk, 0..kv_len), of_kv),
            },
        });
        plan.run(backend, inputs, second, outputs, &mut self.workspace)
    }
}
