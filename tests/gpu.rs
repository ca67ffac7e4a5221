//! Tests of the kernels on a GPU, against the reference: the same cases as on the CPU, and more of them.
//!
//! It has its own harness, so that without a device every test is reported as ignored and none as passed. Built by
//! `cargo test --features cuda --no-run`, the binary also runs on a machine without Rust.

mod common;
#[path = "gpu/context.rs"]
mod context;
#[path = "gpu/driver.rs"]
mod driver;
#[path = "gpu/dropout.rs"]
mod dropout;
#[path = "gpu/first_tiles.rs"]
mod first_tiles;
#[path = "gpu/graph.rs"]
mod graph;
#[path = "gpu/interop.rs"]
mod interop;
#[path = "gpu/lengths.rs"]
mod lengths;
#[path = "gpu/parts.rs"]
mod parts;
#[path = "gpu/piecewise.rs"]
mod piecewise;
#[path = "gpu/specialise.rs"]
mod specialise;
#[path = "common/total.rs"]
mod total;
#[path = "gpu/total_attention.rs"]
mod total_attention;

use ferroflash::cases::Case;
use ferroflash::cuda::Cuda;
use ferroflash::reference::Rows;
use ferroflash::{
    Alibi, Attention, Backend, Determinism, Dtype, Layout, Mask, Operand, OptionalInputs, Problem, RawBackward,
    RawForward, RawTensor, Sinks, bf16,
};
use libtest_mimic::{Arguments, Failed, Trial};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// Number of random cases per run; FERROFLASH_GPU_CASES sets another.
const RANDOM_CASES: u64 = 2000;

/// Body of a test.
type Run = Box<dyn FnOnce(&Cuda) + Send>;

