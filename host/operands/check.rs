//! The rules for tensors, as a visitor: each tensor alone, and the outputs' memory against that of all others.

use kernels_gpu::variants::{Dtype, Op};

use super::{
    LinePlace, Place,
    pass::{LineRow, Lines, Role, TensorRow, Tensors},
    place::Memory,
    seed_offset::WORDS_EACH,
};
use crate::{
    dropout::PlanDropout,
    error::{Dim, Error, Operand, Result},
    lengths::Sequences,
    overlap::{Region, self_alias},
    plan::{InputKinds, Sinks, WORKSPACE_ALIGNMENT},
    problem::{ELEMENT_BYTES, Problem},
    tensor::{Layout, Tensor},
};

/// Unit of TMA's addresses and strides, in bytes.
const GRAIN_BYTES: usize = 16;
/// Elements of a TMA unit.
const GRAIN: usize = GRAIN_BYTES / ELEMENT_BYTES;
/// Exclusive limit of TMA's strides, in bytes.
const STRIDE_LIMIT_BYTES: u64 = 1 << 40;

/// Memory that a tensor is in, which decides on the alignment of its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AddressSpace {
    /// The host's memory, for the CPU backend: aligned as the element type.
    Host,
    /// Device memory: tensors begin at a multiple of 16 bytes, because the copy engine moves units of 16 bytes.
    Device,
}

impl AddressSpace {
    /// Alignment of a contiguous array, in bytes. A GPU loads seed and offset at once.
    fn line_alignment(self, operand: Operand) -> usize {
        match (operand, self) {
            (Operand::SeedOffset, AddressSpace::Host) => size_of::<u64>(),
            (Operand::SeedOffset, AddressSpace::Device) => 2 * size_of::<u64>(),
            _ => size_of::<f32>(),
        }
    }

    /// Alignment of a strided tensor, in bytes.
    fn tensor_alignment(self) -> usize {
        match self {
            AddressSpace::Host => ELEMENT_BYTES,
            AddressSpace::Device => GRAIN_BYTES,
        }
    }
}

/// Memory that a tensor of the call occupies.
#[derive(Clone, Copy, Debug)]
struct Occupied {
    operand: Operand,
    role: Role,
    region: Region,
}

/// Visitor that checks each tensor of a pass alone, lowers it to its address, and remembers the memory it occupies.
#[derive(Clone, Debug)]
pub(crate) struct Check<'a> {
    problem: &'a Problem,
    /// Items of the batch, which are sequences if lengths differ.
    items: usize,
    space: AddressSpace,
    occupied: Vec<Occupied>,
}

impl<'a> Check<'a> {
    pub(crate) fn new(problem: &'a Problem, space: AddressSpace) -> Self {
        Check { problem, items: problem.batch, space, occupied: Vec::new() }
    }

    /// Sets the number of sequences, if lengths differ.
    pub(crate) fn of_kinds(self, kinds: InputKinds) -> Self {
        Check { items: kinds.sequences.map_or(self.items, |sequences| sequences.count), ..self }
    }

    /// Adds memory of a tensor. `region` is `None` if it has none.
    pub(super) fn occupy(&mut self, operand: Operand, role: Role, region: Option<Region>) {
        self.occupied.extend(region.map(|region| Occupied { operand, role, region }));
    }

    /// Checks size and address of a workspace of which `required` bytes are needed, and remembers its memory.
    pub(super) fn workspace(&mut self, address: u64, bytes: usize, required: usize) -> Result<()> {
        if bytes < required {
            return Err(Error::WorkspaceTooSmall { bytes, required });
        }
        if required > 0 {
            check_span(Operand::Workspace, address, required as u128)?;
            check_address(Operand::Workspace, address, WORKSPACE_ALIGNMENT)?;
            self.occupy(Operand::Workspace, Role::Output, Region::of_bytes(address, required as u128));
        }
        Ok(())
    }

