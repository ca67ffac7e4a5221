//! Constants that were chosen by measurement: what each trades off, where and when it was measured.
//!
//! Functions that use them have a worked example in their comment. "Notebook N" is the entry of docs/notebook.md; a
//! constant without one was set with the commit named and its alternatives were not recorded. Unless a comment says
//! otherwise, figures are of bf16 on one H200 with 132 SMs, heads = 2048 / D and batch = 32768 / S. The tiles of each
//! kernel were measured too; they are in the tables of [`crate::variants`], one row per kernel.
//!
//! Counts of registers, and sizes that follow from the layout of tiles or from shared memory, stand next to the code
//! that depends on them.

// Order of work tiles: `attention/scheduler.rs`.

/// Maximum number of bytes of L2 for a section of more than one group of heads: most of an H200's 60 MB. A larger
/// section balances a causal mask's work better, but what its tiles share no longer stays in L2.
///
/// 2026-11-21 (c700b91), causal, S 16384, D 128 and 256; notebook 4, 6, 68. No other value is recorded.
pub const SECTION_L2_BYTES: u64 = 40 << 20;

/// Numbers of groups of heads per section that are tried besides 1, in this order. More candidates find a more even
/// schedule, and each takes a simulation on the host at every plan.
///
/// 2026-11-21 (c700b91), causal, S 16384; notebook 6. Seven was added on 2026-11-22 (aa9b70d), backward, D 128,
/// causal, S 1024: + 0.5 % together with notebook 59; notebook 62.
pub const SECTION_GROUPS: [u64; 10] = [2, 3, 4, 6, 7, 8, 12, 16, 24, 32];

/// Inverse of the gain in makespan, 1 %, from which a larger section is worth what it costs in L2.
///
/// 2026-11-21 (c700b91), causal, S 16384; notebook 6. Backward, sections larger than those chosen were slower at S 1024
/// to 4096; notebook 91.
pub const SECTION_MIN_GAIN_INVERSE: u64 = 100;

/// Inverse of the gain in makespan, 2.5 %, from which a section is worth its cost although it does not stay in L2.
///
/// 2026-11-23 (a5930b3), backward, causal, 32 query heads over 8 key heads, D 128, S 4096 to 16384; notebook 93.
pub const SECTION_MIN_GAIN_INVERSE_BEYOND_L2: u64 = 40;

/// Makespan, in percent of a perfectly even one, at which no further section is tried. It saves simulations on the
/// host, and keeps the smallest section that is good enough.
///
/// 2026-11-21 (7e6f813), causal, forward. No notebook entry.
pub const EVEN_ENOUGH_PERCENT: u64 = 102;

/// Number of tiles in a simulated schedule. With more of them a plan takes longer, and the result changes little.
///
/// 2026-11-21 (c700b91), causal, S 1024 to 16384. No notebook entry.
pub const TRIAL_TILES: u32 = 8192;

/// Cost of starting and storing a tile, in blocks of the mainloop. It counts against orders that give a CTA many short
/// tiles.
///
/// 2026-11-21 (c700b91), causal, forward. No notebook entry.
pub const TILE_START_BLOCKS: u64 = 1;

// Choice among the forward kernels of a head dim: `Variant::order` in `variants.rs`.

/// Cost of a score with three or more consumers, in thousandths of its cost with two. Two overlap less of each other's
/// softmax. A smaller number prefers the kernel with 192 query rows to that with 128, which wastes fewer.
///
/// 2026-11-21 (7e6f813), D 64, S 1024 to 16384; notebook 3, 16.
pub const THREE_CONSUMERS_PERMILLE: i32 = 850;

/// Number of keys from which a step is large, and [`LARGE_STEP_PERMILLE`] is added to its cost. Only blocks of 160 and
/// 176 keys were compared with those of 128.
///
/// 2026-11-21 (b40f731), D 128, no mask; notebook 21.
pub const LARGE_STEP_KEYS: u32 = 129;

/// Cost of a score in a large step relative to one in a medium step, in thousandths: the fixed cost of a step weighs
/// less. Large blocks waste more keys at the end of a row, so they win in long sequences alone.
///
/// 2026-11-21 (b40f731), D 128, no mask, blocks of 176 instead of 128 keys at S 1024, 4096, 16384: 570 → 566, 626 →
/// 616, 641 → 651 TFLOP/s; notebook 21.
pub const LARGE_STEP_PERMILLE: i32 = -25;

/// Number of keys from which a step is medium. Below it, [`SMALL_STEP_PERMILLE`] is added to its cost.
///
/// 2026-11-22 (7510054), D 256, causal, blocks of 64 and 80 keys; notebook 25.
pub const MEDIUM_STEP_KEYS: u32 = 80;

/// Cost of a score in a small step relative to one in a medium step, in thousandths. Small blocks follow a causal
/// mask's edge more closely, so they win in short sequences.
///
/// 2026-11-22 (7510054), D 256, causal, blocks of 64 instead of 80 keys at S 1024, 2048: 471 → 481, 566 → 562 TFLOP/s;
/// notebook 25.
pub const SMALL_STEP_PERMILLE: i32 = 65;

