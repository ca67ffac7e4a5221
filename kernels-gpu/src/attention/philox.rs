//! Philox-4x32: random numbers from a counter and a key, with no state in between (Salmon, Moraes, Dror and Shaw,
//! "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

use crate::arch::bytes::wide_product;

/// Multipliers, one for each half of the counter.
const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
/// Difference between the keys of one round and the next.
const KEY_STEPS: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];

/// Generator of one key. The keys of its rounds depend on nothing else, so the host computes them once.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Philox<const ROUNDS: usize> {
    keys: [[u32; 2]; ROUNDS],
}

impl<const ROUNDS: usize> Philox<ROUNDS> {
    pub fn new(key: u64) -> Self {
        Philox::with_tweak(key, 0)
    }

    /// Returns the generator of a key and a tweak, which enters the keys of odd rounds by an exclusive or. No two pairs
    /// of key and tweak have the same keys in all rounds: round 0 tells the key, and round 1 then the tweak. With tweak
    /// 0 it is Philox as published.
    pub fn with_tweak(key: u64, tweak: u32) -> Self {
        let key = [key as u32, (key >> 32) as u32];
        let step = |word: usize, round: u32| key[word].wrapping_add(KEY_STEPS[word].wrapping_mul(round));
        let keys = |round| [step(0, round) ^ (round % 2 * tweak), step(1, round)];
        Philox { keys: core::array::from_fn(|round| keys(round as u32)) }
    }

    /// Returns the keys of a round.
    #[cfg(test)]
    pub(super) fn key(&self, round: usize) -> [u32; 2] {
        self.keys[round]
    }

    /// Returns 128 random bits for a counter, lowest word first.
    #[inline(always)]
    pub fn at(&self, counter: [u32; 4]) -> [u32; 4] {
        self.from(&Start::new([counter[0], counter[2]]), [counter[1], counter[3]])
    }

    /// Returns what [`Philox::at`] returns, from the start for words 0 and 2 of the counter, and the other two.
    #[inline(always)]
    pub fn from(&self, start: &Start, others: [u32; 2]) -> [u32; 4] {
        let mut x = start.joined(others, self.keys[0]);
        for round in 1..ROUNDS {
            x = next(x, self.keys[round]);
        }
        x
    }

    /// Returns what [`Philox::from`] returns, but for a key and a tweak. Computes the keys of the rounds.
    #[inline(always)]
    pub fn draw([low, high]: [u32; 2], tweak: u32, start: &Start, others: [u32; 2]) -> [u32; 4] {
        let (mut x, mut key) = (start.joined(others, [low, high]), [low, high]);
        for round in 1..ROUNDS as u32 {
            key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
            x = next(x, [key[0] ^ (round % 2 * tweak), key[1]]);
        }
        x
    }
}

/// Products of the first round, which depend on words 0 and 2 of the counter alone.
#[derive(Clone, Copy)]
pub struct Start([[u32; 2]; 2]);

impl Start {
    #[inline(always)]
    pub fn new([x_0, x_2]: [u32; 2]) -> Self {
        let [a, b] = [MULTIPLIERS[0] as u64 * x_0 as u64, MULTIPLIERS[1] as u64 * x_2 as u64];
        Start([[a as u32, (a >> 32) as u32], [b as u32, (b >> 32) as u32]])
    }

    /// Completes the first round.
    #[inline(always)]
    fn joined(&self, [x_1, x_3]: [u32; 2], [key_0, key_1]: [u32; 2]) -> [u32; 4] {
        let Start([[a_low, a_high], [b_low, b_high]]) = *self;
        [b_high ^ x_1 ^ key_0, b_low, a_high ^ x_3 ^ key_1, a_low]
    }
}

/// Computes a round.
#[inline(always)]
fn next(x: [u32; 4], [key_0, key_1]: [u32; 2]) -> [u32; 4] {
    let (a, b) = (wide_product(MULTIPLIERS[0], x[0]), wide_product(MULTIPLIERS[1], x[2]));
    [b.high ^ x[1] ^ key_0, b.low, a.high ^ x[3] ^ key_1, a.low]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks the known answers that the authors publish with their code (Random123, kat_vectors).
    #[test]
    fn known_answers() {
        let pi = ([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], 0x299f_31d0_a409_3822);
        let seven = |(counter, key): ([u32; 4], u64)| Philox::<7>::new(key).at(counter);
        assert_eq!(seven(([0; 4], 0)), [0x5f6f_b709, 0x0d89_3f64, 0x4f12_1f81, 0x4f73_0a48]);
        assert_eq!(seven(([!0; 4], !0)), [0x5207_ddc2, 0x4516_5e59, 0x4d8e_e751, 0x8c52_f662]);
        assert_eq!(seven(pi), [0x4dfc_caba, 0x190a_87f0, 0xc473_62ba, 0xb6b5_242a]);
        let ten = |(counter, key): ([u32; 4], u64)| Philox::<10>::new(key).at(counter);
        assert_eq!(ten(([0; 4], 0)), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(ten(([!0; 4], !0)), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(ten(pi), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }
}
