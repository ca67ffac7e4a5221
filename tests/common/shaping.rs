//! Tests of softcap, ALiBi and sinks that both machines must pass.

use ferroflash::cases::{Case, Order, PiecewiseCase};
use ferroflash::reference::Rows;
use ferroflash::{Alibi, Backend, Determinism, Dtype, Mask, Problem, Sinks, bf16};

/// Returns a case without softcap, for gradients of random cases. The derivative of softcap is rounded to 16 bits,
/// which the plain implementation does not do, so the error is within the tolerance in most cases only.
pub fn without_softcap(case: Case) -> Case {
    Case { softcap: None, ..case }
}

/// Does the work of [`without_softcap`] for a piecewise case.
pub fn piecewise_without_softcap(case: PiecewiseCase) -> PiecewiseCase {
    PiecewiseCase { case: without_softcap(case.case), ..case }
}

/// Returns (name, case): every combination of softcap, ALiBi and sinks, with masks, grouped heads and head dims of
/// every kernel; and shapes that broke other libraries.
pub fn named() -> Vec<(String, Case)> {
    let problem =
        Problem { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 150, seqlen_k: 210, head_dim: 64, dtype: Dtype::Bf16 };
    let mut cases = Vec::new();
    let masks = [Mask::None, Mask::Causal, Mask::Window { left: Some(70), right: Some(20) }];
    let dims = [64, 128, 256, 40, 104];
    for softcap in [None, Some(8.0)] {
        for alibi in [Alibi::None, Alibi::PerHead, Alibi::PerItem] {
            for sinks in [Sinks::None, Sinks::PerHead] {
                for mask in masks {
                    let index = cases.len();
                    let dtype = if index.is_multiple_of(2) { Dtype::Bf16 } else { Dtype::F16 };
                    let problem = Problem { head_dim: dims[index % dims.len()], dtype, ..problem };
                    let (order, padding) = if index.is_multiple_of(3) { (Order::Bshd, 8) } else { (Order::Bhsd, 0) };
                    let dropout = if index % 4 == 1 { 0.1 } else { 0.0 };
                    let case =
                        Case { softcap, alibi, sinks, order, padding, dropout, seed: 3, ..Case::new(problem, mask) };
                    cases.push((format!("softcap {softcap:?}, ALiBi {alibi:?}, sinks {sinks:?}, mask {mask}"), case));
                }
            }
        }
    }
    let mut add = |name: &str, case: Case| cases.push((name.to_owned(), Case { seed: 1, ..case }));
    let case = |heads: (usize, usize), (seqlen_q, seqlen_k), head_dim, mask| {
        let (heads_q, heads_kv) = heads;
        Case::new(Problem { batch: 2, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, dtype: Dtype::Bf16 }, mask)
    };
    let slopes = |case| Case { alibi: Alibi::PerItem, ..case };
    let sinks = |case| Case { sinks: Sinks::PerHead, ..case };
    add("ALiBi, 40 heads", Case { alibi: Alibi::PerHead, ..case((40, 40), (65, 65), 64, Mask::Causal) });
    add("ALiBi, 55 heads without a mask", slopes(case((55, 55), (33, 47), 32, Mask::None)));
    add("ALiBi, one query", slopes(case((8, 2), (1, 300), 128, Mask::Causal)));
    add("softcap 10 at head dim 128", Case { softcap: Some(10.0), ..case((4, 4), (256, 256), 128, Mask::Causal) });
    add("sinks, rows without a key", sinks(case((4, 2), (300, 70), 64, Mask::Causal)));
    add("sinks, no keys", sinks(case((4, 2), (70, 0), 128, Mask::None)));
    add("sinks, no queries", sinks(case((4, 2), (0, 70), 64, Mask::None)));
    add("sinks, neither queries nor keys", sinks(case((4, 2), (0, 0), 64, Mask::None)));
    add("sinks, one key", sinks(slopes(case((4, 1), (239, 1), 128, Mask::Causal))));
    add("sinks, a long causal head", sinks(case((2, 1), (1023, 1024), 256, Mask::Causal)));
    let window = Mask::Window { left: Some(32), right: Some(64) };
    add("sinks and a window, 129 by 32", sinks(case((2, 2), (129, 32), 64, window)));
    cases
}

/// Returns piecewise cases with softcap, ALiBi and sinks together.
pub fn named_piecewise() -> Vec<PiecewiseCase> {
    let cases = named().into_iter().filter(|(_, case)| case.problem.seqlen_q == 150);
    cases
        .zip([-30, 0, 40, 100].into_iter().cycle())
        .map(|((_, case), t)| PiecewiseCase { case, dist_threshold: t })
        .collect()
}

/// Checks that a sink of −∞ is no sink, and that one far above all scores leaves nothing.
pub fn sinks_are_logits<B: Backend>(backend: &B) {
    let problem =
        Problem { batch: 1, heads_q: 2, heads_kv: 1, seqlen_q: 100, seqlen_k: 130, head_dim: 64, dtype: Dtype::Bf16 };
    let case = Case::new(problem, Mask::Causal);
    let inputs = case.inputs::<bf16>().unwrap();
    let run = |sinks: Option<[f32; 2]>| -> (Vec<u16>, Vec<f32>) {
        let upload = |x: &[bf16]| backend.upload(ferroflash::Operand::Q, x).unwrap();
        let [q, k, v] = inputs.each_ref().map(|x| upload(x));
        let tensor = |x, shape| ferroflash::Tensor::bhsd(B::slice(x), shape);
        let (q, k, v) = (tensor(&q, problem.q_shape()), tensor(&k, problem.kv_shape()), tensor(&v, problem.kv_shape()));
        let line = sinks.map(|sinks| backend.upload(ferroflash::Operand::Sinks, &sinks).unwrap());
        let inputs = ferroflash::Inputs::new(q, k, v);
        let inputs = line.as_ref().map_or(inputs, |line| inputs.sinks(B::slice(line)));
        let out = ferroflash::Attention::new(problem).mask(Mask::Causal).forward_with(backend, inputs).unwrap();
        let o: Vec<bf16> = backend.download(&out.o).unwrap();
        (o.iter().map(|x| x.to_bits()).collect(), backend.download(&out.lse.unwrap()).unwrap())
    };
    let (without, lse) = run(None);
    let (none, same) = run(Some([f32::NEG_INFINITY; 2]));
    assert!(without == none);
    assert!(lse.iter().zip(&same).all(|(a, b)| (a - b).abs() <= 1e-5 * a.abs().max(1.0)));
    let (all, lse) = run(Some([1e4, 2e4]));
    assert!(all.iter().all(|&bits| bits & 0x7fff == 0));
    assert!(lse.iter().enumerate().all(|(row, &lse)| lse == if row < 100 { 1e4 } else { 2e4 }));
}

/// Runs every pass of a case. A failure prints the command that runs it again.
pub fn pass_all<B: Backend>(backend: &B, case: &Case, determinism: Determinism) {
    super::pass(backend, case);
    super::pass_backward(backend, case, determinism);
    let outcome = case.run_total(backend).unwrap_or_else(|error| panic!("{case}: {error}"));
    assert!(outcome.passed(), "--op total-attention {case}\n{outcome}");
}

/// Runs both passes of a piecewise case.
pub fn pass_piecewise<B: Backend>(backend: &B, case: &PiecewiseCase, determinism: Determinism) {
    super::piecewise::pass(backend, case, &Rows::All);
    super::piecewise::pass_backward(backend, case, determinism);
}
