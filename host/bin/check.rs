//! `check`: results against the f64 reference, within the accuracy bar.

use std::process::ExitCode;

use ferroflash::Result;
use ferroflash::cases::{Case, Outcome};
use ferroflash::reference::Rows;

use crate::args::{CheckArgs, OpName};
use crate::machine::{Job, Machine, Timed};
use crate::{interrupted, progress, table};

/// Random cases when no flag says otherwise.
const DEFAULT_CASES: u64 = 50;
/// Multiply-adds of a random case at most.
const FLOPS_CPU: f64 = 1e8;
const FLOPS_GPU: f64 = 4e8;
/// Score elements of one case that the reference computes in a few seconds; larger cases are judged by a sample of rows.
const REFERENCE_SCORES: usize = 1 << 29;
/// Rows of such a sample, of each head.
const SAMPLED_ROWS: usize = 64;
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
    println!("{} on {}", plural(cases.len() * args.op.len(), "case"), machine.name());
    let mut failed = 0;
    for &op in &args.op {
        let results = machine.run(Check { op, cases: &cases })?;
        failed += report(&results);
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs cases until they end or the user interrupts.
struct Check<'a> {
    op: OpName,
    cases: &'a [Case],
}

/// A case that ran, and how much of it was judged.
struct Judged {
    op: OpName,
    case: Case,
    outcome: Outcome,
    rows: Rows,
}

impl Job for Check<'_> {
    type Result = Result<Vec<Judged>>;

    fn run<B: Timed>(self, backend: &B, _: &Machine) -> Self::Result {
        let bar = progress(self.cases.len());
        let mut results = Vec::new();
        for case in self.cases {
            if interrupted() {
                break;
            }
            bar.set_message(case.to_string());
            let rows = rows(case);
            let outcome = match self.op {
                OpName::Forward => case.run(backend, &rows)?,
            };
            results.push(Judged { op: self.op, case: *case, outcome, rows });
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(results)
    }
}

/// All rows, or a sample where all would keep the reference busy for long.
fn rows(case: &Case) -> Rows {
    let problem = &case.problem;
    let scores = [problem.batch, problem.heads_q, problem.seqlen_q, problem.seqlen_k]
        .into_iter()
        .fold(1usize, usize::saturating_mul);
    if scores <= REFERENCE_SCORES { Rows::All } else { Rows::sample(problem.seqlen_q, SAMPLED_ROWS) }
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
        row.extend([outcome.o.error, outcome.o.bar, outcome.lse.error, outcome.lse.bar].map(|x| format!("{x:.1e}")));
        row.push(result.to_owned());
        table.add_row(row);
    }
    println!("{table}");
    if results.len() > SHOWN.max(failed) {
        println!("(the {} closest to the bar; {} more are further from it)", SHOWN, results.len() - SHOWN);
    }
    for judged in results.iter().filter(|judged| !judged.outcome.passed()) {
        println!("to run it again: ferroflash check {}", judged.case);
    }
    println!("{} passed, {} failed", results.len() - failed, failed);
    failed
}

fn plural(count: usize, noun: &str) -> String {
    if count == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}
