//! Tests of the public entry points on the CPU backend: the calls that they refuse, and those that they must accept.
//!
//! Every refusal is a typed error that names the field, its value and what is allowed. It comes before anything is
//! written.

use ferroflash::{Attention, Cpu, Dtype, Error, Inputs, Layout, Lse, Mask, Problem, Tensor, bf16, f16};

const PROBLEM: Problem =
    Problem { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 9, seqlen_k: 13, head_dim: 16, dtype: Dtype::Bf16 };
const POISON: f32 = 123.0;

/// Arguments of one call; a test changes one of them.
#[derive(Clone)]
struct Call {
    attention: Attention,
    q: (usize, Layout),
    k: (usize, Layout),
    v: (usize, Layout),
    o: (usize, Layout),
    lse: Option<usize>,
}

impl Call {
    fn contiguous(problem: Problem) -> Self {
        let tensor = |shape: [usize; 4]| (shape.iter().product(), Layout::bhsd(shape));
        Call {
            attention: Attention::new(problem),
            q: tensor(problem.q_shape()),
            k: tensor(problem.kv_shape()),
            v: tensor(problem.kv_shape()),
            o: tensor(problem.q_shape()),
            lse: Some(problem.lse_len()),
        }
    }

    /// Runs the call in place on poisoned outputs, which must stay unchanged if it fails.
    fn run(&self) -> Result<(Vec<bf16>, Option<Vec<f32>>), Error> {
        let input = |len: usize, seed: usize| -> Vec<bf16> {
            (0..len).map(|i| bf16::from_f32(((i * 7 + seed) as f32).sin())).collect()
        };
        let (q, k, v) = (input(self.q.0, 1), input(self.k.0, 2), input(self.v.0, 3));
        let mut o = vec![bf16::from_f32(POISON); self.o.0];
        let mut lse = self.lse.map(|len| vec![POISON; len]);
        let result = self.attention.forward_into(
            &Cpu,
            Inputs::new(
                Tensor { data: &q[..], layout: self.q.1 },
                Tensor { data: &k[..], layout: self.k.1 },
                Tensor { data: &v[..], layout: self.v.1 },
            ),
            Tensor { data: &mut o[..], layout: self.o.1 },
            lse.as_deref_mut(),
        );
        if result.is_err() {
            assert!(o.iter().all(|x| x.to_f32() == POISON), "written although refused");
            assert!(lse.iter().flatten().all(|&x| x == POISON), "written although refused");
        }
        result.map(|()| (o, lse))
    }

    #[track_caller]
    fn refused(change: impl FnOnce(&mut Call)) -> String {
        let mut call = Call::contiguous(PROBLEM);
        change(&mut call);
        call.run().expect_err("it was accepted").to_string()
    }
}

#[test]
fn problems_are_refused_by_every_door() {
    for problem in [
        Problem { heads_q: 0, ..PROBLEM },
        Problem { heads_kv: 0, ..PROBLEM },
        Problem { heads_kv: 3, ..PROBLEM },
        Problem { head_dim: 0, ..PROBLEM },
        Problem { head_dim: 20, ..PROBLEM },
        Problem { head_dim: 264, ..PROBLEM },
        Problem { seqlen_q: usize::MAX, ..PROBLEM },
        Problem { batch: 1 << 31, ..PROBLEM },
        Problem { batch: i32::MAX as usize, heads_q: 1 << 20, ..PROBLEM },
    ] {
        let refusal = problem.validate().and_then(|()| Attention::new(problem).plan(1).map(drop)).unwrap_err();
        let empty = Tensor::bhsd(&[] as &[bf16], [0; 4]);
        let attention = Attention::new(problem);
        assert_eq!(attention.plan(1).unwrap_err(), refusal);
        assert_eq!(attention.forward(&Cpu, empty, empty, empty).unwrap_err(), refusal);
        let o = Tensor::bhsd(&mut [] as &mut [bf16], [0; 4]);
        assert_eq!(attention.forward_into(&Cpu, Inputs::new(empty, empty, empty), o, None).unwrap_err(), refusal);
    }
}

#[test]
fn scales_are_refused() {
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let message = Call::refused(|call| call.attention = Attention::new(PROBLEM).scale(scale));
        assert_eq!(message, format!("scale is {scale}; a finite number above 0 is needed"));
    }
}

