# Written from the test cells of nbs/2_position/music.ipynb by `attnbook export`. Do not edit.
import math
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F

from attnbook.attention import attention_reference
from attnbook.lab.data import skip_without
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
from attnbook.music import (
    BOS,
    REST,
    MusicTransformer,
    Note,
    PerformanceEncoder,
    generate,
    grid_to_tokens,
    load_chorales,
    parameter_counts,
    read_midi,
    relative_attention,
    relative_attention_reference,
    sustain,
    tokens_to_grid,
    write_midi,
)


def _qkv(L, M, H=2, D=16, B=1, dtype=torch.float32, shared=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64).to(device_under_test(), dtype)
    return *(make(B, H, L, D) for _ in range(3)), make(*(() if shared else (H,)), M, D)


def test_kernel_matches_reference():
    for L, M, D, N, beyond, shared in (
        (1, 1, 16, None, "zero", False), (18, 12, 24, None, "zero", True), (33, 33, 16, None, "zero", False),
        (20, 5, 16, None, "clip", False), (34, 50, 16, 9, "zero", False), (33, 1, 16, 16, "clip", True)):
        kw = dict(block_size=N, beyond=beyond, return_lse=True)
        inputs = _qkv(L, M, D=D, H=2 if L < 33 else 1, shared=shared)
        op = partial(relative_attention, backend="triton", **kw)
        check_against_reference(op, partial(relative_attention_reference, **kw), inputs, tol=2e-5)


def test_gradients_in_float64():
    for M, beyond, N in ((4, "zero", None), (4, "clip", None), (11, "zero", 3)):
        check_gradients(partial(relative_attention, beyond=beyond, block_size=N), _qkv(9, M, D=4, dtype=torch.float64))


def _each_backend(q, k, v, rel, **kw):
    return [relative_attention(q, k, v, rel, backend=b, **kw) for b in ("torch", "triton")]

def test_no_table_is_plain_attention():
    q, k, v, rel = _qkv(35, 6)
    want = attention_reference(q, k, v, is_causal=True)
    same = [(rel * 0, "zero"), (rel[:, :0], "zero"), (rel[:, :0], "clip"), (rel[:, :1], "clip")]
    for table, beyond in same:
        for out in _each_backend(q, k, v, table, beyond=beyond): assert rel_error(out, want) < 1e-5
    # one row, then zeros: that is something
    assert rel_error(relative_attention(q, k, v, rel[:, :1]), want) > 1e-2

def test_identity_and_copy():
    q, k, v, rel = _qkv(34, 4)
    u = torch.zeros_like(q[0, 0, 0]); u[0] = 1
    for r in (0, 1):
        table = torch.zeros_like(rel); table[:, r] = 1e3 * u
        for out in _each_backend(q * 0 + u, k * 0, v, table): assert rel_error(out[:, :, r:], v[:, :, :34 - r]) < 1e-5

def test_unused_rows_and_the_future():
    for N, used in ((None, 30), (8, 16)):
        x = [t.requires_grad_() for t in _qkv(30, 48, H=1)]
        out = relative_attention(*x, block_size=N, backend="triton")
        dk, dv, drel = torch.autograd.grad(out[:, :, 12].sum(), x[1:], retain_graph=True)
        assert (dk[:, :, 13:] == 0).all() and (dv[:, :, 13:] == 0).all() and (drel[:, 13:] == 0).all()
        drel, = torch.autograd.grad(out.sum(), x[3:])
        assert (drel[:, used:] == 0).all() and (drel[:, 1:used].abs().sum(-1) > 0).all()


def test_blocks():
    q, k, v, rel = _qkv(40, 16)
    for out in _each_backend(q, k, v, rel, block_size=20):
        assert rel_error(out, relative_attention(q, k, v, rel)) < 1e-5
    # without the first block, later blocks see what they saw …
    later = [x[:, :, 8:] for x in (q, k, v)]
    for out, cut in zip(_each_backend(q, k, v, rel, block_size=8), _each_backend(*later, rel, block_size=8)):
        assert rel_error(out[:, :, 16:], cut[:, :, 8:]) < 1e-5  # … from the second on


def test_strides_groups_and_precision():
    q, k, v, rel = _qkv(17, 9, H=2)
    op = partial(relative_attention, backend="triton")
    check_strides(op, (q[:, :1], k[:, :1], v[:, :1], rel[:1]))
    grouped = lambda q, k, v, rel: relative_attention_reference(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), rel
    )
    check_against_reference(op, grouped, (q, k[:, :1], v[:, :1], rel), tol=2e-5)
    check_against_reference(op, grouped, (q, k[:, :1], v[:, :1], rel), dtype=torch.bfloat16)


def test_deterministic_and_complete():
    op = partial(relative_attention, backend="triton")
    check_deterministic(op, _qkv(18, 20, H=1, B=2), repeats=2)
    check_writes_everything(op, _qkv(17, 30, H=1))
    check_autocast(op, _qkv(5, 9, H=1))


def test_compiles():
    check_compiles(partial(relative_attention, backend="triton"), _qkv(3, 9, H=1))


