# Written from the test cells of nbs/7_looking_inside/vitlens.ipynb by `attnbook export`. Do not edit.
# fmt: off
import base64
import json
import math
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnbook.engine import Launch, arch_of
from attnbook.lab.stats import interval
from attnbook.lab.testing import (
    check_against_reference,
    check_autocast,
    check_compiles,
    check_deterministic,
    check_gradients,
    check_opcheck,
    check_raises,
    check_strides,
    check_writes_everything,
    make_qkv,
    rel_error,
)
from attnbook.lab.testing import device as device_under_test
from attnbook.layers import count_parameters
from attnbook.vit import ViT, attention_maps
from attnbook.vitlens.experiments_study import class_agreement, moved, penalised_loss, strength_experiment, top_share
from attnbook.vitlens.kernels import launch_lens, lens_constants
from attnbook.vitlens.nets import (
    METRICS,
    MODES,
    SCHEMES,
    gate_gradients,
    head_effects,
    head_importance,
    mean_outputs,
    model_stats,
    prune_curve,
)
from attnbook.vitlens.op import attention_stats, lens_op
from attnbook.vitlens.pattern_nets import (
    PatternAutoencoder,
    adjusted_rand,
    fit_autoencoder,
    k_means,
    name_pattern,
    planted_heads,
)
from attnbook.vitlens.reference import (
    attention_stats_blocks,
    attention_stats_reference,
    displacement_pair_counts,
    displacement_sums,
    hop_pair_counts,
    hop_profile,
    js_divergence,
    mean_attention_distance,
    sum_diagonals,
    value_weighted,
)
from attnbook.vitlens.study import (
    _less_alike,
    _mixture,
    _over_runs,
    _penalty,
    _planted,
    _proxy,
    _pruning,
    _rows,
    _share,
    _speed,
    _trend,
    claims,
)
from attnbook.vitlens.views_nets import explore, explorer_page, importance_view, pattern_view, strength_view


def test_sums_over_diagonals():
    a = torch.arange(12.0).reshape(3, 4)
    assert sum_diagonals(a).tolist() == [8.0, 13.0, 15.0, 18.0, 9.0, 3.0]
    for Q, K in ((1, 5), (4, 1), (3, 7)):
        a = torch.randn(2, Q, K)
        want = torch.stack([sum(a[:, q, q + s] for q in range(Q) if 0 <= q + s < K) for s in range(1 - Q, K)], -1)
        torch.testing.assert_close(sum_diagonals(a), want)


@pytest.mark.parametrize("H, W, first, R", [(4, 3, 0, 4), (4, 3, 1, 2), (4, 3, 3, 1), (1, 5, 0, 1), (3, 1, 0, 2)])
def test_displacements_are_summed(H, W, first, R):
    a, want = torch.rand(R, W, H, W, dtype=torch.float64), torch.zeros(2 * H - 1, 2 * W - 1, dtype=torch.float64)
    for r, x, v, u in np.ndindex(*a.shape):
        want[v - (first + r) + H - 1, u - x + W - 1] += a[r, x, v, u]
    torch.testing.assert_close(displacement_sums(a, first), want)


def test_pair_counts():
    assert hop_pair_counts((7, 7)).tolist() == [49, 312, 480, 528, 480, 360, 192]
    for H, W in ((5, 8), (1, 4), (3, 1), (1, 1)):
        places = [(y, x) for y in range(H) for x in range(W)]
        hops = [max(abs(a - c), abs(b - d)) for a, b in places for c, d in places]
        assert hop_pair_counts((H, W)).tolist() == [hops.count(k) for k in range(max(H, W))]
        counts = displacement_pair_counts((H, W))
        assert counts.sum() == (H * W) ** 2 and counts[0, 0] == 1 and counts[H - 1, W - 1] == H * W
    with pytest.raises(ValueError, match="grid_size"):
        hop_pair_counts((0, 3))


