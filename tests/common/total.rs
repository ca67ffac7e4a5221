//! Tests of total attention that both machines must pass.

use ferroflash::cases::{Case, Order, TotalData, for_rows};
use ferroflash::{Backend, Dtype, Mask, Problem, bf16};

/// Returns (name, case): the shapes that are easy to get wrong in such a kernel.
pub fn named() -> Vec<(String, Case)> {
    let problem = |heads: (usize, usize), seqlens: (usize, usize), head_dim| Problem {
        batch: 1,
        heads_q: heads.0,
        heads_kv: heads.1,
        seqlen_q: seqlens.0,
        seqlen_k: seqlens.1,
        head_dim,
        dtype: Dtype::Bf16,
    };
    let mut shapes = vec![
        ("799 by 3", problem((2, 2), (799, 3), 64)),
        ("239 by 1", problem((2, 2), (239, 1), 128)),
        ("10006 by 10", problem((4, 4), (10_006, 10), 128)),
        ("no keys", problem((2, 1), (70, 0), 128)),
        ("no queries", problem((2, 1), (0, 70), 64)),
        ("no queries, more than one block of keys", problem((3, 1), (0, 300), 128)),
        ("no batch", Problem { batch: 0, ..problem((2, 1), (70, 70), 64) }),
        ("one query and one key", problem((1, 1), (1, 1), 8)),
        ("one query", problem((2, 2), (1, 300), 128)),
        ("113 by 203", problem((2, 2), (113, 203), 64)),
        ("1023 by 1024", problem((1, 1), (1023, 1024), 64)),
        ("1024 by 1023", problem((1, 1), (1024, 1023), 128)),
        ("1024 by 1024", problem((1, 1), (1024, 1024), 128)),
        ("1023 by 1024, wide", problem((1, 1), (1023, 1024), 256)),
        ("1024 by 1023, wide", problem((1, 1), (1024, 1023), 256)),
        ("grouped 6 over 2", Problem { batch: 2, ..problem((6, 2), (150, 130), 64) }),
        ("grouped 71 over 1", problem((71, 1), (40, 90), 64)),
    ];
    // Lengths around the edges of query blocks, of 96 rows and of 128.
    for seqlen_q in [63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 193] {
        shapes.push(("an edge", problem((1, 1), (seqlen_q, 130), [256, 72, 64][seqlen_q % 3])));
    }
    // Lengths around the edges of consumers' parts of a work tile, with more query blocks than the ring has slots.
    for seqlen_k in [63, 64, 65, 191, 193, 255, 257, 321] {
        shapes.push(("an edge of keys", problem((1, 1), (1100, seqlen_k), [256, 128, 64][seqlen_k % 3])));
    }
    for head_dim in [16, 40, 56, 96, 200, 248] {
        shapes.push(("head dim", problem((2, 2), (200, 190), head_dim)));
    }
    let mut cases = Vec::new();
    for (index, (name, problem)) in shapes.into_iter().enumerate() {
        let window = Mask::Window { left: Some(90), right: Some(40) };
        for mask in [Mask::None, Mask::Causal, window] {
            let dtype = if index % 2 == 0 { Dtype::Bf16 } else { Dtype::F16 };
            let (order, padding) = if index % 3 == 0 { (Order::Bshd, 8) } else { (Order::Bhsd, 0) };
            let case = Case { order, padding, ..Case::new(Problem { dtype, ..problem }, mask) };
            let Problem { seqlen_q, head_dim, .. } = problem;
            cases.push((format!("{name}, {mask}, M {seqlen_q}, D {head_dim}"), case));
        }
    }
    cases
}

/// Runs a case. A failure prints the command that runs it again.
pub fn pass<B: Backend>(backend: &B, case: &Case) {
    let outcome = case.run_total(backend).unwrap_or_else(|error| panic!("{case}: {error}"));
    assert!(outcome.passed(), "{case}\n{outcome}");
}

/// Checks that every run gives the same bits.
pub fn repeats<B: Backend>(backend: &B, case: &Case, runs: usize) {
    let data: TotalData<bf16> = case.total_data(backend).unwrap();
    let bits = || case.total(backend, &data).unwrap().bits();
    let first = bits();
    for run in 1..runs {
        assert!(bits() == first, "{case}: run {run} differs");
    }
}

