//! Raw calls on the CPU: plans run on the addresses of tensors, as frameworks hold them.
//!
//! They take the same arguments as the raw calls of the GPU, so a binding has one code path for both machines. They
//! return when the results are there.

use super::{Cpu, backward, check, check_host_lengths, pool, total_attention};
use crate::backend::Workspace;
use crate::error::Result;
use crate::lengths::Lengths;
use crate::operands::{RawBackward, RawForward, RawTotalAttention};
use crate::plan::{BackwardPlan, Plan, TotalPlan};
use crate::problem::Problem;

impl Cpu {
    /// Number of threads that run work tiles. Plans take it as the number of SMs.
    pub fn sm_count(&self) -> u32 {
        pool::threads()
    }

    /// Runs a forward plan on addresses of host memory. The workspace is allocated, if the plan needs one.
    ///
    /// # Errors
    /// Every error that names a tensor, before anything is written; [`Error::KernelFault`](crate::Error::KernelFault).
    ///
    /// # Safety
    /// Until the call returns, the addresses are valid for the whole span of their layouts, as initialised elements of
    /// the plan's dtype, f32 for the LSE, slopes and sinks, u64 for seed and offset, and i32 for lengths. They have
    /// exposed provenance, as pointers from outside Rust have. Nothing else writes the inputs or accesses O and the
    /// LSE.
    pub unsafe fn forward_raw(&self, plan: &Plan, args: &RawForward) -> Result<()> {
        let mut check = check(plan.problem(), plan.inputs());
        let args = args.lower(plan, plan.problem().dtype, &mut check)?;
        check.overlaps()?;
        // SAFETY: checked; the caller's promise.
        unsafe { check_lengths(plan.problem(), args.optional.lengths)? };
        // SAFETY: checked; the caller's promise.
        unsafe { super::run(plan, args, &mut Workspace::new()) }
    }

    /// Runs a backward plan on addresses of host memory. The workspace is allocated: `workspace` and `workspace_bytes`
    /// are ignored.
    ///
    /// # Errors
    /// Every error that names a tensor, before anything is written;
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory); [`Error::KernelFault`](crate::Error::KernelFault).
    ///
    /// # Safety
    /// As for [`Cpu::forward_raw`]: f32 for the LSE, slopes, sinks and gradients of LSE and sinks, u64 for seed and
    /// offset. Nothing else writes the inputs or accesses the outputs.
    pub unsafe fn backward_raw(&self, plan: &BackwardPlan, args: &RawBackward) -> Result<()> {
        let plan = &backward::replan(plan)?;
        let mut check = check(plan.problem(), plan.inputs());
        let args = args.lower(plan, plan.problem().dtype, &mut check)?;
        check.overlaps()?;
        // SAFETY: checked; the caller's promise.
        unsafe { check_lengths(plan.problem(), args.optional.lengths)? };
        // SAFETY: checked; the caller's promise.
        unsafe { backward::run(plan, args, &mut Workspace::new()) }
    }

    /// Runs a plan of total attention on addresses of host memory.
    ///
    /// # Errors
    /// Errors of [`Cpu::forward_raw`].
    ///
    /// # Safety
    /// As for [`Cpu::forward_raw`]: f32 for the LSE, slopes and the result. Nothing else writes the inputs or accesses
    /// the result.
    pub unsafe fn total_attention_raw(&self, plan: &TotalPlan, args: &RawTotalAttention) -> Result<()> {
        let mut check = check(plan.problem(), plan.inputs());
        let args = args.lower(plan, plan.problem().dtype, &mut check)?;
        check.overlaps()?;
        // SAFETY: checked; the caller's promise.
        unsafe { check_lengths(plan.problem(), args.lengths)? };
        // SAFETY: checked; the caller's promise.
        unsafe { total_attention::run(plan, args, &mut Workspace::new()) }
    }
}

