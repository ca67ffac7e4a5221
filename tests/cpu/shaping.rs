//! Softcap, ALiBi and sinks on the CPU executor: cases, and calls that are refused.

use crate::common::{self, shaping};
use ferroflash::cases::Case;
use ferroflash::{
    Alibi, Attention, BackwardPlan, Cpu, Determinism, Dtype, Error, Inputs, Mask, Operand, Options, Plan, Problem,
    Sinks, Tensor, TotalInputs, bf16,
};

const PROBLEM: Problem =
    Problem { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 30, seqlen_k: 50, head_dim: 64, dtype: Dtype::Bf16 };

#[test]
fn named_cases() {
    for (name, case) in shaping::named() {
        println!("{name}");
        shaping::pass_all(&Cpu, &case, Determinism::Fast);
    }
}

#[test]
fn named_piecewise_cases() {
    for case in shaping::named_piecewise() {
        shaping::pass_piecewise(&Cpu, &case, Determinism::Exact);
    }
}

#[test]
fn sinks_are_logits() {
    shaping::sinks_are_logits(&Cpu);
}

#[test]
fn gradients_repeat_whatever_the_threads() {
    let problem = Problem { seqlen_q: 1500, ..PROBLEM };
    let all =
        Case { softcap: Some(5.0), alibi: Alibi::PerItem, sinks: Sinks::PerHead, ..Case::new(problem, Mask::None) };
    common::repeats_backward(&Cpu, &all, Determinism::Exact, 2);
    let data = all.backward_data::<_, bf16>(&Cpu).unwrap();
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| all.gradients(&Cpu, &data, Determinism::Fast).unwrap().sink_bits())
    };
    assert!(on(1) == on(3) && on(1).len() == 4);
}

#[test]
fn bad_options_are_refused() {
    let refused = |options: Options| Plan::forward(&PROBLEM, &options, 1).unwrap_err().to_string();
    for cap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let error = refused(Options { softcap: Some(cap), ..Options::default() });
        assert_eq!(error, format!("softcap is {cap}; a finite number above 0 is needed"));
    }
    let (tiny, huge) = (f32::MIN_POSITIVE, f32::MAX);
    let error = refused(Options { scale: Some(tiny), softcap: Some(huge), ..Options::default() });
    assert_eq!(error, "scale / softcap is 0 in f32; a finite number above 0 is needed");
    let error = refused(Options { scale: Some(huge), softcap: Some(tiny), ..Options::default() });
    assert_eq!(error, "scale / softcap is inf in f32; a finite number above 0 is needed");
    let subnormal = Options { scale: Some(1e-40), alibi: Alibi::PerHead, ..Options::default() };
    assert_eq!(refused(subnormal), "1 / scale is inf in f32; a finite number above 0 is needed");
    assert!(Plan::forward(&PROBLEM, &Options { alibi: Alibi::None, ..subnormal }, 1).is_ok());
}

#[test]
fn plans_print_what_they_have() {
    let options = Options { softcap: Some(30.0), alibi: Alibi::PerItem, sinks: Sinks::PerHead, ..Options::default() };
    let text = BackwardPlan::new(&PROBLEM, &options, Determinism::Fast, 1).unwrap().to_string();
    assert!(text.contains("scale 0.125, softcap 30, alibi per batch item, sinks"), "{text}");
}

#[test]
fn lengths_and_presence_are_checked() {
    let x = vec![bf16::ONE; 2 * 4 * 50 * 64];
    let (q, k) = (Tensor::bhsd(&x[..], PROBLEM.q_shape()), Tensor::bhsd(&x[..], PROBLEM.kv_shape()));
    let (attention, inputs, values) = (Attention::new(PROBLEM), Inputs::new(q, k, k), [0.5; 8]);
    let error = |inputs| attention.forward_with(&Cpu, inputs).unwrap_err().to_string();
    assert_eq!(error(inputs.slopes(&values)), "slopes has 8 elements; exactly 4 are needed (heads_q)");
    let items = error(inputs.slopes_per_item(&values[..4]));
    assert_eq!(items, "slopes has 4 elements; exactly 8 are needed (batch × heads_q)");
    assert_eq!(error(inputs.sinks(&values)), "sinks has 8 elements; exactly 4 are needed (heads_q)");
    assert!(attention.forward_with(&Cpu, inputs.slopes_per_item(&values).sinks(&values[..4])).is_ok());
    // A plan that is kept is for one kind of inputs.
    let plan = attention.for_inputs(inputs.slopes(&values).kinds()).plan(1).unwrap();
    let mut o = vec![bf16::ZERO; 2 * 4 * 30 * 64];
    let mut run = |inputs| plan.run(&Cpu, inputs, Tensor::bhsd(&mut o[..], PROBLEM.q_shape()), None);
    let error = run(inputs).unwrap_err().to_string();
    assert_eq!(error, "slopes: the call has none; the plan needs one for each query head");
    let error = run(inputs.slopes(&values[..4]).sinks(&values[..4])).unwrap_err();
    assert!(matches!(error, Error::OptionalInput { operand: Operand::Sinks, .. }), "{error}");
    run(inputs.slopes(&values[..4])).unwrap();
    let lse = vec![3.0; PROBLEM.lse_len()];
    let total = attention.total_attention_with(&Cpu, TotalInputs::new(q, k, &lse[..]).slopes(&values));
    assert!(matches!(total, Err(Error::HeadsLength { operand: Operand::Slopes, .. })));
}

/// The gradient of sinks is returned if there are sinks, and refused if there are none.
#[test]
fn gradients_of_sinks_need_sinks() {
    let x = vec![bf16::ONE; 2 * 4 * 50 * 64];
    let (q, k) = (Tensor::bhsd(&x[..], PROBLEM.q_shape()), Tensor::bhsd(&x[..], PROBLEM.kv_shape()));
    let (attention, lse) = (Attention::new(PROBLEM), vec![5.0; PROBLEM.lse_len()]);
    let plain = Inputs::new(q, k, k).backward(q, q, &lse[..]);
    assert_eq!(attention.backward(&Cpu, plain).unwrap().d_sinks, None);
    let found = attention.backward(&Cpu, plain.sinks(&[1.0, 0.0, -1.0, f32::NEG_INFINITY])).unwrap();
    let d_sinks = found.d_sinks.unwrap();
    // δ is 64 in each row.
    for (found, sink) in d_sinks.iter().zip([1.0f64, 0.0, -1.0, f64::NEG_INFINITY]) {
        let expected = -64.0 * 60.0 * (sink - 5.0).exp();
        assert!((f64::from(*found) - expected).abs() <= 1e-5 * expected.abs(), "{found} not {expected}");
    }
    let [mut dq, mut dk, mut dv] = [q, k, k].map(|x| vec![bf16::ZERO; x.layout.shape.iter().product()]);
    let outputs = ferroflash::Gradients {
        dq: Tensor::bhsd(&mut dq[..], PROBLEM.q_shape()),
        dk: Tensor::bhsd(&mut dk[..], PROBLEM.kv_shape()),
        dv: Tensor::bhsd(&mut dv[..], PROBLEM.kv_shape()),
        d_sinks: Some(&mut [0.0; 4][..]),
    };
    let error = attention.backward_into(&Cpu, plain, outputs).unwrap_err().to_string();
    assert_eq!(error, "d_sinks: the call has one for each query head; the plan needs none");
}
