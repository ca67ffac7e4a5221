//! Compiles the kernels to PTX and machine code, and packs them for the host: all that happens to a kernel on its way.
//!
//! `build.rs` runs this as a program where kernels are compiled from source; `cargo xtask` calls it. docs/toolchain.md
//! describes the steps and says why they are as they are.

pub mod cache;
pub mod compiler;
pub mod pack;
pub mod ptx;
pub mod ptxas;
pub mod work;

use std::collections::HashSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, mem};

use cache::{Cache, hash_of_folder, read};
use compiler::{Compiler, Selection};
use kernels_gpu::ground::constants::Form;
use kernels_gpu::specialise;
use kernels_gpu::variants::{Family, Launch, launches};
use ptxas::{Assembled, Ptxas};

/// Every kernel, compiled.
pub struct Built {
    /// The compiler, for people.
    pub compiler: String,
    /// The assembler, for people, if there is one.
    pub assembler: Option<String>,
    /// The commit of the sources, empty if it is not known.
    pub commit: String,
    /// Sorted by name.
    pub kernels: Vec<Kernel>,
    /// Families that were compiled; the cache had the others.
    pub compiled: Vec<Family>,
    /// What to tell the user.
    pub warnings: Vec<String>,
}

/// One kernel.
pub struct Kernel {
    pub launch: Launch,
    /// Its PTX, a module of its own, with placeholders for its specialisation constants.
    pub text: String,
    /// Size of its by-value parameter in bytes.
    pub parameter_bytes: u32,
    /// The general form, or the only one, then the others that are prebuilt.
    pub forms: Vec<BuiltForm>,
}

/// A kernel with values, or loads of the launch parameter, for its specialisation constants.
pub struct BuiltForm {
    /// The form, of the kernel's own constants alone.
    pub form: Form,
    /// Its name, for files and people.
    pub name: String,
    /// Its PTX.
    pub text: String,
    /// Its machine code, if there is an assembler that takes its PTX.
    pub assembled: Option<Assembled>,
}

impl Kernel {
    fn new(launch: Launch, text: String, parameter_bytes: u32) -> Result<Self, String> {
        let forms = launch.forms().into_iter();
        let forms = forms.map(|form| BuiltForm::new(&launch, &text, form)).collect::<Result<_, _>>()?;
        Ok(Kernel { launch, text, parameter_bytes, forms })
    }
}

impl BuiltForm {
    fn new(launch: &Launch, text: &str, form: Form) -> Result<Self, String> {
        let Launch { symbol, constants: places, .. } = launch;
        let (name, text) = (specialise::name(symbol, places, form), specialise::bind(text, symbol, places, form)?);
        Ok(BuiltForm { form, name, text, assembled: None })
    }
}

/// The folder of what was compiled before: `FERROFLASH_KERNEL_CACHE`, or one in the checkout's `target`.
pub fn cache_folder(root: &Path) -> PathBuf {
    env::var_os("FERROFLASH_KERNEL_CACHE").map_or_else(|| root.join("target/kernels"), PathBuf::from)
}

/// Compiles and assembles every kernel of the checkout `root`, as far as the cache does not have it.
///
/// # Errors
/// A sentence that says what to do, and on further lines a compiler's own words.
pub fn from_source(root: &Path) -> Result<Built, String> {
    let folder = cache_folder(root);
    let families = Cache::open(folder.join("families"))?;
    let cubins = Cache::open(folder.join("cubins"))?;
    // Builds of two profiles may run at the same time; the second finds everything done.
    let lock = folder.join("lock");
    let lock = File::create(&lock).and_then(|file| file.lock().map(|()| file));
    let compiler = compiler::find()?;
    let ptxas = ptxas::find(root);
    let (modules, compiled) = compile(root, &compiler, &folder.join("crates"), &families)?;
    let mut kernels = modules.into_iter().flatten().collect::<Vec<_>>();
    let forms = kernels.iter().flat_map(|kernel| &kernel.forms).collect::<Vec<_>>();
    let assembled = work::each(&forms, |form| Ok(ptxas.as_ref().map(|ptxas| ptxas.assemble(&cubins, &form.text))))?;
    drop(lock);
    let mut warnings = Vec::new();
    for (form, assembled) in kernels.iter_mut().flat_map(|kernel| &mut kernel.forms).zip(assembled) {
        match assembled {
            Some(Ok(assembled)) => form.assembled = Some(assembled),
            // The driver compiles the PTX on first use instead.
            Some(Err(error)) => warnings.push(format!("no machine code for {}: {error}", form.name)),
            None => {}
        }
    }
    kernels.sort_unstable_by_key(|kernel| kernel.launch.symbol);
    let assembler = ptxas.map(|Ptxas { version, .. }| version);
    let commit = commit(root).unwrap_or_default();
    Ok(Built { compiler: compiler.version, assembler, commit, kernels, compiled, warnings })
}

