//! A torch tensor (batch, seqlen, heads, head_dim) or (total, heads, head_dim) as the library takes it, read through
//! its Python attributes.

use ferroflash::{AddressSpace, Dtype, Layout, Operand, RawTensor};
use pyo3::{
    Bound, FromPyObject, PyAny, PyResult,
    exceptions::{PyTypeError, PyValueError},
    intern,
    types::{PyAnyMethods, PyTuple, PyTupleMethods},
};

use crate::{machine::Device, torch::Torch};

/// Dimensions of the tensors of a call.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Dims {
    /// (batch, seqlen, heads, head_dim).
    Batch,
    /// (total, heads, head_dim): sequences of different lengths, one after the other.
    Total,
}

impl Dims {
    /// Returns the dimensions for calls with lengths of sequences or without.
    pub fn of<T>(lengths: Option<&T>) -> Self {
        if lengths.is_some() { Dims::Total } else { Dims::Batch }
    }

    /// Reads a tuple of numbers, one for each dimension, in the order (batch, rows, heads, head_dim). Sequences that
    /// share a tensor have a batch of `batch`.
    fn numbers(self, tuple: &Bound<'_, PyTuple>, batch: usize) -> PyResult<[usize; 4]> {
        let at = |i| tuple.get_borrowed_item(i)?.extract();
        Ok(match self {
            Dims::Batch => [at(0)?, at(1)?, at(2)?, at(3)?],
            Dims::Total => [batch, at(0)?, at(1)?, at(2)?],
        })
    }

    fn count(self) -> usize {
        match self {
            Dims::Batch => 4,
            Dims::Total => 3,
        }
    }

    /// What errors call the dimensions.
    fn name(self) -> &'static str {
        match self {
            Dims::Batch => "(batch, seqlen, heads, head_dim)",
            Dims::Total => "(total, heads, head_dim), because there is cu_seqlens_q,",
        }
    }
}

/// A 16-bit tensor in memory.
pub struct Tensor {
    /// Address and layout, which has the library's order of dimensions: (batch, heads, seqlen, head_dim).
    pub raw: RawTensor,
    pub dtype: Dtype,
    pub device: Device,
    pub dims: Dims,
    /// True if neighbours along head_dim are neighbours in memory. Otherwise `raw` is not the tensor.
    packed: bool,
}

impl Tensor {
    /// Reads a tensor of these dimensions. `name` is its name in errors.
    ///
    /// # Errors
    /// `TypeError` for an object that is no tensor of 16-bit floats, `ValueError` for another number of dimensions or
    /// another kind of device.
    pub fn read(torch: &Torch, object: &Bound<'_, PyAny>, name: &str, dims: Dims) -> PyResult<Self> {
        let py = object.py();
        let dtype = object.getattr(intern!(py, "dtype")).map_err(|_| no_tensor(object, name))?;
        let Some(dtype) = torch.dtype(&dtype) else {
            let text = format!("{name} is {dtype}; torch.float16 or torch.bfloat16 is needed: cast it with .to()");
            return Err(PyTypeError::new_err(text));
        };
        let device = Device::of(object, name)?;
        let shape = object.getattr(intern!(py, "shape"))?.cast_into::<PyTuple>()?;
        if shape.len() != dims.count() {
            let text = format!("{name} has the shape {shape}; {} is needed", dims.name());
            return Err(PyValueError::new_err(text));
        }
        let [batch, seqlen, heads, head_dim] = dims.numbers(&shape, 1)?;
        Tensor::of(object, dims, [batch, heads, seqlen, head_dim], dtype, device)
    }

    /// Reads a tensor that torch has just allocated with the shape, dtype and device of `self`.
    pub fn allocated(&self, object: &Bound<'_, PyAny>) -> PyResult<Self> {
        Tensor::of(object, self.dims, self.raw.layout.shape, self.dtype, self.device)
    }

    /// Reads strides and address. The shape has the library's order.
    fn of(object: &Bound<'_, PyAny>, dims: Dims, shape: [usize; 4], dtype: Dtype, device: Device) -> PyResult<Self> {
        let strides = object.call_method0(intern!(object.py(), "stride"))?.cast_into::<PyTuple>()?;
        let [per_batch, per_row, per_head, per_element] = dims.numbers(&strides, 0)?;
        let layout = Layout::strided(shape, [per_batch, per_head, per_row]);
        let packed = per_element == 1 || shape[3] <= 1 || layout.is_empty();
        Ok(Tensor { raw: RawTensor { address: address(object)?, layout }, dtype, device, dims, packed })
    }

    /// Reads another tensor of the same call, which must have the dtype and the device of `self`, called `first`.
    ///
    /// # Errors
    /// Errors of [`Tensor::read`]; `TypeError` for another dtype, `ValueError` for another device.
    pub fn another(&self, torch: &Torch, object: &Bound<'_, PyAny>, name: &str, first: &str) -> PyResult<Self> {
        let tensor = Tensor::read(torch, object, name, self.dims)?;
        if tensor.dtype != self.dtype {
            let (found, expected) = (tensor.dtype.name(), self.dtype.name());
            return Err(PyTypeError::new_err(format!("{name} is {found}; {first} is {expected}")));
        }
        self.device.check_same(tensor.device, name, first)?;
        Ok(tensor)
    }

