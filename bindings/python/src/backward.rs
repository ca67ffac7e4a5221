//! The backward pass of torch tensors, with one pair of queries and keys or two.

use ferroflash::{BackwardPair, Pair, Piecewise, RawBackward};
use pyo3::{Bound, IntoPyObjectExt, Py, PyAny, PyResult, Python, pyfunction, types::PyTuple};

use crate::{
    dropout::{Drawn, Given},
    error::{exception, is_layout},
    forward::{Inputs, Second, allocate, refused},
    lengths,
    machine::{PLANS, Workspace},
    optional,
    settings::Settings,
    tensor::{Dims, Tensor, address, read_lse},
    torch::Torch,
};

/// Names of the gradients, in the order of [`Inputs::iter`].
const GRADIENTS: [&str; 5] = ["dq", "dk", "dv", "dq2", "dk2"];

/// Returns the gradients (dQ, dK, dV), with a second pair also dQ2 and dK2, and with sinks also theirs as the last; or
/// an integer whose bit i tells that input i (q, k, v, q2, k2, then o and d_o) has to be copied first. `gradients` are
/// tensors to write; `None` allocates them.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "a call with a few positional arguments is the fastest there is")]
pub fn backward(
    py: Python<'_>,
    q: &Bound<'_, PyAny>,
    k: &Bound<'_, PyAny>,
    v: &Bound<'_, PyAny>,
    second: Option<Second<'_>>,
    slopes: Option<&Bound<'_, PyAny>>,
    sinks: Option<&Bound<'_, PyAny>>,
    lengths: Option<lengths::Given<'_>>,
    o: &Bound<'_, PyAny>,
    lse: &Bound<'_, PyAny>,
    d_o: &Bound<'_, PyAny>,
    d_lse: Option<&Bound<'_, PyAny>>,
    gradients: Option<(Bound<'_, PyAny>, Bound<'_, PyAny>, Bound<'_, PyAny>)>,
    left: i64,
    right: i64,
    scale: Option<f32>,
    softcap: Option<f32>,
    dropout: Option<Given<'_>>,
    deterministic: bool,
) -> PyResult<Py<PyAny>> {
    let torch = Torch::get(py)?;
    let (inputs, q_name) = Inputs::read(torch, [q, k, v], second.as_ref(), Dims::of(lengths.as_ref()))?;
    let results = [inputs.q.another(torch, o, "o", q_name)?, inputs.q.another(torch, d_o, "d_o", q_name)?];
    let all = || {
        // The bits of o and d_o do not depend on the number of pairs.
        let gap = if second.is_some() { 0 } else { 2 };
        refused(inputs.iter()) | refused(results.iter()) << (inputs.iter().count() + gap)
    };
    if !inputs.iter().chain(&results).all(Tensor::is_packed) {
        return all().into_py_any(py);
    }
    let lse = read_lse(torch, lse, "lse", &inputs.q)?;
    let d_lse = d_lse.map(|d_lse| read_lse(torch, d_lse, "d_lse", &inputs.q)).transpose()?;

    let drawn = Drawn::read(torch, dropout, &inputs.q)?;
    let optional = optional::read(torch, slopes, sinks, lengths.as_ref(), drawn.seed_offset, &inputs.q)?;
    let settings = Settings { window: (left, right), scale, softcap, dropout: drawn.plan, deterministic };
    let attention = settings.attention(&inputs.q, &inputs.k).for_inputs(optional.kinds());
    let machine = inputs.q.device.open(py, torch)?;
    let plan = match &second {
        None => PLANS.backward(&attention, machine.sm_count()),
        Some((_, _, distance)) => PLANS.piecewise_backward(&Piecewise::new(attention, *distance), machine.sm_count()),
    };
    let plan = plan.map_err(exception)?;

    let mut given = gradients.map(|(dq, dk, dv)| [dq, dk, dv]).into_iter().flatten();
    let likes = [q, k, v].into_iter().chain(second.iter().flat_map(|(q2, k2, _)| [q2, k2]));
    let outputs: Vec<(Bound<'_, PyAny>, Tensor)> = likes
        .zip(inputs.iter())
        .zip(GRADIENTS)
        .map(|((like, read), name)| match given.next() {
            None => allocate(torch, like, read),
            Some(gradient) => {
                let tensor = read.another(torch, &gradient, name, q_name)?;
                if !tensor.is_packed() {
                    let text = format!("{name} is not contiguous along head_dim");
                    return Err(pyo3::exceptions::PyValueError::new_err(text));
                }
                Ok((gradient, tensor))
            }
        })
        .collect::<PyResult<_>>()?;
    let d_sinks = sinks.map(|_| torch.empty_float32(q, &[inputs.q.raw.layout.shape[1]])).transpose()?;
    let workspace = Workspace::allocate(torch, q, machine, plan.workspace_bytes())?;
    let raw = |i: usize| outputs.get(i).map_or(inputs.q.raw, |(_, tensor)| tensor.raw);
    let args = RawBackward {
        q: inputs.q.raw,
        k: inputs.k.raw,
        v: inputs.v.raw,
        second: inputs.second.as_ref().map(|pair| BackwardPair {
            inputs: Pair { q: pair.q.raw, k: pair.k.raw },
            gradients: Pair { q: raw(3), k: raw(4) },
        }),
        optional,
        o: results[0].raw,
        d_o: results[1].raw,
        lse,
        d_lse,
        dq: raw(0),
        dk: raw(1),
        dv: raw(2),
        d_sinks: d_sinks.as_ref().map(address).transpose()?,
        workspace: workspace.address()?,
        workspace_bytes: plan.workspace_bytes(),
    };
    match machine.backward(py, &plan, &args) {
        Ok(()) => {
            let gradients: Vec<_> = outputs.into_iter().map(|(object, _)| object).chain(d_sinks).collect();
            PyTuple::new(py, gradients)?.into_py_any(py)
        }
        Err(error) => match all() {
            bits if bits != 0 && is_layout(&error) => bits.into_py_any(py),
            _ => Err(exception(error)),
        },
    }
}
