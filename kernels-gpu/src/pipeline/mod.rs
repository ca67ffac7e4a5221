//! The ring that carries K and V tiles from the producer to the consumers.

pub mod order;
pub mod ring;
