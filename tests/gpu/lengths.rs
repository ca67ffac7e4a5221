//! Tests of sequences of different lengths on the GPU: those of both machines, graphs, and lengths that are wrong in
//! device memory.

use std::ptr;

use ferroflash::cases::{Case, PiecewiseCase};
use ferroflash::cuda::{Cuda, DeviceBuffer};
use ferroflash::{
    Attention, Backend, Determinism, Error, Inputs, Layout, Lengths, Mask, Operand, OptionalInputs, Problem,
    RawBackward, RawForward, RawTensor, Tensor, bf16,
};

use crate::driver::{Primary, Stream, wait_for_default_stream};
use crate::{common, common::lengths};

/// A test by its name.
type Test = (String, Box<dyn FnOnce(&Cuda) + Send>);

pub fn tests() -> Vec<Test> {
    let mut tests: Vec<Test> = Vec::new();
    let mut add = |name: String, run: Box<dyn FnOnce(&Cuda) + Send>| tests.push((format!("lengths: {name}"), run));
    for (name, case) in lengths::named() {
        for determinism in [Determinism::Fast, Determinism::Exact] {
            let run = move |cuda: &Cuda| common::shaping::pass_all(cuda, &case, determinism);
            add(format!("{name}, {determinism}"), Box::new(run));
        }
    }
    add(
        "ends of both sides apart, large".to_owned(),
        Box::new(|cuda| {
            common::shaping::pass_all(cuda, &lengths::large(), Determinism::Fast);
        }),
    );
    add("each sequence has the bits of itself alone".to_owned(), Box::new(lengths::alone));
    add("nothing crosses".to_owned(), Box::new(lengths::nothing_crosses));
    add("rows of no sequence are never read".to_owned(), Box::new(lengths::gaps_are_never_read));
    add("permutations permute".to_owned(), Box::new(lengths::permutations_permute));
    add("random cases".to_owned(), Box::new(random_cases));
    add("captured once, ten sets of lengths".to_owned(), Box::new(graph));
    add("wrong lengths stay within the tensors".to_owned(), Box::new(wrong_lengths));
    add("a check names the wrong entry".to_owned(), Box::new(checked));
    tests
}

/// Number of random cases per run, each in all passes.
const RANDOM_CASES: u64 = 300;

fn random_cases(cuda: &Cuda) {
    let cases = std::env::var("FERROFLASH_GPU_CASES").ok().and_then(|n| n.parse().ok());
    for seed in 0..cases.unwrap_or(RANDOM_CASES) {
        let determinism = if seed % 2 == 0 { Determinism::Fast } else { Determinism::Exact };
        let case = Case::random_lengths(seed, 5e7);
        let outcome = case.run(cuda, &ferroflash::reference::Rows::All).unwrap();
        assert!(!outcome.failed(), "{case}\n{outcome:#?}");
        let outcome = case.run_backward(cuda, determinism).unwrap();
        assert!(!outcome.failed(), "{case} ({determinism})\n{outcome}");
        let outcome = case.run_total(cuda).unwrap();
        assert!(!outcome.failed(), "{case}\n{outcome}");
        let case = PiecewiseCase::with_random_threshold(case, seed);
        let outcome = case.run_backward(cuda, determinism).unwrap();
        assert!(!outcome.failed(), "{case} ({determinism})\n{outcome}");
    }
}

const SEQUENCES: usize = 12;
const PROBLEM: Problem = Problem {
    batch: 1,
    heads_q: 4,
    heads_kv: 2,
    seqlen_q: 3000,
    seqlen_k: 4000,
    head_dim: 128,
    dtype: ferroflash::Dtype::Bf16,
};

/// Returns cumulative lengths of [`SEQUENCES`] sequences, which are others for each seed.
fn cumulative(seed: i32, rows: i32) -> Vec<i32> {
    let mut ends: Vec<i32> =
        (1..SEQUENCES as i32).map(|i| (i * 7919 * (seed + 1) + 13 * seed).rem_euclid(rows)).collect();
    ends.sort_unstable();
    [vec![0], ends, vec![rows - seed]].concat()
}

/// Buffers of both passes, and their arguments.
struct Call {
    tensors: [DeviceBuffer<bf16>; 8],
    lse: DeviceBuffer<f32>,
    cumulative: [DeviceBuffer<i32>; 2],
    workspaces: [DeviceBuffer<u8>; 2],
}

