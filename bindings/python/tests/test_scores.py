"""Softcap, ALiBi's slopes and sinks, alone and together, against f64."""

import pytest
import torch

import ferroflash
from reference import assert_close, attention, gradients, tensors

BATCH, HEADS = 2, 4
FEATURES = {
    "softcap": ("softcap",),
    "slopes": ("slopes",),
    "slopes per item": ("slopes per item",),
    "sinks": ("sinks",),
    "softcap and sinks": ("softcap", "sinks"),
    "all": ("softcap", "slopes per item", "sinks"),
}
NAMES = ("o", "lse", "dq", "dk", "dv", "dq2", "dk2")


def options(name, device):
    """Returns keyword arguments of the reference: softcap, slopes and sinks."""
    features = FEATURES[name]
    made = {}
    if "softcap" in features:
        made["softcap"] = 1.5
    if "slopes" in features:
        made["slopes"] = torch.rand(HEADS, device=device) * 0.3
    if "slopes per item" in features:
        made["slopes"] = torch.rand(BATCH, HEADS, device=device) * 0.3
    if "sinks" in features:
        made["sinks"] = torch.randn(HEADS, device=device).requires_grad_()
    return made


def ours(made):
    """Returns the same arguments with ferroflash's names."""
    return {"alibi_slopes" if name == "slopes" else name: value for name, value in made.items()}


def check(run, inputs, made, **reference):
    """Compares O, LSE and all gradients. `run` takes the inputs and keyword arguments, and returns (O, LSE)."""
    device = inputs[0].device
    weights = None

    def both(function, inputs, made):
        nonlocal weights
        results = function(*inputs, made)
        if weights is None:
            weights = [torch.randn(result.shape, device=device) for result in results]
        # Rows without a key and without a sink have an infinite LSE, which has no gradient.
        finite = [result.nan_to_num(neginf=0.0) for result in results]
        sinks = [made["sinks"]] if "sinks" in made else []
        return [*results, *gradients(finite, [*inputs, *sinks], weights)]

    def exactly(dtype):
        copies = [x.detach().to(dtype).requires_grad_() for x in inputs]
        mine = dict(made)
        if "sinks" in made:
            mine["sinks"] = made["sinks"].detach().to(dtype).requires_grad_()

        def function(q, k, v, *rest):
            *far, made = rest
            rest = {name: value for name, value in reference.items() if name != "threshold"}
            second = (*far, reference["threshold"]) if far else None
            return attention(q, k, v, second=second, dtype=dtype, **rest, **made)[:2]

        return both(function, copies, mine)

    found = both(lambda *rest: run(*rest[:-1], **ours(rest[-1])), inputs, made)
    exact, plain = exactly(torch.float64), exactly(inputs[0].dtype)
    names = NAMES[: 2 + len(inputs)]
    for name, *three in zip(names, found, exact, plain, strict=False):
        assert_close(*three, name)
    if "sinks" in made:
        assert_sink_gradient(found[-1], made["sinks"], found[:2], weights)


def assert_sink_gradient(found, sinks, results, weights):
    """Compares the gradient of the sinks with its formula, of the pass's own O and LSE, which are judged by themselves.

    It is a sum over all rows of a head, so the tolerance is 1e-5 of the sum of the terms' absolute values, or of 1. The
    error of a computation in 16 bits would be that of a few sums, and by chance any of them may be exact.
    """
    (o, lse), (d_o, d_lse) = results, weights
    dot = (o.double() * d_o.to(o.dtype).double()).sum(-1).transpose(1, 2)
    terms = (sinks.double()[:, None] - lse.double()).exp() * (d_lse.double() - dot)
    expected, size = terms.sum((0, 2)), terms.abs().sum((0, 2)).max().item()
    error = (found.double() - expected).abs().max().item()
    assert error <= 1e-5 * max(size, 1.0), f"d_sinks: error {error:.3g}, size of the terms {size:.3g}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (20, 7)])
@pytest.mark.parametrize("name", FEATURES)
def test_both_passes(device, name, window, dtype):
    inputs = tensors((BATCH, 70, HEADS, 64), (BATCH, 90, 2, 64), dtype, device)

    def run(q, k, v, **made):
        return ferroflash.attention(q, k, v, window_size=window, return_lse=True, **made)

    check(run, inputs, options(name, device), left=window[0], right=window[1])


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [20, 36, 128, 256])
def test_head_dims(device, head_dim, deterministic):
    inputs = tensors((BATCH, 40, HEADS, head_dim), (BATCH, 50, 2, head_dim), device=device)

    def run(q, k, v, **made):
        return ferroflash.attention(q, k, v, causal=True, return_lse=True, deterministic=deterministic, **made)

    check(run, inputs, options("all", device), right=0)


@pytest.mark.parametrize("name", FEATURES)
def test_piecewise(device, name):
    inputs = tensors((BATCH, 50, HEADS, 64), (BATCH, 60, 2, 64), device=device, count=5)

    def run(q1, k1, v, q2, k2, **made):
        return ferroflash.piecewise(q1, k1, q2, k2, v, 11, causal=True, return_lse=True, **made)

    check(run, inputs, options(name, device), right=0, threshold=11)


def test_dropout(device):
    inputs = tensors((BATCH, 50, HEADS, 64), (BATCH, 60, 2, 64), device=device)
    kept = ferroflash.dropout_mask(BATCH, HEADS, 50, 60, 0.3, (5, 6), device=device)

    def run(q, k, v, **made):
        rest = {"dropout_p": 0.3, "seed_offset": (5, 6), "return_lse": True}
        return ferroflash.attention(q, k, v, window_size=(30, 5), **rest, **made)

    check(run, inputs, options("all", device), left=30, right=5, kept=kept, p=0.3)


