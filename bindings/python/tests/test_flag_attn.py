"""FlagAttention's operators give what its own reference implementation gives, by its own bar.

The bar: the largest error, compared to f32, is at most twice that of the same computation in 16 bits, plus 1e-5. Here
the f32 result is not rounded to 16 bits, so that the plain computation has a rounding error as well.
"""

import inspect
import math

import pytest
import torch

import ferroflash
from ferroflash import flag_attn


def tensors(device, *shapes, dtype, order="BHTD", grad=False):
    """Returns normal random tensors of (B, H, T, D), whose memory is in the order given."""
    made = []
    for B, H, T, D in shapes:
        shape = (B, H, T, D) if order == "BHTD" else (B, T, H, D)
        x = torch.randn(shape).to(dtype=dtype, device=device)
        x = x if order == "BHTD" else x.transpose(1, 2)
        made.append(x.detach().requires_grad_(grad))
    return made


def weights(scores, causal):
    """Returns softmax weights of f32 scores, and the log normaliser. Rows without a key are 0."""
    M, N = scores.shape[-2:]
    if causal:
        i, j = (torch.arange(n, device=scores.device) for n in (M, N))
        scores = scores.masked_fill(i[:, None] + N - M < j, float("-inf"))
    return torch.softmax(scores, -1).nan_to_num(), torch.logsumexp(scores, -1)