#[test]
fn shapes_are_refused() {
    let message = Call::refused(|call| call.q.1.shape[2] = 10);
    assert_eq!(message, "q.shape is [2, 4, 10, 16]; the problem needs [2, 4, 9, 16] (batch, heads, seqlen, head_dim)");
    assert!(Call::refused(|call| call.k.1.shape[1] = 4).starts_with("k.shape is [2, 4, 13, 16]; "));
    assert!(Call::refused(|call| call.v.1.shape[3] = 8).starts_with("v.shape is [2, 2, 13, 8]; "));
    assert!(Call::refused(|call| call.o.1.shape[0] = 0).starts_with("o.shape is [0, 4, 9, 16]; "));
}

#[test]
fn short_buffers_are_refused() {
    assert_eq!(Call::refused(|call| call.q.0 -= 1), "q has 1151 elements; its layout needs 1152");
    assert_eq!(Call::refused(|call| call.k.0 = 0), "k has 0 elements; its layout needs 832");
    assert_eq!(Call::refused(|call| call.v.1.strides[0] += 8), "v has 832 elements; its layout needs 840");
    assert_eq!(Call::refused(|call| call.o.0 -= 1), "o has 1151 elements; its layout needs 1152");
    for len in [0, 71, 73] {
        let message = Call::refused(|call| call.lse = Some(len));
        assert_eq!(message, format!("lse has {len} elements; exactly 72 are needed (batch × heads_q × seqlen_q)"));
    }
}

#[test]
fn strides_are_refused() {
    let message = Call::refused(|call| call.q.1.strides[1] = 140);
    assert_eq!(message, "q.strides: the heads stride is 140 elements; a multiple of 8 (16 bytes) is needed");
    assert!(Call::refused(|call| call.k.1.strides[2] = usize::MAX - 7).contains("under 2^40 bytes"));
    assert!(Call::refused(|call| call.v.1.strides = [1 << 40; 3]).starts_with("v.strides: the batch stride is "));
    let message = Call::refused(|call| call.o.1.strides[2] = 8);
    let rule = "an output's rows must not share memory, so at least 16 are needed here";
    assert_eq!(message, format!("o.strides: the seqlen stride is 8 elements; {rule}"));
}

#[test]
fn element_types_are_refused() {
    let x = vec![f16::ZERO; 2000];
    let (q, k) = (Tensor::bhsd(&x[..], PROBLEM.q_shape()), Tensor::bhsd(&x[..], PROBLEM.kv_shape()));
    let error = Attention::new(PROBLEM).forward(&Cpu, q, k, k).unwrap_err();
    assert_eq!(error.to_string(), "the tensors' elements are f16; the problem's dtype is bf16");
}

#[test]
fn inputs_are_checked_before_memory_is_taken() {
    let problem = Problem { batch: 1, seqlen_q: i32::MAX as usize, ..PROBLEM };
    let empty: &[bf16] = &[];
    let (q, k) = (Tensor::bhsd(empty, problem.q_shape()), Tensor::bhsd(empty, problem.kv_shape()));
    let error = Attention::new(problem).forward(&Cpu, q, k, k).unwrap_err();
    assert!(error.to_string().starts_with("q has 0 elements; "), "{error}");
}

#[test]
fn without_queries_nothing_happens() {
    for problem in [
        Problem { batch: 0, ..PROBLEM },
        Problem { seqlen_q: 0, ..PROBLEM },
        Problem { batch: 0, heads_q: 1 << 30, heads_kv: 1, seqlen_q: 1 << 30, ..PROBLEM },
    ] {
        let (o, lse) = Call::contiguous(problem).run().unwrap();
        assert!(o.is_empty() && lse.unwrap().is_empty());
    }
}

#[test]
fn without_keys_the_result_is_zero() {
    for mask in [Mask::None, Mask::Causal] {
        let problem = Problem { seqlen_k: 0, ..PROBLEM };
        let call = Call { attention: Attention::new(problem).mask(mask), ..Call::contiguous(problem) };
        let (o, lse) = call.run().unwrap();
        assert!(o.iter().all(|x| x.to_f32() == 0.0));
        assert!(lse.unwrap().iter().all(|&x| x == f32::NEG_INFINITY));
    }
}

