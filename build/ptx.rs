//! What rustc can't say about a kernel, said in its PTX: launch bounds and a parameter's alignment.
//!
//! rustc writes one module with all kernels. Here it becomes one module a kernel, so that the driver loads what is
//! called and nothing else. Each entry gets `.maxntid` and `.minnctapersm`, without which ptxas ignores `setmaxnreg`,
//! the size of its cluster where it has one, and its by-value parameter the 64-byte alignment that tensor maps need.

use kernels_gpu::variants::Launch;

/// What stands before every kernel.
const ENTRY: &str = ".visible .entry ";

/// One kernel's module.
#[derive(Debug)]
pub struct Module {
    pub symbol: &'static str,
    pub text: String,
    /// Size of its by-value parameter in bytes.
    pub parameter_bytes: u32,
}

/// Splits `text` into one module for each of `launches`; `compiler` goes into a comment.
///
/// A kernel of f16 that is not in `text` is made from the one of bf16: their PTX differs in the type's name alone.
///
/// # Errors
/// What does not agree with `launches`.
pub fn split(text: &str, launches: &[Launch], compiler: &str) -> Result<Vec<Module>, String> {
    let (header, _) = text.split_once(ENTRY).ok_or("the PTX has no kernel")?;
    // The comment that names the first kernel belongs to it, not to the header.
    let header = header.trim_end().trim_end_matches(|c| c != '\n');
    if let Some(function) = text.lines().find(|line| line.contains(".func")) {
        return Err(format!("the PTX has a function that was not inlined: {}", function.trim()));
    }
    let one = |launch: &Launch| {
        let &Launch { symbol, threads, cluster, .. } = launch;
        let entry = entry(text, symbol)
            .map(str::to_owned)
            .or_else(|| f16_entry(text, symbol))
            .ok_or_else(|| format!("the PTX has no kernel {symbol}"))?;
        let (signature, body) = entry.split_once("\n{").ok_or_else(|| format!("the kernel {symbol} has no body"))?;
        let parameter_bytes = parameter_bytes(signature)
            .ok_or_else(|| format!("the kernel {symbol} does not take one parameter by value"))?;
        if let Some(place) = launch.constants.iter().find(|place| place.offset.saturating_add(4) > parameter_bytes) {
            return Err(format!("the parameter of the kernel {symbol} ends before its constant {}", place.bit));
        }
        let signature = signature.replace(".param .align 16", ".param .align 64");
        let cluster = match cluster {
            1 => String::new(),
            ctas => format!(".explicitcluster\n.reqnctapercluster {ctas}\n"),
        };
        let text = format!(
            "// {symbol}, compiled by {compiler}\n{header}\n{ENTRY}{signature}\n\
             .maxntid {threads}\n.minnctapersm 1\n{cluster}{{{body}\n"
        );
        Ok(Module { symbol, text, parameter_bytes })
    };
    launches.iter().map(one).collect()
}

/// Returns the kernel `symbol`, which is one of f16, made from the one of bf16.
fn f16_entry(text: &str, symbol: &str) -> Option<String> {
    let source = symbol.replace("f16", "bf16");
    (source != symbol && !symbol.contains("bf16")).then_some(())?;
    Some(entry(text, &source)?.replace("bf16", "f16"))
}

/// Size of the parameter that `signature` declares, `.param .align 16 .b8 NAME_param_0[SIZE]`; it is the only one.
fn parameter_bytes(signature: &str) -> Option<u32> {
    let mut parameters = signature.split(".param ").skip(1);
    let (_, size) = parameters.next()?.split_once(".b8 ")?.1.split_once("_param_0[")?;
    if parameters.next().is_some() {
        return None;
    }
    size.split_once(']')?.0.parse().ok()
}

/// Returns a kernel from its name to its closing brace.
fn entry<'a>(text: &'a str, symbol: &str) -> Option<&'a str> {
    let start = text
        .match_indices(ENTRY)
        .map(|(at, found)| at + found.len())
        .find(|&at| text[at..].strip_prefix(symbol).is_some_and(|rest| rest.starts_with('(')))?;
    let end = text[start..].find("\n}")?;
    Some(&text[start..start + end + 2])
}

/// Returns `text` with labels that have no number of their function, which depends on what else is in the module.
pub fn without_label_numbers(text: &str) -> String {
    let mut parts = text.split("$L__BB");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + "$L__BB" + part.trim_start_matches(|c: char| c.is_ascii_digit()))
}
