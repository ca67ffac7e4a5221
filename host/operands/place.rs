//! Ways to name the memory of a tensor, and their lowering to an address: an address already, a slice, or nothing yet.

use super::RawTensor;
use crate::tensor::Tensor;

/// Borrowed memory: its start, and its length in elements if that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) address: u64,
    pub(crate) len: Option<usize>,
}

/// Memory of a known length, borrowed for reading or for writing.
pub(crate) trait Slice {
    fn memory(self) -> Memory;
}

impl<T> Slice for &[T] {
    fn memory(self) -> Memory {
        Memory { address: self.as_ptr().expose_provenance() as u64, len: Some(self.len()) }
    }
}

impl<T> Slice for &mut [T] {
    fn memory(self) -> Memory {
        Memory { address: self.as_mut_ptr().expose_provenance() as u64, len: Some(self.len()) }
    }
}

#[cfg(test)]
impl Slice for Memory {
    fn memory(self) -> Memory {
        self
    }
}

/// A strided tensor, or `()` for an output that has no memory yet.
pub(crate) trait Place {
    /// The tensor by its address.
    type Raw;

    /// Returns the lowered tensor, and its memory and layout if it has any.
    fn lower(self) -> (Self::Raw, Option<Tensor<Memory>>);
}

impl Place for RawTensor {
    type Raw = RawTensor;

    fn lower(self) -> (RawTensor, Option<Tensor<Memory>>) {
        let data = Memory { address: self.address, len: None };
        (self, Some(Tensor { data, layout: self.layout }))
    }
}

impl<S: Slice> Place for Tensor<S> {
    type Raw = RawTensor;

    fn lower(self) -> (RawTensor, Option<Tensor<Memory>>) {
        let (data, layout) = (self.data.memory(), self.layout);
        (RawTensor { address: data.address, layout }, Some(Tensor { data, layout }))
    }
}

impl Place for () {
    type Raw = ();

    fn lower(self) -> ((), Option<Tensor<Memory>>) {
        ((), None)
    }
}

/// A contiguous f32 array, or `()` for an output that has no memory yet.
pub(crate) trait LinePlace {
    /// The array's address.
    type Raw;

    /// Returns the lowered array, and its memory if it has any.
    fn lower(self) -> (Self::Raw, Option<Memory>);
}

impl LinePlace for u64 {
    type Raw = u64;

    fn lower(self) -> (u64, Option<Memory>) {
        (self, Some(Memory { address: self, len: None }))
    }
}

impl<S: Slice> LinePlace for S {
    type Raw = u64;

    fn lower(self) -> (u64, Option<Memory>) {
        let memory = self.memory();
        (memory.address, Some(memory))
    }
}

impl LinePlace for () {
    type Raw = ();

    fn lower(self) -> ((), Option<Memory>) {
        ((), None)
    }
}
