//! A program outside the checkout that depends on the published crates: it must build with Rust and a C compiler alone.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use std::{env, fs};

use crate::shell::{Result, output, root, run, step};
use crate::{driver, package};

/// Computes attention on the CPU, then asks for a GPU.
const PROGRAM: &str = r#"use ferroflash::{Attention, Cpu, Dtype, Problem, Tensor, bf16};

fn main() -> Result<(), ferroflash::Error> {
    let problem =
        Problem { batch: 1, heads_q: 2, heads_kv: 1, seqlen_q: 8, seqlen_k: 24, head_dim: 64, dtype: Dtype::Bf16 };
    let random = |shape: [usize; 4], seed: f32| -> Vec<bf16> {
        (0..shape.iter().product::<usize>()).map(|i| bf16::from_f32((i as f32 * seed).sin())).collect()
    };
    let (q, k, v) = (random(problem.q_shape(), 1.7), random(problem.kv_shape(), 2.3), random(problem.kv_shape(), 3.1));
    let out = Attention::new(problem).forward(
        &Cpu,
        Tensor::bhsd(&q, problem.q_shape()),
        Tensor::bhsd(&k, problem.kv_shape()),
        Tensor::bhsd(&v, problem.kv_shape()),
    )?;
    assert!(out.lse.unwrap_or_default().iter().all(|lse| lse.is_finite()));
    println!("attention on the CPU");
    #[cfg(feature = "cuda")]
    gpu()?;
    Ok(())
}

#[cfg(feature = "cuda")]
fn gpu() -> Result<(), ferroflash::Error> {
    use ferroflash::cuda::{Cuda, KERNEL_ORIGIN, KERNELS};
    for kernel in KERNELS {
        assert!(!kernel.cubins.is_empty(), "{}", kernel.symbol);
        for cubin in kernel.cubins {
            assert!(kernel.machine_code(cubin)?.starts_with(b"\x7fELF"), "{}", kernel.symbol);
        }
    }
    println!("{} kernels, {KERNEL_ORIGIN}", KERNELS.len());
    match Cuda::new(0) {
        Ok(_) => println!("a GPU is here"),
        Err(error) => println!("no GPU: {error}"),
    }
    Ok(())
}
"#;

/// A folder outside the checkout with the unpacked crates and a program.
pub struct Dependant {
    folder: PathBuf,
}

impl Drop for Dependant {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Makes the crates, builds the program and runs it.
pub fn check() -> Result {
    let packages = package::make()?;
    step("a program that depends on them, with no kernel compiler and no toolkit in reach");
    let dependant = Dependant::new(&packages.files.iter().map(|(path, _)| path.as_path()).collect::<Vec<_>>())?;
    let time = dependant.build(&["--features", "cuda"])?;
    println!("built in {:.0} s", time.as_secs_f64());
    let said = output(Command::new(dependant.folder.join("target/debug/dependant")).env_remove("LD_LIBRARY_PATH"))?;
    print!("{said}");
    let expected = if driver::has_gpu() { "a GPU is here" } else { "no GPU: " };
    match said.contains("prebuilt") && said.contains(expected) {
        true => Ok(()),
        false => Err(format!("the program should have said \"prebuilt\" and \"{expected}\"")),
    }
}

impl Dependant {
    /// Unpacks the crates and writes the program.
    pub fn new(crates: &[&Path]) -> Result<Self> {
        let folder = env::temp_dir().join(format!("ferroflash-dependant-{}", std::process::id()));
        let dependant = Dependant { folder };
        let folder = &dependant.folder;
        let failed = |path: &Path, error: std::io::Error| format!("{}: {error}", path.display());
        for path in ["src", "bin", "crates"].map(|name| folder.join(name)) {
            fs::create_dir_all(&path).map_err(|error| failed(&path, error))?;
        }
        for file in crates {
            run(Command::new("tar").arg("-xzf").arg(file).arg("-C").arg(folder.join("crates")))?;
        }
        let version = env!("CARGO_PKG_VERSION");
        let manifest = format!(
            "[package]\nname = \"dependant\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\n[workspace]\n\n\
             [dependencies]\nferroflash = {{ version = \"{version}\", default-features = false }}\n\n\
             [features]\ncuda = [\"ferroflash/cuda\"]\n\n\
             [patch.crates-io]\nferroflash = {{ path = \"crates/ferroflash-{version}\" }}\n\
             ferroflash-kernels = {{ path = \"crates/ferroflash-kernels-{version}\" }}\n"
        );
        for (name, text) in [("Cargo.toml", &*manifest), ("src/main.rs", PROGRAM)] {
            let path = folder.join(name);
            fs::write(&path, text).map_err(|error| failed(&path, error))?;
        }
        // The versions that the checkout is tested with.
        let lock = folder.join("Cargo.lock");
        fs::copy(root().join("Cargo.lock"), &lock).map_err(|error| failed(&lock, error))?;
        dependant.link_tools()?;
        Ok(dependant)
    }

    /// Puts Rust and the C compiler into a folder that will be the whole path: no nvcc, no ptxas, no Python.
    fn link_tools(&self) -> Result {
        let sysroot = output(Command::new("rustc").args(["--print", "sysroot"]).current_dir(root()))?;
        let rust = ["cargo", "rustc"].map(|name| Path::new(sysroot.trim()).join("bin").join(name));
        let path = env::var_os("PATH").unwrap_or_default();
        let folders: Vec<PathBuf> = env::split_paths(&path).collect();
        let linker =
            ["cc", "ld", "as", "ar"].map(|name| folders.iter().map(|f| f.join(name)).find(|file| file.is_file()));
        for tool in rust.into_iter().chain(linker.into_iter().flatten()) {
            let link = self.folder.join("bin").join(tool.file_name().unwrap_or_default());
            std::os::unix::fs::symlink(&tool, &link).map_err(|error| format!("{}: {error}", link.display()))?;
        }
        Ok(())
    }

    /// Builds the program from nothing, and returns how long that took.
    pub fn build(&self, arguments: &[&str]) -> Result<Duration> {
        let bin = self.folder.join("bin");
        let mut cargo = Command::new(bin.join("cargo"));
        for (name, _) in env::vars_os() {
            let text = name.to_string_lossy();
            let kept =
                ["CARGO_HOME", "CARGO_HTTP", "CARGO_NET", "CARGO_REGISTR"].iter().any(|kept| text.starts_with(kept));
            if !kept && ["CARGO", "RUST", "CUDA", "FERROFLASH", "LD_", "PYTHON"].iter().any(|no| text.starts_with(no)) {
                cargo.env_remove(&name);
            }
        }
        let target = self.folder.join("target");
        if target.exists() {
            fs::remove_dir_all(&target).map_err(|error| format!("{}: {error}", target.display()))?;
        }
        cargo.current_dir(&self.folder).arg("build").args(arguments).env("PATH", &bin).env("RUSTC", bin.join("rustc"));
        // A build that asks for a kernel compiler would find this one.
        cargo.env("FERROFLASH_RUSTC", "/nonexistent/rustc").env("CARGO_TARGET_DIR", &target);
        let fetched = Instant::now();
        run(Command::new(bin.join("cargo")).current_dir(&self.folder).args(["fetch"]).env("RUSTC", bin.join("rustc")))?;
        println!("dependencies fetched in {:.0} s", fetched.elapsed().as_secs_f64());
        let start = Instant::now();
        run(&mut cargo)?;
        Ok(start.elapsed())
    }
}
