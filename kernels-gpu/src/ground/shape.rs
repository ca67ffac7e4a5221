//! Extents of one attention problem.

use super::sequence::Sequence;

/// Extents of one attention problem. The host has checked that they fit.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub batch: u32,
    pub heads_q: u32,
    pub heads_kv: u32,
    pub seqlen_q: u32,
    pub seqlen_k: u32,
    /// Head dim of the tensors, at most the compiled one of the variant.
    pub head_dim: u32,
}

impl Shape {
    /// Returns the lengths of every item of a dense batch.
    #[inline(always)]
    pub fn sequence(&self) -> Sequence {
        Sequence { seqlen_q: self.seqlen_q, seqlen_k: self.seqlen_k }
    }
    /// Returns the number of query heads that share one key/value head.
    #[inline(always)]
    pub fn group(&self) -> u32 {
        quotient(self.heads_q, self.heads_kv)
    }
    /// Returns the number of a key head, counted over the batch. A plan with at least one work tile has checked that it
    /// fits.
    #[inline(always)]
    pub fn key_head(&self, batch: u32, head: u32) -> u32 {
        batch * self.heads_kv + head
    }
}

/// Returns a / b for b ≥ 1, without the panic that a division by zero would compile to. Kernels contain no panic.
#[inline(always)]
pub fn quotient(a: u32, b: u32) -> u32 {
    a / b.max(1)
}
