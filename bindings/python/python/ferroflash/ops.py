"""Attention, piecewise attention and total attention of torch tensors.

Tensors are (batch, seqlen, heads, head_dim) in float16 or bfloat16, on the CPU or on a CUDA device, where work runs on
torch's current stream. Any strides with a contiguous head_dim are taken without a copy if they are multiples of 8
elements; other tensors are copied, and the first copy warns. Head dims up to 256 that are no multiple of 8 are padded.

Heads may be grouped: query head h reads key head h // (heads_q // heads_kv). A causal mask and windows are aligned to
the bottom right: query i stands at key i + seqlen_k - seqlen_q. A query that attends to no key gets O = 0 and
LSE = -inf. Wrong input raises ValueError or TypeError, and what a machine can't do RuntimeError or MemoryError.

Sequences of different lengths may share one tensor, one after the other. Tensors are then (total, heads, head_dim), and
`cu_seqlens_q` and `cu_seqlens_k` say where the sequences are; see `attention`. Everything works with them, and masks,
ALiBi and dropout count from the start of each sequence.

Results have gradients, and work under torch.compile, torch.export and CUDA graphs.
"""

from __future__ import annotations

import torch

from . import _eager, _launch

_is_compiling = torch.compiler.is_compiling
_is_plain = _eager.is_plain
lengths_of = _launch.lengths_of


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
    seed_offset: tuple[int, int] | torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    max_seqlen_q: int | torch.Tensor | None = None,
    max_seqlen_k: int | torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Computes softmax(softmax_scale * Q @ K^T + mask) @ V, with a bound, a bias and sinks if they are given.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim), or (total_q, heads_q, head_dim) with `cu_seqlens_q`.
        k: (batch, seqlen_k, heads_kv, head_dim), or (total_k, heads_kv, head_dim).
        v: Like k.
        causal: Lets a query attend to the keys up to its place.
        window_size: Keys before and behind its place that a query attends to; -1 is no bound. With `causal` none are
            behind.
        softmax_scale: Above 0; 1 / sqrt(head_dim) by default.
        softcap: Bounds the scores: a score s becomes softcap * tanh(s / softcap). None and 0 are no bound.
        alibi_slopes: (heads_q) or (batch, heads_q), on the device of q. Subtracts slope * |i + seqlen_k - seqlen_q - j|
            from the score of query i and key j. Slopes have no gradient. The batch is the number of sequences.
        sinks: (heads_q), on the device of q: one more score in every row's softmax, without a value. The LSE includes
            it, and gradients flow to it. A query that attends to no key gets O = 0 and LSE = sink.
        dropout_p: Probability that a weight is dropped, at least 0 and below 1.
        deterministic: Gives dQ the same bits in every run. dK, dV and O always have the same bits.
        return_lse: Returns the LSE too. Gradients also flow through it.
        seed_offset: Two integers that the dropout mask is a function of, or an int64 tensor of them, (2), on the device
            of q. Kernels read the tensor when they run, so that a CUDA graph can be replayed with other numbers; the
            backward pass reads it again. By default they come from torch's generator of the device, so that
            torch.manual_seed repeats them, and every replay of a CUDA graph draws others.
        cu_seqlens_q: Cumulative lengths of the sequences that share q, int32 (sequences + 1), on the device of q:
            sequence b has the rows from element b up to but not element b + 1. Rows of no sequence get O = 0,
            LSE = -inf or the sink, and gradients of 0. On the CPU the lengths are checked. On a GPU they are not read
            to the host, so that graphs can be replayed with others; what lies outside of a tensor is never touched.
        cu_seqlens_k: Those of the sequences that share k and v.
        seqused_k: Number of keys of each sequence that count, int32 (sequences). By default they all do.
        max_seqlen_q: Most queries of a sequence. It is a hint from which tiles are chosen, and may be left out. A
            tensor on a GPU is not read.
        max_seqlen_k: Most keys of a sequence.

    Returns:
        O, like q; with `return_lse` (O, LSE). The LSE is the natural logarithm of the sum of the exponentials of the
        final scores, float32 (batch, heads_q, seqlen_q), or (heads_q, total_q) with `cu_seqlens_q`.
    """
    left, right = window_size
    return run(
        q,
        k,
        v,
        left,
        0 if causal else right,
        softmax_scale,
        softcap,
        dropout_p,
        deterministic,
        return_lse,
        alibi_slopes,
        sinks,
        seed_offset,
        lengths_of(cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k),
    )


def run(
    q,
    k,
    v,
    left,
    right,
    scale,
    softcap,
    dropout_p,
    deterministic,
    return_lse,
    slopes=None,
    sinks=None,
    seed_offset=None,
    lengths=None,
):
    """Runs attention with positional arguments, for the functions of this package."""
    head_dim = q.size(-1)
    if head_dim % 8:
        scale = head_dim**-0.5 if scale is None else scale
        rest = (softcap, dropout_p, deterministic, return_lse, slopes, sinks, seed_offset, lengths)
        return _cut(run(*_padded(q, k, v), left, right, scale, *rest), head_dim)
    if slopes is not None:
        slopes = slopes_of(slopes)
    if sinks is not None:
        sinks = per_head(sinks, "sinks")
    if not _is_compiling() and _is_plain(q, k, v) and (sinks is None or _is_plain(sinks, sinks, sinks)):
        dropout = drawn_dropout(q, dropout_p, seed_offset)
        options = (left, right, scale, softcap, dropout, deterministic)
        return _eager.attention(q, k, v, slopes, sinks, lengths, options, return_lse)
    needs_lse = return_lse or _needs_gradient(q, k, v, sinks)
    seed_offset = None if dropout_p == 0.0 else traced_seed_offset(q, seed_offset)
    options = (left, right, scale, softcap, dropout_p, seed_offset, deterministic, needs_lse, *(lengths or ()))
    o, lse = torch.ops.ferroflash.forward(q, k, v, slopes, sinks, *options)
    return (o, lse) if return_lse else o


def per_head(x, name):
    """Returns slopes or sinks as kernels take them: in float32 and contiguous. Gradients flow back."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is {type(x)}; a torch.Tensor is needed")
    if not x.is_floating_point():
        raise TypeError(f"{name} is {x.dtype}; floating-point numbers are needed")
    return x.float().contiguous()


