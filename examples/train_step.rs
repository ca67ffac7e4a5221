//! Trains one attention layer from scratch, on the CPU or, with the feature `cuda`, on the GPU if there is one: `cargo
//! run --release --example train_step`.
//!
//! The task is associative recall. A sequence shows pairs, each a token made of a key and a value, and then asks for
//! the value of each key in another order. Values are drawn again for every sequence, so a question alone does not
//! determine its answer. A layer has to find the key among the earlier tokens, which is what attention does.
//!
//! ```text
//! x = embedding of a token            q, k, v = x·Wq, x·Wk, x·Wv, rounded to bf16
//! o = attention(q, k, v), causal      logits = o·Wo, over the values
//! ```
//!
//! ferroflash computes o from q, k and v, and their gradients from that of o. The rest is here, in plain f32 loops: the
//! matrices with their gradients, the loss, and Adam (arXiv 1412.6980).

use std::time::Instant;

use ferroflash::{
    Attention, Backend, BackwardInputs, Cpu, Dtype, Gradients, Mask, Operand, OptionalInputs, Problem, Result, Tensor,
    bf16,
};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};

/// Number of values a key can have.
pub const VALUES: usize = 16;
/// Number of keys. A sequence shows each once, then asks for each once.
const KEYS: usize = 72;
/// Number of tokens in a sequence: more than one tile of the kernels, and not a multiple of it.
const SEQLEN: usize = 2 * KEYS;
/// Width of an embedding.
const DIM: usize = 32;

/// Attention problem of every step. Two query heads share a key head, so Wk and Wv are half as wide as Wq.
const PROBLEM: Problem =
    Problem { batch: 3, heads_q: 2, heads_kv: 1, seqlen_q: SEQLEN, seqlen_k: SEQLEN, head_dim: 16, dtype: Dtype::Bf16 };
const LEARNING_RATE: f32 = 0.015;
const STEPS: usize = 250;

fn main() -> Result<()> {
    #[cfg(feature = "cuda")]
    match ferroflash::Cuda::new(0) {
        Ok(cuda) => return train(&cuda, STEPS).map(drop),
        Err(error) => println!("{error}; on the CPU instead"),
    }
    train(&Cpu, STEPS).map(drop)
}

/// Trains a new layer, prints its progress, and returns its score in the last step. Every step has sequences that no
/// step before had, so the score measures answers to unseen questions.
pub fn train<B: Backend>(backend: &B, steps: usize) -> Result<Score> {
    let mut rng = StdRng::seed_from_u64(1);
    let mut layer = Layer::new(&mut rng);
    println!("guessing gives a loss of {:.2}", (VALUES as f32).ln());
    let (start, mut score) = (Instant::now(), Score::default());
    for step in 1..=steps {
        score = layer.gradients(backend, &batch(&mut rng))?;
        layer.weights().into_iter().for_each(|weights| weights.update(step));
        if step == 1 || step % 50 == 0 {
            let ms = 1e3 * start.elapsed().as_secs_f64() / step as f64;
            let Score { loss, accuracy } = score;
            println!("step {step:4}: loss {loss:.4}, accuracy {:5.1} %, {ms:.2} ms a step", 100.0 * accuracy);
        }
    }
    Ok(score)
}

/// A key and its value. In a question the layer does not get the value and has to predict it.
pub struct Token {
    key: usize,
    value: usize,
    asked: bool,
}

impl Token {
    /// Returns the rows of the embedding table whose sum is the token's embedding: the key's, and the value's or that
    /// of "?".
    fn rows(&self) -> [usize; 2] {
        [self.key, KEYS + if self.asked { VALUES } else { self.value }]
    }
}

/// Returns random sequences, one after the other: every key with a value, then every key in another order, as a
/// question.
pub fn batch(rng: &mut StdRng) -> Vec<Token> {
    let mut tokens = Vec::new();
    for _ in 0..PROBLEM.batch {
        let mut pairs: Vec<[usize; 2]> = (0..KEYS).map(|key| [key, rng.random_range(0..VALUES)]).collect();
        for asked in [false, true] {
            pairs.shuffle(rng);
            tokens.extend(pairs.iter().map(|&[key, value]| Token { key, value, asked }));
        }
    }
    tokens
}

