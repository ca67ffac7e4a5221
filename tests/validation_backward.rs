//! Tests of the backward pass's entry points on the CPU backend: the calls that they refuse, and those that they must
//! accept.
//!
//! Every refusal is a typed error that names the field, its value and what is allowed. It comes before anything is
//! written. Rules for addresses alone are tested with `RawBackward`.

use ferroflash::{
    Attention, BackwardInputs, BackwardPlan, Cpu, Determinism, Dtype, Error, Gradients, Layout, Mask, OptionalInputs,
    Problem, RawBackward, Tensor, bf16, f16,
};

const PROBLEM: Problem =
    Problem { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 9, seqlen_k: 13, head_dim: 16, dtype: Dtype::Bf16 };
const POISON: f32 = 123.0;

/// Arguments of one call, lengths and layouts; a test changes one of them.
#[derive(Clone)]
struct Call {
    attention: Attention,
    /// Q, K, V, O and dO.
    inputs: [(usize, Layout); 5],
    lse: usize,
    d_lse: Option<usize>,
    /// dQ, dK and dV.
    outputs: [(usize, Layout); 3],
}

impl Call {
    fn contiguous(problem: Problem) -> Self {
        let tensor = |shape: [usize; 4]| (shape.iter().product(), Layout::bhsd(shape));
        let (q, kv) = (tensor(problem.q_shape()), tensor(problem.kv_shape()));
        Call {
            attention: Attention::new(problem),
            inputs: [q, kv, kv, q, q],
            lse: problem.lse_len(),
            d_lse: Some(problem.lse_len()),
            outputs: [q, kv, kv],
        }
    }

    /// Runs the call in place on poisoned outputs, which must stay unchanged if it fails.
    fn run(&self) -> Result<[Vec<bf16>; 3], Error> {
        let mut seed = 0;
        let data = self.inputs.map(|(len, _)| -> Vec<bf16> {
            seed += 1;
            (0..len).map(|i| bf16::from_f32(((i * 7 + seed) as f32).sin())).collect()
        });
        let [q, k, v, o, d_o] = [0, 1, 2, 3, 4].map(|i| Tensor { data: &data[i][..], layout: self.inputs[i].1 });
        let (lse, d_lse) = (vec![3.0; self.lse], self.d_lse.map(|len| vec![0.5; len]));
        let mut outputs = self.outputs.map(|(len, _)| vec![bf16::from_f32(POISON); len]);
        let [dq, dk, dv] = &mut outputs;
        let [of_dq, of_dk, of_dv] = self.outputs.map(|(_, layout)| layout);
        let result = self.attention.backward_into(
            &Cpu,
            BackwardInputs { q, k, v, o, d_o, lse: &lse[..], d_lse: d_lse.as_deref(), optional: OptionalInputs::NONE },
            Gradients {
                dq: Tensor { data: &mut dq[..], layout: of_dq },
                dk: Tensor { data: &mut dk[..], layout: of_dk },
                dv: Tensor { data: &mut dv[..], layout: of_dv },
                d_sinks: None,
            },
        );
        if result.is_err() {
            assert!(outputs.iter().flatten().all(|x| x.to_f32() == POISON), "written although refused");
        }
        result.map(|()| outputs)
    }

    #[track_caller]
    fn refused(change: impl FnOnce(&mut Call)) -> String {
        let mut call = Call::contiguous(PROBLEM);
        change(&mut call);
        call.run().expect_err("it was accepted").to_string()
    }
}

#[test]
fn problems_and_scales_are_refused() {
    for problem in [
        Problem { heads_q: 0, ..PROBLEM },
        Problem { heads_kv: 3, ..PROBLEM },
        Problem { head_dim: 20, ..PROBLEM },
        Problem { seqlen_q: usize::MAX, ..PROBLEM },
        Problem { batch: 1 << 31, ..PROBLEM },
    ] {
        let refusal = problem.validate().unwrap_err();
        let attention = Attention::new(problem);
        assert_eq!(attention.plan_backward(1).unwrap_err(), refusal);
        let empty = Tensor::bhsd(&[] as &[bf16], [0; 4]);
        let inputs: BackwardInputs<&[bf16], &[f32]> = BackwardInputs {
            q: empty,
            k: empty,
            v: empty,
            o: empty,
            d_o: empty,
            lse: &[],
            d_lse: None,
            optional: OptionalInputs::NONE,
        };
        assert_eq!(attention.backward(&Cpu, inputs).unwrap_err(), refusal);
    }
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let message = Call::refused(|call| call.attention = Attention::new(PROBLEM).scale(scale));
        assert_eq!(message, format!("scale is {scale}; a finite number above 0 is needed"));
    }
}

