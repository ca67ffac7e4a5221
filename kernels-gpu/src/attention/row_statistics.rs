//! What the backward pass needs of each query row: where its exponents start, and delta.

use core::f32::consts::LOG2_E;

/// What a row's exponents add: its LSE in base 2, negative, so that P = 2^(s·scale·log₂e + this). A row without a live
/// key gets −∞, and so P = 0.
#[inline(always)]
pub fn exponent_offset(lse: f32) -> f32 {
    if lse == f32::NEG_INFINITY { lse } else { -lse * LOG2_E }
}

/// delta = rowsum(dO∘O) − dLSE: dS = P∘(dP − delta), because ∂LSE/∂S = P.
#[inline(always)]
pub fn delta(dot: f32, d_lse: f32) -> f32 {
    dot - d_lse
}
