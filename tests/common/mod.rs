//! Tests that both machines must pass: named cases, and properties that compare runs with each other.

pub mod piecewise;

use ferroflash::cases::{BackwardData, Case, CaseOutput, Order, for_rows};
use ferroflash::reference::Rows;
use ferroflash::{Backend, Determinism, Dtype, Element, Mask, Problem, bf16, f16};

pub mod dropout;
pub mod lengths;
pub mod shaping;

/// Returns (name, case): the shapes that are easy to get wrong in attention kernels.
pub fn named() -> Vec<(&'static str, Case)> {
    let case = |heads: (usize, usize), seqlens: (usize, usize), head_dim, mask| {
        let problem = Problem {
            batch: 1,
            heads_q: heads.0,
            heads_kv: heads.1,
            seqlen_q: seqlens.0,
            seqlen_k: seqlens.1,
            head_dim,
            dtype: Dtype::Bf16,
        };
        Case::new(problem, mask)
    };
    let batch = |batch, case: Case| Case { problem: Problem { batch, ..case.problem }, ..case };
    let f16 = |case: Case| Case { problem: Problem { dtype: Dtype::F16, ..case.problem }, ..case };
    let bshd = |case: Case| Case { order: Order::Bshd, padding: 8, ..case };
    let window = |left, right| Mask::Window { left, right };
    use Mask::Causal;
    vec![
        ("rows without a key, 799 by 3", case((2, 2), (799, 3), 64, Causal)),
        ("rows without a key, 239 by 1", case((2, 2), (239, 1), 128, Causal)),
        ("rows without a key, 10006 by 10", case((4, 4), (10_006, 10), 128, Causal)),
        ("no keys", case((2, 1), (70, 0), 128, Mask::None)),
        ("no keys, causal", case((2, 1), (70, 0), 64, Causal)),
        ("no queries", case((2, 1), (0, 70), 64, Mask::None)),
        ("no batch", batch(0, case((2, 1), (70, 70), 64, Mask::None))),
        ("one query and one key", case((1, 1), (1, 1), 8, Causal)),
        ("113 by 203", bshd(case((2, 2), (113, 203), 64, Mask::None))),
        ("113 by 203, causal", f16(case((2, 2), (113, 203), 128, Causal))),
        ("1023 by 1024", case((1, 1), (1023, 1024), 64, Causal)),
        ("1024 by 1023", bshd(case((1, 1), (1024, 1023), 128, Causal))),
        ("1024 by 1023, wide", case((1, 1), (1024, 1023), 256, Causal)),
        ("head dim 40", case((2, 2), (200, 190), 40, Mask::None)),
        ("head dim 56", f16(bshd(case((2, 2), (200, 190), 56, Causal)))),
        ("head dim 96", case((2, 2), (200, 190), 96, Mask::None)),
        ("head dim 104", bshd(case((2, 2), (200, 190), 104, Causal))),
        ("head dim 8", case((2, 2), (130, 129), 8, Mask::None)),
        ("head dim 248", f16(case((2, 2), (130, 161), 248, Mask::None))),
        ("grouped 6 over 2", batch(2, case((6, 2), (150, 130), 64, Causal))),
        ("grouped 71 over 1", case((71, 1), (40, 90), 64, Mask::None)),
        ("grouped 7 over 1", f16(bshd(case((7, 1), (70, 130), 128, Causal)))),
        ("two blocks of 176 keys", bshd(case((2, 1), (300, 340), 128, Mask::None))),
        ("a window of one key", case((2, 2), (130, 200), 64, window(Some(0), Some(0)))),
        ("a window on both sides", bshd(case((4, 2), (700, 500), 64, window(Some(100), Some(30))))),
        ("a window without a right bound", case((2, 1), (500, 700), 128, window(Some(64), None))),
        ("a window without a left bound", f16(case((2, 1), (500, 300), 128, window(None, Some(70))))),
        ("a sliding window", batch(2, case((2, 2), (900, 1100), 128, window(Some(200), Some(0))))),
        ("a sliding window, wide", case((2, 1), (600, 600), 256, window(Some(127), Some(0)))),
        ("a sliding window, head dim 96", case((2, 1), (600, 700), 96, window(Some(128), Some(0)))),
        ("keys that no query attends to", bshd(case((4, 1), (100, 900), 192, window(Some(20), Some(10))))),
        ("a window of all keys", case((1, 1), (300, 200), 64, window(Some(u32::MAX), Some(300)))),
        ("inputs of standard deviation 4", Case { input_std: 4.0, ..case((2, 2), (200, 300), 128, Mask::None) }),
    ]
}

