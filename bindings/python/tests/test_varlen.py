"""Sequences of different lengths that share one tensor: every option, gradients, operators and mistakes."""

import pytest
import torch

import ferroflash
from reference import assert_close, attention, cumulative, gradients, of_sequences, tensors

HEADS, HEADS_KV = 4, 2
# Equal and different lengths, sequences without queries, without keys and without both, and one of more than a tile.
QUERIES, KEYS = (37, 0, 5, 150, 0, 12), (37, 20, 60, 100, 0, 0)
NUMBERS = (9, 4)
OPTIONS = {
    "none": {},
    "causal": {"causal": True},
    "window": {"window_size": (20, 7)},
    "softcap": {"causal": True, "softcap": 2.0},
    "alibi": {"causal": True, "alibi_slopes": (HEADS,)},
    "alibi per sequence": {"alibi_slopes": (len(QUERIES), HEADS)},
    "sinks": {"window_size": (30, 0), "sinks": (HEADS,)},
    "dropout": {"dropout_p": 0.25},
    "used": {"causal": True, "seqused_k": (37, 0, 41, 99, 0, 0)},
    "all": {
        "window_size": (40, 3),
        "softcap": 3.0,
        "alibi_slopes": (len(QUERIES), HEADS),
        "sinks": (HEADS,),
        "dropout_p": 0.25,
        "seqused_k": (30, 20, 41, 100, 0, 0),
        "deterministic": True,
    },
}


def made(name, device):
    """Returns keyword arguments of ferroflash, and those of the reference."""
    options = dict(OPTIONS[name])
    left, right = options.get("window_size", (-1, -1))
    expected = {"left": left, "right": 0 if options.get("causal") else right, "softcap": options.get("softcap")}
    for key, own in (("alibi_slopes", "slopes"), ("sinks", "sinks")):
        if key in options:
            options[key] = expected[own] = torch.rand(options[key], device=device) * 0.3
    if "seqused_k" in options:
        expected["used"] = options["seqused_k"]
        options["seqused_k"] = torch.tensor(options["seqused_k"], dtype=torch.int32, device=device)
    if "dropout_p" in options:
        p = expected["p"] = options["dropout_p"]
        options["seed_offset"] = NUMBERS
        shape = (len(QUERIES), HEADS, max(QUERIES), max(KEYS))
        expected["kept"] = ferroflash.dropout_mask(*shape, p, NUMBERS, device=device)
    return options, expected


def lengths(queries=QUERIES, keys=KEYS, device="cpu"):
    """Returns lists of cumulative lengths, and keyword arguments of ferroflash."""
    (list_q, cu_q), (list_k, cu_k) = cumulative(queries, device), cumulative(keys, device)
    longest = {"max_seqlen_q": max(queries), "max_seqlen_k": max(keys)}
    return (list_q, list_k), {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, **longest}


def inputs(queries=QUERIES, keys=KEYS, head_dim=64, dtype=torch.bfloat16, device="cpu", behind=0, count=3):
    """Returns tensors with `behind` rows behind the last sequence."""
    shape_q, shape_k = (sum(queries) + behind, HEADS, head_dim), (sum(keys) + behind, HEADS_KV, head_dim)
    return tensors(shape_q, shape_k, dtype, device, count)


def check(found, exact, plain, inputs, d_results, names=("dq", "dk", "dv")):
    """Compares (O, LSE) and gradients."""
    for name, *three in zip(("o", "lse"), found, exact[:2], plain[:2], strict=True):
        assert_close(*three, name)
    # The weight of an LSE that is -inf is 0 for every result.
    d_o, d_lse = d_results
    three = []
    for o, lse in (found, exact[:2], plain[:2]):
        rows = exact[1].isfinite()
        three.append(gradients((o, torch.where(rows, lse, 0.0)), inputs, (d_o, d_lse * rows)))
    for name, *results in zip(names, *three, strict=True):
        assert_close(*results, name)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.bfloat16), (36, torch.float16)])
