//! Device memory: an owned buffer, and borrowed slices of any device memory. Each knows its device and its stream.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;

use super::Cuda;
use super::driver::{self, check};
use super::stream::{Home, Stream};
use super::sys;
use crate::error::{Error, Operand, Result};
use crate::lengths::Integers;
use crate::operands::{SeedOffset, Skip};

/// Device memory of plain data, freed when dropped.
///
/// It belongs to the stream of the [`Cuda`] that allocated it. It is allocated and freed in that stream's order
/// (`cuMemAllocAsync`, `cuMemFreeAsync`), so dropping it does not wait, and work that was launched before may still use
/// it. On a device without memory pools it is freed after a wait for the stream. A buffer that is dropped while its
/// stream is captured into a graph is not freed, because the graph may use it.
///
/// It holds only plain data, for which any bits are a value:
///
/// ```compile_fail,E0277
/// # use ferroflash::cuda::DeviceBuffer;
/// fn references(buffer: &DeviceBuffer<&'static str>) -> Vec<&'static str> {
///     buffer.to_host().unwrap()
/// }
/// ```
pub struct DeviceBuffer<T: Pod> {
    stream: Arc<Stream>,
    address: u64,
    len: usize,
    elements: PhantomData<T>,
}

impl<T: Pod> DeviceBuffer<T> {
    /// Allocates memory for `len` elements with undefined content. Errors name the memory `operand`.
    pub(super) fn new(cuda: &Cuda, operand: Operand, len: usize) -> Result<Self> {
        let bytes = len as u128 * size_of::<T>() as u128;
        let none = || Error::OutOfMemory { operand, bytes };
        let address = match usize::try_from(bytes) {
            Ok(0) => 0,
            Ok(bytes) => match allocate(&cuda.stream, operand, bytes) {
                Err(Error::Driver { code: sys::OUT_OF_MEMORY, .. }) => return Err(none()),
                allocated => allocated?,
            },
            Err(_) => return Err(none()),
        };
        Ok(DeviceBuffer { stream: cuda.stream.clone(), address, len, elements: PhantomData })
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if it holds no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address on the device; 0 if it holds no element.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Returns the whole buffer as a slice.
    pub fn as_slice(&self) -> DeviceSlice<'_, T> {
        DeviceSlice { address: self.address, len: self.len, home: home(&self.stream), memory: PhantomData }
    }

    /// Returns a range of the buffer for writing, or an empty slice if the range is not within the buffer.
    pub fn as_slice_mut(&mut self, range: Range<usize>) -> DeviceSliceMut<'_, T> {
        let range = if range.start <= range.end && range.end <= self.len { range } else { 0..0 };
        let address = self.address + (range.start * size_of::<T>()) as u64;
        DeviceSliceMut { address, len: range.len(), home: home(&self.stream), memory: PhantomData }
    }

    /// Copies host memory to the buffer after the earlier work of its stream, and waits until that is done.
    ///
    /// # Errors
    /// [`Error::Driver`]. Copies as many elements as both have.
    pub fn copy_from_host(&mut self, from: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(&from[..from.len().min(self.len)]);
        if bytes.is_empty() {
            return Ok(());
        }
        let (calls, _entered) = (self.stream.device.calls(), self.stream.device.enter()?);
        // SAFETY: the buffer holds that many bytes, and the host's are borrowed until the copy is done.
        let code = unsafe {
            (calls.cuMemcpyHtoDAsync_v2)(self.address, bytes.as_ptr().cast(), bytes.len(), self.stream.handle())
        };
        let copied = check(calls, "cuMemcpyHtoDAsync", code);
        self.stream.synchronize().and(copied)
    }

    /// Waits for the earlier work of the buffer's stream, and copies the content to the host.
    ///
    /// # Errors
    /// [`Error::Driver`], also for errors of earlier launches; [`Error::OutOfMemory`] for the host's memory.
    pub fn to_host(&self) -> Result<Vec<T>> {
        let mut to = Vec::new();
        let bytes = self.len * size_of::<T>();
        to.try_reserve_exact(self.len)
            .map_err(|_| Error::OutOfMemory { operand: Operand::Download, bytes: bytes as u128 })?;
        if bytes > 0 {
            let (calls, _entered) = (self.stream.device.calls(), self.stream.device.enter()?);
            let spare: &mut [MaybeUninit<T>] = &mut to.spare_capacity_mut()[..self.len];
            // SAFETY: the spare capacity is that many bytes, and so is the buffer; the copy is over before this
            // function returns.
            let code = unsafe {
                let (to, stream) = (spare.as_mut_ptr().cast(), self.stream.handle());
                (calls.cuMemcpyDtoHAsync_v2)(to, self.address, bytes, stream)
            };
            let copied = check(calls, "cuMemcpyDtoHAsync", code);
            self.stream.synchronize().and(copied)?;
        }
        // SAFETY: the copy has succeeded, so every element is what the device holds, and any bits are valid for plain
        // data.
        unsafe { to.set_len(self.len) };
        Ok(to)
    }
}

impl DeviceBuffer<u32> {
    /// Sets every element to 0 after the earlier work of the buffer's stream. Does not wait.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn set_zero(&mut self) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let _entered = self.stream.device.enter()?;
        // SAFETY: the buffer holds that many words, aligned as the driver aligns what it allocates, and is freed in the
        // order of this stream, whose context is current.
        unsafe { driver::zero_words(self.stream.device.calls(), self.address, self.len, self.stream.handle()) }
    }
}