def test_uniform_attention_has_lift_one():
    M = displacement_pair_counts((5, 8)).double() / 40**2
    torch.testing.assert_close(hop_profile(M), torch.ones(8, dtype=torch.float64))
    assert hop_profile(M, kind="mass")[2] > 2 * hop_profile(M, kind="mass")[0]  # geometry alone
    torch.testing.assert_close(hop_profile(M, kind="mass").sum(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(hop_profile(M, kind="mean"), torch.full((8,), 1 / 40, dtype=torch.float64))
    torch.testing.assert_close(hop_profile(M / 4, renormalize=True), hop_profile(M))
    with pytest.raises(ValueError, match="kind must be one of 'mass', 'mean', 'lift', not 'sum'"):
        hop_profile(M, kind="sum")


def test_mean_distance():
    M = torch.zeros(5, 7)
    M[2 + 1, 3 - 2], M[2, 3] = 0.5, 0.25  # (1, -2) and itself
    assert mean_attention_distance(M) == pytest.approx(0.5 * math.sqrt(5))
    assert mean_attention_distance(M, p=math.inf, patch_size=16) == 0.5 * 2 * 16
    assert mean_attention_distance(M, renormalize=True) == pytest.approx(0.5 * math.sqrt(5) / 0.75)


def test_js_divergence():
    p = torch.tensor([0.5, 0.5, 0.0]).log()
    one, other = torch.tensor([1.0, 0.0, 0.0]).log(), torch.tensor([0.0, 0.0, 1.0]).log()
    assert js_divergence(p, p) == 0 and js_divergence(one, other) == 1
    assert js_divergence(p, one) == js_divergence(one, p)
    m = torch.tensor([0.75, 0.25])
    want = 0.5 * (0.5 * (0.5 / m).log().sum()) + 0.5 * (1 / m[0]).log()
    assert js_divergence(p, one, base=math.e) == pytest.approx(float(want))


def _stats_inputs(B=2, h=2, grid=(3, 4), p=1, d=8, **kw):
    return make_qkv(B, h, p + grid[0] * grid[1], d, **kw), dict(grid_size=grid, num_prefix_tokens=p)


@pytest.mark.parametrize("grid, p", [((3, 4), 0), ((5, 2), 1), ((1, 4), 3), ((1, 1), 1)], ids=str)
def test_statistics_of_uniform_attention(grid, p):
    (q, k, v), kw = _stats_inputs(grid=grid, p=p, dtype=torch.float64)
    s, N, T = attention_stats_reference(q * 0, k, v, **kw), math.prod(grid), p + math.prod(grid)
    torch.testing.assert_close(
        s.displacement, (displacement_pair_counts(grid).to(q) / (N * T)).expand_as(s.displacement)
    )
    torch.testing.assert_close(s.entropy, torch.full_like(s.entropy, math.log(T)))
    torch.testing.assert_close(s.received, torch.ones_like(s.received))
    torch.testing.assert_close(s.out, v.mean(2, keepdim=True).expand_as(v))
    assert s.prefix_mass.shape == (2, 2, T, p)


def test_histogram_and_prefix_mass_sum_to_one():
    (q, k, _), kw = _stats_inputs(p=2, dtype=torch.float64)
    s = attention_stats_reference(q, k, **kw)
    torch.testing.assert_close(s.displacement.sum((-2, -1)), 1 - s.prefix_mass[:, :, 2:].sum(-1).mean(-1))
    assert s.out is None


def test_permuted_patches_change_the_histogram_and_not_the_entropy():
    (q, k, _), kw = _stats_inputs(p=0, dtype=torch.float64)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1)).to(q.device)
    a, b = (attention_stats_reference(x, y, **kw) for x, y in ((q, k), (q[:, :, order], k[:, :, order])))
    torch.testing.assert_close(a.entropy[:, :, order], b.entropy)
    assert rel_error(a.displacement, b.displacement) > 0.1


def test_value_weighted_attention():
    (q, k, v), kw = _stats_inputs(dtype=torch.float64)
    weight = torch.randn(10, 16, dtype=torch.float64, device=q.device)
    s = attention_stats_reference(*value_weighted(q, k, v, weight), **kw, scale=8**-0.5)
    A = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
    norm = torch.stack([(v[:, m] @ weight[:, 8 * m : 8 * m + 8].T).norm(dim=-1) for m in range(2)], 1)
    want = A * norm[:, :, None]
    want = want / want.sum(-1, keepdim=True)
    torch.testing.assert_close(s.received, want.sum(-2))
    torch.testing.assert_close(s.prefix_mass, want[..., :1])


GRIDS = {  # grid, prefix tokens
    "3 x 4": ((3, 4), 1),
    "5 x 9, two in front": ((5, 9), 2),
    "1 x 6": ((1, 6), 0),
    "6 x 1": ((6, 1), 1),
    "one patch": ((1, 1), 0),
}


@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize("grid, p", GRIDS.values(), ids=GRIDS)
def test_blocks_agree_with_the_reference(grid, p, rows, monkeypatch):
    (q, k, v), kw = _stats_inputs(grid=grid, p=p, kv_heads=1, Dv=5)
    monkeypatch.setitem(attention_stats_blocks.__globals__, "BLOCK_NUMBERS", rows * 4 * (p + math.prod(grid)) * grid[1])
    some = lambda f: lambda *x: tuple(t for t in f(*x, **kw) if t.numel())  # without prefix no prefix mass
    check_against_reference(
        some(attention_stats_blocks), some(attention_stats_reference), (q, k, v), tol=1e-5, floor=1e-2
    )


