//! Names of tensors and of their dimensions, as errors say them.

use std::fmt;

/// A tensor of the operator, as errors name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Operand {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// The result.
    O,
    /// The log-sum-exp of each row's scores.
    Lse,
    /// The gradient of the result.
    DO,
    /// The gradient of the log-sum-exp.
    DLse,
    /// The gradient of the queries.
    Dq,
    /// The gradient of the keys.
    Dk,
    /// The gradient of the values.
    Dv,
    /// The gradients of packed keys and values.
    Dkv,
    /// The gradients of packed queries, keys and values.
    Dqkv,
    /// Queries of the second pair of piecewise attention.
    Q2,
    /// Keys of the second pair.
    K2,
    /// The gradient of the second pair's queries.
    Dq2,
    /// The gradient of the second pair's keys.
    Dk2,
    /// Slopes of ALiBi.
    Slopes,
    /// Logits without a value in the softmax.
    Sinks,
    /// The gradient of the sinks.
    DSinks,
    /// Seed and offset of dropout, in memory.
    SeedOffset,
    /// Cumulative lengths of sequences' queries.
    CumulativeQ,
    /// Cumulative lengths of sequences' keys.
    CumulativeK,
    /// First query of each sequence.
    StartsQ,
    /// First key of each sequence.
    StartsK,
    /// Number of queries of each sequence.
    LengthsQ,
    /// Number of keys of each sequence.
    LengthsK,
    /// Memory that the kernels of a backward pass use to pass results to each other.
    Workspace,
    /// The total attention of each key.
    Total,
    /// Dropout mask.
    DropoutMask,
    /// The host's copy of a buffer.
    Download,
    /// Another crate's memory.
    Foreign,
}

impl fmt::Display for Operand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Operand::Q => "q",
            Operand::K => "k",
            Operand::V => "v",
            Operand::O => "o",
            Operand::Lse => "lse",
            Operand::DO => "d_o",
            Operand::DLse => "d_lse",
            Operand::Dq => "dq",
            Operand::Dk => "dk",
            Operand::Dv => "dv",
            Operand::Dkv => "dkv",
            Operand::Dqkv => "dqkv",
            Operand::Q2 => "q2",
            Operand::K2 => "k2",
            Operand::Dq2 => "dq2",
            Operand::Dk2 => "dk2",
            Operand::Slopes => "slopes",
            Operand::Sinks => "sinks",
            Operand::DSinks => "d_sinks",
            Operand::SeedOffset => "seed_offset",
            Operand::CumulativeQ => "cu_seqlens_q",
            Operand::CumulativeK => "cu_seqlens_k",
            Operand::StartsQ => "starts_q",
            Operand::StartsK => "starts_k",
            Operand::LengthsQ => "seqused_q",
            Operand::LengthsK => "seqused_k",
            Operand::Workspace => "workspace",
            Operand::Total => "total",
            Operand::DropoutMask => "dropout_mask",
            Operand::Download => "the copy of a buffer",
            Operand::Foreign => "the memory",
        })
    }
}

/// A dimension with a stride, as errors name it. Its number is its index in
/// [`Layout::strides`](crate::Layout::strides).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dim {
    /// Items of the batch.
    Batch,
    /// Heads.
    Heads,
    /// Rows of one head.
    Seqlen,
}

impl Dim {
    /// The dimensions in the order of [`Layout::strides`](crate::Layout::strides).
    pub const ALL: [Dim; 3] = [Dim::Batch, Dim::Heads, Dim::Seqlen];
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Dim::Batch => "batch",
            Dim::Heads => "heads",
            Dim::Seqlen => "seqlen",
        })
    }
}
