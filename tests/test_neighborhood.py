# Written from the test cells of nbs/3_locality/neighborhood.ipynb by `attnbook export`. Do not edit.
# fmt: off
import math
from functools import partial
from itertools import product
from unittest import mock

import numpy as np
import pytest
import torch

from attnbook.attention import attention_reference, merge_attention
from attnbook.engine import Launch, arch_of
from attnbook.engine.run import describable
from attnbook.lab.bench import peak_memory
from attnbook.lab.testing import TOLERANCE, check_against_reference, check_operation, check_raises, rel_error
from attnbook.lab.testing import device as device_under_test
from attnbook.layers import count_parameters
from attnbook.neighborhood.claims_study import (
    NATTEN_H100,
    STRIDED,
    UNJUDGED,
    _memory_growth,
    _runs,
    _simulator_error,
    _simulator_error_with_fixed_part,
    _simulator_errors,
    _simulator_runs,
    _slides,
    _stride_gains,
    last_of_the_runs,
    natten_runs,
    over_natten,
    simulated_times,
)
from attnbook.neighborhood.experiments_study import (
    PRESETS,
    border_experiment,
    cost_experiment,
    equivariance_experiment,
    nat_data,
    nat_experiments,
    run_experiments,
    stride_experiment,
)
from attnbook.neighborhood.layer_nets import (
    NeighborhoodAttention1d,
    NeighborhoodAttention2d,
    NeighborhoodAttention3d,
    ShiftedWindowAttention,
    fit_neighborhood,
)
from attnbook.neighborhood.nets import (
    NAT,
    NAT_KINDS,
    NATBlock,
    dinat_base,
    dinat_mini,
    dinat_small,
    dinat_tiny,
    from_official,
    nat_base,
    nat_mini,
    nat_small,
    nat_tiny,
    small_nat,
)
from attnbook.neighborhood.op import na1d, na2d, na3d, neighborhood_attention
from attnbook.neighborhood.programs import KERNEL_LAUNCH, _cut, _tiling, kernel_launch, unseen_tables
from attnbook.neighborhood.reference import (
    axis_classes,
    axis_window,
    inverse_axis_window,
    neighborhood_attention_reference,
    neighborhood_axes,
    neighborhood_mask,
    neighborhood_pairs,
)
from attnbook.neighborhood.simulator import (
    CALIBRATING,
    SIMULATED,
    StepCosts,
    _simulated_problem,
    fit_costs,
    kernel_steps,
    kernel_tiles,
    predicted_us,
)
from attnbook.neighborhood.study import (
    GOALS,
    LAUNCHES,
    PROBLEMS,
    PRODUCTS,
    TRIED,
    claims,
    kernel_work,
    over_flex,
    trying_launches,
)
from attnbook.neighborhood.tiles import choose_q_tile, inner_share, tile_spans, tile_waste

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
    "3d mixed": (
        (5, 4, 7),
        dict(window_size=(2, 3, 3), stride=(1, 3, 2), dilation=(2, 1, 2), is_causal=(True, False, False)),
    ),
}
EACH = pytest.mark.parametrize("case", CASES)
BOTH = pytest.mark.parametrize("backend", BACKENDS)


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


@pytest.mark.parametrize(
    "length, w, query, keys",
    [(7, 5, 0, [0, 1, 2, 3, 4]), (7, 5, 2, [0, 1, 2, 3, 4]), (7, 5, 6, [2, 3, 4, 5, 6]), (8, 4, 3, [1, 2, 3, 4])],
)
def test_borders(length, w, query, keys):
    assert neighborhood_mask((length,), w)[query].nonzero().flatten().tolist() == keys


@EACH
def test_mask(case):
    shape, kw = CASES[case]
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


@EACH
@BOTH
def test_agrees_with_dense(backend, case):
    shape, kw = CASES[case]
    op = partial(neighborhood_attention, **kw, return_lse=True, backend=backend)
    check_against_reference(op, partial(dense, shape=shape, kw=kw), draw(shape, Dv=24), grad_tol=2e-5, floor=0.05)