fn main() {
    let arguments = Arguments::from_args();
    let cuda = Cuda::new(0);
    if let Err(error) = &cuda {
        println!("skipped: {error}");
    }
    let cuda = cuda.ok();
    let absent = cuda.is_none();
    let test = |name: &str, run: Run| {
        let cuda = cuda.clone();
        Trial::test(name, move || {
            run(&cuda.ok_or("no CUDA device")?);
            Ok::<(), Failed>(())
        })
        .with_ignored_flag(absent)
    };
    let mut trials: Vec<Trial> = common::named()
        .into_iter()
        .map(|(name, case)| test(name, Box::new(move |cuda| common::pass(cuda, &case))))
        .collect();
    for (name, case) in common::named_backward() {
        for determinism in [Determinism::Fast, Determinism::Exact] {
            let name = format!("backward, {determinism}: {name}");
            trials.push(test(&name, Box::new(move |cuda| common::pass_backward(cuda, &case, determinism))));
        }
    }
    for (name, case) in common::dropout::named() {
        let run = move |cuda: &Cuda| {
            common::pass(cuda, &case);
            common::pass_backward(cuda, &case, Determinism::Exact);
        };
        trials.push(test(&name, Box::new(run)));
    }
    for (head_dim, mask) in [64, 128, 256].into_iter().flat_map(|d| [(d, Mask::None), (d, Mask::Causal)]) {
        trials.push(test(
            &format!("dropout mask recovered, head dim {head_dim}, {mask}"),
            Box::new(move |cuda| common::dropout::mask_is_recovered(cuda, head_dim, mask)),
        ));
    }
    trials.push(test("a graph with dropout from memory", Box::new(graph::dropout_from_memory)));
    trials.push(test("dropout masks", Box::new(dropout::masks)));
    trials.push(test("a dropout mask of more than 2^32 weights", Box::new(dropout::large_mask)));
    trials.push(test("speed of dropout masks", Box::new(dropout::speed)));
    for mask in [Mask::None, Mask::Causal] {
        trials.push(test(&format!("large logits, {mask}"), Box::new(move |cuda| common::large_logits(cuda, mask))));
        for head_dim in [64, 96, 128, 192, 256] {
            trials.push(test(
                &format!("negative scores, head dim {head_dim}, {mask}"),
                Box::new(move |cuda| common::negative_scores(cuda, head_dim, mask)),
            ));
            let problem = Problem { head_dim, ..BIG };
            let case = Case::new(problem, mask);
            trials.push(test(
                &format!("100 repeats, head dim {head_dim}, {mask}"),
                Box::new(move |cuda| common::repeats(cuda, &case, 100)),
            ));
        }
    }
    for (head_dim, mask) in [64, 96, 128, 256].into_iter().flat_map(|d| [(d, Mask::None), (d, Mask::Causal)]) {
        let case = Case { seed: 1, ..Case::new(Problem { head_dim, ..BIG }, mask) };
        trials.push(test(
            &format!("100 exact repeats backward, head dim {head_dim}, {mask}"),
            Box::new(move |cuda| common::repeats_backward(cuda, &case, Determinism::Exact, 100)),
        ));
    }
    for (head_dim, mask) in [64, 128, 256].into_iter().flat_map(|d| [(d, Mask::None), (d, Mask::Causal)]) {
        let case = Case { seed: 1, dropout: 0.1, ..Case::new(Problem { head_dim, ..BIG }, mask) };
        let repeat = move |cuda: &Cuda| {
            common::repeats(cuda, &case, 20);
            common::repeats_backward(cuda, &case, Determinism::Exact, 20);
        };
        trials.push(test(&format!("20 exact repeats with dropout, head dim {head_dim}, {mask}"), Box::new(repeat)));
    }
    for (seqlen_q, seqlen_k) in [(239, 1), (1024, 128)] {
        let problem = Problem { batch: 60, heads_q: 4, heads_kv: 4, seqlen_q, seqlen_k, ..BIG };
        let case = Case { seed: 1, ..Case::new(problem, Mask::Causal) };
        trials.push(test(
            &format!("250 exact repeats backward, {seqlen_q} by {seqlen_k}"),
            Box::new(move |cuda| common::repeats_backward(cuda, &case, Determinism::Exact, 250)),
        ));
    }
    for head_dim in [96, 128, 192, 256] {
        let name = format!("clusters, head dim {head_dim}");
        trials.push(test(&name, Box::new(move |cuda| clusters(cuda, head_dim))));
    }
    for head_dim in [64, 128, 256] {
        let name = format!("work tiles in parts, head dim {head_dim}");
        trials.push(test(&name, Box::new(move |cuda| parts::backward(cuda, head_dim))));
    }
    for head_dim in [128, 256] {
        let name = format!("work tiles that store dQ, head dim {head_dim}");
        trials.push(test(&name, Box::new(move |cuda| first_tiles::backward(cuda, head_dim))));
    }
    for (name, case) in common::shaping::named() {
        for determinism in [Determinism::Fast, Determinism::Exact] {
            let run = move |cuda: &Cuda| common::shaping::pass_all(cuda, &case, determinism);
            trials.push(test(&format!("{name}, {determinism}"), Box::new(run)));
        }
    }
    for case in common::shaping::named_piecewise() {
        let run = move |cuda: &Cuda| common::shaping::pass_piecewise(cuda, &case, Determinism::Exact);
        trials.push(test(&format!("shaped: {case}"), Box::new(run)));
    }
    for head_dim in [64, 128, 256] {
        let case = Case { seed: 1, softcap: Some(10.0), ..Case::new(Problem { head_dim, ..BIG }, Mask::Causal) };
        let case = Case { alibi: Alibi::PerHead, sinks: Sinks::PerHead, ..case };
        let repeat = move |cuda: &Cuda| {
            common::repeats_backward(cuda, &case, Determinism::Exact, 20);
            common::repeats_backward(cuda, &case, Determinism::Fast, 20);
        };
        trials.push(test(&format!("20 repeats with softcap, ALiBi and sinks, head dim {head_dim}"), Box::new(repeat)));
    }
    trials.push(test("sinks are logits", Box::new(common::shaping::sinks_are_logits)));
    trials.extend(lengths::tests().into_iter().map(|(name, run)| test(&name, run)));
    trials.extend(piecewise::tests().into_iter().map(|(name, run)| test(&name, run)));
    trials.extend(specialise::tests().into_iter().map(|(name, run)| test(name, run)));
    trials.push(test("nan gradient stays in its head", Box::new(common::nan_gradient_stays_in_its_head)));
    trials.push(test("random cases backward", Box::new(random_cases_backward)));
    trials.push(test("random cases with dropout", Box::new(random_dropout)));
    trials.push(test("raw addresses backward", Box::new(raw_addresses_backward)));
    for (name, case) in total::named() {
        trials.push(test(&format!("total: {name}"), Box::new(move |cuda| total::pass(cuda, &case))));
    }
    for (head_dim, mask) in [64, 128, 256].into_iter().flat_map(|d| [(d, Mask::None), (d, Mask::Causal)]) {
        let case = Case::new(Problem { head_dim, ..BIG }, mask);
        trials.push(test(
            &format!("100 repeats of total attention, head dim {head_dim}, {mask}"),
            Box::new(move |cuda| total::repeats(cuda, &case, 100)),
        ));
    }
    trials.push(test("total: weights add up", Box::new(total::weights_add_up)));
    trials.push(test("total: nan stays in its head", Box::new(total::nan_stays_in_its_head)));
    trials.push(test("total: an infinite key without weight", Box::new(total::infinite_key)));
    trials.push(test("total: padding is never read", Box::new(total::padding_is_never_read)));
    trials.push(test("total: many work tiles a CTA", Box::new(total_attention::many_tiles)));
    trials.push(test("total: random cases", Box::new(random_cases_total)));
    trials.push(test("total: raw addresses", Box::new(total_attention::raw_addresses)));
    trials.push(test("nan stays in its head", Box::new(common::nan_stays_in_its_head)));
    trials.push(test("padding is never read", Box::new(common::padding_is_never_read)));
    trials.push(test("inputs may repeat a head", Box::new(repeated_heads)));
    trials.push(test("random cases", Box::new(random_cases)));
    trials.push(test("fresh random cases", Box::new(fresh_cases)));
    trials.push(test("many work tiles a CTA", Box::new(many_tiles)));
    trials.push(test("a million tokens", Box::new(a_million_tokens)));
    trials.push(test("raw addresses", Box::new(raw_addresses)));
    trials.push(test("queued runs are timed", Box::new(queued_runs)));
    trials.push(test("captured into a graph", Box::new(graph::forward)));
    for determinism in [Determinism::Fast, Determinism::Exact] {
        let name = format!("captured into a graph, backward, {determinism}");
        trials.push(test(&name, Box::new(move |cuda| graph::backward(cuda, determinism))));
    }
    trials.push(test("the current context stays", Box::new(context::current_context_stays)));
    trials.push(test("streams are put in order", Box::new(context::streams_are_put_in_order)));
    trials.push(test("a stream of the caller's", Box::new(context::callers_stream)));
    trials.push(test("plans and workspaces are kept", Box::new(context::plans_are_kept)));
    trials.push(test("errors say what is wrong", Box::new(context::errors_say_what_is_wrong)));
    trials.push(test("two devices", Box::new(|cuda| context::two_devices(cuda).unwrap())));
    #[cfg(feature = "cudarc")]
    trials.push(test("memory of cudarc's", Box::new(interop::cudarc)));
    #[cfg(feature = "cust")]
    trials.push(test("memory of cust's", Box::new(interop::cust)));
    trials.push(test("exact passes on two streams", Box::new(graph::two_streams)));
    trials.push(test("work tiles that store dQ, beside another launch", Box::new(graph::beside_another)));
    let conclusion = libtest_mimic::run(&arguments, trials);
    if let Some(cuda) = &cuda {
        cuda.synchronize().expect("no launch has failed unseen");
    }
    conclusion.exit();
}

