//! Attention by its definition, written for trust and not for speed. It is the oracle for every kernel.
//!
//! [`forward_f64`] follows the definition in f64. [`forward_plain`] gives the error that the tolerance doubles: the
//! same computation with 16-bit inputs, f32 accumulation, softmax in f32 and P rounded, row by row and without tiles.
//! [`backward_f64`] and [`backward_plain`] are these two for the gradients, [`total_f64`] and [`total_plain`] for total
//! attention. [`Scores`] assigns scores to pairs of queries and keys, in plain and in piecewise attention. [`Accuracy`]
//! has the error and the tolerance, and [`Limits`] says up to which LSE it holds.
//!
//! Sequences of different lengths are computed one by one, each as a dense attention.
//!
//! The results are f64 and take 8 bytes an element: four times O, or four times dQ, dK and dV, and twice that in
//! between. Each thread also holds K and V of a key head and a row of scores. Unlike elsewhere in the crate, the memory
//! is not checked beforehand: the process aborts if there is too little.

mod accuracy;
mod backward;
mod forward;
mod limits;
mod rule;
mod scores;
mod sequences;
mod total_attention;

#[cfg(test)]
mod tests;

pub use crate::operands::{OptionalInputs, Pair};
pub use accuracy::{Accuracy, GradientAccuracy};
pub use backward::{Backward, backward_f64, backward_plain};
pub use forward::{Forward, Rows, forward_f64, forward_plain};
pub use limits::{Beyond, Limits, largest_lse, may_exceed};
pub use scores::Scores;
pub use total_attention::{total_f64, total_plain};
