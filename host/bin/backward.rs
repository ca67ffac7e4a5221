//! A backward pass that runs again and again, in memory that was taken once.

use ferroflash::{
    Backend, BackwardInputs, BackwardPlan, Cpu, Element, Gradients, Operand, Pair, Plan, Result, SecondTensors, Tensor,
};

use crate::inputs::Inputs;

/// The tensors of a backward pass, each contiguous.
pub struct BackwardMemory<'a, B: Backend, E: Element> {
    inputs: &'a Inputs<B, E>,
    o: B::Buffer<E>,
    lse: B::Buffer<f32>,
    dq: B::Buffer<E>,
    dk: B::Buffer<E>,
    dv: B::Buffer<E>,
    /// Of the second pair of a piecewise pass.
    second: Option<Pair<B::Buffer<E>>>,
}

impl<'a, B: Backend, E: Element> BackwardMemory<'a, B, E> {
    /// Memory for the gradients, and O and the LSE from one forward pass over the inputs.
    pub fn new(backend: &B, forward: &Plan, inputs: &'a Inputs<B, E>) -> Result<Self> {
        let problem = forward.problem();
        let [q_len, kv_len] = [problem.q_shape(), problem.kv_shape()].map(|shape| shape.iter().product());
        let zeros = |operand, len| backend.allocate(operand, len, E::from_f32(0.0));
        let mut o = zeros(Operand::O, q_len)?;
        let mut lse = backend.allocate(Operand::Lse, problem.lse_len(), 0.0)?;
        let o_view = Tensor::bhsd(B::slice_mut(&mut o, 0..q_len), problem.q_shape());
        let lse_view = B::slice_mut(&mut lse, 0..problem.lse_len());
        backend.forward_into(forward, inputs.tensors(forward), o_view, Some(lse_view))?;
        let second = match forward.dist_threshold() {
            Some(_) => Some(Pair { q: zeros(Operand::Dq2, q_len)?, k: zeros(Operand::Dk2, kv_len)? }),
            None => None,
        };
        let (dq, dk, dv) = (zeros(Operand::Dq, q_len)?, zeros(Operand::Dk, kv_len)?, zeros(Operand::Dv, kv_len)?);
        Ok(BackwardMemory { inputs, o, lse, dq, dk, dv, second })
    }
}

/// On the CPU, where a run takes its own workspace.
pub fn on_cpu<'a, E: Element>(
    plan: &'a BackwardPlan,
    memory: &'a mut BackwardMemory<'_, Cpu, E>,
) -> impl FnMut() -> Result<()> + 'a {
    let (of_q, of_kv) = (plan.problem().q_shape(), plan.problem().kv_shape());
    let Inputs { q, k, v, second, d_o } = memory.inputs;
    move || {
        let inputs = BackwardInputs {
            q: q.tensor(of_q),
            k: k.tensor(of_kv),
            v: v.tensor(of_kv),
            o: Tensor::bhsd(&memory.o[..], of_q),
            d_o: d_o.tensor(of_q),
            lse: &memory.lse[..],
            d_lse: None,
        };
        let outputs = Gradients {
            dq: Tensor::bhsd(&mut memory.dq[..], of_q),
            dk: Tensor::bhsd(&mut memory.dk[..], of_kv),
            dv: Tensor::bhsd(&mut memory.dv[..], of_kv),
        };
        let second = memory.second.as_mut().map(|Pair { q: dq, k: dk }| SecondTensors {
            inputs: Pair { q: second.q.tensor(of_q), k: second.k.tensor(of_kv) },
            gradients: Pair { q: Tensor::bhsd(&mut dq[..], of_q), k: Tensor::bhsd(&mut dk[..], of_kv) },
        });
        Cpu.backward_into(plan, inputs, outputs, second)
    }
}

/// On the GPU, in one workspace for all runs.
#[cfg(feature = "cuda")]
pub fn on_cuda<'a, E: Element>(
    cuda: &'a ferroflash::Cuda,
    plan: &'a BackwardPlan,
    memory: &'a mut BackwardMemory<'_, ferroflash::Cuda, E>,
) -> Result<impl FnMut() -> Result<()> + 'a> {
    use ferroflash::cuda::DeviceBuffer;
    use ferroflash::{Layout, RawBackward, RawSecond, RawTensor};
    let workspace = cuda.allocate(Operand::Workspace, plan.workspace_bytes(), 0u8)?;
    let tensor = |buffer: &DeviceBuffer<E>, shape| RawTensor { address: buffer.address(), layout: Layout::bhsd(shape) };
    let (of_q, of_kv) = (plan.problem().q_shape(), plan.problem().kv_shape());
    let Inputs { q, k, v, second, d_o } = memory.inputs;
    Ok(move || {
        let args = RawBackward {
            q: tensor(&q.buffer, of_q),
            k: tensor(&k.buffer, of_kv),
            second: memory.second.as_ref().map(|Pair { q: dq, k: dk }| RawSecond {
                inputs: Pair { q: tensor(&second.q.buffer, of_q), k: tensor(&second.k.buffer, of_kv) },
                gradients: Pair { q: tensor(dq, of_q), k: tensor(dk, of_kv) },
            }),
            v: tensor(&v.buffer, of_kv),
            o: tensor(&memory.o, of_q),
            d_o: tensor(&d_o.buffer, of_q),
            lse: memory.lse.address(),
            d_lse: None,
            dq: tensor(&memory.dq, of_q),
            dk: tensor(&memory.dk, of_kv),
            dv: tensor(&memory.dv, of_kv),
            workspace: workspace.address(),
            workspace_bytes: workspace.len(),
        };
        // SAFETY: the buffers are this device's and as large as the plan's tensors, of its dtype; they are borrowed, and
        // the workspace owned, for as long as this closure lives. Freeing a buffer waits for the launches, and so do the
        // copies, all on the default stream.
        unsafe { cuda.backward_raw(plan, &args, std::ptr::null_mut()) }
    })
}
