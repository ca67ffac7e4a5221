//! End of a work tile: normalises O, and stores it and the LSE.

use super::dropping::Dropping;
use super::softmax::Softmax;
use crate::arch::ForwardWarpgroup;
use crate::ground::places::WorkTile;
use crate::params::ForwardParams;

/// Stores this warpgroup's rows of O and LSE. Rows without a valid key get O = 0 and LSE = −∞, whatever V holds.
#[inline(always)]
pub fn store<W: ForwardWarpgroup, S, R: Dropping, const D8: usize>(
    wg: &mut W,
    p: &ForwardParams<W::Tensor, S>,
    tile: &WorkTile,
    mut o: W::Acc<D8>,
    softmax: Softmax<W>,
    dropping: R,
) {
    let (normaliser, lse) = softmax.finish(wg);
    let normaliser = dropping.scale_factors(wg, normaliser);
    wg.map_rows(&mut o, normaliser, |o, r| if r == 0.0 { 0.0 } else { o * r });
    wg.store(&o, &p.o, tile, &p.shape);
    if p.lse != 0 {
        wg.store_rows(lse, p.lse, tile, &p.shape);
    }
}
