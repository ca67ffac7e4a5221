//! Options of an attention as Python hands them over, and its dropout mask.

use ferroflash::{Attention, Determinism, Dropout, Dtype, Mask, Problem};
use pyo3::{Bound, PyResult, Python, pyfunction, types::PyByteArray};

use crate::{error::exception, tensor::Tensor};

/// Options of a pass.
pub struct Settings {
    /// Keys before and behind the query's place that it attends to; a negative number is no bound.
    pub window: (i64, i64),
    /// Factor of the scores; `None` is 1/√head_dim.
    pub scale: Option<f32>,
    /// Probability, seed and offset.
    pub dropout: Option<(f32, u64, u64)>,
    pub deterministic: bool,
}

impl Settings {
    /// Returns the attention of these options over `q` and `k`.
    pub fn attention(&self, q: &Tensor, k: &Tensor) -> Attention {
        let ([batch, heads_q, seqlen_q, head_dim], [_, heads_kv, seqlen_k, _]) =
            (q.raw.layout.shape, k.raw.layout.shape);
        let problem = Problem { batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, dtype: q.dtype };
        let determinism = if self.deterministic { Determinism::Exact } else { Determinism::Fast };
        let attention = Attention::new(problem).mask(self.mask(&problem)).determinism(determinism);
        let attention = self.scale.map_or(attention, |scale| attention.scale(scale));
        let (p, seed, offset) = self.dropout.unwrap_or_default();
        attention.dropout(Dropout { p, seed, offset })
    }

    /// Returns the mask. A bound that no query reaches is none, so that the fastest kernel serves.
    fn mask(&self, problem: &Problem) -> Mask {
        let bound = |keys: i64, reach: usize| match u32::try_from(keys) {
            Ok(bound) if (bound as usize) < reach => Some(bound),
            // Negative numbers are no bound, and numbers beyond 32 bits are beyond any length.
            _ => None,
        };
        match (bound(self.window.0, problem.seqlen_k), bound(self.window.1, problem.seqlen_q)) {
            (None, None) => Mask::None,
            (None, Some(0)) => Mask::Causal,
            (left, right) => Mask::Window { left, right },
        }
    }
}

/// Returns the weights that dropout keeps, one byte each: 1 for a kept weight, (batch, heads_q, seqlen_q, seqlen_k).
#[pyfunction]
pub fn dropout_mask(
    py: Python<'_>,
    shape: (usize, usize, usize, usize),
    dropout: (f32, u64, u64),
) -> PyResult<Bound<'_, PyByteArray>> {
    let (batch, heads_q, seqlen_q, seqlen_k) = shape;
    let problem = Problem { batch, heads_q, heads_kv: 1, seqlen_q, seqlen_k, head_dim: 8, dtype: Dtype::Bf16 };
    let (p, seed, offset) = dropout;
    let kept = py.detach(|| ferroflash::dropout_mask(&problem, &Dropout { p, seed, offset })).map_err(exception)?;
    PyByteArray::new_with(py, kept.len(), |bytes| {
        for (byte, kept) in bytes.iter_mut().zip(kept) {
            *byte = u8::from(kept);
        }
        Ok(())
    })
}

/// Returns the probability that is used for `p`: `p` itself, as f32.
#[pyfunction]
pub fn dropout_probability(p: f32) -> PyResult<f32> {
    Dropout { p, seed: 0, offset: 0 }.validate().map(|()| p).map_err(exception)
}
