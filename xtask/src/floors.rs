//! The floors of the kernel crate: a file imports from its own floor and those below it, so that no circle can arise.
//!
//! The list of floors is the table in docs/architecture.md, from the lowest to the highest. A folder's floor is that of
//! all its files, unless a file has one of its own.

use std::fs;
use std::path::{Path, PathBuf};

use crate::shell::{Result, root};

/// The heading in docs/architecture.md that the table stands under.
const HEADING: &str = "### Floors";

/// The modules of each floor, as paths within the crate.
struct Floors(Vec<Vec<String>>);

impl Floors {
    /// Reads the table: one row a floor, its modules in code marks.
    fn read(document: &str) -> Result<Self> {
        let (_, section) =
            document.split_once(HEADING).ok_or_else(|| format!("the document has no section {HEADING:?}"))?;
        let rows = section.lines().skip_while(|line| !line.starts_with("| ")).take_while(|line| line.starts_with('|'));
        let modules = |row: &str| -> Vec<String> {
            let cell = row.split('|').nth(2).unwrap_or_default();
            cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
        };
        let floors: Vec<_> = rows.map(modules).filter(|modules| !modules.is_empty()).collect();
        if floors.len() < 2 { Err(format!("no table under {HEADING:?}")) } else { Ok(Floors(floors)) }
    }

    /// The floor of a module, by the longest path that names it or a folder of it.
    fn of(&self, module: &str) -> Option<usize> {
        let floor = |path: &str| self.0.iter().position(|floor| floor.iter().any(|module| module == path));
        let mut ends = [module.len()].into_iter().chain(module.rmatch_indices('/').map(|(at, _)| at));
        ends.find_map(|end| floor(&module[..end]))
    }
}

/// The module of a file, relative to the crate's source folder: `arch/sm90/cta`, and `arch` for `arch/mod.rs`.
fn module_of(file: &Path) -> String {
    let path = file.with_extension("").to_string_lossy().replace('\\', "/");
    path.strip_suffix("/mod").unwrap_or(&path).to_owned()
}

/// The modules that a file imports from, outside its tests; `is_folder` says that it is a folder's `mod.rs`.
fn imports(text: &str, module: &str, is_folder: bool) -> Vec<String> {
    let code =
        ["\n#[cfg(test)]", "\n#[cfg(all(test"].iter().fold(text, |text, tests| text.split(tests).next().unwrap_or(""));
    let statements = code.split(';').filter_map(|statement| {
        let statement = statement.trim_start_matches("pub ").rsplit("\n").find_map(|line| {
            let line = line.trim_start().trim_start_matches("pub ");
            line.strip_prefix("use ").map(|_| line)
        })?;
        let start = code.find(statement)?;
        let end = code[start..].find([';', '{'])?;
        Some(code[start + "use ".len()..start + end].trim())
    });
    statements.filter_map(|path| resolve(path, module, is_folder)).collect()
}

/// A path of a `use`, as a module: its leading lower-case parts.
fn resolve(path: &str, module: &str, is_folder: bool) -> Option<String> {
    let mut parts: Vec<&str> = path.split("::").filter(|part| !part.is_empty()).collect();
    let mut base: Vec<&str> = module.split('/').collect();
    match *parts.first()? {
        "crate" => base.clear(),
        "super" if !is_folder || base.len() > 1 => {}
        _ => return None,
    }
    // In a file `super` is its folder, in a folder's own file the folder around it.
    for _ in parts.iter().filter(|&&part| part == "super") {
        base.pop();
    }
    parts.retain(|&part| part != "crate" && part != "super");
    let names = parts.into_iter().take_while(|part| part.starts_with(|c: char| c.is_ascii_lowercase()));
    Some(base.into_iter().chain(names).collect::<Vec<_>>().join("/")).filter(|module| !module.is_empty())
}

/// Every file of a folder, with its path from there.
fn files(folder: &Path, within: &Path, into: &mut Vec<PathBuf>) -> Result {
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = within.join(path.file_name().unwrap_or_default());
        if path.is_dir() {
            files(&path, &name, into)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(name);
        }
    }
    Ok(())
}

/// The imports of the kernel crate that run upwards, as sentences.
pub fn upward() -> Result<Vec<String>> {
    let document = root().join("docs/architecture.md");
    let document = fs::read_to_string(&document).map_err(|error| format!("{}: {error}", document.display()))?;
    let (floors, source) = (Floors::read(&document)?, root().join("kernels-gpu/src"));
    let (mut found, mut wrong) = (Vec::new(), Vec::new());
    files(&source, Path::new(""), &mut found)?;
    for file in found.iter().filter(|file| *file != Path::new("lib.rs") && !file.ends_with("tests.rs")) {
        let text = fs::read_to_string(source.join(file)).map_err(|error| format!("{}: {error}", file.display()))?;
        let module = module_of(file);
        let Some(own) = floors.of(&module) else {
            wrong.push(format!("{module} has no floor in docs/architecture.md"));
            continue;
        };
        for import in imports(&text, &module, file.ends_with("mod.rs")) {
            match floors.of(&import) {
                Some(floor) if floor <= own => {}
                Some(_) => wrong.push(format!("{module} imports from {import}, which is above it")),
                None => wrong.push(format!("{module} imports from {import}, which has no floor")),
            }
        }
    }
    Ok(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "### Floors\n\nText.\n\n| floor | modules |\n| --- | --- |\n| 1 | `ground` |\n\
                         | 2 | `tile`, `arch/bytes` |\n| 3 | `arch` |\n\nMore.\n";

    #[test]
    fn no_import_runs_upwards() {
        let wrong = upward().unwrap();
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    #[test]
    fn floors_are_read_from_the_table() {
        let floors = Floors::read(TABLE).unwrap();
        assert_eq!(
            ["ground/shape", "arch/bytes", "arch/cpu/rows", "none"].map(|m| floors.of(m)),
            [Some(0), Some(1), Some(2), None]
        );
        assert!(Floors::read("### Floors\n").is_err() && Floors::read("").is_err());
    }

    #[test]
    fn imports_are_resolved() {
        let text = "//! x\nuse core::fmt;\n\nuse super::mask::Mask;\npub use crate::ground::shape::{Shape,\n    quotient};\n\
                    use crate::arch::Warpgroup;\n\n#[cfg(test)]\nmod tests {\n    use crate::entry::All;\n}\n";
        assert_eq!(imports(text, "attention/pairs", false), ["attention/mask", "ground/shape", "arch"]);
        assert_eq!(imports("use super::shape::Shape;", "arch/cpu", true), ["arch/shape"]);
        assert_eq!(module_of(Path::new("arch/sm90/mod.rs")), "arch/sm90");
    }
}
