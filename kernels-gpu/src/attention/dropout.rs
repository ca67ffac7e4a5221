//! Dropout of elements of P. Whether an element is kept is a function of (seed, offset, head, query, key), and of
//! nothing else.
//!
//! An element has a random byte, of whose 256 values t or t + 1 drop it. The probability is p = (t + f/2³²)/256, and
//! each call takes t + 1 with probability f/2³² for all of its elements.
//!
//! One Philox call gives four words of eight nibbles each. Each nibble is the upper half of the byte of one of 32
//! elements. The lower half of that byte is the exclusive or of the three nibbles that the other words have at the same
//! position. So every byte is uniform, and the bytes of any three elements are independent of each other. Four can be
//! dependent, as in the extended Hamming code, but only if an upper half leaves open whether its element is kept. One
//! of the sixteen values of an upper half does so, or two at most for both t and t + 1.
//!
//! Two threads apply the same call, and both have its parity, the exclusive or of its words. So the parity chooses
//! between t and t + 1. A comparison of the parity with f would look at its upper nibble first. That nibble also is the
//! exclusive or of the two halves of some bytes: if such a byte is t, its nibble of the parity is known, and so is the
//! choice. These elements would have a probability of t/256 or (t + 1)/256. So the parity is first multiplied by an odd
//! constant. The bits of all nibbles then decide, and the choice is as good as independent of any single nibble.
//!
//! The 32 elements are chosen from a tile of 16 queries × 32 keys so that few threads hold them in the fragments of
//! both passes, whose rows are queries or keys. For query i and key j:
//!
//! | what | value |
//! | --- | --- |
//! | tile of the call | (i/16, j/32) |
//! | call within the tile | ((i mod 8)/2, (j mod 8)/2) |
//! | word of the call | 2·((i + j/32) mod 2) + j/8 mod 2 |
//! | half of the tile, for which `bytes` takes the bytes of the word | j/16 mod 2 |
//! | byte of the word | 2·(j mod 2) + i/8 mod 2 |
//!
//! Words are rotated right by one bit, so that bytes 1 and 3 are what comparisons of two f16 see when they ignore
//! signs.
//!
//! A thread holds rows r and r + 8 of a fragment, and two neighbouring columns of each n8 column group. That is half of
//! what a call decides, or a quarter if rows are keys. As much belongs to the neighbouring row, which the thread four
//! lanes away holds. So threads of even rows make the calls of every second tile, threads of odd rows make the rest,
//! and they exchange halves. If rows are queries, these are always the last two words.

pub mod mask;

#[cfg(not(target_arch = "nvptx64"))]
use core::mem::offset_of;

use super::philox::{Philox, Start};
use crate::arch::bytes::{load_constant_16_bytes, select_bytes};
use crate::arch::constant::Constant;
#[cfg(not(target_arch = "nvptx64"))]
use crate::ground::constants::ConstantPlace;
use crate::ground::constants::Constants;
use crate::tile::lane::Lane;

/// Number of Philox rounds, the same as FlashAttention's.
pub const ROUNDS: usize = 7;

/// Queries and keys of the tiles to which calls belong.
const QUERIES: u32 = 16;
const KEYS: u32 = 32;
/// Factor that copies a byte to each byte of a word.
const EACH_BYTE: u32 = 0x0101_0101;
/// Odd factor, 2³² over the golden ratio, by which multiples of any power of two spread evenly over all words.
const SPREAD: u32 = 0x9e37_79b1;
/// Top bit of each byte.
const TOP_BITS: u32 = 0x8080_8080;

/// Dropout as launch parameters. Of each pair, a call takes the second with probability fraction/2³².
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Address of two u64, seed and offset; read if they are not fixed.
    seed_offset: u64,
    /// Tells if seed and offset are read from there, or else are those of `philox` and `offset`.
    from_memory: Constant<{ Constants::SEED }>,
    philox: Philox<ROUNDS>,
    /// Lower half of the offset.
    offset: u32,
    /// Probability that a call takes t + 1, times 2³².
    fraction: u32,
    /// Bounds of at most 128. Bytes that are at least as large keep an element.
    bounds: [u32; 2],
    /// Addends that carry into the top bit of each byte of seven bits that is as large as the bound.
    addends: [u32; 2],
    /// Two f16, each with the bound in bits 7 to 14 of its magnitude.
    bounds_f16x2: [u32; 2],
    /// All ones if such bytes drop the element instead; 0 otherwise.
    pub flipped: u32,
    /// Factor of kept elements: 1 / (1 − p).
    pub scale: f32,
    /// Probability that an element is dropped.
    p: f32,
}