    /// Checks that each output has memory of its own: it shares none with an input or with an output listed before it.
    pub(crate) fn overlaps(&self) -> Result<()> {
        for (index, output) in self.occupied.iter().enumerate() {
            if output.role == Role::Input {
                continue;
            }
            let (before, after) = self.occupied.split_at(index);
            let inputs = after.iter().filter(|other| other.role == Role::Input);
            for other in before.iter().chain(inputs) {
                if !output.region.is_disjoint(&other.region) {
                    return Err(Error::Overlap { output: output.operand, other: other.operand });
                }
            }
        }
        Ok(())
    }
}

impl<T: Place> Tensors<T> for Check<'_> {
    type To = T::Raw;

    fn tensor(&mut self, row: TensorRow, role: Role, from: T) -> Result<T::Raw> {
        let (raw, tensor) = from.lower();
        if let Some(tensor) = tensor {
            check_tensor(self.problem, row, &tensor, self.space)?;
            if role == Role::Output {
                check_rows_apart(row.operand, &tensor.layout)?;
            }
            let region = Region::of_rows(tensor.data.address, &tensor.layout, ELEMENT_BYTES);
            self.occupy(row.operand, role, region);
        }
        Ok(raw)
    }
}

impl<L: LinePlace> Lines<L> for Check<'_> {
    type To = L::Raw;

    fn line(&mut self, row: LineRow, role: Role, from: L) -> Result<L::Raw> {
        let (raw, memory) = from.lower();
        if let Some(memory) = memory {
            let len = (row.len)(self.problem, self.items);
            check_line(len, row, memory, self.space)?;
            self.occupy(row.operand, role, Region::of_bytes(memory.address, line_bytes(len)));
        }
        Ok(raw)
    }
}

/// Checks that the tensors' element type is the problem's.
pub(crate) fn check_dtype(problem: &Problem, found: Dtype) -> Result<()> {
    if found != problem.dtype {
        return Err(Error::DtypeMismatch { found, expected: problem.dtype });
    }
    Ok(())
}

/// Checks that there is a second pair of Q and K if, and only if, the operator takes one.
pub(super) fn check_second(op: Op, given: bool) -> Result<()> {
    if given != (op.pairs() == 2) {
        return Err(Error::SecondPair { op, given });
    }
    Ok(())
}

/// Checks that slopes and sinks are of the kinds that the plan is for.
pub(super) fn check_kinds(found: InputKinds, planned: InputKinds) -> Result<()> {
    for (operand, same, found, planned) in [
        (Operand::Slopes, found.alibi == planned.alibi, found.alibi.words(), planned.alibi.words()),
        (Operand::Sinks, found.sinks == planned.sinks, found.sinks.words(), planned.sinks.words()),
        (
            Operand::CumulativeQ,
            found.sequences == planned.sequences,
            sequences_words(found.sequences),
            sequences_words(planned.sequences),
        ),
    ] {
        if !same {
            return Err(Error::OptionalInput { operand, found, planned });
        }
    }
    Ok(())
}

/// Returns what errors call lengths of sequences.
fn sequences_words(sequences: Option<Sequences>) -> &'static str {
    match sequences {
        None => "none",
        Some(_) => "lengths of a number of sequences, in one form",
    }
}

/// Checks that there are seed and offset of dropout if, and only if, the plan's dropout reads them from memory.
pub(super) fn check_seed_offset(given: bool, planned: PlanDropout) -> Result<()> {
    let words = |given| if given { "seed and offset in memory" } else { "none" };
    if given != planned.reads_memory() {
        let (found, planned) = (words(given), words(planned.reads_memory()));
        return Err(Error::OptionalInput { operand: Operand::SeedOffset, found, planned });
    }
    Ok(())
}

/// Checks that there are sinks if their gradient is wanted.
pub(super) fn check_d_sinks<M>(d_sinks: &Option<M>, planned: InputKinds) -> Result<()> {
    let (found, planned) = (Sinks::of(d_sinks), planned.sinks);
    if found == Sinks::PerHead && planned == Sinks::None {
        let (found, planned) = (found.words(), planned.words());
        return Err(Error::OptionalInput { operand: Operand::DSinks, found, planned });
    }
    Ok(())
}