@pytest.mark.parametrize("head_dim", [64, 44])
@pytest.mark.parametrize("name", FEATURES)
def test_total_attention(device, name, head_dim):
    q, k, v = tensors((BATCH, 50, HEADS, head_dim), (BATCH, 60, 2, head_dim), device=device)
    made = options(name, device)
    _, lse = ferroflash.attention(q, k, v, causal=True, return_lse=True, **ours(made))
    rest = {key: value for key, value in ours(made).items() if key != "sinks"}
    total = ferroflash.total_attention(q, k, lse, causal=True, **rest)
    exact, plain = (
        attention(q, k, v, right=0, **made, dtype=dtype)[2].sum(2) for dtype in (torch.float64, torch.float32)
    )
    assert_close(total, exact, plain + 1e-4, "total")


def test_no_bound_and_no_input_change_nothing(device):
    q, k, v = tensors((BATCH, 50, HEADS, 64), (BATCH, 60, 2, 64), device=device)
    expected = ferroflash.attention(q, k, v)
    for softcap in (None, 0, 0.0):
        assert ferroflash.attention(q, k, v, softcap=softcap).equal(expected)
    assert ferroflash.attention(q, k, v, alibi_slopes=torch.zeros(HEADS, device=device)).allclose(expected, atol=1e-2)
    none = torch.full((HEADS,), -torch.inf, device=device)
    assert ferroflash.attention(q, k, v, sinks=none).allclose(expected, atol=1e-2)


def test_rows_without_keys_have_their_sink(device):
    q, k, v = tensors((1, 90, HEADS, 64), (1, 30, 2, 64), device=device)
    sinks = torch.randn(HEADS, device=device).requires_grad_()
    o, lse = ferroflash.attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
    assert (o[:, :60] == 0).all()
    assert lse[:, :, :60].allclose(sinks[None, :, None].expand(1, HEADS, 60))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_strides(device, dtype):
    """Slopes and sinks are converted, and the gradient of a parameter has its dtype."""
    q, k, v = tensors((BATCH, 50, HEADS, 64), (BATCH, 60, 2, 64), device=device)
    sinks = torch.nn.Parameter(torch.randn(HEADS, 2, device=device).to(dtype)[:, 0])
    slopes = torch.rand(BATCH, HEADS, 3, device=device).to(dtype)[..., 1].requires_grad_()
    given = ferroflash.attention(q, k, v, sinks=sinks, alibi_slopes=slopes)
    d_o = torch.randn_like(given)
    single = sinks.detach().float().contiguous().requires_grad_()
    converted = ferroflash.attention(q, k, v, sinks=single, alibi_slopes=slopes.detach().float().contiguous())
    assert given.equal(converted)
    given.backward(d_o)
    (expected,) = torch.autograd.grad(converted, single, d_o)
    assert sinks.grad.dtype == dtype and sinks.grad.allclose(expected.to(dtype))
    # Slopes have no gradient.
    assert slopes.grad is None


def test_sinks_alone_need_a_gradient(device):
    q, k, v = (x.detach() for x in tensors((BATCH, 50, HEADS, 64), (BATCH, 60, 2, 64), device=device))
    sinks = torch.randn(HEADS, device=device).requires_grad_()
    o = ferroflash.attention(q, k, v, sinks=sinks)
    d_o = torch.randn_like(o)
    (found,) = torch.autograd.grad(o, sinks, d_o)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    all_of_them = torch.autograd.grad(ferroflash.attention(*inputs, sinks=sinks), [*inputs, sinks], d_o)
    assert found.equal(all_of_them[3])
    frozen = torch.autograd.grad(ferroflash.attention(*inputs, sinks=sinks.detach()), inputs, d_o)
    assert all(a.allclose(b, atol=1e-2) for a, b in zip(frozen, all_of_them[:3], strict=True))


def test_errors(device):
    q, k, v = (x.detach() for x in tensors((BATCH, 50, HEADS, 64), (BATCH, 60, 2, 64), device=device))
    for value in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="^softcap is .*; a finite number above 0 is needed"):
            ferroflash.attention(q, k, v, softcap=value)
    ones = torch.ones(HEADS + 1, device=device)
    with pytest.raises(ValueError, match=r"^alibi_slopes has the shape .*; \[4\] \(heads\) or \(batch, heads\) is"):
        ferroflash.attention(q, k, v, alibi_slopes=ones)
    with pytest.raises(ValueError, match=r"^alibi_slopes has the shape .*; \[2, 4\] \(batch, heads\) or \(heads\) is"):
        ferroflash.total_attention(q, k, torch.zeros(BATCH, HEADS, 50, device=device), alibi_slopes=ones[None])
    with pytest.raises(ValueError, match=r"^sinks has the shape .*; \[4\] \(heads\) is needed"):
        ferroflash.attention(q, k, v, sinks=ones)
    with pytest.raises(TypeError, match="^sinks is torch.int64; floating-point numbers are needed"):
        ferroflash.attention(q, k, v, sinks=torch.ones(HEADS, dtype=torch.int64, device=device))
    with pytest.raises(TypeError, match="^alibi_slopes is <class 'list'>; a torch.Tensor is needed"):
        ferroflash.attention(q, k, v, alibi_slopes=[0.1] * HEADS)


def test_sinks_on_another_device(gpu):
    q, k, v = (x.detach() for x in tensors((BATCH, 50, HEADS, 64), (BATCH, 60, 2, 64), device=gpu))
    with pytest.raises(ValueError, match="^sinks is on cpu; q is on cuda:0"):
        ferroflash.attention(q, k, v, sinks=torch.ones(HEADS))