    /// True if kernels take the tensor as it is. A contiguous copy is taken otherwise.
    pub fn is_taken(&self) -> bool {
        let space = match self.device {
            Device::Cpu => AddressSpace::Host,
            Device::Cuda(_) => AddressSpace::Device,
        };
        self.packed && self.raw.check(Operand::Foreign, space).is_ok()
    }

    /// True if neighbours along head_dim are neighbours in memory.
    pub fn is_packed(&self) -> bool {
        self.packed
    }
}

/// Shape of a result with a number for each row of `rows` rows and each head of `q`: an LSE, its gradient, or total
/// attention.
pub fn lines(q: &Tensor, rows: usize) -> Vec<usize> {
    let [batch, heads, ..] = q.raw.layout.shape;
    match q.dims {
        Dims::Batch => vec![batch, heads, rows],
        Dims::Total => vec![heads, rows],
    }
}

/// Reads the address of an LSE of `q` or of its gradient.
///
/// # Errors
/// Errors of [`read_float32`].
pub fn read_lse(torch: &Torch, object: &Bound<'_, PyAny>, name: &str, q: &Tensor) -> PyResult<u64> {
    let [batch, heads, seqlen, _] = q.raw.layout.shape;
    match q.dims {
        Dims::Batch => read_float32(torch, object, name, [batch, heads, seqlen], "(batch, heads, seqlen)", q),
        Dims::Total => read_float32(torch, object, name, [heads, seqlen], "(heads, total)", q),
    }
}

/// Reads the address of a contiguous f32 tensor of a given shape, on the device of `like`. `dims` names the dimensions
/// in errors.
///
/// # Errors
/// `TypeError` for an object that is no f32 tensor, `ValueError` for another shape, strides or device.
pub fn read_float32<const N: usize>(
    torch: &Torch,
    object: &Bound<'_, PyAny>,
    name: &str,
    shape: [usize; N],
    dims: &str,
    like: &Tensor,
) -> PyResult<u64>
where
    [usize; N]: for<'a, 'py> FromPyObject<'a, 'py>,
{
    check_tensor(object, name, "torch.float32", |dtype| torch.is_float32(dtype))?;
    read_line(object, name, shape, dims, like)
}

/// Reads the address of a contiguous tensor of a given shape, whose dtype has been checked, on the device of `like`.
///
/// # Errors
/// `ValueError` for another shape, strides or device.
pub fn read_line<const N: usize>(
    object: &Bound<'_, PyAny>,
    name: &str,
    shape: [usize; N],
    dims: &str,
    like: &Tensor,
) -> PyResult<u64>
where
    [usize; N]: for<'a, 'py> FromPyObject<'a, 'py>,
{
    check_line(object, name, shape, dims, like)?;
    if !object.call_method0(intern!(object.py(), "is_contiguous"))?.extract::<bool>()? {
        return Err(PyValueError::new_err(format!("{name} is not contiguous")));
    }
    address(object)
}

/// Checks that an object is a tensor of the dtype that `is_needed` recognises, which errors call `needed`.
///
/// # Errors
/// `TypeError` unless it is.
pub fn check_tensor<'py>(
    object: &Bound<'py, PyAny>,
    name: &str,
    needed: &str,
    is_needed: impl FnOnce(&Bound<'py, PyAny>) -> bool,
) -> PyResult<()> {
    let dtype = object.getattr(intern!(object.py(), "dtype")).map_err(|_| no_tensor(object, name))?;
    if is_needed(&dtype) { Ok(()) } else { Err(PyTypeError::new_err(format!("{name} is {dtype}; {needed} is needed"))) }
}

/// Checks that a tensor has a given shape, whose dimensions errors call `dims`, and is on the device of `like`.
///
/// # Errors
/// `ValueError` for another shape or device.
pub fn check_line<const N: usize>(
    object: &Bound<'_, PyAny>,
    name: &str,
    shape: [usize; N],
    dims: &str,
    like: &Tensor,
) -> PyResult<()>
where
    [usize; N]: for<'a, 'py> FromPyObject<'a, 'py>,
{
    like.device.check_same(Device::of(object, name)?, name, "q")?;
    let found = object.getattr(intern!(object.py(), "shape"))?.cast_into::<PyTuple>()?;
    if found.extract::<[usize; N]>().is_ok_and(|found| found == shape) {
        Ok(())
    } else {
        Err(PyValueError::new_err(format!("{name} has the shape {found}; {shape:?} {dims} is needed")))
    }
}

/// Reads the address of a tensor's first element.
pub fn address(object: &Bound<'_, PyAny>) -> PyResult<u64> {
    object.call_method0(intern!(object.py(), "data_ptr"))?.extract()
}

fn no_tensor(object: &Bound<'_, PyAny>, name: &str) -> pyo3::PyErr {
    let kind = object.get_type().to_string();
    PyTypeError::new_err(format!("{name} is {kind}; a torch.Tensor is needed"))
}
