//! Test that memory is linear in the sequence's length. It is a test binary of its own, because it measures the whole
//! process's peak.

use ferroflash::{Attention, BackwardInputs, Cpu, Dtype, OptionalInputs, Problem, Tensor, bf16};

/// The peak grows by less than half of the memory that the scores alone would take.
#[test]
#[cfg(target_os = "linux")]
fn memory_is_linear_in_the_sequence() {
    let problem =
        Problem { batch: 1, heads_q: 1, heads_kv: 1, seqlen_q: 64, seqlen_k: 1 << 20, head_dim: 8, dtype: Dtype::Bf16 };
    let long_q = Problem { seqlen_q: 1 << 16, seqlen_k: 1 << 10, ..problem };
    for problem in [problem, long_q] {
        let x = vec![bf16::ONE; problem.q_shape().iter().product()];
        let kv = vec![bf16::ONE; problem.kv_shape().iter().product()];
        let tensor = |x| Tensor::bhsd(x, problem.kv_shape());
        let q = Tensor::bhsd(&x[..], problem.q_shape());
        let before = peak_bytes();
        Attention::new(problem).forward(&Cpu, q, tensor(&kv[..]), tensor(&kv[..])).unwrap();
        grew_less_than_scores(&problem, before);
    }
    // The backward pass has shorter sequences, because it takes longer.
    let long_k = Problem { seqlen_k: 1 << 18, ..problem };
    let long_q = Problem { seqlen_q: 1 << 14, seqlen_k: 1 << 10, ..problem };
    for problem in [long_k, long_q] {
        let x = vec![bf16::ONE; problem.q_shape().iter().product()];
        let kv = vec![bf16::ONE; problem.kv_shape().iter().product()];
        let (q, k) = (Tensor::bhsd(&x[..], problem.q_shape()), Tensor::bhsd(&kv[..], problem.kv_shape()));
        let lse = vec![(problem.seqlen_k as f32).ln() + 8f32.sqrt(); problem.lse_len()];
        let inputs =
            BackwardInputs { q, k, v: k, o: q, d_o: q, lse: &lse[..], d_lse: None, optional: OptionalInputs::NONE };
        // The peak of earlier work would hide this one.
        let _ = std::fs::write("/proc/self/clear_refs", "5");
        let before = peak_bytes();
        let gradients = Attention::new(problem).backward(&Cpu, inputs).unwrap();
        grew_less_than_scores(&problem, before);
        assert!(gradients.dv.iter().all(|x| x.to_f32() > 0.0));
    }
}

#[cfg(target_os = "linux")]
fn grew_less_than_scores(problem: &Problem, before: usize) {
    let grown = peak_bytes() - before;
    let scores = 4 * problem.seqlen_q * problem.seqlen_k;
    assert!(grown < scores / 2, "{grown} bytes more for {scores} bytes of scores");
}

#[cfg(target_os = "linux")]
fn peak_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    1024 * line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap()
}
