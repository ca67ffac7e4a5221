//! The machine code of every kernel: no stack, no spill, no serialized product, and the instructions that it must have.

use std::path::Path;
use std::process::Command;

use ferroflash_build::ptxas::Assembled;
use ferroflash_build::{Built, BuiltForm, Kernel, cache_folder, from_source, unpack, work};
use kernels_gpu::variants::Launch;

use crate::setup::cuda_tool;
use crate::shell::{Result, output, root, step};

/// Instructions that a kernel with a mainloop must have: tensor cores, TMA, register reallocation.
const NEEDED: [&str; 3] = ["HGMMA", "UTMALDG", "USETMAXREG"];
/// Instructions that no kernel may have: local memory, and the slow path of a shuffle in a warp that may have diverged.
const FORBIDDEN: [&str; 3] = ["LDL", "STL", "BRA.DIV"];
/// The instruction by which a warp reconverges before an operation that needs all its threads. ptxas puts it where it
/// cannot tell that a warp is converged.
const RECONVERGENCE: &str = "WARPSYNC.ALL";
/// Registers of a multiprocessor.
const REGISTER_FILE: u32 = 65536;

/// Returns how often [`RECONVERGENCE`] may occur in a kernel: once where CTAs of a cluster wait for each other, and in
/// the postprocess kernel; once for each row of a dropout mask, whose stores depend on the row's address.
fn reconvergences(launch: &Launch) -> usize {
    match launch.symbol {
        "dropout_mask" => 4,
        symbol => usize::from(launch.cluster > 1 || symbol.starts_with("finish_")),
    }
}

/// Returns the bytes of local memory that a form may have. With softcap, and with dropout in forms of the backward pass
/// that leave constants open, there are a few values more than registers; with both at head dim 256, the derivative of
/// a block has no room next to dV, P and the dropout mask. Three consumers have the fewest registers, of which softcap,
/// two pairs and lengths that differ need most. The backward pass at head dim 64 holds one value more for any window.
/// All other forms spill nothing.
fn spills(form: &str) -> u32 {
    let [cap, dropout, backward, lengths] = ["_cap", "dropout", "backward", "_lengths"].map(|part| form.contains(part));
    let starts = |name: &str| ["bf16", "f16"].iter().any(|dtype| form.starts_with(&name.replace("dtype", dtype)));
    match (cap, dropout && backward) {
        (true, true) if form.contains("d256") => 160,
        (true, _) if lengths && starts("forward_dtype_d64_piecewise_cap") => 128,
        (true, _) => 64,
        (false, true) if form.contains("_any_") => 32,
        (false, _) if starts("backward_dtype_d64_plain_any_") => 8,
        (false, _) => 0,
    }
}

/// What became of one form of a kernel.
struct Row {
    registers: u32,
    stack: u32,
    /// Bytes stored and loaded again.
    spilled: u32,
    hgmma: usize,
    shuffles: usize,
    reconvergences: usize,
    problems: Vec<String>,
}

/// Builds every kernel, as far as the cache does not have it, and checks its machine code.
pub fn check() -> Result {
    step("the machine code of every kernel");
    let built = built()?;
    let folder = cache_folder(&root()).join("latest");
    unpack(&built, &folder)?;
    let forms = forms(&built);
    let rows = work::each(&forms, |(kernel, form)| row(&folder, &kernel.launch, form))?;
    println!(
        "{:44} {:>7} {:>9} {:>9} {:>5} {:>5} {:>5} {:>5} {:>8}  result",
        "kernel", "threads", "registers", "parameter", "stack", "spill", "HGMMA", "SHFL", "WARPSYNC"
    );
    let mut failed = 0;
    for ((kernel, form), row) in forms.iter().zip(rows) {
        let (name, threads, parameter) = (&form.name, kernel.launch.threads, kernel.parameter_bytes);
        let Row { registers, stack, spilled, hgmma, shuffles, reconvergences, problems } = row;
        let result = if problems.is_empty() { "ok".to_owned() } else { problems.join("; ") };
        failed += usize::from(!problems.is_empty());
        println!(
            "{name:44} {threads:>7} {registers:>9} {parameter:>9} {stack:>5} {spilled:>5} {hgmma:>5} {shuffles:>5} \
             {reconvergences:>8}  {result}"
        );
    }
    match failed {
        0 => Ok(()),
        _ => Err(format!("{failed} of {} forms of kernels are not as they should be", forms.len())),
    }
}

/// Every kernel of the checkout, compiled and assembled.
pub fn built() -> Result<Built> {
    let built = from_source(&root())?;
    match built.warnings.first() {
        None if built.assembler.is_none() => Err("there is no ptxas: run `cargo xtask setup`".to_owned()),
        None => Ok(built),
        Some(warning) => Err(warning.clone()),
    }
}

/// Lists every form of every kernel.
fn forms(built: &Built) -> Vec<(&Kernel, &BuiltForm)> {
    built.kernels.iter().flat_map(|kernel| kernel.forms.iter().map(move |form| (kernel, form))).collect()
}

