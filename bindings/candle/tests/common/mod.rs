//! Cases of attention that any device must pass, and their judgement.
//!
//! A case runs three times: with ferroflash, as candle's own matmul and softmax in f32, and as the same operations with
//! every result rounded to 16 bits. ferroflash's largest error against f32 may be twice that of the rounded run.

#![allow(dead_code)]

pub mod cases;
pub mod eager;
pub mod sinks;
pub mod training;

use candle_core::{DType, Device, Result, Tensor, Var};
use ferroflash_candle::FlashAttn;

use cases::{Case, Inputs, Loss, Sinks, Size, Slopes};

/// Errors of one result.
#[derive(Clone, Debug)]
pub struct Judged {
    pub result: String,
    pub error: f32,
    pub allowed: f32,
}

impl Judged {
    pub fn passes(&self) -> bool {
        self.error <= self.allowed
    }
}

/// Runs a case on a device, and judges O, the LSE and the gradient of every variable.
pub fn judge(case: &Case, device: &Device) -> Result<Vec<Judged>> {
    let computed = run(case, device, Way::Flash)?;
    let exact = run(case, device, Way::Eager)?;
    let rounded = run(case, device, Way::Rounded)?;
    let named = computed.named.into_iter().zip(exact.named).zip(rounded.named);
    let judged = named.map(|(((result, computed), (_, exact)), (_, rounded))| Judged {
        result,
        error: distance(&computed, &exact),
        allowed: 2.0 * distance(&rounded, &exact) + 1e-5,
    });
    // That of candle's own operations shows that the formula holds.
    Ok(judged.chain(computed.sinks).chain(exact.sinks).collect())
}

/// Returns the largest difference. It is NaN if there is a NaN, and infinite if the lengths differ.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    if a.len() != b.len() {
        return f32::INFINITY;
    }
    let difference = |(a, b): (&f32, &f32)| if a == b { 0.0 } else { (a - b).abs() };
    a.iter().zip(b).map(difference).fold(0.0, |worst, next| if next > worst || next.is_nan() { next } else { worst })
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Flash,
    Eager,
    Rounded,
}

/// Results of one way.
struct Results {
    /// O, the LSE, and the gradients of Q, K and V, each with its name.
    named: Vec<(String, Vec<f32>)>,
    /// The gradient of the sinks, if they have one.
    sinks: Option<Judged>,
}

/// Computes everything in one way.
fn run(case: &Case, device: &Device, way: Way) -> Result<Results> {
    let dtype = if way == Way::Eager { DType::F32 } else { case.dtype };
    let variable = |tensor: Tensor| Var::from_tensor(&tensor.to_dtype(dtype)?);
    let variables = variables(case, device)?.into_iter().map(variable).collect::<Result<Vec<_>>>()?;
    let tensors = variables.iter().map(|variable| match way {
        Way::Rounded => variable.to_dtype(DType::F32),
        _ => Ok(variable.as_tensor().clone()),
    });
    let [q, k, v] = views(case, &tensors.collect::<Result<Vec<_>>>()?)?;
    let slopes = slopes(case, device)?;
    let variable = Var::from_tensor(&values(&[2 * case.size.heads_q], 4, DType::F32, device)?)?;
    let sinks = sinks(case, &variable)?;

    let (o, lse) = match way {
        Way::Flash => {
            let mut attention = FlashAttn::new().mask(case.mask).dropout(case.dropout);
            if let Some(cap) = case.softcap {
                attention = attention.softcap(cap);
            }
            if let Some(slopes) = &slopes {
                attention = attention.alibi_slopes(slopes);
            }
            if let Some(sinks) = &sinks {
                attention = attention.sinks(sinks);
            }
            attention.forward_with_lse(&q, &k, &v)?
        }
        Way::Eager | Way::Rounded => {
            let Case { mask, softcap, dropout, .. } = *case;
            let rounded = (way == Way::Rounded).then_some(case.dtype);
            let sinks = sinks.clone();
            eager::attention(&q, &k, &v, &eager::Options { mask, softcap, slopes, sinks, dropout, rounded })?
        }
    };
    let weights = |tensor: &Tensor, seed| values(tensor.dims(), seed, case.dtype, device);
    let d_o = match case.loss {
        Loss::Output | Loss::Both => weights(&o, 11)?,
        Loss::Sum => o.ones_like()?.to_dtype(DType::F32)?,
        Loss::Lse => o.zeros_like()?.to_dtype(DType::F32)?,
    };
    let d_lse = match case.loss {
        Loss::Lse | Loss::Both => weights(&lse, 12)?,
        Loss::Output | Loss::Sum => lse.zeros_like()?,
    };
    let of_o = |o: &Tensor| (o.to_dtype(DType::F32)? * &d_o)?.sum_all();
    let of_lse = |lse: &Tensor| (lse * &d_lse)?.sum_all();
    let loss = match case.loss {
        Loss::Output => of_o(&o)?,
        Loss::Sum => o.sum_all()?,
        Loss::Lse => of_lse(&lse)?,
        Loss::Both => (of_o(&o)? + of_lse(&lse)?)?,
    };
    let gradients = loss.backward()?;

    let mut named = vec![("o".to_owned(), flat(&o)?), ("lse".to_owned(), flat(&lse)?)];
    for (index, variable) in variables.iter().enumerate() {
        let gradient = match gradients.get(variable) {
            Some(gradient) => flat(gradient)?,
            // The LSE does not depend on V.
            None => vec![0.0; variable.elem_count()],
        };
        named.push((format!("gradient {index}"), gradient));
    }
    let gradient = gradients.get(&variable).map(|gradient| sinks_of(case, gradient)).transpose()?;
    let sinks = match (sinks, gradient) {
        (Some(sinks), Some(gradient)) => Some(sinks::judge(&sinks, [&o, &d_o], [&lse, &d_lse], &gradient)?),
        _ if matches!(case.sinks, Sinks::None | Sinks::Constant) => None,
        _ => candle_core::bail!("there is no gradient of the sinks"),
    };
    Ok(Results { named, sinks })
}

