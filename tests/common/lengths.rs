//! Tests of sequences of different lengths that both machines must pass.

use std::ops::Range;

use ferroflash::cases::{BackwardData, Case, CaseGradients, CaseLengths, CaseOutput, Gaps, Order};
use ferroflash::{Alibi, Backend, Determinism, Dtype, Mask, Problem, Sinks, bf16};

const PROBLEM: Problem =
    Problem { batch: 1, heads_q: 4, heads_kv: 2, seqlen_q: 0, seqlen_k: 0, head_dim: 64, dtype: Dtype::Bf16 };

fn case(sequences: &[[usize; 2]], mask: Mask) -> Case {
    Case { order: Order::Bshd, ..Case::new(PROBLEM, mask) }.with_lengths(CaseLengths::new(sequences.to_vec()))
}

/// Returns (name, case): shapes that broke other libraries, and those at the edges of tiles and of the schedule.
pub fn named() -> Vec<(&'static str, Case)> {
    let of = |problem: Problem, sequences: &[[usize; 2]], mask| {
        let case = Case { order: Order::Bshd, seed: 1, ..Case::new(problem, mask) };
        case.with_lengths(CaseLengths::new(sequences.to_vec()))
    };
    let gaps = |case: Case, gaps| {
        let lengths = case.lengths.expect("a case of this file");
        case.with_lengths(CaseLengths { gaps, ..lengths })
    };
    let d256 = Problem { heads_q: 4, heads_kv: 1, head_dim: 256, ..PROBLEM };
    let d32 = Problem { head_dim: 32, dtype: Dtype::F16, ..PROBLEM };
    let d128 = Problem { head_dim: 128, dtype: Dtype::F16, ..PROBLEM };
    let window = Mask::Window { left: Some(60), right: Some(10) };
    let mixed = [[130, 257], [0, 40], [1, 1], [300, 300], [64, 0], [65, 129], [2, 500]];
    let all = |case| Case { alibi: Alibi::PerItem, sinks: Sinks::PerHead, softcap: Some(10.0), dropout: 0.1, ..case };
    vec![
        ("ends of both sides apart", of(d256, &[[0, 253], [120, 174], [84, 84], [0, 307]], Mask::None)),
        ("one key each", Case { input_std: 3.0, ..of(d32, &[[76, 1], [34, 1], [146, 1]], Mask::Causal) }),
        ("keys without queries", of(PROBLEM, &[[150, 100], [0, 100], [150, 100]], Mask::None)),
        ("no sequence", of(PROBLEM, &[], Mask::Causal)),
        ("only empty sequences", of(PROBLEM, &[[0, 0], [0, 0], [0, 0]], Mask::None)),
        ("one token in all", of(d128, &[[0, 0], [1, 1], [0, 0]], Mask::Causal)),
        ("no queries at all", of(d128, &[[0, 70], [0, 200]], Mask::None)),
        ("no keys at all", of(d128, &[[70, 0], [200, 0]], Mask::None)),
        ("mixed", of(PROBLEM, &mixed, Mask::Causal)),
        ("mixed, without a mask", of(d128, &mixed, Mask::None)),
        ("mixed, a window", of(d256, &mixed, window)),
        ("mixed, with everything", all(of(PROBLEM, &mixed, Mask::Causal))),
        ("mixed, with everything, head dim 128", all(of(d128, &mixed, window))),
        ("mixed, keys that do not count", gaps(of(d128, &mixed, Mask::Causal), Gaps::Used)),
        ("mixed, slots", gaps(of(PROBLEM, &mixed, Mask::Causal), Gaps::Slots)),
        ("mixed, slots, with everything", gaps(all(of(d256, &mixed, Mask::Causal)), Gaps::Slots)),
        ("more sequences than CTAs", of(d32, &[[3, 5]; 300], Mask::Causal)),
        ("one huge among many of one", {
            let mut sequences = [[1, 1]; 40];
            sequences[17] = [700, 900];
            of(d128, &sequences, Mask::Causal)
        }),
    ]
}

/// Returns a large case that broke another library. The reference takes minutes on a few cores.
#[allow(dead_code)]
pub fn large() -> Case {
    let problem = Problem { heads_q: 4, heads_kv: 1, head_dim: 256, ..PROBLEM };
    let case = Case { order: Order::Bshd, seed: 1, ..Case::new(problem, Mask::None) };
    case.with_lengths(CaseLengths::new(vec![[0, 2538], [1208, 1742], [840, 840], [0, 3072]]))
}

