//! The builder: the options of attention, and its calls.

use candle_core::{Device, Result, Tensor, bail};
use ferroflash as ff;

use crate::{lse::Lse, op::Forward, optional, shapes, sinks};

/// Attention with its options: O = softmax(scale · Q·Kᵀ + mask) · V, and its log-sum-exp (LSE).
///
/// Tensors have the shape (batch, seqlen, heads, head_dim), and the dtype F16 or BF16. Scores, softmax, accumulators
/// and the LSE are f32. The number of query heads is a multiple of the number of key heads, and the head dim is a
/// multiple of 8 up to 256. A query that attends to no key has O = 0, and LSE = −∞ or, with sinks, the sink.
///
/// A call runs on the tensors' device: on a GPU on candle's own stream, in memory that candle allocates. Layouts are
/// taken as they are if the last dim is contiguous, all strides are multiples of 8 elements and the first element is
/// aligned to 16 bytes; other tensors are copied.
///
/// Gradients of Q, K, V and sinks flow through both results. O and the LSE are kept for the backward pass if one of
/// these is a variable or depends on one.
///
/// ```
/// use candle_core::{DType, Device, Result, Tensor, Var};
/// use ferroflash_candle::{Determinism, FlashAttn};
///
/// # fn main() -> Result<()> {
/// let tensor = |shape| Tensor::randn(0f32, 1., shape, &Device::Cpu)?.to_dtype(DType::BF16);
/// let q = Var::from_tensor(&tensor((2, 100, 8, 64))?)?;
/// let (k, v) = (tensor((2, 150, 2, 64))?, tensor((2, 150, 2, 64))?);
///
/// let attention = FlashAttn::new().causal().window(Some(64), Some(0)).determinism(Determinism::Exact);
/// let (o, lse) = attention.forward_with_lse(&q, &k, &v)?;
/// assert_eq!(o.dims(), [2, 100, 8, 64]);
/// assert_eq!(lse.dims(), [2, 8, 100]); // (batch, heads, seqlen), f32
///
/// let loss = (o.to_dtype(DType::F32)?.sqr()?.sum_all()? + lse.sum_all()?)?;
/// let gradients = loss.backward()?;
/// assert_eq!(gradients.get(&q).unwrap().dims(), q.dims());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct FlashAttn {
    scale: Option<f32>,
    mask: ff::Mask,
    softcap: Option<f32>,
    alibi_slopes: Option<Tensor>,
    sinks: Option<Tensor>,
    determinism: ff::Determinism,
    dropout: ff::Dropout,
}

impl FlashAttn {
    /// Returns attention without a mask and without dropout, with the scale 1/√head_dim and fast gradients.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the factor of the scores, which must be finite and above 0.
    pub fn scale(mut self, scale: f32) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Sets the mask, which selects the keys that a query attends to.
    pub fn mask(mut self, mask: ff::Mask) -> Self {
        self.mask = mask;
        self
    }

    /// Sets the causal mask: query i attends to key j if j ≤ i + seqlen_k − seqlen_q, so the last query attends to
    /// every key.
    pub fn causal(self) -> Self {
        self.mask(ff::Mask::Causal)
    }

    /// Sets a window as the mask: query i attends to key j if −left ≤ j − (i + seqlen_k − seqlen_q) ≤ right. `None` is
    /// no bound. A right bound of 0 is a causal window.
    pub fn window(self, left: Option<usize>, right: Option<usize>) -> Self {
        // A bound beyond every sequence is no bound.
        let bound = |bound: Option<usize>| bound.and_then(|keys| u32::try_from(keys).ok());
        self.mask(ff::Mask::Window { left: bound(left), right: bound(right) })
    }

    /// Bounds the scores: a score is cap·tanh(scale·q·k / cap), as in Gemma 2. `cap` must be finite and above 0. ALiBi
    /// and the mask apply to the bounded scores.
    pub fn softcap(mut self, cap: f32) -> Self {
        self.softcap = Some(cap);
        self
    }

    /// Adds ALiBi: slope·|i + seqlen_k − seqlen_q − j| is subtracted from the score of query i and key j. The slopes
    /// are f32, (heads_q) or (batch, heads_q), and of any sign. They are not scaled, and have no gradient.
    pub fn alibi_slopes(mut self, slopes: &Tensor) -> Self {
        self.alibi_slopes = Some(slopes.clone());
        self
    }

