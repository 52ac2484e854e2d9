# Written from the test cells of nbs/4_long_context/routing.ipynb by `attnbook export`. Do not edit.
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
import torch

from attnbook.attention import attention_reference
from attnbook.lab.results import load_results
from attnbook.lab.testing import (
    check_against_reference,
    check_autocast,
    check_compiles,
    check_deterministic,
    check_empty_rows,
    check_opcheck,
    check_operation,
    check_raises,
    check_strides,
    check_writes_everything,
    make_qkv,
    rel_error,
)
from attnbook.lab.testing import device as device_under_test
from attnbook.lab.train import count_parameters
from attnbook.routing import (
    LANGUAGE,
    MEMBERSHIPS,
    OnlineKMeans,
    RoutingAttention,
    RoutingSelfAttention,
    RoutingTransformerLM,
    Segments,
    _bits,
    _divergences,
    _exponents,
    _gpu,
    _language_claims,
    _recall_far,
    _speed,
    _total_speed,
    attention_maps,
    bits_per_byte,
    break_even,
    claims,
    cluster_attention_op,
    cluster_health,
    cluster_sums,
    cluster_sums_op,
    divergence,
    head_rows,
    language_experiment,
    leak_summary,
    mutual_information,
    nearest_membership,
    parameter_counts,
    route_nearest_op,
    route_scores,
    route_scores_op,
    routed_attention,
    routed_attention_gather,
    routed_attention_reference,
    routing_cost,
    routing_model,
    run_language,
    segment_lists,
    segment_tiles_op,
    select_topw_op,
    sort_by_cluster,
    spherical_norm,
    spherical_norm_op,
    spherical_norm_reference,
    timed_steps,
    topw_membership,
)


def _clusters(B, H, n, k, w, seed=0, separate=False, empty=0):
    "Random lists like those of top-w; `empty` slots at the end of each are -1."
    g = torch.Generator().manual_seed(seed)
    lists = [torch.rand(B, H, k, n, generator=g).argsort(-1)[..., :w].sort(-1).values for _ in range(2)]
    lists = [x.masked_fill(torch.arange(w) >= w - empty, -1).int().to(device_under_test()) for x in lists]
    return lists if separate else lists[:1] * 2


def test_gather_is_the_loop():
    q, k, v = make_qkv(2, 2, 21, 8, Dv=5, dtype=torch.float64)
    for kw in (dict(causal=True), dict(causal=False), dict(causal=True, self_attention="fallback", scale=0.3)):
        for separate, empty in ((False, 0), (True, 0), (False, 2)):
            a, b = _clusters(2, 2, 21, 5, 6, separate=separate, empty=empty)
            want = routed_attention_reference(q, k, v, a, b, **kw)
            assert rel_error(routed_attention_gather(q, k, v, a, b, **kw), want) < 1e-12


def test_cost_counts_the_pairs():
    lists = _clusters(1, 1, 40, 5, 8)[0]
    pairs = int((lists[..., :, None] >= lists[..., None, :]).sum())
    cost = routing_cost(40, 5, 8, 16)
    assert cost["pairs"] == pairs and cost["attend"] == 4 * 16 * pairs and cost["assign"] == 2 * 40 * 5 * 16
    assert routing_cost(40, 5, 8, 16, causal=False)["attend"] == 4 * (5 * 8) * 8 * 16                # 4 n w d


def test_norm():
    for d in (16, 20):
        x = make_qkv(2, 2, 19, d)[0]
        op = partial(spherical_norm, backend="triton")
        check_operation(op, spherical_norm_reference, (x,), dtypes=(torch.float32, torch.bfloat16), skip=("autocast",))
        check_opcheck(spherical_norm_op, (x.requires_grad_(), 1e-6))


def test_norm_forgets_shift_and_scale():
    x = make_qkv(1, 2, 9, 24, dtype=torch.float64, requires_grad=True)[0]
    y = spherical_norm(x, eps=0.0)
    moved = spherical_norm(3 * x + torch.linspace(-2, 2, 9, device=x.device)[:, None], eps=0.0)
    assert rel_error(moved, y) < 1e-10
    dx, = torch.autograd.grad((y * torch.randn_like(y)).sum(), x)
    assert (dx.sum(-1).abs() < 1e-10).all() and ((dx * (x - x.mean(-1, keepdim=True))).sum(-1).abs() < 1e-10).all()
    assert (spherical_norm(torch.ones(1, 1, 2, 8)) == 0).all()


def _routes(x, mu, mask):
    for backend in ("torch", "triton"):
        yield nearest_membership(x, mu, mask, backend=backend), route_scores(x, mu, backend=backend)


def test_assignment_kernels():
    for n, k, d, masked in ((1, 1, 16, False), (70, 5, 16, True), (45, 21, 24, False)):
        x = spherical_norm(make_qkv(2, 2, n, d)[0])
        mu = spherical_norm(make_qkv(1, 2, k, d, seed=3)[0])[0]
        mask = torch.rand(2, n, generator=torch.Generator().manual_seed(1)).to(x.device) > 0.2 if masked else None
        (want, r), (got, s) = _routes(x, mu, mask)
        assert all(torch.equal(a, b) for a, b in zip(want, got)) and rel_error(s, r) < 1e-5
        assert (got.offsets.diff(dim=-1) >= 0).all() and (got.offsets[..., -1] == n).all()
        for w in (1, 4, n):
            a, b = (topw_membership(r, w, mask, backend=z) for z in ("torch", "triton"))
            assert torch.equal(a, b) and a.shape == (2, 2, k, min(w, n))