/// Returns a row of every head of a tensor in the case's layout, as bits.
fn rows_of(case: &Case, data: &[bf16], shape: [usize; 4], rows: &Range<usize>) -> Vec<u16> {
    let layout = case.layout(shape);
    let mut bits = Vec::new();
    for (head, row) in (0..shape[1]).flat_map(|head| rows.clone().map(move |row| (head, row))) {
        let start = layout.offset(0, head, row);
        bits.extend(data[start..start + shape[3]].iter().map(|x| x.to_bits()));
    }
    bits
}

/// Returns some rows of every head of a tensor, in the layout of the case that has these alone.
fn narrow(case: &Case, data: &[bf16], shape: [usize; 4], rows: &Range<usize>) -> Vec<bf16> {
    let bits = rows_of(case, data, shape, rows);
    let (heads, len, d) = (shape[1], rows.len(), shape[3]);
    let layout = case.layout([1, heads, len, d]);
    let mut narrow = vec![bf16::ZERO; bits.len()];
    for (index, bits) in bits.chunks_exact(d).enumerate() {
        let start = layout.offset(0, index / len, index % len);
        narrow[start..start + d].iter_mut().zip(bits).for_each(|(x, &bits)| *x = bf16::from_bits(bits));
    }
    narrow
}

/// Returns some rows of every head of an array of one f32 for each row, as bits.
fn line_of(line: &[f32], heads: usize, rows: &Range<usize>) -> Vec<u32> {
    let all = line.len() / heads;
    let of_head = |head: usize| line[head * all..][rows.clone()].iter().map(|x| x.to_bits());
    (0..heads).flat_map(of_head).collect()
}

/// Returns the rows of each sequence of a case without gaps.
fn places(case: &Case) -> Vec<[Range<usize>; 2]> {
    let (mut q, mut k) = (0, 0);
    let lengths = case.lengths.expect("a case with lengths");
    let place = |&[m, n]: &[usize; 2]| {
        let rows = [q..q + m, k..k + n];
        (q, k) = (q + m, k + n);
        rows
    };
    lengths.sequences.iter().map(place).collect()
}

/// Runs both passes of the same data.
fn run<B: Backend>(
    backend: &B,
    case: &Case,
    data: &BackwardData<bf16>,
) -> (CaseOutput<bf16>, CaseGradients<bf16>, Vec<u32>) {
    let output = case.output(backend, &data.inputs).unwrap();
    let gradients = case.gradients(backend, data, Determinism::Exact).unwrap();
    let total = ferroflash::cases::TotalData { inputs: data.inputs.clone(), lse: data.lse.clone() };
    let total = case.total(backend, &total).unwrap();
    assert!(output.untouched && gradients.untouched && total.untouched, "{case}");
    (output, gradients, total.bits())
}

/// Checks that the bits of each sequence are those of running it alone, whatever is before and behind it: O, LSE, the
/// gradients of an exact pass, and total attention.
pub fn alone<B: Backend>(backend: &B) {
    let sequences = [[130, 257], [0, 40], [1, 1], [300, 300], [64, 0], [65, 129], [2, 500]];
    for (head_dim, mask) in [(64, Mask::Causal), (128, Mask::None), (128, Mask::Causal), (256, Mask::Causal)] {
        let problem = Problem { head_dim, ..PROBLEM };
        // An even seed gives the hint of the longest, so that plans of one sequence differ from those of all. This one
        // is odd.
        let whole = Case { seed: 3, order: Order::Bshd, ..Case::new(problem, mask) }
            .with_lengths(CaseLengths::new(sequences.to_vec()));
        let data: BackwardData<bf16> = whole.backward_data(backend).unwrap();
        let (output, gradients, total) = run(backend, &whole, &data);
        for (rows, sequence) in places(&whole).into_iter().zip(sequences) {
            let [of_q, of_k] = &rows;
            let one = whole.with_lengths(CaseLengths::new(vec![sequence]));
            let (q_shape, kv_shape) = (whole.problem.q_shape(), whole.problem.kv_shape());
            let narrow_q = |x: &[bf16]| narrow(&whole, x, q_shape, of_q);
            let narrow_k = |x: &[bf16]| narrow(&whole, x, kv_shape, of_k);
            let floats = |line: &[f32]| line_of(line, 4, of_q).into_iter().map(f32::from_bits).collect::<Vec<f32>>();
            let [q, k, v] = &data.inputs;
            let one_data = BackwardData {
                inputs: [narrow_q(q), narrow_k(k), narrow_k(v)],
                o: narrow_q(&data.o),
                lse: floats(&data.lse),
                d_o: narrow_q(&data.d_o),
                d_lse: data.d_lse.as_deref().map(floats),
            };
            let (one_output, one_gradients, one_total) = run(backend, &one, &one_data);
            let all_q = 0..sequence[0];
            let all_k = 0..sequence[1];
            let (one_q, one_kv) = (one.problem.q_shape(), one.problem.kv_shape());
            assert!(
                rows_of(&whole, &output.o, q_shape, of_q) == rows_of(&one, &one_output.o, one_q, &all_q),
                "O of {sequence:?} in {whole}"
            );
            assert!(line_of(&output.lse, 4, of_q) == line_of(&one_output.lse, 4, &all_q), "LSE of {sequence:?}");
            let floats: Vec<f32> = total.iter().map(|&bits| f32::from_bits(bits)).collect();
            assert!(line_of(&floats, 4, of_k) == one_total, "total of {sequence:?} in {whole}");
            for (index, name) in ["dQ", "dK", "dV"].into_iter().enumerate() {
                let (shape, one_shape, of, all) =
                    if index == 0 { (q_shape, one_q, of_q, &all_q) } else { (kv_shape, one_kv, of_k, &all_k) };
                let found = rows_of(&whole, &gradients.gradients[index], shape, of);
                assert!(
                    found == rows_of(&one, &one_gradients.gradients[index], one_shape, all),
                    "{name} of {sequence:?} in {whole}"
                );
            }
        }
    }
}

