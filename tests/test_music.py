# Written from the test cells of nbs/2_position/music.ipynb by `attnbook export`. Do not edit.
# fmt: off
import contextlib
import importlib
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from attnbook.attention import attention_reference
from attnbook.lab.data import skip_without
from attnbook.lab.stats import Exponent, Interval
from attnbook.lab.testing import (
    check_against_reference,
    check_autocast,
    check_compiles,
    check_deterministic,
    check_gradients,
    check_raises,
    check_strides,
    check_writes_everything,
    rel_error,
)
from attnbook.lab.testing import device as device_under_test
from attnbook.lab.together import Trainee
from attnbook.layers import count_parameters, sinusoids
from attnbook.music.experiments_study import (
    KINDS,
    PAIRS,
    PRESETS,
    _measured,
    chorale_batches,
    chorale_model,
    count_floors,
    echo,
    load_chorales,
    longest,
    music_loss,
    run_experiments,
    self_similarity,
    train_chorales,
    write_music,
)
from attnbook.music.midi import (
    BOS,
    CHORALE_TOKENS,
    PAD,
    REST,
    Note,
    PerformanceEncoder,
    check_notes,
    grid_to_tokens,
    read_midi,
    stretch,
    sustain,
    tokens_to_grid,
    write_midi,
)
from attnbook.music.nets import MusicTransformer, RelativeMultiheadAttention, generate, music_model, sample, token_nll
from attnbook.music.op import _padded, _plan_padding, relative_attention
from attnbook.music.reference import relative_attention_reference
from attnbook.music.study import _beyond, _faster, _gap, _gpu_slope, _peers, _slopes, claims
from attnbook.music.transformers_nets import add_relative_positions


@pytest.mark.parametrize("beyond", ["zero", "clip"])
@pytest.mark.parametrize("M", [3, 40, 400], ids=lambda m: f"{m} rows")
def test_padding_by_one_launch(M, beyond):
    "The same bits as PyTorch's padding, also of a table whose rows are not side by side."
    table = torch.randn(2, 2 * M, 5, device=device_under_test())[:, ::2]
    rows = 40 if beyond == "clip" else min(M, 40)
    assert torch.equal(_plan_padding(table, rows, beyond)(table), _padded(table, rows, beyond))


def _qkv(L, M, H=2, D=16, B=1, dtype=torch.float32, shared=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64).to(device_under_test(), dtype)
    return *(make(B, H, L, D) for _ in range(3)), make(*(() if shared else (H,)), M, D)


AGREEMENT = {  # L, M, D, block size, beyond, shared by the heads?
    "one position": (1, 1, 16, None, "zero", False),
    "short table, shared": (18, 12, 24, None, "zero", True),
    "whole table": (33, 33, 16, None, "zero", False),
    "clipped": (20, 5, 16, None, "clip", False),
    "blocks": (36, 50, 16, 12, "zero", False),
    "blocks, clipped, shared": (33, 1, 16, 16, "clip", True),
}


@pytest.mark.parametrize("case", AGREEMENT)
def test_kernel_matches_reference(case):
    L, M, D, N, beyond, shared = AGREEMENT[case]
    kw = dict(block_size=N, beyond=beyond, return_lse=True)
    inputs = _qkv(L, M, D=D, H=2 if L < 33 else 1, shared=shared)
    op = partial(relative_attention, backend="triton", **kw)
    check_against_reference(op, partial(relative_attention_reference, **kw), inputs, tol=2e-5)


@pytest.mark.parametrize("M, beyond, N", [(4, "zero", None), (4, "clip", None), (11, "zero", 3)])
def test_gradients_in_float64(M, beyond, N):
    check_gradients(partial(relative_attention, beyond=beyond, block_size=N), _qkv(9, M, D=4, dtype=torch.float64))


def _each_backend(q, k, v, rel, **kw):
    return [relative_attention(q, k, v, rel, backend=b, **kw) for b in ("torch", "triton")]


@pytest.mark.parametrize("rows, factor, beyond", [(6, 0, "zero"), (0, 1, "zero"), (0, 1, "clip"), (1, 1, "clip")])
def test_no_table_is_plain_attention(rows, factor, beyond):
    q, k, v, rel = _qkv(20, 6)
    want = attention_reference(q, k, v, is_causal=True)
    for out in _each_backend(q, k, v, rel[:, :rows] * factor, beyond=beyond):
        assert rel_error(out, want) < 1e-5
    assert rel_error(relative_attention(q, k, v, rel[:, :1]), want) > 1e-2  # one row, then zeros: that is something


@pytest.mark.parametrize("r", (0, 1))
def test_identity_and_copy(r):
    q, k, v, rel = _qkv(18, 4, H=1)
    u = torch.zeros_like(q[0, 0, 0])
    u[0] = 1
    table = torch.zeros_like(rel)
    table[:, r] = 1e3 * u
    for out in _each_backend(q * 0 + u, k * 0, v, table):
        assert rel_error(out[:, :, r:], v[:, :, : 18 - r]) < 1e-5


@pytest.mark.parametrize("N, used", [(None, 30), (8, 16)])
def test_unused_rows_and_the_future(N, used):
    x = [t.requires_grad_() for t in _qkv(30, 48, H=1)]
    out = relative_attention(*x, block_size=N, backend="triton")
    dk, dv, drel = torch.autograd.grad(out[:, :, 12].sum(), x[1:], retain_graph=True)
    assert (dk[:, :, 13:] == 0).all() and (dv[:, :, 13:] == 0).all() and (drel[:, 13:] == 0).all()
    (drel,) = torch.autograd.grad(out.sum(), x[3:])
    assert (drel[:, used:] == 0).all() and (drel[:, 1:used].abs().sum(-1) > 0).all()


def test_blocks():
    q, k, v, rel = _qkv(40, 16, H=1)
    for out in _each_backend(q, k, v, rel, block_size=20):
        assert rel_error(out, relative_attention(q, k, v, rel)) < 1e-5
    later = [x[:, :, 8:] for x in (q, k, v)]  # without the first block, later blocks see what they saw …
    for out, cut in zip(_each_backend(q, k, v, rel, block_size=8), _each_backend(*later, rel, block_size=8)):
        assert rel_error(out[:, :, 16:], cut[:, :, 8:]) < 1e-5  # … from the second on


def test_strides():
    q, k, v, rel = _qkv(9, 5, H=1)
    check_strides(partial(relative_attention, backend="triton"), (q, k, v, rel))


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 2e-5), (torch.bfloat16, None)], ids=str)
def test_groups_and_precision(dtype, tol):
    q, k, v, rel = _qkv(17, 9, H=2)
    grouped = lambda q, k, v, rel: relative_attention_reference(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), rel
    )
    check_against_reference(
        partial(relative_attention, backend="triton"), grouped, (q, k[:, :1], v[:, :1], rel), tol=tol, dtype=dtype
    )


