"""The operators of torch.library, namespace `ferroflash`, which torch.compile, torch.export and dispatch modes see.

They are defined for the CPU and for CUDA, with fake kernels and gradients. Plain eager calls go around them
(`_eager.py`), because an operator in Python costs tens of microseconds.

`seed_offset` is an int64 tensor of two elements, so that a graph can draw it anew in every run; it is None without
dropout. Kernels read it on the device of the queries; on the CPU, queries on a GPU take its numbers at the call. A
negative `left` or `right` is no bound. Without `return_lse` the LSE has no elements, and without `sinks` neither has
their gradient. `slopes` and `sinks` are float32 and contiguous. With `cu_seqlens_q`, tensors are (total, heads,
head_dim).
"""

from __future__ import annotations

import torch

from . import _launch

_OPTIONS = (
    "SymInt left, SymInt right, float? scale, float? softcap, float dropout_p, Tensor? seed_offset, bool deterministic"
)
_LENGTHS = (
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_k=None, SymInt? max_seqlen_q=None, "
    "SymInt? max_seqlen_k=None"
)
# Places of `return_lse` among the arguments of the two forward operators.
_RETURN_LSE, _RETURN_LSE_OF_PIECEWISE = 12, 15
# Number of `_LENGTHS`, the last arguments of every operator but one.
_LENGTHS_COUNT = 5
_OPTIONAL = "Tensor? slopes, Tensor? sinks"
_RESULTS = "Tensor o, Tensor lse, Tensor d_o, Tensor? d_lse"
_SCHEMAS = {
    "forward": (
        f"(Tensor q, Tensor k, Tensor v, {_OPTIONAL}, {_OPTIONS}, bool return_lse, {_LENGTHS}) -> (Tensor, Tensor)"
    ),
    "backward": (
        f"(Tensor q, Tensor k, Tensor v, {_OPTIONAL}, {_RESULTS}, {_OPTIONS}, {_LENGTHS})"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "piecewise_forward": (
        f"(Tensor q1, Tensor k1, Tensor q2, Tensor k2, Tensor v, {_OPTIONAL}, SymInt dist_threshold, {_OPTIONS}, "
        f"bool return_lse, {_LENGTHS}) -> (Tensor, Tensor)"
    ),
    "piecewise_backward": (
        f"(Tensor q1, Tensor k1, Tensor q2, Tensor k2, Tensor v, {_OPTIONAL}, {_RESULTS}, SymInt dist_threshold, "
        f"{_OPTIONS}, {_LENGTHS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "total_attention": (
        "(Tensor q, Tensor k, Tensor lse, Tensor? slopes, SymInt left, SymInt right, float? scale, float? softcap, "
        f"{_LENGTHS}) -> Tensor"
    ),
    "dropout_mask": "(Tensor device_of, SymInt[] shape, float dropout_p, Tensor seed_offset) -> Tensor",
}


def _dropout(q, p, seed_offset):
    """Returns the native form of dropout."""
    if p == 0.0:
        return None
    if seed_offset is None:
        raise ValueError("seed_offset is None; dropout needs an int64 tensor of a seed and an offset")
    return _launch.dropout(q, p, seed_offset)


def _lengths(arguments):
    """Returns lengths of sequences from the last arguments of an operator, which are left out if they are None."""
    return _launch.lengths_of(*arguments, *(None,) * (_LENGTHS_COUNT - len(arguments)))


def _or_empty(q, result):
    """Returns a float32 result, or a tensor without elements if there is none."""
    return q.new_empty((0,), dtype=torch.float32) if result is None else result


def forward(q, k, v, slopes, sinks, *options):
    left, right, scale, softcap, dropout_p, seed_offset, _, return_lse, *lengths = options
    options = (left, right, scale, softcap, _dropout(q, dropout_p, seed_offset), return_lse)
    o, lse = _launch.forward(q, k, v, None, slopes, sinks, _lengths(lengths), *options)
    return o, _or_empty(q, lse)


def backward(q, k, v, slopes, sinks, o, lse, d_o, d_lse, *options):
    left, right, scale, softcap, dropout_p, seed_offset, deterministic, *lengths = options
    options = (left, right, scale, softcap, _dropout(q, dropout_p, seed_offset), deterministic)
    dq, dk, dv, *d_sinks = _launch.backward(
        q, k, v, None, slopes, sinks, _lengths(lengths), o, lse, d_o, d_lse, None, *options
    )
    return dq, dk, dv, _or_empty(q, d_sinks[0] if d_sinks else None)


def piecewise_forward(q1, k1, q2, k2, v, slopes, sinks, dist_threshold, *options):
    left, right, scale, softcap, dropout_p, seed_offset, _, return_lse, *lengths = options
    options = (left, right, scale, softcap, _dropout(q1, dropout_p, seed_offset), return_lse)
    o, lse = _launch.forward(q1, k1, v, (q2, k2, dist_threshold), slopes, sinks, _lengths(lengths), *options)
    return o, _or_empty(q1, lse)


def piecewise_backward(q1, k1, q2, k2, v, slopes, sinks, o, lse, d_o, d_lse, dist_threshold, *options):
    left, right, scale, softcap, dropout_p, seed_offset, deterministic, *lengths = options
    second = (q2, k2, dist_threshold)
    options = (left, right, scale, softcap, _dropout(q1, dropout_p, seed_offset), deterministic)
    dq1, dk1, dv, dq2, dk2, *d_sinks = _launch.backward(
        q1, k1, v, second, slopes, sinks, _lengths(lengths), o, lse, d_o, d_lse, None, *options
    )
    return dq1, dk1, dq2, dk2, dv, _or_empty(q1, d_sinks[0] if d_sinks else None)


def total_attention(q, k, lse, slopes, left, right, scale, softcap, *lengths):
    return _launch.total_attention(q, k, lse, slopes, _lengths(lengths), left, right, scale, softcap)


def dropout_mask(device_of, shape, dropout_p, seed_offset):
    return _launch.dropout_mask(shape, dropout_p, seed_offset, device_of.device)


def _result_like(x):
    """Returns a tensor with the strides that the native functions give a result of the shape of `x`."""
    result = torch.empty_like(x)
    return result if result.stride(-1) == 1 else x.new_empty(x.shape)


def _lines_like(q, rows):
    """Returns a float32 tensor with a number for each row of `rows` and each head of `q`, as an LSE has."""
    *batch, _, heads, _ = q.shape
    return q.new_empty((*batch, heads, rows), dtype=torch.float32)


def _fake_forward(q, return_lse):
    lse = _lines_like(q, q.shape[-3]) if return_lse else q.new_empty((0,), dtype=torch.float32)
    return _result_like(q), lse


def _fake_gradients(inputs, sinks):
    d_sinks = inputs[0].new_empty((0,) if sinks is None else sinks.shape, dtype=torch.float32)
    return *map(_result_like, inputs), d_sinks


def _fake_total_attention(q, k, *rest):
    return _lines_like(q, k.shape[-3])


def _save(ctx, inputs, output, count):
    """Saves `count` tensors of the inputs, and the results."""
    inputs, lengths = inputs[:-_LENGTHS_COUNT], inputs[-_LENGTHS_COUNT:]
    # Before the last, `return_lse`, are the options, and with two pairs the threshold.
    *rest, seed_offset, deterministic, return_lse = inputs[count:]
    if not return_lse:
        raise RuntimeError("return_lse is False; gradients need the LSE: pass True")
    ctx.save_for_backward(*inputs[:count], *output, seed_offset, *lengths[:3])
    ctx.rest, ctx.deterministic, ctx.longest = rest, deterministic, lengths[3:]
    ctx.set_materialize_grads(False)


def _setup_context(ctx, inputs, output):
    _save(ctx, inputs, output, 5)


def _setup_piecewise_context(ctx, inputs, output):
    _save(ctx, inputs, output, 7)


def _gradients(op, ctx, d_o, d_lse):
    *tensors, o, lse, seed_offset, cu_seqlens_q, cu_seqlens_k, seqused_k = ctx.saved_tensors
    if d_o is None:
        d_o = torch.zeros_like(o)
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_k, *ctx.longest)
    *gradients, d_sinks = op(*tensors, o, lse, d_o, d_lse, *ctx.rest, seed_offset, ctx.deterministic, *lengths)
    # Slopes, options and lengths have no gradient.
    others = (None,) * (len(ctx.rest) + 3 + _LENGTHS_COUNT)
    return *gradients, None, None if tensors[-1] is None else d_sinks, *others


