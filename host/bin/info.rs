//! `info`: what this build has and what this machine has.

use std::collections::BTreeSet;
use std::process::ExitCode;

use ferroflash::{BACKWARD_VARIANTS, Result, TOTAL_VARIANTS, VARIANTS};
use kernels_gpu::params::{ROW_KERNEL_THREADS, SINK_GRADIENTS};

use crate::args::InfoArgs;
use crate::machine::{Machine, commit};
use crate::{say, table};

pub fn run(args: &InfoArgs) -> Result<ExitCode> {
    say(format_args!(
        "ferroflash {}{}",
        env!("CARGO_PKG_VERSION"),
        commit().map(|c| format!(" ({c})")).unwrap_or_default()
    ));
    say(format_args!("kernels: {}", kernels()));
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

/// Where the kernels came from, and what compiled them.
#[cfg(feature = "cuda")]
fn kernels() -> String {
    use ferroflash::cuda::{COMMIT, KERNEL_ASSEMBLER, KERNEL_COMPILER, KERNEL_ORIGIN};
    let origin = match KERNEL_ORIGIN {
        "prebuilt" => "prebuilt, they came with the package",
        _ => "compiled from source with this program",
    };
    let commit = if COMMIT.is_empty() { "commit unknown".to_owned() } else { format!("commit {COMMIT}") };
    format!("{origin} ({KERNEL_COMPILER}; {}; {commit})", KERNEL_ASSEMBLER.unwrap_or("no ptxas"))
}

#[cfg(not(feature = "cuda"))]
fn kernels() -> String {
    "none (CPU build)".to_owned()
}

/// The GPU, or a line that says why there is none.
fn gpu() -> Option<Machine> {
    let cuda = crate::args::DeviceArgs { device: Some(crate::args::DeviceName::Cuda) };
    Machine::open(&cuda).inspect_err(|error| say(format_args!("gpu: {error}"))).ok()
}

/// Every kernel: the forward ones, the main kernels of the backward pass, those of total attention, and those that
/// prepare and finish a backward pass or compute the gradient of sinks.
fn variants() -> comfy_table::Table {
    let mut table =
        table(["kernel", "tile M × N", "head dim", "threads", "stages", "shared memory", "registers", "code"]);
    let none = || "-".to_owned();
    let tile = |m: u32, n: u32| format!("{m} × {n}");
    let kib = |bytes: u32| format!("{:.1} KiB", f64::from(bytes) / 1024.0);
    let mut row = |symbol: &str, tile, head_dim, threads: u32, stages, smem| {
        let (registers, code) = compiled(symbol);
        table.add_row([symbol.to_owned(), tile, head_dim, threads.to_string(), stages, smem, registers, code]);
    };
    for v in VARIANTS {
        let (tile, smem) = (tile(v.block_m(), v.block_n), kib(v.smem_bytes()));
        row(v.symbol, tile, v.head_dim.to_string(), v.threads(), v.stages.to_string(), smem);
    }
    for v in BACKWARD_VARIANTS {
        let (tile, smem) = (tile(v.block_m, v.block_n), kib(v.smem().bytes()));
        row(v.symbol, tile, v.head_dim.to_string(), v.threads(), none(), smem);
    }
    for v in TOTAL_VARIANTS {
        let (tile, smem) = (tile(v.block_m, v.block_n()), kib(v.smem().bytes()));
        row(v.symbol, tile, v.head_dim.to_string(), v.threads(), v.stages.to_string(), smem);
    }
    // Variants share them.
    let row_kernels: BTreeSet<&str> = BACKWARD_VARIANTS.iter().flat_map(|v| [v.prepare, v.finish]).collect();
    for symbol in row_kernels {
        row(symbol, none(), none(), ROW_KERNEL_THREADS, none(), none());
    }
    row(SINK_GRADIENTS, none(), none(), ROW_KERNEL_THREADS, none(), none());
    table
}

/// Returns the number of registers at entry, over all forms of the kernel, and how the build holds it.
#[cfg(feature = "cuda")]
fn compiled(symbol: &str) -> (String, String) {
    let Some(kernel) = ferroflash::cuda::Kernel::of(symbol) else {
        return ("unknown".to_owned(), "missing".to_owned());
    };
    let counts: BTreeSet<u32> = kernel.cubins.iter().map(|cubin| cubin.registers).collect();
    match (counts.first(), counts.last(), kernel.cubins.len()) {
        (Some(least), Some(most), forms) => {
            let registers = if least == most { least.to_string() } else { format!("{least} to {most}") };
            (registers, if forms == 1 { "cubin".to_owned() } else { format!("{forms} cubins") })
        }
        _ => ("unknown".to_owned(), "PTX".to_owned()),
    }
}

#[cfg(not(feature = "cuda"))]
fn compiled(_: &str) -> (String, String) {
    ("-".to_owned(), "CPU only".to_owned())
}

/// How long the first use of kernels takes.
#[cfg(feature = "cuda")]
fn load_times(machine: &Machine) -> Result<()> {
    use std::time::Duration;

    use ferroflash::{Attention, Dtype, Problem};
    let Machine::Cuda(cuda) = machine else { return Ok(()) };
    let attention = |head_dim| {
        Attention::new(Problem {
            batch: 1,
            heads_q: 1,
            heads_kv: 1,
            seqlen_q: 1,
            seqlen_k: 1,
            head_dim,
            dtype: Dtype::Bf16,
        })
    };
    let report = |symbols: &str, time: Duration| {
        say(format_args!("first use of {symbols}: {:.1} ms", time.as_secs_f64() * 1e3));
    };
    for head_dim in [64, 96, 128, 192, 256] {
        let plan = attention(head_dim).plan(cuda.sm_count())?;
        report(plan.variant().symbol, cuda.load(&plan)?);
    }
    for head_dim in [64, 128, 256] {
        let plan = attention(head_dim).plan_backward(cuda.sm_count())?;
        let variant = plan.variant();
        let symbols = [variant.prepare, variant.symbol, variant.finish].join(", ");
        report(&symbols, cuda.load_backward(&plan)?);
    }
    for head_dim in [64, 128, 256] {
        let plan = attention(head_dim).plan_total_attention(cuda.sm_count())?;
        report(plan.variant().symbol, cuda.load_total_attention(&plan)?);
    }
    Ok(())
}