def test_deterministic():
    check_deterministic(partial(relative_attention, backend="triton"), _qkv(18, 20, H=1, B=2), repeats=2)


def test_writes_everything():
    check_writes_everything(partial(relative_attention, backend="triton"), _qkv(17, 30, H=1))


def test_autocast():
    check_autocast(partial(relative_attention, backend="triton"), _qkv(5, 9, H=1))


def test_compiles():
    check_compiles(partial(relative_attention, backend="triton"), _qkv(3, 9, H=1))


def test_compiles_with_symbolic_sizes():
    x, op = _qkv(5, 3, D=8), partial(relative_attention, backend="triton")
    torch._dynamo.reset()
    assert rel_error(torch.compile(op, backend="aot_eager", dynamic=True, fullgraph=True)(*x), op(*x)) < 1e-6


def test_relative_errors():
    q, k, v, rel = _qkv(6, 3)
    check_raises(
        relative_attention,
        [
            (dict(rel=rel[:, :, :8]), ValueError, ["rel", "16"]),
            (dict(rel=rel.repeat(2, 1, 1)), ValueError, ["rel", "2"]),
            (dict(k=k[:, :, :5], v=v[:, :, :5]), ValueError, ["q and k", "6", "5"]),
            (dict(block_size=0), ValueError, ["block_size", "0"]),
            (dict(block_size=2.0), TypeError, ["block_size", "2.0"]),
            (dict(beyond="wrap"), ValueError, ["beyond", "wrap", "clip"]),
            (dict(rel=rel.int()), TypeError, ["rel", "int32"]),
            (dict(q=q.int()), TypeError, ["q", "int32"]),
            (dict(backend="cuda"), ValueError, ["backend"]),
            (dict(scale=math.inf), ValueError, ["scale"]),
            (dict(scale="1"), TypeError, ["scale"]),
        ],
        q=q,
        k=k,
        v=v,
        rel=rel,
    )


def _small(**kw):
    torch.manual_seed(0)
    sizes = dict(depth=2, dim=16, attn_dim=16, ff_dim=24, heads=2, max_distance=6, dropout=0.0)
    return MusicTransformer(20, **sizes | kw).eval()


CACHED = {
    "plain": dict(),
    "blocks": dict(block_size=5),
    "clipped, shared": dict(beyond="clip", share_heads=True),
    "absolute, labels": dict(max_distance=0, labels=(4, 16)),
    "long table": dict(max_distance=40),
}


@pytest.mark.parametrize("case", CACHED)
def test_cache_equals_parallel(case):
    tokens = torch.randint(0, 20, (2, 23), generator=torch.Generator().manual_seed(0))
    model = _small(**CACHED[case])
    want, caches, parts, before = model(tokens), None, [], F.pad(tokens, (1, 0))
    for a, b in ((0, 7), (7, 8), (8, 20), (20, 23)):
        logits, caches = model.step(before[:, a:b], a, caches)
        parts.append(logits)
    assert (torch.cat(parts, 1) - want).abs().max() < 1e-5


def test_relative_vectors_begin_as_noise_around_zero():
    layer = next(m for m in _small(max_distance=64).modules() if hasattr(m, "rel"))
    rel, width = layer.rel.detach(), layer.rel.shape[-1]
    error = width**-0.5 / rel.numel() ** 0.5
    assert (
        abs(rel.mean()) < 5 * error and rel.std() == pytest.approx(width**-0.5, rel=0.2) and rel.min() < 0 < rel.max()
    )


def test_generate():
    model, prime = _small(), torch.arange(5)
    clamp = torch.full((17,), -1)
    clamp[5::4] = 3
    allowed = torch.arange(20) < 9
    runs = [generate(model, prime, 12, clamp=clamp, allowed=allowed, cached=c, seed=1) for c in (True, False)]
    assert torch.equal(*runs) and (runs[0][5::4] == 3).all() and torch.equal(runs[0][:5], prime) and runs[0].max() < 9
    assert len(generate(model, prime[:0], 4, temperature=0)) == 4


def test_a_batch_is_its_rows():
    "Primes of several lengths and clamps of their own: each row is what it would be alone."
    model, primes = _small(), [torch.arange(5), torch.arange(2), torch.arange(0)]
    clamp = torch.full((3, 12), -1)
    clamp[:, 3::4] = torch.tensor([[1], [2], [3]])
    together = generate(model, primes, 7, clamp=clamp, seed=4)
    for b, (prime, row) in enumerate(zip(primes, clamp)):
        assert torch.equal(together[b], generate(model, prime, 12 - len(prime), clamp=row, seed=4 + b))
    assert (together[:, 7::4] == torch.tensor([[1], [2], [3]])).all() and together[0, 3] == 3  # a prime is not clamped
    pair = generate(model, torch.stack([primes[0]] * 2), 3, temperature=0)
    assert pair.shape == (2, 8) and torch.equal(pair[0], pair[1])


def test_what_follows_a_piece_changes_nothing():
    "Pieces of several lengths in one batch need no mask."
    model, piece = _small(block_size=4), torch.arange(9)
    padded = torch.stack([F.pad(piece, (0, 5), value=v) for v in (0, 7)])
    torch.testing.assert_close(model(padded)[:, :9], model(piece[None]).expand(2, -1, -1), rtol=0, atol=1e-6)


def test_features():
    model, x = _small(), torch.arange(12)[None]
    assert model.forward_features(x).shape == (1, 12, 16)
    assert torch.equal(model.logits(model.forward_features(x)), model(x))


def test_every_part_adds_to_its_input():
    "Pre-norm residual layers: with silent outputs a layer is the identity; dropout lies on both branches."
    layer, x = _small().layers[0], torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = x + layer.attention(layer.norm1(x))
        want = y + layer.ff(layer.norm2(y))
    torch.testing.assert_close(layer(x)[0].detach(), want)
    layer.drop.p = 1.0
    assert torch.equal(layer.train()(x)[0], x)


@pytest.mark.parametrize("case", ("plain", "blocks", "clipped, shared"))
def test_attention_dropout(case):
    "Weights that sum to 1 and give the operation's output; dropped only in training, the rest scaled up."
    layer = _small(attn_dropout=0.5, **CACHED[case]).layers[0].attention
    x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    q, k, v = layer.heads(x)
    w = layer.weights(q, k)
    torch.testing.assert_close(layer.out((w @ v).transpose(1, 2).flatten(2)), layer(x))
    layer.train()
    torch.manual_seed(0)
    mean = torch.stack([layer(x).detach() for _ in range(400)])
    want = layer.eval()(x).detach()
    assert mean.std(0).max() > 0.01 and (mean.mean(0) - want).abs().max() < 6 * mean.std(0).max() / 20
    off = {"attn_dropout": 1.5}, ValueError, "attn_dropout"
    check_raises(
        RelativeMultiheadAttention,
        [off, ({"attn_dropout": 0.1, "backend": "triton"}, ValueError, "triton")],
        embed_dim=8,
        num_heads=2,
        max_distance=4,
    )


