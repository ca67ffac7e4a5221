//! The CPU: vectors, used until the call returns.

use std::marker::PhantomData;

use candle_core::cpu_backend::CpuDevice;
use candle_core::{CpuStorage, DType, Error, Result, Shape, Storage, backend::BackendDevice, bail};
use ferroflash as ff;

use super::{Machine, Place};

pub(crate) struct CpuMachine;

impl Machine for CpuMachine {
    type Storage = CpuStorage;
    type Use<'a> = PhantomData<&'a CpuStorage>;

    fn storage(storage: &Storage) -> Result<&CpuStorage> {
        match storage {
            Storage::Cpu(storage) => Ok(storage),
            _ => bail!("a tensor is not on the CPU, and another is"),
        }
    }

    fn wrap(storage: CpuStorage) -> Storage {
        Storage::Cpu(storage)
    }

    fn sm_count(&self) -> u32 {
        ff::Cpu.sm_count()
    }

    fn allocate(&self, elements: usize, dtype: DType) -> Result<CpuStorage> {
        CpuDevice.zeros_impl(&Shape::from(elements), dtype)
    }

    fn read<'a>(&'a self, storage: &'a CpuStorage) -> Result<Place<Self::Use<'a>>> {
        match storage {
            CpuStorage::F16(data) => Ok(place(data.as_ptr().expose_provenance(), size_of_val(&data[..]))),
            CpuStorage::BF16(data) => Ok(place(data.as_ptr().expose_provenance(), size_of_val(&data[..]))),
            CpuStorage::F32(data) => Ok(place(data.as_ptr().expose_provenance(), size_of_val(&data[..]))),
            _ => bail!("a tensor is neither F16 nor BF16 nor F32"),
        }
    }

    fn write<'a>(&'a self, storage: &'a mut CpuStorage) -> Result<Place<Self::Use<'a>>> {
        match storage {
            CpuStorage::F16(data) => Ok(place(data.as_mut_ptr().expose_provenance(), size_of_val(&data[..]))),
            CpuStorage::BF16(data) => Ok(place(data.as_mut_ptr().expose_provenance(), size_of_val(&data[..]))),
            CpuStorage::F32(data) => Ok(place(data.as_mut_ptr().expose_provenance(), size_of_val(&data[..]))),
            _ => bail!("a tensor is neither F16 nor BF16 nor F32"),
        }
    }

    unsafe fn run(&self, plan: &ff::Plan, args: ff::RawForward) -> Result<()> {
        // SAFETY: the caller's promise. The addresses were exposed, and the memory has values.
        unsafe { ff::Cpu.forward_raw(plan, &args) }.map_err(Error::wrap)
    }

    unsafe fn run_backward(&self, plan: &ff::BackwardPlan, args: ff::RawBackward) -> Result<()> {
        // SAFETY: the caller's promise. The addresses were exposed, and the memory has values.
        unsafe { ff::Cpu.backward_raw(plan, &args) }.map_err(Error::wrap)
    }
}

fn place<'a>(address: usize, bytes: usize) -> Place<PhantomData<&'a CpuStorage>> {
    Place { address: address as u64, bytes, _used: PhantomData }
}
