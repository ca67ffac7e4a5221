//! Tests of total attention on a GPU: work tiles that follow each other, and the form for frameworks.

use ferroflash::cases::Case;
use ferroflash::cuda::Cuda;
use ferroflash::{Attention, Backend, Layout, Mask, Operand, Problem, RawTensor, RawTotalAttention, bf16};

use crate::{BIG, total};

/// Runs more work tiles than a CTA takes at once, of one query block and of many: the ring continues from one to the
/// next.
pub fn many_tiles(cuda: &Cuda) {
    for (seqlen_q, seqlen_k, head_dim) in [(100, 4000, 64), (700, 700, 128), (60, 1000, 256), (300, 20, 64)] {
        for mask in [Mask::None, Mask::Causal] {
            let problem = Problem { batch: 9, heads_q: 12, heads_kv: 4, seqlen_q, seqlen_k, head_dim, ..BIG };
            let case = Case::new(problem, mask);
            total::pass(cuda, &case);
            total::repeats(cuda, &case, 20);
        }
    }
}

/// Runs total attention from addresses, with the smallest alignment of the LSE and the result. Without queries the
/// result must be zeros.
pub fn raw_addresses(cuda: &Cuda) {
    let case = Case::new(BIG, Mask::Causal);
    let data = case.total_data::<_, bf16>(cuda).unwrap();
    let expected = case.total(cuda, &data).unwrap();
    let plan = Attention::new(BIG).mask(Mask::Causal).plan_total_attention(cuda.sm_count()).unwrap();
    cuda.load_total_attention(&plan).unwrap();
    let [q, k, _] = data.inputs.each_ref().map(|x| cuda.upload(Operand::Q, x).unwrap());
    let shifted: Vec<f32> = [f32::NAN].into_iter().chain(data.lse.iter().copied()).collect();
    let lse = cuda.upload(Operand::Lse, &shifted).unwrap();
    let total = cuda.upload(Operand::Total, &vec![f32::NAN; 1 + expected.total.len()]).unwrap();
    let tensor = |address, shape| RawTensor { address, layout: Layout::bhsd(shape) };
    let args = RawTotalAttention {
        q: tensor(q.address(), BIG.q_shape()),
        k: tensor(k.address(), BIG.kv_shape()),
        lse: lse.address() + 4,
        slopes: None,
        lengths: None,
        total: total.address() + 4,
        workspace: 0,
        workspace_bytes: 0,
    };
    let bad = RawTotalAttention { lse: args.lse + 2, ..args };
    let overlap = RawTotalAttention { total: args.lse, ..args };
    let stream = std::ptr::null_mut();
    // SAFETY: the buffers outlive the launches, and the default stream is this device's.
    unsafe {
        assert!(cuda.total_attention_raw(&plan, &bad, stream).is_err());
        assert!(cuda.total_attention_raw(&plan, &overlap, stream).is_err());
        cuda.total_attention_raw(&plan, &args, stream).unwrap();
    }
    let found = cuda.download(&total).unwrap();
    assert!(found[0].is_nan() && found[1..] == expected.total);
    // Without queries all of it is 0, for any earlier content.
    let problem = Problem { seqlen_q: 0, ..BIG };
    let plan = Attention::new(problem).plan_total_attention(cuda.sm_count()).unwrap();
    let args = RawTotalAttention { q: tensor(0, problem.q_shape()), lse: 0, ..args };
    // SAFETY: the buffers outlive the launches, and the default stream is this device's.
    unsafe { cuda.total_attention_raw(&plan, &args, stream) }.unwrap();
    let found = cuda.download(&total).unwrap();
    assert!(found[0].is_nan() && found[1..].iter().all(|&x| x == 0.0));
}
