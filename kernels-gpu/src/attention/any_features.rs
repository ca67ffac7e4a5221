//! Features whose types are known at run time only. The host plans with them and makes launch parameters from them.

use super::by_distance::ByDistance;
use super::dropout::{Dropout, NoDropout};
use super::features::{Chosen, Features};
use super::mask::{Interval, Mask, Window};
use super::query_blocks::blocks_of;
use super::visits::Visits;
use crate::ground::constants::Constants;
use crate::ground::sequence::Sequence;

/// Keys that a query attends to: a window, and in piecewise attention the distance from which on scores come from the
/// far pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnyMask {
    pub window: Window,
    pub dist_threshold: Option<i32>,
}

/// Features of a pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AnyFeatures {
    pub mask: AnyMask,
    pub dropout: Option<Dropout>,
}

impl AnyMask {
    /// Returns the number of pairs of Q and K.
    pub fn pairs(&self) -> u32 {
        if self.dist_threshold.is_some() { 2 } else { 1 }
    }
    /// True if a query may not attend to all keys.
    pub fn is_bounded(&self) -> bool {
        self.window.bounds_left() || self.window.bounds_right()
    }
    /// Returns the number of key blocks that a query tile of `block_m` rows visits, through all pairs together.
    pub fn visits(&self, of: &Sequence, first_row: u32, (block_m, block_n): (u32, u32)) -> u32 {
        let mask = self.window;
        match self.dist_threshold {
            None => Visits::new(of, &mask, first_row, block_m, block_n).count,
            Some(dist_threshold) => {
                Visits::new(of, &ByDistance { mask, dist_threshold }, first_row, block_m, block_n).count
            }
        }
    }
    /// Returns the number of query blocks of a head that a block of keys visits, through all pairs together.
    pub fn query_blocks(&self, of: &Sequence, keys: Interval, block_m: u32) -> u32 {
        let mask = self.window;
        match self.dist_threshold {
            None => blocks_of(of, &mask, 0, keys, block_m).count(),
            Some(dist_threshold) => {
                let mask = ByDistance { mask, dist_threshold };
                (0..2).map(|pair| blocks_of(of, &mask, pair, keys, block_m).count()).sum()
            }
        }
    }
}

/// Function of features of any type.
pub trait WithFeatures {
    type Output;
    fn with<F: Features>(self, features: F) -> Self::Output;
}

impl AnyFeatures {
    /// Calls a function with the features as a value of the type that a kernel has.
    pub fn chosen<V: WithFeatures>(&self, function: V) -> V::Output {
        let mask = self.mask.window;
        match (self.mask.dist_threshold, self.dropout) {
            (None, None) => function.with(Chosen { mask, weights: NoDropout }),
            (None, Some(weights)) => function.with(Chosen { mask, weights }),
            (Some(dist_threshold), None) => {
                function.with(Chosen { mask: ByDistance { mask, dist_threshold }, weights: NoDropout })
            }
            (Some(dist_threshold), Some(weights)) => {
                function.with(Chosen { mask: ByDistance { mask, dist_threshold }, weights })
            }
        }
    }
    /// Returns the specialisation constants of a kernel for these features.
    pub fn constants(&self) -> Constants {
        self.mask.window.constants()
    }
}

/// Features that can be made from [`AnyFeatures`] of the same kind.
pub trait FromAny: Features {
    /// Returns the features, or nothing if a kernel for `any` has features of another type.
    fn from_any(any: &AnyFeatures) -> Option<Self>;
}

/// Mask or dropout that can be made from a run-time value.
pub trait FromValue<T>: Sized {
    fn from_value(value: &T) -> Option<Self>;
}
impl FromValue<AnyMask> for Window {
    fn from_value(mask: &AnyMask) -> Option<Self> {
        mask.dist_threshold.is_none().then_some(mask.window)
    }
}
impl FromValue<AnyMask> for ByDistance<Window> {
    fn from_value(mask: &AnyMask) -> Option<Self> {
        mask.dist_threshold.map(|dist_threshold| ByDistance { mask: mask.window, dist_threshold })
    }
}
impl FromValue<Option<Dropout>> for NoDropout {
    fn from_value(dropout: &Option<Dropout>) -> Option<Self> {
        dropout.is_none().then_some(NoDropout)
    }
}
impl FromValue<Option<Dropout>> for Dropout {
    fn from_value(dropout: &Option<Dropout>) -> Option<Self> {
        *dropout
    }
}
impl<M, R> FromAny for Chosen<M, R>
where
    Self: Features,
    M: FromValue<AnyMask>,
    R: FromValue<Option<Dropout>>,
{
    fn from_any(any: &AnyFeatures) -> Option<Self> {
        Some(Chosen { mask: M::from_value(&any.mask)?, weights: R::from_value(&any.dropout)? })
    }
}
