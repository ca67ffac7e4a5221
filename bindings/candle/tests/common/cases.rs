//! Every case.

use candle_core::DType;
use ferroflash_candle::{Dropout, Mask};

/// One case: what is computed, how the inputs lie in memory, and what the loss depends on.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub name: &'static str,
    pub dtype: DType,
    pub size: Size,
    pub mask: Mask,
    pub inputs: Inputs,
    pub softcap: Option<f32>,
    pub slopes: Slopes,
    pub sinks: Sinks,
    pub dropout: Dropout,
    pub loss: Loss,
}

#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub batch: usize,
    pub heads_q: usize,
    pub heads_kv: usize,
    pub seqlen_q: usize,
    pub seqlen_k: usize,
    pub head_dim: usize,
}

/// Memory of Q, K and V.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Inputs {
    /// Three tensors (batch, seqlen, heads, head_dim).
    Separate,
    /// Three tensors (batch, heads, seqlen, head_dim).
    HeadsFirst,
    /// One tensor (batch, seqlen, 3, heads, head_dim).
    Packed,
    /// Three tensors (batch, seqlen, head_dim, heads): the last dim is strided.
    StridedHeadDim,
    /// Three tensors that begin 3 elements after the start of an allocation.
    Misaligned,
    /// K and V of one head, repeated for all by a stride of 0.
    Repeated,
}

/// Slopes of ALiBi.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Slopes {
    None,
    /// f32 (heads).
    PerHead,
    /// f32 (batch, heads).
    PerItem,
    /// f32 (batch, heads) with the dims transposed in memory.
    Transposed,
}

/// Sinks, f32 (heads).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sinks {
    None,
    /// Sinks without a gradient.
    Constant,
    /// A variable.
    Variable,
    /// Every second element of a variable.
    Strided,
}

/// What the loss depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Loss {
    /// O, each element with a weight of its own.
    Output,
    /// The sum of O, whose gradient is one number.
    Sum,
    /// The LSE.
    Lse,
    /// O and the LSE.
    Both,
}

const SIZE: Size = Size { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 136, seqlen_k: 200, head_dim: 64 };
const CASE: Case = Case {
    name: "",
    dtype: DType::BF16,
    size: SIZE,
    mask: Mask::None,
    inputs: Inputs::Separate,
    softcap: None,
    slopes: Slopes::None,
    sinks: Sinks::None,
    dropout: Dropout::NONE,
    loss: Loss::Output,
};
const SQUARE: Size = Size { heads_kv: 4, seqlen_k: 136, ..SIZE };
const DROPOUT: Dropout = Dropout { p: 0.25, seed: 3, offset: 5 };
/// Everything at once.
const ALL: Case = Case {
    dtype: DType::F16,
    mask: Mask::Window { left: Some(70), right: Some(20) },
    softcap: Some(2.0),
    slopes: Slopes::PerItem,
    sinks: Sinks::Variable,
    dropout: DROPOUT,
    loss: Loss::Both,
    ..CASE
};

