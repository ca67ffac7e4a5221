//! The tensors of one call as addresses and layouts, and the rules for them.
//!
//! Each pass has a table of its tensors ([`Pass`]). Both backends lower their tensors by it to a [`RawForward`], a
//! [`RawBackward`] or a [`RawTotalAttention`], with the same checks ([`Check`]) for slices, device buffers and raw
//! device pointers. If there is nothing to read or write, the address does not matter.

use kernels_gpu::ground::tensor::Strided;

use crate::error::{Operand, Result};
use crate::plan::Schedule;
use crate::problem::ELEMENT_BYTES;
use crate::tensor::{Layout, Tensor};

mod backward;
mod check;
mod forward;
mod gradients;
mod inputs;
mod lowered;
mod packed;
mod pair;
mod pass;
mod place;
mod seed_offset;
mod total_attention;

#[cfg(test)]
mod extremes;

#[cfg(doc)]
use crate::error::Error;

pub use backward::{BackwardTensors, RawBackward};
pub use check::AddressSpace;
pub(crate) use check::Check;
#[cfg(feature = "cuda")]
pub(crate) use check::check_memory_of_mask;
pub use forward::{ForwardTensors, RawForward};
pub use gradients::{BackwardInputs, Gradients};
pub use inputs::{Inputs, OptionalInputs, Slopes, TotalInputs};
pub use packed::{PackedGradients, Skip};
pub(crate) use pair::SecondGradients;
pub use pair::{BackwardPair, Pair, RawSecond, SecondTensors};
pub(crate) use pass::{LineRow, Lines, Pass, Role, TensorRow, Tensors, Visited, VisitedLine, rows};
pub(crate) use place::Memory;
#[cfg(feature = "cuda")]
pub(crate) use place::Slice;
pub(crate) use place::{LinePlace, Place};
pub use seed_offset::SeedOffset;
pub use total_attention::{RawTotalAttention, TotalTensors};

/// A tensor named by its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawTensor {
    /// Address of element (0, 0, 0, 0); on the GPU a multiple of 16.
    pub address: u64,
    /// Layout of the elements from there.
    pub layout: Layout,
}

impl RawTensor {
    /// Checks whether kernels take this tensor as it is. Its shape is not compared with a problem's. A framework copies
    /// a tensor that is refused, and passes the copy; errors name the tensor `operand`.
    ///
    /// ```
    /// use ferroflash::{AddressSpace, Layout, Operand, RawTensor};
    ///
    /// // Rows of 64 elements that are 65 elements apart.
    /// let padded = RawTensor { address: 0x1000, layout: Layout::strided([2, 4, 10, 64], [2600, 650, 65]) };
    /// let error = padded.check(Operand::Q, AddressSpace::Device).unwrap_err();
    /// let rule = "a multiple of 8 (16 bytes) is needed";
    /// assert_eq!(error.to_string(), format!("q.strides: the heads stride is 650 elements; {rule}"));
    /// ```
    ///
    /// # Errors
    /// [`Error::StrideNotMultiple`], [`Error::StrideTooLarge`], [`Error::SpanTooLarge`], [`Error::NullPointer`],
    /// [`Error::Misaligned`].
    pub fn check(&self, operand: Operand, memory: AddressSpace) -> Result<()> {
        let data = Memory { address: self.address, len: None };
        check::check_memory(operand, &Tensor { data, layout: self.layout }, memory)
    }

    /// Returns the tensor as kernels that compute addresses take it.
    pub(crate) fn strided(&self) -> Strided {
        let [stride_batch, stride_head, stride_row] = self.layout.lowered_strides().map(|stride| stride as i64);
        Strided { address: self.address, stride_batch, stride_head, stride_row }
    }

    /// Returns the tensor as kernels take it if sequences of different lengths share its rows
    /// ([`Span`](kernels_gpu::ground::sequence::Span)): it begins as many rows before the first element as it has, and
    /// each batch item is a row.
    pub(crate) fn shared(&self) -> Strided {
        let strided = self.strided();
        let [_, _, rows, _] = self.layout.shape;
        let before = (rows as i64).wrapping_mul(strided.stride_row).wrapping_mul(ELEMENT_BYTES as i64);
        let address = strided.address.wrapping_sub(before as u64);
        Strided { address, stride_batch: strided.stride_row, ..strided }
    }

    /// Returns the tensor as kernels that compute addresses take it, in a dense batch or with rows that sequences
    /// share.
    pub(crate) fn placed(&self, schedule: Option<&Schedule>) -> Strided {
        if schedule.is_some() { self.shared() } else { self.strided() }
    }

    /// Returns the first row of a tensor that has one.
    #[cfg(feature = "cuda")]
    pub(crate) fn first_row(&self) -> Self {
        let [_, _, _, head_dim] = self.layout.shape;
        RawTensor { layout: Layout { shape: [1, 1, 1, head_dim], ..self.layout }, ..*self }
    }
}
