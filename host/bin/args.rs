//! The flags.

use clap::{Args, Parser, Subcommand, ValueEnum};
use ferroflash::cases::{Case, CaseLengths, Gaps, Order};
use ferroflash::{Determinism, Dtype, Mask, Problem};

use crate::op::OpName;
use crate::shaping::ShapingArgs;

/// Exact attention on NVIDIA GPUs and on the CPU.
#[derive(Parser)]
#[command(
    version,
    about,
    after_help = "\
Examples:
  ferroflash check                              50 random cases, both passes, against the f64 reference
  ferroflash check --head-dim 128 --mask causal one case
  ferroflash bench --json results.json          a sweep of head dims, lengths and masks
  ferroflash info                               devices and compiled kernels"
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Devices, driver, compiled kernels and what compiled them.
    Info(InfoArgs),
    /// Compare results with the f64 reference.
    Check(CheckArgs),
    /// Measure speed.
    Bench(BenchArgs),
}

impl Command {
    /// The device that was asked for.
    pub fn device(&self) -> Option<DeviceName> {
        match self {
            Command::Info(args) => args.device.device,
            Command::Check(args) => args.device.device,
            Command::Bench(args) => args.device.device,
        }
    }
}

/// Where to run.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceName {
    Cpu,
    Cuda,
}

#[derive(Args)]
pub struct DeviceArgs {
    /// Where to run; by default the GPU where there is one and the build has the feature `cuda`, otherwise the CPU.
    #[arg(long)]
    pub device: Option<DeviceName>,
}

#[derive(Args)]
pub struct PassArgs {
    /// Passes to run.
    #[arg(long, value_delimiter = ',', default_value = "forward,backward")]
    pub op: Vec<OpName>,
    /// Whether gradients are the same bits on every run (exact, slower); the results of the forward pass always are.
    #[arg(long, value_parser = determinism, default_value = "fast", value_name = "fast|exact")]
    pub determinism: Determinism,
    /// Probability that an attention weight is dropped: at least 0 and below 1.
    #[arg(long, value_parser = dropout, default_value = "0", value_name = "P", allow_negative_numbers = true)]
    pub dropout: f32,
    #[command(flatten)]
    pub shaping: ShapingArgs,
}