@pytest.mark.parametrize("L, w, stride", [(200, 34, 1), (200, 98, 3), (100, 33, 1), (140, 65, 1)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_first_and_last_query(L, w, stride, is_causal):
    kw = dict(window_size=w, stride=stride, is_causal=is_causal)
    op = partial(neighborhood_attention, **kw, return_lse=True, backend="triton")
    check_against_reference(op, partial(dense, shape=(L,), kw=kw), draw((L,), H=1), grad_tol=2e-5, floor=0.05)


@pytest.mark.parametrize("case", ["1d even, stride", "2d", "3d"])
@BOTH
def test_lse_gradient_alone(backend, case):
    shape, kw = CASES[case]
    leaves = [t.requires_grad_() for t in draw(shape)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    weight = torch.linspace(-1, 1, math.prod(shape), device=leaves[0].device).view(shape) + 0.3
    lse = neighborhood_attention(*leaves, **kw, return_lse=True, backend=backend)[1]
    got = torch.autograd.grad((lse * weight).sum(), leaves[:2])
    want = torch.autograd.grad((dense(*exact, shape, kw)[1] * weight.double()).sum(), exact[:2])
    assert all(rel_error(a, b) < 2e-5 for a, b in zip(got, want))


@BOTH
def test_merge_through_lse(backend):
    "Attention over window and extra tokens = window alone and extra tokens alone, merged by their LSE; with gradients."
    (shape, kw), M = CASES["2d"], 5
    q, k, v = draw(shape, Hk=2)
    ak, av = (torch.randn(1, 2, M, 16, generator=torch.Generator().manual_seed(i)).to(q.device) for i in (3, 4))
    leaves = [t.requires_grad_() for t in (q, k, v, ak, av)]
    joint, joint_lse = neighborhood_attention(
        q, k, v, **kw, additional_keys=ak, additional_values=av, return_lse=True, backend=backend
    )
    a, a_lse = neighborhood_attention(q, k, v, **kw, return_lse=True, backend=backend)
    b, b_lse = attention_reference(q.flatten(2, 3), ak, av, return_lse=True)
    merged, merged_lse = merge_attention(a.flatten(2, 3), a_lse.flatten(2), b, b_lse)
    assert rel_error(merged.view_as(joint), joint) < 1e-5
    assert rel_error(merged_lse.view_as(joint_lse), joint_lse) < 1e-5
    weight = torch.randn(joint.shape, generator=torch.Generator().manual_seed(5)).to(q.device)
    got, want = (
        torch.autograd.grad((o.view_as(joint) * weight).sum(), leaves, retain_graph=True) for o in (merged, joint)
    )
    assert all(rel_error(x, y) < 2e-5 for x, y in zip(got, want))


@pytest.mark.parametrize("shape", [(11,), (5, 6), (2, 3, 4)], ids=str)
@BOTH
def test_special_cases(backend, shape):
    q, k, v = draw(shape, H=1)
    n = len(shape) + 1
    run = partial(neighborhood_attention, q, k, v, backend=backend)
    flat = [t.flatten(2, n).double() for t in (q, k, v)]
    assert rel_error(run(1), v) < 1e-5  # window 1: V itself
    # window = map: full attention
    assert rel_error(run(shape), attention_reference(*flat).unflatten(2, shape)) < 1e-5
    if len(shape) == 1:
        assert rel_error(run(shape, is_causal=True), attention_reference(*flat, is_causal=True)) < 1e-5
    # every axis causal: the origin sees itself
    causal = run(tuple(min(3, x) for x in shape), is_causal=True)
    origin = (slice(None), slice(None)) + (0,) * len(shape)
    assert rel_error(causal[origin], v[origin]) < 1e-5


@BOTH
def test_blocked(backend):
    q, k, v = draw((12, 8), B=2, Hk=2)
    blocked = neighborhood_attention(q, k, v, 4, stride=4, backend=backend)
    parts = lambda t: t.double().unflatten(3, (2, 4)).unflatten(2, (3, 4))
    cut = lambda t: parts(t).permute(0, 1, 2, 4, 3, 5, 6).reshape(2, 2 * 6, 16, 16)
    join = lambda t: t.reshape(2, 2, 3, 2, 4, 4, 16).permute(0, 1, 2, 4, 3, 5, 6).reshape(2, 2, 12, 8, 16)
    assert rel_error(blocked, join(attention_reference(*(cut(t) for t in (q, k, v))))) < 1e-5


@BOTH
def test_halo(backend):
    q, k, v = draw((24,), B=2, Hk=2)
    halo = neighborhood_attention(q, k, v, 4 + 2 * 3, stride=4, backend=backend)  # block 4, halo 3
    for b in range(4, 20, 4):
        want = attention_reference(
            q[:, :, b : b + 4].double(), k[:, :, b - 3 : b + 7].double(), v[:, :, b - 3 : b + 7].double()
        )
        assert rel_error(halo[:, :, b : b + 4], want) < 1e-5


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
            total.index_copy_(
                a, inside, (sums.index_select(a, end[inside]) - sums.index_select(a, start[inside])) / size
            )
        x = total
    return x


@EACH
@BOTH
def test_scale_zero_is_a_box_mean(backend, case):
    shape, kw = CASES[case]
    q, k, v = draw(shape, B=1, H=1)
    out = neighborhood_attention(q, k, v, **kw, scale=0.0, backend=backend)
    want = box_mean(v[0, 0].double().cpu(), neighborhood_axes(shape, **kw))
    assert rel_error(out[0, 0].cpu(), want) < 1e-5


@pytest.mark.parametrize("L, w, d", [(19, 5, 1), (19, 4, 1), (20, 5, 3)])
@BOTH
def test_coordinates_give_the_border_law(backend, L, w, d):
    q, k, _ = draw((L,), B=1, H=1)
    position = torch.arange(L, dtype=torch.float32, device=q.device).view(1, 1, L, 1).expand(1, 1, L, 16)
    out = neighborhood_attention(q, k, position.contiguous(), w, dilation=d, scale=0, backend=backend)
    residue, place, n = axis_classes(L, d)
    centre = torch.minimum((place - w // 2).clamp(min=0), n - w) + (w - 1) / 2
    assert rel_error(out[0, 0, :, 0].cpu(), residue + d * centre) < 1e-5


@BOTH
def test_dilation_is_attention_on_subgrids(backend):
    q, k, v = draw((23, 11), B=1, H=1)
    out = neighborhood_attention(q, k, v, (4, 3), dilation=(3, 2), backend=backend)
    for a, b in product(range(3), range(2)):
        # strided views, no copies
        sub = neighborhood_attention(*(t[:, :, a::3, b::2] for t in (q, k, v)), (4, 3), backend="torch")
        assert rel_error(out[:, :, a::3, b::2], sub) < 1e-5


@BOTH
def test_axes_are_independent(backend):
    shape, kw = CASES["3d mixed"]
    q, k, v = draw(shape, H=1)
    full = {**dict(stride=(1, 1, 1), dilation=(1, 1, 1)), **kw}
    order = (2, 0, 1)
    turned = {n: tuple(x[i] for i in order) for n, x in full.items()}
    move = lambda t: t.permute(0, 1, *(2 + i for i in order), 5)
    assert (
        rel_error(
            neighborhood_attention(*map(move, (q, k, v)), **turned, backend=backend),
            move(neighborhood_attention(q, k, v, **full, backend=backend)),
        )
        < 1e-5
    )


@BOTH
def test_future_changes_nothing(backend):
    q, k, v = draw((9, 7))
    kw = dict(window_size=(4, 3), stride=(2, 1), is_causal=(True, False), backend=backend)
    before = neighborhood_attention(q, k, v, **kw)[:, :, :5]
    k, v = k.clone(), v.clone()
    k[:, :, 5:], v[:, :, 5:] = 1e3, -1e3
    assert torch.equal(neighborhood_attention(q, k, v, **kw)[:, :, :5], before)


@pytest.mark.parametrize("case", CASES if device_under_test() == "cuda" else ["1d even, stride", "2d", "3d mixed"])
@BOTH
def test_bias_and_additional_tokens(backend, case):
    shape, kw = CASES[case]
    window = kw["window_size"] if isinstance(kw["window_size"], tuple) else (kw["window_size"],) * len(shape)
    g = torch.Generator().manual_seed(2)
    make = lambda *s: torch.randn(*s, generator=g).to(device_under_test())
    q, k, v = draw(shape)
    inputs = [q, k, v, make(2, *(2 * w - 1 for w in window)), make(1, 1, 3, 16), make(1, 1, 3, 16)]
    leaves, exact = ([t.detach().to(d).requires_grad_() for t in inputs] for d in (torch.float32, torch.float64))
    run = lambda xs, b: neighborhood_attention(
        *xs[:3], **kw, rel_pos_bias=xs[3], additional_keys=xs[4], additional_values=xs[5], return_lse=True, backend=b
    )
    (out, lse), (want, want_lse) = run(leaves, backend), run(exact, "torch")
    assert rel_error(out, want) < 1e-5 and rel_error(lse, want_lse) < 1e-5
    d_out = make(*out.shape)
    for a, b in zip(torch.autograd.grad(out, leaves, d_out), torch.autograd.grad(want, exact, d_out.double())):
        assert float((a - b).norm()) <= 3e-5 * (1 + float(b.norm()))


def test_bias_by_hand():
    "The reference's own bias, against the dense mask: entry (key - query) / dilation + window - 1."
    L, w, d = 14, 3, 2
    q, k, v = (t.double() for t in draw((L,), B=1, H=2))
    table = torch.randn(2, 2 * w - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(q.device)
    offset = (torch.arange(L) - torch.arange(L)[:, None]) // d + w - 1
    bias = table[:, offset.clamp(0, 2 * w - 2)]
    want = attention_reference(q, k, v, mask=neighborhood_mask((L,), w, dilation=d).to(q.device), bias=bias)
    assert rel_error(neighborhood_attention(q, k, v, w, dilation=d, rel_pos_bias=table, backend="torch"), want) < 1e-10


@pytest.mark.parametrize("head_dim", [16, 24, 40])
@BOTH
def test_views_and_heads(backend, head_dim):
    g = torch.Generator().manual_seed(0)
    heads_last = [torch.randn(1, 5, 6, h, head_dim, generator=g).to(device_under_test()) for h in (6, 2, 2)]
    views = [t.permute(0, 3, 1, 2, 4) for t in heads_last]  # (B, H, X, Y, D), not contiguous
    out = neighborhood_attention(*views, (3, 5), backend=backend)
    assert rel_error(out, neighborhood_attention(*(t.contiguous() for t in views), (3, 5), backend="torch")) < 1e-5
    for h in range(6):  # head h reads key head h // 3
        one = neighborhood_attention(
            views[0][:, h : h + 1],
            views[1][:, h // 3 : h // 3 + 1],
            views[2][:, h // 3 : h // 3 + 1],
            (3, 5),
            backend="torch",
        )
        assert rel_error(out[:, h : h + 1], one) < 1e-5


@BOTH
def test_empty_batch(backend):
    empty = torch.zeros(0, 2, 5, 6, 16, device=device_under_test())
    assert na2d(empty, empty, empty, 3, backend=backend).shape == empty.shape


@pytest.mark.parametrize(
    "shape", [(1,), (2,), (7,), (33,), (65,), (1, 13), (13, 2), (9, 17), (2, 1, 9), (5, 9, 3)], ids=str
)
@BOTH
def test_odd_sizes(backend, shape):
    "Axes of 1, 2, 7, 13, 33 and one more than a tile, forward and backward: partial tiles on every axis."
    kw = dict(window_size=tuple(min(x, 3) for x in shape))
    op = partial(neighborhood_attention, **kw, return_lse=True, backend=backend)
    check_against_reference(op, partial(dense, shape=shape, kw=kw), draw(shape, H=1), grad_tol=2e-5, floor=0.05)


@pytest.mark.parametrize("shape, B, Hk, heads_last", [((4, 8, 8), 2, 1, False), ((4, 8, 9), 1, 2, True)])
def test_descriptors_on_maps_of_three(shape, B, Hk, heads_last):
    "Batch and heads are one axis of a tensor descriptor where their strides allow it; else rows come by pointers."
    kw = dict(window_size=(2, 3, 3), is_causal=(True, False, False))
    op = partial(neighborhood_attention, return_lse=True, backend="triton", **kw)
    turned = lambda t: t.movedim(1, -2).contiguous().movedim(-2, 1)
    assert not describable(turned(draw(shape, B=2)[0]))
    tensors = [turned(t) if heads_last else t for t in draw(shape, B=B, Hk=Hk)]
    assert all(describable(t) for t in tensors)
    check_against_reference(op, partial(dense, shape=shape, kw=kw), tensors, grad_tol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@BOTH
def test_half_precision(backend, dtype):
    q, k, v = draw((9, 12), dtype=dtype)
    out, lse = neighborhood_attention(q, k, v, 5, return_lse=True, backend=backend)
    assert out.dtype == dtype and lse.dtype == torch.float32
    want, _ = dense(q.double(), k.double(), v.double(), (9, 12), dict(window_size=5))
    assert rel_error(out, want) < TOLERANCE[dtype]


@BOTH
def test_good_citizen(backend):
    g = torch.Generator().manual_seed(0)
    q, k, v = draw((3, 6), B=1, Hk=1, Dv=24)
    make = lambda *s: torch.randn(*s, generator=g).to(q.device)
    inputs = dict(
        q=q,
        k=k,
        v=v,
        rel_pos_bias=make(2, 5, 5),
        additional_keys=make(1, 1, 3, 16),
        additional_values=make(1, 1, 3, 24),
    )
    dilation = 1 if backend == "triton" and q.device.type == "cpu" else (1, 2)  # the interpreter is slow
    op = partial(
        neighborhood_attention, window_size=3, stride=(2, 1), dilation=dilation, return_lse=True, backend=backend
    )
    skip = ("deterministic",) if backend == "torch" else ()  # a GPU adds a gather's gradients in any order
    check_operation(op, partial(op, backend="torch"), inputs, grad_tol=2e-5, skip=skip)


@pytest.mark.cuda
def test_memory_does_not_grow_with_window():
    if device_under_test() != "cuda":
        return
    q, k, v = draw((64, 64), H=8, Hk=8, D=64, dtype=torch.bfloat16)
    peak = [peak_memory(lambda: na2d(q, k, v, w, backend="triton"), "cuda") for w in (3, 63)]
    assert peak[1] <= 1.05 * peak[0], peak


@pytest.mark.cuda
def test_64_bit_addresses():
    if device_under_test() != "cuda" or torch.cuda.mem_get_info()[0] < 40e9:
        return
    L, D, tail = 2**27 + 5, 16, 1000  # 2**31 elements and a few
    q, k, v = (torch.randn(1, 1, L, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = na1d(q, k, v, 7, backend="triton")[:, :, -tail:]
    want = neighborhood_attention_reference(*(t[:, :, -2 * tail :].double() for t in (q, k, v)), 7)[:, :, -tail:]
    assert rel_error(out, want) < TOLERANCE[torch.bfloat16]


def bad_inputs():
    "(wrong arguments, error, what it names)"
    q, k, v = draw((8, 9), B=2, H=4, Hk=2)
    windows = [
        (dict(window_size=(9, 3)), ValueError, "axis 0"),
        (dict(window_size=3, dilation=(1, 4)), ValueError, "axis 1"),
        (dict(window_size=3, stride=4), ValueError, "stride"),
        (dict(window_size=0), ValueError, "window_size"),
        (dict(window_size=-3), ValueError, "window_size"),
        (dict(window_size=3, dilation=-1), ValueError, "dilation"),
        (dict(window_size=3, stride=0), ValueError, "stride"),
        (dict(window_size=(3, 3, 3)), ValueError, "window_size"),
        (dict(window_size=3.0), TypeError, "window_size"),
        (dict(window_size=True), TypeError, "window_size"),
        (dict(window_size=(3, 3.0)), TypeError, "window_size[1]"),
        (dict(stride=np.float64(1)), TypeError, "stride"),
        (dict(window_size=3, is_causal=1), TypeError, "is_causal"),
        (dict(window_size=3, is_causal=(True,)), ValueError, "is_causal"),
    ]
    tensors = [
        (dict(k=k[:, :, :7]), ValueError, "k must"),
        (dict(v=v[:1]), ValueError, "v must"),
        (dict(k=k[..., :8]), ValueError, "k must"),
        (dict(q=q[:, :3]), ValueError, "heads"),
        (dict(v=v[:, :1]), ValueError, "v must"),
        (dict(q=q[0, 0, 0]), ValueError, "q must"),
        (dict(q=q.int()), TypeError, "q must"),
        (dict(k=k.half()), TypeError, "k must"),
        (dict(v=[1.0]), TypeError, "v must"),
        (dict(backend="cuda"), ValueError, "backend"),
        (dict(scale="1"), TypeError, "scale"),
        (dict(scale=math.inf), ValueError, "scale"),
    ]
    extras = [
        (dict(rel_pos_bias=torch.zeros(4, 5, 3)), ValueError, "rel_pos_bias"),
        (dict(rel_pos_bias=torch.zeros(4, 5, 5).long()), TypeError, "rel_pos_bias"),
        (dict(additional_keys=k[:, :, 0]), ValueError, "additional_"),
        (dict(additional_keys=k[:, :, 0], additional_values=v[:, :1, 0]), ValueError, "additional_values"),
    ]
    return windows + tensors + extras


@pytest.mark.parametrize("bad", bad_inputs(), ids=lambda bad: ", ".join(bad[0]))
def test_bad_input(bad):
    q, k, v = draw((8, 9), B=2, H=4, Hk=2)
    check_raises(neighborhood_attention, [bad], q=q, k=k, v=v, window_size=3)


@pytest.mark.parametrize("f, axes", [(na1d, 2), (na3d, 2), (na2d, 1)], ids=["na1d", "na3d", "na2d"])
def test_wrong_rank(f, axes):
    x = draw((8, 9)[:axes])[1]
    with pytest.raises(ValueError, match="needs q of shape"):
        f(x, x, x, 3)


@BOTH
@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_integers_of_numpy(kind, backend):
    q, k, v = draw((8, 9), H=1)
    want = na2d(q, k, v, (3, 5), stride=(1, 2), backend=backend)
    sizes = dict(window_size=(kind(3), kind(5)), stride=(1, kind(2)), dilation=kind(1), is_causal=np.bool_(False))
    assert torch.equal(na2d(q, k, v, **sizes, backend=backend), want)
    assert neighborhood_pairs(np.array([8, 9]), kind(3)) == 8 * 9 * 9


@pytest.mark.parametrize(
    "kw, error",
    [
        (dict(q_tile=(8, 8, 8)), ValueError),
        (dict(q_tile=8, scheme="diagonal"), ValueError),
        (dict(q_tile=8.0), TypeError),
        (dict(q_tile=8, block_n=0), ValueError),
    ],
    ids=str,
)
def test_bad_tiles(kw, error):
    with pytest.raises(error):
        tile_waste((8, 9), 3, **dict(block_n=32) | kw)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_huge_equal_logits(backend):
    "The mean of ones is 1, whatever the logits."
    q = torch.full((1, 1, 4, 4, 16), 1e4, device=device_under_test())
    out = na2d(q, q, torch.ones_like(q), 3, scale=1.0, backend=backend)
    assert (out - 1).abs().max() < 1e-3


@EACH
def test_double_precision_reference(case):
    shape, kw = CASES[case]
    small = [t.double().requires_grad_() for t in draw(shape, B=1, H=2, D=3)]
    if math.prod(shape) <= 35:
        reference = partial(neighborhood_attention_reference, **kw, return_lse=True)
        assert torch.autograd.gradcheck(reference, small, fast_mode=math.prod(shape) > 17, nondet_tol=1e-12)
    q, k, v = (t.double() for t in draw(shape))
    assert rel_error(neighborhood_attention_reference(q, k, v, **kw), dense(q, k, v, shape, kw)[0]) < 1e-10


@pytest.mark.parametrize(
    "how, want, digits",
    [
        (dict(shape=(56, 56), window_size=7, q_tile=128, block_n=128, scheme="row-major"), 12.9, 1),
        (dict(shape=(56, 56), window_size=7, q_tile=(8, 8), block_n=(8, 8), scheme="aligned"), 9.6, 1),
        (dict(shape=(56, 56), window_size=7, q_tile=(8, 8), block_n=32), 3.9, 1),
        (dict(shape=(30, 48, 80), window_size=(18, 24, 24), q_tile=(4, 8, 4), block_n=64), 1.42, 2),
    ],
    ids=str,
)
def test_waste(how, want, digits):
    assert round(tile_waste(**how), digits) == want


@pytest.mark.parametrize("transpose", [False, True])
def test_blocks_waste_nothing(transpose):
    assert tile_waste((64, 64), 8, stride=8, q_tile=8, block_n=64, transpose=transpose) == 1.0


def test_chosen_tiles():
    assert choose_q_tile((56, 56), 7) == (8, 8) and choose_q_tile((100,), 9, block_m=32) == (32,)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    "kw",
    [
        dict(window_size=(9, 5)),
        dict(window_size=(8, 6), stride=(4, 3)),
        dict(window_size=(4, 3), dilation=(2, 1), is_causal=(True, False)),
    ],
    ids=str,
)
def test_order_of_bricks(kw, transpose):
    "The tables agree with the dense mask: bricks without a mask come first, those that nobody sees are left out."
    shape, tile, brick = (18, 13), (4, 2), (2, 4)
    axes = neighborhood_axes(shape, **kw)
    sides = [int(np.max(np.subtract(*tile_spans(a, t, transpose)[::-1]))) for a, t in zip(axes, tile)]
    share, _, order = unseen_tables(axes, tile, tuple(sides), brick, transpose, torch.device("cpu"))
    mask = neighborhood_mask(shape, **kw).view(*shape, *shape)
    mask = mask.permute(2, 3, 0, 1) if transpose else mask
    starts = [tile_spans(a, t, transpose)[0] for a, t in zip(axes, tile)]
    full, steps, d = 0, 0, axes[0].dilation
    for i, j in product(*(range(len(s)) for s in starts)):
        row = order[share[i] + share[len(starts[0]) + j]].tolist()
        per_class = len(starts[0]) // d
        rows = slice(i // per_class + i % per_class * 4 * d, None, d)
        seen = mask[rows][:4, 2 * j : 2 * j + 2]  # [4, 2, *shape]
        for at, number in enumerate(row[2:]):
            y, x = divmod(number, -(-sides[1] // 4))
            place = seen[:, :, i // per_class :: d][:, :, starts[0][i] + 2 * y :, starts[1][j] + 4 * x :][:, :, :2, :4]
            assert (place.shape[2:] == (2, 4) and bool(place.all())) == (at < row[0]), (i, j, at)
            assert bool(place.any()) == (at < row[1]), (i, j, at)
        full, steps = full + row[0], steps + row[1]
    assert abs(inner_share(axes, tile, brick, transpose)[0] - full / steps) < 1e-12
    useful = tile_waste(shape, **kw, q_tile=tile, block_n=brick, scheme="bricks", transpose=transpose)
    assert round(useful * neighborhood_pairs(shape, **kw)) == 64 * steps


@pytest.mark.parametrize(
    "shape, kw",
    [
        ((16, 16), dict(window_size=15)),
        ((16, 24), dict(window_size=8, stride=8)),
        ((200,), dict(window_size=190)),
        ((150,), dict(window_size=140, is_causal=True)),
    ],
    ids=str,
)
def test_steps_without_mask(shape, kw):
    q, k, v = draw(shape, H=1)
    axes = neighborhood_axes(shape, **kw)
    with mock.patch.dict(_tiling.__globals__, UNMASKED_STEPS=3):
        C = _cut(axes, 32, 16, arch_of(q.device))
        assert C.of_q.unmasked and (C.of_k.unmasked or kw.get("is_causal"))
        op = partial(neighborhood_attention, **kw, return_lse=True, backend="triton")
        check_against_reference(op, partial(dense, shape=shape, kw=kw), (q, k, v), grad_tol=2e-5, floor=0.05)


def with_official_names(net):
    "A NAT's state dict with the names of the official repository."
    found = {}
    for name, t in net.state_dict().items():
        if name.startswith("levels."):
            level, place, rest = name.split(".", 3)[1:]
            if place != "0":
                name = f"levels.{level}.blocks.{int(place) - 1}.{rest.replace('rel_pos_bias', 'rpb')}"
            elif level == "0":
                name = f"patch_embed.{rest.replace('convs.', 'proj.')}"
            else:
                name = f"levels.{int(level) - 1}.downsample.{rest.replace('convs.0', 'reduction')}"
        found[name] = t
    return found


def with_names_of_transformers(net):
    "The same with the names of transformers, as in its `DinatForImageClassification`."
    found = {}
    for name, t in with_official_names(net).items():
        pieces = name.split(".")
        block = "encoder.levels.{}.layers.{}".format(pieces[1], pieces[3]) if "blocks" in pieces else ""
        rest = ".".join(pieces[4:])
        if rest.startswith("attn.qkv."):
            names = [f"dinat.{block}.attention.self.{n}.{pieces[-1]}" for n in ("query", "key", "value")]
            found |= dict(zip(names, t.chunk(3)))
        elif rest in ("gamma1", "gamma2"):
            scales = found.setdefault(f"dinat.{block}.layer_scale_parameters", torch.zeros(2, len(t)))
            scales[int(rest[-1]) - 1] = t
        elif block:
            for a, b in (
                ("norm1", "layernorm_before"),
                ("norm2", "layernorm_after"),
                ("attn.rpb", "attention.self.rpb"),
            ):
                rest = rest.replace(a, b)
            rest = rest.replace("attn.proj", "attention.output.dense").replace("mlp.fc1", "intermediate.dense")
            found[f"dinat.{block}.{rest.replace('mlp.fc2', 'output.dense')}"] = t
        elif pieces[0] == "patch_embed":
            rest = name.removeprefix("patch_embed.").replace("proj.", "patch_embeddings.projection.")
            found[f"dinat.embeddings.{rest}"] = t
        elif pieces[0] == "levels":
            found[f"dinat.encoder.{name}"] = t
        else:
            found[name.replace("norm.", "dinat.layernorm.").replace("head.", "classifier.")] = t
    return found


def small_published(**changes):
    "Two levels with everything that a published size may have, with its weights drawn anew."
    settings = dict(dim=16, depths=(1, 2), num_heads=(1, 2), window_size=3, layer_scale=1e-5, num_classes=3)
    net = NAT(**settings | dict(dilations=((1,), (1, 2))) | changes).eval()
    for p in net.parameters():
        p.data.normal_(std=0.2)
    return net


LAYOUTS = {
    "official": with_official_names,
    "official, in parallel": lambda net: {
        "state_dict": {f"module.{n}": t for n, t in with_official_names(net).items()}
    },
    "transformers": with_names_of_transformers,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts(layout):
    torch.manual_seed(0)
    net, x = small_published(), torch.randn(1, 3, 32, 24)
    state = LAYOUTS[layout](net)
    assert "levels.0.1.attn.qkv.weight" not in state and torch.equal(from_official(small_published(), state)(x), net(x))
    features = from_official(small_published(num_classes=0), state)
    assert torch.equal(features(x), net.forward_features(x).mean((1, 2)))


@pytest.mark.parametrize(
    "changes, says",
    [(dict(num_classes=4), "head.weight"), (dict(layer_scale=None), "gamma1"), (dict(window_size=5), "rel_pos_bias")],
    ids=["classes", "layer scale", "window"],
)
def test_published_weights_that_do_not_fit(changes, says):
    with pytest.raises(ValueError, match=says):
        from_official(small_published(**changes), with_official_names(small_published()))


def test_published_names():
    "A few names of NAT-Mini as they stand in its checkpoint, with their shapes."
    with torch.device("meta"):
        official = with_official_names(nat_mini())
    names = ("patch_embed.proj.1.weight", "levels.0.downsample.reduction.weight", "levels.2.blocks.5.attn.rpb")
    assert [tuple(official[n].shape) for n in names] == [(64, 32, 3, 3), (128, 64, 3, 3), (8, 13, 13)]


def test_names_of_transformers():
    "Its own model has these names, block by block."
    pytest.importorskip("transformers")
    try:
        from transformers import DinatConfig
        from transformers.models.dinat import modeling_dinat as theirs
    except (ImportError, RuntimeError) as e:  # transformers needs a torchvision that fits
        pytest.skip(str(e))
    block = theirs.DinatLayer(DinatConfig(layer_scale_init_value=1e-5, kernel_size=3), 16, 1, 1)
    mine = {n.split("layers.0.")[1] for n in with_names_of_transformers(small_published()) if "levels.0.layers.0." in n}
    assert mine == set(block.state_dict())


@pytest.mark.parametrize(
    "make, dilated, want",
    [
        (nat_mini, dinat_mini, 19_984_174),
        (nat_tiny, dinat_tiny, 27_901_582),
        (nat_small, dinat_small, 50_743_297),
        (nat_base, dinat_base, 89_769_652),
    ],
    ids=["mini", "tiny", "small", "base"],
)
def test_parameter_counts(make, dilated, want):
    assert count_parameters(make) == want == count_parameters(dilated)


@pytest.mark.parametrize(
    "make, depths",
    [
        (dinat_mini, (3, 4, 6, 5)),
        (dinat_tiny, (3, 4, 18, 5)),
        (dinat_small, (3, 4, 18, 5)),
        (dinat_base, (3, 4, 18, 5)),
    ],
    ids=["mini", "tiny", "small", "base"],
)
def test_dilations(make, depths):
    with torch.device("meta"):
        model = make()
    found = [[b.attn.dilation[0] for b in level[1:]] for level in model.levels]
    assert found == [([1, d] * 9)[:n] for n, d in zip(depths, (8, 4, 2, 1))]


@pytest.mark.parametrize(
    "make, last",
    [
        (nat_mini, 0.2),
        (nat_tiny, 0.2),
        (nat_small, 0.3),
        (nat_base, 0.5),
        (dinat_mini, 0.2),
        (dinat_tiny, 0.2),
        (dinat_small, 0.3),
        (dinat_base, 0.5),
    ],
)
def test_drop_path(make, last):
    with torch.device("meta"):
        rates = [b.drop_path.rate for level in make().levels for b in level[1:]]
    assert rates[0] == 0 and abs(rates[-1] - last) < 1e-6 and sorted(rates) == rates
    with torch.device("meta"):
        model = make(drop_path_rate=0.0)
    assert {b.drop_path.rate for level in model.levels for b in level[1:]} == {0.0}


@pytest.mark.parametrize(
    "make", [nat_mini, nat_tiny, nat_small, nat_base, dinat_mini, dinat_tiny, dinat_small, dinat_base]
)
def test_what_a_task_changes(make):
    with torch.device("meta"):
        model = make(num_classes=7, in_channels=1, window_size=5, stride=3, backend="torch")
    blocks = [b.attn for level in model.levels for b in level[1:]]
    assert model.head.out_features == 7 and model.levels[0][0].convs[0].in_channels == 1
    assert {(b.window_size, b.stride, b.backend) for b in blocks} == {((5, 5), (3, 3), "torch")}
    layer_scale = model.levels[0][1].gamma1
    assert (layer_scale is None) == ("mini" in make.__name__ or "tiny" in make.__name__)


def test_block():
    "x + gamma1 * attn(norm1(x)), then x + gamma2 * mlp(norm2(x)); in training drop path takes whole branches."
    torch.manual_seed(0)
    block = NATBlock(16, NeighborhoodAttention2d(16, 2, 3), mlp_ratio=2.0, layer_scale=0.5, drop_path=0.5)
    block.gamma2.data.fill_(0.25)
    x = torch.randn(64, 4, 5, 16)
    block.eval()
    half = x + 0.5 * block.attn(block.norm1(x))
    assert rel_error(block(x), half + 0.25 * block.mlp(block.norm2(half))) < 1e-6
    assert block.mlp.fc1.out_features == 32
    block.train()
    kept = (block(x) != x).flatten(1).any(1).float().mean()  # a branch at least: 3/4 of the samples
    assert 0.5 < kept < 0.95


def test_network():
    "Stem, levels, norm, mean over tokens, head; the map halves with every convolution."
    torch.manual_seed(0)
    net = NAT(dim=16, depths=(1, 1), num_heads=(1, 2), num_classes=3).eval()
    x = torch.randn(2, 3, 32, 20)
    level = net.levels[0][0](x.movedim(1, -1))
    assert level.shape == (2, 8, 5, 16) and len(net.levels[0][0].convs) == 2
    assert net.forward_features(x).shape == (2, 4, 3, 32)
    want = net.norm(net.levels[1](net.levels[0](x.movedim(1, -1)))).mean((1, 2))
    assert rel_error(net(x), net.head(want)) < 1e-6
    features = NAT(dim=16, depths=(1, 1), num_heads=(1, 2), num_classes=0).eval()
    features.load_state_dict({n: p for n, p in net.state_dict().items() if not n.startswith("head.")})
    assert rel_error(features(x), want) < 1e-6
    assert net.levels[1][0].convs[0].bias is None and net.levels[0][0].convs[0].bias is not None
    assert 0.01 < float(net.head.weight.detach().std()) < 0.03 and not net.head.bias.any()


@pytest.mark.parametrize(
    "make, shape",
    [(NeighborhoodAttention1d, (11,)), (NeighborhoodAttention2d, (6, 9)), (NeighborhoodAttention3d, (3, 4, 5))],
    ids=["1d", "2d", "3d"],
)
def test_modules(make, shape):
    torch.manual_seed(0)
    layer = make(32, 2, 3, rel_pos_bias=True, is_causal=(True,) + (False,) * (len(shape) - 1)).to(device_under_test())
    x = torch.randn(2, *shape, 32, device=device_under_test(), requires_grad=True)
    y = layer(x)
    y.square().mean().backward()
    assert y.shape == x.shape and all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert float(layer.rel_pos_bias.grad.abs().sum()) > 0 and "window_size" in repr(layer)
    with pytest.raises(ValueError, match="x must have shape"):
        layer(x[..., :16])


def test_module_is_the_operation():
    "Queries, keys and values in this order from one linear layer, heads one after another; scale as given."
    torch.manual_seed(0)
    layer = NeighborhoodAttention2d(12, 3, (3, 5), stride=(2, 1), dilation=(1, 2), qk_scale=0.3, rel_pos_bias=True)
    layer, x = layer.double(), torch.randn(2, 6, 10, 12, dtype=torch.float64)
    qkv = (x @ layer.qkv.weight.T + layer.qkv.bias).view(2, 6, 10, 3, 3, 4).permute(3, 0, 4, 1, 2, 5)
    out = neighborhood_attention_reference(
        *qkv, (3, 5), stride=(2, 1), dilation=(1, 2), scale=0.3, rel_pos_bias=layer.rel_pos_bias
    )
    assert rel_error(layer(x), layer.proj(out.permute(0, 2, 3, 1, 4).flatten(3))) < 1e-10
    assert NeighborhoodAttention2d(12, 3, 3, qkv_bias=False).qkv.bias is None
    layer = NeighborhoodAttention2d(12, 3, 3, proj_drop=0.5)
    assert float((layer(x.float()) == 0).float().mean()) > 0.3


@pytest.mark.parametrize(
    "arguments, options, error, names",
    [
        ((30, 4, 3), {}, ValueError, "dim"),
        ((32, 4, 3), dict(stride=4), ValueError, "stride"),
        ((32, 4.0, 3), {}, TypeError, "num_heads"),
        ((32.0, 4, 3), {}, TypeError, "dim"),
        ((32, 0, 3), {}, ValueError, "num_heads"),
        ((32, True, 3), {}, TypeError, "num_heads"),
        ((32, 4, 3.0), {}, TypeError, "window_size"),
        ((32, 4, 3), dict(is_causal=1), TypeError, "is_causal"),
        ((32, 4, 3), dict(proj_drop=2), ValueError, "proj_drop"),
        ((32, 4, 3), dict(fit=1), TypeError, "fit"),
        ((32, 4, 3), dict(rel_pos_bias=torch.zeros(2)), TypeError, "rel_pos_bias"),
    ],
    ids=str,
)
def test_bad_modules(arguments, options, error, names):
    with pytest.raises(error, match=names):
        NeighborhoodAttention1d(*arguments, **options)


def test_modules_take_integers_of_numpy():
    layer = NeighborhoodAttention2d(np.int64(32), np.int32(4), (np.int64(3), 5), stride=np.int64(2), rel_pos_bias=True)
    assert layer(torch.randn(1, 6, 7, 32)).shape == (1, 6, 7, 32) and layer.window_size == (3, 5)
    with pytest.raises(ValueError, match="axis 0"):
        NeighborhoodAttention1d(32, 4, 7)(torch.randn(1, 5, 32))


def test_fit():
    "A fitted layer on a small map is global attention with the middle of the bias table."
    torch.manual_seed(0)
    wide = NeighborhoodAttention2d(32, 2, 7, dilation=2, rel_pos_bias=True, fit=True).to(device_under_test())
    small = NeighborhoodAttention2d(32, 2, (4, 5), rel_pos_bias=True).to(device_under_test())
    small.load_state_dict({**wide.state_dict(), "rel_pos_bias": wide.rel_pos_bias[:, 3:10, 2:11]})
    x = torch.randn(2, 4, 5, 32, device=device_under_test())
    assert rel_error(wide(x), small(x)) < 1e-6


@pytest.mark.parametrize(
    "args, want",
    [
        (((14, 14), 7, 1, 4), ((7, 7), (1, 1), (2, 2))),
        (((5, 9), 7, 1, 2), ((5, 7), (1, 1), (1, 1))),
        (((20, 6), (5, 7), (3, 7), (2, 1)), ((5, 6), (3, 6), (2, 1))),
    ],
    ids=str,
)
def test_fitted_neighborhoods(args, want):
    assert fit_neighborhood(*args) == want


@pytest.mark.parametrize("side", [9, 32, 50])
def test_networks_fit_their_maps(side):
    net = NAT(dim=32, depths=(1, 2), num_heads=(1, 2), num_classes=4, dilations=((1,), (1, 4))).to(device_under_test())
    assert net(torch.randn(2, 3, side, side, device=device_under_test())).shape == (2, 4)


def count_steps(shape, kw):
    "What `kernel_steps` says, counted from the dense mask."
    axes, (tile, brick) = neighborhood_axes(shape, **kw), kernel_tiles(shape, **kw)
    mask = neighborhood_mask(shape, **kw).view(*shape, *shape).numpy()
    sides = []  # of every axis: the positions of every tile
    for axis, t in zip(axes, tile):
        longest = -(-axis.length // axis.dilation)
        classes = [range(r, axis.length, axis.dilation) for r in range(axis.dilation)]
        sides.append([c[i : i + t] for c in classes for i in range(0, longest, t)])
    counts = []
    for queries in product(*sides):
        seen = mask[np.ix_(*queries)].reshape(-1, *shape)  # [queries, *shape]
        free = steps = 0
        if len(seen):
            first = [int(k.min()) for k in seen.any(0).nonzero()]
            bricks = [
                [range(k, axis.length, axis.dilation)[i : i + u] for i in range(0, axis.length, u)]
                for axis, k, u in zip(axes, first, brick)
            ]
            for keys in product(*bricks):
                block = seen[np.ix_(range(len(seen)), *keys)]  # [queries, *brick], less at a border
                steps += block.any()
                free += block.all() and block.shape[1:] == brick
        counts.append((free, steps - free))
    free, masked = np.array(counts).T
    if free.sum() < 0.25 * (free + masked).sum():  # too few: every step takes the mask
        free, masked = 0 * free, free + masked
    return free * math.prod(brick), masked * math.prod(brick)


@pytest.mark.parametrize(
    "shape, kw, some",
    [
        ((19, 24), dict(window_size=5), False),
        ((24, 30), dict(window_size=(21, 27)), False),
        ((27, 16), dict(window_size=8, stride=8), True),
        ((21, 16), dict(window_size=(5, 8), dilation=(2, 1)), False),
        ((11, 37), dict(window_size=(3, 4), dilation=(3, 5), stride=(2, 3)), False),
        ((24, 26), dict(window_size=(24, 20), is_causal=(True, False), stride=(1, 4)), True),
        ((40, 33), dict(window_size=(37, 33), is_causal=True), True),
        ((6, 9, 10), dict(window_size=(3, 5, 4)), False),
        ((5, 8, 16), dict(window_size=(5, 8, 13)), True),
        ((4, 8, 9), dict(window_size=(4, 2, 3), stride=(1, 2, 3), is_causal=(True, False, False)), False),
    ],
    ids=str,
)
def test_kernel_steps(shape, kw, some):
    (free, masked), want = kernel_steps(shape, **kw), count_steps(shape, kw)
    assert np.array_equal(free, want[0]) and np.array_equal(masked, want[1])
    assert free.any() == some  # whether there are steps without a mask


@pytest.mark.parametrize(
    "bad",
    [
        (dict(shape=(64,)), ValueError, ["shape", "two or three"]),
        (dict(head_dim=257), ValueError, ["head_dim"]),
        (dict(window_size=9), ValueError, ["window_size", "axis 0"]),
    ],
    ids=lambda bad: str(bad[0]),
)
def test_bad_steps(bad):
    check_raises(kernel_steps, [bad], shape=(8, 8), window_size=3)


def test_predicted_us():
    costs = StepCosts(launch=2.0, program=1.0, free=0.5, masked=0.75, alone=3.0)
    keys = lambda *n: np.array(n)
    one = keys(128), keys(64)  # work 1 + 2 * 0.5 + 0.75
    assert predicted_us(one, 1, costs) == 2 + 3 * 2.75  # alone on its multiprocessor
    assert predicted_us(one, 4, costs, processors=4) == 2 + 3 * 2.75  # and so are four on four
    assert predicted_us(one, 40, costs, processors=4) == 2 + 10 * 2.75  # ten on each: nobody is alone
    assert predicted_us(one, 41, costs, processors=4) == 2 + 11 * 2.75
    assert predicted_us((keys(0, 0, 256), keys(0, 0, 0)), 1, costs) == 2 + 3 * 3.0  # fewer than multiprocessors
    # work 3, 1, 1, 1 on two: the ones fill up beside the three
    assert predicted_us((keys(256, 0, 0, 0), keys(0, 0, 0, 0)), 1, costs._replace(alone=1.0), processors=2) == 2 + 3
    # in the order of launch: 1, 1, 3 on two take 4, though 3, 1, 1 would take 3
    assert predicted_us((keys(0, 0, 256), keys(0, 0, 0)), 1, costs._replace(alone=1.0), processors=2) == 2 + 4


def test_cost_rows():
    "Fractions of the dense product: useful pairs, what tiles of the kernel compute, what row-major tiles do."
    rows = cost_experiment(**PRESETS["smoke"]["cost"])
    assert [r["window"] for r in rows] == [3, 7, 12] and all(r["unfold"] > 0 and r["ms_dense"] > 0 for r in rows)
    assert [r["useful"] for r in rows] == pytest.approx([(w / 12) ** 2 for w in (3, 7, 12)])
    assert all(r["useful"] <= r["box"] and r["useful"] <= r["row_major"] for r in rows)
    assert rows[0]["box"] < rows[2]["box"] and rows[0]["box"] < 1


def test_stride_experiment():
    "Pairs of the boxes bound the speed-up over dense attention; the change is relative to stride 1."
    torch.manual_seed(0)
    x = torch.randn(1, 1, 8, 8, 16)
    rows = stride_experiment(x, 4)
    assert [r["stride"] for r in rows] == [1, 2, 3, 4] and rows[0]["error"] == 0
    for r in rows:
        q_tile, brick = kernel_tiles((8, 8), 4, stride=r["stride"], head_dim=16)
        waste = tile_waste((8, 8), 4, stride=r["stride"], q_tile=q_tile, block_n=brick, scheme="bricks")
        assert r["bound"] == pytest.approx(64 / (16 * waste)) and r["waste"] == waste
    one, four = (neighborhood_attention_reference(x, x, x, 4, stride=s) for s in (1, 4))
    assert rows[3]["error"] == pytest.approx(float((four - one).norm() / one.norm()), rel=1e-5)


def test_equivariance_experiment():
    "Sliding windows move with the picture, dilated ones too; the others only by multiples of their step; all in the same crop."
    g = np.random.default_rng(0)
    rows = equivariance_experiment(g.integers(0, 255, (60, 90, 3), dtype=np.uint8), 32, 3, 2, 2, corner=(5, 7))
    assert [r["shift"] for r in rows] == [1, 2, 3, 4, 5, 6]
    still = {"NA": 1, "NA, dilation 2": 1, "stride 2": 2, "blocked": 3, "halo (block 4, halo 2)": 4}
    for r in rows:
        for name, step in still.items():
            assert r[name] < 1e-9 if r["shift"] % step == 0 else r[name] > 1e-3, (name, r["shift"])


def test_border_experiment():
    "Half a window from the border all rules agree with the larger picture; a cut window keeps the near keys, and only these."
    image = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    rows = border_experiment(image, 16, 5, corner=(20, 20))
    assert [r["distance"] for r in rows] == [0, 1, 2, 3]
    for r in rows:
        for name in ("slide", "cut", "zeros"):
            assert r[name] < 1e-9 if r["distance"] >= 2 else r[name] > 1e-3, (name, r["distance"])


def test_border_experiment_on_one_colour():
    "On a picture of one colour every key is alike: windows that slide or are cut change nothing, zeros do."
    rows = border_experiment(np.full((60, 60, 3), 200, np.uint8), 16, 5, corner=(20, 20))
    assert all(r["slide"] < 1e-9 and r["cut"] < 1e-9 and (r["zeros"] > 1e-3) == (r["distance"] < 2) for r in rows)


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_shifted_windows(shift):
    "A query sees its window of the shifted grid, cut at the map's border; with the bias of the true offset."
    torch.manual_seed(0)
    layer, x = ShiftedWindowAttention(8, 2, 3, shift).double(), torch.randn(2, 6, 9, 8, dtype=torch.float64)
    layer.rel_pos_bias.data.normal_()
    i, j = (t.flatten() for t in torch.meshgrid(torch.arange(6), torch.arange(9), indexing="ij"))
    seen = torch.ones(54, 54, dtype=torch.bool)
    for p in (i, j):
        block = (p + 3 - shift) // 3  # the grid begins at shift - 3
        seen &= block[:, None] == block
    q, k, v = layer.qkv(x).flatten(1, 2).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    near = lambda p: (p[None] - p[:, None]).clamp(-2, 2) + 2
    scores = q @ k.mT / 2 + layer.rel_pos_bias[:, near(i), near(j)]
    want = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v
    assert rel_error(layer(x), layer.proj(want.transpose(1, 2).flatten(2)).unflatten(1, (6, 9))) < 1e-12


def test_shifted_windows_and_blocks():
    "Without a shift, or where the map is one window, they are the blocked neighbourhood of the same weights."
    torch.manual_seed(0)
    blocked = NeighborhoodAttention2d(8, 2, 3, stride=3, rel_pos_bias=True)
    for shift, side in ((0, 6), (1, 3)):
        layer, x = ShiftedWindowAttention(8, 2, 3, shift), torch.randn(1, side, side, 8)
        layer.load_state_dict(blocked.state_dict())
        assert rel_error(layer(x), blocked(x)) < 1e-5
    for arguments, names in (((8, 3, 3), "num_heads"), ((8, 2, 3, 3), "shift"), ((8, 2, 0), "window_size")):
        with pytest.raises(ValueError, match=names):
            ShiftedWindowAttention(*arguments)
    with pytest.raises(ValueError, match="multiples of window_size = 3"):
        ShiftedWindowAttention(8, 2, 3)(torch.zeros(1, 6, 7, 8))


@pytest.mark.parametrize("kind", NAT_KINDS)
def test_kinds_of_neighborhood(kind):
    net = small_nat(kind, 40, 64, (2, 2))
    found = [[b.attn for b in level[1:]] for level in net.levels]
    kinds = [[type(a).__name__[:7] for a in level] for level in found]
    assert kinds == [["Neighbo", "Shifted" if kind == "shifted" else "Neighbo"]] * 2
    sliding = [a for level in found for a in level if type(a) is NeighborhoodAttention2d]
    assert {a.stride for a in sliding} == {(5, 5) if kind in ("blocked", "shifted") else (1, 1)}
    assert {a.window_size for a in sliding} == {(20, 20) if kind == "global" else (5, 5)}
    dilations = [[a.dilation[0] for a in level if a in sliding] for level in found]
    assert dilations == ([[1, 4], [1, 2]] if kind == "NA + dilated" else [[1] * len(d) for d in dilations])
    if kind != "global":
        assert count_parameters(net) == count_parameters(small_nat("NA", 40, 64, (2, 2)))
    assert {(a.window_size, a.shift) for level in found for a in level if a not in sliding} <= {(5, 2)}
    assert net(torch.randn(1, 3, 40, 40)).shape == (1, 10)


def test_every_second_block_is_shifted():
    "Counted over the levels: with one block in each, the second level's."
    blocks = [level[1].attn for level in small_nat("shifted", 20, 32, (1, 1)).levels]
    assert [type(b).__name__ for b in blocks] == ["NeighborhoodAttention2d", "ShiftedWindowAttention"]
    assert [b.attn.dilation for level in small_nat("NA + dilated", 20, 32, (1, 1)).levels for b in level[1:]] == [
        (2, 2),
        (1, 1),
    ]


def test_nat_data(monkeypatch):
    "Standardised by the training images; no image is in both parts; three channels."
    images = np.random.default_rng(0).integers(0, 200, (5000, 28, 28), dtype=np.uint8)
    images[:, 0, 0] = np.arange(5000) % 251
    monkeypatch.setitem(nat_data.__globals__, "mnist5k", lambda: (images, np.arange(5000)))
    x, y, tx, ty = nat_data("mnist5k", 20)
    assert x.shape == (4000, 3, 20, 20) and tx.shape == (1000, 3, 20, 20)
    assert sorted(y.tolist() + ty.tolist()) == list(range(5000))
    assert abs(float(x.mean())) < 1e-4 and float(x.std()) == pytest.approx(1, abs=1e-3) and abs(float(tx.mean())) > 1e-5
    with pytest.raises(ValueError, match="name"):
        nat_data("cifar", 20)


def test_accuracy_of_all_test_images(monkeypatch):
    "Of every part of the test images, with the trained network; the loss is that of the last ten steps."

    def train(trainees, *, steps, batch_size):
        for t in trainees:
            t.model.head.weight.data.zero_(), t.model.head.bias.data.copy_(torch.arange(10.0))  # always the 9
            t.losses = [1.0] * 5 + [3.0] * 10

    monkeypatch.setitem(nat_experiments.__globals__, "train_together", train)
    x, y = torch.zeros(600, 3, 20, 20), torch.tensor([9] * 250 + [0] * 350)
    (row,) = nat_experiments(("NA",), (x, y, x, y), side=20, dim=16, depths=(1, 1), steps=15, batch=4)
    assert row["accuracy"] == pytest.approx(250 / 600) and row["loss"] == 3.0


def test_everything_of_a_preset(monkeypatch):
    "Every experiment is recorded under its name, with the seeds and the number of steps that were asked for."
    kept = []
    monkeypatch.setitem(
        run_experiments.__globals__, "record", lambda chapter, name, **row: kept.append((name, row)) or row
    )
    run_experiments("smoke", "cpu", only="nat", seeds=(3,), steps=1, show=lambda text: None)
    assert [(n, r["kind"], r["run"], r["steps"]) for n, r in kept] == [("nat", kind, 3, 1) for kind in NAT_KINDS]
    assert all(0 <= r["accuracy"] <= 1 and r["parameters"] > 0 and math.isfinite(r["loss"]) for _, r in kept)
    kept.clear()
    run_experiments("smoke", "cpu", only="stride", show=lambda text: None)
    assert {n for n, _ in kept} == {"stride"} and [r["stride"] for _, r in kept] == [1, 2, 3, 4]
    assert kept[0][1]["error"] == 0 < kept[-1][1]["error"]
    with pytest.raises(ValueError, match="only"):
        run_experiments("smoke", only="everything")


def simulator_rows(costs, device="GPU one", date="2026-01-01T00:00:00+00:00", processors=132, slower={}):
    "Rows as `bench_simulator` would write them on a GPU with these costs; `slower`: {case: times as long}."
    return [
        dict(
            case=case,
            method="ours",
            device=device,
            date=date,
            processors=processors,
            calibrates=case in CALIBRATING.values(),
            ms_fwd=predicted_us(*_simulated_problem(case), costs, processors) * slower.get(case, 1) / 1e3,
        )
        for case in SIMULATED
    ]


def test_simulated_problems():
    assert list(CALIBRATING.values()) == list(SIMULATED)[:5] and len(SIMULATED) == 23
    assert len({repr(sorted(p.items())) for p in SIMULATED.values()}) == len(SIMULATED)


@pytest.mark.parametrize("case", SIMULATED)
def test_simulated_problem(case):
    problem = dict(SIMULATED[case])
    assert problem.pop("head_dim") == 64 and problem.pop("heads") == 8 and problem.pop("batch") in (1, 2)
    assert len(neighborhood_axes(**problem)) in (2, 3)


@pytest.mark.parametrize(
    "want, processors",
    [
        (StepCosts(2.5, 1.1, 0.47, 0.53, 2.3), 132),
        (StepCosts(4.0, 0.3, 0.8, 1.5, 1.2), 132),
        (StepCosts(1.0, 5.0, 0.1, 0.4, 4.0), 132),
        (StepCosts(3.0, 0.5, 0.2, 0.25, 2.0), 160),
    ],
    ids=str,
)
def test_costs_are_found_again(want, processors):
    problems = [_simulated_problem(case) for case in CALIBRATING.values()]
    calibration = [(*p, predicted_us(*p, want, processors)) for p in problems]
    found = fit_costs(calibration, processors)
    assert np.allclose(found, want, rtol=1e-6) and found == fit_costs(calibration, processors)


def test_costs_that_are_not_found():
    problems = [_simulated_problem(case) for case in CALIBRATING.values()]
    calibration = [(*p, predicted_us(*p, StepCosts(3.0, 0.5, 0.2, 0.25, 2.0), 160)) for p in problems]
    with pytest.raises(ValueError, match="five"):
        fit_costs(calibration[:4])
    with pytest.raises(ValueError, match="first two"):
        fit_costs(calibration[::-1])
    with pytest.raises(ValueError, match="no positive costs"):
        fit_costs([(*p, 50.0) for p in problems])
    with pytest.raises(ValueError, match="no positive costs"):
        fit_costs(calibration[:4] + calibration[3:4], 160)


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


@pytest.mark.parametrize("case", ["56², w 7", "64², w 13", "128², w 31"])
def test_kernel_work(case):
    "The forward kernel's as the simulator counts it; programs times steps are the pairs of every kernel."
    p, work = PROBLEMS[case], kernel_work(case)
    shape, window, dim = p["shape"], p["window_size"], p["head_dim"]
    free, masked = kernel_steps(shape, window, head_dim=dim)
    rows, brick = (math.prod(x) for x in work["forward"][:2])
    useful = neighborhood_pairs(shape, window)
    assert work["forward"].waste == pytest.approx(rows * (free + masked).sum() / useful)
    assert work["forward"].programs == len(free) and work["forward"].tile == work["dq"].tile
    assert work["forward"].free == pytest.approx(free.sum() / (free + masked).sum())
    for name, w in work.items():
        pairs = w.programs * w.steps * math.prod(w.tile) * math.prod(w.brick)
        assert pairs == pytest.approx(w.waste * useful), name
    assert [work[k].intensity for k in PRODUCTS] == [64, 96, 128]


def test_kernel_work_of_other_launches():
    "Smaller steps waste less; kernels that are not named stay as they are."
    now, other = kernel_work("64², w 13"), kernel_work("64², w 13", dict(dkv=(16, 64, 4, 3)))
    assert other["dkv"].waste < now["dkv"].waste and math.prod(other["dkv"].brick) == 16
    assert other["forward"] == now["forward"] and other["dq"] == now["dq"]


def test_over_flex():
    row = lambda method, fwd, bwd: dict(case="p", method=method, ms_fwd=fwd, ms_bwd=bwd)
    rows = [row("ours", 1.0, 2.0), row("flex", 3.0, 4.0), row("flex tiles", 2.0, None), row("cudnn dense", 0.1, 0.1)]
    assert over_flex(rows, "p") == dict(fwd=2.0, bwd=2.0) and over_flex(rows, "q") == {}
    assert over_flex(rows[:1], "p") == dict(fwd=math.inf, bwd=math.inf)
    assert set(GOALS) <= set(PROBLEMS)


@pytest.mark.parametrize(
    "launches", [dict(forward=(16, 32, 4, 1), dq=(16, 32, 4, 1)), dict(dkv=(16, 32, 4, 1))], ids=str
)
def test_other_launches_compute_the_same(launches):
    "Forward and backward within the context; the table is as before when it ends, also by an error."
    shape, kw = CASES["2d"]
    arch, before = arch_of(torch.device(device_under_test())), dict(KERNEL_LAUNCH)
    op = partial(neighborhood_attention, **kw, return_lse=True, backend="triton")
    with trying_launches(16, launches, arch, 32):
        for kernel, fields in launches.items():
            assert kernel_launch(kernel, 32, 16, arch, (3, 5)) == Launch(*fields)
        check_against_reference(op, partial(dense, shape=shape, kw=kw), draw(shape, H=1), grad_tol=2e-5, floor=0.05)
    assert dict(KERNEL_LAUNCH) == before
    with pytest.raises(ZeroDivisionError), trying_launches(16, launches, arch, 32):
        1 / 0
    assert dict(KERNEL_LAUNCH) == before


def test_candidates():
    "Of problems and kernels there are; forward and dQ, which share tiles, change together."
    for case, others in LAUNCHES.items():
        for launches in others.values():
            assert case in TRIED and launches.keys() <= PRODUCTS.keys()
            assert launches.get("forward", (0, 0))[:2] == launches.get("dq", (0, 0))[:2]
            assert all(1 <= len(fields) - 3 <= 2 for fields in launches.values())


def made_up(name, *rows, **fields):
    "Rows of one GPU as a benchmark would have recorded them."
    same = dict(name=name, device="GPU one", date="2026-01-01T00:00:00+00:00", preset="gpu")
    return [same | fields | row for row in rows]


def natten_rows(*more, date="2026-01-01T00:00:00+00:00", **speed):
    "Rows of NATTEN's problems from one run, ours so many times faster than dense attention; `more` rows besides."
    of = {name.replace(" ", "_").replace(",", ""): name for name in NATTEN_H100}
    return [*more] + made_up(
        "natten",
        *(
            dict(case=of[n], method=method, ms_fwd=ms)
            for n, x in speed.items()
            for method, ms in (("ours", 1.0), ("cudnn dense", x))
        ),
        date=date,
    )


def window_rows(ms, peak=(100, 100), backward=(100, 100), dense=None):
    """Windows 3, 31, 63, 95 and 128 of 128 x 128 that compute twice the useful pairs; ms: time by computed share, both
    ways; peak memory of the first and of the last but one window; `dense`: times of dense attention, by window."""
    share = [(w / 128) ** 2 for w in (3, 31, 63, 95, 128)]
    ours = made_up(
        "windows",
        *(
            dict(
                w=w,
                useful=x,
                waste=2.0,
                ms_fwd=ms(2 * x),
                ms_bwd=ms(2 * x),
                peak_mb_fwd=peak[w == 95],
                peak_mb_bwd=backward[w == 95],
            )
            for w, x in zip((3, 31, 63, 95, 128), share)
        ),
        method="ours",
        batch=2,
        heads=8,
    )
    rows = made_up(
        "windows", *(dict(w=w, ms_fwd=x, ms_bwd=y) for w, (x, y) in (dense or {}).items()), method="cudnn dense"
    )
    return ours + rows


def problem_rows(**times):
    "Rows of the fixed problem p by each method, (forward, backward)."
    rows = (dict(case="p", method=m.replace("_", " "), ms_fwd=x, ms_bwd=y) for m, (x, y) in times.items())
    return made_up("problems", *rows)


def size_rows(ms):
    "A map of 128 x 128 with window 13."
    shape, (tile, brick) = (128, 128), kernel_tiles((128, 128), 13)
    share = 13**2 / 128**2
    pairs = share * tile_waste(shape, 13, q_tile=tile, block_n=brick, scheme="bricks")
    return made_up(
        "sizes",
        dict(N=128**2, window="13", useful=share, ms_fwd=ms(pairs)),
        method="ours",
        batch=1,
        heads=8,
        head_dim=64,
    )


def nat_rows(na, other, kind, date="2026-01-01T00:00:00+00:00", steps=9):
    "Accuracies of seeds, those of the second in another order."
    pairs = [("NA", i, x) for i, x in enumerate(na)] + [(kind, i, x) for i, x in reversed(list(enumerate(other)))]
    return made_up("nat", *(dict(kind=k, run=i, accuracy=x, steps=steps) for k, i, x in pairs), date=date)


linear, shifted, crooked = lambda x: 4 * x, lambda x: 1 + 4 * x, lambda x: (3 if x < 1.0 else 1) * (1 + 4 * x)


SAME = "The same with a fixed part"
moved = lambda *rows: made_up(
    "equivariance", *({"shift": i, "NA": a, "NA, dilation 2": b, "blocked": c} for i, (a, b, c) in enumerate(rows))
)
good = (0.90, 0.91, 0.92)
LATER = "2026-01-02T00:00:00+00:00"
TWO_RUNS = natten_rows(  # a later run of the plain problem with a faster kernel
    *natten_rows(FLUX_4K=4.0, FLUX_4K_stride_16=6.0), FLUX_4K=9.0, date=LATER
)
VERDICTS_ON_ROWS = {  # (a part of the claim's statement, verdict, which): rows
    ("where windows slide", "holds", 0): natten_rows(FLUX_4K=5.2, HunyuanVideo=3.4, FLUX_4K_stride_16=1.0),
    ("where windows slide", "holds in part", 0): natten_rows(FLUX_4K=4.2, HunyuanVideo=9.0),
    ("where windows slide", "does not hold here", 0): natten_rows(FLUX_4K=4.1, HunyuanVideo=9.0),
    ("where windows slide", "holds", 1): TWO_RUNS,
    ("where windows slide", "not measured", 0): natten_rows(FLUX_4K_stride_16=9.2),
    ("where a stride fills", "holds", 0): natten_rows(FLUX_4K_stride_16=9.2, FLUX_4K=0.1),
    ("where a stride fills", "does not hold here", 0): natten_rows(FLUX_4K_stride_16=7.3),
    ("where a stride fills", "not measured", 0): natten_rows(FLUX_4K=9.2),
    ("A stride that fills", "holds", 0): natten_rows(FLUX_4K=4.0, FLUX_4K_stride_16=6.0),
    ("A stride that fills", "holds in part", 0): natten_rows(FLUX_4K=4.0, FLUX_4K_stride_16=4.8),
    ("A stride that fills", "does not hold here", 0): natten_rows(FLUX_4K=4.0, FLUX_4K_stride_16=4.0),
    ("A stride that fills", "holds", 1): TWO_RUNS,  # not 6 of one run over 9 of the other
    ("A stride that fills", "not measured", 0): natten_rows(
        *natten_rows(FLUX_4K=4.0), FLUX_4K_stride_16=9.0, date=LATER
    ),
    ("at every window", "holds", 0): window_rows(lambda x: 1.0, dense={3: (1.1, 9), 95: (1.0, 9)}),
    ("at every window", "holds in part", 0): window_rows(lambda x: 1.0, dense={3: (1.1, 9), 95: (0.9, 9)}),
    ("at every window", "does not hold here", 0): window_rows(lambda x: 1.0, dense={3: (0.9, 9), 95: (0.9, 9)}),
    ("at every window", "not measured", 0): window_rows(lambda x: 1.0),
    ("The same, forward and", "holds", 0): window_rows(lambda x: 1.0, dense={3: (0.5, 1.5), 95: (9, 1)}),
    ("The same, forward and", "holds in part", 0): window_rows(lambda x: 1.0, dense={3: (0.5, 1.4), 95: (9, 1)}),
    ("The same, forward and", "does not hold here", 0): window_rows(lambda x: 1.0, dense={3: (1.9, 0)}),
    ("The same, forward and", "not measured", 0): [],
    ("than every peer", "holds", 0): problem_rows(ours=(1.0, 1.0), flex=(3.0, 0.1), flex_tiles=(0.1, 2.9)),
    ("than every peer", "does not hold here", 0): problem_rows(ours=(1.0, 1.0), flex=(9, 9), flex_tiles=(0.1, 1.8)),
    ("than every peer", "not measured", 0): problem_rows(ours=(1.0, 1.0)),
    ("constant memory", "holds", 0): window_rows(linear, (100, 104)),
    ("constant memory", "holds in part", 0): window_rows(linear, (100, 140)),
    ("constant memory", "does not hold here", 0): window_rows(linear, (100, 160)),
    ("constant memory", "does not hold here", 1): window_rows(linear, (160, 100)),
    ("constant memory", "does not hold here", 2): window_rows(linear, backward=(100, 160)),
    ("constant memory", "not measured", 0): [],
    ("Cost is paid", "holds", 0): window_rows(linear),
    ("Cost is paid", "holds in part", 0): window_rows(lambda x: 4 * x + 0.02 * (x < 0.01)),  # the smallest counts, too
    ("Cost is paid", "does not hold here", 0): window_rows(shifted),
    ("Cost is paid", "not measured", 0): [],
    (SAME, "holds", 0): window_rows(shifted) + size_rows(lambda x: shifted(x) / 2),  # half as many heads
    (SAME, "holds in part", 0): window_rows(shifted),
    (SAME, "holds in part", 1): window_rows(shifted) + size_rows(shifted),
    (SAME, "does not hold here", 0): window_rows(crooked),
    (SAME, "not measured", 0): [],
    ("equivariance", "holds", 0): moved((0.0, 0.0, 0.1)),
    ("equivariance", "holds in part", 0): moved((0.0, 0.1, 0.1)),
    ("equivariance", "holds in part", 1): moved((0.0, 0.0, 0.0)),
    ("equivariance", "holds in part", 2): moved((0.0, 0.0, 0.009)),
    ("equivariance", "does not hold here", 1): moved((2e-6, 0.0, 0.1)),
    ("equivariance", "does not hold here", 0): moved((0.0, 0.0, 0.1), (0.1, 0.0, 0.0)),
    ("equivariance", "not measured", 0): [],
    ("Swin-T", "holds", 0): nat_rows(good, (0.80, 0.81, 0.82), "shifted"),
    ("Swin-T", "not measured", 0): nat_rows(good, (0.89, 0.91, 0.91), "shifted"),  # undecided
    ("Swin-T", "not measured", 1): nat_rows(good[:2], (0.80, 0.81), "shifted"),  # two seeds only
    ("Swin-T", "not measured", 2): nat_rows(good, (0.80, 0.81, 0.82), "blocked"),  # another opponent
    ("Swin-T", "not measured", 3): nat_rows(good, (), "")
    + nat_rows((), (0.1, 0.1, 0.1), "shifted", date=LATER),  # other runs
    ("Swin-T", "holds", 2): nat_rows(good[:2], (0.80, 0.81), "shifted")
    + [r | dict(run=2) for r in nat_rows((0.9,), (0.81,), "shifted", date=LATER)],  # its seeds are of two runs
    ("Swin-T", "does not hold here", 0): nat_rows((0.80, 0.81, 0.82), good, "shifted"),
    ("Swin-T", "holds", 1): nat_rows(good, (0.8, 0.8, 0.8), "shifted") + nat_rows(good, (1, 1, 1), "shifted", steps=2),
    ("exchange nothing", "holds", 0): nat_rows(good, (0.80, 0.81, 0.82), "blocked"),
    ("exchange nothing", "does not hold here", 0): nat_rows((0.80, 0.81, 0.82), good, "blocked"),
    ("exchange nothing", "not measured", 0): nat_rows(good, (0.80, 0.81, 0.82), "shifted"),
    ("20, 28, 51, 90", "holds", 0): [],
}


def recorded(rows):
    "Makes the study read these rows as if they were on record: the newest of each problem and method, or every one."

    def found(name, every=False, **where):
        fits = [r for r in rows if r["name"] == name and all(r.get(n) == x for n, x in where.items())]
        what = lambda r: tuple(
            str(r.get(n)) for n in ("device", "case", "method", "w", "N", "kind", "run", "shift", "steps")
        )
        newest = {what(r): r for r in sorted(fits, key=lambda r: r["date"])}
        return fits if every else [r for r in fits if newest[what(r)] is r]

    return mock.patch.dict(natten_runs.__globals__, _rows=found)


@pytest.mark.parametrize("statement, verdict, which", VERDICTS_ON_ROWS)
def test_verdicts(statement, verdict, which):
    with recorded(VERDICTS_ON_ROWS[statement, verdict, which]):
        (claim,) = (c for c in claims() if statement in c.statement)
        assert claim.judge().verdict == verdict


def test_every_rule_is_tested():
    "Every claim that is judged appears above; that of the simulator has a test of its own."
    judged = [c.statement for c in claims() if c.measured is not None and c.measured is not _simulator_runs]
    assert all(any(part in s for part, *_ in VERDICTS_ON_ROWS) for s in judged) and len(judged) == 13


def test_parameters_to_half_a_million():
    (claim,) = (c for c in claims() if "20, 28, 51, 90" in c.statement)
    assert claim.rule([20.4, 27.6, 51.0, 90.0]) == "holds"
    assert claim.rule([20.6, 27.6, 51.0, 90.0])[0] == "holds in part"


def test_reasons_name_what_was_lost():
    "The windows at which dense attention wins, and what an earlier run gave."
    rows = window_rows(lambda x: 1.0, dense={3: (9.0, 9), 31: (1.0, 9), 95: (0.9, 9), 128: (0.5, 9)})
    with recorded(rows):
        (claim,) = (c for c in claims() if "at every window" in c.statement)
        assert claim.judge().reason.endswith("below 1x at w=95, w=128")
        assert [s.ratio for s in claim.judge().measured] == [9.0, 1.0, 0.9, 0.5]
    found = last_of_the_runs(
        [dict(largest=0.5, median=0.1), dict(largest=0.3, median=0.3), dict(largest=0.2, median=0.1)]
    )
    before = "before it: holds in part (largest 50%, median 10%), does not hold here (largest 30%, median 30%)"
    assert found == ("holds", f"after a change of the kernels; {before}")
    assert last_of_the_runs([dict(largest=0.2, median=0.1)]) == ("holds", "")


def test_runs_are_told_apart():
    "A gap of more than ten minutes separates runs; another device's rows count in none; an older run keeps its rows."
    row = lambda minute, **more: (
        dict(name="natten", case="1-D", method="ours", ms_fwd=1.0, device="B")
        | more
        | dict(date=f"2026-01-01T00:{minute:02}:00+00:00")
    )
    rows = [row(30, i=3), row(0, i=0), row(9, i=1), row(19, i=2), row(1, i=9, device="A")]
    rows += [row(19, i=2, method="cudnn dense", ms_fwd=7.0)]
    with recorded(rows):
        assert [[r["i"] for r in run] for run in _runs("natten")] == [[0, 1, 2, 2], [3]]
        assert natten_runs() == [{"1-D": 7.0}]  # of a problem measured more than once in a run the newest counts
    with recorded(TWO_RUNS):
        assert natten_runs() == [{"FLUX 4K": 4.0, "FLUX 4K, stride 16": 6.0}, {"FLUX 4K": 9.0}]
        assert [(s.where, s.ratio) for s in over_natten(_slides)] == [("FLUX 4K", 9 / 5.2)]
        assert [(s.where, s.ratio) for s in _stride_gains()] == [("FLUX 4K, stride 16", 1.5)]


def test_which_rows_have_strides():
    assert [n for n in NATTEN_H100 if _slides(n)] == ["1-D", "FLUX 4K", "HunyuanVideo"] == list(STRIDED.values())
    assert all(NATTEN_H100[a][:2] == NATTEN_H100[b][:2] and NATTEN_H100[a][2] != 1 for a, b in STRIDED.items())


def test_no_verdict_without_measurement():
    judged = {c.statement: c.judge() for c in claims() if c.measured is None}
    assert len(judged) == len(UNJUDGED) == 6
    assert {v.verdict for v in judged.values()} == {"out of reach here", "not measured"}
    assert all(v.reason for v in judged.values())


def test_simulator_claim():
    (claim,) = (c for c in claims() if c.measured is _simulator_runs)
    costs = StepCosts(2.5, 1.1, 0.47, 0.53, 2.3)
    predicted = [case for case in SIMULATED if case not in CALIBRATING.values()]
    slow = lambda cases, by: simulator_rows(costs, slower=dict.fromkeys(cases, by))
    verdict = lambda rows: claim.rule([_simulator_errors(rows)])[0]
    assert _simulator_errors([]) is None
    assert verdict(simulator_rows(costs)) == verdict(slow(predicted, 1.2)) == verdict(slow(predicted, 0.8)) == "holds"
    assert verdict(slow(predicted[:1], 1.3)) == verdict(slow(predicted[-1:], 0.7)) == "holds in part"
    assert verdict(slow(predicted, 1.3)) == verdict(slow(predicted, 0.7)) == "does not hold here"
    constant = [{**r, "ms_fwd": 0.05} for r in simulator_rows(costs)]  # no costs give such times
    assert verdict(constant) == "does not hold here" and _simulator_errors(constant)["median"] == math.inf


def test_times_of_two_gpus_do_not_mix():
    "The claims' helpers give for the rows of two GPUs what they give for those of the newer one alone."

    def rows(device, day, slow):
        row = lambda name, **fields: dict(name=name, device=device, date=f"2026-01-0{day}T00:00:00+00:00", **fields)
        for w in (3, 7, 15, 23, 95, 128):
            yield row(
                "windows",
                w=w,
                method="ours",
                ms_fwd=slow + w**slow,
                peak_mb_fwd=100 + slow * w,
                peak_mb_bwd=100 + slow * w,
                useful=w * w / 128**2,
                waste=2.0,
                batch=2,
                heads=8,
            )
        yield row(
            "sizes", N=128**2, method="ours", window="13", ms_fwd=slow, useful=0.01, batch=1, heads=8, head_dim=64
        )
        for case, method in product(("FLUX 4K", "FLUX 4K, stride 16"), ("ours", "cudnn dense")):
            yield row("natten", case=case, method=method, ms_fwd=1.0 if method == "ours" else 1 + slow * len(case))

    def measured(rows):
        with recorded(rows):
            return [
                f()
                for f in (
                    natten_runs,
                    _stride_gains,
                    _memory_growth,
                    _simulator_error,
                    _simulator_error_with_fixed_part,
                )
            ]

    old, new = [*rows("GPU one", 1, 2)], [*rows("GPU two", 2, 1.5)]
    assert None not in measured(new) and all(a != b for a, b in zip(measured(new), measured(old)))
    assert measured(old + new) == measured(new + old) == measured(new)
    assert measured(old + new[:6])[-1]["elsewhere"] == math.inf  # the newer GPU timed no other maps




def test_both_runs_of_the_simulator_are_told():
    costs, later = StepCosts(2.5, 1.1, 0.47, 0.53, 2.3), "2026-01-01T00:20:00+00:00"
    predicted = [case for case in SIMULATED if case not in CALIBRATING.values()]
    first = simulator_rows(costs, slower={predicted[0]: 1.5})
    rows = [dict(name="simulator") | r for r in first + simulator_rows(costs, date=later)]
    with recorded(rows):
        (claim,) = (c for c in claims() if c.measured is _simulator_runs)
        found = claim.judge()
    assert found.verdict == "holds" and "before it: holds in part (largest 50%, median 0%)" in found.reason
    assert [round(e["largest"], 6) for e in found.measured] == [0.5, 0.0]
    with recorded([]):
        assert _simulator_runs() is None
