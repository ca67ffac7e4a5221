"""Forward results against f64, for shapes, masks and dtypes."""

import pytest
import torch

import ferroflash
from reference import assert_close, attention, tensors

SHAPES = [
    # batch, seqlen_q, seqlen_k, heads_q, heads_kv, head_dim
    (2, 113, 203, 4, 2, 64),
    (1, 64, 64, 3, 3, 128),
    (1, 1, 339, 8, 1, 96),
    (2, 217, 100, 6, 3, 40),
    (1, 65, 129, 2, 1, 256),
]


def check(found, lse, q, k, v, **options):
    exact = attention(q, k, v, **options)
    plain = attention(q, k, v, **options, dtype=q.dtype)
    assert_close(found, exact[0], plain[0], "o")
    if lse is not None:
        assert lse.dtype == torch.float32
        single = attention(q, k, v, **options, dtype=torch.float32)
        assert_close(lse, exact[1], single[1], "lse")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(device, shape, causal, dtype):
    batch, seqlen_q, seqlen_k, heads_q, heads_kv, head_dim = shape
    q, k, v = tensors((batch, seqlen_q, heads_q, head_dim), (batch, seqlen_k, heads_kv, head_dim), dtype, device)
    with torch.no_grad():
        o, lse = ferroflash.attention(q, k, v, causal=causal, return_lse=True)
        alone = ferroflash.attention(q, k, v, causal=causal)
    assert o.dtype == dtype and o.device == q.device
    assert alone.equal(o)
    check(o, lse, q, k, v, right=0 if causal else -1)


@pytest.mark.parametrize("window", [(0, 0), (17, 0), (-1, 5), (5, -1), (30, 40), (1000, 1000)])
@pytest.mark.parametrize("lengths", [(100, 100), (60, 150), (150, 60)])
def test_windows(device, window, lengths):
    q, k, v = tensors((1, lengths[0], 2, 64), (1, lengths[1], 2, 64), device=device)
    o, lse = ferroflash.attention(q, k, v, window_size=window, return_lse=True)
    check(o, lse, q, k, v, left=window[0], right=window[1])
    o, lse = ferroflash.attention(q, k, v, window_size=window, causal=True, return_lse=True)
    check(o, lse, q, k, v, left=window[0], right=0)


def test_scale(device):
    q, k, v = tensors((1, 50, 2, 64), (1, 70, 2, 64), device=device)
    o, lse = ferroflash.attention(q, k, v, softmax_scale=0.3, return_lse=True)
    check(o, lse, q, k, v, scale=0.3)


@pytest.mark.parametrize("head_dim", [1, 7, 36, 100, 250])
def test_head_dims_that_are_padded(device, head_dim):
    q, k, v = tensors((2, 30, 4, head_dim), (2, 40, 2, head_dim), device=device)
    o, lse = ferroflash.attention(q, k, v, causal=True, return_lse=True)
    check(o, lse, q, k, v, right=0)


def test_rows_without_keys(device):
    q, k, v = tensors((1, 90, 2, 64), (1, 30, 2, 64), device=device)
    o, lse = ferroflash.attention(q, k, v, causal=True, return_lse=True)
    assert (o[:, :60] == 0).all()
    assert (lse[:, :, :60] == -torch.inf).all()
    assert lse[:, :, 60:].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_nothing_to_do(device, shape):
    batch, seqlen_q, seqlen_k = shape
    q, k, v = tensors((batch, seqlen_q, 2, 64), (batch, seqlen_k, 2, 64), device=device)
    o, lse = ferroflash.attention(q, k, v, return_lse=True)
    assert o.shape == q.shape and (o == 0).all()
    assert lse.shape == (batch, 2, seqlen_q) and (lse == -torch.inf).all()
    (o.float().sum()).backward()
    assert all((x.grad == 0).all() and x.grad.shape == x.shape for x in (q, k, v))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("threshold", [-20, 0, 33, 1000])
def test_piecewise(device, threshold, causal):
    q1, k1, v, q2, k2 = tensors((2, 80, 4, 64), (2, 110, 2, 64), device=device, count=5)
    o, lse = ferroflash.piecewise(q1, k1, q2, k2, v, threshold, causal=causal, return_lse=True)
    check(o, lse, q1, k1, v, second=(q2, k2, threshold), right=0 if causal else -1)


def test_piecewise_padded(device):
    q1, k1, v, q2, k2 = tensors((1, 30, 4, 20), (1, 30, 2, 20), device=device, count=5)
    o = ferroflash.piecewise(q1, k1, q2, k2, v, 9, causal=True)
    check(o, None, q1, k1, v, second=(q2, k2, 9), right=0)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (20, 10)])
@pytest.mark.parametrize("head_dim", [64, 44])
def test_total_attention(device, window, head_dim):
    q, k, v = tensors((2, 80, 4, head_dim), (2, 110, 2, head_dim), device=device)
    _, lse = ferroflash.attention(q, k, v, window_size=window, return_lse=True)
    total = ferroflash.total_attention(q, k, lse, window_size=window)
    assert total.shape == (2, 4, 110) and total.dtype == torch.float32 and not total.requires_grad
    options = {"left": window[0], "right": window[1]}
    exact, plain = (attention(q, k, v, **options, dtype=dtype)[2].sum(2) for dtype in (torch.float64, torch.float32))
    assert_close(total, exact, plain + 1e-4, "total")
