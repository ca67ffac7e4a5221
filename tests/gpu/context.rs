//! Guarantees for a program that also uses the driver: its current context stays, streams keep their order, memory its
//! device.

use std::thread;

use ferroflash::cases::{BackwardData, Case};
use ferroflash::cuda::{Cuda, DeviceBuffer, DeviceSlice};
use ferroflash::{
    Attention, Backend, BackwardInputs, Determinism, Error, Gradients, Inputs, Mask, Operand, OptionalInputs, Problem,
    Tensor, Workspace, bf16,
};
use libtest_mimic::Failed;

use crate::BIG;
use crate::driver::{Context, Primary, Stream, current};

const CAUSAL: Mask = Mask::Causal;

/// Checks that every call and every drop leaves the thread's current context unchanged, also if there was none.
pub fn current_context_stays(cuda: &Cuda) {
    let other = Context::new(cuda.ordinal());
    for foreign in [false, true] {
        let here = if foreign { other.make_current() } else { current() };
        let same = |what: &str| assert_eq!(current(), here, "after {what}");
        let opened = Cuda::new(cuda.ordinal()).unwrap();
        same("new");
        let streamed = opened.on_new_stream().unwrap();
        same("on_new_stream");
        let case = Case { seed: 1, ..Case::new(BIG, CAUSAL) };
        let data: BackwardData<bf16> = case.backward_data(&streamed).unwrap();
        same("forward");
        case.gradients(&streamed, &data, Determinism::Exact).unwrap();
        same("backward");
        let x = streamed.upload(Operand::Q, &data.inputs[0]).unwrap();
        same("upload");
        streamed.download(&x).unwrap();
        same("download");
        streamed.time(|| Ok(())).unwrap();
        same("time");
        drop(x);
        same("drop of a buffer");
        let plan = Attention::new(BIG).plan_total_attention(streamed.sm_count()).unwrap();
        streamed.load_total_attention(&plan).unwrap();
        same("load");
        drop((opened, streamed));
        same("drop of a backend");
        assert!(Cuda::new(9999).is_err());
        same("an error");
    }
    drop(other);
}

/// Uses memory of one stream on others, drops it at once and allocates in its place. The results must be those of one
/// stream.
pub fn streams_are_put_in_order(cuda: &Cuda) {
    let case = Case { seed: 1, ..Case::new(BIG, CAUSAL) };
    let data: BackwardData<bf16> = case.backward_data(cuda).unwrap();
    let expected = case.gradients(cuda, &data, Determinism::Exact).unwrap().bits();
    let attention = Attention::new(BIG).mask(CAUSAL).determinism(Determinism::Exact);
    let [a, b] = [0, 1].map(|_| cuda.on_new_stream().unwrap());
    let mut workspace = Workspace::new();
    for run in 0..30 {
        // The inputs belong to three streams, the outputs to two. The work is done on the second and the third
        // alternately.
        let here = if run % 2 == 0 { &b } else { cuda };
        let [q, k, v] = data.inputs.each_ref().map(|x| a.upload(Operand::Q, x).unwrap());
        let [o, d_o] = [&data.o, &data.d_o].map(|x| b.upload(Operand::O, x).unwrap());
        let lse = cuda.upload(Operand::Lse, &data.lse).unwrap();
        let d_lse = data.d_lse.as_ref().map(|x| a.upload(Operand::DLse, x).unwrap());
        let inputs = BackwardInputs {
            q: Tensor::bhsd(q.as_slice(), BIG.q_shape()),
            k: Tensor::bhsd(k.as_slice(), BIG.kv_shape()),
            v: Tensor::bhsd(v.as_slice(), BIG.kv_shape()),
            o: Tensor::bhsd(o.as_slice(), BIG.q_shape()),
            d_o: Tensor::bhsd(d_o.as_slice(), BIG.q_shape()),
            lse: lse.as_slice(),
            d_lse: d_lse.as_ref().map(DeviceBuffer::as_slice),
            optional: OptionalInputs::NONE,
        };
        let gradients: Gradients<DeviceBuffer<bf16>, DeviceBuffer<f32>> =
            attention.backward_in(here, &mut workspace, inputs).unwrap();
        drop((q, k, v, o, d_o, lse, d_lse));
        // These take the place of the dropped memory, if the driver gives it away too early.
        let len = data.inputs[0].len();
        let junk = [&a, &b].map(|cuda| cuda.upload(Operand::Q, &vec![bf16::NAN; len]).unwrap());
        let Gradients { dq, dk, dv, .. } = gradients;
        let found = [dq, dk, dv].map(|x| here.download(&x).unwrap().into_iter().map(bf16::to_bits).collect::<Vec<_>>());
        assert!(found == expected, "run {run}");
        drop(junk);
    }
    assert!(workspace.bytes() > 0);
}

