//! Values of each query row that the backward pass needs: `neg_lse_log2`, δ, and the row's part in the gradient of a
//! sink.

use core::f32::consts::LOG2_E;

/// Returns `neg_lse_log2` = −LSE·log₂e, which exponents add: P = 2^(s·scale·log₂e + `neg_lse_log2`). A row without a
/// valid key has −∞, and so P = 0.
#[inline(always)]
pub fn neg_lse_log2(lse: f32) -> f32 {
    if lse == f32::NEG_INFINITY { lse } else { -lse * LOG2_E }
}

/// Returns δ = rowsum(dO∘O) − dLSE, where `dot` is rowsum(dO∘O). dS = P∘(dP − δ), because ∂LSE/∂S = P.
#[inline(always)]
pub fn delta(dot: f32, d_lse: f32) -> f32 {
    dot - d_lse
}

/// Returns a row's part in the gradient of its head's sink, dS of a key whose V is 0: P∘(0 − δ). `p_sink` is the sink's
/// share of the row's softmax, exp(sink − LSE).
#[inline(always)]
pub fn sink_gradient(p_sink: f32, delta: f32) -> f32 {
    -p_sink * delta
}