#[test]
fn every_input_and_output_is_checked() {
    for (i, name) in ["q", "k", "v", "o", "d_o", "dq", "dk", "dv"].into_iter().enumerate() {
        fn tensor(call: &mut Call, i: usize) -> &mut (usize, Layout) {
            if i < 5 { &mut call.inputs[i] } else { &mut call.outputs[i - 5] }
        }
        let shape = Call::refused(|call| tensor(call, i).1.shape[2] = 10);
        assert!(shape.starts_with(&format!("{name}.shape is [2, ")), "{shape}");
        let short = Call::refused(|call| tensor(call, i).0 -= 1);
        assert!(short.starts_with(&format!("{name} has ")) && short.contains("elements; its layout needs "), "{short}");
        let stride = Call::refused(|call| tensor(call, i).1.strides[1] = 140);
        assert!(stride.starts_with(&format!("{name}.strides: the heads stride is 140 elements; ")), "{stride}");
        let large = Call::refused(|call| tensor(call, i).1.strides[2] = usize::MAX - 7);
        assert!(large.starts_with(&format!("{name}.strides: ")) && large.contains("under 2^40 bytes"), "{large}");
    }
    for len in [0, 71, 73] {
        let rule = format!("has {len} elements; exactly 72 are needed (batch × heads_q × seqlen_q)");
        assert_eq!(Call::refused(|call| call.lse = len), format!("lse {rule}"));
        assert_eq!(Call::refused(|call| call.d_lse = Some(len)), format!("d_lse {rule}"));
    }
    let alias = Call::refused(|call| call.outputs[1].1.strides[2] = 8);
    let rule = "an output's rows must not share memory, so at least 16 are needed here";
    assert_eq!(alias, format!("dk.strides: the seqlen stride is 8 elements; {rule}"));
}

#[test]
fn element_types_are_refused() {
    let x = vec![f16::ZERO; 2000];
    let (q, k) = (Tensor::bhsd(&x[..], PROBLEM.q_shape()), Tensor::bhsd(&x[..], PROBLEM.kv_shape()));
    let lse = vec![0.0; PROBLEM.lse_len()];
    let inputs =
        BackwardInputs { q, k, v: k, o: q, d_o: q, lse: &lse[..], d_lse: None, optional: OptionalInputs::NONE };
    let error = Attention::new(PROBLEM).backward(&Cpu, inputs).unwrap_err();
    assert_eq!(error.to_string(), "the tensors' elements are f16; the problem's dtype is bf16");
}

#[test]
fn inputs_are_checked_before_memory_is_taken() {
    let problem = Problem { batch: 1, heads_q: 1, heads_kv: 1, seqlen_q: i32::MAX as usize, ..PROBLEM };
    let empty: &[bf16] = &[];
    let (q, k) = (Tensor::bhsd(empty, problem.q_shape()), Tensor::bhsd(empty, problem.kv_shape()));
    let inputs: BackwardInputs<_, &[f32]> =
        BackwardInputs { q, k, v: k, o: q, d_o: q, lse: &[], d_lse: None, optional: OptionalInputs::NONE };
    let error = Attention::new(problem).backward(&Cpu, inputs).unwrap_err();
    assert!(error.to_string().starts_with("q has 0 elements; "), "{error}");
}

