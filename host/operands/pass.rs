//! The table of a pass: its tensors, each listed once with name, role, shape and element type.
//!
//! [`Pass::visit`] is that table. It hands each tensor and its row to a visitor, and returns the same pass with the
//! visitor's results in place of the tensors. All work on every tensor of a pass is a visitor. [`Check`](super::Check)
//! checks them and lowers them to addresses, the GPU backend also collects their streams, `attention` allocates
//! results, and `cases` uploads inputs and guards outputs.

use crate::{
    error::{Operand, Result},
    operands::Pair,
    problem::Problem,
    tensor::Layout,
};

/// Use of a tensor by a pass. Inputs may share memory with each other; an output shares memory with no other tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The pass reads the tensor.
    Input,
    /// The pass writes the tensor: a result, or the gradient of an input.
    Output,
}

/// Name and shape of a strided tensor, whose elements have the problem's dtype.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TensorRow {
    pub(crate) operand: Operand,
    pub(crate) shape: fn(&Problem) -> [usize; 4],
}

impl TensorRow {
    /// Number of elements of a contiguous tensor.
    ///
    /// # Errors
    /// [`Error::TooLarge`](crate::Error::TooLarge) if a `usize` can't hold it.
    pub(crate) fn len(&self, problem: &Problem) -> Result<usize> {
        Layout::bhsd((self.shape)(problem)).required_len()
    }
}

/// Name and length of a line: a contiguous f32 array.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LineRow {
    pub(crate) operand: Operand,
    /// Number of elements for so many items of the batch, which are sequences if lengths differ.
    pub(crate) len: fn(&Problem, usize) -> usize,
    /// The shape, as errors name it.
    pub(crate) shape: &'static str,
}

/// The rows of all tables. A new operand has one here, and one line in the table of each pass that takes it.
pub(crate) mod rows {
    use super::{LineRow, Operand, Problem, TensorRow};
    use crate::operands::packed::{kv_shape, qkv_shape};
    use crate::operands::seed_offset::WORDS;

    pub(crate) const Q: TensorRow = of_queries(Operand::Q);
    pub(crate) const K: TensorRow = of_keys(Operand::K);
    pub(crate) const V: TensorRow = of_keys(Operand::V);
    pub(crate) const O: TensorRow = of_queries(Operand::O);
    pub(crate) const Q2: TensorRow = of_queries(Operand::Q2);
    pub(crate) const K2: TensorRow = of_keys(Operand::K2);
    pub(crate) const D_O: TensorRow = of_queries(Operand::DO);
    pub(crate) const DQ: TensorRow = of_queries(Operand::Dq);
    pub(crate) const DK: TensorRow = of_keys(Operand::Dk);
    pub(crate) const DV: TensorRow = of_keys(Operand::Dv);
    pub(crate) const DKV: TensorRow = TensorRow { operand: Operand::Dkv, shape: kv_shape };
    pub(crate) const DQKV: TensorRow = TensorRow { operand: Operand::Dqkv, shape: qkv_shape };
    pub(crate) const DQ2: TensorRow = of_queries(Operand::Dq2);
    pub(crate) const DK2: TensorRow = of_keys(Operand::Dk2);
    pub(crate) const LSE: LineRow = of_rows(Operand::Lse);
    pub(crate) const D_LSE: LineRow = of_rows(Operand::DLse);
    pub(crate) const TOTAL: LineRow =
        LineRow {
            operand: Operand::Total, len: |problem, _| problem.total_len(), shape: "batch × heads_q × seqlen_k"
        };
    pub(crate) const SLOPES: LineRow = of_heads(Operand::Slopes);
    pub(crate) const SLOPES_PER_ITEM: LineRow = LineRow {
        operand: Operand::Slopes,
        len: |problem, items| items.saturating_mul(problem.heads_q),
        shape: "batch × heads_q",
    };
    pub(crate) const SINKS: LineRow = of_heads(Operand::Sinks);
    pub(crate) const D_SINKS: LineRow = of_heads(Operand::DSinks);

    /// Seed and offset of dropout, as f32 of the same memory.
    pub(crate) const SEED_OFFSET: LineRow =
        LineRow { operand: Operand::SeedOffset, len: |_, _| WORDS, shape: "seed, offset" };