/// Returns (name, case): more shapes for the backward pass, in addition to those of [`named`]. Odd seeds have a
/// gradient of the LSE.
pub fn named_backward() -> Vec<(String, Case)> {
    let mut cases: Vec<(String, Case)> =
        named().into_iter().map(|(name, case)| (name.to_owned(), Case { seed: case.seed + 1, ..case })).collect();
    for (seqlen_q, seqlen_k) in [(1, 1), (2, 2), (5, 5), (17, 17), (5, 1), (10, 2), (25, 5), (85, 17), (0, 33), (33, 0)]
    {
        for (head_dim, mask) in [(64, Mask::Causal), (128, Mask::None), (256, Mask::Causal)] {
            for dtype in [Dtype::F16, Dtype::Bf16] {
                let problem = Problem { batch: 2, heads_q: 6, heads_kv: 2, seqlen_q, seqlen_k, head_dim, dtype };
                let seed = seqlen_q as u64 + head_dim as u64 / 64;
                let name = format!("{seqlen_q} by {seqlen_k}, {}, head dim {head_dim}, mask {mask}", dtype.name());
                cases.push((name, Case { seed, ..Case::new(problem, mask) }));
            }
        }
    }
    // Ten work tiles, of which a tail has some: few enough to be split.
    for (head_dim, seqlen_k) in [(64, 600), (128, 600), (256, 300)] {
        for (dtype, order) in [(Dtype::F16, Order::Bhsd), (Dtype::Bf16, Order::Bshd)] {
            for (seqlen_q, head_dim, dropout) in [(300, head_dim, 0.0), (50, head_dim - 8, 0.0), (150, head_dim, 0.2)] {
                let problem = Problem { batch: 1, heads_q: 6, heads_kv: 2, seqlen_q, seqlen_k, head_dim, dtype };
                let name = format!("in parts, {seqlen_q} queries, {}, head dim {head_dim}", dtype.name());
                let case = Case { seed: 1, order, padding: 8, dropout, ..Case::new(problem, Mask::None) };
                cases.push((name, case));
            }
        }
    }
    cases
}

/// Runs a case's backward pass. A failure prints the command that runs it again.
pub fn pass_backward<B: Backend>(backend: &B, case: &Case, determinism: Determinism) {
    let outcome = case.run_backward(backend, determinism).unwrap_or_else(|error| panic!("{case}: {error}"));
    assert!(outcome.passed(), "{case} ({determinism})\n{outcome}");
}

/// Checks that every run of an exact pass gives the same gradients, bit for bit, and every run of a fast pass the same
/// dK and dV.
pub fn repeats_backward<B: Backend>(backend: &B, case: &Case, determinism: Determinism, runs: usize) {
    let data: BackwardData<bf16> = case.backward_data(backend).unwrap();
    let run = || case.gradients(backend, &data, determinism).unwrap();
    let same_from = match determinism {
        Determinism::Fast => 1,
        Determinism::Exact => 0,
    };
    let first = run();
    for index in 1..runs {
        let found = run();
        assert!(found.bits()[same_from..] == first.bits()[same_from..], "{case}: run {index} differs");
        assert!(found.sink_bits() == first.sink_bits(), "{case}: dSinks of run {index} differs");
    }
}

