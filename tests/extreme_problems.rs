//! Problems with extreme extents and not one element: every pass runs on the CPU, or a typed error refuses it.

use ferroflash::{
    Attention, BackwardInputs, Cpu, Determinism, Dropout, Dtype, Error, Mask, OptionalInputs, Problem, Result, Tensor,
    dropout_mask, f16,
};
use proptest::prelude::*;

/// Generates problems without a batch item, or without a query and a key.
fn problem() -> impl Strategy<Value = Problem> {
    let extents = || prop::sample::select(vec![1, 2, 127, 128, 129, 65535, 65536, 65537, (1 << 31) - 1]);
    let lengths = (any::<bool>(), extents(), extents(), extents())
        .prop_map(|(no_batch, batch, queries, keys)| if no_batch { [0, queries, keys] } else { [batch, 0, 0] });
    let head_dim = prop::sample::select(vec![8, 64, 128, 256]);
    (lengths, extents(), extents(), head_dim)
        .prop_map(|([batch, seqlen_q, seqlen_k], heads_kv, group, head_dim)| Problem {
            batch,
            heads_q: heads_kv.saturating_mul(group),
            heads_kv,
            seqlen_q,
            seqlen_k,
            head_dim,
            dtype: Dtype::F16,
        })
        .prop_filter("invalid", |problem| problem.validate().is_ok())
}

/// Returns the number of elements of a result, or 0 if the plan has refused it.
fn len(result: Result<usize>) -> usize {
    match result {
        Ok(len) => len,
        Err(Error::TooLarge { value, limit, .. }) if value > limit => 0,
        Err(error) => panic!("{error}"),
    }
}

fn run(problem: Problem, mask: Mask, determinism: Determinism, dropout: Dropout) {
    let (none, no_line): (&[f16], &[f32]) = (&[], &[]);
    let (q, kv) = (Tensor::bhsd(none, problem.q_shape()), Tensor::bhsd(none, problem.kv_shape()));
    let attention = Attention::new(problem).mask(mask).determinism(determinism).dropout(dropout);
    assert_eq!(len(attention.forward(&Cpu, q, kv, kv).map(|out| out.o.len())), 0);
    let inputs =
        BackwardInputs { q, k: kv, v: kv, o: q, d_o: q, lse: no_line, d_lse: None, optional: OptionalInputs::NONE };
    assert_eq!(len(attention.backward(&Cpu, inputs).map(|gradients| gradients.dk.len())), 0);
    assert_eq!(len(attention.total_attention(&Cpu, q, kv, no_line).map(|total| total.len())), 0);
    assert_eq!(len(dropout_mask(&problem, &dropout).map(|kept| kept.len())), 0);
}

/// Problems with too many key heads for 32 bits.
#[test]
fn many_empty_heads() {
    let heads = 1 << 16;
    let problem = Problem {
        batch: 1 << 16,
        heads_q: heads,
        heads_kv: heads,
        seqlen_q: 0,
        seqlen_k: 0,
        head_dim: 64,
        dtype: Dtype::F16,
    };
    for determinism in [Determinism::Fast, Determinism::Exact] {
        run(problem, Mask::None, determinism, Dropout::NONE);
    }
}

proptest! {
    #[test]
    fn nothing_to_do(problem in problem(), causal: bool, exact: bool, drops: bool) {
        let mask = if causal { Mask::Causal } else { Mask::None };
        let determinism = if exact { Determinism::Exact } else { Determinism::Fast };
        let dropout = if drops { Dropout { p: 0.5, seed: u64::MAX, offset: u64::MAX } } else { Dropout::NONE };
        run(problem, mask, determinism, dropout);
    }
}