def test_inputs():
    "Embeddings times the root of the width, a zero vector first, labels by position, then sinusoids."
    model, before = _small(absolute=False, labels=(4,)), torch.tensor([[3, 5, 5]])
    found = model.inputs(before, 0)[0]
    label = model.labels[0].weight
    torch.testing.assert_close(found, torch.stack([label[0], *(4 * model.embed.weight[5] + label[i] for i in (1, 2))]))
    torch.testing.assert_close(model.inputs(before, 7)[0, 0], 4 * model.embed.weight[3] + label[3])
    plain, timed = (_small(absolute=a).inputs(before, 2) for a in (False, True))
    torch.testing.assert_close(timed - plain, sinusoids(2, 3, 16)[None])


def test_model_is_causal():
    model = _small()
    x = torch.randint(0, 20, (1, 12), generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[0, 7] = (y[0, 7] + 1) % 20
    assert torch.equal(model(x)[:, :8], model(y)[:, :8]) and not torch.equal(model(x)[:, 8], model(y)[:, 8])


def test_generate_refuses():
    none, clamp = torch.zeros(20, dtype=torch.bool), torch.full((8,), -1)
    check_raises(
        generate,
        [
            (dict(clamp=clamp[1:]), ValueError, "clamp"),
            (dict(clamp=clamp + 21), ValueError, ["clamp", "19"]),
            (dict(prime=torch.tensor([20])), ValueError, ["prime", "19"]),
            (dict(prime=torch.ones(2)), TypeError, "prime"),
            (dict(temperature=-1), ValueError, "temperature"),
            (dict(temperature=math.nan), ValueError, "temperature"),
            (dict(top_k=0), ValueError, "top_k"),
            (dict(top_k=1.5), TypeError, "top_k"),
            (dict(allowed=none), ValueError, "allowed"),
            (dict(allowed=none, temperature=0), ValueError, "allowed"),
            (dict(allowed=~none[1:]), ValueError, "allowed"),
            (dict(length=-1), ValueError, "length"),
            (dict(prime=[]), ValueError, "prime"),
            (dict(prime=[torch.arange(3), torch.ones(2)]), TypeError, "prime"),
            (
                dict(prime=torch.zeros(2, 3, dtype=torch.long), clamp=torch.zeros(3, 8, dtype=torch.long)),
                ValueError,
                "clamp",
            ),
        ],
        model=_small(),
        prime=torch.arange(3),
        length=5,
    )


@pytest.mark.parametrize("temperature", (1e-3, 1e-40, 5e-324))
def test_small_temperatures_are_greedy(temperature):
    model, kw = _small(), dict(top_k=5, allowed=torch.arange(20) % 3 == 0)
    greedy = generate(model, torch.arange(3), 6, temperature=0, **kw)
    assert torch.equal(generate(model, torch.arange(3), 6, temperature=temperature, **kw), greedy)
    wide = sample(torch.tensor([1e30, 0, -math.inf]), temperature, None, None, torch.Generator())
    assert wide == 0


def test_top_k_and_temperature_shape_the_draws():
    g, logits = torch.Generator().manual_seed(0), torch.tensor([0.0, 1, 2, 3])
    often = lambda *how: torch.bincount(torch.tensor([sample(logits, *how, g) for _ in range(400)]), minlength=4) / 400
    assert (often(1.0, 2, None)[:2] == 0).all() and (often(1.0, 4, None) > 0).all()
    for temperature in (0.7, 2.0):
        assert (often(temperature, None, None) - (logits / temperature).softmax(0)).abs().max() < 0.1


@pytest.mark.parametrize(
    "call",
    [
        lambda m: generate(m, torch.arange(3), 4),
        lambda m: token_nll(m, [torch.arange(3)], 2),
        lambda m: generate(m, torch.arange(3), 4, top_k=0),
        lambda m: token_nll(m, [torch.arange(30)], 30),
    ],
    ids=("generate", "nll", "refused", "error inside"),
)
def test_modes_are_left_as_found(call):
    model = _small().train()
    model.layers[0].eval()  # somebody has frozen a layer
    before = [m.training for m in model.modules()]
    with contextlib.suppress(ValueError, IndexError):
        call(model)
    assert [m.training for m in model.modules()] == before and not model.layers[0].drop.training and model.training


COUNTS = {
    "piano, absolute": 9_657_344,
    "piano, relative global": 12_803_072,
    "piano, relative global, 88 keys": 12_762_112,
    "piano, relative global, shared table": 10_050_560,
    "chorales, absolute": 3_969_792,
    "chorales, relative": 8_587_264,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    assert count_parameters(partial(music_model, name)) == COUNTS[name]


def _llama(**changes):
    "A tiny random Llama with two key heads for four of queries."
    pytest.importorskip("transformers")
    of = lambda n: getattr(importlib.import_module("transformers.models.llama"), n)
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = of("LlamaConfig")(**sizes, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3)
    return of("LlamaForCausalLM")(config).eval()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_relative_positions_in_a_model_of_transformers(backend):
    with torch.device(device_under_test()), torch.no_grad():
        model, tokens = _llama(), torch.randint(1, 50, (2, 11))
        want = model(tokens).logits
        tables = add_relative_positions(model, 6, backend=backend)
        assert [tuple(t.shape) for t in tables] == [(4, 6, 8)] * 2
        assert torch.allclose(model(tokens).logits, want, atol=1e-4), "zeros change nothing"
        for t in tables:
            nn.init.normal_(t)
        whole = model(tokens).logits
        assert (whole - want).abs().max() > 0.1
        # by hand: the bias of every distance, added by PyTorch's attention
        first = model.model.layers[0]
        x, (cos, sin) = (
            first.input_layernorm(model.model.embed_tokens(tokens)),
            model.model.rotary_emb(model.model.embed_tokens(tokens), torch.arange(11)[None]),
        )
        apply = importlib.import_module("transformers.models.llama.modeling_llama").apply_rotary_pos_emb
        at = first.self_attn
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (at.q_proj, at.k_proj, at.v_proj))
        q, k = apply(q, k, cos, sin)
        far = torch.arange(11)[:, None] - torch.arange(11)
        bias = torch.zeros(2, 4, 11, 11)
        for d in range(6):
            bias += (far == d) * (q @ tables[0][:, d, :, None])
        bias = (bias * 8**-0.5).masked_fill(far < 0, -math.inf)
        by_hand = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
        got = at(x, position_embeddings=(cos, sin), attention_mask=None)[0]
        assert torch.allclose(got, at.o_proj(by_hand.transpose(1, 2).flatten(2)), atol=1e-4)
        # from a cache, and padded at the left
        half = model(tokens[:, :5], use_cache=True)
        rest = model(tokens[:, 5:], past_key_values=half.past_key_values)
        assert torch.allclose(torch.cat([half.logits, rest.logits], 1), whole, atol=1e-3)
        padded, mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], 1), torch.ones(2, 14, dtype=torch.long)
        mask[:, :3] = 0
        places = (mask.cumsum(-1) - 1).clamp_min(0)
        shifted = model(padded, attention_mask=mask, position_ids=places).logits
        assert torch.allclose(shifted[:, 3:], whole, atol=1e-3)


