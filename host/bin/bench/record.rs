//! What `bench` found: a record for each measurement, as a table and as JSON.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::SystemTime;

use ferroflash::{Alibi, Mask, Sinks};
use serde::Serialize;

use super::Step;
use super::measure::Measured;
use super::protocol::Protocol;
use crate::machine::{Machine, commit, kernel_compiler};
use crate::memory::peak_memory;
use crate::{say, table};

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    op: &'static str,
    /// Of a backward pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    determinism: Option<String>,
    /// Where weights are dropped.
    #[serde(skip_serializing_if = "Option::is_none")]
    dropout: Option<f32>,
    /// Its name in the table.
    #[serde(skip)]
    title: String,
    device: &'static str,
    batch: usize,
    heads_q: usize,
    heads_kv: usize,
    seqlen_q: usize,
    seqlen_k: usize,
    head_dim: usize,
    mask: String,
    /// Left and right bound, where the mask is a window.
    #[serde(skip_serializing_if = "Option::is_none")]
    window: Option<[Option<u32>; 2]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    softcap: Option<f32>,
    /// What there is a slope for: heads, or items and heads.
    #[serde(skip_serializing_if = "Option::is_none")]
    alibi: Option<&'static str>,
    /// What there is a sink for.
    #[serde(skip_serializing_if = "Option::is_none")]
    sinks: Option<&'static str>,
    /// Where lengths differ: their flag, and the number of sequences. The lengths are those of all together.
    #[serde(skip_serializing_if = "Option::is_none")]
    lengths: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sequences: Option<usize>,
    /// Of piecewise attention.
    #[serde(skip_serializing_if = "Option::is_none")]
    dist_threshold: Option<i32>,
    dtype: &'static str,
    /// Median.
    ms: f64,
    tflops: f64,
    gbps: f64,
    peak_bytes: usize,
    runs: usize,
}

impl Record {
    /// What a step took.
    pub fn new(step: &Step, machine: &Machine, measured: &Measured) -> Self {
        let Step { op, problem, mask, dist_threshold, determinism, dropout, shaping, lengths_text } = step;
        let seconds = measured.median.as_secs_f64();
        // On a GPU, what the tensors and the workspace take; on the CPU, the process's peak while it measured.
        let own = if machine.is_cpu() { peak_memory() } else { None };
        let tensors = op.tensor_bytes(problem) as usize;
        Record {
            op: op.name(),
            determinism: op.determinism(*determinism).map(|determinism| determinism.to_string()),
            dropout: op.dropout(*dropout),
            title: op.title(*determinism, *dropout, shaping),
            device: if machine.is_cpu() { "cpu" } else { "cuda" },
            batch: problem.batch,
            heads_q: problem.heads_q,
            heads_kv: problem.heads_kv,
            seqlen_q: problem.seqlen_q,
            seqlen_k: problem.seqlen_k,
            head_dim: problem.head_dim,
            mask: mask.to_string(),
            window: match *mask {
                Mask::Window { left, right } => Some([left, right]),
                _ => None,
            },
            softcap: shaping.softcap,
            alibi: match shaping.kinds.alibi {
                Alibi::None => None,
                Alibi::PerHead => Some("heads"),
                Alibi::PerItem => Some("items"),
            },
            sinks: match shaping.kinds.sinks {
                Sinks::None => None,
                Sinks::PerHead => Some("heads"),
            },
            lengths: lengths_text.clone(),
            sequences: shaping.lengths.map(|lengths| lengths.sequences.len()),
            dist_threshold: *dist_threshold,
            dtype: problem.dtype.name(),
            ms: seconds * 1e3,
            tflops: op.flops(problem, *mask, shaping.lengths) / seconds / 1e12,
            gbps: op.bytes(problem) / seconds / 1e9,
            peak_bytes: own.unwrap_or(tensors + measured.extra_bytes),
            runs: measured.runs,
        }
    }
}

/// What the records have in common.
#[derive(Serialize)]
pub struct Header {
    gpu: Option<String>,
    cpu: Option<String>,
    driver: Option<String>,
    compiler: String,
    version: &'static str,
    commit: Option<String>,
    protocol: Protocol,
    unix_time: u64,
}

#[derive(Serialize)]
pub struct Report<'a> {
    pub header: Header,
    pub records: &'a [Record],
}

impl Header {
    pub fn of(machine: &Machine, protocol: Protocol) -> Self {
        let cpu = machine.is_cpu();
        Header {
            gpu: (!cpu).then(|| machine.name()),
            cpu: cpu.then(|| machine.name()),
            driver: machine.driver(),
            compiler: kernel_compiler(),
            version: env!("CARGO_PKG_VERSION"),
            commit: commit(),
            protocol,
            unix_time: SystemTime::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_secs()),
        }
    }
}

/// The file that `--json` names, opened before anything is measured, so that a bad name costs no time. What it held
/// before stays until there are results.
pub struct JsonFile<'a> {
    path: &'a Path,
    file: File,
}

impl<'a> JsonFile<'a> {
    pub fn open(path: &'a Path) -> std::result::Result<Self, String> {
        let file = File::options().write(true).create(true).truncate(false).open(path);
        file.map(|file| JsonFile { path, file }).map_err(|error| cannot_write(path, &error))
    }

    pub fn write(&mut self, report: &Report) -> std::result::Result<(), String> {
        let mut text = serde_json::to_string_pretty(report).map_err(|error| cannot_write(self.path, &error))?;
        text.push('\n');
        // A pipe or a terminal has no length to cut.
        if self.file.metadata().is_ok_and(|metadata| metadata.is_file()) {
            self.file.set_len(0).map_err(|error| cannot_write(self.path, &error))?;
        }
        self.file.write_all(text.as_bytes()).map_err(|error| cannot_write(self.path, &error))
    }
}

fn cannot_write(path: &Path, error: &dyn std::error::Error) -> String {
    format!("{} can't be written: {error}", path.display())
}

/// `peak` is the machine's FLOP/s at most.
pub fn print_table(records: &[Record], peak: Option<f64>) {
    let mut table =
        table(["op", "D", "S", "B", "Hq", "Hkv", "mask", "dtype", "ms", "TFLOP/s", "of peak", "GB/s", "peak MiB"]);
    for r in records {
        let mut row: Vec<String> = vec![r.title.clone()];
        row.extend([r.head_dim, r.seqlen_q, r.batch, r.heads_q, r.heads_kv].map(|x| x.to_string()));
        row.extend([r.mask.clone(), r.dtype.to_owned(), format!("{:.3}", r.ms)]);
        row.push(if r.tflops < 10.0 { format!("{:.3}", r.tflops) } else { format!("{:.0}", r.tflops) });
        row.push(peak.map_or("n/a".to_owned(), |peak| format!("{:.0} %", r.tflops * 1e14 / peak)));
        row.extend([format!("{:.0}", r.gbps), (r.peak_bytes >> 20).to_string()]);
        table.add_row(row);
    }
    say(table);
}
