//! An output between canaries, which reveal writes outside of it.

use crate::element::Element;

use super::for_rows;
use crate::backend::Backend;
use crate::error::{Operand, Result};
use crate::tensor::{Layout, Tensor};

/// Number of elements of the canaries before and after a tensor. It leaves the tensor with the smallest alignment
/// allowed, 16 bytes.
const CANARY: usize = 72;
/// A NaN whose bits no kernel writes.
pub(super) const POISON: u16 = 0xffff;

/// Number of elements of the canaries before and after a line. It leaves the line with the smallest alignment allowed,
/// that of f32.
const CANARY_LINE: usize = 65;
/// A NaN whose bits no kernel writes.
const POISON_LINE: u32 = 0xffff_ffff;

/// Poisoned memory of an f32 array that a backend is to write.
pub(super) struct GuardedLine<B: Backend> {
    buffer: B::Buffer<f32>,
    len: usize,
}

impl<B: Backend> GuardedLine<B> {
    pub(super) fn new(backend: &B, operand: Operand, len: usize) -> Result<Self> {
        let buffer = backend.upload(operand, &vec![f32::from_bits(POISON_LINE); len + 2 * CANARY_LINE])?;
        Ok(GuardedLine { buffer, len })
    }

    /// Returns the array for writing.
    pub(super) fn line(&mut self) -> B::SliceMut<'_, f32> {
        B::slice_mut(&mut self.buffer, CANARY_LINE..CANARY_LINE + self.len)
    }

    /// Returns the array's content, and true if the canaries are unchanged.
    pub(super) fn content(&self, backend: &B) -> Result<(Vec<f32>, bool)> {
        let found = backend.download(&self.buffer)?;
        let end = CANARY_LINE + self.len;
        let kept = found[..CANARY_LINE].iter().chain(&found[end..]).all(|x| x.to_bits() == POISON_LINE);
        Ok((found[CANARY_LINE..end].to_vec(), kept))
    }
}

/// Poisoned memory of a tensor that a backend is to write.
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

    /// Returns the tensor for writing.
    pub(super) fn tensor(&mut self) -> Tensor<B::SliceMut<'_, E>> {
        Tensor { data: B::slice_mut(&mut self.buffer, CANARY..CANARY + self.len), layout: self.layout }
    }

    /// Returns the tensor's content, padding included, and true if canaries and padding are unchanged.
    pub(super) fn content(&self, backend: &B) -> Result<(Vec<E>, bool)> {
        let found = backend.download(&self.buffer)?;
        let mut outside = vec![true; found.len()];
        for_rows(&self.layout, |start| outside[CANARY + start..][..self.layout.shape[3]].fill(false));
        let kept = found.iter().zip(outside).all(|(x, outside)| !outside || x.to_bits() == POISON);
        Ok((found[CANARY..CANARY + self.len].to_vec(), kept))
    }
}
