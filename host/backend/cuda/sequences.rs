//! Sequences of different lengths on the GPU: the launch that writes their schedule, the maps of tensors that they
//! share, and a check of lengths.

use std::time::Duration;

use kernels_gpu::attention::schedule::{SCHEDULE, SCHEDULE_SMEM_BYTES, SCHEDULE_THREADS, ScheduleParams};
use kernels_gpu::ground::constants::Constants;
use kernels_gpu::ground::tensor::TensorMap;
use kernels_gpu::variants::Dtype;

use super::driver::{Extent, check};
use super::lowering::Lowering;
use super::modules::Loaded;
use super::stream::Order;
use super::{Cuda, DeviceSlice, RawStream, Specialise};
use crate::backend::Workspace;
use crate::error::{Error, Operand, Result};
use crate::lengths::Lengths;
use crate::operands::{Pass, RawTensor};
use crate::plan::{InputKinds, Schedule};
use crate::problem::Problem;

impl Cuda {
    /// Returns the map of a tensor that is not empty, in a dense batch or with rows that sequences share.
    pub(super) fn encode(
        &self,
        tensor: &RawTensor,
        dtype: Dtype,
        rows: u32,
        schedule: Option<&Schedule>,
    ) -> Result<TensorMap> {
        let encoder = self.device().encoder;
        match schedule {
            None => encoder.encode(tensor, dtype, rows),
            Some(_) => encoder.encode_shared(tensor, dtype, rows),
        }
    }

    /// Launches the kernel that writes a schedule, if there is one.
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Safety
    /// The parameters are those of arguments that were validated, workspace included; the context is current.
    pub(super) unsafe fn launch_schedule(
        &self,
        schedule: Option<(ScheduleParams, u32)>,
        stream: RawStream,
    ) -> Result<()> {
        let Some((params, lists)) = schedule else { return Ok(()) };
        let kernel = self.schedule_kernel()?;
        let extent = Extent { grid: lists, block: SCHEDULE_THREADS, shared_memory: SCHEDULE_SMEM_BYTES };
        // SAFETY: these are the kernel's parameters; the caller's promise.
        unsafe { kernel.function.launch(extent, stream, &params) }
    }

    /// Loads the kernel that writes a schedule, if there is one. Returns the time that it took when it happened. The
    /// device's context is current.
    pub(super) fn load_schedule(&self, schedule: Option<&Schedule>) -> Result<Duration> {
        schedule.map_or(Ok(Duration::ZERO), |_| Ok(self.schedule_kernel()?.load_time))
    }

    /// Returns the kernel that writes schedules. It has one form. The device's context is current.
    fn schedule_kernel(&self) -> Result<&Loaded> {
        self.kernel(SCHEDULE, Constants::NONE, SCHEDULE_SMEM_BYTES, Specialise::Prebuilt)
    }

    /// Takes memory for a plan's workspace, in the order of the call's stream. Returns its address and size.
    pub(super) fn reserve<'a>(
        &self,
        lowering: &mut Lowering<'a>,
        workspace: &'a mut Workspace<Cuda>,
        bytes: usize,
    ) -> Result<(u64, usize)> {
        if bytes == 0 {
            return Ok((0, 0));
        }
        let memory = workspace.reserve(self, bytes)?;
        lowering.order.add(Operand::Workspace, memory.home)?;
        Ok((memory.address, bytes))
    }

    /// Copies lengths to the host, waits, and checks them.
    pub(super) fn check_lengths_on_host(
        &self,
        problem: &Problem,
        lengths: &Lengths<DeviceSlice<'_, f32>>,
    ) -> Result<()> {
        let kinds = InputKinds { sequences: Some(lengths.kind()), ..InputKinds::default() };
        lengths.visit(&mut Lowering::new(problem, kinds, &self.stream))?;
        let copied = lengths.try_map_ref(|numbers| self.copy_words(*numbers))?;
        copied.map_ref(|numbers: &Vec<f32>| &numbers[..]).check(problem)
    }

    /// Copies words to the host after the earlier work of both streams, and waits for that.
    fn copy_words(&self, from: DeviceSlice<'_, f32>) -> Result<Vec<f32>> {
        let mut to = Vec::new();
        let bytes = from.len * size_of::<f32>();
        to.try_reserve_exact(from.len)
            .map_err(|_| Error::OutOfMemory { operand: Operand::Download, bytes: bytes as u128 })?;
        to.resize(from.len, 0.0);
        if bytes == 0 {
            return Ok(to);
        }
        let mut order = Order::on(&self.stream);
        order.add(Operand::Download, from.home)?;
        let (calls, _entered) = (self.device().calls(), self.device().enter()?);
        order.run(|| {
            // SAFETY: the vector has that many bytes, and so has the borrowed memory; the copy is over before this
            // function returns.
            let code =
                unsafe { (calls.cuMemcpyDtoHAsync_v2)(to.as_mut_ptr().cast(), from.address, bytes, self.stream()) };
            check(calls, "cuMemcpyDtoHAsync", code)
        })?;
        self.stream.synchronize()?;
        Ok(to)
    }
}