def test_reference_has_the_right_gradients():
    (q, k, v), kw = _stats_inputs(p=2)
    check_gradients(lambda *x: tuple(attention_stats_reference(*x, **kw)), (q, k, v))
    check_gradients(lambda *x: tuple(attention_stats_blocks(*x, **kw)), (q, k, v))


def _tuple(op, **kw):
    "An operation that returns the statistics that are not empty, as a tuple."
    return lambda *x: tuple(t for t in op(*x, **kw) if t is not None and t.numel())


CASES = {  # grid, prefix, heads, kv_heads, head_dim, v_dim
    "4 x 5": ((4, 5), 1, 2, 2, 16, 16),
    "7 x 7, odd dims": ((7, 7), 1, 1, 1, 12, 9),
    "5 x 3, two in front": ((5, 3), 2, 2, 1, 16, 16),
    "1 x 9": ((1, 9), 0, 1, 1, 16, 16),
    "9 x 1": ((9, 1), 1, 1, 1, 16, 16),
    "one patch": ((1, 1), 1, 1, 1, 16, 16),
}


@pytest.mark.parametrize("grid, p, h, kv, d, dv", CASES.values(), ids=CASES)
def test_operation(grid, p, h, kv, d, dv):
    q, k, v = make_qkv(1, h, p + math.prod(grid), d, kv_heads=kv, Dv=dv)
    kw = dict(grid_size=grid, num_prefix_tokens=p, scale=0.4)
    check_against_reference(
        _tuple(attention_stats, backend="triton", **kw),
        _tuple(attention_stats_reference, **kw),
        (q, k, v),
        tol=2e-5,
        floor=1e-2,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_types(dtype):
    (q, k, v), kw = _stats_inputs(1, 2, d=16)
    check_against_reference(
        _tuple(attention_stats, backend="triton", **kw),
        _tuple(attention_stats_reference, **kw),
        (q, k, v),
        dtype=dtype,
        tol=2e-2,
        floor=1e-2,
    )


def test_rows_of_several_tiles():
    "Three blocks of 16, the last with 5 patches, and heads taken one at a time."
    (q, k, _), kw = _stats_inputs(1, 2, grid=(2, 37), d=16)
    table = lens_constants.__globals__["LENS_LAUNCH"]
    with (
        table.trying(arch_of(q.device), "forward", 32, 16, Launch(16, 0, 1, 1)),
        table.trying(arch_of(q.device), "dq", 32, 16, Launch(32, 0, 1, 1)),
    ):
        check_against_reference(
            _tuple(attention_stats, backend="triton", **kw),
            _tuple(attention_stats_reference, **kw),
            (q, k),
            tol=2e-5,
            floor=1e-2,
        )


def test_heads_are_taken_in_turns(monkeypatch):
    (q, k, _), kw = _stats_inputs(2, 2, d=16)
    want = attention_stats(q, k, backend="triton", **kw)
    monkeypatch.setitem(launch_lens.__globals__, "PARTS_BYTES", 3 * (8 * 13 * 4 + 8 * 5 * 16))
    for a, b in zip(attention_stats(q, k, backend="triton", **kw)[1:], want[1:]):
        assert torch.equal(a, b)


def test_a_head_that_looks_to_the_right():
    H, W = 4, 5
    x = torch.arange(H * W, device=device_under_test())
    code = F.one_hot(x, H * W).float()[None, None]
    q = 200 * F.one_hot(torch.where(x % W < W - 1, x + 1, x), H * W).float()[None, None]
    s = attention_stats(q, code, grid_size=(H, W), num_prefix_tokens=0, scale=1.0, backend="triton")
    M = s.displacement[0, 0]
    assert M[H - 1, W - 1 : W + 1].tolist() == pytest.approx([4 / 20, 16 / 20])  # the border looks at itself
    assert s.entropy.abs().max() < 1e-6 and s.received[0, 0, :W].tolist() == [0, 1, 1, 1, 2]


@pytest.mark.parametrize("factor", [0.0, 1e4])
def test_extreme_logits(factor):
    (q, k, v), kw = _stats_inputs(1, 1, d=16)
    inputs = [q * factor, k, v]
    got = attention_stats(*inputs, backend="triton", **kw)
    want = attention_stats_reference(*(t.double() for t in inputs), **kw)
    for a, b in zip(got, want):
        assert a.isfinite().all() and rel_error(a, b, floor=1.0) < 5e-3  # an LSE of 1e4 has 3 decimals
    for t in inputs:
        t.requires_grad_()
    s = attention_stats(*inputs, backend="triton", **kw)
    grads = torch.autograd.grad(s.entropy.sum() + s.displacement.pow(2).sum() + s.received.pow(2).sum(), inputs[:2])
    assert all(g.isfinite().all() for g in grads)


def test_manners():
    (q, k, v), kw = _stats_inputs(1, 1, grid=(2, 3), d=16)
    op = _tuple(attention_stats, backend="triton", **kw)
    check_strides(op, (q, k, v), tol=2e-5, floor=1e-2)
    check_deterministic(op, (q, k, v), repeats=2)
    check_writes_everything(op, (q, k, v))
    check_compiles(op, (q, k, v), tol=2e-5, floor=1e-2)
    check_autocast(op, (q, k, v), tol=3e-2, floor=1e-1)


def test_the_operation_of_the_library():
    q, k, _ = make_qkv(1, 1, 7, 16, requires_grad=True)
    lse = torch.logsumexp(q.detach() @ k.detach().transpose(-1, -2) / 4, -1).requires_grad_()
    check_opcheck(lens_op, (q, k, lse, 2, 3, 1, 0.25))


def test_without_values_and_without_images():
    (q, k, v), kw = _stats_inputs(1, 2, d=8)
    a, b = attention_stats(q, k, backend="triton", **kw), attention_stats(q, k, v, backend="triton", **kw)
    assert a.out is None
    for x, y in zip(a[1:], b[1:]):
        torch.testing.assert_close(x, y)


def test_bad_input():
    (q, k, v), kw = _stats_inputs(1, 2, d=8)
    check_raises(
        attention_stats,
        [
            (dict(grid_size=(3, 5)), ValueError, ["grid_size", "12 patches", "3 x 5"]),
            (dict(num_prefix_tokens=-1), ValueError, ["num_prefix_tokens", "-1"]),
            (dict(num_prefix_tokens=2), ValueError, ["grid_size", "11 patches"]),
            (dict(k=k[:, :, :9], v=v[:, :, :9]), ValueError, ["k", "13 tokens", "9"]),
            (dict(v=v.double()), TypeError, ["v", "float64"]),
            (dict(backend="cuda"), ValueError, ["backend"]),
            (dict(grid_size=(3, 4.0)), TypeError, ["grid_size[1]", "4.0"]),
            (dict(scale=math.inf), ValueError, ["scale"]),
        ],
        q=q,
        k=k,
        v=v,
        **kw,
    )


def test_the_model_of_the_chapter():
    assert count_parameters(lambda: ViT(28, 4, 1, 10, dim=64, depth=6, num_heads=4)) == 305_034


def _model(seed=0, **kw):
    torch.manual_seed(seed)
    model = ViT(**dict(img_size=8, patch_size=2, in_channels=1, num_classes=4, dim=12, depth=3, num_heads=3) | kw)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(5, 1, 8, 8, generator=g), torch.randint(4, (5,), generator=g)
    return model.to(device_under_test()).eval(), x.to(device_under_test()), y.to(device_under_test())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_effects_agree_with_gates(scheme):
    model, x, y = _model()
    found = head_effects(model, x, y, scheme=scheme)
    was = model(x).log_softmax(-1)
    for i, m in product(range(3), range(3)):
        gates = torch.ones(3, 3, device=x.device)
        gates[i] = (
            torch.arange(3, device=x.device) == m if scheme == "keep_one" else torch.arange(3, device=x.device) != m
        )
        now = model(x, gates).log_softmax(-1)
        pick = lambda t: t[torch.arange(5), y]
        want = dict(
            prob_drop=pick(was).exp() - pick(now).exp(),
            loss_rise=pick(was) - pick(now),
            jsd=js_divergence(was, now),
            flip=(was.argmax(-1) != now.argmax(-1)).float(),
            acc_drop=(was.argmax(-1) == y).float() - (now.argmax(-1) == y).float(),
        )
        features = [model.forward_head(model.forward_features(x, head_gates=g), pre_logits=True) for g in (None, gates)]
        want["cls_shift"] = 1 - F.cosine_similarity(*features, dim=-1)
        for name, w in want.items():
            torch.testing.assert_close(found[name][:, i, m], w, atol=2e-5, rtol=1e-4, msg=name)
    assert set(found) == set(METRICS) and found["loss_rise"].abs().max() > 0.01


@pytest.mark.parametrize("mode", MODES[1:])
def test_other_ways_to_prune(mode):
    model, x, y = _model()
    means = mean_outputs(model, x)
    got = head_importance(model, x, y, metric="loss_rise", mode=mode, means=means)[:, 1, 2]
    tokens, grid = model.embed(x)
    tokens, block = model.run_blocks(tokens, grid, stop=1), model.blocks[1]
    q, k, v = block.attn.project(block.norm1(tokens))
    A = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    A[:, 2] = torch.eye(17) if mode == "identity" else 1 / 17
    out = A @ v
    if mode == "mean":
        out[:, 2] = means[1, 2]
    after = model.norm(model.run_blocks(block.finish(tokens, block.attn.merge(out)), grid, start=2))
    want = F.cross_entropy(model.forward_head(after), y, reduction="none") - F.cross_entropy(
        model(x), y, reduction="none"
    )
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_gradients_of_gates_are_finite_differences():
    model, x, y = _model()
    model, x = model.double(), x.double()
    got, step = gate_gradients(model, x, y), 1e-5
    for i, m in ((0, 1), (2, 2)):
        gates = torch.ones(3, 3, dtype=torch.float64, device=x.device)
        sides = []
        for sign in (1, -1):
            gates[i, m] = 1 + sign * step
            sides.append(F.cross_entropy(model(x, gates), y, reduction="none"))
        torch.testing.assert_close(
            got[:, i, m].double(), ((sides[0] - sides[1]) / (2 * step)).abs().detach(), rtol=1e-4, atol=1e-6
        )


def test_pruning_curves():
    model, x, y = _model()
    curve = prune_curve(model, x, y, [4, 0])
    gates = torch.ones(3, 3, device=x.device)
    assert curve[0] == pytest.approx(float((model(x).argmax(-1) == y).float().mean()))
    gates[1, 1] = gates[0, 0] = 0
    assert len(curve) == 3 and curve[2] == pytest.approx(float((model(x, gates).argmax(-1) == y).float().mean()))


def test_effects_refuse_and_restore():
    model, x, y = _model(drop_rate=0.5)
    model.train()
    assert (
        torch.equal(head_importance(model, x, metric="jsd"), head_importance(model, x, metric="jsd")) and model.training
    )
    check_raises(
        head_importance,
        [
            (dict(metric="iou"), ValueError, ["metric", "iou"]),
            (dict(mode="noise"), ValueError, ["mode", "noise"]),
            (dict(scheme="all"), ValueError, ["scheme", "all"]),
            (dict(mode="mean"), ValueError, ["means"]),
            (dict(labels=None), ValueError, ["labels", "loss_rise"]),
        ],
        model=model,
        images=x,
        labels=y,
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_statistics_of_a_model(weighted):
    model, x, _ = _model(reg_tokens=1)
    found, A = model_stats(model, x, weighted=weighted), attention_maps(model, x)
    if weighted:
        inputs = []
        model.forward_features(x, look=lambda i, block, t: inputs.append(block.attn.project(block.norm1(t))[2]))
        W = [b.attn.proj.weight.unflatten(1, (3, 4)) for b in model.blocks]
        A = (
            A
            * torch.stack([torch.einsum("bhjv,ohv->bhjo", v, w).norm(dim=-1) for v, w in zip(inputs, W)], 1)[
                ..., None, :
            ]
        )
        A = A / A.sum(-1, keepdim=True)
    for i in range(3):
        torch.testing.assert_close(found[i].received, A[:, i].sum(-2), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[i].prefix_mass, A[:, i, ..., :2], atol=1e-4, rtol=1e-4)
        M = displacement_sums(A[:, i, :, 2:, 2:].unflatten(-1, (4, 4)).unflatten(2, (4, 4))) / 16
        torch.testing.assert_close(found[i].displacement, M, atol=1e-4, rtol=1e-4)


def test_clusters_are_found_and_compared():
    g = torch.Generator().manual_seed(0)
    wanted = torch.arange(60) % 3
    x = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])[wanted] + torch.randn(60, 2, generator=g)
    found = k_means(x, 3)
    assert adjusted_rand(found, wanted) == 1.0 and torch.equal(found, k_means(x, 3)) and k_means(x, 1).max() == 0
    assert abs(adjusted_rand(torch.randint(3, (600,), generator=g), torch.randint(3, (600,), generator=g))) < 0.02
    assert adjusted_rand(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 2])) == pytest.approx(0.5714, abs=1e-4)
    assert adjusted_rand(torch.zeros(4).long(), torch.zeros(4).long()) == 1.0


