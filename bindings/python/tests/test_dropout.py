"""Dropout: the mask of `dropout_mask`, the probability, and where the seed comes from."""

import pytest
import torch

import ferroflash
from reference import assert_close, attention, gradients, tensors


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_both_passes_use_the_mask(device, p):
    inputs = tensors((2, 60, 4, 64), (2, 90, 2, 64), device=device)
    seed_offset = (-5, 2**64 - 4)
    kept = ferroflash.dropout_mask(2, 4, 60, 90, p, seed_offset, device=device)
    assert kept.shape == (2, 4, 60, 90) and kept.dtype == torch.bool and kept.device.type == device
    weights = [torch.randn(2, 60, 4, 64, device=device), torch.randn(2, 4, 60, device=device)]

    def both(results, inputs):
        return [*results, *gradients(results, inputs, weights)]

    options = {"causal": True, "dropout_p": p, "seed_offset": seed_offset, "return_lse": True}
    found = both(ferroflash.attention(*inputs, **options), inputs)
    copies = [[x.detach().to(dtype).requires_grad_() for x in inputs] for dtype in (torch.float64, torch.bfloat16)]
    exact, plain = (both(attention(*x, right=0, kept=kept, p=p, dtype=x[0].dtype)[:2], x) for x in copies)
    for name, *three in zip(("o", "lse", "dq", "dk", "dv"), found, exact, plain, strict=True):
        assert_close(*three, name)


def test_piecewise(device):
    q1, k1, v, q2, k2 = tensors((1, 60, 2, 64), (1, 60, 2, 64), device=device, count=5)
    kept = ferroflash.dropout_mask(1, 2, 60, 60, 0.5, (3, 8), device=device)
    o = ferroflash.piecewise(q1, k1, q2, k2, v, 11, dropout_p=0.5, seed_offset=(3, 8))
    exact, plain = (
        attention(q1, k1, v, second=(q2, k2, 11), kept=kept, p=0.5, dtype=dtype)[0]
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert_close(o, exact, plain)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.17, 0.8])
def test_probability(device, p):
    """The probability is the one asked for: deviations are within five of their standard deviations."""
    kept = ferroflash.dropout_mask(2, 4, 1000, 1003, p, (7, 0), device=device)
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * deviation
    assert kept.cpu().equal(ferroflash.dropout_mask(2, 4, 1000, 1003, p, (7, 0)))


def test_masks_without_dropout_and_without_weights(device):
    assert ferroflash.dropout_mask(1, 2, 10, 20, 0.0, (7, 0), device=device).all()
    assert ferroflash.dropout_mask(0, 2, 100, 200, 0.25, (7, 0), device=device).shape == (0, 2, 100, 200)


def test_the_generator_gives_the_mask(device):
    q, k, v = tensors((1, 50, 2, 64), (1, 50, 2, 64), device=device)

    def run():
        return ferroflash.attention(q, k, v, dropout_p=0.5)

    torch.manual_seed(1)
    first, second = run(), run()
    torch.manual_seed(1)
    assert run().equal(first)
    assert run().equal(second) and not second.equal(first)
    state = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    third = run()
    (torch.set_rng_state if device == "cpu" else torch.cuda.set_rng_state)(state)
    assert run().equal(third)


def test_the_generator_is_left_alone_without_dropout(device):
    q, k, v = tensors((1, 50, 2, 64), (1, 50, 2, 64), device=device)
    get = torch.get_rng_state if device == "cpu" else torch.cuda.get_rng_state
    state = get()
    ferroflash.attention(q, k, v)
    ferroflash.attention(q, k, v, dropout_p=0.5, seed_offset=(1, 2))
    assert get().equal(state)


def test_gpu_offsets_count_in_fours(gpu):
    q, k, v = tensors((1, 50, 2, 64), (1, 50, 2, 64), device=gpu)
    generator = torch.cuda.default_generators[q.get_device()]
    before = generator.get_offset()
    ferroflash.attention(q, k, v, dropout_p=0.5)
    assert generator.get_offset() == before + 4


