//! Tests of piecewise attention on a GPU.

use ferroflash::cases::{Case, PiecewiseCase};
use ferroflash::cuda::Cuda;
use ferroflash::reference::Rows;
use ferroflash::{Determinism, Mask, Problem};

use crate::common::{piecewise, shaping};
use crate::{BIG, Run};

/// Number of random cases of each pass.
const RANDOM_CASES: u64 = 300;

/// Returns every test, by name.
pub fn tests() -> Vec<(String, Run)> {
    let mut tests: Vec<(String, Run)> = vec![
        ("piecewise: named cases".into(), Box::new(named)),
        ("piecewise: named cases, fast gradients".into(), Box::new(|cuda| named_backward(cuda, Determinism::Fast))),
        ("piecewise: named cases, exact gradients".into(), Box::new(|cuda| named_backward(cuda, Determinism::Exact))),
        ("piecewise: becomes plain".into(), Box::new(piecewise::becomes_plain)),
        ("piecewise: moves one distance".into(), Box::new(piecewise::moves_one_distance)),
        ("piecewise: another threshold fails".into(), Box::new(piecewise::another_threshold_fails)),
        ("piecewise: long cases".into(), Box::new(long)),
        ("piecewise: random cases".into(), Box::new(random)),
        ("piecewise: random cases backward".into(), Box::new(random_backward)),
        ("piecewise: many work tiles a CTA".into(), Box::new(many_tiles)),
    ];
    for (head_dim, mask) in [(64, Mask::Causal), (128, Mask::None), (128, Mask::Causal), (256, Mask::Causal)] {
        let case = Case { seed: 1, ..Case::new(Problem { head_dim, ..BIG }, mask) };
        let case = PiecewiseCase { case, dist_threshold: 333 };
        let name = format!("piecewise: 100 exact repeats backward, head dim {head_dim}, {mask}");
        tests.push((name, Box::new(move |cuda| piecewise::repeats_backward(cuda, &case, 100))));
    }
    tests
}

fn named(cuda: &Cuda) {
    for case in piecewise::named() {
        piecewise::pass(cuda, &case, &Rows::All);
    }
}

fn named_backward(cuda: &Cuda, determinism: Determinism) {
    for case in piecewise::named() {
        piecewise::pass_backward(cuda, &case, determinism);
    }
}

fn long(cuda: &Cuda) {
    for case in piecewise::long() {
        piecewise::pass(cuda, &case, &Rows::sample(case.case.problem.seqlen_q, 40));
    }
}

fn random(cuda: &Cuda) {
    for seed in 0..RANDOM_CASES {
        piecewise::pass(cuda, &PiecewiseCase::random(seed, 1e8), &Rows::All);
    }
}

fn random_backward(cuda: &Cuda) {
    for seed in 0..RANDOM_CASES {
        let determinism = if seed % 2 == 0 { Determinism::Fast } else { Determinism::Exact };
        let case = shaping::piecewise_without_softcap(PiecewiseCase::random(seed, 1e8));
        piecewise::pass_backward(cuda, &case, determinism);
    }
}

/// Runs more work tiles than the chip runs at once, so that CTAs take several and the ring wraps around.
fn many_tiles(cuda: &Cuda) {
    for (head_dim, mask) in [(64, Mask::None), (64, Mask::Causal), (128, Mask::Causal), (256, Mask::Causal)] {
        let problem = Problem { batch: 6, heads_q: 24, heads_kv: 8, seqlen_q: 500, seqlen_k: 700, head_dim, ..BIG };
        let case = PiecewiseCase { case: Case::new(problem, mask), dist_threshold: 250 };
        piecewise::pass(cuda, &case, &Rows::sample(500, 40));
    }
}
