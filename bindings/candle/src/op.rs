//! Attention as operations of candle: the forward pass, and the backward pass that candle calls for it.

use std::cell::Cell;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, Error, Layout, Result, Shape, Storage, Tensor, bail, op::BackpropOp};
use ferroflash as ff;

#[cfg(feature = "cuda")]
use crate::machine::CudaMachine;
use crate::{
    lse::Lse,
    machine::{self, CpuMachine, Gradients, Machine, Source},
    shapes,
};

/// Plans of all calls.
static PLANS: ff::Plans = ff::Plans::new();

/// The forward pass of one call.
pub(crate) struct Forward {
    attention: ff::Attention,
    /// `None` if neither a backward pass nor the caller needs the LSE.
    lse: Option<Lse>,
}

impl Forward {
    pub(crate) fn new(attention: ff::Attention, lse: Option<Lse>) -> Self {
        Forward { attention, lse }
    }

    fn run<M: Machine>(&self, machine: &M, inputs: [Source<'_, M::Storage>; 3]) -> Result<(M::Storage, Shape)> {
        let plan = PLANS.forward(&self.attention, machine.sm_count()).map_err(Error::wrap)?;
        let shape = inputs[0].layout.shape().clone();
        let (o, lse) = machine::forward(machine, &plan, inputs, self.lse.is_some())?;
        if let (Some(kept), Some(lse)) = (&self.lse, lse) {
            let [batch, heads, seqlen, _] = plan.problem().q_shape();
            kept.set(leaf(M::wrap(lse), (batch, heads, seqlen)))?;
        }
        Ok((o, shape))
    }
}

impl CustomOp3 for Forward {
    fn name(&self) -> &'static str {
        "ferroflash"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.run(&CpuMachine, [Source::new(q, q_layout), Source::new(k, k_layout), Source::new(v, v_layout)])
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let machine = CudaMachine::new(&q.device)?;
        self.run(&machine, [Source::new(q, q_layout), Source::new(k, k_layout), Source::new(v, v_layout)])
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        o: &Tensor,
        d_o: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(lse) = &self.lse else { bail!("the forward pass kept no LSE, because no argument was tracked") };
        let backward = Backward {
            attention: &self.attention,
            o,
            // The gradient of a sum is one number in every place, with a stride of 0 in the last dim too.
            d_o: shapes::taken(d_o, ff::Operand::DO)?,
            lse: lse.get()?,
            d_lse: lse.take_gradient(),
            others: Cell::new(None),
        };
        let dq = q.apply_op3_no_bwd(k, v, &backward)?;
        let (dk, dv) = backward.others.take().unzip();
        Ok((Some(dq), dk, dv))
    }
}

/// A backward pass as an operation on Q, K and V, which gives dQ.
///
/// candle locks the three together even if they are parts of one tensor. The other inputs are results of operations,
/// and have memory of their own.
struct Backward<'a> {
    attention: &'a ff::Attention,
    o: &'a Tensor,
    d_o: Tensor,
    lse: &'a Tensor,
    d_lse: Option<Tensor>,
    /// dK and dV, once they are computed.
    others: Cell<Option<(Tensor, Tensor)>>,
}

impl Backward<'_> {
    fn run<M: Machine>(&self, machine: &M, [q, k, v]: [Source<'_, M::Storage>; 3]) -> Result<(M::Storage, Shape)> {
        let plan = PLANS.backward(self.attention, machine.sm_count()).map_err(Error::wrap)?;
        let (o, o_layout) = self.o.storage_and_layout();
        let (d_o, d_o_layout) = self.d_o.storage_and_layout();
        let (lse, lse_layout) = self.lse.storage_and_layout();
        let d_lse = self.d_lse.as_ref().map(Tensor::storage_and_layout);
        let inputs = machine::Inputs {
            q,
            k,
            v,
            o: Source::new(M::storage(&o)?, o_layout),
            d_o: Source::new(M::storage(&d_o)?, d_o_layout),
            lse: Source::new(M::storage(&lse)?, lse_layout),
            d_lse: match &d_lse {
                Some((storage, layout)) => Some(Source::new(M::storage(storage)?, layout)),
                None => None,
            },
        };
        let Gradients { dq, dk, dv } = machine::backward(machine, &plan, inputs)?;
        let tensor = |gradient, like: Source<'_, _>| leaf(M::wrap(gradient), like.layout.shape());
        self.others.set(Some((tensor(dk, k), tensor(dv, v))));
        Ok((dq, q.layout.shape().clone()))
    }
}

impl CustomOp3 for Backward<'_> {
    fn name(&self) -> &'static str {
        "ferroflash-backward"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.run(&CpuMachine, [Source::new(q, q_layout), Source::new(k, k_layout), Source::new(v, v_layout)])
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let machine = CudaMachine::new(&q.device)?;
        self.run(&machine, [Source::new(q, q_layout), Source::new(k, k_layout), Source::new(v, v_layout)])
    }
}

/// Returns a contiguous tensor that depends on nothing.
fn leaf(storage: Storage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}
