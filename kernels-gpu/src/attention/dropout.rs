//! Dropout of attention weights: which are kept is a function of (seed, offset, head, query, key), and of nothing else.
//!
//! A weight has a random byte, of which t in 256 drop it. One call of Philox gives four words, and so four times eight
//! nibbles: the upper halves of the bytes of 32 weights, one each. The lower half of a weight's byte is the sum, by
//! exclusive or, of the three nibbles that the other words have in one place. So every byte is uniform, and the bytes
//! of any three weights are independent of each other; four can be dependent, as in the extended Hamming code, but only
//! where an upper half leaves open whether its weight is kept: for one of its sixteen values.
//!
//! The 32 weights are those of a tile of 16 queries × 32 keys that fragments of both passes, whose rows are queries or
//! keys, find in few threads. The call is that of (i/16, j/32) and, within the tile, of ((i mod 8)/2, (j mod 8)/2); its
//! word is 2·((i + j/32) mod 2) + j/8 mod 2, of which `bytes` takes what belongs to the half j/16 mod 2 of the tile;
//! the byte is 2·(j mod 2) + i/8 mod 2. Words are rotated right by one, so that bytes 1 and 3 are what comparisons of
//! two f16 see when they ignore signs.
//!
//! In a fragment a thread holds rows r and r + 8, and two neighbouring columns of each eight: half of what a call
//! gives, or a quarter where rows are keys. As much belongs to the next row, or the one before, four lanes away. So
//! threads of even rows make the calls of every second tile, those of odd rows the rest, and they exchange halves:
//! where rows are queries, always the last two words.

use super::philox::Philox;
use crate::arch::bytes::select_bytes;
use crate::tile::lane::Lane;

/// Rounds of Philox: as many as FlashAttention has.
pub const ROUNDS: usize = 7;

/// Queries and keys of the tiles that calls belong to.
const QUERIES: u32 = 16;
const KEYS: u32 = 32;
/// A byte in each byte of a word.
const EACH_BYTE: u32 = 0x0101_0101;
/// The top bit of each byte.
const TOP_BITS: u32 = 0x8080_8080;

/// Which weights are dropped, as launch parameters.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    philox: Philox<ROUNDS>,
    /// The lower half of the offset.
    offset: u32,
    threshold: u32,
    /// Bytes that are at least this, which is 128 at most, keep a weight.
    bound: u32,
    /// All ones where they drop it instead.
    pub flipped: u32,
    /// Twice the bound as the f16 whose magnitude it is: bits 7 to 14 of it.
    pub bound_f16x2: u32,
    /// What kept weights are multiplied by: 1 / (1 − threshold/256).
    pub scale: f32,
}

/// Whether a kernel drops weights at all, known when it is compiled.
pub trait Drops: Copy {
    /// True if it can.
    const DROPS: bool;
}

/// Every weight counts.
#[derive(Clone, Copy, Debug)]
pub struct NoDropout;

impl Drops for NoDropout {
    const DROPS: bool = false;
}

impl Drops for Dropout {
    const DROPS: bool = true;
}

/// Which way round a tile of weights lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// Rows are queries, columns keys.
    Queries,
    /// Rows are keys, columns queries.
    Keys,
}

/// Where a fragment of weights lies: the query head, counted over the batch, and the first row and column, multiples of
/// 64 for keys and of 32 for queries.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub head: u32,
    pub row: u32,
    pub column: u32,
    pub rows: Rows,
}

/// Which of a thread's sixteen weights in two neighbouring eights of columns: its upper or lower row, the left or right
/// eight, the even or odd column.
#[derive(Clone, Copy, Debug)]
pub struct Element {
    pub lower: usize,
    pub right: usize,
    pub odd: usize,
}

impl Rows {
    /// The word of [`Bytes`] and its byte that belong to a weight.
    #[inline(always)]
    pub const fn byte(self, Element { lower, right, odd }: Element) -> (usize, usize) {
        match self {
            Rows::Queries => (right, 2 * odd + lower),
            Rows::Keys => (odd, 2 * lower + right),
        }
    }
}

