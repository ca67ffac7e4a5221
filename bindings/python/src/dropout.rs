//! Dropout as Python hands it over, and its mask.

use ferroflash::{Dropout, Dtype, PlanDropout, Problem, SeedOffset};
use pyo3::{Bound, FromPyObject, PyAny, PyResult, Python, intern, pyfunction, types::PyAnyMethods};

use crate::{
    error::exception,
    machine::Device,
    tensor::{Tensor, address, check_line, check_tensor},
    torch::Torch,
};

/// Alignment of seed and offset, in bytes: a GPU loads both at once.
const ALIGNMENT: u64 = 16;

/// Dropout of a call in Python's terms.
#[derive(FromPyObject)]
pub enum Given<'py> {
    /// Probability, seed and offset.
    Numbers(f32, u64, u64),
    /// Probability, and a tensor of seed and offset that kernels read: int64 (2), on the device of the queries.
    InMemory(f32, Bound<'py, PyAny>),
}

/// Dropout of a call in the library's terms.
pub struct Drawn<'py> {
    pub plan: PlanDropout,
    /// Address of seed and offset, if kernels read them.
    pub seed_offset: Option<SeedOffset<u64>>,
    /// The tensor at that address.
    _held: Option<Bound<'py, PyAny>>,
}

impl<'py> Drawn<'py> {
    /// Reads the dropout of a call, whose queries are `q`. Seed and offset at an address that a GPU does not take are
    /// copied. The address is valid as long as the result lives; on a GPU, torch frees memory in the stream's order.
    ///
    /// # Errors
    /// `TypeError` for an object that is no int64 tensor, `ValueError` for another shape or device.
    pub fn read(torch: &Torch, given: Option<Given<'py>>, q: &Tensor) -> PyResult<Self> {
        let (p, object) = match given {
            None => return Ok(Drawn { plan: PlanDropout::NONE, seed_offset: None, _held: None }),
            Some(Given::Numbers(p, seed, offset)) => {
                return Ok(Drawn { plan: Dropout { p, seed, offset }.into(), seed_offset: None, _held: None });
            }
            Some(Given::InMemory(p, object)) => (p, object),
        };
        let name = "seed_offset";
        check_tensor(&object, name, "torch.int64", |dtype| torch.is_int64(dtype))?;
        check_line(&object, name, [2], "(seed, offset)", q)?;
        let py = object.py();
        let contiguous = object.call_method0(intern!(py, "is_contiguous"))?.extract::<bool>()?;
        let taken = contiguous && address(&object)?.is_multiple_of(ALIGNMENT);
        let held = if taken { object } else { object.call_method0(intern!(py, "clone"))? };
        let seed_offset = Some(SeedOffset::at(address(&held)?));
        Ok(Drawn { plan: Dropout::from_memory(p), seed_offset, _held: Some(held) })
    }
}

/// Writes the weights that dropout keeps to a tensor of bytes, 1 for a kept weight and 0 for others. `kept` is
/// contiguous, and `shape` is (batch, heads_q, seqlen_q, seqlen_k).
#[pyfunction]
pub fn dropout_mask(
    py: Python<'_>,
    kept: &Bound<'_, PyAny>,
    shape: (usize, usize, usize, usize),
    dropout: (f32, u64, u64),
) -> PyResult<()> {
    let (batch, heads_q, seqlen_q, seqlen_k) = shape;
    let problem = Problem { batch, heads_q, heads_kv: 1, seqlen_q, seqlen_k, head_dim: 8, dtype: Dtype::Bf16 };
    let (p, seed, offset) = dropout;
    let machine = Device::of(kept, "kept")?.open(py, Torch::get(py)?)?;
    let elements = kept.call_method0("numel")?.extract()?;
    machine.dropout_mask(py, &problem, &Dropout { p, seed, offset }, address(kept)?, elements).map_err(exception)
}
