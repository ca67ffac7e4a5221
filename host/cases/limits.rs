//! Whether a case is beyond the limit of a result.

use super::Case;
use crate::dropout::Dropout;
use crate::element::Element;
use crate::error::Result;
use crate::plan::Options;
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
        let (problem, shaping) = (&self.problem, self.shaping());
        if !may_exceed(problem, self.mask, lse, limit) {
            return Ok(None);
        }
        // Dropout is not in the LSE.
        let options = Options { dropout: Dropout::NONE.into(), ..self.options() };
        let exact = forward_f64(problem, &options, scores, v, shaping.inputs(), &Rows::All)?;
        Ok(Beyond::of(results, largest_lse(&exact.lse), limit))
    }
}
