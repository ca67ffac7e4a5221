//! `check`: results against the f64 reference, within the accuracy bar.

mod report;

use std::fmt::{self, Display};
use std::process::ExitCode;

use ferroflash::cases::{Case, Judging, PiecewiseCase};
use ferroflash::reference::Rows;
use ferroflash::{Alibi, Attention, Determinism, InputKinds, Result, Sinks};

use crate::args::CheckArgs;
use crate::machine::{Job, Machine, Timed};
use crate::memory::{available_memory, check_memory};
use crate::op::OpName;
use crate::sweep::{InFlight, Rest, Swept, sweep_in_flight};
use crate::{EXIT_BAD_FLAGS, say};
use report::{Judged, Verdict, report};

/// Random cases when no flag says otherwise.
const DEFAULT_CASES: u64 = 50;
/// Multiply-adds of a random case at most.
const FLOPS_CPU: f64 = 1e8;
const FLOPS_GPU: f64 = 4e8;
/// Score elements of one case that the reference computes in a few seconds; larger cases are judged by a sample of
/// rows.
const REFERENCE_SCORES: usize = 1 << 29;
/// Rows of such a sample, of each head.
const SAMPLED_ROWS: usize = 64;
/// Score elements of the largest case whose gradients or total attention are judged, of which no sample can be taken:
/// every row contributes to every key. The reference needs a minute or two for them.
const GRADIENT_SCORES: usize = 1 << 26;
/// Copies of its tensors that a case needs at least: the test's own, and the backend's.
const COPIES: u128 = 2;
/// Bytes that a case takes while it is judged, for each byte of its tensors: the results in f64 of the reference and of
/// the plain implementation, each twice while heads are joined, and those to be judged.
const REFERENCE_COPIES: u128 = 20;
/// Bytes of all cases that are judged at the same time, where the system does not tell how much memory it has.
const FALLBACK_BYTES: u128 = 4 << 30;

pub fn run(args: &CheckArgs) -> Result<ExitCode> {
    let machine = Machine::open(&args.device)?;
    let limit = if machine.is_cpu() { FLOPS_CPU } else { FLOPS_GPU };
    let cases: Vec<Case> = match &args.case {
        Some(case) => vec![shaped(Case { dropout: args.pass.dropout, ..case.case(args.seed) }, args)],
        None => {
            let count = args.cases.unwrap_or(DEFAULT_CASES);
            let draw = if args.random_lengths { Case::random_lengths } else { Case::random };
            let random = |i| draw(args.seed.wrapping_mul(1 << 32).wrapping_add(i), limit);
            (0..count).map(|i| shaped(Case { dropout: args.pass.dropout, ..random(i) }, args)).collect()
        }
    };
    let given = args.case.as_ref().map(|case| case.dist_threshold);
    let step = |op: OpName, case: Case| Step {
        op,
        case,
        dist_threshold: op.is_piecewise().then(|| match given {
            Some(threshold) => threshold.unwrap_or(i32::try_from(case.problem.seqlen_k / 2).unwrap_or(i32::MAX)),
            None => PiecewiseCase::with_random_threshold(case, case.seed).dist_threshold,
        }),
        determinism: args.pass.determinism,
    };
    let steps: Vec<Step> = args.pass.op.iter().flat_map(|&op| cases.iter().map(move |&case| step(op, case))).collect();
    // What can't run is reported before anything runs.
    for step in &steps {
        let Step { op, case, .. } = step;
        let workspace = op.workspace_bytes(&step.attention())?;
        check_memory(*op, &case.problem, COPIES, if machine.is_cpu() { workspace } else { 0 })?;
        let scores = scores(case);
        let result = match op {
            OpName::Forward | OpName::Piecewise => None,
            OpName::Backward | OpName::PiecewiseBackward => Some("gradients"),
            OpName::TotalAttention => Some("total attention"),
        };
        if let Some(result) = result
            && scores > GRADIENT_SCORES
        {
            eprintln!(
                "error: the reference would take too long for the {result} of {scores} scores (batch × heads_q × \
                 seqlen_q × seqlen_k); at most {GRADIENT_SCORES} are allowed, and --op forward has no limit"
            );
            return Ok(ExitCode::from(EXIT_BAD_FLAGS));
        }
    }
    say(format_args!("{} on {}", plural(steps.len(), "case"), machine.name()));
    let Swept { done, ended } = machine.run(Check { steps: &steps });
    let failed = report(&done);
    ended?;
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Returns a case with the softcap, ALiBi and sinks of the flags.
fn shaped(case: Case, args: &CheckArgs) -> Case {
    let InputKinds { alibi, sinks, .. } = args.pass.shaping.kinds();
    Case {
        softcap: args.pass.shaping.softcap.or(case.softcap),
        alibi: if alibi == Alibi::None { case.alibi } else { alibi },
        sinks: if sinks == Sinks::None { case.sinks } else { sinks },
        ..case
    }
}

/// A case to run.
#[derive(Clone, Copy)]
struct Step {
    op: OpName,
    case: Case,
    /// Of piecewise attention.
    dist_threshold: Option<i32>,
    determinism: Determinism,
}

impl Step {
    /// The case, of a piecewise step.
    fn piecewise(&self) -> Option<PiecewiseCase> {
        Some(PiecewiseCase { case: self.case, dist_threshold: self.dist_threshold? })
    }

    fn attention(&self) -> Attention {
        self.case.attention().determinism(self.determinism)
    }
}

/// The flags that run it again.
impl Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "--op {}", self.op.name())?;
        if let Some(determinism) = self.op.determinism(self.determinism) {
            write!(f, " --determinism {determinism}")?;
        }
        if let Some(threshold) = self.dist_threshold {
            write!(f, " --dist-threshold {threshold}")?;
        }
        write!(f, " {}", self.case)
    }
}

