"""Exact attention for NVIDIA GPUs, for PyTorch.

`attention`, `piecewise` and `total_attention` are ferroflash's own functions. `flash_attn_func` and its relatives have
flash-attention 2's signatures, `ferroflash.flag_attn` has FlagAttention's, and `register_transformers` makes
`attn_implementation="ferroflash"` known to transformers.
"""

from __future__ import annotations

import importlib

from ._native import __version__
from .flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from .ops import attention, dropout_mask, piecewise, total_attention

__all__ = [
    "__version__",
    "attention",
    "dropout_mask",
    "flag_attn",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "piecewise",
    "register_transformers",
    "total_attention",
]


def register_transformers() -> None:
    """Makes `attn_implementation="ferroflash"` known to transformers, version 5 or newer."""
    from .transformers import register

    register()


def __getattr__(name):
    # Imported when it is first used.
    if name == "flag_attn":
        return importlib.import_module(".flag_attn", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
