//! Rows of the tables of kernels. Each is compiled for both dtypes, and covers what its fields say.
//!
//! The macros call `$apply!` with the rows; `entry` makes entry points from them, and `variants` the tables.

/// Calls `$apply!` with the rows of the forward pass.
#[macro_export]
macro_rules! forward_rows {
    ($apply:ident) => {
        $apply! {
            // Three consumers need fewer loads for each query row.
            d64: {
                family: "forward_d128", features: Scored, head_dim: 64, consumers: 3, block_n: 128, stages: 6,
                cluster: 1, masks: Any, prebuilt: ALL,
            }
            // Tiles of 128 query rows waste less of a short causal sequence (notebook 16).
            d64_m128: {
                family: "forward_d128", features: Plain, head_dim: 64, consumers: 2, block_n: 128, stages: 6,
                cluster: 1, masks: Any, prebuilt: FULL_AND_CAUSAL,
            }
            d96: {
                family: "forward_d128", features: Scored, head_dim: 96, consumers: 2, block_n: 128, stages: 5,
                cluster: 1, masks: Any, prebuilt: MOST,
            }
            // Clusters read K and V from L2 once (notebook 24).
            d96_c2: {
                family: "forward_d128", features: Plain, head_dim: 96, consumers: 2, block_n: 128, stages: 5,
                cluster: 2, masks: Full, prebuilt: CLUSTERED,
            }
            d128: {
                family: "forward_d128", features: Scored, head_dim: 128, consumers: 2, block_n: 128, stages: 5,
                cluster: 1, masks: Any, prebuilt: ALL,
            }
            // 176 keys are the largest block whose scores fit the registers (notebook 21).
            d128_n176: {
                family: "forward_d128", features: Plain, head_dim: 128, consumers: 2, block_n: 176, stages: 4,
                cluster: 1, masks: Full, prebuilt: FULL,
            }
            d128_n176_c2: {
                family: "forward_d128", features: Plain, head_dim: 128, consumers: 2, block_n: 176, stages: 4,
                cluster: 2, masks: Full, prebuilt: CLUSTERED,
            }
            d192: {
                family: "forward_d256", features: Scored, head_dim: 192, consumers: 2, block_n: 112, stages: 4,
                cluster: 1, masks: Any, prebuilt: MOST,
            }
            d192_c2: {
                family: "forward_d256", features: Plain, head_dim: 192, consumers: 2, block_n: 112, stages: 4,
                cluster: 2, masks: Full, prebuilt: CLUSTERED,
            }
            d256: {
                family: "forward_d256", features: Scored, head_dim: 256, consumers: 2, block_n: 80, stages: 4,
                cluster: 1, masks: Any, prebuilt: ALL,
            }
            d256_c2: {
                family: "forward_d256", features: Plain, head_dim: 256, consumers: 2, block_n: 80, stages: 4,
                cluster: 2, masks: Full, prebuilt: CLUSTERED,
            }
            // Blocks of 64 keys follow a mask's edge more closely (notebook 25).
            d256_n64: {
                family: "forward_d256", features: Plain, head_dim: 256, consumers: 2, block_n: 64, stages: 5,
                cluster: 1, masks: Bounded, prebuilt: CAUSAL,
            }
            d64_piecewise: {
                family: "piecewise", features: Piecewise, head_dim: 64, consumers: 3, block_n: 128, stages: 6,
                cluster: 1, masks: Any, prebuilt: MOST,
            }
            d64_m128_piecewise: {
                family: "piecewise", features: Piecewise, head_dim: 64, consumers: 2, block_n: 128, stages: 6,
                cluster: 1, masks: Any, prebuilt: MOST,
            }
            // Q of two pairs leaves room for four slots.
            d128_piecewise: {
                family: "piecewise", features: Piecewise, head_dim: 128, consumers: 2, block_n: 128, stages: 4,
                cluster: 1, masks: Any, prebuilt: MOST,
            }
            d256_piecewise: {
                family: "piecewise", features: Piecewise, head_dim: 256, consumers: 2, block_n: 64, stages: 3,
                cluster: 1, masks: Any, prebuilt: MOST,
            }
            // With dropout blocks are multiples of 32 keys, and three consumers lack registers.
            d64_dropout: {
                family: "forward_dropout", features: WithDropout, head_dim: 64, consumers: 2, block_n: 128,
                stages: 6, cluster: 1, masks: Any, prebuilt: MOST,
            }
            d128_dropout: {
                family: "forward_dropout", features: WithDropout, head_dim: 128, consumers: 2, block_n: 128,
                stages: 5, cluster: 1, masks: Any, prebuilt: MOST,
            }
            d256_dropout: {
                family: "forward_dropout", features: WithDropout, head_dim: 256, consumers: 2, block_n: 64,
                stages: 4, cluster: 1, masks: Any, prebuilt: MOST,
            }
            d64_piecewise_dropout: {
                family: "piecewise_dropout", features: PiecewiseWithDropout, head_dim: 64, consumers: 2,
                block_n: 128, stages: 6, cluster: 1, masks: Any, prebuilt: OPEN,
            }
            d128_piecewise_dropout: {
                family: "piecewise_dropout", features: PiecewiseWithDropout, head_dim: 128, consumers: 2,
                block_n: 128, stages: 4, cluster: 1, masks: Any, prebuilt: OPEN,
            }
            d256_piecewise_dropout: {
                family: "piecewise_dropout", features: PiecewiseWithDropout, head_dim: 256, consumers: 2,
                block_n: 64, stages: 3, cluster: 1, masks: Any, prebuilt: OPEN,
            }
        }
    };
}