def test_ties_go_to_the_earlier():
    s = torch.tensor([[[[1.0, 2, 2, 2, 0, 2]]]], device=device_under_test())
    for b in ("torch", "triton"): assert topw_membership(s, 3, backend=b).tolist() == [[[[1, 2, 3]]]]


def test_selection_is_exact():
    g = torch.Generator().manual_seed(0)
    sizes = ((64, 7), (200, 9), (150, 90))
    for n, w in ((200, 90), (5000, 300), (9000, 2500)) if device_under_test() == "cuda" else sizes:
        s = torch.randn(1, 2, 6, n, generator=g).to(device_under_test())
        s[0, 0, 1] = s[0, 0, 1].round()                      # ties at the limit
        s[0, 0, 2] = torch.where(s[0, 0, 2] > 0, 0.0, -0.0)  # these are equal
        s[0, 0, 3, ::3] = s[0, 0, 3].max()                   # more candidates than lanes
        s[0, 0, 4, 5:] = -math.inf                           # too few
        s[0, 0, 5], s[0, 1, 0] = -math.inf, -s[0, 1, 0].abs() - 1e30
        assert torch.equal(topw_membership(s, w, backend="triton"), topw_membership(s, w, backend="torch"))


def _segments(B, H, n, k, seed=0, skew=1.0):
    "Segments of random assignments; with `skew` above 1 some are large and some empty."
    g = torch.Generator().manual_seed(seed)
    a = (torch.rand(B, H, n, generator=g) ** skew * k).long().clamp(max=k - 1)
    return sort_by_cluster(a.to(device_under_test()), k)


def _oracle(a, b, **kw):
    a, b = (segment_lists(x) if isinstance(x, Segments) else x for x in (a, b))
    return lambda q, k, v: routed_attention_reference(q, k, v, a, b, **kw)


def test_clusters_match_the_loops():
    cases = [  # n, d, dv, clusters, width, two lists, empty slots, arguments
        (21, 16, 16, 5, 6, False, 0, dict(causal=True)),
        (40, 16, 16, 2, 37, False, 0, dict(causal=True)),
        (21, 20, 9, 5, 6, True, 0, dict(causal=True)),
        (33, 16, 16, 3, 17, True, 0, dict(causal=False)),
        (21, 16, 16, 4, 9, False, 3, dict(causal=False, scale=0.5)),
        (24, 16, 16, 4, 18, False, 2, dict(causal=True, self_attention="fallback")),
        (20, 16, 16, 3, 7, True, 1, dict(causal=True, self_attention="fallback")),
    ]
    if device_under_test() == "cuda":  # several tiles of 64
        more = ((256, False, True), (300, False, True), (200, True, False))
        cases += [(400, 64, 64, 3, w, separate, 0, dict(causal=c)) for w, separate, c in more]
    for n, d, dv, c, w, separate, empty, kw in cases:
        a, b = _clusters(1, 2, n, c, w, separate=separate, empty=empty)
        op = lambda q, k, v: routed_attention(
            q, k, v, (a, b) if separate else a, padded=empty > 0, backend="triton", **kw
        )
        check_against_reference(op, _oracle(a, b, **kw), make_qkv(1, 2, n, d, Dv=dv), tol=2e-5)


def test_segments_match_the_loops():
    cases = [  # n, d, clusters, skew, two sides, arguments
        (21, 16, 5, 1.0, False, dict(causal=True)),
        (70, 16, 3, 3.0, False, dict(causal=True, window=9)),
        (45, 20, 40, 2.0, False, dict(causal=False)),
        (33, 16, 4, 1.0, True, dict(causal=True)),
        (33, 16, 4, 1.0, True, dict(causal=False, scale=0.3)),
        (50, 16, 4, 2.0, False, dict(causal=True, self_attention="fallback", window=3)),
        (1, 16, 2, 1.0, False, dict(causal=True)),
    ]
    for n, d, c, skew, separate, kw in cases:
        a, b = _segments(1, 2, n, c, skew=skew), _segments(1, 2, n, c, seed=1, skew=skew)
        b = b if separate else a
        op = lambda q, k, v: routed_attention(q, k, v, (a, b) if separate else a, backend="triton", **kw)
        check_against_reference(op, _oracle(a, b, **kw), make_qkv(1, 2, n, d), tol=2e-5, floor=0.1)


def test_other_types():
    sizes = ((25, 4, 8, 24), (400, 3, 300, 64)) if device_under_test() == "cuda" else ((25, 4, 8, 24),)
    for (n, k, w, d), dtype in product(sizes, (torch.bfloat16, torch.float16)):
        for m in (_clusters(1, 2, n, k, w)[0], _segments(1, 2, n, k)):
            check_against_reference(
                partial(routed_attention, membership=m, causal=True, backend="triton"),
                _oracle(m, m, causal=True),
                dict(zip("qkv", make_qkv(1, 2, n, d))),
                dtype=dtype,
                tol=2e-2,
            )