/// Checks one tensor alone.
fn check_tensor(problem: &Problem, row: TensorRow, tensor: &Tensor<Memory>, space: AddressSpace) -> Result<()> {
    let (operand, expected) = (row.operand, (row.shape)(problem));
    if tensor.layout.shape != expected {
        return Err(Error::ShapeMismatch { operand, shape: tensor.layout.shape, expected });
    }
    check_memory(operand, tensor, space)
}

/// Checks strides, length and address of one tensor, whatever its shape.
pub(super) fn check_memory(operand: Operand, tensor: &Tensor<Memory>, space: AddressSpace) -> Result<()> {
    let Tensor { data: Memory { address, len }, layout } = tensor;
    if layout.is_empty() {
        return Ok(());
    }
    check_strides(operand, layout)?;
    let bytes = layout.span().saturating_mul(ELEMENT_BYTES as u128);
    if let Some(len) = *len
        && layout.span() > len as u128
    {
        return Err(Error::BufferTooSmall { operand, len, required: layout.span() });
    }
    check_span(operand, *address, bytes)?;
    check_address(operand, *address, space.tensor_alignment())
}

/// Checks one line alone.
fn check_line(expected: usize, row: LineRow, memory: Memory, space: AddressSpace) -> Result<()> {
    let operand = row.operand;
    if let Some(len) = memory.len
        && len != expected
    {
        return Err(match operand {
            Operand::Total => Error::TotalLength { len, expected },
            Operand::SeedOffset => Error::SeedOffsetLength { len: len / WORDS_EACH },
            Operand::CumulativeQ | Operand::CumulativeK | Operand::StartsQ | Operand::StartsK => {
                Error::LengthsLength { operand, len, expected }
            }
            Operand::LengthsQ | Operand::LengthsK => Error::LengthsLength { operand, len, expected },
            Operand::Lse | Operand::DLse => Error::LseLength { operand, len, expected },
            _ => Error::HeadsLength { operand, len, expected, shape: row.shape },
        });
    }
    if expected == 0 {
        return Ok(());
    }
    check_span(operand, memory.address, line_bytes(expected))?;
    check_address(operand, memory.address, space.line_alignment(operand))
}

/// Returns the size of a line.
fn line_bytes(len: usize) -> u128 {
    len as u128 * size_of::<f32>() as u128
}

/// Checks that an output's rows share no memory.
fn check_rows_apart(operand: Operand, layout: &Layout) -> Result<()> {
    self_alias(layout).map_or(Ok(()), |alias| {
        Err(Error::OutputAliasesItself { operand, dim: alias.dim, stride: alias.stride, required: alias.required })
    })
}

fn check_strides(operand: Operand, layout: &Layout) -> Result<()> {
    let multiple = GRAIN;
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

/// Checks the address of a dropout mask of so many bytes.
#[cfg(feature = "cuda")]
pub(crate) fn check_memory_of_mask(address: u64, bytes: u128) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    check_span(Operand::DropoutMask, address, bytes)?;
    check_address(Operand::DropoutMask, address, 1)
}

/// Checks that the tensor's last byte has an address, and that offsets from its first fit in 63 bits.
pub(super) fn check_span(operand: Operand, address: u64, bytes: u128) -> Result<()> {
    let limit = (u64::MAX as u128 + 1 - address as u128).min(i64::MAX as u128);
    if bytes > limit {
        return Err(Error::SpanTooLarge { operand, address, bytes, limit });
    }
    Ok(())
}

/// Checks that an address of something is not null, and aligned.
pub(super) fn check_address(operand: Operand, address: u64, alignment: usize) -> Result<()> {
    if address == 0 {
        return Err(Error::NullPointer { operand });
    }
    if !address.is_multiple_of(alignment as u64) {
        return Err(Error::Misaligned { operand, address, alignment: alignment as u64 });
    }
    Ok(())
}
