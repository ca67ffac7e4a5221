"""flash-attention 2's functions, with its signatures and defaults.

Replace `from flash_attn import flash_attn_func` by `from ferroflash import flash_attn_func`. Shapes are
(batch, seqlen, heads, head_dim). Three things differ:

- The LSE of a query that attends to no key is -inf, and not +inf. Its O is 0 in both.
- The tensors may also be on the CPU.
- KV caches and block tables are not built yet. They raise NotImplementedError, which names the argument.

With `return_attn_probs` a function returns (out, softmax_lse, S_dmask); softmax_lse is float32 (batch, heads_q,
seqlen_q). S_dmask is None without dropout. With dropout it is exp(score - largest score of its row), (batch, heads_q,
seqlen_q, seqlen_k) in the dtype of q, negative for weights that were dropped. It is for tests: torch operators compute
it, and it takes the memory of all scores.

In the varlen functions softmax_lse is (heads_q, total_q), and S_dmask is (sequences, heads_q, max_seqlen_q,
max_seqlen_k) with zeros outside of the sequences. For S_dmask the lengths are read to the host.
"""

from __future__ import annotations

from typing import NoReturn

import torch

from . import _eager, ops

_run = ops.run
_is_compiling = torch.compiler.is_compiling


def _unsupported(argument, advice):
    return NotImplementedError(f"{argument} is not supported by ferroflash yet: {advice}")


def _seed_offset(q, dropout_p, return_attn_probs):
    """Returns seed and offset of the dropout mask if S_dmask is computed from them."""
    if not return_attn_probs or dropout_p == 0.0:
        return None
    if _is_compiling() or not _eager.is_plain(q, q, q):
        return ops.traced_seed_offset(q, None)
    return ops.draw(q, None)


def _with_probs(result, q, k, left, right, scale, softcap, slopes, dropout_p, seed_offset, lengths=None):
    """Returns (out, softmax_lse, S_dmask) for a result (out, softmax_lse)."""
    if seed_offset is None:
        return *result, None
    from . import _scores

    options = (int(left), int(right), scale, softcap, slopes, dropout_p, seed_offset)
    if lengths is None:
        return *result, _scores.s_dmask(q, k, *options)
    if _is_compiling():
        raise NotImplementedError(
            "return_attn_probs with dropout_p and cu_seqlens is not supported under torch.compile: S_dmask has a shape "
            "that depends on the lengths"
        )
    return *result, _scores.s_dmask_of_sequences(q, k, lengths, *options)


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Computes attention of q (batch, seqlen_q, heads_q, head_dim), and k and v (batch, seqlen_k, heads_kv, head_dim).

    See `ferroflash.attention` for the arguments, and the module for what differs from flash-attention 2.
    """
    left, right = window_size
    right = 0 if causal else right
    if not return_attn_probs:
        return _run(q, k, v, left, right, softmax_scale, softcap, dropout_p, deterministic, False, alibi_slopes)
    options = (left, right, softmax_scale, softcap)
    seed_offset = _seed_offset(q, dropout_p, True)
    result = _run(q, k, v, *options, dropout_p, deterministic, True, alibi_slopes, None, seed_offset)
    return _with_probs(result, q, k, *options, alibi_slopes, dropout_p, seed_offset)


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Computes attention of one tensor (batch, seqlen, 3, heads, head_dim). Its gradient is one tensor too."""
    left, right = window_size
    right = 0 if causal else right
    options = (left, right, softmax_scale, softcap)
    seed_offset = _seed_offset(qkv, dropout_p, return_attn_probs)
    result = _qkv_packed(qkv, options, dropout_p, deterministic, return_attn_probs, alibi_slopes, seed_offset, None)
    if not return_attn_probs:
        return result
    return _with_probs(result, *qkv.unbind(2)[:2], *options, alibi_slopes, dropout_p, seed_offset)


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Computes attention of q, and of keys and values in one tensor (batch, seqlen_k, 2, heads_kv, head_dim).

    The gradient of `kv` is one tensor too.
    """
    left, right = window_size
    right = 0 if causal else right
    options = (left, right, softmax_scale, softcap)
    seed_offset = _seed_offset(q, dropout_p, return_attn_probs)
    result = _kv_packed(q, kv, options, dropout_p, deterministic, return_attn_probs, alibi_slopes, seed_offset, None)
    if not return_attn_probs:
        return result
    return _with_probs(result, q, kv.unbind(2)[0], *options, alibi_slopes, dropout_p, seed_offset)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Computes attention of sequences of different lengths, one after the other in q, k and v.

    q is (total_q, heads_q, head_dim), and k and v are (total_k, heads_kv, head_dim). See `ferroflash.attention` for the
    lengths, and for `seqused_k`, which is that of vLLM's flash-attention. The longest lengths are hints: results do not
    depend on them. A block table is not supported yet.
    """
    if block_table is not None:
        raise _unsupported("block_table", "gather the pages into one tensor of keys and one of values")
    left, right = window_size
    options = (left, 0 if causal else right, softmax_scale, softcap)
    lengths = _given(ops.lengths_of(cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k))
    seed_offset = _seed_offset(q, dropout_p, return_attn_probs)
    rest = (dropout_p, deterministic, return_attn_probs, alibi_slopes, None, seed_offset, lengths)
    result = _run(q, k, v, *options, *rest)
    if not return_attn_probs:
        return result
    return _with_probs(result, q, k, *options, alibi_slopes, dropout_p, seed_offset, lengths)


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Computes attention of sequences of different lengths in one tensor (total, 3, heads, head_dim).

    Its gradient is one tensor too.
    """
    left, right = window_size
    options = (left, 0 if causal else right, softmax_scale, softcap)
    lengths = _given(ops.lengths_of(cu_seqlens, cu_seqlens, None, max_seqlen, max_seqlen), "cu_seqlens")
    seed_offset = _seed_offset(qkv, dropout_p, return_attn_probs)
    rest = (dropout_p, deterministic, return_attn_probs, alibi_slopes, seed_offset, lengths)
    result = _qkv_packed(qkv, options, *rest)
    if not return_attn_probs:
        return result
    return _with_probs(result, *qkv.unbind(1)[:2], *options, alibi_slopes, dropout_p, seed_offset, lengths)


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Computes attention of sequences of different lengths, with keys and values in one tensor.

    q is (total_q, heads_q, head_dim) and kv (total_k, 2, heads_kv, head_dim). The gradient of `kv` is one tensor too.
    """
    left, right = window_size
    options = (left, 0 if causal else right, softmax_scale, softcap)
    lengths = _given(ops.lengths_of(cu_seqlens_q, cu_seqlens_k, None, max_seqlen_q, max_seqlen_k))
    seed_offset = _seed_offset(q, dropout_p, return_attn_probs)
    rest = (dropout_p, deterministic, return_attn_probs, alibi_slopes, seed_offset, lengths)
    result = _kv_packed(q, kv, options, *rest)
    if not return_attn_probs:
        return result
    return _with_probs(result, q, kv.select(1, 0), *options, alibi_slopes, dropout_p, seed_offset, lengths)


