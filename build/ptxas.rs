//! ptxas, where it is there: a cubin spares the first launch of a kernel the driver's compiler.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The first that is there: `FERROFLASH_PTXAS`, what `cargo xtask setup` brought, the CUDA toolkit, the path.
pub fn find(root: &Path) -> Option<PathBuf> {
    if let Some(named) = env::var_os("FERROFLASH_PTXAS") {
        return Some(named.into());
    }
    let toolkits = [
        Some(root.join("target/cuda-tools/nvidia/cu13")),
        env::var_os("CUDA_HOME").map(PathBuf::from),
        Some(PathBuf::from("/usr/local/cuda")),
    ];
    let path = env::var_os("PATH").unwrap_or_default();
    toolkits
        .into_iter()
        .flatten()
        .map(|toolkit| toolkit.join("bin"))
        .chain(env::split_paths(&path))
        .map(|folder| folder.join("ptxas"))
        .find(|ptxas| ptxas.is_file())
}

/// Assembles `ptx` for sm_90a beside it: the cubin's path, and the registers of a thread at entry.
pub fn assemble(ptxas: &Path, ptx: &Path) -> Result<(PathBuf, u32), String> {
    let cubin = ptx.with_extension("cubin");
    let output = Command::new(ptxas)
        .args(["-arch=sm_90a", "-O3", "-v", "-o"])
        .args([&cubin, ptx])
        .output()
        .map_err(|e| format!("{}: {e}", ptxas.display()))?;
    let report = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(report.lines().next().unwrap_or("ptxas failed").to_owned());
    }
    let registers = report
        .split_once("Used ")
        .and_then(|(_, rest)| rest.split_once(" registers"))
        .and_then(|(count, _)| count.parse().ok())
        .ok_or("ptxas did not report registers")?;
    Ok((cubin, registers))
}
