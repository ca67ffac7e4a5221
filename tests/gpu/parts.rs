//! Tests of the backward pass's split work tiles.

use ferroflash::cases::Case;
use ferroflash::cuda::Cuda;
use ferroflash::{Determinism, Dtype, Mask, Problem};

use crate::common;

/// Splits the tail's work tiles, some of which have a partial last block of keys. dK and dV must have the same bits on
/// every run.
pub fn backward(cuda: &Cuda, head_dim: usize) {
    // The first problem has five waves of 132 and a tail of fifteen work tiles; the others have seven work tiles in
    // all.
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