#[test]
fn what_is_empty_is_zero_or_nothing() {
    for problem in [
        Problem { batch: 0, ..PROBLEM },
        Problem { seqlen_q: 0, seqlen_k: 0, ..PROBLEM },
        Problem { batch: 0, heads_q: 1 << 30, heads_kv: 1, seqlen_q: 1 << 30, ..PROBLEM },
    ] {
        assert!(Call::contiguous(problem).run().unwrap().iter().all(Vec::is_empty));
    }
    for (mask, determinism) in [(Mask::None, Determinism::Fast), (Mask::Causal, Determinism::Exact)] {
        for problem in [Problem { seqlen_k: 0, ..PROBLEM }, Problem { seqlen_q: 0, ..PROBLEM }] {
            let attention = Attention::new(problem).mask(mask).determinism(determinism);
            let [dq, dk, dv] = Call { attention, ..Call::contiguous(problem) }.run().unwrap();
            assert_eq!((dq.is_empty(), dk.is_empty()), (problem.seqlen_q == 0, problem.seqlen_k == 0));
            assert!([dq, dk, dv].iter().flatten().all(|x| x.to_f32() == 0.0));
        }
    }
}

#[test]
fn strides_change_no_bit() {
    let dense = Call::contiguous(PROBLEM);
    let padded = |(_, layout): (usize, Layout)| {
        let [_, heads, seqlen, head_dim] = layout.shape;
        let row = head_dim + 8;
        let layout = Layout::strided(layout.shape, [heads * seqlen * row + 16, row, heads * row]);
        (layout.required_len().unwrap() + 3, layout)
    };
    let found = Call { outputs: dense.outputs.map(padded), ..dense.clone() }.run().unwrap();
    for ((found, expected), (_, of)) in found.iter().zip(dense.run().unwrap()).zip(dense.outputs) {
        let (_, layout) = padded((0, of));
        let [batch, heads, seqlen, head_dim] = of.shape;
        let mut is_row = vec![false; found.len()];
        for (b, h, i) in (0..batch).flat_map(|b| (0..heads).flat_map(move |h| (0..seqlen).map(move |i| (b, h, i)))) {
            let (at, dense_at) = (layout.offset(b, h, i), of.offset(b, h, i));
            assert_eq!(found[at..at + head_dim], expected[dense_at..dense_at + head_dim]);
            is_row[at..at + head_dim].fill(true);
        }
        assert!(found.iter().zip(is_row).all(|(x, is_row)| is_row || x.to_f32() == POISON));
    }
}

#[test]
fn both_forms_and_both_orders_give_the_same() {
    let x: Vec<bf16> = (0..2000).map(|i| bf16::from_f32((i as f32).sin())).collect();
    let (q, k) = (Tensor::bhsd(&x[..], PROBLEM.q_shape()), Tensor::bhsd(&x[..], PROBLEM.kv_shape()));
    let attention = Attention::new(PROBLEM).mask(Mask::Causal);
    let out = attention.forward(&Cpu, q, k, k).unwrap();
    let (o, lse) = (Tensor::bhsd(&out.o[..], PROBLEM.q_shape()), out.lse.unwrap());
    let inputs =
        BackwardInputs { q, k, v: k, o, d_o: q, lse: &lse[..], d_lse: Some(&lse[..]), optional: OptionalInputs::NONE };
    let fast = attention.backward(&Cpu, inputs).unwrap();
    assert_eq!(attention.determinism(Determinism::Exact).backward(&Cpu, inputs).unwrap(), fast);
    let mut into = [fast.dq.len(), fast.dk.len(), fast.dv.len()].map(|len| vec![bf16::NAN; len]);
    let [dq, dk, dv] = &mut into;
    let outputs = Gradients {
        dq: Tensor::bhsd(&mut dq[..], PROBLEM.q_shape()),
        dk: Tensor::bhsd(&mut dk[..], PROBLEM.kv_shape()),
        dv: Tensor::bhsd(&mut dv[..], PROBLEM.kv_shape()),
        d_sinks: None,
    };
    attention.backward_into(&Cpu, inputs, outputs).unwrap();
    assert_eq!(into, [fast.dq, fast.dk, fast.dv]);
}

#[test]
fn types_are_send_and_sync() {
    fn shared<T: Send + Sync>() {}
    shared::<BackwardPlan>();
    shared::<RawBackward>();
    shared::<BackwardInputs<&[bf16], &[f32]>>();
    shared::<Gradients<Vec<bf16>, Vec<f32>>>();
    shared::<Determinism>();
}
