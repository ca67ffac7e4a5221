//! Layout of a backward pass's workspace. Its size grows with the sequence, not with its square.

use kernels_gpu::{
    attention::sequences::{Sequences as Table, padded_rows},
    ground::shape::Shape,
    params::Workspace,
    variants::BackwardVariant,
};

use crate::{error::Result, lengths::Sequences, problem::at_most};

/// Alignment in bytes of the workspace and of each region in it.
pub(crate) const WORKSPACE_ALIGNMENT: usize = 256;

/// Maximum number of rows of dQ of all heads and pairs: kernels step from any row to any other by an i32.
const MAX_ROWS: u128 = 1 << 31;

/// Offsets of the workspace's regions from its start, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct WorkspaceLayout {
    /// `neg_lse_log2` (−LSE·log₂e), f32 (batch, heads_q, rows).
    pub(crate) neg_lse_log2: usize,
    /// δ, f32 (batch, heads_q, rows).
    pub(crate) delta: usize,
    /// dQ, f32 (pairs, batch, heads_q, rows, compiled head dim).
    pub(crate) dq: usize,
    /// Numbers of finished work tiles, u32 (batch, heads_kv).
    pub(crate) tiles: usize,
    /// States of the dQ initialisation, u32 (batch, heads_kv).
    pub(crate) first_values: usize,
    /// dQ semaphores, u32 (pairs, batch, heads_q, query blocks); `None` for a fast pass.
    pub(crate) dq_semaphores: Option<usize>,
    /// Split work tiles' shares of the gradients, f32 (slots, {dK, dV}, block of keys, compiled head dim).
    pub(crate) parts: usize,
    /// Size of the whole workspace in bytes.
    pub(crate) bytes: usize,
    /// Number of semaphores in `dq_semaphores`; 0 for a fast pass.
    pub(crate) dq_semaphores_len: usize,
    /// Number of query rows of a head, padding included.
    pub(crate) rows: u32,
}

impl WorkspaceLayout {
    /// Returns the layout for a problem with something to do. `slots` is the number of parts of split work tiles, and
    /// `exact` adds the semaphores of an exact pass.
    ///
    /// # Errors
    /// [`Error::TooLarge`](crate::Error::TooLarge) for more than 2³¹ rows of dQ, the padding of each head included, or
    /// for more bytes than memory can have.
    pub(crate) fn new(variant: &BackwardVariant, shape: &Shape, slots: u32, exact: bool) -> Result<Self> {
        let rows = variant.rows(shape);
        let key_heads = shape.batch as u128 * shape.heads_kv as u128;
        Self::of_rows(variant, shape, rows, key_heads, slots, exact)
    }

    /// Returns the layout for sequences of different lengths, whose rows are those of one item.
    ///
    /// # Errors
    /// As for [`WorkspaceLayout::new`], with the padding of each sequence included.
    pub(crate) fn of_sequences(
        variant: &BackwardVariant,
        shape: &Shape,
        sequences: &Sequences,
        exact: bool,
    ) -> Result<Self> {
        let count = sequences.count as u64;
        let rows = padded_rows(shape.seqlen_q as u64, count);
        at_most("workspace_rows", rows as u128, MAX_ROWS)?;
        let key_heads = Table::items(count) as u128 * shape.heads_kv as u128;
        at_most("sequences and gaps times heads_kv", key_heads, MAX_ROWS)?;
        Self::of_rows(variant, shape, rows as u32, key_heads, 0, exact)
    }

    fn of_rows(
        variant: &BackwardVariant,
        shape: &Shape,
        rows: u32,
        key_heads: u128,
        slots: u32,
        exact: bool,
    ) -> Result<Self> {
        let heads = shape.batch as u128 * shape.heads_q as u128;
        let pairs = variant.op.pairs() as u128;
        at_most("workspace_rows", pairs * heads * rows as u128, MAX_ROWS)?;
        let dq_semaphores_len = if exact { pairs * heads * (rows / variant.block_m) as u128 } else { 0 };
        let row_bytes = heads * rows as u128 * size_of::<f32>() as u128;
        let mut end = 0;
        let mut region = |bytes: u128| {
            let start = end;
            end = (start + bytes).next_multiple_of(WORKSPACE_ALIGNMENT as u128);
            start as usize
        };
        let neg_lse_log2 = region(row_bytes);
        let delta = region(row_bytes);
        let dq = region(pairs * row_bytes * variant.head_dim as u128);
        let [tiles, first_values] = [(); 2].map(|()| region(key_heads * size_of::<u32>() as u128));
        let dq_semaphores = region(dq_semaphores_len * size_of::<u32>() as u128);
        let parts = region(slots as u128 * variant.part_bytes() as u128);
        at_most("workspace_bytes", end, isize::MAX as u128)?;
        Ok(WorkspaceLayout {
            neg_lse_log2,
            delta,
            dq,
            tiles,
            first_values,
            dq_semaphores: exact.then_some(dq_semaphores),
            parts,
            bytes: end as usize,
            dq_semaphores_len: dq_semaphores_len as usize,
            rows,
        })
    }

    /// Returns the workspace at `address`, as kernels take it.
    pub(crate) fn at(&self, address: u64) -> Workspace {
        // Wraps if an empty region begins at the end of the address space.
        let at = |offset: usize| address.wrapping_add(offset as u64);
        Workspace {
            neg_lse_log2: at(self.neg_lse_log2),
            delta: at(self.delta),
            dq: at(self.dq),
            tiles: at(self.tiles),
            first_values: at(self.first_values),
            dq_semaphores: self.dq_semaphores.map_or(0, at),
            parts: at(self.parts),
            rows: self.rows,
        }
    }
}

