//! The extents of one attention problem.

/// Extents of one attention problem, checked by the host to fit.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub batch: u32,
    pub heads_q: u32,
    pub heads_kv: u32,
    pub seqlen_q: u32,
    pub seqlen_k: u32,
    /// The tensors' own head dim; at most the variant's compiled one.
    pub head_dim: u32,
}

impl Shape {
    /// Query heads that share one key/value head.
    #[inline(always)]
    pub fn group(&self) -> u32 {
        quotient(self.heads_q, self.heads_kv)
    }
    /// The number of a key head, counted over the batch; a plan with something to do has checked that it fits.
    #[inline(always)]
    pub fn key_head(&self, batch: u32, head: u32) -> u32 {
        batch * self.heads_kv + head
    }
}

/// a / b for b ≥ 1, without the panic that a division by zero would compile to: kernels have none.
#[inline(always)]
pub fn quotient(a: u32, b: u32) -> u32 {
    a / b.max(1)
}
