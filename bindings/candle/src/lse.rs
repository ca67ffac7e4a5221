//! The LSE of one call: kept for the backward pass, and a second result with a gradient of its own.
//!
//! An operation of candle has one result. So the LSE is the result of a second operation, [`Returned`], whose argument
//! is O. candle runs its backward pass before that of O. It leaves the LSE's gradient here, where O's backward pass
//! finds it, and passes O a gradient of zeros, so that O's backward pass runs even if nothing else depends on O.

use std::sync::{Arc, OnceLock};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, backend::BackendStorage, bail};

use crate::{
    machine::{CpuMachine, Machine},
    passed::Passed,
};

/// Shared by the operations of one call.
#[derive(Clone, Default)]
pub(crate) struct Lse(Arc<Kept>);

#[derive(Default)]
struct Kept {
    lse: OnceLock<Tensor>,
    /// The LSE's gradient in a backward pass that has not reached O yet.
    gradient: Passed,
}

impl Lse {
    /// Keeps the LSE of the forward pass.
    pub(crate) fn set(&self, lse: Tensor) -> Result<()> {
        self.0.lse.set(lse).or_else(|_| bail!("the operation of one call was used twice"))
    }

    /// Returns the LSE of the forward pass.
    pub(crate) fn get(&self) -> Result<&Tensor> {
        match self.0.lse.get() {
            Some(lse) => Ok(lse),
            None => bail!("there was no forward pass, so there is no LSE"),
        }
    }

    /// Takes the gradient that this thread's backward pass has left.
    pub(crate) fn take_gradient(&self) -> Option<Tensor> {
        self.0.gradient.take()
    }

    /// Returns the LSE of the call that gave `o`, with a gradient if `o` has one.
    pub(crate) fn of(&self, o: &Tensor) -> Result<Tensor> {
        if o.track_op() { o.apply_op1(Returned(self.clone())) } else { self.get().cloned() }
    }
}

/// The operation whose argument is O, and whose result is the LSE.
struct Returned(Lse);

impl Returned {
    fn copy<M: Machine>(&self) -> Result<(M::Storage, Shape)> {
        let (storage, layout) = self.0.get()?.storage_and_layout();
        Ok((M::storage(&storage)?.try_clone(layout)?, layout.shape().clone()))
    }
}

impl CustomOp1 for Returned {
    fn name(&self) -> &'static str {
        "ferroflash-lse"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.copy::<CpuMachine>()
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.copy::<crate::machine::CudaMachine>()
    }

    fn bwd(&self, o: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        self.0.0.gradient.leave(gradient.contiguous()?);
        o.zeros_like().map(Some)
    }
}
