//! Plans that are kept between calls, for callers that hold none themselves.
//!
//! A plan is a pure function of the attention and the machine's size, so a call that was planned before has the same
//! plan. Only the random numbers of dropout differ from call to call, and they are no reason to plan again.

use std::sync::{Mutex, PoisonError};

use super::{Attention, Piecewise};
use crate::error::Result;
use crate::plan::{BackwardPlan, Plan, TotalPlan};

/// Number of plans of each pass that are kept.
const CAPACITY: usize = 128;

/// The last 128 plans of each pass, found by comparison with what was asked for before.
///
/// It is for bindings, whose functions are called with tensors alone. It can be a static, and threads may share it.
///
/// ```
/// use ferroflash::{Attention, Dtype, Plans, Problem};
///
/// static PLANS: Plans = Plans::new();
///
/// let problem =
///     Problem { batch: 2, heads_q: 8, heads_kv: 2, seqlen_q: 300, seqlen_k: 500, head_dim: 96, dtype: Dtype::F16 };
/// let attention = Attention::new(problem);
/// assert_eq!(PLANS.forward(&attention, 132)?, attention.plan(132)?);
/// # Ok::<(), ferroflash::Error>(())
/// ```
#[derive(Debug)]
pub struct Plans {
    forward: Kept<Plan>,
    backward: Kept<BackwardPlan>,
    total_attention: Kept<TotalPlan>,
}

impl Plans {
    /// Returns an empty collection.
    pub const fn new() -> Self {
        Plans { forward: Kept::new(), backward: Kept::new(), total_attention: Kept::new() }
    }

    /// Returns the plan of [`Attention::plan`].
    ///
    /// # Errors
    /// Errors of [`Attention::plan`].
    pub fn forward(&self, attention: &Attention, sm_count: u32) -> Result<Plan> {
        let plan = self.forward.get(Key::of(attention, None, sm_count), |key| key.attention.plan(sm_count))?;
        plan.with_random_numbers_of(attention.dropout)
    }

    /// Returns the plan of [`Attention::plan_backward`].
    ///
    /// # Errors
    /// Errors of [`Attention::plan_backward`].
    pub fn backward(&self, attention: &Attention, sm_count: u32) -> Result<BackwardPlan> {
        let key = Key::of(attention, None, sm_count);
        let plan = self.backward.get(key, |key| key.attention.plan_backward(sm_count))?;
        plan.with_random_numbers_of(attention.dropout)
    }

    /// Returns the plan of [`Attention::plan_total_attention`].
    ///
    /// # Errors
    /// Errors of [`Attention::plan_total_attention`].
    pub fn total_attention(&self, attention: &Attention, sm_count: u32) -> Result<TotalPlan> {
        let key = Key::of(attention, None, sm_count);
        self.total_attention.get(key, |key| key.attention.plan_total_attention(sm_count))
    }

    /// Returns the plan of [`Piecewise::plan`].
    ///
    /// # Errors
    /// Errors of [`Piecewise::plan`].
    pub fn piecewise(&self, piecewise: &Piecewise, sm_count: u32) -> Result<Plan> {
        let Piecewise { attention, dist_threshold } = piecewise;
        let key = Key::of(attention, Some(*dist_threshold), sm_count);
        let plan = self.forward.get(key, |key| Piecewise::new(key.attention, *dist_threshold).plan(sm_count))?;
        plan.with_random_numbers_of(attention.dropout)
    }

    /// Returns the plan of [`Piecewise::plan_backward`].
    ///
    /// # Errors
    /// Errors of [`Piecewise::plan_backward`].
    pub fn piecewise_backward(&self, piecewise: &Piecewise, sm_count: u32) -> Result<BackwardPlan> {
        let Piecewise { attention, dist_threshold } = piecewise;
        let key = Key::of(attention, Some(*dist_threshold), sm_count);
        let plan =
            self.backward.get(key, |key| Piecewise::new(key.attention, *dist_threshold).plan_backward(sm_count))?;
        plan.with_random_numbers_of(attention.dropout)
    }
}

impl Default for Plans {
    fn default() -> Self {
        Self::new()
    }
}

