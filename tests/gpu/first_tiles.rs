//! Tests of the backward pass's work tiles that store dQ instead of accumulating.

use ferroflash::cases::Case;
use ferroflash::cuda::Cuda;
use ferroflash::{Determinism, Dtype, Mask, Problem};

use crate::common;

/// Runs short heads, so many that most of them get no zeros: with groups of query heads, lengths that are not whole
/// blocks, and split work tiles. dK and dV must have the same bits on every run.
pub fn backward(cuda: &Cuda, head_dim: usize) {
    let two_blocks = if head_dim == 256 { 110 } else { 250 };
    let single = Problem {
        batch: 4,
        heads_q: 100,
        heads_kv: 100,
        seqlen_q: 170,
        seqlen_k: two_blocks,
        head_dim,
        dtype: Dtype::Bf16,
    };
    let grouped = Problem { heads_q: 120, heads_kv: 40, seqlen_q: 60, seqlen_k: 5 * two_blocks / 2, ..single };
    let shared = Problem { batch: 1, heads_q: 401, heads_kv: 401, seqlen_q: 130, dtype: Dtype::F16, ..single };
    for problem in [single, grouped, shared] {
        // Under a causal mask, every query must attend to the first keys.
        for mask in [Mask::None, Mask::Causal] {
            let mask = if problem.seqlen_q > problem.seqlen_k { Mask::None } else { mask };
            let case = Case { seed: 1, ..Case::new(problem, mask) };
            if cuda.sm_count() == 132 {
                let plan = case.attention().plan_backward(132).unwrap().to_string();
                assert!(plan.contains("zeros for dQ of the first"), "{plan}");
            }
            common::pass_backward(cuda, &case, Determinism::Fast);
            common::pass_backward(cuda, &case, Determinism::Exact);
        }
    }
    let case = Case { seed: 1, ..Case::new(grouped, Mask::Causal) };
    common::repeats_backward(cuda, &case, Determinism::Fast, 50);
}
