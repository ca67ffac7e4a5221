//! `check`: results against the f64 reference, within the accuracy bar.

use std::process::ExitCode;

use ferroflash::cases::{Case, Outcome};
use ferroflash::reference::Rows;
use ferroflash::{Attention, Result};

use crate::args::{CheckArgs, OpName};
use crate::machine::{Job, Machine, Timed, check_memory};
use crate::sweep::{Swept, sweep};
use crate::{say, table};

/// Random cases when no flag says otherwise.
const DEFAULT_CASES: u64 = 50;
/// Multiply-adds of a random case at most.
const FLOPS_CPU: f64 = 1e8;
const FLOPS_GPU: f64 = 4e8;
/// Score elements of one case that the reference computes in a few seconds; larger cases are judged by a sample of rows.
const REFERENCE_SCORES: usize = 1 << 29;
/// Rows of such a sample, of each head.
const SAMPLED_ROWS: usize = 64;
/// Copies of its tensors that a case needs at least: the test's own, and the backend's.
const COPIES: u128 = 2;
/// Rows of the table; failures are always shown.
const SHOWN: usize = 20;

pub fn run(args: &CheckArgs) -> Result<ExitCode> {
    let machine = Machine::open(&args.device)?;
    let limit = if machine.is_cpu() { FLOPS_CPU } else { FLOPS_GPU };
    let cases: Vec<Case> = match &args.case {
        Some(case) => vec![case.case(args.seed)],
        None => {
            let count = args.cases.unwrap_or(DEFAULT_CASES);
            (0..count).map(|i| Case::random(args.seed.wrapping_mul(1 << 32).wrapping_add(i), limit)).collect()
        }
    };
    // Bad shapes are reported before anything runs.
    for case in &cases {
        Attention::new(case.problem).mask(case.mask).scale(case.effective_scale()).plan(1)?;
        check_memory(&case.problem, COPIES)?;
    }
    say(format_args!("{} on {}", plural(cases.len() * args.op.len(), "case"), machine.name()));
    let steps: Vec<(OpName, Case)> = args.op.iter().flat_map(|&op| cases.iter().map(move |&case| (op, case))).collect();
    let Swept { done, ended } = machine.run(Check { steps: &steps });
    let failed = report(&done);
    ended?;
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The cases to run.
struct Check<'a> {
    steps: &'a [(OpName, Case)],
}

/// A case that ran, and how much of it was judged.
struct Judged {
    op: OpName,
    case: Case,
    outcome: Outcome,
    rows: Rows,
}

impl Job for Check<'_> {
    type Result = Swept<Judged>;

    fn run<B: Timed>(self, backend: &B, _: &Machine) -> Self::Result {
        let name = |(op, case): &(OpName, Case)| format!("--op {} {case}", op.name());
        sweep(self.steps, name, |&(op, case)| {
            let rows = rows(&case);
            let outcome = match op {
                OpName::Forward => case.run(backend, &rows)?,
            };
            Ok(Judged { op, case, outcome, rows })
        })
    }
}

/// All rows, or a sample where all would keep the reference busy for long.
fn rows(case: &Case) -> Rows {
    let problem = &case.problem;
    let scores = [problem.batch, problem.heads_q, problem.seqlen_q, problem.seqlen_k]
        .into_iter()
        .fold(1usize, usize::saturating_mul);
    // Rows cost something even where there is no score.
    if scores.max(problem.seqlen_q) <= REFERENCE_SCORES {
        Rows::All
    } else {
        Rows::sample(problem.seqlen_q, SAMPLED_ROWS)
    }
}

/// Prints the cases that failed and those closest to the bar; how many failed.
fn report(results: &[Judged]) -> usize {
    let closeness = |judged: &Judged| judged.outcome.o.error / judged.outcome.o.bar;
    let mut order: Vec<&Judged> = results.iter().collect();
    order.sort_by(|a, b| closeness(b).total_cmp(&closeness(a)));
    order.sort_by_key(|judged| judged.outcome.passed());
    let failed = results.iter().filter(|judged| !judged.outcome.passed()).count();
    let mut table = table([
        "op",
        "B",
        "Hq",
        "Hkv",
        "M",
        "N",
        "D",
        "dtype",
        "mask",
        "layout",
        "std",
        "error O",
        "plain O",
        "bar",
        "error LSE",
        "bar",
        "result",
    ]);
    for Judged { op, case, outcome, rows } in order.iter().take(SHOWN.max(failed)) {
        let p = &case.problem;
        let result = match (outcome.passed(), outcome.untouched, rows) {
            (true, _, Rows::All) => "pass",
            (true, _, Rows::Some(_)) => "pass (sampled rows)",
            (false, true, _) => "FAIL",
            (false, false, _) => "FAIL (wrote outside)",
        };
        let mut row: Vec<String> = vec![op.name().to_owned()];
        row.extend([p.batch, p.heads_q, p.heads_kv, p.seqlen_q, p.seqlen_k, p.head_dim].map(|x| x.to_string()));
        row.extend([p.dtype.name().to_owned(), case.mask.to_string(), case.order.to_string()]);
        row.push(case.input_std.to_string());
        let (o, lse) = (outcome.o, outcome.lse);
        row.extend([o.error, o.plain, o.bar, lse.error, lse.bar].map(|x| format!("{x:.1e}")));
        row.push(result.to_owned());
        table.add_row(row);
    }
    say(table);
    if results.len() > SHOWN.max(failed) {
        let hidden = results.len() - SHOWN.max(failed);
        say(format_args!("(those closest to the bar; {hidden} more are further from it)"));
    }
    for judged in results.iter().filter(|judged| !judged.outcome.passed()) {
        say(format_args!("to run it again: ferroflash check --op {} {}", judged.op.name(), judged.case));
    }
    say(format_args!("{} passed, {} failed", results.len() - failed, failed));
    failed
}

fn plural(count: usize, noun: &str) -> String {
    if count == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}
