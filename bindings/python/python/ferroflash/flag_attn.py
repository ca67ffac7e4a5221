"""FlagAttention's operators, with its names, parameters and layout: (batch, heads, tokens, head dim).

    from ferroflash import flag_attn
    o = flag_attn.flash_attention(q, k, v, causal=True)

Instead of FlagAttention's head dims (16, 32, 64, 128) every multiple of 8 up to 256 is allowed, and piecewise attention
takes fewer key heads than query heads, too.
"""

from . import ops

__all__ = ["flash_attention", "piecewise_attention", "flash_attention_split_kv", "paged_attention"]


def flash_attention(
    q,
    k,
    v,
    causal=False,
    sm_scale=None,
    dropout_p=0.0,
    return_log_normalizer=False,
    return_total_attention=False,
    return_seed_offset=False,
):
    """softmax(sm_scale · q·kᵀ)·v, (batch, heads, tokens, head dim). `sm_scale` defaults to 1/√head_dim.

    A causal mask is aligned to the last query and the last key. With any of the `return_` parameters the result is
    (o, log_normalizer, total_attention, seed, offset), of which those not asked for are None. The log normaliser,
    (batch, heads_q, seqlen_q), is the natural logarithm of each softmax's denominator. The total attention,
    (batch, heads_q, seqlen_k), is the sum of each key's weights over all queries, before dropout. Gradients do not flow
    through these two. Seed and offset are those of the dropout mask (`ferroflash.dropout_mask`), None without dropout.
    They are integers, and while a CUDA graph is captured tensors of one element.
    """
    # Drawn here only to be returned: attention draws by itself.
    seed_offset = ops.draw(q, None) if dropout_p > 0.0 and return_seed_offset else None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    wants_lse = return_log_normalizer or return_total_attention
    o = ops.attention(
        q,
        k,
        v,
        causal=causal,
        softmax_scale=sm_scale,
        dropout_p=dropout_p,
        return_lse=wants_lse,
        seed_offset=seed_offset,
    )
    lse = total = None
    if wants_lse:
        o, lse = o
        lse = lse.detach()
    if return_total_attention:
        total = ops.total_attention(q, k, lse, causal=causal, softmax_scale=sm_scale)
    o = o.transpose(1, 2)
    if not (wants_lse or return_seed_offset):
        return o
    seed, offset = (None, None) if seed_offset is None else seed_offset
    return o, lse if return_log_normalizer else None, total, seed, offset


def piecewise_attention(q1, k1, q2, k2, v, dist_threshold, causal=False, sm_scale=None):
    """Attention whose scores are of two kinds: q2·k2 where a key is at least `dist_threshold` tokens before the query,
    q1·k1 elsewhere. Tensors are (batch, heads, tokens, head dim); positions are aligned to the last query and key.
    """
    q1, k1, q2, k2, v = (x.transpose(1, 2) for x in (q1, k1, q2, k2, v))
    o = ops.piecewise(q1, k1, q2, k2, v, dist_threshold, causal=causal, softmax_scale=sm_scale)
    return o.transpose(1, 2)


def flash_attention_split_kv(q, k, v, causal=False, sm_scale=None):
    """Not there yet: keys split over several thread blocks come with decoding. `flash_attention` gives the same."""
    raise NotImplementedError("split-KV comes with decoding; flash_attention has the same result")


def paged_attention(
    query, key_cache, value_cache, context_lens, block_tables, attn_scale, max_context_len, num_splits=0
):
    """Not there yet: attention over a paged cache comes with decoding."""
    raise NotImplementedError("paged attention comes with decoding")