def test_attention(device, name, head_dim, dtype):
    q, k, v = inputs(head_dim=head_dim, dtype=dtype, device=device, behind=3)
    options, expected = made(name, device)
    lists, given = lengths(device=device)
    learned = [q, k, v]
    if "sinks" in options:
        learned.append(options["sinks"].requires_grad_())
    found = ferroflash.attention(q, k, v, return_lse=True, **options, **given)
    assert found[0].shape == q.shape and found[1].shape == (HEADS, q.shape[0])
    if "sinks" in expected:
        # The LSE of a row of no sequence is the sink, and its gradient is not that of a row.
        behind = found[1][:, sum(QUERIES) :]
        assert behind.equal(options["sinks"][:, None].expand_as(behind))
        found = found[0], torch.cat((found[1][:, : sum(QUERIES)], torch.full_like(behind, -torch.inf)), 1)
    exact, plain = (of_sequences(q, k, v, *lists, **expected, dtype=kind) for kind in (torch.float64, dtype))
    d_results = torch.randn_like(found[0]), torch.randn_like(found[1])
    check(found, exact, plain, learned, d_results, ("dq", "dk", "dv", "d_sinks")[: len(learned)])
    # Without an LSE, and without gradients.
    with torch.no_grad():
        assert ferroflash.attention(q, k, v, **options, **given).equal(found[0])


def test_rows_of_no_sequence(device):
    """Rows before, between and behind sequences get 0 and -inf, and NaN in them stays there."""
    q, k, v = inputs((30,), (30,), device=device)
    with torch.no_grad():
        for x in (q, k, v):
            x[:4] = x[25:] = torch.nan
    cu = torch.tensor([4, 14, 25], dtype=torch.int32, device=device)
    o, lse = ferroflash.attention(q, k, v, causal=True, return_lse=True, cu_seqlens_q=cu, cu_seqlens_k=cu)
    results = (o, *torch.autograd.grad(o, (q, k, v), torch.ones_like(o)))
    for x in results:
        assert (x[:4] == 0).all() and (x[25:] == 0).all() and x.isfinite().all()
    assert (lse[:, :4] == -torch.inf).all() and (lse[:, 25:] == -torch.inf).all()
    for rows in (slice(4, 14), slice(14, 25)):
        alone = ferroflash.attention(q[None, rows], k[None, rows], v[None, rows], causal=True)
        assert torch.allclose(alone[0], o[rows], atol=1e-2)


def test_a_sequence_does_not_depend_on_its_neighbours(device):
    q, k, v = inputs(device=device)
    _, given = lengths(device=device)
    options = {"causal": True, "deterministic": True}

    def run(q, k, v, **given):
        o, lse = ferroflash.attention(q, k, v, return_lse=True, **options, **given)
        return o, lse, *torch.autograd.grad((o, lse), (q, k, v), (torch.ones_like(o), torch.ones_like(lse)))

    o, lse, dq, dk, dv = run(q, k, v, **given)
    first, keys = slice(42, 192), slice(117, 217)
    _, one = lengths((150,), (100,), device)
    alone = run(*(x.detach()[rows].requires_grad_() for x, rows in ((q, first), (k, keys), (v, keys))), **one)
    for found, exact in zip(alone, (o[first], lse[:, first], dq[first], dk[keys], dv[keys]), strict=True):
        assert found.equal(exact)


def test_one_sequence_is_a_dense_batch(device):
    q, k, v = inputs((70,), (90,), device=device)
    _, given = lengths((70,), (90,), device)
    o = ferroflash.attention(q, k, v, causal=True, **given)
    dense = ferroflash.attention(q[None], k[None], v[None], causal=True)
    assert torch.allclose(o, dense[0], atol=1e-2)


@pytest.mark.parametrize("head_dim", [64, 36])
def test_piecewise(device, head_dim):
    q1, k1, v, q2, k2 = learned = inputs(head_dim=head_dim, device=device, count=5)
    options, expected = made("all", device)
    options.pop("window_size")
    expected |= {"left": -1, "right": 0, "second": (q2, k2, 11)}
    lists, given = lengths(device=device)
    found = ferroflash.piecewise(q1, k1, q2, k2, v, 11, causal=True, return_lse=True, **options, **given)
    exact, plain = (of_sequences(q1, k1, v, *lists, **expected, dtype=kind) for kind in (torch.float64, q1.dtype))
    d_results = torch.randn_like(found[0]), torch.randn_like(found[1])
    check(found, exact, plain, learned, d_results, ("dq1", "dk1", "dv", "dq2", "dk2"))


