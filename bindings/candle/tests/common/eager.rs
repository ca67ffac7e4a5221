//! Attention by candle's own operations.

use candle_core::{D, DType, Device, Result, Tensor};
use ferroflash::{Dtype, Problem, dropout_mask};
use ferroflash_candle::{Dropout, Mask};

/// The options of attention by candle's own operations.
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub mask: Mask,
    pub softcap: Option<f32>,
    /// Slopes of ALiBi, f32 (heads) or (batch, heads).
    pub slopes: Option<Tensor>,
    /// Sinks, f32 (heads).
    pub sinks: Option<Tensor>,
    pub dropout: Dropout,
    /// The dtype to which every result is rounded, forward and backward; `None` for no rounding.
    pub rounded: Option<DType>,
}

/// Returns O (batch, seqlen, heads, head_dim) and the LSE (batch, heads, seqlen) of f32 tensors, with the scale
/// 1/√head_dim.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, options: &Options) -> Result<(Tensor, Tensor)> {
    let round = |tensor: Tensor| match options.rounded {
        Some(dtype) => tensor.to_dtype(dtype)?.to_dtype(DType::F32),
        None => Ok(tensor),
    };
    let (_, seqlen_q, heads, head_dim) = q.dims4()?;
    let seqlen_k = k.dim(1)?;
    let live = live(seqlen_q, seqlen_k, options.mask, q.device())?;
    let kept = kept(q, k, options.dropout)?;
    let q = q.transpose(1, 2)?.contiguous()?;
    let (k, v) = (repeated(k, heads)?, repeated(v, heads)?);

    let scores = round(q.matmul(&k.transpose(2, 3)?)?)?;
    let mut scores = round((scores / (head_dim as f64).sqrt())?)?;
    if let Some(cap) = options.softcap {
        scores = round(((scores / f64::from(cap))?.tanh()? * f64::from(cap))?)?;
    }
    if let Some(slopes) = &options.slopes {
        let slopes = slopes.reshape(((), heads, 1, 1))?;
        let bias = slopes.broadcast_mul(&distances(seqlen_q, seqlen_k, q.device())?)?;
        scores = round(scores.broadcast_sub(&bias)?)?;
    }
    let sinks = options.sinks.as_ref().map(|sinks| sinks.reshape((1, heads, 1, 1))).transpose()?;

    let hidden = ((&live - 1.)? * 1e30)?;
    let mut max = scores.broadcast_mul(&live)?.broadcast_add(&hidden)?.max_keepdim(D::Minus1)?.detach();
    if let Some(sinks) = &sinks {
        max = max.broadcast_maximum(&sinks.detach())?;
    }
    // Masked scores become the maximum, whose exponential can't overflow, and are then multiplied by 0.
    let shifted = scores.broadcast_sub(&max)?.broadcast_mul(&live)?;
    let exponentials = shifted.exp()?.broadcast_mul(&live)?;
    let mut sum = exponentials.sum_keepdim(D::Minus1)?;
    if let Some(sinks) = &sinks {
        sum = (sum + sinks.broadcast_sub(&max)?.exp()?)?;
    }
    // Without sinks, a row without keys has the sum 0.
    let empty = sum.eq(0.)?.to_dtype(DType::F32)?;
    let mut weights = round(exponentials.broadcast_div(&(&sum + empty)?)?)?;
    if let Some(kept) = kept {
        weights = round((weights * kept)?)?;
    }
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
    of_pairs(seqlen_q, seqlen_k, device, |distance| {
        let live = left.is_none_or(|left| -i64::from(left) <= distance)
            && right.is_none_or(|right| distance <= i64::from(right));
        f32::from(u8::from(live))
    })
}

/// Returns |j − (i + seqlen_k − seqlen_q)| of query i and key j, f32 (seqlen_q, seqlen_k).
fn distances(seqlen_q: usize, seqlen_k: usize, device: &Device) -> Result<Tensor> {
    of_pairs(seqlen_q, seqlen_k, device, |distance| distance.abs() as f32)
}

/// Returns a function of j − (i + seqlen_k − seqlen_q) for every query i and key j, f32 (seqlen_q, seqlen_k).
fn of_pairs(seqlen_q: usize, seqlen_k: usize, device: &Device, f: impl Fn(i64) -> f32) -> Result<Tensor> {
    let offset = seqlen_k as i64 - seqlen_q as i64;
    let rows = (0..seqlen_q as i64).flat_map(|i| (0..seqlen_k as i64).map(move |j| (i, j)));
    let data = rows.map(|(i, j)| f(j - (i + offset))).collect::<Vec<_>>();
    Tensor::from_vec(data, (seqlen_q, seqlen_k), device)
}

/// Returns 1 / (1 − p) for kept weights and 0 for others, f32 (batch, heads, seqlen_q, seqlen_k); `None` if all are
/// kept.
fn kept(q: &Tensor, k: &Tensor, dropout: Dropout) -> Result<Option<Tensor>> {
    if dropout.p == 0.0 {
        return Ok(None);
    }
    let (batch, seqlen_q, heads_q, head_dim) = q.dims4()?;
    let (_, seqlen_k, heads_kv, _) = k.dims4()?;
    // The dtype does not matter.
    let problem = Problem { batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, dtype: Dtype::Bf16 };
    let kept = dropout_mask(&problem, &dropout).map_err(candle_core::Error::wrap)?;
    let factor = 1.0 / (1.0 - dropout.p);
    let factors = kept.into_iter().map(|kept| if kept { factor } else { 0.0 }).collect::<Vec<_>>();
    Tensor::from_vec(factors, (batch, heads_q, seqlen_q, seqlen_k), q.device()).map(Some)
}
