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
    optional,
    passed::Passed,
    shapes,
};

/// Plans of all calls.
static PLANS: ff::Plans = ff::Plans::new();

/// The forward pass of one call.
pub(crate) struct Forward {
    /// The computation, for optional inputs of these kinds.
    pub(crate) attention: ff::Attention,
    /// Slopes and sinks, contiguous.
    pub(crate) optional: ff::OptionalInputs<Tensor>,
    /// `None` if neither a backward pass nor the caller needs the LSE.
    pub(crate) lse: Option<Lse>,
    /// Place for the gradient of the sinks, if they need one.
    pub(crate) d_sinks: Option<Passed>,
}

impl Forward {
    fn run<M: Machine>(&self, machine: &M, inputs: [Source<'_, M::Storage>; 3]) -> Result<(M::Storage, Shape)> {
        let plan = PLANS.forward(&self.attention, machine.sm_count()).map_err(Error::wrap)?;
        let shape = inputs[0].layout.shape().clone();
        let optional = optional::try_map(&self.optional, |tensor| Ok(tensor.storage_and_layout()))?;
        let optional = optional::try_map(&optional, Source::of::<M>)?;
        let (o, lse) = machine::forward(machine, &plan, inputs, optional, self.lse.is_some())?;
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
            forward: self,
            o,
            // The gradient of a sum is one number in every place, with a stride of 0 in the last dim too.
            d_o: shapes::taken(d_o, ff::Operand::DO)?,
            lse: lse.get()?,
            d_lse: lse.take_gradient(),
            others: Cell::new(None),
        };
        let dq = q.apply_op3_no_bwd(k, v, &backward)?;
        let Some(Others { dk, dv, d_sinks }) = backward.others.take() else { bail!("there was no backward pass") };
        if let (Some(place), Some(d_sinks)) = (&self.d_sinks, d_sinks) {
            place.leave(d_sinks);
        }
        Ok((Some(dq), Some(dk), Some(dv)))
    }
}

/// A backward pass as an operation on Q, K and V, which gives dQ.
///
/// candle locks the three together even if they are parts of one tensor. The other inputs are of another dtype or
/// results of operations, and have memory of their own.
struct Backward<'a> {
    forward: &'a Forward,
    o: &'a Tensor,
    d_o: Tensor,
    lse: &'a Tensor,
    d_lse: Option<Tensor>,
    /// The other gradients, once they are computed.
    others: Cell<Option<Others>>,
}

/// The gradients except dQ.
struct Others {
    dk: Tensor,
    dv: Tensor,
    d_sinks: Option<Tensor>,
}

impl Backward<'_> {
    fn run<M: Machine>(&self, machine: &M, [q, k, v]: [Source<'_, M::Storage>; 3]) -> Result<(M::Storage, Shape)> {
        let Forward { attention, optional, d_sinks, .. } = self.forward;
        let plan = PLANS.backward(attention, machine.sm_count()).map_err(Error::wrap)?;
        let o = self.o.storage_and_layout();
        let d_o = self.d_o.storage_and_layout();
        let lse = self.lse.storage_and_layout();
        let d_lse = self.d_lse.as_ref().map(Tensor::storage_and_layout);
        let optional = optional::try_map(optional, |tensor| Ok(tensor.storage_and_layout()))?;
        let inputs = machine::Inputs {
            q,
            k,
            v,
            o: Source::of::<M>(&o)?,
            d_o: Source::of::<M>(&d_o)?,
            lse: Source::of::<M>(&lse)?,
            d_lse: d_lse.as_ref().map(Source::of::<M>).transpose()?,
            optional: optional::try_map(&optional, Source::of::<M>)?,
        };
        let Gradients { dq, dk, dv, d_sinks } = machine::backward(machine, &plan, inputs, d_sinks.is_some())?;
        self.others.set(Some(Others {
            dk: leaf(M::wrap(dk), k.layout.shape()),
            dv: leaf(M::wrap(dv), v.layout.shape()),
            d_sinks: d_sinks.map(|d_sinks| leaf(M::wrap(d_sinks), plan.problem().heads_q)),
        }));
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
