//! The table of a pass: its tensors, each listed once with name, role, shape and element type.
//!
//! [`Pass::visit`] is that table. It hands each tensor and its row to a visitor, and returns the same pass made of what
//! the visitor returned. Whatever is done with all tensors of a pass is a visitor: [`Check`](super::Check) checks them
//! and lowers them to addresses, the GPU backend also collects their streams, `attention` allocates results, and
//! `cases` uploads inputs and guards outputs.

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
    pub(crate) len: fn(&Problem) -> usize,
}

/// The rows of all tables. A new operand has one here, and one line in the table of each pass that takes it.
pub(crate) mod rows {
    use super::{LineRow, Operand, Problem, TensorRow};

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
    pub(crate) const DQ2: TensorRow = of_queries(Operand::Dq2);
    pub(crate) const DK2: TensorRow = of_keys(Operand::Dk2);
    pub(crate) const LSE: LineRow = LineRow { operand: Operand::Lse, len: Problem::lse_len };
    pub(crate) const D_LSE: LineRow = LineRow { operand: Operand::DLse, len: Problem::lse_len };
    pub(crate) const TOTAL: LineRow = LineRow { operand: Operand::Total, len: Problem::total_len };

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