def test_shared_queries_and_keys():
    n, k, w, d = (400, 3, 300, 64) if device_under_test() == "cuda" else (40, 3, 37, 16)
    x, _, v = make_qkv(1, 2, n, d)
    for m, last in product((_clusters(1, 2, n, k, w)[0], _segments(1, 2, n, k)), ("include", "fallback")):
        kw = dict(causal=True, self_attention=last)
        check_against_reference(lambda x, v: routed_attention(x, x, v, m, backend="triton", **kw),
                                lambda x, v: _oracle(m, m, **kw)(x, x, v), (x, v), tol=2e-5, floor=0.1)


def test_one_cluster_is_full_attention():
    q, k, v = (spherical_norm(t) if i < 2 else t for i, t in enumerate(make_qkv(2, 2, 23, 16)))
    everything = topw_membership(route_scores(q, q[0, :, :1]), 23)
    assert torch.equal(everything[0, 0, 0].cpu(), torch.arange(23).int())
    alone = sort_by_cluster(torch.zeros(2, 2, 23, dtype=torch.long, device=q.device), 1)
    for causal, m, backend in product((True, False), (everything, alone), ("torch", "triton")):
        want = attention_reference(q, k, v, is_causal=causal)
        assert rel_error(routed_attention(q, k, v, m, causal=causal, backend=backend), want) < 1e-5


def test_uncovered_and_doubled_tokens():
    q, k, v = make_qkv(1, 1, 20, 16, requires_grad=True)
    m = torch.tensor([[[[0, 3, 5, 9], [3, 5, 7, 12], [3, 9, 12, 19]]]], dtype=torch.int32, device=q.device)
    covered = torch.zeros(20, dtype=torch.bool, device=q.device)
    covered[m.flatten().long()] = True
    for backend in ("torch", "triton"):
        out = routed_attention(q, k, v, m, causal=True, backend=backend)
        dq, dv = torch.autograd.grad(out.sum(), (q, v))
        for t in (out, dq, dv):
            assert (t[0, 0, ~covered] == 0).all() and (t[0, 0, 19] != 0).any() or t is dq
        single = [
            routed_attention(q, k, v, m[:, :, c : c + 1], causal=True, backend=backend)[0, 0, 3] for c in range(3)
        ]
        assert rel_error(out[0, 0, 3], sum(single) / 3) < 1e-5  # token 3 sits in three clusters: the mean


def test_tokens_in_many_clusters():
    n, k = 40, 20
    # more slots than are summed at once; than a row of the table holds
    for often, separate in ((8, False), (20, False), (20, True)):
        a, b = _clusters(1, 2, n, k, 5, separate=separate)
        a[:, :, :often, 0], b[:, :, :often, 0] = 0, 0
        a[:, :, :often, 1:], b[:, :, :often, 1:] = (x[:, :, :often, 1:].clamp_min(1) for x in (a.clone(), b.clone()))
        op = lambda q, k, v: routed_attention(q, k, v, (a, b) if separate else a, causal=True, backend="triton")
        check_against_reference(op, _oracle(a, b, causal=True), make_qkv(1, 2, n, 16), tol=2e-5)
        check_deterministic(op, make_qkv(1, 2, n, 16), repeats=2)


def test_last_resort():
    q, k, v = make_qkv(1, 1, 12, 16)
    m = sort_by_cluster(torch.tensor([[[0, 1, 1, 2, 1, 2, 1, 1, 1, 2, 1, 1]]], device=q.device), 3)
    for backend in ("torch", "triton"):
        out = routed_attention(q, k, v, m, causal=True, self_attention="fallback", backend=backend)[0, 0]
        for first in (0, 1, 3):
            assert rel_error(out[first], v[0, 0, first]) < 1e-5  # alone: itself
        assert rel_error(out[2], v[0, 0, 1]) < 1e-5 and rel_error(out[5], v[0, 0, 3]) < 1e-5  # the only other one


def test_padding():
    q, _, v = make_qkv(2, 2, 26, 16)
    mask = torch.ones(2, 26, dtype=torch.bool, device=q.device)
    mask[1, 20:] = False
    mu = spherical_norm(make_qkv(1, 2, 3, 16, seed=1)[0])[0]
    for backend in ("torch", "triton"):
        kw = dict(causal=True, backend=backend)
        near, cut = nearest_membership(q, mu, mask), nearest_membership(q[1:, :, :20], mu)
        a, b = routed_attention(q, q, v, near, **kw), routed_attention(*[t[1:, :, :20] for t in (q, q, v)], cut, **kw)
        assert rel_error(a[1:, :, :20], b) < 1e-5
        top = topw_membership(route_scores(q, mu), 22, mask)
        assert (top[1] < 20).all() and (top[1] == -1).any()
        out = routed_attention(q, q, v, top, padded=True, **kw)
        assert (out[1, :, 20:] == 0).all() and rel_error(
            out[1:, :, :20], attention_reference(*[t[1:, :, :20] for t in (q, q, v)], is_causal=True)
        ) < 1e-5


