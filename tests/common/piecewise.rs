//! Tests of piecewise attention that both machines must pass.

use ferroflash::cases::{Case, Order, PiecewiseCase};
use ferroflash::reference::Rows;
use ferroflash::{Backend, Determinism, Dtype, Mask, Problem, bf16};

use super::bits;

const PROBLEM: Problem =
    Problem { batch: 1, heads_q: 2, heads_kv: 1, seqlen_q: 300, seqlen_k: 420, head_dim: 64, dtype: Dtype::Bf16 };

/// Returns shapes and thresholds that are easy to get wrong: rows without a key, no keys or queries at all, grouped
/// heads, every compiled head dim; thresholds at, before and behind every distance, and next to the edges of tiles.
pub fn named() -> Vec<PiecewiseCase> {
    let mut cases = Vec::new();
    let mut add = |problem: Problem, mask, order, thresholds: &[i32]| {
        for &dist_threshold in thresholds {
            let seed = cases.len() as u64;
            let padding = if order == Order::Bshd { 8 } else { 0 };
            let case = Case { seed, order, padding, ..Case::new(problem, mask) };
            cases.push(PiecewiseCase { case, dist_threshold });
        }
    };
    let window = Mask::Window { left: Some(200), right: Some(10) };
    for mask in [Mask::None, Mask::Causal, window] {
        for (head_dim, dtype) in [(64, Dtype::Bf16), (128, Dtype::F16), (256, Dtype::Bf16)] {
            let problem = Problem { head_dim, dtype, ..PROBLEM };
            add(problem, mask, Order::Bhsd, &[-400, -300, -299, -128, -1, 0, 1, 63, 128, 210, 300, 419, 420, 500]);
        }
        add(Problem { seqlen_q: 239, seqlen_k: 1, ..PROBLEM }, mask, Order::Bhsd, &[i32::MIN, -1, 0, 1, i32::MAX]);
        add(Problem { seqlen_q: 799, seqlen_k: 3, ..PROBLEM }, mask, Order::Bshd, &[-300, 0, 1, 2, 3]);
        add(Problem { seqlen_q: 1, seqlen_k: 700, head_dim: 40, ..PROBLEM }, mask, Order::Bshd, &[0, 350, 700]);
        add(Problem { seqlen_k: 0, ..PROBLEM }, mask, Order::Bhsd, &[0]);
        add(Problem { seqlen_q: 0, ..PROBLEM }, mask, Order::Bhsd, &[0]);
        add(Problem { batch: 0, ..PROBLEM }, mask, Order::Bhsd, &[0]);
        add(Problem { seqlen_q: 512, seqlen_k: 612, head_dim: 128, ..PROBLEM }, mask, Order::Bshd, &[100, 256]);
        add(Problem { heads_q: 7, seqlen_q: 65, seqlen_k: 130, head_dim: 104, ..PROBLEM }, mask, Order::Bhsd, &[64]);
    }
    cases
}

/// Returns long problems, judged by a sample of their rows.
pub fn long() -> Vec<PiecewiseCase> {
    let case = |seqlen_q, seqlen_k, head_dim, order| {
        let problem = Problem { batch: 2, heads_q: 4, heads_kv: 4, seqlen_q, seqlen_k, head_dim, ..PROBLEM };
        let case = Case { order, ..Case::new(problem, Mask::Causal) };
        PiecewiseCase { case, dist_threshold: seqlen_k as i32 / 2 }
    };
    vec![case(4096, 4001, 16, Order::Bhsd), case(8192, 3867, 32, Order::Bshd)]
}

/// Runs the forward pass. A failure prints the command that runs it again.
pub fn pass<B: Backend>(backend: &B, case: &PiecewiseCase, rows: &Rows) {
    let outcome = case.run(backend, rows).unwrap_or_else(|error| panic!("{case}: {error}"));
    assert!(outcome.passed(), "{case}\n{outcome:#?}");
}

/// Runs both passes. A failure prints the command that runs them again.
pub fn pass_backward<B: Backend>(backend: &B, case: &PiecewiseCase, determinism: Determinism) {
    let outcome = case.run_backward(backend, determinism).unwrap_or_else(|error| panic!("{case}: {error}"));
    assert!(outcome.passed(), "{case} ({determinism})\n{outcome}");
}

