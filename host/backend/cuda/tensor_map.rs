//! Tensor maps: descriptions of tensors for TMA (CUDA driver API, cuTensorMapEncodeTiled).
//!
//! Encoding is arithmetic on the host. It touches neither the device nor its memory, and takes well under a
//! microsecond.

use std::ffi::c_void;

use kernels_gpu::ground::tensor::{Strided, TensorMap};
use kernels_gpu::tile::smem::PANEL_COLUMNS;
use kernels_gpu::variants::Dtype;

use super::driver::check;
use super::sys::{self, Calls};
use crate::error::{Error, Result};
use crate::operands::RawTensor;

const RANK: usize = 4;

/// A tensor map on a 64-byte boundary, as the driver requires.
#[repr(C, align(64))]
struct TensorMapOut(TensorMap);

// Values of the driver's enums.
const FLOAT16: u32 = 6;
const BFLOAT16: u32 = 9;
const INTERLEAVE_NONE: u32 = 0;
const SWIZZLE_128B: u32 = 3;
const L2_PROMOTION_256B: u32 = 3;
const FILL_ZEROS: u32 = 0;

type EncodeTiled = unsafe extern "C" fn(
    *mut c_void,
    u32,
    u32,
    *mut c_void,
    *const u64,
    *const u64,
    *const u32,
    *const u32,
    u32,
    u32,
    u32,
    u32,
) -> sys::Code;

/// Driver's function that encodes tensor maps.
#[derive(Clone, Copy)]
pub(super) struct Encoder(&'static Calls, EncodeTiled);

impl Encoder {
    /// Returns the function of this driver.
    ///
    /// # Errors
    /// [`Error::NoDevice`] for a driver that is older than CUDA 12.0.
    pub(super) fn of(calls: &'static Calls) -> Result<Self> {
        let reason = "NVIDIA's driver is older than CUDA 12.0, which kernels for Hopper need: install a newer one";
        let encode = calls.cuTensorMapEncodeTiled.ok_or_else(|| Error::NoDevice { reason: reason.to_owned() })?;
        Ok(Encoder(calls, encode))
    }

    /// Returns the map of a tensor that is not empty, for boxes of 64 columns and `rows` rows, in the 128-byte swizzle.
    pub(super) fn encode(self, tensor: &RawTensor, dtype: Dtype, rows: u32) -> Result<TensorMap> {
        let [batch, ..] = tensor.layout.shape.map(|extent| extent as u64);
        self.encode_at(tensor, tensor.strided(), batch, dtype, rows)
    }

    /// Returns the map of a tensor that is not empty and whose rows sequences of different lengths share
    /// ([`Span`](kernels_gpu::ground::sequence::Span)). It begins before the tensor, where nothing is ever loaded from.
    /// A sequence may end behind any row, or before the first.
    pub(super) fn encode_shared(self, tensor: &RawTensor, dtype: Dtype, rows: u32) -> Result<TensorMap> {
        let [_, _, seqlen, _] = tensor.layout.shape.map(|extent| extent as u64);
        self.encode_at(tensor, tensor.shared(), seqlen + 1, dtype, rows)
    }

    fn encode_at(self, tensor: &RawTensor, at: Strided, items: u64, dtype: Dtype, rows: u32) -> Result<TensorMap> {
        let [_, heads, seqlen, head_dim] = tensor.layout.shape.map(|extent| extent as u64);
        let [batch_stride, head_stride, row_stride] =
            [at.stride_batch, at.stride_head, at.stride_row].map(|stride| stride as u64 * size_of::<u16>() as u64);
        let extents: [u64; RANK] = [head_dim, seqlen, heads, items];
        let strides: [u64; RANK - 1] = [row_stride, head_stride, batch_stride];
        let tile: [u32; RANK] = [PANEL_COLUMNS, rows, 1, 1];
        let element_strides = [1u32; RANK];
        let data_type = match dtype {
            Dtype::F16 => FLOAT16,
            Dtype::Bf16 => BFLOAT16,
        };
        let mut map = TensorMapOut(TensorMap([0; 16]));
        // SAFETY: every pointer is to as many elements as the rank asks for; the address is only recorded.
        let code = unsafe {
            (self.1)(
                (&raw mut map).cast(),
                data_type,
                RANK as u32,
                at.address as *mut c_void,
                extents.as_ptr(),
                strides.as_ptr(),
                tile.as_ptr(),
                element_strides.as_ptr(),
                INTERLEAVE_NONE,
                SWIZZLE_128B,
                L2_PROMOTION_256B,
                FILL_ZEROS,
            )
        };
        check(self.0, "cuTensorMapEncodeTiled", code)?;
        Ok(map.0)
    }
}
