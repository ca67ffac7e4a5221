//! Pure values that everything else is made of. Nothing here imports from another folder.

pub mod constants;
pub mod divisor;
pub mod places;
pub mod sequence;
pub mod shape;
pub mod tensor;
