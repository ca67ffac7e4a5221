"""ferroflash under transformers: small random models give the loss, gradients and tokens that eager attention gives."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

import ferroflash  # noqa: E402
from ferroflash import transformers as integration  # noqa: E402

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=7),
    "qwen2": lambda: transformers.Qwen2Config(
        **SMALL,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    # Bounded scores, and windows in every second layer.
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, head_dim=16, query_pre_attn_scalar=4, attn_logit_softcapping=5.0, sliding_window=6
    ),
    # Sinks, and windows in every second layer.
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SMALL, head_dim=16, sliding_window=6, num_local_experts=2, num_experts_per_tok=2
    ),
}


@pytest.fixture(autouse=True)
def registered():
    ferroflash.register_transformers()


def build(kind, implementation, device):
    """Returns a bf16 model of the configuration. Its weights do not depend on the implementation."""
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation, dtype=torch.bfloat16
    )
    return model.to(device).eval()


def tokens(device, batch=2, length=29, seed=1):
    torch.manual_seed(seed)
    return torch.randint(2, 97, (batch, length)).to(device)


def kernel_calls(monkeypatch):
    """Counts how often ferroflash's own kernels compute attention."""
    calls = []
    original = integration.ops.attention

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(integration.ops, "attention", counted)
    return calls


@pytest.mark.parametrize("kind", CONFIGS)
def test_losses_are_those_of_eager(kind, device, monkeypatch):
    """The bar: twice the error of transformers' own implementations in bf16, over some batches, by root mean square."""
    calls = kernel_calls(monkeypatch)
    losses = {}
    # torch's attention has neither bounded scores nor sinks.
    others = ("eager",) if kind in ("gemma2", "gpt_oss") else ("eager", "sdpa")
    for name in ("exact", *others, "ferroflash"):
        # The same weights: those of bf16.
        model = build(kind, "eager" if name == "exact" else name, device)
        model = model.float() if name == "exact" else model
        with torch.no_grad():
            ids = [tokens(device, seed=seed) for seed in range(8)]
            losses[name] = torch.stack([model(x, labels=x).loss.float() for x in ids])
    assert len(calls) == 3 * 8
    assert all(call["causal"] for call in calls)
    error = {name: (losses[name] - losses["exact"]).square().mean().sqrt() for name in losses}
    assert error["ferroflash"] <= 2 * max(error[name] for name in others)


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_are_those_of_eager(kind, device):
    gradients = {}
    ids = tokens(device)
    for name in ("exact", "eager", "ferroflash"):
        model = build(kind, "eager" if name == "exact" else name, device)
        model = model.float() if name == "exact" else model
        model(ids, labels=ids).loss.backward()
        gradients[name] = torch.cat([p.grad.float().flatten() for p in model.parameters()])
    error = {name: (x - gradients["exact"]).norm() for name, x in gradients.items()}
    assert error["ferroflash"] <= 2 * error["eager"]
    assert error["eager"] <= 0.1 * gradients["exact"].norm()


@pytest.mark.parametrize("kind", CONFIGS)
def test_generation_is_that_of_eager(kind, device, monkeypatch):
    """Greedy tokens, up to steps at which bf16 cannot tell the two best ones apart."""
    calls = kernel_calls(monkeypatch)
    ids = tokens(device, batch=1, length=11)
    settings = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    eager = build(kind, "eager", device).generate(ids, **settings)
    ours = build(kind, "ferroflash", device).generate(ids, **settings)
    assert len(calls) == 3 * 20
    for step, (a, b) in enumerate(zip(eager.logits, ours.logits, strict=False)):
        torch.testing.assert_close(a.float(), b.float(), atol=0.06 * a.abs().max().item(), rtol=0)
        if eager.sequences[0, 11 + step] != ours.sequences[0, 11 + step]:
            best = a.float().topk(2).values[0]
            assert best[0] - best[1] <= (a.float() - b.float()).abs().max() * 2, f"step {step}"
            break
    else:
        assert torch.equal(eager.sequences, ours.sequences)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right", "both", "holes"])
