//! What the feature `cuda` needs to build: none of it is NVIDIA's toolkit. Each step is skipped when it was done
//! before.

use std::env;
use std::path::Path;
use std::process::Command;

use ferroflash_build::compiler::{Compiler, DEBIAN_RUSTC};

use crate::driver;
use crate::shell::{Result, apt_install, run, step, target, works};

/// ptxas and nvdisasm, as NVIDIA packs them for Python; no older nvdisasm is packed.
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

/// A rustc that is new enough and has the source of its standard library; build.rs looks in the same places.
fn kernel_compiler() -> Result {
    step("a compiler for the kernels");
    if let Ok(named) = env::var("FERROFLASH_RUSTC") {
        return if compiles_kernels(&named) {
            println!("{named} is new enough and has its standard library's source");
            Ok(())
        } else {
            Err(format!(
                "FERROFLASH_RUSTC is {named}, which is no rustc that is new enough and has its standard library's source"
            ))
        };
    }
    if let Some(rustc) = ["rustc", DEBIAN_RUSTC].into_iter().find(|rustc| compiles_kernels(rustc)) {
        println!("{rustc} is new enough and has its standard library's source");
        return Ok(());
    }
    println!("none found; trying rustup's rust-src, then Debian's rustc-web");
    let added = run(Command::new("rustup").args(["component", "add", "rust-src"]));
    if added.is_ok() && compiles_kernels("rustc") {
        return Ok(());
    }
    println!("rustup could not; Debian's rustc-web, then");
    if apt_install(&["rustc-web", "rust-web-src"]).is_ok() && compiles_kernels(DEBIAN_RUSTC) {
        return Ok(());
    }
    Err("neither `rustup component add rust-src` nor `apt-get install rustc-web rust-web-src` brought a rustc with its \
         standard library's source that is new enough; set FERROFLASH_RUSTC to one"
        .to_owned())
}

/// Whether build.rs would take it.
fn compiles_kernels(rustc: &str) -> bool {
    Compiler::probe(Path::new(rustc)).is_some()
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
    run(pip.arg(target("cuda-tools")).args(CUDA_TOOLS).env("PIP_ROOT_USER_ACTION", "ignore"))
}
