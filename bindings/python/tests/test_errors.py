"""Mistakes are errors that name the argument, its value and what is needed."""

import pytest
import torch

import ferroflash
from reference import tensors


def inputs(shape_q=(1, 20, 4, 64), shape_k=(1, 30, 2, 64), dtype=torch.bfloat16):
    return [x.detach() for x in tensors(shape_q, shape_k, dtype)]


def test_types():
    q, k, v = inputs()
    with pytest.raises(TypeError, match=r"^q is torch.float32; torch.float16 or torch.bfloat16 is needed: cast"):
        ferroflash.attention(q.float(), k.float(), v.float())
    with pytest.raises(TypeError, match=r"^k is f16; q is bf16"):
        ferroflash.attention(q, k.half(), v)
    with pytest.raises(TypeError, match="^v is <class 'list'>; a torch.Tensor is needed|has no attribute"):
        ferroflash._native.forward(q, k, [1.0], None, None, None, None, -1, -1, None, None, None, False)
    with pytest.raises(TypeError, match=r"^lse is torch.bfloat16; torch.float32 is needed"):
        ferroflash.total_attention(q, k, torch.zeros(1, 4, 20, dtype=torch.bfloat16))


def test_autocast_changes_nothing():
    q, k, v = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ferroflash.attention(q, k, v).dtype == torch.bfloat16
        with pytest.raises(TypeError, match="torch.float32"):
            ferroflash.attention(q.float(), k, v)


def test_shapes():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"^q has the shape .*; \(batch, seqlen, heads, head_dim\) is needed"):
        ferroflash.attention(q[0], k[0], v[0])
    with pytest.raises(ValueError, match="^v.shape is .*; the problem needs .*batch, heads, seqlen, head_dim"):
        ferroflash.attention(q, k, v[:, :29])
    with pytest.raises(ValueError, match="^heads_q is 3; a multiple of heads_kv, which is 2, is needed"):
        ferroflash.attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="^k.shape is"):
        ferroflash.attention(q, k.expand(2, -1, -1, -1), v)
    q, k, v = inputs((1, 20, 2, 264), (1, 20, 2, 264))
    with pytest.raises(ValueError, match="^head_dim is 264; allowed are the multiples of 8 from 8 to 256"):
        ferroflash.attention(q, k, v)
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"^lse has the shape .*; \[1, 4, 20\] \(batch, heads, seqlen\) is needed"):
        ferroflash.total_attention(q, k, torch.zeros(1, 4, 21))


def test_values():
    q, k, v = inputs()
    for scale in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="^scale is .*; a finite number above 0 is needed"):
            ferroflash.attention(q, k, v, softmax_scale=scale)
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="^dropout.p is .*; at least 0 and below 1 is needed"):
            ferroflash.attention(q, k, v, dropout_p=p)
        with pytest.raises(ValueError, match="^dropout.p is"):
            ferroflash.dropout_mask(1, 2, 3, 4, p, (0, 0))
    with pytest.raises(ValueError, match="seed_offset is None"):
        torch.ops.ferroflash.forward(q, k, v, None, None, -1, -1, None, None, 0.5, None, False, False)


def test_errors_in_a_call_with_gradients_and_in_operators():
    q, k, v = tensors((1, 20, 4, 64), (1, 30, 2, 64))
    with pytest.raises(ValueError, match="^v.shape is"):
        ferroflash.attention(q, k, v[:, :29])
    with pytest.raises(ValueError, match="^scale is"):
        torch.ops.ferroflash.forward(q, k, v, None, None, -1, -1, 0.0, None, 0.0, None, False, True)


def test_devices():
    q, k, v = (x.to("meta") for x in inputs())
    with pytest.raises(ValueError, match="^q is on meta; the CPU or a CUDA device is needed"):
        ferroflash._native.forward(q, k, v, None, None, None, None, -1, -1, None, None, None, False)


def test_tensors_on_two_devices(gpu):
    q, k, v = inputs()
    with pytest.raises(ValueError, match="^k is on cpu; q is on cuda:0"):
        ferroflash.attention(q.to(gpu), k, v)


def test_lengths_on_another_device(gpu):
    q, k, v = (x[0].to(gpu) for x in inputs())
    cu = torch.tensor([0, 20], dtype=torch.int32)
    with pytest.raises(ValueError, match="^cu_seqlens_q is on cpu; q is on cuda:0"):
        ferroflash.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)


def test_memory(device):
    # Torch's own error.
    with pytest.raises(RuntimeError):
        ferroflash.dropout_mask(1 << 10, 1 << 10, 1 << 20, 1 << 20, 0.5, (0, 0), device=device)


def test_seed_offset():
    q, k, v = inputs()
    for wrong, error, text in (
        (torch.zeros(2), TypeError, "^seed_offset is torch.float32; torch.int64 is needed"),
        (torch.zeros(2, dtype=torch.int32), TypeError, "^seed_offset is torch.int32"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"^seed_offset has the shape torch.Size\(\[3\]\)"),
        (torch.zeros(1, 2, dtype=torch.int64), ValueError, r"\[2\] \(seed, offset\) is needed"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "^seed_offset is on meta"),
    ):
        with pytest.raises(error, match=text):
            ferroflash.attention(q, k, v, dropout_p=0.5, seed_offset=wrong)


def test_the_mask_of_a_tensor_in_a_graph(gpu):
    q, k, v = (x.to(gpu) for x in inputs())
    ferroflash.attention(q, k, v, dropout_p=0.5)
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match="which a CUDA graph can't capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        ferroflash.flash_attn_func(q, k, v, dropout_p=0.5, return_attn_probs=True)