/// What a cluster of two CTAs saves of the cost of a score, in thousandths: each takes half of K and V from L2.
///
/// 2026-11-22 (a5c2311), no mask, D 96 to 256, S 1024, 4096, 16384: 0 to + 4 %; notebook 24.
pub const CLUSTER_SAVING_PERMILLE: i32 = 20;

/// Cost of a launch with clusters, in scores of one CTA: some 2 µs at D 256. It keeps clusters from short launches.
///
/// 2026-11-22 (a5c2311), D 256, batch 8, 8 heads, S 512: − 4 % with clusters; notebook 24.
pub const CLUSTER_START_COST: u64 = 10_000;

// Forward mainloop: `kernels/forward.rs`.

/// Head dim above which O is rescaled only if a row maximum has moved. The check saves multiplications, which grow with
/// the head dim, but keeps ptxas from interleaving the instructions around it.
///
/// 2026-11-21 (7e6f813): D 256 0 to + 3 %, D 128 − 5 %; notebook 20.
pub const RESCALE_CHECK_ABOVE_HEAD_DIM: u32 = 128;

// Backward mainloop: `kernels/backward.rs`, `arch/sm90/backward.rs`.

/// Largest head dim at which a consumer passes on the ping-pong barrier before it issues dP instead of after it. That
/// pays if exponentials take as long as products.
///
/// 2026-11-21 (8bc861c, 223efdc): D 64 + 4 to + 9 % relative to the kernels before notebook 41, D 128 and 256 − 2 to
/// − 5 %; notebook 44.
pub const PING_PONG_BEFORE_DP_MAX_HEAD_DIM: u32 = 64;

/// Head dim at which S of the next block is issued before dV and dK are waited for. Tensor cores then do not run empty,
/// but dP has to wait for the registers of P and dS.
///
/// 2026-11-22 (aa9b70d), S 1024, 4096, 16384: D 128 + 0.5 to + 1.3 %, D 256 − 1 to + 0.3 %; notebook 59.
pub const QUEUED_SCORES_HEAD_DIM: u32 = 128;

/// Largest head dim at which a consumer reads its index again at each use. That takes time, but saves a register: D 64
/// spills otherwise. With dropout all head dims do, because the keys of Philox occupy the uniform registers.
///
/// 2026-11-21 (14572c7): D 128 and 256 − 1 to − 4 %; notebook 45.
pub const REREAD_INDEX_MAX_HEAD_DIM: u32 = 64;

// Backward mainloop of the third warpgroup, `arch/sm90/backward_dq.rs`: the tile of a query block's dQ, counted from 0,
// whose product overlaps the next loads. It is early, because the slots are empty by then, unless registers are needed
// for something else.

/// Tile of dQ that the loads overlap at head dim 64.
///
/// 2026-11-21 (ef8c272): second instead of last tile, with dS published during products; no mask 0, + 3, + 3 %;
/// notebook 47, where both were changed.
pub const LOADS_AT_DQ_TILE_D64: u32 = 1;

/// Tile of dQ that the loads overlap at head dim 128.
///
/// 2026-11-22 (c52d963): third instead of first tile, no mask + 1, + 1.7 %, causal 0; second or fourth tile − 1 to 0;
/// notebook 58.
pub const LOADS_AT_DQ_TILE_D128: u32 = 2;

/// Tile of dQ that the loads overlap at head dim 128 with two pairs.
///
/// 2026-11-21 (ef8c272). No notebook entry of its own.
pub const LOADS_AT_DQ_TILE_D128_TWO_PAIRS: u32 = 3;

/// Tile of dQ that the loads overlap at head dim 256.
///
/// 2026-11-23 (e6e832c), S 1024 and 4096: third tile, with 72 registers for this warpgroup, + 1.5 to + 2.3 %;
/// notebook 81.
pub const LOADS_AT_DQ_TILE_D256: u32 = 2;

// Backward pass, split tail: `attention/key_parts.rs`.

/// Maximum number of parts of a work tile. More parts fill more CTAs, but the postprocess kernel has more to sum.
///
/// 2026-11-22 (c3ee0ee), no mask, D 128, 64 work tiles of S 2048: 269 → 367 TFLOP/s with parts; notebook 65. No
/// other maximum is recorded.
pub const MAX_TILE_PARTS: u32 = 8;

// Backward pass, fast: initialisation of dQ by work tiles, `attention/first_tiles.rs`.

/// Number of waves from the work tile that initialises dQ to those that accumulate. The initialising tile takes as long
/// as two waves if a mask masks out half of the queries, and CTAs are not all equally far. More waves leave less of dQ
/// in L2.
///
/// 2026-11-22 (87d62a4), D 128 and 256, causal, four waves relative to 2.7: − 0.6 % at S 1024, + 1.9 and + 2.8 % at
/// S 4096, which [`DQ_INIT_MAX_KEY_BLOCKS`] excludes; notebook 73, 74.
pub const DQ_INIT_WAVES: u32 = 3;

