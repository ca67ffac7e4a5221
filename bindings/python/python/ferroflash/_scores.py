"""Attention probabilities as flash-attention 2 returns them with dropout, in torch operators. They are for tests."""

from __future__ import annotations

import torch

from . import _launch

# Number of scores that are computed at a time.
_SCORES = 1 << 24
# Absolute value of a dropped weight, at least. It is exact in float16 and keeps the sign of weights that round to 0.
_FLOOR = 2.0**-24


@torch.no_grad()
def s_dmask(q, k, left, right, scale, softcap, slopes, dropout_p, seed_offset):
    """Returns exp(score - largest score of the row), (batch, heads_q, seqlen_q, seqlen_k) in the dtype of q.

    The value is negative for a dropped weight, and 0 where a query does not attend to a key. `seed_offset` is always a
    tensor in calls that take the operators.
    """
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    return _scores(q, k, left, right, scale, softcap, slopes, _kept(q, shape, dropout_p, seed_offset))


@torch.no_grad()
def s_dmask_of_sequences(q, k, lengths, left, right, scale, softcap, slopes, dropout_p, seed_offset):
    """Returns the same for sequences of different lengths, (sequences, heads_q, most queries, most keys).

    It is 0 outside of the sequences. The lengths are read to the host.
    """
    cu_q, cu_k, used, *longest = lengths
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("cu_seqlens_q is read to the host for S_dmask, which a CUDA graph can't capture")
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    queries, keys = cu_q.diff().tolist(), (cu_k.diff() if used is None else used).tolist()
    most = [max((*counts, hint or 0)) for counts, hint in zip((queries, keys), longest, strict=True)]
    shape = (len(queries), q.shape[1], *most)
    kept, result = _kept(q, shape, dropout_p, seed_offset), q.new_zeros(shape)
    for b, (m, n) in enumerate(zip(queries, keys, strict=True)):
        inputs = q[None, starts_q[b] : starts_q[b] + m], k[None, starts_k[b] : starts_k[b] + n]
        own = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        scores = _scores(*inputs, left, right, scale, softcap, own, kept[b : b + 1, :, :m, :n])
        result[b, :, :m, :n] = scores[0]
    return result


def _kept(q, shape, dropout_p, seed_offset):
    """Returns the weights that dropout keeps."""
    if isinstance(seed_offset, torch.Tensor):
        return torch.ops.ferroflash.dropout_mask(q, shape, dropout_p, seed_offset)
    return _launch.dropout_mask(shape, dropout_p, seed_offset, q.device)


def _scores(q, k, left, right, scale, softcap, slopes, kept):
    """Returns S_dmask of a batch for a dropout mask."""
    (batch, seqlen_q, heads, head_dim), (seqlen_k, heads_kv) = q.shape, k.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    result = q.new_empty((batch, heads, seqlen_q, seqlen_k))
    if result.numel() == 0:
        return result
    if slopes is not None:
        slopes = slopes.float().reshape(-1, heads, 1, 1)
    keys = torch.arange(seqlen_k, device=q.device)
    key_heads = k.float().permute(0, 2, 3, 1).unsqueeze(2)
    rows = max(1, _SCORES // max(1, batch * heads * seqlen_k))
    for start in range(0, seqlen_q, rows):
        block = slice(start, min(start + rows, seqlen_q))
        queries = q[:, block].float().transpose(1, 2).unflatten(1, (heads_kv, heads // heads_kv))
        scores = (queries @ key_heads).flatten(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(block.start, block.stop, device=q.device)[:, None] + (seqlen_k - seqlen_q) - keys
        if slopes is not None:
            scores = scores - slopes * distance.abs()
        if left >= 0:
            scores = scores.masked_fill(distance > left, -torch.inf)
        if right >= 0:
            scores = scores.masked_fill(distance < -right, -torch.inf)
        hidden = scores == -torch.inf
        weights = (scores - scores.amax(-1, keepdim=True)).exp().masked_fill(hidden, 0.0)
        dropped = -weights.clamp_min(_FLOOR).masked_fill(hidden, 0.0)
        result[:, :, block] = torch.where(kept[:, :, block], weights, dropped)
    return result