/// Checks that a NaN in one sequence, and NaN in rows that belong to none, leave every other sequence unchanged.
pub fn nothing_crosses<B: Backend>(backend: &B) {
    let whole = Case { seed: 5, ..case(&[[70, 90], [33, 41], [100, 129]], Mask::Causal) };
    let data: BackwardData<bf16> = whole.backward_data(backend).unwrap();
    let clean = run(backend, &whole, &data);
    let places = places(&whole);
    let [of_q, of_k] = &places[1];
    let mut dirty = data.clone();
    let poison = |data: &mut [bf16], shape: [usize; 4], rows: &Range<usize>| {
        let layout = whole.layout(shape);
        for (head, row) in (0..shape[1]).flat_map(|head| rows.clone().map(move |row| (head, row))) {
            let start = layout.offset(0, head, row);
            data[start..start + shape[3]].fill(bf16::NAN);
        }
    };
    let (q_shape, kv_shape) = (whole.problem.q_shape(), whole.problem.kv_shape());
    let [q, k, v] = &mut dirty.inputs;
    poison(q, q_shape, of_q);
    poison(k, kv_shape, of_k);
    poison(v, kv_shape, of_k);
    poison(&mut dirty.o, q_shape, of_q);
    poison(&mut dirty.d_o, q_shape, of_q);
    for (index, lse) in dirty.lse.iter_mut().enumerate() {
        if of_q.contains(&(index % whole.problem.seqlen_q)) {
            *lse = f32::NAN;
        }
    }
    let found = run(backend, &whole, &dirty);
    for [q, k] in [&places[0], &places[2]] {
        let same =
            |a: &[bf16], b: &[bf16], shape, rows| rows_of(&whole, a, shape, rows) == rows_of(&whole, b, shape, rows);
        assert!(same(&found.0.o, &clean.0.o, q_shape, q) && line_of(&found.0.lse, 4, q) == line_of(&clean.0.lse, 4, q));
        for (index, (found, clean)) in found.1.gradients.iter().zip(&clean.1.gradients).enumerate() {
            let (shape, rows) = if index == 0 { (q_shape, q) } else { (kv_shape, k) };
            assert!(same(found, clean, shape, rows), "gradient {index}");
        }
        let floats = |bits: &[u32]| bits.iter().map(|&bits| f32::from_bits(bits)).collect::<Vec<f32>>();
        assert!(line_of(&floats(&found.2), 4, k) == line_of(&floats(&clean.2), 4, k));
    }
    assert!(found.0.o.iter().any(|x| x.is_nan()));
}

