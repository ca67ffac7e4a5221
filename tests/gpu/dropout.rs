//! Tests of the dropout mask that the GPU writes.

use std::ptr;

use ferroflash::cuda::Cuda;
use ferroflash::{Backend, Dropout, Dtype, Operand, Problem, dropout_mask, dropout_mask_into};

const POISON: u8 = 0x55;

/// Compares the GPU's mask with the host's. Memory around it stays as it was.
pub fn masks(cuda: &Cuda) {
    for (batch, heads_q, seqlen_q, seqlen_k) in
        [(1, 1, 1, 1), (2, 3, 17, 31), (1, 2, 300, 64), (3, 2, 129, 333), (1, 4, 1000, 1024), (1, 70_000, 3, 5)]
    {
        let problem = Problem { batch, heads_q, heads_kv: 1, seqlen_q, seqlen_k, head_dim: 64, dtype: Dtype::Bf16 };
        for p in [0.0, 0.17, 0.8, 1e-3] {
            let dropout = Dropout { p, seed: 0x1234_5678_9abc_def0, offset: 1 << 50 | 77 };
            let expected: Vec<u8> = dropout_mask(&problem, &dropout).unwrap().into_iter().map(u8::from).collect();
            for before in [0, 16, 1] {
                let len = expected.len();
                let mut buffer = cuda.upload(Operand::DropoutMask, &vec![POISON; before + len + 64]).unwrap();
                let slice = <Cuda as Backend>::slice_mut(&mut buffer, before..before + len);
                dropout_mask_into(cuda, &problem, &dropout, slice).unwrap();
                let found = cuda.download(&buffer).unwrap();
                assert!(found[before..before + len] == expected, "{problem:?}, {dropout:?}, from byte {before} on");
                assert!(found[..before].iter().chain(&found[before + len..]).all(|&x| x == POISON), "{problem:?}");
            }
        }
    }
}

/// A mask of more than 2³² weights has 64-bit offsets. Its last heads are compared.
pub fn large_mask(cuda: &Cuda) {
    let seqlen = 1 << 15;
    let problem = Problem {
        batch: 1,
        heads_q: 5,
        heads_kv: 5,
        seqlen_q: seqlen,
        seqlen_k: seqlen,
        head_dim: 8,
        dtype: Dtype::F16,
    };
    let dropout = Dropout { p: 0.5, seed: 1, offset: 2 };
    let len = 5 * seqlen * seqlen;
    let Ok(mut buffer) = cuda.allocate::<u8>(Operand::DropoutMask, len) else {
        println!("skipped: no memory for {len} bytes");
        return;
    };
    dropout_mask_into(cuda, &problem, &dropout, <Cuda as Backend>::slice_mut(&mut buffer, 0..len)).unwrap();
    let found = cuda.download(&buffer).unwrap();
    let expected = dropout_mask(&problem, &dropout).unwrap();
    assert!(found.iter().map(|&kept| kept == 1).eq(expected));
}

/// Measures the kernel, in bytes of mask per second.
pub fn speed(cuda: &Cuda) {
    for seqlen in [8192, 8191] {
        let problem = Problem {
            batch: 1,
            heads_q: 32,
            heads_kv: 32,
            seqlen_q: seqlen,
            seqlen_k: seqlen,
            head_dim: 64,
            dtype: Dtype::Bf16,
        };
        let dropout = Dropout { p: 0.17, seed: 1, offset: 2 };
        let buffer = cuda.allocate::<u8>(Operand::DropoutMask, 32 * seqlen * seqlen).unwrap();
        // SAFETY: the buffer outlives the launch, and nothing else uses it; the default stream is this device's.
        let run = || unsafe { cuda.dropout_mask_raw(&problem, &dropout, buffer.address(), ptr::null_mut()) }.unwrap();
        run();
        cuda.synchronize().unwrap();
        let start = std::time::Instant::now();
        (0..10).for_each(|_| run());
        cuda.synchronize().unwrap();
        let rate = 10.0 * buffer.len() as f64 / start.elapsed().as_secs_f64() / 1e9;
        println!("{seqlen} × {seqlen}: {rate:.0} GB/s");
        assert!(rate > 20.0, "{rate} GB/s");
    }
}
