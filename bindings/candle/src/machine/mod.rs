//! The devices: candle's memory, and ferroflash's raw calls on it. All `unsafe` code is in this folder.
//!
//! A [`Machine`] names memory by address. [`forward`] and [`backward`] are safe functions that are the same for every
//! machine: they check that each tensor is within its storage, allocate the results, and run a plan.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use std::ops::Deref;

use candle_core::{DType, Error, Layout, Result, Storage, backend::BackendStorage, bail};
use ferroflash as ff;

use crate::{optional, shapes};
pub(crate) use cpu::CpuMachine;
#[cfg(feature = "cuda")]
pub(crate) use cuda::CudaMachine;

/// Memory of a whole storage. A kernel may use it as long as this value exists.
pub(crate) struct Place<U> {
    address: u64,
    bytes: usize,
    /// Ends the use when it is dropped.
    _used: U,
}

/// A device with the types that candle has for it.
pub(crate) trait Machine {
    /// Memory of a tensor.
    type Storage: BackendStorage;
    /// Use of memory by a kernel.
    type Use<'a>
    where
        Self: 'a;

    /// Returns this machine's storage.
    fn storage(storage: &Storage) -> Result<&Self::Storage>;

    /// Returns storage of any machine.
    fn wrap(storage: Self::Storage) -> Storage;

    /// Number of CTAs that run at once.
    fn sm_count(&self) -> u32;

    /// Allocates memory for results. On the CPU it has values.
    fn allocate(&self, elements: usize, dtype: DType) -> Result<Self::Storage>;

    /// Begins to read memory.
    fn read<'a>(&'a self, storage: &'a Self::Storage) -> Result<Place<Self::Use<'a>>>;

    /// Begins to write memory.
    fn write<'a>(&'a self, storage: &'a mut Self::Storage) -> Result<Place<Self::Use<'a>>>;

    /// Runs a forward plan. The workspace of `args` is not used: the machine allocates it.
    ///
    /// # Safety
    /// The addresses are those of [`Place`]s of this machine that exist until the call returns, each in a place that
    /// the layout does not leave. The elements have the plan's dtype.
    unsafe fn run(&self, plan: &ff::Plan, args: ff::RawForward) -> Result<()>;

    /// Runs a backward plan. The workspace of `args` is not used: the machine allocates it.
    ///
    /// # Safety
    /// The requirements of [`Machine::run`].
    unsafe fn run_backward(&self, plan: &ff::BackwardPlan, args: ff::RawBackward) -> Result<()>;
}

/// An input: storage, and the tensor's layout in it.
#[derive(Debug)]
pub(crate) struct Source<'a, S> {
    pub(crate) storage: &'a S,
    pub(crate) layout: &'a Layout,
}

impl<S> Clone for Source<'_, S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S> Copy for Source<'_, S> {}

impl<'a, S: BackendStorage> Source<'a, S> {
    pub(crate) fn new(storage: &'a S, layout: &'a Layout) -> Self {
        Source { storage, layout }
    }

    /// Returns a tensor's storage, which is locked, and its layout.
    pub(crate) fn of<M: Machine<Storage = S>>(
        (storage, layout): &'a (impl Deref<Target = Storage>, &'a Layout),
    ) -> Result<Self> {
        Ok(Source::new(M::storage(storage)?, layout))
    }

    fn read<M: Machine<Storage = S>>(self, machine: &'a M, dtype: DType) -> Result<Read<'a, M>> {
        if self.storage.dtype() != dtype {
            bail!("an input is {:?}, and {dtype:?} is needed", self.storage.dtype())
        }
        Ok(Read { place: machine.read(self.storage)?, layout: self.layout, element: dtype.size_in_bytes() })
    }
}

/// An input that a kernel is going to read.
struct Read<'a, M: Machine + 'a> {
    place: Place<M::Use<'a>>,
    layout: &'a Layout,
    /// Size of an element in bytes.
    element: usize,
}

