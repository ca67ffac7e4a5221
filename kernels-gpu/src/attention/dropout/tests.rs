use super::*;
use half::f16;
use std::vec::Vec;

const PLACES: [(u32, u32, u32); 4] = [(0, 0, 0), (5, 64, 128), (71, 4096, 64), (3, 0x7fff_ff00, 0x7fff_ff80)];

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

/// Returns the four bytes that comparisons see.
fn joined(nibbles: u32, half: usize) -> u32 {
    let [upper, lower] = [0, 1].map(|lower| in_sight(nibbles, half, lower) >> 7 & 0x00ff_00ff);
    upper | lower << 8
}

/// Checks all 128 threads of a warpgroup, including the exchange of words, against the definition.
#[test]
fn threads_find_what_is_kept() {
    const COLUMNS: u32 = 128;
    let dropout = Dropout::new(100, 0x0123_4567_89ab_cdef, 1 << 33 | 7);
    for (head, row, column) in PLACES {
        for rows in [Rows::Queries, Rows::Keys] {
            let at = Place { head, row, column, rows };
            let mut seen = 0;
            let tile_columns = if rows == Rows::Queries { KEYS } else { QUERIES };
            for pair in 0..COLUMNS / (2 * tile_columns) {
                let lanes: Vec<Lane> = (0..128).map(Lane::new).collect();
                // Bytes of each sixteen columns; if rows are keys, only their top bits are valid.
                let bytes = |thread: usize| -> Vec<Bytes> {
                    let (lane, neighbour) = (lanes[thread], lanes[thread ^ 4]);
                    match rows {
                        Rows::Queries => {
                            let received = dropout.call(&at, neighbour, pair).sent;
                            let tiles = dropout.call(&at, lane, pair).joined(lane, received).map(halves);
                            tiles
                                .as_flattened()
                                .iter()
                                .enumerate()
                                .map(|(sixteen, x)| x.map(|x| joined(x, sixteen % 2)))
                                .map(|x| x.map(|x| dropout.compare(x)))
                                .collect()
                        }
                        Rows::Keys => {
                            let received = dropout.kept_call(&at, neighbour, pair).sent;
                            let joined = dropout.kept_call(&at, lane, pair).joined(lane, received);
                            joined.map(|both| top_bits(both, row + lane.row(0))).to_vec()
                        }
                    }
                };
                for (thread, &lane) in lanes.iter().enumerate() {
                    for (sixteen, bytes) in bytes(thread).into_iter().enumerate() {
                        for (lower, right, odd) in (0..8usize).map(|x| (x / 4, x / 2 % 2, x % 2)) {
                            let r = row + lane.row(lower as u32);
                            let c = column + 2 * tile_columns * pair + 16 * sixteen as u32;
                            let c = c + 8 * right as u32 + lane.column + odd as u32;
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

/// Checks that as many bytes drop their element as the threshold says, and that comparing an f16's magnitude is the
/// same as comparing its bits.
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

/// Checks that every element of a tile has an upper half of its own.
#[test]
fn no_nibble_serves_twice() {
    let mut places: Vec<_> =
        (0..64 * 64).map(|x| (x / 64, x % 64)).map(|(i, j)| (call(i, QUERIES), call(j, KEYS), decides(i, j))).collect();
    places.sort_unstable();
    places.dedup();
    assert_eq!(places.len(), 64 * 64);
}

/// Checks that the bytes of any three elements of a call are as independent as the call's own bits. Their bits are sums
/// of the call's bits, and none of these sums may be the sum of others.
#[test]
fn any_three_bytes_are_independent() {
    // Bits of the call whose sum is each bit of the 32 bytes, found by setting one bit after the other.
    let mut sums = [[0u128; 8]; 32];
    for bit in 0..128 {
        let words: [u32; 4] = core::array::from_fn(|word| if bit / 32 == word { 1 << (bit % 32) } else { 0 });
        for (weight, sums) in sums.iter_mut().enumerate() {
            let (word, half, byte) = (weight / 8, weight as u32 / 4 % 2, weight % 4);
            let found = bytes(words[word], parity(words), half).to_le_bytes()[byte];
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum |= ((found >> i & 1) as u128) << bit;
            }
        }
    }
    let independent = |weights: [usize; 3]| {
        let mut basis: Vec<u128> = Vec::new();
        weights.into_iter().flat_map(|weight| sums[weight]).all(|sum| {
            let rest = basis.iter().fold(sum, |rest, &b| rest.min(rest ^ b));
            basis.push(rest);
            rest != 0
        })
    };
    for (a, b) in (0..32).flat_map(|b| (0..b).map(move |a| (a, b))) {
        assert!((0..a).all(|c| independent([a, b, c])), "{a}, {b}");
    }
}

/// Checks that the masks of neighbouring seeds, offsets and heads are independent.
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
