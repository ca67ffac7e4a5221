"""ferroflash as an attention implementation of Hugging Face transformers 5.

    import ferroflash
    ferroflash.register_transformers()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, attn_implementation="ferroflash")

transformers asks an implementation for two functions: one that makes a mask, one that computes attention. The mask
function here returns None for the masks that ferroflash's kernels compute by themselves: full, causal, and causal with
a sliding window. Padded batches and packed sequences have a mask of two dimensions (`_padding_free.py`) if their mask
is of this kind otherwise: kernels compute them as sequences of different lengths, without padding. Lengths that a
caller gives (cu_seq_lens_q and its relatives, from transformers' DataCollatorWithFlattening) are taken as they are, and
positions that start again tell packed sequences, as with transformers' flash-attention.

For every other mask (static caches, custom masks) it returns transformers' boolean mask. The attention function hands
such a call to torch's `scaled_dot_product_attention`, or to plain torch operators if the model bounds its scores
(softcap) or has sinks. Both are right but slower; it says so once.

Under torch.compile every call has a mask, because transformers cannot tell there whether sequences are packed. So
compiled models are right, but do not use ferroflash's kernels.
"""

import functools

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_torchdynamo_compiling, logging

from . import _padding_free, ops

logger = logging.get_logger(__name__)

NAME = "ferroflash"


def register():
    """Registers ferroflash with transformers. Afterwards models take `attn_implementation="ferroflash"`."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    _announce_functions()
    _announce_sinks()


def _announce_functions():
    """Tells transformers where ferroflash's flash-attention functions are.

    transformers takes every implementation with "flash" in its name for a form of flash-attention, and loads that
    form's functions when a model is built: from a package it knows, or from the hub. Here they are in this package.
    """
    original = getattr(flash_utils, "_lazy_imports", None)
    if original is None or hasattr(original, "knows_ferroflash"):
        return

    @functools.wraps(original)
    def lazy_imports(implementation, *args, **kwargs):
        if implementation is None or NAME not in implementation or "/" in implementation:
            return original(implementation, *args, **kwargs)
        import ferroflash

        functions = ["flash_attn_func", "flash_attn_varlen_func"]
        # The first versions 5 know no cache.
        functions += ["flash_attn_with_kvcache"] if hasattr(flash_utils, "_flash_with_kvcache_fn") else []
        padding = (flash_utils._pad_input, flash_utils._unpad_input)
        return *(getattr(ferroflash, function) for function in functions), *padding

    lazy_imports.knows_ferroflash = True
    flash_utils._lazy_imports = lazy_imports


def _announce_sinks():
    """Lets models with sinks take ferroflash.

    Such a model lists the forms of flash-attention that it works with, and transformers takes the first of them instead
    of any other implementation with "flash" in its name.
    """
    original = getattr(PreTrainedModel, "_check_and_adjust_attn_implementation", None)
    if original is None or hasattr(original, "knows_ferroflash"):
        return

    @functools.wraps(original)
    def check(self, attn_implementation, *args, **kwargs):
        listed = getattr(self, "_compatible_flash_implementations", None) or []
        # A list without any form of flash-attention is that of a model with an attention of its own.
        if attn_implementation == NAME and NAME not in listed and any("flash" in name for name in listed):
            self._compatible_flash_implementations = [*listed, NAME]
        return original(self, attn_implementation, *args, **kwargs)

    check.knows_ferroflash = True
    PreTrainedModel._check_and_adjust_attn_implementation = check


def attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    sliding_window=None,
    softcap=None,
    is_causal=None,
    s_aux=None,
    **kwargs,
):
    """Attention of one layer. Query, key and value are (batch, heads, tokens, head dim), of f16 or bf16.

    Returns the output, (batch, tokens, heads, head dim), and None in place of the attention weights.
    """
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError('ferroflash has no position bias yet; use attn_implementation="eager" for this model')
    if kwargs.get("output_attentions", False):
        logger.warning_once('ferroflash returns no attention weights; use attn_implementation="eager" for them.')
    if attention_mask is not None and attention_mask.dim() != 2:
        if not is_torchdynamo_compiling():
            logger.warning_once(
                "ferroflash computes full, causal and sliding-window attention, also of padded batches and packed "
                "sequences. This batch needs another mask (a static cache, or a custom one), so torch computes it, "
                "which is slower."
            )
        if softcap is not None or s_aux is not None:
            return _masked(module, query, key, value, attention_mask, dropout, scaling, softcap, s_aux), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    query, key, value = (_half(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    window = _window(module, sliding_window, causal, key.shape[2])

    # The kernels take one head dim. Zeros do not change the product, and the scale belongs to the query's.
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if value_dim < head_dim:
        value = F.pad(value, (0, head_dim - value_dim))
    elif value_dim > head_dim:
        scaling = head_dim**-0.5 if scaling is None else scaling
        query, key = (F.pad(x, (0, value_dim - head_dim)) for x in (query, key))

    options = {
        "causal": causal,
        "window_size": window,
        "softmax_scale": scaling,
        "softcap": softcap,
        "sinks": s_aux,
        "dropout_p": dropout,
    }
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    joined = _joined(attention_mask, query.shape[1], key.shape[1], causal, **kwargs)
    if joined is None:
        out = ops.attention(query, key, value, **options)
    else:
        batch, tokens = query.shape[:2]
        out = ops.attention(*joined.join(query, key, value), **options, **joined.lengths)
        out = joined.part(out, batch, tokens)
    return out[..., :value_dim], None


def _joined(
    mask,
    queries,
    keys,
    causal,
    cu_seq_lens_q=None,
    cu_seq_lens_k=None,
    max_length_q=None,
    max_length_k=None,
    position_ids=None,
    **kwargs,
):
    """Returns the sequences of a batch: those of a padding mask, those that the caller gives, or packed ones.

    The result is None for a dense batch.
    """
    padded = mask is not None and mask.dtype == torch.bool
    if cu_seq_lens_q is not None and not padded:
        return _padding_free.of_arguments(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    if mask is not None:
        return _padding_free.of_mask(mask, queries, causal)
    # Some models make their mask without positions.
    one = position_ids is not None and position_ids.dim() == 2 and position_ids.shape[0] == 1
    if one and position_ids.shape[1] == queries == keys > 1 and not is_torchdynamo_compiling():
        return _padding_free.of_positions(position_ids)
    return None


def _masked(module, query, key, value, attention_mask, dropout, scaling, softcap, sinks):
    """Returns the output of attention with a mask, and with a bound of the scores or sinks, in torch operators."""
    batch, heads, queries, head_dim = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3)).float() * (head_dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask
    if sinks is not None:
        sinks = sinks.float().reshape(1, heads, 1, 1).expand(batch, heads, queries, 1)
        weights = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = F.dropout(weights.to(value.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous()


def mask(
    batch_size,
    kv_length,
    kv_offset=0,
    attention_mask=None,
    local_size=None,
    allow_is_causal_skip=True,
    allow_is_bidirectional_skip=False,
    config=None,
    **queries,
):
    """Returns None if ferroflash computes the mask by itself, otherwise a boolean mask, (batch, 1, queries, keys).

    For padded batches and packed sequences it is a mask of two dimensions if that is enough (`_padding_free.py`).

    transformers passes parameters by name. `queries` are those that say where the queries are: their number and the
    first one's position, or in the first versions 5 the tensor of their positions; and others of `sdpa_mask`.
    """
    function, custom = queries.get("mask_function"), queries.get("use_vmap", False)
    packed = None if custom else _padding_free.packed_sequences(function)
    if (allow_is_causal_skip or packed is not None) and not is_torchdynamo_compiling():
        if "cache_position" in queries:
            end = int(queries["cache_position"][-1]) + 1
        else:
            end = int(queries.get("q_offset", 0)) + queries["q_length"]
        # Causal attention is aligned to the last query and the last key. A static cache has unused keys behind them.
        aligned = end == kv_offset + kv_length
        # A local mask is a sliding window or, in a few models, chunks. Chunks larger than the keys are no restriction.
        causal = local_size is None or kv_length < local_size or _slides(config, local_size)
        if aligned and causal:
            if packed is not None:
                return packed
            if not _padded(attention_mask, kv_length, kv_offset):
                return None
            tokens = _tokens(attention_mask, kv_length, kv_offset)
            local = local_size is not None and kv_length >= local_size
            if tokens is not None and (not local or _padding_free.is_contiguous(tokens)):
                return tokens
    full = getattr(function, "__name__", None) == "bidirectional_mask_function" and not custom
    if full and allow_is_bidirectional_skip and not is_torchdynamo_compiling():
        tokens = _tokens(attention_mask, kv_length, kv_offset)
        if tokens is not None and not tokens.all():
            return tokens
    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **queries,
    )


def _padded(attention_mask, kv_length, kv_offset):
    """Returns whether the two-dimensional mask hides any of the keys."""
    if attention_mask is None:
        return False
    visible = attention_mask[:, kv_offset : kv_offset + kv_length]
    return visible.shape[-1] < kv_length or not visible.all()


def _tokens(attention_mask, kv_length, kv_offset):
    """Returns the part of a mask of two dimensions that is for the keys, as bools; None if it has not all of them."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    visible = attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    return visible if visible.shape[-1] == kv_length else None


