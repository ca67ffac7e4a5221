//! What attention is, written for trust and not for speed: the oracle that every kernel is judged by.
//!
//! [`forward_f64`] follows the definition in f64. [`forward_plain`] is what the accuracy bar compares with: the same
//! computation with 16-bit inputs, f32 accumulation, softmax in f32 and P rounded, row by row and without tiles.
//! [`backward_f64`] and [`backward_plain`] are the same two for the gradients, [`total_f64`] and [`total_plain`] for
//! total attention. [`Scores`] says which queries and keys a score comes from, in plain and in piecewise attention.
//! [`Accuracy`] is the bar itself.
//!
//! The results are f64 and take 8 bytes an element: four times O, or four times dQ, dK and dV, and in between twice
//! that. Each thread also holds K and V of a key head and a row of scores. Unlike elsewhere in the crate, nothing
//! checks beforehand that there is so much memory: the process aborts if there is too little.

mod accuracy;
mod backward;
mod forward;
mod scores;
mod total_attention;

pub use crate::operands::Pair;
pub use accuracy::{Accuracy, GradientAccuracy};
pub use backward::{Backward, backward_f64, backward_plain};
pub use forward::{Forward, Rows, forward_f64, forward_plain};
pub use scores::Scores;
pub use total_attention::{total_f64, total_plain};
