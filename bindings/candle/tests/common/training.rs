//! A small language model, trained with ferroflash or with candle's own operations.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, ops};
use ferroflash_candle::{FlashAttn, Mask};

use super::{eager, values};

const BATCH: usize = 4;
const SEQLEN: usize = 48;
const VOCABULARY: usize = 31;
const WIDTH: usize = 64;
const HEADS: usize = 4;
const KEY_HEADS: usize = 2;
const HEAD_DIM: usize = WIDTH / HEADS;
pub const STEPS: usize = 50;

/// Computes attention in the model.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// ferroflash in this dtype; the rest of the model is f32.
    Flash(DType),
    /// candle's own operations in f32.
    Eager,
}

/// A model of one block: attention and a perceptron, each after a norm and with a residual.
struct Model {
    embedding: Var,
    position: Var,
    qkv: Var,
    projection: Var,
    up: Var,
    down: Var,
}

impl Model {
    fn new(device: &Device) -> Result<Self> {
        let new = |rows: usize, columns: usize, seed| {
            let values = values(&[rows, columns], seed, DType::F32, device)?;
            Var::from_tensor(&(values / (rows as f64).sqrt())?)
        };
        Ok(Model {
            embedding: new(VOCABULARY, WIDTH, 1)?,
            position: new(SEQLEN, WIDTH, 2)?,
            qkv: new(WIDTH, (HEADS + 2 * KEY_HEADS) * HEAD_DIM, 3)?,
            projection: new(WIDTH, WIDTH, 4)?,
            up: new(WIDTH, 4 * WIDTH, 5)?,
            down: new(4 * WIDTH, WIDTH, 6)?,
        })
    }

    fn variables(&self) -> Vec<Var> {
        [&self.embedding, &self.position, &self.qkv, &self.projection, &self.up, &self.down].map(Var::clone).to_vec()
    }

    /// Returns the mean negative log-likelihood of `targets`.
    fn loss(&self, tokens: &Tensor, targets: &Tensor, kind: Kind) -> Result<Tensor> {
        let x = self.embedding.index_select(tokens, 0)?.reshape((BATCH, SEQLEN, WIDTH))?;
        let x = x.broadcast_add(&self.position)?;
        let x = (&x + self.attention(&norm(&x)?, kind)?)?;
        let hidden = times(&norm(&x)?, &self.up)?.gelu()?;
        let x = (x + times(&hidden, &self.down)?)?;
        let logits = times(&norm(&x)?, &self.embedding.t()?)?.reshape((BATCH * SEQLEN, VOCABULARY))?;
        candle_nn::loss::nll(&ops::log_softmax(&logits, 1)?, targets)
    }

    fn attention(&self, x: &Tensor, kind: Kind) -> Result<Tensor> {
        let qkv = times(x, &self.qkv)?.reshape((BATCH, SEQLEN, HEADS + 2 * KEY_HEADS, HEAD_DIM))?;
        let o = match kind {
            Kind::Flash(dtype) => {
                // The three are views of one tensor.
                let [q, k, v] = heads(&qkv.to_dtype(dtype)?)?;
                FlashAttn::new().causal().forward(&q, &k, &v)?.to_dtype(DType::F32)?
            }
            Kind::Eager => {
                let [q, k, v] = heads(&qkv)?;
                let causal = eager::Options { mask: Mask::Causal, ..Default::default() };
                eager::attention(&q, &k, &v, &causal)?.0
            }
        };
        times(&o.reshape((BATCH, SEQLEN, WIDTH))?, &self.projection)
    }
}

/// Returns the parts of packed heads.
fn heads(qkv: &Tensor) -> Result<[Tensor; 3]> {
    Ok([qkv.narrow(2, 0, HEADS)?, qkv.narrow(2, HEADS, KEY_HEADS)?, qkv.narrow(2, HEADS + KEY_HEADS, KEY_HEADS)?])
}

fn norm(x: &Tensor) -> Result<Tensor> {
    x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?.sqrt()?)
}

fn times(x: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let (batch, seqlen, width) = x.dims3()?;
    x.reshape((batch * seqlen, width))?.matmul(weights)?.reshape((batch, seqlen, weights.dim(1)?))
}

/// Trains the model, and returns the loss of each step.
pub fn train(device: &Device, kind: Kind) -> Result<Vec<f32>> {
    let model = Model::new(device)?;
    let mut optimizer = AdamW::new(model.variables(), ParamsAdamW { lr: 3e-3, ..Default::default() })?;
    (0..STEPS)
        .map(|step| {
            let (tokens, targets) = batch(step, device)?;
            let loss = model.loss(&tokens, &targets, kind)?;
            optimizer.backward_step(&loss)?;
            loss.to_scalar()
        })
        .collect()
}

/// Returns sequences in which the distance of neighbours is constant. To guess a token needs attention to earlier ones.
fn batch(step: usize, device: &Device) -> Result<(Tensor, Tensor)> {
    let token = |index: usize, ahead: usize| {
        let (item, place) = (step * BATCH + index / SEQLEN, index % SEQLEN + ahead);
        ((item * 7 + place * (1 + item % 5)) % VOCABULARY) as u32
    };
    let make = |ahead| {
        let tokens = (0..BATCH * SEQLEN).map(|index| token(index, ahead)).collect::<Vec<_>>();
        Tensor::from_vec(tokens, BATCH * SEQLEN, device)
    };
    Ok((make(0)?, make(1)?))
}

/// Checks that the loss has fallen, and is the same in both runs but for the noise of 16 bits.
pub fn compare(eager: &[f32], flash: &[f32]) -> std::result::Result<(), String> {
    let (first, last) = (flash[0], flash[STEPS - 1]);
    if last.is_nan() || last > 0.7 * first {
        return Err(format!("the loss went from {first} to {last}: {flash:?}"));
    }
    let apart = eager.iter().zip(flash).map(|(eager, flash)| (eager - flash).abs() / eager).fold(0.0, f32::max);
    if apart > 0.02 {
        return Err(format!("losses are up to {apart} apart: {eager:?} and {flash:?}"));
    }
    Ok(())
}
