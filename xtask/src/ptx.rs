//! ptxas over every kernel: no stack, no spill, no serialized product, and the instructions that Hopper is about.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, thread};

use crate::setup::cuda_tool;
use crate::shell::{Result, cargo, messages, output, step};

/// What the machine code of a kernel with a mainloop must hold: tensor cores, copy engine, register reallocation.
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
    stack: u32,
    /// Bytes stored and loaded again.
    spilled: u32,
    hgmma: usize,
    shuffles: usize,
    problems: Vec<String>,
}

/// Checks the PTX of the last build with the feature `cuda`.
pub fn check() -> Result {
    step("ptxas over every kernel");
    let out = build()?;
    let table = out.join("kernels.rs");
    let table = fs::read_to_string(&table).map_err(|error| format!("{}: {error}", table.display()))?;
    let names = symbols(&table);
    let kernels = assemble_all(&out.join("ptx"), &names);
    println!(
        "{:28} {:>7} {:>9} {:>5} {:>5} {:>5} {:>5}  result",
        "kernel", "threads", "registers", "stack", "spill", "HGMMA", "SHFL"
    );
    let mut failed = 0;
    for kernel in kernels {
        let Kernel { name, threads, registers, stack, spilled, hgmma, shuffles, problems } = kernel?;
        let result = if problems.is_empty() { "ok".to_owned() } else { problems.join("; ") };
        failed += usize::from(!problems.is_empty());
        println!("{name:28} {threads:>7} {registers:>9} {stack:>5} {spilled:>5} {hgmma:>5} {shuffles:>5}  {result}");
    }
    match (names.len(), failed) {
        (0, _) => Err(format!("{} names no kernel", out.join("kernels.rs").display())),
        (_, 0) => Ok(()),
        (all, _) => Err(format!("{failed} of {all} kernels are not as they should be")),
    }
}

/// Where build.rs wrote its PTX, and the table of it.
fn build() -> Result<PathBuf> {
    messages(&mut cargo(&["build", "--features", "cuda", "--lib"]))?
        .iter()
        .filter(|message| message["reason"] == "build-script-executed")
        .filter_map(|message| message["out_dir"].as_str().map(PathBuf::from))
        .find(|out| out.join("ptx").is_dir())
        .ok_or_else(|| "the build wrote no PTX".to_owned())
}

/// The kernels of the table that build.rs writes. The folder may hold more: what an earlier build left.
fn symbols(table: &str) -> Vec<&str> {
    table.split("symbol: \"").skip(1).filter_map(|rest| rest.split_once('"')).map(|(name, _)| name).collect()
}

/// As many at a time as there are cores.
fn assemble_all(folder: &Path, names: &[&str]) -> Vec<Result<Kernel>> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let share = names.len().div_ceil(cores).max(1);
    thread::scope(|scope| {
        let shares: Vec<_> = names
            .chunks(share)
            .map(|names| scope.spawn(|| names.iter().map(|name| assemble(folder, name)).collect::<Vec<_>>()))
            .collect();
        let panicked = || vec![Err("a check panicked".to_owned())];
        shares.into_iter().flat_map(|share| share.join().unwrap_or_else(|_| panicked())).collect()
    })
}

fn assemble(folder: &Path, name: &str) -> Result<Kernel> {
    let ptx = folder.join(format!("{name}.ptx"));
    let cubin = ptx.with_extension("checked.cubin");
    let mut ptxas = Command::new(cuda_tool("ptxas"));
    let report = output(ptxas.args(["-arch=sm_90a", "-v", "-o"]).args([&cubin, &ptx]))?;
    let code = output(Command::new(cuda_tool("nvdisasm")).arg("-c").arg(&cubin))?;
    let text = fs::read_to_string(&ptx).map_err(|error| format!("{}: {error}", ptx.display()))?;
    let threads = text
        .lines()
        .find_map(|line| line.strip_prefix(".maxntid "))
        .and_then(|count| count.trim().parse().ok())
        .ok_or_else(|| format!("{} has no .maxntid", ptx.display()))?;
    let reported = |what: &str| {
        number_before(&report, what).ok_or_else(|| format!("ptxas reports no{what} for {name}:\n{report}"))
    };
    let registers = reported(" registers")?;
    let stack = reported(" bytes stack frame")?;
    let spilled = reported(" bytes spill stores")? + reported(" bytes spill loads")?;
    let count = |mnemonic: &str| code.lines().filter(|line| line.contains(mnemonic)).count();

    let mut problems = Vec::new();
    if stack > 0 {
        problems.push("a stack frame".to_owned());
    }
    if spilled > 0 {
        problems.push("spills".to_owned());
    }
    // C75xx are ptxas's warnings about wgmma and setmaxnreg.
    problems.extend(report.lines().filter(|line| line.contains("(C75")).map(|line| line.trim().to_owned()));
    if ["forward_", "backward_", "total_"].iter().any(|mainloop| name.starts_with(mainloop)) {
        problems.extend(NEEDED.iter().filter(|needed| count(needed) == 0).map(|needed| format!("no {needed}")));
    }
    for mnemonic in FORBIDDEN {
        if count(mnemonic) > 0 {
            problems.push(format!("{} {mnemonic}", count(mnemonic)));
        }
    }
    if registers.saturating_mul(threads) > REGISTER_FILE {
        problems.push(format!("{registers} registers for {threads} threads"));
    }
    Ok(Kernel {
        name: name.to_owned(),
        threads,
        registers,
        stack,
        spilled,
        hgmma: count("HGMMA"),
        shuffles: count("SHFL"),
        problems,
    })
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
    fn kernels_are_read_from_the_table() {
        let table =
            "&[\n    Kernel { symbol: \"a_d64\", ptx: include_str!(\"a.ptx\") },\n    Kernel { symbol: \"b\", .. },";
        assert_eq!(symbols(table), ["a_d64", "b"]);
    }

    #[test]
    fn numbers_are_read_from_reports() {
        let report = "    8 bytes stack frame, 20 bytes spill stores, 0 bytes spill loads\n: Used 168 registers, used";
        assert_eq!(number_before(report, " bytes stack frame"), Some(8));
        assert_eq!(number_before(report, " bytes spill stores"), Some(20));
        assert_eq!(number_before(report, " registers"), Some(168));
        assert_eq!(number_before(report, " barriers"), None);
    }
}
