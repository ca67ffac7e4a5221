//! The machine that a call runs on: the CPU, or a GPU on a stream of torch's.

use ferroflash::{
    BackwardPlan, Cpu, Dropout, Error, Plan, Plans, Problem, RawBackward, RawForward, RawTotalAttention, TotalPlan,
    dropout_mask_into,
};
use pyo3::{Bound, PyAny, PyResult, Python, exceptions::PyValueError, intern, pyfunction, types::PyAnyMethods};

use crate::{
    error::exception,
    gpu::{self, Gpu},
    tensor::address,
    torch::Torch,
};

/// Plans of earlier calls.
pub static PLANS: Plans = Plans::new();

/// Device of a tensor.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Device {
    Cpu,
    /// A GPU, by torch's number of it.
    Cuda(u32),
}

impl Device {
    /// Reads the device of a tensor. `name` is the tensor's name in errors.
    ///
    /// # Errors
    /// `ValueError` for any other kind of device.
    pub fn of(tensor: &Bound<'_, PyAny>, name: &str) -> PyResult<Self> {
        let py = tensor.py();
        if tensor.getattr(intern!(py, "is_cuda"))?.is_truthy()? {
            return Ok(Device::Cuda(tensor.call_method0(intern!(py, "get_device"))?.extract()?));
        }
        if tensor.getattr(intern!(py, "is_cpu"))?.is_truthy()? {
            return Ok(Device::Cpu);
        }
        let device = tensor.getattr("device")?;
        Err(PyValueError::new_err(format!("{name} is on {device}; the CPU or a CUDA device is needed")))
    }

    /// Fails if the tensor `name` is on another device than `self`, that of the tensor `first`.
    pub fn check_same(self, found: Device, name: &str, first: &str) -> PyResult<()> {
        if found == self {
            return Ok(());
        }
        Err(PyValueError::new_err(format!("{name} is on {}; {first} is on {}", found.name(), self.name())))
    }

    fn name(self) -> String {
        match self {
            Device::Cpu => "cpu".to_owned(),
            Device::Cuda(ordinal) => format!("cuda:{ordinal}"),
        }
    }

    /// Opens the device for a pass that is enqueued on torch's current stream.
    ///
    /// # Errors
    /// `RuntimeError` if there is no such GPU or it has no kernels.
    pub fn open(self, py: Python<'_>, torch: &Torch) -> PyResult<Machine> {
        match self {
            Device::Cpu => Ok(Machine::Cpu),
            Device::Cuda(ordinal) => {
                let gpu = Gpu::open(ordinal).map_err(exception)?;
                Ok(Machine::Cuda { gpu, stream: torch.current_stream(py, ordinal)? })
            }
        }
    }
}

/// A machine that runs plans.
#[derive(Clone, Copy)]
pub enum Machine {
    Cpu,
    Cuda {
        gpu: Gpu,
        /// Torch's current stream, a handle of the driver's.
        stream: usize,
    },
}

/// Runs plans on addresses. This is the only code that is unsafe.
///
/// The safety of every call here is this. Callers have read the addresses, layouts and dtypes off torch tensors of the
/// machine's device, which they hold until the call returns. Outputs are tensors that they have just allocated, or that
/// their own callers hand over for writing. Torch keeps a tensor's layout within its memory. On a GPU, torch frees
/// memory in the order of the stream that allocated it, which is the current stream that the pass runs on; a program
/// that uses a tensor on other streams orders them, as for every operator of torch.
#[allow(unsafe_code)]
impl Machine {
    /// Number of SMs, or threads on the CPU.
    pub fn sm_count(self) -> u32 {
        match self {
            Machine::Cpu => Cpu.sm_count(),
            Machine::Cuda { gpu, .. } => gpu.sm_count(),
        }
    }

    /// True if the caller allocates the workspace of a pass.
    fn takes_workspace(self) -> bool {
        matches!(self, Machine::Cuda { .. })
    }

