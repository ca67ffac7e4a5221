//! GPU tests and command line in one folder, for a machine that has a GPU and no Rust.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::setup;
use crate::shell::{Result, cargo, messages, output, root, step, works};

/// Runs what is beside it.
const RUN_SH: &str = r#"#!/bin/sh
# Runs ferroflash's GPU tests and command line; needs the NVIDIA driver and nothing else.
#   ./run.sh                  tests, then random cases, then a small benchmark
#   ./run.sh test [FILTER…]   the GPU tests
#   ./run.sh sanitize         compute-sanitizer's memcheck, racecheck, synccheck and initcheck over a sample of cases
#   ./run.sh check|bench|info [FLAGS…]   the command line
set -eu
cd "$(dirname "$0")"
ops=forward,backward,piecewise,piecewise-backward,total-attention
case "${1:-all}" in
all)
    ./gpu
    ./unit cuda
    ./ferroflash check --device cuda --op "$ops" --cases 200
    ./ferroflash bench --device cuda --op "$ops"
    ;;
test)
    shift
    ./gpu "$@"
    ;;
sanitize)
    for tool in memcheck racecheck synccheck initcheck; do
        echo "== $tool"
        compute-sanitizer --tool "$tool" --error-exitcode 9 ./ferroflash check --device cuda --op "$ops" \
            --cases "${2:-12}"
        # More work tiles than CTAs: the ring and the query tile are used again and again.
        compute-sanitizer --tool "$tool" --error-exitcode 9 ./ferroflash check --device cuda --op "$ops" --batch 3 \
            --heads-q 40 --seqlen-q 400 --mask causal --head-dim 128
    done
    ;;
*)
    ./ferroflash "$@"
    ;;
esac
"#;

/// More than this is a sign that something is in it by mistake.
const LARGEST: u64 = 40 << 20;

/// Builds everything and copies it to `directory`.
pub fn collect(directory: &str) -> Result {
    setup::all()?;
    step("building the GPU tests, the unit tests and the command line");
    let tests = artifact(&["test", "--release", "--features", "cuda", "--test", "gpu", "--no-run"], "gpu")?;
    let unit = artifact(&["test", "--release", "--features", "cuda", "--lib", "--no-run"], "ferroflash")?;
    let cli = artifact(&["build", "--release", "--features", "cuda", "--bin", "ferroflash"], "ferroflash")?;
    let to = root().join(directory);
    fs::create_dir_all(&to).map_err(|error| format!("{}: {error}", to.display()))?;
    let mut bytes = 0;
    for (from, name) in [(&tests, "gpu"), (&unit, "unit"), (&cli, "ferroflash")] {
        let path = to.join(name);
        let failed = |error| format!("{}: {error}", path.display());
        fs::copy(from, &path).map_err(failed)?;
        if works("strip", &["--version"]) {
            output(Command::new("strip").arg(&path))?;
        }
        bytes += fs::metadata(&path).map_err(failed)?.len();
    }
    let script = to.join("run.sh");
    fs::write(&script, RUN_SH).map_err(|error| format!("{}: {error}", script.display()))?;
    output(Command::new("chmod").arg("+x").arg(&script))?;
    println!("\n{directory}/run.sh runs it ({:.1} MiB); copy the folder to the machine with the GPU", mib(bytes));
    if bytes > LARGEST {
        return Err(format!("{directory} is larger than {:.0} MiB", mib(LARGEST)));
    }
    Ok(())
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / (1 << 20) as f64
}

/// Runs cargo and returns the executable of the target called `name`.
fn artifact(arguments: &[&str], name: &str) -> Result<PathBuf> {
    messages(&mut cargo(arguments))?
        .iter()
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .ok_or_else(|| format!("cargo built no {name}"))
}
