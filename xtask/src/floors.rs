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

/// The modules that a file names outside its tests and comments.
///
/// # Errors
/// A sentence for several modules in one `use`, which this reader would miss.
fn imports(text: &str, module: &str) -> Result<Vec<String>> {
    let tests = ["\n#[cfg(test)]", "\n#[cfg(all(test"].iter().filter_map(|tests| text.find(tests)).min();
    let lines = text[..tests.unwrap_or(text.len())].lines().filter(|line| !line.trim_start().starts_with("//"));
    let mut found = Vec::new();
    for line in lines {
        let group = ["use crate::{", "use super::{"].iter().find_map(|group| Some(line.split_once(group)?.1));
        if group.is_some_and(|names| names.is_empty() || names.contains("::")) {
            return Err(format!("{module} imports several modules by one `use`: write one for each"));
        }
        for root in ["crate::", "super::"] {
            for (at, _) in line.match_indices(root).filter(|&(at, _)| !line[..at].ends_with("super::")) {
                let path = &line[at..];
                let end = path.find(|c: char| !(c.is_ascii_alphanumeric() || "_:".contains(c))).unwrap_or(path.len());
                // A macro's name is no module.
                if !path[end..].starts_with('!') {
                    found.extend(resolve(&path[..end], module));
                }
            }
        }
    }
    Ok(found)
}

/// A path, as a module: its leading lower-case parts.
fn resolve(path: &str, module: &str) -> Option<String> {
    let parts: Vec<&str> = path.split("::").filter(|part| !part.is_empty()).collect();
    let mut base: Vec<&str> = if parts.first() == Some(&"crate") { Vec::new() } else { module.split('/').collect() };
    // In a file `super` is its folder, in a folder's own file the folder around it.
    for _ in parts.iter().filter(|&&part| part == "super") {
        base.pop();
    }
    let names = parts.into_iter().filter(|part| !["crate", "super"].contains(part));
    let names = names.take_while(|part| part.starts_with(|c: char| c.is_ascii_lowercase()));
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
        for import in imports(&text, &module)? {
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
        let text = "//! crate::none\nuse core::fmt;\n\nuse super::mask::Mask;\n\
                    pub use crate::ground::shape::{Shape,\n    quotient};\nuse crate::arch::Warpgroup;\n\
                    fn f() { crate::tile::g(); crate::rows!(f) }\n\n\
                    #[cfg(test)]\nmod tests {\n    use crate::entry::All;\n}\n";
        let found = ["attention/mask", "ground/shape", "arch", "tile/g"];
        assert_eq!(imports(text, "attention/pairs").unwrap(), found);
        assert_eq!(imports("use super::super::shape::Shape;", "arch/cpu").unwrap(), ["shape"]);
        assert!(imports("use crate::{arch::A, kernels};", "tile").is_err());
        assert_eq!(module_of(Path::new("arch/sm90/mod.rs")), "arch/sm90");
    }
}
