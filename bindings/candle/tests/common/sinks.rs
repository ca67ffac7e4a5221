//! Judgement of the gradient of sinks.
//!
//! A sink's gradient is −Σ exp(sink − LSE)·(ΣdO∘O − dLSE) over batch items and queries. O and the LSE are those of the
//! pass itself, which are judged on their own, so only the rounding of a sum in f32 is left.

use candle_core::{DType, Device, Result, Tensor};

use super::Judged;

/// Judges the gradient of `sinks`, f32 (heads), for O, (batch, seqlen, heads, head_dim), the LSE, (batch, heads,
/// seqlen), and their gradients. The tolerance is 10⁻⁵ of the sum of the terms' absolute values, or of 1 if that is
/// larger.
pub fn judge(sinks: &Tensor, [o, d_o]: [&Tensor; 2], [lse, d_lse]: [&Tensor; 2], found: &Tensor) -> Result<Judged> {
    let wide = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64);
    let delta = ((wide(d_o)? * wide(o)?)?.sum(3)?.transpose(1, 2)? - wide(d_lse)?)?;
    let (heads, found) = (sinks.dim(0)?, wide(found)?.to_vec1::<f64>()?);
    let weights = wide(sinks)?.reshape((1, heads, 1))?.broadcast_sub(&wide(lse)?)?.exp()?;
    let terms = (weights * delta)?.neg()?;
    let sums = |terms: &Tensor| terms.sum(2)?.sum(0)?.to_vec1::<f64>();
    let (exact, sizes) = (sums(&terms)?, sums(&terms.abs()?)?);
    let errors = found.iter().zip(&exact).map(|(found, exact)| (found - exact).abs());
    // A NaN stays one, and does not pass.
    let error = errors.fold(0.0f64, |worst, next| if next > worst || next.is_nan() { next } else { worst });
    let size = sizes.into_iter().fold(1.0, f64::max);
    let result = "gradient of the sinks".to_owned();
    Ok(Judged { result, error: error as f32, allowed: 1e-5 * size as f32 })
}
