//! Features of a kernel: the small values that vary attention. Each is chosen by its type, and its value is a launch
//! parameter.

use core::mem::offset_of;

use super::by_distance::ByDistance;
use super::dropout::{Dropout, NoDropout};
use super::dropping::Dropping;
use super::mask::{Mask, Window};

/// Features of a kernel, as its mainloop sees them.
pub trait Features: Copy {
    /// Keys that a query attends to.
    type Mask: Mask;
    /// What becomes of P before it is multiplied by V: nothing, or dropout.
    type Weights: Dropping;

    fn mask(&self) -> &Self::Mask;
    fn weights(&self) -> &Self::Weights;
}

/// Features as launch parameters.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Chosen<M, R> {
    pub mask: M,
    pub weights: R,
}

impl<M: Mask, R: Dropping> Features for Chosen<M, R> {
    type Mask = M;
    type Weights = R;
    #[inline(always)]
    fn mask(&self) -> &M {
        &self.mask
    }
    #[inline(always)]
    fn weights(&self) -> &R {
        &self.weights
    }
}

/// Features of the compiled kernels.
pub type Plain = Chosen<Window, NoDropout>;
pub type WithDropout = Chosen<Window, Dropout>;
pub type Piecewise = Chosen<ByDistance<Window>, NoDropout>;
pub type PiecewiseWithDropout = Chosen<ByDistance<Window>, Dropout>;

// The build finds the constants of the mask at the start of the features, and those of a window at the start of
// [`ByDistance`].
const _: () = {
    assert!(offset_of!(Plain, mask) == 0);
    assert!(offset_of!(PiecewiseWithDropout, mask) == 0);
    assert!(offset_of!(ByDistance<Window>, mask) == 0);
};
