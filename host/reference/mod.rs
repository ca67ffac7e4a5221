//! What attention is, written for trust and not for speed: the oracle that every kernel is judged by.
//!
//! [`forward_f64`] follows the definition in f64. [`forward_plain`] is what the accuracy bar compares with: the same
//! computation with 16-bit inputs, f32 accumulation, softmax in f32 and P rounded, row by row and without tiles.
//! [`Accuracy`] is the bar itself.

mod accuracy;
mod forward;

pub use accuracy::Accuracy;
pub use forward::{Forward, Rows, forward_f64, forward_plain};