def _slides(config, local_size):
    """Returns whether a local mask of this size is the configuration's sliding window, not its chunks."""
    window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return local_size == window and local_size != chunk


def _window(module, sliding_window, causal, keys):
    """Returns `window_size`. A sliding window of w tokens includes the query's own, so it is w - 1 to each side."""
    if sliding_window is None and causal:
        # Some models apply their window by the mask alone and do not pass it.
        config = getattr(module, "config", None)
        window = getattr(config, "sliding_window", None)
        if window is not None and keys > window:
            kinds = getattr(config, "layer_types", None)
            if kinds is None:
                raise NotImplementedError(
                    f"{type(module).__name__} has a sliding window but does not pass it to its attention function; "
                    'use attn_implementation="sdpa" for this model'
                )
            if kinds[module.layer_idx] == "sliding_attention":
                sliding_window = window
    if sliding_window is None or keys <= sliding_window:
        return (-1, -1)
    return (sliding_window - 1, 0 if causal else sliding_window - 1)


def _half(name, x):
    """Returns the tensor in autocast's dtype if that is on; refuses f32 otherwise."""
    if x.dtype != torch.float32:
        return x
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    raise ValueError(
        f"ferroflash computes in float16 or bfloat16, and {name} is float32. Load the model with "
        "dtype=torch.bfloat16, or run it under torch.autocast."
    )