def reference(q, k, v, causal=False, scale=None, mask=None, p=0.0):
    """Returns (o, log normaliser, total attention), computed in the inputs' dtype."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)) * (scale or 1 / math.sqrt(q.shape[-1]))
    P, lse = weights(scores.float(), causal)
    total = P.sum(-2)
    if mask is not None:
        P = P.masked_fill(~mask, 0.0)
    return (P.to(v.dtype) @ v) / (1 - p), lse, total


def piecewise(q1, k1, q2, k2, v, threshold, causal):
    M, N = q1.shape[2], k1.shape[2]
    distance = torch.arange(M, device=v.device)[:, None] + N - M - torch.arange(N, device=v.device)
    scores = torch.where(distance >= threshold, q2 @ k2.transpose(2, 3), q1 @ k1.transpose(2, 3))
    P, _ = weights(scores.float() / math.sqrt(q1.shape[-1]), causal)
    return P.to(v.dtype) @ v


def exactly(inputs):
    """Returns copies of the inputs in f32."""
    return [x.detach().float().requires_grad_(x.requires_grad) for x in inputs]


def check(ours, plain, exact):
    """Applies the bar to each output and gradient."""
    for mine, half, full in zip(ours, plain, exact, strict=False):
        assert mine.dtype == half.dtype
        error, bar = ((x.float() - full).abs().max().item() for x in (mine, half))
        assert error <= 2 * bar + 1e-5


def with_gradients(function, inputs, do):
    """Returns the output and the gradient of each input."""
    o = function(*inputs)
    return [o, *torch.autograd.grad(o, inputs, do.to(o.dtype))]


SHAPES = [(2, 4, 4, 60, 72, 32), (1, 4, 2, 65, 65, 64), (2, 2, 1, 72, 40, 16), (1, 3, 3, 1, 97, 128)]


@pytest.mark.parametrize("B, Hq, Hk, M, N, D", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", ["BHTD", "BTHD"])
def test_flash_attention(B, Hq, Hk, M, N, D, causal, dtype, order, device):
    torch.manual_seed(0)
    shapes = (B, Hq, M, D), (B, Hk, N, D), (B, Hk, N, D)
    inputs = tensors(device, *shapes, dtype=dtype, order=order, grad=True)
    (do,) = tensors(device, (B, Hq, M, D), dtype=dtype, order=order)
    ours = with_gradients(lambda q, k, v: flag_attn.flash_attention(q, k, v, causal), inputs, do)
    plain, exact = (with_gradients(lambda *x: reference(*x, causal)[0], x, do) for x in (inputs, exactly(inputs)))
    assert ours[0].shape == (B, Hq, M, D)
    assert ours[0].stride() == inputs[0].stride()
    check(ours, plain, exact)


@pytest.mark.parametrize("causal", [False, True])
def test_extra_outputs(causal, device):
    torch.manual_seed(1)
    q, k, v = tensors(device, (2, 4, 50, 32), (2, 2, 61, 32), (2, 2, 61, 32), dtype=torch.float16)
    out = flag_attn.flash_attention(
        q, k, v, causal, sm_scale=0.3, return_log_normalizer=True, return_total_attention=True
    )
    plain, exact = (reference(*x, causal, scale=0.3) for x in ((q, k, v), exactly((q, k, v))))
    assert len(out) == 5 and out[3:] == (None, None)
    assert [x.dtype for x in out[:3]] == [torch.float16, torch.float32, torch.float32]
    check(out[:3], plain, exact)
    # What is not asked for is None.
    lse = flag_attn.flash_attention(q, k, v, causal, sm_scale=0.3, return_log_normalizer=True)
    assert lse[2:] == (None, None, None) and torch.equal(lse[1], out[1])
    total = flag_attn.flash_attention(q, k, v, causal, sm_scale=0.3, return_total_attention=True)
    assert total[1] is None and torch.equal(total[2], out[2])


def test_dropout(device):
    torch.manual_seed(2)
    p = 0.25
    B, H, M, N, D = shape = (2, 2, 70, 90, 32)
    inputs = tensors(device, (B, H, M, D), (B, H, N, D), (B, H, N, D), dtype=torch.bfloat16, grad=True)
    (do,) = tensors(device, (B, H, M, D), dtype=torch.bfloat16)
    o, lse, total, seed, offset = flag_attn.flash_attention(*inputs, dropout_p=p, return_seed_offset=True)
    assert lse is None and total is None and isinstance(seed, int) and isinstance(offset, int)
    mask = ferroflash.dropout_mask(*shape[:4], p, (seed, offset)).to(device)
    ours = [o, *torch.autograd.grad(o, inputs, do)]
    plain, exact = (
        with_gradients(lambda *x: reference(*x, mask=mask, p=p)[0], x, do) for x in (inputs, exactly(inputs))
    )
    check(ours, plain, exact)
    # torch's seed decides, and every call has a mask of its own.
    torch.manual_seed(3)
    first = flag_attn.flash_attention(*inputs, dropout_p=p)
    second = flag_attn.flash_attention(*inputs, dropout_p=p)
    torch.manual_seed(3)
    assert torch.equal(flag_attn.flash_attention(*inputs, dropout_p=p), first)
    assert not torch.equal(first, second)
    # Without dropout there is neither seed nor offset.
    assert flag_attn.flash_attention(*inputs, return_seed_offset=True)[1:] == (None,) * 4


@pytest.mark.parametrize("B, Hq, Hk, M, N, D", [shape for shape in SHAPES if shape[1] == shape[2]])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", ["BHTD", "BTHD"])
def test_piecewise_attention(B, Hq, Hk, M, N, D, causal, dtype, order, device):
    torch.manual_seed(4)
    q, k = (B, Hq, M, D), (B, Hk, N, D)
    inputs = tensors(device, q, k, q, k, k, dtype=dtype, order=order, grad=True)
    (do,) = tensors(device, q, dtype=dtype, order=order)
    threshold = M // 2 if M < N else M - N // 2
    ours = with_gradients(lambda *x: flag_attn.piecewise_attention(*x, threshold, causal), inputs, do)
    plain, exact = (
        with_gradients(lambda *x: piecewise(*x, threshold, causal), x, do) for x in (inputs, exactly(inputs))
    )
    check(ours, plain, exact)


def test_signatures_are_flag_attentions():
    parameters = {
        flag_attn.flash_attention: "q, k, v, causal=False, sm_scale=None, dropout_p=0.0, return_log_normalizer=False, "
        "return_total_attention=False, return_seed_offset=False",
        flag_attn.piecewise_attention: "q1, k1, q2, k2, v, dist_threshold, causal=False, sm_scale=None",
        flag_attn.flash_attention_split_kv: "q, k, v, causal=False, sm_scale=None",
        flag_attn.paged_attention: "query, key_cache, value_cache, context_lens, block_tables, attn_scale, "
        "max_context_len, num_splits=0",
    }
    for function, expected in parameters.items():
        assert str(inspect.signature(function)) == f"({expected})"


def test_what_is_not_there_says_so():
    with pytest.raises(NotImplementedError):
        flag_attn.flash_attention_split_kv(None, None, None)
    with pytest.raises(NotImplementedError):
        flag_attn.paged_attention(None, None, None, None, None, 1.0, 1)