    /// Lengths of sequences, as f32 of the same memory.
    pub(crate) const CUMULATIVE_Q: LineRow = of_sequences_and_end(Operand::CumulativeQ);
    pub(crate) const CUMULATIVE_K: LineRow = of_sequences_and_end(Operand::CumulativeK);
    pub(crate) const STARTS_Q: LineRow = of_sequences(Operand::StartsQ);
    pub(crate) const STARTS_K: LineRow = of_sequences(Operand::StartsK);
    pub(crate) const LENGTHS_Q: LineRow = of_sequences(Operand::LengthsQ);
    pub(crate) const LENGTHS_K: LineRow = of_sequences(Operand::LengthsK);

    const fn of_sequences(operand: Operand) -> LineRow {
        LineRow { operand, len: |_, items| items, shape: "sequences" }
    }

    const fn of_sequences_and_end(operand: Operand) -> LineRow {
        LineRow { operand, len: |_, items| items.saturating_add(1), shape: "sequences + 1" }
    }

    const fn of_heads(operand: Operand) -> LineRow {
        LineRow { operand, len: |problem, _| problem.heads_q, shape: "heads_q" }
    }

    const fn of_rows(operand: Operand) -> LineRow {
        LineRow { operand, len: |problem, _| problem.lse_len(), shape: "batch × heads_q × seqlen_q" }
    }

    const fn of_queries(operand: Operand) -> TensorRow {
        TensorRow { operand, shape: Problem::q_shape }
    }

    const fn of_keys(operand: Operand) -> TensorRow {
        TensorRow { operand, shape: Problem::kv_shape }
    }
}

/// A visitor of strided tensors that are given as `T`.
pub(crate) trait Tensors<T> {
    /// Replacement of a visited tensor.
    type To;

    fn tensor(&mut self, row: TensorRow, role: Role, from: T) -> Result<Self::To>;

    /// Visits the pair of Q and K that has these rows.
    fn pair(&mut self, rows: Pair<TensorRow>, role: Role, from: Pair<T>) -> Result<Pair<Self::To>> {
        Ok(Pair { q: self.tensor(rows.q, role, from.q)?, k: self.tensor(rows.k, role, from.k)? })
    }
}

/// A visitor of lines that are given as `L`.
pub(crate) trait Lines<L> {
    /// Replacement of a visited line.
    type To;

    fn line(&mut self, row: LineRow, role: Role, from: L) -> Result<Self::To>;

    /// Visits a line that a call may omit.
    fn optional_line(&mut self, row: LineRow, role: Role, from: Option<L>) -> Result<Option<Self::To>> {
        from.map(|from| self.line(row, role, from)).transpose()
    }
}

/// Result of visiting a tensor given as `T`.
pub(crate) type Visited<X, T> = <X as Tensors<T>>::To;
/// Result of visiting a line given as `L`.
pub(crate) type VisitedLine<X, L> = <X as Lines<L>>::To;

/// The tensors of a pass, which `X` can visit.
pub(crate) trait Pass<X> {
    /// The same pass with the visitor's results in place of its tensors.
    type Of;

    /// Hands every tensor to the visitor in the order of the table, and stops at the first error.
    fn visit(self, visitor: &mut X) -> Result<Self::Of>;
}

#[cfg(test)]
mod tests {
    use kernels_gpu::variants::Dtype;

    use super::*;
    use crate::lengths::{Integers, Lengths, Places};
    use crate::operands::{
        BackwardPair, BackwardTensors, ForwardTensors, OptionalInputs, SeedOffset, Slopes, TotalTensors,
    };

    const PROBLEM: Problem =
        Problem { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 10, seqlen_k: 30, head_dim: 8, dtype: Dtype::F16 };

    /// Visitor that notes names, roles and numbers of elements, and numbers the tensors.
    #[derive(Default)]
    struct Notes(Vec<(String, Role, usize)>);

    impl Notes {
        fn note(&mut self, operand: Operand, role: Role, len: usize) -> Result<usize> {
            self.0.push((operand.to_string(), role, len));
            Ok(self.0.len())
        }
    }

    impl Tensors<()> for Notes {
        type To = usize;

        fn tensor(&mut self, row: TensorRow, role: Role, (): ()) -> Result<usize> {
            self.note(row.operand, role, row.len(&PROBLEM)?)
        }
    }

    impl Lines<()> for Notes {
        type To = usize;

        fn line(&mut self, row: LineRow, role: Role, (): ()) -> Result<usize> {
            self.note(row.operand, role, (row.len)(&PROBLEM, PROBLEM.batch))
        }
    }

    /// Checks the table of a pass: inputs and then outputs, in two texts, each tensor with its number of elements.
    fn check(notes: &Notes, inputs: &str, outputs: &str) {
        let text = |role| {
            let of_role = notes.0.iter().filter(|note| note.1 == role);
            of_role.map(|(name, _, len)| format!("{name} {len}")).collect::<Vec<_>>().join(", ")
        };
        assert_eq!([text(Role::Input), text(Role::Output)], [inputs, outputs]);
    }

