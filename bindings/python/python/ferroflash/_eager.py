"""Plain eager calls: native functions without the dispatcher, and lean autograd functions around them.

A call is plain if nothing watches operators: tensors of torch's own types, no dispatch mode, no functorch transform and
no compiler. Every other call takes the operators of `_library.py`, which compute the same.
"""

from __future__ import annotations

import torch

from . import _launch, _library  # noqa: F401  The second defines the operators.

_PLAIN = (torch.Tensor, torch.nn.Parameter)
# Functions of torch's that have no stable name. Without them no call is plain.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: True)
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling


def is_plain(q, k, v):
    """True if a call of these tensors is plain."""
    return (
        type(q) in _PLAIN
        and type(k) in _PLAIN
        and type(v) in _PLAIN
        and not _dispatch_modes()
        and not _transforms_active()
    )


def _apply(function):
    """Returns `function.apply` without its care for functorch and default arguments, which cost microseconds."""
    return super(torch.autograd.Function, function).apply


def _op_options(lengths, left, right, scale, softcap, dropout, deterministic):
    """Returns options and lengths as operators take them."""
    lengths = () if lengths is None else lengths
    if dropout is None:
        return left, right, scale, softcap, 0.0, None, deterministic, *lengths
    p, *drawn = dropout
    seed_offset = drawn[0] if len(drawn) == 1 else seed_offset_tensor(*drawn)
    return left, right, scale, softcap, p, seed_offset, deterministic, *lengths


def seed_offset_tensor(seed, offset):
    """Returns two numbers of 64 bits as operators take them."""
    signed = [(number + 2**63) % 2**64 - 2**63 for number in (seed, offset)]
    return torch.tensor(signed, dtype=torch.int64, device="cpu")


def _keep(ctx, tensors, lengths, options):
    """Keeps tensors, lengths and options for the backward pass. A tensor of seed and offset is one of the tensors."""
    dropout, seed_offset = options[4], None
    if dropout is not None and len(dropout) == 2:
        p, seed_offset = dropout
        options = (*options[:4], (p,), *options[5:])
    ctx.longest = None
    if lengths is not None:
        ctx.longest = lengths[3:]
        tensors = (*tensors, *lengths[:3])
    ctx.save_for_backward(*tensors, seed_offset)
    ctx.options = options


def _kept(ctx):
    """Returns what `_keep` keeps: the tensors, the lengths, and the options."""
    *tensors, seed_offset = ctx.saved_tensors
    lengths, options = None, ctx.options
    if ctx.longest is not None:
        *tensors, cu_seqlens_q, cu_seqlens_k, seqused_k = tensors
        lengths = (cu_seqlens_q, cu_seqlens_k, seqused_k, *ctx.longest)
    if seed_offset is not None:
        options = (*options[:4], (*options[4], seed_offset), *options[5:])
    return tensors, lengths, options


def _watched(d_o, d_lse):
    """True if the backward pass is recorded or compiled, so that it takes the operators."""
    first, second = (d_lse if d_o is None else d_o), (d_o if d_lse is None else d_lse)
    return _is_compiling() or _is_grad_enabled() or not is_plain(first, first, second)


def _gradients(lengths, options, d_o, d_lse, q, k, v, slopes, sinks, o, lse, given=None):
    """Returns dQ, dK, dV, and with sinks their gradient; writes the first three to `given` if the pass is plain."""
    if _watched(d_o, d_lse):
        if d_o is None:
            d_o = torch.zeros_like(o)
        op_options = _op_options(lengths, *options)
        gradients = torch.ops.ferroflash.backward(q, k, v, slopes, sinks, o, lse, d_o, d_lse, *op_options)
        return gradients[:3] if sinks is None else gradients
    gradients = None if given is None else given()
    return _launch.backward(q, k, v, None, slopes, sinks, lengths, o, lse, d_o, d_lse, gradients, *options)


def _save(ctx, inputs, q, k, v, slopes, sinks, lengths, options, return_lse):
    """Runs the forward pass, and keeps what the backward pass needs."""
    o, lse = _launch.forward(q, k, v, None, slopes, sinks, lengths, *options[:5], True)
    _keep(ctx, (*inputs, o, lse), lengths, options)
    if return_lse:
        ctx.set_materialize_grads(False)
        return o, lse
    return o


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, slopes, sinks, lengths, options, return_lse):
        return _save(ctx, (q, k, v, slopes, sinks), q, k, v, slopes, sinks, lengths, options, return_lse)

    @staticmethod
    def backward(ctx, d_o, d_lse=None):
        if d_o is None and d_lse is None:
            return (None,) * 8
        tensors, lengths, options = _kept(ctx)
        dq, dk, dv, *d_sinks = _gradients(lengths, options, d_o, d_lse, *tensors)
        return dq, dk, dv, None, d_sinks[0] if d_sinks else None, None, None, None


