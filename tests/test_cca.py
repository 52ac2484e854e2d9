# Written from the test cells of nbs/4_long_context/cca.ipynb by `attnbook export`. Do not edit.
# fmt: off
import copy
import importlib
import math
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from attnbook.attention import attention_reference
from attnbook.cca.cache import CCACache, cca_decode, turned_on
from attnbook.cca.experiments_study import (
    METHODS,
    PRESETS,
    RECIPE,
    WindowAttention,
    attention_of,
    equal_window,
    lessons_of,
    measured,
    recall_batch,
    recall_rows,
    run_recall,
    run_text,
)
from attnbook.cca.nets import CCAAttention, register_transformers, swap_attention
from attnbook.cca.op import cca_attention, cca_attention_op, cca_pool, cca_pool_op, core_attention, core_attention_op
from attnbook.cca.reference import (
    POOLS,
    cca_attention_reference,
    cca_cost,
    cca_kv_bytes,
    cca_mask,
    cca_pool_reference,
    cca_visible_pairs,
    core_count,
)
from attnbook.cca.study import (
    claims,
    decode_speedup,
    flex_speedup,
    full_speedup,
    gap_closed,
    gpu_rows,
    grid_change,
    last_half,
    looks_far,
    recall_gain,
    speedup_at_all,
    worse_by,
)
from attnbook.lab.stats import paired
from attnbook.lab.testing import (
    TOLERANCE,
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
from attnbook.lm.nets import LanguageModel, ModelConfig, Rope
from attnbook.lm.reference import rotate
from attnbook.lm.tasks import asked_distance

COVERS = [(24, 4, 6), (37, 5, 8), (40, 7, 3), (9, 16, 4), (33, 1, 5), (50, 16, 1), (64, 8, 64), (1, 1, 1), (30, 4, 9)]


@pytest.mark.parametrize("L, g, s", COVERS, ids=str)
def test_exact_cover(L, g, s):
    mask, m = cca_mask(L, g, s), L // g
    tokens = torch.cat([mask[:, :m].repeat_interleave(g, 1), torch.zeros(L, L - m * g, dtype=torch.bool)], 1)
    times = tokens.long() + mask[:, m:].long()  # how often each token is seen
    assert torch.equal(times, torch.ones(L, L, dtype=torch.long).tril())
    raw = mask[:, m:].sum(1)
    few = torch.arange(1, L + 1) < s + g
    assert torch.equal(raw[few], torch.arange(1, L + 1)[few])  # nothing is pooled yet
    assert ((raw[~few] >= s) & (raw[~few] < s + g)).all()


def test_positions_are_counted_from_zero():
    "Token t = s + g - 1 is the first that sees a core."
    assert [core_count(t, 4, 6) for t in (0, 8, 9, 12, 13)] == [0, 0, 1, 1, 2]
    assert core_count(torch.tensor([8, 9, 13]), 4, 6).tolist() == [0, 1, 2]


def test_pair_counts():
    ratio = lambda L: L * (L + 1) / 2 / cca_visible_pairs(L, 16, 1024)
    found = [round(ratio(L), 3) for L in (4096, 32768, 65536, 131072)]
    assert found == [2.104, 8.292, 10.896, 12.954]


@pytest.mark.parametrize("L, g, s", COVERS, ids=str)
def test_pairs_are_those_of_the_mask(L, g, s):
    assert cca_visible_pairs(L, g, s) == int(cca_mask(L, g, s).sum())


def test_cost_of_one_group():
    "g = 1 is causal attention: L (L + 1) / 2 pairs, whatever the window."
    cost = cca_cost(8, 1, 3, heads=2, head_dim=4)
    assert cost["flops_fwd"] == 4 * 4 * 2 * 36 and cost["flops_bwd"] == 10 * 4 * 2 * 36
    cores = 5  # seen by the last query
    assert cost["bytes_fwd"] == 2 * (2 * 4 * 8 * 4 + 2 * 2 * cores * 4) + 4 * 2 * 8
    assert cca_kv_bytes(100, 4, 8, 2, 16) == 2 * (25 + 12) * 2 * 16 * 2
    assert cca_kv_bytes(5, 4, 8, 2, 16, batch=3, layers=2, element_size=4) == 2 * (1 + 5) * 2 * 16 * 24


def draw(L=19, B=1, H=2, Hk=None, D=4, Dv=None, dtype=torch.float64, seed=0):
    "Seeded q, k, v on the device under test, as keyword arguments."
    q, k, v = make_qkv(B, H, L, D, kv_heads=Hk, Dv=Dv, dtype=dtype, seed=seed)
    return dict(q=q, k=k, v=v)


@pytest.mark.parametrize("g, s", [(1, 1), (1, 7), (4, 19), (5, 64), (30, 2)], ids=str)
def test_limits_are_causal_attention(g, s):
    i = draw(Hk=1)
    want = attention_reference(*i.values(), is_causal=True)
    assert rel_error(cca_attention_reference(**i, group_size=g, window_size=s), want) < 1e-12


def test_equal_tokens_pool_to_themselves():
    i = draw(L=20)
    for n in "kv":
        i[n] = i[n][:, :, ::5].repeat_interleave(5, 2)
    cores = {pool: cca_pool_reference(**i, group_size=5, pool=pool) for pool in POOLS}
    for pool in POOLS:
        for core, x in zip(cores[pool], (i["k"], i["v"])):
            assert rel_error(core, x[:, :, ::5]) < 1e-12
    full = attention_reference(*i.values(), is_causal=True)
    out = cca_attention_reference(**i, group_size=5, window_size=3, core_bias=math.log(5))
    assert rel_error(out, full) < 1e-12, "log g makes up for the size of a group"
    assert rel_error(cca_attention_reference(**i, group_size=5, window_size=3), full) > 1e-2


@pytest.mark.parametrize("heads", ["kv", "q"])
def test_pooling_by_hand(heads):
    i, g = draw(L=11, H=4, Hk=2), 3
    kc, vc = cca_pool_reference(**i, group_size=g, pool_heads=heads)
    for h in range(2 if heads == "kv" else 4):
        for c in range(3):
            rows, hk = slice(c * g, c * g + g), h if heads == "kv" else h // 2
            scorers = (2 * h, 2 * h + 1) if heads == "kv" else (h,)
            p = sum((i["k"][0, hk, rows] @ i["q"][0, a, c * g + g - 1] / 2).softmax(0) for a in scorers) / len(scorers)
            assert rel_error(kc[0, h, c], p @ i["k"][0, hk, rows]) < 1e-12
            assert rel_error(vc[0, h, c], p @ i["v"][0, hk, rows]) < 1e-12


def test_other_pools_by_hand():
    i = draw(L=7, H=2, Hk=1)
    for pool, want in (("mean", lambda x: x.mean(0)), ("max", lambda x: x.max(0).values), ("last", lambda x: x[-1])):
        for heads, n in (("kv", 1), ("q", 2)):
            cores = cca_pool_reference(**i, group_size=3, pool=pool, pool_heads=heads)
            for core, x in zip(cores, (i["k"], i["v"])):
                assert core.shape == (1, n, 2, 4)
                assert rel_error(core[0, -1, 1], want(x[0, 0, 3:6])) < 1e-12


def test_a_peaked_group_is_its_peak():
    i = draw(L=8)
    i["q"][..., 0], i["k"][..., 0] = 1.0, 0.0
    i["k"][:, :, 5, 0] = 1e4
    kc, vc = cca_pool_reference(**i, group_size=4)
    assert rel_error(kc[:, :, 1], i["k"][:, :, 5]) < 1e-12 and rel_error(vc[:, :, 1], i["v"][:, :, 5]) < 1e-12


@pytest.mark.parametrize("p", [5, 6, 11, 18])
def test_causality(p):
    i = draw()
    out = cca_attention_reference(**i, group_size=4, window_size=3)
    other = {n: torch.cat([t[:, :, :p], torch.randn_like(t[:, :, p:])], 2) for n, t in i.items()}
    again = cca_attention_reference(**other, group_size=4, window_size=3)
    assert rel_error(again[:, :, :p], out[:, :, :p]) < 1e-12 and rel_error(again[:, :, p:], out[:, :, p:]) > 1e-2


@pytest.mark.parametrize("t, far", [(7, True), (6, False), (16, False)], ids=["scorer", "inside", "no group yet"])
def test_the_last_query_chooses(t, far):
    i = draw(L=18)
    out = cca_attention_reference(**i, group_size=4, window_size=3)
    i["q"][:, :, t] += 1
    changed = (cca_attention_reference(**i, group_size=4, window_size=3) != out).any(-1).any(1)[0]
    rows = [r for r in range(18) if r == t or far and core_count(r, 4, 3) > t // 4]
    assert changed.nonzero().flatten().tolist() == rows


def test_order_inside_a_far_group_does_not_matter():
    i, g, s = draw(L=24), 4, 5
    out = cca_attention_reference(**i, group_size=g, window_size=s)
    moved = i | {n: i[n][:, :, [0, 1, 2, 3, 6, 4, 7, 5, *range(8, 24)]] for n in "kv"}
    again = cca_attention_reference(**moved, group_size=g, window_size=s)
    far = [t for t in range(24) if core_count(t, g, s) >= 2]
    assert rel_error(again[:, :, far], out[:, :, far]) < 1e-12
    moved["q"] = i["q"][:, :, [0, 1, 2, 3, 4, 5, 7, 6, *range(8, 24)]]
    assert rel_error(cca_attention_reference(**moved, group_size=g, window_size=s)[:, :, far], out[:, :, far]) > 1e-3


@pytest.mark.parametrize("pool", POOLS)
def test_reference_gradients(pool):
    op = partial(cca_attention_reference, group_size=4, window_size=6, pool=pool, core_bias=0.5)
    check_gradients(op, draw(L=19, H=2, Hk=1))


def _spans(L, g, s, BM, BN):
    "The four spans as Python functions of a tile's number (Triton's interpreter is not needed for integers)."
    first = lambda t: max(t + 1 - s, 0) // g * g
    up = lambda a, b: -(-a // b)
    M = core_count(L - 1, g, s)

    def tile(i, size, n):
        return i * size, min(i * size + size, n) - 1

    raw_k = lambda i: (lambda a, z: (first(a) // BN, up(first(z), BN), (a + 1) // BN, up(z + 1, BN)))(*tile(i, BM, L))
    core_k = lambda i: (lambda a, z: (0, 0, first(a) // g // BN, up(first(z) // g, BN)))(*tile(i, BM, L))
    last = lambda n: min(n // g * g + g + s - 2, L - 1)
    raw_q = lambda j: (lambda a, z: (a // BM, up(z, BM), (last(a) + 1) // BM, up(last(z) + 1, BM)))(*tile(j, BN, L))
    begin = lambda c: (c + 1) * g + s - 1
    core_q = lambda j: (lambda a, z: (begin(a) // BM, up(begin(z), BM), L // BM, up(L, BM)))(*tile(j, BN, M))
    return raw_k, core_k, raw_q, core_q, M


@pytest.mark.parametrize("L, g, s", [(37, 5, 8), (40, 7, 3), (64, 4, 16), (50, 16, 1), (33, 3, 20)], ids=str)
@pytest.mark.parametrize("BM, BN", [(4, 8), (8, 4)], ids=str)
def test_spans(L, g, s, BM, BN):
    raw_k, core_k, raw_q, core_q, M = _spans(L, g, s, BM, BN)
    mask = cca_mask(L, g, s)
    cores, raw = mask[:, :M], mask[:, L // g :]

    def check(span, seen, rows, columns):
        for i in range(-(-seen.shape[0] // rows)):
            lo, full_lo, full_hi, hi = span(i)
            part = seen[i * rows : (i + 1) * rows]
            for j in range(-(-seen.shape[1] // columns)):
                block = part[:, j * columns : (j + 1) * columns]
                assert block.any() == (lo <= j < hi), (i, j)
                full = max(full_lo, lo) <= j < min(max(full_hi, full_lo), hi)
                assert not full or block.all() and block.shape[1] == columns, (i, j)

    check(raw_k, raw, BM, BN)
    check(raw_q, raw.T, BN, BM)
    if M:
        check(core_k, cores, BM, BN)
        check(core_q, cores.T, BN, BM)


BACKENDS = ("torch", "triton")
CASES = {  # name -> (arguments of draw, group, window)
    "plain": (dict(L=40, D=16), 4, 8),
    "odd": (dict(L=37, H=2, Hk=1, D=8), 5, 7),
    "group of 3": (dict(L=50, H=1, D=16), 3, 10),
    "window below group": (dict(L=41, H=1, D=16, Dv=24), 7, 3),
    "group of 1": (dict(L=21, H=1), 1, 4),
    "shared heads": (dict(L=35, H=4, Hk=2), 4, 6),
    "short": (dict(L=3, H=1), 4, 6),
    "one token": (dict(L=1, H=1), 1, 1),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_reference(case, backend):
    what, g, s = CASES[case]
    op = partial(cca_attention, group_size=g, window_size=s, backend=backend)
    check_against_reference(
        op, partial(cca_attention_reference, group_size=g, window_size=s), draw(**what, dtype=torch.float32), grad_tol=3e-5
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", ["kv", "q"])
@pytest.mark.parametrize("pool, bias", [("cca", 1.5), ("mean", None), ("max", -0.5), ("last", None)], ids=str)
def test_pools_and_bias(pool, bias, heads, backend):
    options = dict(group_size=4, window_size=6, pool=pool, pool_heads=heads, core_bias=bias, scale=0.3)
    i = draw(L=35, H=4, Hk=2, dtype=torch.float32)
    op = partial(cca_attention, backend=backend, **options)
    check_against_reference(op, partial(cca_attention_reference, **options), i, grad_tol=3e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_types(dtype, backend):
    options = dict(group_size=4, window_size=6)
    i = draw(L=33, D=16, Hk=1, dtype=dtype)
    op = partial(cca_attention, backend=backend, **options)
    check_against_reference(
        op, partial(cca_attention_reference, **options), i, dtype=dtype, grad_tol=3 * TOLERANCE[dtype]
    )


@pytest.mark.parametrize("heads", ["kv", "q"])
@pytest.mark.parametrize("L, g", [(23, 5), (9, 3), (150, 70)], ids=str)
def test_pooling(L, g, heads):
    i = draw(L=L, H=4, Hk=2, D=8, Dv=5, dtype=torch.float32)
    op = partial(cca_pool, group_size=g, pool_heads=heads)
    check_against_reference(partial(op, backend="triton"), partial(op, backend="torch"), i, grad_tol=3e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_given_cores(backend):
    "The halves make the whole, whether the cores are just enough or more."
    i, g, s = draw(L=30, H=2, Hk=1, dtype=torch.float32), 4, 6

    def halves(q, k, v):
        kc, vc = cca_pool(q, k, v, g, backend=backend)
        assert kc.shape[2] == 7 and core_count(29, g, s) == 6
        return core_attention(q, k, v, kc, vc, g, s, backend=backend)

    check_against_reference(halves, partial(cca_attention_reference, group_size=g, window_size=s), i, grad_tol=3e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_given_cores(backend):
    i, g, s = draw(L=26, H=2, Hk=1, dtype=torch.float32), 4, 6
    i |= dict(k_core=torch.randn(1, 1, 5, 4), v_core=torch.randn(1, 1, 5, 4))

    def reference(q, k, v, k_core, v_core):
        keys, values = (torch.cat(x, 2).repeat_interleave(2, 1) for x in ((k_core, k), (v_core, v)))
        mask = cca_mask(26, g, s)[:, [*range(5), *range(6, 32)]]
        return attention_reference(q, keys, values, mask=mask.to(q.device))

    i = {n: t.to(device_under_test()) for n, t in i.items()}
    op = partial(core_attention, group_size=g, window_size=s, backend=backend)
    check_against_reference(op, reference, i, grad_tol=3e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_good_citizen(backend):
    op = partial(cca_attention, group_size=3, window_size=4, backend=backend)
    reference = partial(cca_attention_reference, group_size=3, window_size=4)
    check_operation(op, reference, draw(L=18, H=2, Hk=1, dtype=torch.float32), grad_tol=3e-5)


def test_pool_is_a_good_citizen():
    op = partial(cca_pool, group_size=3, backend="triton")
    i = draw(L=8, H=2, Hk=1, dtype=torch.float32)
    check_operation(op, partial(cca_pool_reference, group_size=3), i, grad_tol=3e-5)


def test_registered_operations():
    q, k, v = (t.requires_grad_() for t in draw(L=13, H=2, Hk=1, dtype=torch.float32).values())
    cores = [torch.randn(1, 1, 3, 4, device=q.device, requires_grad=True) for _ in "kv"]
    check_opcheck(cca_pool_op, (q, k, v, 4, 3, False, 0.5))
    check_opcheck(core_attention_op, (q, k, v, *cores, 3, 4, 0.5, 0.0))
    check_opcheck(cca_attention_op, (q, k, v, 3, 4, True, 0.5, 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits(backend):
    q = torch.full((1, 1, 24, 16), 1e4, device=device_under_test())
    out = cca_attention(q, q, torch.ones_like(q), 4, 6, scale=1.0, backend=backend)
    assert (out - 1).abs().max() < 1e-3
    i = draw(L=24, H=1, D=16, dtype=torch.float32)
    i["q"][:], i["k"][:] = 1.0, 0.0
    i["k"][:, :, 5] = 3e3
    out = cca_attention(**i, group_size=4, window_size=6, backend=backend)
    far = [t for t in range(24) if core_count(t, 4, 6) >= 2]  # token 5 is in their second core
    assert rel_error(out[:, :, far], i["v"][:, :, 5:6].expand(-1, -1, len(far), -1)) < 1e-5


@pytest.mark.parametrize("scale", [0.0, -0.4], ids=str)
def test_scales_without_folding(scale):
    options = dict(group_size=3, window_size=4, scale=scale, core_bias=0.7)
    op = partial(cca_attention, backend="triton", **options)
    i = draw(L=18, H=1, dtype=torch.float32)
    check_against_reference(op, partial(cca_attention_reference, **options), i, grad_tol=3e-5)


def test_meta():
    q = torch.empty(1, 2, 40, 8, device="meta")
    assert cca_attention(q, q, q, 4, 8).shape == q.shape


def test_bad_input():
    i = draw(L=20, H=4, Hk=2, dtype=torch.float32)
    q, k, v = i.values()
    core = torch.zeros(1, 2, 3, 4, device=q.device)
    bad = [
        (dict(group_size=0), ValueError, ("group_size", "0")),
        (dict(group_size=2.0), TypeError, ("group_size", "2.0")),
        (dict(group_size=True), TypeError, "group_size"),
        (dict(window_size=0), ValueError, ("window_size", "0")),
        (dict(window_size="8"), TypeError, "window_size"),
        (dict(k=k[:, :, :-1]), ValueError, "k"),
        (dict(k=k[:, :, :-1], v=v[:, :, :-1]), ValueError, ("k must", "20", "19")),
        (dict(q=q[:, :3]), ValueError, "heads"),
        (dict(q=q.long()), TypeError, "q must"),
        (dict(v=v.half()), TypeError, "v must"),
        (dict(pool="sum"), ValueError, ("pool", "mean")),
        (dict(pool=1), TypeError, "pool"),
        (dict(pool_heads="all"), ValueError, "pool_heads"),
        (dict(core_bias="log"), TypeError, "core_bias"),
        (dict(scale=math.inf), ValueError, "scale"),
        (dict(backend="cuda"), ValueError, "backend"),
    ]
    check_raises(cca_attention, bad, **i, group_size=4, window_size=8)
    pool_bad = [b for b in bad if not {"window_size", "core_bias"} & b[0].keys()]
    check_raises(cca_pool, pool_bad, **i, group_size=4)
    few = [
        (dict(k_core=core[:, :, :2]), ValueError, ("k_core", "3 cores", "2")),
        (dict(v_core=core[:, :1]), ValueError, "v_core"),
        (dict(k_core=core.double()), TypeError, "k_core"),
        (dict(v_core=None), TypeError, "v_core"),
    ]
    check_raises(core_attention, few, **i, k_core=core, v_core=core, group_size=4, window_size=8)


DECODES = {  # name -> (draw, group, window, options)
    "plain": (dict(L=30), 4, 6, {}),
    "shared heads": (dict(L=29, H=4, Hk=2, D=8), 3, 5, dict(core_bias=1.0)),
    "cores by query": (dict(L=23, H=4, Hk=2, D=8), 4, 3, dict(pool_heads="q")),
    "group of 1": (dict(L=9), 1, 3, {}),
    "mean": (dict(L=20), 4, 6, dict(pool="mean", scale=0.3)),
}


def cache_for(i, g, s, backend, **options):
    "An empty cache for inputs i."
    (B, H, L, D), HK = i["q"].shape, i["k"].shape[1]
    return CCACache(
        B, HK, D, g, s, L, i["q"].dtype, i["q"].device, heads=H, backend=backend, **options
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", DECODES)
def test_steps_are_the_parallel_form(case, backend):
    what, g, s, options = DECODES[case]
    i = draw(**what, B=2, dtype=torch.float32)
    want = cca_attention_reference(**i, group_size=g, window_size=s, **options)
    at = lambda a, b: (t[:, :, a:b] for t in i.values())
    one = cache_for(i, g, s, backend, **options)
    out = torch.cat([one.step(*at(t, t + 1)) for t in range(want.shape[2])], 2)
    assert rel_error(out, want) < 1e-5
    two = cache_for(i, g, s, backend, **options)
    first, rest = two.prefill(*at(0, 7)), []
    for t in range(7, want.shape[2], 2):
        two.extend(2, len(range(t, min(t + 2, want.shape[2]))))
        rest.append(two.attend(0, *at(t, t + 2)))
    assert rel_error(torch.cat([first, *rest], 2), want) < 1e-5
    m = want.shape[2] // g
    assert all(rel_error(a[:, :, :m], b[:, :, :m]) < 1e-5 for a, b in zip(one.cores[0], two.cores[0]))


def test_size_of_a_cache():
    cache = CCACache(2, 3, 8, 4, 6, max_len=41, dtype=torch.bfloat16, depth=5)
    assert cache.nbytes == cca_kv_bytes(41, 4, 6, 3, 8, batch=2, layers=5)
    assert cache.nbytes == 2 * (41 // 4 + 4 + 6) * 3 * 8 * 2 * 2 * 5
    out = cache_for(i := draw(L=12, dtype=torch.float32), 4, 6, "torch")
    first = out.prefill(*i.values())
    out.reset()
    assert torch.equal(out.prefill(*i.values()), first) and int(out.length) == 12


def test_cache_refuses():
    bad = [
        (dict(batch=0), ValueError, "batch"),
        (dict(max_len=1.5), TypeError, "max_len"),
        (dict(group_size=0), ValueError, "group_size"),
        (dict(pool="sum"), ValueError, "pool"),
        (dict(pool_heads="q"), TypeError, "heads"),
        (dict(core_bias="1"), TypeError, "core_bias"),
    ]
    check_raises(CCACache, bad, batch=1, kv_heads=1, head_dim=4, group_size=4, window_size=4)
    cache = CCACache(2, 1, 4, 4, 4, max_len=16)
    with pytest.raises(ValueError, match="mask"):
        cache.extend(2, 3, mask=torch.tensor([[False, True, True]] * 2))
    with pytest.raises(ValueError, match="2 rows"):
        cache.extend(1, 3)
    q, length = torch.zeros(2, 1, 1, 4), torch.tensor(3)
    good = dict(q=q, length=length, rings=cache.rings[0], cores=cache.cores[0], group_size=4, window_size=4)
    cases = [
        (dict(q=q[0]), ValueError, "q"),
        (dict(length=3), TypeError, "length"),
        (dict(length=length.float()), TypeError, "length"),
        (dict(rings=[t[:, :, :7] for t in cache.rings[0]]), ValueError, ("rings", "8", "7")),
        (dict(cores=[t.double() for t in cache.cores[0]]), TypeError, "cores"),
        (dict(rings=cache.rings[0][0]), TypeError, ("rings", "pair")),
        (dict(rings=[t[..., :3] for t in cache.rings[0]]), ValueError, "rings[0]"),
        (dict(rings=[t[:1] for t in cache.rings[0]]), ValueError, "rings[0]"),
        (dict(rings=[cache.rings[0][0], cache.rings[0][1][:, :, :7]]), ValueError, "rings[1]"),
        (dict(cores=[t.repeat(1, 3, 1, 1) for t in cache.cores[0]]), ValueError, "cores"),
        (dict(cores=[cache.cores[0][0], cache.cores[0][1][..., :2]]), ValueError, "cores"),
        (dict(rings=[t.repeat(1, 2, 1, 1) for t in cache.rings[0]]), ValueError, ("heads", "2")),
        (dict(window_size=0), ValueError, "window_size"),
    ]
    check_raises(cca_decode, cases, **good)


def tiny_model(**changes):
    "A small model with shared heads, in float64."
    torch.manual_seed(0)
    sizes = dict(vocab_size=17, dim=32, depth=2, heads=4, kv_heads=2, max_length=64, init_std=0.4)
    return LanguageModel(ModelConfig(**sizes | changes)).to(device_under_test(), torch.float64).eval()


def test_a_swapped_model_keeps_its_weights():
    model, x = tiny_model(), torch.randint(17, (2, 40), device=device_under_test())
    names, full = list(model.state_dict()), model(x)
    swap_attention(model, 4, 64)
    assert rel_error(model(x), full) < 1e-12 and list(model.state_dict()) == names
    attend = swap_attention(model, 4, 8)
    out = model(x)
    assert rel_error(out[:, :11], full[:, :11]) < 1e-12 and rel_error(out[:, 12:], full[:, 12:]) > 1e-3
    assert model.blocks[1].attention.attend is attend and "4, 8" in repr(attend)
    model.set_attention(None)
    assert torch.equal(model(x), full)


@pytest.mark.parametrize("rope_pool", ["post", "pre"])
@pytest.mark.parametrize("pool", ["cca", "mean"])
def test_cached_model(rope_pool, pool):
    model, x = tiny_model(), torch.randint(17, (2, 33), device=device_under_test())
    attend = swap_attention(model, 4, 6, pool=pool, rope_pool=rope_pool, core_bias=0.5)
    whole, cache = model(x), attend.make_cache(model, batch=2, max_length=40)
    parts = [model(x[:, :9], cache=cache)] + [model(x[:, t : t + 1], cache=cache) for t in range(9, 33)]
    assert rel_error(torch.cat(parts, 1), whole) < 1e-10


def test_turned_keys():
    "Turning on is rotating the key, as it was before, to the group's last position."
    k, rope, g = torch.randn(1, 2, 11, 8, dtype=torch.float64), Rope(8), 4
    at = torch.arange(11)
    end = torch.where(at < 8, at // g * g + g - 1, at)[None]
    rotated, want = (rotate(k, *rope.tables(p)) for p in (at[None], end))
    assert rel_error(turned_on(rotated, g, rope.frequencies), want) < 1e-6


def test_pre_and_post_differ_only_where_cores_are_seen():
    model, x = tiny_model(depth=1), torch.randint(17, (1, 20), device=device_under_test())
    outs = []
    for how in ("post", "pre"):
        swap_attention(model, 4, 6, rope_pool=how)
        outs.append(model(x))
    assert torch.equal(outs[0][:, :9], outs[1][:, :9]) and rel_error(outs[0][:, 9:], outs[1][:, 9:]) > 1e-4


def test_layer():
    torch.manual_seed(0)
    layer = CCAAttention(32, 4, 2, group_size=4, window_size=6).double()
    x = torch.randn(2, 25, 32, dtype=torch.float64)
    assert layer(x).shape == x.shape
    assert count_parameters(layer) == 2 * 32 * 32 + 2 * 32 * 16 == count_parameters(tiny_model().blocks[0].attention)
    theirs = tiny_model().cpu().blocks[0].attention
    mine = CCAAttention.from_attention(theirs, 4, 99)
    rope = Rope(8)
    call = dict(mask=None, segments=None, positions=None, cache=None, rope=rope)
    want = theirs(x, rope.tables(torch.arange(25)[None]), call)
    assert rel_error(mine(x), want) < 1e-12
    for bad in (nn.Linear(3, 3), nn.MultiheadAttention(8, 2)):
        with pytest.raises(TypeError, match="projections"):
            CCAAttention.from_attention(bad)
    check_raises(
        CCAAttention,
        [
            (dict(num_heads=5), ValueError, "heads"),
            (dict(num_kv_heads=3), ValueError, "kv_heads"),
            (dict(group_size=0), ValueError, "group_size"),
            (dict(rope_pool="none"), ValueError, "rope_pool"),
            (dict(bias=1), TypeError, "bias"),
        ],
        dim=32,
        num_heads=4,
    )


def test_layer_survives_copying_and_bfloat16():
    layer = CCAAttention(16, 2, group_size=4, window_size=6, rope_theta=None)
    again = copy.deepcopy(layer)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(1, 19, 16)
    assert torch.equal(again(x), layer(x)) and "CoreContextAttention(4, 6" in repr(layer)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_socket_refuses():
    model = tiny_model()
    attend, x = swap_attention(model, 4, 6), torch.randint(17, (2, 9), device=device_under_test())
    mask = torch.ones(2, 9, dtype=torch.bool, device=x.device)
    mask[0, 0] = False
    with pytest.raises(ValueError, match="mask"):
        model(x, mask=mask)
    with pytest.raises(TypeError, match="CCACache"):
        model(x, cache=model.make_cache())
    q = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match="causal"):
        attend(q, q, q, causal=False)


def test_in_transformers():
    pytest.importorskip("transformers")
    try:
        llama = importlib.import_module("transformers.models.llama")
        of = lambda n: getattr(llama, n)
        sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        torch.manual_seed(0)
        config = of("LlamaConfig")(**sizes, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5)
        model = of("LlamaForCausalLM")(config).eval()
    except RuntimeError as e:  # torchvision for another torch
        pytest.skip(str(e))
    x = torch.randint(50, (2, 30))
    with torch.no_grad():
        run = lambda how, **kw: (model.set_attn_implementation(how), model(x, use_cache=False, **kw).logits)[1]
        full = run("sdpa")
        assert torch.allclose(run(register_transformers("cca_wide", 4, 64)), full, atol=1e-4)
        out = run(register_transformers("cca_4_8", 4, 8))
        assert torch.allclose(out[:, :11], full[:, :11], atol=1e-4) and not torch.allclose(out[:, 12:], full[:, 12:])
        padded = torch.ones_like(x)
        padded[0, :3] = 0
        with pytest.raises(ValueError, match="attention_mask"):
            run("cca_4_8", attention_mask=padded)
        with pytest.raises(ValueError, match="use_cache"):
            cache = model(x[:, :9], use_cache=True).past_key_values
            model(x[:, 9:10], past_key_values=cache)


def test_windows():
    i = draw(L=20, dtype=torch.float32)
    t = torch.arange(20)
    near = (t[:, None] - t >= 0) & (t[:, None] - t < 5)
    assert rel_error(WindowAttention(5)(**i), attention_reference(*i.values(), mask=near.to(i["q"].device))) < 1e-5
    seen = near | (t < 2) & (t[:, None] >= t)
    assert rel_error(WindowAttention(5, 2)(**i), attention_reference(*i.values(), mask=seen.to(i["q"].device))) < 1e-5
    assert rel_error(WindowAttention(5, 2)(**i), WindowAttention(5)(**i)) > 1e-2


@pytest.mark.parametrize("L, g, s", [(256, 16, 16), (2048, 16, 128), (48, 4, 8)], ids=str)
def test_a_wide_window_costs_as_much(L, g, s):
    w = equal_window(L, g, s)
    pairs = sum(min(t + 1, w) for t in range(L))
    assert s < w < L and abs(pairs / cca_visible_pairs(L, g, s) - 1) < 0.02


def test_methods_are_what_they_are_called():
    kinds = {m: attention_of(m, 4, 8, 64) for m in METHODS}
    assert all(kinds[p].pool == p for p in ("cca", "mean", "max", "last"))
    assert kinds["cca"].core_bias is None and kinds["cca + log g"].core_bias == math.log(4)
    assert kinds["cca, pre"].rope_pool == "pre" and kinds["cca"].rope_pool == "post"
    assert (kinds["window"].window_size, kinds["window"].sinks) == (11, 0) and kinds["sinks + window"].sinks == 4
    other = attention_of("cca 16 + log g", 4, 8, 64)
    assert other.group_size == 16 and other.core_bias == math.log(16) and other.window_size == 8
    with pytest.raises(ValueError, match="method"):
        attention_of("ccc", 4, 8, 64)


def test_distances():
    cfg = dict(batch=6, length=40, pairs=4, vocab=20)
    x, y = recall_batch(cfg, 3)
    far, asked = asked_distance(x, y, 4), 0
    for b in range(6):
        known = {int(x[b, 2 * i]): (2 * i, int(x[b, 2 * i + 1])) for i in range(4)}
        for t in range(40):
            if y[b, t] >= 0:
                place, value = known[int(x[b, t])]
                assert int(far[b, t]) == t - place and int(y[b, t]) == value
                asked += 1
    assert asked and int((far > 0).sum()) == asked


def test_lessons_are_the_presets():
    cfg = dict(batch=3, length=40, pairs=4, vocab=20, lessons=((2, 10, 2), (3, 40, 4)))
    lessons = lessons_of(cfg, 7)
    assert [tuple(lessons(i)[0].shape) for i in range(6)] == [(3, 10)] * 2 + [(3, 40)] * 4 and len(lessons) == 5
    assert torch.equal(lessons(2)[0], recall_batch(cfg, 9)[0]) and not torch.equal(lessons(2)[0], lessons(3)[0])
    for p in ("smoke", "gpu"):
        sizes = PRESETS[p]["recall"]
        assert sizes["lessons"][-1][1:] == (sizes["length"], sizes["pairs"]) and sizes["depth"] <= 2
        # with more layers an answer could be read off an earlier question


class _Knows(nn.Module):
    "Answers rightly what stands at most so far back."

    def __init__(self, reach, cfg):
        super().__init__()
        self.reach, self.cfg = reach, cfg

    def forward(self, x):
        keys, values = x[:, : 2 * self.cfg["pairs"] : 2], x[:, 1 : 2 * self.cfg["pairs"] : 2]
        same = x[:, :, None] == keys[:, None]
        answer = values.gather(1, same.float().argmax(-1))
        near = torch.arange(x.shape[1]) - 2 * same.float().argmax(-1) <= self.reach
        return F.one_hot(torch.where(near, answer, 0), self.cfg["vocab"]).float()


def test_recall_is_counted_by_distance():
    cfg = dict(batch=64, length=40, pairs=4, vocab=20, tests=2)
    rows = recall_rows(_Knows(20, cfg), cfg, 0, "cpu")
    assert [r["upto"] for r in rows][-1] == 40
    assert all(r["right"] == (r["upto"] <= 20) for r in rows) and all(r["asked"] > 0 for r in rows)


def test_runs_record_what_they_measure():
    rows = list(run_text("smoke")) + list(run_recall("smoke"))
    cfg = PRESETS["smoke"]["text"]
    switch = {(r["method"], r["tuned"]): r for r in rows if r["name"] == "switch"}
    assert len(switch) == len(cfg["methods"]) * 2
    assert switch["full", 0]["near"] == pytest.approx(switch["cca", 0]["near"], rel=1e-5)  # nothing is pooled there
    assert switch["full", 0]["bits"] != switch["cca", 0]["bits"]
    assert switch["full", 2]["bits"] != switch["full", 0]["bits"]
    grid = [r for r in rows if r["name"] == "grid"]
    assert len(grid) == 4 and all(0 < r["share"] < 1 for r in grid)
    assert {r["method"] for r in rows if r["name"] == "pairs"} == set(PRESETS["smoke"]["recall"]["methods"])
    (lessons,) = (r for r in rows if r["name"] == "lessons")
    assert lessons["curve"][-1][0] == 2 and 0 <= lessons["curve"][-1][1] <= 1
    assert all(r["recipe"] == RECIPE and "recipe" in r["key"] for r in rows if r["name"] in ("switch", "grid"))


GOOD_PART_BAD = {  # claim -> measurements that hold, hold in part, do not hold; None where there is no such verdict
    "At 128K tokens": (0.93, None, 0.9),
    "Complexity": (1.0, 1.4, 1.9),
    "Attention is faster": (4.0, 3.9, 0.9),
    "The same at 128K": (6.0, 5.9, 0.9),
    "The same backward": ({"32768": 3.0, "131072": 9.0}, {"32768": 2.9, "131072": 9.0}, {"32768": 9.0, "131072": 0.9}),
    "It is faster at every": ({"a": 1.0, "b": 9.0}, {"a": 0.9, "b": 9.0}, {"a": 0.7, "b": 9.0}),
    "It is faster than Flex": ({"a": 1.0}, {"a": 0.95}, {"a": 0.8}),
    "A step of decoding": ({"a": 2.0}, {"a": 1.5}, {"a": 0.9}),
    "After a short": (0.5, 0.2, 0.05),
    "Group and window": (0.01, 0.02, 0.05),
}
PAIRED = ("It beats a window", "and a window", "Weights by", "and max", "Distant answers", "Adding log g")


def _verdict(claim, measured):
    (rule,) = (c.rule for c in claims() if c.statement.startswith(claim))
    found = rule(measured)
    return found if isinstance(found, str) else found[0]


@pytest.mark.parametrize("claim", GOOD_PART_BAD)
def test_rules(claim):
    names = "holds", "holds in part", "does not hold here"
    for name, found in zip(names, GOOD_PART_BAD[claim]):
        assert found is None or _verdict(claim, found) == name


@pytest.mark.parametrize("claim", PAIRED)
def test_paired_rules(claim):
    d = [
        paired({i: m + e for i, e in enumerate((-0.01, 0.0, 0.01))}, dict.fromkeys(range(3), 0.0))
        for m in (0.5, 0.0, -0.5)
    ]
    assert [_verdict(claim, x) for x in d] == ["holds", "not measured", "does not hold here"]


def _recorded(monkeypatch, **tables):
    "Makes the study read these rows (name -> rows) as if they were recorded."

    def read(chapter, name=None, **where):
        rows = [dict(device="G", date="2026-01-01", training="gpu", run=0) | r for r in tables.get(name, [])]
        return [r for r in rows if all(r.get(k) == v for k, v in where.items())]

    monkeypatch.setitem(gpu_rows.__globals__, "load_results", read)


def test_text_is_looked_up(monkeypatch):
    row = lambda method, run, x, tuned=100, **more: (
        dict(method=method, run=run, last_half=x, bits=9.0, tuned=tuned) | more
    )
    kinds = (("window", 2.0), ("cca", 1.2), ("full", 1.0))
    switch = [row(m, i, x + i / 100, tuned=n) for m, x in kinds for i in range(3) for n in (0, 100) if m != "cca" or n]
    near = [r if r["method"] == "full" or r["tuned"] else r | dict(last_half=1.04) for r in switch]
    _recorded(monkeypatch, switch=near)  # the control: a model to which a window is hardly a loss
    assert looks_far() == set() and gap_closed() is None and worse_by("window", "cca") is None
    switch += [row("cca", 0, 7.0, tuned=0), row("cca", 9, 8.0, training="cpu")]
    _recorded(monkeypatch, switch=switch)
    assert looks_far() == {0, 1, 2}
    assert gap_closed() == pytest.approx(0.8)
    d = worse_by("window", "cca")
    assert d.mean == pytest.approx(0.8)
    assert worse_by("window", "cca", 0) is None and worse_by("mean", "cca") is None
    assert last_half("cca", 0) == {0: 7.0}


def test_recall_and_grid_are_looked_up(monkeypatch):
    row = lambda m, run, upto, x, tuned=5: dict(method=m, run=run, upto=upto, right=x, tuned=tuned)
    recall = [row("cca 4", i, 256, 0.75) for i in range(2)] + [row("sinks + window", i, 256, 0.25) for i in range(2)]
    recall += [row("cca 4", 0, 64, 0.1), row("cca 4", 0, 256, 0.0, tuned=0)]
    grid = [dict(g=g, s=128, bits=b) for g, b in ((8, 1.99), (16, 2.0), (32, 2.1), (64, 3.0))] + [
        dict(g=8, s=32, bits=9.0)
    ]
    ceiling = lambda x: [row("full", i, 256, x) for i in range(2)]
    _recorded(monkeypatch, pairs=recall + ceiling(0.95), grid=grid)
    assert recall_gain("cca 4", "sinks + window").mean == pytest.approx(0.5)
    assert recall_gain("cca 4", "cca 64") is None and grid_change() == pytest.approx(0.05)
    _recorded(monkeypatch, pairs=recall + ceiling(0.55))  # what was not learnt cannot be kept
    assert recall_gain("cca 4", "sinks + window") is None


def test_speed_is_looked_up(monkeypatch):
    row = lambda m, L, fwd, bwd: dict(method=m, L=L, ms_fwd=fwd, ms_bwd=bwd)
    prefill = [row("ours", 32768, 1.0, 2.0), row("cudnn, full", 32768, 5.0, 8.0), row("flash, full", 32768, 4.5, 9.0)]
    prefill += [row("flex", 32768, 0.5, 0.5), row("ours", 4096, 1.0, 1.0), row("flash, full", 4096, 0.5, None)]
    prefill += [row("cudnn, full", 4096, None, None)]
    decode = [
        dict(method="ours", L=9, ms=1.0),
        dict(method="sdpa, full", L=9, ms=3.0),
        dict(method="sdpa, window", L=9, ms=0.1),
    ]
    _recorded(monkeypatch, prefill=prefill, decode=decode, flex=[row("ours", 9, 1.0, 2.0), row("flex", 9, 3.0, 2.2)])
    assert flex_speedup() == pytest.approx(dict(forward=3.0, backward=1.1))
    assert list(full_speedup("ms_fwd", 32768).values()) == [4.5] and sorted(full_speedup("ms_fwd").values()) == [
        0.5,
        4.5,
    ]
    assert list(full_speedup("ms_bwd", 32768).values()) == [4.0] and list(decode_speedup().values()) == [3.0]
    found = {c.statement[:18]: c.judge().verdict for c in claims()}
    assert found["Attention is faste"] == "holds" and found["The same backward,"] == "not measured"  # 128K is missing
    assert found["The same at 128K t"] == "not measured" and found["It is faster at ev"] == "does not hold here"
    prefill += [row("ours", 131072, 1.0, 2.0), row("flash, full", 131072, 9.0, 9.0)]
    _recorded(monkeypatch, prefill=[r for r in prefill if r["L"] > 4096])
    found = {c.statement[:18]: c.judge().verdict for c in claims()}
    assert found["The same backward,"] == "holds" and found["It is faster at ev"] == "not measured"
    assert speedup_at_all("ms_fwd", (32768, 131072)) == pytest.approx({"L=32768": 4.5, "L=131072": 9.0})


def test_bits_before_the_first_core_and_of_the_last_half(monkeypatch):
    "Of 20 positions with 0, 1, 2, … bits; the first core is seen after the window and all but one of a group."
    found = type("Bits", (), dict(total=9.5, by_position=torch.arange(20.0)))
    monkeypatch.setitem(measured.__globals__, "bits_per_byte", lambda model, windows, batch_size: found)
    assert measured(None, None, dict(s=5, g=4), "cpu") == dict(bits=9.5, near=3.5, last_half=14.5)


def test_nothing_recorded_is_not_measured(monkeypatch):
    _recorded(monkeypatch)
    verdicts = [c.judge().verdict for c in claims()]
    assert verdicts == ["holds", "does not hold here"] + ["not measured"] * 14 + ["out of reach here"]
