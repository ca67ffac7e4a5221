//! Accuracy against f64, with the tolerance of flash-attention's and FlagAttention's own tests.

use super::backward::Backward;
use super::forward::Forward;
use crate::operands::Pair;

/// Added to twice the plain error, so that the tolerance is above 0 if the plain result happens to be exact.
const SLACK: f64 = 1e-5;

/// Maximum error of one result, and that of a plain implementation in the same precision.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Accuracy {
    /// Maximum absolute error. It is infinite if NaN, an infinity, a −∞ or a row of zeros is in a wrong place.
    pub error: f64,
    /// Maximum absolute error of the plain implementation.
    pub plain: f64,
    /// Tolerance: the largest error allowed.
    pub bar: f64,
}

impl Accuracy {
    /// Accuracy of O. The tolerance is twice the plain error + 10⁻⁵. A row without a key must be 0, not nearly 0.
    pub fn of_o(found: &Forward, plain: &Forward, exact: &Forward) -> Self {
        let accuracy = Self::compare(&found.o, &plain.o, &exact.o, SLACK);
        let head_dim = exact.o.len() / exact.lse.len().max(1);
        let mut rows = found.o.chunks(head_dim.max(1)).zip(&exact.lse);
        let stray = rows.any(|(o, &lse)| lse == f64::NEG_INFINITY && o.iter().any(|&x| x != 0.0));
        Accuracy { error: if stray { f64::INFINITY } else { accuracy.error }, ..accuracy }
    }

    /// Accuracy of the LSE. The tolerance is twice the plain error + 10⁻⁵ of the largest LSE, or of 1, which f32
    /// resolves to 6·10⁻⁸.
    pub fn of_lse(found: &Forward, plain: &Forward, exact: &Forward) -> Self {
        let largest = exact.lse.iter().filter(|x| x.is_finite()).fold(1.0f64, |a, x| a.max(x.abs()));
        Self::compare(&found.lse, &plain.lse, &exact.lse, SLACK * largest)
    }

    /// Accuracy of total attention. The tolerance is twice the plain error + 10⁻⁵.
    pub fn of_total(found: &[f64], plain: &[f64], exact: &[f64]) -> Self {
        Self::compare(found, plain, exact, SLACK)
    }

    /// True if the error is within the tolerance.
    pub fn passed(&self) -> bool {
        self.error <= self.bar
    }

    fn compare(found: &[f64], plain: &[f64], exact: &[f64], slack: f64) -> Self {
        let error = largest_error(found, exact);
        let plain = largest_error(plain, exact);
        // If even the plain result is not a number, there is nothing to double.
        let bar = if plain.is_finite() { 2.0 * plain + slack } else { slack };
        Accuracy { error, plain, bar }
    }
}

/// Accuracy of the gradients. If there are two pairs of Q and K, `dq` and `dk` are those of the first.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GradientAccuracy {
    /// Accuracy of dQ.
    pub dq: Accuracy,
    /// Accuracy of dK.
    pub dk: Accuracy,
    /// Accuracy of dV.
    pub dv: Accuracy,
    /// Accuracy of dQ and dK of the second pair, if there is one.
    pub second: Option<Pair<Accuracy>>,
    /// Accuracy of the gradient of the sinks, if there are any.
    pub d_sinks: Option<Accuracy>,
}

impl GradientAccuracy {
    /// Returns the accuracy of each gradient. The tolerance is twice the plain error + 10⁻⁵.
    ///
    /// If every query attends to a single key, the exact dQ and dK are 0, because dP and δ are equal sums. A plain loop
    /// forms them in the same order and gets 0; a machine that forms them in different orders gets f32's rounding of
    /// them. In that case the 10⁻⁵ count in units of `cancelled`, the size of the terms whose difference is 0.
    /// Otherwise `cancelled` is 1.
    ///
    /// The gradient of a sink is a sum in f32 over all rows of a head, in an order of the machine's own. Its 10⁻⁵ count
    /// in units of the sum of the terms' absolute values, which bounds the rounding of a sum, or of 1 if that is
    /// larger.
    pub fn of(found: &Backward, plain: &Backward, exact: &Backward, cancelled: f64) -> Self {
        let compare = |of: fn(&Backward) -> &[f64], slack| Accuracy::compare(of(found), of(plain), of(exact), slack);
        let slack = SLACK * cancelled.max(1.0);
        GradientAccuracy {
            dq: compare(|x| &x.dq, slack),
            dk: compare(|x| &x.dk, slack),
            dv: compare(|x| &x.dv, SLACK),
            second: exact.second.is_some().then(|| Pair {
                q: compare(|x| x.second.as_ref().map_or(&[], |pair| &pair.q), slack),
                k: compare(|x| x.second.as_ref().map_or(&[], |pair| &pair.k), slack),
            }),
            d_sinks: exact
                .d_sinks
                .is_some()
                .then(|| compare(|x| x.d_sinks.as_deref().unwrap_or_default(), SLACK * exact.sink_terms.max(1.0))),
        }
    }

