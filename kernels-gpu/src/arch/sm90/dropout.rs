//! Dropout mask of a thread's elements of P. One Philox call decides on 32 elements, or on sixteen if rows are keys,
//! and each thread exchanges half of its results with the neighbouring row.

use super::fragment::{Fragment, Operand};
use super::math::{at_least_f16x2, or_and_not, shuffle_xor};
use crate::attention::dropout::{Bytes, Call, Dropout, Element, Place, Rows, halves, in_sight, top_bits};
use crate::tile::lane::Lane;

/// Sign bit of an f32.
const SIGN: u32 = 1 << 31;

/// Random bytes of each n8 column group; two neighbouring groups share them. If rows are keys, only the top bit of a
/// byte is left, which is set if the element is kept.
#[derive(Clone, Copy)]
pub struct Keep<const N8: usize> {
    bytes: [Bytes; N8],
    /// Bound of each group's bytes if rows are queries. The groups of a tile share it.
    bounds_f16x2: [u32; N8],
    rows: Rows,
    /// Copy from [`Dropout`].
    flipped: u32,
}

/// Returns the results for this thread's rows in two tiles, one from its own call and one from its neighbour's.
#[inline(always)]
fn exchange<const WORDS: usize>(call: Call<WORDS>, lane: Lane) -> [[u32; WORDS]; 2] {
    call.joined(lane, call.sent.map(shuffle_xor::<4>))
}

impl<const N8: usize> Keep<N8> {
    #[inline(always)]
    pub fn new(dropout: &Dropout, at: &Place, lane: Lane) -> Self {
        let (mut bytes, mut bounds_f16x2) = ([[0; 2]; N8], [0; N8]);
        let mut sixteen = |index: usize, x: Bytes| (bytes[2 * index], bytes[2 * index + 1]) = (x, x);
        match at.rows {
            Rows::Queries => {
                for pair in 0..N8 / 8 {
                    let tiles = exchange(dropout.call(at, lane, pair as u32), lane);
                    for (i, x) in tiles.map(halves).as_flattened().iter().enumerate() {
                        sixteen(4 * pair + i, *x);
                    }
                    for (i, [_, _, parity]) in tiles.into_iter().enumerate() {
                        bounds_f16x2[8 * pair + 4 * i..][..4].fill(dropout.bound_f16x2(parity));
                    }
                }
            }
            Rows::Keys => {
                for pair in 0..N8 / 4 {
                    let tiles = exchange(dropout.kept_call(at, lane, pair as u32), lane);
                    for (i, kept) in tiles.into_iter().enumerate() {
                        sixteen(2 * pair + i, top_bits(kept, at.row + lane.row(0)));
                    }
                }
            }
        }
        Keep { bytes, bounds_f16x2, rows: at.rows, flipped: dropout.flipped }
    }

    /// Sets the sign bit of dropped elements of P, if rows are keys. Every element comes from `ex2` with a clear sign
    /// bit, even a NaN.
    #[inline(always)]
    pub fn mark(&self, x: &mut Fragment<N8>) {
        for (group, registers) in x.0.iter_mut().enumerate() {
            for (i, x) in registers.iter_mut().enumerate() {
                let (word, byte) = self.rows.byte(Element { lower: i / 2, right: group % 2, odd: i % 2 });
                let at_the_top = self.bytes[group][word] << (8 * (3 - byte));
                *x = f32::from_bits(or_and_not(x.to_bits(), SIGN, at_the_top));
            }
        }
    }

    /// Sets dropped elements to 0, if rows are keys.
    #[inline(always)]
    pub fn drop(&self, x: &mut Fragment<N8>) {
        for (group, registers) in x.0.iter_mut().enumerate() {
            for (i, x) in registers.iter_mut().enumerate() {
                let (word, byte) = self.rows.byte(Element { lower: i / 2, right: group % 2, odd: i % 2 });
                let at_the_top = self.bytes[group][word] << (8 * (3 - byte));
                *x = f32::from_bits(x.to_bits() & (at_the_top as i32 >> 31) as u32);
            }
        }
    }

    /// Sets dropped elements of P to 0, two at a time, if rows are queries. The f16 units compare, because the integer
    /// pipe is busy with Philox.
    #[inline(always)]
    pub fn apply_operand(&self, x: &mut Operand<N8>) {
        for (group, registers) in x.0.iter_mut().enumerate() {
            for (lower, x) in registers.iter_mut().enumerate() {
                let (word, byte) = self.rows.byte(Element { lower, right: group % 2, odd: 0 });
                let word = in_sight(self.bytes[group][word], group / 2 % 2, byte);
                *x &= at_least_f16x2(word, self.bounds_f16x2[group]) ^ self.flipped;
            }
        }
    }
}
