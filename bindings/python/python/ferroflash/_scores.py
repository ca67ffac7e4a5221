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
    (batch, seqlen_q, heads, head_dim), (seqlen_k, heads_kv) = q.shape, k.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    shape = (batch, heads, seqlen_q, seqlen_k)
    if isinstance(seed_offset, torch.Tensor):
        kept = torch.ops.ferroflash.dropout_mask(q, shape, dropout_p, seed_offset)
    else:
        kept = _launch.dropout_mask(shape, dropout_p, seed_offset, q.device)
    result = q.new_empty(shape)
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
