//! Bytes of words, for machines without an instruction that selects them.

/// Four of the eight bytes of `a` and `b`, as the digits of `selector` name them.
pub fn select_bytes(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = (a as u64 | (b as u64) << 32).to_le_bytes();
    u32::from_le_bytes(core::array::from_fn(|digit| bytes[(selector >> (4 * digit)) as usize % 8]))
}
