//! End of a work tile: normalises O, and stores it and the LSE.

use super::dropping::Dropping;
use super::features::Features;
use super::softmax::Softmax;
use crate::arch::ForwardWarpgroup;
use crate::ground::places::WorkTile;
use crate::params::ForwardParams;

/// Stores this warpgroup's rows of O and LSE. Rows without a valid key get O = 0, whatever V holds, and
/// LSE = −∞, or the sink if there is one.
#[inline(always)]
pub fn store<W: ForwardWarpgroup, F: Features, const D8: usize>(
    wg: &mut W,
    p: &ForwardParams<W::Tensor, F>,
    tile: &WorkTile,
    mut o: W::Acc<D8>,
    softmax: Softmax<W>,
) {
    let base = &p.base;
    let (normaliser, lse) = if base.sinks.is_none() {
        softmax.finish(wg)
    } else {
        softmax.finish_with_sink(wg, wg.read_f32(base.sinks.of(tile.batch, tile.head)))
    };
    let normaliser = p.features.weights().scale_factors(wg, normaliser);
    wg.map_rows(&mut o, normaliser, |o, r| if r == 0.0 { 0.0 } else { o * r });
    let rows = base.item(tile.batch).q;
    wg.store(&o, &base.o, tile, &rows, base.shape.head_dim);
    if !base.lse.is_none() {
        wg.store_rows(lse, &base.lse, tile, &rows);
    }
}