/// Quality of the answers: the mean cross-entropy, and the share of right answers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Score {
    pub loss: f32,
    pub accuracy: f32,
}

/// A matrix of weights, rows × columns, with its gradient and Adam's running means.
pub struct Weights {
    columns: usize,
    pub value: Vec<f32>,
    pub gradient: Vec<f32>,
    mean: Vec<f32>,
    square: Vec<f32>,
}

impl Weights {
    /// Returns uniformly random weights of variance 1 / `rows`.
    fn new(rng: &mut StdRng, rows: usize, columns: usize) -> Self {
        let bound = (3.0 / rows as f32).sqrt();
        let value = (0..rows * columns).map(|_| rng.random_range(-bound..bound)).collect();
        let zeros = vec![0.0; rows * columns];
        Weights { columns, value, gradient: zeros.clone(), mean: zeros.clone(), square: zeros }
    }

    /// Computes y = x·W for each row of x.
    fn forward(&self, x: &[f32]) -> Vec<f32> {
        let rows = self.value.len() / self.columns;
        let mut y = vec![0.0; x.len() / rows * self.columns];
        for (x, y) in x.chunks_exact(rows).zip(y.chunks_exact_mut(self.columns)) {
            for (x, w) in x.iter().zip(self.value.chunks_exact(self.columns)) {
                y.iter_mut().zip(w).for_each(|(y, w)| *y += x * w);
            }
        }
        y
    }

    /// Adds xᵀ·dy, from the gradient dy of y = x·W, to the gradient of W. Returns the gradient of x, dy·Wᵀ.
    fn backward(&mut self, x: &[f32], dy: &[f32]) -> Vec<f32> {
        let mut dx = Vec::with_capacity(x.len());
        for (x, dy) in x.chunks_exact(self.value.len() / self.columns).zip(dy.chunks_exact(self.columns)) {
            let rows = self.value.chunks_exact(self.columns).zip(self.gradient.chunks_exact_mut(self.columns));
            for (x, (w, dw)) in x.iter().zip(rows) {
                dx.push(w.iter().zip(dy).map(|(w, dy)| w * dy).sum());
                dw.iter_mut().zip(dy).for_each(|(dw, dy)| *dw += x * dy);
            }
        }
        dx
    }

    /// Makes Adam's step number `step`, counted from 1. Sets the gradient to 0 afterwards.
    fn update(&mut self, step: usize) {
        // The means start from 0; these factors correct for it.
        let (of_mean, of_square) = (1.0 - 0.9f32.powi(step as i32), 1.0 - 0.99f32.powi(step as i32));
        for (i, g) in self.gradient.iter_mut().enumerate() {
            self.mean[i] += 0.1 * (*g - self.mean[i]);
            self.square[i] += 0.01 * (*g * *g - self.square[i]);
            self.value[i] -= LEARNING_RATE * (self.mean[i] / of_mean) / ((self.square[i] / of_square).sqrt() + 1e-8);
            *g = 0.0;
        }
    }
}

/// Weights: the embedding table, with a row for each key, each value and "?"; Wq, Wk, Wv and Wo.
pub struct Layer {
    pub embedding: Weights,
    pub wq: Weights,
    pub wk: Weights,
    pub wv: Weights,
    pub wo: Weights,
}

impl Layer {
    pub fn new(rng: &mut StdRng) -> Self {
        let (q_width, kv_width) = (PROBLEM.heads_q * PROBLEM.head_dim, PROBLEM.heads_kv * PROBLEM.head_dim);
        Layer {
            embedding: Weights::new(rng, KEYS + VALUES + 1, DIM),
            wq: Weights::new(rng, DIM, q_width),
            wk: Weights::new(rng, DIM, kv_width),
            wv: Weights::new(rng, DIM, kv_width),
            wo: Weights::new(rng, q_width, VALUES),
        }
    }

