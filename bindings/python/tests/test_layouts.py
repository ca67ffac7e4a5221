"""Layouts that kernels take run without a copy; others are copied, and the first copy warns."""

import warnings

import pytest
import torch

import ferroflash
from ferroflash import _launch
from reference import tensors

TAKEN = {
    "rows first": lambda make: make(2, 40, 4, 64),
    "heads first": lambda make: make(2, 4, 40, 64).transpose(1, 2),
    "batch last but one": lambda make: make(40, 4, 2, 64).permute(2, 0, 1, 3),
    "packed": lambda make: make(2, 40, 3, 4, 64)[:, :, 1],
    "padded rows": lambda make: make(2, 40, 4, 72)[..., :64],
    "behind the start": lambda make: make(2, 48, 4, 64)[:, 8:],
    "every second": lambda make: make(2, 80, 8, 64)[:, ::2, 1::2],
    "repeated heads": lambda make: make(2, 40, 1, 64).expand(2, 40, 4, 64),
    "repeated batch": lambda make: make(1, 40, 4, 64).expand(2, 40, 4, 64),
}
COPIED = {
    "odd rows": lambda make: make(2, 40, 4, 67)[..., :64],
    "head_dim with a stride": lambda make: make(2, 40, 4, 128)[..., ::2],
    "head_dim not last": lambda make: make(2, 40, 64, 4).transpose(2, 3),
    "repeated elements": lambda make: make(2, 40, 4, 1).expand(2, 40, 4, 64),
}


def maker(device):
    return lambda *shape: torch.randn(shape, device=device).to(torch.bfloat16)


@pytest.mark.parametrize("operand", [0, 1, 2])
@pytest.mark.parametrize("name", [*TAKEN, *COPIED])
def test_layouts(device, name, operand):
    taken = name in TAKEN
    inputs = [x.detach() for x in tensors((2, 40, 4, 64), (2, 40, 4, 64), device=device)]
    inputs[operand] = (TAKEN | COPIED)[name](maker(device))
    contiguous = [x.contiguous().requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    expected = ferroflash.attention(*contiguous, causal=True)
    d_o = torch.randn_like(expected)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = ferroflash.attention(*inputs, causal=True)
        gradients = torch.autograd.grad(found, inputs, d_o)
    assert found.equal(expected)
    for x, gradient, exact in zip(inputs, gradients, torch.autograd.grad(expected, contiguous, d_o), strict=True):
        assert gradient.shape == x.shape and torch.allclose(gradient, exact, atol=1e-2)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == (0 if taken else 1), texts
    if not taken:
        assert f"ferroflash copies {'qkv'[operand]}, whose strides are" in texts[0]
        assert caught[0].filename == __file__


def test_memory_at_an_odd_address(device):
    # The CPU takes any address.
    memory = torch.randn(2 * 40 * 4 * 64 + 3, device=device).to(torch.bfloat16)
    q = memory[3:].view(2, 40, 4, 64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = ferroflash.attention(q, q, q)
    assert len(caught) == (0 if device == "cpu" else 1)
    assert found.equal(ferroflash.attention(*[q.clone()] * 3))


def test_the_warning_comes_once():
    q = torch.randn(2, 40, 64, 4).to(torch.bfloat16).transpose(2, 3)
    k = torch.randn(2, 40, 4, 64).to(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"kernels take a contiguous head_dim"):
        ferroflash.attention(q, k, k)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ferroflash.attention(q, k, k)
        ferroflash.attention(k, q, k)
    assert _launch._warned


def test_piecewise_and_total_attention_copy_too(device):
    make = maker(device)
    inputs = [make(2, 40, 64, 4).transpose(2, 3) for _ in range(5)]
    copies = [x.contiguous() for x in inputs]
    with pytest.warns(UserWarning, match="copies q,"):
        found = ferroflash.piecewise(*inputs, 5, causal=True)
    assert found.equal(ferroflash.piecewise(*copies, 5, causal=True))
    one = [*copies]
    one[3] = inputs[3].detach().requires_grad_()
    o = ferroflash.piecewise(*one, 5, causal=True)
    assert o.equal(found)
    o.sum().backward()
    assert one[3].grad.shape == one[3].shape
    _, lse = ferroflash.attention(*copies[:3], return_lse=True)
    strided = lse.transpose(1, 2).contiguous().transpose(1, 2)
    total = ferroflash.total_attention(*copies[:2], lse)
    assert ferroflash.total_attention(*inputs[:2], strided).equal(total)


def test_results_have_the_order_of_strides_of_q(device):
    make = maker(device)
    q = make(2, 4, 40, 64).transpose(1, 2).requires_grad_()
    k = make(2, 40, 4, 64)
    o = ferroflash.attention(q, k, k)
    assert o.stride() == q.stride()
    assert o.transpose(1, 2).is_contiguous()
