//! Features whose types are known at run time only. The host plans with them and makes launch parameters from them.

use super::by_distance::ByDistance;
use super::dropout::{Dropout, NoDropout};
use super::features::{Chosen, Features};
use super::mask::{Interval, Mask, Window};
use super::query_blocks::blocks_of;
use super::score::{Scaled, Shaped};
use super::visits::Visits;
use crate::ground::constants::Constants;
use crate::ground::sequence::Sequence;

/// Lists the types of masks that kernels are compiled for.
macro_rules! masks {
    ($($(#[$doc:meta])* $name:ident($mask:ty),)*) => {
        /// Mask of a pass.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum AnyMask {
            $($(#[$doc])* $name($mask),)*
        }

        impl AnyMask {
            /// Calls a function with the mask as a value of its type.
            fn with<V: WithMask>(&self, function: V) -> V::Output {
                match *self {
                    $(AnyMask::$name(mask) => function.with(mask),)*
                }
            }
        }

        $(impl FromValue<AnyMask> for $mask {
            fn from_value(mask: &AnyMask) -> Option<Self> {
                if let AnyMask::$name(mask) = *mask { Some(mask) } else { None }
            }
        })*
    };
}
masks! {
    /// One pair of Q and K.
    Window(Window),
    /// A near and a far pair, each with the keys that the window leaves to it.
    ByDistance(ByDistance<Window>),
}

/// Features of a pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AnyFeatures {
    pub mask: AnyMask,
    pub score: Shaped,
    pub dropout: Option<Dropout>,
}

/// Function of a mask of any type.
trait WithMask {
    type Output;
    fn with<M: Mask>(self, mask: M) -> Self::Output;
}

impl AnyMask {
    /// Returns a window, in piecewise attention with the distance from which on scores come from the far pair.
    pub fn new(mask: Window, dist_threshold: Option<i32>) -> Self {
        match dist_threshold {
            None => AnyMask::Window(mask),
            Some(dist_threshold) => AnyMask::ByDistance(ByDistance { mask, dist_threshold }),
        }
    }
    /// Returns the number of pairs of Q and K.
    pub fn pairs(&self) -> u32 {
        struct Pairs;
        impl WithMask for Pairs {
            type Output = u32;
            fn with<M: Mask>(self, _: M) -> u32 {
                M::PAIRS
            }
        }
        self.with(Pairs)
    }
    /// Returns the specialisation constants of a kernel for this mask.
    pub fn constants(&self) -> Constants {
        struct Bounds;
        impl WithMask for Bounds {
            type Output = Constants;
            fn with<M: Mask>(self, mask: M) -> Constants {
                let left = Constants::NONE.with(Constants::LEFT, mask.bounds_left());
                left.with(Constants::RIGHT, mask.bounds_right())
            }
        }
        self.with(Bounds)
    }
    /// True if a query may not attend to all keys.
    pub fn is_bounded(&self) -> bool {
        self.constants() != Constants::NONE
    }
    /// Returns the number of key blocks that a query tile of `block_m` rows visits, through all pairs together.
    pub fn visits(&self, of: &Sequence, first_row: u32, (block_m, block_n): (u32, u32)) -> u32 {
        struct Count<'a>(&'a Sequence, u32, u32, u32);
        impl WithMask for Count<'_> {
            type Output = u32;
            fn with<M: Mask>(self, mask: M) -> u32 {
                Visits::new(self.0, &mask, self.1, self.2, self.3).count
            }
        }
        self.with(Count(of, first_row, block_m, block_n))
    }
    /// Returns the number of query blocks of a head that a block of keys visits, through all pairs together.
    pub fn query_blocks(&self, of: &Sequence, keys: Interval, block_m: u32) -> u32 {
        struct Count<'a>(&'a Sequence, Interval, u32);
        impl WithMask for Count<'_> {
            type Output = u32;
            fn with<M: Mask>(self, mask: M) -> u32 {
                (0..M::PAIRS).map(|pair| blocks_of(self.0, &mask, pair, self.1, self.2).count()).sum()
            }
        }
        self.with(Count(of, keys, block_m))
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
        struct Chooses<V>(V, Shaped, Option<Dropout>);
        impl<V: WithFeatures> WithMask for Chooses<V> {
            type Output = V::Output;
            fn with<M: Mask>(self, mask: M) -> V::Output {
                let Chooses(function, score, dropout) = self;
                match dropout {
                    None => function.with(Chosen { mask, score, weights: NoDropout }),
                    Some(weights) => function.with(Chosen { mask, score, weights }),
                }
            }
        }
        self.mask.with(Chooses(function, self.score, self.dropout))
    }
    /// Returns the same features with the address of dropout's seed and offset, if they are in memory.
    #[must_use]
    pub fn with_seed_offset(self, address: Option<u64>) -> Self {
        let dropout = self.dropout.map(|dropout| dropout.with_address(address.unwrap_or(0)));
        AnyFeatures { dropout, ..self }
    }
    /// Returns the specialisation constants of a kernel for these features.
    pub fn constants(&self) -> Constants {
        let dropout = self.dropout.map_or(Constants::NONE, |dropout| dropout.constants());
        Constants::from_bits(self.mask.constants().bits() | self.score.constants().bits() | dropout.bits())
    }
}

/// Features that can be made from [`AnyFeatures`] of the same kind.
pub trait FromAny: Features {
    /// Returns the features, or nothing if a kernel for `any` has features of another type.
    fn from_any(any: &AnyFeatures) -> Option<Self>;
    /// True if a kernel with features of this type covers `any`.
    fn covers(any: &AnyFeatures) -> bool {
        Self::from_any(any).is_some()
    }
}

/// Mask, score or dropout that can be made from a run-time value.
pub trait FromValue<T>: Sized {
    fn from_value(value: &T) -> Option<Self>;
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
impl FromValue<Shaped> for Shaped {
    fn from_value(score: &Shaped) -> Option<Self> {
        Some(*score)
    }
}
impl FromValue<Shaped> for Scaled {
    fn from_value(score: &Shaped) -> Option<Self> {
        score.scaled()
    }
}
impl<M, S, R> FromAny for Chosen<M, S, R>
where
    Self: Features,
    M: FromValue<AnyMask>,
    S: FromValue<Shaped>,
    R: FromValue<Option<Dropout>>,
{
    fn from_any(any: &AnyFeatures) -> Option<Self> {
        let (mask, score) = (M::from_value(&any.mask)?, S::from_value(&any.score)?);
        Some(Chosen { mask, score, weights: R::from_value(&any.dropout)? })
    }
}
