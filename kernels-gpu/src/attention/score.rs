//! Scores: what becomes of the product of a query and a key before the softmax. Softcap bounds it, and ALiBi subtracts
//! a multiple of the distance.
//!
//! The score of query i and key j is scale·q·k. With softcap it is cap·tanh(scale·q·k / cap) (Gemma 2, arXiv
//! 2408.00118, section 2). ALiBi then subtracts slope·|i + seqlen_k − seqlen_q − j|, with a slope for each head (arXiv
//! 2108.12409). The mask applies after both.
//!
//! Kernels keep scores in a unit, [`Score::unit`], so that plain scores stay as the product leaves them. Within a block
//! on one side of the diagonal, the distance is a value of the row plus the column. So ALiBi costs one fused
//! multiply-add for each score, with the column as a constant, and the value of the row goes into the softmax.

#[cfg(not(target_arch = "nvptx64"))]
use core::mem::offset_of;

use super::mask::Mask;
use crate::arch::constant::Constant;
use crate::arch::{Edge, Warpgroup};
#[cfg(not(target_arch = "nvptx64"))]
use crate::ground::constants::ConstantPlace;
use crate::ground::constants::Constants;
use crate::ground::sequence::Sequence;
use crate::ground::tensor::PerHead;
use crate::tile::lane::WARPGROUP_ROWS;

/// Rule that turns products of queries and keys into scores, in two parts: a curve, which depends on the product alone,
/// and a bias, which depends on the place alone. It is a value in the launch parameters.
///
/// A wrong rule gives wrong results, but never an access outside the tensors.
pub trait Score: Copy {
    /// Places of its specialisation constants, from its own start.
    #[cfg(not(target_arch = "nvptx64"))]
    const CONSTANTS: &'static [ConstantPlace] = &[];

    /// Returns the unit of scores: a score is a kernel's number times this.
    fn unit(&self) -> f32;

    /// True if there is a curve, so that the derivative is not 1.
    fn is_curved(&self) -> bool;
    /// Applies the curve, if there is one, to a block of products.
    fn curve<W: Warpgroup, const N8: usize>(&self, wg: &W, x: &mut W::Acc<N8>);
    /// Returns the derivative, by scale·q·k, of a score that the curve has given.
    fn derivative<W: Warpgroup>(x: f32) -> f32;

    /// Reads what the bias of a query head depends on. Returns nothing if there is no bias.
    fn of_head<W: Warpgroup>(&self, wg: &W, batch: u32, head: u32) -> Option<f32>;
    /// Adds the bias to a block of scores, but for a value of each row that is still missing: the one returned.
    fn bias<W: Warpgroup, const N8: usize>(
        &self,
        wg: &W,
        x: &mut W::Acc<N8>,
        of_head: Option<f32>,
        distances: &Distances,
    ) -> Option<W::Rows>;
}

/// Signed distances of the elements of a fragment of scores: `first` of the first, one less from row to row, and one
/// more from column to column. Rows may be queries or keys.
#[derive(Clone, Copy, Debug)]
pub struct Distances {
    first: i32,
    sign: Sign,
}

/// Sign of all distances of a fragment that count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sign {
    Negative,
    Positive,
    Mixed,
}

impl Distances {
    /// Returns those of keys from the places of their queries, for a fragment of `width` columns. Rows are queries from
    /// `row` on, columns keys from `key` on.
    #[inline(always)]
    pub fn of_queries<M: Mask>(of: &Sequence, mask: &M, row: u32, key: u32, width: u32) -> Self {
        let first = (key as i32).wrapping_sub(of.place(row));
        Distances { first, sign: if mask.sees_behind() { Sign::of(first, width) } else { Sign::Negative } }
    }
    /// Returns those of queries' places from their keys. Rows are keys, columns queries.
    #[inline(always)]
    pub fn of_keys<M: Mask>(of: &Sequence, mask: &M, row: u32, key: u32, width: u32) -> Self {
        let first = of.place(row).wrapping_sub(key as i32);
        Distances { first, sign: if mask.sees_behind() { Sign::of(first, width) } else { Sign::Positive } }
    }
}

impl Distances {
    /// Returns the same distances, which are subtracted one by one. It takes an operation more for each score than
    /// adding a value of the row to a value of the column, and has one rounding instead of three.
    #[inline(always)]
    pub fn one_by_one(self) -> Self {
        Distances { sign: Sign::Mixed, ..self }
    }
}

impl Sign {
    #[inline(always)]
    fn of(first: i32, width: u32) -> Self {
        let (least, greatest) = (first.wrapping_sub(WARPGROUP_ROWS as i32 - 1), first.wrapping_add(width as i32 - 1));
        if greatest <= 0 {
            Sign::Negative
        } else if least >= 0 {
            Sign::Positive
        } else {
            Sign::Mixed
        }
    }
}

/// Scores without a curve and without a bias: scale·q·k. It has the layout of [`Shaped`], so that the host need not
/// know which of the two a kernel takes.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scaled(Shaped);

