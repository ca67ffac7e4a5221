//! A backward pass that runs again and again, in memory that was taken once.

use ferroflash::cases::Case;
use ferroflash::{
    Attention, Backend, BackwardInputs, BackwardPlan, Cpu, Element, Gradients, Operand, Pair, Piecewise, Result,
    SecondTensors, Tensor,
};

/// Makes dO other numbers than the inputs.
const GRADIENT_SEED: u64 = 1;
/// Makes a second pair other numbers than the first.
const SECOND_SEED: u64 = 2;

/// The tensors of a backward pass, each contiguous.
pub struct BackwardMemory<B: Backend, E: Element> {
    q: B::Buffer<E>,
    k: B::Buffer<E>,
    v: B::Buffer<E>,
    o: B::Buffer<E>,
    d_o: B::Buffer<E>,
    lse: B::Buffer<f32>,
    dq: B::Buffer<E>,
    dk: B::Buffer<E>,
    dv: B::Buffer<E>,
    second: Option<SecondMemory<B::Buffer<E>>>,
}

/// The second pair of a piecewise pass, and its gradients.
struct SecondMemory<T> {
    inputs: Pair<T>,
    gradients: Pair<T>,
}

impl<B: Backend, E: Element> BackwardMemory<B, E> {
    /// Random inputs, and O and the LSE from one forward pass.
    pub fn new(backend: &B, attention: &Attention, case: &Case, dist_threshold: Option<i32>) -> Result<Self> {
        let problem = &case.problem;
        let (of_q, of_kv) = (problem.q_shape(), problem.kv_shape());
        let (q_len, kv_len) = (of_q.iter().product(), of_kv.iter().product());
        let [d_o, ..] = Case { seed: case.seed ^ GRADIENT_SEED, ..*case }.random_inputs::<E>()?;
        let d_o = backend.upload(Operand::DO, &d_o)?;
        let [q, k, v] = case.random_inputs::<E>()?;
        let q = backend.upload(Operand::Q, &q)?;
        let k = backend.upload(Operand::K, &k)?;
        let v = backend.upload(Operand::V, &v)?;
        let second = dist_threshold.map(|_| second_pair(backend, case)).transpose()?;
        let zeros = |operand, len| backend.allocate(operand, len, E::from_f32(0.0));
        let mut o = zeros(Operand::O, q_len)?;
        let mut lse = backend.allocate(Operand::Lse, problem.lse_len(), 0.0)?;
        let read = |buffer, shape| Tensor::bhsd(B::slice(buffer), shape);
        let o_view = Tensor::bhsd(B::slice_mut(&mut o, 0..q_len), of_q);
        let lse_view = Some(B::slice_mut(&mut lse, 0..problem.lse_len()));
        match (dist_threshold, &second) {
            (Some(threshold), Some(second)) => {
                let first = Pair { q: read(&q, of_q), k: read(&k, of_kv) };
                let second = Pair { q: read(&second.q, of_q), k: read(&second.k, of_kv) };
                let piecewise = Piecewise::new(attention.clone(), threshold);
                piecewise.forward_into(backend, first, second, read(&v, of_kv), o_view, lse_view)?;
            }
            _ => {
                let (q, k, v) = (read(&q, of_q), read(&k, of_kv), read(&v, of_kv));
                attention.forward_into(backend, q, k, v, o_view, lse_view)?;
            }
        }
        let second = match second {
            Some(inputs) => {
                let gradients = Pair { q: zeros(Operand::Dq2, q_len)?, k: zeros(Operand::Dk2, kv_len)? };
                Some(SecondMemory { inputs, gradients })
            }
            None => None,
        };
        let (dq, dk, dv) = (zeros(Operand::Dq, q_len)?, zeros(Operand::Dk, kv_len)?, zeros(Operand::Dv, kv_len)?);
        Ok(BackwardMemory { q, k, v, o, d_o, lse, dq, dk, dv, second })
    }
}

/// A second pair of random queries and keys for a case.
pub fn second_pair<B: Backend, E: Element>(backend: &B, case: &Case) -> Result<Pair<B::Buffer<E>>> {
    let [q, k, _] = Case { seed: case.seed ^ SECOND_SEED, ..*case }.random_inputs::<E>()?;
    Ok(Pair { q: backend.upload(Operand::Q2, &q)?, k: backend.upload(Operand::K2, &k)? })
}

/// On the CPU, where a run takes its own workspace.
pub fn on_cpu<'a, E: Element>(
    plan: &'a BackwardPlan,
    memory: &'a mut BackwardMemory<Cpu, E>,
) -> impl FnMut() -> Result<()> + 'a {
    let (of_q, of_kv) = (plan.problem().q_shape(), plan.problem().kv_shape());
    move || {
        let inputs = BackwardInputs {
            q: Tensor::bhsd(&memory.q[..], of_q),
            k: Tensor::bhsd(&memory.k[..], of_kv),
            v: Tensor::bhsd(&memory.v[..], of_kv),
            o: Tensor::bhsd(&memory.o[..], of_q),
            d_o: Tensor::bhsd(&memory.d_o[..], of_q),
            lse: &memory.lse[..],
            d_lse: None,
        };
        let outputs = Gradients {
            dq: Tensor::bhsd(&mut memory.dq[..], of_q),
            dk: Tensor::bhsd(&mut memory.dk[..], of_kv),
            dv: Tensor::bhsd(&mut memory.dv[..], of_kv),
        };
        let second = memory.second.as_mut().map(|SecondMemory { inputs, gradients }| SecondTensors {
            inputs: Pair { q: Tensor::bhsd(&inputs.q[..], of_q), k: Tensor::bhsd(&inputs.k[..], of_kv) },
            gradients: Pair {
                q: Tensor::bhsd(&mut gradients.q[..], of_q),
                k: Tensor::bhsd(&mut gradients.k[..], of_kv),
            },
        });
        Cpu.backward_into(plan, inputs, outputs, second)
    }
}

/// On the GPU, in one workspace for all runs.
#[cfg(feature = "cuda")]
pub fn on_cuda<'a, E: Element>(
    cuda: &'a ferroflash::Cuda,
    plan: &'a BackwardPlan,
    memory: &'a mut BackwardMemory<ferroflash::Cuda, E>,
) -> Result<impl FnMut() -> Result<()> + 'a> {
    use ferroflash::cuda::DeviceBuffer;
    use ferroflash::{Layout, RawBackward, RawSecond, RawTensor};
    let workspace = cuda.allocate(Operand::Workspace, plan.workspace_bytes(), 0u8)?;
    let tensor = |buffer: &DeviceBuffer<E>, shape| RawTensor { address: buffer.address(), layout: Layout::bhsd(shape) };
    let (of_q, of_kv) = (plan.problem().q_shape(), plan.problem().kv_shape());
    Ok(move || {
        let args = RawBackward {
            q: tensor(&memory.q, of_q),
            k: tensor(&memory.k, of_kv),
            second: memory.second.as_ref().map(|SecondMemory { inputs, gradients }| RawSecond {
                inputs: Pair { q: tensor(&inputs.q, of_q), k: tensor(&inputs.k, of_kv) },
                gradients: Pair { q: tensor(&gradients.q, of_q), k: tensor(&gradients.k, of_kv) },
            }),
            v: tensor(&memory.v, of_kv),
            o: tensor(&memory.o, of_q),
            d_o: tensor(&memory.d_o, of_q),
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
