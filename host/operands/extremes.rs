//! Raw arguments with extreme addresses, shapes and strides. Validation accepts or refuses them, and nothing overflows.

use kernels_gpu::variants::Dtype;
use proptest::prelude::*;

use super::{
    OptionalInputs, Pair, RawBackward, RawForward, RawSecond, RawTensor, RawTotalAttention, SeedOffset, Slopes,
};
use crate::{
    dropout::Dropout,
    lengths::Lengths,
    plan::{Alibi, BackwardPlan, Determinism, Options, Plan, Sinks, TotalPlan},
    problem::{Mask, Problem},
    tensor::Layout,
};

const LARGEST: usize = usize::MAX - 7;

fn address() -> impl Strategy<Value = u64> {
    prop::sample::select(vec![0, 1, 16, 256, 1 << 32, 1 << 47, 1 << 63, u64::MAX - 255, u64::MAX - 15, u64::MAX])
}

fn stride() -> impl Strategy<Value = usize> {
    prop::sample::select(vec![0, 1, 8, 64, 1 << 20, (1 << 39) - 8, 1 << 39, 1 << 62, LARGEST, usize::MAX])
}

/// Generates a tensor of this shape, or sometimes of another.
fn tensor(shape: [usize; 4]) -> impl Strategy<Value = RawTensor> {
    let other = prop::sample::select(vec![[0; 4], [usize::MAX; 4], [1, 1, 1, 8]]);
    let shapes = prop_oneof![9 => Just(shape), 1 => other];
    (address(), shapes, [stride(), stride(), stride()])
        .prop_map(|(address, shape, strides)| RawTensor { address, layout: Layout { shape, strides } })
}

fn problem() -> impl Strategy<Value = Problem> {
    let extents = || prop::sample::select(vec![0, 1, 3, 128, 1 << 20, 1 << 26]);
    (extents(), extents(), extents(), 1..3usize)
        .prop_map(|(batch, seqlen_q, seqlen_k, heads_kv)| Problem {
            batch,
            heads_q: 2 * heads_kv,
            heads_kv,
            seqlen_q,
            seqlen_k,
            head_dim: 64,
            dtype: Dtype::Bf16,
        })
        .prop_filter("invalid", |problem| problem.validate().is_ok())
}

/// Generates a problem and ten tensors, in five pairs of one with the queries' shape and one with the keys'.
fn arguments() -> impl Strategy<Value = (Problem, [[RawTensor; 2]; 5], [u64; 3], bool)> {
    problem().prop_flat_map(|problem| {
        let pair = || [tensor(problem.q_shape()).boxed(), tensor(problem.kv_shape()).boxed()];
        let pairs = [pair(), pair(), pair(), pair(), pair()];
        (Just(problem), pairs, [address(), address(), address()], any::<bool>())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn validation_never_panics((problem, pairs, lines, exact) in arguments()) {
        let [[q, k], [o, v], [d_o, dk], [dq, dv], [q2, k2]] = pairs;
        let [lse, other, workspace] = lines;
        let second = Pair { q: q2, k: k2 };
        let bytes = usize::MAX;
        let forward = RawForward {
            q, k, second: None, v, optional: OptionalInputs::NONE, o, lse: Some(lse), workspace, workspace_bytes: bytes,
        };
        if let Ok(plan) = Plan::forward(&problem, &Options::default(), 132) {
            let _ = forward.validate(&plan);
        }
        if let Ok(plan) = Plan::forward(&problem, &Options { mask: Mask::Causal, dist_threshold: Some(7), ..Options::default() }, 132) {
            let _ = RawForward { second: Some(second), ..forward }.validate(&plan);
        }
        let (d_lse, optional, d_sinks, workspace_bytes) = (Some(other), OptionalInputs::NONE, None, usize::MAX);
        let backward = RawBackward {
            q, k, second: None, v, o, d_o, lse, d_lse, optional, dq, dk, dv, d_sinks, workspace, workspace_bytes,
        };
        let determinism = if exact { Determinism::Exact } else { Determinism::Fast };
        if let Ok(plan) = BackwardPlan::new(&problem, &Options::default(), determinism, 132)
            && backward.validate(&plan).is_ok()
        {
            backward.prepare(&plan);
            backward.finish(&plan).count();
        }
        if let Ok(plan) = BackwardPlan::new(&problem, &Options { dist_threshold: Some(7), ..Options::default() }, determinism, 132) {
            let second = RawSecond { inputs: second, gradients: Pair { q: dq, k: dk } };
            let _ = RawBackward { second: Some(second), ..backward }.validate(&plan);
        }
        let dropout = Dropout::from_memory(0.1);
        let options = Options { alibi: Alibi::PerItem, sinks: Sinks::PerHead, dropout, ..Options::default() };
        let optional = OptionalInputs { slopes: Some(Slopes::PerItem(other)), sinks: Some(lse), seed_offset: Some(SeedOffset::at(lse)), lengths: None };
        if let Ok(plan) = Plan::forward(&problem, &options, 132) {
            let _ = RawForward { optional, ..forward }.validate(&plan);
        }
        if let Ok(plan) = BackwardPlan::new(&problem, &options, determinism, 132) {
            let _ = RawBackward { optional, d_sinks: Some(workspace), ..backward }.validate(&plan);
        }
        if let Ok(plan) = TotalPlan::new(&problem, &Options::default(), 132) {
            let (slopes, lengths) = (None, None);
            let total = RawTotalAttention { q, k, lse, slopes, lengths, total: other, workspace, workspace_bytes };
            let _ = total.validate(&plan);
        }
        // Sequences of different lengths, which have a batch of 1.
        let lengths = Lengths::cumulative(1 << 20, lse, other);
        let problem = Problem { batch: 1, ..problem };
        let options = Options { sequences: Some(lengths.kind()), ..Options::default() };
        let optional = OptionalInputs { lengths: Some(lengths), ..OptionalInputs::NONE };
        if let Ok(plan) = Plan::forward(&problem, &options, 132) {
            let forward = RawForward { optional, ..forward };
            if forward.validate(&plan).is_ok() {
                forward.params(&plan, [(); 4], None);
                forward.schedule(&plan);
            }
        }
        if let Ok(plan) = BackwardPlan::new(&problem, &options, determinism, 132) {
            let backward = RawBackward { optional, ..backward };
            if backward.validate(&plan).is_ok() {
                backward.prepare(&plan);
                backward.finish(&plan).count();
                backward.schedule(&plan);
            }
        }
    }
}
