"""What only a GPU has: graphs, streams, a second device, and agreement with the CPU."""

import pytest
import torch

import ferroflash
from reference import tensors


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
