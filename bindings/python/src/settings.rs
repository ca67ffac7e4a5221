//! Options of an attention as Python hands them over.

use ferroflash::{Attention, Determinism, Mask, PlanDropout, Problem};

use crate::tensor::Tensor;

/// Options of a pass.
pub struct Settings {
    /// Keys before and behind the query's place that it attends to; a negative number is no bound.
    pub window: (i64, i64),
    /// Factor of the scores; `None` is 1/√head_dim.
    pub scale: Option<f32>,
    /// Bound of the scores; `None` and 0 are no bound.
    pub softcap: Option<f32>,
    pub dropout: PlanDropout,
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
        let softcap = self.softcap.filter(|&cap| cap != 0.0);
        let attention = softcap.map_or(attention, |cap| attention.softcap(cap));
        attention.dropout(self.dropout)
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
