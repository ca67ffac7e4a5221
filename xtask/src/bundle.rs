//! GPU tests and command line in one folder, for a machine that has a GPU and no Rust.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::setup;
use crate::shell::{Result, cargo, output, root, step, works};

/// Runs what is beside it.
const RUN_SH: &str = r#"#!/bin/sh
# Runs ferroflash's GPU tests and command line; needs the NVIDIA driver and nothing else.
#   ./run.sh                  tests, then random cases, then a small benchmark
#   ./run.sh test [FILTER…]   the GPU tests
#   ./run.sh sanitize         compute-sanitizer's memcheck, racecheck, synccheck and initcheck over a sample of cases
#   ./run.sh check|bench|info [FLAGS…]   the command line
set -eu
cd "$(dirname "$0")"
case "${1:-all}" in
all)
    ./gpu
    ./ferroflash check --device cuda --cases 200
    ./ferroflash bench --device cuda
    ;;
test)
    shift
    ./gpu "$@"
    ;;
sanitize)
    for tool in memcheck racecheck synccheck initcheck; do
        echo "== $tool"
        compute-sanitizer --tool "$tool" --error-exitcode 9 ./ferroflash check --device cuda --cases "${2:-12}"
        # More work tiles than CTAs: the ring and the query tile are used again and again.
        compute-sanitizer --tool "$tool" --error-exitcode 9 ./ferroflash check --device cuda --batch 3 --heads-q 40 \
            --seqlen-q 400 --mask causal --head-dim 128
    done
    ;;
*)
    ./ferroflash "$@"
    ;;
esac
"#;

/// Builds everything and copies it to `directory`.
pub fn collect(directory: &str) -> Result {
    setup::all()?;
    step("building the GPU tests and the command line");
    let tests = artifact(&["test", "--release", "--features", "cuda", "--test", "gpu", "--no-run"], "gpu")?;
    let cli = artifact(&["build", "--release", "--features", "cuda", "--bin", "ferroflash"], "ferroflash")?;
    let to = root().join(directory);
    fs::create_dir_all(&to).map_err(|error| format!("{}: {error}", to.display()))?;
    for (from, name) in [(&tests, "gpu"), (&cli, "ferroflash")] {
        let path = to.join(name);
        fs::copy(from, &path).map_err(|error| format!("{}: {error}", path.display()))?;
        if works("strip", &["--version"]) {
            output(Command::new("strip").arg(&path))?;
        }
    }
    let script = to.join("run.sh");
    fs::write(&script, RUN_SH).map_err(|error| format!("{}: {error}", script.display()))?;
    output(Command::new("chmod").arg("+x").arg(&script))?;
    println!("{directory}/run.sh runs it; copy the folder to the machine with the GPU");
    Ok(())
}

/// Runs cargo and returns the executable of the target called `name`.
fn artifact(arguments: &[&str], name: &str) -> Result<PathBuf> {
    let messages = output(cargo(arguments).arg("--message-format=json"))?;
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| message["executable"].as_str().map(|path| Path::new(path).to_owned()))
        .ok_or_else(|| format!("cargo built no {name}"))
}
