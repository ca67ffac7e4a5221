//! Whether a case is beyond the limit of a result.

use super::Case;
use crate::dropout::Dropout;
use crate::element::Element;
use crate::error::Result;
use crate::reference::{Beyond, Rows, Scores, forward_f64, largest_lse, may_exceed};
use crate::tensor::Tensor;

impl Case {
    /// Returns the results as beyond `limit` if the largest exact |LSE| is. The exact LSE is computed only if `lse`,
    /// the machine's own, leaves that open.
    pub(super) fn beyond<E: Element>(
        &self,
        results: &'static str,
        limit: f64,
        lse: &[f32],
        scores: Scores<Tensor<&[E]>>,
        v: Tensor<&[E]>,
    ) -> Result<Option<Beyond>> {
        let (problem, mask, scale) = (&self.problem, self.mask, self.effective_scale());
        if !may_exceed(problem, mask, lse, limit) {
            return Ok(None);
        }
        // Dropout is not in the LSE.
        let exact = forward_f64(problem, mask, scale, &Dropout::NONE, scores, v, &Rows::All)?;
        Ok(Beyond::of(results, largest_lse(&exact.lse), limit))
    }
}
