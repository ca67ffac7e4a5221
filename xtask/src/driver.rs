//! The CUDA driver: an import library for the feature `cust`, and whether there is a driver and a GPU.
//!
//! `cust` links `libcuda`. NVIDIA's toolkit carries an import library for that; without the toolkit, one is made here
//! of the names that `cust` declares, in which every call returns CUDA_ERROR_NO_DEVICE. The feature `cuda` needs none.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::shell::{Result, cargo, output, run, step, target, works};

/// The name that programs look for at run time.
const SONAME: &str = "libcuda.so.1";
const NO_DEVICE: u32 = 100;

/// For linking. Cargo puts this folder on the loader's path too, so it must not hold [`SONAME`], which would hide the
/// real driver.
fn link_folder() -> PathBuf {
    target("cuda-driver/lib64")
}

/// Makes the import library.
pub fn import_library() -> Result {
    step("the driver's import library, for the feature `cust`");
    if link_folder().join("libcuda.so").is_file() {
        println!("it is in target/cuda-driver");
        return Ok(());
    }
    let source = cust_raw()?;
    let text = fs::read_to_string(&source).map_err(|error| format!("{}: {error}", source.display()))?;
    let names = driver_functions(&text);
    if names.is_empty() {
        return Err(format!("{} declares no driver function", source.display()));
    }
    let stubs = link_folder().join("stubs");
    fs::create_dir_all(&stubs).map_err(|error| format!("{}: {error}", stubs.display()))?;
    let c = target("cuda-driver/libcuda.c");
    let functions: String = names.iter().map(|name| format!("int {name}(void) {{ return {NO_DEVICE}; }}\n")).collect();
    fs::write(&c, functions).map_err(|error| format!("{}: {error}", c.display()))?;
    let library = link_folder().join("libcuda.so");
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", &format!("-Wl,-soname,{SONAME}"), "-o"]).args([&library, &c]);
    run(&mut cc)?;
    println!("{} functions", names.len());
    Ok(())
}

/// Where cust_raw declares the driver's functions.
fn cust_raw() -> Result<PathBuf> {
    let metadata = output(
        cargo(&["metadata", "--quiet", "--format-version", "1", "--features", "cust"]).env("CARGO_TERM_QUIET", "true"),
    )?;
    let json = metadata.lines().find(|line| line.starts_with('{')).unwrap_or_default();
    let metadata: serde_json::Value = serde_json::from_str(json).map_err(|error| format!("cargo metadata: {error}"))?;
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let manifest = packages
        .filter(|package| package["name"] == "cust_raw")
        .find_map(|package| package["manifest_path"].as_str())
        .ok_or("cargo metadata names no cust_raw")?;
    Ok(Path::new(manifest).with_file_name("src").join("cuda.rs"))
}

/// The names of `pub fn cu…(` declarations.
fn driver_functions(text: &str) -> BTreeSet<&str> {
    text.split("pub fn ")
        .skip(1)
        .filter_map(|rest| rest.split_once('('))
        .map(|(name, _)| name)
        .filter(|name| name.starts_with("cu") && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'))
        .collect()
}

/// True if the driver's library can be loaded.
fn has_driver() -> bool {
    output(Command::new("ldconfig").arg("-p"))
        .or_else(|_| output(Command::new("/sbin/ldconfig").arg("-p")))
        .is_ok_and(|list| list.contains(SONAME))
}

/// True if there is a GPU to run on.
pub fn has_gpu() -> bool {
    has_driver() && (Path::new("/dev/nvidia0").exists() || works("nvidia-smi", &["-L"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found() {
        let text = "extern \"C\" {\n    pub fn cuInit(Flags: u32) -> CUresult;\n}\npub fn other(x: u8);\n\
                    pub fn cuMemFree_v2(\n        dptr: CUdeviceptr,\n    ) -> CUresult;\npub fn custom<T>(x: T) {}";
        assert_eq!(driver_functions(text).into_iter().collect::<Vec<_>>(), ["cuInit", "cuMemFree_v2"]);
    }
}