WANTED = ["self", "offset (0, -1)", "ring 2", "uniform", "stripe"]


@pytest.mark.parametrize("grid", [(7, 7), (5, 9)], ids=str)
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_planted_heads_are_found(grid, noise):
    q, k = (t.to(device_under_test()) for t in planted_heads(grid, noise=noise))
    s = attention_stats(q, k, grid_size=grid, num_prefix_tokens=0, scale=1.0)
    assert name_pattern(s) == [WANTED]
    if noise == 0:
        H, W = grid
        assert float(s.displacement[0, 0, H - 1, W - 1]) == pytest.approx(1) and s.entropy[0, 0].abs().max() < 1e-4
        assert float(s.displacement[0, 1, H - 1, W - 2]) == pytest.approx((W - 1) / W)
        assert float(hop_profile(s.displacement[0, 2], kind="mass")[2]) == pytest.approx(1, abs=1e-4)
        assert float(s.entropy[0, 3].mean()) == pytest.approx(math.log(H * W), abs=1e-4)
        assert float(s.received[0, 4].unflatten(-1, grid)[:, W - 2].sum()) == pytest.approx(H * W, rel=1e-4)


def test_what_prefix_tokens_and_mixtures_are_called():
    q, k = planted_heads((5, 5))
    s = attention_stats(q, k, grid_size=(5, 5), num_prefix_tokens=0, scale=1.0)
    gone = s._replace(displacement=0.3 * s.displacement)  # the rest went to prefix tokens
    assert name_pattern(gone)[0][0] == "prefix"
    both = s._replace(
        displacement=s.displacement[:, :1] * 0.45 + s.displacement[:, 2:3] * 0.45 + s.displacement[:, 3:4] * 0.1,
        entropy=s.entropy[:, :1],
        received=s.received[:, :1],
    )
    assert name_pattern(both) == [["mixed"]]


