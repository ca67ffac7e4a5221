//! `bench`: the median time of many runs, by device events on a GPU.

use std::fs::File;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use ferroflash::cases::Case;
use ferroflash::{Attention, Dtype, Element, Lse, Mask, Operand, Problem, Result, Tensor, bf16, f16};
use serde::Serialize;

use crate::args::{BenchArgs, OpName};
use crate::machine::{Job, Machine, Timed, commit, kernel_compiler};
use crate::{interrupted, progress, table};

/// Runs that warm-up and measurement have at least.
const WARM_UP: usize = 2;
const FEWEST_RUNS: usize = 5;

/// One measurement.
#[derive(Clone, Debug, Serialize)]
struct Record {
    op: &'static str,
    device: &'static str,
    batch: usize,
    heads_q: usize,
    heads_kv: usize,
    seqlen_q: usize,
    seqlen_k: usize,
    head_dim: usize,
    mask: String,
    dtype: &'static str,
    /// Median.
    ms: f64,
    tflops: f64,
    gbps: f64,
    peak_bytes: usize,
    runs: usize,
}

/// What the records have in common.
#[derive(Serialize)]
struct Header {
    gpu: Option<String>,
    cpu: Option<String>,
    driver: Option<String>,
    compiler: String,
    version: &'static str,
    commit: Option<String>,
    unix_time: u64,
}

#[derive(Serialize)]
struct Report<'a> {
    header: Header,
    records: &'a [Record],
}

