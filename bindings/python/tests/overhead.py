"""Prints the host time of one call beside that of torch's scaled_dot_product_attention: python tests/overhead.py

Batch 1, 8 heads, 256 queries and keys, head dim 64, as in small models, where the host's time is what counts. The bar
is 1.5 times torch's without gradients and 2 times with them. A call is timed until it returns, with the device idle at
the start of each round, and rounds of the functions alternate; the median round counts.

On the CPU, which computes before it returns, the functions are also timed with a batch of 0. That leaves the host's
part alone.
"""

import statistics
import time

import torch

import ferroflash

BATCH, HEADS, SEQLEN, HEAD_DIM = 1, 8, 256, 64
# Few enough that a GPU's queue never fills.
CALLS, ROUNDS = 100, 60


def inputs(device, batch, requires_grad):
    shape = (batch, SEQLEN, HEADS, HEAD_DIM)
    return [torch.randn(shape, device=device).bfloat16().requires_grad_(requires_grad) for _ in range(3)]


def sdpa(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def functions(device, batch, gradients):
    """Returns the functions by name, each with its inputs. Torch's takes its own layout, heads before rows."""
    mine, torchs = inputs(device, batch, gradients), inputs(device, batch, gradients)
    torchs = [x.detach().transpose(1, 2).contiguous().requires_grad_(gradients) for x in torchs]
    qkv = torch.stack([x.detach() for x in mine], 2).requires_grad_(gradients)
    result = {
        "torch sdpa": (sdpa, torchs),
        "attention": (ferroflash.attention, mine),
        "flash_attn_func": (ferroflash.flash_attn_func, mine),
        "flash_attn_qkvpacked_func": (ferroflash.flash_attn_qkvpacked_func, [qkv]),
    }
    try:
        import flash_attn
    except ImportError:
        return result
    return result | {"flash-attention 2": (flash_attn.flash_attn_func, mine)}


def time_rounds(device, batch, gradients):
    """Returns the median host time of one call by name, in microseconds."""
    calls = {}
    for name, (function, tensors) in functions(device, batch, gradients).items():
        if gradients:
            d_o = torch.ones_like(function(*tensors))

            def call(function=function, tensors=tensors, d_o=d_o):
                torch.autograd.grad(function(*tensors), tensors, d_o)
        else:

            def call(function=function, tensors=tensors):
                function(*tensors)

        calls[name] = call
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()
            synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter() - start) / CALLS * 1e6)
            synchronize()
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, ferroflash {ferroflash.__version__}, {where}")
    batch = BATCH if device == "cuda" else 0
    print(f"batch {batch}, {HEADS} heads, {SEQLEN} queries and keys, head dim {HEAD_DIM}, bfloat16\n")
    print(f"{'µs a call':28}{'forward':>10}{'':>8}{'forward + backward':>22}")
    with torch.no_grad():
        forward = time_rounds(device, batch, False)
    both = time_rounds(device, batch, True)
    for name in forward:
        ratios = [table[name] / table["torch sdpa"] for table in (forward, both)]
        print(f"{name:28}{forward[name]:10.1f}{ratios[0]:7.2f}×{both[name]:22.1f}{ratios[1]:7.2f}×")
    return forward, both


if __name__ == "__main__":
    main()
