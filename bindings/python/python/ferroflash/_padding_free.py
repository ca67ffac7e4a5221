"""Batches of transformers without their padding: sequences of different lengths, one after the other in one tensor.

The mask function tells the attention function about them by a mask of two dimensions, (batch, tokens): of bools for a
padded batch, True for tokens, and of integers for packed sequences, equal for tokens of one sequence. transformers'
masks for kernels have two or four dimensions, so models hand these on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Joined(NamedTuple):
    """Where the sequences are, and the rows of a batch that they consist of; None stands for all rows."""

    lengths: dict
    rows_q: torch.Tensor | None = None
    rows_k: torch.Tensor | None = None

    def join(self, query, key, value):
        """Returns tensors (total, heads, head_dim) of those (batch, tokens, heads, head_dim)."""
        pairs = ((query, self.rows_q), (key, self.rows_k), (value, self.rows_k))
        flat = ((x.reshape(-1, *x.shape[2:]), rows) for x, rows in pairs)
        return [x if rows is None else x.index_select(0, rows) for x, rows in flat]

    def part(self, out, batch, tokens):
        """Returns a result (batch, tokens, heads, head_dim), with zeros for padding."""
        if self.rows_q is not None:
            out = out.new_zeros((batch * tokens, *out.shape[1:])).index_copy(0, self.rows_q, out)
        return out.reshape(batch, tokens, *out.shape[1:])


def of_arguments(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k):
    """Returns sequences whose lengths a model's caller gives."""
    cu_seq_lens_k = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
    return Joined(_lengths(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k))


def of_mask(mask, queries, causal):
    """Returns the sequences of a mask of two dimensions, for the last `queries` tokens of each batch item."""
    return _kept(_of_mask, mask, queries, causal)


def of_positions(position_ids):
    """Returns the packed sequences of positions (1, tokens), which start again with each; None for one sequence."""
    return _kept(_of_positions, position_ids)


def _kept(function, tensor, *arguments):
    """Calls a function of a tensor that layers share, once for its content: finding sequences waits for the GPU."""
    # Tensors of inference mode don't tell when they are written.
    if torch.compiler.is_compiling() or tensor.is_inference():
        return function(tensor, *arguments)
    version, kept = tensor.__dict__.get("_ferroflash_sequences", (None, None))
    if version != tensor._version:
        kept = {}
        tensor._ferroflash_sequences = tensor._version, kept
    if arguments not in kept:
        kept[arguments] = function(tensor, *arguments)
    return kept[arguments]


def _of_positions(position_ids):
    sequences = (position_ids == position_ids.min()).cumsum(1)
    # Tokens before the first one with the least position are a sequence of their own.
    joined = _of_packed(sequences)
    return joined if joined.lengths["cu_seqlens_q"].numel() > 2 else None


def _of_mask(mask, queries, causal):
    if mask.dtype != torch.bool:
        return _of_packed(mask)
    rows_k, cu_k, longest_k = _tokens(mask)
    if causal:
        # Causal attention is aligned to the last token, which is the last query and the last key.
        rows_q, cu_q, longest_q = (rows_k, cu_k, longest_k) if queries == mask.shape[1] else _tokens(mask[:, -queries:])
    else:
        rows_q, longest_q = None, queries
        cu_q = torch.arange(0, (mask.shape[0] + 1) * queries, queries, dtype=torch.int32, device=mask.device)
    return Joined(_lengths(cu_q, cu_k, longest_q, longest_k), rows_q, rows_k)


def _of_packed(sequences):
    """Returns the sequences of a batch by the number of each token's sequence."""
    starts = F.pad(sequences.diff(dim=1) != 0, (1, 0), value=True).flatten().nonzero().flatten()
    cu = F.pad(starts, (0, 1), value=sequences.numel()).to(torch.int32)
    longest = int(cu.diff().max())
    return Joined(_lengths(cu, cu, longest, longest))


def _tokens(mask):
    """Returns the rows of tokens, the cumulative lengths of sequences, and the longest length."""
    lengths = mask.sum(-1, dtype=torch.int32)
    cu = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return mask.flatten().nonzero().flatten(), cu, int(lengths.max())


def _lengths(cu_q, cu_k, longest_q, longest_k):
    return {
        "cu_seqlens_q": cu_q.to(torch.int32).contiguous(),
        "cu_seqlens_k": cu_k.to(torch.int32).contiguous(),
        "max_seqlen_q": longest_q,
        "max_seqlen_k": longest_k,
    }


def packed_sequences(mask_function):
    """Returns the number of each token's sequence, integers (batch, tokens), that a mask function compares.

    The mask function is that of causal attention with or without a local size, of positions that count from the start
    of each sequence, and of sequences that don't see one another. transformers makes it if positions start again. For
    any other function the result is None.
    """
    parts = _closure(mask_function, "and_masks.<locals>.and_mask").get("mask_functions", ())
    if len(parts) != 2:
        return None
    if parts[0].__qualname__ != "remap_positions_for_packed_sequence.<locals>.inner_mask":
        return None
    return _closure(parts[1], "packed_sequence_mask_function.<locals>.inner_mask").get("packed_sequence_mask")


def _closure(function, name):
    """Returns the variables that a function of this name has from around it."""
    if getattr(function, "__qualname__", None) != name or function.__closure__ is None:
        return {}
    cells = (cell.cell_contents for cell in function.__closure__)
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


def is_contiguous(mask):
    """Returns whether the tokens of every batch item lie side by side, so that distances do not change by joining."""
    starts = mask[:, 0].to(torch.int32) + (mask[:, 1:] & ~mask[:, :-1]).sum(-1)
    return bool((starts <= 1).all())
