//! Stand-in for [`gpu`](crate::gpu) in builds without the feature `cuda`: there is no GPU to open.

use ferroflash::{
    BackwardPlan, Dropout, Error, Plan, Problem, RawBackward, RawForward, RawTotalAttention, Result, TotalPlan,
};

/// No value.
#[derive(Clone, Copy)]
pub enum Gpu {}

#[allow(unsafe_code)]
impl Gpu {
    pub fn open(ordinal: u32) -> Result<Self> {
        let reason = format!("device {ordinal} was asked for, and this build of ferroflash has no GPU kernels");
        Err(Error::NoDevice { reason })
    }

    pub fn sm_count(self) -> u32 {
        match self {}
    }

    /// # Safety
    /// None: it is never called.
    pub unsafe fn forward(self, _: &Plan, _: &RawForward, _: usize) -> Result<()> {
        match self {}
    }

    /// # Safety
    /// None: it is never called.
    pub unsafe fn backward(self, _: &BackwardPlan, _: &RawBackward, _: usize) -> Result<()> {
        match self {}
    }

    /// # Safety
    /// None: it is never called.
    pub unsafe fn total_attention(self, _: &TotalPlan, _: &RawTotalAttention, _: usize) -> Result<()> {
        match self {}
    }

    /// # Safety
    /// None: it is never called.
    pub unsafe fn dropout_mask(self, _: &Problem, _: &Dropout, _: u64, _: usize) -> Result<()> {
        match self {}
    }
}

pub fn device_count() -> u32 {
    0
}

pub fn kernel_count() -> usize {
    0
}
