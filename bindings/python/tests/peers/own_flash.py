"""flash-attention's own kernels, as torch carries them, under flash-attention's function names.

They show whether a test that fails over ferroflash fails over the peer, too. torch's copy has no ALiBi, softcap or
deterministic backward pass.
"""

import torch
import torch.nn.functional as F

__all__ = ["flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_kvpacked_func"]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, p, scale, causal, left, right):
        lengths = (q.shape[1], k.shape[1])
        out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, *lengths, p, causal, False, scale=scale, window_size_left=left, window_size_right=right
        )
        ctx.save_for_backward(q, k, v, out, lse, seed, offset)
        ctx.rest = (lengths, p, scale, causal, left, right)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):
        q, k, v, out, lse, seed, offset = ctx.saved_tensors
        lengths, p, scale, causal, left, right = ctx.rest
        if grad.stride(-1) != 1:
            grad = grad.contiguous()
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, None, None, *lengths, p, causal, seed, offset,
            scale=scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return dq, dk, dv, None, None, None, None, None


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """flash-attention 2's function; head dims are padded to a multiple of 8, as its own wrapper does."""
    if softcap or alibi_slopes is not None or deterministic:
        raise NotImplementedError(
            "torch's copy of flash-attention has no softcap, ALiBi or deterministic backward pass"
        )
    head_dim = q.shape[-1]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    q, k, v = (F.pad(x, (0, -head_dim % 8)) for x in (q, k, v))
    left, right = (int(side) for side in window_size)
    left, right = (None if side < 0 else side for side in (left, 0 if causal else right))
    out, lse = _Attention.apply(q, k, v, dropout_p, scale, causal and left is None, left, right)
    out = out[..., :head_dim]
    return (out, lse, None) if return_attn_probs else out


def flash_attn_qkvpacked_func(qkv, *args, **kwargs):
    return flash_attn_func(*qkv.unbind(2), *args, **kwargs)


def flash_attn_kvpacked_func(q, kv, *args, **kwargs):
    return flash_attn_func(q, *kv.unbind(2), *args, **kwargs)