def _backward(ctx, d_o, d_lse):
    return _gradients(torch.ops.ferroflash.backward, ctx, d_o, d_lse)


def _backward_piecewise(ctx, d_o, d_lse):
    return _gradients(torch.ops.ferroflash.piecewise_backward, ctx, d_o, d_lse)


def _no_second_derivative(ctx, *gradients):
    raise NotImplementedError("attention has no second derivative")


def _no_derivative(ctx, *gradients):
    raise NotImplementedError("total_attention has no gradient")


def _register():
    """Defines the operators. The tags promise what torch.compile needs, and ask it for inputs strided as traced."""
    kernels = {
        "forward": (forward, lambda *inputs: _fake_forward(inputs[0], inputs[_RETURN_LSE])),
        "backward": (backward, lambda q, k, v, slopes, sinks, *rest: _fake_gradients((q, k, v), sinks)),
        "piecewise_forward": (
            piecewise_forward,
            lambda *inputs: _fake_forward(inputs[0], inputs[_RETURN_LSE_OF_PIECEWISE]),
        ),
        "piecewise_backward": (piecewise_backward, lambda *inputs: _fake_gradients(inputs[:5], inputs[6])),
        "total_attention": (total_attention, _fake_total_attention),
        "dropout_mask": (
            dropout_mask,
            lambda device_of, shape, *rest: device_of.new_empty(shape, dtype=torch.bool),
        ),
    }
    gradients = {
        "forward": (_backward, _setup_context),
        "backward": (_no_second_derivative, None),
        "piecewise_forward": (_backward_piecewise, _setup_piecewise_context),
        "piecewise_backward": (_no_second_derivative, None),
        "total_attention": (_no_derivative, None),
    }
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    for name, schema in _SCHEMAS.items():
        operator = f"ferroflash::{name}"
        torch.library.define(operator, schema, tags=tags)
        kernel, fake = kernels[name]
        torch.library.impl(operator, ("cpu", "cuda"), kernel)
        torch.library.register_fake(operator, fake)
        if name in gradients:
            gradient, setup = gradients[name]
            torch.library.register_autograd(operator, gradient, setup_context=setup)


_register()
