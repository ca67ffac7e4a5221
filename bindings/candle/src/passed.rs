//! A gradient that one operation of a call leaves for another.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, ThreadId};

use candle_core::Tensor;

/// A gradient of each backward pass that has reached one operation and not the other. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct Passed(Arc<Mutex<Vec<(ThreadId, Tensor)>>>);

impl Passed {
    /// Takes the gradient that this thread's backward pass has left.
    pub(crate) fn take(&self) -> Option<Tensor> {
        let mut gradients = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let place = gradients.iter().position(|(thread, _)| *thread == thread::current().id())?;
        Some(gradients.swap_remove(place).1)
    }

    /// Leaves the gradient of this thread's backward pass.
    pub(crate) fn leave(&self, gradient: Tensor) {
        // If an earlier pass failed, its gradient is still here.
        drop(self.take());
        let mut gradients = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        gradients.push((thread::current().id(), gradient));
    }
}