/// Runs a case. A failure prints the command that runs it again.
pub fn pass<B: Backend>(backend: &B, case: &Case) {
    let outcome = case.run(backend, &Rows::All).unwrap_or_else(|error| panic!("{case}: {error}"));
    assert!(outcome.passed(), "{case}\n{outcome:#?}");
}

/// Returns O and LSE as bits, so that NaN can be compared too.
pub fn bits<E: Element>(output: &CaseOutput<E>) -> (Vec<u16>, Vec<u32>) {
    (output.o.iter().map(|x| x.to_bits()).collect(), output.lse.iter().map(|x| x.to_bits()).collect())
}

/// Checks that every run gives the same bits.
pub fn repeats<B: Backend>(backend: &B, case: &Case, runs: usize) {
    let inputs = case.inputs::<bf16>().unwrap();
    let first = bits(&case.output(backend, &inputs).unwrap());
    for run in 1..runs {
        assert!(bits(&case.output(backend, &inputs).unwrap()) == first, "{case}: run {run} differs");
    }
}

/// Checks that logits up to ±2.5·10⁵ give a finite answer. Their exponent of the largest score is not exactly 0
/// (docs/numerics.md). So P's largest element is rounded, where plain softmax has an exact 1: half a unit in the last
/// place of f16.
pub fn large_logits<B: Backend>(backend: &B, mask: Mask) {
    let problem =
        Problem { batch: 1, heads_q: 2, heads_kv: 2, seqlen_q: 200, seqlen_k: 150, head_dim: 64, dtype: Dtype::F16 };
    let case = Case { scale: Some(1.0), input_std: 1.0, ..Case::new(problem, mask) };
    let mut inputs = case.inputs::<f16>().unwrap();
    // 64 products of ±62.5 by ±62.5 are ±250,000; every row and key has one sign.
    for tensor in &mut inputs[..2] {
        for (row, line) in tensor.chunks_exact_mut(64).enumerate() {
            line.fill(f16::from_f32(if row % 3 == 0 { -62.5 } else { 62.5 }));
        }
    }
    let outcome = case.judge(backend, &inputs, &Rows::All).unwrap();
    let largest_v = inputs[2].iter().fold(0.0f32, |a, x| a.max(x.to_f32().abs()));
    let rounding_of_p = f64::from(largest_v) * 2f64.powi(-11);
    assert!(outcome.o.error <= outcome.o.bar + rounding_of_p, "{case}\n{outcome:#?}");
    assert!(outcome.lse.passed() && outcome.untouched, "{case}\n{outcome:#?}");
    let output = case.output(backend, &inputs).unwrap();
    let live = output.lse.iter().filter(|lse| lse.is_finite()).count();
    assert!(live >= 2 * 149 && output.o.iter().all(|x| x.is_finite()), "{case}: {live} finite LSE");
}

/// Checks rows whose scores are all negative, or negative except for one key, together with rows whose scores are all
/// positive. They spread so far that a maximum taken too low overflows the exponentials.
pub fn negative_scores<B: Backend>(backend: &B, head_dim: usize, mask: Mask) {
    let problem =
        Problem { batch: 1, heads_q: 2, heads_kv: 2, seqlen_q: 333, seqlen_k: 700, head_dim, dtype: Dtype::Bf16 };
    let case = Case { scale: Some(256.0 / head_dim as f32), ..Case::new(problem, mask) };
    let mut inputs = case.inputs::<bf16>().unwrap();
    // Every product has the sign of its row, except with key 300. Exponents reach some ±235 in base 2.
    let [rows, keys, _] = &mut inputs;
    for (row, line) in rows.chunks_exact_mut(head_dim).enumerate() {
        line.iter_mut().for_each(|x| *x = bf16::from_f32(x.to_f32().abs() * if row % 3 == 0 { 1.0 } else { -1.0 }));
    }
    for (key, line) in keys.chunks_exact_mut(head_dim).enumerate() {
        let factor = if key == 300 { -0.5 } else { (key % 50 + 1) as f32 / 50.0 };
        line.iter_mut().for_each(|x| *x = bf16::from_f32(x.to_f32().abs() * factor));
    }
    let outcome = case.judge(backend, &inputs, &Rows::All).unwrap();
    assert!(outcome.passed(), "{case}\n{outcome:#?}");
}