impl<T: Pod> Drop for DeviceBuffer<T> {
    fn drop(&mut self) {
        if self.address == 0 {
            return;
        }
        let (device, stream) = (&self.stream.device, &self.stream);
        let Ok(_entered) = device.enter() else { return };
        if stream.is_capturing() != Ok(false) {
            return;
        }
        // An error here belongs to an earlier launch, and other calls report it.
        if device.pools {
            // SAFETY: allocated by `new` on this stream. No slice of it is left, and this stream was made to wait for
            // other streams that used it.
            let _ = unsafe { (device.calls().cuMemFreeAsync)(self.address, stream.handle()) };
        } else {
            let _ = stream.synchronize();
            // SAFETY: allocated by `new` in this context; everything that used it has run.
            let _ = unsafe { (device.calls().cuMemFree_v2)(self.address) };
        }
    }
}

/// Allocates `bytes` bytes in the order of a stream.
fn allocate(stream: &Stream, operand: Operand, bytes: usize) -> Result<u64> {
    let (device, calls, mut address) = (&stream.device, stream.device.calls(), 0);
    let _entered = device.enter()?;
    if stream.is_capturing()? {
        return Err(Error::Capturing { operand });
    }
    if device.pools {
        // SAFETY: writes one address; the stream is live.
        let code = unsafe { (calls.cuMemAllocAsync)(&mut address, bytes, stream.handle()) };
        check(calls, "cuMemAllocAsync", code)?;
    } else {
        // SAFETY: writes one address.
        check(calls, "cuMemAlloc", unsafe { (calls.cuMemAlloc_v2)(&mut address, bytes) })?;
    }
    Ok(address)
}

fn home(stream: &Stream) -> Home<'_> {
    Home { ordinal: stream.device.ordinal, stream: Some(stream) }
}

/// Borrowed device memory for reading.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSlice<'a, T> {
    pub(super) address: u64,
    pub(super) len: usize,
    pub(super) home: Home<'a>,
    pub(super) memory: PhantomData<&'a [T]>,
}

impl<T: Pod> DeviceSlice<'_, T> {
    /// Returns a slice of `len` elements at an address on the device of `cuda`, for instance a framework's.
    ///
    /// # Safety
    /// The elements are valid on that device until all work that reads this slice has run. Nothing writes them
    /// meanwhile, and earlier writes come first in the order of the stream that reads them.
    pub unsafe fn from_raw(cuda: &Cuda, address: u64, len: usize) -> Self {
        let home = Home { ordinal: cuda.ordinal(), stream: None };
        DeviceSlice { address, len, home, memory: PhantomData }
    }
}

#[cfg(any(feature = "cust", feature = "cudarc"))]
impl<'a, T> DeviceSlice<'a, T> {
    /// Returns the same memory, ordered with the stream of `cuda`.
    pub(super) fn on(self, cuda: &'a Cuda) -> Self {
        DeviceSlice { home: home(&cuda.stream), ..self }
    }
}

impl<'a> From<DeviceSlice<'a, u64>> for SeedOffset<DeviceSlice<'a, f32>> {
    fn from(numbers: DeviceSlice<'a, u64>) -> Self {
        let DeviceSlice { address, len, home, .. } = numbers;
        let len = len.saturating_mul(size_of::<u64>() / size_of::<f32>());
        SeedOffset::of_words(DeviceSlice { address, len, home, memory: PhantomData })
    }
}

impl<T> Skip for DeviceSlice<'_, T> {
    fn skip(self, start: usize) -> Self {
        let start = start.min(self.len);
        DeviceSlice { address: self.address + (start * size_of::<T>()) as u64, len: self.len - start, ..self }
    }
}

impl<'a> From<DeviceSlice<'a, i32>> for Integers<DeviceSlice<'a, f32>> {
    fn from(numbers: DeviceSlice<'a, i32>) -> Self {
        let DeviceSlice { address, len, home, .. } = numbers;
        Integers::of_words(DeviceSlice { address, len, home, memory: PhantomData })
    }
}

/// Borrowed device memory for writing.
#[derive(Debug)]
pub struct DeviceSliceMut<'a, T> {
    pub(super) address: u64,
    pub(super) len: usize,
    pub(super) home: Home<'a>,
    pub(super) memory: PhantomData<&'a mut [T]>,
}

impl<T: Pod> DeviceSliceMut<'_, T> {
    /// Returns a slice of `len` elements at an address on the device of `cuda`, for instance a framework's.
    ///
    /// # Safety
    /// The elements are valid on that device until all work that writes this slice has run. Nothing else accesses them
    /// meanwhile, and earlier accesses come first in the order of the stream that writes them.
    pub unsafe fn from_raw(cuda: &Cuda, address: u64, len: usize) -> Self {
        let home = Home { ordinal: cuda.ordinal(), stream: None };
        DeviceSliceMut { address, len, home, memory: PhantomData }
    }
}

#[cfg(any(feature = "cust", feature = "cudarc"))]
impl<'a, T> DeviceSliceMut<'a, T> {
    /// Returns the same memory, ordered with the stream of `cuda`.
    pub(super) fn on(self, cuda: &'a Cuda) -> Self {
        DeviceSliceMut { home: home(&cuda.stream), ..self }
    }
}
