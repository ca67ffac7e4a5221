//! Lengths of one batch item, and where its rows lie.

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

/// Rows of one batch item in a tensor of queries, or of keys: row i has the coordinates `batch` and `first + i`.
///
/// In a dense batch these are the item's number and i. Sequences of different lengths share one tensor of `rows` rows,
/// in which a sequence may end anywhere. TMA finds ends of a tensor alone: it loads zeros beyond an extent, and stores
/// nothing there. So the host describes that tensor with `rows` rows of a batch item, but with the stride of a row as
/// the stride from one batch item to the next, and begins `rows` rows before the first element. Row i of a sequence
/// that ends at `end` and has `len` rows then has the coordinates (end, rows − len + i): the address is that of row
/// end − len + i, and the coordinate of the row reaches `rows` where the sequence ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub batch: u32,
    pub first: u32,
    pub len: u32,
}

impl Span {
    /// Returns the rows of an item of a dense batch.
    #[inline(always)]
    pub fn dense(batch: u32, len: u32) -> Self {
        Span { batch, first: 0, len }
    }
    /// Returns the rows of a sequence of `len` rows that ends at row `end` of a tensor of `rows` rows.
    #[inline(always)]
    pub fn ending(end: u32, len: u32, rows: u32) -> Self {
        Span { batch: end, first: rows.wrapping_sub(len), len }
    }
}

/// Queries and keys of one batch item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchItem {
    pub q: Span,
    pub k: Span,
}

impl BatchItem {
    /// Returns the item's lengths.
    #[inline(always)]
    pub fn sequence(&self) -> Sequence {
        Sequence { seqlen_q: self.q.len, seqlen_k: self.k.len }
    }
}