def test_padded_batches_are_right(kind, side, device, monkeypatch):
    calls = kernel_calls(monkeypatch)
    ids = tokens(device, batch=2, length=16)
    attention_mask = torch.ones_like(ids)
    if side != "right":
        attention_mask[1, 3 if side == "holes" else 0 : 5] = 0
    if side in ("right", "both"):
        attention_mask[1, -5:] = 0
    logits = {}
    for implementation in ("eager", "ferroflash"):
        with torch.no_grad():
            logits[implementation] = build(kind, implementation, device)(ids, attention_mask=attention_mask).logits
    # Holes change the distances that windows count.
    windows = {"mistral": 3, "qwen2": 1, "gemma2": 2, "gpt_oss": 2}.get(kind, 0) if side == "holes" else 0
    assert len(calls) == 3 - windows
    assert all(call["cu_seqlens_q"] is call["cu_seqlens_k"] for call in calls)
    seen = attention_mask.bool()
    a, b = (logits[name].float()[seen] for name in ("eager", "ferroflash"))
    torch.testing.assert_close(a, b, atol=0.06 * a.abs().max().item(), rtol=0)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_padded_batches_are_those_of_eager(kind, side, device, monkeypatch):
    calls = kernel_calls(monkeypatch)
    ids = tokens(device, batch=3, length=16)
    attention_mask = torch.ones_like(ids)
    attention_mask[1, slice(0, 5) if side == "left" else slice(-5, None)] = 0
    attention_mask[2, slice(0, 15) if side == "left" else slice(-15, None)] = 0
    labels = ids.masked_fill(attention_mask == 0, -100)
    # The label of a sequence's first token would be that of a padding token.
    labels[:, 1:] = labels[:, 1:].masked_fill(attention_mask[:, :-1] == 0, -100)
    gradients = {}
    for name in ("exact", "eager", "ferroflash"):
        model = build(kind, "eager" if name == "exact" else name, device)
        model = model.float() if name == "exact" else model
        model(ids, attention_mask=attention_mask, labels=labels).loss.backward()
        gradients[name] = torch.cat([p.grad.float().flatten() for p in model.parameters()])
    assert len(calls) == 3
    error = {name: (x - gradients["exact"]).norm() for name, x in gradients.items()}
    assert error["ferroflash"] <= 2 * error["eager"]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("how", ["positions", "lengths", "both"])
def test_packed_sequences_are_those_of_eager(kind, how, device, monkeypatch):
    """Logits and gradients of each sequence, by the bar of the other tests."""
    lengths = (9, 1, 14, 5)
    ids = tokens(device, batch=1, length=sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    cu = torch.tensor([0, 9, 10, 24, 29], dtype=torch.int32, device=device)
    given = {"position_ids": positions}
    if how != "positions":
        given |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 14, "max_length_k": 14}
    weights = torch.randn(1, sum(lengths), 97, device=device)
    found = {}
    for name in ("exact", "eager", "ferroflash"):
        model = build(kind, "eager" if name == "exact" else name, device)
        model = model.float() if name == "exact" else model
        if name == "ferroflash":
            calls = kernel_calls(monkeypatch)
            logits = model(ids, use_cache=False, **given).logits
            assert len(calls) == 3 and all(call["cu_seqlens_q"].equal(cu) for call in calls)
            assert all((call["cu_seqlens_q"] is cu) == (how != "positions") for call in calls)
        else:
            logits = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
        (logits.float() * weights).sum().backward()
        found[name] = logits.float().detach(), torch.cat([p.grad.float().flatten() for p in model.parameters()])
    for i in range(2):
        error = {name: (found[name][i] - found["exact"][i]).norm() for name in found}
        assert error["ferroflash"] <= 2 * error["eager"] + 1e-5