    /// Adds a sink to each query head, f32 (heads_q): one more logit in every row's softmax, without a value. The LSE
    /// includes it. A query that attends to no key has O = 0 and LSE = sink.
    ///
    /// Sinks have a gradient. If they are a variable or depend on one, V is copied once.
    ///
    /// ```
    /// use candle_core::{DType, Device, Result, Tensor, Var};
    /// use ferroflash_candle::FlashAttn;
    ///
    /// # fn main() -> Result<()> {
    /// let tensor = |shape| Tensor::randn(0f32, 1., shape, &Device::Cpu)?.to_dtype(DType::BF16);
    /// let (q, kv) = (tensor((2, 100, 8, 64))?, tensor((2, 100, 2, 64))?);
    /// let sinks = Var::zeros(8, DType::F32, &Device::Cpu)?;
    ///
    /// let o = FlashAttn::new().window(Some(32), Some(0)).sinks(&sinks).forward(&q, &kv, &kv)?;
    /// let gradients = o.to_dtype(DType::F32)?.sqr()?.mean_all()?.backward()?;
    /// assert_eq!(gradients.get(&sinks).unwrap().dims(), [8]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn sinks(mut self, sinks: &Tensor) -> Self {
        self.sinks = Some(sinks.clone());
        self
    }

    /// Sets whether gradients have the same bits on every run. The results of a forward pass always have.
    pub fn determinism(mut self, determinism: ff::Determinism) -> Self {
        self.determinism = determinism;
        self
    }

    /// Sets the dropout of attention weights, for training: each is dropped with the probability asked for, and kept
    /// ones are scaled in f32. Every step needs a new seed or a new offset.
    pub fn dropout(mut self, dropout: ff::Dropout) -> Self {
        self.dropout = dropout;
        self
    }

    /// Returns O, (batch, seqlen_q, heads_q, head_dim), contiguous.
    ///
    /// # Errors
    /// An error that names the argument for shapes, dtypes and options that are not supported; errors of the device.
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (forward, [q, k, v]) = self.prepare(q, k, v)?;
        let tracked = q.track_op() || k.track_op() || v.track_op();
        q.apply_op3(&k, &v, Forward { lse: tracked.then(Lse::default), ..forward })
    }

    /// Returns O, and the LSE (batch, heads_q, seqlen_q) as f32. Both have gradients.
    ///
    /// # Errors
    /// Errors of [`FlashAttn::forward`].
    pub fn forward_with_lse(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (forward, [q, k, v]) = self.prepare(q, k, v)?;
        let lse = Lse::default();
        let o = q.apply_op3(&k, &v, Forward { lse: Some(lse.clone()), ..forward })?;
        let lse = lse.of(&o)?;
        Ok((o, lse))
    }

    /// Returns the operation, which keeps no LSE, and its arguments as the kernels take them.
    fn prepare(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Forward, [Tensor; 3])> {
        match q.device() {
            Device::Cuda(_) if cfg!(not(feature = "cuda")) => {
                bail!("the tensors are on a GPU, for which ferroflash-candle needs its feature \"cuda\"")
            }
            Device::Metal(_) => bail!("the tensors are on a Metal device; NVIDIA GPUs and the CPU are supported"),
            _ => {}
        }
        let problem = shapes::problem(q, k, v)?;
        let optional = optional::inputs(&problem, q, self.alibi_slopes.as_ref(), self.sinks.as_ref())?;
        let mut attention = ff::Attention::new(problem)
            .mask(self.mask)
            .determinism(self.determinism)
            .dropout(self.dropout)
            .for_inputs(optional.kinds());
        if let Some(scale) = self.scale {
            attention = attention.scale(scale);
        }
        if let Some(cap) = self.softcap {
            attention = attention.softcap(cap);
        }
        let q = shapes::taken(q, ff::Operand::Q)?;
        let k = shapes::taken(k, ff::Operand::K)?;
        let (v, d_sinks) = match &self.sinks {
            Some(sinks) if sinks.track_op() => {
                let (v, d_sinks) = sinks::attach(v, sinks)?;
                (v, Some(d_sinks))
            }
            _ => (shapes::taken(v, ff::Operand::V)?, None),
        };
        Ok((Forward { attention, optional, lse: None, d_sinks }, [q, k, v]))
    }
}
