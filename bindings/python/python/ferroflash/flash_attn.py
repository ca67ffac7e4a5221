"""flash-attention 2's functions, with its signatures and defaults.

Replace `from flash_attn import flash_attn_func` by `from ferroflash import flash_attn_func`. Shapes are
(batch, seqlen, heads, head_dim). Three things differ:

- The LSE of a query that attends to no key is -inf, and not +inf. Its O is 0 in both.
- The tensors may also be on the CPU.
- Packed sequences (varlen) and KV caches are not built yet. They raise NotImplementedError, which names the argument.

With `return_attn_probs` a function returns (out, softmax_lse, S_dmask); softmax_lse is float32 (batch, heads_q,
seqlen_q). S_dmask is None without dropout. With dropout it is exp(score - largest score of its row), (batch, heads_q,
seqlen_q, seqlen_k) in the dtype of q, negative for weights that were dropped. It is for tests: torch operators compute
it, and it takes the memory of all scores.
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


def _with_probs(result, q, k, left, right, scale, softcap, slopes, dropout_p, seed_offset):
    """Returns (out, softmax_lse, S_dmask) for a result (out, softmax_lse)."""
    if seed_offset is None:
        return *result, None
    from ._scores import s_dmask

    return *result, s_dmask(q, k, int(left), int(right), scale, softcap, slopes, dropout_p, seed_offset)


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
    if _is_eager(qkv, qkv):
        dropout = ops.drawn_dropout(qkv, dropout_p, seed_offset)
        slopes = ops.slopes_of(alibi_slopes)
        result = _eager.qkv_packed(qkv, slopes, (*options, dropout, deterministic), return_attn_probs)
    else:
        rest = (dropout_p, deterministic, return_attn_probs, alibi_slopes, None, seed_offset)
        result = _run(*qkv.unbind(2), *options, *rest)
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
    if _is_eager(q, kv):
        dropout = ops.drawn_dropout(q, dropout_p, seed_offset)
        slopes = ops.slopes_of(alibi_slopes)
        result = _eager.kv_packed(q, kv, slopes, (*options, dropout, deterministic), return_attn_probs)
    else:
        rest = (dropout_p, deterministic, return_attn_probs, alibi_slopes, None, seed_offset)
        result = _run(q, *kv.unbind(2), *options, *rest)
    if not return_attn_probs:
        return result
    return _with_probs(result, q, kv.unbind(2)[0], *options, alibi_slopes, dropout_p, seed_offset)


def _is_eager(q, packed):
    """True for a plain eager call that needs no padding."""
    return not _is_compiling() and _eager.is_plain(q, packed, packed) and q.size(-1) % 8 == 0


_VARLEN = "call flash_attn_func for each sequence, or pad the sequences to one length"


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
) -> NoReturn:
    """Raises NotImplementedError: packed sequences are not built yet."""
    if block_table is not None:
        raise _unsupported("block_table", "gather the pages into tensors and call flash_attn_func")
    raise _unsupported("cu_seqlens_q", _VARLEN)


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
) -> NoReturn:
    """Raises NotImplementedError: packed sequences are not built yet."""
    raise _unsupported("cu_seqlens", _VARLEN)


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
) -> NoReturn:
    """Raises NotImplementedError: packed sequences are not built yet."""
    raise _unsupported("cu_seqlens_q", _VARLEN)


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
