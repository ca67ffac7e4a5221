//! Visitor that lowers the tensors of a call to device addresses: it checks them, and collects the streams they belong
//! to.

use super::memory::{DeviceSlice, DeviceSliceMut};
use super::stream::{Home, Order, Stream};
use crate::error::Result;
use crate::operands::{AddressSpace, Check, LinePlace, LineRow, Lines, Memory, Place, Role, Slice, TensorRow, Tensors};
use crate::plan::InputKinds;
use crate::problem::Problem;
use crate::tensor::Tensor;

/// The checks of a call's tensors, and the order of its launches with other streams.
pub(super) struct Lowering<'a> {
    pub(super) check: Check<'a>,
    pub(super) order: Order<'a>,
}

impl<'a> Lowering<'a> {
    /// Starts with a call on `stream`, so far without tensors.
    pub(super) fn new(problem: &'a Problem, kinds: InputKinds, stream: &'a Stream) -> Self {
        Lowering { check: Check::new(problem, AddressSpace::Device).of_kinds(kinds), order: Order::on(stream) }
    }
}

impl<'a, T: Place + Homed<'a>> Tensors<T> for Lowering<'a> {
    type To = T::Raw;

    fn tensor(&mut self, row: TensorRow, role: Role, from: T) -> Result<T::Raw> {
        from.home().map_or(Ok(()), |home| self.order.add(row.operand, home))?;
        self.check.tensor(row, role, from)
    }
}

impl<'a, L: LinePlace + Homed<'a>> Lines<L> for Lowering<'a> {
    type To = L::Raw;

    fn line(&mut self, row: LineRow, role: Role, from: L) -> Result<L::Raw> {
        from.home().map_or(Ok(()), |home| self.order.add(row.operand, home))?;
        self.check.line(row, role, from)
    }
}

/// Memory that belongs to a device and a stream, or `()` for an output that has no memory yet.
pub(super) trait Homed<'a> {
    fn home(&self) -> Option<Home<'a>>;
}

impl<'a, T> Homed<'a> for DeviceSlice<'a, T> {
    fn home(&self) -> Option<Home<'a>> {
        Some(self.home)
    }
}

impl<'a, T> Homed<'a> for DeviceSliceMut<'a, T> {
    fn home(&self) -> Option<Home<'a>> {
        Some(self.home)
    }
}

impl<'a, S: Homed<'a>> Homed<'a> for Tensor<S> {
    fn home(&self) -> Option<Home<'a>> {
        self.data.home()
    }
}

impl<'a> Homed<'a> for () {
    fn home(&self) -> Option<Home<'a>> {
        None
    }
}

impl<T> Slice for DeviceSlice<'_, T> {
    fn memory(self) -> Memory {
        Memory { address: self.address, len: Some(self.len) }
    }
}

impl<T> Slice for DeviceSliceMut<'_, T> {
    fn memory(self) -> Memory {
        Memory { address: self.address, len: Some(self.len) }
    }
}
