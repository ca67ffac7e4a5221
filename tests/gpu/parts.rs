//! Work tiles of the backward pass that are taken in parts.

use ferroflash::cases::Case;
use ferroflash::cuda::Cuda;
use ferroflash::{Backend, Determinism, Dtype, Mask, Problem};

use crate::common;

/// Work tiles that whole rounds leave over are taken in parts, some of a last block of keys that is not whole; dK and
/// dV are the same bits on every run.
pub fn backward(cuda: &Cuda, head_dim: usize) {
    // Five rounds of 132 and fifteen work tiles more, and seven in all.
    let seqlen_k = if head_dim == 256 { 300 } else { 600 };
    let many = Problem { batch: 3, heads_q: 90, heads_kv: 45, seqlen_q: 190, seqlen_k, head_dim, dtype: Dtype::Bf16 };
    let few = Problem { batch: 1, heads_q: 14, heads_kv: 7, seqlen_q: 1000, seqlen_k: 60, dtype: Dtype::F16, ..many };
    for problem in [many, few, Problem { heads_q: 7, ..few }] {
        for dropout in [0.0, 0.1] {
            let case = Case { seed: 1, dropout, ..Case::new(problem, Mask::None) };
            if cuda.sm_count() == 132 {
                let plan = case.attention().plan_backward(132).unwrap().to_string();
                assert!(plan.contains(" parts each"), "{plan}");
            }
            common::pass_backward(cuda, &case, Determinism::Fast);
        }
    }
    let case = Case { seed: 1, ..Case::new(many, Mask::None) };
    common::repeats_backward(cuda, &case, Determinism::Fast, 50);
}