#[cfg(test)]
mod tests {
    use kernels_gpu::attention::any_features::{AnyFeatures, AnyMask};
    use kernels_gpu::attention::mask::Window;
    use kernels_gpu::attention::score::Shaped;
    use kernels_gpu::variants::{self, BackwardVariant, Dtype, Needed};
    use proptest::prelude::*;

    use super::*;
    use crate::error::Error;

    const SHAPE: Shape = Shape { batch: 2, heads_q: 6, heads_kv: 2, seqlen_q: 1000, seqlen_k: 300, head_dim: 72 };

    const SLOTS: u32 = 3;

    fn variant(head_dim: u32, dist_threshold: Option<i32>) -> &'static BackwardVariant {
        let features = AnyFeatures {
            mask: AnyMask::new(Window::FULL, dist_threshold),
            score: Shaped::new(1.0, None, false),
            dropout: None,
        };
        variants::backward(&Needed { dtype: Dtype::F16, head_dim, features }).unwrap()
    }

    fn layout(shape: &Shape, exact: bool) -> Result<WorkspaceLayout> {
        WorkspaceLayout::new(variant(shape.head_dim, None), shape, SLOTS, exact)
    }

    #[test]
    fn regions_follow_one_another() {
        let (fast, exact) = (layout(&SHAPE, false).unwrap(), layout(&SHAPE, true).unwrap());
        let rows = 12 * 1024;
        assert_eq!((fast.neg_lse_log2, fast.delta, fast.dq), (0, 4 * rows, 8 * rows));
        // Head dim 72 runs in 128. There are two key heads in each of two batch items.
        assert_eq!((fast.tiles, fast.rows), (8 * rows + 4 * 128 * rows, 1024));
        assert_eq!((fast.dq_semaphores, fast.dq_semaphores_len, fast.parts), (None, 0, fast.first_values + 256));
        assert_eq!(fast.first_values, fast.tiles + 256);
        // Shares of dK and dV of 128 keys.
        let parts = SLOTS as usize * 2 * 128 * 128 * 4;
        assert_eq!(fast.bytes, fast.parts + parts);
        assert_eq!((exact.dq_semaphores, exact.dq_semaphores_len), (Some(fast.parts), 12 * (1024 / 64)));
        assert_eq!(exact.parts, fast.parts + (4 * exact.dq_semaphores_len).next_multiple_of(256));
        assert_eq!(exact.bytes, exact.parts + parts);
        let base = 0x1000;
        let at = |offset: usize| base + offset as u64;
        let [delta, dq, tiles, first_values, parts] =
            [fast.delta, fast.dq, fast.tiles, fast.first_values, fast.parts].map(at);
        let expected =
            Workspace { neg_lse_log2: base, delta, dq, dq_semaphores: 0, tiles, first_values, parts, rows: 1024 };
        assert_eq!(fast.at(base), expected);
        assert_eq!(exact.at(base), Workspace { dq_semaphores: parts, parts: at(exact.parts), ..expected });
    }

    #[test]
    fn rows_have_a_limit() {
        // 128 rows per head, even with few queries.
        let most = Shape { batch: 1 << 24, heads_q: 1, heads_kv: 1, seqlen_q: 1, ..SHAPE };
        assert_eq!(layout(&most, true).unwrap().rows, 128);
        let more = Shape { batch: (1 << 24) + 1, ..most };
        let error = |value| Err(Error::TooLarge { field: "workspace_rows", value, limit: 1 << 31 });
        assert_eq!(layout(&more, false), error((1 << 31) + 128));
        // dQ of a second pair has its own rows.
        let piecewise = |batch| WorkspaceLayout::new(variant(64, Some(3)), &Shape { batch, ..most }, 0, false);
        assert!(piecewise(1 << 23).is_ok());
        assert_eq!(piecewise((1 << 23) + 1), error((1 << 31) + 256));
        let long = Shape { batch: 1, heads_q: 2, heads_kv: 1, seqlen_q: i32::MAX as u32, ..SHAPE };
        assert!(layout(&long, false).is_err());
        assert_eq!(layout(&Shape { heads_q: 1, ..long }, false).unwrap().rows, 1 << 31);
    }

    proptest! {
        #[test]
        fn regions_are_apart_aligned_and_linear(
            batch in 1..5u32, heads_kv in 1..40u32, group in 1..4u32, seqlen_q in 0..5000u32, head_dim in 1..=32u32,
            slots in 0..=132u32, exact: bool,
        ) {
            let heads = heads_kv * group;
            let shape = Shape { batch, heads_q: heads, heads_kv, seqlen_q, head_dim: 8 * head_dim, ..SHAPE };
            let variant = variant(shape.head_dim, None);
            let found = WorkspaceLayout::new(variant, &shape, slots, exact).unwrap();
            let rows = (batch * heads * found.rows) as usize;
            let dq_semaphores = found.dq_semaphores.unwrap_or(found.parts);
            for (start, bytes, end) in [
                (found.neg_lse_log2, 4 * rows, found.delta),
                (found.delta, 4 * rows, found.dq),
                (found.dq, 4 * rows * variant.head_dim as usize, found.tiles),
                (found.tiles, 4 * (batch * heads_kv) as usize, found.first_values),
                (found.first_values, 4 * (batch * heads_kv) as usize, dq_semaphores),
                (dq_semaphores, 4 * found.dq_semaphores_len, found.parts),
                (found.parts, (slots * variant.part_bytes()) as usize, found.bytes),
            ] {
                prop_assert!(start.is_multiple_of(256) && start + bytes <= end && end - start < bytes + 256);
            }
            prop_assert!(found.rows >= seqlen_q && found.rows < seqlen_q + 129 && found.rows.is_multiple_of(variant.block_m));
            prop_assert_eq!(exact, found.dq_semaphores.is_some() && found.dq_semaphores_len > 0);
        }
    }
}
