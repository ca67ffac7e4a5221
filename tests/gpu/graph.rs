//! Tests of CUDA graphs: the raw form, captured on a stream of the caller's, as frameworks do it.
//!
//! Other tests run on the default stream meanwhile. A non-blocking stream and a capture of this thread alone do not
//! affect them. But no test may wait for the whole context while a stream of it is captured.

use std::ptr;

use ferroflash::cases::{BackwardData, Case};
use ferroflash::cuda::{Cuda, DeviceBuffer};
use ferroflash::{
    Attention, Backend, Determinism, Dropout, Inputs, Layout, Mask, Operand, OptionalInputs, Pod, Problem, RawBackward,
    RawForward, RawTensor, SeedOffset, Tensor, bf16,
};

use crate::BIG;
use crate::driver::{Primary, Stream, wait_for_default_stream};

/// Captures a forward pass: one launch.
pub fn forward(cuda: &Cuda) {
    let _current = Primary::enter(cuda.ordinal());
    let first = Case::new(BIG, Mask::Causal);
    let contents = [first, Case { seed: 1, ..first }].map(|case| case.inputs::<bf16>().unwrap());
    // These launches are ordinary, and are the kernel's first use as well.
    let expected = contents.each_ref().map(|inputs| crate::common::bits(&first.output(cuda, inputs).unwrap()));
    assert!(expected[0] != expected[1]);

    let plan = Attention::new(BIG).mask(Mask::Causal).plan(cuda.sm_count()).unwrap();
    cuda.load(&plan).unwrap();
    let mut inputs = contents[0].each_ref().map(|x| cuda.upload(Operand::Q, x).unwrap());
    let mut o = cuda.upload(Operand::O, &vec![bf16::NAN; expected[0].0.len()]).unwrap();
    let mut lse = cuda.upload(Operand::Lse, &vec![f32::NAN; expected[0].1.len()]).unwrap();
    let [q, k, v] = inputs.each_ref().map(DeviceBuffer::address);
    let args = RawForward {
        q: of_q(&BIG, q),
        k: of_kv(&BIG, k),
        second: None,
        optional: OptionalInputs::NONE,
        v: of_kv(&BIG, v),
        o: of_q(&BIG, o.address()),
        lse: Some(lse.address()),
        workspace: 0,
        workspace_bytes: 0,
    };
    let stream = Stream::new();
    // SAFETY: the buffers outlive the graph, and nothing uses them while it runs; the stream is of the device's
    // context.
    let graph = stream.capture(|stream| unsafe { cuda.forward_raw(&plan, &args, stream) }.unwrap());
    wait_for_default_stream();
    assert!(cuda.download(&o).unwrap().iter().all(|x| x.is_nan()), "a capture launches nothing");
    for (contents, expected) in contents.iter().zip(&expected) {
        refill(&mut inputs, contents);
        poison(&mut o, bf16::NAN);
        poison(&mut lse, f32::NAN);
        stream.run(&graph);
        assert!((bits16(cuda, &o), bits32(cuda, &lse)) == *expected);
    }
}