fn row(folder: &Path, launch: &Launch, form: &BuiltForm) -> Result<Row> {
    let name = &form.name;
    let Assembled { report, registers, .. } =
        form.assembled.as_ref().ok_or_else(|| format!("{name} has no machine code"))?;
    let code = output(Command::new(cuda_tool("nvdisasm")).arg("-c").arg(folder.join(name).with_extension("cubin")))?;
    let reported =
        |what: &str| number_before(report, what).ok_or_else(|| format!("ptxas reports no{what} for {name}:\n{report}"));
    let stack = reported(" bytes stack frame")?;
    let spilled = reported(" bytes spill stores")? + reported(" bytes spill loads")?;
    let count = |mnemonic: &str| code.lines().filter(|line| line.contains(mnemonic)).count();

    let mut problems = Vec::new();
    let spills = self::spills(name);
    if stack > spills {
        problems.push("a stack frame".to_owned());
    }
    if spilled > 3 * spills {
        problems.push("spills".to_owned());
    }
    // C75xx are ptxas's warnings about wgmma and setmaxnreg.
    problems.extend(report.lines().filter(|line| line.contains("(C75")).map(|line| line.trim().to_owned()));
    if launch.mainloop {
        problems.extend(NEEDED.iter().filter(|needed| count(needed) == 0).map(|needed| format!("no {needed}")));
    }
    for mnemonic in FORBIDDEN {
        if count(mnemonic) > spills as usize / 2 {
            problems.push(format!("{} {mnemonic}", count(mnemonic)));
        }
    }
    let reconvergences = (count(RECONVERGENCE), self::reconvergences(launch));
    if reconvergences.0 > reconvergences.1 {
        problems.push(format!("{} {RECONVERGENCE}, {} at most", reconvergences.0, reconvergences.1));
    }
    if registers.saturating_mul(launch.threads) > REGISTER_FILE {
        problems.push(format!("{registers} registers for {} threads", launch.threads));
    }
    let (hgmma, shuffles) = (count("HGMMA"), count("SHFL"));
    Ok(Row { registers: *registers, stack, spilled, hgmma, shuffles, reconvergences: reconvergences.0, problems })
}

/// Compares the cubins of this checkout with those of another build, which lie in `folder`, byte for byte.
pub fn compare(folder: &str) -> Result {
    step("cubins of this checkout and of another build");
    let built = built()?;
    let mut different = Vec::new();
    let forms = forms(&built);
    for (_, form) in &forms {
        let path = Path::new(folder).join(&form.name).with_extension("cubin");
        let other = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        if form.assembled.as_ref().is_none_or(|assembled| assembled.cubin != other) {
            different.push(&*form.name);
        }
    }
    match different.len() {
        0 => {
            println!("all {} are the same, byte for byte", forms.len());
            Ok(())
        }
        count => Err(format!("{count} of {} differ: {}", forms.len(), different.join(", "))),
    }
}

/// Compares the kernels of f16, which are made from the PTX of bf16, with what rustc makes of them.
pub fn f16() -> Result {
    step("kernels of f16, made from bf16 and compiled by themselves");
    let different = ferroflash_build::f16_by_itself(&root())?;
    match different.len() {
        0 => {
            println!("they are the same but for the numbers of labels");
            Ok(())
        }
        count => Err(format!(
            "{count} differ: {}; give each an entry point of its own in kernels-gpu/src/entry.rs, as those that \
             prepare have",
            different.join(", ")
        )),
    }
}

/// The number in front of `what`.
fn number_before(report: &str, what: &str) -> Option<u32> {
    let (before, _) = report.split_once(what)?;
    before.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use kernels_gpu::attention::schedule::SCHEDULE;
    use kernels_gpu::specialise;

    use super::*;

    /// Kernels without a mainloop, such as the one that writes a schedule, may have no local memory.
    #[test]
    fn forms_have_allowances() {
        for (form, bytes) in [
            ("schedule", 0),
            ("dropout_mask", 0),
            ("forward_bf16_d64_plain", 0),
            ("forward_bf16_d64_right_lengths", 0),
            ("forward_f16_d128_lengths_any_left_right_alibi", 0),
            ("forward_f16_d64_piecewise_cap_any_left_right_alibi", 64),
            ("forward_f16_d64_piecewise_cap_lengths_any_left_right_alibi", 128),
            ("backward_bf16_d64_plain_any_left_right", 8),
            ("backward_bf16_d64_lengths_any_left_right", 0),
            ("backward_bf16_d128_plain_any_left_right_alibi", 0),
            ("backward_bf16_d128_dropout_lengths_any_left_right_alibi_seed", 32),
            ("backward_bf16_d256_dropout_cap_lengths_any_left_right_alibi_seed", 160),
        ] {
            assert_eq!(spills(form), bytes, "{form}");
        }
    }

    /// The names of forms, by which allowances are given, are those of the table.
    #[test]
    fn forms_with_allowances_exist() {
        let launches = kernels_gpu::variants::launches();
        let names: Vec<String> = launches
            .iter()
            .flat_map(|launch| {
                launch.forms().into_iter().map(|form| specialise::name(launch.symbol, &launch.constants, form))
            })
            .collect();
        for bytes in [8, 32, 64, 128, 160] {
            assert!(names.iter().any(|name| spills(name) == bytes), "{bytes}");
        }
        let schedule = launches.iter().find(|launch| launch.symbol == SCHEDULE).unwrap();
        assert_eq!((schedule.threads, schedule.mainloop, schedule.forms().len()), (128, false, 1));
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