def test_packed_sequences_in_several_batch_items(device, monkeypatch):
    ids = tokens(device, batch=2, length=12)
    positions = torch.stack((torch.arange(12), torch.cat((torch.arange(7), torch.arange(5))))).to(device)
    calls = kernel_calls(monkeypatch)
    with torch.no_grad():
        found = build("llama", "ferroflash", device)(ids, position_ids=positions, use_cache=False).logits.float()
        exact = build("llama", "eager", device)(ids, position_ids=positions, use_cache=False).logits.float()
    assert calls[0]["cu_seqlens_q"].tolist() == [0, 12, 19, 24]
    torch.testing.assert_close(found, exact, atol=0.06 * exact.abs().max().item(), rtol=0)


def test_positions_are_read_again_when_they_change(device):
    """Models that make their mask without positions leave packed sequences to the attention function."""
    torch.manual_seed(3)
    module, positions = torch.nn.Module(), torch.cat((torch.arange(7), torch.arange(5)))[None].to(device)
    q = torch.randn(1, 2, 12, 16, dtype=torch.bfloat16, device=device)
    for inference in (False, True):
        with torch.inference_mode(inference):
            given = positions.clone()
            for length in (7, 4):
                given[0, length:] = torch.arange(12 - length, device=device)
                given[0, :length] = torch.arange(length, device=device)
                out, _ = integration.attention(module, q, q, q, None, is_causal=True, position_ids=given)
                rows = q[:, :, length:].transpose(1, 2)
                expected = ferroflash.attention(rows, rows, rows, causal=True)
                torch.testing.assert_close(out[:, length:], expected, atol=0.02, rtol=0)
            given.copy_(torch.arange(12, device=device))
            out, _ = integration.attention(module, q, q, q, None, is_causal=True, position_ids=given)
            rows = q.transpose(1, 2)
            assert out.equal(ferroflash.attention(rows, rows, rows, causal=True))


def test_a_batch_of_the_flattening_collator(device):
    """The collator's batch, with its own lengths, gives the loss of a padded batch."""
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    parts = [{"input_ids": x.tolist()} for x in tokens("cpu", 1, 29)[0].split((9, 14, 6))]
    batch = {name: x.to(device) if hasattr(x, "to") else x for name, x in collator(parts).items()}
    model = build("llama", "ferroflash", device)
    with torch.no_grad():
        loss = model(**batch, use_cache=False).loss
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(p["input_ids"]) for p in parts], batch_first=True)
        padded = padded.to(device)
        labels = padded.masked_fill(padded == 0, -100)
        expected = model(padded, attention_mask=(padded != 0).long(), labels=labels).loss
    torch.testing.assert_close(loss, expected, atol=0.02, rtol=0)


def test_padded_encoders_are_right(device, monkeypatch):
    """Full attention: every query counts, and keys without padding."""
    small = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    config = transformers.BertConfig(**small, num_attention_heads=4, initializer_range=0.2)
    ids = tokens(device, batch=3, length=16)
    attention_mask = torch.ones_like(ids)
    attention_mask[1, -5:] = attention_mask[2, 3:] = 0
    states, calls = {}, kernel_calls(monkeypatch)
    for implementation in ("eager", "ferroflash"):
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config, attn_implementation=implementation, dtype=torch.bfloat16)
        with torch.no_grad():
            states[implementation] = model.to(device).eval()(ids, attention_mask=attention_mask).last_hidden_state
    assert len(calls) == 3 and calls[0]["cu_seqlens_k"].tolist() == [0, 16, 27, 30]
    torch.testing.assert_close(states["ferroflash"].float(), states["eager"].float(), atol=0.1, rtol=0)


