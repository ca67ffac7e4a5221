//! What `check` says of the cases that ran.

use ferroflash::cases::{BackwardOutcome, Outcome, TotalOutcome};
use ferroflash::reference::{Accuracy, Beyond, Rows};

use super::Step;
use crate::shaping::Shaping;
use crate::{say, table};

/// Rows of the table; failures are always shown.
const SHOWN: usize = 20;

/// A case that ran.
pub struct Judged {
    pub step: Step,
    pub verdict: Verdict,
}

/// How it ended, whichever pass it was of.
pub struct Verdict {
    /// The result that stands for the others, and its accuracy.
    tensor: &'static str,
    accuracy: Accuracy,
    lse: Option<Accuracy>,
    /// A promise is broken.
    failed: bool,
    /// The results that have no bar.
    beyond: Option<Beyond>,
    untouched: bool,
    sampled: bool,
}

impl Verdict {
    /// Of a forward pass, of which `rows` were judged: O, and the LSE beside it.
    pub fn forward(outcome: &Outcome, rows: Rows) -> Self {
        Verdict {
            tensor: "O",
            accuracy: outcome.o,
            lse: Some(outcome.lse),
            failed: outcome.failed(),
            beyond: outcome.beyond(),
            untouched: outcome.untouched,
            sampled: matches!(rows, Rows::Some(_)),
        }
    }

    /// Of a backward pass: the gradient closest to its bar, or furthest beyond it.
    pub fn backward(outcome: &BackwardOutcome) -> Self {
        let worse = |a: (&'static str, Accuracy), b: (&'static str, Accuracy)| {
            if closeness(&b.1) > closeness(&a.1) { b } else { a }
        };
        let (tensor, accuracy) = outcome.gradients.named().into_iter().reduce(worse).unwrap_or_default();
        Verdict {
            tensor,
            accuracy,
            lse: None,
            failed: outcome.failed(),
            beyond: outcome.beyond,
            untouched: outcome.untouched,
            sampled: false,
        }
    }

    /// Of total attention.
    pub fn total_attention(outcome: &TotalOutcome) -> Self {
        Verdict {
            tensor: "total",
            accuracy: outcome.total,
            lse: None,
            failed: outcome.failed(),
            beyond: outcome.beyond,
            untouched: outcome.untouched,
            sampled: false,
        }
    }

    fn words(&self) -> String {
        match self {
            Verdict { failed: true, untouched: true, .. } => "FAIL".to_owned(),
            Verdict { failed: true, untouched: false, .. } => "FAIL (wrote outside)".to_owned(),
            Verdict { beyond: Some(beyond), .. } => beyond.to_string(),
            Verdict { sampled: true, .. } => "pass (sampled rows)".to_owned(),
            Verdict { .. } => "pass".to_owned(),
        }
    }

    /// Neither passed nor failed.
    fn is_beyond(&self) -> bool {
        !self.failed && self.beyond.is_some()
    }
}

/// The error in units of its bar.
fn closeness(accuracy: &Accuracy) -> f64 {
    accuracy.error / accuracy.bar
}

/// Prints the cases that failed, those beyond a limit and those closest to the bar; how many failed.
pub fn report(results: &[Judged]) -> usize {
    let mut order: Vec<&Judged> = results.iter().collect();
    order.sort_by(|a, b| closeness(&b.verdict.accuracy).total_cmp(&closeness(&a.verdict.accuracy)));
    order.sort_by_key(|judged| (!judged.verdict.failed, !judged.verdict.is_beyond()));
    let failed = results.iter().filter(|judged| judged.verdict.failed).count();
    let beyond = results.iter().filter(|judged| judged.verdict.is_beyond()).count();
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
        "worst",
        "error",
        "plain",
        "bar",
        "error LSE",
        "bar",
        "result",
    ]);
    for judged in order.iter().take(SHOWN.max(failed)) {
        table.add_row(row(judged));
    }
    say(table);
    if results.len() > SHOWN.max(failed) {
        let hidden = results.len() - SHOWN.max(failed);
        say(format_args!("(those closest to the bar; {hidden} more are further from it)"));
    }
    for judged in results.iter().filter(|judged| judged.verdict.failed) {
        say(format_args!("to run it again: ferroflash check {}", judged.step));
    }
    let passed = results.len() - failed - beyond;
    match beyond {
        0 => say(format_args!("{passed} passed, {failed} failed")),
        _ => say(format_args!("{passed} passed, {failed} failed, {beyond} beyond a limit")),
    }
    failed
}

