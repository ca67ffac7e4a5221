"""flash-attention 2's functions: signatures, packed tensors, S_dmask, and errors for what is not built yet."""

import inspect

import pytest
import torch

import ferroflash
from reference import assert_close, attention, tensors

REST = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
SIGNATURES = {
    "flash_attn_func": f"(q, k, v, {REST})",
    "flash_attn_qkvpacked_func": f"(qkv, {REST})",
    "flash_attn_kvpacked_func": f"(q, kv, {REST})",
    "flash_attn_varlen_func": (
        f"(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {REST}, block_table=None, seqused_k=None)"
    ),
    "flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen, {REST})",
    "flash_attn_varlen_kvpacked_func": (f"(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {REST})"),
    "flash_attn_with_kvcache": (
        "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False)"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    signature = inspect.signature(getattr(ferroflash, name))
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attn_func(device, causal):
    q, k, v = tensors((2, 70, 4, 64), (2, 90, 2, 64), device=device)
    out, lse, s_dmask = ferroflash.flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    assert s_dmask is None and lse.shape == (2, 4, 70) and lse.dtype == torch.float32
    expected = ferroflash.attention(q, k, v, causal=causal, return_lse=True)
    assert out.equal(expected[0]) and lse.equal(expected[1])
    assert ferroflash.flash_attn_func(q, k, v, 0.0, None, causal).equal(out)
    window = ferroflash.flash_attn_func(q, k, v, causal=causal, window_size=(10, 20))
    right = 0 if causal else 20
    exact, plain = (attention(q, k, v, left=10, right=right, dtype=dtype)[0] for dtype in (torch.float64, q.dtype))
    assert_close(window, exact, plain)


@pytest.mark.parametrize("head_dim", [64, 36])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_packed(device, head_dim, dropout_p):
    qkv = torch.randn(2, 50, 3, 4, head_dim, device=device).to(torch.bfloat16).requires_grad_()
    kv = torch.randn(2, 60, 2, 2, head_dim, device=device).to(torch.bfloat16).requires_grad_()
    q = qkv[:, :, 0].detach().clone().requires_grad_()
    d_o = torch.randn(2, 50, 4, head_dim, device=device).to(torch.bfloat16)
    options = {"dropout_p": dropout_p, "causal": True}

    def seeded(function, *inputs, **options):
        torch.manual_seed(5)
        return function(*inputs, **options)

    packed = seeded(ferroflash.flash_attn_qkvpacked_func, qkv, **options)
    separate = seeded(ferroflash.flash_attn_func, *qkv.unbind(2), **options)
    assert packed.equal(separate)
    (found,), (expected,) = (torch.autograd.grad(o, qkv, d_o) for o in (packed, separate))
    assert found.is_contiguous() and torch.allclose(found, expected, atol=1e-2)

    packed = seeded(ferroflash.flash_attn_kvpacked_func, q, kv, **options)
    separate = seeded(ferroflash.flash_attn_func, q, *kv.unbind(2), **options)
    assert packed.equal(separate)
    for found, expected in zip(*(torch.autograd.grad(o, (q, kv), d_o) for o in (packed, separate)), strict=True):
        assert torch.allclose(found, expected, atol=1e-2)


@pytest.mark.parametrize("head_dim", [64, 36])
@pytest.mark.parametrize("per_item", [False, True])
def test_softcap_and_alibi(device, head_dim, per_item):
    qkv = torch.randn(2, 50, 3, 4, head_dim, device=device).half().requires_grad_()
    d_o = torch.randn(2, 50, 4, head_dim, device=device).half()
    slopes = torch.rand((2, 4) if per_item else (4,), device=device) * 0.3
    options = {"softcap": 2.0, "alibi_slopes": slopes, "causal": True}
    separate = ferroflash.flash_attn_func(*qkv.unbind(2), **options)
    made = {"softcap": 2.0, "slopes": slopes, "right": 0}
    exact, plain = (attention(*qkv.unbind(2), **made, dtype=dtype)[0] for dtype in (torch.float64, qkv.dtype))
    assert_close(separate, exact, plain)
    assert ferroflash.flash_attn_func(*qkv.detach().unbind(2), **options).equal(separate)
    (expected,) = torch.autograd.grad(separate, qkv, d_o)

    packed = ferroflash.flash_attn_qkvpacked_func(qkv, **options)
    assert packed.equal(separate)
    assert torch.allclose(torch.autograd.grad(packed, qkv, d_o)[0], expected, atol=1e-2)

    q, kv = qkv[:, :, 0].detach().requires_grad_(), qkv[:, :, 1:].detach().requires_grad_()
    packed = ferroflash.flash_attn_kvpacked_func(q, kv, **options)
    assert packed.equal(separate)
    dq, dkv = torch.autograd.grad(packed, (q, kv), d_o)
    assert torch.allclose(torch.cat((dq[:, :, None], dkv), 2), expected, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (20, 7)])
@pytest.mark.parametrize("head_dim", [64, 36])
def test_s_dmask(device, head_dim, window, dtype, monkeypatch):
    """Its sign is the dropout mask, and its absolute values are proportional to the weights of each row."""
    # Several blocks of rows.
    monkeypatch.setattr("ferroflash._scores._SCORES", 2 * 4 * 60 * 16)
    q, k, v = tensors((2, 50, 4, head_dim), (2, 60, 2, head_dim), dtype, device)
    slopes = torch.rand(4, device=device) * 0.3
    options = {"dropout_p": 0.3, "softcap": 3.0, "alibi_slopes": slopes, "window_size": window}
    o, lse, s_dmask = ferroflash.flash_attn_func(q, k, v, **options, return_attn_probs=True)
    assert s_dmask.shape == (2, 4, 50, 60) and s_dmask.dtype == dtype and not s_dmask.requires_grad
    made = {"left": window[0], "right": window[1], "softcap": 3.0, "slopes": slopes}
    kept = s_dmask >= 0
    exact, plain = (attention(q, k, v, **made, kept=kept, p=0.3, dtype=kind) for kind in (torch.float64, dtype))
    assert_close(o, exact[0], plain[0])
    weights = s_dmask.abs().double()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    assert torch.allclose(weights / weights.sum(-1, keepdim=True), exact[2], atol=tolerance)
    assert (s_dmask[exact[2] == 0] == 0).all()
    # Every weight that was dropped is negative, however small it is.
    dropped = (s_dmask < 0).double().sum() / (exact[2] > 0).sum()
    assert abs(dropped.item() - 0.3) < 0.02
    torch.manual_seed(1)
    first = ferroflash.flash_attn_func(q, k, v, **options, return_attn_probs=True)
    torch.manual_seed(1)
    kv = torch.stack((k, v), 2)
    packed = ferroflash.flash_attn_kvpacked_func(q, kv, **options, return_attn_probs=True)
    torch.manual_seed(1)
    assert ferroflash.flash_attn_func(q, k, v, **options).equal(first[0])
    assert all(a.equal(b) for a, b in zip(first, packed, strict=True))


def test_s_dmask_of_packed_and_compiled_calls(device):
    qkv = torch.randn(2, 50, 3, 4, 64, device=device).half()

    def run(qkv):
        return ferroflash.flash_attn_qkvpacked_func(qkv, 0.5, causal=True, return_attn_probs=True)

    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        o, _, s_dmask = function(qkv)
        exact, plain = (
            attention(*qkv.unbind(2), right=0, kept=s_dmask >= 0, p=0.5, dtype=dtype)[0]
            for dtype in (torch.float64, qkv.dtype)
        )
        assert_close(o, exact, plain)


def test_packed_without_gradients_and_with_some(device):
    qkv = torch.randn(1, 50, 3, 4, 64, device=device).half()
    out, lse, _ = ferroflash.flash_attn_qkvpacked_func(qkv, return_attn_probs=True)
    assert not out.requires_grad and lse.shape == (1, 4, 50)
    q = qkv[:, :, 0].clone().requires_grad_()
    o = ferroflash.flash_attn_kvpacked_func(q, qkv[:, :, 1:])
    o.sum().backward()
    expected = torch.autograd.grad(ferroflash.flash_attn_func(q, *qkv[:, :, 1:].unbind(2)).sum(), q)
    assert torch.allclose(q.grad, expected[0], atol=1e-2)


def test_packed_gradients_through_the_lse(device):
    qkv = torch.randn(1, 50, 3, 4, 64, device=device).half().requires_grad_()
    _, lse, _ = ferroflash.flash_attn_qkvpacked_func(qkv, causal=True, return_attn_probs=True)
    found = torch.autograd.grad(lse.sum(), qkv)[0]
    q, k, v = qkv.unbind(2)
    _, lse, _ = ferroflash.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert torch.allclose(found, torch.autograd.grad(lse.sum(), qkv)[0], atol=1e-2)
    with pytest.raises(NotImplementedError, match="second derivative"):
        o = ferroflash.flash_attn_qkvpacked_func(qkv)
        first = torch.autograd.grad(o.float().sum(), qkv, create_graph=True)[0]
        first.float().sum().backward()


def test_what_is_not_built_yet():
    q, k, v = tensors((1, 20, 2, 64), (1, 20, 2, 64))
    lengths = torch.tensor([0, 20], dtype=torch.int32)
    varlen = (q[0], k[0], v[0], lengths, lengths, 20, 20)
    table = torch.zeros(1, 1, dtype=torch.int32)
    calls = [
        ("block_table", lambda: ferroflash.flash_attn_varlen_func(*varlen, block_table=table)),
        ("k_cache", lambda: ferroflash.flash_attn_with_kvcache(q, k, v)),
    ]
    for argument, call in calls:
        with pytest.raises(NotImplementedError, match=f"^{argument}.* is not supported by ferroflash yet: ."):
            call()