def test_manners():
    for m in (_clusters(1, 2, 19, 3, 8)[0], _segments(1, 2, 19, 3)):
        op = lambda q, k, v: routed_attention(q, k, v, m, causal=True, backend="triton")
        inputs = make_qkv(1, 2, 19, 16)
        check_strides(op, inputs, tol=2e-5)
        check_deterministic(op, inputs, repeats=2)
        check_writes_everything(op, inputs)
        check_compiles(op, inputs, tol=2e-5)
        check_autocast(op, inputs, tol=2e-2)


def test_rows_without_keys():
    q, k, v = make_qkv(1, 1, 18, 16)
    a, b = _segments(1, 1, 18, 3), sort_by_cluster(torch.full((1, 1, 18), 2, device=q.device), 3)
    empty = (a.assignment != 2) | (torch.zeros(1, 1, 18, device=q.device) > 0)
    for backend in ("torch", "triton"):
        check_empty_rows(
            lambda q, k, v: routed_attention(q, k, v, (a, b), causal=False, backend=backend), (q, k, v), empty
        )


def test_the_operations_of_the_library():
    x, mu = spherical_norm(make_qkv(1, 2, 20, 16)[0]), spherical_norm(make_qkv(1, 2, 3, 16, seed=1)[0])[0]
    check_opcheck(route_nearest_op, (x, mu, None))
    check_opcheck(route_scores_op, (x, mu))
    check_opcheck(select_topw_op, (route_scores(x, mu), 5))
    index = topw_membership(route_scores(x, mu), 5)
    q, _, v = make_qkv(1, 2, 20, 16, requires_grad=True)
    check_opcheck(cluster_attention_op, (q, None, v, index, None, [1, 0, 0], 0.25))
    check_opcheck(segment_tiles_op, (nearest_membership(x, mu).offsets, 8, 16))


def test_routing_errors():
    q, k, v = make_qkv(1, 2, 12, 16)
    s, top = _segments(1, 2, 12, 3), _clusters(1, 2, 12, 3, 4)[0]
    check_raises(
        routed_attention,
        [
            (dict(membership=top.long()), ValueError, ["membership", "int32", "int64"]),
            (dict(membership=top[:, :1]), ValueError, ["membership", "(1, 2)"]),
            (dict(membership=_segments(1, 2, 11, 3)), ValueError, ["membership", "12", "11"]),
            (dict(membership=(s, top)), ValueError, ["one kind"]),
            (dict(membership=(s, _segments(1, 2, 12, 4))), ValueError, ["3", "4"]),
            (dict(k=k[:, :1], v=v[:, :1]), ValueError, ["heads", "2", "1"]),
            (dict(self_attention="no"), ValueError, ["self_attention", "no"]),
            (dict(scale=math.nan), ValueError, ["scale", "nan"]),
            (dict(window=0), ValueError, ["window", "0"]),
            (dict(membership=top, window=3), ValueError, ["window", "Segments"]),
            (dict(causal=False, window=3), ValueError, ["window", "causal"]),
            (dict(backend="cuda"), ValueError, ["backend", "cuda"]),
        ],
        q=q,
        k=k,
        v=v,
        membership=s,
        causal=True,
    )
    if device_under_test() == "cpu":
        bad = s._replace(offsets=s.offsets - 1)
        check_raises(
            routed_attention,
            [(dict(membership=bad), ValueError, ["offsets", "12", "11"])],
            q=q,
            k=k,
            v=v,
            membership=s,
            causal=True,
        )
    check_raises(
        topw_membership,
        [
            (dict(window=0), ValueError, ["window", "0"]),
            (dict(window=2.0), ValueError, ["window", "2.0"]),
            (dict(scores=q[0]), ValueError, ["scores"]),
        ],
        scores=q,
        window=2,
    )
    check_raises(
        nearest_membership,
        [
            (dict(centroids=q[0, :1]), ValueError, ["centroids", "2"]),
            (dict(centroids=q[0, :, :0]), ValueError, ["num_clusters", "1"]),
            (dict(mask=q[..., 0] > 0), ValueError, ["mask"]),
        ],
        x=q,
        centroids=q[0, :, :3],
    )
    check_raises(
        spherical_norm,
        [(dict(x=q.int()), TypeError, ["x", "int32"]), (dict(backend="triton", x=q[0]), ValueError, ["x"])],
        x=q,
    )


def _kmeans(**kw):
    torch.manual_seed(0)
    return OnlineKMeans(2, 3, 16, **kw).to(device_under_test())


