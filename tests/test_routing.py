# Written from the test cells of nbs/4_long_context/routing.ipynb by `attnbook export`. Do not edit.
# fmt: off
import copy
import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from attnbook.attention import attention_reference
from attnbook.lab.results import load_results
from attnbook.lab.stats import t_quantile
from attnbook.lab.testing import (
    check_against_reference,
    check_opcheck,
    check_operation,
    check_raises,
    make_qkv,
    rel_error,
)
from attnbook.lab.testing import device as device_under_test
from attnbook.layers import count_parameters
from attnbook.lm.tasks import asked_distance
from attnbook.routing.kmeans_nets import OnlineKMeans
from attnbook.routing.language_nets import RoutingTransformerLM, parameter_counts, routing_model
from attnbook.routing.language_study import (
    attention_maps,
    bits_per_byte,
    cluster_health,
    divergence,
    head_rows,
    language_experiment,
    language_model,
    mutual_information,
    run_language,
    timed_steps,
    train_for,
)
from attnbook.routing.leak_study import gain_on_the_bound, leak_summary, uniform_tokens
from attnbook.routing.membership_op import (
    cluster_sums,
    cluster_sums_op,
    nearest_membership,
    route_nearest_op,
    route_scores,
    route_scores_op,
    spherical_norm,
    spherical_norm_op,
    topw_membership,
)
from attnbook.routing.nets import MEMBERSHIPS, Router, RoutingAttention, RoutingSelfAttention
from attnbook.routing.op import routed_attention
from attnbook.routing.presets_study import _ALL, PRESETS, VARIANTS
from attnbook.routing.recall_study import recall_batch, recall_experiment, route
from attnbook.routing.records_study import (
    all_break_evens,
    all_speeds,
    break_even,
    fitted_exponents,
    gpu_name,
    gpu_rows,
    group_speed,
    head_divergence,
    language_difference,
    language_gain,
    recall_far,
    step_speed,
    total_speed,
)
from attnbook.routing.reference import (
    Segments,
    routed_attention_reference,
    routing_cost,
    segment_lists,
    sort_by_cluster,
    spherical_norm_reference,
)
from attnbook.routing.study import language_claims, leak_claims, least_bytes, run_models, speed_claims, trained_heads

GPU, BACKENDS = device_under_test() == "cuda", ("torch", "triton")


def _clusters(B, H, n, k, w, seed=0, separate=False):
    "Random lists like those of top-w."
    g = torch.Generator().manual_seed(seed)
    lists = [torch.rand(B, H, k, n, generator=g).argsort(-1)[..., :w].sort(-1).values for _ in range(2)]
    lists = [x.int().to(device_under_test()) for x in lists]
    return lists if separate else lists[:1] * 2


def _segments(B, H, n, k, seed=0, skew=1.0):
    "Segments of random assignments; with `skew` above 1 some are large and some empty."
    g = torch.Generator().manual_seed(seed)
    a = (torch.rand(B, H, n, generator=g) ** skew * k).long().clamp(max=k - 1)
    return sort_by_cluster(a.to(device_under_test()), k)


def _oracle(a, b, **kw):
    a, b = (segment_lists(x) if isinstance(x, Segments) else x for x in (a, b))
    return lambda q, k, v: routed_attention_reference(q, k, v, a, b, **kw)


def test_cost_counts_the_pairs():
    lists = _clusters(1, 1, 40, 5, 8)[0]
    pairs = int((lists[..., :, None] >= lists[..., None, :]).sum())
    cost = routing_cost(40, 5, 8, 16)
    assert cost["pairs"] == pairs and cost["attend"] == 4 * 16 * pairs and cost["assign"] == 2 * 40 * 5 * 16
    assert routing_cost(40, 5, 8, 16, causal=False)["attend"] == 4 * (5 * 8) * 8 * 16  # 4 n w d


@pytest.mark.parametrize("d", [16, 20])
def test_norm(d):
    x = make_qkv(2, 2, 19, d)[0]
    check_operation(
        partial(spherical_norm, backend="triton"),
        spherical_norm_reference,
        (x,),
        dtypes=(torch.float32, torch.bfloat16),
        skip=("autocast",),
    )
    check_opcheck(spherical_norm_op, (x.requires_grad_(), 1e-6))


def test_norm_forgets_shift_and_scale():
    x = make_qkv(1, 2, 9, 24, dtype=torch.float64, requires_grad=True)[0]
    y = spherical_norm(x, eps=0.0)
    moved = spherical_norm(3 * x + torch.linspace(-2, 2, 9, device=x.device)[:, None], eps=0.0)
    assert rel_error(moved, y) < 1e-10
    (dx,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), x)
    assert (dx.sum(-1).abs() < 1e-10).all() and ((dx * (x - x.mean(-1, keepdim=True))).sum(-1).abs() < 1e-10).all()
    assert (spherical_norm(torch.ones(1, 1, 2, 8)) == 0).all()


ROUTES = [(1, 1, 16, False), (70, 5, 16, True), (40, 18, 24, False)]  # tokens, clusters, head_dim, with padding


@pytest.mark.parametrize("n, k, d, masked", ROUTES)
def test_assignment_kernels(n, k, d, masked):
    B = 1 + masked
    x = spherical_norm(make_qkv(B, 2, n, d)[0])
    mu = spherical_norm(make_qkv(1, 2, k, d, seed=3)[0])[0]
    mask = torch.rand(B, n, generator=torch.Generator().manual_seed(1)).to(x.device) > 0.2 if masked else None
    want, got = (nearest_membership(x, mu, mask, backend=z) for z in ("torch", "triton"))
    r, s = (route_scores(x, mu, backend=z) for z in ("torch", "triton"))
    assert all(torch.equal(a, b) for a, b in zip(want, got)) and rel_error(s, r) < 1e-5
    assert (got.offsets.diff(dim=-1) >= 0).all() and (got.offsets[..., -1] == n).all()
    a, b = (topw_membership(r[:, :, :5], 4, mask, backend=z) for z in ("torch", "triton"))
    assert torch.equal(a, b) and a.shape == (B, 2, min(k, 5), min(4, n))