def slopes_of(alibi_slopes):
    """Returns the slopes of ALiBi as kernels take them, which have no gradient; None if there are none."""
    return None if alibi_slopes is None else per_head(alibi_slopes, "alibi_slopes").detach()


def piecewise(
    q1: torch.Tensor,
    k1: torch.Tensor,
    q2: torch.Tensor,
    k2: torch.Tensor,
    v: torch.Tensor,
    dist_threshold: int,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
    seed_offset: tuple[int, int] | torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    max_seqlen_q: int | torch.Tensor | None = None,
    max_seqlen_k: int | torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Computes attention whose scores come from one of two pairs of queries and keys, by distance.

    The score of query i and key j is q2 @ k2 if i + seqlen_k - seqlen_q - j is at least `dist_threshold`, an integer,
    and q1 @ k1 otherwise. `q2` is like `q1` and `k2` like `k1`; see `attention` for everything else.
    """
    right = 0 if causal else -1
    head_dim = q1.size(-1)
    if head_dim % 8:
        options = {
            "causal": causal,
            "softcap": softcap,
            "alibi_slopes": alibi_slopes,
            "sinks": sinks,
            "dropout_p": dropout_p,
            "deterministic": deterministic,
            "return_lse": return_lse,
            "seed_offset": seed_offset,
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k": cu_seqlens_k,
            "seqused_k": seqused_k,
            "max_seqlen_q": max_seqlen_q,
            "max_seqlen_k": max_seqlen_k,
        }
        scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
        result = piecewise(*_padded(q1, k1, q2, k2, v), dist_threshold, softmax_scale=scale, **options)
        return _cut(result, head_dim)
    lengths = lengths_of(cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k)
    slopes = slopes_of(alibi_slopes)
    sinks = None if sinks is None else per_head(sinks, "sinks")
    if not _is_compiling() and _is_plain(q1, k1, v) and _is_plain(q2, k2, v if sinks is None else sinks):
        dropout = drawn_dropout(q1, dropout_p, seed_offset)
        options = (-1, right, softmax_scale, softcap, dropout, deterministic)
        return _eager.piecewise(q1, k1, q2, k2, v, slopes, sinks, lengths, dist_threshold, options, return_lse)
    needs_lse = return_lse or _needs_gradient(q1, k1, q2, k2, v, sinks)
    seed_offset = None if dropout_p == 0.0 else traced_seed_offset(q1, seed_offset)
    options = (-1, right, softmax_scale, softcap, dropout_p, seed_offset, deterministic, needs_lse, *(lengths or ()))
    o, lse = torch.ops.ferroflash.piecewise_forward(q1, k1, q2, k2, v, slopes, sinks, dist_threshold, *options)
    return (o, lse) if return_lse else o


def total_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    max_seqlen_q: int | torch.Tensor | None = None,
    max_seqlen_k: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes the weight that each key got from all queries: the column sums of softmax(scores).

    Dropout does not change it, and it has no gradient.

    Args:
        q: As in `attention`.
        k: As in `attention`.
        lse: LSE of the forward pass with the same options, float32 (batch, heads_q, seqlen_q), or (heads_q, total_q)
            with `cu_seqlens_q`. Sinks act through it.
        causal: As in `attention`.
        window_size: As in `attention`.
        softmax_scale: As in `attention`.
        softcap: As in `attention`.
        alibi_slopes: As in `attention`.
        cu_seqlens_q: As in `attention`.
        cu_seqlens_k: As in `attention`.
        seqused_k: As in `attention`.
        max_seqlen_q: As in `attention`.
        max_seqlen_k: As in `attention`.

    Returns:
        float32 (batch, heads_q, seqlen_k), or (heads_q, total_k) with `cu_seqlens_q`.
    """
    left, right = window_size
    right = 0 if causal else right
    q, k, lse = q.detach(), k.detach(), lse.detach()
    head_dim = q.size(-1)
    if head_dim % 8:
        softmax_scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
        q, k = _padded(q, k)
    slopes = slopes_of(alibi_slopes)
    lengths = lengths_of(cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k)
    options = (left, right, softmax_scale, softcap)
    if not _is_compiling() and _is_plain(q, k, lse):
        return _launch.total_attention(q, k, lse, slopes, lengths, *options)
    return torch.ops.ferroflash.total_attention(q, k, lse, slopes, *options, *(lengths or ()))


def dropout_mask(
    batch: int,
    heads_q: int,
    seqlen_q: int,
    seqlen_k: int,
    dropout_p: float,
    seed_offset: tuple[int, int] | torch.Tensor,
    *,
    device: torch.device | str | int = "cpu",
) -> torch.Tensor:
    """Returns the dropout mask of `seed_offset`: bool (batch, heads_q, seqlen_q, seqlen_k), True for kept weights.

    Both passes use it. For sequences of different lengths, it is that of a batch of them padded to one length: sequence
    b has the first rows and columns of item b. It is the same on every device, and computed on the one that it is
    returned on. It is for tests: it takes memory that neither pass needs. `seed_offset` as an int64 tensor of two
    elements is read to the host, so that the call waits for the GPU which the tensor is on.
    """
    return _launch.dropout_mask((batch, heads_q, seqlen_q, seqlen_k), dropout_p, seed_offset, device)


def _padded(*tensors):
    """Returns the tensors with zeros behind every head, up to a multiple of 8."""
    return [torch.nn.functional.pad(tensor, (0, -tensor.size(-1) % 8)) for tensor in tensors]


def _cut(result, head_dim):
    """Returns O, or (O, LSE), without what padding has added."""
    if isinstance(result, tuple):
        return result[0][..., :head_dim], result[1]
    return result[..., :head_dim]


def _needs_gradient(*tensors):
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def drawn_dropout(q, dropout_p, seed_offset):
    """Returns the dropout of an eager call as native functions take it; None if there is none."""
    return None if dropout_p == 0.0 else _launch.dropout(q, dropout_p, draw(q, seed_offset))


def draw(q, seed_offset):
    """Returns seed and offset for the dropout of an eager call, from torch's generator unless they are given.

    They are two integers, or a tensor if one is given or a CUDA graph is being captured, whose replays draw anew.
    """
    if seed_offset is not None:
        return seed_offset
    if not q.is_cuda:
        return _random(q).tolist()
    if torch.cuda.is_current_stream_capturing():
        return _random(q)
    generator = torch.cuda.default_generators[q.get_device()]
    seed, offset = generator.initial_seed(), generator.get_offset()
    # Torch counts offsets in fours.
    generator.set_offset(offset + 4)
    return seed % 2**64, offset


def traced_seed_offset(q, seed_offset):
    """Returns a tensor of seed and offset, which a compiled graph draws anew in every run unless they are given."""
    if isinstance(seed_offset, torch.Tensor):
        return seed_offset
    if seed_offset is None:
        return _random(q)
    return _eager.seed_offset_tensor(*seed_offset)


def _random(q):
    """Returns a random seed and offset on the device of q."""
    return torch.randint(1 << 62, (2,), dtype=torch.int64, device=q.device)
