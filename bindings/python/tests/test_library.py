"""The operators of torch.library: opcheck, torch.compile, torch.export and dispatch modes."""

import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ferroflash
from reference import cumulative, tensors

OPS = torch.ops.ferroflash


def small(count=3, dtype=torch.float16, device="cpu"):
    return tensors((2, 20, 4, 32), (2, 30, 2, 32), dtype, device, count)


def seed_offset():
    return torch.tensor([3, 4])


def per_head(device, sinks=True):
    """Returns slopes and sinks."""
    slopes = torch.rand(4, device=device)
    return slopes, torch.randn(4, device=device).requires_grad_() if sinks else None


OPTIONS = [(-1, -1, None, None, 0.0, None, False), (5, 0, 0.2, 3.0, 0.25, seed_offset(), True)]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=["none", "all"])
def test_opcheck_forward_and_backward(device, options, sinks):
    q, k, v = small(device=device)
    optional = per_head(device) if sinks else (None, None)
    torch.library.opcheck(OPS.forward, (q, k, v, *optional, *options, True))
    optional = tuple(None if x is None else x.detach() for x in optional)
    with torch.no_grad():
        o, lse = OPS.forward(q, k, v, *optional, *options, True)
        torch.library.opcheck(OPS.forward, (q.detach(), k.detach(), v.detach(), *optional, *options, False))
    inputs = [x.detach() for x in (q, k, v)]
    results = [x.detach() for x in (o, lse)]
    d_o, d_lse = torch.randn_like(o), torch.randn_like(lse)
    torch.library.opcheck(OPS.backward, (*inputs, *optional, *results, d_o, d_lse, *options))
    torch.library.opcheck(OPS.backward, (*inputs, *optional, *results, d_o, None, *options))


@pytest.mark.parametrize("sinks", [False, True])
def test_opcheck_piecewise(device, sinks):
    q1, k1, v, q2, k2 = small(5, device=device)
    options = (7, -1, 0, None, 2.0 if sinks else None, 0.0, None, False)
    optional = per_head(device) if sinks else (None, None)
    torch.library.opcheck(OPS.piecewise_forward, (q1, k1, q2, k2, v, *optional, *options, True))
    optional = tuple(None if x is None else x.detach() for x in optional)
    with torch.no_grad():
        o, lse = OPS.piecewise_forward(q1, k1, q2, k2, v, *optional, *options, True)
    inputs = [x.detach() for x in (q1, k1, q2, k2, v)]
    results = (o, lse, torch.randn_like(o), None)
    torch.library.opcheck(OPS.piecewise_backward, (*inputs, *optional, *results, *options))


def test_opcheck_total_attention_and_dropout_mask(device):
    q, k, v = small(device=device)
    _, lse = ferroflash.attention(q, k, v, return_lse=True)
    slopes, _ = per_head(device)
    for rest in ((None, -1, -1, None, None), (slopes, 5, 0, 0.2, 3.0)):
        torch.library.opcheck(OPS.total_attention, (q.detach(), k.detach(), lse.detach(), *rest))
    torch.library.opcheck(OPS.dropout_mask, (q.detach(), (2, 4, 20, 30), 0.25, seed_offset()))


@pytest.mark.parametrize("used", [False, True])
def test_opcheck_of_sequences(device, used):
    q, k, v, q2, k2 = tensors((40, 4, 32), (60, 2, 32), torch.float16, device, 5)
    slopes, sinks = torch.rand(3, 4, device=device), torch.randn(4, device=device).requires_grad_()
    lengths = cumulative((20, 0, 20), device)[1], cumulative((30, 20, 7), device)[1]
    lengths += (torch.tensor((25, 20, 0), dtype=torch.int32, device=device), 20, 30) if used else ()
    options = (5, 0, 0.2, 3.0, 0.25, seed_offset(), True)
    torch.library.opcheck(OPS.forward, (q, k, v, slopes, sinks, *options, True, *lengths))
    torch.library.opcheck(OPS.piecewise_forward, (q, k, q2, k2, v, slopes, sinks, 7, *options, True, *lengths))
    q, k, v, q2, k2, sinks = (x.detach() for x in (q, k, v, q2, k2, sinks))
    o, lse = OPS.forward(q, k, v, slopes, sinks, *options, True, *lengths)
    torch.library.opcheck(OPS.forward, (q, k, v, slopes, sinks, *options, False, *lengths))
    results = (o, lse, torch.randn_like(o), torch.randn_like(lse))
    torch.library.opcheck(OPS.backward, (q, k, v, slopes, sinks, *results, *options, *lengths))
    torch.library.opcheck(OPS.piecewise_backward, (q, k, q2, k2, v, slopes, sinks, *results, 7, *options, *lengths))
    torch.library.opcheck(OPS.total_attention, (q, k, lse, slopes, *options[:4], *lengths))


