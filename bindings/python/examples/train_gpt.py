"""Trains a small GPT with ferroflash and with plain attention, from the same weights and data.

    python train_gpt.py [--device cuda] [--steps 50]

The model is a decoder-only transformer over characters: token and position embeddings, blocks of causal attention with
fewer key heads than query heads, and an MLP. Both runs see the same batches, so their losses differ by rounding alone.
The text is generated: sums written out, such as "17+8=25;".
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn

CHARACTERS = "0123456789+=;"


def eager_attention(q, k, v):
    """Causal attention, (batch, tokens, heads, head dim), with every score in memory."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
    scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).float().softmax(-1).to(v.dtype)
    return (weights @ v).transpose(1, 2)


def ferroflash_attention(q, k, v):
    import ferroflash

    return ferroflash.flash_attn_func(q, k, v, causal=True)


ATTENTION = {"eager": eager_attention, "ferroflash": ferroflash_attention}


class Block(nn.Module):
    def __init__(self, width, heads, kv_heads, attention):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.attention = heads, kv_heads, width // heads, attention
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        # Views of one tensor: ferroflash takes their strides as they are.
        heads = self.qkv(self.norm1(x)).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        x = x + self.out(self.attention(q, k, v).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, attention, width=64, layers=2, heads=4, kv_heads=2, context=64):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(len(CHARACTERS), width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, attention) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(CHARACTERS), bias=False)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def batches(count, batch, context):
    """Yields batches of the generated text, (batch, context + 1)."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        rows = []
        for _ in range(batch):
            text = ""
            while len(text) <= context:
                a, b = torch.randint(0, 100, (2,), generator=generator).tolist()
                text += f"{a}+{b}={a + b};"
            rows.append([CHARACTERS.index(character) for character in text[: context + 1]])
        yield torch.tensor(rows)


def train(kind, steps=50, device="cpu", dtype=torch.bfloat16, batch=8, context=64, **sizes):
    """Returns the loss of every step. The weights are f32; products and attention run in `dtype`."""
    torch.manual_seed(0)
    model = GPT(ATTENTION[kind], context=context, **sizes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for ids in batches(steps, batch, context):
        ids = ids.to(device)
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    sizes = {"width": 512, "layers": 6, "heads": 8, "kv_heads": 2, "context": 1024} if args.device == "cuda" else {}
    losses = {}
    for kind in ATTENTION:
        start = time.perf_counter()
        losses[kind] = train(kind, args.steps, args.device, **sizes)
        print(f"{kind}: {time.perf_counter() - start:.1f} s")
    print("step  eager   ferroflash")
    for step in range(0, args.steps, max(1, args.steps // 10)):
        print(f"{step:4}  {losses['eager'][step]:.4f}  {losses['ferroflash'][step]:.4f}")
    print(f"last  {losses['eager'][-1]:.4f}  {losses['ferroflash'][-1]:.4f}")


if __name__ == "__main__":
    main()
