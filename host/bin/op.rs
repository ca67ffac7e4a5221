//! The passes that a command can run, and what each costs.

use clap::ValueEnum;
use ferroflash::cases::CaseLengths;
use ferroflash::{Attention, Determinism, Mask, Operand, Piecewise, Problem, Result};

use crate::shaping::Shaping;

/// What to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OpName {
    Forward,
    Backward,
    /// Two pairs of Q and K, by distance.
    Piecewise,
    PiecewiseBackward,
    TotalAttention,
}

impl OpName {
    pub fn name(self) -> &'static str {
        match self {
            OpName::Forward => "forward",
            OpName::Backward => "backward",
            OpName::Piecewise => "piecewise",
            OpName::PiecewiseBackward => "piecewise-backward",
            OpName::TotalAttention => "total-attention",
        }
    }

    /// Whether it computes gradients.
    pub fn is_backward(self) -> bool {
        matches!(self, OpName::Backward | OpName::PiecewiseBackward)
    }

    /// Whether it has two pairs of Q and K.
    pub fn is_piecewise(self) -> bool {
        matches!(self, OpName::Piecewise | OpName::PiecewiseBackward)
    }

    /// How it was asked to run, where it can run in more than one way.
    pub fn determinism(self, asked: Determinism) -> Option<Determinism> {
        self.is_backward().then_some(asked)
    }

    /// The probability that it drops a weight, where it drops any.
    pub fn dropout(self, asked: f32) -> Option<f32> {
        (asked > 0.0 && self != OpName::TotalAttention).then_some(asked)
    }

    /// Its name in a table, for people.
    pub fn title(self, determinism: Determinism, dropout: f32, shaping: &Shaping) -> String {
        let mut title = self.name().to_owned();
        if self.determinism(determinism) == Some(Determinism::Exact) {
            title += " exact";
        }
        if let Some(dropout) = self.dropout(dropout) {
            title += &format!(" dropout {dropout}");
        }
        shaping.add_to(&mut title);
        title
    }

    /// Plans it, for whatever machine; the bytes of workspace that it needs.
    ///
    /// # Errors
    /// Those of the plan: shapes that can't be.
    pub fn workspace_bytes(self, attention: &Attention) -> Result<usize> {
        // Any threshold has the same.
        let piecewise = Piecewise::new(*attention, 0);
        Ok(match self {
            OpName::Forward => attention.plan(1)?.workspace_bytes(),
            OpName::Backward => attention.plan_backward(1)?.workspace_bytes(),
            OpName::Piecewise => piecewise.plan(1)?.workspace_bytes(),
            OpName::PiecewiseBackward => piecewise.plan_backward(1)?.workspace_bytes(),
            OpName::TotalAttention => attention.plan_total_attention(1)?.workspace_bytes(),
        })
    }

    /// The tensors that it reads and writes, but for the LSE, with their sizes in bytes.
    pub fn tensors(self, problem: &Problem) -> Vec<(Operand, u128)> {
        let bytes = |shape: [usize; 4]| shape.iter().fold(2u128, |bytes, &extent| bytes.saturating_mul(extent as u128));
        let (q, kv) = (bytes(problem.q_shape()), bytes(problem.kv_shape()));
        let mut tensors = vec![(Operand::Q, q), (Operand::K, kv)];
        if self == OpName::TotalAttention {
            let total = (problem.total_len() as u128).saturating_mul(size_of::<f32>() as u128);
            tensors.push((Operand::Total, total));
            return tensors;
        }
        tensors.extend([(Operand::V, kv), (Operand::O, q)]);
        if self.is_piecewise() {
            tensors.extend([(Operand::Q2, q), (Operand::K2, kv)]);
        }
        if self == OpName::PiecewiseBackward {
            tensors.extend([(Operand::Dq2, q), (Operand::Dk2, kv)]);
        }
        if self.is_backward() {
            tensors.extend([(Operand::DO, q), (Operand::Dq, q), (Operand::Dk, kv), (Operand::Dv, kv)]);
        }
        tensors
    }

    /// Bytes of all of them.
    pub fn tensor_bytes(self, problem: &Problem) -> u128 {
        self.tensors(problem).into_iter().map(|(_, bytes)| bytes).sum()
    }

    /// Bytes that it must move at least: each tensor once, and the LSE.
    pub fn bytes(self, problem: &Problem) -> f64 {
        self.tensor_bytes(problem) as f64 + 4.0 * problem.lse_len() as f64
    }

    /// Floating-point operations by the field's convention: the backward pass has five products where the forward pass
    /// has two, total attention has one. Piecewise attention counts as plain attention does, each score once.
    pub fn flops(self, problem: &Problem, mask: Mask, lengths: Option<CaseLengths>) -> f64 {
        let forward = match lengths {
            None => problem.flops_forward(mask),
            Some(lengths) => lengths.problems(*problem).map(|problem| problem.flops_forward(mask)).sum(),
        };
        match self {
            OpName::Forward | OpName::Piecewise => forward,
            OpName::Backward | OpName::PiecewiseBackward => 2.5 * forward,
            OpName::TotalAttention => 0.5 * forward,
        }
    }
}

#[cfg(test)]
mod tests {
    use ferroflash::Dtype;

    use super::*;

    #[test]
    fn costs_follow_the_convention() {
        let problem = Problem {
            batch: 2,
            heads_q: 6,
            heads_kv: 2,
            seqlen_q: 100,
            seqlen_k: 300,
            head_dim: 64,
            dtype: Dtype::F16,
        };
        let (q, kv, lse) = (2 * 6 * 100 * 64 * 2, 2 * 2 * 300 * 64 * 2, 2 * 6 * 100 * 4);
        assert_eq!(OpName::Forward.bytes(&problem), problem.bytes_forward());
        assert_eq!(OpName::Backward.bytes(&problem), (4 * q + 4 * kv + lse) as f64);
        assert_eq!(OpName::Piecewise.bytes(&problem), problem.bytes_forward() + (q + kv) as f64);
        assert_eq!(OpName::PiecewiseBackward.bytes(&problem), (6 * q + 6 * kv + lse) as f64);
        let total = 2 * 6 * 300 * 4;
        assert_eq!(OpName::TotalAttention.bytes(&problem), (q + kv + lse + total) as f64);
        for mask in [Mask::None, Mask::Causal] {
            assert_eq!(OpName::TotalAttention.flops(&problem, mask, None), 0.5 * problem.flops_forward(mask));
            assert_eq!(OpName::Forward.flops(&problem, mask, None), problem.flops_forward(mask));
            let two = Some(CaseLengths::new(vec![[50, 150], [50, 150]]));
            assert_eq!(OpName::Forward.flops(&problem, mask, two), problem.flops_forward(mask) / 4.0);
            assert_eq!(OpName::Backward.flops(&problem, mask, None), 2.5 * problem.flops_forward(mask));
        }
    }
}