impl Call {
    fn new(cuda: &Cuda, attention: &Attention) -> Self {
        let values = |rows: usize, heads: usize, step: usize| -> Vec<bf16> {
            let value = |i: usize| bf16::from_f32(((i * step) % 2003) as f32 / 600.0 - 1.67);
            (0..rows * heads * 128).map(value).collect()
        };
        let (m, n) = (PROBLEM.seqlen_q, PROBLEM.seqlen_k);
        let tensors = [
            values(m, 4, 7919),
            values(n, 2, 104_729),
            values(n, 2, 1_299_709),
            values(m, 4, 0),
            values(m, 4, 611_953),
            values(m, 4, 0),
            values(n, 2, 0),
            values(n, 2, 0),
        ];
        let (plan, backward) = plans(cuda, attention);
        let workspace = |bytes: usize| cuda.upload(Operand::Workspace, &vec![0xffu8; bytes]).unwrap();
        Call {
            tensors: tensors.map(|x| cuda.upload(Operand::Q, &x).unwrap()),
            lse: cuda.upload(Operand::Lse, &vec![0.0; PROBLEM.lse_len()]).unwrap(),
            cumulative: [m, n].map(|rows| cuda.upload(Operand::CumulativeQ, &cumulative(0, rows as i32)).unwrap()),
            workspaces: [plan.workspace_bytes(), backward.workspace_bytes()].map(workspace),
        }
    }

    fn args(&self) -> (RawForward, RawBackward) {
        let tensor =
            |index: usize, shape| RawTensor { address: self.tensors[index].address(), layout: Layout::bshd(shape) };
        let (of_q, of_kv) = (PROBLEM.q_shape(), PROBLEM.kv_shape());
        let [q, k, v, o] = [tensor(0, of_q), tensor(1, of_kv), tensor(2, of_kv), tensor(3, of_q)];
        let mut optional = OptionalInputs::NONE;
        let [cu_q, cu_k] = self.cumulative.each_ref().map(DeviceBuffer::address);
        optional.lengths = Some(Lengths::cumulative(SEQUENCES, cu_q, cu_k));
        let lse = self.lse.address();
        let [of_forward, of_backward] = &self.workspaces;
        let forward = RawForward {
            q,
            k,
            second: None,
            optional,
            v,
            o,
            lse: Some(lse),
            workspace: of_forward.address(),
            workspace_bytes: of_forward.len(),
        };
        let backward = RawBackward {
            q,
            k,
            second: None,
            v,
            o,
            d_o: tensor(4, of_q),
            lse,
            d_lse: None,
            optional,
            dq: tensor(5, of_q),
            dk: tensor(6, of_kv),
            dv: tensor(7, of_kv),
            d_sinks: None,
            workspace: of_backward.address(),
            workspace_bytes: of_backward.len(),
        };
        (forward, backward)
    }

    /// Returns O, LSE and gradients as bits.
    fn results(&self, cuda: &Cuda) -> (Vec<Vec<u16>>, Vec<u32>) {
        let bits = |index: usize| cuda.download(&self.tensors[index]).unwrap().iter().map(|x| x.to_bits()).collect();
        let lse = cuda.download(&self.lse).unwrap().iter().map(|x| x.to_bits()).collect();
        ([3, 5, 6, 7].map(bits).to_vec(), lse)
    }

    fn set_lengths(&mut self, seed: i32) {
        for (numbers, rows) in self.cumulative.iter_mut().zip([PROBLEM.seqlen_q, PROBLEM.seqlen_k]) {
            numbers.copy_from_host(&cumulative(seed, rows as i32)).unwrap();
        }
    }

    fn poison(&mut self) {
        for index in [3, 5, 6, 7] {
            let len = self.tensors[index].len();
            self.tensors[index].copy_from_host(&vec![bf16::NAN; len]).unwrap();
        }
        let len = self.lse.len();
        self.lse.copy_from_host(&vec![f32::NAN; len]).unwrap();
        for workspace in &mut self.workspaces {
            let len = workspace.len();
            workspace.copy_from_host(&vec![0xffu8; len]).unwrap();
        }
    }
}

fn attention() -> Attention {
    let kinds = Inputs::new(empty(), empty(), empty())
        .lengths(Lengths::cumulative(SEQUENCES, &[][..] as &[i32], &[][..] as &[i32]))
        .kinds();
    Attention::new(PROBLEM).mask(Mask::Causal).determinism(Determinism::Exact).for_inputs(kinds)
}

fn empty() -> Tensor<&'static [bf16]> {
    Tensor::bhsd(&[], [0; 4])
}

