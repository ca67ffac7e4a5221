//! Compressed streams, one of cubins and one of PTX for each family, and the table that finds a kernel in them.
//!
//! Kernels of a family resemble each other, so one stream of all is several times smaller than each by itself. The host
//! includes the table and unpacks a stream when a kernel of it is first called.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::ops::Range;
use std::path::Path;

use kernels_gpu::ground::constants::Form;
use kernels_gpu::variants::Family;
use lzma_rust2::{LzmaOptions, LzmaWriter};

use crate::cache::write;
use crate::ptxas::Assembled;
use crate::{Built, Kernel, work};

/// The table's file.
pub const TABLE: &str = "kernels.rs";

/// How much time compression may take.
#[derive(Clone, Copy)]
pub enum Effort {
    /// For a build in a checkout: tenths of a second.
    Fast,
    /// For packages.
    Best,
}

/// Bytes of the streams of a packed build, unpacked and packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    pub ptx: usize,
    pub packed_ptx: usize,
    pub cubins: usize,
    pub packed_cubins: usize,
}

/// Writes the streams of `built` and their table to `folder`.
///
/// # Errors
/// A file that can't be written.
pub fn pack(built: &Built, folder: &Path, effort: Effort) -> Result<Sizes, String> {
    fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let sizes = work::each(&Family::ALL, |&family| {
        let kernels = || built.kernels.iter().filter(|kernel| kernel.launch.family == family);
        let ptx: Vec<u8> = kernels().flat_map(|kernel| kernel.text.bytes()).collect();
        let cubins: Vec<u8> = kernels().flat_map(cubins).flat_map(|(_, made)| made.cubin.iter().copied()).collect();
        let (packed_ptx, packed_cubins) = (compress(&ptx, effort)?, compress(&cubins, effort)?);
        write(&folder.join(ptx_stream(family)), &packed_ptx)?;
        write(&folder.join(cubin_stream(family)), &packed_cubins)?;
        let (packed_ptx, packed_cubins) = (packed_ptx.len(), packed_cubins.len());
        Ok(Sizes { ptx: ptx.len(), packed_ptx, cubins: cubins.len(), packed_cubins })
    })?;
    write(&folder.join(TABLE), table(built)?)?;
    Ok(sizes.into_iter().fold(Sizes::default(), |all, one| Sizes {
        ptx: all.ptx + one.ptx,
        packed_ptx: all.packed_ptx + one.packed_ptx,
        cubins: all.cubins + one.cubins,
        packed_cubins: all.packed_cubins + one.packed_cubins,
    }))
}

fn ptx_stream(family: Family) -> String {
    format!("{}.ptx.lzma", family.name())
}

fn cubin_stream(family: Family) -> String {
    format!("{}.cubins.lzma", family.name())
}

/// Returns the assembled forms of a kernel.
fn cubins(kernel: &Kernel) -> impl Iterator<Item = (Form, &Assembled)> {
    kernel.forms.iter().filter_map(|built| built.assembled.as_ref().map(|assembled| (built.form, assembled)))
}

/// LZMA with its header, which tells the size.
fn compress(bytes: &[u8], effort: Effort) -> Result<Vec<u8>, String> {
    let mut options = LzmaOptions::with_preset(match effort {
        Effort::Fast => 1,
        Effort::Best => 6,
    });
    // A whole stream, so that every kernel finds all those before it.
    options.dict_size = bytes.len().next_power_of_two().clamp(1 << 16, 1 << 26) as u32;
    let failed = |error: std::io::Error| format!("compression: {error}");
    let mut writer = LzmaWriter::new_use_header(Vec::new(), &options, Some(bytes.len() as u64)).map_err(failed)?;
    writer.write_all(bytes).map_err(failed)?;
    writer.finish().map_err(failed)
}

/// The table as Rust. Paths in it are relative to itself, so the folder can be moved.
fn table(built: &Built) -> Result<String, String> {
    let mut text = String::from("// Written by ferroflash-build.\n\n");
    let mut line =
        |arguments: std::fmt::Arguments<'_>| writeln!(text, "{arguments}").map_err(|error| error.to_string());
    line(format_args!("/// Compiler of the kernels.\npub const KERNEL_COMPILER: &str = {:?};", built.compiler))?;
    line(format_args!(
        "/// Assembler of the kernels; none if there is PTX alone.\npub const KERNEL_ASSEMBLER: Option<&str> = {:?};",
        built.assembler
    ))?;
    line(format_args!(
        "/// Commit of the kernels' sources, empty if it is not known.\npub const COMMIT: &str = {:?};",
        built.commit
    ))?;
    line(format_args!("static STREAMS: [Streams; {}] = [", Family::ALL.len()))?;
    for family in Family::ALL {
        let (cubins, ptx) = (cubin_stream(family), ptx_stream(family));
        line(format_args!("    Streams::new(include_bytes!({cubins:?}), include_bytes!({ptx:?})),"))?;
    }
    line(format_args!("];\n/// Every compiled kernel, sorted by name.\npub static KERNELS: &[Kernel] = &["))?;
    let mut ends = [(0, 0); Family::ALL.len()];
    for kernel in &built.kernels {
        let family = Family::ALL.iter().position(|&family| family == kernel.launch.family).unwrap_or_default();
        let (cubin_end, ptx_end) = &mut ends[family];
        let ptx = range(ptx_end, kernel.text.len());
        line(format_args!(
            "    Kernel {{ symbol: {:?}, streams: &STREAMS[{family}], ptx: {ptx:?}, parameter_bytes: {},",
            kernel.launch.symbol, kernel.parameter_bytes
        ))?;
        line(format_args!("        constants: &{:?},", kernel.launch.constants))?;
        line(format_args!("        cubins: &["))?;
        for (form, Assembled { cubin, registers, .. }) in cubins(kernel) {
            let bytes = range(cubin_end, cubin.len());
            let (values, open) = (form.values().bits(), form.open().bits());
            line(format_args!(
                "            Cubin {{ form: Form::from_bits({values}, {open}), bytes: {bytes:?}, \
                 registers: {registers} }},"
            ))?;
        }
        line(format_args!("        ] }},"))?;
    }
    line(format_args!("];"))?;
    Ok(text)
}

/// Returns the next `len` bytes of a stream, and moves its end behind them.
fn range(end: &mut usize, len: usize) -> Range<usize> {
    let start = *end;
    *end += len;
    start..*end
}
