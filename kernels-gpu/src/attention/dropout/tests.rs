use super::*;
use half::f16;
use std::vec::Vec;

const PLACES: [(u32, u32, u32); 4] = [(0, 0, 0), (5, 64, 128), (71, 4096, 64), (3, 0x7fff_ff00, 0x7fff_ff80)];

/// Returns dropout for each t from 0 to 255, with the choice between t and t + 1, and the chosen one of the two.
fn thresholds() -> impl Iterator<Item = (Dropout, usize, usize)> {
    (0..512usize).map(|x| {
        let dropout = Dropout::new(((x / 2) as f32 + 0.5) / 256.0, 0, 0).unwrap();
        assert_eq!(dropout.fraction, 1 << 31);
        (dropout, x % 2, x / 2 + x % 2)
    })
}

#[test]
fn bytes_are_compared_one_by_one() {
    for (dropout, choice, threshold) in thresholds() {
        for byte in 0..=255u8 {
            let word = u32::from_le_bytes([byte, 255 - byte, byte ^ 0x80, byte]);
            let kept = dropout.compare(word, dropout.addends[choice]).to_le_bytes().map(|x| x & 0x80 != 0);
            let expected = |x: u8| (x as u32 >= dropout.bounds[choice]) != (dropout.flipped != 0);
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
    let dropout = Dropout::new(100.4 / 256.0, 0x0123_4567_89ab_cdef, 1 << 33 | 7).unwrap();
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
                            let tiles = dropout.call(&at, lane, pair).joined(lane, received);
                            let seen = |words: [u32; 3]| {
                                let addend = dropout.chosen(words[2], dropout.addends);
                                let halves = halves(words);
                                [0, 1].map(|half| halves[half].map(|x| dropout.compare(joined(x, half), addend)))
                            };
                            tiles.map(seen).as_flattened().to_vec()
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
    for (dropout, choice, threshold) in thresholds() {
        let addend = dropout.addends[choice];
        let kept = (0..=255).filter(|&byte| dropout.compare(byte, addend) & 0x80 != 0).count();
        assert_eq!(kept, 256 - threshold);
        let bound = f16::from_bits(dropout.bounds_f16x2[choice] as u16).to_f64();
        assert_eq!(dropout.bounds_f16x2[choice] >> 16, dropout.bounds_f16x2[choice] & 0xffff);
        for bits in 0..=u16::MAX {
            let x = f16::from_bits(bits).to_f64().abs();
            let large = (bits >> 7 & 0xff) as u32 >= dropout.bounds[choice];
            assert_eq!(x >= bound || x.is_nan(), large, "{bits} {threshold}");
        }
    }
}

#[test]
fn probabilities_have_forty_bits() {
    let parts = |p| Dropout::new(p, 0, 0).map(|dropout| (dropout.bounds, dropout.flipped, dropout.fraction));
    assert_eq!(parts(0.0), None);
    assert_eq!(parts(-0.0), None);
    assert_eq!(parts(f32::MIN_POSITIVE), None);
    assert_eq!(parts((-41f32).exp2().next_down()), None);
    assert_eq!(parts((-41f32).exp2()), Some(([0, 1], 0, 1)));
    assert_eq!(parts(1.0 / 512.0), Some(([0, 1], 0, 1 << 31)));
    assert_eq!(parts(0.5f32.next_down()), Some(([127, 128], 0, 0u32.wrapping_sub(1 << 15))));
    assert_eq!(parts(0.5), Some(([128, 127], u32::MAX, 0)));
    assert_eq!(parts(1.0f32.next_down()), Some(([1, 0], u32::MAX, 0u32.wrapping_sub(1 << 16))));
    for p in [0.17f32, 0.8, 0.1, 1.0 / 512.0, 1.0f32.next_down(), 1e-30] {
        let dropout = Dropout::new(p.max(1e-12), 0, 0).unwrap();
        let p = p.max(1e-12) as f64;
        assert_eq!(dropout.scale, (1.0 / (1.0 - p)) as f32);
        assert_eq!(dropout.keeps(), (1.0 - p) as f32);
    }
}

/// Shares of dropped elements, over many calls.
struct Shares {
    calls: u32,
    /// Number of calls that drop the element, by its position.
    dropped: [u32; 32],
    /// Number of calls with t as the element's byte, and of those that drop it.
    at_threshold: [[u32; 2]; 32],
    /// Number of calls that drop both elements, by their positions.
    both: [[u32; 32]; 32],
}

impl Shares {
    fn new(dropout: &Dropout, threshold: u32) -> Self {
        let calls = 1 << 20;
        let mut shares = Shares { calls, dropped: [0; 32], at_threshold: [[0; 2]; 32], both: [[0; 32]; 32] };
        for call in 0..calls {
            let words = dropout.philox.at([call, 1, 2, 3]);
            let mut dropped = 0u32;
            for (position, at_threshold) in shares.at_threshold.iter_mut().enumerate() {
                let (i, j) = ((position / 16 * 8 + position / 8 % 2) as u32, (position % 8) as u32);
                let (i, j) = (i, j / 2 * 8 + j % 2);
                let drops = !dropout.kept_by(words, i, j);
                dropped |= (drops as u32) << position;
                let (word, half, byte) = decides(i, j);
                let byte = bytes(words[word], parity(words), half).to_le_bytes()[byte] as u32;
                if byte == if dropout.flipped == 0 { threshold } else { 255 - threshold } {
                    at_threshold[0] += 1;
                    at_threshold[1] += drops as u32;
                }
            }
            for a in (0..32).filter(|a| dropped >> a & 1 != 0) {
                shares.dropped[a] += 1;
                (0..a).for_each(|b| shares.both[a][b] += dropped >> b & 1);
            }
        }
        shares
    }
}

/// Checks that `count` of `of` trials is a share of `p`, to within so many standard deviations.
#[track_caller]
fn is_share(count: u32, of: u32, p: f64, sigmas: f64) {
    let (count, of) = (count as f64, of as f64);
    assert!((count - of * p).powi(2) <= sigmas.powi(2) * of * p * (1.0 - p), "{count} of {of} at {p}");
}

/// Checks the share of dropped elements at each position of a call, and that of pairs. The choice between t and t + 1
/// may depend on no element: elements whose byte is t are dropped with probability f/2³².
#[test]
fn every_position_has_the_probability() {
    for (p, threshold) in [(0.17f32, 43), (0.8, 204), (0.1, 25), (1.0 / 512.0, 0), (0.9999, 255), (0.5, 128)] {
        let dropout = Dropout::new(p, 11, 12).unwrap();
        let (p, f) = (p as f64, dropout.fraction as f64 / (1u64 << 32) as f64);
        assert!((p - (threshold as f64 + f) / 256.0).abs() < 1e-12);
        let shares = Shares::new(&dropout, threshold);
        // Elements share the choice, so any two have this covariance, and their number a larger deviation.
        let shared = f * (1.0 - f) / 65536.0;
        for (a, dropped) in shares.dropped.into_iter().enumerate() {
            is_share(dropped, shares.calls, p, 5.0);
            let [count, dropped] = shares.at_threshold[a];
            is_share(count, shares.calls, 1.0 / 256.0, 5.0);
            is_share(dropped, count, f, 5.0);
            (0..a).for_each(|b| is_share(shares.both[a][b], shares.calls, p * p + shared, 5.5));
        }
        let (dropped, all) = (shares.dropped.iter().sum::<u32>() as f64, shares.calls as f64 * 32.0);
        let sigma = (all * (p * (1.0 - p) + 31.0 * shared)).sqrt();
        assert!((dropped - all * p).abs() < 5.0 * sigma, "{dropped} of {all} at {p}");
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

/// Checks that seeds and offsets have keys and counters of their own: what a generator is made of tells both.
#[test]
fn generators_tell_seed_and_offset() {
    let mut x = 1u64;
    let mut next = || {
        x = x.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        x ^ x >> 29
    };
    for _ in 0..1000 {
        let (seed, offset) = (next(), next());
        let dropout = Dropout::new(0.5, seed, offset).unwrap();
        let [[a, b], [c, _]] = [dropout.philox.key(0), dropout.philox.key(1)];
        assert_eq!(a as u64 | (b as u64) << 32, seed);
        let upper = c ^ Philox::<ROUNDS>::new(seed).key(1)[0];
        assert_eq!(dropout.offset as u64 | (upper as u64) << 32, offset);
    }
}

/// Checks that the masks of neighbouring seeds, offsets and heads are independent.
#[test]
fn masks_are_independent() {
    const SIDE: u32 = 256;
    let kept = |dropout: Dropout, head| -> Vec<bool> {
        (0..SIDE * SIDE).map(|x| dropout.kept(head, x / SIDE, x % SIDE)).collect()
    };
    let first = kept(Dropout::new(0.5, 1, 0).unwrap(), 0);
    for other in [
        kept(Dropout::new(0.5, 2, 0).unwrap(), 0),
        kept(Dropout::new(0.5, 1, 1).unwrap(), 0),
        kept(Dropout::new(0.5, 1, 1 << 32).unwrap(), 0),
        kept(Dropout::new(0.5, 1 << 32 | 1, 0).unwrap(), 0),
        kept(Dropout::new(0.5, 1 << 32 | 1, 1 << 32).unwrap(), 0),
        kept(Dropout::new(0.5, 1 << 32, 1 << 32 | 1).unwrap(), 0),
        kept(Dropout::new(0.5, 1, 0).unwrap(), 1),
    ] {
        let same = first.iter().zip(&other).filter(|(a, b)| a == b).count() as f64;
        let (mean, sigma) = ((SIDE * SIDE) as f64 / 2.0, (SIDE * SIDE) as f64 / 4.0);
        assert!((same - mean).abs() < 5.0 * sigma.sqrt(), "{same} of {} agree", SIDE * SIDE);
    }
}
