//! What shapes the scores and the softmax of a case: softcap, ALiBi and sinks.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;

use super::Case;
use crate::lengths::Lengths;
use crate::operands::{OptionalInputs, Slopes};
use crate::plan::{Alibi, InputKinds, Options, Sinks};

/// Changes the seed, so that slopes and sinks are other numbers than a case's inputs.
const VALUES_SEED: u64 = 0x5851_f42d_4c95_7f2d;
/// Changes the seed, so that the choice of options leaves the shape of a case as it is.
const CHOICE_SEED: u64 = 0x1405_7b7e_f767_814f;

/// Slopes and sinks of a case.
#[derive(Clone, Debug, PartialEq)]
pub struct Shaping(OptionalInputs<Vec<f32>>);

impl Shaping {
    /// Borrows the values.
    pub fn inputs(&self) -> OptionalInputs<&[f32]> {
        let OptionalInputs { slopes, sinks, lengths, .. } = &self.0;
        let slopes = slopes.as_ref().map(|slopes| match slopes {
            Slopes::PerHead(slopes) => Slopes::PerHead(&slopes[..]),
            Slopes::PerItem(slopes) => Slopes::PerItem(&slopes[..]),
        });
        let lengths = lengths.as_ref().map(lengths_of);
        OptionalInputs { slopes, sinks: sinks.as_deref(), seed_offset: None, lengths }
    }
}

/// Borrows lengths.
pub(super) fn lengths_of(lengths: &Lengths<Vec<f32>>) -> Lengths<&[f32]> {
    lengths.map_ref(|numbers| &numbers[..])
}

impl Case {
    /// Returns the same case with softcap, ALiBi and sinks, each with a probability of a third. Caps are from 0.5 to
    /// 100.
    pub fn with_random_shaping(self, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed ^ CHOICE_SEED);
        let third = 1.0 / 3.0;
        let softcap = rng.random_bool(third).then(|| 0.5 * 200f32.powf(rng.random_range(0.0..1.0)));
        let alibi = match (rng.random_bool(third), rng.random()) {
            (false, _) => Alibi::None,
            (true, false) => Alibi::PerHead,
            (true, true) => Alibi::PerItem,
        };
        let sinks = if rng.random_bool(third) { Sinks::PerHead } else { Sinks::None };
        Case { softcap, alibi, sinks, ..self }
    }

    /// Returns the slopes of the case, from −1 to 1, and the sinks, normal values of standard deviation 2.
    pub fn shaping(&self) -> Shaping {
        let mut rng = StdRng::seed_from_u64(self.seed ^ VALUES_SEED);
        let mut slopes = |len| (0..len).map(|_| rng.random_range(-1.0..1.0)).collect::<Vec<f32>>();
        let heads = self.problem.heads_q;
        let slopes = match self.alibi {
            Alibi::None => None,
            Alibi::PerHead => Some(Slopes::PerHead(slopes(heads))),
            Alibi::PerItem => Some(Slopes::PerItem(slopes(self.items() * heads))),
        };
        let mut sink = || -> f32 { 2.0 * rng.sample::<f32, _>(StandardNormal) };
        let sinks = match self.sinks {
            Sinks::None => None,
            Sinks::PerHead => Some((0..heads).map(|_| sink()).collect()),
        };
        let lengths = self.lengths.map(|lengths| lengths.input(self.seed));
        Shaping(OptionalInputs { slopes, sinks, seed_offset: None, lengths })
    }

    /// Returns the kinds of the optional inputs.
    pub fn kinds(&self) -> InputKinds {
        let sequences = self.lengths.map(|lengths| lengths.input(self.seed).kind());
        InputKinds { alibi: self.alibi, sinks: self.sinks, sequences }
    }

    /// Returns the options of the case.
    pub fn options(&self) -> Options {
        let (mask, scale, softcap) = (self.mask, Some(self.effective_scale()), self.softcap);
        let (alibi, sinks, dropout) = (self.alibi, self.sinks, self.dropped().into());
        let sequences = self.kinds().sequences;
        Options { mask, scale, softcap, alibi, sinks, dropout, sequences, dist_threshold: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_is_drawn() {
        let cases: Vec<Case> = (0..300).map(|seed| Case::random(seed, 1e6)).collect();
        for softcap in [false, true] {
            for alibi in [Alibi::None, Alibi::PerHead, Alibi::PerItem] {
                for sinks in [Sinks::None, Sinks::PerHead] {
                    let is = |case: &&Case| (case.softcap.is_some(), case.alibi, case.sinks) == (softcap, alibi, sinks);
                    assert!(cases.iter().filter(is).count() >= 3, "{softcap} {alibi:?} {sinks:?}");
                }
            }
        }
        assert!(cases.iter().filter_map(|case| case.softcap).all(|cap| (0.5..=100.0).contains(&cap)));
    }

    #[test]
    fn values_are_those_of_the_seed() {
        let case = Case { alibi: Alibi::PerItem, sinks: Sinks::PerHead, ..Case::random(7, 1e6) };
        let (shaping, other) = (case.shaping(), Case { seed: case.seed + 1, ..case }.shaping());
        assert_eq!(shaping, case.shaping());
        assert!(shaping.inputs() != other.inputs());
        assert_eq!(
            shaping.inputs().kinds(),
            InputKinds { alibi: Alibi::PerItem, sinks: Sinks::PerHead, sequences: None }
        );
    }
}