@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
def test_generation_with_relative_positions(cache):
    model, tokens = _llama(), torch.randint(1, 50, (1, 7))
    for t in add_relative_positions(model, 6, shared=True):
        nn.init.normal_(t)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, disable_compile=True)
    mask = torch.ones_like(tokens)
    kept = model.generate(tokens, attention_mask=mask, **options, **(dict(cache_implementation=cache) if cache else {}))
    plain = model.generate(tokens, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(kept, plain) and kept.shape == (1, 13)


def test_relative_positions_are_added_once():
    model = _llama()
    add_relative_positions(model, 4)
    with pytest.raises(ValueError, match="this one has them"):
        add_relative_positions(model, 4)
    with pytest.raises(ValueError, match="no attention layers"):
        add_relative_positions(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="max_distance"):
        add_relative_positions(_llama(), 0)
    loss = model(torch.randint(1, 50, (2, 9)), labels=torch.randint(1, 50, (2, 9))).loss
    loss.backward()
    assert all(m.relative.grad.abs().sum() > 0 for m in model.modules() if hasattr(m, "relative"))


def test_chorales():
    skip_without("music21")
    splits = [load_chorales(s) for s in ("train", "valid", "test")]
    tokens = torch.cat([t for s in splits for t in s.values()])
    assert sum(map(len, splits)) == 363 and len(tokens) == 316_288
    assert int(tokens.min()) == REST and int(tokens.max()) < BOS
    assert not set(splits[0]) & set(splits[1]) and not set(splits[1]) & set(splits[2])
    piece = next(iter(splits[0].values()))
    assert torch.equal(grid_to_tokens(tokens_to_grid(piece)), piece)
    check_raises(load_chorales, [(dict(split="dev"), ValueError, ["split", "dev"])])
    check_raises(grid_to_tokens, [(dict(pitch=np.array([[90, 60, 50, 40]])), ValueError, ["81", "90"])])


ROUND_TRIPS = {
    "a chord": [Note(0, 0.5, 60), Note(0, 0.5, 64), Note(0, 0.25, 67)],
    "struck again at its end": [Note(0, 0.5, 60), Note(0.5, 1, 60), Note(1, 1.25, 60)],
    "overlapping": [Note(0, 1, 60), Note(0.5, 2, 60, 1), Note(0.75, 0.876, 60, 127)],
    "twice the same": [Note(0, 1, 60), Note(0, 1, 60)],
    "fifteen at once": [Note(i / 10, 4, 60, 1 + i) for i in range(15)],
    "late": [Note(500_000, 500_001, 0), Note(536_870, 536_870.5, 127)],
    "none": [],
}


def written_midi(notes, **kw):
    "The notes and the bytes of a file with these notes."
    with TemporaryDirectory() as folder:
        path = write_midi(Path(folder) / "test.mid", notes, **kw)
        return read_midi(path), path.read_bytes()


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_midi_holds_the_notes(case):
    assert written_midi(ROUND_TRIPS[case])[0] == sorted(ROUND_TRIPS[case])


def test_midi_rounds_to_ticks():
    assert written_midi([Note(0.1234, 0.1234, 60)])[0] == [Note(0.124, 0.126, 60)]  # at least one tick
    assert written_midi([Note(0.1234, 0.5, 60)], ticks=10)[0] == [Note(0.1, 0.5, 60)]
    numbers = [Note(np.float32(0.5), np.float64(1), np.int64(60), np.uint8(3))]
    assert written_midi(numbers)[0] == [Note(0.5, 1, 60, 3)]


def test_midi_bytes():
    "What the specification asks for, written by hand; no reader of ours is involved."
    head = "4d546864 00000006 0000 0001 01f4 4d54726b 00000024 00ff5103 0f4240"
    events = " 00 903c40 8174 803c00 00 904040 00 914040 01 804000 01 814000 00 ff2f00"
    notes = [Note(0, 0.488, 60), Note(0.488, 0.49, 64), Note(0.488, 0.492, 64)]
    assert written_midi(notes)[1] == bytes.fromhex(head + events)


@pytest.mark.parametrize(
    "bad, error, words",
    [
        (Note(-0.1, 0.2, 60), ValueError, "notes[1].start"),
        (Note(math.nan, 1, 60), ValueError, "notes[1].start"),
        (Note(0, math.inf, 60), ValueError, "notes[1].end"),
        (Note(1, 0.5, 60), ValueError, "notes[1].end"),
        (Note(0, 1, 128), ValueError, "notes[1].pitch"),
        (Note(0, 1, -1), ValueError, "notes[1].pitch"),
        (Note(0, 1, 60.5), TypeError, "notes[1].pitch"),
        (Note(0, 1, 60, 0), ValueError, "notes[1].velocity"),
        (Note(0, 1, 60, 128), ValueError, "notes[1].velocity"),
        (Note("0", 1, 60), TypeError, "notes[1].start"),
        ((0, 1, 60), TypeError, "notes[1] must be a Note"),
        (Note(0, 1e6, 60), ValueError, "notes[1] must end before"),
    ],
    ids=str,
)
def test_midi_refuses(bad, error, words):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "test.mid"
        check_raises(write_midi, [(dict(notes=[Note(0, 1, 60), bad]), error, words)], path=path, notes=[])
        path.unlink()
        with pytest.raises(error):
            write_midi(path, [Note(0, 1, 60), bad])
        assert not path.exists()


def test_midi_has_channels_for_fifteen():
    with pytest.raises(ValueError, match=r"notes\[15\].*pitch 60"):
        written_midi([Note(0, 1, 60)] * 16)
    for ticks, error in ((0, ValueError), (32768, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="ticks"):
            written_midi([], ticks=ticks)


HEADER = "4d546864 00000006"
PIECE = [Note(0, 2, 48, 96), Note(0, 2, 60, 96), Note(0.5, 2, 67, 64), Note(1, 2, 76, 32)]
FOREIGN = {  # bytes, notes
    "specification, format 0": (
        f"""{HEADER} 0000 0001 0060 4d54726b 0000003b 00ff580404021808 00ff510307a120 00c005
        00c12e 00c246 00923060 003c60 60914340 60904c20 814082 3040 003c40 00814340 00804c40 00ff2f00""",
        PIECE,
    ),
    "specification, format 1": (
        f"""{HEADER} 0001 0004 0060 4d54726b 00000014 00ff580404021808 00ff510307a120 8300ff2f00
        4d54726b 00000010 00c005 8140904c20 81404c00 00ff2f00 4d54726b 0000000f 00c12e 60914340 82204300 00ff2f00
        4d54726b 00000015 00c246 00923060 003c60 83003000 003c00 00ff2f00""",
        PIECE,
    ),
    "mido": (
        f"""{HEADER} 0001 0002 0060 4d54726b 00000012 00ff510303d09060ff51030f424000ff2f00 4d54726b 0000003b
        00ff0304736f6c6f00c30700f004010203f700933c5030405100b3407f00f22c0260833c0a00404005e31c3f0099230100d9032b992300
        00ff2f00""",
        [Note(0, 0.75, 60, 80), Note(0.125, 0.75, 64, 81), Note(0.75 + 5 / 96, 1.25, 35, 1)],
    ),
    "pretty_midi": (
        f"""{HEADER} 0001 0003 00dc 4d54726b 00000013 00ff51030a2c2a00ff58040402180801ff2f00 4d54726b
        0000002e 00ff03057069616e6f00c00000903c6452485011e0644021b0407f21903c00003c5a81253c00824a480001ff2f00 4d54726b
        00000015 00ff03036b697400c9002199244621240001ff2f00""",
        [
            Note(0, 0.4999995, 60, 100),
            Note(0.0999999, 0.1999998, 36, 70),
            Note(0.2484846, 1.999998, 72, 80),
            Note(0.4999995, 0.999999, 60, 90),
        ],
    ),
    "frames": (f"{HEADER} 0000 0001 e728 4d54726b 0000000d 00903c40 8768803c00 00ff2f00", [Note(0, 1, 60, 64)]),
    "frames, 29.97": (
        f"{HEADER} 0000 0001 e364 4d54726b 0000000d 00903c40 8768803c00 00ff2f00",
        [Note(0, 1000 * 1001 / 3_000_000, 60, 64)],
    ),
    "overlapping, the first ends first": (
        f"{HEADER} 0000 0001 01f4 4d54726b 00000013 00903c01 64903c02 64803c00 643c00 00ff2f00",
        [Note(0, 0.2, 60, 1), Note(0.1, 0.3, 60, 2)],
    ),
    "no onset, no end": (
        f"{HEADER} 0000 0001 01f4 4d54726b 0000000d 00804000 00903c40 8374ff2f00",
        [Note(0, 0.5, 60, 64)],
    ),
    "chunks of others, a long header": (
        "4d546864 00000008 0000 0001 01f4 abcd 58585858 00000003 010203 4d54726b 0000000d 00903c40 8374803c00 00ff2f00",
        [Note(0, 0.5, 60, 64)],
    ),
}


def read_bytes(data):
    "The notes of a file with these bytes."
    with TemporaryDirectory() as folder:
        path = Path(folder) / "foreign.mid"
        path.write_bytes(data)
        return read_midi(path)


@pytest.mark.parametrize("case", FOREIGN)
def test_midi_of_others(case):
    data, want = FOREIGN[case]
    notes = read_bytes(bytes.fromhex(data))
    assert [n[2:] for n in notes] == [n[2:] for n in want]
    assert np.allclose([n[:2] for n in notes], [n[:2] for n in want], rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", FOREIGN)
def test_midi_cut_off(case):
    data = bytes.fromhex(FOREIGN[case][0])
    for n in range(len(data)):
        with pytest.raises(ValueError, match="foreign.mid"):
            read_bytes(data[:n])


@pytest.mark.parametrize(
    "data, words",
    [
        ("52494646", "MThd"),
        (HEADER + "0002 0001 01f4", "format is 2"),
        (HEADER + "0000 0001 0000", "0 ticks"),
        (HEADER + "0000 0001 01f4 4d54726b 00000003 003c40", "data byte"),
        (HEADER + "0000 0001 01f4 4d54726b 00000004 00903c80", "0x90"),
        (HEADER + "0000 0001 01f4 4d54726b 00000002 00f4", "0xf4"),
    ],
    ids=("not MIDI", "format 2", "no ticks", "no status", "no data byte", "undefined"),
)
def test_midi_that_cannot_be_read(data, words):
    with pytest.raises(ValueError, match=f"foreign.mid.*{words}"):
        read_bytes(bytes.fromhex(data))


def test_vocabulary():
    assert PerformanceEncoder().num_tokens == 390 and PerformanceEncoder(21, 108).num_tokens == 310
    check_raises(
        PerformanceEncoder,
        [
            (dict(min_pitch=5, max_pitch=3), ValueError, "min_pitch"),
            (dict(velocity_bins=0), ValueError, "velocity_bins"),
            (dict(velocity_bins=128), ValueError, "velocity_bins"),
            (dict(steps_per_second=0.5), TypeError, "steps_per_second"),
        ],
    )
    check_raises(
        PerformanceEncoder(21, 108).encode,
        [
            (dict(notes=[Note(0, 1, 109)]), ValueError, ["pitch", "108", "109"]),
            (dict(notes=[Note(0, 1, 60), Note(-0.1, 1, 60)]), ValueError, ["notes[1].start", "-0.1"]),
            (dict(notes=[Note(0, 1, 60, 0)]), ValueError, ["notes[0].velocity"]),
        ],
    )


@pytest.mark.parametrize("pitches", ((0, 127), (21, 108)))
def test_performance_round_trip(pitches):
    encoder, rng = PerformanceEncoder(*pitches), np.random.default_rng(0)
    start = rng.uniform(0, 20, 300)
    drawn = zip(start, rng.exponential(0.6, 300), rng.integers(21, 109, 300), rng.integers(1, 128, 300))
    notes = [Note(s, s + d, int(p), int(v)) for s, d, p, v in drawn]
    tokens = encoder.encode(notes)
    assert encoder.decode(tokens) == encoder.quantise(notes)
    assert torch.equal(encoder.encode(encoder.decode(tokens)), tokens)
    assert 0 < tokens.min() and tokens.max() < encoder.num_tokens


@pytest.mark.parametrize("bins", (1, 2, 10, 32, 63, 64, 65, 100, 126, 127))
def test_velocities_survive(bins):
    encoder = PerformanceEncoder(velocity_bins=bins)
    for v in range(1, 128):
        quantised = encoder.quantise([Note(0, 1, 60, v)])
        assert encoder.quantise(quantised) == encoder.decode(encoder.encode(quantised)) == quantised
        assert 1 <= quantised[0].velocity <= 127 and abs(quantised[0].velocity - v) <= 64 / bins + 1
    assert len({encoder._bin(v) for v in range(1, 128)}) == bins  # no bin is wasted


def test_long_gaps():
    e = PerformanceEncoder()
    tokens = e.encode([Note(2.34, 2.5, 60)]).tolist()
    assert [t - e.shift + 1 for t in tokens[:3]] == [100, 100, 34]  # two seconds and 0.34 s


def test_any_tokens_decode():
    e = PerformanceEncoder()
    stream = [e.num_tokens + 5, 0, -7, e.on + 60, e.shift, 1, e.num_tokens, e.off + 60, e.off + 61]
    assert e.decode(stream) == [Note(0, 0.01, 60, e._middle(e._bin(64)))]
    noise = np.random.default_rng(0).integers(-50, 500, 5000)
    assert check_notes(e.decode(noise)) and e.quantise(e.decode(noise)) == e.decode(noise)


def test_stretch():
    notes = [Note(1.0, 2.0, 60, 90), Note(2.0, 2.5, 64, 30)]
    assert stretch(notes, 1.5, -3) == [Note(1.5, 3.0, 57, 90), Note(3.0, 3.75, 61, 30)]  # slower, lower, as loud
    assert stretch(notes) == notes


def test_sustain():
    notes = [Note(0, 0.5, 60), Note(1, 1.25, 60), Note(0, 0.25, 64)]
    assert [n.end for n in sustain(notes, [(0.125, 2)])] == [1, 2, 2]  # until struck again, until released


@pytest.mark.parametrize("low, high", [(2, BOS - 1), (2, 4), (BOS - 3, BOS - 1), (20, 25)], ids=str)
def test_transposed_crops_stay_notes(low, high):
    piece = torch.tensor([low, REST, high, REST] * 16)
    rows = torch.cat([chorale_batches([piece], 64, 64, seed)(3) for seed in range(3)])
    shifts = rows[:, 0] - low
    assert torch.equal(
        rows, torch.where(piece >= 2, piece + shifts[:, None], piece)
    )  # all notes by one shift, rests as they are
    least, most = max(-5, 2 - low), min(6, BOS - 1 - high)
    assert sorted(set(shifts.tolist())) == list(range(least, most + 1))  # every shift that is allowed, no other


def test_crops_are_filled_up():
    batch = chorale_batches([torch.tensor([5, 6, 7])], 5, 4)(0)
    assert (
        (batch[:, 3:] == PAD).all()
        and (batch[:, :3] >= 2).all()
        and torch.equal(batch, chorale_batches([torch.tensor([5, 6, 7])], 5, 4)(0))
    )


def test_echo():
    g = torch.Generator().manual_seed(0)
    phrase, other = (torch.randint(2, 40, (64,), generator=g) for _ in range(2))
    assert echo(torch.cat([phrase, phrase])) > 0.5 > echo(torch.cat([phrase, other]))
    assert echo(phrase.new_full((128,), 5)) == 1 and math.isnan(echo(phrase[:60]))
    assert echo(torch.cat([phrase, phrase]), torch.cat([other, other])) < 0.3  # in another piece
    S = self_similarity(torch.tensor([5, 6, 7, 8, 5, 6, 9, 9]))
    assert S.tolist() == [[1.0, 0.5], [0.5, 1.0]]
    late = torch.cat([other, phrase[:32], phrase[:32]])  # the last two beats are those just before
    assert self_similarity(late)[24:].max() == 1 and echo(late) > echo(torch.cat([other, phrase]))


def test_floors_by_hand():
    "One piece of two columns: after the token four back, the next is certain up to smoothing; every voice has two tokens."
    piece = torch.tensor([2, 3, 4, 5] + [6, 7, 8, 9] * 50)
    found = count_floors([piece], [piece])
    assert found["uniform"] == pytest.approx(math.log(47)) and found["previous"] < found["voice"] < 0.7
    strange = count_floors([piece], [torch.tensor([10, 10, 10, 10, 10, 10, 10, 10])])
    assert strange["voice"] > 3 and strange["previous"] == pytest.approx(math.log(CHORALE_TOKENS))


def test_a_training(monkeypatch):
    "Kinds with one seed see the same crops and begin alike; a row holds what was measured within and beyond."
    g = torch.Generator().manual_seed(0)
    pieces = {f"{i}": torch.randint(2, 40, (200 + 40 * i,), generator=g) for i in range(4)}
    monkeypatch.setitem(train_chorales.__globals__, "load_chorales", lambda split: pieces)
    cfg = PRESETS["smoke"] | dict(pieces=4)
    (model, row), (_, again), (_, local) = train_chorales(("relative", "relative", "relative local"), cfg, run=3)
    assert not model.training and row["loss"] == again["loss"] and row["nll"] == again["nll"] != local["nll"]
    assert row["run"] == 3 and row["length"] == 64 and row["long_pieces"] == 4 and list(row["curve"]) == ["0", "64"]
    nll = token_nll(model, list(pieces.values()), 128)
    assert row["nll"] == pytest.approx(float(nll[:, :64].mean())) and row["beyond"] == pytest.approx(
        float(nll[:, 64:].mean())
    )
    assert row["growth"] == pytest.approx(row["beyond"] - row["nll"], abs=1e-6)
    written = write_music(model, cfg, seed=1)
    assert written["songs"] == 4 and written["harmonised"][::4] == written["piece"][::4] == pieces["0"][:64:4].tolist()
    assert written["continued"][:32] == pieces["0"][:32].tolist()
    assert all(0 <= written[n] <= 1 for n in ("echo", "echo_of_others", "bach", "bach_of_others"))
    own, whole = [torch.tensor(written[n]) for n in ("continued", "harmonised")], [p[:64] for p in pieces.values()]
    assert all(REST <= t.min() and t.max() < BOS for t in own)  # notes and rests only
    assert written["bach"] == pytest.approx(np.mean([echo(p) for p in whole]))
    others = [echo(whole[i], whole[(i + 1) % 4]) for i in range(4)]
    assert written["bach_of_others"] == pytest.approx(np.mean(others))
    voices = token_nll(model, list(pieces.values()), 64)
    assert written["by_voice"]["bass"] == pytest.approx(float(voices[:, 3::4].mean()))


def test_kinds_differ_in_what_they_know_of_positions():
    cfg = PRESETS["smoke"]
    models = {kind: chorale_model(kind, cfg) for kind in KINDS}
    layer = {kind: m.layers[0].attention for kind, m in models.items()}
    table = {kind: a.max_distance for kind, a in layer.items()}
    assert table == dict(zip(KINDS, (0, 0, 32, 32, 32, 32))) and {a.num_heads for a in layer.values()} == {cfg["heads"]}
    assert [k for k, a in layer.items() if a.block_size] == ["relative local"] and layer[
        "relative local"
    ].block_size == 16
    assert [k for k, m in models.items() if len(m.labels) == 2] == ["absolute + labels", "relative + labels"]
    assert [k for k, m in models.items() if not m.absolute] == ["relative only"]
    assert [t.num_embeddings for t in models["relative + labels"].labels] == [4, 16]  # voices, places in a beat
    check_raises(chorale_model, [(dict(kind="both"), ValueError, "both")], kind="relative", cfg=cfg)


def test_padding_is_no_loss():
    "The mean over tokens that are some, and of the logits at their own places."
    logits = torch.randn(2, 3, CHORALE_TOKENS, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[5, 6, PAD], [7, PAD, PAD]])
    want = -logits.log_softmax(-1)[[0, 0, 1], [0, 1, 0], [5, 6, 7]].mean()
    assert music_loss(lambda tokens: logits, tokens) == pytest.approx(float(want))


def test_record_experiments(monkeypatch):
    "Each kind and seed once, a pair with all its seeds first, and the music of three kinds, each by its own model."
    g = torch.Generator().manual_seed(0)
    pieces = {f"{i}": torch.randint(2, 40, (200,), generator=g) for i in range(3)}
    monkeypatch.setitem(train_chorales.__globals__, "load_chorales", lambda split: pieces)
    monkeypatch.setitem(train_chorales.__globals__, "record", lambda chapter, name, **row: row | dict(name=name))
    lines = []
    rows = run_experiments("smoke", "cpu", runs=[4], show=lines.append)
    found = [(r["name"], r["kind"], r["run"], r["training"]) for r in rows if r["name"] == "chorales"]
    assert found == [("chorales", kind, 4, "smoke") for pair in PAIRS for kind in pair]
    assert sorted(kind for pair in PAIRS for kind in pair) == sorted(KINDS) and len(lines) == 3 + 6
    written = {r["kind"]: r["continued"] for r in rows if r["name"] == "continuation"}
    assert list(written) == ["relative", "absolute", "relative only"] and len({str(w) for w in written.values()}) == 3
    few = run_experiments("smoke", "cpu", runs=[0, 1], show=lines.append, groups=[("relative only",)], steps=1)
    assert [(r["kind"], r["run"]) for r in few if r["name"] == "chorales"] == [
        ("relative only", 0),
        ("relative only", 1),
    ]
    assert {(r["steps"], r["training"]) for r in few if r["name"] == "chorales"} == {(1, "smoke, 1 steps")}
    monkeypatch.setitem(load_chorales.__globals__, "bach_chorales", dict)
    with pytest.raises(FileNotFoundError, match="corpus/bach"):
        load_chorales("train")


def test_growth_is_that_of_the_same_pieces():
    "A short piece that is easy must not make long ones look as if they grew."
    model = nn.Linear(1, 1)
    nll = torch.full((2, 8), torch.nan)
    nll[0], nll[1, :4] = 2.0, 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_chorales.__globals__, "token_nll", lambda *_: nll)
        row = _measured(Trainee(model, music_loss, (), losses=[1.0] * 40), [None] * 2, 4)
    assert (row["nll"], row["beyond"], row["growth"], row["long_pieces"]) == (1.0, 2.0, 0.0, 1)
    assert row["loss"] == {"0": 1.0, "20": 1.0}


@pytest.mark.parametrize("block_size", (None, 8), ids=("global", "blocks"))
def test_peers_agree(block_size):
    "Every peer but plain attention, uncompiled, against the gather; plain attention is the gather with a table of zeros."
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 32, 16, generator=g) for _ in range(3))
    rel = torch.randn(2, 32, 16, generator=g)
    want = relative_attention_reference(q, k, v, rel, block_size=block_size)
    names = ["skew", "gather", "skew, compiled"] + ["flex, QE buffer"] * (block_size is None)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        for name, peer in _peers(*names, block_size=block_size).items():
            assert rel_error(peer(q, k, v, rel), want) < 1e-5, name


