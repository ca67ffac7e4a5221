//! The CPU executor beside a plain loop, and the GPU where there is one: batch 1, 8 heads, 1024 tokens, head dim 64.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ferroflash::cases::{Case, plain_loop};
use ferroflash::{Attention, Cpu, Dtype, Mask, Problem, bf16};

const PROBLEM: Problem =
    Problem { batch: 1, heads_q: 8, heads_kv: 8, seqlen_q: 1024, seqlen_k: 1024, head_dim: 64, dtype: Dtype::Bf16 };

fn forward(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("forward");
    group.sample_size(10).throughput(Throughput::Elements(PROBLEM.flops_forward(Mask::None) as u64));
    let case = Case::new(PROBLEM, Mask::None);
    let inputs = case.inputs::<bf16>().expect("a valid problem");
    let attention = Attention::new(PROBLEM);
    let [q, k, v] = case.tensors(&inputs);
    group.bench_function("cpu executor", |b| b.iter(|| attention.forward(&Cpu, q, k, v).expect("valid tensors")));

    let floats = inputs.each_ref().map(|x| x.iter().map(|x| x.to_f32()).collect::<Vec<f32>>());
    let head = PROBLEM.seqlen_q * PROBLEM.head_dim;
    let mut o = vec![0.0; floats[0].len()];
    group.bench_function("plain loop", |b| {
        b.iter(|| {
            for (h, o) in o.chunks_exact_mut(head).enumerate() {
                plain_loop(floats.each_ref().map(|x| &x[h * head..][..head]), o, PROBLEM.head_dim, 0.125);
            }
            black_box(&mut o);
        })
    });
    #[cfg(feature = "cuda")]
    gpu(&mut group, &inputs);
    group.finish();
}

/// Device time, by events.
#[cfg(feature = "cuda")]
fn gpu(group: &mut criterion::BenchmarkGroup<'_, criterion::measurement::WallTime>, inputs: &[Vec<bf16>; 3]) {
    use ferroflash::{Backend, Cuda, Operand, Tensor};
    let Ok(cuda) = Cuda::new(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let [q, k, v] = inputs.each_ref().map(|x| cuda.upload(Operand::Q, x).expect("device memory"));
    let view = |buffer, shape| Tensor::bhsd(Cuda::slice(buffer), shape);
    let attention = Attention::new(PROBLEM);
    group.bench_function("gpu", |b| {
        b.iter_custom(|runs| {
            let launches = || {
                for _ in 0..runs {
                    let (q_shape, kv_shape) = (PROBLEM.q_shape(), PROBLEM.kv_shape());
                    attention.forward(&cuda, view(&q, q_shape), view(&k, kv_shape), view(&v, kv_shape))?;
                }
                Ok(())
            };
            cuda.time(launches).expect("a launch")
        })
    });
}

criterion_group!(benches, forward);
criterion_main!(benches);
