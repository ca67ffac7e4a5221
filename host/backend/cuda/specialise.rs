//! The choice between the general form of a kernel, which is there at once, and a specialised one, which is faster.

use std::time::Duration;

use super::modules::Loaded;
use super::{Constants, Cuda};
use crate::error::Result;
use crate::plan::Plan;

/// Time at which a backend compiles a kernel specialised to a plan, if the build holds no such form.
///
/// A specialised kernel has one combination of features, such as one kind of mask, and is up to 4 % faster than the
/// general one, which reads from its launch parameter what it has to do. A build holds the general form of each kernel
/// and the specialised ones of common combinations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Specialise {
    /// On request alone, by [`Cuda::load`] and the functions like it. Other calls use the general form. They wait for a
    /// compiler only if the build holds no machine code that the driver takes.
    #[default]
    Prebuilt,
    /// At the first use of a combination. The driver's compiler needs about a second for it.
    AtFirstUse,
    /// Never, not even if the build holds a specialised form: the general form runs. It is there to compare the two.
    Never,
}

impl Cuda {
    /// Returns the same device and stream, with another choice of when to compile specialised kernels. Kernels that
    /// another [`Cuda`] of the device has loaded are used by all of them.
    ///
    /// ```no_run
    /// use ferroflash::cuda::{Cuda, Specialise};
    ///
    /// let cuda = Cuda::new(0)?.specialise(Specialise::AtFirstUse);
    /// # Ok::<(), ferroflash::Error>(())
    /// ```
    #[must_use]
    pub fn specialise(self, when: Specialise) -> Self {
        Cuda { specialise: when, ..self }
    }

    /// Returns the kernel of this name, loaded in the best form for `constants`. The device's context is current.
    pub(super) fn kernel(
        &self,
        symbol: &'static str,
        constants: Constants,
        smem_bytes: u32,
        policy: Specialise,
    ) -> Result<&Loaded> {
        let device = self.device();
        device.modules.get(device.calls(), symbol, constants, smem_bytes, policy)
    }

    /// Loads a plan's kernel before its first launch, specialised to the plan. If the build does not hold that form,
    /// the driver compiles it, in about a second. Later launches with the same features use it. Returns the time that
    /// loading took when it happened.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver).
    pub fn load(&self, plan: &Plan) -> Result<Duration> {
        let _entered = self.device().enter()?;
        let (symbol, policy) = (plan.variant().symbol, Specialise::AtFirstUse);
        let of_kernel = self.kernel(symbol, plan.constants(), plan.smem_bytes(), policy)?.load_time;
        Ok(of_kernel + self.load_schedule(plan.schedule.as_ref())?)
    }
}