def gap(low, high, training="gpu", worst=0.5, seeds=3):
    return dict(training=training, gap=Interval((low + high) / 2, (high - low) / 2, seeds), worst=worst)


def growth(growth, less, training="gpu", worst=0.5, runs=3):
    return dict(growth=growth, less=less, training=training, worst=worst, runs=runs)


RULES = {  # a word of the claim, what was measured, the verdict
    "lower": ("beats absolute positions on", gap(0.03, 0.05), "holds"),
    "hardly lower": ("beats absolute positions on", gap(0.001, 0.01), "does not hold here"),
    "higher": ("beats absolute positions on", gap(-0.05, -0.03), "does not hold here"),
    "perhaps lower": ("beats absolute positions on", gap(0.01, 0.05), "not measured"),
    "one seed": ("beats absolute positions on", gap(0.03, 0.05, seeds=1), "not measured"),
    "lower, small": ("beats absolute positions on", gap(0.03, 0.05, "laptop"), "not measured"),
    "lower, in a minute": ("beats absolute positions on", gap(0.03, 0.05, "cpu"), "not measured"),
    "lower than what counting beats": ("beats absolute positions on", gap(0.03, 0.05, worst=1.1), "not measured"),
    "labels": ("both have labels", gap(0.03, 0.05), "holds"),
    "no better with labels": ("both have labels", gap(-0.01, 0.01), "does not hold here"),
    "one side has labels": ("Without labels", gap(0.0, 0.01), "does not hold here"),
    "local as good": ("local attention", gap(-0.02, 0.01), "holds"),
    "local worse": ("local attention", gap(-0.07, -0.05), "does not hold here"),
    "local, perhaps": ("local attention", gap(-0.05, 0.05), "not measured"),
    "goes on": ("goes on", growth(0.01, 0.2), "holds"),
    "both deteriorate": ("goes on", growth(0.1, 0.2), "does not hold here"),
    "neither deteriorates": ("goes on", growth(0.01, 0.01), "does not hold here"),
    "goes on, one seed": ("goes on", growth(0.01, 0.2, runs=1), "not measured"),
    "goes on, small": ("distances only", growth(-0.1, 2, "laptop"), "not measured"),
    "goes on, under-trained": ("distances only", growth(-0.1, 2, worst=1.1), "not measured"),
    "linear": ("Skewing keeps", dict(gather=2.0, skew=1.8, ours=0.9), "holds"),
    "linear, and so is the skew": ("Skewing keeps", dict(gather=2.0, skew=1.2, ours=0.9), "holds in part"),
    "nearly linear": ("Skewing keeps", dict(gather=2.0, skew=1.8, ours=1.2), "holds in part"),
    "square": ("Skewing keeps", dict(gather=2.0, skew=1.8, ours=1.9), "does not hold here"),
    "peak linear": ("Peak memory", Exponent(1.0, math.nan, 2), "holds"),
    "peak nearly linear": ("Peak memory", 1.2, "holds in part"),
    "peak square": ("Peak memory", 2.0, "does not hold here"),
    "4.2 MB": ("4.2 MB", [4.2, 8.6], "holds"),
    "Shaw's only": ("4.2 MB", [5, 8.5], "holds in part"),
    "neither": ("4.2 MB", [5, 9.5], "does not hold here"),
    "three times": ("compiled skew, forward", {"a": 3.1, "b": 9}, "holds"),
    "twice": ("compiled skew, backward", {"a": 2, "b": 9}, "holds in part"),
    "slower": ("compiled skew, forward", {"a": 1, "b": 9}, "does not hold here"),
    "blocks": ("blocks of 512 as well, forward", {"a": 3.1}, "holds"),
    "slower than flex": ("FlexAttention with a buffer of L x L, forward", {"a": 0.7}, "does not hold here"),
    "plain": ("costs at most twice plain causal attention, forward", {"a": 0.5}, "holds"),
    "plain, thrice": ("costs at most twice plain causal attention, backward", {"a": 0.34}, "holds in part"),
    "plain, four times": (
        "costs at most twice plain causal attention, backward",
        {"a": 0.5, "b": 0.25},
        "does not hold here",
    ),
}


