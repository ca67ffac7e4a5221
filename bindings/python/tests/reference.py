"""Attention in plain torch operators, of any precision, and the project's bar for errors."""

import math

import torch


def live(seqlen_q, seqlen_k, left, right, device):
    """Returns which keys a query attends to, bool (seqlen_q, seqlen_k); a negative bound is none."""
    place = torch.arange(seqlen_q, device=device)[:, None] + seqlen_k - seqlen_q
    key = torch.arange(seqlen_k, device=device)[None, :]
    result = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left >= 0:
        result &= key >= place - left
    if right >= 0:
        result &= key <= place + right
    return result


def attention(
    q,
    k,
    v,
    *,
    left=-1,
    right=-1,
    scale=None,
    softcap=None,
    slopes=None,
    sinks=None,
    second=None,
    kept=None,
    p=0.0,
    dtype=torch.float64,
):
    """Returns (O, LSE, P) of tensors (batch, seqlen, heads, head_dim), computed in `dtype`.

    `second` is (q2, k2, dist_threshold), `kept` a dropout mask (batch, heads_q, seqlen_q, seqlen_k), `slopes` are
    (heads_q) or (batch, heads_q) and `sinks` (heads_q).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[2] // k.shape[2]

    def heads(x, repeat=1):
        return x.to(dtype).transpose(1, 2).repeat_interleave(repeat, 1)

    scores = heads(q) @ heads(k, group).transpose(2, 3) * scale
    queries, keys = scores.shape[2:]
    place = torch.arange(queries, device=q.device)[:, None] + keys - queries
    distance = place - torch.arange(keys, device=q.device)[None, :]
    if second is not None:
        q2, k2, threshold = second
        far = heads(q2) @ heads(k2, group).transpose(2, 3) * scale
        scores = torch.where(distance >= threshold, far, scores)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores - slopes.to(dtype).reshape(-1, q.shape[2], 1, 1) * distance.abs()
    mask = live(q.shape[1], k.shape[1], left, right, q.device)
    scores = scores.masked_fill(~mask, -math.inf)
    logits = scores
    if sinks is not None:
        column = sinks.to(dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        logits = torch.cat((scores, column), -1)
    lse = torch.logsumexp(logits.float() if dtype != torch.float64 else logits, -1)
    # A row without keys has P = 0.
    floor = torch.where(lse.isfinite(), lse, torch.zeros_like(lse)).to(dtype)
    weights = (scores - floor[..., None]).exp()
    dropped = weights
    if kept is not None:
        dropped = weights * kept.to(weights.device) / (1.0 - p)
    o = (dropped @ heads(v, group)).transpose(1, 2)
    return o, lse, weights


def assert_close(found, exact, plain, name="result"):
    """Fails if the error is above twice that of the same computation in 16 bits, plus 1e-5."""
    found, exact, plain = found.detach().double(), exact.detach().double(), plain.detach().double()
    assert found.shape == exact.shape, name
    assert found.isfinite().equal(exact.isfinite()), f"{name}: infinite or NaN elsewhere"
    finite = exact.isfinite()
    assert found[~finite].equal(exact[~finite]), name
    if not finite.any():
        return
    error = (found - exact)[finite].abs().max().item()
    bar = 2 * (plain - exact)[finite].abs().max().item() + 1e-5
    assert error <= bar, f"{name}: error {error:.3g}, bar {bar:.3g}"


def tensors(shape_q, shape_k, dtype=torch.bfloat16, device="cpu", count=3):
    """Returns normal random q, k, v (and q2, k2 with `count` 5) that need gradients."""
    shapes = [shape_q, shape_k, shape_k, shape_q, shape_k][:count]
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def gradients(results, inputs, weights):
    """Returns the gradients of sum(result * weight) over the pairs."""
    total = sum((result * weight.to(result.dtype)).sum() for result, weight in zip(results, weights, strict=True))
    return torch.autograd.grad(total, inputs)