/// Calls `$apply!` with the rows of the backward pass.
#[macro_export]
macro_rules! backward_rows {
    ($apply:ident) => {
        $apply! {
            d64: {
                family: "backward", features: Plain, head_dim: 64, block_m: 128, block_n: 128, split: Keys,
                k_stages: 1, prebuilt: FULL_AND_CAUSAL,
            }
            // With softcap or ALiBi, blocks of 128 queries lack registers.
            d64_scored: {
                family: "backward", features: Scored, head_dim: 64, block_m: 64, block_n: 128, split: Keys,
                k_stages: 1, prebuilt: SCORED,
            }
            d128: {
                family: "backward", features: Scored, head_dim: 128, block_m: 64, block_n: 128, split: Keys,
                k_stages: 2, prebuilt: ALL,
            }
            d256: {
                family: "backward", features: Scored, head_dim: 256, block_m: 64, block_n: 64, split: Gradients,
                k_stages: 1, prebuilt: ALL,
            }
            d64_piecewise: {
                family: "piecewise_backward", features: Piecewise, head_dim: 64, block_m: 64, block_n: 128,
                split: Keys, k_stages: 1, prebuilt: MOST,
            }
            d128_piecewise: {
                family: "piecewise_backward", features: Piecewise, head_dim: 128, block_m: 64, block_n: 128,
                split: Keys, k_stages: 1, prebuilt: MOST,
            }
            d256_piecewise: {
                family: "piecewise_backward", features: Piecewise, head_dim: 256, block_m: 64, block_n: 64,
                split: Gradients, k_stages: 1, prebuilt: MOST,
            }
            d64_dropout: {
                family: "backward_dropout", features: WithDropout, head_dim: 64, block_m: 64, block_n: 128,
                split: Keys, k_stages: 1, prebuilt: MOST,
            }
            d128_dropout: {
                family: "backward_dropout", features: WithDropout, head_dim: 128, block_m: 64, block_n: 128,
                split: Keys, k_stages: 1, prebuilt: MOST,
            }
            d256_dropout: {
                family: "backward_dropout", features: WithDropout, head_dim: 256, block_m: 64, block_n: 64,
                split: Gradients, k_stages: 1, prebuilt: MOST,
            }
            d64_piecewise_dropout: {
                family: "piecewise_backward_dropout", features: PiecewiseWithDropout, head_dim: 64, block_m: 64,
                block_n: 128, split: Keys, k_stages: 1, prebuilt: OPEN,
            }
            d128_piecewise_dropout: {
                family: "piecewise_backward_dropout", features: PiecewiseWithDropout, head_dim: 128, block_m: 64,
                block_n: 128, split: Keys, k_stages: 1, prebuilt: OPEN,
            }
            d256_piecewise_dropout: {
                family: "piecewise_backward_dropout", features: PiecewiseWithDropout, head_dim: 256, block_m: 64,
                block_n: 64, split: Gradients, k_stages: 1, prebuilt: OPEN,
            }
        }
    };
}

/// Calls `$apply!` with the postprocess kernels of the backward pass: one for each head dim and block of keys.
#[macro_export]
macro_rules! finish_rows {
    ($apply:ident) => {
        $apply! {
            d64: { head_dim: 64, block_n: 128 }
            d128: { head_dim: 128, block_n: 128 }
            d256: { head_dim: 256, block_n: 64 }
        }
    };
}

/// Calls `$apply!` with the rows of total attention.
#[macro_export]
macro_rules! total_rows {
    ($apply:ident) => {
        $apply! {
            d64: { head_dim: 64, consumers: 4, block_m: 128, stages: 6, }
            d128: { head_dim: 128, consumers: 4, block_m: 128, stages: 2, }
            d256: { head_dim: 256, consumers: 2, block_m: 96, stages: 2, }
        }
    };
}