def test_autoencoder():
    q, k = planted_heads((5, 5), noise=0.1)
    maps = (q @ k.transpose(-1, -2)).softmax(-1)[0].repeat(4, 1, 1)
    net, explained = fit_autoencoder(maps, steps=60, batch=20)
    again, other = (fit_autoencoder(maps, steps=2, batch=20, seed=s)[0].spread.weight for s in (0, 1))
    assert explained > 0.3 and not torch.equal(again, other)
    assert torch.equal(again, fit_autoencoder(maps, steps=2, batch=20, seed=0)[0].spread.weight)
    assert net.encode(maps).shape == (20, 8) and net(maps).shape == maps.shape
    assert count_parameters(PatternAutoencoder(50)) == 117_881
    with pytest.raises(ValueError, match="tokens must be an integer of at least 1, not 0"):
        PatternAutoencoder(0)


def test_views_draw_what_they_are_given():
    import matplotlib.pyplot as plt

    x = torch.zeros(4, 2, 3)
    x[:, 1, 2], x[:, 0, 0] = 1.0, -0.5
    ax = importance_view(x, mark=1)
    frames = [r.get_xy() for r in ax.patches]
    assert frames == [(2 - 0.48, 1 - 0.48)] and {t.get_text() for t in ax.texts} == {"1", "-0.5"}
    axs = strength_view(torch.ones(2, 3, 4), importance=torch.tensor([[0, 1, 0], [1.0, 0, 0]]))
    assert [[line.get_linewidth() for line in a.lines[:3]] for a in axs] == [[1, 2, 1], [2, 1, 1]]
    axs = pattern_view(torch.rand(2, 3, 5, 7), names=[["a", "b", "c"], ["d", "e", "f"]])
    assert axs.shape == (2, 3) and axs[1, 2].get_title() == "f"
    plt.close("all")


