//! ptxas, if it is installed: a cubin spares the first launch of a kernel the driver's compiler.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::{Cache, Hash, read};

const FLAGS: [&str; 3] = ["-arch=sm_90a", "-O3", "-v"];

/// An assembler.
pub struct Ptxas {
    path: PathBuf,
    /// Its release, for people.
    pub version: String,
}

/// What ptxas made of a kernel.
pub struct Assembled {
    pub cubin: Vec<u8>,
    /// Its own words about registers, stack and spills, with its warnings.
    pub report: String,
    /// Number of registers of a thread at entry.
    pub registers: u32,
}

/// Returns the first that is there: `FERROFLASH_PTXAS`, what `cargo xtask setup` brought, the CUDA toolkit, the path.
pub fn find(root: &Path) -> Option<Ptxas> {
    if let Some(named) = env::var_os("FERROFLASH_PTXAS") {
        return Ptxas::probe(named.into());
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
        .filter(|ptxas| ptxas.is_file())
        .find_map(Ptxas::probe)
}

impl Ptxas {
    fn probe(path: PathBuf) -> Option<Ptxas> {
        let output = Command::new(&path).arg("--version").output().ok().filter(|output| output.status.success())?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let release = text.split_once(", V").map_or("unknown", |(_, rest)| rest);
        let version = format!("ptxas {}", release.lines().next().unwrap_or_default().trim());
        Some(Ptxas { path, version })
    }

    /// Assembles `text` for sm_90a, or takes what was made of the same text before.
    ///
    /// # Errors
    /// What ptxas says about the text.
    pub fn assemble(&self, cache: &Cache, text: &str) -> Result<Assembled, String> {
        let name = FLAGS.iter().fold(Hash::EMPTY.with(&self.version).with(text), |hash, flag| hash.with(flag)).name();
        let (cubin, report) = (format!("{name}.cubin"), format!("{name}.report"));
        if let (Some(cubin), Some(report)) = (cache.read(&cubin), cache.read(&report)) {
            return assembled(cubin, String::from_utf8_lossy(&report).into_owned());
        }
        let ptx = format!("{name}.ptx");
        cache.write(&ptx, text.as_bytes())?;
        let (ptx, _) = cache.path(&ptx);
        let made = ptx.with_extension("made");
        let output = Command::new(&self.path)
            .args(FLAGS)
            .arg("-o")
            .args([&made, &ptx])
            .output()
            .map_err(|error| format!("{}: {error}", self.path.display()))?;
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        if !output.status.success() {
            return Err(words.lines().next().unwrap_or("ptxas failed").to_owned());
        }
        let bytes = read(&made)?;
        for temporary in [&ptx, &made] {
            let _ = std::fs::remove_file(temporary);
        }
        // The report is last: an entry counts only with both.
        cache.write(&cubin, &bytes)?;
        cache.write(&report, words.as_bytes())?;
        assembled(bytes, words)
    }
}

fn assembled(cubin: Vec<u8>, report: String) -> Result<Assembled, String> {
    let registers = report
        .split_once("Used ")
        .and_then(|(_, rest)| rest.split_once(" registers"))
        .and_then(|(count, _)| count.parse().ok())
        .ok_or("ptxas did not report registers")?;
    Ok(Assembled { cubin, report, registers })
}