/// Checks a stream of the caller's, and streams that are refused.
pub fn callers_stream(cuda: &Cuda) {
    let case = Case::new(BIG, CAUSAL);
    let inputs = case.inputs::<bf16>().unwrap();
    let expected = case.output(cuda, &inputs).unwrap();
    let _current = Primary::enter(cuda.ordinal());
    let stream = Stream::new();
    // SAFETY: the stream outlives the backend and its buffers.
    let on_stream = unsafe { cuda.on_stream(stream.raw()) }.unwrap();
    assert_eq!(on_stream.stream(), stream.raw());
    let found = case.output(&on_stream, &inputs).unwrap();
    assert!(found.o == expected.o && found.lse == expected.lse);
    drop(on_stream);
    let number = |stream: usize| std::ptr::without_provenance_mut(stream);
    // SAFETY: these are the driver's own names of streams.
    unsafe {
        assert!(cuda.on_stream(number(1)).unwrap().stream().is_null());
        assert_eq!(cuda.on_stream(number(2)).err(), Some(Error::ThreadStream));
    }
    let other = Context::new(cuda.ordinal());
    other.make_current();
    let foreign = Stream::new();
    // SAFETY: a live stream, of another context.
    let refused = unsafe { cuda.on_stream(foreign.raw()) };
    assert_eq!(refused.err(), Some(Error::WrongContext { device: cuda.ordinal() }));
    drop(foreign);
    // Memory can't be allocated while a stream is captured, and a buffer that is dropped does not end the capture.
    drop(other);
    let _current = Primary::enter(cuda.ordinal());
    // SAFETY: the stream outlives the backend and its buffers.
    let on_stream = unsafe { cuda.on_stream(stream.raw()) }.unwrap();
    let buffer = on_stream.upload(Operand::Q, &[1u32; 100]).unwrap();
    let mut refused = None;
    stream.capture(|_| {
        refused = on_stream.allocate::<u32>(Operand::K, 100).err();
        drop(buffer);
    });
    assert_eq!(refused, Some(Error::Capturing { operand: Operand::K }));
}

/// Checks that a plan and a workspace that are kept give the bits of a pass that makes its own, on contents that
/// change.
pub fn plans_are_kept(cuda: &Cuda) {
    let attention = Attention::new(BIG).mask(CAUSAL).determinism(Determinism::Exact);
    let (plan, backward) =
        (attention.plan(cuda.sm_count()).unwrap(), attention.plan_backward(cuda.sm_count()).unwrap());
    let mut workspace = Workspace::new();
    for seed in [1, 3, 1] {
        let case = Case { seed, ..Case::new(BIG, CAUSAL) };
        let data: BackwardData<bf16> = case.backward_data(cuda).unwrap();
        let [q, k, v] = data.inputs.each_ref().map(|x| cuda.upload(Operand::Q, x).unwrap());
        let [mut dq, mut dk, mut dv] = [&q, &k, &v].map(|x| cuda.allocate::<bf16>(Operand::Dq, x.len()).unwrap());
        let of_q = |x| Tensor::bhsd(x, BIG.q_shape());
        let of_kv = |x| Tensor::bhsd(x, BIG.kv_shape());
        let (q, k, v) = (of_q(q.as_slice()), of_kv(k.as_slice()), of_kv(v.as_slice()));
        let mut o = cuda.allocate::<bf16>(Operand::O, data.o.len()).unwrap();
        let mut lse = cuda.allocate::<f32>(Operand::Lse, data.lse.len()).unwrap();
        let (o_len, lse_len) = (o.len(), lse.len());
        let o_view = Tensor::bhsd(o.as_slice_mut(0..o_len), BIG.q_shape());
        plan.run(cuda, Inputs::new(q, k, v), o_view, Some(lse.as_slice_mut(0..lse_len))).unwrap();
        let d_o = cuda.upload(Operand::DO, &data.d_o).unwrap();
        let d_lse = data.d_lse.as_ref().map(|x| cuda.upload(Operand::DLse, x).unwrap());
        let inputs = BackwardInputs {
            q,
            k,
            v,
            o: of_q(o.as_slice()),
            d_o: of_q(d_o.as_slice()),
            lse: lse.as_slice(),
            d_lse: d_lse.as_ref().map(DeviceBuffer::as_slice),
            optional: OptionalInputs::NONE,
        };
        let lens = [dq.len(), dk.len(), dv.len()];
        let outputs = Gradients {
            dq: Tensor::bhsd(dq.as_slice_mut(0..lens[0]), BIG.q_shape()),
            dk: Tensor::bhsd(dk.as_slice_mut(0..lens[1]), BIG.kv_shape()),
            dv: Tensor::bhsd(dv.as_slice_mut(0..lens[2]), BIG.kv_shape()),
            d_sinks: None,
        };
        backward.run(cuda, inputs, None, outputs, &mut workspace).unwrap();
        let found = [dq, dk, dv].map(|x| cuda.download(&x).unwrap().into_iter().map(bf16::to_bits).collect::<Vec<_>>());
        assert!(found == case.gradients(cuda, &data, Determinism::Exact).unwrap().bits(), "seed {seed}");
    }
    assert!(workspace.bytes() >= backward.workspace_bytes());
}