@pytest.mark.parametrize("case", RULES)
def test_rules(case):
    words, measured, want = RULES[case]
    (claim,) = (c for c in claims() if words in c.statement)
    assert replace(claim, measured=measured).judge().verdict == want


NLL = {
    "absolute": 0.9,
    "absolute + labels": 0.7,
    "relative": 0.6,
    "relative + labels": 0.5,
    "relative local": 0.61,
    "relative only": 0.6,
}


def shelf_of_rows():
    "Rows whose verdicts are known: what is lower, over which positions, which training, machine and method counts."
    curve = lambda x, later: {"0": x, "64": x, "128": x + later, "192": x + later, "256": 9.0}
    later = lambda kind: 0.5 if kind == "absolute" else 0.01
    trainings = [
        dict(
            kind=k,
            run=i,
            training=t,
            length=128,
            nll=x + 0.002 * i if t == "gpu" else 1 - x,
            curve=curve(x + 0.002 * i, later(k)),
        )
        for k, x in NLL.items()
        for i in range(3)
        for t in ("cpu", "gpu")
    ]
    times = {"ours": 1.0, "skew, compiled": 4.0, "flex, QE buffer": 2.0, "cudnn, no relative term": 0.6}
    backward = {m: 0.2 if m.startswith("cudnn") else 1 / x for m, x in times.items()}
    speed = [dict(method=m, B=1, L=8, D=64, M=8, ms_fwd=x, ms_bwd=backward[m]) for m, x in times.items()]
    kept = [dict(method=m, L=L, kept=L**n) for m, n in (("gather", 2), ("skew", 2), ("ours", 1)) for L in (8, 16, 32)]
    peaks = [dict(method="ours", B=2, L=L, D=64, M=L, ms_fwd=None, peak_mb_bwd=L * 2.0) for L in (8, 16)]
    return dict(chorales=trainings, attention=speed, local=speed, kept=kept, memory=peaks)