@pytest.mark.parametrize("head_dim", [64, 36])
@pytest.mark.parametrize("name", ["causal", "window", "alibi per sequence", "all"])
def test_total_attention(device, name, head_dim):
    q, k, v = (x.detach() for x in inputs(head_dim=head_dim, device=device, behind=2))
    options, expected = made(name, device)
    lists, given = lengths(device=device)
    _, lse = ferroflash.attention(q, k, v, return_lse=True, **options, **given)
    for key in ("sinks", "dropout_p", "seed_offset", "deterministic"):
        options.pop(key, None)
    total = ferroflash.total_attention(q, k, lse, **options, **given)
    exact, plain = (of_sequences(q, k, v, *lists, **expected, dtype=kind)[2] for kind in (torch.float64, q.dtype))
    assert_close(total, exact, plain)


@pytest.mark.parametrize("head_dim", [64, 36])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_flash_attn(device, head_dim, dropout_p):
    """The three functions agree, and the gradient of a packed tensor is one tensor."""
    qkv = torch.randn(sum(QUERIES), 3, HEADS, head_dim, device=device).to(torch.bfloat16).requires_grad_()
    kv = torch.randn(sum(KEYS), 2, HEADS_KV, head_dim, device=device).to(torch.bfloat16).requires_grad_()
    (list_q, cu_q), (_, cu_k) = cumulative(QUERIES, device), cumulative(KEYS, device)
    d_o = torch.randn(sum(QUERIES), HEADS, head_dim, device=device).to(torch.bfloat16)
    options = {"dropout_p": dropout_p, "causal": True, "softcap": 3.0, "alibi_slopes": torch.rand(4, device=device)}

    def seeded(function, *inputs, **more):
        torch.manual_seed(5)
        return function(*inputs, **options, **more)

    packed = seeded(ferroflash.flash_attn_varlen_qkvpacked_func, qkv, cu_q, max(QUERIES))
    longest = (max(QUERIES), max(QUERIES))
    separate = seeded(ferroflash.flash_attn_varlen_func, *qkv.unbind(1), cu_q, cu_q, *longest)
    assert packed.equal(separate)
    (found,), (expected,) = (torch.autograd.grad(o, qkv, d_o) for o in (packed, separate))
    assert found.is_contiguous() and torch.allclose(found, expected, atol=1e-2)

    q = qkv[:, 0].detach().clone().requires_grad_()
    given = (cu_q, cu_k, max(QUERIES), max(KEYS))
    packed = seeded(ferroflash.flash_attn_varlen_kvpacked_func, q, kv, *given)
    separate = seeded(ferroflash.flash_attn_varlen_func, q, *kv.unbind(1), *given)
    assert packed.equal(separate)
    for found, expected in zip(*(torch.autograd.grad(o, (q, kv), d_o) for o in (packed, separate)), strict=True):
        assert torch.allclose(found, expected, atol=1e-2)
    if dropout_p == 0.0:
        out, lse, s_dmask = seeded(ferroflash.flash_attn_varlen_kvpacked_func, q, kv, *given, return_attn_probs=True)
        assert out.equal(packed) and lse.shape == (HEADS, list_q[-1]) and s_dmask is None
        used = torch.tensor(KEYS, dtype=torch.int32, device=device)
        assert seeded(ferroflash.flash_attn_varlen_func, q, *kv.unbind(1), *given, seqused_k=used).equal(out)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_s_dmask(device, per_sequence):
    """Its sign is the dropout mask, and its absolute values are proportional to the weights of each row."""
    _, given = lengths(device=device)
    q, k, v = (x.detach() for x in inputs(dtype=torch.float16, device=device))
    slopes = torch.rand((len(QUERIES), HEADS) if per_sequence else HEADS, device=device) * 0.3
    options = {"dropout_p": 0.3, "softcap": 3.0, "alibi_slopes": slopes, "window_size": (20, 7)}
    torch.manual_seed(1)
    o, lse, s_dmask = ferroflash.flash_attn_varlen_func(q, k, v, **given, **options, return_attn_probs=True)
    assert s_dmask.shape == (len(QUERIES), HEADS, max(QUERIES), max(KEYS)) and s_dmask.dtype == q.dtype
    for b, (m, n) in enumerate(zip(QUERIES, KEYS, strict=True)):
        assert (s_dmask[b, :, m:] == 0).all() and (s_dmask[b, :, :, n:] == 0).all()
        if m * n == 0:
            continue
        rows, keys = slice(sum(QUERIES[:b]), sum(QUERIES[: b + 1])), slice(sum(KEYS[:b]), sum(KEYS[: b + 1]))
        one = s_dmask[b : b + 1, :, :m, :n]
        made = {"left": 20, "right": 7, "softcap": 3.0, "slopes": slopes[b] if per_sequence else slopes}
        tensors = (q[None, rows], k[None, keys], v[None, keys])
        exact, plain = (
            attention(*tensors, **made, kept=one >= 0, p=0.3, dtype=kind) for kind in (torch.float64, q.dtype)
        )
        assert_close(o[rows], exact[0][0], plain[0][0])
        weights = one.abs().double()
        total = weights.sum(-1, keepdim=True)
        assert torch.allclose(weights / torch.where(total > 0, total, 1.0), exact[2], atol=2e-3)
    torch.manual_seed(1)
    kv = torch.stack((k, v), 1)
    packed = ferroflash.flash_attn_varlen_kvpacked_func(q, kv, **given, **options, return_attn_probs=True)
    assert all(a.equal(b) for a, b in zip(packed, (o, lse, s_dmask), strict=True))
    cu, qkv = given["cu_seqlens_q"], torch.stack((q, q, q), 1)
    torch.manual_seed(1)
    packed = ferroflash.flash_attn_varlen_qkvpacked_func(qkv, cu, 150, **options, return_attn_probs=True)
    torch.manual_seed(1)
    assert ferroflash.flash_attn_varlen_qkvpacked_func(qkv, cu, 150, **options).equal(packed[0])
    assert packed[2].shape == (len(QUERIES), HEADS, 150, 150)