/// Checks that a NaN in one key leaves every other batch item and key head unchanged, bit for bit.
pub fn nan_stays_in_its_head<B: Backend>(backend: &B) {
    let problem =
        Problem { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 150, seqlen_k: 140, head_dim: 64, dtype: Dtype::Bf16 };
    let case = Case::new(problem, Mask::Causal);
    let clean = case.inputs::<bf16>().unwrap();
    let before = bits(&case.output(backend, &clean).unwrap());
    for tensor in [1, 2] {
        let mut inputs = clean.clone();
        let start = case.layout(problem.kv_shape()).offset(1, 0, 77);
        inputs[tensor][start..start + 64].fill(bf16::NAN);
        let output = case.output(backend, &inputs).unwrap();
        let after = bits(&output);
        let head = 150 * 64;
        for row in 0..8 {
            let same = before.0[row * head..][..head] == after.0[row * head..][..head];
            // Query heads 0 and 1 of batch item 1 read the key head with the NaN.
            assert_eq!(same, !(4..6).contains(&row), "tensor {tensor}, head {row}");
        }
        assert!(output.o[4 * head..].iter().any(|x| x.is_nan()), "the NaN itself must be seen");
    }
}

/// Checks that a NaN in one row of dO leaves every other batch item and key head unchanged, bit for bit.
pub fn nan_gradient_stays_in_its_head<B: Backend>(backend: &B) {
    let problem =
        Problem { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 150, seqlen_k: 140, head_dim: 64, dtype: Dtype::Bf16 };
    let case = Case { seed: 1, ..Case::new(problem, Mask::Causal) };
    let clean: BackwardData<bf16> = case.backward_data(backend).unwrap();
    let before = case.gradients(backend, &clean, Determinism::Exact).unwrap().bits();
    let mut data = clean.clone();
    // This is a row of query head 1 of batch item 1, which reads key head 0.
    let start = case.layout(problem.q_shape()).offset(1, 1, 77);
    data.d_o[start..start + 64].fill(bf16::NAN);
    let after = case.gradients(backend, &data, Determinism::Exact).unwrap().bits();
    for (gradient, (rows, dirty)) in [(150 * 64, 5), (140 * 64, 2), (140 * 64, 2)].into_iter().enumerate() {
        for (head, (a, b)) in before[gradient].chunks(rows).zip(after[gradient].chunks(rows)).enumerate() {
            assert_eq!(a == b, head != dirty, "gradient {gradient}, head {head}");
        }
    }
}

/// Checks that memory between strided rows never matters: zeros and NaN there give the same bits.
pub fn padding_is_never_read<B: Backend>(backend: &B) {
    for (order, head_dim) in [(Order::Bhsd, 40), (Order::Bshd, 128), (Order::Bshd, 232)] {
        let problem =
            Problem { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 70, seqlen_k: 67, head_dim, dtype: Dtype::Bf16 };
        let case = Case { order, padding: 24, ..Case::new(problem, Mask::None) };
        let poisoned = case.inputs::<bf16>().unwrap();
        let mut zeros = poisoned.clone();
        for (tensor, shape) in zeros.iter_mut().zip([problem.q_shape(), problem.kv_shape(), problem.kv_shape()]) {
            let mut padding = vec![true; tensor.len()];
            for_rows(&case.layout(shape), |start| padding[start..start + head_dim].fill(false));
            for (x, padding) in tensor.iter_mut().zip(padding) {
                if padding {
                    *x = bf16::ZERO;
                }
            }
        }
        let [a, b] = [&poisoned, &zeros].map(|inputs| case.output(backend, inputs).unwrap());
        assert!(bits(&a) == bits(&b) && a.untouched && b.untouched, "{case}");
    }
}