/// Checks that NaN in rows that belong to no sequence, in slots and behind keys that count, changes nothing.
pub fn gaps_are_never_read<B: Backend>(backend: &B) {
    for gaps in [Gaps::Used, Gaps::Slots] {
        let whole = Case { seed: 7, ..case(&[[70, 90], [33, 41], [0, 9], [100, 129]], Mask::Causal) };
        let lengths = CaseLengths { gaps, ..whole.lengths.expect("a case with lengths") };
        let whole = whole.with_lengths(lengths);
        let data: BackwardData<bf16> = whole.backward_data(backend).unwrap();
        let clean = run(backend, &whole, &data);
        let mut dirty = data.clone();
        let rows = whole.rows_of_gaps();
        for (index, tensor) in dirty.inputs.iter_mut().chain([&mut dirty.o, &mut dirty.d_o]).enumerate() {
            let is_q = matches!(index, 0 | 3 | 4);
            let shape = if is_q { whole.problem.q_shape() } else { whole.problem.kv_shape() };
            let layout = whole.layout(shape);
            for (head, &row) in
                (0..shape[1]).flat_map(|head| rows[usize::from(!is_q)].iter().map(move |row| (head, row)))
            {
                let start = layout.offset(0, head, row);
                tensor[start..start + shape[3]].fill(bf16::NAN);
            }
        }
        for (index, lse) in dirty.lse.iter_mut().enumerate() {
            if rows[0].contains(&(index % whole.problem.seqlen_q)) {
                *lse = f32::NAN;
            }
        }
        let found = run(backend, &whole, &dirty);
        assert!(rows[1].len() > 20);
        assert!(found.0.bits() == clean.0.bits() && found.1.bits() == clean.1.bits() && found.2 == clean.2, "{gaps:?}");
        // What belongs to no sequence is 0.
        let [o, dk] = [&found.0.o, &found.1.gradients[1]];
        for (tensor, shape, rows) in [(o, whole.problem.q_shape(), &rows[0]), (dk, whole.problem.kv_shape(), &rows[1])]
        {
            assert!(rows.iter().all(|&row| rows_of(&whole, tensor, shape, &(row..row + 1)).iter().all(|&x| x == 0)));
        }
    }
}

/// Checks that a permutation of the sequences permutes the bits.
pub fn permutations_permute<B: Backend>(backend: &B) {
    let sequences = [[70, 90], [33, 41], [0, 9], [100, 129], [5, 300]];
    let order = [3, 0, 4, 2, 1];
    let permuted = order.map(|index| sequences[index]);
    let [a, b] = [sequences, permuted].map(|sequences| Case { seed: 9, ..case(&sequences, Mask::Causal) });
    let data: BackwardData<bf16> = a.backward_data(backend).unwrap();
    let (of_a, of_b) = (places(&a), places(&b));
    let move_rows = |data: &[bf16], shape: [usize; 4], side: usize| {
        let mut moved = data.to_vec();
        let layout = a.layout(shape);
        for (to, &from) in order.iter().enumerate() {
            let (to, from) = (&of_b[to][side], &of_a[from][side]);
            for (head, row) in (0..shape[1]).flat_map(|head| (0..from.len()).map(move |row| (head, row))) {
                let [from, to] = [from, to].map(|rows| layout.offset(0, head, rows.start + row));
                moved[to..to + shape[3]].copy_from_slice(&data[from..from + shape[3]]);
            }
        }
        moved
    };
    let move_line = |line: &[f32], side: usize| {
        let (mut moved, all) = (line.to_vec(), line.len() / 4);
        for (to, &from) in order.iter().enumerate() {
            let (to, from) = (of_b[to][side].clone(), of_a[from][side].clone());
            for head in 0..4 {
                let start = head * all;
                moved[start + to.start..start + to.end].copy_from_slice(&line[start + from.start..start + from.end]);
            }
        }
        moved
    };
    let (q_shape, kv_shape) = (a.problem.q_shape(), a.problem.kv_shape());
    let [q, k, v] = &data.inputs;
    let moved = BackwardData {
        inputs: [move_rows(q, q_shape, 0), move_rows(k, kv_shape, 1), move_rows(v, kv_shape, 1)],
        o: move_rows(&data.o, q_shape, 0),
        lse: move_line(&data.lse, 0),
        d_o: move_rows(&data.d_o, q_shape, 0),
        d_lse: data.d_lse.as_deref().map(|line| move_line(line, 0)),
    };
    let (found_a, found_b) = (run(backend, &a, &data), run(backend, &b, &moved));
    let bits = |x: &[bf16]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert!(bits(&move_rows(&found_a.0.o, q_shape, 0)) == bits(&found_b.0.o));
    for (index, (a, b)) in found_a.1.gradients.iter().zip(&found_b.1.gradients).enumerate() {
        let (shape, side) = if index == 0 { (q_shape, 0) } else { (kv_shape, 1) };
        assert!(bits(&move_rows(a, shape, side)) == bits(b), "gradient {index}");
    }
}
