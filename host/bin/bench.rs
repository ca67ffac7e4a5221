//! `bench`: the median time of many runs, by device events on a GPU.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use ferroflash::cases::Case;
use ferroflash::{Attention, Dtype, Element, Mask, Operand, Problem, Result, Tensor, bf16, f16};
use serde::Serialize;

use crate::args::{BenchArgs, OpName};
use crate::machine::{Job, Machine, Timed, check_memory, commit, forget_peak_memory, kernel_compiler, peak_memory};
use crate::sweep::{Swept, interrupted, sweep};
use crate::{say, table};

/// Copies of its tensors that this computer must hold: the values, and on the CPU what they are uploaded to.
const COPIES_CPU: u128 = 2;
const COPIES_GPU: u128 = 1;
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
    let steps = steps(args, &machine);
    // Bad shapes are reported before anything is measured.
    for Step { problem, mask, .. } in &steps {
        Attention::new(*problem).mask(*mask).plan(1)?;
        check_memory(problem, if machine.is_cpu() { COPIES_CPU } else { COPIES_GPU })?;
    }
    let mut file = match args.json.as_deref().map(JsonFile::open).transpose() {
        Ok(file) => file,
        Err(message) => return Ok(fail(&message)),
    };
    let budget = Duration::from_millis(args.budget_ms.unwrap_or(if machine.is_cpu() { 500 } else { 300 }));
    say(machine.name());
    let Swept { done, ended } = machine.run(Bench { steps: &steps, budget });
    let records: Vec<Record> = done.into_iter().flatten().collect();
    print_table(&records, machine.matrix_peak());
    if let Some(file) = &mut file {
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
        if let Err(message) = file.write(&Report { header, records: &records }) {
            return Ok(fail(&message));
        }
    }
    ended?;
    Ok(ExitCode::SUCCESS)
}

fn fail(message: &str) -> ExitCode {
    eprintln!("error: {message}");
    ExitCode::FAILURE
}

/// The file that `--json` names, opened before anything is measured, so that a bad name costs no time. What it held
/// before stays until there are results.
struct JsonFile<'a> {
    path: &'a Path,
    file: File,
}

impl<'a> JsonFile<'a> {
    fn open(path: &'a Path) -> std::result::Result<Self, String> {
        let file = File::options().write(true).create(true).truncate(false).open(path);
        file.map(|file| JsonFile { path, file }).map_err(|error| cannot_write(path, &error))
    }

    fn write(&mut self, report: &Report) -> std::result::Result<(), String> {
        let mut text = serde_json::to_string_pretty(report).map_err(|error| cannot_write(self.path, &error))?;
        text.push('\n');
        // A pipe or a terminal has no length to cut.
        if self.file.metadata().is_ok_and(|metadata| metadata.is_file()) {
            self.file.set_len(0).map_err(|error| cannot_write(self.path, &error))?;
        }
        self.file.write_all(text.as_bytes()).map_err(|error| cannot_write(self.path, &error))
    }
}

fn cannot_write(path: &Path, error: &dyn std::error::Error) -> String {
    format!("{} can't be written: {error}", path.display())
}

/// One measurement to make.
struct Step {
    op: OpName,
    problem: Problem,
    mask: Mask,
}

/// Every measurement that the flags ask for.
fn steps(args: &BenchArgs, machine: &Machine) -> Vec<Step> {
    let pick = |given: &[usize], gpu: &[usize], cpu: &[usize]| match (given.is_empty(), machine.is_cpu()) {
        (false, _) => given.to_vec(),
        (true, false) => gpu.to_vec(),
        (true, true) => cpu.to_vec(),
    };
    let head_dims = pick(&args.head_dims, &[64, 128, 256], &[64, 128]);
    let seqlens = pick(&args.seqlens, &[1024, 4096, 16384], &[256, 1024]);
    let tokens = args.tokens.unwrap_or(if machine.is_cpu() { 1024 } else { 32768 });
    let hidden = args.hidden.unwrap_or(if machine.is_cpu() { 512 } else { 2048 });
    let mut steps = Vec::new();
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
                        steps.push(Step { op, problem, mask });
                    }
                }
            }
        }
    }
    steps
}

struct Bench<'a> {
    steps: &'a [Step],
    budget: Duration,
}

impl Job for Bench<'_> {
    type Result = Swept<Option<Record>>;

    fn run<B: Timed>(self, backend: &B, machine: &Machine) -> Self::Result {
        let name = |Step { op, problem, mask }: &Step| {
            format!("{} D {} S {} {mask}", op.name(), problem.head_dim, problem.seqlen_q)
        };
        sweep(self.steps, name, |step| {
            forget_peak_memory();
            let measured = match (step.op, step.problem.dtype) {
                (OpName::Forward, Dtype::F16) => forward::<B, f16>(backend, step, self.budget)?,
                (OpName::Forward, Dtype::Bf16) => forward::<B, bf16>(backend, step, self.budget)?,
            };
            Ok(measured.map(|measured| record(step, machine, &measured)))
        })
    }
}

/// What runs of one problem took.
struct Measured {
    /// Sorted.
    times: Vec<Duration>,
    workspace_bytes: usize,
}

/// Measures one problem; `None` where Ctrl-C left too few runs for a median.
fn forward<B: Timed, E: Element>(backend: &B, step: &Step, budget: Duration) -> Result<Option<Measured>> {
    let Step { problem, mask, .. } = step;
    let plan = Attention::new(*problem).mask(*mask).plan(backend.sm_count())?;
    let inputs = Case::new(*problem, *mask).random_inputs::<E>()?;
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
    let measured = Measured { times, workspace_bytes: plan.workspace_bytes() };
    Ok(Some(measured).filter(|measured| measured.times.len() >= FEWEST_RUNS))
}

fn record(step: &Step, machine: &Machine, measured: &Measured) -> Record {
    let Step { op, problem, mask } = step;
    let times = &measured.times;
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
        tflops: problem.flops_forward(*mask) / seconds / 1e12,
        gbps: problem.bytes_forward() / seconds / 1e9,
        peak_bytes: peak_bytes(problem, machine, measured.workspace_bytes),
        runs: times.len(),
    }
}

/// On a GPU, what the tensors and the workspace take; on the CPU, the process's peak while it measured.
fn peak_bytes(problem: &Problem, machine: &Machine, workspace_bytes: usize) -> usize {
    let tensors = 4 * (problem.q_shape().iter().product::<usize>() + problem.kv_shape().iter().product::<usize>());
    let own = if machine.is_cpu() { peak_memory() } else { None };
    own.unwrap_or(tensors + workspace_bytes)
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
    say(table);
}
