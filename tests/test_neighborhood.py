# Written from the test cells of nbs/3_locality/neighborhood.ipynb by `attnbook export`. Do not edit.
import math
from functools import partial
from itertools import product
from unittest import mock

import numpy as np
import pytest
import torch

from attnbook.attention import attention_reference, merge_attention
from attnbook.engine import _describable
from attnbook.lab.bench import peak_memory
from attnbook.lab.testing import TOLERANCE, check_against_reference, check_operation, check_raises, rel_error
from attnbook.lab.testing import device as device_under_test
from attnbook.neighborhood import (
    CALIBRATING,
    NAT,
    SIMULATED,
    NeighborhoodAttention1d,
    NeighborhoodAttention2d,
    NeighborhoodAttention3d,
    StepCosts,
    _gpu_ratio,
    _memory_growth,
    _simulator_error,
    _simulator_error_with_fixed_part,
    _simulator_errors,
    _stride_gain,
    axis_classes,
    axis_window,
    choose_q_tile,
    claims,
    dinat_base,
    dinat_mini,
    dinat_small,
    dinat_tiny,
    fit_costs,
    inner_share,
    inverse_axis_window,
    kernel_steps,
    kernel_tiles,
    na1d,
    na2d,
    na3d,
    nat_base,
    nat_mini,
    nat_small,
    nat_tiny,
    neighborhood_attention,
    neighborhood_attention_reference,
    neighborhood_axes,
    neighborhood_mask,
    neighborhood_pairs,
    predicted_us,
    simulated_times,
    tile_spans,
    tile_waste,
    unseen_tables,
)


