//! Tests of the forms of a kernel: the general form and the specialised ones give the same bits.

use std::time::{Duration, Instant};

use ferroflash::cases::{Case, PiecewiseCase};
use ferroflash::cuda::{Cuda, Specialise};
use ferroflash::{Determinism, Dtype, Mask, Piecewise, Problem, bf16};

use super::Run;

/// Returns (name, test).
pub fn tests() -> Vec<(&'static str, Run)> {
    vec![
        ("every form gives the same bits", Box::new(same_bits)),
        ("a kernel that is not prebuilt runs at once", Box::new(first_use)),
        ("a kernel is specialised on request", Box::new(on_request)),
    ]
}

/// Shapes whose tiles have masked and full blocks, for every compiled head dim.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (head_dim, mask) in [64, 96, 128, 192, 256].into_iter().flat_map(|d| [(d, Mask::None), (d, Mask::Causal)]) {
        for dropout in [0.0, 0.2] {
            let problem = Problem {
                batch: 2,
                heads_q: 4,
                heads_kv: 2,
                seqlen_q: 500,
                seqlen_k: 700,
                head_dim,
                dtype: Dtype::Bf16,
            };
            cases.push(Case { dropout, seed: 3, ..Case::new(problem, mask) });
        }
    }
    cases
}

/// Compares the general form with the prebuilt specialised one, or with one that the driver compiles.
fn same_bits(cuda: &Cuda) {
    let general = &cuda.clone().specialise(Specialise::Never);
    for case in cases() {
        // The causal form of a kernel with dropout and two pairs is compiled here, in about a second.
        let compiles = case.mask == Mask::Causal && case.problem.head_dim == 128;
        let special = &cuda.clone().specialise(if compiles { Specialise::AtFirstUse } else { Specialise::Prebuilt });
        let data = case.backward_data::<_, bf16>(cuda).unwrap();
        let [a, b] = [general, special].map(|cuda| case.output(cuda, &data.inputs).unwrap());
        assert!(a.bits() == b.bits(), "forward of {case}");
        let [a, b] = [general, special].map(|cuda| case.gradients(cuda, &data, Determinism::Exact).unwrap());
        assert!(a.bits() == b.bits(), "backward of {case}");
        let case = PiecewiseCase { case, dist_threshold: 300 };
        let inputs = case.inputs::<bf16>().unwrap();
        let [a, b] = [general, special].map(|cuda| case.output(cuda, &inputs).unwrap());
        assert!(a.bits() == b.bits(), "forward of {case}");
        let data = case.backward_data(inputs, a).unwrap();
        let [a, b] = [general, special].map(|cuda| case.gradients(cuda, &data, Determinism::Exact).unwrap());
        assert!(a.bits() == b.bits(), "backward of {case}");
        let case = Case { dropout: 0.0, ..case.case };
        let data = case.total_data::<_, bf16>(cuda).unwrap();
        let [a, b] = [general, special].map(|cuda| case.total(cuda, &data).unwrap());
        assert!(a.bits() == b.bits(), "total attention of {case}");
    }
}

/// A combination for which the build holds no specialised kernel.
fn not_prebuilt(head_dim: usize) -> PiecewiseCase {
    let problem =
        Problem { batch: 1, heads_q: 2, heads_kv: 1, seqlen_q: 200, seqlen_k: 300, head_dim, dtype: Dtype::Bf16 };
    PiecewiseCase { case: Case { dropout: 0.1, ..Case::new(problem, Mask::Causal) }, dist_threshold: 100 }
}

/// Measures the first result, in a process that has used no kernel. The general kernel is loaded, not compiled.
fn first_use(cuda: &Cuda) {
    let case = not_prebuilt(256);
    let inputs = case.inputs::<bf16>().unwrap();
    let start = Instant::now();
    case.output(cuda, &inputs).unwrap();
    let first = start.elapsed();
    let start = Instant::now();
    case.output(cuda, &inputs).unwrap();
    println!("a combination that is not prebuilt: {first:?}, then {:?}", start.elapsed());
    // Compiling takes longer. Alone on the machine this takes less than 50 ms, but other tests may run at the same
    // time.
    assert!(first < Duration::from_secs(1), "{first:?}");
}

/// The specialised kernel takes the place of the general one when the caller asks for it.
fn on_request(cuda: &Cuda) {
    let case = not_prebuilt(64);
    let inputs = case.inputs::<bf16>().unwrap();
    let general = case.output(cuda, &inputs).unwrap();
    let piecewise = Piecewise::new(case.case.attention(), case.dist_threshold);
    let plan = piecewise.plan(cuda.sm_count()).unwrap();
    println!("specialised in {:?}", cuda.load(&plan).unwrap());
    let start = Instant::now();
    cuda.load(&plan).unwrap();
    assert!(start.elapsed() < Duration::from_millis(100), "a kernel is compiled once");
    assert!(case.output(cuda, &inputs).unwrap().bits() == general.bits());
}