def test_compiled_graphs_draw_a_mask_in_every_run(device):
    q, k, v = tensors((1, 50, 2, 64), (1, 50, 2, 64), device=device)
    run = torch.compile(
        lambda q, k, v: ferroflash.attention(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    first, second = run(q, k, v), run(q, k, v)
    assert not first.equal(second)
    given = torch.compile(
        lambda q, k, v: ferroflash.attention(q, k, v, dropout_p=0.5, seed_offset=(2**63 + 1, 8)),
        fullgraph=True,
        backend="aot_eager",
    )
    assert given(q, k, v).equal(ferroflash.attention(q, k, v, dropout_p=0.5, seed_offset=(2**63 + 1, 8)))


NUMBERS = (-5, 2**63 - 4)
TENSORS = {
    "contiguous": lambda device: torch.tensor(NUMBERS, device=device),
    # Kernels take neither as it is.
    "sliced": lambda device: torch.tensor((1, *NUMBERS), device=device)[1:],
    "strided": lambda device: torch.tensor((NUMBERS[0], 1, NUMBERS[1]), device=device)[::2],
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("layout", TENSORS)
@pytest.mark.parametrize("count", [3, 5], ids=["attention", "piecewise"])
def test_a_tensor_gives_the_mask_of_its_numbers(device, count, layout, compiled):
    inputs = tensors((2, 50, 2, 64), (2, 50, 2, 64), device=device, count=count)
    options = {"dropout_p": 0.5, "causal": True, "deterministic": True}

    def run(inputs, seed_offset):
        if count == 3:
            return ferroflash.attention(*inputs, seed_offset=seed_offset, **options)
        q1, k1, v, q2, k2 = inputs
        return ferroflash.piecewise(q1, k1, q2, k2, v, 9, seed_offset=seed_offset, **options)

    expected = run(inputs, NUMBERS)
    d_o = torch.randn_like(expected)
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = run(inputs, TENSORS[layout](device))
    assert found.equal(expected)
    pairs = zip(torch.autograd.grad(found, inputs, d_o), torch.autograd.grad(expected, inputs, d_o), strict=True)
    assert all(a.equal(b) for a, b in pairs)
    with torch.no_grad():
        assert run(inputs, TENSORS[layout](device)).equal(expected)


def test_packed_functions_keep_a_tensor(device, monkeypatch):
    """The draw of a captured graph is a tensor, which the packed functions keep for their backward pass."""
    qkv = torch.randn(2, 50, 3, 2, 64, device=device).bfloat16().requires_grad_()
    q, kv = (x.detach().clone().requires_grad_() for x in (qkv[:, :, 0], qkv[:, :, 1:]))
    results = []
    for drawn in (NUMBERS, TENSORS["contiguous"](device)):
        monkeypatch.setattr(ferroflash.ops, "draw", lambda q, seed_offset, drawn=drawn: drawn)
        packed = ferroflash.flash_attn_qkvpacked_func(qkv, 0.5)
        pair = ferroflash.flash_attn_kvpacked_func(q, kv, 0.5)
        probs = ferroflash.flash_attn_func(*qkv.unbind(2), 0.5, return_attn_probs=True)
        found = torch.autograd.grad(packed, qkv, packed), torch.autograd.grad(pair, (q, kv), pair)
        results.append([packed, pair, *probs, *found[0], *found[1]])
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_a_tensor_belongs_to_both_passes(device):
    q, k, v = tensors((1, 50, 2, 64), (1, 50, 2, 64), device=device)
    numbers = torch.tensor(NUMBERS, device=device)
    o = ferroflash.attention(q, k, v, dropout_p=0.5, seed_offset=numbers)
    numbers += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_masks_of_a_tensor(device):
    expected = ferroflash.dropout_mask(1, 2, 60, 70, 0.5, NUMBERS)
    assert ferroflash.dropout_mask(1, 2, 60, 70, 0.5, torch.tensor(NUMBERS, device=device)).equal(expected)
    found = torch.ops.ferroflash.dropout_mask(torch.empty(0, device=device), (1, 2, 60, 70), 0.5, torch.tensor(NUMBERS))
    assert found.cpu().equal(expected)


def test_a_tensor_on_the_cpu_is_read_for_a_gpu(gpu):
    q, k, v = tensors((1, 50, 2, 64), (1, 50, 2, 64), device=gpu)
    found, expected = (
        ferroflash.attention(q, k, v, dropout_p=0.5, seed_offset=drawn) for drawn in (torch.tensor(NUMBERS), NUMBERS)
    )
    assert found.equal(expected)


def test_exported_programs_draw_a_mask_in_every_run(device):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return ferroflash.attention(q, k, v, dropout_p=0.5)

    inputs = tuple(x.detach() for x in tensors((1, 50, 2, 64), (1, 50, 2, 64), device=device))
    run = torch.export.export(Module(), inputs).module()
    torch.manual_seed(1)
    first, second = run(*inputs), run(*inputs)
    torch.manual_seed(1)
    assert run(*inputs).equal(first) and not second.equal(first)
