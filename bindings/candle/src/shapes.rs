//! candle's shapes and layouts in ferroflash's terms, and the decision about a copy.
//!
//! candle's functions take (batch, seqlen, heads, head_dim). ferroflash takes (batch, heads, seqlen, head_dim) in any
//! stride order, so a layout is translated and no element moves.

use candle_core::{DType, Error, Layout, Result, Tensor, bail};
use ferroflash as ff;

/// Address that stands for the start of an allocation: all of them begin at a multiple of 256 bytes or, on the CPU, of
/// the element's size.
const START: u64 = 256;

/// Returns the problem that three tensors (batch, seqlen, heads, head_dim) pose.
pub(crate) fn problem(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<ff::Problem> {
    let (batch, seqlen_q, heads_q, head_dim) = dims4("q", q)?;
    let (_, seqlen_k, heads_kv, _) = dims4("k", k)?;
    let expected = (batch, seqlen_k, heads_kv, head_dim);
    for (name, tensor) in [("k", k), ("v", v)] {
        let shape = dims4(name, tensor)?;
        if shape != expected {
            bail!("{name} has the shape {shape:?}; {expected:?} is needed, as q has {:?}", q.dims())
        }
        if tensor.dtype() != q.dtype() {
            bail!("{name} is {:?} and q is {:?}; one dtype is needed", tensor.dtype(), q.dtype())
        }
        if !tensor.device().same_device(q.device()) {
            bail!(
                "{name} is on {:?} and q on {:?}; one device is needed",
                tensor.device().location(),
                q.device().location()
            )
        }
    }
    let dtype = match q.dtype() {
        DType::F16 => ff::Dtype::F16,
        DType::BF16 => ff::Dtype::Bf16,
        other => bail!("q, k and v are {other:?}; F16 and BF16 are supported, so convert them with Tensor::to_dtype"),
    };
    Ok(ff::Problem { batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, dtype })
}

fn dims4(name: &str, tensor: &Tensor) -> Result<(usize, usize, usize, usize)> {
    tensor.dims4().map_err(|_| {
        Error::msg(format!("{name} has the shape {:?}; (batch, seqlen, heads, head_dim) is needed", tensor.dims()))
    })
}

/// Returns candle's name of an element type.
pub(crate) fn dtype(dtype: ff::Dtype) -> DType {
    match dtype {
        ff::Dtype::F16 => DType::F16,
        ff::Dtype::Bf16 => DType::BF16,
    }
}

/// Returns a layout (batch, seqlen, heads, head_dim) as ferroflash takes it. The stride of head_dim has to be 1.
pub(crate) fn layout(layout: &Layout) -> Result<ff::Layout> {
    let (batch, seqlen, heads, head_dim) = layout.shape().dims4()?;
    match *layout.stride() {
        [b, s, h, 1] => Ok(ff::Layout::strided([batch, heads, seqlen, head_dim], [b, h, s])),
        _ => bail!("the stride of the last dim is not 1"),
    }
}

/// Returns the tensor if the kernels take it as it is, and otherwise a contiguous copy, through which gradients flow.
pub(crate) fn taken(tensor: &Tensor, operand: ff::Operand) -> Result<Tensor> {
    let space = if tensor.device().is_cpu() { ff::AddressSpace::Host } else { ff::AddressSpace::Device };
    let offset = tensor.layout().start_offset() * tensor.dtype().size_in_bytes();
    let fits = layout(tensor.layout())
        .is_ok_and(|layout| ff::RawTensor { address: START + offset as u64, layout }.check(operand, space).is_ok());
    if fits { Ok(tensor.clone()) } else { tensor.force_contiguous() }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    #[test]
    fn tensors_are_copied_only_if_they_must() {
        let tensor = |shape: &[usize]| Tensor::zeros(shape, DType::BF16, &Device::Cpu).unwrap();
        let copied = |tensor: Result<Tensor>| {
            let tensor = tensor.unwrap();
            let taken = taken(&tensor, ff::Operand::Q).unwrap();
            assert_eq!(taken.dims(), tensor.dims());
            taken.id() != tensor.id()
        };
        assert!(!copied(Ok(tensor(&[2, 3, 4, 64]))));
        assert!(!copied(tensor(&[2, 4, 3, 64]).transpose(1, 2)));
        assert!(!copied(tensor(&[2, 3, 3, 4, 64]).narrow(2, 1, 1).unwrap().squeeze(2)));
        assert!(!copied(tensor(&[2, 3, 1, 64]).broadcast_as((2, 3, 4, 64))));
        assert!(!copied(tensor(&[2, 3, 4, 72]).narrow(3, 8, 64)));
        assert!(!copied(tensor(&[2, 0, 4, 64]).transpose(2, 3).unwrap().transpose(2, 3)));

        assert!(copied(tensor(&[2, 3, 64, 4]).transpose(2, 3)));
        assert!(copied(tensor(&[1, 1, 1, 1]).broadcast_as((2, 3, 4, 64))));
        assert!(copied(tensor(&[2, 3, 4, 65]).narrow(3, 0, 64)));
    }
}
