"""What only a GPU has: graphs, streams, a second device, and agreement with the CPU."""

import pytest
import torch

import ferroflash
from reference import assert_close, attention, cumulative, of_sequences, tensors


def both_passes(inputs, d_o, **options):
    o = ferroflash.attention(*inputs, causal=True, deterministic=True, **options)
    return o, *torch.autograd.grad(o, inputs, d_o)


def scores(inputs):
    """Returns keyword arguments of softcap, ALiBi and sinks."""
    slopes = torch.linspace(0.05, 0.2, 4, device=inputs[0].device)
    return {"softcap": 3.0, "alibi_slopes": slopes, "sinks": slopes * 5}


@pytest.mark.parametrize("with_scores", [False, True])
def test_cpu_and_gpu_agree(gpu, with_scores):
    inputs = tensors((2, 200, 4, 64), (2, 250, 2, 64))
    d_o = torch.randn_like(inputs[0])
    options = {"dropout_p": 0.25, "seed_offset": (9, 4)}
    expected = both_passes(inputs, d_o, **options, **(scores(inputs) if with_scores else {}))
    moved = [x.detach().to(gpu).requires_grad_() for x in inputs]
    options |= scores(moved) if with_scores else {}
    for found, exact in zip(both_passes(moved, d_o.to(gpu), **options), expected, strict=True):
        assert torch.allclose(found.cpu(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("compiled", [False, True])
def test_graph_of_a_forward_pass(gpu, compiled):
    q, k, v = (x.detach() for x in tensors((2, 100, 4, 64), (2, 120, 2, 64), device=gpu))

    def run(q, k, v):
        return ferroflash.attention(q, k, v, causal=True, return_lse=True)

    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(q, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = run(q, k, v)
    for _ in range(3):
        q.normal_()
        graph.replay()
        expected = ferroflash.attention(q, k, v, causal=True, return_lse=True)
        assert o.equal(expected[0]) and lse.equal(expected[1])


@pytest.mark.parametrize("with_scores", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_graph_of_a_training_step(gpu, deterministic, with_scores):
    inputs = tensors((2, 100, 4, 64), (2, 100, 4, 64), device=gpu)
    d_o = torch.randn_like(inputs[0])
    options = scores(inputs) if with_scores else {}
    learned = [*inputs, options["sinks"].requires_grad_()] if with_scores else inputs

    def run():
        o = ferroflash.attention(*inputs, causal=True, deterministic=deterministic, **options)
        return o, *torch.autograd.grad(o, learned, d_o)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        with torch.no_grad():
            inputs[0].normal_()
            d_o.normal_()
        graph.replay()
        for found, exact in zip(captured, run(), strict=True):
            assert found.equal(exact) if deterministic else torch.allclose(found, exact, atol=1e-2, rtol=1e-2)


def test_cpu_and_gpu_agree_on_sequences(gpu):
    lengths = (100, 0, 37, 260)
    inputs, (_, cu) = tensors((397, 4, 64), (397, 2, 64)), cumulative(lengths)
    d_o = torch.randn_like(inputs[0])
    options = {"dropout_p": 0.25, "seed_offset": (9, 4)}
    expected = both_passes(inputs, d_o, cu_seqlens_q=cu, cu_seqlens_k=cu, **options, **scores(inputs))
    moved, cu = [x.detach().to(gpu).requires_grad_() for x in inputs], cu.to(gpu)
    found = both_passes(moved, d_o.to(gpu), cu_seqlens_q=cu, cu_seqlens_k=cu, **options, **scores(moved))
    for one, exact in zip(found, expected, strict=True):
        assert torch.allclose(one.cpu(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("deterministic", [False, True])
def test_graph_with_other_lengths(gpu, deterministic):
    """A graph of a training step is replayed with other sequences, whose lengths the host never reads."""
    inputs, cu = tensors((300, 4, 64), (300, 2, 64), device=gpu), cumulative((100, 100, 100), gpu)[1]
    d_o = torch.randn_like(inputs[0])

    def run():
        o = ferroflash.flash_attn_varlen_func(*inputs, cu, cu, 300, 300, causal=True, deterministic=deterministic)
        return o, *torch.autograd.grad(o, inputs, d_o)

    graph, captured = capture(run)
    for lengths in ((300, 0, 0), (1, 150, 80), (0, 0, 0), (37, 200, 63)):
        ends, numbers = cumulative(lengths, gpu)
        cu.copy_(numbers)
        graph.replay()
        exact, plain = (
            of_sequences(*inputs, ends, ends, right=0, dtype=dtype)[0] for dtype in (torch.float64, torch.bfloat16)
        )
        assert_close(captured[0], exact, plain)
        for found, again in zip(captured, run(), strict=True):
            assert found.equal(again) if deterministic else torch.allclose(found, again, atol=1e-2, rtol=1e-2)


def test_lengths_outside_of_the_tensor_touch_nothing_else(gpu):
    q, k, v = (x.detach() for x in tensors((100, 4, 64), (100, 2, 64), device=gpu))
    for lengths in ([0, 50, 1 << 20], [-7, 50, 100], [90, 10, 100], [2**31 - 1, 0, -(2**31)]):
        cu = torch.tensor(lengths, dtype=torch.int32, device=gpu)
        ferroflash.attention(q, k, v, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu)
    torch.cuda.synchronize()
    cu = torch.tensor((0, 50, 100), dtype=torch.int32, device=gpu)
    o = ferroflash.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert torch.allclose(o[50:], ferroflash.attention(q[None, 50:], k[None, 50:], v[None, 50:])[0], atol=1e-2)


def training_step(inputs, d_o, **options):
    """Returns O and the gradients of attention over q, k, v, or of piecewise attention with q2 and k2."""
    options |= {"causal": True, "deterministic": True, "dropout_p": 0.25}
    if len(inputs) == 5:
        q1, k1, v, q2, k2 = inputs
        o = ferroflash.piecewise(q1, k1, q2, k2, v, 30, **options)
    else:
        o = ferroflash.attention(*inputs, **options)
    return o, *torch.autograd.grad(o, inputs, d_o)


def capture(run):
    """Returns a graph of `run` and its results, after a call outside the graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    return graph, captured


@pytest.mark.parametrize("count", [3, 5])
def test_graph_with_dropout(gpu, monkeypatch, count):
    """Every replay has another mask, and its backward pass is that of the same mask."""
    inputs = tensors((2, 100, 4, 64), (2, 100, 4, 64), device=gpu, count=count)
    d_o, drawn, draw = torch.randn_like(inputs[0]), [], ferroflash.ops.draw

    def remember(q, seed_offset):
        drawn.append(draw(q, seed_offset))
        return drawn[-1]

    monkeypatch.setattr(ferroflash.ops, "draw", remember)
    graph, captured = capture(lambda: training_step(inputs, d_o))
    monkeypatch.undo()
    numbers = drawn[-1]
    assert isinstance(numbers, torch.Tensor) and numbers.device.type == "cuda"
    seen = set()
    for _ in range(3):
        graph.replay()
        pair = tuple(numbers.tolist())
        seen.add(pair)
        for found, exact in zip(captured, training_step(inputs, d_o, seed_offset=pair), strict=True):
            assert found.equal(exact)
        if count == 3:
            kept = ferroflash.dropout_mask(2, 4, 100, 100, 0.25, numbers, device=gpu)
            exact, plain = (
                attention(*inputs, right=0, kept=kept, p=0.25, dtype=dtype)[0]
                for dtype in (torch.float64, torch.bfloat16)
            )
            assert_close(captured[0], exact, plain)
            results = zip(
                captured[1:], *(torch.autograd.grad(o, inputs, d_o.to(o)) for o in (exact, plain)), strict=True
            )
            for name, three in zip(("dq", "dk", "dv"), results, strict=True):
                assert_close(*three, name)
    assert len(seen) == 3


def test_graph_with_a_given_tensor(gpu):
    inputs = tensors((2, 100, 4, 64), (2, 100, 4, 64), device=gpu)
    d_o, numbers = torch.randn_like(inputs[0]), torch.tensor((3, 4), device=gpu)
    graph, captured = capture(lambda: training_step(inputs, d_o, seed_offset=numbers))
    for pair in ((5, 6), (-7, 2**62)):
        numbers.copy_(torch.tensor(pair))
        graph.replay()
        for found, exact in zip(captured, training_step(inputs, d_o, seed_offset=pair), strict=True):
            assert found.equal(exact)


def test_reduce_overhead_with_dropout(gpu):
    inputs = tensors((2, 100, 4, 64), (2, 100, 4, 64), device=gpu)
    run = torch.compile(lambda q, k, v: ferroflash.attention(q, k, v, dropout_p=0.25), mode="reduce-overhead")
    seen = []
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        o = run(*inputs)
        seen.append(o.detach().float().sum().item())
        torch.autograd.grad(o, inputs, torch.ones_like(o))
    assert len(set(seen)) == 5


def test_reduce_overhead(gpu):
    inputs = tensors((2, 100, 4, 64), (2, 100, 4, 64), device=gpu)
    run = torch.compile(
        lambda q, k, v: ferroflash.attention(q, k, v, causal=True), fullgraph=True, mode="reduce-overhead"
    )
    d_o = torch.randn_like(inputs[0])
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        found = torch.autograd.grad(run(*inputs), inputs, d_o)
        expected = torch.autograd.grad(ferroflash.attention(*inputs, causal=True), inputs, d_o)
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-2, rtol=1e-2)


def test_side_stream(gpu):
    inputs = tensors((2, 500, 8, 64), (2, 500, 8, 64), device=gpu)
    d_o = torch.randn_like(inputs[0])
    expected = both_passes(inputs, d_o)
    side = torch.cuda.Stream()
    for _ in range(10):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # The inputs exist only after this wait, so that a pass on another stream would read other numbers.
            torch.cuda._sleep(2_000_000)
            late = [x.detach().clone().requires_grad_() for x in inputs]
            found = both_passes(late, d_o)
        side.synchronize()
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_memory_is_freed_in_the_order_of_the_stream(gpu):
    # Every tensor is dropped while its kernels may not have started.
    expected = None
    for _ in range(20):
        torch.manual_seed(2)
        inputs = tensors((2, 300, 8, 64), (2, 300, 8, 64), device=gpu)
        results = both_passes(inputs, torch.ones_like(inputs[0]))
        sums = torch.stack([result.float().abs().sum() for result in results])
        del inputs, results
        torch.randn(1 << 22, device=gpu)
        assert expected is None or sums.equal(expected)
        expected = sums


def test_second_device(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = tensors((2, 100, 4, 64), (2, 120, 2, 64), device="cuda:0")
    d_o = torch.randn_like(inputs[0])
    expected = both_passes(inputs, d_o)
    moved = [x.detach().to("cuda:1").requires_grad_() for x in inputs]
    assert torch.cuda.current_device() == 0
    found = both_passes(moved, d_o.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(a.device.index == 1 and a.to("cuda:0").equal(b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="^k is on cuda:1; q is on cuda:0"):
        ferroflash.attention(inputs[0], *moved[1:])


def test_two_threads_on_two_streams(gpu):
    from concurrent.futures import ThreadPoolExecutor

    problems = [tensors((1, 200, 4, 64), (1, 200, 4, 64), device=gpu) for _ in range(4)]
    d_o = torch.ones_like(problems[0][0])
    expected = [both_passes(inputs, d_o) for inputs in problems]
    torch.cuda.synchronize()

    def run(inputs):
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [both_passes(inputs, d_o) for _ in range(10)][-1]
            torch.cuda.current_stream().synchronize()
        return results

    with ThreadPoolExecutor(4) as pool:
        for found, exact in zip(pool.map(run, problems), expected, strict=True):
            assert all(a.equal(b) for a, b in zip(found, exact, strict=True))