/// The cases to run.
struct Check<'a> {
    steps: &'a [Step],
}

impl Job for Check<'_> {
    type Result = Swept<Judged>;

    fn run<B: Timed>(self, backend: &B, _: &Machine) -> Self::Result {
        let at_most = InFlight {
            items: rayon::current_num_threads(),
            bytes: available_memory().map_or(FALLBACK_BYTES, |bytes| bytes as u128 / 2),
        };
        sweep_in_flight(self.steps, Step::to_string, at_most, Step::reference_bytes, |step| step.launch(backend))
    }
}

impl Step {
    /// Runs the case. What is returned judges it.
    fn launch<B: Timed>(&self, backend: &B) -> Result<Rest<Judged>> {
        let step = *self;
        let Step { op, case, determinism, .. } = step;
        // A verdict from a judgement.
        fn rest<T: 'static>(
            step: Step,
            judging: Judging<T>,
            verdict: impl FnOnce(T) -> Verdict + Send + 'static,
        ) -> Rest<Judged> {
            Box::new(move || Ok(Judged { step, verdict: verdict(judging()?) }))
        }
        let rows = rows(&case);
        Ok(match (op, step.piecewise()) {
            (OpName::TotalAttention, _) => {
                rest(step, case.launch_total(backend)?, |outcome| Verdict::total_attention(&outcome))
            }
            (OpName::Forward | OpName::Piecewise, None) => {
                rest(step, case.launch(backend, rows.clone())?, |outcome| Verdict::forward(&outcome, rows))
            }
            (OpName::Forward | OpName::Piecewise, Some(case)) => {
                rest(step, case.launch(backend, rows.clone())?, |outcome| Verdict::forward(&outcome, rows))
            }
            (_, None) => rest(step, case.launch_backward(backend, determinism)?, |outcome| Verdict::backward(&outcome)),
            (_, Some(case)) => {
                rest(step, case.launch_backward(backend, determinism)?, |outcome| Verdict::backward(&outcome))
            }
        })
    }

    /// Memory that the case takes until it is judged, about.
    fn reference_bytes(&self) -> u128 {
        self.op.tensor_bytes(&self.case.problem).saturating_mul(REFERENCE_COPIES)
    }
}

/// All rows, or a sample where all would keep the reference busy for long.
fn rows(case: &Case) -> Rows {
    if scores(case) <= REFERENCE_SCORES { Rows::All } else { Rows::sample(case.problem.seqlen_q, SAMPLED_ROWS) }
}

/// Scores of a case; rows and keys cost something even where there is no score.
fn scores(case: &Case) -> usize {
    let problem = &case.problem;
    if let Some(lengths) = case.lengths {
        let of_sequence = |[q, k]: &[usize; 2]| q.max(&1).saturating_mul(*k.max(&1));
        let all = lengths.sequences.iter().map(of_sequence).fold(1, usize::saturating_add);
        return all.saturating_mul(problem.heads_q);
    }
    [problem.batch, problem.heads_q, problem.seqlen_q.max(1), problem.seqlen_k.max(1)]
        .into_iter()
        .fold(1, usize::saturating_mul)
}

fn plural(count: usize, noun: &str) -> String {
    if count == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    #[test]
    fn a_case_prints_the_flags_that_run_it_again() {
        for (op, determinism, dropout) in [
            (OpName::Forward, Determinism::Fast, 0.0),
            (OpName::Forward, Determinism::Fast, 0.1),
            (OpName::Backward, Determinism::Fast, 0.3),
            (OpName::Backward, Determinism::Exact, 0.0),
            (OpName::Piecewise, Determinism::Fast, 0.0),
            (OpName::PiecewiseBackward, Determinism::Exact, 0.0),
            (OpName::TotalAttention, Determinism::Fast, 0.0),
        ] {
            let dist_threshold = op.is_piecewise().then_some(-3);
            let seed = (dropout * 10.0) as u64 + op as u64;
            let case = Case { padding: 0, dropout, ..Case::random(seed, 1e6) };
            let step = Step { op, case, dist_threshold, determinism };
            let line = format!("ferroflash check {step}");
            let Ok(Cli { command: Command::Check(args) }) = Cli::try_parse_from(line.split(' ')) else {
                panic!("{line}");
            };
            assert_eq!(args.case.as_ref().and_then(|case| case.dist_threshold), dist_threshold, "{line}");
            let case = args.case.as_ref().map(|case| Case { dropout: args.pass.dropout, ..case.case(args.seed) });
            let case = case.map(|case| shaped(case, &args));
            let scale = Some(step.case.effective_scale());
            assert_eq!((args.pass.op, args.pass.determinism), (vec![op], determinism), "{line}");
            assert_eq!(case, Some(Case { scale, ..step.case }), "{line}");
        }
    }
}
