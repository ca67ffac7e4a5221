//! Values of each query row that the backward pass needs: `neg_lse_log2` and δ.

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
