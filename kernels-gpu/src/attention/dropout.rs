//! Dropout of attention weights: which are kept is a function of (seed, offset, head, query, key), and of nothing else.
//!
//! A weight has a random byte, of which t in 256 drop it. One call of Philox gives the bytes of sixteen weights of a 16 × 16
//! tile, chosen so that fragments of both passes, whose rows are queries or keys, find them in few threads. The call is that
//! of (i/16, j/16) and, within the tile, of ((i mod 8)/2, (j mod 8)/2); its word is 2·((i + j/16) mod 2) + j/8 mod 2; of that
//! word, rotated left by one bit, the byte is 2·(j mod 2) + i/8 mod 2. As the word is, bytes 1 and 3 are then what
//! comparisons of two f16 see when they ignore signs.
//!
//! In a fragment a thread holds rows r and r + 8, and two neighbouring columns of each eight: half of what a call gives,
//! whichever way round the tile lies. The other half is that of the next row, or the one before, four lanes away. So
//! threads of even rows make the calls of every second tile, those of odd rows the rest, and they exchange halves: where
//! rows are queries, always the last two words.

use super::philox::Philox;
use crate::arch::select_bytes;
use crate::tile::lane::Lane;

/// Rounds of Philox: as many as FlashAttention has.
pub const ROUNDS: usize = 7;

/// Columns and rows of the tiles that calls belong to.
const TILE: u32 = 16;
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

/// Which way round a tile of weights lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// Rows are queries, columns keys.
    Queries,
    /// Rows are keys, columns queries.
    Keys,
}

/// Where a fragment of weights lies: the query head, counted over the batch, and the first row and column, multiples of 32.
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
/// queries, rotated right by one.
pub type Bytes = [u32; 2];

/// The call that a row or column takes part in, counted along it: four to a tile.
#[inline(always)]
const fn call(x: u32) -> u32 {
    x / TILE * 4 + x % 8 / 2
}