/// Captures a backward pass: three launches, of which some may start early. In an exact pass one of them is
/// cooperative, and its semaphores are set to zero before them.
pub fn backward(cuda: &Cuda, determinism: Determinism) {
    let _current = Primary::enter(cuda.ordinal());
    // Odd seeds have a gradient of the LSE.
    let first = Case { seed: 1, ..Case::new(BIG, Mask::Causal) };
    let contents: [BackwardData<bf16>; 2] =
        [first, Case { seed: 3, ..first }].map(|case| case.backward_data(cuda).unwrap());
    let attention = Attention::new(BIG).mask(Mask::Causal).determinism(determinism);
    let plan = attention.plan_backward(cuda.sm_count()).unwrap();
    cuda.load_backward(&plan).unwrap();

    let mut inputs = tensors(&contents[0]).map(|x| cuda.upload(Operand::Q, x).unwrap());
    let mut rows = statistics(&contents[0]).map(|x| cuda.upload(Operand::Lse, x).unwrap());
    let [q, k, v] = contents[0].inputs.each_ref().map(Vec::len);
    let mut outputs = [q, k, v].map(|len| cuda.upload(Operand::Dq, &vec![bf16::NAN; len]).unwrap());
    let workspace = cuda.upload(Operand::Workspace, &vec![0xffu8; plan.workspace_bytes()]).unwrap();
    let args = raw(&BIG, &inputs, &rows, &outputs, &workspace);
    // These launches are ordinary, and are the kernels' first use as well.
    let expected = contents.each_ref().map(|data| {
        refill(&mut inputs, tensors(data));
        refill(&mut rows, statistics(data));
        outputs.iter_mut().for_each(|x| poison(x, bf16::NAN));
        // SAFETY: the buffers outlive the launches, and the default stream is this device's.
        unsafe { cuda.backward_raw(&plan, &args, ptr::null_mut()) }.unwrap();
        outputs.each_ref().map(|x| bits16(cuda, x))
    });
    assert!((0..3).all(|i| expected[0][i] != expected[1][i]));

    outputs.iter_mut().for_each(|x| poison(x, bf16::NAN));
    let stream = Stream::new();
    // SAFETY: the buffers outlive the graph, and nothing uses them while it runs; the stream is of the device's
    // context.
    let graph = stream.capture(|stream| unsafe { cuda.backward_raw(&plan, &args, stream) }.unwrap());
    wait_for_default_stream();
    for x in &outputs {
        assert!(cuda.download(x).unwrap().iter().all(|x| x.is_nan()), "a capture launches nothing");
    }
    for (data, expected) in contents.iter().zip(&expected) {
        refill(&mut inputs, tensors(data));
        refill(&mut rows, statistics(data));
        outputs.iter_mut().for_each(|x| poison(x, bf16::NAN));
        stream.run(&graph);
        assert!(same(&outputs.each_ref().map(|x| bits16(cuda, x)), expected, determinism));
    }
}