@contextlib.contextmanager
def rows_on_the_shelf(shelf):
    "Within it the chapter reads these rows and no others."
    frame = dict(date="2026-01-01T00:00:00+00:00", device="made up", versions={}, preset="gpu")
    read = lambda chapter, name, **where: [frame | r for r in shelf.get(name, [])]
    with pytest.MonkeyPatch.context() as patch:
        for room in (longest, claims):  # both read rows
            patch.setitem(room.__globals__, "load_results", read)
        yield


def test_claims_read_the_right_rows():
    with rows_on_the_shelf(shelf_of_rows()):
        found = [c.judge() for c in claims()]
        lower = _gap("relative", "absolute")
        assert (
            lower["gap"].mean == pytest.approx(0.3) and lower["gap"].n == 3 and lower["worst"] == pytest.approx(0.902)
        )
        assert _gap("absolute", "relative")["gap"].mean == pytest.approx(-0.3)
        grown = _beyond("relative")
        assert grown["growth"] == pytest.approx(0.01) and grown["less"] == pytest.approx(0.49) and grown["runs"] == 3
        assert grown["worst"] == pytest.approx(0.904)
    speeds = ["holds", "does not hold here"] * 4  # forward ours wins, backward the others do
    assert [v.verdict for v in found] == ["holds"] * 9 + speeds + ["out of reach here"] * 3