/// Checks that a failed allocation and a missing device have errors of their own.
pub fn errors_say_what_is_wrong(cuda: &Cuda) {
    let elements = 1usize << 50;
    let error = cuda.allocate::<u32>(Operand::O, elements).err();
    assert_eq!(error, Some(Error::OutOfMemory { operand: Operand::O, bytes: 4u128 << 50 }));
    let error = Cuda::new(9999).err().unwrap();
    assert!(matches!(&error, Error::NoDevice { reason } if reason.contains("9999")), "{error}");
}

/// Uses device 1 while another is current, both at once from two threads, and tensors of the other device.
pub fn two_devices(cuda: &Cuda) -> Result<(), Failed> {
    let count = Cuda::device_count();
    if count < 2 {
        println!("skipped: {count} device, this test takes 2");
        return Ok(());
    }
    let other = Cuda::new(1)?;
    let problem = Problem { seqlen_q: 700, ..BIG };
    let case = Case { seed: 1, ..Case::new(problem, CAUSAL) };
    let data: BackwardData<bf16> = case.backward_data(cuda)?;
    let expected = case.gradients(cuda, &data, Determinism::Exact)?.bits();
    {
        let _current = Primary::enter(0);
        let here = current();
        let on_other: BackwardData<bf16> = case.backward_data(&other)?;
        assert!(on_other.o == data.o && on_other.lse == data.lse);
        assert!(case.gradients(&other, &data, Determinism::Exact)?.bits() == expected);
        assert_eq!(current(), here, "device 0 stays current");
    }
    thread::scope(|scope| {
        for cuda in [cuda, &other] {
            scope.spawn(|| {
                for _ in 0..20 {
                    assert!(case.gradients(cuda, &data, Determinism::Exact).unwrap().bits() == expected);
                }
            });
        }
    });
    // Each operand on the wrong device is refused, on any stream.
    let there = other.upload(Operand::Q, &data.inputs[0])?;
    let here = data.inputs.each_ref().map(|x| cuda.upload(Operand::Q, x).unwrap());
    let of_q = |x| Tensor::bhsd(x, problem.q_shape());
    let of_kv = |x| Tensor::bhsd(x, problem.kv_shape());
    let wrong = |operand| Some(Error::WrongDevice { operand, found: 1, expected: 0 });
    let attention = Attention::new(problem).mask(CAUSAL);
    let [q, k, v] = here.each_ref().map(DeviceBuffer::as_slice);
    assert_eq!(attention.forward(cuda, of_q(there.as_slice()), of_kv(k), of_kv(v)).err(), wrong(Operand::Q));
    let k_there = other.upload(Operand::K, &data.inputs[1])?;
    assert_eq!(attention.forward(cuda, of_q(q), of_kv(k_there.as_slice()), of_kv(v)).err(), wrong(Operand::K));
    let mut o = other.allocate::<bf16>(Operand::O, data.o.len())?;
    let o = Tensor::bhsd(o.as_slice_mut(0..data.o.len()), problem.q_shape());
    assert_eq!(
        attention.forward_into(cuda, Inputs::new(of_q(q), of_kv(k), of_kv(v)), o, None).err(),
        wrong(Operand::O)
    );
    let lse = other.upload(Operand::Lse, &data.lse)?;
    assert_eq!(attention.total_attention(cuda, of_q(q), of_kv(k), lse.as_slice()).err(), wrong(Operand::Lse));
    // SAFETY: never read, because it is refused.
    let raw = unsafe { DeviceSlice::from_raw(&other, there.address(), there.len()) };
    assert_eq!(attention.forward(cuda, of_q(raw), of_kv(k), of_kv(v)).err(), wrong(Operand::Q));
    Ok(())
}
