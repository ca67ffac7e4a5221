//! How long builds take and how large their parts are, measured in a folder of their own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::dependant::Dependant;
use crate::package::{self, kib};
use crate::shell::{Result, cargo, root, run, step, target};

/// A source that only the backward kernels use, and a change of it that changes their machine code.
const BACKWARD_SOURCE: &str = "kernels-gpu/src/kernels/backward.rs";
const BACKWARD_CHANGE: [&str; 2] = ["p.scale * LOG2_E", "p.scale * (LOG2_E * 1.0001)"];
const CUDA: [&str; 4] = ["build", "--release", "--features", "cuda"];

/// A folder that is removed at the end.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A source file that gets its text back at the end.
struct Changed {
    path: PathBuf,
    text: String,
}

impl Changed {
    fn new(path: PathBuf, [from, to]: [&str; 2]) -> Result<Self> {
        let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        if !text.contains(from) {
            return Err(format!("{} has no {from:?}: change BACKWARD_CHANGE in xtask/src/times.rs", path.display()));
        }
        fs::write(&path, text.replace(from, to)).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Changed { path, text })
    }
}

impl Drop for Changed {
    fn drop(&mut self) {
        let _ = fs::write(&self.path, &self.text);
    }
}

/// Measures what is named, or everything: `plain`, `source`, `prebuilt`, `dependant`, `sizes`.
pub fn measure(what: &[&str]) -> Result {
    const ALL: [&str; 5] = ["plain", "source", "prebuilt", "dependant", "sizes"];
    if let Some(unknown) = what.iter().find(|name| !ALL.contains(name)) {
        return Err(format!("cargo xtask times measures no {unknown}: name some of {}", ALL.join(", ")));
    }
    let wanted = |name: &str| what.is_empty() || what.contains(&name);
    let folder = Folder(target("times"));
    let mut rows: Vec<(String, String)> = Vec::new();
    if wanted("plain") {
        rows.push(timed(&folder.0, "`cargo build --release` from nothing", &["build", "--release"], "source")?);
    }
    if wanted("source") {
        rows.push(timed(&folder.0, "the same with `--features cuda`, kernels from source", &CUDA, "source")?);
        let changed = Changed::new(root().join(BACKWARD_SOURCE), BACKWARD_CHANGE)?;
        rows.push(again(&folder.0, "again, with another constant in a source of the backward kernels", &CUDA)?);
        drop(changed);
        rows.push(again(&folder.0, "again, with the old constant", &CUDA)?);
    }
    if ["prebuilt", "dependant", "sizes"].into_iter().any(wanted) {
        let packages = package::make()?;
        if wanted("prebuilt") {
            rows.push(timed(
                &folder.0,
                "`cargo build --release --features cuda`, prebuilt kernels",
                &CUDA,
                "prebuilt",
            )?);
        }
        if wanted("dependant") {
            let dependant = Dependant::new(&packages.files.iter().map(|(path, _)| path.as_path()).collect::<Vec<_>>())?;
            let cpu = dependant.build(&["--release"])?.as_secs_f64();
            let cuda = dependant.build(&["--release", "--features", "cuda"])?.as_secs_f64();
            rows.push(("a dependant's program, release, CPU alone".to_owned(), seconds(cpu)));
            rows.push(("the same with `cuda` and prebuilt kernels".to_owned(), seconds(cuda)));
        }
        if wanted("sizes") {
            let sizes = packages.kernels;
            let packed = |raw: usize, packed: usize| format!("{} as {}", kib(raw as u64), kib(packed as u64));
            rows.push(("PTX of all kernels".to_owned(), packed(sizes.ptx, sizes.packed_ptx)));
            rows.push(("their machine code".to_owned(), packed(sizes.cubins, sizes.packed_cubins)));
            for (path, bytes) in &packages.files {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                rows.push((format!("`{name}`"), kib(*bytes)));
            }
        }
    }
    step("measured");
    println!("| what | |\n| --- | --- |");
    for (what, result) in rows {
        println!("| {what} | {result} |");
    }
    Ok(())
}

/// A build from nothing, kernels and all.
fn timed(folder: &Path, name: &str, arguments: &[&str], kernels: &str) -> Result<(String, String)> {
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    let start = Instant::now();
    run(build(folder, arguments).env("FERROFLASH_KERNELS", kernels))?;
    Ok((name.to_owned(), seconds(start.elapsed().as_secs_f64())))
}

/// The next build from source.
fn again(folder: &Path, name: &str, arguments: &[&str]) -> Result<(String, String)> {
    let start = Instant::now();
    run(build(folder, arguments).env("FERROFLASH_KERNELS", "source"))?;
    Ok((name.to_owned(), seconds(start.elapsed().as_secs_f64())))
}

fn build(folder: &Path, arguments: &[&str]) -> Command {
    let mut cargo = cargo(arguments);
    cargo.arg("--target-dir").arg(folder).env("FERROFLASH_KERNEL_CACHE", folder.join("kernels"));
    cargo
}

fn seconds(time: f64) -> String {
    match time as u64 {
        0..60 => format!("{time:.0} s"),
        whole => format!("{} min {} s", whole / 60, whole % 60),
    }
}