/// Every case.
pub const CASES: &[Case] = &[
    Case { name: "bf16", ..CASE },
    Case { name: "bf16_causal", mask: Mask::Causal, ..CASE },
    Case { name: "f16", dtype: DType::F16, ..CASE },
    Case { name: "f16_causal", dtype: DType::F16, mask: Mask::Causal, ..CASE },
    Case { name: "packed_qkv", size: SQUARE, mask: Mask::Causal, inputs: Inputs::Packed, ..CASE },
    Case { name: "gradient_of_a_sum", mask: Mask::Causal, loss: Loss::Sum, ..CASE },
    Case { name: "strided_head_dim", inputs: Inputs::StridedHeadDim, ..CASE },
    Case { name: "misaligned", inputs: Inputs::Misaligned, ..CASE },
    Case { name: "heads_first", mask: Mask::Causal, inputs: Inputs::HeadsFirst, ..CASE },
    Case { name: "repeated_heads", inputs: Inputs::Repeated, ..CASE },
    Case { name: "one_key_head", size: Size { heads_kv: 1, ..SIZE }, mask: Mask::Causal, ..CASE },
    Case { name: "gradient_of_the_lse", mask: Mask::Causal, loss: Loss::Lse, ..CASE },
    Case { name: "gradient_of_both", dtype: DType::F16, mask: Mask::Causal, loss: Loss::Both, ..CASE },
    Case { name: "window", mask: Mask::Window { left: Some(30), right: Some(10) }, ..CASE },
    Case { name: "causal_window", mask: Mask::Window { left: Some(50), right: Some(0) }, ..CASE },
    Case { name: "rows_without_keys", size: Size { seqlen_q: 200, seqlen_k: 136, ..SIZE }, mask: Mask::Causal, ..CASE },
    Case { name: "one_query", size: Size { seqlen_q: 1, seqlen_k: 300, ..SIZE }, mask: Mask::Causal, ..CASE },
    Case { name: "head_dim_40", size: Size { head_dim: 40, ..SIZE }, mask: Mask::Causal, ..CASE },
    Case { name: "head_dim_128", size: Size { head_dim: 128, ..SIZE }, mask: Mask::Causal, ..CASE },
    Case { name: "head_dim_256", size: Size { head_dim: 256, ..SIZE }, ..CASE },
    Case { name: "dropout", mask: Mask::Causal, dropout: DROPOUT, ..CASE },
    Case { name: "softcap", softcap: Some(2.0), ..CASE },
    Case {
        name: "softcap_causal",
        dtype: DType::F16,
        mask: Mask::Causal,
        softcap: Some(2.0),
        loss: Loss::Both,
        ..CASE
    },
    Case { name: "alibi", slopes: Slopes::PerHead, ..CASE },
    Case { name: "alibi_causal", dtype: DType::F16, mask: Mask::Causal, slopes: Slopes::PerHead, ..CASE },
    Case { name: "alibi_per_item", slopes: Slopes::PerItem, loss: Loss::Both, ..CASE },
    Case {
        name: "alibi_heads_first",
        mask: Mask::Window { left: Some(30), right: Some(10) },
        inputs: Inputs::HeadsFirst,
        slopes: Slopes::Transposed,
        ..CASE
    },
    Case { name: "sinks", sinks: Sinks::Variable, ..CASE },
    Case { name: "sinks_causal", dtype: DType::F16, mask: Mask::Causal, sinks: Sinks::Variable, ..CASE },
    Case { name: "sinks_gradient_of_the_lse", sinks: Sinks::Variable, loss: Loss::Lse, ..CASE },
    Case { name: "sinks_gradient_of_both", mask: Mask::Causal, sinks: Sinks::Variable, loss: Loss::Both, ..CASE },
    Case { name: "sinks_without_gradient", mask: Mask::Causal, sinks: Sinks::Constant, ..CASE },
    Case { name: "sinks_strided", sinks: Sinks::Strided, inputs: Inputs::StridedHeadDim, ..CASE },
    Case {
        name: "sinks_rows_without_keys",
        size: Size { seqlen_q: 200, seqlen_k: 136, ..SIZE },
        mask: Mask::Causal,
        sinks: Sinks::Variable,
        loss: Loss::Both,
        ..CASE
    },
    Case { name: "sinks_packed_qkv", size: SQUARE, inputs: Inputs::Packed, sinks: Sinks::Variable, ..CASE },
    Case { name: "sinks_repeated_heads", inputs: Inputs::Repeated, sinks: Sinks::Variable, ..CASE },
    Case { name: "softcap_and_alibi", softcap: Some(2.0), slopes: Slopes::PerHead, mask: Mask::Causal, ..CASE },
    Case { name: "softcap_and_sinks", softcap: Some(2.0), sinks: Sinks::Variable, mask: Mask::Causal, ..CASE },
    Case { name: "alibi_and_sinks", slopes: Slopes::PerHead, sinks: Sinks::Variable, ..CASE },
    Case { name: "sinks_and_dropout", sinks: Sinks::Variable, dropout: DROPOUT, ..CASE },
    Case { name: "all", ..ALL },
    Case { name: "all_one_key_head", dtype: DType::BF16, size: Size { heads_kv: 1, ..SIZE }, ..ALL },
    Case { name: "all_head_dim_128", size: Size { head_dim: 128, ..SIZE }, mask: Mask::Causal, ..ALL },
    Case { name: "all_head_dim_256", size: Size { head_dim: 256, ..SIZE }, ..ALL },
];