/// Maximum number of blocks of keys per head. With more, zeroing is so small a part of the work that what is lost from
/// L2 outweighs it.
///
/// 2026-11-22 (87d62a4), D 128 and 256: S 1024 + 1 to + 3 %, S 4096 0 to − 2 %, S 16384, causal, down to − 4 %;
/// notebook 73.
pub const DQ_INIT_MAX_KEY_BLOCKS: u32 = 16;

/// Smallest head dim at which work tiles initialise dQ. Below it the zeros are too few to gain anything.
///
/// 2026-11-22 (87d62a4): D 64 within 1 %; notebook 73.
pub const DQ_INIT_MIN_HEAD_DIM: u32 = 128;

// Backward pass, exact: `attention/query_blocks.rs`, `BackwardVariant::exact_order` in `variants/backward.rs`.

/// Head dim above which exact passes use the constants for large heads, of which fewer stay in L2.
///
/// 2026-11-23 (4116606), D 256; notebook 82.
pub const EXACT_LARGE_ABOVE_HEAD_DIM: u32 = 128;

/// Number of query blocks that share one counter of the dQ semaphore. With more, a CTA waits and signals less often,
/// but key blocks of one head follow each other at a greater distance.
///
/// 2026-11-21, 401 → 476 TFLOP/s with four instead of one; notebook 38.
pub const DQ_SEMAPHORE_BLOCKS: u32 = 4;

/// [`DQ_SEMAPHORE_BLOCKS`] for large heads.
///
/// 2026-11-23 (4116606), D 256, S 1024, 4096, 16384: none 309, 368, 372 → 331, 397, 414 TFLOP/s, causal 226, 300, 304 →
/// 240, 311, 307, with two instead of one. Four had 145 to 272; notebook 82.
pub const DQ_SEMAPHORE_BLOCKS_LARGE: u32 = 2;

/// Minimum number of heads of a section without a mask.
///
/// 2026-11-21 (2823d16), D 64 and 128; notebook 39.
pub const EXACT_MIN_SECTION: u32 = 1;

/// [`EXACT_MIN_SECTION`] for large heads.
///
/// 2026-11-23 (e8f703c), D 256, S 16384. No notebook entry.
pub const EXACT_MIN_SECTION_LARGE: u32 = 2;

/// Minimum number of heads of a section under a causal mask. Neighbouring key blocks differ in their number of steps,
/// so that few heads wait more than without a mask.
///
/// 2026-11-21 (170041a), D 64 and 128, S 16384; notebook 39, 92.
pub const EXACT_MIN_SECTION_CAUSAL: u32 = 16;

/// [`EXACT_MIN_SECTION_CAUSAL`] for large heads.
///
/// 2026-11-23 (4116606), D 256, S 16384, causal: 314 → 378 TFLOP/s with sections of 4; notebook 82.
pub const EXACT_MIN_SECTION_CAUSAL_LARGE: u32 = 4;

/// Minimum number of steps that a key block is taken to have under a causal mask. It limits the sections of short
/// sequences.
///
/// 2026-11-21 (170041a), S 1024. Sections of 33 heads, which it gives at D 256, had 240 TFLOP/s and those of 40 to 66
/// heads 197 to 227; notebook 92.
pub const EXACT_MIN_STEPS_CAUSAL: u32 = 8;

// Total attention: `tile/smem_total.rs`.

/// Number of consumers from which one fragment of scores each suffices: the exponentials of one overlap the products of
/// the others. With fewer, each needs a second fragment, and so more registers.
///
/// 2026-11-21 (b6bba8a), D 64: 393 TFLOP/s at S 4096; 2026-11-23 (265d35c), D 128: 510 → 588 with four instead of
/// three; notebook 102, 120.
pub const ONE_FRAGMENT_CONSUMERS: u32 = 4;

/// Largest head dim at which a consumer keeps its keys in registers. Products then read only Q from shared memory, but
/// larger heads spill.
///
/// 2026-11-22 (3db8f93), D 64, S 16384: 395 → 399 TFLOP/s, causal 403 → 407; notebook 110. D 128 spills; notebook 120.
pub const KEYS_IN_REGISTERS_MAX_HEAD_DIM: u32 = 64;

/// Largest head dim at which some exponentials are polynomials: there the SFU is the limit.
///
/// 2026-11-23 (12fcf73), D 64, S 4096 and 16384: + 1.1 to + 2.3 %; notebook 116.
pub const POLYNOMIAL_MAX_HEAD_DIM: u32 = 64;

/// Number of queries at the end of a block of which every second has polynomials for exponentials: one query in sixteen
/// for blocks of 128. With more, other units cost more than the SFU saves.
///
/// 2026-11-23 (12fcf73), D 64, S 16384: one in sixteen + 1.5 to + 2.0 %, in 32 + 0.3 to + 1.6, in eight 0;
/// notebook 116.
pub const POLYNOMIAL_QUERIES: u32 = 16;