/// Returns the slopes of the case.
fn slopes(case: &Case, device: &Device) -> Result<Option<Tensor>> {
    let Size { batch, heads_q, .. } = case.size;
    let make = |shape: &[usize]| values(shape, 7, DType::F32, device)? * 0.03;
    match case.slopes {
        Slopes::None => Ok(None),
        Slopes::PerHead => make(&[heads_q]).map(Some),
        Slopes::PerItem => make(&[batch, heads_q]).map(Some),
        Slopes::Transposed => make(&[heads_q, batch])?.t().map(Some),
    }
}

/// Returns the sinks of the case.
fn sinks(case: &Case, variable: &Var) -> Result<Option<Tensor>> {
    match case.sinks {
        Sinks::None => Ok(None),
        Sinks::Constant => sinks_of(case, &variable.as_detached_tensor()).map(Some),
        Sinks::Variable | Sinks::Strided => sinks_of(case, variable).map(Some),
    }
}

/// Returns the part that the sinks are of a tensor twice as long.
fn sinks_of(case: &Case, all: &Tensor) -> Result<Tensor> {
    let heads = case.size.heads_q;
    match case.sinks {
        Sinks::Strided => all.reshape((heads, 2))?.narrow(1, 1, 1)?.squeeze(1),
        _ => all.narrow(0, 3, heads),
    }
}

/// Returns the values of the variables in f32, rounded to the case's dtype.
fn variables(case: &Case, device: &Device) -> Result<Vec<Tensor>> {
    let Size { batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim } = case.size;
    let make = |shape: &[usize], seed| values(shape, seed, case.dtype, device);
    let three = |of: &dyn Fn(usize, usize) -> Vec<usize>| {
        let (q, kv) = (of(seqlen_q, heads_q), of(seqlen_k, heads_kv));
        Ok(vec![make(&q, 1)?, make(&kv, 2)?, make(&kv, 3)?])
    };
    match case.inputs {
        Inputs::Separate => three(&|seqlen, heads| vec![batch, seqlen, heads, head_dim]),
        Inputs::HeadsFirst => three(&|seqlen, heads| vec![batch, heads, seqlen, head_dim]),
        Inputs::Packed => Ok(vec![make(&[batch, seqlen_q, 3, heads_q, head_dim], 1)?]),
        Inputs::StridedHeadDim => three(&|seqlen, heads| vec![batch, seqlen, head_dim, heads]),
        Inputs::Misaligned => three(&|seqlen, heads| vec![3 + batch * seqlen * heads * head_dim]),
        Inputs::Repeated => {
            let kv = [batch, seqlen_k, 1, head_dim];
            Ok(vec![make(&[batch, seqlen_q, heads_q, head_dim], 1)?, make(&kv, 2)?, make(&kv, 3)?])
        }
    }
}

/// Returns Q, K and V as (batch, seqlen, heads, head_dim), without a copy.
fn views(case: &Case, variables: &[Tensor]) -> Result<[Tensor; 3]> {
    let Size { batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim } = case.size;
    if case.inputs == Inputs::Packed {
        let part = |index| variables[0].narrow(2, index, 1)?.squeeze(2);
        return Ok([part(0)?, part(1)?, part(2)?]);
    }
    let view = |index: usize| {
        let (seqlen, heads) = if index == 0 { (seqlen_q, heads_q) } else { (seqlen_k, heads_kv) };
        let variable = &variables[index];
        match case.inputs {
            Inputs::HeadsFirst => variable.transpose(1, 2),
            Inputs::StridedHeadDim => variable.transpose(2, 3),
            Inputs::Misaligned => {
                variable.narrow(0, 3, variable.elem_count() - 3)?.reshape((batch, seqlen, heads, head_dim))
            }
            Inputs::Repeated => variable.broadcast_as((batch, seqlen, heads, head_dim)),
            _ => Ok(variable.clone()),
        }
    };
    Ok([view(0)?, view(1)?, view(2)?])
}

/// Returns f32 values with mean 0 and variance 1 that are the same for the same seed, rounded to `dtype`.
pub fn values(shape: &[usize], seed: u64, dtype: DType, device: &Device) -> Result<Tensor> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    // The sum of 12 uniform numbers has the variance 1.
    let data = (0..shape.iter().product()).map(|_| (0..12).map(|_| uniform()).sum::<f32>()).collect::<Vec<_>>();
    Tensor::from_vec(data, shape, &Device::Cpu)?.to_dtype(dtype)?.to_dtype(DType::F32)?.to_device(device)
}

/// Returns all elements in f32.
pub fn flat(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}
