//! Optional inputs of torch tensors: the slopes of ALiBi, sinks, lengths of sequences, and seed and offset of dropout.

use ferroflash::{Lengths, OptionalInputs, SeedOffset, Slopes};
use pyo3::{
    Bound, PyAny, PyResult, intern,
    types::{PyAnyMethods, PyTuple, PyTupleMethods},
};

use crate::{
    lengths,
    tensor::{Tensor, read_float32},
    torch::Torch,
};

/// Reads the optional inputs of a call, whose queries are `q`.
///
/// # Errors
/// `TypeError` for an object that is no tensor of the dtype needed, `ValueError` for another shape, strides or device.
pub fn read(
    torch: &Torch,
    slopes: Option<&Bound<'_, PyAny>>,
    sinks: Option<&Bound<'_, PyAny>>,
    given: Option<&lengths::Given<'_>>,
    seed_offset: Option<SeedOffset<u64>>,
    q: &Tensor,
) -> PyResult<OptionalInputs<u64>> {
    let mut optional = OptionalInputs::NONE;
    optional.lengths = given.map(|given| lengths::read(torch, given, q)).transpose()?;
    optional.slopes = slopes.map(|slopes| read_slopes(torch, slopes, optional.lengths.as_ref(), q)).transpose()?;
    if let Some(sinks) = sinks {
        let [_, heads, _, _] = q.raw.layout.shape;
        optional.sinks = Some(read_float32(torch, sinks, "sinks", [heads], "(heads)", q)?);
    }
    optional.seed_offset = seed_offset;
    Ok(optional)
}

/// Reads the slopes of ALiBi. Their number of dimensions tells whether batch items, or sequences if there are lengths,
/// have slopes of their own.
pub fn read_slopes(
    torch: &Torch,
    slopes: &Bound<'_, PyAny>,
    lengths: Option<&Lengths<u64>>,
    q: &Tensor,
) -> PyResult<Slopes<u64>> {
    let name = "alibi_slopes";
    let [batch, heads, _, _] = q.raw.layout.shape;
    let items = lengths.map_or(batch, |lengths| lengths.sequences);
    // An object without a shape is an error of `read_float32`.
    let shape = slopes.getattr_opt(intern!(slopes.py(), "shape"))?.and_then(|shape| shape.cast_into::<PyTuple>().ok());
    if shape.is_some_and(|shape| shape.len() == 2) {
        Ok(Slopes::PerItem(read_float32(torch, slopes, name, [items, heads], "(batch, heads) or (heads)", q)?))
    } else {
        Ok(Slopes::PerHead(read_float32(torch, slopes, name, [heads], "(heads) or (batch, heads)", q)?))
    }
}
