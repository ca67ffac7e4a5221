//! The optional inputs of attention: the slopes of ALiBi and the sinks, f32 for each query head.

use candle_core::{DType, Result, Tensor, bail};
use ferroflash as ff;

/// Returns the optional inputs for Q, K and V of this problem, contiguous and without a history.
pub(crate) fn inputs(
    problem: &ff::Problem,
    q: &Tensor,
    slopes: Option<&Tensor>,
    sinks: Option<&Tensor>,
) -> Result<ff::OptionalInputs<Tensor>> {
    let (batch, heads) = (problem.batch, problem.heads_q);
    let mut inputs = ff::OptionalInputs::NONE;
    if let Some(slopes) = slopes {
        check("alibi_slopes", slopes, q)?;
        let contiguous = slopes.detach().contiguous()?;
        inputs.slopes = match slopes.dims() {
            shape if shape == [heads] => Some(ff::Slopes::PerHead(contiguous)),
            shape if shape == [batch, heads] => Some(ff::Slopes::PerItem(contiguous)),
            shape => {
                bail!(
                    "alibi_slopes has the shape {shape:?}; (heads) or (batch, heads) is needed, as q has {:?}",
                    q.dims()
                )
            }
        };
    }
    if let Some(sinks) = sinks {
        check("sinks", sinks, q)?;
        if sinks.dims() != [heads] {
            bail!("sinks has the shape {:?}; (heads) is needed, as q has {:?}", sinks.dims(), q.dims())
        }
        inputs.sinks = Some(sinks.detach().contiguous()?);
    }
    Ok(inputs)
}

/// Checks dtype and device.
fn check(name: &str, tensor: &Tensor, q: &Tensor) -> Result<()> {
    if tensor.dtype() != DType::F32 {
        bail!("{name} is {:?}; F32 is needed, so convert it with Tensor::to_dtype", tensor.dtype())
    }
    if !tensor.device().same_device(q.device()) {
        bail!(
            "{name} is on {:?} and q on {:?}; one device is needed",
            tensor.device().location(),
            q.device().location()
        )
    }
    Ok(())
}

/// Applies `f` to each input that is there.
pub(crate) fn try_map<'a, L, U>(
    inputs: &'a ff::OptionalInputs<L>,
    mut f: impl FnMut(&'a L) -> Result<U>,
) -> Result<ff::OptionalInputs<U>> {
    let mut mapped = ff::OptionalInputs::NONE;
    mapped.slopes = match &inputs.slopes {
        None => None,
        Some(ff::Slopes::PerHead(line)) => Some(ff::Slopes::PerHead(f(line)?)),
        Some(ff::Slopes::PerItem(line)) => Some(ff::Slopes::PerItem(f(line)?)),
    };
    mapped.sinks = inputs.sinks.as_ref().map(f).transpose()?;
    Ok(mapped)
}