def _given(lengths, name="cu_seqlens_q"):
    """Returns the lengths; refuses None, which would be a dense batch."""
    if lengths is None:
        raise ValueError(f"{name} is None; an int32 tensor of cumulative lengths is needed")
    return lengths


def _qkv_packed(qkv, options, dropout_p, deterministic, return_lse, alibi_slopes, seed_offset, lengths):
    """Runs attention over one tensor. Its gradient is written as one tensor if the call is a plain eager one."""
    if not _is_eager(qkv, qkv):
        rest = (dropout_p, deterministic, return_lse, alibi_slopes, None, seed_offset, lengths)
        return _run(*qkv.unbind(-3), *options, *rest)
    dropout, slopes = ops.drawn_dropout(qkv, dropout_p, seed_offset), ops.slopes_of(alibi_slopes)
    return _eager.qkv_packed(qkv, slopes, lengths, (*options, dropout, deterministic), return_lse)


def _kv_packed(q, kv, options, dropout_p, deterministic, return_lse, alibi_slopes, seed_offset, lengths):
    """Runs attention over queries, and keys and values in one tensor, whose gradient is written likewise."""
    if not _is_eager(q, kv):
        rest = (dropout_p, deterministic, return_lse, alibi_slopes, None, seed_offset, lengths)
        return _run(q, *kv.unbind(-3), *options, *rest)
    dropout, slopes = ops.drawn_dropout(q, dropout_p, seed_offset), ops.slopes_of(alibi_slopes)
    return _eager.kv_packed(q, kv, slopes, lengths, (*options, dropout, deterministic), return_lse)


def _is_eager(q, packed):
    """True for a plain eager call that needs no padding."""
    return not _is_compiling() and _eager.is_plain(q, packed, packed) and q.size(-1) % 8 == 0


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> NoReturn:
    """Raises NotImplementedError: KV caches are not built yet."""
    raise _unsupported("k_cache", "call flash_attn_func with the cache's live part, k_cache[:, :length]")