ROUTED = {  # membership of queries and of keys, arguments
    "lists": (*_clusters(1, 2, 21, 5, 6), dict(causal=True)),
    "two lists": (*_clusters(1, 2, 21, 5, 6, separate=True), dict(causal=False)),
    "lists, fallback": (*_clusters(1, 2, 21, 4, 9), dict(causal=True, self_attention="fallback", scale=0.3)),
    "segments": (*[_segments(1, 2, 21, 5)] * 2, dict(causal=True)),
    "two sides": (_segments(1, 2, 21, 4), _segments(1, 2, 21, 4, seed=1), dict(causal=True)),
    "segments, window, fallback": (
        *[_segments(1, 2, 21, 3, skew=2.0)] * 2,
        dict(causal=True, self_attention="fallback", window=3),
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("a, b, kw", ROUTED.values(), ids=ROUTED)
def test_routed_attention_is_the_loops(a, b, kw, backend):
    op = partial(routed_attention, membership=a if a is b else (a, b), backend=backend, **kw)
    check_against_reference(
        op, _oracle(a, b, **kw), dict(zip("qkv", make_qkv(1, 2, 21, 16, Dv=9))), tol=2e-5, floor=0.1
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_one_cluster_is_full_attention(causal, backend):
    q, k, v = (spherical_norm(t) if i < 2 else t for i, t in enumerate(make_qkv(2, 2, 23, 16)))
    everything = topw_membership(route_scores(q, q[0, :, :1]), 23)
    assert torch.equal(everything[0, 0, 0].cpu(), torch.arange(23).int())
    alone = sort_by_cluster(torch.zeros(2, 2, 23, dtype=torch.long, device=q.device), 1)
    for m in (everything, alone):
        want = attention_reference(q, k, v, is_causal=causal)
        assert rel_error(routed_attention(q, k, v, m, causal=causal, backend=backend), want) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_uncovered_and_doubled_tokens(backend):
    q, k, v = make_qkv(1, 1, 20, 16, requires_grad=True)
    m = torch.tensor([[[[0, 3, 5, 9], [3, 5, 7, 12], [3, 9, 12, 19]]]], dtype=torch.int32, device=q.device)
    covered = torch.zeros(20, dtype=torch.bool, device=q.device)
    covered[m.flatten().long()] = True
    out = routed_attention(q, k, v, m, causal=True, backend=backend)
    dq, dv = torch.autograd.grad(out.sum(), (q, v))
    assert all((t[0, 0, ~covered] == 0).all() for t in (out, dq, dv))
    assert all((t[0, 0, 19] != 0).any() for t in (out, dv))
    single = [routed_attention(q, k, v, m[:, :, c : c + 1], causal=True, backend=backend)[0, 0, 3] for c in range(3)]
    assert rel_error(out[0, 0, 3], sum(single) / 3) < 1e-5  # token 3 sits in three clusters: the mean


@pytest.mark.parametrize("backend", BACKENDS)
def test_last_resort(backend):
    q, k, v = make_qkv(1, 1, 12, 16)
    m = sort_by_cluster(torch.tensor([[[0, 1, 1, 2, 1, 2, 1, 1, 1, 2, 1, 1]]], device=q.device), 3)
    out = routed_attention(q, k, v, m, causal=True, self_attention="fallback", backend=backend)[0, 0]
    for first in (0, 1, 3):
        assert rel_error(out[first], v[0, 0, first]) < 1e-5  # alone: itself
    assert rel_error(out[2], v[0, 0, 1]) < 1e-5 and rel_error(out[5], v[0, 0, 3]) < 1e-5  # the only other one


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding(backend):
    q, _, v = make_qkv(2, 2, 26, 16)
    mask, kw = torch.ones(2, 26, dtype=torch.bool, device=q.device), dict(causal=True, backend=backend)
    mask[1, 20:] = False
    mu = spherical_norm(make_qkv(1, 2, 3, 16, seed=1)[0])[0]
    short = [t[1:, :, :20] for t in (q, q, v)]
    near, cut = nearest_membership(q, mu, mask), nearest_membership(short[0], mu)
    a, b = routed_attention(q, q, v, near, **kw), routed_attention(*short, cut, **kw)
    assert rel_error(a[1:, :, :20], b) < 1e-5
    top = topw_membership(route_scores(q, mu), 22, mask)
    assert (top[1] < 20).all() and (top[1] == -1).any()
    out = routed_attention(q, q, v, top, padded=True, **kw)
    assert (out[1, :, 20:] == 0).all() and rel_error(
        out[1:, :, :20], attention_reference(*short, is_causal=True)
    ) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["lists", "segments"])
def test_integers_of_any_type(kind, backend):
    (q, k, v), s = make_qkv(1, 2, 19, 16), _segments(1, 2, 19, 3)
    m, wide = (
        (s, Segments(*(t.long() for t in s)))
        if kind == "segments"
        else (s.order[:, :, None], s.order[:, :, None].long())
    )
    a, b = (routed_attention(q, k, v, x, causal=True, backend=backend) for x in (m, wide))
    assert torch.equal(a, b)
    if kind == "segments":
        a, b = (routed_attention(q, k, v, s, causal=True, window=w, backend=backend) for w in (3, np.int64(3)))
        assert torch.equal(a, b) and topw_membership(q[:, :, :2], np.int64(2), backend=backend).shape == (1, 2, 2, 2)


def test_the_operations_of_the_library():
    x, mu = spherical_norm(make_qkv(1, 1, 12, 16)[0]), spherical_norm(make_qkv(1, 1, 3, 16, seed=1)[0])[0]
    check_opcheck(route_nearest_op, (x, mu, None))
    check_opcheck(route_scores_op, (x, mu))
    s = nearest_membership(x, mu)
    check_opcheck(cluster_sums_op, (x, s.order, s.offsets))


def test_routing_errors():
    q, k, v = make_qkv(1, 2, 12, 16)
    s, top = _segments(1, 2, 12, 3), _clusters(1, 2, 12, 3, 4)[0]
    bad = [
        (dict(membership=top.float()), TypeError, ["membership", "float32"]),
        (dict(membership=[1, 2, 3]), ValueError, ["membership", "3"]),
        (dict(membership="topw"), TypeError, ["membership", "str"]),
        (dict(membership=top[:, :1]), ValueError, ["membership", "1, 2"]),
        (dict(membership=_segments(1, 2, 11, 3)), ValueError, ["membership", "12", "11"]),
        (dict(membership=(s, top)), ValueError, ["one kind"]),
        (dict(membership=(s, _segments(1, 2, 12, 4))), ValueError, ["3", "4"]),
        (dict(k=k[:, :1], v=v[:, :1]), ValueError, ["heads", "2", "1"]),
        (dict(self_attention="no"), ValueError, ["self_attention", "no"]),
        (dict(scale=math.nan), ValueError, ["scale", "nan"]),
        (dict(scale="1"), TypeError, ["scale", "1"]),
        (dict(window=0), ValueError, ["window", "0"]),
        (dict(window=2.0), TypeError, ["window", "2.0"]),
        (dict(membership=top, window=3), ValueError, ["window", "Segments"]),
        (dict(causal=False, window=3), ValueError, ["window", "causal"]),
        (dict(backend="cuda"), ValueError, ["backend", "cuda"]),
    ]
    short = (dict(membership=s._replace(offsets=s.offsets - 1)), ValueError, ["offsets", "12", "11"])
    check_raises(routed_attention, bad + [short] * (not GPU), q=q, k=k, v=v, membership=s, causal=True)


def test_membership_errors():
    q = make_qkv(1, 2, 12, 16)[0]
    bad = [
        (dict(window=0), ValueError, ["window", "0"]),
        (dict(window=2.0), TypeError, ["window", "2.0"]),
        (dict(scores=q[0]), ValueError, ["scores"]),
    ]
    check_raises(topw_membership, bad, scores=q, window=2)
    bad = [
        (dict(centroids=q[0, :1]), ValueError, ["centroids", "2"]),
        (dict(centroids=q[0, :, :0]), ValueError, ["num_clusters", "1"]),
        (dict(mask=q[..., 0] > 0), ValueError, ["mask"]),
        (dict(x=q.int()), TypeError, ["x", "int32"]),
    ]
    check_raises(nearest_membership, bad, x=q, centroids=q[0, :, :3])
    bad = [(dict(x=q.int()), TypeError, ["x", "int32"]), (dict(backend="triton", x=q[0]), ValueError, ["x"])]
    check_raises(spherical_norm, bad, x=q)


def _kmeans(**kw):
    torch.manual_seed(0)
    return OnlineKMeans(2, 3, 16, **kw).to(device_under_test())


def _one_step(m, x):
    "A step of the averages with tokens x, and where these went."
    s = m.assign(x)
    m.update(*m.statistics((x, s)))
    return s.assignment


@pytest.mark.parametrize("decay", [1.0, 0.0])
def test_moving_averages(decay):
    x, m = spherical_norm(make_qkv(2, 2, 40, 16, requires_grad=True)[0]), _kmeans(decay=decay, renormalise=decay == 1)
    before, s = m.centroids.clone(), m.assign(x)
    assert torch.equal(m.centroids, before) and not any(t.requires_grad for t in (*m.buffers(), *s))
    at = _one_step(m, x)
    assert m.centroids.isfinite().all() and m.centroids.grad_fn is None and not list(m.parameters())
    for h, c in product(range(2), range(3)):  # decay 1: frozen; 0: the means of the batch
        assert rel_error(m.centroids[h, c], before[h, c] if decay else x[:, h][at[:, h] == c].mean(0)) < 1e-4


def test_sums_by_both_backends():
    x, m = spherical_norm(make_qkv(2, 2, 45, 16)[0]), _kmeans()
    mask = torch.arange(45, device=x.device).expand(2, -1) < 31
    for s in (m.assign(x), m.assign(x, mask)):
        (a, n), (b, _) = (cluster_sums(x, s, backend=z) for z in ("torch", "triton"))
        assert rel_error(b, a) < 1e-5 and int(n.sum()) == 2 * 2 * 45
    sums, counts = m.statistics((x, s))
    assert int(counts.sum()) == 2 * 2 * 31 and rel_error(sums.sum(1), x[:, :, :31].sum((0, 2))) < 1e-4
    both = m.statistics((x, s), (x, s))
    assert rel_error(both[0], 2 * sums) < 1e-6 and torch.equal(both[1], 2 * counts)


def test_separated_clusters_are_found():
    g = torch.Generator().manual_seed(0)
    centres = spherical_norm_reference(torch.randn(1, 1, 3, 16, generator=g))
    label = torch.randint(3, (200,), generator=g)
    x = spherical_norm_reference(centres[:, :, label] + 0.05 * torch.randn(1, 1, 200, 16, generator=g))
    torch.manual_seed(4)
    m, x = OnlineKMeans(1, 3, 16, decay=0.9).to(device_under_test()), x.to(device_under_test())
    for _ in range(60):
        found = _one_step(m, x)[0, 0].cpu()
    assert len({(int(a), int(b)) for a, b in zip(label, found)}) == 3  # one to one: mutual information is full
    assert ((m.centroids.norm(dim=-1) - 4).abs() < 1e-3).all()


def test_empty_cluster_and_official_start():
    m = _kmeans(decay=0.0)
    before = m.centroids.clone()
    _one_step(m, before[None, :, :1].expand(1, 2, 9, 16).contiguous())  # everybody at centroid 0
    assert torch.equal(m.centroids[:, 1:], before[:, 1:]) and m.centroids.isfinite().all()
    official = _kmeans(renormalise=False, initial_count=0.0)
    _one_step(official, spherical_norm(make_qkv(2, 2, 40, 16)[0]))
    assert official.centroids.norm(dim=-1).median() > 10 * 4  # the jump of the official code


@pytest.mark.parametrize("revive", [None, 0.1, 0.0])
def test_dead_centroids_are_revived(revive):
    "Tokens stand round one point, far from centroids 1 and 2: only revived ones ever meet a token."
    m = _kmeans(decay=0.5, revive=revive)
    near = m.centroids[None, :, :1] + 0.1 * torch.randn(4, 2, 9, 16, generator=torch.Generator().manual_seed(1)).to(
        m.centroids.device
    )
    x = spherical_norm(near.contiguous())
    before = m.centroids.clone()
    found = m.statistics((x, m.assign(x)))
    assert len(found) == (2 if revive is None else 3)
    for _ in range(12):  # N of a dead cluster halves every time, the mean tends to 12
        m.update(*m.statistics((x, m.assign(x))))
    moved = (m.centroids[:, 1:] - before[:, 1:]).norm(dim=-1) > 0.1
    assert bool(moved.all()) == bool(revive) and bool(moved.any()) == bool(revive)
    if revive:
        assert ((m.centroids[:, 1:] @ x.transpose(-1, -2)).amax(-1) > 15).all()  # on a token, of norm 4
        assert (m.assign(x).offsets.diff(dim=-1).float().sum(0).amin(-1) > 0).all()  # all have tokens now
        old = m.counts.clone()
        m.counts[:, 2], fresh = 0.01, found[2]
        total, parts = m.counts.mean(-1), m.sums.clone()
        m._revive(fresh)
        assert torch.equal(m.counts[:, 2], total) and torch.equal(m.counts[:, :2], old[:, :2])
        assert torch.equal(m.centroids[:, 2], fresh[:, 2]) and torch.equal(m.sums[:, :2], parts[:, :2])
        assert rel_error(m.sums[:, 2], fresh[:, 2] * total[:, None]) < 1e-6


def test_random_tokens_are_of_the_own_head():
    x, m = spherical_norm(make_qkv(2, 2, 40, 16)[0]), _kmeans(revive=0.5)
    fresh = m.statistics((x, m.assign(x)))[2]
    assert fresh.shape == (2, 3, 16) and fresh.dtype == torch.float32
    for h in range(2):
        assert all(any(torch.equal(f, t) for t in x[:, h].flatten(0, 1)) for f in fresh[h])
    mask = torch.arange(40, device=x.device).expand(2, -1) < torch.tensor([[3], [5]], device=x.device)
    padded = torch.where(mask[:, None, :, None], x, 7.0)  # one token of them would be seen
    for _ in range(5):
        assert (m.statistics((padded, m.assign(padded, mask)))[2] != 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_averages_move_in_any_type(dtype):
    m = _kmeans().to(dtype)
    assert all(t.dtype == torch.promote_types(dtype, torch.float32) for t in m.buffers())
    for _ in range(300):
        m.update(torch.ones(2, 3, 16, device=m.counts.device), torch.tensor([[64.0, 0, 1]] * 2, device=m.counts.device))
    want = 0.999**300 + (1 - 0.999**300) * torch.tensor([64.0, 0, 1])
    assert (m.counts.cpu() - want).abs().max() < 1e-3


@pytest.mark.parametrize("decay", [0.0, 0.999])
def test_a_token_that_is_no_number_moves_nothing(decay):
    x, m = spherical_norm(make_qkv(1, 2, 40, 16)[0]), _kmeans(decay=decay)
    before, bad = [t.clone() for t in m.buffers()], x.clone()
    bad[0, 0, 0, 0] = math.nan
    at = int(_one_step(m, bad)[0, 0, 0])
    assert all(t.isfinite().all() and torch.equal(t[0, at], b[0, at]) for t, b in zip(m.buffers(), before))
    assert not torch.equal(m.centroids[1], before[0][1])  # the other head moved


def test_a_copy_of_its_own():
    class Group:
        "Cannot be copied, as torch's cannot."

        def __deepcopy__(self, memo):
            raise TypeError("a process group is not copied")

    m = _kmeans(process_group=Group())
    n = copy.deepcopy(nn.ModuleList([m, m]))
    assert n[0] is n[1] is not m and n[0].process_group is m.process_group
    assert torch.equal(n[0].counts, m.counts) and n[0].counts.data_ptr() != m.counts.data_ptr()


def test_statistics_of_bfloat16_tokens():
    "The tokens are rounded, the sums and the distance are not: within a hundredth of float32's."
    x, m = spherical_norm(make_qkv(4, 2, 200, 16)[0]), _kmeans(commitment=1.0)
    a, b = m.assign(x), m.assign(x.bfloat16())
    assert float((a.assignment != b.assignment).float().mean()) < 0.02  # halfway between two centroids
    sums, counts = m.statistics((x.bfloat16(), a))
    assert sums.dtype == torch.float32 and torch.equal(counts, m.statistics((x, a))[1])
    assert rel_error(sums, m.statistics((x, a))[0]) < 1e-2
    near = m.centroids[:, :1].expand(-1, 30, -1)[None] + 0.02  # far nearer than a step of bfloat16 at 2
    s = m.assign(near.contiguous())
    want = (near.bfloat16().double() - m.centroids[:, :1].double()).square().mean()
    assert (
        abs(float(m.loss(near.bfloat16(), s)) - float(want)) < 1e-6
        and m.loss(near.bfloat16(), s).dtype == torch.float32
    )


def test_commitment_gradient():
    x = spherical_norm(make_qkv(1, 2, 10, 16, dtype=torch.float64)[0]).requires_grad_()
    m = _kmeans(commitment=0.3).double()
    s = m.assign(x)
    (dx,) = torch.autograd.grad(m.loss(x, s), x)
    mu = torch.stack([m.centroids[h][s.assignment[0, h].long()] for h in range(2)])[None]
    assert rel_error(dx, 2 * 0.3 * (x - mu) / x.numel()) < 1e-12
    assert float(_kmeans(commitment=0.0).double().loss(x.detach(), s)) == 0
    mask = torch.arange(10, device=x.device)[None] < 6
    assert rel_error(m.loss(x, m.assign(x, mask), mask), m.loss(x[:, :, :6], m.assign(x[:, :, :6]))) < 1e-12
    bad = [
        (dict(num_clusters=0), ValueError, ["num_clusters", "0"]),
        (dict(decay=1.5), ValueError, ["decay", "1.5"]),
        (dict(commitment=-1), ValueError, ["commitment"]),
        (dict(head_dim=8.0), TypeError, ["head_dim", "8.0"]),
    ]
    check_raises(OnlineKMeans, bad, num_heads=2, num_clusters=3, head_dim=8)


TWO_PROCESSES = """
import os, sys, torch
from attnbook.routing.kmeans_nets import OnlineKMeans
from attnbook.routing.reference import spherical_norm_reference
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
x = spherical_norm_reference(torch.randn(2, 2, 30, 16, generator=torch.Generator().manual_seed(0)))
def run(x, group, **kw):
    torch.manual_seed(0)
    m = OnlineKMeans(2, 3, 16, decay=0.5, process_group=group, **kw)
    torch.manual_seed(rank)
    m.update(*m.statistics((x, m.assign(x))))
    return m.centroids
difference = (run(x[rank:rank + 1], True) - run(x, None)).abs().max()
assert difference < 1e-5, difference
mine = run(x[rank:rank + 1], True, revive=1.0).contiguous()  # tokens are drawn apart, and must be the first one's
first = mine.clone()
torch.distributed.broadcast(first, 0)
assert torch.equal(mine, first)
torch.distributed.barrier()
os._exit(0)  # in an orderly exit a thread of gloo now and then aborts the process
"""


def test_two_processes_update_as_one():
    with TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen([sys.executable, "-c", TWO_PROCESSES, str(r), folder], stderr=subprocess.PIPE)
            for r in range(2)
        ]
        for r in ranks:
            said = r.communicate(timeout=120)[1]
            assert r.returncode == 0, said.decode()


def _small(membership="nearest", **kw):
    torch.manual_seed(0)
    sizes = dict(dim=32, depth=2, heads=4, local_heads=2, ff_dim=24, local_window=6, num_clusters=3, window=5)
    return RoutingTransformerLM(20, membership=membership, **sizes | kw).to(device_under_test()).eval()


def _tokens(*shape, seed=0):
    return torch.randint(20, shape, generator=torch.Generator().manual_seed(seed)).to(device_under_test())


DECODED = {
    "nearest": {},
    "nearest, fallback": dict(self_attention="fallback"),
    "random": {},
    "full": {},
    "local, fallback": dict(self_attention="fallback"),
    "nearest, no local heads": dict(local_heads=0, absolute=True),
    "nearest, rotary": dict(rotary=True, scale=1.0),
    "full, rotary": dict(rotary=True, self_attention="fallback"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", DECODED)
def test_decoding_equals_the_parallel_forward(name):
    x, model, caches, rows = _tokens(2, 26), _small(name.split(",")[0], **DECODED[name]), None, []
    for t in range(x.shape[1]):
        logits, caches = model.step(x[:, t : t + 1], caches, t)
        rows.append(logits)
    assert (torch.cat(rows, 1) - model(x)[0]).abs().max() < (1e-4 if x.is_cuda else 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("membership", ["nearest", "random", "local", "full"])
def test_no_future_in_the_causal_modes(membership):
    x = _tokens(1, 24)
    y = x.clone()
    y[0, 15] = (y[0, 15] + 1) % 20
    a, b = (_small(membership)(t)[0][0] for t in (x, y))
    assert torch.equal(a[:15], b[:15]) and not torch.equal(a[15], b[15])


def test_topw_leaks():
    "Two centroids, windows of 1: the later token is nearer to the first centroid and pushes the earlier one out."
    mu = torch.zeros(1, 1, 16)
    mu[..., 0], mu[..., 1] = 2, -2
    x = torch.zeros(1, 1, 2, 16)
    x[..., 0, 0], x[..., 0, 1], x[..., 0, 2] = 1, -1, 0.5  # token 0: near
    x, mu = x.to(device_under_test()), mu.to(device_under_test())
    before = topw_membership(route_scores(x[:, :, :1], mu), 1)
    x[..., 1, 0], x[..., 1, 1] = 2, -2  # token 1: nearer
    after = topw_membership(route_scores(x, mu), 1)
    assert before.tolist() == [[[[0]]]] and after.tolist() == [[[[1]]]]
    out = routed_attention(x, x, torch.ones_like(x), after, causal=True)
    assert (out[0, 0, 0] == 0).all()  # token 0 has lost its output


@torch.no_grad()
@pytest.mark.parametrize("dim", [16, 7], ids="head_dim={}".format)
def test_turned_tokens(dim):
    "Norms stay, products depend on the distance alone, and routers turn what they compare, not what they assign."
    x = spherical_norm(make_qkv(1, 2, 1, dim)[0]).expand(-1, -1, 9, -1)
    turn = Router(2, dim, num_clusters=2, window=4, rotary=True).turn
    y, later = turn(x), turn(x, start=5)
    assert rel_error(y.norm(dim=-1), x.norm(dim=-1)) < 1e-5 and torch.equal(y[:, :, 0], x[:, :, 0])
    assert rel_error(later[:, :, :4], y[:, :, 5:]) < 1e-5
    s = y @ y.transpose(-1, -2)
    assert rel_error(s[..., 1:, 1:], s[..., :-1, :-1]) < 1e-4 and (s[..., 0, 0] - s[..., 0, 3]).abs().min() > 1e-3
    for membership in MEMBERSHIPS:
        q, _, v = make_qkv(1, 2, 12, dim)
        torch.manual_seed(0)
        router = Router(2, dim, num_clusters=2, window=4, membership=membership, rotary=True).to(q.device).eval()
        out, plain = router(q, None, v)[0], q.clone()
        router.rotary = False
        assert rel_error(router(q, None, v)[0], out) > 1e-3, membership  # the position counts
        t = spherical_norm(plain)
        if membership in ("topw", "nearest"):
            m = router.members(t)[0]
            router.rotary = True
            want = routed_attention(router.turn(t), router.turn(t), v, m, causal=True)
            assert rel_error(out, want) < 1e-5
            k = make_qkv(1, 2, 12, dim)[1]  # keys of their own
            y = spherical_norm(k)
            want = routed_attention(router.turn(t), router.turn(y), v, (m, router.members(y)[0]), causal=True)
            assert rel_error(router(q, k, v)[0], want) < 1e-5


@torch.no_grad()
def test_features_and_head():
    model, x = _small(emb_dim=8), _tokens(2, 9)
    states, aux = model.forward_features(x)
    assert states.shape == (2, 9, 32) and float(aux) == 0
    assert torch.equal(model.forward_head(states), model(x)[0]) and model(x)[0].shape == (2, 9, 20)
    parts = []  # in training every layer adds its commitment loss
    for block in model.train().blocks:
        block.register_forward_hook(lambda m, args, out: parts.append(float(out[1])))
    _, aux = model.forward_features(x)
    assert len(parts) == 2 and min(parts) > 0 and float(aux) == pytest.approx(sum(parts))


def test_topw_is_not_decoded():
    check_raises(_small("topw").step, [(dict(tokens=_tokens(1, 1)), ValueError, ["topw", "step"])])


@pytest.mark.parametrize("membership", ["topw", "nearest"])
def test_training_moves_centroids_once(membership):
    model, x, y = _small(membership).train(), _tokens(2, 24), _tokens(2, 24, seed=1)
    before = [r.kmeans.centroids.clone() for r in model.routers()]
    model.loss(x, y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(torch.equal(r.kmeans.centroids, b) for r, b in zip(model.routers(), before))  # not by the forward
    first = model.routers()[0]
    sums, counts = first.pending
    model(x)  # as checkpointing would
    assert torch.equal(first.pending[0], sums) and (counts.sum(-1) == 2 * 24).all()
    old = first.kmeans.counts.clone()
    model.update_centroids(), model.update_centroids()
    assert rel_error(first.kmeans.counts, 0.999 * old + 0.001 * counts) < 1e-6
    assert not torch.equal(first.kmeans.centroids, before[0])
    model.eval().loss(x, y)
    assert first.pending is None


@pytest.mark.parametrize("membership", ["topw", "nearest"])
def test_layers_for_encoders_and_padding(membership):
    torch.manual_seed(0)
    x, context = (torch.randn(2, n, 32, device=device_under_test()) for n in (20, 13))
    mask = torch.arange(20, device=x.device).expand(2, -1) < 15
    layer = RoutingAttention(32, 2, num_clusters=3, window=6, membership=membership, causal=False).to(x.device).train()
    out, aux = layer(x, context)
    assert out.shape == x.shape and bool(aux > 0)
    assert int(layer.router.pending[1].sum()) == 2 * 2 * (20 + 13)  # queries and keys
    for more in ((), (context,)):
        out, _ = layer(x, *more, mask=mask)
        seen = int(layer.router.pending[1].sum())
        cut, _ = layer(x[:, :15], *more)
        assert (out[:, 15:] == 0).all() and (membership == "topw" or rel_error(out[:, :15], cut) < 1e-4)
        assert seen == 2 * 2 * (15 + 13 if more else 30)


@pytest.mark.parametrize("membership", ["topw", "nearest", "local", "full"])
def test_two_backends_one_model(membership):
    x, y = _tokens(1, 20), _tokens(1, 20, seed=1)
    models = [_small(membership, backend=b, depth=1, self_attention="fallback").train() for b in ("torch", "triton")]
    losses = [m.loss(x, y) for m in models]
    for loss in losses:
        loss.backward()
    assert abs(float(losses[0].detach()) - float(losses[1].detach())) < 1e-4
    for (name, a), (_, b) in zip(*(m.named_parameters() for m in models)):
        assert rel_error(b.grad, a.grad, 1e-6) < 1e-3, name


@pytest.mark.parametrize("membership", ["topw", "nearest", "local"])
def test_a_model_in_bfloat16(membership):
    model = _small(membership, absolute=True).bfloat16().train()
    model.loss(_tokens(2, 24), _tokens(2, 24, seed=1)).backward()
    model.update_centroids()
    assert {b.dtype for r in model.routers() for b in r.kmeans.buffers()} == {torch.float32}
    assert all(p.dtype == p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


def test_module_errors():
    bad = [
        (dict(local_heads=5), ValueError, ["local_heads", "5", "4"]),
        (dict(num_heads=3, local_heads=1), ValueError, ["num_heads", "3"]),
        (dict(membership="best"), ValueError, ["membership", "best", "topw"]),
        (dict(num_clusters=0), ValueError, ["num_clusters", "0"]),
        (dict(window=0), ValueError, ["window", "0"]),
        (dict(window=5.0), TypeError, ["window", "5.0"]),
        (dict(causal=False), ValueError, ["causal", "local_heads=0"]),
        (dict(membership="full", share_qk=False), ValueError, ["share_qk", "full"]),
    ]
    check_raises(RoutingSelfAttention, bad, embed_dim=32, num_heads=4, local_heads=2)
    layer, x = RoutingAttention(32, 2, num_clusters=3, window=6), torch.zeros(1, 4, 32)
    check_raises(layer, [(dict(context=x), ValueError, ["share_qk", "context"])], x=x)


def test_parameter_counts():
    d, f = 1032, 4096
    layers = 22 * (4 * d * d + 3 * d * f + 4 * d) + 2 * d - 2 * (d // 8) * d  # two routing heads share queries and keys
    assert parameter_counts()["pg19, 8k"] == layers
    assert routing_model("pg19, 8k", 1, depth=2, skip_first=1).blocks[1].attention.head_dim == 129
    assert len({count_parameters(_small(m)) for m in MEMBERSHIPS}) == 1  # the controls have equal parameters
    check_raises(
        routing_model, [(dict(name="pg19"), ValueError, ["name", "pg19", "enwik8, 8k"])], name="enwik8, 8k", depth=1
    )


class _Knowing(nn.Module):
    "Logits that put everything on the tokens that `guess(x)` gives."

    vocab_size = 16

    def __init__(self, guess, sure=50.0):
        super().__init__()
        self.guess, self.sure = guess, sure

    def forward(self, x):
        return self.sure * F.one_hot(self.guess(x), 16).float(), None


def test_gain_is_scored_on_the_targets():
    score = lambda model: gain_on_the_bound(model, batches=2, batch=8, seed=5)
    idle, copy = score(_Knowing(lambda x: x, sure=0.0)), score(_Knowing(lambda x: x))
    following = {tuple(x.flatten().tolist()): y for x, y in (uniform_tokens(8, 5 + i) for i in range(2))}
    oracle = score(_Knowing(lambda x: following[tuple(x.flatten().tolist())]))
    assert idle["gain"] == pytest.approx(0, abs=1e-6) and idle["error"] == pytest.approx(0, abs=1e-6)
    assert copy["gain"] > 10  # sure of what it has just read, and nearly always wrong
    assert oracle["gain"] == pytest.approx(-math.log(16), abs=1e-6)
    each = []  # the error is that of a mean of 16 sequences
    for i in range(2):
        x, y = uniform_tokens(8, 5 + i)
        each += [50 * float((a != b).float().mean()) for a, b in zip(x, y)]  # sure of a wrong symbol: 50 nats
    assert copy["error"] == pytest.approx(np.std(each, ddof=1) / 4, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("membership, honest", [("nearest", True), ("topw", False)])
def test_honest_bits(membership, honest):
    x, y = (t.cpu() for t in (_tokens(2, 24), _tokens(2, 24, seed=1)))
    found = bits_per_byte(_small(membership), x, y, device_under_test(), False, prefixes=8)
    assert (abs(found["prefix"] - found["same"]) < 1e-4) == honest
    model = _small(membership)  # the mean over all positions, in bits
    nats = F.cross_entropy(model(x.to(device_under_test()))[0].flatten(0, 1).cpu(), y.flatten())
    assert found["bits"] == pytest.approx(float(nats) / math.log(2), rel=1e-4)


@contextmanager
def only_these(*rows):
    "Nothing is on record but made-up rows; what is recorded inside goes to the same place."
    common = dict(
        key=sorted({"membership", "variant", "run", "step", "quarter", "layer", "pair", "method", "n"}),
        preset="gpu",
        versions={},
    )
    with (
        TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, ATTNBOOK_RESULTS=folder),
        mock.patch("attnbook.lab.results._checkout", return_value=None),
    ):
        Path(folder, "routing.jsonl").write_text("".join(json.dumps(common | r) + "\n" for r in rows))
        yield


def _row(membership, run, bits, device="one", day=1, **fields):
    "A language model of the gpu preset; from the prefix it has twice the bits."
    what = dict(name="language", training="gpu", device=device, date=f"2026-01-{day:02}T00:00:00+00:00")
    what |= dict(variant="whole", seconds=10.0, steps=5)
    return what | dict(membership=membership, run=run, bits=bits, prefix=2 * bits) | fields


def _train(membership="local", **kw):
    "A model of no size at all."
    cfg = PRESETS["smoke"]["language"] | dict(length=32)
    data = [torch.randint(256, (400,), generator=torch.Generator().manual_seed(i), dtype=torch.uint8) for i in range(3)]
    return language_experiment(membership, cfg, data, device=device_under_test(), **kw)


def test_steps_or_seconds():
    _, row = _train(steps=3, run=1)
    assert row["steps"] == 3 and row["timed"] is False and row["seconds"] > 0 and row["run"] == 1
    _, row = _train(seconds=1e-3)
    assert row["steps"] == 1 and row["timed"] is True and row["variant"] == "whole"
    assert (row["peak_mb"] is None) == (torch.device(device_under_test()).type == "cpu")
    bad = [
        (dict(), ValueError, ["seconds", "steps"]),
        (dict(steps=3, seconds=1.0), ValueError, ["seconds", "steps", "3"]),
    ]
    bad += [(dict(steps=s), ValueError, ["steps", repr(s)]) for s in (0, -1)]
    check_raises(_train, bad + [(dict(steps=s), TypeError, ["steps", repr(s)]) for s in (2.0, True)])


def test_further_seeds_take_the_steps_of_the_timed_run():
    old = [_row(m, 0, 1.0, steps=s) for m, s in (("local", 3), ("full", 2))]
    with only_these(*old, _row("local", 0, 1.0, day=2, device="two", steps=9, timed=False)):
        assert timed_steps() == {"local": 3, "full": 2} and timed_steps(run=1) == timed_steps("cpu") == {}
    with only_these(*old, _row("full", 0, 1.0, day=2, device="two", steps=8)):
        assert timed_steps() == {"full": 8}
    with only_these(*old, _row("full", 0, 1.0, day=2, steps=9, variant="no positions")):
        assert timed_steps() == {"local": 3, "full": 2}  # a variant is another model
    with only_these():
        models = run_language("smoke", device_under_test(), seed=1, steps={"local": 2})
        (row,) = load_results("routing", "language")
        assert set(models) == {"local"} and row["key"] == ["membership", "run", "training", "variant"]
        assert (row["run"], row["seed"], row["steps"], row["timed"]) == (1, 1, 2, False) and row["seconds"] > 0
        bad = [
            (dict(seconds=5.0), ["seconds", "steps", "5.0"]),
            (dict(memberships=("local", "full")), ["steps", "lacks full"]),
            (dict(steps={}), ["steps", "lacks topw"]),
            (dict(steps={"local": 0}), ["steps", "0"]),
            (dict(variant="other"), ["variant", "other", "whole"]),
        ]
        check_raises(partial(run_language, steps={"local": 2}), [(kw, ValueError, words) for kw, words in bad])
        assert len(load_results("routing")) == 1


class _Clock:
    "A second passes whenever somebody looks."

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def test_rows_of_a_training():
    "Seconds and steps are those of the end, the time of a step that of the last stretch; the variant is trained."
    seen = [dict(step=s, seconds=t, bits=float(s), dead=0.5) for s, t in ((2, 1.0), (4, 1.5), (8, 3.5))]
    trained = []
    with mock.patch.dict(
        language_experiment.__globals__,
        train_for=lambda model, *args, **kw: trained.append((model.to(kw["device"]), kw)) or seen,
    ):
        _, row = _train("nearest", seconds=3.0, variant="no positions", run=4)
    assert (row["steps"], row["seconds"], row["step_ms"], row["run"]) == (8, 3.5, 500.0, 4)
    assert row["curve"] == {"2": 2.0, "4": 4.0, "8": 8.0} and row["health"]["4"] == {"dead": 0.5}
    model, kw = trained[0]
    assert row["variant"] == "no positions" and not model.routers()[0].rotary and kw["seconds"] == 3.0
    assert row["parameters"] == count_parameters(model)


def test_every_model_has_the_same_seconds():
    "Time spent on looking does not count, the rate follows the clock, and the model ends in eval mode."
    batches = lambda step: (_tokens(1, 8, seed=step), _tokens(1, 8, seed=step + 1))
    model, rates, clock = _small(depth=1), [], _Clock()

    def look(m):
        assert not m.training
        clock.now += 100.0  # an evaluation takes long
        return dict(bits=1.0)

    with mock.patch.object(torch.optim.AdamW, "step", autospec=True) as step:
        step.side_effect = lambda opt: rates.append(opt.param_groups[0]["lr"])
        seen = train_for(
            model, batches, seconds=16, device=device_under_test(), watch=look, looks=2, every=1, clock=clock
        )
    assert rates[:3] == [0.0] * 3  # before the clock starts
    rates, last = rates[3:], seen[-1]
    assert not model.training and len(seen) == 2 and last["seconds"] < 20 and last["bits"] == 1.0
    assert last["step"] == len(rates) and seen[0]["step"] < last["step"] and seen[0]["seconds"] >= 8
    top = rates.index(max(rates))
    assert 0 < top < len(rates) / 2 and rates[0] < rates[1] and rates[-1] < 0.3 * max(rates)
    assert all(a >= b for a, b in zip(rates[top:], rates[top + 1 :]))
    seen = train_for(model, batches, steps=6, device=device_under_test(), looks=3)
    assert [s["step"] for s in seen] == [2, 4, 6] and all(a["seconds"] < b["seconds"] for a, b in zip(seen, seen[1:]))


def test_variants_take_one_thing_away():
    cfg = PRESETS["smoke"]["language"]
    whole = language_model("nearest", cfg).routers()[0]
    found = (whole.how["scale"], whole.rotary, whole.kmeans.decay, whole.kmeans.revive, whole.how["self_attention"])
    assert found == (1.0, True, 0.99, 0.1, "fallback")
    for name, (changed,) in ((n, v) for n, v in VARIANTS.items() if v):
        r = language_model("nearest", cfg, variant=name).routers()[0]
        now = dict(scale=r.how["scale"], rotary=r.rotary, decay=r.kmeans.decay, revive=r.kmeans.revive)
        old = dict(zip(("scale", "rotary", "decay", "revive"), found))
        assert {k for k in now if now[k] != old[k]} == {changed}
    same = [language_model(m, cfg, seed=3) for m in _ALL]
    assert len({count_parameters(m) for m in same}) == 1
    assert all(torch.equal(same[0].embed.weight, m.embed.weight) for m in same)  # one start for all


@torch.no_grad()
def test_maps_are_the_weights():
    model, x = _small("nearest"), _tokens(1, 24)
    layer, g = model.blocks[0].attention, torch.Generator().manual_seed(0)
    t = torch.randn(1, 24, 32, generator=g).to(x.device)
    maps = attention_maps(layer, t)
    assert maps.shape == (4, 24, 24) and (maps.sum(-1) - 1).abs().max() < 1e-2 and (maps.triu(1) == 0).all()
    (_, _, routed), (_, _, local) = layer.heads(t)
    parts = torch.cat([maps[:2] @ routed[0], maps[2:] @ local[0]])
    assert rel_error(layer.out(parts.transpose(0, 1).flatten(1)[None]), layer(t)[0]) < 1e-2
    assert {r["pair"] for r in head_rows(model, x)} == {"routing, routing", "routing, local", "local, local"}


@torch.no_grad()
def test_measures_of_heads_and_clusters():
    p, a = torch.eye(3), np.array([0, 0, 1, 1, 2, 2])
    half = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    assert float(divergence(*half)) == pytest.approx(0.5 * math.log(2))  # h(1/4, 1/2, 1/4) less ln 2
    assert divergence(p, p).abs().max() < 1e-6 and (divergence(p, p.roll(1, 0)) - math.log(2)).abs().max() < 1e-6
    assert abs(mutual_information(a, (a + 1) % 3) - 1) < 1e-9
    assert mutual_information(np.tile([0, 1], 6), np.repeat([0, 1], 6)) < 1e-9
    topw, nearest, local = (cluster_health(_small(m), _tokens(1, 24)) for m in ("topw", "nearest", "local"))
    assert 0 < topw["coverage"] < 1 and 0 < topw["balance"] <= 1 and nearest["coverage"] == 1 and local == {}


def test_distances_of_recall():
    x = torch.tensor([[5, 1, 7, 2, 5, 9, 7, 5]])  # pairs (5, 1), (7, 2); then 5 and 7 are asked, and 5 again
    y = torch.tensor([[-100, -100, -100, -100, 1, -100, 2, 1]])
    assert asked_distance(x, y, 2).tolist() == [[0, 0, 0, 0, 4, 0, 4, 7]]


def test_recall_is_scored_by_distance():
    "A model that remembers sixteen tokens: all right in the near quarters, all wrong in the far ones, each asked once."
    cfg = PRESETS["smoke"]["recall"] | dict(batch=64)

    class Forgetful(nn.Module):
        def forward(self, x):
            keys = x[:, : 2 * cfg["pairs"] : 2]
            at = 2 * (x[:, :, None] == keys[:, None]).float().argmax(-1)
            near = torch.arange(x.shape[1]) - at <= 16
            answer = x.gather(1, at + 1)
            return F.one_hot(torch.where(near, answer, (answer + 1) % cfg["vocab"]), cfg["vocab"]).float(), None

    made, fake = [], mock.Mock(return_value=mock.Mock(seconds=1.0))
    make = lambda vocab, **kw: made.append((vocab, kw)) or Forgetful()
    with mock.patch.dict(recall_experiment.__globals__, RoutingTransformerLM=make, fit=fake):
        rows = recall_experiment("nearest", cfg, run=2)
    assert {r["upto"]: r["accuracy"] for r in rows} == {8: 1.0, 16: 1.0, 24: 0.0, 32: 0.0}
    asked = sum(int((recall_batch(cfg, 10**9 + i)[1] >= 0).sum()) for i in range(cfg["tests"]))
    assert sum(r["asked"] for r in rows) == asked and {r["run"] for r in rows} == {2}
    (vocab, kw), reach = made[0], 2 * cfg["model"]["local_window"] * cfg["model"]["depth"]
    assert vocab == cfg["vocab"] and (kw["scale"], kw["self_attention"]) == (1.0, "fallback")
    assert rows[0]["reach"] == reach and rows[0]["chance"] == 2 / cfg["vocab"]


LANGUAGE_RUNS = [_row(m, i, b) for m, at in (("topw", (1.0, 2.0)), ("local", (1.5, 2.1))) for i, b in enumerate(at)]
OTHER_RUNS = {  # rows beside those of two runs
    "nothing": [],
    "a run of one": [_row("topw", 2, 9.0)],
    "two halves": [_row("local", 2, 9.0, day=3), _row("full", 0, 9.0)],
    "half a run of another device": [_row("topw", 0, 2.0, device="two", day=2)],
    "an older model": [{k: v for k, v in _row("topw", 0, 9.0, day=3).items() if k != "variant"}],
    "a variant": [_row(m, 3, 9.0, day=3, variant="scale 1/√d") for m in ("topw", "local")],
    "another text": [_row(m, 3, 9.0, day=3, data=m) for m in ("topw", "local")],
    "unequal seconds": [_row("topw", 3, 9.0), _row("local", 3, 9.0, seconds=11.0)],
}


@pytest.mark.parametrize("more", OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_differences_are_taken_run_by_run(more):
    "Where topw takes part, from prefixes: twice the bits of these rows."
    with only_these(*LANGUAGE_RUNS, *more):
        found = language_gain("topw", "local")
        assert found.mean == pytest.approx(0.6) and found.n == 2
        assert found.half == pytest.approx(t_quantile(0.95, 1) * 0.4)


def test_which_runs_are_compared():
    with only_these(LANGUAGE_RUNS[0], LANGUAGE_RUNS[2]):
        assert language_gain("topw", "local").mean == 1.0 and language_gain("local", "topw").mean == -1.0
        assert language_gain("topw", "full") is None and language_difference("topw", "full") is None
        assert list(language_difference("topw", "local")) == ["topw better by", "ceiling, full better than local by"]
    with only_these(_row("nearest", 0, 1.0), _row("local", 0, 1.25), _row("full", 0, 0.5)):  # all positions
        assert language_gain("nearest", "local").mean == 0.25
        assert language_difference("nearest", "local")["ceiling, full better than local by"].mean == 0.75
    later = [_row(LANGUAGE_RUNS[i]["membership"], 0, 2 * LANGUAGE_RUNS[i]["bits"], device="two", day=2) for i in (0, 2)]
    with only_these(*later, *LANGUAGE_RUNS):  # run 0 again on another device: the newer pair
        assert language_gain("topw", "local").mean == pytest.approx(1.1)


def test_equal_cost():
    "Seconds within three hundredths; steps that were given cost what the timed run of as many steps did."
    topw, given = _row("topw", 0, 1.0), dict(timed=False, day=3, seconds=99.0)
    with only_these(topw, _row("local", 0, 1.5, seconds=10.29)):
        assert language_gain("topw", "local").n == 1
    for seconds in (10.31, 9.7, None):
        with only_these(topw, _row("local", 0, 1.5, seconds=seconds)):
            assert language_gain("topw", "local") is None
    runs = [_row("topw", 1, 1.0, **given), _row("local", 1, 1.5, device="two", **given)]
    with only_these(*runs):  # no clock anywhere
        assert language_gain("topw", "local") is None
    with only_these(topw, _row("local", 0, 1.5), *runs):
        assert language_gain("topw", "local").n == 2
    with only_these(topw, _row("local", 0, 1.5, seconds=11.0), *runs):
        assert language_gain("topw", "local") is None
    with only_these(topw, _row("local", 0, 1.5), runs[0], runs[1] | dict(steps=6)):
        assert language_gain("topw", "local").n == 1
    with only_these(topw, _row("local", 0, 1.5), runs[0], _row("local", 1, 1.5, device="two")):  # a clock elsewhere
        assert language_gain("topw", "local").n == 1


def _races(a, b, gain, ceiling, spread=0.001, runs=3):
    "Rows of three runs: a better than b by `gain`, full better than local by `ceiling`, at all positions and prefixes."
    level = {"local": 5.0, "full": 5.0 - ceiling}
    level.setdefault(b, 5.0), level.setdefault(a, level[b] - gain)
    if a in ("local", "full"):
        raise ValueError(a)
    for m, bits in level.items():
        for run in range(runs):
            bits_here = bits + (spread * run if m == a else 0.0)
            yield _row(m, run, bits_here, prefix=bits_here)


GAINS = {  # gain, ceiling, verdicts of `better` and of `as good as`
    "better": (0.02, 0.2, "holds"),
    "worse": (-0.02, 0.2, "does not hold here"),
    "worse, but there is nothing to be found": (-0.02, -0.1, "not measured"),
    "worse, the ceiling undecided": (-0.02, 0.0, "not measured"),
    "better, though full is not": (0.02, -0.1, "holds"),
    "within the interval": (0.001, 0.2, "not measured"),
}


@pytest.mark.parametrize("case", GAINS.values(), ids=GAINS)
@pytest.mark.parametrize(
    "which, a, b", [(0, "topw", "local"), (1, "nearest", "local"), (2, "topw", "random"), (3, "nearest", "random")]
)
def test_verdicts_on_language(which, a, b, case):
    gain, ceiling, want = case
    with only_these(*_races(a, b, gain, ceiling)):
        claim = language_claims()[which]
        assert claim.judge().verdict == want and "3 seeds" in claim.scale


@pytest.mark.parametrize(
    "gain, ceiling, want",
    [
        (0.02, 0.2, "holds"),
        (-0.005, 0.2, "holds"),
        (-0.02, 0.2, "does not hold here"),
        (-0.011, 0.2, "not measured"),
        (-0.005, -0.1, "not measured"),  # as good as what gains nothing
        (-0.005, 0.0, "not measured"),
    ],
)
def test_verdicts_on_full_attention(gain, ceiling, want):
    with only_these(*_races("nearest", "full", gain, ceiling)):
        assert language_claims()[4].judge().verdict == want


def test_controls_fail_and_one_run_says_nothing():
    "Random routing in the place of routing: as good as itself, as bad as local heads."
    control = [r | dict(membership="nearest") for r in _races("nearest", "random", 0.0, 0.2, 0.0)]
    with only_these(*control):
        assert all(c.judge().verdict != "holds" for c in language_claims()[:5])
    with only_these(*_races("nearest", "local", 0.5, 0.5, runs=1)):
        assert {c.judge().verdict for c in language_claims()[:5]} == {"not measured"}
    with only_these():
        never = [*language_claims(), *speed_claims(), *leak_claims()[:3]]
        assert {c.judge().verdict for c in never} == {"not measured"}


def _quarter(m, run, accuracy, q=3, **kw):
    what = dict(name="recall", quarter=q, upto=128 * (q + 1), length=512, reach=64, accuracy=accuracy, chance=0.1)
    return _row(m, run, 0.0, **kw) | what


def test_recall_is_averaged():
    rows = [_quarter(m, run, a) for m, at in (("full", (1.0, 1.0)), ("local", (0.1,))) for run, a in enumerate(at)]
    rows += [_quarter("nearest", 0, 0.7), _quarter("nearest", 1, 0.5, device="two"), _quarter("topw", 0, 0.9)]
    with only_these(*rows[:-1]):
        assert recall_far() is None  # the rule compares four
    near = _quarter("nearest", 1, 0.0, q=0)  # within reach of the window: says nothing
    with only_these(*rows, near, _quarter("nearest", 0, 0.9, device="two", day=2)):  # on two devices: the newer
        found = recall_far()
        assert abs(found["nearest"] - 0.7) < 1e-9 and (found["full"], found["local"], found["chance"]) == (1, 0.1, 0.1)
        assert found["runs"] == {"full": 2, "local": 1, "nearest": 2, "topw": 1}
        assert (found["lowest"]["nearest"], found["highest"]["nearest"]) == (0.5, 0.9)
        *_, claim = language_claims()
        assert claim.judge().verdict == "holds in part" and "1 or 2 seeds" in claim.scale
    with only_these(*rows, _quarter("nearest", 1, 0.2, q=1), _quarter("local", 0, 0.4, q=2)):  # beyond reach: counts
        found = recall_far()
        assert (found["lowest"]["nearest"], found["highest"]["local"]) == (0.2, 0.4)
        assert found["nearest"] == pytest.approx(0.45)


@pytest.mark.parametrize(
    "full, nearest, topw, local, runs, want",
    [
        (1.0, 0.9, 0.9, 0.1, 3, "holds"),
        (1.0, 0.9, 0.9, 0.1, 2, "holds in part"),  # too few runs
        (1.0, 0.9, 0.7, 0.1, 3, "holds in part"),
        (1.0, 0.7, 0.9, 0.1, 3, "holds in part"),
        (1.0, 0.9, 0.9, 0.4, 3, "not measured"),
        (1.0, 0.3, 0.9, 0.2, 3, "does not hold here"),
        (1.0, 0.9, 0.3, 0.2, 3, "does not hold here"),
        (1.0, 0.1, 0.1, 0.1, 3, "does not hold here"),  # the control in their place
        (0.7, 0.9, 0.9, 0.1, 3, "not measured"),
    ],
)
def test_verdicts_on_recall(full, nearest, topw, local, runs, want):
    of = dict(full=full, nearest=nearest, topw=topw, local=local)
    with only_these(*(_quarter(m, run, x) for m, x in of.items() for run in range(runs))):
        assert language_claims()[-1].judge().verdict == want


def _times(name, device, day, ms, **fields):
    return dict(name=name, device=device, date=f"2026-01-{day:02}T00:00:00+00:00") | fields | ms


def _crossover(device, day, power, scale, methods=("ours", "topw (ours)", "flash", "cudnn")):
    "Times of plain attention that grow quadratically, of routing by a power."
    for m, n in product(methods, (16384, 32768, 65536)):
        ms = scale * (n / 16384) ** (power if "ours" in m else 2)
        yield _times("crossover", device, day, dict(ms_fwd=ms, ms_bwd=ms if "ours" in m else 4 * ms), method=m, n=n)


OLD, NEW = list(_crossover("one", 1, 1.5, 100.0)), list(_crossover("two", 2, 1.0, 1.0))


@pytest.mark.parametrize("rows", [OLD + NEW, NEW + OLD], ids=["old first", "new first"])
def test_times_are_of_one_device(rows):
    with only_these(*rows):  # both complete: the newer
        assert {r["device"] for r in gpu_rows("crossover")} == {"two"} and len(gpu_rows("crossover")) == 12
        assert total_speed() == pytest.approx({16384: 2.5, 32768: 5, 65536: 10}) and break_even() == 16384
        assert abs(fitted_exponents()["routing"] - 1) < 1e-6 and abs(fitted_exponents()["plain"] - 2) < 1e-6
        assert gpu_name("crossover") == "two" and gpu_name("clusters") == "one GPU"
        assert [c.scale.split("; ")[-1] for c in speed_claims()[:5]] == ["two", "one GPU", "the same", "one GPU", "two"]


def test_times_are_not_mixed():
    with only_these(*OLD, *_crossover("two", 2, 1.0, 1.0, ("flash",))):  # nothing is filled up from the older
        assert total_speed() == {} and fitted_exponents() is None and break_even() is None
    with only_these():
        assert gpu_rows("crossover") == [] and fitted_exponents() is None and break_even() is None


def test_the_faster_plain_kernel_is_fitted():
    rows = [r | (dict(ms_fwd=r["n"] ** 1.9 * 1e-12) if r["method"] == "flash" else {}) for r in NEW]
    with only_these(*rows):
        assert fitted_exponents()["plain"] == pytest.approx(1.9)
    with only_these(*(r | (dict(ms_fwd=None) if r["method"] == "cudnn" else {}) for r in NEW)):  # it failed
        assert fitted_exponents()["plain"] == pytest.approx(2.0)


EXPONENTS = {
    "as published": (1.5, 1.4, 2.0, "holds"),
    "linear": (1.0, 1.0, 2.0, "holds in part"),
    "one linear": (1.0, 1.5, 2.0, "holds in part"),
    "quadratic": (2.0, 2.0, 2.0, "does not hold here"),
    "one quadratic": (1.5, 2.0, 2.0, "does not hold here"),
    "nothing is quadratic": (1.5, 1.5, 1.5, "not measured"),
    "everything is cubic": (1.5, 1.5, 3.0, "not measured"),
}


@pytest.mark.parametrize("near, top, plain, want", EXPONENTS.values(), ids=EXPONENTS)
def test_verdicts_on_the_exponent(near, top, plain, want):
    of = {"ours": near, "topw (ours)": top, "flash": plain, "cudnn": plain}
    rows = [
        _times("crossover", "two", 2, dict(ms_fwd=1e-6 * n**p, ms_bwd=1.0), method=m, n=n)
        for m, p in of.items()
        for n in (1024, 16384, 32768, 65536)
    ]
    rows += [r | dict(n=2048, ms_fwd=9e9) for r in rows[::4]]  # short ones take no part
    with only_these(*rows):
        assert speed_claims()[0].judge().verdict == want


def _race(name, ratio, where, peers=("flash", "cudnn"), ours="ours"):
    "Ours at one millisecond each way, the faster peer `ratio` times as long, another twice that."
    times = {ours: 1.0} | {p: ratio * (1 + i) for i, p in enumerate(peers)}
    return [_times(name, "two", 2, dict(ms_fwd=t, ms_bwd=t), method=m, **where) for m, t in times.items()]


@pytest.mark.parametrize(
    "ratios, want",
    [((3.5, 9.0), "holds"), ((1.5, 9.0), "holds in part"), ((0.5, 9.0), "does not hold here")],
    ids=["everywhere", "faster everywhere", "slower somewhere"],
)
def test_total_speed_is_judged_at_every_length(ratios, want):
    rows = [r for n, x in zip((1024, 65536), ratios) for r in _race("crossover", x, dict(n=n))]
    rows += [r | dict(method="topw (ours)") for r in rows if r["method"] == "ours"]
    with only_these(*rows):
        assert speed_claims()[4].judge().verdict == want
        assert all_speeds() == {f"{m}, n={n}": x for m in ("nearest", "topw") for n, x in zip((1024, 65536), ratios)}


BREAKS = {  # ratios of nearest and top-w at 4k, 8k and 16k
    "both": ((0.5, 2, 2), (0.5, 2, 2), "holds"),
    "later": ((0.5, 0.5, 2), (0.5, 0.5, 2), "does not hold here"),
    "one": ((0.5, 2, 2), (0.5, 0.5, 2), "holds in part"),
    "not for good": ((2, 2, 0.5), (2, 2, 0.5), "does not hold here"),
}


@pytest.mark.parametrize("near, top, want", BREAKS.values(), ids=BREAKS)
def test_verdicts_on_breaking_even(near, top, want):
    lengths = (4096, 8192, 16384)
    with only_these(*_race("crossover", 1.0, dict(n=4096))):
        assert all_break_evens() is None  # top-w was not measured
    rows = [r for n, x in zip(lengths, near) for r in _race("crossover", x, dict(n=n))]
    ours = [
        r for n, x, y in zip(lengths, near, top) for r in _race("crossover", x / y, dict(n=n)) if r["method"] == "flash"
    ]
    rows += [r | dict(method="topw (ours)") for r in ours]
    with only_these(*rows):
        assert speed_claims()[5].judge().verdict == want


def test_forward_alone_may_break_even_later():
    rows = [r | (dict(ms_fwd=1.5) if r["method"] == "ours" else {}) for r in _race("crossover", 1.3, dict(n=4096))]
    with only_these(*rows, *_race("crossover", 2.0, dict(n=8192))):
        assert (break_even(), break_even(field="ms_fwd")) == (4096, 8192)


@pytest.mark.parametrize(
    "which, name, peers",
    [
        (1, "clusters", ("gather, compiled",)),
        (2, "clusters", ("gather + flash",)),
        (3, "segments", ("gather + varlen", "flex, mask given")),
        (6, "trained", ("flash", "cudnn")),
    ],
)
def test_verdicts_on_given_groups(which, name, peers):
    "At every size, in both directions, against the fastest peer; for the first claim four times as fast."
    fast, slow = (5.0, 3.0) if which == 1 else (1.5, 0.8)
    where = lambda n: dict(n=n) | (dict(layer=0, membership="nearest") if name == "trained" else {})
    for ratios, want in (
        ((fast, fast), "holds"),
        ((fast, slow), "holds in part"),
        ((slow, slow), "does not hold here"),
    ):
        rows = [r for n, x in zip((8192, 65536), ratios) for r in _race(name, x, where(n), peers)]
        with only_these(*rows):
            assert speed_claims()[which].judge().verdict == want
    with only_these(*_race(name, fast, where(8192), peers)[1:]):
        assert speed_claims()[which].judge().verdict == "not measured"
    if name != "trained":
        rows = _race(name, fast, where(8192), peers)
        rows[0]["ms_bwd"] = 99.0
        with only_these(*rows):
            assert speed_claims()[which].judge().verdict == "holds in part"
            assert [s.where for s in group_speed(name, *peers)] == ["n=8192, forward", "n=8192, backward"]


def test_failed_peers_are_named():
    rows = _race("segments", 2.0, dict(n=8192), ("gather + varlen", "flex, mask given"))
    rows[-1] |= dict(ms_fwd=None, ms_bwd=None)
    with only_these(*rows):
        assert "flex, mask given at n=8192" in speed_claims()[3].judge().reason


def test_steps_are_compared_on_one_device():
    rows = [_row("nearest", 0, 1.0, timed=True, step_ms=60.0), _row("full", 0, 1.0, timed=True, step_ms=57.0)]
    with only_these(*rows):
        assert step_speed() == {"run 0, one": 0.95} and speed_claims()[7].judge().verdict == "does not hold here"
    for change in (dict(device="two"), dict(run=1), dict(timed=False), dict(variant="no positions")):
        with only_these(rows[0], rows[1] | change):
            assert step_speed() is None
    with only_these(rows[0] | dict(step_ms=50.0), rows[1]):
        assert speed_claims()[7].judge().verdict == "holds"


@torch.no_grad()
def test_trained_heads_are_what_the_router_is_given():
    model, x = _small("nearest"), _tokens(1, 24)
    caught = trained_heads(model, x)
    assert len(caught) == 2
    router, q, v = caught[0]
    states = model.blocks[0].norm1(model._enter(x))
    (want_q, _, want_v), _ = model.blocks[0].attention.heads(states)
    assert router is model.routers()[0] and torch.equal(q, want_q) and torch.equal(v, want_v)
    ours = route(q, v, router.kmeans.centroids, "nearest", router.window)
    assert rel_error(ours, router(q, None, v)[0]) < 1e-4


def test_models_are_trained_one_by_one():
    "Each at once with its rows: heads of three, tokens of nearest with seed 0 on a GPU; then variants, while time is left."

    def go(**kw):
        seen = []
        fakes = dict(
            run_language=lambda preset, device, seed, memberships, variant: (
                seen.append((f"seed {seed}", *memberships, variant)) or {m: m for m in memberships}
            ),
            run_heads=lambda models, preset, device, seed: seen.append(("heads", *models, seed)),
            time_trained=lambda model, device: seen.append(("trained", model, device)),
        )
        with mock.patch.dict(run_models.__globals__, fakes):
            return run_models("gpu", **kw), seen

    done, seen = go(variants=("no positions",))
    assert done == ["local", "full", "nearest", "topw", "random", "nearest, no positions"]
    assert seen[:2] == [("seed 0", "local", "whole"), ("heads", "local", 0)]
    assert [x for x in seen if x[0] == "heads"] == [("heads", m, 0) for m in ("local", "nearest", "topw")]
    assert seen.index(("trained", "nearest", "cuda")) < seen.index(("seed 0", "topw", "whole"))
    assert seen[-1] == ("seed 0", "nearest", "no positions")
    for other in (dict(seed=1), dict(device="cpu"), dict(memberships=("local",), variants=("no positions",))):
        assert not any(x[0] == "trained" for x in go(**other)[1])
    ticks = iter(range(0, 1000, 10))
    assert go(limit=35, clock=lambda: next(ticks))[0] == ["local", "full"]


def test_least_bytes():
    "Four tokens of two numbers in 16 bits, six slots: x, v and output; and their gradients."
    assert least_bytes(4, 6, heads=1, dim=2) == dict(fwd=3 * 16 + 24, bwd=6 * 16 + 24)
    assert least_bytes(4, 6, heads=3, dim=2)["fwd"] == 3 * (3 * 16 + 24)


def _leak(run, gain, step=9, error=0.0, membership="topw", **kw):
    return _row(membership, run, 0.0, **kw) | dict(name="leak", step=step, gain=gain, error=error)


def test_a_run_counts_once():
    with only_these(_leak(0, 1.0), _leak(1, 3.0), _leak(0, 5.0, day=2, device="two"), _leak(0, 9.0, step=4)):
        assert leak_summary() == {"topw": dict(gain=4.0, error=1.0, runs=2, step=9)}
    with only_these(_leak(0, 1.0, error=0.3)):
        assert leak_summary()["topw"]["error"] == 0.3
    with only_these(_leak(0, 1.0, error=9.0), _leak(1, 1.0, error=9.0)):  # the sequences of each run, not only the runs
        assert leak_summary()["topw"]["error"] == pytest.approx(9 / 2**0.5)


@pytest.mark.parametrize(
    "gain, want",
    [
        (-4e-3, "does not hold here"),
        (-2e-3, "holds"),
        (4e-3, "holds"),
        (0.02, "not measured"),
        (-0.5, "does not hold here"),
    ],
)
def test_verdicts_on_the_leak(gain, want):
    with only_these(_leak(0, gain, error=1e-3), _leak(0, gain, error=1e-3, membership="nearest")):
        assert [c.judge().verdict for c in leak_claims()[:2]] == [want] * 2
    with only_these(_leak(0, -1.0, error=1e-3), _leak(0, gain, error=1e-3, membership="nearest")):  # each its own row
        assert [c.judge().verdict for c in leak_claims()[:2]] == ["does not hold here", want]
    small = [_leak(0, gain, error=1e-3, membership=m) | dict(training="cpu") for m in ("topw", "nearest")]
    with only_these(*small):  # a training of seconds cannot acquit anybody
        assert {c.judge().verdict for c in leak_claims()[:2]} == {"not measured"}


def _heads(routing_local, local_local=0.2, control=0.3, spread=0.01, runs=3, **more):
    "Divergences of three runs, two layers each."
    of = {("topw", "routing, local"): routing_local, ("topw", "local, local"): local_local}
    of[("local", "routing, local")] = control
    for (m, pair), x in of.items():
        for run in range(runs):
            for layer in range(2):
                value = x + (layer - 0.5) * 0.1 + (spread * run if m == "topw" else 0)
                yield _row(m, run, 0.0) | dict(name="heads", layer=layer, pair=pair, divergence=value) | more


HEAD_CASES = {
    "as published": (0.6, 0.2, 0.3, "holds"),
    "less than twice local heads": (0.35, 0.2, 0.3, "holds in part"),
    "its control": (0.6, 0.2, 0.6, "not measured"),
    "less than its control": (0.6, 0.2, 0.7, "does not hold here"),
}


@pytest.mark.parametrize("routing, local, control, want", HEAD_CASES.values(), ids=HEAD_CASES)
def test_verdicts_on_heads(routing, local, control, want):
    claim = lambda: leak_claims()[2].judge()
    with only_these(*_heads(routing, local, control, spread=0.001 if want != "not measured" else 0.0)):
        assert claim().verdict == want
    with only_these(*_heads(routing, local, control, runs=1)):
        assert claim().verdict == "not measured"
    for other in (dict(training="cpu"), dict(variant="no positions")):
        with only_these(*_heads(routing, local, control, **other)):
            assert claim().verdict == "not measured"


def test_divergences_are_means_over_layers_and_runs():
    with only_these(*_heads(0.5, 0.2, 0.3)):
        found = head_divergence()
        assert found["routing_local"] == pytest.approx(0.51) and found["local_local"] == pytest.approx(0.21)
        assert found["above the control by"].mean == pytest.approx(0.21) and found["above the control by"].n == 3
    with only_these(*(r for r in _heads(0.5) if r["membership"] == "topw")):
        assert head_divergence() is None
