//! Memory is linear in the sequence's length. A test binary of its own, since it watches the whole process's peak.

use ferroflash::{Attention, Cpu, Dtype, Problem, Tensor, bf16};

/// The peak grows by less than half of what the scores alone would take.
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
        let grown = peak_bytes() - before;
        let scores = 4 * problem.seqlen_q * problem.seqlen_k;
        assert!(grown < scores / 2, "{grown} bytes more for {scores} bytes of scores");
    }
}

#[cfg(target_os = "linux")]
fn peak_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    1024 * line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap()
}
