//! The forward pass of torch tensors, with one pair of queries and keys or two.

use ferroflash::{Attention, Pair, Piecewise, RawForward};
use pyo3::{Bound, IntoPyObjectExt, Py, PyAny, PyResult, Python, pyfunction};

use crate::{
    dropout::{Drawn, Given},
    error::{exception, is_layout},
    lengths,
    machine::{PLANS, Workspace},
    optional,
    settings::Settings,
    tensor::{Dims, Tensor, address, lines},
    torch::Torch,
};

/// The second pair of queries and keys of piecewise attention, and the distance from which on it counts.
pub type Second<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, i32);

/// Inputs of a call, in the order of the bits that [`Inputs::refused`] returns.
pub struct Inputs {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub second: Option<Pair<Tensor>>,
}

impl Inputs {
    /// Reads them. The queries and keys are called `q1` and `k1` if there is a second pair.
    pub fn read(
        torch: &Torch,
        [q, k, v]: [&Bound<'_, PyAny>; 3],
        second: Option<&Second<'_>>,
        dims: Dims,
    ) -> PyResult<(Self, &'static str)> {
        let (q_name, k_name) = if second.is_some() { ("q1", "k1") } else { ("q", "k") };
        let q = Tensor::read(torch, q, q_name, dims)?;
        let k = q.another(torch, k, k_name, q_name)?;
        let v = q.another(torch, v, "v", q_name)?;
        let second = match second {
            None => None,
            Some((q2, k2, _)) => {
                Some(Pair { q: q.another(torch, q2, "q2", q_name)?, k: q.another(torch, k2, "k2", q_name)? })
            }
        };
        Ok((Inputs { q, k, v, second }, q_name))
    }

    /// The tensors, in their order.
    pub fn iter(&self) -> impl Iterator<Item = &Tensor> {
        let second = self.second.iter().flat_map(|pair| [&pair.q, &pair.k]);
        [&self.q, &self.k, &self.v].into_iter().chain(second)
    }
}

/// Returns a number whose bit i tells that kernels do not take tensor i as it is.
pub fn refused<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> u32 {
    tensors.enumerate().fold(0, |bits, (i, tensor)| bits | u32::from(!tensor.is_taken()) << i)
}

/// Allocates a result of the shape of `like`, which is `read`.
pub fn allocate<'py>(torch: &Torch, like: &Bound<'py, PyAny>, read: &Tensor) -> PyResult<(Bound<'py, PyAny>, Tensor)> {
    let result = torch.empty_like(like)?;
    let tensor = read.allocated(&result)?;
    if tensor.is_packed() {
        return Ok((result, tensor));
    }
    // Torch has no order of strides for a tensor that repeats elements.
    let [batch, heads, seqlen, head_dim] = read.raw.layout.shape;
    let shape = [batch, seqlen, heads, head_dim];
    let result = torch.empty(like, if read.dims == Dims::Total { &shape[1..] } else { &shape })?;
    let tensor = read.allocated(&result)?;
    Ok((result, tensor))
}

/// Returns (O, LSE), or an integer whose bit i tells that input i (q, k, v, q2, k2) has to be copied first. The LSE is
/// `None` unless asked for.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "a call with a few positional arguments is the fastest there is")]
pub fn forward(
    py: Python<'_>,
    q: &Bound<'_, PyAny>,
    k: &Bound<'_, PyAny>,
    v: &Bound<'_, PyAny>,
    second: Option<Second<'_>>,
    slopes: Option<&Bound<'_, PyAny>>,
    sinks: Option<&Bound<'_, PyAny>>,
    lengths: Option<lengths::Given<'_>>,
    left: i64,
    right: i64,
    scale: Option<f32>,
    softcap: Option<f32>,
    dropout: Option<Given<'_>>,
    return_lse: bool,
) -> PyResult<Py<PyAny>> {
    let torch = Torch::get(py)?;
    let (inputs, _) = Inputs::read(torch, [q, k, v], second.as_ref(), Dims::of(lengths.as_ref()))?;
    if !inputs.iter().all(Tensor::is_packed) {
        return refused(inputs.iter()).into_py_any(py);
    }
    let drawn = Drawn::read(torch, dropout, &inputs.q)?;
    let optional = optional::read(torch, slopes, sinks, lengths.as_ref(), drawn.seed_offset, &inputs.q)?;
    let settings = Settings { window: (left, right), scale, softcap, dropout: drawn.plan, deterministic: false };
    let attention: Attention = settings.attention(&inputs.q, &inputs.k).for_inputs(optional.kinds());
    let machine = inputs.q.device.open(py, torch)?;
    let plan = match &second {
        None => PLANS.forward(&attention, machine.sm_count()),
        Some((_, _, distance)) => PLANS.piecewise(&Piecewise::new(attention, *distance), machine.sm_count()),
    };
    let plan = plan.map_err(exception)?;
    let (o, raw_o) = allocate(torch, q, &inputs.q)?;
    let lse = match return_lse {
        false => None,
        true => Some(torch.empty_float32(q, &lines(&inputs.q, inputs.q.raw.layout.shape[2]))?),
    };
    let workspace = Workspace::allocate(torch, q, machine, plan.workspace_bytes())?;
    let args = RawForward {
        q: inputs.q.raw,
        k: inputs.k.raw,
        v: inputs.v.raw,
        second: inputs.second.as_ref().map(|pair| Pair { q: pair.q.raw, k: pair.k.raw }),
        optional,
        o: raw_o.raw,
        lse: lse.as_ref().map(address).transpose()?,
        workspace: workspace.address()?,
        workspace_bytes: plan.workspace_bytes(),
    };
    match machine.forward(py, &plan, &args) {
        Ok(()) => (o, lse).into_py_any(py),
        Err(error) => match refused(inputs.iter()) {
            bits if bits != 0 && is_layout(&error) => bits.into_py_any(py),
            _ => Err(exception(error)),
        },
    }
}
