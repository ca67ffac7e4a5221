//! `info`: what this build has and what this machine has.

use std::process::ExitCode;

use ferroflash::{Result, VARIANTS};

use crate::args::InfoArgs;
use crate::machine::{Machine, commit, kernel_compiler};
use crate::{say, table};

pub fn run(args: &InfoArgs) -> Result<ExitCode> {
    say(format_args!(
        "ferroflash {}{}",
        env!("CARGO_PKG_VERSION"),
        commit().map(|c| format!(" ({c})")).unwrap_or_default()
    ));
    say(format_args!("kernels compiled by: {}", kernel_compiler()));
    say(format_args!(
        "cpu: {}",
        Machine::open(&crate::args::DeviceArgs { device: Some(crate::args::DeviceName::Cpu) })?.name()
    ));
    let machine = match args.device.device {
        Some(_) => Machine::open(&args.device).map(Some)?,
        None => gpu(),
    };
    if let Some(machine) = machine.filter(|machine| !machine.is_cpu()) {
        let (size, driver) = (machine.size().unwrap_or_default(), machine.driver().unwrap_or_default());
        say(format_args!("gpu: {}, {size}, driver {driver}", machine.name()));
        #[cfg(feature = "cuda")]
        load_times(&machine)?;
    }
    say("");
    say(variants());
    Ok(ExitCode::SUCCESS)
}

/// The GPU, or a line that says why there is none.
fn gpu() -> Option<Machine> {
    let cuda = crate::args::DeviceArgs { device: Some(crate::args::DeviceName::Cuda) };
    Machine::open(&cuda).inspect_err(|error| say(format_args!("gpu: {error}"))).ok()
}

fn variants() -> comfy_table::Table {
    let mut table =
        table(["kernel", "tile M × N", "head dim", "threads", "stages", "shared memory", "registers", "code"]);
    for variant in VARIANTS {
        let (registers, code) = compiled(variant.symbol);
        table.add_row([
            variant.symbol.to_owned(),
            format!("{} × {}", variant.block_m(), variant.block_n),
            variant.head_dim.to_string(),
            variant.threads().to_string(),
            variant.stages.to_string(),
            format!("{:.1} KiB", f64::from(variant.smem_bytes()) / 1024.0),
            registers,
            code,
        ]);
    }
    table
}

/// Registers at entry, and in what form the build holds the kernel.
#[cfg(feature = "cuda")]
fn compiled(symbol: &str) -> (String, String) {
    let kernel = ferroflash::cuda::KERNELS.iter().find(|kernel| kernel.symbol == symbol);
    let registers = kernel.and_then(|kernel| kernel.registers).map_or("unknown".to_owned(), |count| count.to_string());
    let code = match kernel {
        Some(kernel) if kernel.cubin.is_some() => "cubin",
        Some(_) => "PTX",
        None => "missing",
    };
    (registers, code.to_owned())
}

#[cfg(not(feature = "cuda"))]
fn compiled(_: &str) -> (String, String) {
    ("-".to_owned(), "CPU only".to_owned())
}

/// How long the first use of a kernel takes.
#[cfg(feature = "cuda")]
fn load_times(machine: &Machine) -> Result<()> {
    use ferroflash::{Attention, Backend, Dtype, Problem};
    let Machine::Cuda(cuda) = machine else { return Ok(()) };
    for head_dim in [64, 96, 128, 192, 256] {
        let problem =
            Problem { batch: 1, heads_q: 1, heads_kv: 1, seqlen_q: 1, seqlen_k: 1, head_dim, dtype: Dtype::Bf16 };
        let plan = Attention::new(problem).plan(cuda.sm_count())?;
        say(format_args!("first use of {}: {:.1} ms", plan.variant().symbol, cuda.load(&plan)?.as_secs_f64() * 1e3));
    }
    Ok(())
}
