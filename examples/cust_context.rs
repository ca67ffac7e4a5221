//! Attention in a program that uses Rust-CUDA's host half: its context, its stream and its memory.
//!
//! ```sh
//! cargo xtask setup   # cust is built against the driver's import library
//! cargo run --release --features cust --example cust_context
//! ```

use std::error::Error;
use std::sync::Arc;

use cust::memory::{CopyDestination, DeviceBuffer};
use cust::stream::{Stream, StreamFlags};
use ferroflash::{Attention, Cpu, Cuda, Dtype, Inputs, Mask, Problem, Tensor, bf16};

const PROBLEM: Problem =
    Problem { batch: 2, heads_q: 8, heads_kv: 2, seqlen_q: 500, seqlen_k: 500, head_dim: 64, dtype: Dtype::Bf16 };

fn main() -> Result<(), Box<dyn Error>> {
    let values = |shape: [usize; 4], seed: f32| -> Vec<bf16> {
        (0..shape.iter().product::<usize>()).map(|i| bf16::from_f32((i as f32 * seed).sin())).collect()
    };
    let (q_shape, kv_shape) = (PROBLEM.q_shape(), PROBLEM.kv_shape());
    let [q, k, v] = [(q_shape, 1.7), (kv_shape, 2.3), (kv_shape, 3.1)].map(|(shape, seed)| values(shape, seed));

    // The context, memory and stream are cust's. cust has no 16-bit floats, so it holds their bits.
    let context = cust::quick_init()?;
    let stream = Arc::new(Stream::new(StreamFlags::NON_BLOCKING, None)?);
    let upload = |x: &[bf16]| DeviceBuffer::from_slice(&x.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    let (device_q, device_k, device_v) = (upload(&q)?, upload(&k)?, upload(&v)?);
    let mut device_o = DeviceBuffer::<u16>::zeroed(q.len())?;

    let attention = Attention::new(PROBLEM).mask(Mask::Causal);
    let cuda = Cuda::from_cust(&context)?.on_cust_stream(stream)?;
    {
        let (q, k, v) = (cuda.read_cust(&device_q)?, cuda.read_cust(&device_k)?, cuda.read_cust(&device_v)?);
        let mut o = cuda.write_cust(&mut device_o)?;
        let inputs = Inputs::new(
            Tensor::bhsd(q.as_slice(), q_shape),
            Tensor::bhsd(k.as_slice(), kv_shape),
            Tensor::bhsd(v.as_slice(), kv_shape),
        );
        attention.forward_into::<_, bf16>(&cuda, inputs, Tensor::bhsd(o.as_slice_mut(), q_shape), None)?;
    } // Here the views wait for the stream.
    let mut found = vec![0u16; q.len()];
    device_o.copy_to(&mut found)?;

    let (q, k, v) = (Tensor::bhsd(&q[..], q_shape), Tensor::bhsd(&k[..], kv_shape), Tensor::bhsd(&v[..], kv_shape));
    let expected = attention.forward(&Cpu, q, k, v)?.o;
    let differences =
        found.iter().zip(&expected).map(|(found, cpu)| (bf16::from_bits(*found).to_f32() - cpu.to_f32()).abs());
    println!("{}: largest difference from the CPU {:.1e}", cuda.name(), differences.fold(0.0, f32::max));
    Ok(())
}