/// Number of random backward cases per run, half of them exact. The reference takes most of the time.
const RANDOM_BACKWARD_CASES: u64 = 1000;

const BIG: Problem =
    Problem { batch: 2, heads_q: 8, heads_kv: 4, seqlen_q: 1100, seqlen_k: 1300, head_dim: 128, dtype: Dtype::Bf16 };

fn random_cases(cuda: &Cuda) {
    let cases = std::env::var("FERROFLASH_GPU_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(RANDOM_CASES);
    for seed in 0..cases {
        common::pass(cuda, &Case::random(seed, 4e8));
    }
    println!("{cases} random cases passed");
}

fn random_cases_backward(cuda: &Cuda) {
    let cases = std::env::var("FERROFLASH_GPU_CASES").ok().and_then(|n| n.parse().ok());
    for seed in 0..cases.unwrap_or(RANDOM_BACKWARD_CASES) {
        let determinism = if seed % 2 == 0 { Determinism::Fast } else { Determinism::Exact };
        common::pass_backward(cuda, &Case::random(seed, 1e8), determinism);
    }
}

/// Number of random cases of total attention per run.
const RANDOM_TOTAL_CASES: u64 = 1000;

fn random_cases_total(cuda: &Cuda) {
    let cases = std::env::var("FERROFLASH_GPU_CASES").ok().and_then(|n| n.parse().ok());
    for seed in 0..cases.unwrap_or(RANDOM_TOTAL_CASES) {
        total::pass(cuda, &Case::random(seed, 1e8));
    }
}

/// Number of random cases with dropout per run, each in both passes.
const RANDOM_DROPOUT_CASES: u64 = 500;

fn random_dropout(cuda: &Cuda) {
    let cases = std::env::var("FERROFLASH_GPU_CASES").ok().and_then(|n| n.parse().ok());
    for seed in 0..cases.unwrap_or(RANDOM_DROPOUT_CASES) {
        let case = Case::random_dropout(seed, 1e8);
        let determinism = if seed % 2 == 0 { Determinism::Fast } else { Determinism::Exact };
        common::pass(cuda, &case);
        common::pass_backward(cuda, &case, determinism);
    }
}

/// Runs cases that no run has had before. A failure prints the command that runs it again.
fn fresh_cases(cuda: &Cuda) {
    let config = Config { cases: 200, failure_persistence: None, ..Config::default() };
    let judged = TestRunner::new(config).run(&any::<u64>(), |seed| {
        let case = Case::random(seed, 4e8);
        let outcome = case.run(cuda, &Rows::All).map_err(|error| TestCaseError::fail(format!("{case}: {error}")))?;
        prop_assert!(!outcome.failed(), "{case}\n{outcome:#?}");
        Ok(())
    });
    judged.unwrap_or_else(|error| panic!("{error}"));
}

/// Runs more work tiles than the chip runs at once, so that CTAs take several and the ring wraps around.
fn many_tiles(cuda: &Cuda) {
    for (head_dim, mask) in [(64, Mask::None), (64, Mask::Causal), (128, Mask::Causal), (256, Mask::Causal)] {
        let problem = Problem { batch: 6, heads_q: 24, heads_kv: 8, seqlen_q: 500, seqlen_k: 700, head_dim, ..BIG };
        for dropout in [0.0, 0.3] {
            let case = Case { dropout, ..Case::new(problem, mask) };
            let outcome = case.run(cuda, &Rows::sample(500, 40)).unwrap();
            assert!(outcome.passed(), "{case}\n{outcome:#?}");
        }
    }
}

/// Runs CTAs that load K and V for each other: partial tiles and blocks, an odd number of tiles per query head, several
/// tiles per CTA. Checks that every run gives the same bits.
fn clusters(cuda: &Cuda, head_dim: usize) {
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let few = Problem { batch: 1, heads_q: 12, heads_kv: 2, seqlen_q: 300, seqlen_k: 4999, head_dim, dtype };
        let many = Problem { batch: 6, heads_q: 24, heads_kv: 8, seqlen_q: 500, seqlen_k: 1700, ..few };
        for problem in [few, many] {
            let plan = Attention::new(problem).plan(cuda.sm_count()).unwrap();
            assert_eq!(plan.variant().cluster, 2, "{plan}");
            let case = Case::new(problem, Mask::None);
            let outcome = case.run(cuda, &Rows::sample(problem.seqlen_q, 40)).unwrap();
            assert!(outcome.passed(), "{case}\n{outcome:#?}");
        }
        if dtype == Dtype::Bf16 {
            common::repeats(cuda, &Case::new(few, Mask::None), 100);
            common::repeats(cuda, &Case::new(many, Mask::None), 10);
        }
    }
}