def test_padded_generation_is_right(device):
    ids = tokens(device, batch=2, length=8)
    attention_mask = torch.ones_like(ids)
    attention_mask[1, :3] = 0
    settings = {"attention_mask": attention_mask, "max_new_tokens": 6, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    eager = build("llama", "eager", device).generate(ids, **settings)
    ours = build("llama", "ferroflash", device).generate(ids, **settings)
    torch.testing.assert_close(
        eager.logits[0].float(), ours.logits[0].float(), atol=0.06 * eager.logits[0].abs().max().item(), rtol=0
    )


@pytest.mark.parametrize("case", ["packed", "static cache", "cached chunk"])
def test_other_masks_are_right(case, device, monkeypatch):
    calls = kernel_calls(monkeypatch)
    ids = tokens(device, batch=1, length=12)
    logits = {}
    for implementation in ("eager", "ferroflash"):
        model = build("llama", implementation, device)
        with torch.no_grad():
            if case == "packed":
                positions = torch.cat([torch.arange(7), torch.arange(5)])[None].to(device)
                out = model(ids, position_ids=positions, use_cache=False)
            elif case == "static cache":
                cache = transformers.StaticCache(config=model.config, max_cache_len=32)
                model(ids[:, :9], past_key_values=cache)
                out = model(ids[:, 9:], past_key_values=cache, position_ids=torch.arange(9, 12, device=device)[None])
            else:
                cache = model(ids[:, :9]).past_key_values
                out = model(ids[:, 9:], past_key_values=cache)
        logits[implementation] = out.logits.float()
    a, b = logits["eager"], logits["ferroflash"]
    torch.testing.assert_close(a, b, atol=0.06 * a.abs().max().item(), rtol=0)
    # Several queries behind a cache need no mask: a causal mask is aligned to the last query and the last key.
    assert len(calls) == {"cached chunk": 6, "packed": 3, "static cache": 0}[case]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_compiled_models_are_right(kind, device):
    """Without a graph break. Their masks are tensors, so torch computes the attention."""
    model = build(kind, "ferroflash", device)
    ids = tokens(device)
    expected = model(ids, labels=ids).loss
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=0.02, rtol=0)


def test_a_window_of_w_tokens_has_w_keys(device):
    """The sliding window counts the query's own token."""
    model = build("mistral", "ferroflash", device)
    ids = tokens(device, batch=1, length=20)
    layer = model.model.layers[0].self_attn
    x = torch.randn(1, 20, 64, dtype=torch.bfloat16, device=device)
    rotary = model.model.rotary_emb(x, torch.arange(20, device=device)[None])
    with torch.no_grad():
        before = layer(x, rotary, None)[0]
        x[:, 3] += 1.0
        after = layer(x, rotary, None)[0]
    changed = (before != after).any(-1)[0].nonzero().flatten().tolist()
    assert ids.shape[1] == 20
    assert changed == list(range(3, 3 + 7))


def test_refusals(device):
    module = torch.nn.Module()
    q = torch.randn(1, 2, 5, 8, dtype=torch.bfloat16, device=device)
    with pytest.raises(NotImplementedError, match="position bias"):
        integration.attention(module, q, q, q, None, position_bias=q)
    with pytest.raises(ValueError, match="float32"):
        integration.attention(module, q.float(), q, q, None)
    # A model that has a window, but applies it by the mask alone.
    module.config = transformers.MistralConfig(**SMALL, sliding_window=3)
    with pytest.raises(NotImplementedError, match="sliding window"):
        integration.attention(module, q, q, q, None)
    with torch.autocast(device, dtype=torch.bfloat16):
        out, _ = integration.attention(module, q.float(), q.float(), q, None, sliding_window=3)
    assert out.dtype == torch.bfloat16


def test_values_with_their_own_head_dim(device):
    torch.manual_seed(2)
    module = torch.nn.Module()
    for dims in ((32, 16), (16, 32)):
        q, k = (torch.randn(2, 4, 9, dims[0], dtype=torch.bfloat16, device=device) for _ in range(2))
        v = torch.randn(2, 4, 9, dims[1], dtype=torch.bfloat16, device=device)
        out, _ = integration.attention(module, q, k, v, None, is_causal=True)
        expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
        torch.testing.assert_close(out.transpose(1, 2).float(), expected, atol=0.03, rtol=0.02)
