//! Functions of the crate candle-flash-attn that ferroflash does not support so far. Each returns an error that names
//! the argument, and says what is supported.

#![allow(clippy::too_many_arguments, unused_variables)]

use candle_core::{Error, Result, Tensor};

/// Attention with sequences of different lengths, which is not supported so far.
///
/// # Errors
/// Always, naming `seqlens_q` and `seqlens_k`.
pub fn flash_attn_varlen(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    Err(varlen("flash_attn_varlen"))
}

/// Attention with sequences of different lengths in a window, which is not supported so far.
///
/// # Errors
/// Always, naming `seqlens_q` and `seqlens_k`.
pub fn flash_attn_varlen_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    Err(varlen("flash_attn_varlen_windowed"))
}

/// Attention with sequences of different lengths and a paged cache, which is not supported so far.
///
/// # Errors
/// Always, naming `block_table`.
pub fn flash_attn_varlen_paged_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    block_table: &Tensor,
    mm_prefix_ranges: Option<&Tensor>,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    page_block_size: usize,
    softcap: Option<f32>,
) -> Result<Tensor> {
    Err(Error::msg(
        "flash_attn_varlen_paged_windowed: block_table is not supported so far; flash_attn_windowed takes K and V as \
         (batch, seqlen, heads, head_dim), in any stride order",
    ))
}

/// Attention with sequences of different lengths and ALiBi, which is not supported so far.
///
/// # Errors
/// Always, naming `seqlens_q` and `seqlens_k`.
pub fn flash_attn_varlen_alibi(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    Err(varlen("flash_attn_varlen_alibi"))
}

/// Attention with sequences of different lengths and ALiBi in a window, which is not supported so far.
///
/// # Errors
/// Always, naming `seqlens_q` and `seqlens_k`.
pub fn flash_attn_varlen_alibi_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    Err(varlen("flash_attn_varlen_alibi_windowed"))
}

/// Attention with sequences of different lengths, ALiBi and a soft cap, which is not supported so far.
///
/// # Errors
/// Always, naming `seqlens_q` and `seqlens_k`.
pub fn flash_attn_varlen_alibi_windowed_softcap(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    softcap: f32,
) -> Result<Tensor> {
    Err(varlen("flash_attn_varlen_alibi_windowed_softcap"))
}

/// Returns the error for sequences of different lengths.
fn varlen(function: &str) -> Error {
    Error::msg(format!(
        "{function}: seqlens_q and seqlens_k, sequences of different lengths, are not supported so far; one length for \
         all sequences is, by {} with (batch, seqlen, heads, head_dim)",
        function.replace("_varlen", "")
    ))
}