/// Checks that the weights of every query that attends to a key add up to 1, for any mask.
pub fn weights_add_up<B: Backend>(backend: &B) {
    for (seqlen_q, seqlen_k, head_dim) in [(300, 300, 64), (700, 200, 128), (130, 513, 256), (799, 3, 40)] {
        for mask in [Mask::None, Mask::Causal] {
            let problem =
                Problem { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q, seqlen_k, head_dim, dtype: Dtype::Bf16 };
            let case = Case { input_std: 2.0, ..Case::new(problem, mask) };
            let data: TotalData<bf16> = case.total_data(backend).unwrap();
            let found = case.total(backend, &data).unwrap();
            assert_eq!(found.total.len(), 8 * seqlen_k);
            let live = if mask == Mask::Causal { seqlen_q.min(seqlen_k) } else { seqlen_q } as f64;
            for (head, line) in found.total.chunks_exact(seqlen_k).enumerate() {
                let sum: f64 = line.iter().map(|&x| f64::from(x)).sum();
                // Each P is off by some units in the last place of its exponent, which is below 2⁵.
                assert!((sum - live).abs() <= 1e-5 * live, "{case}: head {head} adds up to {sum}, not {live}");
            }
        }
    }
}

/// Checks that a NaN in one key, in one query and in one element of the LSE leaves every head that does not read it
/// unchanged, bit for bit.
pub fn nan_stays_in_its_head<B: Backend>(backend: &B) {
    let problem =
        Problem { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 150, seqlen_k: 140, head_dim: 64, dtype: Dtype::Bf16 };
    let case = Case::new(problem, Mask::Causal);
    let clean: TotalData<bf16> = case.total_data(backend).unwrap();
    let before = case.total(backend, &clean).unwrap().bits();
    let check = |name: &str, dirty: std::ops::Range<usize>, change: &dyn Fn(&mut TotalData<bf16>)| {
        let mut data = clean.clone();
        change(&mut data);
        let found = case.total(backend, &data).unwrap();
        for (head, (a, b)) in before.chunks(140).zip(found.bits().chunks(140)).enumerate() {
            assert_eq!(a == b, !dirty.contains(&head), "{name}, head {head}");
        }
        let nans = found.total.iter().filter(|x| x.is_nan()).count();
        assert!(nans > 0 && nans <= dirty.len() * 140, "{name}: {nans} NaN");
    };
    // Query heads 0 and 1 read key head 0 of batch item 1. A NaN in the key makes only that key's total NaN.
    let key = case.layout(problem.kv_shape()).offset(1, 0, 77);
    check("key", 4..6, &|data| data.inputs[1][key..key + 64].fill(bf16::NAN));
    let query = case.layout(problem.q_shape()).offset(1, 1, 77);
    check("query", 5..6, &|data| data.inputs[0][query..query + 64].fill(bf16::NAN));
    // The weights of the second query come from a polynomial.
    for query in [77, 113] {
        check("lse", 6..7, &|data| data.lse[6 * 150 + query] = f32::NAN);
    }
}

/// Checks that an infinite key without weight keeps the total 0, because rows past the last query never matter.
pub fn infinite_key<B: Backend>(backend: &B) {
    for head_dim in [64, 128, 256] {
        // The blocks of keys are whole, and there are 77 queries. Most rows of their block are past the end, and 0 · ∞
        // is NaN.
        let problem =
            Problem { batch: 1, heads_q: 1, heads_kv: 1, seqlen_q: 77, seqlen_k: 256, head_dim, dtype: Dtype::Bf16 };
        let case = Case::new(problem, Mask::None);
        let mut inputs = case.inputs::<bf16>().unwrap();
        inputs[0].iter_mut().for_each(|x| *x = bf16::from_f32(x.to_f32().abs() + 0.1));
        inputs[1][..head_dim].fill(bf16::NEG_INFINITY);
        let lse = case.output(backend, &inputs).unwrap().lse;
        let found = case.total(backend, &TotalData { inputs, lse }).unwrap();
        assert_eq!(found.total[0], 0.0, "head dim {head_dim}");
        assert!(found.total.iter().all(|x| x.is_finite()), "head dim {head_dim}");
    }
}

/// Checks that memory between strided rows never matters: zeros and NaN there give the same bits.
pub fn padding_is_never_read<B: Backend>(backend: &B) {
    for (order, head_dim) in [(Order::Bhsd, 40), (Order::Bshd, 128), (Order::Bshd, 232)] {
        let problem =
            Problem { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 70, seqlen_k: 67, head_dim, dtype: Dtype::Bf16 };
        let case = Case { order, padding: 24, ..Case::new(problem, Mask::None) };
        let poisoned: TotalData<bf16> = case.total_data(backend).unwrap();
        let mut zeros = poisoned.clone();
        for (tensor, shape) in zeros.inputs.iter_mut().zip([problem.q_shape(), problem.kv_shape()]) {
            let mut padding = vec![true; tensor.len()];
            for_rows(&case.layout(shape), |start| padding[start..start + head_dim].fill(false));
            for (x, padding) in tensor.iter_mut().zip(padding) {
                if padding {
                    *x = bf16::ZERO;
                }
            }
        }
        let [a, b] = [&poisoned, &zeros].map(|data| case.total(backend, data).unwrap());
        assert!(a.bits() == b.bits() && a.untouched && b.untouched, "{case}");
    }
}