def test_moving_averages():
    x = spherical_norm(make_qkv(2, 2, 40, 16, requires_grad=True)[0])
    frozen, follow = _kmeans(decay=1.0), _kmeans(decay=0.0, renormalise=False)
    for m in (frozen, follow):
        before, s = m.centroids.clone(), m.assign(x)
        assert torch.equal(m.centroids, before) and not any(t.requires_grad for t in (*m.buffers(), *s))
        m.update(*m.statistics((x, s)))
        assert m.centroids.isfinite().all() and m.centroids.grad_fn is None and not list(m.parameters())
        if m is frozen:
            assert rel_error(m.centroids, before) < 1e-5
    for h, c in product(range(2), range(3)):  # decay 0: the means of the batch
        assert rel_error(follow.centroids[h, c], x[:, h][s.assignment[:, h] == c].mean(0)) < 1e-4


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
    check_opcheck(cluster_sums_op, (x, s.order, s.offsets))


def test_separated_clusters_are_found():
    g = torch.Generator().manual_seed(0)
    centres = spherical_norm_reference(torch.randn(1, 1, 3, 16, generator=g))
    label = torch.randint(3, (200,), generator=g)
    x = spherical_norm_reference(centres[:, :, label] + 0.05 * torch.randn(1, 1, 200, 16, generator=g)).to(
        device_under_test()
    )
    torch.manual_seed(4)
    m = OnlineKMeans(1, 3, 16, decay=0.9).to(x.device)
    for _ in range(60):
        m.update(*m.statistics((x, m.assign(x))))
    found = m.assign(x).assignment[0, 0].cpu()
    assert len({(int(a), int(b)) for a, b in zip(label, found)}) == 3  # one to one: mutual information is full
    assert ((m.centroids.norm(dim=-1) - 4).abs() < 1e-3).all()


def test_empty_cluster_and_official_start():
    m = _kmeans(decay=0.0)
    x = m.centroids[None, :, :1].expand(1, 2, 9, 16).contiguous()  # everybody at centroid 0
    before = m.centroids.clone()
    m.update(*m.statistics((x, m.assign(x))))
    assert torch.equal(m.centroids[:, 1:], before[:, 1:]) and m.centroids.isfinite().all()
    official = _kmeans(renormalise=False, initial_count=0.0)
    x = spherical_norm(make_qkv(2, 2, 40, 16)[0])
    official.update(*official.statistics((x, official.assign(x))))
    assert official.centroids.norm(dim=-1).median() > 10 * 4  # the jump of the official code


def test_commitment_gradient():
    x, m = (
        spherical_norm(make_qkv(1, 2, 10, 16, dtype=torch.float64)[0]).requires_grad_(),
        _kmeans(commitment=0.3).double(),
    )
    s = m.assign(x)
    (dx,) = torch.autograd.grad(m.loss(x, s), x)
    mu = torch.stack([m.centroids[h][s.assignment[0, h].long()] for h in range(2)])[None]
    assert rel_error(dx, 2 * 0.3 * (x - mu) / x.numel()) < 1e-12
    assert float(_kmeans(commitment=0.0).double().loss(x.detach(), s)) == 0
    mask = torch.arange(10, device=x.device)[None] < 6
    assert rel_error(m.loss(x, m.assign(x, mask), mask), m.loss(x[:, :, :6], m.assign(x[:, :, :6]))) < 1e-12
    check_raises(
        OnlineKMeans,
        [
            (dict(num_clusters=0), ValueError, ["num_clusters", "0"]),
            (dict(decay=1.5), ValueError, ["decay", "1.5"]),
            (dict(commitment=-1), ValueError, ["commitment"]),
        ],
        num_heads=2,
        num_clusters=3,
        head_dim=8,
    )


def test_two_processes_update_as_one():
    script = """
import os, sys, torch
from attnbook.routing import OnlineKMeans, spherical_norm_reference
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
x = spherical_norm_reference(torch.randn(2, 2, 30, 16, generator=torch.Generator().manual_seed(0)))
def run(x, group):
    torch.manual_seed(0)
    m = OnlineKMeans(2, 3, 16, decay=0.5, process_group=group)
    m.update(*m.statistics((x, m.assign(x))))
    return m.centroids
difference = (run(x[rank:rank + 1], True) - run(x, None)).abs().max()
assert difference < 1e-5, difference
torch.distributed.barrier()
os._exit(0)  # in an orderly exit a thread of gloo now and then aborts the process
"""
    with TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen([sys.executable, "-c", script, str(r), folder], stderr=subprocess.PIPE) for r in range(2)
        ]
        for r in ranks:
            said = r.communicate(timeout=120)[1]
            assert r.returncode == 0, said.decode()


def _small(membership="nearest", **kw):
    torch.manual_seed(0)
    return (
        RoutingTransformerLM(
            20,
            **dict(
                dim=32,
                depth=2,
                heads=4,
                local_heads=2,
                ff_dim=24,
                local_window=6,
                num_clusters=3,
                window=5,
                membership=membership,
            )
            | kw,
        )
        .to(device_under_test())
        .eval()
    )


def _tokens(*shape, seed=0):
    return torch.randint(20, shape, generator=torch.Generator().manual_seed(seed)).to(device_under_test())