/// Captures both passes with dropout whose seed and offset lie in device memory. Each launch draws the mask of the
/// numbers that it finds there, in both passes. A safe call reads them too.
pub fn dropout_from_memory(cuda: &Cuda) {
    let _current = Primary::enter(cuda.ordinal());
    let case = Case { seed: 1, ..Case::new(BIG, Mask::Causal) };
    let data: BackwardData<bf16> = case.backward_data(cuda).unwrap();
    let numbers = [[7u64, 0], [7, 1 << 32], [7 + (1 << 32), 0], [u64::MAX, u64::MAX]];
    let attention = Attention::new(BIG).mask(Mask::Causal).determinism(Determinism::Exact);
    let plans = |attention: Attention| {
        let sm_count = cuda.sm_count();
        let (plan, backward) = (attention.plan(sm_count).unwrap(), attention.plan_backward(sm_count).unwrap());
        cuda.load(&plan).unwrap();
        cuda.load_backward(&backward).unwrap();
        (plan, backward)
    };
    let drawn = attention.dropout(Dropout::from_memory(0.17));
    let (plan, backward) = plans(drawn);

    let inputs = tensors(&data).map(|x| cuda.upload(Operand::Q, x).unwrap());
    let rows = statistics(&data).map(|x| cuda.upload(Operand::Lse, x).unwrap());
    let mut o = cuda.upload(Operand::O, &vec![bf16::NAN; data.o.len()]).unwrap();
    let mut outputs = data.inputs.each_ref().map(|x| cuda.upload(Operand::Dq, &vec![bf16::NAN; x.len()]).unwrap());
    let workspace = cuda.upload(Operand::Workspace, &vec![0xffu8; backward.workspace_bytes()]).unwrap();
    let mut seed_offset = cuda.upload(Operand::SeedOffset, &numbers[0]).unwrap();
    let mut optional = OptionalInputs::NONE;
    optional.seed_offset = Some(SeedOffset::at(seed_offset.address()));
    let [q, k, v, ..] = inputs.each_ref().map(DeviceBuffer::address);
    let forward_args = RawForward {
        q: of_q(&BIG, q),
        k: of_kv(&BIG, k),
        second: None,
        optional,
        v: of_kv(&BIG, v),
        o: of_q(&BIG, o.address()),
        lse: None,
        workspace: 0,
        workspace_bytes: 0,
    };
    let args = RawBackward { optional, ..raw(&BIG, &inputs, &rows, &outputs, &workspace) };
    // These launches are ordinary, with the same numbers in the launch parameters.
    let expected = numbers.map(|[seed, offset]| {
        let (plan, backward) = plans(attention.dropout(Dropout { p: 0.17, seed, offset }));
        let optional = OptionalInputs::NONE;
        // SAFETY: the buffers outlive the launches, and the default stream is this device's.
        unsafe {
            cuda.forward_raw(&plan, &RawForward { optional, ..forward_args }, ptr::null_mut()).unwrap();
            cuda.backward_raw(&backward, &RawBackward { optional, ..args }, ptr::null_mut()).unwrap();
        }
        (bits16(cuda, &o), outputs.each_ref().map(|x| bits16(cuda, x)))
    });
    assert!((1..numbers.len()).all(|i| expected[i - 1].0 != expected[i].0 && expected[i - 1].1 != expected[i].1));

    let stream = Stream::new();
    // SAFETY: the buffers outlive the graph, and nothing uses them while it runs; the stream is of the device's
    // context.
    let graph = stream.capture(|stream| unsafe {
        cuda.forward_raw(&plan, &forward_args, stream).unwrap();
        cuda.backward_raw(&backward, &args, stream).unwrap();
    });
    wait_for_default_stream();
    for (numbers, expected) in numbers.iter().zip(&expected) {
        seed_offset.copy_from_host(numbers).unwrap();
        poison(&mut o, bf16::NAN);
        outputs.iter_mut().for_each(|x| poison(x, bf16::NAN));
        stream.run(&graph);
        let found = (bits16(cuda, &o), outputs.each_ref().map(|x| bits16(cuda, x)));
        assert!(found == *expected, "{numbers:?}");
        let [q, k, v, ..] = inputs.each_ref().map(Cuda::slice);
        let kv = |x| Tensor::bhsd(x, BIG.kv_shape());
        let safe = Inputs::new(Tensor::bhsd(q, BIG.q_shape()), kv(k), kv(v)).seed_offset(Cuda::slice(&seed_offset));
        assert!(bits16(cuda, &drawn.forward_with(cuda, safe).unwrap().o) == expected.0, "{numbers:?}");
    }
}

/// True if two runs gave the same gradients. They must have the same bits, except dQ of a fast pass, which is summed in
/// any order.
fn same(found: &[Vec<u16>; 3], expected: &[Vec<u16>; 3], determinism: Determinism) -> bool {
    let value = |bits: u16| bf16::from_bits(bits).to_f32();
    let bound = expected[0].iter().map(|&x| value(x).abs()).fold(0.0, f32::max) / 128.0;
    let close = |(&x, &y): (&u16, &u16)| (value(x) - value(y)).abs() <= bound;
    found[1..] == expected[1..]
        && match determinism {
            Determinism::Fast => found[0].len() == expected[0].len() && found[0].iter().zip(&expected[0]).all(close),
            Determinism::Exact => found[0] == expected[0],
        }
}