def count_steps(shape, kw):
    "What `kernel_steps` says, counted from the dense mask."
    axes, (tile, brick) = neighborhood_axes(shape, **kw), kernel_tiles(shape, **kw)
    mask = neighborhood_mask(shape, **kw).view(*shape, *shape).numpy()
    sides = []                                                         # of every axis: the positions of every tile
    for axis, t in zip(axes, tile):
        longest = -(-axis.length // axis.dilation)
        classes = [range(r, axis.length, axis.dilation) for r in range(axis.dilation)]
        sides.append([c[i:i + t] for c in classes for i in range(0, longest, t)])
    counts = []
    for queries in product(*sides):
        seen = mask[np.ix_(*queries)].reshape(-1, *shape)              # [queries, *shape]
        free = steps = 0
        if len(seen):
            first = [int(k.min()) for k in seen.any(0).nonzero()]
            bricks = [[range(k, axis.length, axis.dilation)[i:i + u] for i in range(0, axis.length, u)]
                      for axis, k, u in zip(axes, first, brick)]
            for keys in product(*bricks):
                block = seen[np.ix_(range(len(seen)), *keys)]          # [queries, *brick], less at a border
                steps += block.any()
                free += block.all() and block.shape[1:] == brick
        counts.append((free, steps - free))
    free, masked = np.array(counts).T
    if free.sum() < 0.25 * (free + masked).sum():                      # too few: every step takes the mask
        free, masked = 0 * free, free + masked
    return free * math.prod(brick), masked * math.prod(brick)

def test_kernel_steps():
    some = 0
    for shape, kw in (((19, 24), dict(window_size=5)), ((24, 30), dict(window_size=(21, 27))),
                      ((27, 16), dict(window_size=8, stride=8)), ((21, 16), dict(window_size=(5, 8), dilation=(2, 1))),
                      ((11, 37), dict(window_size=(3, 4), dilation=(3, 5), stride=(2, 3))),
                      ((24, 26), dict(window_size=(24, 20), is_causal=(True, False), stride=(1, 4))),
                      ((40, 33), dict(window_size=(37, 33), is_causal=True)),
                      ((6, 9, 10), dict(window_size=(3, 5, 4))), ((5, 8, 16), dict(window_size=(5, 8, 13))),
                      ((4, 8, 9), dict(window_size=(4, 2, 3), stride=(1, 2, 3), is_causal=(True, False, False)))):
        (free, masked), want = kernel_steps(shape, **kw), count_steps(shape, kw)
        assert np.array_equal(free, want[0]) and np.array_equal(masked, want[1]), (shape, kw)
        some += bool(free.any())
    assert 3 <= some < 10                                              # both kinds of steps were there
    check_raises(kernel_steps, [(dict(shape=(64,)), ValueError, ["shape", "two or three"]),
                                (dict(head_dim=257), ValueError, ["head_dim"]),
                                (dict(window_size=9), ValueError, ["window_size", "axis 0"])],
                 shape=(8, 8), window_size=3)


def test_predicted_us():
    costs = StepCosts(launch=2.0, program=1.0, free=0.5, masked=0.75, alone=3.0)
    keys = lambda *n: np.array(n)
    one = keys(128), keys(64)                                          # work 1 + 2 * 0.5 + 0.75
    assert predicted_us(one, 1, costs) == 2 + 3 * 2.75                 # alone on its multiprocessor
    assert predicted_us(one, 4, costs, processors=4) == 2 + 3 * 2.75   # and so are four on four
    assert predicted_us(one, 40, costs, processors=4) == 2 + 10 * 2.75 # ten on each: nobody is alone
    assert predicted_us(one, 41, costs, processors=4) == 2 + 11 * 2.75
    assert predicted_us((keys(0, 0, 256), keys(0, 0, 0)), 1, costs) == 2 + 3 * 3.0   # fewer than multiprocessors
    # work 3, 1, 1, 1 on two: the ones fill up beside the three
    assert predicted_us((keys(256, 0, 0, 0), keys(0, 0, 0, 0)), 1, costs._replace(alone=1.0), processors=2) == 2 + 3
    # in the order of launch: 1, 1, 3 on two take 4, though 3, 1, 1 would take 3
    assert predicted_us((keys(0, 0, 256), keys(0, 0, 0)), 1, costs._replace(alone=1.0), processors=2) == 2 + 4


BACKENDS = ("torch", "triton")
CASES = {  # name -> (shape, arguments), small: the interpreter is slow
    "1d": ((13,), dict(window_size=5)),
    "1d even, stride": ((17,), dict(window_size=6, stride=4)),
    "1d causal, stride": ((16,), dict(window_size=5, stride=3, is_causal=True)),
    "1d dilated": ((33,), dict(window_size=7, dilation=4)),
    "1d single token": ((1,), dict(window_size=1)),
    "2d": ((7, 9), dict(window_size=(3, 5))),
    "2d stride, dilation": ((13, 8), dict(window_size=(3, 4), stride=(2, 4), dilation=(3, 2))),
    "2d one axis causal": ((9, 7), dict(window_size=(4, 3), is_causal=(True, False), stride=(2, 1))),
    "2d thin": ((2, 17), dict(window_size=(1, 16))),
    "3d": ((4, 5, 6), dict(window_size=(3, 2, 5))),
    "3d mixed": ((5, 4, 7), dict(window_size=(2, 3, 3), stride=(1, 3, 2), dilation=(2, 1, 2),
                                 is_causal=(True, False, False))),
}

#: the interpreter is slow: the heavier tests take these there, and all cases on a GPU
FEW = CASES if device_under_test() == "cuda" else {name: CASES[name] for name in ("1d even, stride", "2d", "3d mixed")}

def draw(shape, B=1, H=2, Hk=1, D=16, Dv=None, dtype=torch.float32, seed=0):
    "Seeded q, k, v on the device under test."
    g = torch.Generator().manual_seed(seed)
    make = lambda h, d: torch.randn(B, h, *shape, d, generator=g, dtype=torch.float64).to(device_under_test(), dtype)
    return make(H, D), make(Hk, D), make(Hk, Dv or D)

def dense(q, k, v, shape, kw, scale=None):
    "Dense attention with the dense mask, in the type of the inputs, through the book's plain reference."
    mask = neighborhood_mask(shape, **kw).to(q.device)
    n = len(shape) + 1
    out, lse = attention_reference(*(t.flatten(2, n) for t in (q, k, v)), mask=mask, scale=scale, return_lse=True)
    return out.unflatten(2, shape), lse.unflatten(2, shape)


def test_mask_and_borders():
    assert neighborhood_mask((7,), 5)[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert neighborhood_mask((7,), 5)[2].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert neighborhood_mask((7,), 5)[6].nonzero().flatten().tolist() == [2, 3, 4, 5, 6]
    assert neighborhood_mask((8,), 4)[3].nonzero().flatten().tolist() == [1, 2, 3, 4]
    for shape, kw in CASES.values():
        mask = neighborhood_mask(shape, **kw)
        assert mask.diagonal().all() and mask.any(0).all()
        if not np.any(kw.get("is_causal", False)):
            assert (mask.sum(1) == neighborhood_pairs(shape, **kw) // math.prod(shape)).all()

def test_inverse_window():
    rng = np.random.default_rng(0)
    for _ in range(300):
        d, w, more = (int(rng.integers(*limits)) for limits in ((1, 5), (1, 9), (0, 40)))
        L, s = w * d + more, int(rng.integers(1, w + 1))
        axis = (L, w, s, d, bool(rng.integers(2)))
        residue, place, _ = axis_classes(L, d)
        first, end = inverse_axis_window(*axis)
        inside = (residue[:, None] == residue) & (place[:, None] >= first) & (place[:, None] < end)
        assert torch.equal(neighborhood_mask((L,), w, stride=s, dilation=d, is_causal=axis[4]), inside), axis


def test_agrees_with_dense():
    for backend, (shape, kw) in product(BACKENDS, CASES.values()):
        op = partial(neighborhood_attention, **kw, return_lse=True, backend=backend)
        check_against_reference(op, partial(dense, shape=shape, kw=kw), draw(shape, Dv=24), grad_tol=2e-5, floor=0.05)


def test_lse_gradient_alone():
    for backend, (shape, kw) in product(BACKENDS, (CASES["1d even, stride"], CASES["2d"], CASES["3d"])):
        leaves = [t.requires_grad_() for t in draw(shape)]
        exact = [t.detach().double().requires_grad_() for t in leaves]
        weight = torch.linspace(-1, 1, math.prod(shape), device=leaves[0].device).view(shape)
        for w in (torch.ones_like(weight), weight):
            got = torch.autograd.grad((neighborhood_attention(*leaves, **kw, return_lse=True,
                                                              backend=backend)[1] * w).sum(), leaves[:2])
            want = torch.autograd.grad((dense(*exact, shape, kw)[1] * w.double()).sum(), exact[:2])
            assert all(rel_error(a, b) < 2e-5 for a, b in zip(got, want)), (shape, backend)

def test_merge_through_lse():
    "Attention over window and extra tokens = window alone and extra tokens alone, merged by their LSE; with gradients."
    for backend in BACKENDS:
        (shape, kw), M = CASES["2d"], 5
        q, k, v = draw(shape, B=2, Hk=2)
        ak, av = (torch.randn(2, 2, M, 16, generator=torch.Generator().manual_seed(i)).to(q.device) for i in (3, 4))
        leaves = [t.requires_grad_() for t in (q, k, v, ak, av)]
        joint, joint_lse = neighborhood_attention(q, k, v, **kw, additional_keys=ak, additional_values=av,
                                                  return_lse=True, backend=backend)
        a, a_lse = neighborhood_attention(q, k, v, **kw, return_lse=True, backend=backend)
        b, b_lse = attention_reference(q.flatten(2, 3), ak, av, return_lse=True)
        merged, merged_lse = merge_attention(a.flatten(2, 3), a_lse.flatten(2), b, b_lse)
        assert rel_error(merged.view_as(joint), joint) < 1e-5 and rel_error(merged_lse.view_as(joint_lse),
            joint_lse) < 1e-5
        weight = torch.randn(joint.shape, generator=torch.Generator().manual_seed(5)).to(q.device)
        got, want = (torch.autograd.grad((o.view_as(joint) * weight).sum(), leaves, retain_graph=True)
                     for o in (merged, joint))
        assert all(rel_error(x, y) < 2e-5 for x, y in zip(got, want))


def test_special_cases():
    for backend, shape in product(BACKENDS, ((11,), (5, 6), (3, 4, 5))):
        q, k, v = draw(shape)
        n, v_all = len(shape) + 1, draw(shape)[2].expand(-1, 2, *[-1] * (len(shape) + 1))
        run = partial(neighborhood_attention, q, k, v, backend=backend)
        flat = [t.flatten(2, n).double() for t in (q, k, v)]
        assert rel_error(run(1), v_all) < 1e-5                                                   # window 1: V itself
        # window = map: full attention
        assert rel_error(run(shape), attention_reference(*flat).unflatten(2, shape)) < 1e-5
        if len(shape) == 1:
            assert rel_error(run(shape, is_causal=True), attention_reference(*flat, is_causal=True)) < 1e-5
        # every axis causal: the origin sees itself
        causal = run(tuple(min(3, x) for x in shape), is_causal=True)
        origin = (slice(None), slice(None)) + (0,) * len(shape)
        assert rel_error(causal[origin], v_all[origin]) < 1e-5

def test_blocked_and_halo():
    for backend in BACKENDS:
        q, k, v = draw((12, 8), B=2, Hk=2)
        blocked = neighborhood_attention(q, k, v, 4, stride=4, backend=backend)
        parts = lambda t: t.double().unflatten(3, (2, 4)).unflatten(2, (3, 4))
        cut = lambda t: parts(t).permute(0, 1, 2, 4, 3, 5, 6).reshape(2, 2 * 6, 16, 16)
        join = lambda t: t.reshape(2, 2, 3, 2, 4, 4, 16).permute(0, 1, 2, 4, 3, 5, 6).reshape(2, 2, 12, 8, 16)
        assert rel_error(blocked, join(attention_reference(*(cut(t) for t in (q, k, v))))) < 1e-5
        q, k, v = draw((24,), B=2, Hk=2)
        halo = neighborhood_attention(q, k, v, 4 + 2 * 3, stride=4, backend=backend)             # block 4, halo 3
        for b in range(4, 20, 4):
            want = attention_reference(q[:, :, b:b + 4].double(), k[:, :, b - 3:b + 7].double(),
                                       v[:, :, b - 3:b + 7].double())
            assert rel_error(halo[:, :, b:b + 4], want) < 1e-5


def box_mean(x, axes):
    "Mean of x (*X, D) over the windows of its axes, by cumulative sums: no attention in it."
    for a, axis in enumerate(axes):
        residue, _, _ = axis_classes(axis.length, axis.dilation)
        start, end = axis_window(*axis)
        total = torch.zeros_like(x)
        for r in range(axis.dilation):
            inside = (residue == r).nonzero().flatten()
            part = x.index_select(a, inside)
            sums = torch.cat([torch.zeros_like(part.narrow(a, 0, 1)), part.cumsum(a)], a)
            size = (end - start)[inside].view(-1, *[1] * (x.dim() - a - 1))
            total.index_copy_(a, inside,
                              (sums.index_select(a, end[inside]) - sums.index_select(a, start[inside])) / size)
        x = total
    return x

def test_scale_zero_is_a_box_mean():
    for backend, (name, (shape, kw)) in product(BACKENDS, CASES.items()):
        q, k, v = draw(shape, B=1, Hk=2)
        out = neighborhood_attention(q, k, v, **kw, scale=0.0, backend=backend)
        axes = neighborhood_axes(shape, **kw)
        want = torch.stack([box_mean(v[0, h].double().cpu(), axes) for h in range(2)])
        assert rel_error(out[0].cpu(), want) < 1e-5, (name, backend)

def test_coordinates_give_the_border_law():
    for backend, (L, w, d) in product(BACKENDS, ((19, 5, 1), (19, 4, 1), (20, 5, 3))):
        q, k, _ = draw((L,), B=1, H=1)
        position = torch.arange(L, dtype=torch.float32, device=q.device)
        out = neighborhood_attention(q, k, position.view(1, 1, L, 1).expand(1, 1, L, 16).contiguous(), w, dilation=d,
                                     scale=0, backend=backend)
        residue, place, n = axis_classes(L, d)
        centre = torch.minimum((place - w // 2).clamp(min=0), n - w) + (w - 1) / 2
        assert rel_error(out[0, 0, :, 0].cpu(), residue + d * centre) < 1e-5


def test_dilation_is_attention_on_subgrids():
    for backend in BACKENDS:
        q, k, v = draw((23, 11), B=1)
        out = neighborhood_attention(q, k, v, (4, 3), dilation=(3, 2), backend=backend)
        for a, b in product(range(3), range(2)):
            # strided views, no copies
            sub = neighborhood_attention(*(t[:, :, a::3, b::2] for t in (q, k, v)), (4, 3), backend=backend)
            assert rel_error(out[:, :, a::3, b::2], sub) < 1e-6

def test_axes_are_independent():
    for backend in BACKENDS:
        shape, kw = CASES["3d mixed"]
        q, k, v = draw(shape)
        full = {**dict(stride=(1, 1, 1), dilation=(1, 1, 1)), **kw}
        order = (2, 0, 1)
        turned = {n: tuple(x[i] for i in order) for n, x in full.items()}
        move = lambda t: t.permute(0, 1, *(2 + i for i in order), 5)
        assert rel_error(neighborhood_attention(*map(move, (q, k, v)), **turned, backend=backend),
                         move(neighborhood_attention(q, k, v, **full, backend=backend))) < 1e-5

def test_future_changes_nothing():
    for backend in BACKENDS:
        q, k, v = draw((9, 7))
        kw = dict(window_size=(4, 3), stride=(2, 1), is_causal=(True, False), backend=backend)
        before = neighborhood_attention(q, k, v, **kw)[:, :, :5]
        k, v = k.clone(), v.clone()
        k[:, :, 5:], v[:, :, 5:] = 1e3, -1e3
        assert torch.equal(neighborhood_attention(q, k, v, **kw)[:, :, :5], before)


def test_bias_and_additional_tokens():
    for backend, (name, (shape, kw)) in product(BACKENDS, FEW.items()):
        window = kw["window_size"] if isinstance(kw["window_size"], tuple) else (kw["window_size"],) * len(shape)
        g = torch.Generator().manual_seed(2)
        make = lambda *s: torch.randn(*s, generator=g).to(device_under_test())
        q, k, v = draw(shape)
        inputs = [q, k, v, make(2, *(2 * w - 1 for w in window)), make(1, 1, 3, 16), make(1, 1, 3, 16)]
        leaves, exact = ([t.detach().to(d).requires_grad_() for t in inputs] for d in (torch.float32, torch.float64))
        run = lambda xs, b: neighborhood_attention(*xs[:3], **kw, rel_pos_bias=xs[3], additional_keys=xs[4],
                                                   additional_values=xs[5], return_lse=True, backend=b)
        (out, lse), (want, want_lse) = run(leaves, backend), run(exact, "torch")
        assert rel_error(out, want) < 1e-5 and rel_error(lse, want_lse) < 1e-5, (name, backend)
        d_out = make(*out.shape)
        for a, b in zip(torch.autograd.grad(out, leaves, d_out), torch.autograd.grad(want, exact, d_out.double())):
            assert float((a - b).norm()) <= 3e-5 * (1 + float(b.norm())), (name, backend)

def test_bias_by_hand():
    "The reference's own bias, against the dense mask: entry (key - query) / dilation + window - 1."
    L, w, d = 14, 3, 2
    q, k, v = (t.double() for t in draw((L,), B=1, H=2))
    table = torch.randn(2, 2 * w - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(q.device)
    offset = (torch.arange(L) - torch.arange(L)[:, None]) // d + w - 1
    bias = table[:, offset.clamp(0, 2 * w - 2)]
    want = attention_reference(q, k, v, mask=neighborhood_mask((L,), w, dilation=d).to(q.device), bias=bias)
    assert rel_error(neighborhood_attention(q, k, v, w, dilation=d, rel_pos_bias=table, backend="torch"), want) < 1e-10


def test_views_and_heads():
    for backend, head_dim in product(BACKENDS, (16, 24, 40)):
        g = torch.Generator().manual_seed(0)
        heads_last = [torch.randn(2, 5, 6, h, head_dim, generator=g).to(device_under_test()) for h in (6, 2, 2)]
        views = [t.permute(0, 3, 1, 2, 4) for t in heads_last]                # (B, H, X, Y, D), not contiguous
        a, b = (neighborhood_attention(*ts, (3, 5), backend=backend) for ts in (views, [t.contiguous() for t in views]))
        assert rel_error(a, b) < 1e-6
        # head h reads key head h // 3
        for h in range(6):
            one = neighborhood_attention(views[0][:, h:h + 1], views[1][:, h // 3:h // 3 + 1],
                                         views[2][:, h // 3:h // 3 + 1], (3, 5), backend=backend)
            assert rel_error(a[:, h:h + 1], one) < 1e-5
    empty = torch.zeros(0, 2, 5, 6, 16, device=device_under_test())
    assert na2d(empty, empty, empty, 3).shape == empty.shape

def test_odd_sizes():
    "Axes of 1, 2, 7, 13, 33 and one more than a tile, forward and backward: partial tiles on every axis."
    for backend, shape in product(BACKENDS,
                                  ((1,), (2,), (7,), (33,), (65,), (1, 13), (13, 2), (9, 17), (2, 1, 9), (5, 9, 3))):
        op = partial(neighborhood_attention, window_size=tuple(min(x, 3) for x in shape), return_lse=True,
                     backend=backend)
        reference = partial(dense, shape=shape, kw=dict(window_size=tuple(min(x, 3) for x in shape)))
        check_against_reference(op, reference, draw(shape, B=1), grad_tol=2e-5, floor=0.05)

def test_descriptors_on_maps_of_three():
    "Batch and heads are one axis of a tensor descriptor where their strides allow it; else rows come by pointers."
    shape, kw = (4, 8, 9), dict(window_size=(2, 3, 3), is_causal=(True, False, False))
    op = partial(neighborhood_attention, return_lse=True, backend="triton", **kw)
    heads_last = lambda t: t.movedim(1, -2).contiguous().movedim(-2, 1)
    assert not _describable(heads_last(draw(shape, B=2)[0]))
    for B, Hk, relay in ((2, 1, torch.Tensor.contiguous), (1, 2, heads_last)):
        tensors = [relay(t) for t in draw(shape, B=B, Hk=Hk)]
        assert all(_describable(t) for t in tensors)
        check_against_reference(op, partial(dense, shape=shape, kw=kw), tensors, grad_tol=2e-5)

def test_half_precision():
    for backend, dtype in product(BACKENDS, (torch.float16, torch.bfloat16)):
        q, k, v = draw((9, 12), dtype=dtype)
        out, lse = neighborhood_attention(q, k, v, 5, return_lse=True, backend=backend)
        assert out.dtype == dtype and lse.dtype == torch.float32
        assert rel_error(out, dense(q.double(), k.double(), v.double(), (9, 12),
                                    dict(window_size=5))[0]) < TOLERANCE[dtype]


def test_good_citizen():
    g = torch.Generator().manual_seed(0)
    q, k, v = draw((3, 6), B=1, Hk=1, Dv=24)
    make = lambda *s: torch.randn(*s, generator=g).to(q.device)
    inputs = dict(q=q, k=k, v=v, rel_pos_bias=make(2, 5, 5), additional_keys=make(1, 1, 3, 16),
                  additional_values=make(1, 1, 3, 24))
    for backend in BACKENDS:
        op = partial(neighborhood_attention, window_size=3, stride=(2, 1), dilation=(1, 2), return_lse=True,
                     backend=backend)
        skip = ("deterministic",) if backend == "torch" else ()         # a GPU adds a gather's gradients in any order
        check_operation(op, partial(op, backend="torch"), inputs, grad_tol=2e-5, skip=skip)


@pytest.mark.cuda
def test_memory_does_not_grow_with_window():
    if device_under_test() != "cuda": return
    q, k, v = draw((64, 64), H=8, Hk=8, D=64, dtype=torch.bfloat16)
    peak = [peak_memory(lambda: na2d(q, k, v, w, backend="triton"), "cuda") for w in (3, 63)]
    assert peak[1] <= 1.05 * peak[0], peak

@pytest.mark.cuda
def test_64_bit_addresses():
    if device_under_test() != "cuda" or torch.cuda.mem_get_info()[0] < 40e9: return
    L, D, tail = 2**27 + 5, 16, 1000                                # 2**31 elements and a few
    q, k, v = (torch.randn(1, 1, L, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = na1d(q, k, v, 7, backend="triton")[:, :, -tail:]
    want = neighborhood_attention_reference(*(t[:, :, -2 * tail:].double() for t in (q, k, v)), 7)[:, :, -tail:]
    assert rel_error(out, want) < TOLERANCE[torch.bfloat16]


def test_bad_input():
    q, k, v = draw((8, 9), B=2, H=4, Hk=2)
    bad = [
        (dict(window_size=(9, 3)), ValueError, "axis 0"), (dict(window_size=3, dilation=(1, 4)), ValueError, "axis 1"),
        (dict(window_size=3, stride=4), ValueError, "stride"), (dict(window_size=0), ValueError, "window_size"),
        (dict(window_size=-3), ValueError, "window_size"), (dict(window_size=3, dilation=-1), ValueError, "dilation"),
        (dict(window_size=3, stride=0), ValueError, "stride"), (dict(window_size=(3, 3, 3)), ValueError, "window_size"),
        (dict(window_size=3.0), TypeError, "window_size"), (dict(window_size=True), TypeError, "window_size"),
        (dict(window_size=3, is_causal=1), TypeError, "is_causal"), (dict(window_size=3, is_causal=(True,)),
            ValueError, "is_causal"),
        (dict(window_size=3, k=k[:, :, :7]), ValueError, "k must"), (dict(window_size=3, v=v[:1]), ValueError,
            "v must"),
        (dict(window_size=3, k=k[..., :8]), ValueError, "k must"), (dict(window_size=3, q=q[:, :3]), ValueError,
            "heads"),
        (dict(window_size=3, v=v[:, :1]), ValueError, "v must"), (dict(window_size=3, q=q[0, 0, 0]), ValueError,
            "q must"),
        (dict(window_size=3, q=q.int()), TypeError, "q must"), (dict(window_size=3, k=k.half()), TypeError, "k must"),
        (dict(window_size=3, v=[1.0]), TypeError, "v must"), (dict(window_size=3, backend="cuda"), ValueError,
                                                              "backend"),
        (dict(window_size=3, scale="1"), TypeError, "scale"), (dict(window_size=3, scale=math.inf), ValueError,
                                                               "scale"),
        (dict(window_size=3, rel_pos_bias=torch.zeros(4, 5, 3)), ValueError, "rel_pos_bias"),
        (dict(window_size=3, rel_pos_bias=torch.zeros(4, 5, 5).long()), TypeError, "rel_pos_bias"),
        (dict(window_size=3, additional_keys=k[:, :, 0]), ValueError, "additional_"),
        (dict(window_size=3, additional_keys=k[:, :, 0], additional_values=v[:, :1, 0]), ValueError,
         "additional_values"),
    ]
    check_raises(neighborhood_attention, bad, q=q, k=k, v=v, window_size=3)
    for f, x in ((na1d, q), (na3d, q), (na2d, q[:, :, 0])):
        with pytest.raises(ValueError, match="needs q of shape"): f(x, x, x, 3)
    for kw in (dict(q_tile=(8, 8, 8), block_n=32), dict(q_tile=8, block_n=32, scheme="diagonal")):
        with pytest.raises(ValueError): tile_waste((8, 9), 3, **kw)


def test_double_precision_reference():
    for name, (shape, kw) in CASES.items():
        small = [t.double().requires_grad_() for t in draw(shape, B=1, H=2, D=3)]
        if math.prod(shape) <= 35: assert torch.autograd.gradcheck(partial(neighborhood_attention_reference, **kw,
                return_lse=True), small), name
        q, k, v = (t.double() for t in draw(shape))
        assert rel_error(neighborhood_attention_reference(q, k, v, **kw), dense(q, k, v, shape, kw)[0]) < 1e-10, name

def test_tiles():
    assert abs(tile_waste((56, 56), 7, q_tile=128, block_n=128, scheme="row-major") - 12.9) < 0.05
    assert abs(tile_waste((56, 56), 7, q_tile=(8, 8), block_n=(8, 8), scheme="aligned") - 9.6) < 0.05
    assert abs(tile_waste((56, 56), 7, q_tile=(8, 8), block_n=32) - 3.9) < 0.05
    assert abs(tile_waste((30, 48, 80), (18, 24, 24), q_tile=(4, 8, 4), block_n=64) - 1.42) < 0.005
    assert choose_q_tile((56, 56), 7) == (8, 8) and choose_q_tile((100,), 9, block_m=32) == (32,)
    # blocks are perfect in both directions
    for transpose in (False, True):
        assert tile_waste((64, 64), 8, stride=8, q_tile=8, block_n=64, transpose=transpose) == 1.0

def test_order_of_bricks():
    "The tables agree with the dense mask: bricks without a mask come first, those that nobody sees are left out."
    for kw, transpose in product((dict(window_size=(9, 5)), dict(window_size=(8, 6), stride=(4, 3)),
                                  dict(window_size=(4, 3), dilation=(2, 1), is_causal=(True, False))), (False, True)):
        shape, tile, brick = (18, 13), (4, 2), (2, 4)
        axes = neighborhood_axes(shape, **kw)
        sides = [int(np.max(np.subtract(*tile_spans(a, t, transpose)[::-1]))) for a, t in zip(axes, tile)]
        share, _, order = unseen_tables(axes, tile, tuple(sides), brick, transpose, torch.device("cpu"))
        mask = neighborhood_mask(shape, **kw).view(*shape, *shape)
        mask = mask.permute(2, 3, 0, 1) if transpose else mask
        starts = [tile_spans(a, t, transpose)[0] for a, t in zip(axes, tile)]
        full, steps = 0, 0
        for i, j in product(*(range(len(s)) for s in starts)):
            row = order[share[i] + share[len(starts[0]) + j]].tolist()
            per_class = len(starts[0]) // axes[0].dilation
            rows = slice(i // per_class + i % per_class * 4 * axes[0].dilation, None, axes[0].dilation)
            seen = mask[rows][:4, 2 * j:2 * j + 2]                                          # [4, 2, *shape]
            for at, number in enumerate(row[2:]):
                y, x = divmod(number, -(-sides[1] // 4))
                place = seen[:, :, i // per_class::axes[0].dilation][:, :, starts[0][i] + 2 * y:, starts[1][j] + 4 * x:][:, :, :2, :4]
                assert (place.shape[2:] == (2, 4) and bool(place.all())) == (at < row[0]), (kw, transpose, i, j, at)
                assert bool(place.any()) == (at < row[1]), (kw, transpose, i, j, at)
            full, steps = full + row[0], steps + row[1]
        assert abs(inner_share(axes, tile, brick, transpose)[0] - full / steps) < 1e-12
        useful = tile_waste(shape, **kw, q_tile=tile, block_n=brick, scheme="bricks", transpose=transpose)
        assert round(useful * neighborhood_pairs(shape, **kw)) == 64 * steps

def test_steps_without_mask():
    "Windows so wide that most steps need no mask, in all kernels."
    for shape, kw in (((16, 48), dict(window_size=(15, 47))), ((16, 24), dict(window_size=8, stride=8)),
                      ((800,), dict(window_size=780)), ((300,), dict(window_size=290, is_causal=True))):
        op = partial(neighborhood_attention, **kw, return_lse=True, backend="triton")
        check_against_reference(op, partial(dense, shape=shape, kw=kw), draw(shape, H=1), grad_tol=2e-5, floor=0.05)


def test_parameter_counts():
    for make, dilated, want in ((nat_mini, dinat_mini, 19_984_174), (nat_tiny, dinat_tiny, 27_901_582),
                                (nat_small, dinat_small, 50_743_297), (nat_base, dinat_base, 89_769_652)):
        with torch.device("meta"):
            assert sum(p.numel() for p in make().parameters()) == want == sum(p.numel() for p in dilated().parameters())

def test_dilations():
    with torch.device("meta"): model = dinat_mini()
    assert [[b.attn.dilation[0] for b in level[1:]] for level in model.levels] == [[1, 8, 1], [1, 4, 1, 4],
        [1, 2, 1, 2, 1, 2], [1, 1, 1, 1, 1]]
    with torch.device("meta"): rates = [b.drop_path.p for level in nat_base().levels for b in level[1:]]
    assert rates[0] == 0 and abs(rates[-1] - 0.5) < 1e-6 and sorted(rates) == rates


def test_modules():
    torch.manual_seed(0)
    for make, shape in ((NeighborhoodAttention1d, (11,)), (NeighborhoodAttention2d, (6, 9)),
                        (NeighborhoodAttention3d, (3, 4, 5))):
        layer = make(32, 2, 3, rel_pos_bias=True,
                     is_causal=(True,) + (False,) * (len(shape) - 1)).to(device_under_test())
        x = torch.randn(2, *shape, 32, device=device_under_test(), requires_grad=True)
        y = layer(x)
        y.square().mean().backward()
        assert y.shape == x.shape and all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
        assert float(layer.rel_pos_bias.grad.abs().sum()) > 0 and "window_size" in repr(layer)
        with pytest.raises(ValueError, match="x must have shape"): layer(x[..., :16])
    with pytest.raises(ValueError, match="embed_dim"): NeighborhoodAttention1d(30, 4, 3)
    with pytest.raises(ValueError, match="stride"): NeighborhoodAttention1d(32, 4, 3, stride=4)
    with pytest.raises(ValueError, match="axis 0"): NeighborhoodAttention1d(32, 4, 7)(torch.randn(1, 5, 32))

def test_fit():
    "A fitted layer on a small map is global attention with the middle of the bias table."
    torch.manual_seed(0)
    wide = NeighborhoodAttention2d(32, 2, 7, dilation=2, rel_pos_bias=True, fit=True).to(device_under_test())
    small = NeighborhoodAttention2d(32, 2, (4, 5), rel_pos_bias=True).to(device_under_test())
    small.load_state_dict({**wide.state_dict(), "rel_pos_bias": wide.rel_pos_bias[:, 3:10, 2:11]})
    x = torch.randn(2, 4, 5, 32, device=device_under_test())
    assert rel_error(wide(x), small(x)) < 1e-6
    for side in (9, 32, 50):
        net = NAT(dim=32, depths=(1, 2), num_heads=(1, 2), num_classes=4,
                  dilations=((1,), (1, 4))).to(device_under_test())
        assert net(torch.randn(2, 3, side, side, device=device_under_test())).shape == (2, 4)


def simulated_steps(case):
    "Steps of one head and number of heads of one of `SIMULATED`."
    problem = SIMULATED[case]
    return (kernel_steps(**{n: x for n, x in problem.items() if n not in ("batch", "heads")}),
            problem["batch"] * problem["heads"])

def simulator_rows(costs, device="GPU one", date="2026-01-01T00:00:00+00:00", processors=132, slower={}):
    "Rows as `bench_simulator` would write them on a GPU with these costs; `slower`: {case: times as long}."
    return [dict(case=case, method="ours", device=device, date=date, processors=processors,
                 calibrates=case in CALIBRATING.values(),
                 ms_fwd=predicted_us(*simulated_steps(case), costs, processors) * slower.get(case, 1) / 1e3)
            for case in SIMULATED]

def test_simulated_problems():
    assert list(CALIBRATING.values()) == list(SIMULATED)[:5] and len(SIMULATED) == 23
    for problem in SIMULATED.values():
        axes = neighborhood_axes(*(problem.get(n, d) for n, d in (("shape", None), ("window_size", None), ("stride", 1),
                                                                  ("dilation", 1), ("is_causal", False))))
        assert len(axes) in (2, 3) and problem["head_dim"] == 64 and problem["heads"] == 8
    assert len({repr(sorted(p.items())) for p in SIMULATED.values()}) == len(SIMULATED)

def test_costs_are_found_again():
    for want, processors in ((StepCosts(2.5, 1.1, 0.47, 0.53, 2.3), 132), (StepCosts(4.0, 0.3, 0.8, 1.5, 1.2), 132),
                             (StepCosts(1.0, 5.0, 0.1, 0.4, 4.0), 132), (StepCosts(3.0, 0.5, 0.2, 0.25, 2.0), 160)):
        problems = [simulated_steps(case) for case in CALIBRATING.values()]
        calibration = [(*p, predicted_us(*p, want, processors)) for p in problems]
        found = fit_costs(calibration, processors)
        assert np.allclose(found, want, rtol=1e-6) and found == fit_costs(calibration, processors)
    with pytest.raises(ValueError, match="five"): fit_costs(calibration[:4])
    with pytest.raises(ValueError, match="first two"): fit_costs(calibration[::-1])
    with pytest.raises(ValueError, match="no positive costs"): fit_costs([(*p, 50.0) for p in problems])
    with pytest.raises(ValueError, match="no positive costs"): fit_costs(calibration[:4] + calibration[3:4], processors)

def test_simulated_times():
    costs = StepCosts(2.5, 1.1, 0.47, 0.53, 2.3)
    other = costs._replace(free=0.3)
    old, new = simulator_rows(costs), simulator_rows(other, "GPU two", "2026-01-02T00:00:00+00:00", 150)
    for rows, want in ((old, costs), (old + new, other), (new + old, other)):
        found, times = simulated_times(rows)
        assert np.allclose(found, want, rtol=1e-6) and list(times) == list(SIMULATED)
        assert all(abs(measured / predicted - 1) < 1e-6 for predicted, measured in times.values())
    assert simulated_times([]) is None and simulated_times(old + new[:-1]) is None
    assert simulated_times(simulator_rows(costs, processors=127)) is None
    assert simulated_times([r | dict(arch="small") for r in old]) is None


def test_simulator_claim():
    claim, = (c for c in claims() if c.measured is _simulator_errors)
    costs = StepCosts(2.5, 1.1, 0.47, 0.53, 2.3)
    predicted = [case for case in SIMULATED if case not in CALIBRATING.values()]
    slow = lambda cases, by: simulator_rows(costs, slower=dict.fromkeys(cases, by))
    verdict = lambda rows: claim.rule(_simulator_errors(rows))
    assert _simulator_errors([]) is None
    assert verdict(simulator_rows(costs)) == verdict(slow(predicted, 1.2)) == verdict(slow(predicted, 0.8)) == "holds"
    assert verdict(slow(predicted[:1], 1.3)) == verdict(slow(predicted[-1:], 0.7)) == "holds in part"
    assert verdict(slow(predicted, 1.3)) == verdict(slow(predicted, 0.7)) == "does not hold here"
    constant = [{**r, "ms_fwd": 0.05} for r in simulator_rows(costs)]           # no costs give such times
    assert verdict(constant) == "does not hold here" and _simulator_errors(constant)["median"] == math.inf

def test_times_of_two_gpus_do_not_mix():
    "The claims' helpers give for the rows of two GPUs what they give for those of the newer one alone."
    def rows(device, day, slow):
        row = lambda name, **fields: dict(name=name, device=device, date=f"2026-01-0{day}T00:00:00+00:00", **fields)
        for w in (3, 7, 15, 23, 95, 128):
            yield row("windows", w=w, method="ours", ms_fwd=slow + w**slow, peak_mb_fwd=100 + slow * w,
                      useful=w * w / 128**2, waste=2.0, batch=2, heads=8)
        yield row("sizes", N=128**2, method="ours", window="13", ms_fwd=slow, useful=0.01, batch=1, heads=8,
                  head_dim=64)
        for case, method in product(("FLUX 4K", "FLUX 4K, stride 16"), ("ours", "cudnn dense")):
            yield row("natten", case=case, method=method, ms_fwd=1.0 if method == "ours" else 1 + slow * len(case))

    def measured(rows):
        fits = lambda row, where: all(row.get(n) == x for n, x in where.items())
        found = lambda name, **where: [r for r in rows if r["name"] == name and fits(r, where)]
        with mock.patch.dict(_gpu_ratio.__globals__, _rows=found):
            return [f() for f in (partial(_gpu_ratio, "FLUX 4K"), _stride_gain, _memory_growth, _simulator_error,
                                  _simulator_error_with_fixed_part)]

    old, new = [*rows("GPU one", 1, 2)], [*rows("GPU two", 2, 1.5)]
    assert None not in measured(new) and all(a != b for a, b in zip(measured(new), measured(old)))
    assert measured(old + new) == measured(new + old) == measured(new)
    assert measured(old + new[:6])[-1]["elsewhere"] == math.inf                # the newer GPU timed no other maps