/// Property of a kernel, known when it is compiled: with or without dropout.
pub trait Drops: Copy {
    /// True if the kernel can drop elements.
    const DROPS: bool;
    /// Places of its specialisation constants, from its own start.
    #[cfg(not(target_arch = "nvptx64"))]
    const CONSTANTS: &'static [ConstantPlace] = &[];
}

/// No dropout: every element is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoDropout;

impl Drops for NoDropout {
    const DROPS: bool = false;
}

impl Drops for Dropout {
    const DROPS: bool = true;
    #[cfg(not(target_arch = "nvptx64"))]
    const CONSTANTS: &'static [ConstantPlace] =
        &[ConstantPlace { bit: Constants::SEED, offset: offset_of!(Dropout, from_memory) as u32 }];
}

/// Orientation of a tile of P.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// Rows are queries, columns keys.
    Queries,
    /// Rows are keys, columns queries.
    Keys,
}

/// Position of a fragment of P: the query head, counted over the batch, and the first row and column. They are
/// multiples of 64 for keys and of 32 for queries.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub head: u32,
    pub row: u32,
    pub column: u32,
    pub rows: Rows,
}

/// Position of one of a thread's elements in two neighbouring n8 column groups: its upper or lower row, the left or
/// right group, the even or odd column.
#[derive(Clone, Copy, Debug)]
pub struct Element {
    pub lower: usize,
    pub right: usize,
    pub odd: usize,
}

impl Rows {
    /// Returns the word of [`Bytes`], and the byte in it, that belong to an element.
    #[inline(always)]
    pub const fn byte(self, Element { lower, right, odd }: Element) -> (usize, usize) {
        match self {
            Rows::Queries => (right, 2 * odd + lower),
            Rows::Keys => (odd, 2 * lower + right),
        }
    }
}

/// Random bytes of a thread's elements of a 16 × 16 tile, at the positions that [`Rows::byte`] returns. If rows are
/// queries, they are still as [`in_sight`] takes them.
pub type Bytes = [u32; 2];

/// Returns the number of the call to which a query or key belongs, counted along its axis. A tile has four.
#[inline(always)]
const fn call(x: u32, tile: u32) -> u32 {
    x / tile * 4 + x % 8 / 2
}

/// Returns the word of a call that decides on an element, the half of the tile that the element is in, and the byte.
const fn decides(i: u32, j: u32) -> (usize, u32, usize) {
    ((2 * ((i + j / KEYS) % 2) + j / 8 % 2) as usize, j / 16 % 2, (2 * (j % 2) + i / 8 % 2) as usize)
}

/// Returns the bytes of a word for one half of a tile's keys, 0 or 1, before they are rotated into place. `parity` is
/// the exclusive or of the call's words, so that `word ^ parity` is that of the three others. A nibble of the word is
/// the upper half of a byte for one half of the keys. For the other half of the keys, the exclusive or in its position
/// is a lower half.
#[inline(always)]
fn nibbles(word: u32, parity: u32, half: u32) -> u32 {
    let lower = 0x8787_8787 ^ half.wrapping_neg();
    word ^ parity & lower
}

/// Returns [`nibbles`], rotated so that their bytes are the bytes of the word.
#[inline(always)]
fn bytes(word: u32, parity: u32, half: u32) -> u32 {
    nibbles(word, parity, half).rotate_left(4 * half + 1)
}

/// Returns the exclusive or of a call's words.
#[inline(always)]
fn parity([a, b, c, d]: [u32; 4]) -> u32 {
    a ^ b ^ c ^ d
}

/// Returns a thread's bytes of a tile of 16 × 32 elements for each half of the columns, as [`in_sight`] takes them.
/// Rows are queries. The arguments are two words of a call, and the call's parity.
#[inline(always)]
pub fn halves([a, b, parity]: [u32; 3]) -> [Bytes; 2] {
    [0, 1].map(|half| [a, b].map(|word| nibbles(word, parity, half)))
}

/// Returns the bytes that one of the [`halves`] has for the upper or lower rows, in bits 7 to 14 of each half word,
/// where comparisons see them. One of the rotations may be a shift, because the bits that it loses are not compared. A
/// shift is a product, which need not run on the integer pipe (notebook 135).
#[inline(always)]
pub fn in_sight(nibbles: u32, half: usize, lower: usize) -> u32 {
    match (half, lower) {
        (0, 0) => nibbles.rotate_left(8),
        (0, _) => nibbles,
        (_, 0) => nibbles.rotate_left(12),
        (_, _) => nibbles << 4,
    }
}

/// Returns `b` if a lane's rows are odd, and `a` otherwise. It is arithmetic, because a branch by lane could take
/// shuffles with it.
#[inline(always)]
fn where_odd<const WORDS: usize>(lane: Lane, a: [u32; WORDS], b: [u32; WORDS]) -> [u32; WORDS] {
    let odd = (lane.row(0) % 2).wrapping_neg();
    core::array::from_fn(|word| a[word] ^ (a[word] ^ b[word]) & odd)
}

