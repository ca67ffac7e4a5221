//! Running programs, and saying so.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// An error is a sentence for people.
pub type Result<T = ()> = std::result::Result<T, String>;

/// Prints what happens next.
pub fn step(what: &str) {
    println!("\n== {what}");
}

/// The workspace's folder.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new(".")).to_owned()
}

/// A folder under target/, for what is fetched or made.
pub fn target(folder: &str) -> PathBuf {
    root().join("target").join(folder)
}

/// Cargo, in the workspace's folder.
pub fn cargo(arguments: &[&str]) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root()).args(arguments);
    cargo
}

/// Runs a program and shows what it prints.
pub fn run(command: &mut Command) -> Result {
    println!("$ {}", line(command));
    let status = command.status().map_err(|error| format!("{}: {error}", line(command)))?;
    if status.success() { Ok(()) } else { Err(format!("{} failed ({status})", line(command))) }
}

/// Runs a program and returns what it prints, standard error last.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("{}: {error}", line(command)))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(text) } else { Err(format!("{} failed:\n{text}", line(command))) }
}

/// Runs cargo with its progress shown and returns its messages, which say what was built and where.
pub fn messages(cargo: &mut Command) -> Result<Vec<serde_json::Value>> {
    cargo.arg("--message-format=json-render-diagnostics");
    println!("$ {}", line(cargo));
    let output = cargo.stderr(Stdio::inherit()).output().map_err(|error| format!("{}: {error}", line(cargo)))?;
    if !output.status.success() {
        return Err(format!("{} failed ({})", line(cargo), output.status));
    }
    // A build script may print anything; what is not JSON is no message.
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

/// Whether a program is there and runs.
pub fn works(program: &str, arguments: &[&str]) -> bool {
    output(Command::new(program).args(arguments)).is_ok()
}

/// Installs Debian packages.
pub fn apt_install(packages: &[&str]) -> Result {
    let apt = |arguments: &[&str]| {
        let mut command = if works("id", &["-u"]) && output(Command::new("id").arg("-u"))?.trim() == "0" {
            Command::new("apt-get")
        } else {
            let mut sudo = Command::new("sudo");
            sudo.arg("apt-get");
            sudo
        };
        run(command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive"))
    };
    apt(&["update", "-qq"])?;
    apt(&[&["install", "-y", "-qq", "--no-install-recommends"], packages].concat())
}

fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