    /// Runs a forward plan without the interpreter's lock.
    pub fn forward(self, py: Python<'_>, plan: &Plan, args: &RawForward) -> Result<(), Error> {
        py.detach(|| match self {
            // SAFETY: see the `impl` block.
            Machine::Cpu => unsafe { Cpu.forward_raw(plan, args) },
            // SAFETY: see the `impl` block.
            Machine::Cuda { gpu, stream } => unsafe { gpu.forward(plan, args, stream) },
        })
    }

    /// Runs a backward plan without the interpreter's lock.
    pub fn backward(self, py: Python<'_>, plan: &BackwardPlan, args: &RawBackward) -> Result<(), Error> {
        py.detach(|| match self {
            // SAFETY: see the `impl` block.
            Machine::Cpu => unsafe { Cpu.backward_raw(plan, args) },
            // SAFETY: see the `impl` block. The workspace is a tensor of torch's too.
            Machine::Cuda { gpu, stream } => unsafe { gpu.backward(plan, args, stream) },
        })
    }

    /// Runs a plan of total attention without the interpreter's lock.
    pub fn total_attention(self, py: Python<'_>, plan: &TotalPlan, args: &RawTotalAttention) -> Result<(), Error> {
        py.detach(|| match self {
            // SAFETY: see the `impl` block.
            Machine::Cpu => unsafe { Cpu.total_attention_raw(plan, args) },
            // SAFETY: see the `impl` block.
            Machine::Cuda { gpu, stream } => unsafe { gpu.total_attention(plan, args, stream) },
        })
    }

    /// Writes a dropout mask of `elements` bytes without the interpreter's lock.
    ///
    /// # Errors
    /// Errors of [`dropout_mask_into`].
    pub fn dropout_mask(
        self,
        py: Python<'_>,
        problem: &Problem,
        dropout: &Dropout,
        kept: u64,
        elements: usize,
    ) -> Result<(), Error> {
        let Problem { batch, heads_q, seqlen_q, seqlen_k, .. } = *problem;
        let expected =
            [batch, heads_q, seqlen_q, seqlen_k].iter().fold(1, |len: u128, &n| len.saturating_mul(n as u128));
        if elements as u128 != expected {
            return Err(Error::MaskLength { len: elements, expected });
        }
        py.detach(|| match self {
            Machine::Cpu if elements == 0 => dropout_mask_into(&Cpu, problem, dropout, &mut []),
            Machine::Cpu => {
                // SAFETY: see the `impl` block. The tensor has as many bytes.
                let kept = unsafe { std::slice::from_raw_parts_mut(kept as *mut u8, elements) };
                dropout_mask_into(&Cpu, problem, dropout, kept)
            }
            // SAFETY: see the `impl` block. The tensor has the mask's number of bytes.
            Machine::Cuda { gpu, stream } => unsafe { gpu.dropout_mask(problem, dropout, kept, stream) },
        })
    }
}

/// Memory for the kernels' own use in one pass. The tensor lives until the pass is enqueued.
pub struct Workspace<'py>(Option<Bound<'py, PyAny>>);

impl<'py> Workspace<'py> {
    /// Allocates so many bytes with torch, on the device of `like`. The CPU allocates its own.
    pub fn allocate(torch: &Torch, like: &Bound<'py, PyAny>, machine: Machine, bytes: usize) -> PyResult<Self> {
        match machine.takes_workspace() && bytes > 0 {
            true => Ok(Workspace(Some(torch.empty_bytes(like, bytes)?))),
            false => Ok(Workspace(None)),
        }
    }

    /// Returns its address; 0 if there is none.
    pub fn address(&self) -> PyResult<u64> {
        self.0.as_ref().map_or(Ok(0), address)
    }
}

/// Number of GPUs that NVIDIA's driver shows; 0 without a driver.
#[pyfunction]
pub fn device_count() -> u32 {
    gpu::device_count()
}

/// Number of GPU kernels in this build.
#[pyfunction]
pub fn kernel_count() -> usize {
    gpu::kernel_count()
}