pub fn run(args: &BenchArgs) -> Result<ExitCode> {
    let machine = Machine::open(&args.device)?;
    let sweep = sweep(args, &machine);
    // Bad shapes are reported before anything is measured.
    for (_, problem, mask) in &sweep {
        Attention::new(*problem).mask(*mask).plan(1)?;
    }
    let budget = Duration::from_millis(args.budget_ms.unwrap_or(if machine.is_cpu() { 500 } else { 300 }));
    println!("{}", machine.name());
    let records = machine.run(Bench { sweep: &sweep, budget })?;
    print_table(&records, machine.matrix_peak());
    if let Some(path) = &args.json {
        let cpu = machine.is_cpu();
        let header = Header {
            gpu: (!cpu).then(|| machine.name()),
            cpu: cpu.then(|| machine.name()),
            driver: machine.driver(),
            compiler: kernel_compiler(),
            version: env!("CARGO_PKG_VERSION"),
            commit: commit(),
            unix_time: SystemTime::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_secs()),
        };
        let written = File::create(path).map_err(|error| error.to_string()).and_then(|file| {
            serde_json::to_writer_pretty(file, &Report { header, records: &records }).map_err(|e| e.to_string())
        });
        if let Err(error) = written {
            eprintln!("error: {} could not be written: {error}", path.display());
            return Ok(ExitCode::FAILURE);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Every measurement that the flags ask for.
fn sweep(args: &BenchArgs, machine: &Machine) -> Vec<(OpName, Problem, Mask)> {
    let pick = |given: &[usize], gpu: &[usize], cpu: &[usize]| match (given.is_empty(), machine.is_cpu()) {
        (false, _) => given.to_vec(),
        (true, false) => gpu.to_vec(),
        (true, true) => cpu.to_vec(),
    };
    let head_dims = pick(&args.head_dims, &[64, 128, 256], &[64, 128]);
    let seqlens = pick(&args.seqlens, &[1024, 4096, 16384], &[256, 1024]);
    let tokens = args.tokens.unwrap_or(if machine.is_cpu() { 1024 } else { 32768 });
    let hidden = args.hidden.unwrap_or(if machine.is_cpu() { 512 } else { 2048 });
    let mut sweep = Vec::new();
    for &op in &args.op {
        for &dtype in &args.dtype {
            for &head_dim in &head_dims {
                for &seqlen in &seqlens {
                    for &mask in &args.mask {
                        let heads_q = (hidden / head_dim.max(1)).max(1);
                        let problem = Problem {
                            batch: (tokens / seqlen.max(1)).max(1),
                            heads_q,
                            heads_kv: args.heads_kv.unwrap_or(heads_q),
                            seqlen_q: seqlen,
                            seqlen_k: seqlen,
                            head_dim,
                            dtype,
                        };
                        sweep.push((op, problem, mask));
                    }
                }
            }
        }
    }
    sweep
}

struct Bench<'a> {
    sweep: &'a [(OpName, Problem, Mask)],
    budget: Duration,
}

impl Job for Bench<'_> {
    type Result = Result<Vec<Record>>;

    fn run<B: Timed>(self, backend: &B, machine: &Machine) -> Self::Result {
        let bar = progress(self.sweep.len());
        let mut records = Vec::new();
        for &(op, problem, mask) in self.sweep {
            if interrupted() {
                break;
            }
            bar.set_message(format!("{} D {} S {} {mask}", op.name(), problem.head_dim, problem.seqlen_q));
            let times = match problem.dtype {
                Dtype::F16 => measure::<B, f16>(backend, &problem, mask, self.budget)?,
                Dtype::Bf16 => measure::<B, bf16>(backend, &problem, mask, self.budget)?,
            };
            records.push(record(op, &problem, mask, machine, &times));
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(records)
    }
}

/// The times of all runs, sorted.
fn measure<B: Timed, E: Element>(
    backend: &B,
    problem: &Problem,
    mask: Mask,
    budget: Duration,
) -> Result<Vec<Duration>> {
    let attention = Attention::new(*problem).mask(mask).lse(Lse::Omit);
    let plan = attention.plan(backend.sm_count())?;
    let inputs = Case::new(*problem, mask).random_inputs::<E>()?;
    let [q, k, v] = [
        backend.upload(Operand::Q, &inputs[0])?,
        backend.upload(Operand::K, &inputs[1])?,
        backend.upload(Operand::V, &inputs[2])?,
    ];
    let mut o = backend.allocate(Operand::O, inputs[0].len(), E::from_f32(0.0))?;
    let len = inputs[0].len();
    let mut launch = || {
        let kv = |buffer| Tensor::bhsd(B::slice(buffer), problem.kv_shape());
        let q = Tensor::bhsd(B::slice(&q), problem.q_shape());
        let o = Tensor::bhsd(B::slice_mut(&mut o, 0..len), problem.q_shape());
        backend.forward_into(&plan, q, kv(&k), kv(&v), o, None)
    };
    // As long as the measurement: a chip that comes from a pause runs faster than it can go on.
    let (start, mut runs) = (Instant::now(), 0);
    while (runs < WARM_UP || start.elapsed() < budget) && !interrupted() {
        backend.time(&mut launch)?;
        runs += 1;
    }
    let (start, mut times) = (Instant::now(), Vec::new());
    while (times.len() < FEWEST_RUNS || start.elapsed() < budget) && !interrupted() {
        times.push(backend.time(&mut launch)?);
    }
    times.sort();
    Ok(times)
}

fn record(op: OpName, problem: &Problem, mask: Mask, machine: &Machine, times: &[Duration]) -> Record {
    let seconds = times.get(times.len() / 2).map_or(f64::NAN, Duration::as_secs_f64);
    Record {
        op: op.name(),
        device: if machine.is_cpu() { "cpu" } else { "cuda" },
        batch: problem.batch,
        heads_q: problem.heads_q,
        heads_kv: problem.heads_kv,
        seqlen_q: problem.seqlen_q,
        seqlen_k: problem.seqlen_k,
        head_dim: problem.head_dim,
        mask: mask.to_string(),
        dtype: problem.dtype.name(),
        ms: seconds * 1e3,
        tflops: problem.flops_forward(mask) / seconds / 1e12,
        gbps: problem.bytes_forward() / seconds / 1e9,
        peak_bytes: peak_bytes(problem, machine),
        runs: times.len(),
    }
}

/// On a GPU, what the tensors take: there is no workspace. On the CPU, the process's peak.
fn peak_bytes(problem: &Problem, machine: &Machine) -> usize {
    let own = || {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        Some(1024 * line.split_whitespace().next()?.parse::<usize>().ok()?)
    };
    let tensors = 4 * (problem.q_shape().iter().product::<usize>() + problem.kv_shape().iter().product::<usize>());
    if machine.is_cpu() { own().unwrap_or(tensors) } else { tensors }
}

fn print_table(records: &[Record], peak: Option<f64>) {
    let mut table =
        table(["op", "D", "S", "B", "Hq", "Hkv", "mask", "dtype", "ms", "TFLOP/s", "of peak", "GB/s", "peak MiB"]);
    for r in records {
        let mut row: Vec<String> = vec![r.op.to_owned()];
        row.extend([r.head_dim, r.seqlen_q, r.batch, r.heads_q, r.heads_kv].map(|x| x.to_string()));
        row.extend([r.mask.clone(), r.dtype.to_owned(), format!("{:.3}", r.ms)]);
        row.push(if r.tflops < 10.0 { format!("{:.3}", r.tflops) } else { format!("{:.0}", r.tflops) });
        row.push(peak.map_or("n/a".to_owned(), |peak| format!("{:.0} %", r.tflops * 1e14 / peak)));
        row.extend([format!("{:.0}", r.gbps), (r.peak_bytes >> 20).to_string()]);
        table.add_row(row);
    }
    println!("{table}");
}