@torch.no_grad()
def test_decoding_equals_the_parallel_forward():
    x = _tokens(2, 26)
    for membership, kw in (
        ("nearest", {}),
        ("nearest", dict(self_attention="fallback")),
        ("random", {}),
        ("full", {}),
        ("local", dict(self_attention="fallback")),
        ("nearest", dict(local_heads=0, absolute=True)),
    ):
        model, caches, rows = _small(membership, **kw), None, []
        for t in range(x.shape[1]):
            logits, caches = model.step(x[:, t : t + 1], caches, t)
            rows.append(logits)
        assert (torch.cat(rows, 1) - model(x)[0]).abs().max() < (1e-4 if x.is_cuda else 1e-5), membership


@torch.no_grad()
def test_no_future_in_the_causal_modes():
    x = _tokens(1, 24)
    y = x.clone()
    y[0, 15] = (y[0, 15] + 1) % 20
    for membership in ("nearest", "random", "local", "full"):
        a, b = (_small(membership)(t)[0][0] for t in (x, y))
        assert torch.equal(a[:15], b[:15]) and not torch.equal(a[15], b[15]), membership


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


def test_topw_is_not_decoded():
    check_raises(_small("topw").step, [(dict(tokens=_tokens(1, 1)), ValueError, ["topw", "step"])])





def test_training_moves_centroids_once():
    for membership in ("topw", "nearest"):
        model = _small(membership).train()
        x, y = _tokens(2, 24), _tokens(2, 24, seed=1)
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


def test_layers_for_encoders_and_padding():
    torch.manual_seed(0)
    x, context = (torch.randn(2, n, 32, device=device_under_test()) for n in (20, 13))
    mask = torch.arange(20, device=x.device).expand(2, -1) < 15
    for membership in ("topw", "nearest"):
        layer = (
            RoutingAttention(32, 2, num_clusters=3, window=6, membership=membership, causal=False).to(x.device).train()
        )
        out, aux = layer(x, context)
        assert out.shape == x.shape and bool(aux > 0)
        assert int(layer.router.pending[1].sum()) == 2 * 2 * (20 + 13)  # queries and keys
        out, _ = layer(x, mask=mask)
        cut, _ = layer(x[:, :15])
        assert (out[:, 15:] == 0).all() and (membership == "topw" or rel_error(out[:, :15], cut) < 1e-4)
        assert int(layer.router.pending[1].sum()) == 2 * 2 * 30
        out, _ = layer(x, context, mask=mask)
        cut, _ = layer(x[:, :15], context)
        assert (out[:, 15:] == 0).all() and (membership == "topw" or rel_error(out[:, :15], cut) < 1e-4)


def test_two_backends_one_model():
    x, y = _tokens(1, 20), _tokens(1, 20, seed=1)
    for membership in ("topw", "nearest", "local", "full"):
        models = [
            _small(membership, backend=b, depth=1, self_attention="fallback").train() for b in ("torch", "triton")
        ]
        losses = [m.loss(x, y) for m in models]
        for loss in losses:
            loss.backward()
        assert abs(float(losses[0].detach()) - float(losses[1].detach())) < 1e-4
        for (name, a), (_, b) in zip(*(m.named_parameters() for m in models)):
            assert rel_error(b.grad, a.grad, 1e-6) < 1e-3, (membership, name)


def test_module_errors():
    good = dict(embed_dim=32, num_heads=4, local_heads=2)
    check_raises(
        RoutingSelfAttention,
        [
            (dict(local_heads=5), ValueError, ["local_heads", "5", "4"]),
            (dict(num_heads=3, local_heads=1), ValueError, ["num_heads", "3"]),
            (dict(membership="best"), ValueError, ["membership", "best", "topw"]),
            (dict(num_clusters=0), ValueError, ["num_clusters", "0"]),
            (dict(window=0), ValueError, ["window", "0"]),
            (dict(causal=False), ValueError, ["causal", "local_heads=0"]),
            (dict(membership="full", share_qk=False), ValueError, ["share_qk", "full"]),
        ],
        **good,
    )
    layer = RoutingAttention(32, 2, num_clusters=3, window=6)
    x = torch.zeros(1, 4, 32)
    check_raises(layer, [(dict(context=x), ValueError, ["share_qk", "context"])], x=x)





def test_parameter_counts():
    d, f = 1032, 4096
    layers = 22 * (4 * d * d + 3 * d * f + 4 * d) + 2 * d - 2 * (d // 8) * d  # two routing heads share queries and keys
    assert parameter_counts()["pg19, 8k"] == layers
    assert routing_model("pg19, 8k", 1, depth=2, skip_first=1).blocks[1].attention.head_dim == 129
    memberships = [count_parameters(_small(m)) for m in MEMBERSHIPS]
    assert len(set(memberships)) == 1  # the controls have equal parameters


@torch.no_grad()
def test_honest_bits():
    x, y = (t.cpu() for t in (_tokens(2, 24), _tokens(2, 24, seed=1)))
    for m in ("nearest", "topw"):
        found = bits_per_byte(_small(m), x, y, device_under_test(), False, prefixes=8)
        assert (abs(found["prefix"] - found["same"]) < 1e-4) == (m == "nearest"), (m, found)


@contextmanager
def only_these(*rows):
    "Nothing is on record but made-up rows; what is recorded inside goes to the same place."
    common = dict(key=sorted({"membership", "run", "step", "quarter", "layer", "pair", "method", "n"}), preset="gpu")
    with (
        TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, ATTNBOOK_RESULTS=folder),
        mock.patch("attnbook.lab.bench._checkout", return_value=None),
    ):
        Path(folder, "routing.jsonl").write_text("".join(json.dumps(common | r) + "\n" for r in rows))
        yield


