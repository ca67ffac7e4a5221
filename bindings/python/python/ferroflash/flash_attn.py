"""flash-attention 2's functions, with its signatures and defaults.

Replace `from flash_attn import flash_attn_func` by `from ferroflash import flash_attn_func`. Shapes are
(batch, seqlen, heads, head_dim). Three things differ:

- The LSE of a query that attends to no key is -inf, and not +inf. Its O is 0 in both.
- The tensors may also be on the CPU.
- What is not built yet raises NotImplementedError, which names the argument: softcap, alibi_slopes, S_dmask with
  dropout, packed sequences (varlen) and KV caches.

With `return_attn_probs` a function returns (out, softmax_lse, None); softmax_lse is float32 (batch, heads_q, seqlen_q).
"""

from __future__ import annotations

from typing import NoReturn

import torch

from . import _eager, ops

_run = ops.run
_is_compiling = torch.compiler.is_compiling


def _unsupported(argument, advice):
    return NotImplementedError(f"{argument} is not supported by ferroflash yet: {advice}")


def _check(dropout_p, softcap, alibi_slopes, return_attn_probs):
    """Refuses what is not built yet."""
    if softcap != 0.0:
        raise _unsupported("softcap", "pass 0.0, or use another attention for models that cap their scores")
    if alibi_slopes is not None:
        raise _unsupported("alibi_slopes", "pass None, or use another attention for models with ALiBi")
    if return_attn_probs and dropout_p > 0.0:
        raise _unsupported(
            "return_attn_probs with dropout_p above 0",
            "pass dropout_p=0.0, or call ferroflash.attention with return_lse and seed_offset and take the mask from "
            "ferroflash.dropout_mask",
        )


def _result(result, return_attn_probs):
    return (*result, None) if return_attn_probs else result


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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """Computes attention of q (batch, seqlen_q, heads_q, head_dim), and k and v (batch, seqlen_k, heads_kv, head_dim).

    See `ferroflash.attention` for the arguments, and the module for what differs from flash-attention 2.
    """
    if softcap != 0.0 or alibi_slopes is not None or return_attn_probs:
        _check(dropout_p, softcap, alibi_slopes, return_attn_probs)
    left, right = window_size
    right = 0 if causal else right
    result = _run(q, k, v, left, right, softmax_scale, dropout_p, deterministic, return_attn_probs)
    return _result(result, return_attn_probs)


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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """Computes attention of one tensor (batch, seqlen, 3, heads, head_dim). Its gradient is one tensor too."""
    _check(dropout_p, softcap, alibi_slopes, return_attn_probs)
    left, right = window_size
    right = 0 if causal else right
    if _is_eager(qkv, qkv):
        dropout = None if dropout_p == 0.0 else (dropout_p, *ops.draw(qkv, None))
        options = (left, right, softmax_scale, dropout, deterministic)
        result = _eager.qkv_packed(qkv, options, return_attn_probs)
    else:
        q, k, v = qkv.unbind(2)
        result = _run(q, k, v, left, right, softmax_scale, dropout_p, deterministic, return_attn_probs)
    return _result(result, return_attn_probs)


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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """Computes attention of q, and of keys and values in one tensor (batch, seqlen_k, 2, heads_kv, head_dim).

    The gradient of `kv` is one tensor too.
    """
    _check(dropout_p, softcap, alibi_slopes, return_attn_probs)
    left, right = window_size
    right = 0 if causal else right
    if _is_eager(q, kv):
        dropout = None if dropout_p == 0.0 else (dropout_p, *ops.draw(q, None))
        options = (left, right, softmax_scale, dropout, deterministic)
        result = _eager.kv_packed(q, kv, options, return_attn_probs)
    else:
        k, v = kv.unbind(2)
        result = _run(q, k, v, left, right, softmax_scale, dropout_p, deterministic, return_attn_probs)
    return _result(result, return_attn_probs)


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
