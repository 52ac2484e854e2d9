# Written from the test cells of nbs/5_vision/ulsam.ipynb by `attnbook export`. Do not edit.
# fmt: off
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnbook.lab.stats import Interval
from attnbook.lab.testing import (
    check_against_reference,
    check_autocast,
    check_compiles,
    check_deterministic,
    check_gradients,
    check_opcheck,
    check_raises,
    check_writes_everything,
    evaluate,
    rel_error,
)
from attnbook.lab.testing import device as device_under_test
from attnbook.layers import count_parameters
from attnbook.ulsam.kernels import PLANE_LAUNCH, PlaneLaunch, plane_launches
from attnbook.ulsam.nets import (
    PUBLISHED_REPLACED,
    ULSAM,
    Bottleneck,
    add_ulsam,
    mobilenet_v1,
    mobilenet_v1_small,
    mobilenet_v2,
    mobilenet_v2_small,
    multiply_adds,
    replace_blocks,
    replaced_cost,
    ulsam_mobilenet_v1,
    ulsam_mobilenet_v2,
)
from attnbook.ulsam.op import _LAUNCHES, subspace_attention, subspace_op
from attnbook.ulsam.reference import subspace_attention_reference, ulsam_parameter_count
from attnbook.ulsam.study import CANDIDATES, _difference, _faster, _of_floor, _peaks, claims, official_loop, vectorised
from attnbook.ulsam.training_study import (
    FONTS,
    NETS,
    _maps_row,
    font_data,
    map_statistics,
    net_experiments,
    small_net,
    subspace_maps,
)

BACKENDS = ("torch", "triton")
SIZES = {  # name -> (B, C, H, W), subspaces
    "one pixel": ((2, 6, 1, 1), 3),
    "one row": ((1, 4, 1, 7), 2),
    "7x7": ((2, 6, 7, 7), 1),
    "odd": ((1, 10, 5, 6), 2),
    "each channel": ((1, 3, 4, 3), 3),
    "one map": ((2, 9, 3, 5), 1),
}


def draw(size, dtype=torch.float32, seed=0, rounded=False):
    "x, dw_weight and pw_weight on the device under test; `rounded`: x full of ties."
    g = torch.Generator().manual_seed(seed)
    make = lambda *s: torch.randn(s, generator=g, dtype=torch.float64)
    x = make(*size).mul(2).round() if rounded else make(*size)
    tensors = [t.to(device_under_test(), dtype) for t in (x, make(size[1]), make(size[1]))]
    return dict(zip(("x", "dw_weight", "pw_weight"), tensors))


@pytest.mark.parametrize("relu", [False, True], ids=["equations", "code"])
def test_reference_gradients(relu):
    i = draw((2, 6, 4, 5), torch.float64)
    more = dict(dw_bias=i["dw_weight"].flip(0), pw_bias=i["pw_weight"][:3], relu=True) if relu else {}

    def both(**inputs):
        return subspace_attention_reference(**inputs, num_subspaces=3, relu=relu, return_maps=True)

    check_gradients(both, i | {k: t for k, t in more.items() if k != "relu"})


def one_by_one(x, dw_weight, pw_weight, num_subspaces):
    "Convolutions and concatenation, subspace by subspace."
    out = []
    for part, w, v in zip(x.chunk(num_subspaces, 1), dw_weight.chunk(num_subspaces), pw_weight.chunk(num_subspaces)):
        d = F.conv2d(part, w[:, None, None, None], groups=len(w))
        a = F.conv2d(F.max_pool2d(d, 3, 1, 1), v[None, :, None, None])
        a = a.flatten(2).softmax(2).view_as(a)
        out.append(a * part + part)
    return torch.cat(out, 1)


@pytest.mark.parametrize("case", SIZES)
def test_reference_is_the_loop(case):
    size, g = SIZES[case]
    i = draw(size, torch.float64)
    torch.testing.assert_close(subspace_attention_reference(**i, num_subspaces=g), one_by_one(**i, num_subspaces=g))


