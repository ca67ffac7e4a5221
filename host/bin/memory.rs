//! This computer's memory: whether it holds what is asked for, and how much this process has held.

use ferroflash::{Error, Operand, Problem, Result};

use crate::op::OpName;

/// Fails where this computer has no memory for a pass's tensors, of which a run needs `copies`, and for a workspace of
/// its own. Linux would promise the memory all the same, and end the process when it is used.
pub fn check_memory(op: OpName, problem: &Problem, copies: u128, workspace: usize) -> Result<()> {
    let Some(available) = available_memory() else { return Ok(()) };
    let mut needed = 0u128;
    let tensors = op.tensors(problem).into_iter().map(|(operand, bytes)| (operand, bytes, copies));
    for (operand, bytes, copies) in tensors.chain([(Operand::Workspace, workspace as u128, 1)]) {
        needed = bytes.saturating_mul(copies).saturating_add(needed);
        if needed > available as u128 {
            return Err(Error::OutOfMemory { operand, bytes });
        }
    }
    Ok(())
}

/// The memory that this computer can still give.
pub fn available_memory() -> Option<usize> {
    proc_kib("/proc/meminfo", "MemAvailable:")
}

/// The most memory that this process has held since [`forget_peak_memory`].
pub fn peak_memory() -> Option<usize> {
    proc_kib("/proc/self/status", "VmHWM:")
}

/// Starts [`peak_memory`] anew. Where the system does not let us, the peak is that of the whole process.
pub fn forget_peak_memory() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// A field that Linux gives in KiB, in bytes.
fn proc_kib(file: &str, field: &str) -> Option<usize> {
    let text = std::fs::read_to_string(file).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(field))?;
    Some(1024 * value.split_whitespace().next()?.parse::<usize>().ok()?)
}
