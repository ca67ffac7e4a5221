"""Calls of the native functions, with copies of the inputs that kernels do not take.

Kernels take every layout with a contiguous head_dim whose other strides are multiples of 8 elements, at an address
that is a multiple of 16 bytes on a GPU. A native function that meets another input returns an integer, whose bits name
the inputs to copy. This costs nothing when there is none.
"""

from __future__ import annotations

import sys
import warnings

import torch

from . import _native

# The order of the bits.
_NAMES = ("q", "k", "v", "q2", "k2", "o", "d_o")
# The inputs whose layout the caller has chosen.
_CALLERS = frozenset(("q", "k", "v", "q2", "k2"))

_warned = False


def _caller():
    """Returns the stack level, seen from the function that warns, of the first caller outside this package."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__package__") == __package__:
        level, frame = level + 1, frame.f_back
    return level


def _copied(bits, tensors):
    """Returns the tensors, those of `bits` as contiguous copies. The first copy of a caller's tensor warns."""
    global _warned
    result = []
    for i, (name, tensor) in enumerate(zip(_NAMES, tensors, strict=False)):
        if bits >> i & 1:
            if name in _CALLERS and not _warned:
                _warned = True
                warnings.warn(
                    f"ferroflash copies {name}, whose strides are {tuple(tensor.stride())}: kernels take a contiguous "
                    "head_dim, other strides that are multiples of 8 elements, and memory at a multiple of 16 bytes. "
                    "Later copies do not warn.",
                    UserWarning,
                    stacklevel=_caller(),
                )
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        result.append(tensor)
    return result


def forward(q, k, v, second, slopes, sinks, lengths, left, right, scale, softcap, dropout, return_lse):
    """Returns (O, LSE or None). `second` is None or (q2, k2, dist_threshold), `dropout` None, (p, seed, offset) or
    (p, seed_offset) with a tensor, `lengths` None or what `lengths_of` returns.
    """
    done = _native.forward(q, k, v, second, slopes, sinks, lengths, left, right, scale, softcap, dropout, return_lse)
    if type(done) is not int:
        return done
    if second is None:
        q, k, v = _copied(done, (q, k, v))
    else:
        q, k, v, q2, k2 = _copied(done, (q, k, v, *second[:2]))
        second = (q2, k2, second[2])
    return _native.forward(q, k, v, second, slopes, sinks, lengths, left, right, scale, softcap, dropout, return_lse)


def backward(q, k, v, second, slopes, sinks, lengths, o, lse, d_o, d_lse, gradients, *options):
    """Returns (dQ, dK, dV), with a second pair also dQ2 and dK2, and with sinks also their gradient.

    `gradients` are tensors to write, or None. The gradient of a result may be None, which is zero. `options` are
    (left, right, scale, softcap, dropout, deterministic).
    """
    if d_o is None:
        d_o = torch.zeros_like(o)
    if d_lse is not None:
        d_lse = d_lse.contiguous()
    done = _native.backward(q, k, v, second, slopes, sinks, lengths, o, lse, d_o, d_lse, gradients, *options)
    if type(done) is not int:
        return done
    q2, k2 = (None, None) if second is None else second[:2]
    q, k, v, q2, k2, o, d_o = _copied(done, (q, k, v, q2, k2, o, d_o))
    if second is not None:
        second = (q2, k2, second[2])
    return _native.backward(q, k, v, second, slopes, sinks, lengths, o, lse, d_o, d_lse, gradients, *options)


def total_attention(q, k, lse, slopes, lengths, left, right, scale, softcap):
    """Returns the total attention, f32 (batch, heads_q, seqlen_k), with lengths (heads_q, total_k)."""
    lse = lse.contiguous()
    done = _native.total_attention(q, k, lse, slopes, lengths, left, right, scale, softcap)
    if type(done) is not int:
        return done
    q, k = _copied(done, (q, k))
    return _native.total_attention(q, k, lse, slopes, lengths, left, right, scale, softcap)


def lengths_of(cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k):
    """Returns lengths of sequences as the functions here take them; None for a dense batch."""
    if cu_seqlens_q is None and cu_seqlens_k is None and seqused_k is None:
        return None
    for name, given in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if given is None:
            raise ValueError(f"{name} is None; sequences of different lengths need cu_seqlens_q and cu_seqlens_k")
    return cu_seqlens_q, cu_seqlens_k, seqused_k, _longest(max_seqlen_q), _longest(max_seqlen_k)


def _longest(length):
    """Returns the longest length of a sequence as a number; None if a tensor has it that is not read here.

    It is a hint. Reading it would wait for the GPU, or break a graph that is compiled.
    """
    if not isinstance(length, torch.Tensor):
        return length
    return int(length) if length.is_cpu and not torch.compiler.is_compiling() else None


def dropout_mask(shape, dropout_p, seed_offset, device):
    """Returns the weights that dropout keeps, bool of a shape (batch, heads_q, seqlen_q, seqlen_k)."""
    seed, offset = numbers(seed_offset)
    kept = torch.empty(shape, dtype=torch.bool, device=device)
    _native.dropout_mask(kept, tuple(shape), (dropout_p, seed, offset))
    return kept


def numbers(seed_offset):
    """Returns seed and offset as integers of 64 bits without a sign. A tensor is read to the host."""
    if isinstance(seed_offset, torch.Tensor):
        if seed_offset.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "seed_offset is read to the host for the dropout mask, which a CUDA graph can't capture: compute the "
                "mask after a replay"
            )
        seed_offset = seed_offset.tolist()
    seed, offset = seed_offset
    return seed % 2**64, offset % 2**64


def dropout(q, p, seed_offset):
    """Returns dropout as native functions take it. For queries on a GPU, a tensor on the CPU is read here."""
    if isinstance(seed_offset, torch.Tensor) and not (seed_offset.is_cpu and q.is_cuda):
        return p, seed_offset
    return p, *numbers(seed_offset)
