//! The parts of torch that native functions call: dtypes, allocation, the current stream.

use pyo3::{
    Bound, Py, PyAny, PyResult, Python, intern,
    sync::PyOnceLock,
    types::{IntoPyDict, PyAnyMethods, PyDict},
};

use ferroflash::Dtype;

/// Objects of torch, looked up once.
pub struct Torch {
    float16: Py<PyAny>,
    bfloat16: Py<PyAny>,
    float32: Py<PyAny>,
    int32: Py<PyAny>,
    int64: Py<PyAny>,
    empty_like: Py<PyAny>,
    /// `{"dtype": torch.float32}`
    as_float32: Py<PyDict>,
    /// `{"dtype": torch.uint8}`
    as_bytes: Py<PyDict>,
    /// `torch._C._cuda_getCurrentRawStream`, which takes a device's number; `None` if this torch has none.
    raw_stream: Option<Py<PyAny>>,
}

impl Torch {
    /// Returns torch's objects. The first call imports torch.
    pub fn get(py: Python<'_>) -> PyResult<&'static Torch> {
        static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
        TORCH.get_or_try_init(py, || {
            let torch = py.import("torch")?;
            let get = |name: &str| torch.getattr(name);
            let (float32, uint8) = (get("float32")?, get("uint8")?);
            Ok(Torch {
                float16: get("float16")?.unbind(),
                bfloat16: get("bfloat16")?.unbind(),
                int32: get("int32")?.unbind(),
                int64: get("int64")?.unbind(),
                empty_like: get("empty_like")?.unbind(),
                as_float32: [("dtype", &float32)].into_py_dict(py)?.unbind(),
                as_bytes: [("dtype", &uint8)].into_py_dict(py)?.unbind(),
                raw_stream: get("_C")?.getattr_opt("_cuda_getCurrentRawStream")?.map(Bound::unbind),
                float32: float32.unbind(),
            })
        })
    }

    /// Returns the library's name of a 16-bit torch dtype; `None` for any other object.
    pub fn dtype(&self, dtype: &Bound<'_, PyAny>) -> Option<Dtype> {
        if dtype.is(&self.bfloat16) {
            Some(Dtype::Bf16)
        } else if dtype.is(&self.float16) {
            Some(Dtype::F16)
        } else {
            None
        }
    }

    /// True for `torch.float32`.
    pub fn is_float32(&self, dtype: &Bound<'_, PyAny>) -> bool {
        dtype.is(&self.float32)
    }

    /// True for `torch.int32`.
    pub fn is_int32(&self, dtype: &Bound<'_, PyAny>) -> bool {
        dtype.is(&self.int32)
    }

    /// True for `torch.int64`.
    pub fn is_int64(&self, dtype: &Bound<'_, PyAny>) -> bool {
        dtype.is(&self.int64)
    }

    /// Allocates a tensor of the same shape, with the same order of strides if there is one.
    pub fn empty_like<'py>(&self, like: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        self.empty_like.bind(like.py()).call1((like,))
    }

    /// Allocates a contiguous tensor of the same dtype and device.
    pub fn empty<'py>(&self, like: &Bound<'py, PyAny>, shape: &[usize]) -> PyResult<Bound<'py, PyAny>> {
        like.call_method1(intern!(like.py(), "new_empty"), (shape,))
    }

    /// Allocates a contiguous f32 tensor on the same device.
    pub fn empty_float32<'py>(&self, like: &Bound<'py, PyAny>, shape: &[usize]) -> PyResult<Bound<'py, PyAny>> {
        let py = like.py();
        like.call_method(intern!(py, "new_empty"), (shape,), Some(self.as_float32.bind(py)))
    }

    /// Allocates bytes on the same device.
    pub fn empty_bytes<'py>(&self, like: &Bound<'py, PyAny>, bytes: usize) -> PyResult<Bound<'py, PyAny>> {
        let py = like.py();
        like.call_method(intern!(py, "new_empty"), ((bytes,),), Some(self.as_bytes.bind(py)))
    }

    /// Returns torch's current stream of a device, as the driver's handle.
    pub fn current_stream(&self, py: Python<'_>, ordinal: u32) -> PyResult<usize> {
        match &self.raw_stream {
            Some(function) => function.bind(py).call1((ordinal,))?.extract(),
            None => {
                let stream = py.import("torch.cuda")?.call_method1("current_stream", (ordinal,))?;
                stream.getattr("cuda_stream")?.extract()
            }
        }
    }
}
