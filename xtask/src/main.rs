//! What people and CI run: `cargo xtask setup | demo | test | bundle`.

mod bundle;
#[path = "../../build/compiler.rs"]
#[allow(dead_code, reason = "build.rs needs the rest of it")]
mod compiler;
mod driver;
#[cfg(test)]
mod floors;
mod ptx;
mod setup;
mod shell;

use std::process::ExitCode;

use shell::{Result, cargo, run, step};

const HELP: &str = "\
cargo xtask <command>

  setup          install what the feature `cuda` needs to build: a kernel compiler, ptxas, the driver's import library
  demo           check and measure attention, on the GPU where there is one, otherwise on the CPU
  test           every test, on CPU and GPU, and ptxas over every kernel
  bundle [DIR]   collect the GPU tests and the command line in DIR (gpu-bundle), to run where there is no Rust";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["setup"] => setup::all(),
        ["demo"] => demo(),
        ["test"] => test(),
        ["bundle"] => bundle::collect("gpu-bundle"),
        ["bundle", directory] => bundle::collect(directory),
        ["help" | "--help" | "-h"] => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("{HELP}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("\nerror: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Cases against the reference, and a small benchmark.
fn demo() -> Result {
    let gpu = driver::has_gpu();
    if gpu {
        setup::all()?;
    } else {
        step("no GPU with a driver here: running on the CPU");
    }
    for command in [&["check", "--cases", "40"][..], &["bench"]] {
        let mut cargo = cargo(&["run", "--release", "--quiet"]);
        if gpu {
            cargo.args(["--features", "cuda"]);
        }
        cargo.arg("--").args(command).args(["--device", if gpu { "cuda" } else { "cpu" }]);
        run(&mut cargo)?;
    }
    Ok(())
}

/// Every test, then the kernels' PTX.
fn test() -> Result {
    setup::all()?;
    step("tests on the CPU, and on the GPU where there is one");
    let mut tests = cargo(&["test", "--workspace", "--features", "cuda"]);
    driver::provide(&mut tests);
    run(&mut tests)?;
    step("the library by itself, without the command line and the GPU");
    run(&mut cargo(&["check", "--no-default-features"]))?;
    ptx::check()
}
