//! Lengths of one batch item.

/// Lengths of one batch item. Masks are aligned to its end: the place of query row `i` among the keys is
/// i + seqlen_k − seqlen_q.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    pub seqlen_q: u32,
    pub seqlen_k: u32,
}

impl Sequence {
    /// Returns the place of query row `i` among the keys. For a row of padding, from seqlen_q on, it may wrap; no
    /// result of such a row is stored.
    #[inline(always)]
    pub fn place(&self, i: u32) -> i32 {
        (i as i32).wrapping_add(self.seqlen_k as i32 - self.seqlen_q as i32)
    }
    /// Returns the query row whose place is key `j`. There may be no such row. For a key of padding, from seqlen_k on,
    /// it may wrap; no result of such a key is stored.
    #[inline(always)]
    pub fn row(&self, j: u32) -> i32 {
        (j as i32).wrapping_sub(self.seqlen_k as i32 - self.seqlen_q as i32)
    }
}