/// Returns the kernels of each family with their PTX, and the families that were compiled for it.
fn compile(
    root: &Path,
    compiler: &Compiler,
    crates: &Path,
    cache: &Cache,
) -> Result<(Vec<Vec<Kernel>>, Vec<Family>), String> {
    let package = root.join("kernels-gpu");
    let sources = hash_of_folder(compiler.hash(), &package.join("src"))?;
    let sources = sources.with(read(&package.join("Cargo.toml"))?).with(read(&root.join("Cargo.lock"))?);
    // Names of the families' entries, if these very sources have been compiled before.
    let list = format!("{}.list", sources.name());
    let known = cache.read(&list).map(|names| String::from_utf8_lossy(&names).into_owned());
    let known: Option<Vec<String>> = known.and_then(|names| {
        names.lines().map(|name| cache.read(name).and_then(|ptx| String::from_utf8(ptx).ok())).collect()
    });
    let (texts, compiled) = match known {
        Some(texts) if texts.len() == Family::ALL.len() => (texts, Vec::new()),
        _ => {
            let dependencies = compiler.dependencies(&package, crates)?;
            let mut results = work::each(&Family::ALL, |family| {
                let selection = Selection { family: family.name(), element: "bf16" };
                compiler.compile(&package, &dependencies, selection, cache)
            })?;
            let names: Vec<&str> = results.iter().map(|result| &*result.name).collect();
            cache.write(&list, names.join("\n").as_bytes())?;
            let new = Family::ALL.into_iter().zip(&results).filter(|(_, result)| result.is_new);
            let new = new.map(|(family, _)| family).collect();
            (results.iter_mut().map(|result| mem::take(&mut result.ptx)).collect(), new)
        }
    };
    let all = launches();
    let split = |(family, text): (Family, String)| {
        let launches: Vec<Launch> = all.iter().filter(|launch| launch.family == family).cloned().collect();
        let modules = ptx::split(&text, &launches, &compiler.version)?;
        let kernel = |(launch, ptx::Module { text, parameter_bytes, .. })| Kernel::new(launch, text, parameter_bytes);
        launches.into_iter().zip(modules).map(kernel).collect()
    };
    let kernels = Family::ALL.into_iter().zip(texts).map(split).collect::<Result<_, String>>()?;
    Ok((kernels, compiled))
}

/// Compares the f16 kernels that are made from the PTX of bf16 with what rustc makes of their own source, but for the
/// numbers of labels. Returns the names of those that differ.
///
/// # Errors
/// As [`from_source`].
pub fn f16_by_itself(root: &Path) -> Result<Vec<&'static str>, String> {
    let folder = cache_folder(root);
    let cache = Cache::open(folder.join("families"))?;
    let (package, compiler) = (root.join("kernels-gpu"), compiler::find()?);
    let (made, _) = compile(root, &compiler, &folder.join("crates"), &cache)?;
    let dependencies = compiler.dependencies(&package, &folder.join("crates"))?;
    let texts = work::each(&Family::ALL, |family| {
        let selection = Selection { family: family.name(), element: "f16" };
        compiler.compile(&package, &dependencies, selection, &cache).map(|compiled| compiled.ptx)
    })?;
    let mut different = Vec::new();
    for (kernels, text) in made.iter().zip(texts) {
        let f16 = kernels.iter().filter(|kernel| !kernel.launch.symbol.contains("bf16")).collect::<Vec<_>>();
        let launches: Vec<Launch> = f16.iter().map(|kernel| kernel.launch.clone()).collect();
        let modules = ptx::split(&text, &launches, &compiler.version)?;
        let differs = |(kernel, module): &(&Kernel, ptx::Module)| {
            ptx::without_label_numbers(&kernel.text) != ptx::without_label_numbers(&module.text)
        };
        different.extend(f16.into_iter().zip(modules).filter(differs).map(|(kernel, _)| kernel.launch.symbol));
    }
    Ok(different)
}

/// The commit of a checkout, with a mark if sources differ from it.
fn commit(root: &Path) -> Option<String> {
    let output = Command::new("git").arg("-C").arg(root).args(["rev-parse", "--short", "HEAD"]).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Writes the PTX and the machine code of each form of each kernel to a folder, a file each, for people to look at.
/// Removes those of an earlier build.
///
/// # Errors
/// A file that can't be written.
pub fn unpack(built: &Built, folder: &Path) -> Result<(), String> {
    fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let forms = || built.kernels.iter().flat_map(|kernel| &kernel.forms);
    let names: HashSet<&str> = forms().map(|form| &*form.name).collect();
    for path in fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()) {
        let is_code = path.extension().is_some_and(|extension| extension == "ptx" || extension == "cubin");
        if is_code && !path.file_stem().and_then(|stem| stem.to_str()).is_some_and(|stem| names.contains(stem)) {
            let _ = fs::remove_file(&path);
        }
    }
    for form in forms() {
        let path = folder.join(&form.name);
        cache::write(&path.with_extension("ptx"), &form.text)?;
        if let Some(assembled) = &form.assembled {
            cache::write(&path.with_extension("cubin"), &assembled.cubin)?;
        }
    }
    Ok(())
}