/// Checks lengths of sequences, if there are any: kernels take them as they are.
///
/// # Safety
/// The addresses were checked, and are valid for reading as many i32 as there are sequences, and one more if lengths
/// are cumulative.
unsafe fn check_lengths(problem: &Problem, lengths: Option<Lengths<u64>>) -> Result<()> {
    let read = |address: u64, len: usize| match len {
        // An empty array may have any address.
        0 => &[][..],
        // SAFETY: the caller's promise. Every i32 is an f32, too.
        _ => unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(address as usize), len) },
    };
    let lengths = lengths.map(|lengths| lengths.read_with(read)).transpose()?;
    check_host_lengths(problem, lengths.as_ref())
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use kernels_gpu::variants::Dtype;

    use super::*;
    use crate::error::{Error, Operand};
    use crate::operands::{Inputs, OptionalInputs, RawTensor};
    use crate::tensor::{Layout, Tensor};
    use crate::{Attention, Mask, Problem};

    const PROBLEM: Problem =
        Problem { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 70, seqlen_k: 90, head_dim: 24, dtype: Dtype::Bf16 };

    fn values(shape: [usize; 4], factor: f32) -> Vec<bf16> {
        (0..shape.iter().product::<usize>()).map(|i| bf16::from_f32((i as f32 * factor).sin())).collect()
    }

    fn raw(data: &[bf16], shape: [usize; 4]) -> RawTensor {
        RawTensor { address: data.as_ptr().expose_provenance() as u64, layout: Layout::bhsd(shape) }
    }

    fn raw_mut(data: &mut [bf16], shape: [usize; 4]) -> RawTensor {
        RawTensor { address: data.as_mut_ptr().expose_provenance() as u64, layout: Layout::bhsd(shape) }
    }

    fn line(data: &mut [f32]) -> u64 {
        data.as_mut_ptr().expose_provenance() as u64
    }

    /// The raw calls give the bits of the safe ones.
    #[test]
    fn raw_calls_are_the_safe_ones() {
        let (q_shape, kv_shape) = (PROBLEM.q_shape(), PROBLEM.kv_shape());
        let [q, d_o] = [1.7, 0.9].map(|factor| values(q_shape, factor));
        let [k, v] = [2.3, 3.1].map(|factor| values(kv_shape, factor));
        let attention = Attention::new(PROBLEM).mask(Mask::Causal);
        let tensor = |data, shape| Tensor::bhsd(data, shape);
        let (qt, kt, vt) = (tensor(&q[..], q_shape), tensor(&k[..], kv_shape), tensor(&v[..], kv_shape));
        let out = attention.forward(&Cpu, qt, kt, vt).unwrap();

        let (mut o, mut lse) = (vec![bf16::ZERO; q.len()], vec![0.0; PROBLEM.lse_len()]);
        let args = RawForward {
            q: raw(&q, q_shape),
            k: raw(&k, kv_shape),
            v: raw(&v, kv_shape),
            second: None,
            optional: OptionalInputs::NONE,
            o: raw_mut(&mut o, q_shape),
            lse: Some(line(&mut lse)),
            workspace: 0,
            workspace_bytes: 0,
        };
        // SAFETY: the addresses are those of live vectors of the right lengths.
        unsafe { Cpu.forward_raw(&attention.plan(1).unwrap(), &args) }.unwrap();
        assert_eq!((&o, Some(&lse)), (&out.o, out.lse.as_ref()));

        let (ot, d_ot) = (tensor(&o[..], q_shape), tensor(&d_o[..], q_shape));
        let inputs = Inputs::new(qt, kt, vt).backward(ot, d_ot, &lse[..]);
        let gradients = attention.backward(&Cpu, inputs).unwrap();
        let [mut dq, mut dk, mut dv] = [&q, &k, &v].map(|like| vec![bf16::ZERO; like.len()]);
        let args = RawBackward {
            q: args.q,
            k: args.k,
            v: args.v,
            second: None,
            o: args.o,
            d_o: raw(&d_o, q_shape),
            lse: line(&mut lse),
            d_lse: None,
            optional: OptionalInputs::NONE,
            dq: raw_mut(&mut dq, q_shape),
            dk: raw_mut(&mut dk, kv_shape),
            dv: raw_mut(&mut dv, kv_shape),
            d_sinks: None,
            workspace: 0,
            workspace_bytes: 0,
        };
        // SAFETY: as above.
        unsafe { Cpu.backward_raw(&attention.plan_backward(132).unwrap(), &args) }.unwrap();
        assert_eq!((dq, dk, dv), (gradients.dq, gradients.dk, gradients.dv));

        let mut total = vec![f32::NAN; PROBLEM.total_len()];
        let args = RawTotalAttention {
            q: args.q,
            k: args.k,
            lse: args.lse,
            slopes: None,
            lengths: None,
            total: line(&mut total),
            workspace: 0,
            workspace_bytes: 0,
        };
        // SAFETY: as above.
        unsafe { Cpu.total_attention_raw(&attention.plan_total_attention(1).unwrap(), &args) }.unwrap();
        assert_eq!(total, attention.total_attention(&Cpu, qt, kt, &lse[..]).unwrap());
    }

    #[test]
    fn raw_calls_refuse_bad_addresses() {
        let plan = Attention::new(PROBLEM).plan(1).unwrap();
        let tensor = |address, shape| RawTensor { address, layout: Layout::bhsd(shape) };
        let args = RawForward {
            q: tensor(0, PROBLEM.q_shape()),
            k: tensor(0x20000, PROBLEM.kv_shape()),
            v: tensor(0x40000, PROBLEM.kv_shape()),
            second: None,
            optional: OptionalInputs::NONE,
            o: tensor(0x60000, PROBLEM.q_shape()),
            lse: None,
            workspace: 0,
            workspace_bytes: 0,
        };
        // SAFETY: the errors come before any access.
        let error = |args: &RawForward| unsafe { Cpu.forward_raw(&plan, args) }.unwrap_err();
        assert_eq!(error(&args), Error::NullPointer { operand: Operand::Q });
        let odd = RawForward { q: tensor(0x10001, PROBLEM.q_shape()), ..args };
        assert_eq!(error(&odd), Error::Misaligned { operand: Operand::Q, address: 0x10001, alignment: 2 });
        let overlapping = RawForward { q: args.o, ..args };
        assert_eq!(error(&overlapping), Error::Overlap { output: Operand::O, other: Operand::Q });
    }
    /// Lengths at addresses are refused as those in slices are.
    #[test]
    fn raw_calls_refuse_bad_lengths() {
        let problem = Problem { batch: 1, ..PROBLEM };
        let (q, k) = (values(problem.q_shape(), 1.7), values(problem.kv_shape(), 2.3));
        let mut o = vec![bf16::ZERO; q.len()];
        let address = |numbers: &[i32]| numbers.as_ptr().expose_provenance() as u64;
        let (good, used, bad) = ([0, 30, 70], [30, 40], [0, 80, 70]);
        let forward = |lengths: Lengths<u64>, o: RawTensor| {
            let optional = OptionalInputs { lengths: Some(lengths), ..OptionalInputs::NONE };
            let plan = Attention::new(problem).for_inputs(optional.kinds()).plan(1).unwrap();
            let (q, k) = (raw(&q, problem.q_shape()), raw(&k, problem.kv_shape()));
            let args =
                RawForward { q, k, v: k, second: None, optional, o, lse: None, workspace: 0, workspace_bytes: 0 };
            // SAFETY: the addresses are those of live vectors of the right lengths.
            unsafe { Cpu.forward_raw(&plan, &args) }
        };
        let o = raw_mut(&mut o, problem.q_shape());
        let lengths = Lengths::cumulative(2, address(&good), address(&good)).used_keys(address(&used));
        assert_eq!(forward(lengths, o), Ok(()));
        let place = |operand, index, value, least, most| Error::SequencePlace { operand, index, value, least, most };
        let error = forward(Lengths::cumulative(2, address(&bad), address(&good)), o).unwrap_err();
        assert_eq!(error, place(Operand::CumulativeQ, 1, 80, 0, 70));
        let error = forward(lengths.used_keys(address(&good[1..])), o).unwrap_err();
        assert_eq!(error, place(Operand::LengthsK, 1, 70, 0, 40));
    }
}