    const PAIR: Pair<()> = Pair { q: (), k: () };

    #[test]
    fn forward_lists_each_tensor_once() {
        let mut notes = Notes::default();
        let cumulative = || Places::Cumulative(Integers::of_words(()));
        let lengths = Lengths { sequences: 2, q: cumulative(), k: cumulative(), longest: None };
        let optional = OptionalInputs {
            slopes: Some(Slopes::PerItem(())),
            sinks: Some(()),
            seed_offset: Some(SeedOffset::of_words(())),
            lengths: Some(lengths),
        };
        let (workspace, workspace_bytes) = (256, 512);
        let tensors = ForwardTensors {
            q: (),
            k: (),
            second: Some(PAIR),
            v: (),
            optional,
            o: (),
            lse: Some(()),
            workspace,
            workspace_bytes,
        };
        let visited = tensors.visit(&mut notes).unwrap();
        check(
            &notes,
            "q 640, k 960, v 960, q2 640, k2 960, slopes 8, sinks 4, seed_offset 4, cu_seqlens_q 3, cu_seqlens_k 3",
            "o 640, lse 80",
        );
        let second = Some(Pair { q: 4, k: 5 });
        let optional = OptionalInputs {
            slopes: Some(Slopes::PerItem(6)),
            sinks: Some(7),
            seed_offset: Some(SeedOffset::of_words(8)),
            lengths: Some(Lengths {
                sequences: 2,
                q: Places::Cumulative(Integers::of_words(9)),
                k: Places::Cumulative(Integers::of_words(10)),
                longest: None,
            }),
        };
        let (o, lse) = (11, Some(12));
        let expected = ForwardTensors { q: 1, k: 2, v: 3, second, optional, o, lse, workspace, workspace_bytes };
        assert_eq!(visited, expected);
    }

    #[test]
    fn backward_lists_each_tensor_once() {
        let mut notes = Notes::default();
        let tensors = BackwardTensors {
            q: (),
            k: (),
            second: Some(BackwardPair { inputs: PAIR, gradients: PAIR }),
            v: (),
            o: (),
            d_o: (),
            lse: (),
            d_lse: Some(()),
            optional: OptionalInputs { slopes: Some(Slopes::PerHead(())), sinks: Some(()), ..OptionalInputs::NONE },
            dq: (),
            dk: (),
            dv: (),
            d_sinks: Some(()),
            workspace: 256,
            workspace_bytes: 512,
        };
        let visited = tensors.visit(&mut notes).unwrap();
        check(
            &notes,
            "q 640, k 960, v 960, o 640, d_o 640, lse 80, d_lse 80, slopes 4, sinks 4, q2 640, k2 960",
            "dq 640, dk 960, dv 960, d_sinks 4, dq2 640, dk2 960",
        );
        let numbers = [visited.q, visited.k, visited.v, visited.o, visited.d_o, visited.lse];
        assert_eq!((numbers, visited.d_lse), ([1, 2, 3, 4, 5, 6], Some(7)));
        assert_eq!(
            visited.optional,
            OptionalInputs { slopes: Some(Slopes::PerHead(8)), sinks: Some(9), ..OptionalInputs::NONE }
        );
        assert_eq!(([visited.dq, visited.dk, visited.dv], visited.d_sinks), ([10, 11, 12], Some(13)));
        let second = BackwardPair { inputs: Pair { q: 14, k: 15 }, gradients: Pair { q: 16, k: 17 } };
        assert_eq!((visited.second, visited.workspace, visited.workspace_bytes), (Some(second), 256, 512));
    }

    #[test]
    fn total_attention_lists_each_tensor_once() {
        let mut notes = Notes::default();
        let slopes = Some(Slopes::PerHead(()));
        let (lengths, workspace, workspace_bytes) = (None, 256, 512);
        let tensors = TotalTensors { q: (), k: (), lse: (), slopes, lengths, total: (), workspace, workspace_bytes };
        let visited = tensors.visit(&mut notes).unwrap();
        check(&notes, "q 640, k 960, lse 80, slopes 4", "total 240");
        let (slopes, lengths) = (Some(Slopes::PerHead(4)), None);
        let expected = TotalTensors { q: 1, k: 2, lse: 3, slopes, lengths, total: 5, workspace, workspace_bytes };
        assert_eq!(visited, expected);
    }
}
