"""Native functions, for the package's own use: `ferroflash.ops` has those for users.

Tensors are (batch, seqlen, heads, head_dim), and with `lengths` (total, heads, head_dim). `slopes` are float32
(heads_q) or (batch, heads_q), `sinks` float32 (heads_q). `lengths` are (cu_seqlens_q, cu_seqlens_k, seqused_k,
max_seqlen_q, max_seqlen_k), of which tensors are int32 on the device of q. A negative `left` or `right` is no bound,
`scale` None is 1 / sqrt(head_dim), `softcap` None or 0 no bound, and `dropout` is (p, seed, offset), or (p,
seed_offset) with an int64 tensor of two elements on the device of q, which kernels read when they run. An integer as
the result tells which inputs to copy first: bit i stands for input i of q, k, v, q2, k2, o, d_o.
"""

from torch import Tensor

__version__: str

_Second = tuple[Tensor, Tensor, int]
_Lengths = tuple[Tensor, Tensor, Tensor | None, int | None, int | None]
_Dropout = tuple[float, int, int] | tuple[float, Tensor]

def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    second: _Second | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    lengths: _Lengths | None,
    left: int,
    right: int,
    scale: float | None,
    softcap: float | None,
    dropout: _Dropout | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None] | int:
    """Returns (O, LSE or None)."""

def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    second: _Second | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    lengths: _Lengths | None,
    o: Tensor,
    lse: Tensor,
    d_o: Tensor,
    d_lse: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor] | None,
    left: int,
    right: int,
    scale: float | None,
    softcap: float | None,
    dropout: _Dropout | None,
    deterministic: bool,
) -> tuple[Tensor, ...] | int:
    """Returns (dQ, dK, dV), with a second pair also dQ2 and dK2, and with sinks also their gradient.

    `gradients` tells where the first three go.
    """

def total_attention(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    slopes: Tensor | None,
    lengths: _Lengths | None,
    left: int,
    right: int,
    scale: float | None,
    softcap: float | None,
) -> Tensor | int:
    """Returns the total attention, float32 (batch, heads_q, seqlen_k), with lengths (heads_q, total_k)."""

def dropout_mask(kept: Tensor, shape: tuple[int, int, int, int], dropout: tuple[float, int, int]) -> None:
    """Writes True for kept weights to a contiguous tensor of bools; `shape` is (batch, heads_q, seqlen_q, seqlen_k)."""

def device_count() -> int:
    """Number of GPUs that NVIDIA's driver shows; 0 without a driver."""

def kernel_count() -> int:
    """Number of GPU kernels in this build."""