/// Runs one sequence of 2²⁰ tokens, judged by a sample of its rows.
fn a_million_tokens(cuda: &Cuda) {
    let seqlen = 1 << 20;
    let problem =
        Problem { batch: 1, heads_q: 1, heads_kv: 1, seqlen_q: seqlen, seqlen_k: seqlen, head_dim: 128, ..BIG };
    for mask in [Mask::None, Mask::Causal] {
        let case = Case::new(problem, mask);
        let outcome = case.run(cuda, &Rows::sample(seqlen, 24)).unwrap();
        assert!(outcome.passed(), "{case}\n{outcome:#?}");
    }
}

/// Checks that a head stride of 0 reads one key head for all.
fn repeated_heads(cuda: &Cuda) {
    let problem = Problem { batch: 1, heads_q: 4, heads_kv: 4, seqlen_q: 100, seqlen_k: 90, head_dim: 64, ..BIG };
    let one = Case::new(Problem { heads_kv: 1, ..problem }, Mask::None);
    let inputs = one.inputs::<bf16>().unwrap();
    let expected = one.output(cuda, &inputs).unwrap();
    let [q, k, v] = inputs.each_ref().map(|x| cuda.upload(Operand::Q, x).unwrap());
    let layout = Layout::strided(problem.kv_shape(), [0, 0, 64]);
    let view = |buffer| ferroflash::Tensor { data: Cuda::slice(buffer), layout };
    let q = ferroflash::Tensor::bhsd(Cuda::slice(&q), problem.q_shape());
    let output = Attention::new(problem).forward(cuda, q, view(&k), view(&v)).unwrap();
    assert!(cuda.download(&output.o).unwrap() == expected.o);
}

