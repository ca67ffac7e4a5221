//! What people and CI run, each a command of `cargo xtask`.

mod bundle;
mod dependant;
mod driver;
#[cfg(test)]
mod floors;
mod package;
mod ptx;
mod setup;
mod shell;
mod times;
mod wheel;

use std::process::ExitCode;

use shell::{Result, cargo, run, step};

const HELP: &str = "\
cargo xtask <command>

  setup          install what kernels from source need, a kernel compiler and ptxas, and what the feature `cust` needs
  demo           check and measure attention, on the GPU where there is one, otherwise on the CPU
  test           every test, on CPU and GPU, and a check of every kernel's machine code
  machine-code   check every kernel's machine code alone
  package        make the crates as they are published, with prebuilt kernels, in target/package
  dependant      build and run a program that depends on those crates, with no kernel compiler and no toolkit in reach
  times [WHAT…]  measure how long builds take and how large their parts are, in a folder of their own
  compare DIR    compare the machine code of every kernel with the cubins in DIR, byte for byte
  f16            compile the kernels of f16 too, and compare them with those that the build makes from bf16
  wheel          build the Python package with its kernels, and run its tests in a fresh virtual environment
  bundle [DIR]   collect the GPU tests and the command line in DIR (gpu-bundle), to run where there is no Rust";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["setup"] => setup::all(),
        ["demo"] => demo(),
        ["test"] => test(),
        ["machine-code"] => ptx::check(),
        ["package"] => package::make().map(drop),
        ["dependant"] => dependant::check(),
        ["times", ref what @ ..] => times::measure(what),
        ["compare", folder] => ptx::compare(folder),
        ["f16"] => ptx::f16(),
        ["wheel"] => wheel::check(),
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

/// Every test, then the kernels' machine code.
fn test() -> Result {
    setup::all()?;
    step("tests on the CPU, and on the GPU where there is one");
    run(&mut cargo(&["test", "--workspace", "--features", "cuda"]))?;
    step("the examples of conversions from cudarc and cust");
    run(&mut cargo(&["test", "--doc", "--features", "cudarc,cust", "cuda/cu"]))?;
    step("the library by itself, without the command line and the GPU");
    run(&mut cargo(&["check", "--no-default-features"]))?;
    ptx::check()
}
