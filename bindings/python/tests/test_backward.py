"""Gradients against f64 autograd."""

import pytest
import torch
import torch.utils.checkpoint

import ferroflash
from reference import assert_close, attention, gradients, tensors

NAMES = ("dq", "dk", "dv", "dq2", "dk2")


def check(run, inputs, weights, **options):
    """Compares the gradients of `run` with those of the reference. `weights` are the gradients of O, and of the LSE."""
    count = len(weights)

    def reference(dtype):
        copies = [x.detach().to(dtype).requires_grad_() for x in inputs]
        q, k, v, *far = copies
        second = (*far, options["threshold"]) if far else None
        rest = {name: value for name, value in options.items() if name != "threshold"}
        return gradients(attention(q, k, v, second=second, dtype=dtype, **rest)[:count], copies, weights)

    found = gradients(run(*inputs)[:count], inputs, weights)
    exact, plain = reference(torch.float64), reference(inputs[0].dtype)
    for name, *three in zip(NAMES, found, exact, plain, strict=False):
        assert_close(*three, name)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape_q", "shape_k", "window"),
    [
        ((2, 75, 4, 64), (2, 130, 2, 64), (-1, -1)),
        ((1, 100, 2, 128), (1, 100, 1, 128), (-1, 0)),
        ((1, 90, 2, 32), (1, 60, 2, 32), (20, 7)),
        ((1, 40, 2, 256), (1, 70, 2, 256), (-1, 0)),
        ((1, 33, 2, 52), (1, 47, 2, 52), (-1, -1)),
    ],
)
def test_gradients(device, shape_q, shape_k, window, dtype, deterministic):
    inputs = tensors(shape_q, shape_k, dtype, device)

    def run(q, k, v):
        return (ferroflash.attention(q, k, v, window_size=window, deterministic=deterministic),)

    weights = [torch.randn(shape_q, device=device).to(dtype)]
    check(run, inputs, weights, left=window[0], right=window[1])


def test_gradients_through_the_lse(device):
    inputs = tensors((2, 70, 4, 64), (2, 90, 2, 64), device=device)

    def run(q, k, v):
        return ferroflash.attention(q, k, v, causal=True, return_lse=True)

    weights = [torch.randn(2, 70, 4, 64, device=device), torch.randn(2, 4, 70, device=device)]
    check(run, inputs, weights, right=0)
    # O is used, and the LSE is not.
    check(run, inputs, weights[:1], right=0)


def test_only_the_lse_is_used(device):
    q, k, v = tensors((1, 40, 2, 64), (1, 50, 2, 64), device=device)
    weight = torch.randn(1, 2, 40, device=device)
    _, lse = ferroflash.attention(q, k, v, return_lse=True)
    found = gradients([lse], [q, k, v], [weight])
    assert (found[2] == 0).all()
    copies = [x.detach().double().requires_grad_() for x in (q, k)]
    exact = gradients([attention(*copies, v)[1]], copies, [weight])
    rounded = [x.detach().clone().requires_grad_() for x in (q, k)]
    plain = gradients([attention(*rounded, v, dtype=q.dtype)[1]], rounded, [weight])
    for i in range(2):
        assert_close(found[i], exact[i], plain[i], NAMES[i])


@pytest.mark.parametrize("threshold", [0, 25])
@pytest.mark.parametrize("causal", [False, True])
def test_piecewise(device, threshold, causal):
    inputs = tensors((1, 80, 4, 64), (1, 100, 2, 64), device=device, count=5)

    def run(q1, k1, v, q2, k2):
        return ferroflash.piecewise(q1, k1, q2, k2, v, threshold, causal=causal, return_lse=True)

    weights = [torch.randn(1, 80, 4, 64, device=device), torch.randn(1, 4, 80, device=device)]
    check(run, inputs, weights, threshold=threshold, right=0 if causal else -1)


def test_an_output_that_is_used_twice(device):
    q, k, v = tensors((1, 50, 2, 64), (1, 50, 2, 64), device=device)
    first, second = (torch.randn_like(q) for _ in range(2))
    o = ferroflash.attention(q, k, v, deterministic=True)
    found = torch.autograd.grad((o * first).sum() + (o * second).sum(), (q, k, v), retain_graph=True)
    expected = torch.autograd.grad(o, (q, k, v), first + second)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["broadcast", "heads first", "sliced", "head_dim last but one", "one for all"])
def test_gradients_of_any_strides(device, kind):
    q, k, v = tensors((2, 50, 4, 64), (2, 60, 4, 64), device=device)
    d_o = {
        "broadcast": lambda: torch.randn(1, 1, 1, 64, device=device).expand(2, 50, 4, 64),
        "heads first": lambda: torch.randn(2, 4, 50, 64, device=device).transpose(1, 2),
        "sliced": lambda: torch.randn(2, 50, 4, 67, device=device)[..., 1:65],
        "head_dim last but one": lambda: torch.randn(2, 50, 64, 4, device=device).transpose(2, 3),
        "one for all": lambda: torch.ones((), device=device).expand(2, 50, 4, 64),
    }[kind]().to(q.dtype)
    o, lse = ferroflash.attention(q, k, v, causal=True, deterministic=True, return_lse=True)
    d_lse = torch.randn(2, 4, 1, device=device).expand(2, 4, 50)
    found = torch.autograd.grad((o, lse), (q, k, v), (d_o, d_lse), retain_graph=True)
    expected = torch.autograd.grad((o, lse), (q, k, v), (d_o.contiguous(), d_lse.contiguous()))
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_some_inputs_need_gradients(device, needed):
    inputs = tensors((1, 50, 2, 64), (1, 60, 2, 64), device=device)
    d_o = torch.randn_like(inputs[0])
    expected = torch.autograd.grad(ferroflash.attention(*inputs, deterministic=True), inputs, d_o)
    some = [x.detach().requires_grad_(i in needed) for i, x in enumerate(inputs)]
    ferroflash.attention(*some, deterministic=True).backward(d_o)
    for i, x in enumerate(some):
        assert (x.grad is None) == (i not in needed)
        assert x.grad is None or x.grad.equal(expected[i])


def test_exact_gradients_repeat(device):
    inputs = tensors((2, 200, 4, 64), (2, 200, 2, 64), device=device)
    d_o = torch.randn_like(inputs[0])

    def run():
        return torch.autograd.grad(ferroflash.attention(*inputs, causal=True, deterministic=True), inputs, d_o)

    assert all(a.equal(b) for a, b in zip(run(), run(), strict=True))


def test_there_is_no_second_derivative(device):
    q, k, v = tensors((1, 20, 2, 64), (1, 20, 2, 64), device=device)
    o = ferroflash.attention(q, k, v)
    (dq,) = torch.autograd.grad(o.float().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dq.float().sum().backward()


def test_checkpointing(device):
    inputs = tensors((1, 50, 2, 64), (1, 60, 2, 64), device=device)
    d_o = torch.randn_like(inputs[0])

    def run(q, k, v):
        return ferroflash.attention(q, k, v, dropout_p=0.25)

    torch.manual_seed(3)
    expected = torch.autograd.grad(run(*inputs), inputs, d_o)
    torch.manual_seed(3)
    o = torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=False)
    found = torch.autograd.grad(o, inputs, d_o)
    assert all(torch.allclose(a, b, atol=1e-2) for a, b in zip(found, expected, strict=True))
