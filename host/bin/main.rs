//! The command line: `info`, `check` and `bench`.

mod args;
mod backward;
mod bench;
mod check;
mod info;
mod inputs;
mod machine;
mod memory;
mod op;
mod shaping;
mod sweep;

use std::fmt::Display;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{Cli, Command, DeviceName};

/// Exit code of a process whose reader went away: 128 + SIGPIPE, as shells report it.
const EXIT_NO_READER: i32 = 141;
/// Exit code for flags that ask for what can't be, as clap has it.
const EXIT_BAD_FLAGS: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cfg!(not(feature = "cuda")) && cli.command.device() == Some(DeviceName::Cuda) {
        let message = format!("--device cuda: {}", machine::NO_GPU_SUPPORT);
        Cli::command().error(clap::error::ErrorKind::InvalidValue, message).exit();
    }
    sweep::catch_interrupts();
    let result = match &cli.command {
        Command::Info(args) => info::run(args),
        Command::Check(args) => check::run(args),
        Command::Bench(args) => bench::run(args),
    };
    let code = result.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        if error.is_bad_input() { ExitCode::from(EXIT_BAD_FLAGS) } else { ExitCode::FAILURE }
    });
    if sweep::interrupted() { ExitCode::from(sweep::EXIT_INTERRUPTED) } else { code }
}

/// Prints a line; where its reader has seen enough, as `head` has, the process ends without a word.
fn say(line: impl Display) {
    let Err(error) = writeln!(std::io::stdout(), "{line}") else { return };
    if error.kind() == ErrorKind::BrokenPipe {
        std::process::exit(EXIT_NO_READER);
    }
    eprintln!("error: standard output can't be written: {error}");
    std::process::exit(1);
}

/// A table in the style of all our tables.
fn table<const N: usize>(header: [&str; N]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING).set_header(header);
    for column in table.column_iter_mut() {
        column.set_cell_alignment(comfy_table::CellAlignment::Right);
    }
    table
}
