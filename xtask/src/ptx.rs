//! ptxas over every kernel: no stack, no spill, no serialized product, and the instructions that Hopper is about.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, thread};

use crate::setup::cuda_tool;
use crate::shell::{Result, cargo, output, step};

/// What every kernel's machine code must hold: tensor cores, copy engine, register reallocation.
const NEEDED: [&str; 3] = ["HGMMA", "UTMALDG", "USETMAXREG"];
/// And must not: local memory, and the slow path of a shuffle in a warp that may have diverged.
const FORBIDDEN: [&str; 3] = ["LDL", "STL", "BRA.DIV"];
/// Registers of a multiprocessor.
const REGISTER_FILE: u32 = 65536;

/// What became of one kernel.
struct Kernel {
    name: String,
    threads: u32,
    registers: u32,
    hgmma: usize,
    problems: Vec<String>,
}

/// Checks the PTX of the last build with the feature `cuda`.
pub fn check() -> Result {
    step("ptxas over every kernel");
    let folder = ptx_folder()?;
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)
        .map_err(|error| format!("{}: {error}", folder.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "ptx"))
        .collect();
    files.sort();
    let kernels: Vec<Result<Kernel>> = thread::scope(|scope| {
        let threads: Vec<_> = files.iter().map(|file| scope.spawn(|| assemble(file))).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err("a check panicked".to_owned()))).collect()
    });
    println!("{:28} {:>7} {:>9} {:>6}  result", "kernel", "threads", "registers", "HGMMA");
    let mut failed = 0;
    for kernel in kernels {
        let Kernel { name, threads, registers, hgmma, problems } = kernel?;
        let result = if problems.is_empty() { "ok".to_owned() } else { problems.join("; ") };
        failed += usize::from(!problems.is_empty());
        println!("{name:28} {threads:>7} {registers:>9} {hgmma:>6}  {result}");
    }
    match (files.len(), failed) {
        (0, _) => Err(format!("{} holds no PTX", folder.display())),
        (_, 0) => Ok(()),
        _ => Err(format!("{failed} of {} kernels are not as they should be", files.len())),
    }
}

/// Where build.rs wrote its PTX.
fn ptx_folder() -> Result<PathBuf> {
    let messages = output(&mut cargo(&["build", "--quiet", "--features", "cuda", "--lib", "--message-format=json"]))?;
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["reason"] == "build-script-executed")
        .filter_map(|message| message["out_dir"].as_str().map(|out| Path::new(out).join("ptx")))
        .find(|folder| folder.is_dir())
        .ok_or_else(|| "the build wrote no PTX".to_owned())
}

fn assemble(ptx: &Path) -> Result<Kernel> {
    let cubin = ptx.with_extension("checked.cubin");
    let mut ptxas = Command::new(cuda_tool("ptxas"));
    let report = output(ptxas.args(["-arch=sm_90a", "-v", "-o"]).args([&cubin, ptx]))?;
    let code = output(Command::new(cuda_tool("nvdisasm")).arg("-c").arg(&cubin))?;
    let text = fs::read_to_string(ptx).map_err(|error| format!("{}: {error}", ptx.display()))?;
    let threads = text
        .lines()
        .find_map(|line| line.strip_prefix(".maxntid "))
        .and_then(|count| count.trim().parse().ok())
        .ok_or_else(|| format!("{} has no .maxntid", ptx.display()))?;
    let registers = number_before(&report, " registers").unwrap_or(u32::MAX);
    let mut problems = Vec::new();
    for what in [" bytes stack frame", " bytes spill stores", " bytes spill loads"] {
        match number_before(&report, what) {
            Some(0) => {}
            Some(bytes) => problems.push(format!("{bytes}{what}")),
            None => problems.push(format!("ptxas reports no{what}")),
        }
    }
    // C75xx are ptxas's warnings about wgmma and setmaxnreg.
    problems.extend(report.lines().filter(|line| line.contains("(C75")).map(|line| line.trim().to_owned()));
    let count = |mnemonic: &str| code.lines().filter(|line| line.contains(mnemonic)).count();
    problems.extend(NEEDED.iter().filter(|needed| count(needed) == 0).map(|needed| format!("no {needed}")));
    for mnemonic in FORBIDDEN {
        if count(mnemonic) > 0 {
            problems.push(format!("{} {mnemonic}", count(mnemonic)));
        }
    }
    if registers.saturating_mul(threads) > REGISTER_FILE {
        problems.push(format!("{registers} registers for {threads} threads"));
    }
    let name = ptx.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Kernel { name, threads, registers, hgmma: count("HGMMA"), problems })
}

/// The number in front of `what`.
fn number_before(report: &str, what: &str) -> Option<u32> {
    let (before, _) = report.split_once(what)?;
    before.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_from_reports() {
        let report = "    8 bytes stack frame, 20 bytes spill stores, 0 bytes spill loads\n: Used 168 registers, used";
        assert_eq!(number_before(report, " bytes stack frame"), Some(8));
        assert_eq!(number_before(report, " bytes spill stores"), Some(20));
        assert_eq!(number_before(report, " registers"), Some(168));
        assert_eq!(number_before(report, " barriers"), None);
    }
}