def test_the_gradient_of_a_packed_tensor_is_written_in_place(device, monkeypatch):
    """Kernels write the three gradients where they stay."""
    given = []
    original = ferroflash._launch.backward

    def watched(*arguments):
        given.append(arguments[11])
        return original(*arguments)

    monkeypatch.setattr(ferroflash._launch, "backward", watched)
    qkv = torch.randn(30, 3, HEADS, 64, device=device).half().requires_grad_()
    _, cu = cumulative((10, 20), device)
    o = ferroflash.flash_attn_varlen_qkvpacked_func(qkv, cu, 20, causal=True)
    (found,) = torch.autograd.grad(o.sum(), qkv)
    (gradients,) = given
    places = [gradient.data_ptr() - found.data_ptr() for gradient in gradients]
    assert places == [i * HEADS * 64 * 2 for i in range(3)]


def test_longest_lengths_are_hints(device):
    q, k, v = (x.detach() for x in inputs(device=device))
    lists, given = lengths(device=device)
    cumulative = {name: given[name] for name in ("cu_seqlens_q", "cu_seqlens_k")}
    exact, plain = (of_sequences(q, k, v, *lists, right=0, dtype=kind)[0] for kind in (torch.float64, q.dtype))
    tensor = torch.tensor(150, device=device)
    for longest in ((None, None), (1, 1), (1 << 20, 1 << 20), (tensor, tensor)):
        named = dict(zip(("max_seqlen_q", "max_seqlen_k"), longest, strict=True))
        assert_close(ferroflash.attention(q, k, v, causal=True, **cumulative, **named), exact, plain)


def test_strides(device):
    """Heads first, and a part of a packed tensor, run without a copy; other strides are copied."""
    _, given = lengths((30, 20), (30, 20), device)
    q, k, v = (x.detach() for x in inputs((30, 20), (30, 20), device=device))
    expected = ferroflash.attention(q, k, v, **given)
    first = q.transpose(0, 1).contiguous().transpose(0, 1)
    o = ferroflash.attention(first, k, v, **given)
    assert o.equal(expected) and o.stride() == first.stride()
    odd = q.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.warns(UserWarning, match="copies q,"):
        assert ferroflash.attention(odd, k, v, **given).equal(expected)
    repeated = q[:, :1].expand(-1, HEADS, -1)
    assert ferroflash.attention(repeated, k, v, **given).equal(ferroflash.attention(repeated.clone(), k, v, **given))