def test_one_bad_seed_or_length_counts():
    shelf = shelf_of_rows()
    shelf["chorales"] = [r | dict(growth=0.2 if r["run"] == 1 else 0.0) for r in shelf["chorales"]]
    shelf["kept"] += [dict(method="ours", L=4, kept=1.0)]
    shelf["memory"] += [dict(method="ours", B=2, L=4, D=64, M=4, peak_mb_bwd=2.0)]
    with rows_on_the_shelf(shelf):
        assert _beyond("relative")["growth"] == 0.2 and _beyond("relative")["less"] == 0
        assert _slopes()["ours"] == pytest.approx(3) and _gpu_slope().slope == pytest.approx(3)


def test_a_failed_peer_is_no_victory():
    shelf = shelf_of_rows()
    shelf["attention"] = [r | dict(ms_fwd=None) if "flex" in r["method"] else r for r in shelf["attention"]]
    with rows_on_the_shelf(shelf):
        assert _faster("flex, QE buffer") is None and _faster("flex, QE buffer", "ms_bwd")


def test_seeds_are_paired():
    "A seed that is easy for both kinds is no spread between them; a seed that only one has does not count."
    shelf = dict(chorales=[r | dict(nll=r["nll"] + 5 * r["run"] / 100) for r in shelf_of_rows()["chorales"]])
    shelf["chorales"] += [dict(kind="relative", run=7, training="gpu", length=128, nll=9.0, curve={})]
    with rows_on_the_shelf(shelf):
        found = _gap("relative", "absolute")["gap"]
    assert found.n == 3 and found.mean == pytest.approx(0.3) and found.half < 1e-6


def test_the_longest_training():
    "gpu before cpu, and of it the last machine that has the kinds; machines are not mixed."
    gpu = lambda kind, day, device, **more: dict(
        kind=kind, training="gpu", date=f"2026-01-0{day}", device=device, **more
    )
    rows = [
        gpu("a", 1, "old"),
        gpu("b", 1, "old"),
        gpu("a", 2, "new"),
        dict(kind="c", training="cpu", date="2026-01-09", device="x"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(longest.__globals__, "load_results", lambda *args: rows)
        assert [r["device"] for r in longest()] == ["new"] and [r["device"] for r in longest(kinds=("a", "b"))] == [
            "old"
        ] * 2
        assert [r["kind"] for r in longest(kinds=("c",))] == ["c"] and longest(kinds=("a", "c")) == []


def test_claims_cope_with_missing_rows():
    with rows_on_the_shelf({}):
        verdicts = [c.judge().verdict for c in claims()]
    assert verdicts == ["holds"] + ["not measured"] * 16 + ["out of reach here"] * 3