/// Runs exact passes on two streams at once, whose CTAs do not all fit on the device together. Each must give the bits
/// of a pass alone. Cooperative launches guarantee that neither waits forever; this test does not prove it, because
/// ordinary launches have passed here as well.
pub fn two_streams(cuda: &Cuda) {
    let _current = Primary::enter(cuda.ordinal());
    let case = Case { seed: 1, ..Case::new(BIG, Mask::Causal) };
    let data: BackwardData<bf16> = case.backward_data(cuda).unwrap();
    let attention = Attention::new(BIG).mask(Mask::Causal).determinism(Determinism::Exact);
    let plan = attention.plan_backward(cuda.sm_count()).unwrap();
    assert!(2 * plan.grid() > cuda.sm_count(), "{plan}");
    cuda.load_backward(&plan).unwrap();
    let inputs = tensors(&data).map(|x| cuda.upload(Operand::Q, x).unwrap());
    let rows = statistics(&data).map(|x| cuda.upload(Operand::Lse, x).unwrap());
    let lens = data.inputs.each_ref().map(Vec::len);
    let outputs = [0, 1].map(|_| lens.map(|len| cuda.upload(Operand::Dq, &vec![bf16::NAN; len]).unwrap()));
    let workspaces = [0, 1].map(|_| cuda.upload(Operand::Workspace, &vec![0xffu8; plan.workspace_bytes()]).unwrap());
    let streams = [0, 1].map(|_| Stream::new());
    wait_for_default_stream();
    for _ in 0..100 {
        for ((outputs, workspace), stream) in outputs.iter().zip(&workspaces).zip(&streams) {
            let args = raw(&BIG, &inputs, &rows, outputs, workspace);
            // SAFETY: the buffers outlive the launches, and each stream has outputs and a workspace of its own.
            unsafe { cuda.backward_raw(&plan, &args, stream.raw()) }.unwrap();
        }
    }
    streams.iter().for_each(Stream::wait);
    let [first, second] = outputs.each_ref().map(|outputs| outputs.each_ref().map(|x| bits16(cuda, x)));
    assert!(first == second, "{case}");
    let expected = case.gradients(cuda, &data, Determinism::Exact).unwrap().bits();
    assert!(first == expected, "{case}");
}

/// Runs a fast pass whose CTAs can't all run at first, because another launch occupies some of the SMs. Accumulating
/// work tiles then find that the storing ones have not begun. They wait for none of them, and dQ must be the same.
pub fn beside_another(cuda: &Cuda) {
    let _current = Primary::enter(cuda.ordinal());
    let problem = Problem { batch: 6, heads_q: 100, heads_kv: 100, seqlen_q: 200, seqlen_k: 256, ..BIG };
    let case = Case { seed: 1, ..Case::new(problem, Mask::Causal) };
    let data: BackwardData<bf16> = case.backward_data(cuda).unwrap();
    let expected = case.gradients(cuda, &data, Determinism::Fast).unwrap().bits();
    let plan = Attention::new(problem).mask(Mask::Causal).plan_backward(cuda.sm_count()).unwrap();
    assert!(cuda.sm_count() != 132 || plan.to_string().contains("zeros for dQ of the first"), "{plan}");
    cuda.load_backward(&plan).unwrap();
    let inputs = tensors(&data).map(|x| cuda.upload(Operand::Q, x).unwrap());
    let rows = statistics(&data).map(|x| cuda.upload(Operand::Lse, x).unwrap());
    let mut outputs = data.inputs.each_ref().map(|x| cuda.upload(Operand::Dq, &vec![bf16::NAN; x.len()]).unwrap());
    let mut workspace = cuda.upload(Operand::Workspace, &vec![0xffu8; plan.workspace_bytes()]).unwrap();

    // It has few work tiles, each of which takes longer than the pass.
    let other = Problem { batch: 1, heads_q: 1, heads_kv: 1, seqlen_q: 7000, seqlen_k: 100_000, ..BIG };
    let other_plan = Attention::new(other).plan(cuda.sm_count()).unwrap();
    assert!(other_plan.grid() < cuda.sm_count(), "{other_plan}");
    cuda.load(&other_plan).unwrap();
    let [q, k, o] = [7000, 100_000, 7000].map(|rows| {
        let x: Vec<bf16> = (0..rows * 128).map(|i| bf16::from_f32((i % 251) as f32 / 251.0)).collect();
        cuda.upload(Operand::Q, &x).unwrap()
    });
    let other_args = RawForward {
        q: of_q(&other, q.address()),
        k: of_kv(&other, k.address()),
        second: None,
        optional: OptionalInputs::NONE,
        v: of_kv(&other, k.address()),
        o: of_q(&other, o.address()),
        lse: None,
        workspace: 0,
        workspace_bytes: 0,
    };
    let streams = [0, 1].map(|_| Stream::new());
    for run in 0..20 {
        outputs.iter_mut().for_each(|x| poison(x, bf16::NAN));
        poison(&mut workspace, 0xff);
        wait_for_default_stream();
        let args = raw(&problem, &inputs, &rows, &outputs, &workspace);
        // SAFETY: the buffers outlive the launches, which write to different ones.
        unsafe {
            cuda.forward_raw(&other_plan, &other_args, streams[0].raw()).unwrap();
            cuda.backward_raw(&plan, &args, streams[1].raw()).unwrap();
        }
        streams.iter().for_each(Stream::wait);
        let found = outputs.each_ref().map(|x| bits16(cuda, x));
        assert!(same(&found, &expected, Determinism::Fast), "{case}: run {run}");
    }
}

