//! Tests of the CPU backend in a process that was forked from one that used it, and in one whose memory is short. It is
//! a test binary of its own, because the child has a copy of the test's thread only.
#![cfg(target_os = "linux")]

use std::panic::AssertUnwindSafe;
use std::thread::sleep;
use std::time::{Duration, Instant};

use ferroflash::{
    Attention, Backend, BackwardInputs, Cpu, Dtype, Error, Operand, OptionalInputs, Problem, Tensor, bf16,
};

/// Timeout, far longer than the child can take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Returns O, the LSE, dQ and the total attention of one problem.
fn results() -> Vec<u32> {
    let problem =
        Problem { batch: 2, heads_q: 3, heads_kv: 3, seqlen_q: 300, seqlen_k: 300, head_dim: 64, dtype: Dtype::Bf16 };
    let values: Vec<bf16> = (0..2 * 3 * 300 * 64).map(|i| bf16::from_f32((i as f32).sin())).collect();
    let x = Tensor::bhsd(&values[..], problem.q_shape());
    let attention = Attention::new(problem);
    let out = attention.forward(&Cpu, x, x, x).unwrap();
    let lse = out.lse.unwrap();
    let o = Tensor::bhsd(&out.o[..], problem.q_shape());
    let inputs =
        BackwardInputs { q: x, k: x, v: x, o, d_o: x, lse: &lse[..], d_lse: None, optional: OptionalInputs::NONE };
    let dq = attention.backward(&Cpu, inputs).unwrap().dq;
    let total = attention.total_attention(&Cpu, x, x, &lse[..]).unwrap();
    let halves = out.o.iter().chain(&dq).map(|x| x.to_bits() as u32);
    halves.chain(lse.iter().chain(&total).map(|x| x.to_bits())).collect()
}

/// Runs `check` in a child process. Fails if it returns false, panics or does not end.
fn in_child(check: impl FnOnce() -> bool) {
    // SAFETY: the child runs the code below, which waits for no other thread, and ends without running the parent's
    // destructors.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let passed = std::panic::catch_unwind(AssertUnwindSafe(check)).unwrap_or(false);
        // SAFETY: ends the process.
        unsafe { libc::_exit(if passed { 0 } else { 1 }) };
    }
    assert!(child > 0, "no process could be started");
    let start = Instant::now();
    let mut status = 0;
    // SAFETY: `status` is valid for writing, and the child is this process's own.
    while unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) } == 0 {
        if start.elapsed() > PATIENCE {
            // SAFETY: the child was not waited for yet, so its process id is still its own.
            unsafe { libc::kill(child, libc::SIGKILL) };
            panic!("the child did not end");
        }
        sleep(Duration::from_millis(10));
    }
    assert_eq!(status, 0, "the child failed");
}

#[test]
fn works_after_fork() {
    let expected = results();
    in_child(|| results() == expected);
}

#[test]
fn short_memory_is_an_error() {
    const LEN: usize = 64 << 20;
    let buffer = Cpu.upload(Operand::Q, &vec![1.0f32; LEN]).unwrap();
    in_child(|| {
        // SAFETY: reads a number from the system.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64;
        let pages = std::fs::read_to_string("/proc/self/statm").ok();
        let held = pages.and_then(|text| text.split(' ').next()?.parse::<u64>().ok()).unwrap_or(0) * page;
        // The limit leaves room for less than a second buffer.
        let limit = libc::rlimit { rlim_cur: held + (32 << 20), rlim_max: libc::RLIM_INFINITY };
        // SAFETY: the limit is valid for reading.
        let limited = held > 0 && unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) } == 0;
        let bytes = 4 * LEN as u128;
        limited
            && Cpu.upload(Operand::K, &buffer) == Err(Error::OutOfMemory { operand: Operand::K, bytes })
            && Cpu.download(&buffer) == Err(Error::OutOfMemory { operand: Operand::Download, bytes })
            && Cpu.allocate::<f32>(Operand::O, LEN) == Err(Error::OutOfMemory { operand: Operand::O, bytes })
    });
}