/// Runs the form for frameworks: addresses and a stream. Bad addresses are refused before anything is launched.
fn raw_addresses(cuda: &Cuda) {
    let case = Case::new(BIG, Mask::Causal);
    let inputs = case.inputs::<bf16>().unwrap();
    let expected = case.output(cuda, &inputs).unwrap();
    let buffers = inputs.each_ref().map(|x| cuda.upload(Operand::Q, x).unwrap());
    let o = cuda.upload(Operand::O, &vec![bf16::NAN; expected.o.len()]).unwrap();
    let plan = Attention::new(BIG).mask(Mask::Causal).plan(cuda.sm_count()).unwrap();
    cuda.load(&plan).unwrap();
    let tensor = |address, shape| RawTensor { address, layout: Layout::bhsd(shape) };
    let [q, k, v] = buffers.each_ref().map(|buffer| buffer.address());
    let args = RawForward {
        q: tensor(q, BIG.q_shape()),
        k: tensor(k, BIG.kv_shape()),
        second: None,
        optional: OptionalInputs::NONE,
        v: tensor(v, BIG.kv_shape()),
        o: tensor(o.address(), BIG.q_shape()),
        lse: None,
        workspace: 0,
        workspace_bytes: 0,
    };
    let bad = RawForward { k: tensor(k + 2, BIG.kv_shape()), ..args };
    let overlap = RawForward { o: tensor(q, BIG.q_shape()), ..args };
    // SAFETY: the buffers outlive the launches, and the default stream is this device's.
    unsafe {
        assert!(cuda.forward_raw(&plan, &bad, std::ptr::null_mut()).is_err());
        assert!(cuda.forward_raw(&plan, &overlap, std::ptr::null_mut()).is_err());
        cuda.forward_raw(&plan, &args, std::ptr::null_mut()).unwrap();
    }
    assert!(cuda.download(&o).unwrap() == expected.o);
    let start = std::time::Instant::now();
    for _ in 0..100 {
        // SAFETY: the buffers outlive the launches, and the default stream is this device's.
        unsafe { cuda.forward_raw(&plan, &args, std::ptr::null_mut()) }.unwrap();
    }
    println!("raw launch: {:?} of host time", start.elapsed() / 100);
    // There is no wait for the whole context, because another test may be capturing a stream of it.
    assert!(cuda.download(&o).unwrap() == expected.o);
}