fn plans(cuda: &Cuda, attention: &Attention) -> (ferroflash::Plan, ferroflash::BackwardPlan) {
    (attention.plan(cuda.sm_count()).unwrap(), attention.plan_backward(cuda.sm_count()).unwrap())
}

/// Captures both passes once, and launches the graph with ten sets of lengths in the same buffers. Each launch gives
/// what ordinary launches give.
fn graph(cuda: &Cuda) {
    let _current = Primary::enter(cuda.ordinal());
    let attention = attention();
    let (plan, backward) = plans(cuda, &attention);
    cuda.load(&plan).unwrap();
    cuda.load_backward(&backward).unwrap();
    let mut call = Call::new(cuda, &attention);
    let (forward_args, backward_args) = call.args();
    let run = |stream| {
        // SAFETY: the buffers outlive the launches, and nothing else uses them; the stream is of the device's context.
        unsafe {
            cuda.forward_raw(&plan, &forward_args, stream).unwrap();
            cuda.backward_raw(&backward, &backward_args, stream).unwrap();
        }
    };
    let expected: Vec<_> = (0..10)
        .map(|seed| {
            call.set_lengths(seed);
            call.poison();
            run(ptr::null_mut());
            call.results(cuda)
        })
        .collect();
    assert!((1..10).all(|seed| expected[seed] != expected[seed - 1]));
    let stream = Stream::new();
    let graph = stream.capture(run);
    wait_for_default_stream();
    for (seed, expected) in (0..).zip(&expected) {
        call.set_lengths(seed);
        call.poison();
        stream.run(&graph);
        assert!(call.results(cuda) == *expected, "lengths {seed}");
    }
}

/// Runs both passes with lengths that are wrong in device memory: negative, decreasing, beyond the tensors. They end,
/// and no memory outside is read (compute-sanitizer) or written.
fn wrong_lengths(cuda: &Cuda) {
    let attention = attention();
    let (plan, backward) = plans(cuda, &attention);
    let mut call = Call::new(cuda, &attention);
    let (forward_args, backward_args) = call.args();
    for seed in 0..8i32 {
        for (side, numbers) in call.cumulative.iter_mut().enumerate() {
            let number = |i: i32| match seed {
                0 => -i,
                1 => i32::MAX - i,
                2 => i32::MIN + i,
                3 => 5000 - 400 * i,
                4 => (i % 2) * 3000,
                5 => i * 1000,
                _ => (i * 7919 * seed + side as i32 * 104_729).rem_euclid(6000) - 1000,
            };
            let wrong: Vec<i32> = (0..=SEQUENCES as i32).map(number).collect();
            numbers.copy_from_host(&wrong).unwrap();
        }
        // SAFETY: the buffers outlive the launches, and the default stream is this device's.
        unsafe {
            cuda.forward_raw(&plan, &forward_args, ptr::null_mut()).unwrap();
            cuda.backward_raw(&backward, &backward_args, ptr::null_mut()).unwrap();
        }
        // What is not a sequence is a gap, so every row is written.
        let (tensors, _) = call.results(cuda);
        assert!(tensors.iter().all(|x| x.iter().all(|&bits| bits != 0xffff)), "lengths {seed}");
    }
    let [q, k] = call.cumulative.each_ref().map(|numbers| numbers.as_slice());
    assert!(cuda.check_lengths(&PROBLEM, &Lengths::cumulative(SEQUENCES, q, k)).is_err());
}

/// Checks lengths in device memory, which names the wrong entry.
fn checked(cuda: &Cuda) {
    let [good, bad, short] =
        [[0, 10, 30], [0, 40, 30], [0, 10, 20]].map(|x| cuda.upload(Operand::CumulativeQ, &x).unwrap());
    let problem = Problem { seqlen_q: 30, seqlen_k: 30, ..PROBLEM };
    let check = |q: &DeviceBuffer<i32>, k: &DeviceBuffer<i32>, sequences| {
        cuda.check_lengths(&problem, &Lengths::cumulative(sequences, q.as_slice(), k.as_slice()))
    };
    assert_eq!(check(&good, &short, 2), Ok(()));
    let error = Error::SequencePlace { operand: Operand::CumulativeK, index: 1, value: 40, least: 0, most: 30 };
    assert_eq!(check(&good, &bad, 2), Err(error));
    let error = Error::LengthsLength { operand: Operand::CumulativeQ, len: 3, expected: 4 };
    assert_eq!(check(&good, &good, 3), Err(error));
}
