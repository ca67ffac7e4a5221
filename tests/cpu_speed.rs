//! The CPU executor is faster than a plain loop, several times if the processor has AVX2. A test binary of its own,
//! since cargo runs one binary after the other: other tests would take its cores.

use std::time::{Duration, Instant};

use ferroflash::cases::{Case, plain_loop};
use ferroflash::{Attention, Cpu, Dtype, Mask, Problem, bf16};

/// Runs of each; the best counts.
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
    // In turns, so that whatever else the machine does meets both.
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

/// Factor by which the executor is faster at least.
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
