//! Finds the kernels for the feature `cuda`: prebuilt ones in a published crate, and in a checkout those of its source.
//!
//! The folder of the kernels holds a table in Rust, which the host includes. Prebuilt kernels are such a folder, and
//! nothing is left to do. From source, `ferroflash-build` makes one: another process, so that a build with prebuilt
//! kernels compiles nothing for it.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::{env, fs};

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return ExitCode::SUCCESS;
    }
    println!("cargo::rerun-if-env-changed=FERROFLASH_KERNELS");
    match kernels() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            if !message.is_empty() {
                println!("cargo::error={message}");
            }
            ExitCode::FAILURE
        }
    }
}

fn kernels() -> Result<(), String> {
    let root = PathBuf::from(required("CARGO_MANIFEST_DIR")?);
    let has_source = root.join("kernels-gpu/Cargo.toml").is_file();
    let choice = env::var("FERROFLASH_KERNELS").unwrap_or_default();
    let (folder, origin) = match (&*choice, has_source) {
        ("source", true) | ("", true) => (from_source(&root)?, "source"),
        ("prebuilt", _) | ("", false) => (prebuilt(&root)?, "prebuilt"),
        ("source", false) => {
            return Err(
                "FERROFLASH_KERNELS is source, but this package has no kernel sources: depend on a checkout or \
                        on the git repository of ferroflash instead"
                    .to_owned(),
            );
        }
        (other, _) => {
            return Err(format!("FERROFLASH_KERNELS is {other}: set it to source or to prebuilt"));
        }
    };
    println!("cargo::rustc-env=FERROFLASH_KERNEL_TABLE={}", folder.join("kernels.rs").display());
    println!("cargo::rustc-env=FERROFLASH_KERNEL_ORIGIN={origin}");
    Ok(())
}

fn prebuilt(root: &Path) -> Result<PathBuf, String> {
    let folder = root.join("prebuilt");
    println!("cargo::rerun-if-changed={}", folder.display());
    match folder.join("kernels.rs").is_file() {
        true => Ok(folder),
        false => {
            Err("there are no prebuilt kernels in this checkout: run `cargo xtask package`, which makes them, or \
                      leave FERROFLASH_KERNELS unset"
                .to_owned())
        }
    }
}

/// Runs `ferroflash-build`; an empty error means that it has said what is wrong.
fn from_source(root: &Path) -> Result<PathBuf, String> {
    for input in ["kernels-gpu/src", "kernels-gpu/Cargo.toml", "build", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", root.join(input).display());
    }
    for variable in ["FERROFLASH_RUSTC", "FERROFLASH_PTXAS", "FERROFLASH_KERNEL_CACHE", "CUDA_HOME"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(required("OUT_DIR")?).join("kernels");
    fs::create_dir_all(&out).map_err(|error| format!("{}: {error}", out.display()))?;
    let cache = env::var_os("FERROFLASH_KERNEL_CACHE").map_or_else(|| root.join("target/kernels"), PathBuf::from);
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // What the outer cargo has set for this package must not reach the inner one.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let inherited = ["CARGO_PKG_", "CARGO_FEATURE_", "CARGO_CFG_", "CARGO_PROFILE_", "CARGO_BUILD_", "DEP_"];
        let single = ["RUSTDOC", "TARGET", "HOST", "PROFILE", "OUT_DIR", "CARGO_ENCODED_RUSTFLAGS"];
        if inherited.iter().any(|prefix| text.starts_with(prefix)) || single.contains(&&*text) {
            cargo.env_remove(&name);
        }
    }
    let status = cargo
        .args(["run", "--quiet", "--release", "--package", "ferroflash-build", "--manifest-path"])
        .arg(root.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(cache.join("builder"))
        .arg("--")
        .args([root, &*out])
        .status()
        .map_err(|error| format!("cargo: {error}"))?;
    if status.success() { Ok(out) } else { Err(String::new()) }
}

fn required(variable: &str) -> Result<String, String> {
    env::var(variable).map_err(|error| format!("{variable}: {error}"))
}