impl<M: Machine> Read<'_, M> {
    /// Returns a tensor (batch, seqlen, heads, head_dim) that lies within the storage.
    fn tensor(&self) -> Result<ff::RawTensor> {
        let layout = shapes::layout(self.layout)?;
        let address = self.address(layout.required_len().map_err(Error::wrap)?)?;
        Ok(ff::RawTensor { address, layout })
    }

    /// Returns the address of so many contiguous elements, which lie within the storage.
    fn line(&self, elements: usize) -> Result<u64> {
        if !self.layout.is_contiguous() || self.layout.shape().elem_count() != elements {
            bail!("{:?} is not the layout of {elements} contiguous elements", self.layout)
        }
        self.address(elements)
    }

    /// Returns the address of the first of `elements` elements.
    fn address(&self, elements: usize) -> Result<u64> {
        let start = self.layout.start_offset();
        match start.checked_add(elements).and_then(|end| end.checked_mul(self.element)) {
            Some(end) if end <= self.place.bytes => Ok(self.place.address + (start * self.element) as u64),
            _ => bail!("{:?} reaches beyond its storage of {} bytes", self.layout, self.place.bytes),
        }
    }
}

/// Inputs of a backward pass.
pub(crate) struct Inputs<'a, S> {
    pub(crate) q: Source<'a, S>,
    pub(crate) k: Source<'a, S>,
    pub(crate) v: Source<'a, S>,
    pub(crate) o: Source<'a, S>,
    pub(crate) d_o: Source<'a, S>,
    pub(crate) lse: Source<'a, S>,
    pub(crate) d_lse: Option<Source<'a, S>>,
    pub(crate) optional: ff::OptionalInputs<Source<'a, S>>,
}

/// Results of a backward pass, contiguous.
pub(crate) struct Gradients<S> {
    pub(crate) dq: S,
    pub(crate) dk: S,
    pub(crate) dv: S,
    pub(crate) d_sinks: Option<S>,
}

