//! Attention by candle's own operations.

use candle_core::{D, DType, Device, Result, Tensor};
use ferroflash_candle::Mask;

/// Returns O (batch, seqlen, heads, head_dim) and the LSE (batch, heads, seqlen) of f32 tensors, with the scale
/// 1/√head_dim. If `rounded` is a dtype, every result is rounded to it, forward and backward.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: Mask, rounded: Option<DType>) -> Result<(Tensor, Tensor)> {
    let round = |tensor: Tensor| match rounded {
        Some(dtype) => tensor.to_dtype(dtype)?.to_dtype(DType::F32),
        None => Ok(tensor),
    };
    let (_, seqlen_q, heads, head_dim) = q.dims4()?;
    let seqlen_k = k.dim(1)?;
    let live = live(seqlen_q, seqlen_k, mask, q.device())?;
    let q = q.transpose(1, 2)?.contiguous()?;
    let (k, v) = (repeated(k, heads)?, repeated(v, heads)?);

    let scores = round(q.matmul(&k.transpose(2, 3)?)?)?;
    let scores = round((scores / (head_dim as f64).sqrt())?)?;
    let hidden = ((&live - 1.)? * 1e30)?;
    let max = scores.broadcast_mul(&live)?.broadcast_add(&hidden)?.max_keepdim(D::Minus1)?.detach();
    // Masked scores become the maximum, whose exponential can't overflow, and are then multiplied by 0.
    let shifted = scores.broadcast_sub(&max)?.broadcast_mul(&live)?;
    let exponentials = shifted.exp()?.broadcast_mul(&live)?;
    let sum = exponentials.sum_keepdim(D::Minus1)?;
    // A row without keys has the sum 0.
    let empty = live.sum_keepdim(1)?.eq(0.)?.to_dtype(DType::F32)?;
    let weights = round(exponentials.broadcast_div(&sum.broadcast_add(&empty)?)?)?;
    let o = round(weights.matmul(&v)?)?;
    let lse = (max + sum.log()?)?.squeeze(D::Minus1)?;
    Ok((o.transpose(1, 2)?, lse))
}

/// Returns (batch, seqlen, heads, head_dim) as (batch, `heads`, seqlen, head_dim), contiguous.
pub fn repeated(tensor: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, seqlen, heads_kv, head_dim) = tensor.dims4()?;
    let group = heads / heads_kv;
    let tensor = tensor.transpose(1, 2)?.unsqueeze(2)?;
    let tensor = tensor.broadcast_as((batch, heads_kv, group, seqlen, head_dim))?.contiguous()?;
    tensor.reshape((batch, heads, seqlen, head_dim))
}

/// Returns 1 where a query attends to a key, and 0 elsewhere, f32 (seqlen_q, seqlen_k).
pub fn live(seqlen_q: usize, seqlen_k: usize, mask: Mask, device: &Device) -> Result<Tensor> {
    let (left, right) = match mask {
        Mask::None => (None, None),
        Mask::Causal => (None, Some(0)),
        Mask::Window { left, right } => (left, right),
        other => candle_core::bail!("no such mask here: {other:?}"),
    };
    let offset = seqlen_k as i64 - seqlen_q as i64;
    let attends = |i: i64, j: i64| {
        let distance = j - (i + offset);
        left.is_none_or(|left| -i64::from(left) <= distance) && right.is_none_or(|right| distance <= i64::from(right))
    };
    let rows = (0..seqlen_q as i64).flat_map(|i| (0..seqlen_k as i64).map(move |j| (i, j)));
    let data = rows.map(|(i, j)| f32::from(u8::from(attends(i, j)))).collect();
    Tensor::from_vec(data, (seqlen_q, seqlen_k), device)
}
