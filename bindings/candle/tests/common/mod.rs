//! Cases of attention that any device must pass, and their judgement.
//!
//! A case runs three times: with ferroflash, as candle's own matmul and softmax in f32, and as the same operations with
//! every result rounded to 16 bits. ferroflash's largest error against f32 may be twice that of the rounded run.

#![allow(dead_code)]

pub mod eager;
pub mod training;

use candle_core::{DType, Device, Result, Tensor, Var};
use ferroflash_candle::{Dropout, FlashAttn, Mask};

/// One case: what is computed, how the inputs lie in memory, and what the loss depends on.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub name: &'static str,
    pub dtype: DType,
    pub size: Size,
    pub mask: Mask,
    pub inputs: Inputs,
    pub softcap: Option<f32>,
    pub slopes: Slopes,
    pub sinks: Sinks,
    pub dropout: Dropout,
    pub loss: Loss,
}

#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub batch: usize,
    pub heads_q: usize,
    pub heads_kv: usize,
    pub seqlen_q: usize,
    pub seqlen_k: usize,
    pub head_dim: usize,
}

/// Memory of Q, K and V.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Inputs {
    /// Three tensors (batch, seqlen, heads, head_dim).
    Separate,
    /// Three tensors (batch, heads, seqlen, head_dim).
    HeadsFirst,
    /// One tensor (batch, seqlen, 3, heads, head_dim).
    Packed,
    /// Three tensors (batch, seqlen, head_dim, heads): the last dim is strided.
    StridedHeadDim,
    /// Three tensors that begin 3 elements after the start of an allocation.
    Misaligned,
    /// K and V of one head, repeated for all by a stride of 0.
    Repeated,
}

/// Slopes of ALiBi.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Slopes {
    None,
    /// f32 (heads).
    PerHead,
    /// f32 (batch, heads).
    PerItem,
    /// f32 (batch, heads) with the dims transposed in memory.
    Transposed,
}

/// Sinks, f32 (heads).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sinks {
    None,
    /// Sinks without a gradient.
    Constant,
    /// A variable.
    Variable,
    /// Every second element of a variable.
    Strided,
}

/// What the loss depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Loss {
    /// O, each element with a weight of its own.
    Output,
    /// The sum of O, whose gradient is one number.
    Sum,
    /// The LSE.
    Lse,
    /// O and the LSE.
    Both,
}

const SIZE: Size = Size { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 136, seqlen_k: 200, head_dim: 64 };
const CASE: Case = Case {
    name: "",
    dtype: DType::BF16,
    size: SIZE,
    mask: Mask::None,
    inputs: Inputs::Separate,
    softcap: None,
    slopes: Slopes::None,
    sinks: Sinks::None,
    dropout: Dropout::NONE,
    loss: Loss::Output,
};
const SQUARE: Size = Size { heads_kv: 4, seqlen_k: 136, ..SIZE };
const DROPOUT: Dropout = Dropout { p: 0.25, seed: 3, offset: 5 };
/// Everything at once.
const ALL: Case = Case {
    dtype: DType::F16,
    mask: Mask::Window { left: Some(70), right: Some(20) },
    softcap: Some(2.0),
    slopes: Slopes::PerItem,
    sinks: Sinks::Variable,
    dropout: DROPOUT,
    loss: Loss::Both,
    ..CASE
};

