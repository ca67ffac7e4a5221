//! The rule that turns products of queries and keys into scores: scale, softcap and ALiBi; and the sink of a head.

use std::ops::Range;

use super::forward::{Real, dot};
use crate::operands::{OptionalInputs, Slopes};
use crate::plan::Plan;

/// Scale and softcap of an attention, and slope and sink of a query head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule<R> {
    pub(super) scale: R,
    cap: Option<R>,
    slope: Option<R>,
    pub(super) sink: Option<R>,
    /// seqlen_k − seqlen_q, which with a query gives its place among the keys.
    offset: i64,
}

/// A score, and its derivative by scale·q·k.
pub(super) struct Score<R> {
    pub(super) value: R,
    pub(super) derivative: R,
}

impl<R: Real> Rule<R> {
    /// Returns the rule of a batch item's query head.
    pub(super) fn new(plan: &Plan, optional: &OptionalInputs<&[f32]>, batch: usize, head: usize) -> Self {
        let problem = plan.problem();
        let slope = optional.slopes.map(|slopes| match slopes {
            Slopes::PerHead(slopes) => slopes[head],
            Slopes::PerItem(slopes) => slopes[batch * problem.heads_q + head],
        });
        Rule {
            scale: R::from_f32(plan.scale()),
            cap: plan.options().softcap.map(R::from_f32),
            slope: slope.map(R::from_f32),
            sink: optional.sinks.map(|sinks| R::from_f32(sinks[head])),
            offset: problem.seqlen_k as i64 - problem.seqlen_q as i64,
        }
    }

    /// Returns the scores of query `i` with `keys`, of which `k` has the rows.
    pub(super) fn scores<'a>(
        &'a self,
        q: &'a [R],
        k: &'a [R],
        i: usize,
        keys: &Range<usize>,
    ) -> impl Iterator<Item = Score<R>> + use<'a, R> {
        k.chunks_exact(q.len()).zip(keys.clone()).map(move |(k, j)| {
            let (mut value, mut derivative) = (self.scale * dot(q, k), R::from_f32(1.0));
            if let Some(cap) = self.cap {
                let bounded = (value / cap).tanh();
                value = cap * bounded;
                derivative = derivative - bounded * bounded;
            }
            if let Some(slope) = self.slope {
                let distance = (i as i64 + self.offset - j as i64).unsigned_abs();
                value = value - slope * R::from_f32(distance as f32);
            }
            Score { value, derivative }
        })
    }

    /// Turns the scores of a row into weights, which are the row's softmax with the sink. Returns the LSE. Without
    /// scores and without a sink it is −∞.
    pub(super) fn softmax(&self, p: &mut [R]) -> R {
        let (m, l) = self.exponents(p);
        p.iter_mut().for_each(|p| *p = *p / l);
        let mut lse = m;
        lse += l.ln();
        lse
    }

    /// Turns the scores of a row into exponentials of their differences from a maximum. Returns the maximum and the
    /// sum, in which the sink counts too.
    fn exponents(&self, p: &mut [R]) -> (R, R) {
        let start = self.sink.unwrap_or(R::NEG_INFINITY);
        let m = p.iter().fold(start, |m, &s| if s > m { s } else { m });
        let mut l = R::default();
        for p in p {
            *p = (*p - m).exp();
            l += *p;
        }
        if let Some(sink) = self.sink {
            l += (sink - m).exp();
        }
        (m, l)
    }
}