def test_no_sequences(device):
    q, k, v = inputs((0,), (0,), device=device)
    cu = torch.zeros(1, dtype=torch.int32, device=device)
    o = ferroflash.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    o.sum().backward()
    assert o.shape == q.shape == q.grad.shape
    q, k, v = inputs((7,), (9,), device=device)
    o, lse = ferroflash.attention(q, k, v, return_lse=True, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert (o == 0).all() and (lse == -torch.inf).all()


def test_mistakes():
    q, k, v = (x.detach() for x in inputs((30, 20), (30, 20)))
    cu = cumulative((30, 20))[1]

    def fails(error, text, *tensors, **changed):
        with pytest.raises(error, match=text):
            ferroflash.attention(*(tensors or (q, k, v)), **{"cu_seqlens_q": cu, "cu_seqlens_k": cu, **changed})

    fails(TypeError, "^cu_seqlens_q is torch.int64; torch.int32 is needed", cu_seqlens_q=cu.long())
    fails(TypeError, "^cu_seqlens_k is torch.int64; torch.int32 is needed", cu_seqlens_k=cu.long())
    fails(TypeError, "^cu_seqlens_q is <class 'list'>; a torch.Tensor is needed", cu_seqlens_q=[0, 30, 50])
    fails(ValueError, r"^cu_seqlens_k has the shape .*; \[3\] \(sequences \+ 1\) is needed", cu_seqlens_k=cu[:2])
    fails(ValueError, r"^cu_seqlens_q has the shape .*; \(sequences \+ 1\) is needed", cu_seqlens_q=cu[None])
    fails(ValueError, r"^cu_seqlens_q has the shape .*\(sequences \+ 1\)", cu_seqlens_q=cu[:0])
    fails(ValueError, "^cu_seqlens_q is not contiguous", cu_seqlens_q=torch.stack((cu, cu), 1)[:, 0])
    fails(ValueError, "^cu_seqlens_q is on meta; the CPU or a CUDA device is needed", cu_seqlens_q=cu.to("meta"))
    fails(ValueError, "^cu_seqlens_k is None; sequences of different lengths need", cu_seqlens_k=None)
    fails(ValueError, r"^seqused_k has the shape .*; \[2\] \(sequences\) is needed", seqused_k=cu)
    fails(ValueError, "^max_seqlen_q is -1; at least 0 is needed", max_seqlen_q=-1, max_seqlen_k=3)
    fails(ValueError, r"^q has the shape .*; \(total, heads, head_dim\), because", q[None], k, v)
    fails(ValueError, r"^alibi_slopes has the shape .*; \[2, 4\]", alibi_slopes=torch.rand(3, 4))
    # Lengths in the host's memory are checked.
    for numbers, text in (
        ([0, 40, 30], r"^cu_seqlens_q\[2\] is 30; a number from 40 to 50 is needed"),
        ([-1, 30, 50], r"^cu_seqlens_q\[0\] is -1"),
        ([0, 30, 51], r"^cu_seqlens_q\[2\] is 51"),
    ):
        fails(ValueError, text, cu_seqlens_q=torch.tensor(numbers, dtype=torch.int32))
    used = torch.tensor((30, 21), dtype=torch.int32)
    fails(ValueError, r"^seqused_k\[1\] is 21; a number from 0 to 20|lengths_k", seqused_k=used)
    with pytest.raises(ValueError, match=r"^lse has the shape .*; \[4, 50\] \(heads, total\) is needed"):
        ferroflash.total_attention(q, k, torch.zeros(1, 4, 50), cu_seqlens_q=cu, cu_seqlens_k=cu)
    with pytest.raises(ValueError, match="^cu_seqlens_q is None"):
        ferroflash.flash_attn_varlen_func(q, k, v, None, None, 30, 30)


def test_the_reference_is_that_of_dense_batches():
    """Equal lengths give what a dense batch gives."""
    q, k, v = tensors((2, 20, 4, 32), (2, 30, 2, 32))
    cu_q, cu_k = cumulative((20, 20))[0], cumulative((30, 30))[0]
    o, lse, _ = of_sequences(*(x.flatten(0, 1) for x in (q, k, v)), cu_q, cu_k, right=0)
    dense, dense_lse, _ = attention(q, k, v, right=0)
    assert torch.allclose(o, dense.flatten(0, 1)) and torch.allclose(lse, dense_lse.transpose(0, 1).flatten(1))