fn row(Judged { step, verdict }: &Judged) -> Vec<String> {
    let Step { op, case, determinism, .. } = step;
    let (p, Verdict { accuracy, lse, .. }) = (&case.problem, verdict);
    let number = |x: f64| format!("{x:.1e}");
    let shaping = Shaping { softcap: case.softcap, kinds: case.kinds(), lengths: case.lengths };
    let mut row = vec![op.title(*determinism, case.dropout, &shaping)];
    row.extend([p.batch, p.heads_q, p.heads_kv, p.seqlen_q, p.seqlen_k, p.head_dim].map(|x| x.to_string()));
    row.extend([p.dtype.name().to_owned(), case.mask.to_string(), case.order.to_string()]);
    row.extend([case.input_std.to_string(), verdict.tensor.to_owned()]);
    row.extend([accuracy.error, accuracy.plain, accuracy.bar].map(number));
    row.extend(lse.map_or(["-".to_owned(), "-".to_owned()], |lse| [lse.error, lse.bar].map(number)));
    row.push(verdict.words());
    row
}

#[cfg(test)]
mod tests {
    use ferroflash::reference::{GradientAccuracy, Pair};

    use super::*;

    #[test]
    fn the_worst_gradient_stands_for_all() {
        let accuracy = |error| Accuracy { error, plain: 0.5, bar: 1.0 };
        for (errors, name) in [
            ([0.2, 0.1, 0.1], "dQ"),
            ([0.2, 0.3, 0.1], "dK"),
            ([0.2, 0.3, 1.5], "dV"),
            ([0.2, f64::INFINITY, 1.5], "dK"),
        ] {
            let [dq, dk, dv] = errors.map(accuracy);
            let gradients = GradientAccuracy { dq, dk, dv, ..GradientAccuracy::default() };
            let outcome = BackwardOutcome { gradients, untouched: true, beyond: None };
            let verdict = Verdict::backward(&outcome);
            assert_eq!((verdict.tensor, verdict.failed), (name, !outcome.passed()), "{errors:?}");
            let second = Some(Pair { q: accuracy(0.1), k: accuracy(2.0) });
            let outcome = BackwardOutcome { gradients: GradientAccuracy { second, ..gradients }, ..outcome };
            let verdict = Verdict::backward(&outcome);
            let name = if errors.contains(&f64::INFINITY) { "dK1" } else { "dK2" };
            assert_eq!((verdict.tensor, verdict.failed), (name, true), "{errors:?}");
        }
    }

    #[test]
    fn beyond_the_limit_is_neither() {
        let accuracy = Accuracy { error: 2.0, plain: 0.5, bar: 1.0 };
        let beyond = Beyond::of("total attention", 200.0, 128.0);
        let outcome = TotalOutcome { total: accuracy, untouched: true, beyond };
        let verdict = Verdict::total_attention(&outcome);
        assert!(!verdict.failed && verdict.is_beyond());
        assert_eq!(verdict.words(), "beyond the limit of total attention: |LSE| 2.0e2 is above 128");
        for outcome in [TotalOutcome { untouched: false, ..outcome }, TotalOutcome { beyond: None, ..outcome }] {
            let verdict = Verdict::total_attention(&outcome);
            assert!(verdict.failed && !verdict.is_beyond() && verdict.words().starts_with("FAIL"));
        }
    }
}
