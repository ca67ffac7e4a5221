"""Calls from many threads, and an interpreter that runs on while a pass computes."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

import ferroflash
from reference import tensors


def test_many_threads(device):
    problems = [tensors((1, 30 + i, 4, 64), (1, 50 + i, 2, 64), device=device) for i in range(8)]

    def run(inputs):
        o = ferroflash.attention(*inputs, causal=True, deterministic=True)
        return o, *torch.autograd.grad(o, inputs, torch.ones_like(o))

    expected = [run(inputs) for inputs in problems]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for found, exact in zip(pool.map(run, problems), expected, strict=True):
                assert all(a.equal(b) for a, b in zip(found, exact, strict=True))


def test_other_threads_run_meanwhile():
    q = torch.randn(1, 1500, 8, 128).half()
    done = threading.Event()

    def compute():
        ferroflash.attention(q, q, q)
        done.set()

    thread = threading.Thread(target=compute)
    thread.start()
    turns = 0
    while not done.is_set():
        time.sleep(0.001)
        turns += 1
    thread.join()
    assert turns > 3