def test_opcheck_strided(device):
    none = (None, None, -1, 0, None, None, 0.0, None, False, True)
    qkv = torch.randn(2, 20, 3, 4, 32, device=device).to(torch.float16).requires_grad_()
    torch.library.opcheck(OPS.forward, (*qkv.unbind(2), *none))
    heads_first = [torch.randn(2, 4, 20, 32, device=device).half().transpose(1, 2).requires_grad_() for _ in range(3)]
    torch.library.opcheck(OPS.forward, (*heads_first, *none))


def scores(q, softcap=2.0):
    """Returns keyword arguments whose sinks depend on q, so that a gradient flows through them."""
    sinks = q[0, 0, :, 0]
    return {"softcap": softcap, "alibi_slopes": torch.linspace(0.1, 0.4, 4, device=q.device), "sinks": sinks}


def joined(q, k, v, **options):
    """Returns tensors of sequences that share them, and keyword arguments."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32, device=q.device) for ends in ([0, 13, 13, 40], [0, 30, 35, 60]))
    return (q, k, v), {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, **options}


def varlen(q, k, v, cut=32, **options):
    """Attention of sequences of different lengths."""
    inputs, options = joined(q[..., :cut], k[..., :cut], v[..., :cut], causal=True, return_lse=True, **options)
    return ferroflash.attention(*inputs, **options)


def varlen_packed(q, k, v):
    """The packed functions, with tensors and numbers as the longest lengths."""
    (q, k, v), lengths = joined(q, k, v)
    cu_q, cu_k = lengths.values()
    first = ferroflash.flash_attn_varlen_kvpacked_func(q, torch.stack((k, v), 1), cu_q, cu_k, 27, cu_k.diff().max())
    return first, ferroflash.flash_attn_varlen_qkvpacked_func(torch.stack((k, k, v), 1), cu_k, 30, causal=True)


FUNCTIONS = {
    "attention": lambda q, k, v: ferroflash.attention(q, k, v, causal=True, window_size=(9, 4)),
    "lse": lambda q, k, v: ferroflash.attention(q, k, v, return_lse=True),
    "padded": lambda q, k, v: ferroflash.attention(q[..., :27], k[..., :27], v[..., :27], causal=True),
    "flash_attn_func": lambda q, k, v: ferroflash.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[:2],
    "qkvpacked": lambda q, k, v: ferroflash.flash_attn_qkvpacked_func(torch.stack((k, k, v), 2), causal=True),
    "kvpacked": lambda q, k, v: ferroflash.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), causal=True),
    "scores": lambda q, k, v: ferroflash.attention(q, k, v, causal=True, return_lse=True, **scores(q)),
    "scores padded": lambda q, k, v: ferroflash.attention(q[..., :27], k[..., :27], v[..., :27], **scores(q)),
    "piecewise": lambda q, k, v: ferroflash.piecewise(q, k, q * 0.5, k * 2, v, 8, causal=True),
    "piecewise scores": lambda q, k, v: ferroflash.piecewise(q, k, q * 0.5, k * 2, v, 8, **scores(q)),
    "varlen": varlen,
    "varlen padded": lambda q, k, v: varlen(q, k, v, 27, max_seqlen_q=27, max_seqlen_k=30),
    "varlen scores": lambda q, k, v: varlen(q, k, v, **scores(q)),
    "varlen packed": varlen_packed,
    "total": lambda q, k, v: ferroflash.total_attention(q, k, ferroflash.attention(q, k, v, return_lse=True)[1]),
}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compile(device, name, backend):
    few = ("attention",) if device == "cpu" else ("attention", "padded", "piecewise", "scores", "varlen")
    if backend == "inductor" and name not in few:
        pytest.skip("slow to compile, and the same operators as others")
    if backend == "inductor" and device == "cpu" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    inputs = small(device=device)
    torch._dynamo.reset()

    def run(function):
        results = function(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        if not results[0].requires_grad:
            return results
        torch.manual_seed(4)
        weights = [torch.randn(result.shape, device=device).to(result.dtype) for result in results]
        return *results, *torch.autograd.grad(results, inputs, weights, allow_unused=True)

    found = run(torch.compile(FUNCTIONS[name], fullgraph=True, backend=backend))
    for a, b in zip(found, run(FUNCTIONS[name]), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=4e-3, rtol=4e-3)


def test_compile_with_dynamic_shapes(device):
    torch._dynamo.reset()
    run = torch.compile(lambda q, k, v: ferroflash.attention(q, k, v, causal=True), fullgraph=True, dynamic=True)
    for seqlen in (20, 33, 50):
        q, k, v = tensors((2, seqlen, 4, 32), (2, seqlen + 3, 2, 32), device=device)
        assert run(q, k, v).equal(ferroflash.attention(q, k, v, causal=True))


def test_compile_with_dynamic_lengths(device):
    """One graph serves batches of other sequences, and of other numbers of tokens."""
    torch._dynamo.reset()

    def run(q, k, cu_q, cu_k, longest):
        return ferroflash.flash_attn_varlen_func(q, k, k, cu_q, cu_k, longest, longest, causal=True)

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for lengths in ((20, 3), (33, 5, 12), (50, 4, 4, 4)):
        _, cu = cumulative(lengths, device)
        q, k, _ = tensors((sum(lengths), 4, 32), (sum(lengths), 2, 32), device=device)
        assert compiled(q, k, cu, cu, max(lengths)).equal(run(q, k, cu, cu, max(lengths)))


def test_export(device):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return ferroflash.attention(q, k, v, causal=True)

    inputs = tuple(x.detach() for x in small(device=device))
    exported = torch.export.export(Module(), inputs)
    assert any("ferroflash" in str(node.target) for node in exported.graph.nodes)
    assert exported.module()(*inputs).equal(ferroflash.attention(*inputs, causal=True))


def test_export_with_sinks(device):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.sinks = torch.nn.Parameter(torch.randn(4, device=device).bfloat16())
            self.register_buffer("slopes", torch.linspace(0.1, 0.4, 4, device=device))

        def forward(self, q, k, v):
            return ferroflash.attention(q, k, v, softcap=2.0, sinks=self.sinks, alibi_slopes=self.slopes)

    inputs, module = tuple(x.detach() for x in small(device=device)), Module()
    exported = torch.export.export(module, inputs)
    assert exported.module()(*inputs).equal(module(*inputs))


def test_dispatch_modes_see_the_operators(device):
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    q, k, v = small(device=device)
    with Watch():
        watched = ferroflash.attention(q, k, v)
        watched.sum().backward()
    assert "ferroflash.forward.default" in seen and "ferroflash.backward.default" in seen
    assert watched.equal(ferroflash.attention(q, k, v))


def test_subclasses_take_the_operators(device):
    class Subclass(torch.Tensor):
        pass

    q, k, v = (x.detach() for x in small(device=device))
    found = ferroflash.attention(q.as_subclass(Subclass), k, v)
    assert torch.Tensor(found).equal(ferroflash.attention(q, k, v))


def test_fake_tensors_have_the_strides_of_real_ones(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    layouts = {
        "rows first": lambda: torch.randn(2, 20, 4, 32, device=device),
        "heads first": lambda: torch.randn(2, 4, 20, 32, device=device).transpose(1, 2),
        "packed": lambda: torch.randn(2, 20, 3, 4, 32, device=device)[:, :, 1],
        "repeated": lambda: torch.randn(2, 20, 1, 32, device=device).expand(2, 20, 4, 32),
        "one batch item": lambda: torch.randn(20, 4, 32, device=device).expand(2, 20, 4, 32),
    }
    for name, make in layouts.items():
        x = make().half()
        real = ferroflash.attention(x, x, x)
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(x)
            result = ferroflash.attention(fake, fake, fake)
        assert result.stride() == real.stride(), name
        assert result.dtype == real.dtype and result.device.type == real.device.type


def test_fake_tensors_of_sequences_have_the_strides_of_real_ones(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    _, cu = cumulative((13, 7), device)
    layouts = {
        "rows first": lambda: torch.randn(20, 4, 32, device=device),
        "heads first": lambda: torch.randn(4, 20, 32, device=device).transpose(0, 1),
        "packed": lambda: torch.randn(20, 3, 4, 32, device=device)[:, 1],
        "repeated": lambda: torch.randn(20, 1, 32, device=device).expand(20, 4, 32),
    }
    for name, make in layouts.items():
        x = make().half()
        real = ferroflash.attention(x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=True)
        with FakeTensorMode() as mode:
            fake, lengths = mode.from_tensor(x), mode.from_tensor(cu)
            found = ferroflash.attention(fake, fake, fake, cu_seqlens_q=lengths, cu_seqlens_k=lengths, return_lse=True)
        for a, b in zip(found, real, strict=True):
            assert a.stride() == b.stride() and a.shape == b.shape and a.dtype == b.dtype, name


def test_gradients_need_the_lse(device):
    q, k, v = small(device=device)
    with pytest.raises(RuntimeError, match="return_lse is False"):
        OPS.forward(q, k, v, None, None, -1, -1, None, None, 0.0, None, False, False)


def test_total_attention_has_no_gradient(device):
    q, k, v = small(device=device)
    _, lse = ferroflash.attention(q, k, v, return_lse=True)
    with pytest.raises(NotImplementedError, match="no gradient"):
        OPS.total_attention(q, k, lse.detach(), None, -1, -1, None, None).sum().backward()
