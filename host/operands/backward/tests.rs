//! Every rule for the tensors of a backward pass, violated once.

use super::*;
use crate::plan::Options;
use crate::{plan::Determinism, problem::Problem, tensor::Layout};

const PROBLEM: Problem =
    Problem { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 10, seqlen_k: 20, head_dim: 16, dtype: Dtype::F16 };

fn plan(problem: &Problem) -> BackwardPlan {
    BackwardPlan::new(problem, &Options::default(), Determinism::Exact, 1).unwrap()
}

fn tensor(address: u64, shape: [usize; 4]) -> RawTensor {
    RawTensor { address, layout: Layout::bhsd(shape) }
}

/// Returns contiguous tensors, far from each other.
fn args() -> RawBackward {
    let (q, kv) = (PROBLEM.q_shape(), PROBLEM.kv_shape());
    RawBackward {
        q: tensor(0x10000, q),
        k: tensor(0x20000, kv),
        second: None,
        optional: OptionalInputs::NONE,
        d_sinks: None,
        v: tensor(0x30000, kv),
        o: tensor(0x40000, q),
        d_o: tensor(0x50000, q),
        lse: 0x60000,
        d_lse: Some(0x70000),
        dq: tensor(0x80000, q),
        dk: tensor(0x90000, kv),
        dv: tensor(0xa0000, kv),
        workspace: 0x1000000,
        workspace_bytes: plan(&PROBLEM).workspace_bytes(),
    }
}

#[track_caller]
fn message(change: impl FnOnce(&mut RawBackward)) -> String {
    let mut args = args();
    change(&mut args);
    args.validate(&plan(&PROBLEM)).unwrap_err().to_string()
}