/// Runs a forward plan. Returns O, contiguous, and the LSE if it is wanted.
pub(crate) fn forward<M: Machine>(
    machine: &M,
    plan: &ff::Plan,
    [q, k, v]: [Source<'_, M::Storage>; 3],
    optional: ff::OptionalInputs<Source<'_, M::Storage>>,
    with_lse: bool,
) -> Result<(M::Storage, Option<M::Storage>)> {
    let problem = plan.problem();
    let dtype = shapes::dtype(problem.dtype);
    let mut o = machine.allocate(volume(problem.q_shape()), dtype)?;
    let mut lse = match with_lse {
        true => Some(machine.allocate(problem.lse_len(), DType::F32)?),
        false => None,
    };
    {
        let (q, k, v) = (q.read(machine, dtype)?, k.read(machine, dtype)?, v.read(machine, dtype)?);
        let optional = optional::try_map(&optional, |line| line.read(machine, DType::F32))?;
        let o = machine.write(&mut o)?;
        let lse = lse.as_mut().map(|lse| machine.write(lse)).transpose()?;
        let args = ff::RawForward {
            q: q.tensor()?,
            k: k.tensor()?,
            v: v.tensor()?,
            second: None,
            optional: optional_lines(problem, &optional)?,
            o: result(&o, problem.q_shape()),
            lse: lse.as_ref().map(|lse| lse.address),
            workspace: 0,
            workspace_bytes: 0,
        };
        // SAFETY: each address is that of a place above. `Read` has checked the inputs' bounds and dtype, and the
        // results were allocated for the plan's shapes, to which the call compares all layouts. The lines have the
        // plan's lengths, and the call compares the kinds of the optional inputs to the plan's.
        unsafe { machine.run(plan, args) }?;
    }
    Ok((o, lse))
}

/// Runs a backward plan. Returns the gradient of the sinks if there are sinks and it is wanted.
pub(crate) fn backward<M: Machine>(
    machine: &M,
    plan: &ff::BackwardPlan,
    inputs: Inputs<'_, M::Storage>,
    with_d_sinks: bool,
) -> Result<Gradients<M::Storage>> {
    let problem = plan.problem();
    let (dtype, line) = (shapes::dtype(problem.dtype), DType::F32);
    let mut dq = machine.allocate(volume(problem.q_shape()), dtype)?;
    let mut dk = machine.allocate(volume(problem.kv_shape()), dtype)?;
    let mut dv = machine.allocate(volume(problem.kv_shape()), dtype)?;
    let mut d_sinks = match inputs.optional.sinks {
        Some(_) if with_d_sinks => Some(machine.allocate(problem.heads_q, line)?),
        _ => None,
    };
    {
        let (q, k, v) =
            (inputs.q.read(machine, dtype)?, inputs.k.read(machine, dtype)?, inputs.v.read(machine, dtype)?);
        let (o, d_o) = (inputs.o.read(machine, dtype)?, inputs.d_o.read(machine, dtype)?);
        let lse = inputs.lse.read(machine, line)?;
        let d_lse = inputs.d_lse.map(|d_lse| d_lse.read(machine, line)).transpose()?;
        let optional = optional::try_map(&inputs.optional, |of| of.read(machine, line))?;
        let (dq, dk, dv) = (machine.write(&mut dq)?, machine.write(&mut dk)?, machine.write(&mut dv)?);
        let d_sinks = d_sinks.as_mut().map(|d_sinks| machine.write(d_sinks)).transpose()?;
        let args = ff::RawBackward {
            q: q.tensor()?,
            k: k.tensor()?,
            v: v.tensor()?,
            second: None,
            optional: optional_lines(problem, &optional)?,
            o: o.tensor()?,
            d_o: d_o.tensor()?,
            lse: lse.line(problem.lse_len())?,
            d_lse: d_lse.as_ref().map(|d_lse| d_lse.line(problem.lse_len())).transpose()?,
            dq: result(&dq, problem.q_shape()),
            dk: result(&dk, problem.kv_shape()),
            dv: result(&dv, problem.kv_shape()),
            d_sinks: d_sinks.as_ref().map(|d_sinks| d_sinks.address),
            workspace: 0,
            workspace_bytes: 0,
        };
        // SAFETY: each address is that of a place above. `Read` has checked the inputs' bounds and dtype, and the
        // results were allocated for the plan's shapes, to which the call compares all layouts. The lines have the
        // plan's lengths, and the call compares the kinds of the optional inputs to the plan's.
        unsafe { machine.run_backward(plan, args) }?;
    }
    Ok(Gradients { dq, dk, dv, d_sinks })
}

/// Returns the addresses of the optional inputs, whose lengths are those of the problem.
fn optional_lines<M: Machine>(
    problem: &ff::Problem,
    optional: &ff::OptionalInputs<Read<'_, M>>,
) -> Result<ff::OptionalInputs<u64>> {
    let mut lines = ff::OptionalInputs::NONE;
    let heads = problem.heads_q;
    lines.slopes = match &optional.slopes {
        None => None,
        Some(ff::Slopes::PerHead(slopes)) => Some(ff::Slopes::PerHead(slopes.line(heads)?)),
        Some(ff::Slopes::PerItem(slopes)) => Some(ff::Slopes::PerItem(slopes.line(problem.batch * heads)?)),
    };
    lines.sinks = optional.sinks.as_ref().map(|sinks| sinks.line(heads)).transpose()?;
    Ok(lines)
}

/// Returns a result in the order batch, seqlen, heads, head_dim.
fn result<U>(place: &Place<U>, shape: [usize; 4]) -> ff::RawTensor {
    ff::RawTensor { address: place.address, layout: ff::Layout::bshd(shape) }
}

/// Number of elements of a validated problem's tensor.
fn volume(shape: [usize; 4]) -> usize {
    shape.iter().product()
}
