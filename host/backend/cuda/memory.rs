//! Device memory: an owned buffer, and borrowed slices of any device memory.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;

use super::driver;
use super::{Cuda, Device};
use crate::error::{Error, Operand, Result};

/// Elements that a device memory holds: plain data.
pub trait Plain: Copy + Send + Sync + 'static {}
impl<T: Copy + Send + Sync + 'static> Plain for T {}

/// Device memory, freed when dropped.
pub struct DeviceBuffer<T: Plain> {
    device: Arc<Device>,
    address: u64,
    len: usize,
    elements: PhantomData<T>,
}

impl<T: Plain> DeviceBuffer<T> {
    /// Memory for `len` elements, its content undefined; `operand` is what an error calls it.
    pub(super) fn new(cuda: &Cuda, operand: Operand, len: usize) -> Result<Self> {
        let bytes = len as u128 * size_of::<T>() as u128;
        cuda.device.make_current()?;
        let address = match usize::try_from(bytes) {
            Ok(0) => 0,
            Ok(bytes) => driver::allocate(bytes).map_err(|_| Error::OutOfMemory { operand, bytes: bytes as u128 })?,
            Err(_) => return Err(Error::OutOfMemory { operand, bytes }),
        };
        Ok(DeviceBuffer { device: cuda.device.clone(), address, len, elements: PhantomData })
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address on the device; 0 where it holds no element.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// All of it.
    pub fn as_slice(&self) -> DeviceSlice<'_, T> {
        DeviceSlice { address: self.address, len: self.len, memory: PhantomData }
    }

    /// A range of it, to be written; empty where the buffer does not have it.
    pub fn as_slice_mut(&mut self, range: Range<usize>) -> DeviceSliceMut<'_, T> {
        let range = if range.start <= range.end && range.end <= self.len { range } else { 0..0 };
        let address = self.address + (range.start * size_of::<T>()) as u64;
        DeviceSliceMut { address, len: range.len(), memory: PhantomData }
    }

    /// Copies host memory over it, and waits until that is done.
    ///
    /// # Errors
    /// [`Error::Driver`]. Copies as many elements as both have.
    pub fn copy_from_host(&mut self, from: &[T]) -> Result<()> {
        let from = &from[..from.len().min(self.len)];
        if from.is_empty() {
            return Ok(());
        }
        self.device.make_current()?;
        // SAFETY: plain data is bytes; the buffer holds that many elements.
        unsafe {
            let bytes = std::slice::from_raw_parts(from.as_ptr().cast::<u8>(), size_of_val(from));
            driver::copy_to_device(self.address, bytes)
        }
    }

    /// Waits for everything that was launched before, and copies it to the host.
    ///
    /// # Errors
    /// [`Error::Driver`], also for what went wrong in earlier launches.
    pub fn to_host(&self) -> Result<Vec<T>> {
        self.device.make_current()?;
        let mut to = Vec::with_capacity(self.len);
        let spare: &mut [MaybeUninit<T>] = &mut to.spare_capacity_mut()[..self.len];
        let bytes = size_of_val(spare);
        if bytes > 0 {
            // SAFETY: the spare capacity is that many bytes, and so is the buffer; once the copy has succeeded every
            // element is what the device holds, and buffers are made for elements that any bits are valid for.
            unsafe {
                driver::copy_to_host(std::slice::from_raw_parts_mut(spare.as_mut_ptr().cast(), bytes), self.address)?;
                to.set_len(self.len);
            }
        }
        Ok(to)
    }
}

impl DeviceBuffer<u32> {
    /// Sets every element to 0, after what was launched before on the default stream; does not wait.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn set_zero(&mut self) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        self.device.make_current()?;
        // SAFETY: the buffer holds that many words, aligned as the driver aligns what it allocates. Freeing it waits, and
        // so do the copies, all on the default stream, which is this device's, as its context is current.
        unsafe { driver::zero_words(self.address, self.len, std::ptr::null_mut()) }
    }
}

impl<T: Plain> Drop for DeviceBuffer<T> {
    fn drop(&mut self) {
        if self.address != 0 && self.device.make_current().is_ok() {
            // SAFETY: allocated by `new` in this context; nobody can name it any more. The driver waits for the
            // launches that still use it.
            unsafe { driver::free(self.address) };
        }
    }
}

/// Device memory to be read, borrowed.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSlice<'a, T> {
    pub(super) address: u64,
    pub(super) len: usize,
    memory: PhantomData<&'a [T]>,
}

impl<T> DeviceSlice<'_, T> {
    /// `len` elements at a device address, say a framework's.
    ///
    /// # Safety
    /// They are valid on the backend's device, and nobody writes them, until what reads this slice has run.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        DeviceSlice { address, len, memory: PhantomData }
    }
}

/// Device memory to be written, borrowed.
#[derive(Debug)]
pub struct DeviceSliceMut<'a, T> {
    pub(super) address: u64,
    pub(super) len: usize,
    memory: PhantomData<&'a mut [T]>,
}

impl<T> DeviceSliceMut<'_, T> {
    /// `len` elements at a device address, say a framework's.
    ///
    /// # Safety
    /// They are valid on the backend's device, and nobody else accesses them, until what writes this slice has run.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        DeviceSliceMut { address, len, memory: PhantomData }
    }
}