def test_the_page_holds_the_maps(tmp_path):
    model, x, _ = _model()
    page = explorer_page(model, x[:2], path=tmp_path / "page.html")
    data = json.loads(page.split("const D = ")[1].split(", root =")[0].replace("<\\/", "</"))
    got = np.frombuffer(base64.b64decode(data["maps"]), np.uint8).reshape(2, 3, 3, 17, 17) / 255
    assert np.abs(got**2 - attention_maps(model, x[:2]).detach().cpu().numpy()).max() < 0.005
    assert (data["H"], data["W"], data["prefix"], data["Y"]) == (4, 4, 1, 8) and len(data["notes"]) == 3
    assert page in (tmp_path / "page.html").read_text(encoding="utf-8")
    hard = explorer_page(model, x[:1], notes=[["</script>"] * 3] * 3)
    assert hard.count("</script>") == 1  # the page's own
    with pytest.raises(ValueError, match="images must be fewer"):
        explorer_page(model, torch.zeros(1, 1, 300, 300))


def test_the_page_is_shown():
    pytest.importorskip("IPython")
    model, x, _ = _model()
    assert explore(model, x[:1], kind="page").data.startswith('<div class="lens"')


def test_widgets():
    pytest.importorskip("ipywidgets")
    import matplotlib.pyplot as plt

    model, x, _ = _model()
    controls = explore(model, x, kind="widgets")
    assert [w.max for w in controls.children[:4]] == [5, 3, 3, 16] and controls.children[3].min == 0
    controls.update()
    plt.close("all")


def test_digits_are_moved():
    x = torch.zeros(40, 1, 28, 28)
    x[:, :, 10:18, 10:18] = 1
    x[:, :, 12, 13] = 2
    y, labels = moved(x, torch.arange(40), generator=torch.Generator().manual_seed(0))
    place = (y == 2).nonzero()[:, 2:]
    assert torch.equal(labels, torch.arange(40)) and y.shape == x.shape and len(place) == 40
    assert (place - torch.tensor([12, 13])).abs().max() == 3 and (y.sum((1, 2, 3)) == x.sum((1, 2, 3))).all()
    y, _ = moved(
        torch.ones(9, 1, 28, 28) * torch.arange(1.0, 10)[:, None, None, None],
        labels[:9],
        generator=torch.Generator().manual_seed(0),
    )
    assert set(y.unique().tolist()) == set(range(1, 10))  # background is the least


