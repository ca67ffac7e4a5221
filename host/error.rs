//! One error type for the whole crate. Each variant names the field, its value and what is allowed.
//!
//! Every mistake of a caller is found before anything is launched. Only the variants from [`Error::OutOfMemory`] on
//! come from the machine.

mod operand;

use kernels_gpu::variants::{Dtype, Op};

use crate::plan::Needs;
pub use operand::{Dim, Operand};

/// Result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// Reason why an attention could not be computed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A count of the problem is 0 where at least 1 is needed.
    #[error("{field} is 0; at least 1 is needed")]
    Zero {
        /// The field of [`Problem`](crate::Problem).
        field: &'static str,
    },
    /// The number of query heads is no multiple of the number of key heads.
    #[error("heads_q is {heads_q}; a multiple of heads_kv, which is {heads_kv}, is needed")]
    HeadsNotDivisible {
        /// Query heads asked for.
        heads_q: usize,
        /// Key and value heads asked for.
        heads_kv: usize,
    },
    /// The head dim has no kernel.
    #[error("head_dim is {value}; allowed are the multiples of 8 from 8 to 256")]
    HeadDim {
        /// The head dim asked for.
        value: usize,
    },
    /// A number is beyond what kernels or addresses can hold.
    #[error("{field} is {value}; at most {limit} is allowed")]
    TooLarge {
        /// Name of the quantity.
        field: &'static str,
        /// The number, capped at `u128::MAX`.
        value: u128,
        /// The largest number allowed.
        limit: u128,
    },
    /// The softmax scale is zero, negative or not finite.
    #[error("scale is {value}; a finite number above 0 is needed")]
    Scale {
        /// The scale asked for.
        value: f32,
    },
    /// The bound of the scores is zero, negative or not finite.
    #[error("softcap is {value}; a finite number above 0 is needed")]
    Softcap {
        /// The bound asked for.
        value: f32,
    },
    /// Scale and softcap are so far apart, or so small, that f32 does not hold a quotient that kernels multiply by.
    #[error("{factor} is {value} in f32; a finite number above 0 is needed")]
    ScoreFactor {
        /// The quotient.
        factor: &'static str,
        /// Its value in f32.
        value: f32,
    },
    /// The probability of dropout is negative, 1 or above, or not a number.
    #[error("dropout.p is {value}; at least 0 and below 1 is needed")]
    Dropout {
        /// The probability asked for.
        value: f32,
    },
    /// A text names no mask.
    #[error("mask is {value:?}; allowed are \"none\", \"causal\" and \"window:LEFT:RIGHT\", with none for no bound")]
    UnknownMask {
        /// The text.
        value: String,
    },
    /// No kernel was compiled for the pass.
    #[error("no kernel is compiled for {needs}")]
    NoVariant {
        /// Properties that the pass needs of the kernel.
        needs: Needs,
    },
    /// A plan of piecewise attention was given one pair of Q and K, or another plan two.
    #[error("second is {}; a plan of {} needs {}", if *.given { "given" } else { "missing" }, op.name(),
        if *.given { "none" } else { "a second pair of queries and keys" })]
    SecondPair {
        /// Operator that the plan computes.
        op: Op,
        /// True if there was a second pair.
        given: bool,
    },
    /// A call has other slopes or sinks than its plan was made for, the gradient of sinks without sinks, or seed and
    /// offset of dropout in memory for a plan with fixed ones, or the opposite.
    #[error("{operand}: the call has {found}; the plan needs {planned}")]
    OptionalInput {
        /// The slopes, the sinks, their gradient, or seed and offset.
        operand: Operand,
        /// What the call has.
        found: &'static str,
        /// What the plan was made for.
        planned: &'static str,
    },
    /// The tensors' element type is not the problem's.
    #[error("the tensors' elements are {}; the problem's dtype is {}", found.name(), expected.name())]
    DtypeMismatch {
        /// Element type of the tensors.
        found: Dtype,
        /// Element type of the problem.
        expected: Dtype,
    },
    /// A tensor's shape is not the one that follows from the problem.
    #[error("{operand}.shape is {shape:?}; the problem needs {expected:?} (batch, heads, seqlen, head_dim)")]
    ShapeMismatch {
        /// The tensor.
        operand: Operand,
        /// Shape of the tensor.
        shape: [usize; 4],
        /// The shape that follows from the problem.
        expected: [usize; 4],
    },
    /// A stride is not a multiple of 16 bytes.
    #[error("{operand}.strides: the {dim} stride is {stride} elements; a multiple of {multiple} (16 bytes) is needed")]
    StrideNotMultiple {
        /// The tensor.
        operand: Operand,
        /// The dimension whose stride it is.
        dim: Dim,
        /// The stride, in elements.
        stride: usize,
        /// Number of elements that the stride must be a multiple of.
        multiple: usize,
    },
    /// A stride is too large for TMA, which counts up to 2^40 bytes.
    #[error("{operand}.strides: the {dim} stride is {stride} elements; at most {limit} are allowed (under 2^40 bytes)")]
    StrideTooLarge {
        /// The tensor.
        operand: Operand,
        /// The dimension whose stride it is.
        dim: Dim,
        /// The stride, in elements.
        stride: usize,
        /// The largest stride allowed, in elements.
        limit: u64,
    },
    /// A tensor reaches beyond what an address can hold.
    #[error("{operand} spans {bytes} bytes from address {address:#x}; at most {limit} are allowed")]
    SpanTooLarge {
        /// The tensor.
        operand: Operand,
        /// Address of its first element.
        address: u64,
        /// Bytes from its first element to the end of its last.
        bytes: u128,
        /// Maximum number of bytes.
        limit: u128,
    },
    /// A buffer ends before the last element of its layout.
    #[error("{operand} has {len} elements; its layout needs {required}")]
    BufferTooSmall {
        /// The tensor.
        operand: Operand,
        /// Elements of the buffer.
        len: usize,
        /// Elements that the layout spans.
        required: u128,
    },
    /// The buffer of the LSE, or of its gradient, is not exactly (batch, heads_q, seqlen_q).
    #[error("{operand} has {len} elements; exactly {expected} are needed (batch × heads_q × seqlen_q)")]
    LseLength {
        /// The LSE or its gradient.
        operand: Operand,
        /// Elements of the buffer.
        len: usize,
        /// Elements that the problem has.
        expected: usize,
    },
    /// The buffer of the total attention is not exactly (batch, heads_q, seqlen_k).
    #[error("total has {len} elements; exactly {expected} are needed (batch × heads_q × seqlen_k)")]
    TotalLength {
        /// Elements of the buffer.
        len: usize,
        /// Elements that the problem has.
        expected: usize,
    },
    /// The buffer of slopes, of sinks or of the sinks' gradient has not exactly one element for each head, or for each
    /// batch item and head.
    #[error("{operand} has {len} elements; exactly {expected} are needed ({shape})")]
    HeadsLength {
        /// The slopes, the sinks or their gradient.
        operand: Operand,
        /// Elements of the buffer.
        len: usize,
        /// Elements that the problem has.
        expected: usize,
        /// The shape whose elements they are.
        shape: &'static str,
    },
    /// A buffer of sequences' lengths has not one element for each sequence, and one more if they are cumulative.
    #[error("{operand} has {len} element{}; exactly {expected} are needed", if *len == 1 { "" } else { "s" })]
    LengthsLength {
        /// The buffer.
        operand: Operand,
        /// Elements of the buffer.
        len: usize,
        /// Elements that the sequences need.
        expected: usize,
    },
    /// A sequence does not lie within the tensor, or begins before the end of the one before it.
    #[error(
        "{operand}[{index}] is {value}; a number from {least} to {most} is needed, because sequences follow one \
         another in the tensor"
    )]
    SequencePlace {
        /// The array of lengths.
        operand: Operand,
        /// Index of the element.
        index: usize,
        /// The element.
        value: i32,
        /// Least value.
        least: i64,
        /// Largest value.
        most: i64,
    },
    /// Queries, keys and values share a packed tensor, but their numbers of rows differ.
    #[error("seqlen_q is {seqlen_q} and seqlen_k {seqlen_k}; packed queries, keys and values need equal ones")]
    PackedLengths {
        /// Queries.
        seqlen_q: usize,
        /// Keys.
        seqlen_k: usize,
    },
    /// A text that names no lengths of sequences.
    #[error(
        "lengths are {value:?}; queries x keys of each sequence are needed, as in 7x7,0x12,137x349, or none, or \
         log-normal:SEQUENCES:TOKENS:SEED"
    )]
    UnknownLengths {
        /// The text.
        value: String,
    },
    /// Sequences of different lengths share one tensor, whose batch is 1.
    #[error("batch is {value}; sequences of different lengths share one tensor, and need a batch of 1")]
    BatchOfSequences {
        /// The batch.
        value: usize,
    },
    /// The buffer of dropout's seed and offset is not exactly these two.
    #[error("seed_offset has {len} elements; exactly 2 are needed (seed, offset)")]
    SeedOffsetLength {
        /// Elements of the buffer.
        len: usize,
    },
    /// The buffer of a dropout mask is not exactly (batch, heads_q, seqlen_q, seqlen_k).
    #[error("dropout_mask has {len} elements; exactly {expected} are needed (batch × heads_q × seqlen_q × seqlen_k)")]
    MaskLength {
        /// Elements of the buffer.
        len: usize,
        /// Elements that the problem has.
        expected: u128,
    },
    /// The workspace is smaller than the plan asks for.
    #[error("workspace has {bytes} bytes; the plan needs {required}")]
    WorkspaceTooSmall {
        /// Bytes of the workspace.
        bytes: usize,
        /// Bytes that the plan needs.
        required: usize,
    },
    /// A device pointer is null although the tensor is not empty.
    #[error("{operand} is a null pointer; its tensor is not empty")]
    NullPointer {
        /// The tensor.
        operand: Operand,
    },
    /// A device pointer is not aligned.
    #[error("{operand} is at address {address:#x}; a multiple of {alignment} bytes is needed")]
    Misaligned {
        /// The tensor.
        operand: Operand,
        /// Its address.
        address: u64,
        /// The alignment needed, in bytes.
        alignment: u64,
    },
    /// Rows of an output share memory, or its dimensions do not nest.
    #[error(
        "{operand}.strides: the {dim} stride is {stride} elements; an output's rows must not share memory, so at least \
         {required} are needed here"
    )]
    OutputAliasesItself {
        /// The output.
        operand: Operand,
        /// The dimension whose stride is too small.
        dim: Dim,
        /// The stride, in elements.
        stride: usize,
        /// Elements that the dimensions within it span.
        required: u128,
    },
    /// An output shares memory with another tensor.
    #[error("{output} overlaps {other}; an output needs memory of its own")]
    Overlap {
        /// The output.
        output: Operand,
        /// The tensor that it overlaps.
        other: Operand,
    },
    /// A tensor lies on another device than the backend's.
    #[error(
        "{operand} lies on device {found}; the backend is device {expected}: copy it there, or use a backend of its \
         device"
    )]
    WrongDevice {
        /// The tensor.
        operand: Operand,
        /// Device that it lies on.
        found: u32,
        /// The backend's device.
        expected: u32,
    },
    /// A stream belongs to another context than the primary one of the backend's device.
    #[error("the stream is not one of the primary context of device {device}: pass a stream that was made in it")]
    WrongContext {
        /// The backend's device.
        device: u32,
    },
    /// A backend was to be made for `CU_STREAM_PER_THREAD`, which is a different stream in each thread.
    #[error("the stream is CU_STREAM_PER_THREAD, which is another stream in each thread: pass one that was made")]
    ThreadStream,
    /// Memory was to be allocated on a stream that is captured into a graph.
    #[error("{operand} can't be allocated while the stream is captured into a graph: allocate it before the capture")]
    Capturing {
        /// Tensor that the memory is for.
        operand: Operand,
    },
    /// Memory for a result could not be allocated.
    #[error("no memory for {bytes} bytes of {operand}")]
    OutOfMemory {
        /// Tensor that it was for.
        operand: Operand,
        /// Bytes asked for.
        bytes: u128,
    },
    /// A kernel violated its own protocol: a bug of this crate, found by the CPU executor. Outputs are unspecified.
    #[error("kernel {symbol} failed in CTA {cta}: {message}")]
    KernelFault {
        /// The kernel.
        symbol: &'static str,
        /// The CTA.
        cta: u32,
        /// Message of the executor.
        message: String,
    },
    /// There is no CUDA device, or no driver.
    #[error("no CUDA device: {reason}")]
    NoDevice {
        /// Missing driver, function or device.
        reason: String,
    },
    /// No kernel is compiled for the device.
    #[error("{name} has compute capability {major}.{minor}; {needed} is needed")]
    UnsupportedDevice {
        /// The device's name.
        name: String,
        /// The device's compute capability, before the point.
        major: u32,
        /// The device's compute capability, after the point.
        minor: u32,
        /// Compute capability that this build has kernels for.
        needed: &'static str,
    },
    /// A kernel of this build can't be used: a bug of this crate or a damaged build.
    #[error("kernel {symbol} can't be used: {message}")]
    BrokenKernel {
        /// The kernel.
        symbol: &'static str,
        /// Defect of the kernel.
        message: String,
    },
    /// A call of the CUDA driver failed.
    #[error("{call} failed: {message}")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// The `CUresult` that it returned.
        code: u32,
        /// Message of the driver.
        message: String,
    },
}

impl Error {
    /// True if the caller's input is at fault, and not the machine or this crate.
    pub fn is_bad_input(&self) -> bool {
        !matches!(
            self,
            Error::OutOfMemory { .. }
                | Error::KernelFault { .. }
                | Error::NoDevice { .. }
                | Error::UnsupportedDevice { .. }
                | Error::BrokenKernel { .. }
                | Error::Driver { .. }
        )
    }
}