/// Runs the gradients' form for frameworks, with a workspace of the caller's whose content does not matter.
fn raw_addresses_backward(cuda: &Cuda) {
    let case = Case { seed: 1, ..Case::new(BIG, Mask::Causal) };
    let data = case.backward_data::<_, bf16>(cuda).unwrap();
    let expected = case.gradients(cuda, &data, Determinism::Exact).unwrap();
    let attention = Attention::new(BIG).mask(Mask::Causal).determinism(Determinism::Exact);
    let plan = attention.plan_backward(cuda.sm_count()).unwrap();
    cuda.load_backward(&plan).unwrap();
    let [q, k, v] = data.inputs.each_ref().map(|x| cuda.upload(Operand::Q, x).unwrap());
    let [o, d_o] = [&data.o, &data.d_o].map(|x| cuda.upload(Operand::O, x).unwrap());
    let lse = cuda.upload(Operand::Lse, &data.lse).unwrap();
    let d_lse = data.d_lse.as_ref().map(|d_lse| cuda.upload(Operand::DLse, d_lse).unwrap());
    let outputs = expected.gradients.each_ref().map(|x| cuda.upload(Operand::Dq, &vec![bf16::NAN; x.len()]).unwrap());
    let workspace = cuda.upload(Operand::Workspace, &vec![0xffu8; plan.workspace_bytes()]).unwrap();
    let of_q = |address| RawTensor { address, layout: Layout::bhsd(BIG.q_shape()) };
    let of_kv = |address| RawTensor { address, layout: Layout::bhsd(BIG.kv_shape()) };
    let [dq, dk, dv] = outputs.each_ref().map(|x| x.address());
    let args = RawBackward {
        q: of_q(q.address()),
        k: of_kv(k.address()),
        second: None,
        optional: OptionalInputs::NONE,
        d_sinks: None,
        v: of_kv(v.address()),
        o: of_q(o.address()),
        d_o: of_q(d_o.address()),
        lse: lse.address(),
        d_lse: d_lse.as_ref().map(|d_lse| d_lse.address()),
        dq: of_q(dq),
        dk: of_kv(dk),
        dv: of_kv(dv),
        workspace: workspace.address(),
        workspace_bytes: workspace.len(),
    };
    let small = RawBackward { workspace_bytes: workspace.len() - 1, ..args };
    let overlap = RawBackward { dk: of_kv(dv), ..args };
    let stream = std::ptr::null_mut();
    // SAFETY: the buffers outlive the launches, and the default stream is this device's.
    unsafe {
        assert!(cuda.backward_raw(&plan, &small, stream).is_err());
        assert!(cuda.backward_raw(&plan, &overlap, stream).is_err());
        // Runs twice, so that the second run finds the first one's values in the workspace.
        cuda.backward_raw(&plan, &args, stream).unwrap();
        cuda.backward_raw(&plan, &args, stream).unwrap();
    }
    for (found, expected) in outputs.iter().zip(&expected.gradients) {
        assert!(cuda.download(found).unwrap() == *expected);
    }
}

/// Checks that every run has a time, and that the work before a run has an effect. The times themselves depend on the
/// other tests.
fn queued_runs(cuda: &Cuda) {
    let [mut cache, mut target] = [1 << 20, 1 << 10].map(|len| cuda.upload(Operand::Total, &vec![1u32; len]).unwrap());
    let times = cuda.time_each(300, || cache.set_zero(), || target.set_zero()).unwrap();
    assert!(times.len() == 300 && times.iter().all(|time| time.as_secs() < 1), "{times:?}");
    assert!([&cache, &target].into_iter().all(|x| cuda.download(x).unwrap().iter().all(|&x| x == 0)));
    assert!(cuda.time_each(0, || Ok(()), || Ok(())).unwrap().is_empty());
    assert!(cuda.allocate::<u32>(Operand::Total, 0).unwrap().set_zero().is_ok());
}
