//! The tensors of one call as addresses and layouts, and the rules for them.
//!
//! Both backends lower their tensors to a [`RawForward`] or a [`RawBackward`] and check it here, so the rules are the
//! same for slices, device buffers and raw device pointers. If there is nothing to read or write, the address does not
//! matter.

use kernels_gpu::{
    ground::tensor::Strided,
    variants::{Dtype, Op},
};

use crate::{
    error::{Dim, Error, Operand, Result},
    overlap::{Region, self_alias},
    problem::{ELEMENT_BYTES, Problem},
    tensor::Layout,
};

mod backward;
mod forward;
mod gradients;
mod pair;
mod total_attention;

#[cfg(test)]
mod extremes;

pub(crate) use backward::check_inputs as check_backward_inputs;
pub use backward::{RawBackward, RawSecond};
pub(crate) use forward::Buffers;
pub use forward::RawForward;
pub use gradients::{BackwardInputs, Gradients};
pub use pair::{ForwardInputs, Pair, SecondTensors};
pub use total_attention::RawTotalAttention;
pub(crate) use total_attention::check_inputs as check_total_inputs;

/// Unit of TMA's addresses and strides, in bytes.
const GRAIN_BYTES: usize = 16;
/// Exclusive limit of TMA's strides, in bytes.
const STRIDE_LIMIT_BYTES: u64 = 1 << 40;

/// A tensor named by its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawTensor {
    /// Address of element (0, 0, 0, 0); on the GPU a multiple of 16.
    pub address: u64,
    /// Layout of the elements from there.
    pub layout: Layout,
}

impl RawTensor {
    /// Returns the tensor as kernels that compute addresses take it.
    pub(crate) fn strided(&self) -> Strided {
        let [stride_batch, stride_head, stride_row] = self.layout.lowered_strides().map(|stride| stride as i64);
        Strided { address: self.address, stride_batch, stride_head, stride_row }
    }

    /// Returns the first row of a tensor that has one.
    #[cfg(feature = "cuda")]
    pub(crate) fn first_row(&self) -> Self {
        let [_, _, _, head_dim] = self.layout.shape;
        RawTensor { layout: Layout { shape: [1, 1, 1, head_dim], ..self.layout }, ..*self }
    }

    fn region(&self) -> Option<Region> {
        Region::of_rows(self.address, &self.layout, ELEMENT_BYTES)
    }
}

/// Rules for addresses: the host's or the device's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AddressSpace {
    /// The host's memory: any address that Rust's own slices have.
    Host,
    /// Device memory: not null, aligned for TMA.
    Device,
}

/// Borrowed memory: its start, and its length in elements if that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) address: u64,
    pub(crate) len: Option<usize>,
}

/// Checks that the tensors' element type is the problem's.
pub(crate) fn check_dtype(problem: &Problem, found: Dtype) -> Result<()> {
    if found != problem.dtype {
        return Err(Error::DtypeMismatch { found, expected: problem.dtype });
    }
    Ok(())
}

/// Checks that there is a second pair of Q and K if, and only if, the operator takes one.
pub(crate) fn check_second(op: Op, given: bool) -> Result<()> {
    if given != (op.pairs() == 2) {
        return Err(Error::SecondPair { op, given });
    }
    Ok(())
}

/// Checks one tensor alone; `len` is the length of its buffer in elements, if that is known.
pub(crate) fn check_tensor(
    problem: &Problem,
    operand: Operand,
    tensor: &RawTensor,
    space: AddressSpace,
    len: Option<usize>,
) -> Result<()> {
    let RawTensor { address, layout } = tensor;
    let expected = match operand {
        Operand::K | Operand::V | Operand::Dk | Operand::Dv | Operand::K2 | Operand::Dk2 => problem.kv_shape(),
        _ => problem.q_shape(),
    };
    if layout.shape != expected {
        return Err(Error::ShapeMismatch { operand, shape: layout.shape, expected });
    }
    if layout.is_empty() {
        return Ok(());
    }
    check_strides(operand, layout)?;
    let bytes = layout.span().saturating_mul(ELEMENT_BYTES as u128);
    if let Some(len) = len
        && layout.span() > len as u128
    {
        return Err(Error::BufferTooSmall { operand, len, required: layout.span() });
    }
    check_span(operand, *address, bytes)?;
    check_address(operand, *address, GRAIN_BYTES, space)
}

/// Checks an f32 array (batch, heads_q, seqlen_q), contiguous, alone.
fn check_lse(problem: &Problem, operand: Operand, memory: Memory, space: AddressSpace) -> Result<()> {
    let expected = problem.lse_len();
    if let Some(len) = memory.len
        && len != expected
    {
        return Err(Error::LseLength { operand, len, expected });
    }
    check_floats(operand, memory.address, expected, space)
}

/// Checks the address and the length of a contiguous f32 array of `len` elements.
fn check_floats(operand: Operand, address: u64, len: usize, space: AddressSpace) -> Result<()> {
    if len == 0 {
        return Ok(());
    }
    check_span(operand, address, len as u128 * size_of::<f32>() as u128)?;
    check_address(operand, address, size_of::<f32>(), space)
}

/// Returns the bytes of an f32 array (batch, heads_q, seqlen_q).
fn lse_region(problem: &Problem, address: u64) -> Option<Region> {
    Region::of_bytes(address, problem.lse_len() as u128 * size_of::<f32>() as u128)
}

/// Checks that an output's rows share no memory.
fn check_rows_apart(operand: Operand, layout: &Layout) -> Result<()> {
    self_alias(layout).map_or(Ok(()), |alias| {
        Err(Error::OutputAliasesItself { operand, dim: alias.dim, stride: alias.stride, required: alias.required })
    })
}

fn check_strides(operand: Operand, layout: &Layout) -> Result<()> {
    let multiple = GRAIN_BYTES / ELEMENT_BYTES;
    let limit = STRIDE_LIMIT_BYTES / ELEMENT_BYTES as u64 - multiple as u64;
    for (dim, stride) in Dim::ALL.into_iter().zip(layout.lowered_strides()) {
        if !stride.is_multiple_of(multiple) {
            return Err(Error::StrideNotMultiple { operand, dim, stride, multiple });
        }
        if stride as u64 > limit {
            return Err(Error::StrideTooLarge { operand, dim, stride, limit });
        }
    }
    Ok(())
}

/// Checks that the tensor's last byte has an address, and that offsets from its first fit in 63 bits.
fn check_span(operand: Operand, address: u64, bytes: u128) -> Result<()> {
    let limit = (u64::MAX as u128 + 1 - address as u128).min(i64::MAX as u128);
    if bytes > limit {
        return Err(Error::SpanTooLarge { operand, address, bytes, limit });
    }
    Ok(())
}

fn check_address(operand: Operand, address: u64, alignment: usize, space: AddressSpace) -> Result<()> {
    match space {
        AddressSpace::Host => Ok(()),
        AddressSpace::Device if address == 0 => Err(Error::NullPointer { operand }),
        AddressSpace::Device if !address.is_multiple_of(alignment as u64) => {
            Err(Error::Misaligned { operand, address, alignment: alignment as u64 })
        }
        AddressSpace::Device => Ok(()),
    }
}

fn check_disjoint(output: (Operand, Option<Region>), other: (Operand, Option<Region>)) -> Result<()> {
    match (output.1, other.1) {
        (Some(a), Some(b)) if !a.is_disjoint(&b) => Err(Error::Overlap { output: output.0, other: other.0 }),
        _ => Ok(()),
    }
}
