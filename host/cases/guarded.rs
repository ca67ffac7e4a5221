//! An output between canaries: what a kernel writes, and whether it wrote anything else.

use crate::element::Element;

use super::for_rows;
use crate::backend::Backend;
use crate::error::{Operand, Result};
use crate::tensor::{Layout, Tensor};

/// Elements of the canaries before and after it; the tensor is left with the least alignment allowed: 16 bytes.
const CANARY: usize = 72;
/// A NaN whose bits no kernel writes.
pub(super) const POISON: u16 = 0xffff;

/// Elements of the canaries before and after a line, which is left with the least alignment allowed: that of f32.
const CANARY_LINE: usize = 65;
/// A NaN whose bits no kernel writes.
const POISON_LINE: u32 = 0xffff_ffff;

/// Memory of an f32 array that a backend is to write, poisoned.
pub(super) struct GuardedLine<B: Backend> {
    buffer: B::Buffer<f32>,
    len: usize,
}

impl<B: Backend> GuardedLine<B> {
    pub(super) fn new(backend: &B, operand: Operand, len: usize) -> Result<Self> {
        let buffer = backend.upload(operand, &vec![f32::from_bits(POISON_LINE); len + 2 * CANARY_LINE])?;
        Ok(GuardedLine { buffer, len })
    }

    /// The array, to be written.
    pub(super) fn line(&mut self) -> B::SliceMut<'_, f32> {
        B::slice_mut(&mut self.buffer, CANARY_LINE..CANARY_LINE + self.len)
    }

    /// What was written, and whether the canaries are as they were.
    pub(super) fn content(&self, backend: &B) -> Result<(Vec<f32>, bool)> {
        let found = backend.download(&self.buffer)?;
        let end = CANARY_LINE + self.len;
        let kept = found[..CANARY_LINE].iter().chain(&found[end..]).all(|x| x.to_bits() == POISON_LINE);
        Ok((found[CANARY_LINE..end].to_vec(), kept))
    }
}

/// Memory of a tensor that a backend is to write, poisoned.
pub(super) struct Guarded<B: Backend, E: Element> {
    buffer: B::Buffer<E>,
    layout: Layout,
    len: usize,
}

impl<B: Backend, E: Element> Guarded<B, E> {
    pub(super) fn new(backend: &B, operand: Operand, layout: Layout) -> Result<Self> {
        let len = layout.required_len()?;
        let buffer = backend.upload(operand, &vec![E::from_bits(POISON); len + 2 * CANARY])?;
        Ok(Guarded { buffer, layout, len })
    }

    /// The tensor, to be written.
    pub(super) fn tensor(&mut self) -> Tensor<B::SliceMut<'_, E>> {
        Tensor { data: B::slice_mut(&mut self.buffer, CANARY..CANARY + self.len), layout: self.layout }
    }

    /// What was written, padding included, and whether canaries and padding are as they were.
    pub(super) fn content(&self, backend: &B) -> Result<(Vec<E>, bool)> {
        let found = backend.download(&self.buffer)?;
        let mut outside = vec![true; found.len()];
        for_rows(&self.layout, |start| outside[CANARY + start..][..self.layout.shape[3]].fill(false));
        let kept = found.iter().zip(outside).all(|(x, outside)| !outside || x.to_bits() == POISON);
        Ok((found[CANARY..CANARY + self.len].to_vec(), kept))
    }
}
