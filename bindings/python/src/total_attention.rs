//! Total attention of torch tensors.

use ferroflash::{Alibi, InputKinds, Lengths, PlanDropout, RawTotalAttention, Slopes};
use pyo3::{Bound, IntoPyObjectExt, Py, PyAny, PyResult, Python, pyfunction};

use crate::{
    error::{exception, is_layout},
    forward::refused,
    lengths,
    machine::{PLANS, Workspace},
    optional::read_slopes,
    settings::Settings,
    tensor::{Dims, Tensor, address, lines, read_lse},
    torch::Torch,
};

/// Returns the total attention, f32 (batch, heads_q, seqlen_k), with lengths (heads_q, total_k); or an integer whose
/// bit i tells that input i (q, k) has to be copied first.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "a call with a few positional arguments is the fastest there is")]
pub fn total_attention(
    py: Python<'_>,
    q: &Bound<'_, PyAny>,
    k: &Bound<'_, PyAny>,
    lse: &Bound<'_, PyAny>,
    slopes: Option<&Bound<'_, PyAny>>,
    lengths: Option<lengths::Given<'_>>,
    left: i64,
    right: i64,
    scale: Option<f32>,
    softcap: Option<f32>,
) -> PyResult<Py<PyAny>> {
    let torch = Torch::get(py)?;
    let queries = &Tensor::read(torch, q, "q", Dims::of(lengths.as_ref()))?;
    let keys = &queries.another(torch, k, "k", "q")?;
    let all = || refused([queries, keys].into_iter());
    if !(queries.is_packed() && keys.is_packed()) {
        return all().into_py_any(py);
    }
    let lse = read_lse(torch, lse, "lse", queries)?;
    let lengths = lengths.map(|lengths| lengths::read(torch, &lengths, queries)).transpose()?;
    let slopes = slopes.map(|slopes| read_slopes(torch, slopes, lengths.as_ref(), queries)).transpose()?;
    let settings = Settings { window: (left, right), scale, softcap, dropout: PlanDropout::NONE, deterministic: false };
    let alibi = slopes.as_ref().map_or(Alibi::None, Slopes::kind);
    let sequences = lengths.as_ref().map(Lengths::kind);
    let kinds = InputKinds { alibi, sequences, ..InputKinds::default() };
    let attention = settings.attention(queries, keys).for_inputs(kinds);
    let machine = queries.device.open(py, torch)?;
    let plan = PLANS.total_attention(&attention, machine.sm_count()).map_err(exception)?;
    let total = torch.empty_float32(q, &lines(queries, keys.raw.layout.shape[2]))?;
    let workspace = Workspace::allocate(torch, q, machine, plan.workspace_bytes())?;
    let args = RawTotalAttention {
        q: queries.raw,
        k: keys.raw,
        lse,
        slopes,
        lengths,
        total: address(&total)?,
        workspace: workspace.address()?,
        workspace_bytes: plan.workspace_bytes(),
    };
    match machine.total_attention(py, &plan, &args) {
        Ok(()) => total.into_py_any(py),
        Err(error) => match all() {
            bits if bits != 0 && is_layout(&error) => bits.into_py_any(py),
            _ => Err(exception(error)),
        },
    }
}