/// Every case.
pub const CASES: &[Case] = &[
    Case { name: "bf16", ..CASE },
    Case { name: "bf16_causal", mask: Mask::Causal, ..CASE },
    Case { name: "f16", dtype: DType::F16, ..CASE },
    Case { name: "f16_causal", dtype: DType::F16, mask: Mask::Causal, ..CASE },
    Case { name: "packed_qkv", size: SQUARE, mask: Mask::Causal, inputs: Inputs::Packed, ..CASE },
    Case { name: "gradient_of_a_sum", mask: Mask::Causal, loss: Loss::Sum, ..CASE },
    Case { name: "strided_head_dim", inputs: Inputs::StridedHeadDim, ..CASE },
    Case { name: "misaligned", inputs: Inputs::Misaligned, ..CASE },
    Case { name: "heads_first", mask: Mask::Causal, inputs: Inputs::HeadsFirst, ..CASE },
    Case { name: "repeated_heads", inputs: Inputs::Repeated, ..CASE },
    Case { name: "one_key_head", size: Size { heads_kv: 1, ..SIZE }, mask: Mask::Causal, ..CASE },
    Case { name: "gradient_of_the_lse", mask: Mask::Causal, loss: Loss::Lse, ..CASE },
    Case { name: "gradient_of_both", dtype: DType::F16, mask: Mask::Causal, loss: Loss::Both, ..CASE },
    Case { name: "window", mask: Mask::Window { left: Some(30), right: Some(10) }, ..CASE },
    Case { name: "causal_window", mask: Mask::Window { left: Some(50), right: Some(0) }, ..CASE },
    Case { name: "rows_without_keys", size: Size { seqlen_q: 200, seqlen_k: 136, ..SIZE }, mask: Mask::Causal, ..CASE },
    Case { name: "one_query", size: Size { seqlen_q: 1, seqlen_k: 300, ..SIZE }, mask: Mask::Causal, ..CASE },
    Case { name: "head_dim_40", size: Size { head_dim: 40, ..SIZE }, mask: Mask::Causal, ..CASE },
    Case { name: "head_dim_128", size: Size { head_dim: 128, ..SIZE }, mask: Mask::Causal, ..CASE },
    Case { name: "head_dim_256", size: Size { head_dim: 256, ..SIZE }, ..CASE },
    Case { name: "dropout", mask: Mask::Causal, dropout: DROPOUT, ..CASE },
    Case { name: "softcap", softcap: Some(2.0), ..CASE },
    Case {
        name: "softcap_causal",
        dtype: DType::F16,
        mask: Mask::Causal,
        softcap: Some(2.0),
        loss: Loss::Both,
        ..CASE
    },
    Case { name: "alibi", slopes: Slopes::PerHead, ..CASE },
    Case { name: "alibi_causal", dtype: DType::F16, mask: Mask::Causal, slopes: Slopes::PerHead, ..CASE },
    Case { name: "alibi_per_item", slopes: Slopes::PerItem, loss: Loss::Both, ..CASE },
    Case {
        name: "alibi_heads_first",
        mask: Mask::Window { left: Some(30), right: Some(10) },
        inputs: Inputs::HeadsFirst,
        slopes: Slopes::Transposed,
        ..CASE
    },
    Case { name: "sinks", sinks: Sinks::Variable, ..CASE },
    Case { name: "sinks_causal", dtype: DType::F16, mask: Mask::Causal, sinks: Sinks::Variable, ..CASE },
    Case { name: "sinks_gradient_of_the_lse", sinks: Sinks::Variable, loss: Loss::Lse, ..CASE },
    Case { name: "sinks_gradient_of_both", mask: Mask::Causal, sinks: Sinks::Variable, loss: Loss::Both, ..CASE },
    Case { name: "sinks_without_gradient", mask: Mask::Causal, sinks: Sinks::Constant, ..CASE },
    Case { name: "sinks_strided", sinks: Sinks::Strided, inputs: Inputs::StridedHeadDim, ..CASE },
    Case {
        name: "sinks_rows_without_keys",
        size: Size { seqlen_q: 200, seqlen_k: 136, ..SIZE },
        mask: Mask::Causal,
        sinks: Sinks::Variable,
        loss: Loss::Both,
        ..CASE
    },
    Case { name: "sinks_packed_qkv", size: SQUARE, inputs: Inputs::Packed, sinks: Sinks::Variable, ..CASE },
    Case { name: "sinks_repeated_heads", inputs: Inputs::Repeated, sinks: Sinks::Variable, ..CASE },
    Case { name: "softcap_and_alibi", softcap: Some(2.0), slopes: Slopes::PerHead, mask: Mask::Causal, ..CASE },
    Case { name: "softcap_and_sinks", softcap: Some(2.0), sinks: Sinks::Variable, mask: Mask::Causal, ..CASE },
    Case { name: "alibi_and_sinks", slopes: Slopes::PerHead, sinks: Sinks::Variable, ..CASE },
    Case { name: "sinks_and_dropout", sinks: Sinks::Variable, dropout: DROPOUT, ..CASE },
    Case { name: "all", ..ALL },
    Case { name: "all_one_key_head", dtype: DType::BF16, size: Size { heads_kv: 1, ..SIZE }, ..ALL },
    Case { name: "all_head_dim_128", size: Size { head_dim: 128, ..SIZE }, mask: Mask::Causal, ..ALL },
    Case { name: "all_head_dim_256", size: Size { head_dim: 256, ..SIZE }, ..ALL },
];

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
    let judged =
        computed.into_iter().zip(exact).zip(rounded).map(|(((result, computed), (_, exact)), (_, rounded))| Judged {
            result,
            error: distance(&computed, &exact),
            allowed: 2.0 * distance(&rounded, &exact) + 1e-5,
        });
    Ok(judged.collect())
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

