//! The CPU backend in a process that was forked from one that used it. A test binary of its own, since the child has a
//! copy of no thread but the test's.
#![cfg(unix)]

use std::thread::sleep;
use std::time::{Duration, Instant};

use ferroflash::{Attention, BackwardInputs, Cpu, Dtype, Problem, Tensor, bf16};

/// Longer than the child can take by far.
const PATIENCE: Duration = Duration::from_secs(60);

/// O, the LSE, dQ and the total attention of one problem.
fn results() -> Vec<u32> {
    let problem =
        Problem { batch: 2, heads_q: 3, heads_kv: 3, seqlen_q: 300, seqlen_k: 300, head_dim: 64, dtype: Dtype::Bf16 };
    let values: Vec<bf16> = (0..2 * 3 * 300 * 64).map(|i| bf16::from_f32((i as f32).sin())).collect();
    let x = Tensor::bhsd(&values[..], problem.q_shape());
    let attention = Attention::new(problem);
    let out = attention.forward(&Cpu, x, x, x).unwrap();
    let lse = out.lse.unwrap();
    let o = Tensor::bhsd(&out.o[..], problem.q_shape());
    let inputs = BackwardInputs { q: x, k: x, v: x, o, d_o: x, lse: &lse[..], d_lse: None };
    let dq = attention.backward(&Cpu, inputs).unwrap().dq;
    let total = attention.total_attention(&Cpu, x, x, &lse[..]).unwrap();
    let halves = out.o.iter().chain(&dq).map(|x| x.to_bits() as u32);
    halves.chain(lse.iter().chain(&total).map(|x| x.to_bits())).collect()
}

#[test]
fn works_after_fork() {
    let expected = results();
    // SAFETY: the child calls what follows, which waits for no other thread, and leaves without running the parent's
    // destructors.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let same = std::panic::catch_unwind(|| results() == expected).unwrap_or(false);
        // SAFETY: ends the process.
        unsafe { libc::_exit(if same { 0 } else { 1 }) };
    }
    assert!(child > 0, "no process could be started");
    let start = Instant::now();
    let mut status = 0;
    // SAFETY: `status` is valid for writing, and the child is this process's own.
    while unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) } == 0 {
        if start.elapsed() > PATIENCE {
            // SAFETY: the child was not waited for yet, so its number is its own.
            unsafe { libc::kill(child, libc::SIGKILL) };
            panic!("the child did not end");
        }
        sleep(Duration::from_millis(10));
    }
    assert_eq!(status, 0, "the child failed or its results differ");
}
