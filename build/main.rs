//! What `build.rs` runs: compiles the kernels of the checkout ROOT and packs them into the folder OUT.

use std::path::Path;
use std::process::ExitCode;

use ferroflash_build::pack::{Effort, pack};
use ferroflash_build::{cache_folder, from_source, unpack};

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [root, out] = &arguments[..] else {
        eprintln!("ferroflash-build ROOT OUT");
        return ExitCode::from(2);
    };
    match build(Path::new(root), Path::new(out)) {
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

fn build(root: &Path, out: &Path) -> Result<(), String> {
    let built = from_source(root)?;
    // Cargo shows this with -vv.
    let names: Vec<&str> = built.compiled.iter().map(|family| family.name()).collect();
    println!(
        "families compiled: {}; the others were in the cache",
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    );
    for warning in &built.warnings {
        println!("cargo::warning={warning}");
    }
    unpack(&built, &cache_folder(root).join("latest"))?;
    pack(&built, out, Effort::Fast).map(drop)
}
