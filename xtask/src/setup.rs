//! What the feature `cuda` needs to build: none of it is NVIDIA's toolkit. Each step is skipped when it was done before.

use std::env;
use std::path::Path;
use std::process::Command;

use crate::driver;
use crate::shell::{Result, apt_install, output, run, step, target, works};

/// ptxas and nvdisasm, as NVIDIA packs them for Python.
const CUDA_TOOLS: [&str; 2] = ["nvidia-cuda-nvcc==13.0.88", "nvidia-cuda-nvdisasm==13.2.51"];

/// Every step.
pub fn all() -> Result {
    kernel_compiler()?;
    c_compiler()?;
    cuda_tools()?;
    driver::import_library()
}

/// Where a tool of [`CUDA_TOOLS`] is.
pub fn cuda_tool(name: &str) -> std::path::PathBuf {
    target("cuda-tools/nvidia/cu13/bin").join(name)
}

/// A rustc with the source of its standard library; build.rs looks in the same places.
fn kernel_compiler() -> Result {
    step("a compiler for the kernels");
    let named = env::var("FERROFLASH_RUSTC").ok();
    let mut candidates = [named.as_deref(), Some("rustc"), Some("/usr/bin/rustc")].into_iter().flatten();
    if let Some(rustc) = candidates.find(|rustc| has_library_source(rustc)) {
        println!("{rustc} has its standard library's source");
        return Ok(());
    }
    println!("none found; trying rustup's rust-src, then Debian's rustc-web");
    if works("rustup", &["component", "add", "rust-src"]) && has_library_source("rustc") {
        println!("added rust-src");
        return Ok(());
    }
    apt_install(&["rustc-web", "rust-web-src"])?;
    if has_library_source("/usr/bin/rustc") {
        return Ok(());
    }
    Err("neither `rustup component add rust-src` nor `apt-get install rustc-web rust-web-src` brought a rustc with its \
         standard library's source; set FERROFLASH_RUSTC to one that has it"
        .to_owned())
}

fn has_library_source(rustc: &str) -> bool {
    output(Command::new(rustc).args(["--print", "sysroot"]))
        .is_ok_and(|sysroot| Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file())
}

/// Rust itself links with it.
fn c_compiler() -> Result {
    step("a C compiler");
    if works("cc", &["--version"]) {
        println!("cc is there");
        return Ok(());
    }
    apt_install(&["gcc", "libc6-dev"])
}

/// ptxas makes cubins, so that first use needs no compilation, and checks the kernels; nvdisasm shows what they became.
fn cuda_tools() -> Result {
    step("ptxas and nvdisasm");
    if ["ptxas", "nvdisasm"].iter().all(|tool| cuda_tool(tool).is_file()) {
        println!("they are in target/cuda-tools");
        return Ok(());
    }
    if !works("python3", &["-m", "pip", "--version"]) {
        apt_install(&["python3-pip"])?;
    }
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--upgrade", "--target"]);
    run(pip.arg(target("cuda-tools")).args(CUDA_TOOLS))
}
