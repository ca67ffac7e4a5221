//! The gradient of sinks.
//!
//! An operation of candle has at most three arguments, which are Q, K and V. So sinks that need a gradient are an
//! argument of an operation before it, [`Attached`]: its other argument is V, and its result is a copy of V. candle
//! runs its backward pass after that of attention, which has left the gradient of the sinks here.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, backend::BackendStorage, bail};

#[cfg(feature = "cuda")]
use crate::machine::CudaMachine;
use crate::{
    machine::{CpuMachine, Machine},
    passed::Passed,
};

/// Returns a copy of `v` that depends on `sinks`, and the place for the gradient of the sinks.
pub(crate) fn attach(v: &Tensor, sinks: &Tensor) -> Result<(Tensor, Passed)> {
    let gradient = Passed::default();
    Ok((v.apply_op2(sinks, Attached(gradient.clone()))?, gradient))
}

/// The operation whose arguments are V and the sinks, and whose result is a contiguous copy of V.
struct Attached(Passed);

fn copy<M: Machine>(machine: &M, v: &M::Storage, layout: &Layout) -> Result<(M::Storage, Shape)> {
    let shape = layout.shape().clone();
    let mut copy = machine.allocate(shape.elem_count(), v.dtype())?;
    if shape.elem_count() > 0 {
        v.copy_strided_src(&mut copy, 0, layout)?;
    }
    Ok((copy, shape))
}

impl CustomOp2 for Attached {
    fn name(&self) -> &'static str {
        "ferroflash-sinks"
    }

    fn cpu_fwd(&self, v: &CpuStorage, layout: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        copy(&CpuMachine, v, layout)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, v: &CudaStorage, layout: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        copy(&CudaMachine::new(&v.device)?, v, layout)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor, dv: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Some(d_sinks) = self.0.take() else { bail!("the backward pass of attention left no gradient of sinks") };
        Ok((Some(dv.clone()), Some(d_sinks)))
    }
}