def test_shares_and_agreement():
    assert top_share(torch.ones(4, 4)) == pytest.approx(0.25)
    assert top_share(torch.tensor([[8.0, 1.0], [1.0, -3.0]])) == pytest.approx(0.8) and math.isnan(
        top_share(-torch.ones(4))
    )
    g = torch.Generator().manual_seed(0)
    labels, noise = torch.arange(40) % 4, 0.1 * torch.randn(40, 2, 6, generator=g)
    own = torch.randn(4, 2, 6, generator=g)
    each, same = (
        class_agreement(own[labels] + noise, labels),
        class_agreement(own[:1].expand(40, -1, -1) + noise, labels),
    )
    assert each["within"] > 0.8 and each["between"] < 0.5 and same["between"] > 0.8
    assert math.isnan(class_agreement(own, torch.arange(4))["within"])


def test_the_penalty_is_the_sum_it_says():
    model, x, y = _model()
    A = attention_maps(model, x)[:, 0, :, 1:, 1:]
    place = torch.cartesian_prod(torch.arange(4), torch.arange(4)).to(x.device)
    hop = (place[None] - place[:, None]).abs().amax(-1)
    want = F.cross_entropy(model(x), y) + 0.5 * ((A * hop**2).sum((-2, -1)) / 16).mean()
    torch.testing.assert_close(penalised_loss(0.5)(model, x, y), want)
    torch.testing.assert_close(penalised_loss(0.0)(model, x, y), F.cross_entropy(model(x), y))


def test_strength_of_a_model():
    model, x, _ = _model()
    s = strength_experiment(model, x)
    A = attention_maps(model, x).mean(0)
    M = displacement_sums(A[..., 1:, 1:].unflatten(-1, (4, 4)).unflatten(2, (4, 4))) / 16
    torch.testing.assert_close(
        torch.tensor(s["distance"]), mean_attention_distance(M, renormalize=True).detach().cpu(), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(torch.tensor(s["to_class"]), A[..., 1:, 0].mean(-1).detach().cpu(), atol=1e-4, rtol=1e-4)
    assert np.shape(s["lift"]) == (3, 3, 4) and s["uniform"] == pytest.approx(
        float(torch.cdist(*[torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))] * 2).mean())
    )


def _interval(*values):
    return interval(values)


VERDICTS_OF = {  # claim -> made-up measurements that hold, hold in part (or are undecided), do not hold
    "Importance is uneven": (_interval(0.6, 0.61), _interval(0.42, 0.43), _interval(0.25, 0.25)),
    "Which heads matter": (_interval(0.3, 0.31), None, _interval(-0.3, -0.31)),
    "Importance by pruning": (_interval(5.0, 5.1), None, _interval(-5.0, -5.1)),
    "and which cannot": (_interval(5.0, 5.1), None, _interval(-5.0, -5.1)),
    "Shallow layers": (dict(local=3.0, far=0.8), dict(local=1.0, far=0.9), dict(local=1.0, far=0.5)),
    "Attention spreads": (_interval(0.5, 0.51), None, _interval(-0.5, -0.51)),
    "Patches attend": (_interval(0.5, 0.51), None, _interval(-0.5, -0.51)),
    "An autoencoder": (_interval(0.7, 0.71), _interval(0.45, 0.46), _interval(0.0, 0.01)),
    "They say more": (_interval(0.1, 0.11), None, _interval(-0.1, -0.11)),
    "The lens finds": (
        {"noise 0.0": 5, "noise 0.3": 5},
        {"noise 0.0": 5, "noise 0.3": 4},
        {"noise 0.0": 3, "noise 0.3": 3},
    ),
    "The gradient of": (_interval(0.8, 0.81), _interval(0.5, 0.51), _interval(0.1, 0.11)),
    "A penalty": (_interval(1.0, 1.1), None, _interval(-1.0, -1.1)),
    "Statistics are faster": [dict(a=x, b=9.0) for x in (3.0, 2.9, 0.9)],
    "and at every size": [dict(a=x, b=9.0) for x in (2.0, 1.9, 0.9)],
    "They take": [dict(a=x) for x in (50.0, 49.0, 19.0)],
    "They cost": [dict(a=x, b=1.0) for x in (0.5, 0.4, 0.2)],
    "Starting again": [dict(a=x) for x in (1.8, 1.7, 0.9)],
}