/// The word of a call that decides on a weight, and, once it is rotated left by one, the byte.
const fn decides(i: u32, j: u32) -> (usize, usize) {
    ((2 * ((i + j / TILE) % 2) + j / 8 % 2) as usize, (2 * (j % 2) + i / 8 % 2) as usize)
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

/// What [`Dropout::kept_call`] says of a tile in rows from `row`, with the top bits of each byte for its weights: even columns
/// have the top bit and odd ones the bit below it, or the other way round in every second tile of rows.
#[inline(always)]
pub fn top_bits([both]: [u32; 1], row: u32) -> Bytes {
    let swapped = row / TILE % 2;
    [both << swapped, both << (1 - swapped)]
}

impl Dropout {
    /// Drops weights with probability threshold/256. The mask is that of the key `seed` and of counters from `offset`, of
    /// which the upper half is added to the key's: no two masks of one seed are the same.
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

    /// The call that decides on the weight of query `i` for key `j`, and on fifteen others; `head` counts query heads over the
    /// batch.
    #[inline(always)]
    fn words(&self, head: u32, i: u32, j: u32) -> [u32; 4] {
        self.philox.at([call(i), call(j), head, self.offset])
    }

    /// Whether the weight of query `i` for key `j` is kept, by the words of its call.
    fn kept_by(&self, words: [u32; 4], i: u32, j: u32) -> bool {
        let (word, byte) = decides(i, j);
        let byte = words[word].rotate_left(1).to_le_bytes()[byte];
        (byte as u32 >= self.bound) != (self.flipped != 0)
    }

    /// Whether the weight of query `i` for key `j` is kept; `head` counts query heads over the batch.
    pub fn kept(&self, head: u32, i: u32, j: u32) -> bool {
        self.kept_by(self.words(head, i, j), i, j)
    }

    /// `f(i, j, kept)` for all that a call decides on, given the first of them, `i` and `j`: both are even, and among the first
    /// eight of their tile.
    pub fn for_call(&self, head: u32, i: u32, j: u32, mut f: impl FnMut(u32, u32, bool)) {
        let words = self.words(head, i, j);
        for (i, j) in [i, i + 1, i + 8, i + 9].into_iter().flat_map(|i| [j, j + 1, j + 8, j + 9].map(|j| (i, j))) {
            f(i, j, self.kept_by(words, i, j));
        }
    }

    /// Sets the top bit of each byte that keeps its weight, and clears that of the others.
    #[inline(always)]
    fn compare(&self, bytes: u32) -> u32 {
        // The lower seven bits by an addition that carries into the eighth, and no further.
        let lower = (bytes & !TOP_BITS).wrapping_add((0x80 - self.bound) * EACH_BYTE);
        (bytes | lower) ^ self.flipped
    }

    /// The call that the thread at `lane` makes for the columns 32·pair.. of a fragment: for the first sixteen where its rows
    /// are even, for the next where they are odd.
    #[inline(always)]
    fn words_at(&self, at: &Place, lane: Lane, pair: u32) -> [u32; 4] {
        let row = at.row + lane.row(0);
        let column = at.column + 2 * TILE * pair + TILE * (lane.row(0) % 2) + lane.column;
        let [i, j] = if at.rows == Rows::Queries { [row, column] } else { [column, row] };
        self.words(at.head, i, j)
    }

    /// That call where rows are queries.
    #[inline(always)]
    pub fn call(&self, at: &Place, lane: Lane, pair: u32) -> Call<2> {
        let [a, b, c, d] = self.words_at(at, lane, pair);
        Call { own: [a, b], sent: [c, d] }
    }

    /// Where rows are keys, what that call decides.
    #[inline(always)]
    pub fn kept_call(&self, at: &Place, lane: Lane, pair: u32) -> Call<1> {
        let [a, b, c, d] = self.words_at(at, lane, pair).map(|word| word.rotate_left(1));
        let [even, odd] = [0x5410, 0x7632].map(|bytes| {
            let [first, second] = [select_bytes(a, b, bytes), select_bytes(c, d, bytes)].map(|x| self.compare(x));
            [first ^ (first ^ second >> 1) & !TOP_BITS]
        });
        Call { own: where_odd(lane, even, odd), sent: where_odd(lane, odd, even) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;
    use std::vec::Vec;

    const PLACES: [(u32, u32, u32); 4] = [(0, 0, 0), (5, 64, 128), (71, 4096, 32), (3, 0x7fff_ff00, 0x7fff_ff80)];

    #[test]
    fn bytes_are_compared_one_by_one() {
        for threshold in 0..=255u8 {
            let dropout = Dropout::new(threshold, 0, 0);
            for byte in 0..=255u8 {
                let word = u32::from_le_bytes([byte, 255 - byte, byte ^ 0x80, byte]);
                let kept = dropout.compare(word).to_le_bytes().map(|x| x & 0x80 != 0);
                let expected = |x: u8| (x as u32 >= dropout.bound) != (dropout.flipped != 0);
                assert_eq!(kept, word.to_le_bytes().map(expected), "{byte} against {threshold}");
            }
        }
    }

    /// All 128 threads of a warpgroup, exchange included, against the definition.
    #[test]
    fn threads_find_what_is_kept() {
        const COLUMNS: u32 = 128;
        let dropout = Dropout::new(100, 0x0123_4567_89ab_cdef, 1 << 33 | 7);
        for (head, row, column) in PLACES {
            for rows in [Rows::Queries, Rows::Keys] {
                let at = Place { head, row, column, rows };
                let mut seen = 0;
                for pair in 0..COLUMNS / 32 {
                    let lanes: Vec<Lane> = (0..128).map(Lane::new).collect();
                    // The bytes of the two tiles, where rows are keys with their top bits only.
                    let bytes = |thread: usize| -> [Bytes; 2] {
                        let (lane, neighbour) = (lanes[thread], lanes[thread ^ 4]);
                        match rows {
                            Rows::Queries => {
                                let received = dropout.call(&at, neighbour, pair).sent;
                                let joined = dropout.call(&at, lane, pair).joined(lane, received);
                                joined.map(|bytes| bytes.map(|word| dropout.compare(word.rotate_left(1))))
                            }
                            Rows::Keys => {
                                let received = dropout.kept_call(&at, neighbour, pair).sent;
                                let joined = dropout.kept_call(&at, lane, pair).joined(lane, received);
                                joined.map(|both| top_bits(both, row + lane.row(0)))
                            }
                        }
                    };
                    for (thread, &lane) in lanes.iter().enumerate() {
                        for (tile, bytes) in bytes(thread).into_iter().enumerate() {
                            for (lower, right, odd) in (0..8usize).map(|x| (x / 4, x / 2 % 2, x % 2)) {
                                let r = row + lane.row(lower as u32);
                                let c =
                                    column + 32 * pair + 16 * tile as u32 + 8 * right as u32 + lane.column + odd as u32;
                                let (i, j) = if rows == Rows::Queries { (r, c) } else { (c, r) };
                                let (word, byte) = rows.byte(Element { lower, right, odd });
                                let kept = bytes[word].to_le_bytes()[byte] & 0x80 != 0;
                                assert_eq!(kept, dropout.kept(head, i, j), "{at:?}: query {i}, key {j}");
                                seen += 1;
                            }
                        }
                    }
                }
                assert_eq!(seen, 64 * COLUMNS);
            }
        }
    }

    /// As many bytes drop their weight as the threshold says, and an f16's magnitude is compared as its bits are.
    #[test]
    fn thresholds_are_exact() {
        for threshold in 0..=255u8 {
            let dropout = Dropout::new(threshold, 0, 0);
            let kept = (0..=255).filter(|&byte| dropout.compare(byte) & 0x80 != 0).count();
            assert_eq!(kept, 256 - threshold as usize);
            let bound = f16::from_bits(dropout.bound_f16x2 as u16).to_f64();
            for bits in 0..=u16::MAX {
                let x = f16::from_bits(bits).to_f64().abs();
                assert_eq!(x >= bound || x.is_nan(), (bits >> 7 & 0xff) as u32 >= dropout.bound, "{bits} {threshold}");
            }
        }
    }

    /// Every weight of a tile has a byte of its own.
    #[test]
    fn no_byte_serves_twice() {
        let mut places: Vec<(u32, u32, usize, usize)> = (0..32 * 32)
            .map(|x| (x / 32, x % 32))
            .map(|(i, j)| (call(i), call(j), decides(i, j).0, decides(i, j).1))
            .collect();
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), 32 * 32);
    }

    /// Neighbours in seed, offset and head have nothing to do with each other.
    #[test]
    fn masks_are_independent() {
        const SIDE: u32 = 256;
        let kept = |dropout: Dropout, head| -> Vec<bool> {
            (0..SIDE * SIDE).map(|x| dropout.kept(head, x / SIDE, x % SIDE)).collect()
        };
        let first = kept(Dropout::new(128, 1, 0), 0);
        for other in [
            kept(Dropout::new(128, 2, 0), 0),
            kept(Dropout::new(128, 1, 1), 0),
            kept(Dropout::new(128, 1, 1 << 32), 0),
            kept(Dropout::new(128, 1 << 32 | 1, 0), 0),
            kept(Dropout::new(128, 1, 0), 1),
        ] {
            let same = first.iter().zip(&other).filter(|(a, b)| a == b).count() as f64;
            let (mean, sigma) = ((SIDE * SIDE) as f64 / 2.0, (SIDE * SIDE) as f64 / 4.0);
            assert!((same - mean).abs() < 5.0 * sigma.sqrt(), "{same} of {} agree", SIDE * SIDE);
        }
    }
}