def run(backend):
    return partial(subspace_attention, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_maps_sum_to_one(backend):
    y, maps = run(backend)(**draw((2, 6, 5, 6)), num_subspaces=2, return_maps=True)
    assert maps.shape == (2, 2, 5, 6) and (maps > 0).all() and y.shape == (2, 6, 5, 6)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 2, device=maps.device))
    ones = run(backend)(**(draw((1, 6, 5, 6)) | dict(x=torch.ones(1, 6, 5, 6, device=maps.device))), num_subspaces=2)
    torch.testing.assert_close(ones, torch.full_like(ones, 1 + 1 / 30))  # a constant: the map is uniform


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_not_zero(backend):
    "All features are negative: zeros around the map would win every window at the border."
    i = draw((1, 2, 3, 3))
    i |= dict(x=-1 - i["x"].abs(), dw_weight=i["dw_weight"] * 0 + 1, pw_weight=i["pw_weight"] * 0)
    i["pw_weight"][0] = 1
    _, maps = run(backend)(**i, num_subspaces=1, return_maps=True)
    x = i["x"][0, 0]
    logits = torch.stack([x[max(0, y - 1) : y + 2, max(0, c - 1) : c + 2].max() for y in range(3) for c in range(3)])
    torch.testing.assert_close(maps[0, 0].flatten(), logits.softmax(0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place, count", [((2, 2), 9), ((0, 0), 4), ((0, 3), 6)], ids=["inside", "corner", "edge"])
def test_a_bright_pixel_is_a_plateau(place, count, backend):
    x = torch.zeros(1, 1, 5, 6, device=device_under_test())
    x[0, 0][place] = 1.0
    one = torch.ones(1, device=x.device)
    _, maps = run(backend)(x, one, one, 1, return_maps=True)
    high = maps[0, 0] > maps.min() * 2
    assert int(high.sum()) == count and high[place] and abs(float(maps.max() / maps.min()) - math.e) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_subspaces_are_apart(backend):
    "Changing one changes no other; one map for all is another function; channels of a subspace may trade places."
    i = draw((1, 8, 4, 5))
    y, z = run(backend)(**i, num_subspaces=4), run(backend)(**i, num_subspaces=1)
    changed = run(backend)(**(i | dict(x=torch.cat([i["x"][:, :2] * 3, i["x"][:, 2:]], 1))), num_subspaces=4)
    assert torch.equal(changed[:, 2:], y[:, 2:]) and not torch.equal(changed[:, :2], 3 * y[:, :2])
    assert rel_error(z, y) > 1e-3
    order = torch.tensor([1, 0, 2, 3, 5, 4, 6, 7], device=y.device)
    other = run(backend)(i["x"][:, order], i["dw_weight"][order], i["pw_weight"][order], 4)
    torch.testing.assert_close(other, y[:, order])


VARIANTS = {  # name -> what differs from the equations
    "equations": {},
    "code": dict(relu=True, biases=True),
    "relu": dict(relu=True),
    "bias": dict(dw=True),
    "gate": dict(gate_scale=30.0),
    "5x5": dict(pool_size=5),
    "1x1": dict(pool_size=1),
}


def variant(name, i, g):
    "Inputs and options of a variant."
    options = dict(VARIANTS[name])
    biases, dw = options.pop("biases", False), options.pop("dw", False)
    more = dict(dw_bias=i["dw_weight"].flip(0) / 2) if biases or dw else {}
    more |= dict(pw_bias=i["pw_weight"][:g] / 2) if biases else {}
    return i | more, options | dict(num_subspaces=g, return_maps=True)


def check_kernel(i, options, **more):
    "Outputs and gradients of the Triton backend against the reference in float64."
    fix = lambda f, **kw: lambda **inputs: f(**inputs, **options, **kw)
    ours, reference = fix(subspace_attention, backend="triton"), fix(subspace_attention_reference)
    return check_against_reference(ours, reference, i, **more)


@pytest.mark.parametrize("case", SIZES)
def test_sizes(case):
    size, g = SIZES[case]
    check_kernel(*variant("equations", draw(size), g))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("parts", [False, True], ids=["one pass", "parts"])
def test_variants(name, parts, monkeypatch):
    if parts:
        monkeypatch.setitem(plane_launches.__globals__, "ONE_PASS", (0, 0, 0))
        monkeypatch.setattr(_LAUNCHES, "kept", {})  # what other tests decided
    floor = 1.0 if name == "bias" else 0.0  # a bias before a softmax has no gradient
    check_kernel(*variant(name, draw((1, 4, 5, 4)), 2), grad_tol=3e-5, floor=floor)


@pytest.mark.parametrize("parts", [False, True], ids=["one pass", "parts"])
@pytest.mark.parametrize("layout", ["last", "sliced", "strided", "expanded"])
def test_layouts(layout, parts, monkeypatch):
    if parts:
        monkeypatch.setitem(plane_launches.__globals__, "ONE_PASS", (0, 0, 0))
        monkeypatch.setattr(_LAUNCHES, "kept", {})  # what other tests decided
    i = draw((2, 3, 3, 4))
    want = evaluate(partial(subspace_attention, backend="torch", num_subspaces=1), i)
    x = i["x"]
    made = dict(
        last=lambda: x.contiguous(memory_format=torch.channels_last),
        sliced=lambda: torch.stack([x, x * math.nan], 1)[:, 0],
        strided=lambda: torch.stack([x, x * math.nan], -1)[..., 0],
        expanded=lambda: x[:1].expand(2, -1, -1, -1),
    )
    i["x"] = made[layout]()
    if layout == "expanded":
        want = evaluate(partial(subspace_attention, backend="torch", num_subspaces=1), i)
    got = evaluate(partial(subspace_attention, backend="triton", num_subspaces=1), i)
    assert rel_error(got[0][0], want[0][0]) < 1e-5
    for name, d in want[1].items():
        assert rel_error(got[1][name], d) < 1e-5, name
    if layout == "last":
        y = subspace_attention(i["x"], i["dw_weight"], i["pw_weight"], 1, backend="triton")
        assert y.is_contiguous(memory_format=torch.channels_last) and got[0][0].shape == want[0][0].shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_types(dtype):
    check_kernel(*variant("equations", draw((1, 4, 5, 7), dtype), 2), grad_tol=1.5e-2)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize(
    "size, pool", [((3, 48, 14, 14), 5), ((3, 48, 14, 14), 7), ((2, 32, 56, 56), 5), ((3, 48, 14, 14), 3)], ids=str
)
@pytest.mark.cuda
def test_wide_windows_on_a_gpu(size, pool, last):
    i = draw(size, torch.bfloat16)
    i["x"] = i["x"].contiguous(memory_format=torch.channels_last) if last else i["x"]
    check_kernel(i, dict(num_subspaces=4, pool_size=pool, return_maps=True), grad_tol=2e-2)


@pytest.mark.parametrize("what", ["rounded", "constant", "zero weights", "all negative", "relu"])
def test_ties(what):
    i = draw((1, 4, 4, 5), rounded=True)
    if what == "constant":
        i["x"] = torch.ones_like(i["x"])
    if what == "zero weights":
        i["dw_weight"] = i["dw_weight"] * torch.tensor([0.0, 1, 0, 1], device=i["x"].device)
    if what == "all negative":
        i["dw_weight"] = -i["dw_weight"].abs()
    check_kernel(i, dict(num_subspaces=2, return_maps=True, relu=what == "relu"), floor=0.1)


def test_small_changes():
    "Logits moved together move nothing; without a pointwise weight the map is uniform; one pixel doubles."
    i = draw((1, 4, 4, 4))
    y = subspace_attention(**(i | dict(pw_weight=torch.zeros_like(i["pw_weight"]))), num_subspaces=2, backend="triton")
    torch.testing.assert_close(y, i["x"] * (1 + 1 / 16))
    one = i | dict(x=i["x"][..., :1, :1])
    torch.testing.assert_close(subspace_attention(**one, num_subspaces=4, backend="triton"), 2 * one["x"])
    huge = i | dict(pw_weight=i["pw_weight"] * 1e4)
    y, maps = subspace_attention(**huge, num_subspaces=2, backend="triton", return_maps=True)
    assert y.isfinite().all() and float(maps.max()) > 0.3 and rel_error(maps.sum((2, 3)), torch.ones(1, 2)) < 1e-6


@pytest.mark.parametrize("relu", [False, True], ids=["equations", "code"])
def test_manners(relu):
    i, options = variant("code" if relu else "equations", draw((1, 4, 3, 4)), 2)
    op = lambda **inputs: subspace_attention(**inputs, **options, backend="triton")
    for check in (check_writes_everything, check_deterministic, check_autocast, *[check_compiles] * (not relu)):
        check(op, i)


@pytest.mark.parametrize("relu", [False, True], ids=["equations", "code"])
def test_opcheck(relu):
    i, _ = variant("code" if relu else "equations", draw((1, 2, 2, 3)), 2)
    args = [i["x"], i["dw_weight"], i["pw_weight"], i.get("dw_bias"), i.get("pw_bias")]
    check_opcheck(subspace_op, [*(t if t is None else t.requires_grad_() for t in args), 2, 3, relu, 1.0, True])


def test_what_is_kept():
    "x itself, the maps and a byte for each window; in inference no bytes."
    i = {k: t.requires_grad_() for k, t in draw((2, 8, 4, 4)).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        subspace_attention(**i, num_subspaces=2, backend="triton")
    assert sum(t.nbytes for t in kept) <= sum(t.nbytes for t in i.values()) + 2 * 2 * 16 * 4 + i["x"].numel()
    assert not any(t.dtype == torch.int64 for t in kept)


def test_empty():
    i = draw((0, 4, 3, 3))
    assert subspace_attention(**i, num_subspaces=2, backend="triton").shape == (0, 4, 3, 3)


def test_bad_input():
    i = draw((1, 6, 4, 5))
    x, w = i["x"], i["dw_weight"]
    check_raises(
        subspace_attention,
        [
            (dict(num_subspaces=4), ValueError, ("num_subspaces", "6")),
            (dict(num_subspaces=0), ValueError, "num_subspaces"),
            (dict(num_subspaces=2.0), TypeError, "num_subspaces"),
            (dict(pool_size=2), ValueError, ("pool_size", "odd")),
            (dict(pool_size=0), ValueError, "pool_size"),
            (dict(pool_size=True), TypeError, "pool_size"),
            (dict(dw_weight=w[:4]), ValueError, ("dw_weight", "6")),
            (dict(pw_weight=w[:, None]), ValueError, "pw_weight"),
            (dict(pw_weight=w.long()), TypeError, "pw_weight"),
            (dict(x=x[0]), ValueError, "x must"),
            (dict(x=x.int()), TypeError, "x must"),
            (dict(dw_weight=None), TypeError, "dw_weight"),
            (dict(dw_bias=w[:2]), ValueError, "dw_bias"),
            (dict(pw_bias=w[:3]), ValueError, "pw_bias"),
            (dict(relu=1), TypeError, "relu"),
            (dict(gate_scale="1"), TypeError, "gate_scale"),
            (dict(gate_scale=math.inf), ValueError, "gate_scale"),
            (dict(backend="cuda"), ValueError, "backend"),
            (dict(pool_size=9, backend="triton"), ValueError, "pool_size"),
        ],
        **i,
        num_subspaces=3,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm, count", [(None, 128), ("batch", 332)], ids=["equations", "code"])
def test_module(norm, count, backend):
    torch.manual_seed(0)
    layer = ULSAM(64, 4, norm=norm, backend=backend).to(device_under_test())
    assert count_parameters(layer) == count == ulsam_parameter_count(64, 4, norm)
    assert layer.no_weight_decay() == {"dw_weight", "pw_weight"}
    x = torch.randn(1, 64, 3, 4, device=device_under_test(), requires_grad=True)
    y, maps = layer(x, return_maps=True)
    y.square().mean().backward()
    assert y.shape == x.shape and maps.shape == (1, 4, 3, 4) and x.grad.isfinite().all()
    assert all(p.grad is not None for p in layer.parameters()) and "num_subspaces=4" in repr(layer)
    area = ULSAM(64, 4, norm=norm, gate_scale="area", backend=backend).to(x.device)
    area.load_state_dict(layer.state_dict())
    assert abs(float(area(torch.ones_like(x)).detach().mean()) - 2) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_folds(backend):
    "In evaluation one call does what batch norms with the running statistics do."
    torch.manual_seed(1)
    layer = ULSAM(12, 3, norm="batch", backend=backend).to(device_under_test())
    for _ in range(3):
        layer(torch.randn(4, 12, 5, 4, device=device_under_test()) * 2 + 1)
    for n in (layer.dw_norm, layer.pw_norm):
        torch.nn.init.normal_(n.weight), torch.nn.init.normal_(n.bias)
    x = torch.randn(1, 12, 4, 3, device=device_under_test())
    layer.eval()
    out, maps = layer(x, return_maps=True)
    _, want = layer._trained(x)  # batch norms of a module in evaluation
    assert rel_error(maps, want) < 1e-5 and rel_error(out, x * (1 + want.repeat_interleave(4, 1))) < 1e-5


def test_inert_parameters():
    "What batch norm takes away gets no gradient: both biases, and the scale of the depthwise weight."
    torch.manual_seed(0)
    layer, x = ULSAM(8, 2, norm="batch", gate_scale="area").double(), torch.randn(4, 8, 5, 5).double()
    with torch.no_grad():
        layer.dw_weight.copy_(layer.dw_weight.sign())  # at 0.01 batch norm's epsilon is not small
    layer(x).square().sum().backward()
    size = float(layer.pw_weight.grad.norm())
    assert float(layer.dw_bias.grad.norm()) < 1e-9 * size and float(layer.pw_bias.grad.norm()) < 1e-9 * size
    assert float(layer.dw_weight.grad.norm()) < 1e-3 * size
    assert layer.dw_norm.momentum == 0.1 and ULSAM(4, 2, norm="batch", momentum=0.9).pw_norm.momentum == 0.9


def test_module_refuses():
    check_raises(
        ULSAM,
        [
            (dict(num_subspaces=3), ValueError, "num_subspaces"),
            (dict(channels=0), ValueError, "channels"),
            (dict(norm="layer"), ValueError, "norm"),
            (dict(gate_scale="wide"), TypeError, "gate_scale"),
            (dict(norm=1), TypeError, "norm"),
        ],
        channels=8,
    )
    with pytest.raises(ValueError, match="x must have shape"):
        ULSAM(8)(torch.randn(1, 4, 3, 3))


def on_meta(make):
    with torch.device("meta"):
        return make()


def test_published_counts():
    v1, v2 = on_meta(mobilenet_v1), on_meta(mobilenet_v2)
    assert (count_parameters(v1), multiply_adds(v1)) == (4_231_976, 568_740_352)
    assert (count_parameters(v2), multiply_adds(v2)) == (3_504_872, 300_774_272)
    assert round(multiply_adds(v1) / 1e6) == 569 and round(count_parameters(v1) / 1e6, 1) == 4.2
    net = on_meta(lambda: add_ulsam(mobilenet_v1(), [11, 13], 4))  # 512 on 14 x 14, 1024 on 7 x 7
    assert multiply_adds(net) - multiply_adds(v1) == 200_704 + 2 * 1024 * 49
    net = on_meta(lambda: add_ulsam(mobilenet_v2(), [16], 4))
    assert multiply_adds(net) - multiply_adds(v2) == 2 * 160 * 49


@pytest.mark.parametrize("widths", PUBLISHED_REPLACED, ids=str)
def test_published_replacements(widths):
    found, want = replaced_cost(widths), PUBLISHED_REPLACED[widths]
    assert abs(found[0] - want[0]) < 0.006 and abs(found[1] - want[1]) < 0.02


def test_replaced_layers_of_v1():
    "One of the five layers of 512 channels: 266,752 weights and 2,048 numbers of its batch norms go, 1,024 come."
    v1, net = on_meta(mobilenet_v1), on_meta(lambda: replace_blocks(mobilenet_v1(), [9], 4))
    assert count_parameters(v1) - count_parameters(net) == 266_752 + 2_048 - 1_024
    assert round(multiply_adds(net) / 1e6) == 517 and int(count_parameters(net) / 1e5) == 39


@pytest.mark.parametrize(
    "width, published", [(1.0, (569, 517, 3.9)), (0.75, (325, 296, 2.4)), (0.5, (149, 136, 1.2))], ids=str
)
def test_published_widths_of_v1(width, published):
    "Multiply-adds before and after the replacement, and parameters after it; at half width only what follows from the formula."
    v1, net = (on_meta(lambda f=f: f(width=width)) for f in (mobilenet_v1, ulsam_mobilenet_v1))
    assert tuple(round(multiply_adds(n) / 1e6) for n in (v1, net)) == published[:2]
    assert int(count_parameters(net) / 1e5) / 10 == published[2]


def test_smallest_network_of_v2():
    net = on_meta(ulsam_mobilenet_v2)
    assert [i for i, b in enumerate(net.blocks, 1) if isinstance(b, ULSAM)] == [12, 13, 15, 16]
    assert [b.channels for b in net.blocks if isinstance(b, ULSAM)] == [96, 96, 160, 160]
    assert abs(multiply_adds(net) / 1e6 - 223.77 - 0.774) < 0.01, "300.77 M, which the paper calls 300"


@pytest.mark.parametrize("position, c, area", [(8, 64, 196), (12, 96, 196), (15, 160, 49)])
def test_bottlenecks_of_v2(position, c, area):
    v2, net = on_meta(mobilenet_v2), on_meta(lambda: replace_blocks(mobilenet_v2(), [position], None))
    assert count_parameters(v2) - count_parameters(net) == 12 * c * c + 54 * c + 26 * c
    assert multiply_adds(v2) - multiply_adds(net) == (12 * c * c + 54 * c) * area


def test_positions():
    for bad in ([0], [14], [2], [6, 6], [1.5]):
        with pytest.raises((ValueError, TypeError), match="positions"):
            replace_blocks(on_meta(mobilenet_v1), bad, 4)
    with pytest.raises(ValueError, match="num_subspaces"):
        replace_blocks(on_meta(mobilenet_v2), [12], 5)
    net = replace_blocks(replace_blocks(on_meta(mobilenet_v2_small), [5], 2), [7], None)
    assert [type(b).__name__ for b in net.blocks] == ["Bottleneck"] * 4 + ["ULSAM", "Bottleneck", "Identity"]


def test_residuals():
    "A bottleneck adds its input where shapes allow, and only there."
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6)
    for block, added in ((Bottleneck(4, 4), x), (Bottleneck(4, 6), 0), (Bottleneck(4, 4, 2), 0)):
        torch.testing.assert_close(block.eval()(x), block.layers(x) + added)


def test_counting_leaves_the_mode():
    net = mobilenet_v1_small().train()
    total = multiply_adds(net, 16)
    assert net.training and total == multiply_adds(net.eval(), 16) and not net.training


@pytest.mark.parametrize("make", [mobilenet_v1_small, mobilenet_v2_small], ids=lambda f: f.__name__)
def test_small_networks(make):
    torch.manual_seed(0)
    net = add_ulsam(make(5, 1), [3], 4, norm="batch").to(device_under_test())
    out = net(torch.randn(2, 1, 16, 16, device=device_under_test()))
    out.square().mean().backward()
    assert out.shape == (2, 5) and all(p.grad is not None for p in net.parameters())


SIGNS = (Interval(1.0, 0.5, 5), Interval(0.1, 0.5, 5), Interval(-1.0, 0.5, 5))
VERDICTS_OF = {  # claim -> made-up measurements and their verdicts
    "ULSAM added": (SIGNS, ("holds", "not measured", "does not hold here")),
    "Several maps": (SIGNS, ("holds", "not measured", "does not hold here")),
    "ULSAM can replace": (
        (Interval(0.1, 0.3, 5), Interval(-0.4, 0.3, 5), Interval(-1.0, 0.3, 5)),
        ("holds", "not measured", "does not hold here"),
    ),
    "ULSAM in place": (SIGNS, ("holds", "not measured", "does not hold here")),
    "Trained maps": ((4.0, 2.0, 1.0), ("holds", "holds in part", "does not hold here")),
    "The kernel is faster": (
        [{"a": x, "b": 9.0} for x in (5.0, 2.0, 1.9)],
        ("holds", "holds in part", "does not hold here"),
    ),
    "It is faster": (
        [{"a": a, "b": b} for a, b in ((1.0, 2.0), (0.9, 2.0), (0.9, 0.8))],
        ("holds", "holds in part", "does not hold here"),
    ),
    "It runs near": (
        [{"a": a, "b": b} for a, b in ((0.6, 0.9), (0.5, 0.9), (0.5, 0.1))],
        ("holds", "holds in part", "does not hold here"),
    ),
    "The module has": (
        (
            {"parameters": 1024, "multiply-adds": 200_704},
            {"parameters": 1024, "multiply-adds": 0},
            {"parameters": 1, "multiply-adds": 1},
        ),
        ("holds", "holds in part", "does not hold here"),
    ),
}


@pytest.mark.parametrize("claim", VERDICTS_OF)
def test_rules(claim):
    (rule,) = (c.rule for c in claims() if c.statement.startswith(claim))
    measured, verdicts = VERDICTS_OF[claim]
    found = [rule(m) for m in measured]
    assert tuple(f if isinstance(f, str) else f[0] for f in found) == verdicts


def _recorded(monkeypatch, **tables):
    "Makes the study read these rows (table -> rows) as if they were recorded."

    def read(chapter, name=None, **where):
        rows = [dict(device="G", date="2026-01-01", versions={}, preset="gpu") | r for r in tables.get(name, [])]
        return [r for r in rows if all(r.get(k) == v for k, v in where.items())]

    monkeypatch.setitem(_difference.__globals__, "load_results", read)


def test_differences_are_looked_up(monkeypatch):
    "Paired by seed, in points, of the longest runs of the gpu preset; three seeds at least."
    row = lambda net, run, accuracy, **more: dict(net=net, run=run, accuracy=accuracy, steps=600) | more
    rows = [row(net, i, x + i / 100) for net, x in (("replace 4", 0.9), ("identity", 0.88)) for i in range(3)]
    rows += [row("plain", i, 0.9) for i in range(2)]
    rows += [row("identity", 0, 0.1, steps=60), row("identity", 1, 0.1, preset="cpu")]
    _recorded(monkeypatch, nets=rows)
    found = _difference("nets", ("replace 4",), "identity")
    assert found.mean == pytest.approx(2.0) and found.n == 3 and found.half < 1e-6
    assert _difference("nets", ("replace 4",), "plain") is None and _difference("fonts", ("add 1",), "plain") is None
    assert _difference("nets", ("replace 4", "identity"), "identity").mean == pytest.approx(1.0)


def test_speed_is_looked_up(monkeypatch):
    row = lambda method, B, fwd, bwd: dict(method=method, B=B, C=8, H=14, g=4, layout="first", ms_fwd=fwd, ms_bwd=bwd)
    nets = [dict(net="add 4", after=[dict(peak=3.0), dict(peak=5.0)]), dict(net="add 4, area", after=[dict(peak=99.0)])]
    batch = [row("ours", 256, 1.0, 1.5), row("vectorised", 256, 4.0, 6.0), row("official loop", 256, 8.0, 9.0)]
    bound = [
        dict(B=b, H=h, layout="first", ms_fwd=f, ms_bwd=0.75)
        for b, h, f in ((256, 14, 0.5), (1, 14, 9.0), (256, 7, 9.0))
    ]
    _recorded(monkeypatch, batch=batch, nets=nets, bound=bound)
    assert [s.ratio for s in _faster("batch", "ms_fwd")] == [4.0] and _faster("stages", "ms_fwd") is None
    assert [s.ratio for s in _faster("batch", ("ms_fwd", "ms_bwd"), ("official loop",))] == [6.8]
    assert _of_floor() == pytest.approx({"first, fwd": 0.5, "first, bwd": 0.5}) and _peaks() == 4.0


def test_nothing_recorded_is_not_measured(monkeypatch):
    _recorded(monkeypatch)
    verdicts = [c.judge().verdict for c in claims()]
    assert verdicts == ["holds", "holds"] + ["not measured"] * 13 + ["out of reach here"] * 2


def test_map_statistics():
    torch.manual_seed(0)
    net = nn.Sequential(ULSAM(4, 2), ULSAM(4, 1))
    with torch.no_grad():
        net[0].pw_weight.zero_(), net[1].pw_weight.fill_(100.0), net[1].dw_weight.fill_(1.0)
    x = torch.zeros(2, 4, 6, 6)
    x[:, :, 2, 2] = 1.0
    flat, peaked = map_statistics(net, x)
    assert flat["dead"] == 1 and flat["peak"] == pytest.approx(1) and flat["entropy"] == pytest.approx(1)
    assert peaked["peak"] == pytest.approx(36 / 9, rel=1e-3) and peaked["dead"] == 0 and peaked["likeness"] is None
    assert peaked["entropy"] == pytest.approx(math.log(9) / math.log(36), rel=1e-3) and len(flat["frequency"]) == 2
    assert map_statistics(net, x * torch.tensor([1.0, 0])[:, None, None, None])[1]["peak"] == pytest.approx(
        2.5, rel=1e-3
    )
    with torch.no_grad():
        net[0].pw_weight.copy_(torch.tensor([1.0, 1, 1, 1])), net[0].dw_weight.fill_(1.0)
    assert map_statistics(net, x)[0]["likeness"] == pytest.approx(1)


def test_data():
    x, y, tx, ty = font_data(train=2, test=1)
    assert x.shape == (42, 1, 32, 32) and tx.shape == (21, 1, 32, 32) and len(FONTS) == 21
    assert torch.equal(y, torch.arange(21).repeat_interleave(2)) and torch.equal(ty, torch.arange(21))
    assert abs(float(x.mean())) < 1e-4 and not torch.equal(x[0], x[1])


@pytest.mark.parametrize("name", NETS)
def test_small_nets(name):
    how, g, options = NETS[name]
    layers = [m for m in small_net(name).modules() if isinstance(m, ULSAM)]
    assert [m.num_subspaces for m in layers] == [g] * (2 if g else 0)
    assert len(small_net(name).blocks) == 7 and [m.channels for m in layers] == ([48, 64] if g else [])
    few = count_parameters(small_net("identity")) + sum(count_parameters(m) for m in layers)
    assert (count_parameters(small_net(name)) == few) == (how == "replace")


def test_training_is_paired():
    "Networks of a seed see the same batches whatever trains beside them; accuracy is that of the test images."
    torch.manual_seed(0)
    y = torch.arange(24) % 2
    x = torch.randn(24, 1, 16, 16) + 4 * y[:, None, None, None]
    data, options = (x, y, -x, y), dict(steps=3, batch=8, seed=1, device=device_under_test())
    (a, net), (b, _) = net_experiments([("add 4, area", data), ("plain", data)], **options)
    ((alone, _),) = net_experiments([("plain", data)], **options)
    assert (alone["loss"], alone["run"], b["before"], b["after"]) == (b["loss"], 1, [], []) and a["loss"] != b["loss"]
    right = (net(-x.to(options["device"])).argmax(-1).cpu() == y).double().mean()
    assert a["accuracy"] == pytest.approx(float(right)) and a["before"] != a["after"] and not net.training
    maps = subspace_maps(net, x.to(options["device"]))
    assert maps.shape == (24, 4, 4, 4) and torch.allclose(maps.mean((2, 3)), torch.ones_like(maps[:, :, 0, 0]))
    row = _maps_row(net, data, options["device"])
    assert len(row["pictures"]) == len(row["maps"]) == 4 and len(bytes.fromhex(row["pictures"][0])) == 256
    assert np.allclose(
        row["maps"][1][2], subspace_maps(net, -x[6:7].to(options["device"]))[0, 2].flatten().cpu(), atol=6e-3
    )


def test_candidates_are_launches():
    "Of every kernel and layout, and none is the table's own."
    assert {kernel + ", last" * last for kernel, last in CANDIDATES} == set(PLANE_LAUNCH.kernels)
    for (kernel, last), entries in CANDIDATES.items():
        own = PLANE_LAUNCH.find("sm90", kernel + ", last" * last, 16, 256)
        assert own not in [PlaneLaunch(*e) for e in entries] and own.tile >= 16


def test_peers_agree():
    i = draw((2, 8, 5, 4), torch.float64)
    want = subspace_attention_reference(**i, num_subspaces=2)
    for peer in (official_loop, vectorised):
        torch.testing.assert_close(peer(**i, num_subspaces=2), want)
