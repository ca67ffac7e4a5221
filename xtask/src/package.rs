//! The crates as they are published: the kernels' source as one, the library with prebuilt kernels as the other.

use std::fs;
use std::path::PathBuf;

use ferroflash_build::pack::{Effort, Sizes, pack};

use crate::ptx;
use crate::shell::{Result, cargo, root, run, step, target};

/// The limit of crates.io.
const LARGEST: u64 = 10 << 20;
/// The crates that are published, with those that depend on others last.
const CRATES: [&str; 2] = ["ferroflash-kernels", "ferroflash"];

/// What [`make`] has made.
pub struct Packages {
    /// The crate files, each with its size in bytes.
    pub files: Vec<(PathBuf, u64)>,
    pub kernels: Sizes,
}

/// Compiles every kernel, packs them into `prebuilt`, and makes the crates.
pub fn make() -> Result<Packages> {
    step("prebuilt kernels");
    let built = ptx::built()?;
    let folder = root().join("prebuilt");
    if folder.exists() {
        fs::remove_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    let kernels = pack(&built, &folder, Effort::Best)?;
    println!(
        "{} kernels in {} forms: {} of PTX as {}, {} of machine code as {}",
        built.kernels.len(),
        built.kernels.iter().map(|kernel| kernel.forms.len()).sum::<usize>(),
        kib(kernels.ptx as u64),
        kib(kernels.packed_ptx as u64),
        kib(kernels.cubins as u64),
        kib(kernels.packed_cubins as u64)
    );
    step("packages");
    let mut package = cargo(&["package", "--allow-dirty", "--no-verify", "--target-dir"]);
    package.arg(target("")).args(CRATES.iter().flat_map(|name| ["--package", name]));
    run(&mut package)?;
    let mut files = Vec::new();
    for name in CRATES {
        let path = target("package").join(format!("{name}-{}.crate", env!("CARGO_PKG_VERSION")));
        let bytes = fs::metadata(&path).map_err(|error| format!("{}: {error}", path.display()))?.len();
        println!("{}: {}", path.display(), kib(bytes));
        if bytes > LARGEST {
            return Err(format!("{} is larger than the {} that crates.io takes", path.display(), kib(LARGEST)));
        }
        files.push((path, bytes));
    }
    Ok(Packages { files, kernels })
}

/// A size for people.
pub fn kib(bytes: u64) -> String {
    match bytes {
        0..1_048_576 => format!("{:.0} KiB", bytes as f64 / 1024.0),
        _ => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
    }
}