    /// Runs forward and backward, and adds to the gradient of every weight.
    pub fn gradients<B: Backend>(&mut self, backend: &B, tokens: &[Token]) -> Result<Score> {
        let table: Vec<&[f32]> = self.embedding.value.chunks_exact(DIM).collect();
        let sum = |[a, b]: [usize; 2]| table[a].iter().zip(table[b]).map(|(a, b)| a + b);
        let x: Vec<f32> = tokens.iter().flat_map(|token| sum(token.rows())).collect();

        // A projection has one row per token, and a row consists of its heads: the order is batch, seqlen, heads,
        // head_dim.
        let bf16s = |x: Vec<f32>| -> Vec<bf16> { x.into_iter().map(bf16::from_f32).collect() };
        let (of_q, of_kv) = (PROBLEM.q_shape(), PROBLEM.kv_shape());
        let q = backend.upload(Operand::Q, &bf16s(self.wq.forward(&x)))?;
        let k = backend.upload(Operand::K, &bf16s(self.wk.forward(&x)))?;
        let v = backend.upload(Operand::V, &bf16s(self.wv.forward(&x)))?;
        let q = Tensor::bshd(B::slice(&q), of_q);
        let k = Tensor::bshd(B::slice(&k), of_kv);
        let v = Tensor::bshd(B::slice(&v), of_kv);
        let attention = Attention::new(PROBLEM).mask(Mask::Causal);
        let out = attention.forward(backend, q, k, v)?;

        // ferroflash returns tensors in the order batch, heads, seqlen, head_dim.
        let o = token_rows(&backend.download(&out.o)?, of_q);
        let (score, dlogits) = cross_entropy(&self.wo.forward(&o), tokens);
        let d_o = backend.upload(Operand::DO, &bf16s(self.wo.backward(&o, &dlogits)))?;

        let (o, d_o) = (Tensor::bhsd(B::slice(&out.o), of_q), Tensor::bshd(B::slice(&d_o), of_q));
        let lse = B::slice(out.lse.as_ref().expect("returned unless omitted"));
        let inputs = BackwardInputs { q, k, v, o, d_o, lse, d_lse: None, optional: OptionalInputs::NONE };
        let Gradients { dq, dk, dv, .. } = attention.backward(backend, inputs)?;

        // x is the input of three projections, so its gradient is the sum of three.
        for (w, gradient, shape) in [(&mut self.wq, dq, of_q), (&mut self.wk, dk, of_kv), (&mut self.wv, dv, of_kv)] {
            let dx = w.backward(&x, &token_rows(&backend.download(&gradient)?, shape));
            for (token, dx) in tokens.iter().zip(dx.chunks_exact(DIM)) {
                for row in token.rows() {
                    let d = &mut self.embedding.gradient[row * DIM..][..DIM];
                    d.iter_mut().zip(dx).for_each(|(d, dx)| *d += dx);
                }
            }
        }
        Ok(score)
    }

    /// Returns every matrix of weights, in the order of the fields.
    pub fn weights(&mut self) -> [&mut Weights; 5] {
        [&mut self.embedding, &mut self.wq, &mut self.wk, &mut self.wv, &mut self.wo]
    }
}

/// Returns the score, and the loss's gradient by the logits: (softmax − 1 at the answer) / questions for questions, and
/// 0 for other tokens.
fn cross_entropy(logits: &[f32], tokens: &[Token]) -> (Score, Vec<f32>) {
    let share = 1.0 / (PROBLEM.batch * KEYS) as f32;
    let (mut score, mut gradient) = (Score::default(), vec![0.0; logits.len()]);
    let rows = logits.chunks_exact(VALUES).zip(gradient.chunks_exact_mut(VALUES));
    for (token, (logits, gradient)) in tokens.iter().zip(rows).filter(|(token, _)| token.asked) {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let lse = max + logits.iter().map(|x| (x - max).exp()).sum::<f32>().ln();
        score.loss += share * (lse - logits[token.value]);
        score.accuracy += if logits[token.value] == max { share } else { 0.0 };
        gradient.iter_mut().zip(logits).for_each(|(d, x)| *d = share * (x - lse).exp());
        gradient[token.value] -= share;
    }
    (score, gradient)
}

/// Converts from batch, heads, seqlen, head_dim to a row of f32 for each token: batch, seqlen, heads, head_dim.
fn token_rows(x: &[bf16], [batch, heads, seqlen, head_dim]: [usize; 4]) -> Vec<f32> {
    let mut rows = Vec::with_capacity(x.len());
    for (b, s, h) in (0..batch).flat_map(|b| (0..seqlen).flat_map(move |s| (0..heads).map(move |h| (b, s, h)))) {
        rows.extend(x[((b * heads + h) * seqlen + s) * head_dim..][..head_dim].iter().map(|x| x.to_f32()));
    }
    rows
}