@pytest.mark.parametrize("claim", VERDICTS_OF)
def test_rules(claim):
    (rule,) = (c.rule for c in claims() if c.statement.startswith(claim))
    say = lambda m: f if isinstance(f := rule(m), str) else f[0]
    for m, verdict in zip(VERDICTS_OF[claim], ("holds", "holds in part", "does not hold here")):
        if m is not None:
            assert say(m) == verdict
    if VERDICTS_OF[claim][1] is None:
        assert say(_interval(-1.0, 1.0)) == "not measured"
    if hasattr(VERDICTS_OF[claim][0], "half"):
        assert say(_interval(9.0)) == "not measured"


def test_every_claim_is_tested():
    assert (
        len(claims()) == len(VERDICTS_OF) + 1 and [c.judge().verdict for c in claims()].count("out of reach here") == 1
    )


def _recorded(monkeypatch, **tables):
    "Makes the study read these rows (name -> rows) as if they were recorded."

    def read(chapter, name=None, **where):
        found = [dict(device="G", date="2026-01-01", versions={}, preset="gpu") | r for r in tables.get(name, [])]
        return [r for r in found if all(r.get(k) == v for k, v in where.items())]

    monkeypatch.setitem(_rows.__globals__, "load_results", read)


def test_numbers_are_looked_up(monkeypatch):
    judged = lambda run, **kw: dict(run=run, metric="loss_rise", scheme="leave_one_out", mode="zero", rank=1.0) | kw
    curve = lambda run, order, area: dict(run=run, order=order, area=area)

    def layers(run, which, distance):
        return dict(
            run=run,
            model=which,
            distance=[[d, d] for d in distance],
            uniform=4.0,
            to_class=[[-d] for d in distance],
            lift=[[[9.0, 5.0], [1.0, 0.2]]] * 4,
        )

    _recorded(
        monkeypatch,
        importance=[judged(s, top_share=0.5 + s / 10, within=0.9, between=0.4) for s in (0, 1)]
        + [judged(s, metric="gradient", rank=0.3) for s in (0, 1)]
        + [judged(0, top_share=9.0, preset="cpu")],
        pruning=[
            curve(0, o, a)
            for o, a in (
                ("loss_rise, leave_one_out, zero", 0.9),
                ("most important first", 0.2),
                ("random 0", 0.5),
                ("random 1", 0.7),
            )
        ],
        strength=[layers(0, "trained", [1, 2, 3, 5]), layers(0, "random", [4, 3, 2, 1])],
        penalty=[
            dict(run=s, weight=w, accuracy=a) for s in (0, 1) for w, a in ((0.0, 0.5), (0.1, 0.9), (1.0, 0.6 + s / 10))
        ],
        patterns=[dict(run=0, stable=0.7, head_autoencoder=0.2, head_histogram=0.5)],
    )
    assert _over_runs(_share, "importance").mean == pytest.approx(0.55) and _over_runs(
        _less_alike, "importance"
    ).mean == pytest.approx(0.5)
    assert _over_runs(_proxy, "importance").mean == pytest.approx(0.3)
    assert _over_runs(_pruning, "pruning").mean == pytest.approx(30)
    assert _over_runs(lambda r: -_pruning(r, "most important first"), "pruning").mean == pytest.approx(40)
    assert _over_runs(partial(_trend, field="distance"), "strength").mean == pytest.approx(2)
    assert _over_runs(partial(_trend, field="to_class"), "strength").mean == pytest.approx(-2)
    assert _mixture() == dict(local=5.0, far=0.25) and _penalty().mean == pytest.approx(15)
    found = {c.statement[:16]: c.measured() for c in claims() if c.measured}
    assert found["They say more ab"].mean == pytest.approx(-0.3) and found["An autoencoder f"].mean == pytest.approx(
        0.7
    )
    _recorded(monkeypatch)
    assert (
        _mixture() is None
        and _penalty() is None
        and _over_runs(_share, "importance") is None
        and _speed("ms_fwd") is None
    )


def test_speeds_are_looked_up(monkeypatch):
    time = lambda side, method, ms, mb=1.0: dict(side=side, method=method, ms_fwd=ms, ms_bwd=2 * ms, peak_mb_fwd=mb)
    rows = [
        time(s, m, ms * s, mb)
        for s in (14, 64)
        for m, ms, mb in (
            ("ours", 1.0, 1.0),
            ("eager", 4.0, 90.0),
            ("eager compiled", 3.0, 60.0),
            ("sdpa alone", 0.6, 1.0),
        )
    ]
    _recorded(monkeypatch, size=rows, training=rows)
    found = {c.statement: c.measured() for c in claims() if c.measured}
    ratio = lambda text: [round(s.ratio, 6) for s in next(v for k, v in found.items() if k.startswith(text))]
    assert ratio("Statistics are faster") == [3.0] and ratio("and at every size") == [3.0, 3.0]
    assert ratio("They take") == [60.0] and ratio("They cost") == [0.6, 0.6]


def test_planted_heads_are_counted():
    assert _planted() == {"noise 0.0": 5, "noise 0.3": 5}
