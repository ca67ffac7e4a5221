//! Tests with dropout that both machines must pass.

use ferroflash::cases::{Case, CaseOutput};
use ferroflash::{Backend, BackwardInputs, Dtype, Mask, Operand, OptionalInputs, Problem, Tensor, bf16, dropout_mask};

/// Returns (name, case): the shapes of [`super::named`], with more and less dropout.
pub fn named() -> Vec<(String, Case)> {
    let small = super::named().into_iter().filter(|(_, case)| case.problem.seqlen_q <= 1024);
    small
        .zip([0.1, 0.5, 0.9].into_iter().cycle())
        .map(|((name, case), dropout)| (format!("{name}, dropout {dropout}"), Case { dropout, seed: 1, ..case }))
        .collect()
}

/// Checks that the kernels drop the weights of `dropout_mask`. With Q = 0 every weight of a row is the same. V and dO
/// are rows of unit matrices and show the weights one by one, in O and in dV.
pub fn mask_is_recovered<B: Backend>(backend: &B, head_dim: usize, mask: Mask) {
    let problem =
        Problem { batch: 2, heads_q: 2, heads_kv: 1, seqlen_q: 150, seqlen_k: 210, head_dim, dtype: Dtype::Bf16 };
    let case = Case { dropout: 0.3, seed: 0x1234_5678_9abc, ..Case::new(problem, mask) };
    let kept = dropout_mask(&problem, &case.dropped()).unwrap();
    let live = |i: usize, j: usize| mask == Mask::None || j + 150 <= i + 210;
    let unit = |seqlen: usize, first: usize, row: usize, d: usize| row % seqlen == first + d;
    let (q_len, kv_len) = (2 * 2 * 150 * head_dim, 2 * 210 * head_dim);
    for first in (0..210).step_by(head_dim) {
        let rows = |seqlen, len: usize| -> Vec<bf16> {
            let one = |at: usize| unit(seqlen, first, at / head_dim, at % head_dim);
            (0..len).map(|at| if one(at) { bf16::ONE } else { bf16::ZERO }).collect()
        };
        let inputs = [vec![bf16::ZERO; q_len], vec![bf16::ZERO; kv_len], rows(210, kv_len)];
        let output = case.output(backend, &inputs).unwrap();
        for (row, o) in output.o.chunks_exact(head_dim).enumerate() {
            for (d, o) in o.iter().enumerate().take_while(|(d, _)| first + d < 210) {
                let (i, j) = (row % 150, first + d);
                let expected = kept[row * 210 + j] && live(i, j);
                assert_eq!(o.to_f32() != 0.0, expected, "head {}, query {i}, key {j}", row / 150);
            }
        }
        // Column d of a key's dV has its weight for query first + d, summed over the heads of the group, so one head is
        // checked at a time.
        for head in 0..2 {
            let mut d_o = rows(150, q_len);
            for (row, line) in d_o.chunks_exact_mut(head_dim).enumerate() {
                if row / 150 % 2 != head {
                    line.fill(bf16::ZERO);
                }
            }
            let dv = gradient_of_v(backend, &case, &inputs, &output, &d_o);
            for (row, dv) in dv.chunks_exact(head_dim).enumerate() {
                for (d, dv) in dv.iter().enumerate().take_while(|(d, _)| first + d < 150) {
                    let (batch, i, j) = (row / 210, first + d, row % 210);
                    let expected = kept[((batch * 2 + head) * 150 + i) * 210 + j] && live(i, j);
                    assert_eq!(dv.to_f32() != 0.0, expected, "batch {batch}, head {head}, query {i}, key {j}, dV");
                }
            }
        }
    }
}

fn gradient_of_v<B: Backend>(
    backend: &B,
    case: &Case,
    [q, k, v]: &[Vec<bf16>; 3],
    output: &CaseOutput<bf16>,
    d_o: &[bf16],
) -> Vec<bf16> {
    let (of_q, of_kv) = (case.problem.q_shape(), case.problem.kv_shape());
    let upload = |operand, x: &[bf16]| backend.upload(operand, x).unwrap();
    let (q, k, v) = (upload(Operand::Q, q), upload(Operand::K, k), upload(Operand::V, v));
    let (o, d_o) = (upload(Operand::O, &output.o), upload(Operand::DO, d_o));
    let lse = backend.upload(Operand::Lse, &output.lse).unwrap();
    let inputs = BackwardInputs {
        q: Tensor::bhsd(B::slice(&q), of_q),
        k: Tensor::bhsd(B::slice(&k), of_kv),
        v: Tensor::bhsd(B::slice(&v), of_kv),
        o: Tensor::bhsd(B::slice(&o), of_q),
        d_o: Tensor::bhsd(B::slice(&d_o), of_q),
        lse: B::slice(&lse),
        d_lse: None,
        optional: OptionalInputs::NONE,
    };
    backend.download(&case.attention().backward(backend, inputs).unwrap().dv).unwrap()
}