/// The random bytes of what a thread holds of a 16 × 16 tile, in the places that [`Rows::byte`] names; where rows are
/// queries, as [`in_sight`] takes them.
pub type Bytes = [u32; 2];

/// The call that a query or key takes part in, counted along it: four to a tile.
#[inline(always)]
const fn call(x: u32, tile: u32) -> u32 {
    x / tile * 4 + x % 8 / 2
}

/// The word of a call that decides on a weight, the half of the tile that it is in, and the byte.
const fn decides(i: u32, j: u32) -> (usize, u32, usize) {
    ((2 * ((i + j / KEYS) % 2) + j / 8 % 2) as usize, j / 16 % 2, (2 * (j % 2) + i / 8 % 2) as usize)
}

/// What a word has for one half of the keys of a tile, 0 or 1: bytes, once they are turned; `parity` is the sum of the
/// call's words. A nibble is the upper half of a byte for one half of the keys, and in the lower ones for the other.
#[inline(always)]
fn nibbles(word: u32, parity: u32, half: u32) -> u32 {
    let lower = 0x8787_8787 ^ half.wrapping_neg();
    word ^ parity & lower
}

/// The same, turned to where bytes begin.
#[inline(always)]
fn bytes(word: u32, parity: u32, half: u32) -> u32 {
    nibbles(word, parity, half).rotate_left(4 * half + 1)
}

/// The sum of a call's words, by exclusive or.
#[inline(always)]
fn parity([a, b, c, d]: [u32; 4]) -> u32 {
    a ^ b ^ c ^ d
}

/// The bytes of 16 × 32 weights for each half of the columns, as [`in_sight`] takes them, from their words and the
/// call's parity; rows are queries.
#[inline(always)]
pub fn halves([a, b, parity]: [u32; 3]) -> [Bytes; 2] {
    [0, 1].map(|half| [a, b].map(|word| nibbles(word, parity, half)))
}

/// What one of the [`halves`] has for the upper rows or the lower, in bits 7 to 14 of each half word, where comparisons
/// see it. A shift does for one of the rotations: what it loses is not compared, and it is a product, which integer
/// units need not do.
#[inline(always)]
pub fn in_sight(nibbles: u32, half: usize, lower: usize) -> u32 {
    match (half, lower) {
        (0, 0) => nibbles.rotate_left(8),
        (0, _) => nibbles,
        (_, 0) => nibbles.rotate_left(12),
        (_, _) => nibbles << 4,
    }
}

/// `b` where a lane's rows are odd, `a` elsewhere: by arithmetic, because a branch by lane could take shuffles with it.
#[inline(always)]
fn where_odd<const WORDS: usize>(lane: Lane, a: [u32; WORDS], b: [u32; WORDS]) -> [u32; WORDS] {
    let odd = (lane.row(0) % 2).wrapping_neg();
    core::array::from_fn(|word| a[word] ^ (a[word] ^ b[word]) & odd)
}

/// What one thread's call gives to its own row, and to the neighbouring one.
#[derive(Clone, Copy)]
pub struct Call<const WORDS: usize> {
    own: [u32; WORDS],
    /// What the thread of the neighbouring row, four lanes away, needs.
    pub sent: [u32; WORDS],
}

impl<const WORDS: usize> Call<WORDS> {
    /// What this thread's rows have in the two tiles, with what its neighbour has sent.
    #[inline(always)]
    pub fn joined(&self, lane: Lane, received: [u32; WORDS]) -> [[u32; WORDS]; 2] {
        [where_odd(lane, self.own, received), where_odd(lane, received, self.own)]
    }
}

/// What [`Dropout::kept_call`] says of a tile in rows from `row`, with the top bits of each byte for its weights: even
/// columns have the top bit and odd ones the bit below it, or the other way round in every second tile of rows.
#[inline(always)]
pub fn top_bits([both]: [u32; 1], row: u32) -> Bytes {
    let swapped = row / KEYS % 2;
    [both << swapped, both << (1 - swapped)]
}

