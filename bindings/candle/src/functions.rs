//! The functions of the crate candle-flash-attn, with its names and parameters.
//!
//! They differ in three ways: they have gradients, they take tensors on the CPU too, and what ferroflash does not
//! support so far is an error that names the argument.

use candle_core::{Result, Tensor};

use crate::flash::FlashAttn;

/// Returns softmax(scale · Q·Kᵀ) · V for tensors (batch, seqlen, heads, head_dim), with the causal mask if `causal`.
///
/// The mask is aligned to the bottom right: the last query attends to every key.
///
/// # Errors
/// Errors of [`FlashAttn::forward`].
pub fn flash_attn(q: &Tensor, k: &Tensor, v: &Tensor, softmax_scale: f32, causal: bool) -> Result<Tensor> {
    masked(softmax_scale, causal).forward(q, k, v)
}

/// Returns what [`flash_attn`] does, and the log-sum-exp of each query's scaled scores, f32 (batch, heads, seqlen).
/// Both have gradients.
///
/// # Errors
/// Errors of [`FlashAttn::forward`].
pub fn flash_attn_with_lse(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    causal: bool,
) -> Result<(Tensor, Tensor)> {
    masked(softmax_scale, causal).forward_with_lse(q, k, v)
}

/// Returns attention in which query i attends to key j if
/// −`window_size_left` ≤ j − (i + seqlen_k − seqlen_q) ≤ `window_size_right`.
///
/// Bounds are those of candle-flash-attn: a bound above seqlen_k is none. If there is one bound, the other is seqlen_k.
/// That excludes keys only if there are more queries than keys; [`FlashAttn::window`] has no such bound. `None` with
/// `Some(0)` is the causal mask.
///
/// # Errors
/// Errors of [`FlashAttn::forward`].
pub fn flash_attn_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    windowed(k, softmax_scale, window_size_left, window_size_right)?.forward(q, k, v)
}

/// Returns what [`flash_attn`] does with ALiBi ([`FlashAttn::alibi_slopes`]), whose slopes are f32 (heads).
///
/// # Errors
/// Errors of [`FlashAttn::forward`].
pub fn flash_attn_alibi(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    masked(softmax_scale, causal).alibi_slopes(alibi_slopes).forward(q, k, v)
}

/// Returns what [`flash_attn_windowed`] does with ALiBi ([`FlashAttn::alibi_slopes`]), whose slopes are f32 (heads).
///
/// # Errors
/// Errors of [`FlashAttn::forward`].
pub fn flash_attn_alibi_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    windowed(k, softmax_scale, window_size_left, window_size_right)?.alibi_slopes(alibi_slopes).forward(q, k, v)
}

/// Returns what [`flash_attn_alibi_windowed`] does with bounded scores ([`FlashAttn::softcap`]). Without slopes there
/// is no ALiBi, and a `softcap` of 0 is no bound.
///
/// # Errors
/// Errors of [`FlashAttn::forward`].
#[allow(clippy::too_many_arguments)]
pub fn flash_attn_alibi_windowed_softcap(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    softcap: f32,
) -> Result<Tensor> {
    let mut attention = windowed(k, softmax_scale, window_size_left, window_size_right)?;
    if let Some(slopes) = alibi_slopes {
        attention = attention.alibi_slopes(slopes);
    }
    if softcap != 0.0 {
        attention = attention.softcap(softcap);
    }
    attention.forward(q, k, v)
}

fn masked(softmax_scale: f32, causal: bool) -> FlashAttn {
    let attention = FlashAttn::new().scale(softmax_scale);
    if causal { attention.causal() } else { attention }
}

/// Returns attention in the window that candle-flash-attn makes of these bounds.
fn windowed(k: &Tensor, softmax_scale: f32, left: Option<usize>, right: Option<usize>) -> Result<FlashAttn> {
    let seqlen_k = k.dim(1)?;
    let within = |bound: Option<usize>| bound.filter(|&keys| keys <= seqlen_k);
    let (left, right) = match (within(left), within(right)) {
        (Some(left), None) => (Some(left), Some(seqlen_k)),
        other => other,
    };
    Ok(FlashAttn::new().scale(softmax_scale).window(left, right))
}