/// Returns every tensor of 16-bit elements.
fn tensors(args: &mut RawBackward) -> [(&'static str, &mut RawTensor); 8] {
    let RawBackward { q, k, v, o, d_o, dq, dk, dv, .. } = args;
    [("q", q), ("k", k), ("v", v), ("o", o), ("d_o", d_o), ("dq", dq), ("dk", dk), ("dv", dv)]
}

#[test]
fn contiguous_tensors_are_valid() {
    assert_eq!(args().validate(&plan(&PROBLEM)), Ok(()));
    assert_eq!(RawBackward { d_lse: None, ..args() }.validate(&plan(&PROBLEM)), Ok(()));
    assert_eq!(RawBackward { workspace_bytes: usize::MAX, ..args() }.validate(&plan(&PROBLEM)), Ok(()));
}

#[test]
fn every_tensor_is_checked() {
    for i in 0..8 {
        let name = tensors(&mut args())[i].0;
        let error = message(|args| tensors(args)[i].1.address = 0);
        assert_eq!(error, format!("{name} is a null pointer; its tensor is not empty"));
        let error = message(|args| tensors(args)[i].1.address += 8);
        assert!(error.starts_with(&format!("{name} is at address 0x")) && error.ends_with("of 16 bytes is needed"));
        let error = message(|args| tensors(args)[i].1.address = u64::MAX - 15);
        assert!(error.starts_with(&format!("{name} spans ")), "{error}");
        let error = message(|args| tensors(args)[i].1.layout.strides[2] = 20);
        assert!(error.starts_with(&format!("{name}.strides: the seqlen stride is 20 elements; a multiple of 8")));
        let error = message(|args| tensors(args)[i].1.layout.strides[0] = 1 << 39);
        assert!(error.starts_with(&format!("{name}.strides: the batch stride is 549755813888 elements; at most")));
        let error = message(|args| tensors(args)[i].1.layout.shape[2] = 7);
        assert!(error.starts_with(&format!("{name}.shape is [2, ")), "{error}");
    }
}

#[test]
fn lines_are_checked() {
    assert_eq!(message(|args| args.lse = 0), "lse is a null pointer; its tensor is not empty");
    assert_eq!(message(|args| args.d_lse = Some(0)), "d_lse is a null pointer; its tensor is not empty");
    let error = message(|args| args.d_lse = Some(0x70002));
    assert_eq!(error, "d_lse is at address 0x70002; a multiple of 4 bytes is needed");
    let error = message(|args| args.lse = u64::MAX - 15);
    assert_eq!(error, "lse spans 320 bytes from address 0xfffffffffffffff0; at most 16 are allowed");
}

#[test]
fn the_workspace_is_checked() {
    let required = plan(&PROBLEM).workspace_bytes();
    let error = message(|args| args.workspace_bytes -= 1);
    assert_eq!(error, format!("workspace has {} bytes; the plan needs {required}", required - 1));
    assert_eq!(message(|args| args.workspace = 0), "workspace is a null pointer; its tensor is not empty");
    let error = message(|args| args.workspace += 128);
    assert_eq!(error, "workspace is at address 0x1000080; a multiple of 256 bytes is needed");
    let error = message(|args| args.workspace = u64::MAX - 255);
    assert!(error.starts_with(&format!("workspace spans {required} bytes from address 0xffffffffffffff00; ")));
}

#[test]
fn outputs_have_memory_of_their_own() {
    let rule = "an output needs memory of its own";
    for output in 5..8 {
        for other in (0..8).filter(|&other| other != output) {
            let mut args = args();
            let address = tensors(&mut args)[other].1.address;
            let names = [output, other].map(|i| tensors(&mut args)[i].0);
            tensors(&mut args)[output].1.address = address + 16;
            let found = args.validate(&plan(&PROBLEM)).unwrap_err().to_string();
            // The error names the later one of two outputs.
            let [output, other] = if other > output && other >= 5 { [names[1], names[0]] } else { names };
            assert_eq!(found, format!("{output} overlaps {other}; {rule}"));
        }
        let name = tensors(&mut args())[output].0;
        for (line, address) in [("lse", 0x60000), ("d_lse", 0x70000)] {
            let found = message(|args| tensors(args)[output].1.address = address);
            assert_eq!(found, format!("{name} overlaps {line}; {rule}"));
        }
        let found = message(|args| tensors(args)[output].1.layout.strides[1] = 0);
        assert!(found.starts_with(&format!("{name}.strides: the heads stride is 0 elements; an output's rows")));
    }
}

#[test]
fn the_workspace_has_memory_of_its_own() {
    let rule = "an output needs memory of its own";
    for i in 0..8 {
        let name = tensors(&mut args())[i].0;
        let last = args().workspace + args().workspace_bytes as u64 - 16;
        let found = message(|args| tensors(args)[i].1.address = last);
        assert_eq!(found, format!("workspace overlaps {name}; {rule}"));
    }
    let found = message(|args| args.lse = args.workspace - 4);
    assert_eq!(found, format!("workspace overlaps lse; {rule}"));
    let found = message(|args| args.d_lse = Some(args.workspace + 4));
    assert_eq!(found, format!("workspace overlaps d_lse; {rule}"));
}

#[test]
fn gradients_may_be_parts_of_one_tensor_and_inputs_shared() {
    // The dimensions are (batch, seqlen, q and k and v, heads, head_dim).
    let problem = Problem { heads_kv: 4, seqlen_k: 10, ..PROBLEM };
    let layout = Layout::strided(problem.q_shape(), [10 * 192, 16, 192]);
    let part = |i: u64| RawTensor { address: 0x80000 + 128 * i, layout };
    let q = tensor(0x10000, problem.q_shape());
    let parts = RawBackward { q, k: q, v: q, d_o: q, dq: part(0), dk: part(1), dv: part(2), ..args() };
    assert_eq!(parts.validate(&plan(&problem)), Ok(()));
    assert!(RawBackward { dv: part(1), ..parts }.validate(&plan(&problem)).is_err());
}

#[test]
fn addresses_of_nothing_do_not_matter() {
    for problem in [Problem { batch: 0, ..PROBLEM }, Problem { seqlen_q: 0, seqlen_k: 0, ..PROBLEM }] {
        let tensor = |shape| RawTensor { address: 1, layout: Layout::strided(shape, [usize::MAX; 3]) };
        let (q, k) = (tensor(problem.q_shape()), tensor(problem.kv_shape()));
        let args = RawBackward {
            q,
            k,
            second: None,
            optional: OptionalInputs::NONE,
            d_sinks: None,
            v: k,
            o: q,
            d_o: q,
            lse: 0,
            d_lse: Some(0),
            dq: q,
            dk: k,
            dv: k,
            workspace: 0,
            workspace_bytes: 0,
        };
        assert_eq!(args.validate(&plan(&problem)), Ok(()));
    }
}
