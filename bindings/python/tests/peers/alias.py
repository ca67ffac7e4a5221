"""Puts ferroflash where the peers' tests import their own package.

A peer's tests import its package for two things: the operators under test, and helpers (reference implementations,
padding, rotary embeddings). The helpers come from the peer's checkout, the operators from ferroflash. Nothing of the
peer's compiled or Triton kernels is loaded, except with `own`, which runs the tests over the peer itself.
"""

import importlib
import sys
import types
from pathlib import Path


def install(peer, checkout, own):
    """Makes `import flag_attn` or `import flash_attn` give ferroflash's operators, or with `own` the peer's."""
    {"flag-attn": flag_attn, "flash-attn": flash_attn}[peer](Path(checkout), own)


def flag_attn(checkout, own):
    """FlagAttention. Its own kernels are Triton's, and import from the checkout as they are."""
    source = checkout / "src"
    if own:
        sys.path.insert(0, str(source))
        return
    import ferroflash
    from ferroflash import flag_attn as ours

    package = _package("flag_attn", source / "flag_attn")
    for name in ("flash_attention", "piecewise_attention", "flash_attention_split_kv", "paged_attention"):
        setattr(package, name, getattr(ours, name))
    package.testing = importlib.import_module("flag_attn.testing")

    # Their mask belongs to their generator of random numbers; the reference has to drop what ferroflash drops.
    def recompute_mask(B, H, M, N, dropout_p, seed, offset, device):
        return ferroflash.dropout_mask(B, H, M, N, dropout_p, (seed, offset), device=device)

    package.testing.recompute_mask = recompute_mask


def flash_attn(checkout, own):
    """flash-attention. Its own kernels are those that torch carries, since building them takes hours."""
    package = _package("flash_attn", checkout / "flash_attn")
    if own:
        import own_flash as operators
    else:
        import ferroflash as operators
    for name in (
        "flash_attn_func",
        "flash_attn_qkvpacked_func",
        "flash_attn_kvpacked_func",
        "flash_attn_varlen_func",
        "flash_attn_varlen_qkvpacked_func",
        "flash_attn_varlen_kvpacked_func",
        "flash_attn_with_kvcache",
    ):
        setattr(package, name, getattr(operators, name, None) or _missing(name))
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface.USE_TRITON_ROCM = False
    # Their tests ask how many keys share a largest score in S_dmask. In ferroflash's all keys of a row do.
    interface._get_block_size_n = _missing("_get_block_size_n") if own else lambda *_: 1 << 30
    interface._flash_attn_varlen_forward = _missing("_flash_attn_varlen_forward")
    # Anything else of theirs, such as the compiled module, is missing from the moment it is imported.
    interface.__getattr__ = lambda name: None if name.startswith("__") else _missing(name)()
    sys.modules["flash_attn.flash_attn_interface"] = interface


def _package(name, path):
    """Registers an empty package whose submodules are found in `path`."""
    package = types.ModuleType(name)
    package.__path__ = [str(path)]
    sys.modules[name] = package
    return package


def _missing(name):
    def missing(*args, **kwargs):
        raise NotImplementedError(f"{name} is not there")

    return missing
