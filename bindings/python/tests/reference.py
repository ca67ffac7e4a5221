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


def of_sequences(q, k, v, cu_q, cu_k, *, used=None, slopes=None, second=None, kept=None, **options):
    """Returns (O, LSE, total attention) of sequences that share tensors (total, heads, head_dim), one after the other.

    `cu_q` and `cu_k` are lists of cumulative lengths, `used` is a list of the numbers of keys that count, and `kept` a
    dropout mask (sequences, heads_q, longest, longest). Rows of no sequence get 0, -inf and 0.
    """
    dtype = options.get("dtype", torch.float64)
    o = torch.zeros(q.shape, dtype=dtype, device=q.device)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=kind, device=q.device)
    total = torch.zeros(q.shape[1], k.shape[0], dtype=torch.float64, device=q.device)
    for b in range(len(cu_q) - 1):
        rows = slice(cu_q[b], cu_q[b + 1])
        keys = slice(cu_k[b], cu_k[b + 1] if used is None else cu_k[b] + used[b])
        queries, count = rows.stop - rows.start, keys.stop - keys.start
        if queries == 0:
            continue
        one = dict(options)
        if slopes is not None:
            one["slopes"] = slopes[b] if slopes.dim() == 2 else slopes
        if second is not None:
            one["second"] = (second[0][None, rows], second[1][None, keys], second[2])
        if kept is not None:
            one["kept"] = kept[b : b + 1, :, :queries, :count]
        result, of_rows, weights = attention(q[None, rows], k[None, keys], v[None, keys], **one)
        o = torch.cat((o[: rows.start], result[0], o[rows.stop :]))
        lse = torch.cat((lse[:, : rows.start], of_rows[0], lse[:, rows.stop :]), 1)
        total[:, keys] = weights[0].detach().double().sum(1)
    return o, lse, total


def cumulative(lengths, device="cpu"):
    """Returns cumulative lengths as a list, and as the int32 tensor that functions take."""
    result = [0]
    for length in lengths:
        result.append(result[-1] + length)
    return result, torch.tensor(result, dtype=torch.int32, device=device)


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