def test_relative_errors():
    q, k, v, rel = _qkv(6, 3)
    check_raises(
        relative_attention,
        [
            (dict(rel=rel[:, :, :8]), ValueError, ["rel", "16"]),
            (dict(rel=rel.repeat(2, 1, 1)), ValueError, ["rel", "2"]),
            (dict(k=k[:, :, :5], v=v[:, :, :5]), ValueError, ["q and k", "6", "5"]),
            (dict(block_size=0), ValueError, ["block_size", "0"]),
            (dict(beyond="wrap"), ValueError, ["beyond", "wrap", "clip"]),
            (dict(rel=rel.int()), TypeError, ["rel", "int32"]),
            (dict(q=q.int()), TypeError, ["q", "int32"]),
            (dict(backend="cuda"), ValueError, ["backend"]),
            (dict(scale=math.inf), ValueError, ["scale"]),
        ],
        q=q,
        k=k,
        v=v,
        rel=rel,
    )


def _small(**kw):
    torch.manual_seed(0)
    return MusicTransformer(
        20, **dict(depth=2, dim=16, attn_dim=16, ff_dim=24, heads=2, max_distance=6, dropout=0.0) | kw
    ).eval()


def test_cache_equals_parallel():
    tokens = torch.randint(0, 20, (2, 23))
    for kw in (
        dict(),
        dict(block_size=5),
        dict(beyond="clip", share_heads=True),
        dict(max_distance=0, labels=(4, 16)),
        dict(max_distance=40),
    ):
        model = _small(**kw)
        want, caches, parts, before = model(tokens), None, [], F.pad(tokens, (1, 0))
        for a, b in ((0, 7), (7, 8), (8, 20), (20, 23)):
            logits, caches = model.step(before[:, a:b], a, caches)
            parts.append(logits)
        assert (torch.cat(parts, 1) - want).abs().max() < 1e-5


def test_generate():
    model, prime = _small(), torch.arange(5)
    clamp = torch.full((17,), -1)
    clamp[5::4] = 3
    allowed = torch.arange(20) < 9
    runs = [generate(model, prime, 12, clamp=clamp, allowed=allowed, cached=c, seed=1) for c in (True, False)]
    assert torch.equal(*runs) and (runs[0][5::4] == 3).all() and torch.equal(runs[0][:5], prime) and runs[0].max() < 9
    assert len(generate(model, prime[:0], 4, temperature=0)) == 4
    check_raises(
        partial(generate, model, prime),
        [(dict(clamp=clamp[1:]), ValueError, "clamp"), (dict(temperature=-1), ValueError, "temperature")],
        length=12,
    )


def test_model_is_causal():
    model = _small()
    x = torch.randint(0, 20, (1, 12))
    y = x.clone()
    y[0, 7] = (y[0, 7] + 1) % 20
    assert torch.equal(model(x)[:, :8], model(y)[:, :8]) and not torch.equal(model(x)[:, 8], model(y)[:, 8])


def test_parameter_counts():
    want = [9_657_344, 12_803_072, 12_762_112, 10_050_560, None, 3_969_792, 8_587_264]
    for (name, n), w in zip(parameter_counts().items(), want): assert w in (None, n), (name, n, w)


def test_chorales():
    skip_without("music21")
    splits = [load_chorales(s) for s in ("train", "valid", "test")]
    tokens = torch.cat([t for s in splits for t in s.values()])
    assert (
        sum(map(len, splits)) == 363
        and len(tokens) == 316_288
        and int(tokens.min()) == REST
        and int(tokens.max()) < BOS
    )
    assert not set(splits[0]) & set(splits[1]) and not set(splits[1]) & set(splits[2])
    piece = next(iter(splits[0].values()))
    assert torch.equal(grid_to_tokens(tokens_to_grid(piece)), piece)
    check_raises(load_chorales, [(dict(split="dev"), ValueError, ["split", "dev"])])
    check_raises(grid_to_tokens, [(dict(pitch=np.array([[90, 60, 50, 40]])), ValueError, ["81", "90"])])


def test_vocabulary():
    assert PerformanceEncoder().num_tokens == 390 and PerformanceEncoder(21, 108).num_tokens == 310
    check_raises(
        PerformanceEncoder,
        [
            (dict(min_pitch=5, max_pitch=3), ValueError, "min_pitch"),
            (dict(velocity_bins=0), ValueError, "velocity_bins"),
        ],
    )
    check_raises(
        PerformanceEncoder(21, 108).encode, [(dict(notes=[Note(0, 1, 109)]), ValueError, ["pitch", "108", "109"])]
    )


def test_performance_round_trip():
    for encoder in (PerformanceEncoder(), PerformanceEncoder(21, 108)):
        rng = np.random.default_rng(0)
        start = rng.uniform(0, 20, 300)
        notes = [
            Note(s, s + d, int(p), int(v))
            for s, d, p, v in zip(
                start, rng.exponential(0.6, 300), rng.integers(21, 109, 300), rng.integers(1, 128, 300)
            )
        ]
        tokens = encoder.encode(notes)
        assert encoder.decode(tokens) == encoder.quantise(notes) and torch.equal(
            encoder.encode(encoder.decode(tokens)), tokens
        )
        assert 0 < tokens.min() and tokens.max() < encoder.num_tokens


def test_long_gaps():
    e = PerformanceEncoder()
    tokens = e.encode([Note(2.34, 2.5, 60)]).tolist()
    assert [t - e.shift + 1 for t in tokens[:3]] == [100, 100, 34]  # two seconds and 0.34 s


def test_sustain_and_midi():
    notes = [Note(0, 0.5, 60), Note(1, 1.25, 60), Note(0, 0.25, 64)]
    # until struck again, until released
    assert [n.end for n in sustain(notes, [(0.125, 2)])] == [1, 2, 2]
    with TemporaryDirectory() as folder:
        assert read_midi(write_midi(Path(folder) / "test.mid", notes)) == sorted(notes)