def _row(membership, run, bits, device="one", day=1, **fields):
    "A language model of the gpu preset; from the prefix it has twice the bits."
    what = dict(name="language", training="gpu", device=device, date=f"2026-01-{day:02}T00:00:00+00:00")
    return what | dict(membership=membership, run=run, bits=bits, prefix=2 * bits) | fields


def test_steps_or_seconds():
    cfg = LANGUAGE["cpu"] | dict(length=32, batch=2, windows=2, prefixes=2)
    data = [torch.randint(256, (400,), generator=torch.Generator().manual_seed(i), dtype=torch.uint8) for i in range(3)]
    train = partial(language_experiment, "local", cfg, data, device=device_under_test())
    _, row = train(steps=3, run=1)
    assert row["steps"] == 3 and row["timed"] is False and row["seconds"] > 0 and row["run"] == 1
    _, row = train(seconds=1e-3)
    assert row["steps"] == 20 and row["timed"] is True
    both = (dict(steps=3, seconds=1.0), ValueError, ["seconds", "steps", "3"])
    counts = [(dict(steps=s), ValueError, ["steps", repr(s)]) for s in (0, -1, 2.0, True)]
    check_raises(train, [(dict(), ValueError, ["seconds", "steps"]), both, *counts])


def test_further_seeds_take_the_steps_of_the_timed_run():
    old = [_row(m, 0, 1.0, steps=s) for m, s in (("local", 3), ("full", 2))]
    with only_these(*old, _row("local", 0, 1.0, day=2, device="two", steps=9, timed=False)):
        assert timed_steps() == {"local": 3, "full": 2} and timed_steps(run=1) == timed_steps("laptop") == {}
    with only_these(*old, _row("full", 0, 1.0, day=2, device="two", steps=8)):
        assert timed_steps() == {"full": 8}
    with only_these():
        models = run_language("cpu", device_under_test(), seed=1, steps={"local": 2})
        (row,) = load_results("routing", "language")
        assert set(models) == {"local"} and row["key"] == ["membership", "run", "training"]
        assert (row["run"], row["seed"], row["steps"], row["timed"]) == (1, 1, 2, False) and row["seconds"] > 0
        bad = [
            (dict(budget=5.0), ["budget", "steps", "5.0"]),
            (dict(memberships=("local", "full")), ["steps", "lacks full"]),
            (dict(steps={}), ["steps", "lacks topw"]),
            (dict(steps={"local": 0}), ["steps", "0"]),
        ]
        check_raises(partial(run_language, steps={"local": 2}), [(kw, ValueError, words) for kw, words in bad])
        assert len(load_results("routing")) == 1


@torch.no_grad()
def test_maps_and_divergence():
    model, x = _small("nearest"), _tokens(1, 24)
    layer, t = (
        model.blocks[0].attention,
        torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(0)).to(x.device),
    )
    maps = attention_maps(layer, t)
    assert maps.shape == (4, 24, 24) and (maps.sum(-1) - 1).abs().max() < 1e-2 and (maps.triu(1) == 0).all()
    v = layer.heads(t)[1][2]
    want = layer(t)[0]
    parts = [maps[:2] @ layer.heads(t)[0][2][0], maps[2:] @ v[0]]
    assert rel_error(layer.out(torch.cat(parts).transpose(0, 1).flatten(1)[None]), want) < 1e-2
    p = torch.eye(3)
    assert divergence(p, p).abs().max() < 1e-6 and (divergence(p, p.roll(1, 0)) - math.log(2)).abs().max() < 1e-6
    a = np.array([0, 0, 1, 1, 2, 2])
    assert (
        abs(mutual_information(a, (a + 1) % 3) - 1) < 1e-9
        and mutual_information(np.tile([0, 1], 6), np.repeat([0, 1], 6)) < 1e-9
    )
    assert {r["pair"] for r in head_rows(model, x)} == {"routing, routing", "routing, local", "local, local"}
    health = cluster_health(_small("topw"), x)
    assert 0 < health["coverage"] < 1 and 0 < health["balance"] <= 1 and cluster_health(model, x)["coverage"] == 1