/// Returns O, the LSE and the gradients, each with its name.
fn run(case: &Case, device: &Device, way: Way) -> Result<Vec<(String, Vec<f32>)>> {
    let dtype = if way == Way::Eager { DType::F32 } else { case.dtype };
    let variable = |tensor: Tensor| Var::from_tensor(&tensor.to_dtype(dtype)?);
    let variables = variables(case, device)?.into_iter().map(variable).collect::<Result<Vec<_>>>()?;
    let tensors = variables.iter().map(|variable| match way {
        Way::Rounded => variable.to_dtype(DType::F32),
        _ => Ok(variable.as_tensor().clone()),
    });
    let [q, k, v] = views(case, &tensors.collect::<Result<Vec<_>>>()?)?;
    let slopes = slopes(case, device)?;
    let sinks = Var::from_tensor(&values(&[2 * case.size.heads_q], 4, DType::F32, device)?)?;

    let (o, lse) = match way {
        Way::Flash => {
            let mut attention = FlashAttn::new().mask(case.mask).dropout(case.dropout);
            if let Some(cap) = case.softcap {
                attention = attention.softcap(cap);
            }
            if let Some(slopes) = &slopes {
                attention = attention.alibi_slopes(slopes);
            }
            if let Some(sinks) = sinks_of(case, &sinks)? {
                attention = attention.sinks(&sinks);
            }
            attention.forward_with_lse(&q, &k, &v)?
        }
        Way::Eager | Way::Rounded => {
            let Case { mask, softcap, dropout, .. } = *case;
            let rounded = (way == Way::Rounded).then_some(case.dtype);
            let sinks = sinks_of(case, &sinks)?;
            eager::attention(&q, &k, &v, &eager::Options { mask, softcap, slopes, sinks, dropout, rounded })?
        }
    };
    let weighted = |tensor: &Tensor, seed| -> Result<Tensor> {
        (tensor.to_dtype(DType::F32)? * values(tensor.dims(), seed, case.dtype, device)?)?.sum_all()
    };
    let loss = match case.loss {
        Loss::Output => weighted(&o, 11)?,
        Loss::Sum => o.sum_all()?,
        Loss::Lse => weighted(&lse, 12)?,
        Loss::Both => (weighted(&o, 11)? + weighted(&lse, 12)?)?,
    };
    let gradients = loss.backward()?;

    let mut results = vec![("o".to_owned(), flat(&o)?), ("lse".to_owned(), flat(&lse)?)];
    for (index, variable) in variables.iter().enumerate() {
        let gradient = match gradients.get(variable) {
            Some(gradient) => flat(gradient)?,
            // The LSE does not depend on V.
            None => vec![0.0; variable.elem_count()],
        };
        results.push((format!("gradient {index}"), gradient));
    }
    match gradients.get(&sinks) {
        Some(gradient) => results.push(("gradient of the sinks".to_owned(), flat(gradient)?)),
        None if matches!(case.sinks, Sinks::None | Sinks::Constant) => {}
        None => candle_core::bail!("there is no gradient of the sinks"),
    }
    Ok(results)
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

/// Returns the sinks of the case, which are part of a variable twice as long.
fn sinks_of(case: &Case, variable: &Var) -> Result<Option<Tensor>> {
    let heads = case.size.heads_q;
    match case.sinks {
        Sinks::None => Ok(None),
        Sinks::Constant => variable.detach().narrow(0, 3, heads).map(Some),
        Sinks::Variable => variable.narrow(0, 3, heads).map(Some),
        Sinks::Strided => variable.reshape((heads, 2))?.narrow(1, 1, 1)?.squeeze(1).map(Some),
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
