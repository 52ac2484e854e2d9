# Written from the test cells of nbs/1_foundations/17_integrations.ipynb by `attnbook export`. Do not edit.
# fmt: off
import importlib
import importlib.util
import sys

import pytest
import torch
import torch.nn as nn

from attnbook.attention import attention_mask
from attnbook.engine import attention
from attnbook.integrations.timm import register_models, swap_attention
from attnbook.integrations.transformers import attend, register


def package(name):
    "The package; skips if it is not there. PyPI's torchvision does not know a CPU build of torch: its two operations are declared, not used."
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError:
        for n in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[n]
        package.library = torch.library.Library("torchvision", "FRAGMENT")
        for n in ("nms", "qnms"):
            package.library.define(f"{n}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip(name)


@pytest.fixture(scope="module")
def llama():
    "A tiny random Llama with two key heads for four of queries."
    package("transformers")
    of = lambda n: getattr(importlib.import_module("transformers.models.llama"), n)
    torch.manual_seed(0)
    config = of("LlamaConfig")(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
    )
    return of("LlamaForCausalLM")(config).eval()


def logits(model, name, *args, **kw):
    model.set_attn_implementation(name)
    with torch.no_grad():
        return model(*args, **kw).logits


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_dense_attention_is_that_of_sdpa(llama, backend):
    name, tokens = register(f"attnbook_{backend}", backend=backend), torch.randint(0, 50, (2, 9))
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[1, :4] = 0
    assert torch.allclose(logits(llama, name, tokens), logits(llama, "sdpa", tokens), atol=1e-4)
    got, want = (logits(llama, n, tokens, attention_mask=padding) for n in (name, "sdpa"))
    assert torch.allclose(got[0], want[0], atol=1e-4) and torch.allclose(got[1, 4:], want[1, 4:], atol=1e-4)


@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
def test_the_same_text_is_generated(llama, cache):
    register()
    tokens, padding = torch.randint(1, 50, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    padding[0, :3] = 0
    for mask in (torch.ones_like(padding), padding):
        texts = []
        for name in ("attnbook", "sdpa"):
            llama.set_attn_implementation(name)
            texts.append(
                llama.generate(
                    tokens,
                    attention_mask=mask,
                    max_new_tokens=8,
                    min_new_tokens=8,  # whatever ends a text
                    do_sample=False,
                    pad_token_id=0,
                    disable_compile=True,
                    **(dict(cache_implementation=cache) if cache else {}),
                )
            )
        assert torch.equal(*texts) and texts[0].shape == (2, 15)


def test_a_window_sees_the_same_from_a_cache(llama):
    name, tokens = register("attnbook_window", window_size=4), torch.randint(0, 50, (1, 12))
    whole = logits(llama, name, tokens)
    band = attention_mask(12, 12, is_causal=True, window_size=4)[None, None]
    assert torch.allclose(whole, logits(llama, "sdpa", tokens, attention_mask=band), atol=1e-4)
    assert not torch.allclose(whole[:, 5:], logits(llama, "sdpa", tokens)[:, 5:], atol=1e-2)
    llama.set_attn_implementation(name)
    with torch.no_grad():
        first = llama(tokens[:, :7], use_cache=True)
        second = llama(tokens[:, 7:10], past_key_values=first.past_key_values, use_cache=True)
        third = llama(tokens[:, 10:11], past_key_values=second.past_key_values, use_cache=True)
    assert torch.allclose(torch.cat([first.logits, second.logits, third.logits], 1), whole[:, :11], atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_packed_texts_do_not_see_each_other(llama, backend):
    name, lengths = register(f"attnbook_packed_{backend}", packed=True, backend=backend), (5, 1, 6)
    texts = [torch.randint(0, 50, (1, n)) for n in lengths]
    begins = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    row = torch.cat(texts, 1)
    got = logits(llama, name, row, position_ids=positions, cu_seq_lens_q=begins, cu_seq_lens_k=begins, use_cache=False)
    want = torch.cat([logits(llama, "sdpa", t) for t in texts], 1)
    assert torch.allclose(got, want, atol=1e-4)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        logits(llama, name, row, position_ids=positions, use_cache=False)
    with pytest.raises(ValueError, match="one row"):
        logits(llama, name, row.expand(2, -1), cu_seq_lens_q=begins, cu_seq_lens_k=begins, use_cache=False)
    with pytest.raises(ValueError, match="padding"):
        logits(llama, name, row, attention_mask=(row > 25).long(), cu_seq_lens_q=begins, cu_seq_lens_k=begins)
    with pytest.raises(ValueError, match="window_size"):
        register("never", window_size=3, packed=True)


def test_what_cannot_be_done_is_refused():
    x = torch.zeros(1, 2, 3, 4)
    for bad in (dict(dropout=0.1), dict(softcap=5.0), dict(output_attentions=True)):
        with pytest.raises(ValueError, match="set another attn_implementation"):
            attend(nn.Identity(), x, x, x, None, **bad)


@pytest.fixture(scope="module")
def vit():
    timm = package("timm")
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5, class_token=False, global_pool="avg"
    ).eval()


def test_a_swapped_model_keeps_its_weights(vit):
    x, keys = torch.randn(2, 3, 64, 64), list(vit.state_dict())
    with torch.no_grad():
        want = vit(x)
        swap_attention(vit, attention)
        assert torch.allclose(vit(x), want, atol=1e-4) and list(vit.state_dict()) == keys
        swap_attention(vit, lambda q, k, v: attention(q, k, v, window_size=2), blocks=[1])
        assert not torch.allclose(vit(x), want, atol=1e-4)
    with pytest.raises(ValueError, match=r"blocks must be from 0 to 2, not \[3\]"):
        swap_attention(vit, attention, blocks=[3])
    with pytest.raises(ValueError, match="this one has none"):
        swap_attention(nn.Linear(2, 2), attention)


def test_swapped_windows_keep_bias_and_shift():
    timm = package("timm")
    torch.manual_seed(0)
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(2, 2), num_heads=(2, 4), embed_dim=16,
        num_classes=5,
    ).eval()  # fmt: skip
    for weight in (p for p in swin.parameters() if p.dim() > 1):
        nn.init.normal_(weight, std=0.3)
    x, keys = torch.randn(2, 3, 64, 64), set(swin.state_dict())
    with torch.no_grad():
        want, seen = swin(x), []
        swap_attention(swin, lambda q, k, v, bias: seen.append(bias) or attention(q, k, v, bias=bias))
        assert torch.allclose(swin(x), want, atol=1e-3) and set(swin.state_dict()) == keys
        assert any(len(b) == 1 for b in seen) and any((b < -50).any() for b in seen)  # whole and shifted blocks
        swap_attention(swin, lambda q, k, v, bias: attention(q, k, v))
        assert (swin(x) - want).abs().max() > 0.1


def test_models_of_the_book_can_be_had_by_timm():
    timm = package("timm")
    assert "attnbook_halonet_h1" in register_models() and register_models() == register_models()
    with torch.device("meta"):
        model = timm.create_model("attnbook_halonet_h0", num_classes=7)
    assert model.head.out_features == 7 and model.default_cfg["input_size"] == (3, 256, 256)
    with pytest.raises(ValueError, match="no weights for 'halonet_h0'"):
        timm.create_model("attnbook_halonet_h0", pretrained=True)
