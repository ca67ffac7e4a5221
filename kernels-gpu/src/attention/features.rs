//! Features of a kernel: the small values that vary attention. Each is chosen by its type, and its value is a launch
//! parameter.

use core::mem::offset_of;
#[cfg(not(target_arch = "nvptx64"))]
use std::vec::Vec;

use super::by_distance::ByDistance;
use super::dropout::{Dropout, NoDropout};
use super::dropping::Dropping;
use super::mask::{Mask, Window};
use super::score::{Scaled, Score, Shaped};
#[cfg(not(target_arch = "nvptx64"))]
use crate::ground::constants::ConstantPlace;

/// Features of a kernel, as its mainloop sees them.
pub trait Features: Copy {
    /// Keys that a query attends to.
    type Mask: Mask;
    /// What becomes of a product of a query and a key before the softmax.
    type Score: Score;
    /// What becomes of P before it is multiplied by V: nothing, or dropout.
    type Weights: Dropping;

    /// Places of the specialisation constants, from the start of the features.
    #[cfg(not(target_arch = "nvptx64"))]
    fn constants() -> Vec<ConstantPlace>;

    fn mask(&self) -> &Self::Mask;
    fn score(&self) -> &Self::Score;
    fn weights(&self) -> &Self::Weights;
}

/// Features as launch parameters.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Chosen<M, S, R> {
    pub mask: M,
    pub score: S,
    pub weights: R,
}

impl<M: Mask, S: Score, R: Dropping> Features for Chosen<M, S, R> {
    type Mask = M;
    type Score = S;
    type Weights = R;

    #[cfg(not(target_arch = "nvptx64"))]
    fn constants() -> Vec<ConstantPlace> {
        let at = |start: usize, places: &'static [ConstantPlace]| {
            places.iter().map(move |place| ConstantPlace { offset: start as u32 + place.offset, ..*place })
        };
        let mask = at(offset_of!(Self, mask), M::CONSTANTS);
        let score = at(offset_of!(Self, score), S::CONSTANTS);
        let weights = at(offset_of!(Self, weights), R::CONSTANTS);
        mask.chain(score).chain(weights).collect()
    }
    #[inline(always)]
    fn mask(&self) -> &M {
        &self.mask
    }
    #[inline(always)]
    fn score(&self) -> &S {
        &self.score
    }
    #[inline(always)]
    fn weights(&self) -> &R {
        &self.weights
    }
}

/// Features of the compiled kernels. Those of the first have neither softcap nor ALiBi.
pub type Plain = Chosen<Window, Scaled, NoDropout>;
pub type Scored = Chosen<Window, Shaped, NoDropout>;
pub type WithDropout = Chosen<Window, Shaped, Dropout>;
pub type Piecewise = Chosen<ByDistance<Window>, Shaped, NoDropout>;
pub type PiecewiseWithDropout = Chosen<ByDistance<Window>, Shaped, Dropout>;

// A mask of two pairs has the constants of its own mask.
const _: () = assert!(offset_of!(ByDistance<Window>, mask) == 0);
