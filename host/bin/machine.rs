//! The machine that a command runs on: the CPU, or a GPU where the build has it.

use std::time::{Duration, Instant};

use ferroflash::{Backend, Cpu, Error, Operand, Problem, Result};

use crate::args::{DeviceArgs, DeviceName};

/// Why a build without the feature has no GPU.
pub const NO_GPU_SUPPORT: &str =
    "this build has no GPU support; build it with `--features cuda`, see `cargo xtask setup`";

/// A machine, opened.
pub enum Machine {
    Cpu(Cpu),
    #[cfg(feature = "cuda")]
    Cuda(ferroflash::Cuda),
}

/// What a command does with a machine, whichever it is.
pub trait Job {
    type Result;
    fn run<B: Timed>(self, backend: &B, machine: &Machine) -> Self::Result;
}

/// A backend that can measure itself.
pub trait Timed: Backend {
    /// The device time of what `work` runs.
    fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration>;
}

impl Timed for Cpu {
    fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        let start = Instant::now();
        work()?;
        Ok(start.elapsed())
    }
}

#[cfg(feature = "cuda")]
impl Timed for ferroflash::Cuda {
    fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        ferroflash::Cuda::time(self, work)
    }
}

impl Machine {
    /// The machine that the flags ask for.
    pub fn open(args: &DeviceArgs) -> Result<Self> {
        match args.device {
            Some(DeviceName::Cpu) => Ok(Machine::Cpu(Cpu)),
            Some(DeviceName::Cuda) => Self::cuda(),
            None => match Self::cuda() {
                Err(error @ (Error::NoDevice { .. } | Error::UnsupportedDevice { .. })) => {
                    if cfg!(feature = "cuda") {
                        eprintln!("note: this runs on the CPU: {error}");
                    }
                    Ok(Machine::Cpu(Cpu))
                }
                opened => opened,
            },
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda() -> Result<Self> {
        ferroflash::Cuda::new(0).map(Machine::Cuda)
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda() -> Result<Self> {
        Err(Error::NoDevice { reason: NO_GPU_SUPPORT.to_owned() })
    }

    /// Runs a job on it.
    pub fn run<J: Job>(&self, job: J) -> J::Result {
        match self {
            Machine::Cpu(cpu) => job.run(cpu, self),
            #[cfg(feature = "cuda")]
            Machine::Cuda(cuda) => job.run(cuda, self),
        }
    }

    pub fn is_cpu(&self) -> bool {
        matches!(self, Machine::Cpu(_))
    }

    /// Its name, for people.
    pub fn name(&self) -> String {
        match self {
            Machine::Cpu(_) => cpu_name(),
            #[cfg(feature = "cuda")]
            Machine::Cuda(cuda) => cuda.name().to_owned(),
        }
    }

    /// The driver's CUDA version; none on the CPU.
    pub fn driver(&self) -> Option<String> {
        match self {
            Machine::Cpu(_) => None,
            #[cfg(feature = "cuda")]
            Machine::Cuda(cuda) => cuda.driver_version().ok().map(|(major, minor)| format!("CUDA {major}.{minor}")),
        }
    }

    /// Multiprocessors and memory of a GPU; none for the CPU.
    pub fn size(&self) -> Option<String> {
        match self {
            Machine::Cpu(_) => None,
            #[cfg(feature = "cuda")]
            Machine::Cuda(cuda) => {
                let memory = cuda.total_memory().ok()? as f64 / f64::from(1 << 30);
                Some(format!("{} multiprocessors, {memory:.0} GiB", cuda.sm_count()))
            }
        }
    }

    /// Dense 16-bit FLOP/s of its matrix units at the peak clock; none on the CPU.
    pub fn matrix_peak(&self) -> Option<f64> {
        match self {
            Machine::Cpu(_) => None,
            #[cfg(feature = "cuda")]
            Machine::Cuda(cuda) => {
                // 4096 FLOP a clock and multiprocessor on sm_90: 989 TFLOP/s of an H100 or H200 at 1830 MHz.
                let clock = 1.83e9_f64.min(f64::from(cuda.clock_khz().ok()?) * 1e3);
                Some(f64::from(cuda.sm_count()) * clock * 4096.0)
            }
        }
    }
}

/// Fails where this computer has no memory for a problem's tensors, of which a run needs `copies`. Linux would promise
/// the memory all the same, and end the process when it is used.
pub fn check_memory(problem: &Problem, copies: u128) -> Result<()> {
    let Some(available) = proc_kib("/proc/meminfo", "MemAvailable:") else { return Ok(()) };
    let mut needed = 0;
    for (operand, shape) in [
        (Operand::Q, problem.q_shape()),
        (Operand::K, problem.kv_shape()),
        (Operand::V, problem.kv_shape()),
        (Operand::O, problem.q_shape()),
    ] {
        let bytes = shape.iter().fold(2u128, |bytes, &extent| bytes.saturating_mul(extent as u128));
        needed = bytes.saturating_mul(copies).saturating_add(needed);
        if needed > available as u128 {
            return Err(Error::OutOfMemory { operand, bytes });
        }
    }
    Ok(())
}

/// The most memory that this process has held since [`forget_peak_memory`].
pub fn peak_memory() -> Option<usize> {
    proc_kib("/proc/self/status", "VmHWM:")
}

/// Starts [`peak_memory`] anew. Where the system does not let us, the peak is that of the whole process.
pub fn forget_peak_memory() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// A field that Linux gives in KiB, in bytes.
fn proc_kib(file: &str, field: &str) -> Option<usize> {
    let text = std::fs::read_to_string(file).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(field))?;
    Some(1024 * value.split_whitespace().next()?.parse::<usize>().ok()?)
}

/// What compiled the kernels that a device runs.
pub fn kernel_compiler() -> String {
    #[cfg(feature = "cuda")]
    return ferroflash::cuda::KERNEL_COMPILER.to_owned();
    #[cfg(not(feature = "cuda"))]
    "none (CPU build)".to_owned()
}

/// The commit that the kernels were compiled from, where it is known.
pub fn commit() -> Option<String> {
    #[cfg(feature = "cuda")]
    return Some(ferroflash::cuda::COMMIT.to_owned()).filter(|commit| !commit.is_empty());
    #[cfg(not(feature = "cuda"))]
    None
}

fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, name)| name);
    format!("{} ({} threads)", model.unwrap_or(std::env::consts::ARCH), rayon::current_num_threads())
}