#[test]
fn lse_is_returned_on_request() {
    let x = vec![bf16::ONE; 2000];
    let (q, k) = (Tensor::bhsd(&x[..], PROBLEM.q_shape()), Tensor::bhsd(&x[..], PROBLEM.kv_shape()));
    let out = Attention::new(PROBLEM).forward(&Cpu, q, k, k).unwrap();
    assert_eq!((out.o.len(), out.lse.unwrap().len()), (1152, 72));
    let omitted = Attention::new(PROBLEM).lse(Lse::Omit).forward(&Cpu, q, k, k).unwrap();
    assert_eq!((omitted.o, omitted.lse), (out.o, None));
}

#[test]
fn between_output_rows_nothing_is_written() {
    let dense = Call::contiguous(PROBLEM);
    let strides = [4 * 9 * 24 + 8, 24, 4 * 24];
    let layout = Layout::strided(PROBLEM.q_shape(), strides);
    let len = layout.required_len().unwrap() + 100;
    let (o, _) = Call { o: (len, layout), ..dense.clone() }.run().unwrap();
    let (expected, _) = dense.run().unwrap();
    let mut is_row = vec![false; len];
    let [batch, heads, seqlen, head_dim] = PROBLEM.q_shape();
    for (b, h, i) in (0..batch).flat_map(|b| (0..heads).flat_map(move |h| (0..seqlen).map(move |i| (b, h, i)))) {
        let (at, dense_at) = (layout.offset(b, h, i), Layout::bhsd(PROBLEM.q_shape()).offset(b, h, i));
        assert_eq!(o[at..at + head_dim], expected[dense_at..dense_at + head_dim]);
        is_row[at..at + head_dim].fill(true);
    }
    assert!(o.iter().zip(is_row).all(|(x, is_row)| is_row || x.to_f32() == POISON));
}

#[test]
fn strides_of_single_extents_do_not_matter() {
    let problem = Problem { batch: 1, heads_q: 1, heads_kv: 1, seqlen_q: 1, seqlen_k: 1, ..PROBLEM };
    let dense = Call::contiguous(problem);
    let odd = |(len, layout): (usize, Layout)| (len, Layout { strides: [usize::MAX, 3, 0], ..layout });
    let call = Call { q: odd(dense.q), k: odd(dense.k), v: odd(dense.v), o: odd(dense.o), ..dense.clone() };
    assert_eq!(call.run(), dense.run());
}

#[test]
fn inputs_may_repeat_a_head() {
    let x: Vec<bf16> = (0..2000).map(|i| bf16::from_f32((i as f32).sin())).collect();
    let q = Tensor::bhsd(&x[..], PROBLEM.q_shape());
    let mut broadcast = Tensor::bhsd(&x[..], PROBLEM.kv_shape());
    broadcast.layout.strides[1] = 0;
    let single = Problem { heads_kv: 1, ..PROBLEM };
    let mut shared = Tensor::bhsd(&x[..], single.kv_shape());
    shared.layout.strides[0] = broadcast.layout.strides[0];
    let repeated = Attention::new(PROBLEM).forward(&Cpu, q, broadcast, broadcast).unwrap();
    assert_eq!(repeated, Attention::new(single).forward(&Cpu, q, shared, shared).unwrap());
}

#[test]
fn host_slices_need_no_alignment() {
    let x: Vec<bf16> = (0..2000).map(|i| bf16::from_f32((i as f32).sin())).collect();
    let dense = Attention::new(PROBLEM);
    let at = |first: usize| {
        let moved: Vec<bf16> = [&vec![bf16::NAN; first][..], &x].concat();
        let (q, k) =
            (Tensor::bhsd(&moved[first..], PROBLEM.q_shape()), Tensor::bhsd(&moved[first..], PROBLEM.kv_shape()));
        dense.forward(&Cpu, q, k, k).unwrap()
    };
    let aligned = at(0);
    for first in 1..8 {
        assert_eq!(at(first), aligned);
    }
}

#[test]
fn types_are_send_and_sync() {
    fn shared<T: Send + Sync>() {}
    shared::<Attention>();
    shared::<ferroflash::Plan>();
    shared::<ferroflash::RawForward>();
    shared::<Error>();
    shared::<Cpu>();
}
