//! `bench`: the median time of many runs, by device events on a GPU.

mod measure;
mod protocol;
mod record;

use std::process::ExitCode;
use std::time::Duration;

use ferroflash::{
    Attention, BackwardPlan, Determinism, Dropout, Dtype, InputKinds, Mask, Piecewise, Plan, Problem, Result, bf16, f16,
};

use crate::args::BenchArgs;
use crate::inputs::Inputs;
use crate::machine::{Job, Machine, Timed};
use crate::memory::check_memory;
use crate::op::OpName;
use crate::say;
use crate::shaping::{Shaping, sequences};
use crate::sweep::{Swept, sweep};
use measure::measure;
use protocol::{Method, Protocol};
use record::{Header, JsonFile, Record, Report, print_table};

/// Copies of its tensors that this computer must hold: the values, and on the CPU what they are uploaded to.
const COPIES_CPU: u128 = 2;
const COPIES_GPU: u128 = 1;

pub fn run(args: &BenchArgs) -> Result<ExitCode> {
    let machine = Machine::open(&args.device)?;
    let steps = steps(args, &machine);
    // Bad shapes are reported before anything is measured.
    for step in &steps {
        let workspace = step.op.workspace_bytes(&step.attention())?;
        let (copies, workspace) = if machine.is_cpu() { (COPIES_CPU, workspace) } else { (COPIES_GPU, 0) };
        check_memory(step.op, &step.problem, copies, workspace)?;
    }
    let mut file = match args.json.as_deref().map(JsonFile::open).transpose() {
        Ok(file) => file,
        Err(message) => return Ok(fail(&message)),
    };
    let method = method(args, &machine);
    say(machine.name());
    let Swept { done, ended } = machine.run(Bench { steps: &steps, method })?;
    let records: Vec<Record> = done.into_iter().flatten().collect();
    print_table(&records, machine.matrix_peak());
    let report = Report { header: Header::of(&machine, method.protocol), records: &records };
    if let Some(Err(message)) = file.as_mut().map(|file| file.write(&report)) {
        return Ok(fail(&message));
    }
    ended?;
    Ok(ExitCode::SUCCESS)
}

fn fail(message: &str) -> ExitCode {
    eprintln!("error: {message}");
    ExitCode::FAILURE
}

/// One measurement to make.
struct Step {
    op: OpName,
    problem: Problem,
    mask: Mask,
    /// Of piecewise attention.
    dist_threshold: Option<i32>,
    determinism: Determinism,
    dropout: f32,
    shaping: Shaping,
    /// The flag of its lengths.
    lengths_text: Option<String>,
}

impl Step {
    fn attention(&self) -> Attention {
        let dropout = Dropout { p: self.dropout, ..Dropout::NONE };
        let attention = Attention::new(self.problem).mask(self.mask).determinism(self.determinism).dropout(dropout);
        let attention = attention.for_inputs(self.shaping.kinds);
        self.shaping.softcap.map_or(attention, |cap| attention.softcap(cap))
    }

    fn piecewise(&self) -> Option<Piecewise> {
        Some(Piecewise::new(self.attention(), self.dist_threshold?))
    }

    /// How its forward pass runs.
    fn plan(&self, sm_count: u32) -> Result<Plan> {
        match self.piecewise() {
            Some(piecewise) => piecewise.plan(sm_count),
            None => self.attention().plan(sm_count),
        }
    }

    /// How its backward pass runs.
    fn plan_backward(&self, sm_count: u32) -> Result<BackwardPlan> {
        match self.piecewise() {
            Some(piecewise) => piecewise.plan_backward(sm_count),
            None => self.attention().plan_backward(sm_count),
        }
    }
}

/// How the flags want it measured; on the CPU, runs are always back to back.
fn method(args: &BenchArgs, machine: &Machine) -> Method {
    let (protocol, default_ms) = match (machine.is_cpu(), args.sustained) {
        (true, _) => (Protocol::Sustained, 500),
        (false, true) => (Protocol::Sustained, 300),
        (false, false) => (Protocol::L2Cleared, 150),
    };
    Method { protocol, budget: Duration::from_millis(args.budget_ms.unwrap_or(default_ms)) }
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
    let lengths = args.lengths.as_ref().map(|(_, lengths)| *lengths);
    let kinds = InputKinds { sequences: lengths.map(sequences), ..args.pass.shaping.kinds() };
    let shaping = Shaping { softcap: args.pass.shaping.softcap, kinds, lengths };
    let all = |side: usize| lengths.map(|lengths| lengths.sequences.iter().map(|sequence| sequence[side]).sum());
    // With lengths, one measurement takes the place of those of all lengths of a dense batch.
    let seqlens = all(0).map_or(seqlens, |rows: usize| vec![rows]);
    let mut steps = Vec::new();
    for &op in &args.pass.op {
        for &dtype in &args.dtype {
            for &head_dim in &head_dims {
                for &seqlen in &seqlens {
                    for &mask in args.window.as_ref().map_or(&args.mask[..], std::slice::from_ref) {
                        let heads_q = (hidden / head_dim.max(1)).max(1);
                        let problem = Problem {
                            batch: if lengths.is_some() { 1 } else { (tokens / seqlen.max(1)).max(1) },
                            heads_q,
                            heads_kv: args.heads_kv.unwrap_or(heads_q),
                            seqlen_q: seqlen,
                            seqlen_k: all(1).unwrap_or(seqlen),
                            head_dim,
                            dtype,
                        };
                        let half = i32::try_from(seqlen / 2).unwrap_or(i32::MAX);
                        let dist_threshold = op.is_piecewise().then(|| args.dist_threshold.unwrap_or(half));
                        let (determinism, dropout) = (args.pass.determinism, args.pass.dropout);
                        let lengths_text = args.lengths.as_ref().map(|(text, _)| text.clone());
                        steps.push(Step {
                            op,
                            problem,
                            mask,
                            dist_threshold,
                            determinism,
                            dropout,
                            shaping,
                            lengths_text,
                        });
                    }
                }
            }
        }
    }
    steps
}

struct Bench<'a> {
    steps: &'a [Step],
    method: Method,
}

impl Job for Bench<'_> {
    type Result = Result<Swept<Option<Record>>>;

    fn run<B: Timed>(self, backend: &B, machine: &Machine) -> Self::Result {
        let name = |Step { op, problem, mask, determinism, dropout, shaping, .. }: &Step| {
            let title = op.title(*determinism, *dropout, shaping);
            format!("{title} D {} S {} {mask}", problem.head_dim, problem.seqlen_q)
        };
        let (mut in_f16, mut in_bf16) = (Inputs::<B, f16>::new(backend)?, Inputs::<B, bf16>::new(backend)?);
        Ok(sweep(self.steps, name, |step| {
            in_f16.keep(backend, step.op, &step.problem)?;
            in_bf16.keep(backend, step.op, &step.problem)?;
            let measured = match step.problem.dtype {
                Dtype::F16 => measure(backend, step, in_f16.upload(backend, step.op, &step.problem)?, &self.method)?,
                Dtype::Bf16 => measure(backend, step, in_bf16.upload(backend, step.op, &step.problem)?, &self.method)?,
            };
            Ok(measured.map(|measured| Record::new(step, machine, &measured)))
        }))
    }
}