/// Returns the arguments of a backward pass: Q, K, V, O and dO; the LSE and its gradient; dQ, dK and dV; the workspace.
fn raw(
    problem: &Problem,
    inputs: &[DeviceBuffer<bf16>; 5],
    rows: &[DeviceBuffer<f32>; 2],
    outputs: &[DeviceBuffer<bf16>; 3],
    workspace: &DeviceBuffer<u8>,
) -> RawBackward {
    let [q, k, v, o, d_o] = inputs.each_ref().map(DeviceBuffer::address);
    let [lse, d_lse] = rows.each_ref().map(DeviceBuffer::address);
    let [dq, dk, dv] = outputs.each_ref().map(DeviceBuffer::address);
    RawBackward {
        q: of_q(problem, q),
        k: of_kv(problem, k),
        second: None,
        optional: OptionalInputs::NONE,
        d_sinks: None,
        v: of_kv(problem, v),
        o: of_q(problem, o),
        d_o: of_q(problem, d_o),
        lse,
        d_lse: Some(d_lse),
        dq: of_q(problem, dq),
        dk: of_kv(problem, dk),
        dv: of_kv(problem, dv),
        workspace: workspace.address(),
        workspace_bytes: workspace.len(),
    }
}

/// Returns Q, K, V, O and dO.
fn tensors(data: &BackwardData<bf16>) -> [&Vec<bf16>; 5] {
    let [q, k, v] = &data.inputs;
    [q, k, v, &data.o, &data.d_o]
}

/// Returns the LSE and its gradient.
fn statistics(data: &BackwardData<bf16>) -> [&Vec<f32>; 2] {
    [&data.lse, data.d_lse.as_ref().expect("odd seeds have one")]
}

fn of_q(problem: &Problem, address: u64) -> RawTensor {
    RawTensor { address, layout: Layout::bhsd(problem.q_shape()) }
}

fn of_kv(problem: &Problem, address: u64) -> RawTensor {
    RawTensor { address, layout: Layout::bhsd(problem.kv_shape()) }
}

/// Copies other contents into the same memory.
fn refill<'a, T: Pod>(buffers: &mut [DeviceBuffer<T>], contents: impl IntoIterator<Item = &'a Vec<T>>) {
    for (buffer, contents) in buffers.iter_mut().zip(contents) {
        assert_eq!(buffer.len(), contents.len());
        buffer.copy_from_host(contents).unwrap();
    }
}

/// Fills a buffer with content that every run must overwrite.
fn poison<T: Pod>(buffer: &mut DeviceBuffer<T>, with: T) {
    let poison = vec![with; buffer.len()];
    buffer.copy_from_host(&poison).unwrap();
}

/// Returns a buffer's content as bits, so that NaN can be compared too.
fn bits16(cuda: &Cuda, buffer: &DeviceBuffer<bf16>) -> Vec<u16> {
    cuda.download(buffer).unwrap().into_iter().map(bf16::to_bits).collect()
}

fn bits32(cuda: &Cuda, buffer: &DeviceBuffer<f32>) -> Vec<u32> {
    cuda.download(buffer).unwrap().into_iter().map(f32::to_bits).collect()
}
