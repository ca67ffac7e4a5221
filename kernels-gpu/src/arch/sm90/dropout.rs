//! Which weights a thread keeps: one Philox call for sixteen of them, and an exchange with the neighbouring row.

use super::fragment::{Fragment, Operand};
use super::math::{end_block, or_and_not, select_bytes, shuffle_xor};
use crate::attention::dropout::{Dropout, KeptBits, Place, Rows};
use crate::tile::lane::Lane;

/// The sign of an f32.
const SIGN: u32 = 1 << 31;

/// What a thread keeps of each eight columns; two neighbours, which make a tile, share a word.
#[derive(Clone, Copy)]
pub struct Keep<const N8: usize> {
    bits: [KeptBits; N8],
    rows: Rows,
}

impl<const N8: usize> Keep<N8> {
    /// After the products that were issued before it, and before what comes after it.
    #[inline(always)]
    pub fn new(dropout: &Dropout, at: &Place, lane: Lane) -> Self {
        end_block(dropout.threshold());
        let mut bits = [KeptBits(0); N8];
        for pair in 0..N8 / 4 {
            let call = dropout.call(at, lane, pair as u32);
            let [first, second] = call.joined(lane, shuffle_xor::<4>(call.sent(lane)));
            (bits[4 * pair], bits[4 * pair + 1]) = (first, first);
            (bits[4 * pair + 2], bits[4 * pair + 3]) = (second, second);
        }
        end_block(dropout.threshold());
        Keep { bits, rows: at.rows }
    }

    /// Dropped weights get a negative sign; as `ex2` gave them, even a NaN has a positive one.
    #[inline(always)]
    pub fn mark(&self, x: &mut Fragment<N8>) {
        for (group, registers) in x.0.iter_mut().enumerate() {
            let words = self.bits[group].words();
            for (i, x) in registers.iter_mut().enumerate() {
                let at_the_top = words[i % 2] << (8 * (3 - self.rows.byte(i / 2, group % 2)));
                *x = f32::from_bits(or_and_not(x.to_bits(), SIGN, at_the_top));
            }
        }
    }

    /// Dropped weights become 0, two at a time.
    #[inline(always)]
    pub fn apply_operand(&self, x: &mut Operand<N8>) {
        for (group, registers) in x.0.iter_mut().enumerate() {
            let [even, odd] = self.bits[group].words();
            for (half, x) in registers.iter_mut().enumerate() {
                let byte = self.rows.byte(half, group % 2);
                *x &= select_bytes(even, odd, 0x11 * sign_of(byte) + 0x1100 * sign_of(4 + byte));
            }
        }
    }
}

/// The selector of a byte whose top bit fills the byte that is selected (PTX ISA, prmt).
#[inline(always)]
const fn sign_of(byte: usize) -> u32 {
    8 + byte as u32
}