impl Score for Scaled {
    #[inline(always)]
    fn unit(&self) -> f32 {
        self.0.unit
    }
    #[inline(always)]
    fn is_curved(&self) -> bool {
        false
    }
    #[inline(always)]
    fn curve<W: Warpgroup, const N8: usize>(&self, _: &W, _: &mut W::Acc<N8>) {}
    #[inline(always)]
    fn derivative<W: Warpgroup>(_: f32) -> f32 {
        1.0
    }
    #[inline(always)]
    fn of_head<W: Warpgroup>(&self, _: &W, _: u32, _: u32) -> Option<f32> {
        None
    }
    #[inline(always)]
    fn bias<W: Warpgroup, const N8: usize>(
        &self,
        _: &W,
        _: &mut W::Acc<N8>,
        _: Option<f32>,
        _: &Distances,
    ) -> Option<W::Rows> {
        None
    }
}

/// Scores of the library: scale, softcap and ALiBi, each of the last two under a specialisation constant.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shaped {
    /// Slopes of ALiBi; read if there is ALiBi.
    slopes: PerHead,
    has_cap: Constant<{ Constants::CAP }>,
    has_slopes: Constant<{ Constants::ALIBI }>,
    /// Factor from products to arguments of tanh, scale / cap; read if there is softcap.
    inner: f32,
    /// Unit of scores: cap if there is softcap, otherwise scale.
    unit: f32,
    /// 1 / unit.
    per_unit: f32,
}

#[cfg(not(target_arch = "nvptx64"))]
impl Shaped {
    /// Makes scores from the softmax scale, the bound of softcap if there is one, and the presence of ALiBi. `scale`
    /// and `cap` are finite and positive.
    pub fn new(scale: f32, cap: Option<f32>, has_slopes: bool) -> Self {
        let unit = cap.unwrap_or(scale);
        Shaped {
            slopes: PerHead::NONE,
            has_cap: Constant::new(cap.is_some()),
            has_slopes: Constant::new(has_slopes),
            inner: cap.map_or(0.0, |cap| (f64::from(scale) / f64::from(cap)) as f32),
            unit,
            per_unit: 1.0 / unit,
        }
    }
    /// Sets the slopes, which kernels read if there is ALiBi.
    pub fn with_slopes(self, slopes: PerHead) -> Self {
        Shaped { slopes, ..self }
    }
    /// Returns the scores as those without softcap and ALiBi, if they are.
    pub fn scaled(&self) -> Option<Scaled> {
        (self.constants() == Constants::NONE).then_some(Scaled(*self))
    }
    /// Returns the values of the specialisation constants.
    pub fn constants(&self) -> Constants {
        let cap = Constants::NONE.with(Constants::CAP, self.has_cap.get());
        cap.with(Constants::ALIBI, self.has_slopes.get())
    }
}

impl Shaped {
    /// Subtracts slope·|distance| from each score, but for the values of rows that it returns.
    #[inline(always)]
    fn subtract_distances<W: Warpgroup, const N8: usize>(
        &self,
        wg: &W,
        x: &mut W::Acc<N8>,
        slope: f32,
        Distances { first, sign }: &Distances,
    ) -> W::Rows {
        let slope = slope * self.per_unit;
        let rows = |first: i32| wg.rows_of(|r| first.wrapping_sub(r as i32) as f32);
        // Columns count from the edge with the smallest distances, because the largest weights are there: the sum of
        // the value of the row and that of the column must not cancel.
        let (slope, missing, rows) = match *sign {
            Sign::Mixed => {
                wg.subtract_distances(x, rows(*first), slope);
                return wg.rows(0.0);
            }
            Sign::Negative => {
                let last = 8 * N8 as i32 - 1;
                (slope, wg.add_columns(x, slope, Edge::Last), rows(first.wrapping_add(last)))
            }
            Sign::Positive => (-slope, wg.add_columns(x, -slope, Edge::First), rows(*first)),
        };
        wg.zip(rows, missing, |row, missing| W::fma(row, slope, missing))
    }
}

impl Score for Shaped {
    #[cfg(not(target_arch = "nvptx64"))]
    const CONSTANTS: &'static [ConstantPlace] = &[
        ConstantPlace { bit: Constants::CAP, offset: offset_of!(Shaped, has_cap) as u32 },
        ConstantPlace { bit: Constants::ALIBI, offset: offset_of!(Shaped, has_slopes) as u32 },
    ];

    #[inline(always)]
    fn unit(&self) -> f32 {
        self.unit
    }

    #[inline(always)]
    fn is_curved(&self) -> bool {
        self.has_cap.get()
    }
    #[inline(always)]
    fn curve<W: Warpgroup, const N8: usize>(&self, wg: &W, x: &mut W::Acc<N8>) {
        if self.has_cap.get() {
            wg.tanh(x, self.inner);
        }
    }
    /// The derivative of tanh is 1 − tanh².
    #[inline(always)]
    fn derivative<W: Warpgroup>(x: f32) -> f32 {
        W::fma(-x, x, 1.0)
    }

    #[inline(always)]
    fn of_head<W: Warpgroup>(&self, wg: &W, batch: u32, head: u32) -> Option<f32> {
        if self.has_slopes.get() { Some(wg.read_f32(self.slopes.of(batch, head))) } else { None }
    }
    #[inline(always)]
    fn bias<W: Warpgroup, const N8: usize>(
        &self,
        wg: &W,
        x: &mut W::Acc<N8>,
        of_head: Option<f32>,
        distances: &Distances,
    ) -> Option<W::Rows> {
        match of_head {
            Some(slope) => Some(self.subtract_distances(wg, x, slope, distances)),
            None => None,
        }
    }
}