    /// Returns each accuracy with its name. Names of Q and K are numbered if there are two pairs.
    pub fn named(&self) -> Vec<(&'static str, Accuracy)> {
        let mut named = match self.second {
            None => vec![("dQ", self.dq), ("dK", self.dk), ("dV", self.dv)],
            Some(Pair { q, k }) => vec![("dQ1", self.dq), ("dK1", self.dk), ("dQ2", q), ("dK2", k), ("dV", self.dv)],
        };
        named.extend(self.d_sinks.map(|d_sinks| ("dSinks", d_sinks)));
        named
    }

    /// True if every error is within its tolerance.
    pub fn passed(&self) -> bool {
        self.named().iter().all(|(_, accuracy)| accuracy.passed())
    }
}

/// Returns the largest absolute difference. NaN counts as equal to NaN, and an infinity as equal to itself; any other
/// difference that involves them is an infinite error.
fn largest_error(found: &[f64], exact: &[f64]) -> f64 {
    if found.len() != exact.len() {
        return f64::INFINITY;
    }
    found.iter().zip(exact).fold(0.0, |largest, (found, exact)| {
        let same = found == exact || found.is_nan() && exact.is_nan();
        let error = if same { 0.0 } else { (found - exact).abs() };
        if error.is_nan() { f64::INFINITY } else { largest.max(error) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const INF: f64 = f64::INFINITY;

    #[test]
    fn special_values_must_stand_where_they_belong() {
        assert_eq!(largest_error(&[f64::NAN, -INF, 1.0], &[f64::NAN, -INF, 1.5]), 0.5);
        for (found, exact) in [(f64::NAN, 1.0), (1.0, f64::NAN), (INF, 1.0), (0.0, -INF), (INF, -INF)] {
            assert_eq!(largest_error(&[found, 0.0], &[exact, 0.0]), INF, "{found} for {exact}");
        }
        assert_eq!(largest_error(&[], &[1.0]), INF);
    }

    #[test]
    fn the_bar_is_twice_the_plain_error() {
        let forward = |x: f64| Forward { o: vec![x], lse: vec![x] };
        let judge = |found| Accuracy::of_o(&forward(found), &forward(1.25), &forward(1.0));
        assert!(judge(1.5).passed() && judge(0.5).passed());
        assert!(!judge(1.51).passed() && !judge(f64::NAN).passed());
    }

    #[test]
    fn every_gradient_has_its_bar() {
        let piecewise = |x: [f64; 5]| {
            let [dq, dk, dv, q, k] = x.map(|x| vec![x]);
            Backward { dq, dk, dv, second: Some(Pair { q, k }), ..Backward::default() }
        };
        let plain = |x| Backward { second: None, ..piecewise(x) };
        let judge = |of: &dyn Fn([f64; 5]) -> Backward, found| {
            GradientAccuracy::of(&of(found), &of([1.25; 5]), &of([1.0; 5]), 1.0)
        };
        for (of, gradients) in [(&plain as &dyn Fn([f64; 5]) -> Backward, 3), (&piecewise, 5)] {
            assert!(judge(of, [1.5, 0.5, 1.0, 1.5, 0.5]).passed());
            for wrong in [1.51, 0.49, f64::NAN, INF] {
                for i in 0..5 {
                    let mut found = [1.0; 5];
                    found[i] = wrong;
                    let judged = judge(of, found);
                    assert_eq!(judged.passed(), i >= gradients, "{found:?}");
                    assert_eq!(judged.named().len(), gradients);
                }
            }
        }
        let missing = GradientAccuracy::of(&plain([1.0; 5]), &piecewise([1.0; 5]), &piecewise([1.0; 5]), 1.0);
        assert!(!missing.passed());
    }

    #[test]
    fn rows_without_a_key_are_exactly_zero() {
        let forward = |x: f64| Forward { o: vec![1.0, 1.0, x, 0.0], lse: vec![1.0, -INF] };
        let judge = |x| Accuracy::of_o(&forward(x), &forward(0.0), &forward(0.0));
        assert!(judge(0.0).passed() && judge(-0.0).passed());
        assert!(!judge(1e-7).passed());
    }
}
