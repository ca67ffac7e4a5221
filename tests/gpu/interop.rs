//! Tests with contexts, streams and memory of other crates. The results must be those of ferroflash's own memory.

#![cfg(any(feature = "cudarc", feature = "cust"))]

use ferroflash::cases::Case;
use ferroflash::{Attention, Cuda, Inputs, Mask, Tensor, bf16};

use crate::BIG;
#[cfg(feature = "cust")]
use crate::driver::current;

/// Returns the inputs of a causal case, and the bits of its output.
fn case(cuda: &Cuda) -> ([Vec<bf16>; 3], Vec<bf16>) {
    let case = Case::new(BIG, Mask::Causal);
    let inputs = case.inputs::<bf16>().unwrap();
    let expected = case.output(cuda, &inputs).unwrap().o;
    (inputs, expected)
}

/// Uses memory of cudarc's on two of its streams, written and read again by cudarc.
#[cfg(feature = "cudarc")]
pub fn cudarc(cuda: &Cuda) {
    use cudarc::driver::CudaContext;
    use ferroflash::cuda::CudarcStream;
    use ferroflash::{Backend, Error};

    let (inputs, expected) = case(cuda);
    let context = CudaContext::new(cuda.ordinal() as usize).unwrap();
    let (stream, other) = (context.new_stream().unwrap(), context.new_stream().unwrap());
    let backend = CudarcStream::new(&stream).unwrap();
    assert_eq!(backend.cuda().stream(), stream.cu_stream().cast());
    for _ in 0..20 {
        let [q, k, v] = inputs.each_ref().map(|x| other.clone_htod(x).unwrap());
        let mut o = other.alloc_zeros::<bf16>(expected.len()).unwrap();
        {
            let [q, k, v] = [&q, &k, &v].map(|x| backend.read(x).unwrap());
            let mut o = backend.write(&mut o).unwrap();
            let (q_shape, kv_shape) = (BIG.q_shape(), BIG.kv_shape());
            let [q, k, v] =
                [(&q, q_shape), (&k, kv_shape), (&v, kv_shape)].map(|(x, shape)| Tensor::bhsd(x.as_slice(), shape));
            let o = Tensor::bhsd(o.as_slice_mut(), q_shape);
            Attention::new(BIG).mask(Mask::Causal).forward_into(backend.cuda(), Inputs::new(q, k, v), o, None).unwrap();
        }
        drop((q, k, v));
        assert!(other.clone_dtoh(&o).unwrap() == expected);
    }
    if Cuda::device_count() > 1 {
        let there = CudaContext::new(1).unwrap().default_stream();
        let x = there.clone_htod(&[0.0f32; 8]).unwrap();
        assert!(matches!(backend.read(&x).err(), Some(Error::WrongDevice { found: 1, expected: 0, .. })));
    }
    // A buffer of ferroflash's stays valid after cudarc's stream was dropped.
    let buffer = backend.cuda().upload(ferroflash::Operand::Q, &inputs[0]).unwrap();
    drop((backend, stream, other, context));
    assert!(cuda.download(&buffer).unwrap() == inputs[0]);
}

/// Uses memory of cust's, in its context and on its stream.
#[cfg(feature = "cust")]
pub fn cust(cuda: &Cuda) {
    use std::sync::Arc;

    use cust::memory::{CopyDestination, DeviceBuffer};
    use cust::stream::{Stream, StreamFlags};

    let (inputs, expected) = case(cuda);
    cust::init(cust::CudaFlags::empty()).unwrap();
    let context = cust::context::Context::new(cust::device::Device::get_device(cuda.ordinal()).unwrap()).unwrap();
    let here = current();
    let stream = Arc::new(Stream::new(StreamFlags::NON_BLOCKING, None).unwrap());
    let backend = Cuda::from_cust(&context).unwrap().on_cust_stream(stream).unwrap();
    assert_eq!(current(), here);
    let bits = inputs.each_ref().map(|x| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    for _ in 0..5 {
        let [q, k, v] = bits.each_ref().map(|x| DeviceBuffer::from_slice(x).unwrap());
        let mut o = DeviceBuffer::<u16>::zeroed(expected.len()).unwrap();
        {
            let [q, k, v] = [&q, &k, &v].map(|x| backend.read_cust::<bf16, _>(x).unwrap());
            let mut o = backend.write_cust::<bf16, _>(&mut o).unwrap();
            let (q_shape, kv_shape) = (BIG.q_shape(), BIG.kv_shape());
            let [q, k, v] =
                [(&q, q_shape), (&k, kv_shape), (&v, kv_shape)].map(|(x, shape)| Tensor::bhsd(x.as_slice(), shape));
            let o = Tensor::bhsd(o.as_slice_mut(), q_shape);
            Attention::new(BIG).mask(Mask::Causal).forward_into(&backend, Inputs::new(q, k, v), o, None).unwrap();
        }
        let mut found = vec![0u16; expected.len()];
        o.copy_to(&mut found).unwrap();
        assert!(found.into_iter().map(bf16::from_bits).eq(expected.iter().copied()));
    }
}