/// Checks that piecewise attention becomes plain attention. With the same tensors in both pairs it does for any
/// threshold, also at a distance and next to it. With the threshold beyond every distance it is that of the first pair,
/// bit for bit, and with 0 and a causal mask that of the second.
pub fn becomes_plain<B: Backend>(backend: &B) {
    for (mask, head_dim) in [(Mask::None, 64), (Mask::Causal, 64), (Mask::None, 128), (Mask::Causal, 128)] {
        let case = Case::new(Problem { head_dim, ..PROBLEM }, mask);
        let piecewise = |dist_threshold| PiecewiseCase { case, dist_threshold };
        let [q, k, q2, k2, v] = piecewise(0).inputs::<bf16>().unwrap();
        let same = [q.clone(), k.clone(), q.clone(), k.clone(), v.clone()];
        for threshold in [-300, -299, 0, 1, 119, 120, 121, 250, 419, 420] {
            let found = piecewise(threshold).output(backend, &same).unwrap();
            // The distance has no effect.
            let outcome = piecewise(0).judge(&same, &found, &Rows::All).unwrap();
            assert!(outcome.passed(), "{case}, threshold {threshold}: {outcome:?}");
        }
        let first = case.output(backend, &[q.clone(), k.clone(), v.clone()]).unwrap();
        let second = case.output(backend, &[q2.clone(), k2.clone(), v.clone()]).unwrap();
        let both = [q, k, q2, k2, v];
        for threshold in [420, 421, i32::MAX] {
            let found = piecewise(threshold).output(backend, &both).unwrap();
            assert!(bits(&found) == bits(&first), "{case}, threshold {threshold}");
        }
        let all_second = if mask == Mask::Causal { 0 } else { -299 };
        for threshold in [all_second, all_second - 1, i32::MIN] {
            let found = piecewise(threshold).output(backend, &both).unwrap();
            assert!(bits(&found) == bits(&second), "{case}, threshold {threshold}");
        }
    }
}

/// Checks one key and query at a distance: the threshold moves the score there and no other.
pub fn moves_one_distance<B: Backend>(backend: &B) {
    // Row i of O is the mean of V over its keys, unless it has keys of the second pair, whose scores are far larger.
    let problem = Problem { heads_q: 1, seqlen_q: 70, seqlen_k: 200, ..PROBLEM };
    let case = Case { scale: Some(1.0), ..Case::new(problem, Mask::Causal) };
    for dist_threshold in [1, 63, 129, 130, 131, 198] {
        let piecewise = PiecewiseCase { case, dist_threshold };
        let [q, k, ..] = piecewise.inputs::<bf16>().unwrap();
        let fill = |like: &[bf16], x: f32| vec![bf16::from_f32(x); like.len()];
        let mut v = fill(&k, 0.0);
        for (j, row) in v.chunks_exact_mut(64).enumerate() {
            // These are exact in bf16: small integers, and powers of two for larger numbers.
            row[j % 64] = bf16::from_f32(1.0 + (j / 64) as f32);
        }
        let inputs = [fill(&q, 0.0), fill(&k, 0.0), fill(&q, 1.0), fill(&k, 1.0), v];
        let found = piecewise.output(backend, &inputs).unwrap();
        for (i, lse) in found.lse.iter().enumerate() {
            let far = (i as i32 + 130 - dist_threshold + 1).max(0);
            let expected = if far > 0 { 64.0 + (far as f32).ln() } else { ((i + 131) as f32).ln() };
            assert!((lse - expected).abs() < 1e-3, "threshold {dist_threshold}, row {i}: {lse}, not {expected}");
        }
    }
}

/// Checks that every run of an exact pass gives the same gradients, bit for bit.
pub fn repeats_backward<B: Backend>(backend: &B, case: &PiecewiseCase, runs: usize) {
    let inputs = case.inputs::<bf16>().unwrap();
    let output = case.output(backend, &inputs).unwrap();
    let data = case.backward_data(inputs, output).unwrap();
    let found = || case.gradients(backend, &data, Determinism::Exact).unwrap().bits();
    let first = found();
    for run in 1..runs {
        assert!(found() == first, "{case}: run {run} differs");
    }
}

/// Checks that a run fails if the reference has another threshold.
pub fn another_threshold_fails<B: Backend>(backend: &B) {
    let case = PiecewiseCase { case: Case::new(PROBLEM, Mask::Causal), dist_threshold: 100 };
    let inputs = case.inputs::<bf16>().unwrap();
    let found = case.output(backend, &inputs).unwrap();
    for dist_threshold in [99, 101] {
        assert!(!PiecewiseCase { dist_threshold, ..case }.judge(&inputs, &found, &Rows::All).unwrap().passed());
    }
}