class _QkvPacked(torch.autograd.Function):
    """Attention over one tensor (batch, seqlen, 3, heads, head_dim) or (total, 3, heads, head_dim).

    Its gradient is one tensor, whose three parts the kernels write.
    """

    @staticmethod
    def forward(ctx, qkv, slopes, lengths, options, return_lse):
        return _save(ctx, (qkv, slopes), *qkv.unbind(-3), slopes, None, lengths, options, return_lse)

    @staticmethod
    def backward(ctx, d_o, d_lse=None):
        if d_o is None and d_lse is None:
            return (None,) * 5
        (qkv, slopes, o, lse), lengths, options = _kept(ctx)
        packed = None

        def given():
            nonlocal packed
            packed = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
            return packed.unbind(-3)

        gradients = _gradients(lengths, options, d_o, d_lse, *qkv.unbind(-3), slopes, None, o, lse, given)
        return torch.stack(gradients, -3) if packed is None else packed, None, None, None, None


class _KvPacked(torch.autograd.Function):
    """Attention over q and one tensor (batch, seqlen_k, 2, heads_kv, head_dim) or (total_k, 2, heads_kv, head_dim).

    Its gradient is one tensor, whose two parts the kernels write.
    """

    @staticmethod
    def forward(ctx, q, kv, slopes, lengths, options, return_lse):
        return _save(ctx, (q, kv, slopes), q, *kv.unbind(-3), slopes, None, lengths, options, return_lse)

    @staticmethod
    def backward(ctx, d_o, d_lse=None):
        if d_o is None and d_lse is None:
            return (None,) * 6
        (q, kv, slopes, o, lse), lengths, options = _kept(ctx)
        packed = None

        def given():
            nonlocal packed
            packed = torch.empty(kv.shape, dtype=kv.dtype, device=kv.device)
            return torch.empty(q.shape, dtype=q.dtype, device=q.device), *packed.unbind(-3)

        dq, dk, dv = _gradients(lengths, options, d_o, d_lse, q, *kv.unbind(-3), slopes, None, o, lse, given)
        return dq, torch.stack((dk, dv), -3) if packed is None else packed, None, None, None, None


class _Piecewise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q1, k1, q2, k2, v, slopes, sinks, lengths, dist_threshold, options, return_lse):
        o, lse = _launch.forward(q1, k1, v, (q2, k2, dist_threshold), slopes, sinks, lengths, *options[:5], True)
        _keep(ctx, (q1, k1, q2, k2, v, slopes, sinks, o, lse), lengths, options)
        ctx.dist_threshold = dist_threshold
        if return_lse:
            ctx.set_materialize_grads(False)
            return o, lse
        return o

    @staticmethod
    def backward(ctx, d_o, d_lse=None):
        if d_o is None and d_lse is None:
            return (None,) * 11
        (q1, k1, q2, k2, v, slopes, sinks, o, lse), lengths, options = _kept(ctx)
        if _watched(d_o, d_lse):
            if d_o is None:
                d_o = torch.zeros_like(o)
            results = (o, lse, d_o, d_lse, ctx.dist_threshold)
            dq1, dk1, dq2, dk2, dv, d_sinks = torch.ops.ferroflash.piecewise_backward(
                q1, k1, q2, k2, v, slopes, sinks, *results, *_op_options(lengths, *options)
            )
            d_sinks = [] if sinks is None else [d_sinks]
        else:
            second = (q2, k2, ctx.dist_threshold)
            dq1, dk1, dv, dq2, dk2, *d_sinks = _launch.backward(
                q1, k1, v, second, slopes, sinks, lengths, o, lse, d_o, d_lse, None, *options
            )
        return dq1, dk1, dq2, dk2, dv, None, d_sinks[0] if d_sinks else None, None, None, None, None


_apply_attention = _apply(_Attention)
_apply_qkv_packed = _apply(_QkvPacked)
_apply_kv_packed = _apply(_KvPacked)
_apply_piecewise = _apply(_Piecewise)


def attention(q, k, v, slopes, sinks, lengths, options, return_lse):
    """Returns O, or (O, LSE). `options` are (left, right, scale, softcap, dropout, deterministic).

    `lengths` are None or what `_launch.lengths_of` returns.
    """
    if _is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    ):
        return _apply_attention(q, k, v, slopes, sinks, lengths, options, return_lse)
    o, lse = _launch.forward(q, k, v, None, slopes, sinks, lengths, *options[:5], return_lse)
    return (o, lse) if return_lse else o


def qkv_packed(qkv, slopes, lengths, options, return_lse):
    """Attention over one packed tensor."""
    if _is_grad_enabled() and qkv.requires_grad:
        return _apply_qkv_packed(qkv, slopes, lengths, options, return_lse)
    return attention(*qkv.unbind(-3), slopes, None, lengths, options, return_lse)


def kv_packed(q, kv, slopes, lengths, options, return_lse):
    """Attention over queries, and keys and values in one packed tensor."""
    if _is_grad_enabled() and kv.requires_grad:
        return _apply_kv_packed(q, kv, slopes, lengths, options, return_lse)
    return attention(q, *kv.unbind(-3), slopes, None, lengths, options, return_lse)


def piecewise(q1, k1, q2, k2, v, slopes, sinks, lengths, dist_threshold, options, return_lse):
    """Piecewise attention."""
    if _is_grad_enabled() and any(x is not None and x.requires_grad for x in (q1, k1, q2, k2, v, sinks)):
        return _apply_piecewise(q1, k1, q2, k2, v, slopes, sinks, lengths, dist_threshold, options, return_lse)
    o, lse = _launch.forward(q1, k1, v, (q2, k2, dist_threshold), slopes, sinks, lengths, *options[:5], return_lse)
    return (o, lse) if return_lse else o