impl Dropout {
    /// Drops weights with probability threshold/256. The mask is that of the key `seed` and of counters from `offset`,
    /// of which the upper half is added to the key's: no two masks of one seed are the same.
    pub fn new(threshold: u8, seed: u64, offset: u64) -> Self {
        let key = seed.wrapping_add(offset & (u32::MAX as u64) << 32);
        let scale = 256.0 / (256.0 - threshold as f32);
        let threshold = threshold as u32;
        let bound = threshold.min(256 - threshold);
        Dropout {
            philox: Philox::new(key),
            offset: offset as u32,
            threshold,
            bound,
            flipped: if bound == threshold { 0 } else { u32::MAX },
            bound_f16x2: (bound << 7) * 0x0001_0001,
            scale,
        }
    }

    /// The share of weights that are kept: the probability.
    pub fn keeps(&self) -> f32 {
        1.0 - self.threshold as f32 / 256.0
    }

    /// The call that decides on the weight of query `i` for key `j`, and on 31 others; `head` counts query heads over
    /// the batch.
    #[inline(always)]
    fn words(&self, head: u32, i: u32, j: u32) -> [u32; 4] {
        self.philox.at([call(i, QUERIES), call(j, KEYS), head, self.offset])
    }

    /// Whether the weight of query `i` for key `j` is kept, by the words of its call.
    fn kept_by(&self, words: [u32; 4], i: u32, j: u32) -> bool {
        let (word, half, byte) = decides(i, j);
        let byte = bytes(words[word], parity(words), half).to_le_bytes()[byte];
        (byte as u32 >= self.bound) != (self.flipped != 0)
    }

    /// Whether the weight of query `i` for key `j` is kept; `head` counts query heads over the batch.
    pub fn kept(&self, head: u32, i: u32, j: u32) -> bool {
        self.kept_by(self.words(head, i, j), i, j)
    }

    /// `f(i, j, kept)` for all that a call decides on, if `i` and `j` are the first of them, and for none otherwise.
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

    /// Sets the top bit of each byte that keeps its weight, and clears that of the others.
    #[inline(always)]
    fn compare(&self, bytes: u32) -> u32 {
        // The lower seven bits by an addition that carries into the eighth, and no further.
        let lower = (bytes & !TOP_BITS).wrapping_add((0x80 - self.bound) * EACH_BYTE);
        (bytes | lower) ^ self.flipped
    }

    /// The call that the thread at `lane` makes for a pair of tiles of a fragment: for the first where its rows are
    /// even, for the second where they are odd.
    #[inline(always)]
    fn words_at(&self, at: &Place, lane: Lane, pair: u32) -> [u32; 4] {
        if at.rows == Rows::Queries {
            // Calls are counted along rows and columns as lanes are: eight lanes share two rows, and so a call's, and
            // their calls are all that two tiles have there.
            let [i, j] = [at.row / 4 + lane.thread / 8, at.column / 8 + 8 * pair + lane.thread % 8];
            return self.philox.at([i, j, at.head, self.offset]);
        }
        let row = at.row + lane.row(0);
        let column = at.column + QUERIES * (2 * pair + lane.row(0) % 2) + lane.column;
        self.words(at.head, column, row)
    }

    /// That call where rows are queries, a pair has 64 columns: what [`halves`] takes.
    #[inline(always)]
    pub fn call(&self, at: &Place, lane: Lane, pair: u32) -> Call<3> {
        let words = self.words_at(at, lane, pair);
        let ([a, b, c, d], parity) = (words, parity(words));
        Call { own: [a, b, parity], sent: [c, d, parity] }
    }

    /// Where rows are keys, and a pair has 32 columns, what that call decides.
    #[inline(always)]
    pub fn kept_call(&self, at: &Place, lane: Lane, pair: u32) -> Call<1> {
        let words = self.words_at(at, lane, pair);
        let (parity, half) = (parity(words), (at.row + lane.row(0)) / 16 % 2);
        let [a, b, c, d] = words.map(|word| bytes(word, parity, half));
        let [even, odd] = [0x5410, 0x7632].map(|bytes| {
            let [first, second] = [select_bytes(a, b, bytes), select_bytes(c, d, bytes)].map(|x| self.compare(x));
            [first ^ (first ^ second >> 1) & !TOP_BITS]
        });
        Call { own: where_odd(lane, even, odd), sent: where_odd(lane, odd, even) }
    }
}

#[cfg(test)]
mod tests;
