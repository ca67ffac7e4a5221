//! What rustc can't say about a kernel, said in its PTX: launch bounds and a parameter's alignment.
//!
//! rustc writes one module with all kernels. Here it becomes one module a kernel, so that the driver loads what is
//! called and nothing else. Each entry gets `.maxntid` and `.minnctapersm`, without which ptxas ignores `setmaxnreg`,
//! the size of its cluster where it has one, and its by-value parameter the 64-byte alignment that tensor maps need.

/// What stands before every kernel.
const ENTRY: &str = ".visible .entry ";

/// Splits `text` into one module for each of `launches`, (kernel, threads of a CTA, CTAs of a cluster); `compiler` goes into
/// a comment.
pub fn split(text: &str, launches: &[(&str, u32, u32)], compiler: &str) -> Result<Vec<(String, String)>, String> {
    let (header, _) = text.split_once(ENTRY).ok_or("the PTX has no kernel")?;
    // The comment that names the first kernel belongs to it, not to the header.
    let header = header.trim_end().trim_end_matches(|c| c != '\n');
    if let Some(function) = text.lines().find(|line| line.contains(".func")) {
        return Err(format!("the PTX has a function that was not inlined: {}", function.trim()));
    }
    launches
        .iter()
        .map(|&(symbol, threads, cluster)| {
            let entry = entry(text, symbol).ok_or_else(|| format!("the PTX has no kernel {symbol}"))?;
            let (signature, body) =
                entry.split_once("\n{").ok_or_else(|| format!("the kernel {symbol} has no body"))?;
            let signature = signature.replace(".param .align 16", ".param .align 64");
            let cluster = match cluster {
                1 => String::new(),
                ctas => format!(".explicitcluster\n.reqnctapercluster {ctas}\n"),
            };
            let module = format!(
                "// {symbol}, compiled by {compiler}\n{header}\n{ENTRY}{signature}\n\
                 .maxntid {threads}\n.minnctapersm 1\n{cluster}{{{body}\n"
            );
            Ok((symbol.to_owned(), module))
        })
        .collect()
}

/// A kernel from its name to its closing brace.
fn entry<'a>(text: &'a str, symbol: &str) -> Option<&'a str> {
    let start = text
        .match_indices(ENTRY)
        .map(|(at, found)| at + found.len())
        .find(|&at| text[at..].strip_prefix(symbol).is_some_and(|rest| rest.starts_with('(')))?;
    let end = text[start..].find("\n}")?;
    Some(&text[start..start + end + 2])
}