#[derive(Args)]
pub struct InfoArgs {
    #[command(flatten)]
    pub device: DeviceArgs,
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  ferroflash check --cases 200 --seed 7
  ferroflash check --seqlen-q 1023 --seqlen-k 1024 --heads-q 6 --heads-kv 2 --dtype f16 --mask causal
  ferroflash check --op backward --determinism exact --mask causal --head-dim 128
  ferroflash check --op piecewise,piecewise-backward --mask causal --dist-threshold 100
  ferroflash check --op total-attention --seqlen-q 1000 --seqlen-k 300
  ferroflash check --dropout 0.1 --head-dim 128
  ferroflash check --softcap 30 --alibi --sinks --window 200,0 --head-dim 128
  ferroflash check --lengths 7x7,0x12,137x349 --mask causal
  ferroflash check --random-lengths --cases 200
  ferroflash check --op forward --device cuda --seqlen-q 1048576 --seqlen-k 1048576 --heads-q 1 --heads-kv 1

With --cases, or with no flag that describes a case, shapes are drawn at random from the seed, and so are softcap, ALiBi
and sinks unless their flags are given. Otherwise one case runs.
Where the reference would take minutes, as with a million tokens, a sample of query rows is judged; gradients and total
attention can't be sampled, and such a case has no check of them. dO is random, and so is dLSE where the seed is odd.

Above a limit of the largest |LSE| of a row, the bar says nothing about a result (docs/numerics.md): O above 4096 in f16 \
and 32768 in bf16, gradients above 2048 and 16384, total attention above 128, the LSE above 6.7e7 and 5.4e8. Such a case \
runs and is neither passed nor failed, but \"beyond the limit\", and is counted apart. It fails only if it writes outside \
its outputs or, up to the limit of the LSE, if O has another NaN or infinity than the reference, or the LSE misses its bar.

Exit code 0 when no case fails, 1 when one does or can't run, 2 for bad flags.")]
pub struct CheckArgs {
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub pass: PassArgs,
    /// Random cases to run [default: 50].
    #[arg(long, conflicts_with = "case", value_parser = clap::value_parser!(u64).range(1..))]
    pub cases: Option<u64>,
    /// Sequences of random lengths in every random case.
    #[arg(long, conflicts_with = "case")]
    pub random_lengths: bool,
    /// Seed of the cases, of their inputs and of dropout.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    #[command(flatten)]
    pub case: Option<CaseArgs>,
}

#[derive(Args)]
#[group(id = "case", multiple = true)]
pub struct CaseArgs {
    #[arg(long, default_value_t = 1)]
    pub batch: usize,
    #[arg(long, default_value_t = 4)]
    pub heads_q: usize,
    /// Divides heads_q [default: heads_q].
    #[arg(long)]
    pub heads_kv: Option<usize>,
    #[arg(long, default_value_t = 512)]
    pub seqlen_q: usize,
    /// [default: seqlen_q]
    #[arg(long)]
    pub seqlen_k: Option<usize>,
    /// A multiple of 8 from 8 to 256.
    #[arg(long, default_value_t = 64)]
    pub head_dim: usize,
    #[arg(long, value_parser = dtype, default_value = "bf16", value_name = "f16|bf16")]
    pub dtype: Dtype,
    /// none, causal, or window:LEFT:RIGHT (keys before and behind the query's place, or none for no bound). All are
    /// aligned to the bottom right.
    #[arg(long, value_parser = mask, default_value = "none", value_name = "none|causal|window:L:R")]
    pub mask: Mask,
    /// The same as --mask window:LEFT:RIGHT.
    #[arg(long, value_parser = window, value_name = "LEFT,RIGHT", conflicts_with = "mask")]
    pub window: Option<Mask>,
    /// Factor of the scores [default: 1/√head_dim].
    #[arg(long, allow_negative_numbers = true)]
    pub scale: Option<f32>,
    /// The distance from which on scores come from the second pair, for piecewise attention [default: seqlen_k / 2].
    #[arg(long, allow_negative_numbers = true)]
    pub dist_threshold: Option<i32>,
    /// Order of the dimensions in memory.
    #[arg(long, value_parser = order, default_value = "bhsd", value_name = "bhsd|bshd")]
    pub layout: Order,
    /// Queries x keys of each sequence, in one tensor: 7x7,0x12,137x349, or none, or log-normal:SEQUENCES:TOKENS:SEED.
    /// It takes the place of --batch, --seqlen-q and --seqlen-k.
    #[arg(long, value_parser = lengths, conflicts_with_all = ["batch", "seqlen_q", "seqlen_k"])]
    pub lengths: Option<CaseLengths>,
    /// Rows that belong to no sequence: none, behind the keys of each (used), or anywhere (slots).
    #[arg(long, value_parser = gaps, default_value = "none", value_name = "none|used|slots", requires = "lengths")]
    pub gaps: Gaps,
    /// Standard deviation of the random inputs.
    #[arg(long, value_parser = input_std, default_value = "1", allow_negative_numbers = true)]
    pub input_std: f32,
}

impl CaseArgs {
    pub fn case(&self, seed: u64) -> Case {
        let problem = Problem {
            batch: self.batch,
            heads_q: self.heads_q,
            heads_kv: self.heads_kv.unwrap_or(self.heads_q),
            seqlen_q: self.seqlen_q,
            seqlen_k: self.seqlen_k.unwrap_or(self.seqlen_q),
            head_dim: self.head_dim,
            dtype: self.dtype,
        };
        let case = Case {
            scale: self.scale,
            order: self.layout,
            input_std: self.input_std,
            seed,
            ..Case::new(problem, self.window.unwrap_or(self.mask))
        };
        match self.lengths {
            None => case,
            Some(lengths) => case.with_lengths(CaseLengths { gaps: self.gaps, ..lengths }),
        }
    }
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  ferroflash bench --head-dims 128 --seqlens 4096,16384 --mask none,causal --json results.json
  ferroflash bench --device cpu --tokens 2048 --hidden 256
  ferroflash bench --heads-kv 8 --hidden 4096 --head-dims 128
  ferroflash bench --op backward --determinism exact
  ferroflash bench --op piecewise,piecewise-backward --mask causal
  ferroflash bench --op forward,total-attention --head-dims 64
  ferroflash bench --head-dims 128 --dropout 0.1
  ferroflash bench --head-dims 128 --window 1024,0 --softcap 50 --sinks
  ferroflash bench --lengths log-normal:64:65536:7 --heads-kv 8 --hidden 4096 --head-dims 128 --mask causal
  ferroflash bench --sustained

The batch is tokens / seqlen and the heads are hidden / head_dim, so every measurement has about the same size. \
Inputs are random. TFLOP/s count 4·B·H·M·N·D, 2.5 times that for backward, half of that for total attention, half when \
causal; the time is the median of many runs.

On a GPU the chip rests for a quarter of a second before each measurement, and the L2 cache is cleared before each run, \
as triton.testing.do_bench does it, so figures can be held against those of others; with --sustained, and on the CPU, \
runs follow one another. The header of the JSON file says which, as its protocol: l2-cleared or sustained.")]
pub struct BenchArgs {
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub pass: PassArgs,
    /// [default: 64,128,256; on the CPU 64,128]
    #[arg(long, value_delimiter = ',')]
    pub head_dims: Vec<usize>,
    /// [default: 1024,4096,16384; on the CPU 256,1024]
    #[arg(long, value_delimiter = ',')]
    pub seqlens: Vec<usize>,
    #[arg(long, value_delimiter = ',', value_parser = mask, default_value = "none,causal",
        value_name = "none|causal|window:L:R")]
    pub mask: Vec<Mask>,
    /// The same as --mask window:LEFT:RIGHT.
    #[arg(long, value_parser = window, value_name = "LEFT,RIGHT", conflicts_with = "mask")]
    pub window: Option<Mask>,
    #[arg(long, value_delimiter = ',', value_parser = dtype, default_value = "bf16", value_name = "f16|bf16")]
    pub dtype: Vec<Dtype>,
    /// The distance from which on scores come from the second pair, for piecewise attention [default: seqlen / 2].
    #[arg(long, allow_negative_numbers = true)]
    pub dist_threshold: Option<i32>,
    /// Queries x keys of each sequence, in one tensor: 7x7,0x12,137x349, or log-normal:SEQUENCES:TOKENS:SEED. It takes
    /// the place of --seqlens and --tokens.
    #[arg(long, value_parser = lengths_and_text, conflicts_with_all = ["seqlens", "tokens"])]
    pub lengths: Option<(String, CaseLengths)>,
    /// Tokens of a batch [default: 32768; on the CPU 1024].
    #[arg(long)]
    pub tokens: Option<usize>,
    /// Query heads times head dim [default: 2048; on the CPU 512].
    #[arg(long)]
    pub hidden: Option<usize>,
    /// Key heads, for grouped queries [default: as many as query heads].
    #[arg(long)]
    pub heads_kv: Option<usize>,
    /// Runs back to back after a warm-up as long as the measurement: what the chip sustains under its power limit. On
    /// the CPU it is always so.
    #[arg(long)]
    pub sustained: bool,
    /// Milliseconds that one measurement runs, after a warm-up of a third of that; of as long with --sustained and on
    /// the CPU [default: 150; with --sustained 300; on the CPU 500].
    #[arg(long)]
    pub budget_ms: Option<u64>,
    /// Also write the results to this file.
    #[arg(long, value_name = "FILE")]
    pub json: Option<std::path::PathBuf>,
}

