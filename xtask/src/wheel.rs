//! The Python package: a wheel with its kernels, tried in a fresh virtual environment.
//!
//! Everything is under target/wheel: the tools that build it, torch with the tools that test it, both installed once,
//! and the environment that the wheel is installed in, made again in every run. That environment sees torch by a path
//! and nothing else of the machine.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use crate::package::kib;
use crate::setup;
use crate::shell::{Result, output, root, run, step, target, works};

/// Builds wheels; zig links against the oldest C library that [`PLATFORM`] allows.
const BUILD_TOOLS: [&str; 2] = ["maturin==1.16.0", "ziglang==0.15.2"];
/// What tests need, torch aside.
const TEST_TOOLS: [&str; 3] = ["pytest==9.2.0", "numpy", "transformers==5.24.0"];
/// The version of torch that tests run with, unless `FERROFLASH_TORCH` names another.
const TORCH: &str = "torch==2.11.0";
/// Linux with glibc 2.28 or newer, as torch's own wheels.
const PLATFORM: &str = "manylinux_2_28";
/// Limit of a wheel's size: a wheel without its kernels, or with symbols, is outside.
const BYTES: std::ops::Range<u64> = 1 << 20..8 << 20;

/// Builds the wheel, and runs its tests where it is installed.
pub fn check() -> Result {
    setup::all()?;
    let wheel = build()?;
    step("the wheel in a fresh environment");
    let tools = test_environment()?;
    let fresh = target("wheel/fresh");
    environment(&fresh, true)?;
    let python = fresh.join("bin/python");
    fs::write(site_packages(&python)?.join("torch.pth"), format!("{}\n", tools.display()))
        .map_err(|error| format!("{}: {error}", fresh.display()))?;
    run(pip(&python).args(["install", "--no-deps"]).arg(&wheel))?;
    step("its tests");
    let tests = root().join("bindings/python/tests");
    run(Command::new(&python).args(["-m", "pytest", "-q", "-p", "no:cacheprovider"]).arg(&tests).current_dir(&tests))
}

/// Builds the wheel and returns its path.
fn build() -> Result<PathBuf> {
    step("the wheel");
    let tools = target("wheel/build");
    environment(&tools, false)?;
    let python = tools.join("bin/python");
    if !works(&text(&tools.join("bin/maturin")), &["--version"])
        || !works(&text(&python), &["-m", "ziglang", "version"])
    {
        run(pip(&python).arg("install").args(BUILD_TOOLS))?;
    }
    let folder = target("wheel/dist");
    if folder.exists() {
        fs::remove_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    let mut maturin = Command::new(tools.join("bin/maturin"));
    maturin.args(["build", "--release", "--locked", "--zig", "--compatibility", PLATFORM, "--out"]).arg(&folder);
    maturin.current_dir(root().join("bindings/python")).env("VIRTUAL_ENV", &tools);
    run(maturin.env("PATH", path_with(&tools.join("bin"))?))?;
    let entries = fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let wheels: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    let [wheel] = &wheels[..] else { return Err(format!("{wheels:?}: one wheel was expected")) };
    let bytes = fs::metadata(wheel).map_err(|error| format!("{}: {error}", wheel.display()))?.len();
    println!("{}: {}", wheel.display(), kib(bytes));
    match BYTES.contains(&bytes) {
        true => Ok(wheel.clone()),
        false => Err(format!("the wheel should have {} to {}", kib(BYTES.start), kib(BYTES.end))),
    }
}

/// Returns the folder where torch and pytest are: that of `FERROFLASH_TORCH_SITE` (the site-packages of some other
/// environment), or else one that is installed under target/ for each torch.
fn test_environment() -> Result<PathBuf> {
    if let Some(folder) = env::var_os("FERROFLASH_TORCH_SITE") {
        return Ok(folder.into());
    }
    let torch = env::var("FERROFLASH_TORCH").unwrap_or_else(|_| TORCH.to_owned());
    let folder = target("wheel").join(torch.replace(|c: char| !c.is_ascii_alphanumeric() && c != '.', "-"));
    environment(&folder, false)?;
    let python = folder.join("bin/python");
    if !works(&text(&python), &["-c", "import torch, pytest, numpy, transformers"]) {
        run(pip(&python).arg("install").arg(&torch).args(TEST_TOOLS))?;
    }
    site_packages(&python)
}

/// Makes a virtual environment, if there is none or a new one is asked for.
fn environment(folder: &Path, fresh: bool) -> Result {
    if !fresh && folder.join("bin/python").is_file() {
        return Ok(());
    }
    let python = env::var("PYTHON").unwrap_or_else(|_| "python3".to_owned());
    run(Command::new(python).args(["-m", "venv", "--clear"]).arg(folder))
}

fn pip(python: &Path) -> Command {
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "--quiet", "--disable-pip-version-check"]);
    pip
}

fn site_packages(python: &Path) -> Result<PathBuf> {
    let script = "import sysconfig; print(sysconfig.get_path('purelib'))";
    Ok(output(Command::new(python).args(["-c", script]))?.trim().into())
}

/// Returns the search path with a folder before the others: maturin looks for zig there.
fn path_with(folder: &Path) -> Result<std::ffi::OsString> {
    let others = env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(folder.to_owned()).chain(env::split_paths(&others));
    env::join_paths(folders).map_err(|error| format!("{}: {error}", folder.display()))
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
