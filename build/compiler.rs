//! The kernel compiler: a rustc that has the source of its own `core` beside it, since none is shipped compiled for
//! this target.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Where Debian's rustc-web puts its compiler.
pub const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const TARGET: &str = "nvptx64-nvidia-cuda";

const NONE_FOUND: &str = concat!(
    "the feature `cuda` compiles GPU kernels, for which a rustc from ",
    env!("CARGO_PKG_RUST_VERSION"),
    " on with its library source is needed, and none was found: run `rustup component add rust-src`, or `apt-get install \
     rustc-web rust-web-src` where that is as new, or name one in the environment variable FERROFLASH_RUSTC"
);

/// A rustc that can compile kernels.
pub struct Compiler {
    rustc: PathBuf,
    /// Its release and LLVM, for people.
    pub version: String,
}

/// The first that is there: `FERROFLASH_RUSTC`, the active toolchain with rust-src, Debian's rustc-web.
pub fn find() -> Result<Compiler, String> {
    if let Some(rustc) = env::var_os("FERROFLASH_RUSTC") {
        let rustc = PathBuf::from(rustc);
        return Compiler::probe(&rustc).ok_or_else(|| {
            format!(
                "FERROFLASH_RUSTC is {}; what is needed is a rustc from {} on with its standard library's source in \
                 <sysroot>/lib/rustlib/src/rust/library",
                rustc.display(),
                env!("CARGO_PKG_RUST_VERSION")
            )
        });
    }
    let active = env::var_os("RUSTC").map(PathBuf::from);
    active
        .iter()
        .map(PathBuf::as_path)
        .chain([Path::new(DEBIAN_RUSTC)])
        .find_map(Compiler::probe)
        .ok_or_else(|| NONE_FOUND.to_owned())
}

/// Major and minor number of a release, as far as they are there.
fn release(text: &str) -> Vec<u32> {
    text.split(['.', '-']).take(2).map_while(|part| part.parse().ok()).collect()
}

impl Compiler {
    /// `rustc`, if it runs, has its source and is new enough.
    pub fn probe(rustc: &Path) -> Option<Compiler> {
        let ask = |arguments: &[&str]| {
            let output = Command::new(rustc).args(arguments).output().ok()?;
            output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let sysroot = ask(&["--print", "sysroot"])?;
        let library = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library");
        library.join("core/src/lib.rs").is_file().then_some(())?;
        let verbose = ask(&["-vV"])?;
        let field = |name: &str| verbose.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("unknown").trim();
        (release(field("release:")) >= release(env!("CARGO_PKG_RUST_VERSION"))).then_some(())?;
        let version = format!("rustc {}, LLVM {}", field("release:"), field("LLVM version:"));
        Some(Compiler { rustc: rustc.to_owned(), version })
    }

    /// The PTX of the kernel crate in `package`, all kernels in one module.
    pub fn compile(&self, package: &Path, target_dir: &Path) -> Result<String, String> {
        let manifest = package.join("Cargo.toml");
        let flags = [
            // No linker is needed: fat LTO leaves one module, and its assembly is what is wanted.
            "-Clinker=/bin/true",
            "-Ctarget-cpu=sm_90a",
            // The first version of PTX with red.v4.f32.
            "-Ctarget-feature=+ptx81",
            "--emit=asm",
            // Fragments are arrays that must become registers, so every loop over one must unroll.
            "-Cllvm-args=-unroll-threshold=100000",
        ];
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        // What the outer cargo has set for its own package must not reach the inner one.
        for (name, _) in env::vars_os() {
            let text = name.to_string_lossy();
            let inherited = ["CARGO_PKG_", "CARGO_FEATURE_", "CARGO_CFG_", "CARGO_PROFILE_", "CARGO_BUILD_", "DEP_"];
            let single = ["RUSTFLAGS", "RUSTDOC", "TARGET", "HOST", "PROFILE"];
            if inherited.iter().any(|prefix| text.starts_with(prefix)) || single.contains(&&*text) {
                cargo.env_remove(&name);
            }
        }
        let output = cargo
            .args(["rustc", "--release", "--crate-type", "cdylib", "-Zbuild-std=core", "--target", TARGET])
            .arg("--manifest-path")
            .arg(&manifest)
            .arg("--target-dir")
            .arg(target_dir)
            .current_dir(package)
            .env("RUSTC", &self.rustc)
            .env("RUSTC_BOOTSTRAP", "1")
            // Empty, so that a wrapper of the user's configuration is not used either.
            .env("RUSTC_WRAPPER", "")
            .env("RUSTC_WORKSPACE_WRAPPER", "")
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
            .env("CARGO_PROFILE_RELEASE_LTO", "fat")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
            .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "3")
            .env("CARGO_PROFILE_RELEASE_DEBUG", "none")
            .output()
            .map_err(|e| format!("cargo: {e}"))?;
        if !output.status.success() {
            return Err(format!(
                "{} could not compile the kernels\n{}",
                self.version,
                String::from_utf8_lossy(&output.stderr)
            ));
        }
        let path = target_dir.join(TARGET).join("release/deps/kernels_gpu.s");
        fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))
    }
}