fn lengths(text: &str) -> Result<CaseLengths, String> {
    text.parse().map_err(|error: ferroflash::Error| error.to_string())
}

fn lengths_and_text(text: &str) -> Result<(String, CaseLengths), String> {
    Ok((text.to_owned(), lengths(text)?))
}

fn gaps(text: &str) -> Result<Gaps, String> {
    let found = Gaps::NAMES.iter().find(|(name, _)| *name == text);
    found.map(|(_, gaps)| *gaps).ok_or_else(|| "allowed are none, used and slots".to_owned())
}

fn dtype(text: &str) -> Result<Dtype, String> {
    [Dtype::F16, Dtype::Bf16]
        .into_iter()
        .find(|dtype| dtype.name() == text)
        .ok_or_else(|| "allowed are f16 and bf16".to_owned())
}

fn mask(text: &str) -> Result<Mask, String> {
    text.parse().map_err(|error: ferroflash::Error| error.to_string())
}

fn window(text: &str) -> Result<Mask, String> {
    let mask = format!("window:{}", text.replacen(',', ":", 1)).parse();
    mask.map_err(|_| "two numbers of keys are needed, LEFT,RIGHT, or none for no bound".to_owned())
}

fn determinism(text: &str) -> Result<Determinism, String> {
    [Determinism::Fast, Determinism::Exact]
        .into_iter()
        .find(|determinism| determinism.to_string() == text)
        .ok_or_else(|| "allowed are fast and exact".to_owned())
}

fn input_std(text: &str) -> Result<f32, String> {
    let std = text.parse().ok().filter(|std: &f32| std.is_finite() && *std >= 0.0);
    std.ok_or_else(|| "a finite number, 0 or above, is needed".to_owned())
}

fn dropout(text: &str) -> Result<f32, String> {
    let p = text.parse().map_err(|_| "a number is needed".to_owned())?;
    let dropout = ferroflash::Dropout { p, ..Default::default() };
    dropout.validate().map(|()| p).map_err(|error| error.to_string())
}

fn order(text: &str) -> Result<Order, String> {
    [Order::Bhsd, Order::Bshd]
        .into_iter()
        .find(|order| order.to_string() == text)
        .ok_or_else(|| "allowed are bhsd and bshd".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn flags_are_consistent() {
        Cli::command().debug_assert();
    }
}
