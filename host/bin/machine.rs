//! The machine that a command runs on: the CPU, or a GPU where the build has it.

use std::time::{Duration, Instant};

use ferroflash::{Backend, Cpu, Error, Result};

use crate::args::{DeviceArgs, DeviceName};

/// Why a build without the feature has no GPU.
pub const NO_GPU_SUPPORT: &str = "this build has no GPU support; build it with `--features cuda`";

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
pub trait Timed: Backend + Sized {
    /// The device time of what `work` runs; waits until that has run.
    fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration>;

    /// The device time of each of `runs` calls of `work`, before each of which `before` is called and not timed; a GPU
    /// gets all of them without a wait in between.
    fn time_each(
        &self,
        runs: usize,
        before: impl FnMut() -> Result<()>,
        work: impl FnMut() -> Result<()>,
    ) -> Result<Vec<Duration>>;

    /// Fills a buffer with zeros, so that the caches hold the end of it and nothing else; a GPU is not waited for.
    fn set_zero(&self, buffer: &mut Self::Buffer<u32>) -> Result<()>;
}

impl Timed for Cpu {
    fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        let start = Instant::now();
        work()?;
        Ok(start.elapsed())
    }

    fn time_each(
        &self,
        runs: usize,
        mut before: impl FnMut() -> Result<()>,
        mut work: impl FnMut() -> Result<()>,
    ) -> Result<Vec<Duration>> {
        let run = |_| {
            before()?;
            self.time(&mut work)
        };
        (0..runs).map(run).collect()
    }

    fn set_zero(&self, buffer: &mut Vec<u32>) -> Result<()> {
        buffer.fill(0);
        Ok(())
    }
}

#[cfg(feature = "cuda")]
impl Timed for ferroflash::Cuda {
    fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        ferroflash::Cuda::time(self, work)
    }

    fn time_each(
        &self,
        runs: usize,
        before: impl FnMut() -> Result<()>,
        work: impl FnMut() -> Result<()>,
    ) -> Result<Vec<Duration>> {
        ferroflash::Cuda::time_each(self, runs, before, work)
    }

    fn set_zero(&self, buffer: &mut ferroflash::cuda::DeviceBuffer<u32>) -> Result<()> {
        buffer.set_zero()
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
