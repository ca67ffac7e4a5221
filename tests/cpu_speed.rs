//! Test that the CPU executor is faster than a plain loop, several times if the processor has AVX2. It is a test binary
//! of its own, because cargo runs one binary after the other and other tests would take its cores.

use std::time::{Duration, Instant};

use ferroflash::cases::{Case, plain_loop};
use ferroflash::{Attention, Cpu, Dtype, Mask, Problem, bf16};

/// Number of runs of each; the best counts.
const RUNS: usize = 5;

#[test]
fn faster_than_a_plain_loop() {
    let problem =
        Problem { batch: 1, heads_q: 8, heads_kv: 8, seqlen_q: 1024, seqlen_k: 1024, head_dim: 64, dtype: Dtype::Bf16 };
    let case = Case::new(problem, Mask::None);
    let inputs = case.inputs::<bf16>().unwrap();
    let [q, k, v] = case.tensors(&inputs);
    let attention = Attention::new(problem);
    let floats = inputs.each_ref().map(|x| x.iter().map(|x| x.to_f32()).collect::<Vec<f32>>());
    let head = 1024 * 64;
    let mut o = vec![0.0; 8 * head];
    let (mut ours, mut plain) = (Duration::MAX, Duration::MAX);
    // The two alternate, so that other load on the machine affects both.
    for _ in 0..RUNS {
        ours = ours.min(time(|| {
            attention.forward(&Cpu, q, k, v).unwrap();
        }));
        plain = plain.min(time(|| {
            for h in 0..8 {
                plain_loop(floats.each_ref().map(|x| &x[h * head..][..head]), &mut o[h * head..][..head], 64, 0.125);
            }
        }));
    }
    println!("executor {ours:?}, plain loop {plain:?}");
    assert!(ours * times_faster() < plain, "executor {ours:?}, plain loop {plain:?}");
}

/// Minimum factor by which the executor is faster.
fn times_faster() -> u32 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
        return 3;
    }
    1
}

fn time(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}