/// Everything that a plan depends on, without the seed and offset of dropout.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Key {
    attention: Attention,
    dist_threshold: Option<i32>,
    sm_count: u32,
}

impl Key {
    fn of(attention: &Attention, dist_threshold: Option<i32>, sm_count: u32) -> Self {
        let attention = attention.dropout(attention.dropout.without_numbers());
        Key { attention, dist_threshold, sm_count }
    }
}

/// The last plans of one pass, the most recently used first.
#[derive(Debug)]
struct Kept<P> {
    plans: Mutex<Vec<(Key, P)>>,
}

impl<P: Copy> Kept<P> {
    const fn new() -> Self {
        Kept { plans: Mutex::new(Vec::new()) }
    }

    /// Returns the plan of `key`, which is made if it is not there. Errors are not kept.
    fn get(&self, key: Key, make: impl FnOnce(&Key) -> Result<P>) -> Result<P> {
        let lock = || self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let mut plans = lock();
        if let Some(place) = plans.iter().position(|(kept, _)| *kept == key) {
            // Plans in front of it move back by one.
            plans[..=place].rotate_right(1);
            return Ok(plans[0].1);
        }
        drop(plans);
        // Other threads find their plans while this one is made.
        let plan = make(&key)?;
        let mut plans = lock();
        plans.truncate(CAPACITY - 1);
        plans.insert(0, (key, plan));
        Ok(plan)
    }
}

#[cfg(test)]
mod tests {
    use kernels_gpu::variants::Dtype;

    use super::*;
    use crate::dropout::Dropout;
    use crate::plan::Determinism;
    use crate::problem::{Mask, Problem};

    fn attention(seqlen: usize) -> Attention {
        Attention::new(Problem {
            batch: 2,
            heads_q: 4,
            heads_kv: 2,
            seqlen_q: seqlen,
            seqlen_k: seqlen,
            head_dim: 64,
            dtype: Dtype::F16,
        })
    }

    /// Kept plans equal new ones, whatever was asked for before.
    #[test]
    fn plans_are_those_of_the_attention() {
        let plans = Plans::new();
        for _ in 0..2 {
            for seqlen in [0, 100, 1000] {
                for mask in [Mask::None, Mask::Causal, Mask::Window { left: Some(3), right: Some(0) }] {
                    for p in [0.0, 0.25] {
                        for (seed, sm_count) in [(1, 7), (2, 132)] {
                            let dropout = Dropout { p, seed, offset: 4 * seed };
                            let attention = attention(seqlen).mask(mask).dropout(dropout).scale(0.5);
                            let exact = attention.determinism(Determinism::Exact);
                            let piecewise = Piecewise::new(attention, 9);
                            assert_eq!(plans.forward(&attention, sm_count), attention.plan(sm_count));
                            assert_eq!(plans.backward(&attention, sm_count), attention.plan_backward(sm_count));
                            assert_eq!(plans.backward(&exact, sm_count), exact.plan_backward(sm_count));
                            assert_eq!(plans.piecewise(&piecewise, sm_count), piecewise.plan(sm_count));
                            assert_eq!(
                                plans.piecewise_backward(&piecewise, sm_count),
                                piecewise.plan_backward(sm_count)
                            );
                            assert_eq!(
                                plans.total_attention(&attention, sm_count),
                                attention.plan_total_attention(sm_count)
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn seeds_share_a_plan_and_old_plans_go() {
        let plans = Plans::new();
        for seed in 0..10 {
            plans.forward(&attention(10).dropout(Dropout { p: 0.5, seed, offset: 0 }), 1).unwrap();
        }
        let kept = || plans.forward.plans.lock().unwrap().len();
        assert_eq!(kept(), 1);
        for seqlen in 0..2 * CAPACITY {
            plans.forward(&attention(seqlen), 1).unwrap();
        }
        assert_eq!(kept(), CAPACITY);
    }

    #[test]
    fn errors_are_not_kept() {
        let plans = Plans::new();
        for _ in 0..2 {
            assert!(plans.forward(&attention(10).scale(f32::NAN), 1).is_err());
        }
        assert!(plans.forward.plans.lock().unwrap().is_empty());
    }
}
