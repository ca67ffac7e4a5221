//! The kernel compiler: a rustc that has the source of its own `core`, since none is shipped compiled for this target.
//!
//! One cargo builds `core` and the other crates that kernels need. Then each family of kernels is a rustc process.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use crate::cache::{Cache, Hash, read};

/// Where Debian's rustc-web puts its compiler.
pub const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const TARGET: &str = "nvptx64-nvidia-cuda";
/// Flags of every crate.
const FLAGS: [&str; 4] = [
    // No linker is needed: fat LTO leaves one module, and its assembly is what is wanted.
    "-Clinker=/bin/true",
    "-Ctarget-cpu=sm_90a",
    // The first version of PTX with red.v4.f32.
    "-Ctarget-feature=+ptx81",
    // Fragments are arrays that must become registers, so every loop over one must unroll.
    "-Cllvm-args=-unroll-threshold=100000",
];
/// Flags of the kernel crate. Other families' functions are unused in each process, so warnings mean nothing there.
const CRATE: [&str; 10] = [
    "--crate-name=kernels_gpu",
    "--edition=2024",
    "--crate-type=cdylib",
    "-Copt-level=3",
    "-Cpanic=abort",
    "-Ccodegen-units=1",
    "-Cmetadata=kernels",
    "-Zunstable-options",
    "-Awarnings",
    "--target",
];
/// Flags that give the code as LLVM gets it, without lines of the source: the same code has the same bytes.
const UNOPTIMISED: [&str; 2] = ["-Cno-prepopulate-passes", "-Zlocation-detail=none"];

const NONE_FOUND: &str = concat!(
    "the feature `cuda` compiles GPU kernels, for which a rustc from ",
    env!("CARGO_PKG_RUST_VERSION"),
    " on with its library source is needed, and none was found: run `rustup component add rust-src`, or `apt-get \
     install rustc-web rust-web-src` where that is as new, or name one in the environment variable FERROFLASH_RUSTC"
);

/// A rustc that can compile kernels.
#[derive(Debug)]
pub struct Compiler {
    rustc: PathBuf,
    /// Its release and LLVM, for people.
    pub version: String,
    /// All that it says about itself.
    verbose: String,
}

/// The compiled crates that the kernel crate needs.
pub struct Dependencies {
    /// Folders with the crates that these need in turn.
    folders: [PathBuf; 2],
    /// For each, its name as `--extern` wants it, and its file.
    externs: Vec<(&'static str, PathBuf)>,
}

/// Which entry points a process compiles: the `cfg`s of `entry`.
#[derive(Clone, Copy)]
pub struct Selection {
    pub family: &'static str,
    pub element: &'static str,
}

/// Returns the first that is there: `FERROFLASH_RUSTC`, the active toolchain with rust-src, Debian's rustc-web.
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
    let active = env::var_os("RUSTC").map_or_else(|| "rustc".into(), PathBuf::from);
    [&*active, Path::new(DEBIAN_RUSTC)].into_iter().find_map(Compiler::probe).ok_or_else(|| NONE_FOUND.to_owned())
}

/// Major and minor number of a release, as far as they are there.
fn release(text: &str) -> Vec<u32> {
    text.split(['.', '-']).take(2).map_while(|part| part.parse().ok()).collect()
}