def test_differences_are_taken_run_by_run():
    close = lambda a, b: set(a) == set(b) and all(abs(a[k] - b[k]) < 1e-9 for k in a)
    runs = [_row(m, i, b) for m, bits in (("topw", (1.0, 2.0)), ("local", (1.5, 2.1))) for i, b in enumerate(bits)]
    with only_these(runs[0], runs[2]):
        assert close(_bits("topw", "local"), {"topw better by": 1.0, "parallel": 0.5, "runs": 1})
        assert _bits("topw", "full") is None and next(iter(_bits("topw", "local"))) == "topw better by"
    both = {"topw better by": 0.6, "parallel": 0.3, "runs": 2, "standard error": 0.4, "parallel standard error": 0.2}
    given = dict(timed=False, day=3)
    for more in ([], [_row("topw", 2, 9.0)], [_row("local", 2, 9.0, day=3), _row("full", 0, 9.0)]):  # a run of one only
        with only_these(*runs, *more):
            assert close(_bits("topw", "local"), both), more
    later = [_row(r["membership"], 0, 2 * r["bits"], device="two", day=2) for r in (runs[0], runs[2])]
    with only_these(*later, *runs):  # run 0 again on another device: the newer pair
        assert close(_bits("topw", "local"), both | {"topw better by": 1.1, "parallel": 0.55, "standard error": 0.9,
                                                     "parallel standard error": 0.45})
    with only_these(*runs, later[0]):  # half of it: its training time is of another device
        assert close(_bits("topw", "local"), both)
    with only_these(_row("topw", 1, 1.0, **given), _row("local", 1, 1.5, device="two", **given)):  # equal steps
        assert _bits("topw", "local")["runs"] == 1
    with only_these(*runs):
        beats, *_ = _language_claims(lambda *c: c)
        assert beats[3](beats[4]()) == "holds" and "2 seeds" in beats[5]
        assert all(c.judge().verdict for c in claims())


def test_recall_is_averaged():
    quarter = lambda m, run, accuracy, q=3, **kw: _row(m, run, 0.0, **kw) | dict(
        name="recall", quarter=q, accuracy=accuracy, chance=0.1
    )
    rows = [quarter(m, run, a) for m, at in (("full", (1.0, 1.0)), ("local", (0.1,))) for run, a in enumerate(at)]
    rows += [quarter("nearest", 0, 0.7), quarter("nearest", 1, 0.5, device="two"), quarter("nearest", 2, 0.0, q=2)]
    with only_these(*rows[:3]):
        assert _recall_far() is None  # the rule compares three
    with only_these(*rows, quarter("nearest", 0, 0.9, device="two", day=2)):  # run 0 on two devices: the newer
        found = _recall_far()
        assert abs(found["nearest"] - 0.7) < 1e-9 and (found["full"], found["local"], found["chance"]) == (1, 0.1, 0.1)
        assert found["runs"] == {"full": 2, "local": 1, "nearest": 2}
        assert (found["lowest"]["nearest"], found["highest"]["nearest"]) == (0.5, 0.9)
        *_, claim = _language_claims(lambda *c: c)
        assert claim[3](found) == "holds in part" and "1 or 2 seeds" in claim[5]


def test_times_are_of_one_device():
    def crossover(device, day, power, scale, methods=("ours", "topw (ours)", "flash", "cudnn")):
        for m, n in product(methods, (16384, 32768, 65536)):
            ms = scale * (n / 16384) ** (power if "ours" in m else 2)
            time = dict(method=m, n=n, ms_fwd=ms, ms_bwd=ms if "ours" in m else 4 * ms)
            yield dict(name="crossover", device=device, date=f"2026-01-{day:02}T00:00:00+00:00") | time

    old, new = list(crossover("one", 1, 1.5, 100.0)), list(crossover("two", 2, 1.0, 1.0))
    for rows in (old + new, new + old):  # both complete: the newer
        with only_these(*rows):
            assert {r["device"] for r in _gpu("crossover")} == {"two"} and len(_gpu("crossover", n=65536)) == 4
            assert abs(_total_speed(16384) - 2.5) < 1e-9 and abs(_total_speed() - 10) < 1e-9 and break_even() == 16384
            assert abs(_exponents()["routing"] - 1) < 1e-6 and abs(_exponents()["plain"] - 2) < 1e-6
            assert _speed("crossover", {"flash", "cudnn"}, n=65536) == 4
    with only_these(*old, *crossover("two", 2, 1.0, 1.0, ("flash",))):  # nothing is filled up from the older
        assert _total_speed() is None and _exponents() is None and break_even() is None
    with only_these():
        assert _gpu("crossover") == [] and _exponents() is None


def test_a_run_counts_once():
    leak = lambda run, gain, step=9, error=0.0, **kw: _row("topw", run, 0.0, **kw) | dict(
        name="leak", step=step, gain=gain, error=error
    )
    rows = [leak(0, 1.0), leak(1, 3.0), leak(0, 5.0, day=2, device="two"), leak(0, 9.0, step=4)]
    with only_these(*rows):
        assert leak_summary() == {"topw": dict(gain=4.0, error=1.0, runs=2, step=9)}
    head = lambda value, **kw: dict(name="heads", layer=0, divergence=value) | kw
    old = {k: v for k, v in _row("topw", 0, 0.0).items() if k != "run"}  # recorded before rows had a run
    with only_these(
        *(old | head(0.1, pair=p) for p in ("local, local", "routing, local")),
        *(_row("topw", i, 0.0, day=2) | head(0.2 + 0.2 * i, pair="local, local") for i in range(2)),
        *(_row("topw", i, 0.0, day=2) | head(0.5, pair="routing, local") for i in range(2)),
    ):
        found = _divergences()
        assert abs(found["local_local"] - 0.3) < 1e-9 and found["routing_local"] == 0.5 and found["runs"] == 2
