//! Compiles the kernels to PTX where the feature `cuda` asks for it; without it there is nothing to do.
//!
//! The kernel crate is compiled by a nested cargo with `-Zbuild-std`, its PTX gets its launch bounds and is split into
//! one module a kernel, and a table of them all is generated for the host. docs/toolchain.md says why this way.

#[path = "build/compiler.rs"]
mod compiler;
#[path = "build/ptx.rs"]
mod ptx;
#[path = "build/ptxas.rs"]
mod ptxas;

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, thread};

use flate2::Compression;
use flate2::write::ZlibEncoder;
use kernels_gpu::variants;

fn main() -> ExitCode {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=build");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return ExitCode::SUCCESS;
    }
    match compile_kernels() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            // The first line is what cargo shows as the error; the rest is a compiler's own words.
            let (first, rest) = message.split_once('\n').unwrap_or((&message, ""));
            println!("cargo::error={first}");
            eprintln!("{rest}");
            ExitCode::FAILURE
        }
    }
}

fn compile_kernels() -> Result<(), String> {
    let root = PathBuf::from(required("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(required("OUT_DIR")?);
    for input in ["kernels-gpu/src", "kernels-gpu/Cargo.toml"] {
        println!("cargo:rerun-if-changed={}", root.join(input).display());
    }
    for variable in ["FERROFLASH_RUSTC", "FERROFLASH_PTXAS", "CUDA_HOME"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }

    let compiler = compiler::find()?;
    let text = compiler.compile(&root.join("kernels-gpu"), &out.join("kernels"))?;
    let launches = variants::launches();
    let mut modules = ptx::split(&text, &launches, &compiler.version)?;
    modules.sort_unstable();

    let folder = out.join("ptx");
    fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let ptxas = ptxas::find(&root);
    let mut table =
        format!("/// What compiled the kernels.\npub const KERNEL_COMPILER: &str = {:?};\n", compiler.version);
    let commit = git_commit(&root).unwrap_or_default();
    writeln!(
        table,
        "/// The commit of the sources, empty where it is not known.\npub const COMMIT: &str = {commit:?};"
    )
    .unwrap();
    writeln!(table, "/// Every compiled kernel, by name.\npub static KERNELS: &[Kernel] = &[").unwrap();
    let mut paths = Vec::new();
    for (symbol, text) in &modules {
        let path = folder.join(format!("{symbol}.ptx"));
        fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?;
        paths.push(path);
    }
    let assembled = assemble_all(ptxas.as_deref(), &paths);
    for (((symbol, text), path), assembled) in modules.iter().zip(&paths).zip(&assembled) {
        let packed = path.with_extension("ptx.z");
        fs::write(&packed, compress(text)?).map_err(|e| format!("{}: {e}", packed.display()))?;
        let (cubin, registers) = match assembled {
            Some((cubin, registers)) => (format!("Some(include_bytes!({cubin:?}))"), format!("Some({registers})")),
            None => ("None".to_owned(), "None".to_owned()),
        };
        writeln!(
            table,
            "    Kernel {{ symbol: {symbol:?}, ptx: include_bytes!({packed:?}), cubin: {cubin}, registers: {registers} }},"
        )
        .unwrap();
    }
    table.push_str("];\n");
    fs::write(out.join("kernels.rs"), table).map_err(|e| format!("kernels.rs: {e}"))
}

/// The text, some ten times smaller: there is much of it, and few programs ever need it.
fn compress(text: &str) -> Result<Vec<u8>, String> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text.as_bytes()).and_then(|()| encoder.finish()).map_err(|e| e.to_string())
}

/// A cubin of each module, on all cores.
fn assemble_all(ptxas: Option<&Path>, modules: &[PathBuf]) -> Vec<Option<(PathBuf, u32)>> {
    let next = AtomicUsize::new(0);
    let results: Vec<_> = modules.iter().map(|_| OnceLock::new()).collect();
    let work = || {
        while let Some(i) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&i| i < modules.len()) {
            let _ = results[i].set(ptxas.and_then(|ptxas| assemble(ptxas, &modules[i])));
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(work);
        }
    });
    results.into_iter().map(|result| result.into_inner().flatten()).collect()
}

/// A cubin of one module; where ptxas can't make it, the driver compiles the PTX on first use instead.
fn assemble(ptxas: &Path, ptx: &Path) -> Option<(PathBuf, u32)> {
    match ptxas::assemble(ptxas, ptx) {
        Ok(assembled) => Some(assembled),
        Err(message) => {
            println!("cargo:warning=no cubin for {}: {message}", ptx.display());
            None
        }
    }
}

fn required(variable: &str) -> Result<String, String> {
    env::var(variable).map_err(|e| format!("{variable}: {e}"))
}

fn git_commit(root: &Path) -> Option<String> {
    let output = Command::new("git").arg("-C").arg(root).args(["rev-parse", "--short", "HEAD"]).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