/// Words that one thread's call gives to its own row and to the neighbouring one.
#[derive(Clone, Copy)]
pub struct Call<const WORDS: usize> {
    own: [u32; WORDS],
    /// Words for the thread of the neighbouring row, four lanes away.
    pub sent: [u32; WORDS],
}

impl<const WORDS: usize> Call<WORDS> {
    /// Returns the words of this thread's rows in the two tiles, given the words that its neighbour has sent.
    #[inline(always)]
    pub fn joined(&self, lane: Lane, received: [u32; WORDS]) -> [[u32; WORDS]; 2] {
        [where_odd(lane, self.own, received), where_odd(lane, received, self.own)]
    }
}

/// Moves what [`Dropout::kept_call`] returns for a tile, in rows from `row`, to the top bits of bytes: one word for
/// even columns, one for odd ones. In `both`, even columns have the top bit of each byte and odd ones the bit below it.
/// In every second tile of rows it is the opposite.
#[inline(always)]
pub fn top_bits([both]: [u32; 1], row: u32) -> Bytes {
    let swapped = row / KEYS % 2;
    [both << swapped, both << (1 - swapped)]
}

impl Dropout {
    /// Drops elements with probability `p`. The key of Philox is `seed`, the last word of counters the lower half of
    /// `offset`, and the tweak its upper half. So no two pairs of seed and offset have the same generator and counters.
    ///
    /// `p` is at least 0 and below 1. Returns nothing if no element is dropped: if p·2⁴⁰ rounds to 0.
    pub fn new(p: f32, seed: u64, offset: u64) -> Option<Self> {
        let dropout = Dropout::of(p, seed, offset);
        (dropout.fraction > 0 || dropout.bounds[0] > 0 || dropout.flipped != 0).then_some(dropout)
    }

    /// Returns what [`Dropout::new`] does, but also for a probability that drops nothing.
    pub fn of(p: f32, seed: u64, offset: u64) -> Self {
        // Exact but for p below 2⁻¹⁶, because an f32 has 24 bits.
        let steps = (p as f64 * (1u64 << 40) as f64 + 0.5) as u64;
        let (threshold, fraction) = ((steps >> 32) as u32, steps as u32);
        let flipped = threshold >= 128;
        let bounds = [threshold, threshold + 1].map(|t| if flipped { 256 - t } else { t });
        Dropout {
            seed_offset: 0,
            from_memory: Constant::new(false),
            philox: Philox::with_tweak(seed, (offset >> 32) as u32),
            offset: offset as u32,
            fraction,
            bounds,
            addends: bounds.map(|bound| (0x80 - bound) * EACH_BYTE),
            bounds_f16x2: bounds.map(|bound| (bound << 7) * 0x0001_0001),
            flipped: if flipped { u32::MAX } else { 0 },
            scale: (1.0 / (1.0 - p as f64)) as f32,
            p,
        }
    }

    /// Returns the same dropout with seed and offset in memory, two u64. Kernels read them, after
    /// [`Dropout::with_address`].
    #[cfg(not(target_arch = "nvptx64"))]
    pub fn from_memory(self) -> Self {
        Dropout { from_memory: Constant::new(true), ..self }
    }

    /// Sets the address of seed and offset: that of 16 bytes, on the GPU a multiple of 16.
    #[cfg(not(target_arch = "nvptx64"))]
    pub fn with_address(self, seed_offset: u64) -> Self {
        Dropout { seed_offset, ..self }
    }

    /// Returns the values of the specialisation constants.
    #[cfg(not(target_arch = "nvptx64"))]
    pub fn constants(&self) -> Constants {
        Constants::NONE.with(Constants::SEED, self.from_memory.get())
    }

    /// Returns the probability that an element is kept.
    pub fn keeps(&self) -> f32 {
        1.0 - self.p
    }

    /// Returns what a call takes for its elements, by its parity: `a` with t, `b` with t + 1.
    #[inline(always)]
    fn chosen(&self, parity: u32, [a, b]: [u32; 2]) -> u32 {
        if parity.wrapping_mul(SPREAD) < self.fraction { b } else { a }
    }

    /// Returns the bound of the bytes of a call that [`in_sight`] returns, in both half words.
    #[inline(always)]
    pub fn bound_f16x2(&self, parity: u32) -> u32 {
        self.chosen(parity, self.bounds_f16x2)
    }

