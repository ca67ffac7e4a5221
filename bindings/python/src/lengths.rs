//! Lengths of sequences that share one tensor, as Python hands them over.

use ferroflash::{Lengths, Places};
use pyo3::{
    Bound, PyAny, PyResult,
    exceptions::PyValueError,
    intern,
    types::{PyAnyMethods, PyTuple},
};

use crate::{
    tensor::{Tensor, check_tensor, read_line},
    torch::Torch,
};

/// Lengths of a call in Python's terms: cumulative lengths of queries and keys, the number of keys that count if they
/// are not all, and the longest queries and keys if they are known.
pub type Given<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, Option<Bound<'py, PyAny>>, Option<i64>, Option<i64>);

/// Shape of cumulative lengths in errors.
const CUMULATIVE_DIMS: &str = "(sequences + 1)";

/// Reads the lengths of a call, whose queries are `q`. Their values stay where they are.
///
/// # Errors
/// `TypeError` for an object that is no int32 tensor, `ValueError` for another shape, strides or device, and for a
/// longest sequence below 0.
pub fn read(torch: &Torch, given: &Given<'_>, q: &Tensor) -> PyResult<Lengths<u64>> {
    let (cumulative_q, cumulative_k, used_k, longest_q, longest_k) = given;
    let count = count(torch, cumulative_q)?;
    let line = |object, name, len, dims| {
        check_int32(torch, object, name)?;
        read_line(object, name, [len], dims, q)
    };
    let queries = line(cumulative_q, "cu_seqlens_q", count + 1, CUMULATIVE_DIMS)?;
    let keys = line(cumulative_k, "cu_seqlens_k", count + 1, CUMULATIVE_DIMS)?;
    let k = match used_k {
        None => Places::Cumulative(keys.into()),
        Some(used) => {
            let lengths = line(used, "seqused_k", count, "(sequences)")?;
            Places::Used { cumulative: keys.into(), lengths: lengths.into() }
        }
    };
    let longest = longest(*longest_q, "max_seqlen_q")?.zip(longest(*longest_k, "max_seqlen_k")?);
    let q = Places::Cumulative(queries.into());
    Ok(Lengths { sequences: count, q, k, longest: longest.map(|(queries, keys)| [queries, keys]) })
}

/// Returns the number of sequences that cumulative lengths tell.
fn count(torch: &Torch, cumulative: &Bound<'_, PyAny>) -> PyResult<usize> {
    let name = "cu_seqlens_q";
    check_int32(torch, cumulative, name)?;
    let shape = cumulative.getattr(intern!(cumulative.py(), "shape"))?.cast_into::<PyTuple>()?;
    match shape.extract::<[usize; 1]>() {
        Ok([len]) if len > 0 => Ok(len - 1),
        _ => Err(PyValueError::new_err(format!("{name} has the shape {shape}; {CUMULATIVE_DIMS} is needed"))),
    }
}

fn check_int32(torch: &Torch, object: &Bound<'_, PyAny>, name: &str) -> PyResult<()> {
    check_tensor(object, name, "torch.int32", |dtype| torch.is_int32(dtype))
}

/// Returns the longest length of one side if it is known.
fn longest(len: Option<i64>, name: &str) -> PyResult<Option<usize>> {
    let checked = |len: i64| {
        usize::try_from(len).map_err(|_| PyValueError::new_err(format!("{name} is {len}; at least 0 is needed")))
    };
    len.map(checked).transpose()
}
