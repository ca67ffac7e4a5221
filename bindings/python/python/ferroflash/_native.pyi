"""Native functions, for the package's own use: `ferroflash.ops` has those for users.

Tensors are (batch, seqlen, heads, head_dim). A negative `left` or `right` is no bound, `scale` None is
1 / sqrt(head_dim), and `dropout` is (p, seed, offset). An integer as the result tells which inputs to copy first: bit i
stands for input i of q, k, v, q2, k2, o, d_o.
"""

from torch import Tensor

__version__: str

_Second = tuple[Tensor, Tensor, int]
_Dropout = tuple[float, int, int]

def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    second: _Second | None,
    left: int,
    right: int,
    scale: float | None,
    dropout: _Dropout | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None] | int:
    """Returns (O, LSE or None)."""

def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    second: _Second | None,
    o: Tensor,
    lse: Tensor,
    d_o: Tensor,
    d_lse: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor] | None,
    left: int,
    right: int,
    scale: float | None,
    dropout: _Dropout | None,
    deterministic: bool,
) -> tuple[Tensor, ...] | int:
    """Returns (dQ, dK, dV), and with a second pair also dQ2 and dK2. `gradients`: where the first three go."""

def total_attention(q: Tensor, k: Tensor, lse: Tensor, left: int, right: int, scale: float | None) -> Tensor | int:
    """Returns the total attention, float32 (batch, heads_q, seqlen_k)."""

def dropout_mask(shape: tuple[int, int, int, int], dropout: _Dropout) -> bytearray:
    """Returns one byte for each weight, 1 for a kept one; `shape` is (batch, heads_q, seqlen_q, seqlen_k)."""

def dropout_probability(p: float) -> float:
    """Returns the probability that is used for `p`."""

def device_count() -> int:
    """Number of GPUs that NVIDIA's driver shows; 0 without a driver."""

def kernel_count() -> int:
    """Number of GPU kernels in this build."""