    /// Makes the call of a counter, of which the offset is still missing.
    #[inline(always)]
    fn draw(&self, [i, j, head]: [u32; 3]) -> [u32; 4] {
        let start = Start::new([i, head]);
        if self.from_memory.get_for(j) {
            // SAFETY: I5, the host has checked the array.
            let [low, high, offset, tweak] = unsafe { load_constant_16_bytes(self.seed_offset) };
            return Philox::<ROUNDS>::draw([low, high], tweak, &start, [j, offset]);
        }
        self.philox.from(&start, [j, self.offset])
    }

    /// Makes the call that decides on the element of query `i` and key `j`, and on 31 others. `head` counts query heads
    /// over the batch.
    #[inline(always)]
    fn words(&self, head: u32, i: u32, j: u32) -> [u32; 4] {
        self.draw([call(i, QUERIES), call(j, KEYS), head])
    }

    /// True if the element of query `i` and key `j` is kept, by the words of its call.
    fn kept_by(&self, words: [u32; 4], i: u32, j: u32) -> bool {
        let (word, half, byte) = decides(i, j);
        let parity = parity(words);
        let byte = bytes(words[word], parity, half).to_le_bytes()[byte];
        (byte as u32 >= self.chosen(parity, self.bounds)) != (self.flipped != 0)
    }

    /// True if the element of query `i` and key `j` is kept. `head` counts query heads over the batch.
    pub fn kept(&self, head: u32, i: u32, j: u32) -> bool {
        self.kept_by(self.words(head, i, j), i, j)
    }

    /// Calls `f(i, j, kept)` for all elements on which a call decides if `i` and `j` are the first of them, and for
    /// none otherwise.
    pub fn for_call(&self, head: u32, i: u32, j: u32, mut f: impl FnMut(u32, u32, bool)) {
        let first = |x: u32, tile| x % tile < 8 && x.is_multiple_of(2);
        if !first(i, QUERIES) || !first(j, KEYS) {
            return;
        }
        let words = self.words(head, i, j);
        for i in [i, i + 1, i + 8, i + 9] {
            for j in (j..j + KEYS).step_by(8).flat_map(|j| [j, j + 1]) {
                f(i, j, self.kept_by(words, i, j));
            }
        }
    }

    /// Sets the top bit of each byte that keeps its element, and clears it in the others. `addend` is the call's of
    /// `addends`.
    #[inline(always)]
    fn compare(&self, bytes: u32, addend: u32) -> u32 {
        // Compares the lower seven bits by an addition that carries into the eighth, and no further.
        let lower = (bytes & !TOP_BITS).wrapping_add(addend);
        (bytes | lower) ^ self.flipped
    }

    /// Makes the call of the thread at `lane` for a pair of tiles of a fragment: for the first tile if its rows are
    /// even, for the second if they are odd.
    #[inline(always)]
    fn words_at(&self, at: &Place, lane: Lane, pair: u32) -> [u32; 4] {
        if at.rows == Rows::Queries {
            // Calls are counted along rows and columns as lanes are. Eight lanes share two rows, which belong to one
            // call along their axis. The calls of these lanes are all that the two tiles have in those rows.
            let [i, j] = [at.row / 4 + lane.thread / 8, at.column / 8 + 8 * pair + lane.thread % 8];
            return self.draw([i, j, at.head]);
        }
        let row = at.row + lane.row(0);
        let column = at.column + QUERIES * (2 * pair + lane.row(0) % 2) + lane.column;
        self.words(at.head, column, row)
    }

    /// Makes the thread's call for a pair of tiles if rows are queries; the pair has 64 columns. The words are
    /// arguments of [`halves`].
    #[inline(always)]
    pub fn call(&self, at: &Place, lane: Lane, pair: u32) -> Call<3> {
        let words = self.words_at(at, lane, pair);
        let ([a, b, c, d], parity) = (words, parity(words));
        Call { own: [a, b, parity], sent: [c, d, parity] }
    }

    /// Makes the thread's call for a pair of tiles if rows are keys; the pair has 32 columns. Returns which elements
    /// are kept, as [`top_bits`] takes it.
    #[inline(always)]
    pub fn kept_call(&self, at: &Place, lane: Lane, pair: u32) -> Call<1> {
        let words = self.words_at(at, lane, pair);
        let (parity, half) = (parity(words), (at.row + lane.row(0)) / 16 % 2);
        let [a, b, c, d] = words.map(|word| bytes(word, parity, half));
        let addend = self.chosen(parity, self.addends);
        let [even, odd] = [0x5410, 0x7632].map(|bytes| {
            let [first, second] =
                [select_bytes(a, b, bytes), select_bytes(c, d, bytes)].map(|x| self.compare(x, addend));
            [first ^ (first ^ second >> 1) & !TOP_BITS]
        });
        Call { own: where_odd(lane, even, odd), sent: where_odd(lane, odd, even) }
    }
}

#[cfg(test)]
mod tests;