impl Compiler {
    /// Returns `rustc` if it runs, has its source and is new enough.
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
        Some(Compiler { rustc: rustc.to_owned(), version, verbose: format!("{}{}", verbose, sysroot) })
    }

    /// Hash of this compiler and its flags.
    pub fn hash(&self) -> Hash {
        let flags = FLAGS.iter().chain(&CRATE).chain(&UNOPTIMISED);
        flags.fold(Hash::EMPTY.with(&self.verbose), |hash, flag| hash.with(flag))
    }

    /// Builds `core` and the crates that the kernel crate in `package` needs, and checks the kernel crate itself.
    ///
    /// # Errors
    /// What rustc says about the kernel crate.
    pub fn dependencies(&self, package: &Path, target_dir: &Path) -> Result<Dependencies, String> {
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        without_outer_cargo(&mut cargo);
        let output = cargo
            .args(["rustc", "--release", "--lib", "--crate-type", "cdylib", "-Zbuild-std=core", "--target", TARGET])
            .args(["--message-format=json-render-diagnostics", "--manifest-path"])
            .arg(package.join("Cargo.toml"))
            .arg("--target-dir")
            .arg(target_dir)
            .current_dir(package)
            .env("RUSTC", &self.rustc)
            .env("RUSTC_BOOTSTRAP", "1")
            // Empty, so that a wrapper of the user's configuration is not used either.
            .env("RUSTC_WRAPPER", "")
            .env("RUSTC_WORKSPACE_WRAPPER", "")
            .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"))
            .env("CARGO_PROFILE_RELEASE_LTO", "fat")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
            .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "3")
            .env("CARGO_PROFILE_RELEASE_DEBUG", "none")
            .output()
            .map_err(|error| format!("cargo: {error}"))?;
        if !output.status.success() {
            return Err(self.failed(&String::from_utf8_lossy(&output.stderr)));
        }
        let messages = String::from_utf8_lossy(&output.stdout);
        let externs = ["half", "noprelude:compiler_builtins", "noprelude:core"]
            .into_iter()
            .map(|name| {
                let file = format!("lib{}-", name.rsplit(':').next().unwrap_or(name));
                rlib(&messages, &file).map(|path| (name, path)).ok_or_else(|| format!("cargo built no {name}"))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let folders = [target_dir.join(TARGET).join("release/deps"), target_dir.join("release/deps")];
        Ok(Dependencies { folders, externs })
    }

    /// Returns the PTX of the selected kernels, all in one module, or takes what was made of the same code before.
    ///
    /// # Errors
    /// What rustc says about the kernels.
    pub fn compile(
        &self,
        package: &Path,
        dependencies: &Dependencies,
        selection: Selection,
        cache: &Cache,
    ) -> Result<Compiled, String> {
        let Selection { family, element } = selection;
        // Every process has a folder of its own: rustc's temporary files have the same names in all of them.
        let (scratch, _) = cache.path(&format!("{family}-{element}"));
        let hash = dependencies
            .externs
            .iter()
            .fold(self.hash(), |hash, (_, file)| hash.with(file.file_name().unwrap_or_default().as_encoded_bytes()));
        let emitted = |flags: &[&str], extension: &str| {
            fs::create_dir_all(&scratch).map_err(|error| format!("{}: {error}", scratch.display()))?;
            let mut rustc = self.rustc(package, dependencies, selection);
            self.run(rustc.args(flags).arg("--out-dir").arg(&scratch))?;
            let bytes = read(&scratch.join("kernels_gpu").with_extension(extension));
            let _ = fs::remove_dir_all(&scratch);
            bytes
        };
        let code = emitted(&[&UNOPTIMISED[..], &["--emit=llvm-bc"]].concat(), "bc")?;
        let name = format!("{}.ptx", hash.with(family).with(element).with(code).name());
        if let Some(ptx) = cache.read(&name) {
            return Ok(Compiled { ptx: text(ptx)?, name, is_new: false });
        }
        let ptx = emitted(&["-Clto", "--emit=asm"], "s")?;
        cache.write(&name, &ptx)?;
        Ok(Compiled { ptx: text(ptx)?, name, is_new: true })
    }

    /// Returns the command that compiles the selected kernels, but for what it emits.
    fn rustc(&self, package: &Path, dependencies: &Dependencies, selection: Selection) -> Command {
        let Selection { family, element } = selection;
        let mut rustc = Command::new(&self.rustc);
        without_outer_cargo(&mut rustc);
        rustc.current_dir(package).env("RUSTC_BOOTSTRAP", "1").args(FLAGS).args(CRATE).args([TARGET, "src/lib.rs"]);
        rustc.args(["--cfg", &format!("family=\"{family}\""), "--cfg", &format!("element=\"{element}\"")]);
        for folder in &dependencies.folders {
            rustc.arg("-L").arg(format!("dependency={}", folder.display()));
        }
        for (name, file) in &dependencies.externs {
            rustc.arg("--extern").arg(format!("{name}={}", file.display()));
        }
        rustc
    }

    fn run(&self, rustc: &mut Command) -> Result<(), String> {
        let output = rustc.output().map_err(|error| format!("{}: {error}", self.rustc.display()))?;
        match output.status.success() {
            true => Ok(()),
            false => Err(self.failed(&String::from_utf8_lossy(&output.stderr))),
        }
    }

    fn failed(&self, words: &str) -> String {
        format!("{} could not compile the kernels\n{words}", self.version)
    }
}

/// PTX of a family.
pub struct Compiled {
    pub ptx: String,
    /// Name of its entry in the cache.
    pub name: String,
    /// False if it was in the cache.
    pub is_new: bool,
}

fn text(bytes: Vec<u8>) -> Result<String, String> {
    String::from_utf8(bytes).map_err(|error| format!("the PTX is no text: {error}"))
}

/// Keeps what an outer cargo has set for its own package away from an inner one.
pub fn without_outer_cargo(command: &mut Command) {
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let inherited = ["CARGO_PKG_", "CARGO_FEATURE_", "CARGO_CFG_", "CARGO_PROFILE_", "CARGO_BUILD_", "DEP_"];
        let single = ["RUSTFLAGS", "RUSTDOC", "TARGET", "HOST", "PROFILE", "CARGO_ENCODED_RUSTFLAGS"];
        if inherited.iter().any(|prefix| text.starts_with(prefix)) || single.contains(&&*text) {
            command.env_remove(&name);
        }
    }
}

/// Finds the library whose file name starts with `name` in cargo's messages, which are JSON.
fn rlib(messages: &str, name: &str) -> Option<PathBuf> {
    let strings =
        messages.lines().filter(|line| line.contains("\"compiler-artifact\"")).flat_map(|line| line.split('"'));
    strings
        .filter(|string| string.ends_with(".rlib"))
        .map(|string| PathBuf::from(string.replace("\\\\", "\\")))
        .find(|path| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name)))
}
